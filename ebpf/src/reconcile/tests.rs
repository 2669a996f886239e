use std::cell::RefCell;
use std::collections::{BTreeMap, VecDeque};
use std::net::SocketAddr;
use std::rc::Rc;
use std::sync::Arc;

use fastrand::Rng;

use super::*;
use crate::ids::QUARANTINE;
use crate::maps::{Capacity, FakeMaps, FaultyMaps, Lookup, State, Which};
use crate::table::{Algorithm, Endpoint, EndpointSet, Family, Node, Service};
use lockgate_ebpf_common::SetWord;

const CAPACITY: Capacity = Capacity { services: 64, slots: 4096, endpoints: 512 };

fn name(number: u8) -> ServiceName {
    ServiceName { name: format!("n/s{number}:80").into(), protocol: Protocol::Tcp, family: Family::Ipv4 }
}

fn vip(number: u8) -> table::Frontend {
    table::Frontend::new(SocketAddr::from(([10, 96, 0, number], 80)), Protocol::Tcp)
}

fn set(rng: &mut Rng) -> EndpointSet {
    let mut numbers: Vec<u8> = (0..rng.usize(..5)).map(|_| rng.u8(..8)).collect();
    numbers.sort_unstable();
    numbers.dedup();
    numbers
        .into_iter()
        .map(|one| Endpoint { address: SocketAddr::from(([10, 1, 0, one], 80)), weight: 1 })
        .collect()
}

fn service(rng: &mut Rng) -> Service {
    let (cluster, local) = (set(rng), set(rng));
    Service {
        has_endpoints: !cluster.is_empty() || !local.is_empty() || rng.bool(),
        cluster,
        local,
        internal_local: rng.u8(..4) == 0,
        external_local: rng.u8(..4) == 0,
        affinity: (rng.u8(..4) == 0).then(|| rng.u32(1..100)),
        source_ranges: (rng.u8(..4) == 0)
            .then(|| [format!("10.{}.0.0/16", rng.u8(..3)).parse().unwrap()].into()),
        algorithm: [Algorithm::Random, Algorithm::RoundRobin, Algorithm::Weighted][rng.usize(..3)],
    }
}

/// `table` with a few changes: sets, VIPs that move, Services that come and go.
fn change(table: &ServiceTable, rng: &mut Rng) -> ServiceTable {
    let mut table = table.clone();
    for _ in 0..rng.usize(1..5) {
        let number = rng.u8(..8);
        match rng.u8(..6) {
            0 => drop(table.services.remove(&name(number))),
            1 => drop(table.frontends.remove(&vip(rng.u8(..12)))),
            2 => {
                let target = Target { service: name(number), role: Role::ClusterIp };
                table.frontends.insert(vip(rng.u8(..12)), target);
            }
            3 => drop(table.cluster_ips.insert(vip(number).address)),
            4 => drop(table.cluster_ips.remove(&vip(number).address)),
            _ => drop(table.services.insert(name(number), Arc::new(service(rng)))),
        }
    }
    let frontends = table.frontends.iter().filter(|(_, target)| table.services.contains_key(&target.service));
    table.frontends = frontends.map(|(key, target)| (*key, target.clone())).collect();
    table
}

/// What a lookup of `which` set means in `service`.
fn meaning(service: &Service, which: Which) -> Lookup {
    let set = if which == Which::Local { &service.local } else { &service.cluster };
    match (set.is_empty(), service.has_endpoints) {
        (false, _) => Lookup::Endpoints(set.iter().map(|one| one.address).collect()),
        (true, true) => Lookup::Drop,
        (true, false) => Lookup::Reject,
    }
}

/// The obvious model: the tables that may be live in part, and the words that a
/// reader may still hold.
#[derive(Default)]
struct Model {
    now: Duration,
    tables: VecDeque<ServiceTable>,
    words: BTreeMap<(u32, bool), SetWord>,
    /// Replaced then, and what it meant.
    held: Vec<(Duration, u32, Which, SetWord, Lookup)>,
    writes: usize,
}

impl Model {
    /// What may be found at `frontend`: a target of any table in the Service of any table.
    fn allows(&self, frontend: &table::Frontend, which: Which, found: &Lookup) -> bool {
        let targets = || self.tables.iter().map(|table| table.frontends.get(frontend));
        if *found == Lookup::Absent {
            return targets().any(|target| target.is_none())
                || targets().flatten().any(|target| {
                    self.tables.iter().any(|table| !table.services.contains_key(&target.service))
                });
        }
        targets().flatten().any(|target| {
            let services = self.tables.iter().filter_map(|table| table.services.get(&target.service));
            services.into_iter().any(|service| meaning(service, which) == *found)
        })
    }

