//! One Service in the maps: its line, its two runs, its endpoints, its ranges.

use std::collections::{BTreeMap, BTreeSet};
use std::net::SocketAddr;

use ipnet::IpNet;
use lockgate_ebpf_common::{
    Allowed, Endpoint, Service, SetWord, Slot, SourceRange, algorithm, endpoint, maps as name,
    service as flag,
};

use super::Pools;
use crate::ids::Run;
use crate::maglev;
use crate::maps::{MapError, Maps, Which, address, source_range};
use crate::table::{self, Algorithm};

/// What the maps hold of one Service. Always what was really written.
#[derive(Debug)]
pub(super) struct Live {
    index: u32,
    /// As written, but for `turn`, which is the kernel's.
    pub(super) line: Service,
    /// By set: its run, if that is this Service's alone.
    pub(super) runs: [Option<Run>; 2],
    /// By set: the run's slots, as indices into `ENDPOINTS`.
    pub(super) slots: [Vec<u32>; 2],
    pub(super) endpoints: BTreeMap<SocketAddr, Entry>,
    /// To the generation each was written for.
    pub(super) ranges: BTreeMap<RangeKey, u32>,
    /// Has been as desired once: frontends may lead to it.
    complete: bool,
}

/// Prefix length, and the two fields of a [`SourceRange`].
pub(super) type RangeKey = (u32, [u8; 4], [u8; 16]);

/// An element of `ENDPOINTS`.
#[derive(Clone, Copy, Debug)]
pub(super) struct Entry {
    pub(super) index: u32,
    pub(super) element: Endpoint,
}

impl Live {
    /// A Service at an index that was nobody's, still without endpoints.
    pub(super) fn create(maps: &mut impl Maps, ids: &mut Pools) -> Result<Live, MapError> {
        let index = ids.services.take(ids.now).ok_or(MapError::Full(name::SERVICES))?;
        let before = maps.service(index);
        // Generations go on where the predecessor at this index stopped.
        let empty = |word: SetWord| SetWord::new(SetWord::EMPTY_REJECT, 0, word.generation().wrapping_add(1));
        let line = Service {
            cluster: empty(before.cluster),
            local: empty(before.local),
            generation: before.generation.wrapping_add(1),
            ..Service::default()
        };
        if let Err(error) = maps.write_service(index, &line) {
            ids.services.give(index, ids.now);
            return Err(error);
        }
        Ok(Live::found(index, line, true))
    }

    /// What is at `index`, so far without its runs, endpoints and ranges.
    pub(super) fn found(index: u32, line: Service, new: bool) -> Live {
        Live {
            index,
            line,
            runs: [None, None],
            slots: [Vec::new(), Vec::new()],
            endpoints: BTreeMap::new(),
            ranges: BTreeMap::new(),
            complete: !new,
        }
    }

    pub(super) fn index(&self) -> u32 {
        self.index
    }

    pub(super) fn generation(&self) -> u16 {
        self.line.generation
    }

    /// Whether frontends may lead to it.
    pub(super) fn is_complete(&self) -> bool {
        self.complete
    }

    pub(super) fn word(&mut self, which: Which) -> &mut SetWord {
        match which {
            Which::Cluster => &mut self.line.cluster,
            Which::Local => &mut self.line.local,
        }
    }

    /// Makes it as `desired`. After an error it is something between that
    /// still forwards to one whole set.
    pub(super) fn update(
        &mut self,
        desired: &table::Service,
        node: &table::Node,
        maps: &mut impl Maps,
        ids: &mut Pools,
    ) -> Result<(), MapError> {
        let mut wanted: BTreeMap<SocketAddr, u8> = BTreeMap::new();
        for (set, flag) in [(&desired.cluster, endpoint::CLUSTER), (&desired.local, endpoint::LOCAL)] {
            set.iter().for_each(|one| *wanted.entry(one.address).or_default() |= flag);
        }
        self.join(&wanted, node, maps, ids)?;
        let sets = [(Which::Cluster, &desired.cluster), (Which::Local, &desired.local)];
        // A set that becomes empty does so only when nothing may use it any more.
        for (which, set) in sets.iter().filter(|(_, set)| !set.is_empty()) {
            self.commit(*which, &self.places(desired.algorithm, set), desired, maps, ids)?;
        }
        self.settings(desired, maps)?;
        for (which, _) in sets.iter().filter(|(_, set)| set.is_empty()) {
            self.commit(*which, &[], desired, maps, ids)?;
        }
        self.complete = true;
        self.leave(&wanted, maps, ids)
    }

