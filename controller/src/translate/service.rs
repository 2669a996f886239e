//! Services to entries for the service plane: kube-proxy's contract. Which
//! endpoints a Service has is [`categorize`]'s business, and the gateway's too.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::hash::Hash;
use std::sync::Arc;

use ipnet::IpNet;
use lockgate_ebpf::ServiceTable;
use lockgate_ebpf::table::{self, Family, Frontend, HealthCheck, Role, ServiceName};

use super::endpoints::{Index, toggle};
use super::put;
use crate::objects::{Node, Notice};
use crate::store::{Key, Store};

pub(super) mod categorize;
mod make;

pub(super) use make::ALGORITHM;

/// What the operator chose for the service plane of one node.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct NodeOptions {
    /// The Node this is (`--hostname-override`).
    pub name: Arc<str>,
    /// The node's own addresses; those of the Node object if empty.
    pub addresses: Vec<std::net::IpAddr>,
    /// Its primary address, rather than what the Node object says (`--bind-address`).
    pub primary: Option<std::net::IpAddr>,
    /// Which of them serve node ports (`--nodeport-addresses`).
    pub node_ports: NodePorts,
    /// Its loopback addresses serve node ports as well, to itself.
    pub node_ports_on_loopback: bool,
    /// Serve the Services with this label `service.kubernetes.io/service-proxy-name`
    /// rather than those without one (`--service-proxy-name`).
    pub proxy_name: Option<Arc<str>>,
    /// Whose traffic is not from outside (`--cluster-cidr`).
    pub cluster_networks: Vec<IpNet>,
    /// Instead of these, the Pod networks of the Node object (`--detect-local-mode=NodeCIDR`).
    pub detect_by_node: bool,
    /// Where cluster IPs come from: an address there without a Service is dropped.
    pub service_networks: Vec<IpNet>,
    /// `--masquerade-all`
    pub masquerade_all: bool,
    /// Serve `spec.externalIPs`, which let anyone who may write a Service take
    /// over any address (CVE-2020-8554).
    pub external_ips: bool,
}

/// Which addresses of the node serve node ports.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum NodePorts {
    /// The first of each family in the Node object, as in kube-proxy's nftables mode.
    #[default]
    Primary,
    /// Those in one of these; all of a family of which none is named.
    Networks(Vec<IpNet>),
}

/// The endpoints of a service port that are not in one of its sets, the local one or that of the whole
/// cluster, each with the reason. Looks at every object of `store`: for people who ask.
pub fn left_out(
    name: &ServiceName,
    is_local: bool,
    options: &NodeOptions,
    store: &Store,
) -> Vec<(std::net::SocketAddr, String)> {
    make::left_out(name, is_local, options, store)
}

/// Oldest first; without a timestamp last; then by name.
type Owner = (i64, Key);

/// What every Service puts into the table.
#[derive(Default)]
pub(super) struct Services {
    made: HashMap<Key, Made>,
    frontends: Claims<Frontend>,
    cluster_ips: Claims<std::net::IpAddr>,
    checks: Claims<u16>,
    /// Services whose notices may have changed though they did not.
    touched: BTreeSet<Key>,
}

/// What one Service puts into the table.
#[derive(Default)]
struct Made {
    owner: Option<Owner>,
    /// With the field each comes from.
    frontends: BTreeMap<Frontend, (table::Target, String)>,
    services: BTreeMap<ServiceName, table::Service>,
    cluster_ips: BTreeSet<std::net::IpAddr>,
    check: Option<(u16, HealthCheck)>,
    notices: Vec<Notice>,
}

/// Who wants what only one can have: the oldest gets it.
struct Claims<T> {
    owners: HashMap<T, BTreeSet<Owner>>,
    unsettled: BTreeSet<T>,
}

impl<T> Default for Claims<T> {
    fn default() -> Self {
        Claims { owners: HashMap::new(), unsettled: BTreeSet::new() }
    }
}

impl<T: Hash + Ord + Clone> Claims<T> {
    fn set(&mut self, thing: &T, owner: &Owner, present: bool, touched: &mut BTreeSet<Key>) {
        let others = self.owners.get(thing).into_iter().flatten();
        touched.extend(others.map(|(_, key)| key.clone()));
        toggle(&mut self.owners, thing.clone(), owner.clone(), present);
        self.unsettled.insert(thing.clone());
    }

    fn first(&self, thing: &T) -> Option<&Key> {
        self.owners.get(thing)?.first().map(|(_, key)| key)
    }
}

impl Services {
    #[cfg(test)]
    pub(super) fn is_empty(&self) -> bool {
        self.made.is_empty()
            && self.frontends.owners.is_empty()
            && self.cluster_ips.owners.is_empty()
            && self.checks.owners.is_empty()
    }

    /// Makes what the Service `key` puts into the table.
    pub(super) fn make(&mut self, key: &Key, options: &NodeOptions, store: &Store, index: &Index) {
        if let Some(before) = self.made.remove(key) {
            self.claim(&before, false);
        }
        let Some(service) = store.services.get(key) else { return };
        let made = make::service(key, service, options, store, index);
        self.claim(&made, true);
        self.made.insert(key.clone(), made);
    }

    fn claim(&mut self, made: &Made, present: bool) {
        let Some(owner) = &made.owner else { return };
        for frontend in made.frontends.keys() {
            self.frontends.set(frontend, owner, present, &mut self.touched);
        }
        for address in &made.cluster_ips {
            // Two Services of one address may well share it, if their ports differ.
            self.cluster_ips.set(address, owner, present, &mut BTreeSet::new());
        }
        if let Some((port, _)) = &made.check {
            self.checks.set(port, owner, present, &mut self.touched);
        }
    }