    fn check(&mut self, state: &State) {
        self.writes += 1;
        for number in 0..12 {
            let key = frontend_key(&vip(number));
            for which in Which::ALL {
                let found = state.lookup(&key, which);
                assert!(self.allows(&vip(number), which, &found), "{number} {which:?} found {found:?}");
            }
        }
        // A reader that loaded a word before still finds what it meant.
        for (since, index, which, word, meant) in &self.held {
            if *since + QUARANTINE > self.now {
                assert_eq!(state.set(*index, *which, *word), *meant, "index {index}, held since {since:?}");
            }
        }
        // Words that a frontend leads to; others nobody reads.
        let used: BTreeSet<u32> = state.frontends.values().map(|(index, ..)| *index).collect();
        let mut words = BTreeMap::new();
        for index in used {
            let service = &state.services[index as usize];
            words.insert((index, false), service.cluster);
            words.insert((index, true), service.local);
        }
        for ((index, local), old) in std::mem::replace(&mut self.words, words) {
            if old.count() > 0 && self.words.get(&(index, local)) != Some(&old) {
                let which = if local { Which::Local } else { Which::Cluster };
                let meant = state.set(index, which, old);
                assert!(!matches!(meant, Lookup::Torn(_)), "torn as it was replaced");
                self.held.push((self.now, index, which, old, meant));
            }
        }
        let now = self.now;
        self.held.retain(|(since, ..)| *since + QUARANTINE > now);
    }
}

struct World {
    model: Rc<RefCell<Model>>,
    reconciler: Option<Reconciler<FaultyMaps>>,
    table: ServiceTable,
    now: Duration,
    seed: u64,
}

impl Drop for World {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("seed {}", self.seed);
        }
    }
}

impl World {
    fn new(seed: u64, probability: f64) -> World {
        let model = Rc::new(RefCell::new(Model::default()));
        let mut maps = FakeMaps::new(CAPACITY, 100);
        let watched = model.clone();
        maps.watch = Some(Box::new(move |state| watched.borrow_mut().check(state)));
        let reconciler = Reconciler::new(FaultyMaps::new(maps, seed, probability), Duration::ZERO).unwrap();
        model.borrow_mut().tables.push_back(ServiceTable::default());
        World {
            model,
            reconciler: Some(reconciler),
            table: ServiceTable::default(),
            now: Duration::ZERO,
            seed,
        }
    }

    fn reconciler(&mut self) -> &mut Reconciler<FaultyMaps> {
        self.reconciler.as_mut().unwrap()
    }

    fn apply(&mut self, step: Duration) -> Outcome {
        self.now += step;
        let (now, table) = (self.now, self.table.clone());
        {
            let mut model = self.model.borrow_mut();
            model.now = now;
            model.tables.push_back(table.clone());
        }
        let outcome = self.reconciler().apply(&table, now);
        if outcome.pending == 0 {
            let mut model = self.model.borrow_mut();
            let before = model.tables.len() - 1;
            model.tables.drain(..before);
        }
        outcome
    }

    fn restart(&mut self) {
        let maps = self.reconciler.take().unwrap().into_maps();
        self.reconciler = Some(Reconciler::new(maps, self.now).unwrap());
    }

    /// Everything is as the table says.
    fn assert_live(&mut self) {
        let table = self.table.clone();
        let state = &self.reconciler().maps().maps.state;
        for (frontend, target) in &table.frontends {
            for which in Which::ALL {
                let wanted = meaning(&table.services[&target.service], which);
                assert_eq!(state.lookup(&frontend_key(frontend), which), wanted, "{frontend} {which:?}");
            }
        }
        assert_eq!(state.frontends.len(), table.frontends.len() + table.cluster_ips.len());
        let mut ranges = 0;
        let mut endpoints = 0;
        for service in table.services.values() {
            ranges += service.source_ranges.as_ref().map_or(0, |ranges| ranges.len());
            let both: BTreeSet<_> = service.cluster.iter().chain(service.local.iter()).collect();
            endpoints += both.len();
        }
        assert_eq!(state.source_ranges.len(), ranges);
        assert_eq!(state.endpoints.iter().filter(|one| one.sets != 0).count(), endpoints);
    }
}

#[test]
fn every_write_leaves_each_frontend_at_one_whole_set() {
    for seed in 0..150 {
        let mut rng = Rng::with_seed(seed);
        let mut world = World::new(seed, 0.0);
        for _ in 0..40 {
            world.table = change(&world.table, &mut rng);
            let outcome = world.apply(Duration::from_millis(rng.u64(..800)));
            assert_eq!(outcome, Outcome::default(), "seed {seed}");
            world.assert_live();
        }
    }
}

#[test]
fn faults_are_retried_and_show_no_half_written_set() {
    for seed in 0..150 {
        let mut rng = Rng::with_seed(seed);
        let mut world = World::new(seed, 0.2);
        for _ in 0..25 {
            if rng.u8(..4) > 0 {
                world.table = change(&world.table, &mut rng);
            }
            if rng.u8(..8) == 0 {
                world.restart();
            }
            world.apply(Duration::from_millis(rng.u64(..800)));
        }
        world.reconciler().maps_mut().probability = 0.0;
        let outcome = world.apply(Duration::ZERO);
        assert_eq!(outcome, Outcome::default(), "seed {seed}");
        world.assert_live();
    }
}