    /// Endpoints are there, and in the sets they will be in, before any slot names them.
    fn join(
        &mut self,
        wanted: &BTreeMap<SocketAddr, u8>,
        node: &table::Node,
        maps: &mut impl Maps,
        ids: &mut Pools,
    ) -> Result<(), MapError> {
        for (at, sets) in wanted {
            let flags = if node.addresses.contains_key(&at.ip()) { endpoint::HOST_NETWORK } else { 0 };
            let Some(entry) = self.endpoints.get_mut(at) else {
                let entry = add(at, *sets, flags, maps, ids)?;
                self.endpoints.insert(*at, entry);
                continue;
            };
            let joined = entry.element.sets | sets;
            if flags != entry.element.flags {
                let element = Endpoint { flags, sets: joined, ..entry.element };
                maps.write_endpoint(entry.index, &element)?;
                entry.element = element;
            } else if joined != entry.element.sets {
                maps.write_sets(entry.index, joined)?;
                entry.element.sets = joined;
            }
        }
        Ok(())
    }

    /// What the slots of a run name, in their order.
    fn places(&self, algorithm: Algorithm, set: &[table::Endpoint]) -> Vec<u32> {
        let index = |place: usize| self.endpoints[&set[place].address].index; // joined before
        places(algorithm, set).into_iter().map(index).collect()
    }

    fn commit(
        &mut self,
        which: Which,
        places: &[u32],
        desired: &table::Service,
        maps: &mut impl Maps,
        ids: &mut Pools,
    ) -> Result<(), MapError> {
        let old = *self.word(which);
        let generation = old.generation().wrapping_add(1);
        let run = if places.is_empty() {
            let empty = if desired.has_endpoints { SetWord::EMPTY_DROP } else { SetWord::EMPTY_REJECT };
            if old.count() == 0 && old.base() == empty {
                return Ok(());
            }
            return self.store(which, SetWord::new(empty, 0, generation), places, maps, ids);
        } else if self.slots[which as usize] == places {
            return Ok(());
        } else {
            ids.slots.take(places.len() as u32, ids.now).ok_or(MapError::Full(name::SLOTS))?
        };
        let word = SetWord::new(run.base, places.len() as u16, generation);
        let owner = Slot::owner_of(self.index, which == Which::Local, word);
        let slots: Vec<Slot> = places.iter().map(|index| Slot { endpoint: *index, owner }).collect();
        let written = maps.write_slots(run.base, &slots);
        let stored = written.and_then(|()| self.store(which, word, places, maps, ids));
        if stored.is_err() {
            // No word has named it. Should the store have happened all the same, a reader sees
            // foreign owners once it is given out again; so it rests as if it had been used.
            ids.slots.give(run, ids.now);
        }
        stored
    }

    /// The one store, and what the old word named is given up.
    fn store(
        &mut self,
        which: Which,
        word: SetWord,
        places: &[u32],
        maps: &mut impl Maps,
        ids: &mut Pools,
    ) -> Result<(), MapError> {
        maps.commit(self.index, which, word)?;
        *self.word(which) = word;
        if let Some(run) = std::mem::replace(&mut self.runs[which as usize], run_of(word)) {
            ids.slots.give(run, ids.now);
        }
        self.slots[which as usize] = places.to_vec();
        Ok(())
    }

    fn settings(&mut self, desired: &table::Service, maps: &mut impl Maps) -> Result<(), MapError> {
        let bit = |on: bool, flag: u32| if on { flag } else { 0 };
        let line = Service {
            flags: bit(desired.internal_local, flag::INTERNAL_LOCAL)
                | bit(desired.external_local, flag::EXTERNAL_LOCAL)
                | bit(desired.affinity.is_some(), flag::AFFINITY)
                | bit(desired.source_ranges.is_some(), flag::SOURCE_RANGES),
            affinity_timeout: desired.affinity.unwrap_or(0),
            algorithm: algorithm_of(desired.algorithm),
            ..self.line
        };
        let networks = desired.source_ranges.iter().flat_map(|ranges| ranges.iter());
        let wanted: BTreeSet<_> = networks.map(|network| range_key(self.index, network)).collect();
        // Who may come is there before anybody is asked, and goes after nobody is.
        let generation = u32::from(self.line.generation);
        for range in &wanted {
            if self.ranges.get(range) != Some(&generation) {
                maps.put_source_range(range.0, &source(*range), Allowed { generation })?;
                self.ranges.insert(*range, generation);
            }
        }
        if line != self.line {
            maps.write_settings(self.index, &line)?;
            self.line = line;
        }
        let gone: Vec<RangeKey> =
            self.ranges.keys().filter(|range| !wanted.contains(range)).copied().collect();
        for range in gone {
            maps.remove_source_range(range.0, &source(range))?;
            self.ranges.remove(&range);
        }
        Ok(())
    }

