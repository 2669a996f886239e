//! Services to pools for the proxy, and to entries for the service plane.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::Arc;

use lockgate_proxy::table::{Balance, Endpoint, HostPattern, NamingKey, Pool, PoolKey, UpstreamProtocol};

use super::endpoints::{Index, Selected, toggle};
use super::host::{PoolId, Wanted};
use super::plan::Age;
use super::streams::{self, Streams};
use super::wish::Wish;
use super::{Desired, Options, put};
use crate::objects::{Notice, PortRef, Protocol, Service, ServicePort};
use crate::store::{Key, Store};

/// Which pools are wanted of each Service.
#[derive(Default)]
pub(super) struct Pools {
    /// Where nobody wishes otherwise.
    balance: Balance,
    /// By Service.
    wanted: HashMap<Key, BTreeMap<PoolId, Users>>,
    made: HashMap<Key, BTreeSet<PoolKey>>,
    /// What to tell the authors of Services; without those that need not be told anything.
    notices: HashMap<Key, Vec<Notice>>,
    /// Wanted by L4 listeners, by Service.
    streams: HashMap<Key, BTreeSet<PoolId>>,
}

/// The hosts whose rules name a pool.
#[derive(Default)]
struct Users {
    hosts: BTreeSet<HostPattern>,
    /// What their Ingresses say about balancing; the oldest wins.
    wishes: BTreeMap<(Age, HostPattern), Wish>,
    /// Those whose requests have keys or sessions.
    steered: BTreeSet<HostPattern>,
}

impl Pools {
    pub(super) fn new(options: &Options) -> Pools {
        Pools { balance: options.load_balance, ..Pools::default() }
    }

    #[cfg(test)]
    pub(super) fn is_empty(&self) -> bool {
        self.wanted.is_empty() && self.made.is_empty() && self.notices.is_empty() && self.streams.is_empty()
    }

    /// Host `host` now names `new` instead of `old`. Adds to `services` those
    /// whose pools have to be made again.
    pub(super) fn replace(
        &mut self,
        host: &HostPattern,
        old: &BTreeMap<PoolId, Wanted>,
        new: &BTreeMap<PoolId, Wanted>,
        services: &mut BTreeSet<Key>,
    ) {
        for (id, wish) in old.iter().filter(|(id, wish)| new.get(id) != Some(wish)) {
            services.insert(id.service.clone());
            let Some(pools) = self.wanted.get_mut(&id.service) else { continue };
            let Some(users) = pools.get_mut(id) else { continue };
            users.hosts.remove(host);
            users.steered.remove(host);
            for age in wish.wishes.keys() {
                users.wishes.remove(&(age.clone(), host.clone()));
            }
            if users.hosts.is_empty() {
                pools.remove(id);
            }
            if pools.is_empty() {
                self.wanted.remove(&id.service);
            }
        }
        for (id, wish) in new.iter().filter(|(id, wish)| old.get(id) != Some(wish)) {
            services.insert(id.service.clone());
            let users = self.wanted.entry(id.service.clone()).or_default().entry(id.clone()).or_default();
            users.hosts.insert(host.clone());
            if wish.steered {
                users.steered.insert(host.clone());
            }
            for (age, wish) in &wish.wishes {
                users.wishes.insert((age.clone(), host.clone()), wish.clone());
            }
        }
    }

    /// As [`Pools::replace`], for all L4 listeners.
    pub(super) fn replace_streams(&mut self, old: &Streams, new: &Streams, services: &mut BTreeSet<Key>) {
        for (ids, present) in
            [(old.pools.difference(&new.pools), false), (new.pools.difference(&old.pools), true)]
        {
            for id in ids {
                services.insert(id.service.clone());
                toggle(&mut self.streams, id.service.clone(), id.clone(), present);
            }
        }
    }

