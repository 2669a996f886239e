//! Objects in, tables and statuses out: pure, total, deterministic.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::Arc;

use imbl::OrdMap;
use imbl::ordmap::DiffItem;
use lockgate_ebpf::ServiceTable;
use lockgate_proxy::RoutingTable;
use lockgate_proxy::table::{Balance, HostPattern};

use crate::objects::{Kind, Notice, ObjectRef};
use crate::store::{Key, Store};

mod annotations;
mod canary;
mod certificates;
mod endpoints;
mod headers;
mod host;
mod ingresses;
mod plan;
mod pools;
mod resilience;
mod service;
mod settings;
mod status;
mod steering;
mod streams;
mod wish;

use certificates::Certificates;
use headers::Headers;
use ingresses::{Classes, Ingresses};
use pools::Pools;
use service::Services;
use streams::Streams;

pub use headers::HeaderOptions;
pub use service::{NodeOptions, NodePorts, left_out};
pub use streams::StreamOptions;
pub(crate) use wish::balance;

/// What the operator chose, fixed for the life of the process.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Options {
    /// Serve only the Ingresses of this class. `None` serves every Ingress, as
    /// a folder of manifests wants.
    pub ingress_class: Option<String>,
    /// An Ingress that names no class is not served, even if the class is the
    /// default one. Only with [`Options::ingress_class`].
    pub require_class: bool,
    /// A Secret of type `kubernetes.io/tls` for clients whose SNI matches nothing.
    pub default_certificate: Option<Key>,
    /// How endpoints are chosen where no Ingress says otherwise
    /// (ingress-nginx's `load-balance`).
    pub load_balance: Balance,
    /// TCP and UDP ports that are relayed as they are.
    pub streams: StreamOptions,
    /// The node whose service plane this feeds. `None`: there is none.
    pub node: Option<NodeOptions>,
    /// What is changed in the heads of requests and responses.
    pub headers: HeaderOptions,
}

/// What should be live.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Desired {
    /// For the proxy.
    pub routes: RoutingTable,
    /// For the service plane.
    pub services: ServiceTable,
    /// What to tell the authors of objects. Every Ingress has an entry, an
    /// empty one if it is served as written; other objects only if there is
    /// something to say.
    pub statuses: OrdMap<ObjectRef, Arc<Vec<Notice>>>,
}

/// Translates one store after another, at the cost of what changed between them.
///
/// Every step is keyed by what it makes (a host, a Service's pools, a host's
/// certificates, an object's status) and runs again only for the keys that a
/// changed object touches. From nothing, everything is changed: there is no
/// second way to the same result.
#[derive(Default)]
pub struct Translator {
    options: Options,
    /// What `desired` was made from.
    store: Store,
    desired: Desired,
    ingresses: Ingresses,
    endpoints: endpoints::Index,
    hosts: HashMap<HostPattern, host::Found>,
    pools: Pools,
    services: Services,
    certificates: Certificates,
    streams: Streams,
    headers: Headers,
    #[cfg(test)]
    made: Made,
}

/// How often each step ran, for the test that the work follows the change.
#[cfg(test)]
#[derive(Clone, Copy, Default)]
struct Made {
    hosts: usize,
    services: usize,
    statuses: usize,
}

/// What has to be made again.
#[derive(Default)]
struct Dirty {
    hosts: BTreeSet<HostPattern>,
    services: BTreeSet<Key>,
    certificates: BTreeSet<HostPattern>,
    default_certificate: bool,
    /// Of Ingresses.
    statuses: BTreeSet<Key>,
    streams: bool,
    headers: bool,
}

impl Translator {
    /// A translator that has seen nothing yet.
    pub fn new(options: Options) -> Translator {
        let (pools, headers) = (Pools::new(&options), Headers::new(&options.headers));
        Translator { pools, headers, options, ..Translator::default() }
    }

    /// From the next translation on, the node has these addresses. Does nothing
    /// without [`Options::node`].
    pub fn set_node_addresses(&mut self, addresses: Vec<std::net::IpAddr>) {
        if let Some(node) = &mut self.options.node {
            node.addresses = addresses;
        }
    }

