//! Makes a [`ServiceTable`] live: the difference to what is live, written so
//! that at every moment each frontend leads to one whole set, old or new.
//!
//! ```text
//!  endpoints ─► slots of a fresh run ─► commit: one word ─► frontends ─► what left, a second later
//! ```
//!
//! A frontend is added after its Service is complete, and removed before the
//! Service is given up. What fails is written again by the next call; what was
//! written before it stays correct by itself.

use std::collections::{BTreeSet, HashMap};
use std::time::Duration;

use imbl::OrdMap;
use imbl::ordmap::DiffItem;
use lockgate_ebpf_common::{Frontend, FrontendKey, kind, protocol, scope};

use crate::ids::{Ids, Runs};
use crate::maps::{MapError, Maps, address};
use crate::table::{self, Protocol, Role, Scope, ServiceName, ServiceTable, Target};

mod restore;
mod service;

use restore::Strays;
use service::Live;
pub(crate) use service::{algorithm_of, places};

/// What [`Reconciler::apply`] could not do.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Outcome {
    /// Services and frontends that are not as they should be; the next call
    /// tries them again.
    pub pending: usize,
    /// Of those, the first few.
    pub errors: Vec<(String, MapError)>,
    /// How many writes failed.
    pub failures: usize,
    /// Of those, how many though their map had room.
    pub refusals: usize,
}

/// Errors that an [`Outcome`] keeps.
const MOST_ERRORS: usize = 16;

/// Keeps maps as a [`ServiceTable`] says.
pub struct Reconciler<M> {
    maps: M,
    /// What was tried last; what of it failed is in `retry`.
    applied: ServiceTable,
    retry: Retry,
    services: HashMap<ServiceName, Live>,
    /// Services of a predecessor that no name was found for.
    orphans: HashMap<u32, Live>,
    strays: Strays,
    frontends: HashMap<FrontendKey, Frontend>,
    ids: Pools,
    outcome: Outcome,
    /// The first call compares everything with what a predecessor left.
    first: bool,
}

#[derive(Default)]
struct Retry {
    services: BTreeSet<ServiceName>,
    frontends: BTreeSet<FrontendKey>,
    node: bool,
}

/// What is given out, and the time at which.
struct Pools {
    services: Ids,
    endpoints: Ids,
    slots: Runs,
    now: Duration,
}

impl<M: Maps> Reconciler<M> {
    /// Takes over what `maps` hold. `now` is monotonic, as with [`Reconciler::apply`].
    pub fn new(maps: M, now: Duration) -> Result<Reconciler<M>, MapError> {
        let restored = restore::read(&maps, now)?;
        Ok(Reconciler {
            maps,
            applied: ServiceTable::default(),
            retry: Retry { node: true, ..Retry::default() },
            services: HashMap::new(),
            orphans: restored.services,
            strays: restored.strays,
            frontends: restored.frontends,
            ids: restored.ids,
            outcome: Outcome::default(),
            first: true,
        })
    }

    /// The maps, to look at.
    pub fn maps(&self) -> &M {
        &self.maps
    }

    /// What was applied last.
    pub fn table(&self) -> &ServiceTable {
        &self.applied
    }

    /// The maps, to change how they behave; what they hold is the reconciler's.
    pub fn maps_mut(&mut self) -> &mut M {
        &mut self.maps
    }

    /// Gives the maps back, as a process does that ends.
    pub fn into_maps(self) -> M {
        self.maps
    }

    /// Makes `table` live, at the cost of what changed since the last call.
    /// `now` is the time since some fixed moment, and never goes back: it
    /// tells how long ago something was given up.
    pub fn apply(&mut self, table: &ServiceTable, now: Duration) -> Outcome {
        self.ids.now = now;
        self.outcome = Outcome::default();
        let old = std::mem::replace(&mut self.applied, table.clone());
        let services = self.changed_services(&old);
        let frontends = self.changed_frontends(&old);
        if self.first {
            // First of all, so that an index whose frontends are all of one Service is adopted.
            for key in &frontends {
                if !self.is_desired(key) {
                    self.settle_frontend(key);
                }
            }
            self.adopt();
        }
        if let Err(error) = self.strays.clear(&mut self.maps, &mut self.ids) {
            self.fail("what a predecessor left".to_owned(), error);
        }
        self.settle_node(&old);
        for name in &services {
            self.settle_service(name);
        }
        for key in frontends {
            self.settle_frontend(&key);
        }
        self.retire(services);
        self.first = false;
        self.outcome.pending = self.retry.services.len()
            + self.retry.frontends.len()
            + usize::from(self.retry.node)
            + self.orphans.len()
            + self.strays.len();
        std::mem::take(&mut self.outcome)
    }