#[test]
fn applying_again_writes_nothing_and_neither_does_a_successor() {
    for seed in 0..100 {
        let mut rng = Rng::with_seed(seed);
        let mut world = World::new(seed, 0.0);
        for _ in 0..10 {
            world.table = change(&world.table, &mut rng);
            world.apply(Duration::from_millis(300));
        }
        // Services without a frontend are found by nobody: a successor gives them new places.
        let named: BTreeSet<_> =
            world.table.frontends.values().map(|target| target.service.clone()).collect();
        world.table.services = world
            .table
            .services
            .iter()
            .filter(|(name, _)| named.contains(*name))
            .map(|(name, service)| (name.clone(), service.clone()))
            .collect();
        world.apply(Duration::from_millis(300));
        let before = world.reconciler().maps().maps.state.clone();
        let writes = world.reconciler().maps().maps.writes;
        world.apply(Duration::from_millis(300));
        world.restart();
        let outcome = world.apply(Duration::from_millis(300));
        assert_eq!(outcome, Outcome::default());
        assert_eq!(world.reconciler().maps().maps.writes, writes, "seed {seed}");
        assert_eq!(world.reconciler().maps().maps.state, before, "seed {seed}");
    }
}

#[test]
fn a_full_map_leaves_the_rest_served() {
    let mut rng = Rng::with_seed(1);
    let mut maps = FakeMaps::new(Capacity { services: 4, ..CAPACITY }, 100);
    maps.watch = None;
    let mut reconciler = Reconciler::new(maps, Duration::ZERO).unwrap();
    let mut table = ServiceTable::default();
    for number in 0..6 {
        table.services.insert(name(number), Arc::new(service(&mut rng)));
        table.frontends.insert(vip(number), Target { service: name(number), role: Role::ClusterIp });
    }
    let outcome = reconciler.apply(&table, Duration::ZERO);
    assert_eq!(outcome.pending, 6, "three services and their frontends: {outcome:?}");
    assert!(outcome.errors.iter().all(|(_, error)| *error == MapError::Full("SERVICES")));
    assert_eq!(reconciler.maps().state.frontends.len(), 3);
    for number in 0..3 {
        table.services.remove(&name(number));
        table.frontends.remove(&vip(number));
    }
    assert_ne!(
        reconciler.apply(&table, Duration::ZERO).pending,
        0,
        "places rest before they are given again"
    );
    assert_eq!(reconciler.apply(&table, QUARANTINE).pending, 0);
    assert_eq!(reconciler.maps().state.frontends.len(), 3);
}

#[test]
fn the_node_has_its_addresses() {
    let mut reconciler = Reconciler::new(FakeMaps::new(CAPACITY, 10), Duration::ZERO).unwrap();
    let with = |addresses: &[(&str, bool)]| {
        let addresses = addresses.iter().map(|(one, serves)| (one.parse().unwrap(), *serves)).collect();
        ServiceTable { node: Arc::new(Node { addresses, ..Node::default() }), ..ServiceTable::default() }
    };
    reconciler
        .apply(&with(&[("192.168.0.1", true), ("fd00::1", false), ("127.0.0.1", true)]), Duration::ZERO);
    let flags: Vec<u32> = reconciler.maps().state.node_addresses.values().copied().collect();
    assert_eq!(flags, [3, 1, 0]);
    reconciler.apply(&with(&[("192.168.0.2", true)]), Duration::ZERO);
    assert_eq!(reconciler.maps().state.node_addresses.len(), 1);
}

#[test]
fn maglev_and_weights_become_slots() {
    let mut reconciler = Reconciler::new(FakeMaps::new(CAPACITY, 10), Duration::ZERO).unwrap();
    let endpoint = |last, weight| Endpoint { address: SocketAddr::from(([10, 1, 0, last], 80)), weight };
    let mut apply = |algorithm| {
        let service = Service {
            cluster: [endpoint(1, 1), endpoint(2, 3)].into(),
            has_endpoints: true,
            algorithm,
            ..Service::default()
        };
        let table = ServiceTable {
            services: [(name(0), Arc::new(service))].into_iter().collect(),
            frontends: [(vip(0), Target { service: name(0), role: Role::ClusterIp })].into_iter().collect(),
            ..ServiceTable::default()
        };
        assert_eq!(reconciler.apply(&table, Duration::ZERO), Outcome::default());
        let found = reconciler.maps().state.lookup(&frontend_key(&vip(0)), Which::Cluster);
        let Lookup::Endpoints(found) = found else { panic!("{found:?}") };
        let of_first = found.iter().filter(|one| **one == endpoint(1, 1).address).count();
        (of_first, found.len())
    };
    assert_eq!(apply(Algorithm::Random), (1, 2));
    assert_eq!(apply(Algorithm::Weighted), (1, 4));
    let (of_first, all) = apply(Algorithm::Maglev);
    assert_eq!(all, 251);
    assert!(of_first.abs_diff(all / 4) <= 2, "{of_first} of {all}");
}