    /// The desired state for `store`. Never fails: what is wrong with an object
    /// becomes its status.
    pub fn translate(&mut self, store: &Store) -> Desired {
        let old = std::mem::replace(&mut self.store, store.clone());
        let first = old.is_empty();
        let mut dirty =
            Dirty { default_certificate: first, streams: first, headers: first, ..Dirty::default() };
        self.read_ingresses(&old, &mut dirty);
        self.read_endpoints(&old, &mut dirty);
        self.read_secrets(&old, &mut dirty);
        self.read_config_maps(&old, &mut dirty);
        self.read_headers(&mut dirty);
        #[cfg(test)]
        let hosts = dirty.hosts.len();
        self.make_hosts(&mut dirty);
        self.make_streams(&mut dirty);
        self.make_services(&dirty);
        self.make_certificates(&mut dirty);
        self.make_statuses(&dirty);
        self.headers.forget();
        #[cfg(test)]
        {
            self.made.hosts += hosts;
            self.made.services += dirty.services.len();
            self.made.statuses += dirty.statuses.len();
        }
        self.desired.clone()
    }

    fn read_ingresses(&mut self, old: &Store, dirty: &mut Dirty) {
        let before = Classes::new(&self.options, old);
        let after = Classes::new(&self.options, &self.store);
        if before != after {
            for (key, ingress) in &self.store.ingresses {
                if before.serves(ingress) != after.serves(ingress) || after.serves(ingress).is_err() {
                    self.ingresses.replace(key, Some((ingress, &after)), dirty);
                }
            }
        }
        for (key, _, new) in changes(&old.ingresses, &self.store.ingresses) {
            self.ingresses.replace(key, new.map(|new| (new, &after)), dirty);
        }
    }

    fn read_endpoints(&mut self, old: &Store, dirty: &mut Dirty) {
        for (key, old, new) in changes(&old.services, &self.store.services) {
            for (service, present) in
                old.map(|old| (old, false)).into_iter().chain(new.map(|new| (new, true)))
            {
                self.endpoints.service(service, present);
            }
            dirty.services.insert(key.clone());
            dirty.statuses.extend(self.ingresses.using_service(key).cloned());
            dirty.streams |= self.streams.uses(key);
        }
        for (_, old, new) in changes(&old.slices, &self.store.slices) {
            dirty.services.extend(old.and_then(|old| self.endpoints.slice(old, false)));
            dirty.services.extend(new.and_then(|new| self.endpoints.slice(new, true)));
        }
        for (_, old, new) in changes(&old.pods, &self.store.pods) {
            for (pod, present) in old.map(|old| (old, false)).into_iter().chain(new.map(|new| (new, true))) {
                dirty.services.extend(self.endpoints.pod(pod, present, &self.store));
            }
        }
        // Zones may change anywhere; Nodes come and go rarely.
        let zones_changed = changes(&old.nodes, &self.store.nodes).any(|(_, old, new)| {
            old.and_then(|old| old.zone.as_ref()) != new.and_then(|new| new.zone.as_ref())
        });
        if self.own_node_changed(old) || zones_changed {
            dirty.services.extend(self.store.services.keys().cloned());
        }
    }

    /// Its zone decides about topology, its addresses about source ranges.
    fn own_node_changed(&mut self, old: &Store) -> bool {
        let Some(options) = &self.options.node else { return false };
        let made = service::node(options, &self.store);
        let moved = *self.desired.services.node != made;
        if moved {
            self.desired.services.node = Arc::new(made);
        }
        moved || service::own_node(options, old) != service::own_node(options, &self.store)
    }

    fn read_secrets(&mut self, old: &Store, dirty: &mut Dirty) {
        for (key, _, _) in changes(&old.secrets, &self.store.secrets) {
            self.certificates.forget(key);
            dirty.default_certificate |= self.options.default_certificate.as_ref() == Some(key);
            for ingress in self.ingresses.using_secret(key) {
                dirty.statuses.insert(ingress.clone());
                if let Some(plan) = self.ingresses.plan(ingress) {
                    dirty.certificates.extend(plan.certified_hosts());
                    dirty.default_certificate |= plan.tls.iter().any(|tls| tls.any_host);
                }
            }
        }
    }