    fn changed_services(&mut self, old: &ServiceTable) -> BTreeSet<ServiceName> {
        let mut changed = std::mem::take(&mut self.retry.services);
        changed.extend(differing(&old.services, &self.applied.services).cloned());
        if old.node.addresses != self.applied.node.addresses {
            // Which endpoints are the node's own.
            changed.extend(self.applied.services.keys().cloned());
        }
        changed
    }

    fn changed_frontends(&mut self, old: &ServiceTable) -> BTreeSet<FrontendKey> {
        let mut changed = std::mem::take(&mut self.retry.frontends);
        changed.extend(differing(&old.frontends, &self.applied.frontends).map(frontend_key));
        changed.extend(old.cluster_ips.diff(&self.applied.cluster_ips).map(|item| match item {
            imbl::ordset::DiffItem::Add(ip) | imbl::ordset::DiffItem::Remove(ip) => cluster_key(*ip),
        }));
        if self.first {
            changed.extend(self.frontends.keys().copied());
        }
        changed
    }

    fn fail(&mut self, what: String, error: MapError) {
        self.outcome.failures += 1;
        self.outcome.refusals += usize::from(!matches!(error, MapError::Full(_)));
        if self.outcome.errors.len() < MOST_ERRORS {
            self.outcome.errors.push((what, error));
        }
    }

    fn settle_service(&mut self, name: &ServiceName) {
        let Some(desired) = self.applied.services.get(name).cloned() else { return };
        let live = match self.services.remove(name) {
            Some(live) => Ok(live),
            None => Live::create(&mut self.maps, &mut self.ids),
        };
        let result = live.and_then(|mut live| {
            let result = live.update(&desired, &self.applied.node, &mut self.maps, &mut self.ids);
            self.services.insert(name.clone(), live);
            result
        });
        if let Err(error) = result {
            self.fail(name.to_string(), error);
            self.retry.services.insert(name.clone());
        }
    }

    /// The Service that `key` should lead to, if the table has the key.
    fn desired(&self, key: &FrontendKey) -> Option<&Target> {
        self.applied.frontends.get(&frontend(key)?)
    }

    fn is_desired(&self, key: &FrontendKey) -> bool {
        match key.scope {
            scope::CLUSTER_ADDRESS => self.applied.cluster_ips.contains(&ip(key)),
            _ => self.desired(key).is_some(),
        }
    }

    fn settle_frontend(&mut self, key: &FrontendKey) {
        let wanted = match key.scope {
            scope::CLUSTER_ADDRESS => self.is_desired(key).then_some(Frontend {
                service: 0,
                generation: 0,
                kind: kind::CLUSTER_IP,
                zero: 0,
            }),
            _ => self.desired(key).and_then(|target| {
                let live = self.services.get(&target.service).filter(|live| live.is_complete())?;
                let (service, generation) = (live.index(), live.generation());
                Some(Frontend { service, generation, kind: kind_of(target.role), zero: 0 })
            }),
        };
        if wanted.is_none() && self.is_desired(key) {
            // Its Service could not be written: until it is, the address is nobody's.
            self.retry.frontends.insert(*key);
            if self.keeps_orphan(key) {
                return;
            }
        }
        if self.frontends.get(key) == wanted.as_ref() {
            return;
        }
        let result = match &wanted {
            Some(value) => self.maps.put_frontend(key, value),
            None => self.maps.remove_frontend(key),
        };
        match (result, wanted) {
            (Ok(()), Some(value)) => drop(self.frontends.insert(*key, value)),
            (Ok(()), None) => drop(self.frontends.remove(key)),
            (Err(error), _) => {
                let what = frontend(key).map_or_else(|| ip(key).to_string(), |one| one.to_string());
                self.fail(what, error);
                self.retry.frontends.insert(*key);
            }
        }
    }

    /// Whether `key` leads to a Service of a predecessor that may well be its own: that one goes on
    /// serving until the new one can be written, unless it takes the room for it.
    fn keeps_orphan(&self, key: &FrontendKey) -> bool {
        let nothing_is_full = self.outcome.failures == self.outcome.refusals;
        nothing_is_full
            && self.frontends.get(key).is_some_and(|live| self.orphans.contains_key(&live.service))
    }

    /// Gives up Services that are not desired, once no frontend leads to them.
    fn retire(&mut self, candidates: BTreeSet<ServiceName>) {
        let gone = candidates.into_iter().filter(|name| !self.applied.services.contains_key(name));
        let gone: Vec<ServiceName> = gone.filter(|name| self.services.contains_key(name)).collect();
        if gone.is_empty() && self.orphans.is_empty() {
            return;
        }
        // Only those whose removal failed can be left: few.
        let referenced: BTreeSet<u32> = self
            .retry
            .frontends
            .iter()
            .filter_map(|key| self.frontends.get(key))
            .map(|one| one.service)
            .collect();
        for name in gone {
            let Some(mut live) = self.services.remove(&name) else { continue };
            let result = match referenced.contains(&live.index()) {
                true => {
                    Err(MapError::Refused(lockgate_ebpf_common::maps::FRONTENDS, "still there".to_owned()))
                }
                false => live.retire(&mut self.maps, &mut self.ids),
            };
            if let Err(error) = result {
                self.fail(name.to_string(), error);
                self.retry.services.insert(name.clone());
                self.services.insert(name, live);
            }
        }
        let (maps, ids) = (&mut self.maps, &mut self.ids);
        self.orphans.retain(|index, live| referenced.contains(index) || live.retire(maps, ids).is_err());
    }