    /// Makes the pools and notices of one Service.
    pub(super) fn make(&mut self, key: &Key, store: &Store, index: &Index, desired: &mut Desired) {
        let service = store.services.get(key).map(|service| &**service);
        let selected: Vec<Selected> = service
            .map(|service| service.ports.iter().map(|port| index.select(store, service, port)).collect())
            .unwrap_or_default();
        let ports = || service.into_iter().flat_map(|service| &service.ports).zip(&selected);

        let mut notices = Vec::new();
        let own =
            service.map(|service| Wish::of_service(&service.annotations, &mut notices)).unwrap_or_default();
        let mut made = BTreeSet::new();
        let mut without = BTreeSet::new();
        for (id, users) in self.wanted.get(key).into_iter().flatten() {
            let named = |(port, _): &(&ServicePort, &Selected)| is_port(port, &id.port);
            let Some((port, selected)) = ports().find(named) else { continue };
            let Some(service) = service.filter(|service| is_served(service)) else { continue };
            if selected.endpoints.is_empty() {
                without.insert(port.port);
            }
            let mut wish = own.clone();
            users.wishes.values().for_each(|other| wish.complete(other));
            wish.balance = wish.balance.or(Some(self.balance));
            let steered = !users.steered.is_empty();
            put(&mut desired.routes.pools, id.key(), pool(id, service, port, selected, wish, steered));
            made.insert(id.key());
        }
        for id in self.streams.get(key).into_iter().flatten() {
            let Some((port, selected)) = ports().find(|(port, _)| streams::is_port(port, id)) else {
                continue;
            };
            if selected.endpoints.is_empty() {
                without.insert(port.port);
            }
            let pool = streams::pool(id, selected);
            let pool = Pool {
                balance: own.balance.unwrap_or(pool.balance),
                prefer_zone: selected.hinted || service.is_some_and(|service| service.prefers_zone),
                slow_start: own.slow_start,
                check: own.check.clone(),
                ..pool
            };
            put(&mut desired.routes.pools, id.key(), pool);
            made.insert(id.key());
        }
        let before = self.made.remove(key).unwrap_or_default();
        for gone in before.difference(&made) {
            desired.routes.pools.remove(gone);
        }
        if !made.is_empty() {
            self.made.insert(key.clone(), made);
        }
        notices.extend(service.map(|service| empty_ports(service, index, &without)).unwrap_or_default());
        match notices.is_empty() {
            true => drop(self.notices.remove(key)),
            false => drop(self.notices.insert(key.clone(), notices)),
        }
    }

    /// What to tell the author of the Service `key`.
    pub(super) fn notices(&self, key: &Key) -> Vec<Notice> {
        self.notices.get(key).cloned().unwrap_or_default()
    }
}

/// Whether the proxy forwards to it at all.
fn is_served(service: &Service) -> bool {
    service.kind == crate::objects::ServiceKind::Endpoints
}

/// Whether `port` is the TCP port that `written` names.
pub(super) fn is_port(port: &ServicePort, written: &PortRef) -> bool {
    port.protocol == Protocol::Tcp
        && match written {
            PortRef::Number(number) => i32::from(port.port) == *number,
            PortRef::Name(name) => port.name == *name,
        }
}

fn pool(
    id: &PoolId,
    service: &Service,
    port: &ServicePort,
    selected: &Selected,
    wish: Wish,
    steered: bool,
) -> Pool {
    let spoken = port.app_protocol.as_ref().or(selected.app_protocol.as_ref());
    let endpoint = |(address, zone): (&_, &Option<Arc<str>>)| Endpoint {
        address: *address,
        weight: 1,
        zone: zone.clone(),
    };
    Pool {
        protocol: id.protocol.unwrap_or_else(|| upstream_protocol(spoken.map(|text| &**text))),
        balance: wish.balance.unwrap_or_default(),
        endpoints: selected.endpoints.iter().map(endpoint).collect(),
        seating: steered.then(|| naming_key(id, service)),
        prefer_zone: service.prefers_zone || selected.hinted,
        slow_start: wish.slow_start,
        check: wish.check,
    }
}

/// Replicas and restarts know the Service's UID, and clients do not. Without
/// one its name has to do, by which a client that knows it, too, could guess
/// an address and see whether it is right.
fn naming_key(id: &PoolId, service: &Service) -> NamingKey {
    NamingKey(service.uid.clone().unwrap_or_else(|| id.key().0))
}

/// KEP-3726 and the names of IANA.
fn upstream_protocol(app_protocol: Option<&str>) -> UpstreamProtocol {
    match app_protocol.map(str::to_ascii_lowercase).as_deref() {
        Some("kubernetes.io/h2c" | "grpc") => UpstreamProtocol::H2c,
        Some("https" | "kubernetes.io/wss") => UpstreamProtocol::Https,
        _ => UpstreamProtocol::Http1,
    }
}

fn empty_ports(service: &Service, index: &Index, ports: &BTreeSet<u16>) -> Vec<Notice> {
    let remedy = match index.uses_pods(service) {
        true => "start Pods that its selector matches, or add an EndpointSlice",
        false => "add ready endpoints to its EndpointSlices",
    };
    let field = if index.uses_pods(service) { ".spec.selector" } else { "" };
    let notice = |port: &u16| {
        let message = format!("port {port} has no ready endpoint: it takes no request");
        Notice::warning(field, message, remedy)
    };
    ports.iter().map(notice).collect()
}
