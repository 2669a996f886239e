//! What becomes of a new connection: kube-proxy's verdict matrix as a pure
//! function of the [`ServiceTable`]. The kernel half does the same on maps; its
//! tests compare it with this.

use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

use crate::table::{
    Endpoint, Family, Frontend, Node, Protocol, Role, Scope, Service, ServiceName, ServiceTable, Target,
};

/// Who opens a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Client {
    /// Its address.
    pub address: IpAddr,
    /// From where it comes.
    pub origin: Origin,
}

/// From where a connection comes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Origin {
    /// The node's own network namespace.
    Node,
    /// A Pod, as far as [`Node::pod_networks`] tells.
    Pod,
    /// Elsewhere.
    Outside,
}

/// What becomes of a new connection.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Verdict<'a> {
    /// It is for no Service: left as it is.
    Pass,
    /// It goes to one of `endpoints`.
    Forward {
        /// The service port.
        name: &'a ServiceName,
        /// Its settings: affinity, algorithm.
        service: &'a Arc<Service>,
        /// Which set.
        set: Set,
        /// Its members; never empty.
        endpoints: &'a [Endpoint],
        /// The endpoint sees the node's address rather than the client's.
        /// Whatever this says, so it does if the client is the endpoint.
        masquerade: bool,
    },
    /// Answered with ICMP port unreachable, or `ECONNREFUSED`.
    Reject(Reason),
    /// Not answered.
    Drop(Reason),
}

/// One of a [`Service`]'s two sets.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(missing_docs)] // the variants are the fields of Service
pub enum Set {
    Cluster,
    Local,
}

/// Why a connection is not forwarded.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Reason {
    /// No node has an endpoint.
    NoEndpoints,
    /// Its policy is `Local`, and there are endpoints, but not on this node.
    NoLocalEndpoints,
    /// Its client is in none of `loadBalancerSourceRanges`.
    SourceRanges,
    /// A cluster IP without such a port.
    NoSuchPort,
    /// An address of the Service network that no Service has.
    NoSuchService,
}

impl std::fmt::Display for Reason {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Reason::NoEndpoints => "no node has a usable endpoint",
            Reason::NoLocalEndpoints => "the traffic policy is Local and this node has no usable endpoint",
            Reason::SourceRanges => "the client is in none of the Service's loadBalancerSourceRanges",
            Reason::NoSuchPort => "the cluster IP has no such port",
            Reason::NoSuchService => "no Service has this address of the Service network",
        })
    }
}

impl Node {
    /// `address` as a client of this node.
    pub fn client(&self, address: IpAddr) -> Client {
        let origin = if address.is_loopback() || self.addresses.contains_key(&address) {
            Origin::Node
        } else if self.pod_networks.iter().any(|network| network.contains(&address)) {
            Origin::Pod
        } else {
            Origin::Outside
        };
        Client { address, origin }
    }
}

impl ServiceTable {
    /// The frontend of a packet to `destination`: an address before a node port.
    pub fn find(&self, destination: SocketAddr, protocol: Protocol) -> Option<(Frontend, &Target)> {
        let exact = Frontend::new(destination, protocol);
        if let Some(target) = self.frontends.get(&exact) {
            return Some((exact, target));
        }
        if self.node.addresses.get(&destination.ip()) != Some(&true) {
            return None;
        }
        let shared = Frontend::node_port(Family::of(destination.ip()), destination.port(), protocol);
        Some((shared, self.frontends.get(&shared)?))
    }

    /// What becomes of a new connection of `client` to `destination`.
    pub fn verdict(&self, client: Client, destination: SocketAddr, protocol: Protocol) -> Verdict<'_> {
        let Some((frontend, target)) = self.find(destination, protocol) else {
            return self.without_frontend(destination.ip());
        };
        debug_assert!(frontend.scope == Scope::NodePort || frontend.address == destination.ip());
        let Some(service) = self.services.get(&target.service) else { return Verdict::Pass };
        match target.role {
            Role::ClusterIp => self.internal(client, &target.service, service),
            role => self.external(client, role, &target.service, service),
        }
    }

    fn without_frontend(&self, address: IpAddr) -> Verdict<'_> {
        if self.cluster_ips.contains(&address) {
            return Verdict::Reject(Reason::NoSuchPort);
        }
        match self.node.service_networks.iter().any(|network| network.contains(&address)) {
            true => Verdict::Drop(Reason::NoSuchService),
            false => Verdict::Pass,
        }
    }

    fn internal<'a>(&self, client: Client, name: &'a ServiceName, service: &'a Arc<Service>) -> Verdict<'a> {
        let outside = client.origin == Origin::Outside && !self.node.pod_networks.is_empty();
        let masquerade = self.node.masquerade_all || outside;
        let set = if service.internal_local { Set::Local } else { Set::Cluster };
        forward(name, service, set, masquerade)
    }

    fn external<'a>(
        &self,
        client: Client,
        role: Role,
        name: &'a ServiceName,
        service: &'a Arc<Service>,
    ) -> Verdict<'a> {
        // Before anything else, as kube-proxy does it before DNAT.
        if role == Role::LoadBalancer
            && let Some(ranges) = &service.source_ranges
            && !ranges.iter().any(|range| range.contains(&client.address))
        {
            return Verdict::Drop(Reason::SourceRanges);
        }
        match (service.external_local, client.origin) {
            (false, _) => forward(name, service, Set::Cluster, true),
            // Pods and the node itself need no load balancer to find a node with endpoints.
            (true, Origin::Pod) => forward(name, service, Set::Cluster, false),
            (true, Origin::Node) => forward(name, service, Set::Cluster, true),
            (true, Origin::Outside) => forward(name, service, Set::Local, false),
        }
    }
}

fn forward<'a>(name: &'a ServiceName, service: &'a Arc<Service>, set: Set, masquerade: bool) -> Verdict<'a> {
    let endpoints = match set {
        Set::Cluster => &*service.cluster,
        Set::Local => &*service.local,
    };
    if !endpoints.is_empty() {
        return Verdict::Forward { name, service, set, endpoints, masquerade };
    }
    match service.has_endpoints {
        true => Verdict::Drop(Reason::NoLocalEndpoints),
        false => Verdict::Reject(Reason::NoEndpoints),
    }
}

impl std::fmt::Display for Verdict<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Verdict::Pass => f.write_str("pass"),
            Verdict::Reject(reason) => write!(f, "reject: {reason}"),
            Verdict::Drop(reason) => write!(f, "drop: {reason}"),
            Verdict::Forward { name, set, endpoints, masquerade, .. } => {
                let set = if *set == Set::Local { "local" } else { "cluster" };
                write!(f, "{name} {set}")?;
                for endpoint in *endpoints {
                    write!(f, " {}", endpoint.address)?;
                }
                f.write_str(if *masquerade { ", masqueraded" } else { "" })
            }
        }
    }
}

#[cfg(test)]
mod tests;
