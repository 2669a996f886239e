//! One Service to its frontends and sets.

use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

use ipnet::IpNet;
use lockgate_ebpf::table::{
    self, Algorithm, Endpoint, EndpointSet, Family, Frontend, HealthCheck, MAX_ENDPOINTS, Role, ServiceName,
    Target,
};

use super::categorize::{self, Candidate, Uses, View, categorize};
use super::{Made, NodeOptions, is_external, own_node};
use crate::objects::{Notice, Protocol, Service, ServiceKind, ServicePort, Via};
use crate::store::{Key, Store};
use crate::translate::endpoints::Index;

/// How the service plane chooses among a Service's endpoints.
pub(in crate::translate) const ALGORITHM: &str = "lockgate.io/service-algorithm";

/// What `service` puts into the table.
pub(super) fn service(
    key: &Key,
    service: &Service,
    options: &NodeOptions,
    store: &Store,
    index: &Index,
) -> Made {
    let mut made = Made::default();
    if is_skipped(service, options) {
        return made;
    }
    made.owner = Some((service.meta.created.unwrap_or(i64::MAX), key.clone()));
    let node = own_node(options, store);
    let view = View { node: &options.name, zone: node.and_then(|node| node.zone.as_deref()) };
    let own = super::node(options, store);
    let algorithm = algorithm(service, &mut made.notices);
    let mut maker =
        Maker { key, service, options, made, view, node: &own, algorithm, local: BTreeMap::new() };
    maker.warn();
    let mut candidates = Vec::new();
    for (at, port) in service.ports.iter().enumerate() {
        candidates.clear();
        index.candidates(store, service, port, &mut |candidate| candidates.push(candidate));
        for family in Family::ALL {
            maker.port(at, port, family, &candidates);
        }
    }
    maker.health_check();
    maker.made
}

/// The endpoints of `name` that its set leaves out, each with the reason. At the cost of the store.
pub(super) fn left_out(
    name: &ServiceName,
    is_local: bool,
    options: &NodeOptions,
    store: &Store,
) -> Vec<(SocketAddr, String)> {
    let service_of = |(key, service): (&Key, &Arc<Service>)| {
        let shown = name.name.strip_prefix(&format!("{key}:"))?.to_owned();
        let port = service
            .ports
            .iter()
            .find(|port| protocol(port.protocol) == name.protocol && label(port) == shown);
        Some((service.clone(), port?.clone()))
    };
    let Some((service, port)) = store.services.iter().find_map(service_of) else { return Vec::new() };
    let index = Index::of_service(&service, store);
    let mut candidates = Vec::new();
    index.candidates(store, &service, &port, &mut |candidate| candidates.push(candidate));
    candidates.retain(|one| Family::of(one.address.ip()) == name.family);
    let zone = own_node(options, store).and_then(|node| node.zone.as_deref());
    categorize::left_out(&candidates, View { node: &options.name, zone }, is_local)
}

/// What stands for a port in the name of a service port.
fn label(port: &ServicePort) -> String {
    if port.name.is_empty() { port.port.to_string() } else { port.name.to_string() }
}

/// kube-proxy's `ShouldSkipService`.
fn is_skipped(service: &Service, options: &NodeOptions) -> bool {
    service.exposure.proxy_name != options.proxy_name
        || service.exposure.headless
        || service.kind == ServiceKind::ExternalName
        || service.addresses.is_empty()
}

struct Maker<'a> {
    key: &'a Key,
    service: &'a Service,
    options: &'a NodeOptions,
    view: View<'a>,
    node: &'a table::Node,
    algorithm: Algorithm,
    made: Made,
    /// Addresses of ready endpoints on this node, for the health check.
    local: BTreeMap<IpAddr, ()>,
}

