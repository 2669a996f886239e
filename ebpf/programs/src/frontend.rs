//! Is this address a Service's? The only place that reads `FRONTENDS`.

use lockgate_ebpf_common::{
    Address, Event, Frontend, FrontendKey, Service, Settings, kind, node_address, protocol, scope, service,
};

use crate::maps::{FRONTENDS, NODE_ADDRESSES, SERVICES, SETTINGS, count};

/// An address as `bpf_sock_addr` has it: four words in network byte order, IPv4 mapped.
pub type Words = [u32; 4];

/// Third word of a mapped IPv4 address.
pub const MAPPED: u32 = 0xffff_u32.to_be();

/// What a destination means.
#[must_use]
pub enum Found {
    /// Not ours.
    Nothing,
    /// A Service's address, but nothing is served there.
    UnknownPort,
    /// An address of this Service.
    Service(Use),
}

/// A Service as one of its addresses shows it.
#[derive(Clone, Copy)]
pub struct Use {
    /// Its element of `SERVICES`.
    pub service: *const Service,
    /// Its index there.
    pub index: u32,
    /// Its generation when the frontend was written.
    pub generation: u16,
    /// Of [`service`].
    pub flags: u32,
    /// One of [`kind`].
    pub kind: u8,
}

impl Use {
    /// The set for clients on this node and in its Pods: external addresses short-circuit to the cluster's.
    #[inline(always)]
    pub fn local_inside(&self) -> bool {
        self.kind == kind::CLUSTER_IP && self.flags & service::INTERNAL_LOCAL != 0
    }
}

/// Looks up a destination; `port` in network byte order. `of_node` says whether the client is the node's own
/// network namespace.
#[inline(always)]
pub fn find(address: Words, port: [u8; 2], protocol: u8, of_node: impl FnOnce(&Settings) -> bool) -> Found {
    let mut key = FrontendKey { address: bytes(address), port, protocol, scope: scope::ADDRESS };
    if let Some(frontend) = frontend(&key) {
        return resolve(frontend);
    }
    if let Some(frontend) = node_port(address, &mut key, of_node) {
        return resolve(frontend);
    }
    key = FrontendKey { address: bytes(address), port: [0; 2], protocol: 0, scope: scope::CLUSTER_ADDRESS };
    if frontend(&key).is_some() { Found::UnknownPort } else { Found::Nothing }
}

#[inline(always)]
fn node_port(
    address: Words,
    key: &mut FrontendKey,
    of_node: impl FnOnce(&Settings) -> bool,
) -> Option<Frontend> {
    let settings = SETTINGS.get(0)?;
    let port = u16::from_be_bytes(key.port);
    if port < settings.node_port_first || port > settings.node_port_last {
        return None;
    }
    // SAFETY: without preallocation an element is freed a grace period after it left the map, and this program
    // runs inside one; the value is one word.
    let flags = unsafe { *NODE_ADDRESSES.get(&key.address)? };
    if flags & node_address::NODE_PORTS == 0 || (flags & node_address::NODE_ONLY != 0 && !of_node(settings)) {
        return None;
    }
    let any = if is_mapped(address) { [0, 0, MAPPED, 0] } else { [0; 4] };
    key.address = bytes(any);
    key.scope = scope::NODE_PORT;
    frontend(key)
}

#[inline(always)]
fn frontend(key: &FrontendKey) -> Option<Frontend> {
    // SAFETY: as in `node_port`; values are replaced as a whole element.
    unsafe { FRONTENDS.get(key).copied() }
}

#[inline(always)]
fn resolve(frontend: Frontend) -> Found {
    let Some(service) = SERVICES.get_ptr(frontend.service) else {
        count(Event::StaleFrontend);
        return Found::Nothing;
    };
    // SAFETY: the verifier knows the pointer as a value of the map. User space may write at any time, so each
    // field is read once.
    let (generation, flags) = unsafe {
        ((&raw const (*service).generation).read_volatile(), (&raw const (*service).flags).read_volatile())
    };
    if generation != frontend.generation {
        count(Event::StaleFrontend);
        return Found::Nothing;
    }
    Found::Service(Use { service, index: frontend.service, generation, flags, kind: frontend.kind })
}

/// Whether `address` is a mapped IPv4 address.
#[inline(always)]
pub fn is_mapped(address: Words) -> bool {
    address[0] == 0 && address[1] == 0 && address[2] == MAPPED
}

/// The protocol number of the maps for that of a socket; none for those we do not balance at sockets.
#[inline(always)]
pub fn balanced(socket_protocol: u32) -> Option<u8> {
    /// Multipath TCP has a number of its own, above those of IP headers.
    const MPTCP: u32 = 262;
    const TCP: u32 = protocol::TCP as u32;
    const UDP: u32 = protocol::UDP as u32;
    match socket_protocol {
        TCP | MPTCP => Some(protocol::TCP),
        UDP => Some(protocol::UDP),
        _ => None,
    }
}

/// `address` as the maps have it.
#[inline(always)]
pub fn bytes(address: Words) -> Address {
    // SAFETY: both are 16 bytes without padding or invalid values; the words are in network byte order, so
    // their bytes are as the maps have them.
    unsafe { core::mem::transmute(address) }
}
