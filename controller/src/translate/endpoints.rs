//! Which addresses of a Service may receive traffic: kube-proxy's rules, for
//! both data planes.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

use super::service::categorize::{Candidate, anywhere};
use crate::objects::{EndpointSlice, Labels, Pod, Service, ServiceKind, ServicePort, SlicePort, TargetPort};
use crate::store::{Key, Store};

/// The endpoints of one Service port.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Selected {
    /// Those for new traffic, each with its zone.
    pub(super) endpoints: BTreeMap<SocketAddr, Option<Arc<str>>>,
    /// Of the first slice that has the port; used if the Service says nothing.
    pub(super) app_protocol: Option<Arc<str>>,
    /// Every endpoint has a hint which zone's traffic is meant for it, and that
    /// is its zone above.
    pub(super) hinted: bool,
}

/// Finds the slices and Pods of a Service, and the Services of a Pod, without
/// looking at all of them.
#[derive(Default)]
pub(super) struct Index {
    slices: HashMap<Key, BTreeSet<Key>>,
    pods: HashMap<Label, BTreeSet<Key>>,
    services: HashMap<Label, BTreeSet<Key>>,
}

/// Namespace, label, value.
type Label = (Arc<str>, Arc<str>, Arc<str>);

fn labels_of<'a>(namespace: &'a Arc<str>, labels: &'a Labels) -> impl Iterator<Item = Label> + 'a {
    labels.iter().map(|(label, value)| (namespace.clone(), label.clone(), value.clone()))
}

/// Adds or removes one entry; an empty set leaves the map.
pub(super) fn toggle<K: std::hash::Hash + Eq, V: Ord>(
    map: &mut HashMap<K, BTreeSet<V>>,
    key: K,
    value: V,
    present: bool,
) {
    if present {
        map.entry(key).or_default().insert(value);
    } else if let Some(set) = map.get_mut(&key) {
        set.remove(&value);
        if set.is_empty() {
            map.remove(&key);
        }
    }
}

impl Index {
    #[cfg(test)]
    pub(super) fn is_empty(&self) -> bool {
        self.slices.is_empty() && self.pods.is_empty() && self.services.is_empty()
    }

    /// An index of what one Service needs.
    pub(super) fn of_service(service: &Service, store: &Store) -> Index {
        let mut index = Index::default();
        let own = store.slices.values().filter(|slice| slice.meta.namespace == service.meta.namespace);
        for slice in own.filter(|slice| slice.service.as_ref() == Some(&service.meta.name)) {
            index.slice(slice, true);
        }
        index.service(service, true);
        for pod in store.pods.values().filter(|pod| selects(service, pod)) {
            index.pod(pod, true, store);
        }
        index
    }

    /// Returns the Service whose endpoints changed.
    pub(super) fn slice(&mut self, slice: &EndpointSlice, present: bool) -> Option<Key> {
        let service = Key::new(slice.meta.namespace.clone(), slice.service.clone()?);
        toggle(&mut self.slices, service.clone(), Key::from(&slice.meta), present);
        Some(service)
    }

    pub(super) fn service(&mut self, service: &Service, present: bool) {
        for label in labels_of(&service.meta.namespace, &service.selector) {
            toggle(&mut self.services, label, Key::from(&service.meta), present);
        }
    }

    /// Returns the Services that may select it.
    pub(super) fn pod(&mut self, pod: &Pod, present: bool, store: &Store) -> Vec<Key> {
        let mut services = BTreeSet::new();
        for label in labels_of(&pod.meta.namespace, &pod.labels) {
            services.extend(self.services.get(&label).into_iter().flatten().cloned());
            toggle(&mut self.pods, label, Key::from(&pod.meta), present);
        }
        let selects = |key: &Key| store.services.get(key).is_some_and(|service| selects(service, pod));
        services.into_iter().filter(selects).collect()
    }

    /// Whether `service` takes its endpoints from Pods rather than slices.
    pub(super) fn uses_pods(&self, service: &Service) -> bool {
        !service.selector.is_empty() && !self.slices.contains_key(&Key::from(&service.meta))
    }

    /// The endpoints of `port` for the gateway. An `ExternalName` Service has none.
    pub(super) fn select(&self, store: &Store, service: &Service, port: &ServicePort) -> Selected {
        let mut candidates = Vec::new();
        let app_protocol = self.candidates(store, service, port, &mut |candidate| candidates.push(candidate));
        let (endpoints, hinted) = chosen(store, &candidates);
        Selected { endpoints, app_protocol, hinted }
    }