    fn settle_node(&mut self, old: &ServiceTable) {
        if self.applied.node.addresses == old.node.addresses && !self.retry.node {
            return;
        }
        let result = self.write_node_addresses();
        self.retry.node = result.is_err();
        if let Err(error) = result {
            self.fail("the node's addresses".to_owned(), error);
        }
    }

    fn write_node_addresses(&mut self) -> Result<(), MapError> {
        use lockgate_ebpf_common::node_address::{NODE_ONLY, NODE_PORTS};
        let mut live: HashMap<_, _> = self.maps.node_addresses()?.into_iter().collect();
        for (own, serves) in &self.applied.node.addresses {
            let only = if own.is_loopback() { NODE_ONLY } else { 0 };
            let flags = only | if *serves { NODE_PORTS } else { 0 };
            if live.remove(&address(*own)) != Some(flags) {
                self.maps.put_node_address(&address(*own), flags)?;
            }
        }
        live.into_keys().try_for_each(|gone| self.maps.remove_node_address(&gone))
    }

    /// Names the Services of a predecessor by the frontends that lead to them.
    fn adopt(&mut self) {
        let mut names: HashMap<u32, Option<&ServiceName>> = HashMap::new();
        for (key, live) in &self.frontends {
            if key.scope == scope::CLUSTER_ADDRESS {
                continue;
            }
            let name =
                frontend(key).and_then(|one| self.applied.frontends.get(&one)).map(|target| &target.service);
            // All of them have to agree: none may lead to a foreign set, not even for a moment.
            let known = names.entry(live.service).or_insert(name);
            if *known != name {
                *known = None;
            }
        }
        let mut names: Vec<_> = names.into_iter().collect();
        names.sort_unstable_by_key(|(index, _)| *index);
        for (index, name) in names {
            let Some(name) = name.filter(|name| !self.services.contains_key(*name)) else { continue };
            if let Some(live) = self.orphans.remove(&index) {
                self.services.insert(name.clone(), live);
            }
        }
    }
}

fn differing<'a, K: Ord + Clone, V: PartialEq>(
    old: &'a OrdMap<K, V>,
    new: &'a OrdMap<K, V>,
) -> impl Iterator<Item = &'a K> {
    old.diff(new).map(|item| match item {
        DiffItem::Add(key, _) | DiffItem::Remove(key, _) => key,
        DiffItem::Update { new: (key, _), .. } => key,
    })
}

/// `frontend` as the maps have it.
pub(crate) fn frontend_key(frontend: &table::Frontend) -> FrontendKey {
    FrontendKey {
        address: address(frontend.address),
        port: frontend.port.to_be_bytes(),
        protocol: match frontend.protocol {
            Protocol::Tcp => protocol::TCP,
            Protocol::Udp => protocol::UDP,
            Protocol::Sctp => protocol::SCTP,
        },
        scope: match frontend.scope {
            Scope::Address => scope::ADDRESS,
            Scope::NodePort => scope::NODE_PORT,
        },
    }
}

fn cluster_key(ip: std::net::IpAddr) -> FrontendKey {
    FrontendKey { address: address(ip), port: [0; 2], protocol: 0, scope: scope::CLUSTER_ADDRESS }
}

pub(crate) fn ip(key: &FrontendKey) -> std::net::IpAddr {
    std::net::Ipv6Addr::from(key.address).to_canonical()
}

/// The other way; none for what no table has.
pub(crate) fn frontend(key: &FrontendKey) -> Option<table::Frontend> {
    let protocol = match key.protocol {
        protocol::TCP => Protocol::Tcp,
        protocol::UDP => Protocol::Udp,
        protocol::SCTP => Protocol::Sctp,
        _ => return None,
    };
    let scope = match key.scope {
        scope::ADDRESS => Scope::Address,
        scope::NODE_PORT => Scope::NodePort,
        _ => return None,
    };
    Some(table::Frontend { address: ip(key), port: u16::from_be_bytes(key.port), protocol, scope })
}

fn kind_of(role: Role) -> u8 {
    match role {
        Role::ClusterIp => kind::CLUSTER_IP,
        Role::NodePort => kind::NODE_PORT,
        Role::LoadBalancer => kind::LOAD_BALANCER,
        Role::ExternalIp => kind::EXTERNAL_IP,
    }
}

#[cfg(test)]
mod tests;
