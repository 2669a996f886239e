//! The desired state of the service plane on one node: plain data, comparable,
//! serialisable. [`verdict`](crate::verdict) says what it means.

use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

use imbl::{OrdMap, OrdSet};
use ipnet::IpNet;
use serde::{Serialize, Serializer};

/// Every service address of the cluster, the endpoints behind it, and what has
/// to be known of the node.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct ServiceTable {
    /// What a packet may be addressed to.
    pub frontends: OrdMap<Frontend, Target>,
    /// What the frontends lead to, by [`Target::service`].
    pub services: OrdMap<ServiceName, Arc<Service>>,
    /// The cluster IPs. A port of theirs without a frontend is rejected.
    pub cluster_ips: OrdSet<IpAddr>,
    /// `healthCheckNodePort`s of this node, by port.
    pub health_checks: OrdMap<u16, Arc<HealthCheck>>,
    /// The node it is for.
    pub node: Arc<Node>,
}

/// The destination of a packet before translation. As text
/// `10.0.0.1:80/tcp`, or `node-port:30080/tcp+ipv4`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Frontend {
    /// The address; unspecified (`0.0.0.0` or `::`) for [`Scope::NodePort`].
    pub address: IpAddr,
    /// The port; not 0.
    pub port: u16,
    /// The transport.
    pub protocol: Protocol,
    /// What `address` stands for.
    pub scope: Scope,
}

/// What the address of a [`Frontend`] stands for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Scope {
    /// Itself. Looked up first.
    Address,
    /// Every address of [`Node::addresses`] that serves node ports, of its family.
    NodePort,
}

impl Frontend {
    /// `address` itself.
    pub fn new(address: SocketAddr, protocol: Protocol) -> Frontend {
        Frontend { address: address.ip(), port: address.port(), protocol, scope: Scope::Address }
    }

    /// A port of the node's own addresses.
    pub fn node_port(family: Family, port: u16, protocol: Protocol) -> Frontend {
        Frontend { address: family.unspecified(), port, protocol, scope: Scope::NodePort }
    }
}

impl std::fmt::Display for Frontend {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Frontend { address, port, protocol, scope } = self;
        match scope {
            Scope::Address => write!(f, "{}/{protocol}", SocketAddr::new(*address, *port)),
            Scope::NodePort => write!(f, "node-port:{port}/{protocol}+{}", Family::of(*address)),
        }
    }
}

impl Serialize for Frontend {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

/// IPv4 or IPv6.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize)]
#[serde(rename_all = "lowercase")]
#[allow(missing_docs)] // the variants are their names
pub enum Family {
    Ipv4,
    Ipv6,
}

impl Family {
    /// Both.
    pub const ALL: [Family; 2] = [Family::Ipv4, Family::Ipv6];

    /// That of `address`.
    pub fn of(address: IpAddr) -> Family {
        if address.is_ipv4() { Family::Ipv4 } else { Family::Ipv6 }
    }

    /// `0.0.0.0` or `::`.
    pub fn unspecified(self) -> IpAddr {
        match self {
            Family::Ipv4 => std::net::Ipv4Addr::UNSPECIFIED.into(),
            Family::Ipv6 => std::net::Ipv6Addr::UNSPECIFIED.into(),
        }
    }
}

impl std::fmt::Display for Family {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Family::Ipv4 => "ipv4",
            Family::Ipv6 => "ipv6",
        })
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

impl std::fmt::Display for Protocol {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Protocol::Tcp => "tcp",
            Protocol::Udp => "udp",
            Protocol::Sctp => "sctp",
        })
    }
}

/// Where a frontend leads.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Target {
    /// A key of [`ServiceTable::services`].
    pub service: ServiceName,
    /// Which of the Service's addresses it is, and so which of its policies apply.
    pub role: Role,
}

/// Which address of a Service a frontend is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Role {
    /// `spec.clusterIPs`: the internal traffic policy.
    ClusterIp,
    /// `spec.externalIPs`: the external traffic policy.
    ExternalIp,
    /// `status.loadBalancer.ingress`: the external traffic policy and the source ranges.
    LoadBalancer,
    /// `spec.ports[].nodePort`: the external traffic policy.
    NodePort,
}