    /// Gives `each` endpoint of `port` that slices or Pods show, whatever its
    /// conditions. Returns the protocol of the first slice that has the port.
    pub(super) fn candidates<'a>(
        &self,
        store: &'a Store,
        service: &Service,
        port: &ServicePort,
        each: &mut dyn FnMut(Candidate<'a>),
    ) -> Option<Arc<str>> {
        if service.kind == ServiceKind::ExternalName {
            return None;
        }
        if self.uses_pods(service) {
            self.add_pods(store, service, port, each);
            return None;
        }
        self.add_slices(store, service, port, each)
    }

    fn add_slices<'a>(
        &self,
        store: &'a Store,
        service: &Service,
        port: &ServicePort,
        each: &mut dyn FnMut(Candidate<'a>),
    ) -> Option<Arc<str>> {
        let mut app_protocol = None;
        let keys = self.slices.get(&Key::from(&service.meta)).into_iter().flatten();
        for slice in keys.filter_map(|key| store.slices.get(key)) {
            let named = |entry: &&SlicePort| entry.name == port.name && entry.protocol == port.protocol;
            let Some(entry) = slice.ports.iter().find(named) else { continue };
            app_protocol = app_protocol.or_else(|| entry.app_protocol.clone());
            for endpoint in &slice.endpoints {
                each(Candidate {
                    address: SocketAddr::new(endpoint.address, entry.port),
                    ready: endpoint.ready,
                    serving: endpoint.serving,
                    terminating: endpoint.terminating,
                    zone: endpoint.zone.as_ref(),
                    for_zones: &endpoint.for_zones,
                    for_nodes: &endpoint.for_nodes,
                    node: endpoint.node.as_ref(),
                });
            }
        }
        app_protocol
    }

    fn add_pods<'a>(
        &self,
        store: &'a Store,
        service: &Service,
        port: &ServicePort,
        each: &mut dyn FnMut(Candidate<'a>),
    ) {
        // The rarest label of the selector leaves the fewest Pods to look at.
        let sets = labels_of(&service.meta.namespace, &service.selector).map(|label| self.pods.get(&label));
        let Some(rarest) = sets.min_by_key(|set| set.map_or(0, BTreeSet::len)).flatten() else { return };
        for pod in rarest.iter().filter_map(|key| store.pods.get(key)).filter(|pod| selects(service, pod)) {
            let Some(number) = target_port(port, pod) else { continue };
            // A Pod as written in a file has no phase and no conditions.
            let running = matches!(&*pod.phase, "Running" | "");
            let serving = running && pod.ready.unwrap_or(true);
            for address in addresses(service, pod) {
                each(Candidate {
                    address: SocketAddr::new(address, number),
                    ready: running && service.publish_not_ready || serving && !pod.terminating,
                    serving,
                    terminating: pod.terminating,
                    zone: None,
                    for_zones: &[],
                    for_nodes: &[],
                    node: pod.node.as_ref(),
                });
            }
        }
    }
}

/// Those for new traffic with their zones, and whether these are those of hints.
fn chosen(store: &Store, candidates: &[Candidate<'_>]) -> (BTreeMap<SocketAddr, Option<Arc<str>>>, bool) {
    let (usable, hinted) = anywhere(candidates);
    let of_node = |node: &Arc<str>| store.nodes.get(&Key::new("", node.clone()))?.zone.clone();
    let zone = |one: &Candidate<'_>| match hinted {
        true => one.for_zones.first().cloned(),
        false => one.zone.cloned().or_else(|| of_node(one.node?)),
    };
    (usable.iter().map(|one| (one.address, zone(one))).collect(), hinted)
}

fn selects(service: &Service, pod: &Pod) -> bool {
    !service.selector.is_empty()
        && service.meta.namespace == pod.meta.namespace
        && service.selector.iter().all(|(label, value)| pod.labels.get(label) == Some(value))
}

fn target_port(port: &ServicePort, pod: &Pod) -> Option<u16> {
    match &port.target {
        TargetPort::Same => Some(port.port),
        TargetPort::Number(number) => Some(*number),
        TargetPort::Name(name) => {
            let named = pod.ports.iter().find(|entry| entry.name == *name && entry.protocol == port.protocol);
            named.map(|entry| entry.port)
        }
    }
}

/// Those of the Service's address families; of the Pod's first if the Service
/// has no address of its own.
fn addresses(service: &Service, pod: &Pod) -> impl Iterator<Item = IpAddr> {
    let wanted = |family: bool| match service.addresses.is_empty() {
        true => pod.addresses.first().is_some_and(|first| first.is_ipv4() == family),
        false => service.addresses.iter().any(|address| address.is_ipv4() == family),
    };
    let (v4, v6) = (wanted(true), wanted(false));
    pod.addresses.iter().copied().filter(move |address| if address.is_ipv4() { v4 } else { v6 })
}

#[cfg(test)]
mod tests;