    /// Writes what [`Services::make`] changed of `services` into the table.
    /// Returns further Services whose notices may have changed.
    pub(super) fn settle(&mut self, services: &BTreeSet<Key>, table: &mut ServiceTable) -> BTreeSet<Key> {
        for frontend in std::mem::take(&mut self.frontends.unsettled) {
            let owner = self.frontends.first(&frontend).and_then(|owner| self.made.get(owner));
            match owner.and_then(|made| made.frontends.get(&frontend)) {
                None => drop(table.frontends.remove(&frontend)),
                Some((target, _)) if table.frontends.get(&frontend) == Some(target) => {}
                Some((target, _)) => drop(table.frontends.insert(frontend, target.clone())),
            }
        }
        for address in std::mem::take(&mut self.cluster_ips.unsettled) {
            match self.cluster_ips.first(&address) {
                None => drop(table.cluster_ips.remove(&address)),
                Some(_) => drop(table.cluster_ips.insert(address)),
            }
        }
        for port in std::mem::take(&mut self.checks.unsettled) {
            let owner = self.checks.first(&port).and_then(|owner| self.made.get(owner));
            match owner.and_then(|made| made.check.as_ref()) {
                None => drop(table.health_checks.remove(&port)),
                Some((_, check)) => put(&mut table.health_checks, port, check.clone()),
            }
        }
        for key in services {
            self.settle_services(key, table);
        }
        std::mem::take(&mut self.touched)
    }

    /// The ports of one Service; no other has the same.
    fn settle_services(&mut self, key: &Key, table: &mut ServiceTable) {
        let made = self.made.get(key).map(|made| &made.services);
        for (name, service) in made.into_iter().flatten() {
            put(&mut table.services, name.clone(), service.clone());
        }
        // Its names begin alike, and after `:` comes what no name of a Service can have.
        let first = ServiceName {
            name: format!("{key}:").into(),
            protocol: table::Protocol::Tcp,
            family: Family::Ipv4,
        };
        let prefix = first.name.clone();
        let own = table.services.range(first..).map(|(name, _)| name);
        let own = own.take_while(|name| name.name.starts_with(&*prefix));
        let gone: Vec<ServiceName> =
            own.filter(|name| made.is_none_or(|made| !made.contains_key(*name))).cloned().collect();
        for name in gone {
            table.services.remove(&name);
        }
    }

    /// What to tell the Service's author.
    pub(super) fn notices(&self, key: &Key) -> Vec<Notice> {
        let Some(made) = self.made.get(key) else { return Vec::new() };
        let mut notices = made.notices.clone();
        for (frontend, (_, field)) in &made.frontends {
            if let Some(owner) = self.frontends.first(frontend).filter(|owner| *owner != key) {
                let what = match frontend.scope {
                    table::Scope::Address => frontend.to_string(),
                    table::Scope::NodePort => format!("node port {}/{}", frontend.port, frontend.protocol),
                };
                notices.push(taken(field, &what, owner));
            }
        }
        if let Some((port, _)) = made.check
            && let Some(owner) = self.checks.first(&port).filter(|owner| *owner != key)
        {
            notices.push(taken(".spec.healthCheckNodePort", &format!("port {port}"), owner));
        }
        // Both families of a node port say the same.
        let mut said = BTreeSet::new();
        notices.retain(|notice| said.insert(notice.clone()));
        notices
    }
}

fn taken(field: &str, what: &str, owner: &Key) -> Notice {
    let message = format!("{what} is that of the older Service {owner}: not served for this one");
    Notice::error(field, message, "choose another, or remove one of the two")
}

/// The own Node object.
pub(super) fn own_node<'a>(options: &NodeOptions, store: &'a Store) -> Option<&'a Arc<Node>> {
    store.nodes.get(&Key::new("", options.name.clone()))
}

/// What the table says of the node.
pub(super) fn node(options: &NodeOptions, store: &Store) -> table::Node {
    let object = own_node(options, store);
    let reported = object.map(|node| node.addresses.as_slice()).unwrap_or_default();
    let own = if options.addresses.is_empty() { reported } else { &options.addresses };
    let primary = |family| {
        let first = |from: &[std::net::IpAddr]| from.iter().copied().find(|one| Family::of(*one) == family);
        let bound = options.primary.filter(|one| Family::of(*one) == family);
        bound.or_else(|| first(reported)).or_else(|| first(own))
    };
    let serves = |address: &std::net::IpAddr| {
        let family = Family::of(*address);
        match &options.node_ports {
            _ if address.is_loopback() => options.node_ports_on_loopback,
            NodePorts::Primary => primary(family) == Some(*address),
            NodePorts::Networks(networks) => {
                let of_family = || networks.iter().filter(|network| Family::of(network.addr()) == family);
                of_family().next().is_none() || of_family().any(|network| network.contains(address))
            }
        }
    };
    let pod_networks = match options.detect_by_node {
        true => object.map(|node| node.pod_networks.clone()).unwrap_or_default(),
        false => options.cluster_networks.clone(),
    };
    table::Node {
        addresses: own.iter().map(|address| (*address, serves(address))).collect(),
        pod_networks,
        service_networks: options.service_networks.clone(),
        masquerade_all: options.masquerade_all,
    }
}

/// Whether `role` is reached from elsewhere than Pods and nodes.
fn is_external(role: Role) -> bool {
    role != Role::ClusterIp
}

#[cfg(test)]
mod tests;
