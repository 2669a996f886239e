//! What maps hold, in the words of the table: for people, and to tell the difference to what is desired.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, SocketAddr};

use ipnet::IpNet;
use lockgate_ebpf_common::{Service, SetWord, Slot, algorithm, kind, scope, service as flag};
use serde::Serialize;

use crate::maps::{MapError, Maps, Which, socket_address};
use crate::reconcile::{algorithm_of, frontend, ip, places};
use crate::table::{self, Frontend, Role, ServiceTable};

/// Everything that is served, or should be.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Live {
    /// What packets may be addressed to.
    pub frontends: BTreeMap<Frontend, Target>,
    /// Addresses whose other ports are rejected.
    pub cluster_ips: BTreeSet<IpAddr>,
}

/// What a frontend leads to.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Target {
    /// Which address of its Service it is.
    pub role: Role,
    /// The set of traffic policy `Cluster`.
    pub cluster: Set,
    /// The set of traffic policy `Local`.
    pub local: Set,
    /// `internalTrafficPolicy: Local`
    pub internal_local: bool,
    /// `externalTrafficPolicy: Local`
    pub external_local: bool,
    /// Seconds a client keeps its endpoint.
    pub affinity: Option<u32>,
    /// Who may come, if not everybody.
    pub source_ranges: Option<BTreeSet<IpNet>>,
    /// How the kernel chooses: `random`, `source_hash` or `round_robin`.
    pub algorithm: &'static str,
}

/// A set of endpoints.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Set {
    /// One of these.
    Endpoints(BTreeSet<SocketAddr>),
    /// None anywhere: clients are refused.
    Reject,
    /// None for these clients: they get no answer.
    Drop,
    /// Its run is not its own: damaged.
    Torn,
}

impl Live {
    /// What `maps` hold. With `of` only these frontends, without cluster IPs.
    ///
    /// # Errors
    /// A map cannot be read.
    pub fn read(maps: &impl Maps, of: Option<&BTreeSet<Frontend>>) -> Result<Live, MapError> {
        let mut ranges: BTreeMap<u32, Vec<(u32, IpNet)>> = BTreeMap::new();
        for (prefix, range, allowed) in maps.source_ranges()? {
            let index = u32::from_be_bytes(range.service);
            ranges
                .entry(index)
                .or_default()
                .extend(network(prefix, range.address).map(|one| (allowed.generation, one)));
        }
        let mut live = Live::default();
        for (key, value) in maps.frontends()? {
            if key.scope == scope::CLUSTER_ADDRESS && of.is_none() {
                live.cluster_ips.insert(ip(&key));
            }
            let Some(frontend) = frontend(&key).filter(|one| of.is_none_or(|of| of.contains(one))) else {
                continue;
            };
            if !(1..maps.capacity().services).contains(&value.service) {
                continue;
            }
            let service = maps.service(value.service);
            // Another Service is there: programs take the frontend for absent, too.
            if service.generation == value.generation {
                let own = ranges.get(&value.service).into_iter().flatten();
                let own = own.filter(|(generation, _)| *generation == u32::from(service.generation));
                let target =
                    target(maps, value.service, &service, value.kind, own.map(|(_, one)| *one).collect());
                live.frontends.insert(frontend, target);
            }
        }
        Ok(live)
    }

    /// What maps should hold for `table`. With `of` as [`Live::read`].
    pub fn desired(table: &ServiceTable, of: Option<&BTreeSet<Frontend>>) -> Live {
        let wanted = |frontend: &Frontend| of.is_none_or(|of| of.contains(frontend));
        let frontends = table.frontends.iter().filter(|(frontend, _)| wanted(frontend));
        let targets = frontends.filter_map(|(frontend, target)| {
            Some((*frontend, desired(target.role, table.services.get(&target.service)?)))
        });
        Live {
            frontends: targets.collect(),
            cluster_ips: if of.is_none() {
                table.cluster_ips.iter().copied().collect()
            } else {
                BTreeSet::new()
            },
        }
    }

    /// In words, how `self` differs from `desired`; a line for each frontend and address.
    pub fn difference(&self, desired: &Live) -> Vec<String> {
        let mut lines = Vec::new();
        let keys: BTreeSet<&Frontend> = self.frontends.keys().chain(desired.frontends.keys()).collect();
        for key in keys {
            match (self.frontends.get(key), desired.frontends.get(key)) {
                (Some(live), Some(desired)) if live == desired => {}
                (Some(live), Some(desired)) => {
                    lines.push(format!("{key}: is {live:?}, should be {desired:?}"))
                }
                (Some(_), None) => lines.push(format!("{key}: is there, should not be")),
                (None, _) => lines.push(format!("{key}: is not there")),
            }
        }
        for ip in self.cluster_ips.symmetric_difference(&desired.cluster_ips) {
            let state =
                if desired.cluster_ips.contains(ip) { "is not there" } else { "is there, should not be" };
            lines.push(format!("cluster IP {ip}: {state}"));
        }
        lines
    }
}

fn target(maps: &impl Maps, index: u32, service: &Service, kind: u8, ranges: BTreeSet<IpNet>) -> Target {
    let is = |flag| service.flags & flag != 0;
    Target {
        role: role(kind),
        cluster: set(maps, index, Which::Cluster, service.cluster),
        local: set(maps, index, Which::Local, service.local),
        internal_local: is(flag::INTERNAL_LOCAL),
        external_local: is(flag::EXTERNAL_LOCAL),
        affinity: is(flag::AFFINITY).then_some(service.affinity_timeout),
        source_ranges: is(flag::SOURCE_RANGES).then_some(ranges),
        algorithm: name(service.algorithm),
    }
}

