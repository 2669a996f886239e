//! The seam to the kernel: what is read from maps at start, and every single
//! write to them.

use std::net::{IpAddr, SocketAddr};

use ipnet::IpNet;
use lockgate_ebpf_common::{
    Address, Allowed, Endpoint, Frontend, FrontendKey, Service, SetWord, Slot, SourceRange, mapped,
};

mod fake;

pub use fake::{FakeMaps, FaultyMaps, Lookup, State};

/// A write that was not done, or at most in part.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum MapError {
    /// The map has no room.
    #[error("map {0} is full")]
    Full(&'static str),
    /// The kernel refused.
    #[error("writing to map {0}: {1}")]
    Refused(&'static str, String),
}

/// Room of the arrays, in elements.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(missing_docs)] // the fields are the maps
pub struct Capacity {
    pub services: u32,
    pub slots: u32,
    pub endpoints: u32,
}

/// One of the two sets of a Service.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(missing_docs)] // the variants are the fields of Service
pub enum Which {
    Cluster,
    Local,
}

impl Which {
    /// Both.
    pub const ALL: [Which; 2] = [Which::Cluster, Which::Local];
}

/// The maps of the service plane. Writes happen in the order of the calls, each
/// visible to programs when the next one is.
pub trait Maps {
    /// Room of the arrays; what lies beyond is never passed.
    fn capacity(&self) -> Capacity;
    /// All frontends.
    fn frontends(&self) -> Result<Vec<(FrontendKey, Frontend)>, MapError>;
    /// All source ranges with their prefix lengths.
    fn source_ranges(&self) -> Result<Vec<(u32, SourceRange, Allowed)>, MapError>;
    /// All addresses of the node with their flags.
    fn node_addresses(&self) -> Result<Vec<(Address, u32)>, MapError>;
    /// One element.
    fn service(&self, index: u32) -> Service;
    /// One element.
    fn slot(&self, index: u32) -> Slot;
    /// One element.
    fn endpoint(&self, index: u32) -> Endpoint;
    /// What programs counted, by its name; nothing where there are no programs.
    fn events(&self) -> Result<Vec<(&'static str, u64)>, MapError> {
        Ok(Vec::new())
    }

    /// A whole element that no frontend names.
    fn write_service(&mut self, index: u32, service: &Service) -> Result<(), MapError>;
    /// Flags, affinity timeout and algorithm of an element, each a store of its own.
    fn write_settings(&mut self, index: u32, service: &Service) -> Result<(), MapError>;
    /// The commit: one aligned 8-byte store after everything written before.
    fn commit(&mut self, index: u32, which: Which, word: SetWord) -> Result<(), MapError>;
    /// A run that no word names.
    fn write_slots(&mut self, base: u32, slots: &[Slot]) -> Result<(), MapError>;
    /// A whole element that no slot names, or one of which only flags change.
    fn write_endpoint(&mut self, index: u32, endpoint: &Endpoint) -> Result<(), MapError>;
    /// [`Endpoint::sets`] of an element.
    fn write_sets(&mut self, index: u32, sets: u8) -> Result<(), MapError>;
    /// Adds or replaces one.
    fn put_frontend(&mut self, key: &FrontendKey, value: &Frontend) -> Result<(), MapError>;
    /// Removes one; one that is absent is no error.
    fn remove_frontend(&mut self, key: &FrontendKey) -> Result<(), MapError>;
    /// Adds or replaces one.
    fn put_source_range(&mut self, prefix: u32, range: &SourceRange, value: Allowed) -> Result<(), MapError>;
    /// Removes one; one that is absent is no error.
    fn remove_source_range(&mut self, prefix: u32, range: &SourceRange) -> Result<(), MapError>;
    /// Adds or replaces one.
    fn put_node_address(&mut self, address: &Address, flags: u32) -> Result<(), MapError>;
    /// Removes one; one that is absent is no error.
    fn remove_node_address(&mut self, address: &Address) -> Result<(), MapError>;
}

/// `address` as the maps have it.
pub fn address(address: IpAddr) -> Address {
    match address {
        IpAddr::V4(address) => mapped(address.octets()),
        IpAddr::V6(address) => address.octets(),
    }
}

/// The address and port that an element of `ENDPOINTS` holds.
pub fn socket_address(endpoint: &Endpoint) -> SocketAddr {
    let address = std::net::Ipv6Addr::from(endpoint.address);
    let address = address.to_ipv4_mapped().map_or(IpAddr::V6(address), IpAddr::V4);
    SocketAddr::new(address, u16::from_be_bytes(endpoint.port))
}

/// `network` as a key of `SOURCE_RANGES` for the Service `index`.
pub fn source_range(index: u32, network: &IpNet) -> (u32, SourceRange) {
    let prefix = u32::from(network.prefix_len()) + if network.addr().is_ipv4() { 32 + 96 } else { 32 };
    (prefix, SourceRange { service: index.to_be_bytes(), address: address(network.network()) })
}
