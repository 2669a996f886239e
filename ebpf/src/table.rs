//! The desired state of the service plane: plain data, comparable, serialisable.

use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

use imbl::OrdMap;
use serde::Serialize;

/// Every service address and the endpoints behind it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ServiceTable {
    /// By what a packet carries.
    pub services: OrdMap<ServiceKey, Arc<Service>>,
}

impl Serialize for ServiceTable {
    /// Keys as text (`10.0.0.1:80/tcp`), so that every format can hold them.
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_map(self.services.iter().map(|(key, service)| (key.to_string(), service)))
    }
}

/// The destination of a packet before translation.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ServiceKey {
    /// The cluster IP.
    pub address: IpAddr,
    /// The Service's port.
    pub port: u16,
    /// The transport.
    pub protocol: Protocol,
}

impl std::fmt::Display for ServiceKey {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let protocol = match self.protocol {
            Protocol::Tcp => "tcp",
            Protocol::Udp => "udp",
            Protocol::Sctp => "sctp",
        };
        write!(f, "{}/{protocol}", SocketAddr::new(self.address, self.port))
    }
}

/// A transport protocol.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize)]
#[serde(rename_all = "snake_case")]
#[allow(missing_docs)] // the variants are their names
pub enum Protocol {
    Tcp,
    Udp,
    Sctp,
}

/// One port of a Kubernetes Service.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Service {
    /// `namespace/name:port`, for logs and metrics.
    pub name: Arc<str>,
    /// Those that may receive new connections, sorted, each once, of the key's
    /// address family.
    pub endpoints: Vec<SocketAddr>,
}