fn set(maps: &impl Maps, index: u32, which: Which, word: SetWord) -> Set {
    match (word.count(), word.base()) {
        (0, SetWord::EMPTY_DROP) => return Set::Drop,
        (0, _) => return Set::Reject,
        _ => {}
    }
    let owner = Slot::owner_of(index, which == Which::Local, word);
    let run = word.base()..word.base().saturating_add(u32::from(word.count()));
    if run.end > maps.capacity().slots {
        return Set::Torn;
    }
    let mut endpoints = BTreeSet::new();
    for slot in run.map(|at| maps.slot(at)) {
        if slot.owner != owner || slot.endpoint >= maps.capacity().endpoints {
            return Set::Torn;
        }
        endpoints.insert(socket_address(&maps.endpoint(slot.endpoint)));
    }
    Set::Endpoints(endpoints)
}

fn desired(role: Role, service: &table::Service) -> Target {
    let set = |set: &[table::Endpoint]| {
        let chosen = places(service.algorithm, set).into_iter().map(|place| set[place].address);
        let chosen: BTreeSet<SocketAddr> = chosen.collect();
        match (chosen.is_empty(), service.has_endpoints) {
            (false, _) => Set::Endpoints(chosen),
            (true, true) => Set::Drop,
            (true, false) => Set::Reject,
        }
    };
    Target {
        role,
        cluster: set(&service.cluster),
        local: set(&service.local),
        internal_local: service.internal_local,
        external_local: service.external_local,
        affinity: service.affinity,
        source_ranges: service
            .source_ranges
            .as_ref()
            .map(|ranges| ranges.iter().map(|one| one.trunc()).collect()),
        algorithm: name(algorithm_of(service.algorithm)),
    }
}

fn role(kind: u8) -> Role {
    match kind {
        kind::NODE_PORT => Role::NodePort,
        kind::LOAD_BALANCER => Role::LoadBalancer,
        kind::EXTERNAL_IP => Role::ExternalIp,
        _ => Role::ClusterIp,
    }
}

fn name(algorithm: u8) -> &'static str {
    match algorithm {
        algorithm::SOURCE_HASH => "source_hash",
        algorithm::ROUND_ROBIN => "round_robin",
        _ => "random",
    }
}

/// The network behind the index of a source range; none for what nobody wrote.
fn network(prefix: u32, address: [u8; 16]) -> Option<IpNet> {
    let address = std::net::Ipv6Addr::from(address);
    let prefix = prefix.checked_sub(32)?;
    match address.to_ipv4_mapped().filter(|_| prefix >= 96) {
        Some(address) => IpNet::new(address.into(), u8::try_from(prefix - 96).ok()?).ok(),
        None => IpNet::new(address.into(), u8::try_from(prefix).ok()?).ok(),
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::time::Duration;

    use super::*;
    use crate::Reconciler;
    use crate::maps::{Capacity, FakeMaps};
    use crate::table::{Algorithm, Endpoint, Family, Protocol, ServiceName};

    fn table() -> ServiceTable {
        let name = ServiceName { name: "n/s:80".into(), protocol: Protocol::Tcp, family: Family::Ipv4 };
        let endpoint = |last, weight| Endpoint { address: SocketAddr::from(([10, 1, 0, last], 80)), weight };
        let service = table::Service {
            cluster: [endpoint(1, 1), endpoint(2, 0)].into(),
            has_endpoints: true,
            external_local: true,
            affinity: Some(3),
            source_ranges: Some(["10.0.0.0/8".parse().unwrap(), "192.0.2.1/32".parse().unwrap()].into()),
            algorithm: Algorithm::Weighted,
            ..table::Service::default()
        };
        let frontend = |ip: [u8; 4], role| {
            (
                Frontend::new(SocketAddr::from((ip, 80)), Protocol::Tcp),
                table::Target { service: name.clone(), role },
            )
        };
        ServiceTable {
            frontends: [
                frontend([10, 96, 0, 1], Role::ClusterIp),
                frontend([203, 0, 113, 1], Role::LoadBalancer),
            ]
            .into_iter()
            .collect(),
            services: [(name.clone(), Arc::new(service))].into_iter().collect(),
            cluster_ips: [IpAddr::from([10, 96, 0, 1])].into_iter().collect(),
            ..ServiceTable::default()
        }
    }

    #[test]
    fn what_is_live_reads_as_what_is_desired() {
        let table = table();
        let maps = FakeMaps::new(Capacity { services: 8, slots: 64, endpoints: 16 }, 16);
        let mut reconciler = Reconciler::new(maps, Duration::ZERO).unwrap();
        let desired = Live::desired(&table, None);
        let before = Live::read(reconciler.maps(), None).unwrap().difference(&desired);
        assert_eq!(before.len(), 3, "{before:?}");
        assert_eq!(before[0], "10.96.0.1:80/tcp: is not there");
        assert_eq!(reconciler.apply(&table, Duration::ZERO).pending, 0);
        let live = Live::read(reconciler.maps(), None).unwrap();
        assert_eq!(live, desired);
        let target = live.frontends.values().next().unwrap();
        let only = ["10.1.0.1:80".parse().unwrap()].into();
        assert_eq!(
            (&target.cluster, &target.local),
            (&Set::Endpoints(only), &Set::Drop),
            "a weight of 0 gets nothing"
        );

        // Somebody else writes.
        reconciler.maps_mut().state.slots.iter_mut().for_each(|slot| slot.owner ^= 1);
        reconciler.maps_mut().state.frontends.pop_last();
        let one = [*desired.frontends.keys().next().unwrap()].into();
        let damaged =
            Live::read(reconciler.maps(), Some(&one)).unwrap().difference(&Live::desired(&table, Some(&one)));
        assert!(damaged.len() == 1 && damaged[0].contains("cluster: Torn"), "{damaged:?}");
    }
}