    /// After the commits: clients that stuck to what has left choose anew.
    fn leave(
        &mut self,
        wanted: &BTreeMap<SocketAddr, u8>,
        maps: &mut impl Maps,
        ids: &mut Pools,
    ) -> Result<(), MapError> {
        let stay = |at: &SocketAddr| wanted.get(at).copied().unwrap_or(0);
        let differs = |(at, entry): &(&SocketAddr, &mut Entry)| entry.element.sets != stay(at);
        for (at, entry) in self.endpoints.iter_mut().filter(differs) {
            maps.write_sets(entry.index, stay(at))?;
            entry.element.sets = stay(at);
            if entry.element.sets == 0 {
                ids.endpoints.give(entry.index, ids.now);
            }
        }
        self.endpoints.retain(|_, entry| entry.element.sets != 0);
        Ok(())
    }

    /// Gives everything up. No frontend leads here.
    pub(super) fn retire(&mut self, maps: &mut impl Maps, ids: &mut Pools) -> Result<(), MapError> {
        while let Some((&range, _)) = self.ranges.first_key_value() {
            maps.remove_source_range(range.0, &source(range))?;
            self.ranges.remove(&range);
        }
        self.leave(&BTreeMap::new(), maps, ids)?;
        for run in self.runs.iter_mut().filter_map(Option::take) {
            ids.slots.give(run, ids.now);
        }
        ids.services.give(self.index, ids.now);
        Ok(())
    }
}

/// The places of a run, as indices into `set`.
pub(crate) fn places(algorithm: Algorithm, set: &[table::Endpoint]) -> Vec<usize> {
    match algorithm {
        Algorithm::Maglev => {
            maglev::table(set, maglev::size(set.len())).into_iter().map(|place| place as usize).collect()
        }
        Algorithm::Weighted => {
            let total: u64 = set.iter().map(|one| u64::from(one.weight)).sum();
            // Shares are kept as well as the count of a set allows.
            let scale = total.div_ceil(table::MAX_ENDPOINTS as u64).max(1);
            let times = |one: &table::Endpoint| (u64::from(one.weight) / scale) as usize;
            let all = set.iter().enumerate();
            all.flat_map(|(place, one)| std::iter::repeat_n(place, times(one))).collect()
        }
        _ => (0..set.len()).collect(),
    }
}

/// What the kernel does for `algorithm`.
pub(crate) fn algorithm_of(algorithm: Algorithm) -> u8 {
    match algorithm {
        Algorithm::Random | Algorithm::Weighted | Algorithm::LeastConnections => algorithm::RANDOM,
        Algorithm::SourceHash | Algorithm::Maglev => algorithm::SOURCE_HASH,
        Algorithm::RoundRobin => algorithm::ROUND_ROBIN,
    }
}

fn add(
    at: &SocketAddr,
    sets: u8,
    flags: u8,
    maps: &mut impl Maps,
    ids: &mut Pools,
) -> Result<Entry, MapError> {
    let index = ids.endpoints.take(ids.now).ok_or(MapError::Full(name::ENDPOINTS))?;
    let generation = maps.endpoint(index).generation.wrapping_add(1);
    let element =
        Endpoint { address: address(at.ip()), port: at.port().to_be_bytes(), sets, flags, generation };
    match maps.write_endpoint(index, &element) {
        Ok(()) => Ok(Entry { index, element }),
        Err(error) => {
            ids.endpoints.give(index, ids.now);
            Err(error)
        }
    }
}

/// The run that `word` names, if it is of a set that is not empty.
pub(super) fn run_of(word: SetWord) -> Option<Run> {
    (word.count() > 0).then(|| Run { base: word.base(), len: u32::from(word.count()) })
}

fn range_key(index: u32, network: &IpNet) -> RangeKey {
    let (prefix, range) = source_range(index, network);
    (prefix, range.service, range.address)
}

pub(super) fn source((_, service, address): RangeKey) -> SourceRange {
    SourceRange { service, address }
}