    fn read_config_maps(&mut self, old: &Store, dirty: &mut Dirty) {
        for (key, _, _) in changes(&old.config_maps, &self.store.config_maps) {
            dirty.streams |= self.options.streams.names(key);
            dirty.headers |= self.options.headers.names(key);
            for ingress in self.ingresses.using_config_map(key) {
                dirty.statuses.insert(ingress.clone());
                dirty
                    .hosts
                    .extend(self.ingresses.plan(ingress).iter().flat_map(|plan| plan.contributes_to()));
            }
        }
    }

    /// What holds for all requests is said once; rules with edits of their own are made again.
    fn read_headers(&mut self, dirty: &mut Dirty) {
        if !dirty.headers {
            return;
        }
        for (config_map, notices) in self.headers.read(&self.store) {
            set_status(&mut self.desired, config_map.reference(Kind::ConfigMap), notices, true);
        }
        // A ConfigMap that is named for both is told of both.
        dirty.streams = true;
        let everywhere = self.headers.everywhere();
        if self.desired.routes.edits != everywhere {
            self.desired.routes.edits = everywhere;
            dirty.hosts.extend(self.ingresses.with_headers().flat_map(|plan| plan.contributes_to()));
        }
    }

    fn make_hosts(&mut self, dirty: &mut Dirty) {
        for pattern in std::mem::take(&mut dirty.hosts) {
            let plans = self.ingresses.with_rules_for(&pattern);
            plans.iter().for_each(|plan| self.headers.load(plan, &self.store));
            let outcome = host::build(&pattern, &plans, &mut self.headers);
            match outcome.host {
                Some(host) => put(&mut self.desired.routes.hosts, pattern.clone(), host),
                None => drop(self.desired.routes.hosts.remove(&pattern)),
            }
            match outcome.passthrough {
                Some(passed) => put(&mut self.desired.routes.passthrough, pattern.clone(), passed),
                None => drop(self.desired.routes.passthrough.remove(&pattern)),
            }
            let outcome = outcome.found;
            let previous = self.hosts.remove(&pattern).unwrap_or_default();
            differing(&previous.notices, &outcome.notices, &mut dirty.statuses);
            self.pools.replace(&pattern, &previous.pools, &outcome.pools, &mut dirty.services);
            if !outcome.pools.is_empty() || !outcome.notices.is_empty() {
                self.hosts.insert(pattern, outcome);
            }
        }
    }

    fn make_streams(&mut self, dirty: &mut Dirty) {
        if !dirty.streams {
            return;
        }
        let made = streams::make(&self.options.streams, &self.store);
        self.pools.replace_streams(&self.streams, &made.streams, &mut dirty.services);
        let listeners = &mut self.desired.routes.listeners;
        for gone in
            listeners.keys().filter(|key| !made.listeners.contains_key(key)).copied().collect::<Vec<_>>()
        {
            listeners.remove(&gone);
        }
        for (key, listener) in made.listeners {
            put(listeners, key, listener);
        }
        for (config_map, notices) in made.notices {
            set_status(&mut self.desired, config_map.reference(Kind::ConfigMap), notices, true);
        }
        self.streams = made.streams;
    }

    fn make_services(&mut self, dirty: &Dirty) {
        for key in &dirty.services {
            self.pools.make(key, &self.store, &self.endpoints, &mut self.desired);
        }
        let mut told = BTreeSet::new();
        if let Some(options) = &self.options.node {
            for key in &dirty.services {
                self.services.make(key, options, &self.store, &self.endpoints);
            }
            told = self.services.settle(&dirty.services, &mut self.desired.services);
        }
        for key in dirty.services.union(&told) {
            let mut notices = self.pools.notices(key);
            notices.extend(self.services.notices(key));
            set_status(&mut self.desired, key.reference(Kind::Service), notices, false);
        }
    }