impl Maker<'_> {
    fn warn(&mut self) {
        let exposure = &self.service.exposure;
        if !exposure.external_ips.is_empty() && !self.options.external_ips {
            self.made.notices.push(Notice::warning(
                ".spec.externalIPs",
                "not served: whoever may write a Service could take over any address with it (CVE-2020-8554)",
                "use a LoadBalancer, or start the node agent with --enable-external-ips",
            ));
        }
        if exposure.via == Via::ClusterIp {
            for (at, _) in self.service.ports.iter().enumerate().filter(|(_, port)| port.node_port.is_some())
            {
                let field = format!(".spec.ports[{at}].nodePort");
                let message = "a Service of type ClusterIP has no node ports: ignored";
                self.made.notices.push(Notice::warning(field, message, "set type to NodePort"));
            }
        }
    }

    /// The addresses of the Service in `family`, with the fields they are written in.
    fn addresses(&self, family: Family) -> Vec<(IpAddr, Role, &'static str)> {
        let exposure = &self.service.exposure;
        let balanced = (exposure.via == Via::LoadBalancer).then_some(&exposure.load_balancer_ips);
        let external = self.options.external_ips.then_some(&exposure.external_ips);
        let cluster = self.service.addresses.iter().map(|one| (*one, Role::ClusterIp, ".spec.clusterIPs"));
        // Before external IPs: its source ranges hold if one address is both.
        let balanced = balanced.into_iter().flatten();
        let balanced = balanced.map(|one| (*one, Role::LoadBalancer, ".status.loadBalancer.ingress"));
        let external = external.into_iter().flatten();
        let external = external.map(|one| (*one, Role::ExternalIp, ".spec.externalIPs"));
        cluster.chain(balanced).chain(external).filter(|(one, ..)| Family::of(*one) == family).collect()
    }

    fn port(&mut self, at: usize, port: &ServicePort, family: Family, candidates: &[Candidate<'_>]) {
        let addresses = self.addresses(family);
        // No cluster IP of the family, and nothing else of it either.
        if addresses.iter().all(|(_, role, _)| is_external(*role)) {
            return;
        }
        let shown = label(port);
        let protocol = protocol(port.protocol);
        let name = ServiceName { name: format!("{}:{shown}", self.key).into(), protocol, family };
        if self.made.services.contains_key(&name) {
            let field = format!(".spec.ports[{at}].name");
            let message = format!("another port of the Service is called {shown:?}: this one is ignored");
            return self.made.notices.push(Notice::error(field, message, "give each port its own name"));
        }
        let target = |role| Target { service: name.clone(), role };
        let mut external = false;
        for (address, role, field) in addresses {
            external |= is_external(role);
            if role == Role::ClusterIp {
                self.made.cluster_ips.insert(address);
            }
            let frontend = Frontend::new(SocketAddr::new(address, port.port), protocol);
            self.made.frontends.entry(frontend).or_insert_with(|| (target(role), field.to_owned()));
        }
        if let Some(number) = port.node_port.filter(|_| self.service.exposure.via != Via::ClusterIp) {
            external = true;
            let frontend = Frontend::node_port(family, number, protocol);
            let field = format!(".spec.ports[{at}].nodePort");
            self.made.frontends.entry(frontend).or_insert((target(Role::NodePort), field));
        }
        let made = self.sets(at, family, external, candidates);
        self.made.services.insert(name, made);
    }

    fn sets(
        &mut self,
        at: usize,
        family: Family,
        external: bool,
        candidates: &[Candidate<'_>],
    ) -> table::Service {
        let exposure = &self.service.exposure;
        let external_local = exposure.external_local && external;
        let of_family: Vec<Candidate<'_>> =
            candidates.iter().filter(|one| Family::of(one.address.ip()) == family).copied().collect();
        let here =
            of_family.iter().filter(|one| one.ready && one.node.is_some_and(|own| **own == *self.view.node));
        self.local.extend(here.map(|one| (one.address.ip(), ())));
        let uses = Uses {
            cluster: !exposure.internal_local || external,
            local: exposure.internal_local || external_local,
        };
        let sets = categorize(&of_family, self.view, uses);
        let longest = sets.cluster.len().max(sets.local.len());
        if longest > MAX_ENDPOINTS {
            let message = format!("port has {longest} endpoints: the first {MAX_ENDPOINTS} are used");
            let remedy = "spread the Pods over several Services";
            self.made.notices.push(Notice::error(format!(".spec.ports[{at}]"), message, remedy));
        }
        table::Service {
            cluster: set(&sets.cluster),
            local: set(&sets.local),
            has_endpoints: sets.has_endpoints,
            internal_local: exposure.internal_local,
            external_local,
            affinity: exposure.affinity,
            source_ranges: source_ranges(self.service, family, self.node),
            algorithm: self.algorithm,
        }
    }

    fn health_check(&mut self) {
        let exposure = &self.service.exposure;
        if exposure.via != Via::LoadBalancer || !exposure.external_local {
            return;
        }
        let Some(port) = exposure.health_check_port else { return };
        let check = HealthCheck {
            namespace: self.key.namespace.clone(),
            name: self.key.name.clone(),
            local_endpoints: self.local.len(),
        };
        self.made.check = Some((port, check));
    }
}

fn set(addresses: &[SocketAddr]) -> EndpointSet {
    addresses.iter().take(MAX_ENDPOINTS).map(|address| Endpoint { address: *address, weight: 1 }).collect()
}

/// Ranges of the other family do not restrict this one, as in kube-proxy. If one
/// holds an address of the node, the node may come: its packets to the
/// load balancer's address have just that as their source.
fn source_ranges(service: &Service, family: Family, node: &table::Node) -> Option<Arc<[IpNet]>> {
    let written = service.exposure.source_ranges.as_ref()?;
    let mut ranges: Vec<IpNet> =
        written.iter().filter(|range| Family::of(range.addr()) == family).copied().collect();
    if ranges.is_empty() && !written.is_empty() {
        return None;
    }
    if node.addresses.keys().any(|own| ranges.iter().any(|range| range.contains(own))) {
        let own = service.exposure.load_balancer_ips.iter().filter(|one| Family::of(**one) == family);
        ranges.extend(own.map(|one| IpNet::from(*one)));
    }
    Some(ranges.into())
}

fn algorithm(service: &Service, notices: &mut Vec<Notice>) -> Algorithm {
    let Some(written) = service.annotations.get(ALGORITHM) else { return Algorithm::default() };
    let at_random = |what: &str| {
        let message = format!("{what}: until then endpoints are chosen at random");
        Notice::warning(format!(".metadata.annotations[{ALGORITHM:?}]"), message, "use maglev or round_robin")
    };
    // Beside our names those of IPVS, whose users come from there.
    match &**written {
        "random" => Algorithm::Random,
        "round_robin" | "rr" => Algorithm::RoundRobin,
        "weighted" | "wrr" => {
            notices.push(at_random("nothing says the weights of endpoints yet"));
            Algorithm::Weighted
        }
        "least_connections" | "lc" => {
            notices.push(at_random("the kernel half does not count connections yet"));
            Algorithm::LeastConnections
        }
        "source_hash" | "sh" => Algorithm::SourceHash,
        "maglev" | "mh" => Algorithm::Maglev,
        other => {
            notices.push(Notice::error(
                format!(".metadata.annotations[{ALGORITHM:?}]"),
                format!("{other:?} is unknown: endpoints are chosen at random"),
                "use random, round_robin, weighted, least_connections, source_hash or maglev",
            ));
            Algorithm::default()
        }
    }
}

fn protocol(protocol: Protocol) -> table::Protocol {
    match protocol {
        Protocol::Tcp => table::Protocol::Tcp,
        Protocol::Udp => table::Protocol::Udp,
        Protocol::Sctp => table::Protocol::Sctp,
    }
}