/// One port of a Kubernetes Service in one address family, as kube-proxy
/// counts them: session affinity is its own. As text
/// `namespace/name:port/tcp+ipv4`; `port` is the port's name, or its number if
/// it has none.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ServiceName {
    /// `namespace/name:port`
    pub name: Arc<str>,
    /// The transport.
    pub protocol: Protocol,
    /// The family.
    pub family: Family,
}

impl std::fmt::Display for ServiceName {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}/{}+{}", self.name, self.protocol, self.family)
    }
}

impl Serialize for ServiceName {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

/// What new connections to a service port get. Established ones stay where they are.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Service {
    /// For traffic policy `Cluster`, after topology; sorted by address, each
    /// once. Empty if nothing uses that policy.
    pub cluster: EndpointSet,
    /// For traffic policy `Local`: those on this node. Empty if nothing uses
    /// that policy.
    pub local: EndpointSet,
    /// Whether any node has an endpoint that may be used: without one traffic
    /// is rejected, with one that policy keeps away it is dropped.
    pub has_endpoints: bool,
    /// `internalTrafficPolicy: Local`
    #[serde(skip_serializing_if = "is_false")]
    pub internal_local: bool,
    /// `externalTrafficPolicy: Local`
    #[serde(skip_serializing_if = "is_false")]
    pub external_local: bool,
    /// For how many seconds after its last new connection a client address
    /// keeps its endpoint; 1 to 86,400.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub affinity: Option<u32>,
    /// Who may use its [`Role::LoadBalancer`] frontends; `None` is everybody.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub source_ranges: Option<Arc<[IpNet]>>,
    /// How one of the set is chosen.
    #[serde(skip_serializing_if = "Algorithm::is_default")]
    pub algorithm: Algorithm,
}

fn is_false(value: &bool) -> bool {
    !value
}

/// Endpoints, sorted by address, each once; at most [`MAX_ENDPOINTS`].
pub type EndpointSet = Arc<[Endpoint]>;

/// The count of a set is a 16-bit field of its commit word.
pub const MAX_ENDPOINTS: usize = u16::MAX as usize;

/// Where a connection may end.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Endpoint {
    /// Of the Service's family.
    pub address: SocketAddr,
    /// Its share; 1 unless the Service says otherwise.
    pub weight: u16,
}

impl Serialize for Endpoint {
    /// `10.0.0.1:80`, or `10.0.0.1:80 weight 3`.
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match self.weight {
            1 => serializer.collect_str(&self.address),
            weight => serializer.collect_str(&format_args!("{} weight {weight}", self.address)),
        }
    }
}

/// How one of several endpoints is chosen for a new connection.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Algorithm {
    /// Each alike, as kube-proxy.
    #[default]
    Random,
    /// In turn.
    RoundRobin,
    /// By [`Endpoint::weight`].
    Weighted,
    /// The one with fewer open connections, of two.
    LeastConnections,
    /// By the client's address.
    SourceHash,
    /// By the client's address and port; few move when the set changes.
    Maglev,
}

impl Algorithm {
    fn is_default(&self) -> bool {
        *self == Algorithm::default()
    }
}

/// A `healthCheckNodePort`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct HealthCheck {
    /// The Service's namespace.
    pub namespace: Arc<str>,
    /// The Service's name.
    pub name: Arc<str>,
    /// Addresses of this node with a ready endpoint of it; terminating ones do not count.
    pub local_endpoints: usize,
}

/// What the service plane has to know of the node it runs on.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Node {
    /// The node's own addresses, and whether each serves node ports.
    pub addresses: BTreeMap<IpAddr, bool>,
    /// Whose traffic is not from outside: kube-proxy's `detectLocalMode`.
    /// Without any, every client that is not the node itself is outside.
    pub pod_networks: Vec<IpNet>,
    /// Where cluster IPs come from; an address of these that no Service has is dropped.
    pub service_networks: Vec<IpNet>,
    /// Masquerade all traffic to cluster IPs.
    pub masquerade_all: bool,
}