    fn make_certificates(&mut self, dirty: &mut Dirty) {
        for pattern in std::mem::take(&mut dirty.certificates) {
            let plans = self.ingresses.with_certificates_for(&pattern);
            let made = self.certificates.make(&pattern, &plans, &self.store, &mut dirty.statuses);
            if made.is_empty() {
                self.desired.routes.certificates.remove(&pattern);
            } else {
                put(&mut self.desired.routes.certificates, pattern, made);
            }
        }
        if !dirty.default_certificate {
            return;
        }
        let (certificate, notices) = match &self.options.default_certificate {
            Some(secret) => self.certificates.of_operator(secret, &self.store),
            None => (self.certificates.of_oldest(self.ingresses.with_any_host(), &self.store), Vec::new()),
        };
        self.desired.routes.default_certificate = certificate;
        if let Some(secret) = &self.options.default_certificate {
            set_status(&mut self.desired, secret.reference(Kind::Secret), notices, false);
        }
    }

    fn make_statuses(&mut self, dirty: &Dirty) {
        for key in &dirty.statuses {
            let reference = key.reference(Kind::Ingress);
            let Some(ingress) = self.store.ingresses.get(key) else {
                self.desired.statuses.remove(&reference);
                continue;
            };
            let notices = match self.ingresses.plan(key) {
                Some(plan) => {
                    let mut notices = status::of_plan(plan, &self.store, &mut self.certificates);
                    self.headers.load(plan, &self.store);
                    notices.extend(self.headers.notice(plan));
                    for host in plan.contributes_to() {
                        notices.extend(
                            self.hosts
                                .get(&host)
                                .and_then(|host| host.notices.get(key))
                                .into_iter()
                                .flatten()
                                .cloned(),
                        );
                    }
                    for host in plan.certified_hosts() {
                        notices.extend(self.certificates.notices(&host, key).cloned());
                    }
                    notices.sort_by_key(|notice| notice.level);
                    notices
                }
                None => self.ingresses.refusal(ingress, &Classes::new(&self.options, &self.store)),
            };
            set_status(&mut self.desired, reference, notices, true);
        }
    }
}

/// An entry without notices is kept only if `keep`.
fn set_status(desired: &mut Desired, reference: ObjectRef, notices: Vec<Notice>, keep: bool) {
    if notices.is_empty() && !keep {
        desired.statuses.remove(&reference);
    } else {
        put(&mut desired.statuses, reference, notices);
    }
}

/// Inserts `value` unless an equal one is there, so that what did not change stays shared.
fn put<K: Ord + Clone, V: PartialEq>(map: &mut OrdMap<K, Arc<V>>, key: K, value: V) {
    if map.get(&key).is_none_or(|old| **old != value) {
        map.insert(key, Arc::new(value));
    }
}

/// Key, old and new value of every entry in which the maps differ. Skips what they share.
fn changes<'a, T: PartialEq>(
    old: &'a OrdMap<Key, Arc<T>>,
    new: &'a OrdMap<Key, Arc<T>>,
) -> impl Iterator<Item = (&'a Key, Option<&'a Arc<T>>, Option<&'a Arc<T>>)> {
    old.diff(new).map(|item| match item {
        DiffItem::Add(key, new) => (key, None, Some(new)),
        DiffItem::Update { old: (_, old), new: (key, new) } => (key, Some(old), Some(new)),
        DiffItem::Remove(key, old) => (key, Some(old), None),
    })
}

/// Adds to `keys` those whose notices differ.
fn differing(old: &BTreeMap<Key, Vec<Notice>>, new: &BTreeMap<Key, Vec<Notice>>, keys: &mut BTreeSet<Key>) {
    let changed = old.keys().chain(new.keys()).filter(|key| old.get(key) != new.get(key));
    keys.extend(changed.cloned());
}

/// [`Translator::translate`] from scratch.
pub fn translate(store: &Store, options: &Options) -> Desired {
    Translator::new(options.clone()).translate(store)
}

#[cfg(test)]
mod tests;
