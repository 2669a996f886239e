//! Maps in memory, for tests and for showing what would be written.

use std::collections::BTreeMap;
use std::fmt;
use std::net::SocketAddr;

use lockgate_ebpf_common::{endpoint, scope};

use super::*;

/// What the maps hold.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[allow(missing_docs)] // the fields are the maps
pub struct State {
    pub frontends: BTreeMap<FrontendKey, (u32, u16, u8)>,
    pub services: Vec<Service>,
    pub slots: Vec<Slot>,
    pub endpoints: Vec<Endpoint>,
    /// By service index (network byte order), address and prefix length, to the generation.
    pub source_ranges: BTreeMap<([u8; 4], Address, u32), u32>,
    pub node_addresses: BTreeMap<Address, u32>,
}

/// What a program would find.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Lookup {
    /// No frontend.
    Absent,
    /// One of these; sorted, each as often as it has slots.
    Endpoints(Vec<SocketAddr>),
    /// An empty set whose clients are refused.
    Reject,
    /// An empty set whose clients get no answer.
    Drop,
    /// A run that is not its word's: never, if writes are ordered well.
    Torn(SetWord),
}

impl State {
    /// As the programs look up: the frontend, its Service, then the set.
    pub fn lookup(&self, key: &FrontendKey, which: Which) -> Lookup {
        let Some((index, generation, _)) = self.frontends.get(key).copied() else { return Lookup::Absent };
        let service = &self.services[index as usize];
        if service.generation != generation {
            return Lookup::Absent;
        }
        self.set(index, which, if which == Which::Local { service.local } else { service.cluster })
    }

    /// What `word` of a Service means now, also if another has replaced it.
    pub fn set(&self, index: u32, which: Which, word: SetWord) -> Lookup {
        match (word.count(), word.base()) {
            (0, SetWord::EMPTY_DROP) => return Lookup::Drop,
            (0, _) => return Lookup::Reject,
            _ => {}
        }
        let owner = Slot::owner_of(index, which == Which::Local, word);
        let run = word.base() as usize..word.base() as usize + usize::from(word.count());
        let Some(run) = self.slots.get(run).filter(|run| run.iter().all(|slot| slot.owner == owner)) else {
            return Lookup::Torn(word);
        };
        let endpoint = |slot: &Slot| socket_address(&self.endpoints[slot.endpoint as usize]);
        let mut endpoints: Vec<SocketAddr> = run.iter().map(endpoint).collect();
        endpoints.sort_unstable();
        Lookup::Endpoints(endpoints)
    }
}

/// Maps in memory that never fail but when full.
#[derive(Default)]
pub struct FakeMaps {
    /// What they hold.
    pub state: State,
    /// Frontends there is room for.
    pub most_frontends: usize,
    /// Called after every single write.
    pub watch: Option<Box<dyn FnMut(&State)>>,
    /// Writes so far.
    pub writes: usize,
}

impl FakeMaps {
    /// Empty maps with room for this much.
    pub fn new(capacity: Capacity, frontends: usize) -> FakeMaps {
        FakeMaps {
            state: State {
                services: vec![Service::default(); capacity.services as usize],
                slots: vec![Slot::default(); capacity.slots as usize],
                endpoints: vec![Endpoint::default(); capacity.endpoints as usize],
                ..State::default()
            },
            most_frontends: frontends,
            ..FakeMaps::default()
        }
    }

    fn wrote(&mut self) {
        self.writes += 1;
        if let Some(watch) = &mut self.watch {
            watch(&self.state);
        }
    }
}

impl Maps for FakeMaps {
    fn capacity(&self) -> Capacity {
        Capacity {
            services: self.state.services.len() as u32,
            slots: self.state.slots.len() as u32,
            endpoints: self.state.endpoints.len() as u32,
        }
    }

    fn frontends(&self) -> Result<Vec<(FrontendKey, Frontend)>, MapError> {
        let value = |(service, generation, kind)| Frontend { service, generation, kind, zero: 0 };
        Ok(self.state.frontends.iter().map(|(key, entry)| (*key, value(*entry))).collect())
    }

    fn source_ranges(&self) -> Result<Vec<(u32, SourceRange, Allowed)>, MapError> {
        let ranges = self.state.source_ranges.iter().map(|(&(service, address, prefix), &generation)| {
            (prefix, SourceRange { service, address }, Allowed { generation })
        });
        Ok(ranges.collect())
    }

    fn node_addresses(&self) -> Result<Vec<(Address, u32)>, MapError> {
        Ok(self.state.node_addresses.iter().map(|(address, flags)| (*address, *flags)).collect())
    }

    fn service(&self, index: u32) -> Service {
        self.state.services[index as usize]
    }

    fn slot(&self, index: u32) -> Slot {
        self.state.slots[index as usize]
    }

    fn endpoint(&self, index: u32) -> Endpoint {
        self.state.endpoints[index as usize]
    }

    fn write_service(&mut self, index: u32, service: &Service) -> Result<(), MapError> {
        self.state.services[index as usize] = *service;
        self.wrote();
        Ok(())
    }

    fn write_settings(&mut self, index: u32, service: &Service) -> Result<(), MapError> {
        let written = &mut self.state.services[index as usize];
        written.algorithm = service.algorithm;
        self.wrote();
        self.state.services[index as usize].affinity_timeout = service.affinity_timeout;
        self.wrote();
        self.state.services[index as usize].flags = service.flags;
        self.wrote();
        Ok(())
    }

    fn commit(&mut self, index: u32, which: Which, word: SetWord) -> Result<(), MapError> {
        let service = &mut self.state.services[index as usize];
        *(if which == Which::Local { &mut service.local } else { &mut service.cluster }) = word;
        self.wrote();
        Ok(())
    }

    fn write_slots(&mut self, base: u32, slots: &[Slot]) -> Result<(), MapError> {
        for (slot, index) in slots.iter().zip(base as usize..) {
            self.state.slots[index] = *slot;
            self.wrote();
        }
        Ok(())
    }

    fn write_endpoint(&mut self, index: u32, endpoint: &Endpoint) -> Result<(), MapError> {
        self.state.endpoints[index as usize] = *endpoint;
        self.wrote();
        Ok(())
    }

    fn write_sets(&mut self, index: u32, sets: u8) -> Result<(), MapError> {
        self.state.endpoints[index as usize].sets = sets;
        self.wrote();
        Ok(())
    }

    fn put_frontend(&mut self, key: &FrontendKey, value: &Frontend) -> Result<(), MapError> {
        if self.state.frontends.len() >= self.most_frontends && !self.state.frontends.contains_key(key) {
            return Err(MapError::Full(lockgate_ebpf_common::maps::FRONTENDS));
        }
        self.state.frontends.insert(*key, (value.service, value.generation, value.kind));
        self.wrote();
        Ok(())
    }

    fn remove_frontend(&mut self, key: &FrontendKey) -> Result<(), MapError> {
        self.state.frontends.remove(key);
        self.wrote();
        Ok(())
    }

    fn put_source_range(&mut self, prefix: u32, range: &SourceRange, value: Allowed) -> Result<(), MapError> {
        self.state.source_ranges.insert((range.service, range.address, prefix), value.generation);
        self.wrote();
        Ok(())
    }

    fn remove_source_range(&mut self, prefix: u32, range: &SourceRange) -> Result<(), MapError> {
        self.state.source_ranges.remove(&(range.service, range.address, prefix));
        self.wrote();
        Ok(())
    }

    fn put_node_address(&mut self, address: &Address, flags: u32) -> Result<(), MapError> {
        self.state.node_addresses.insert(*address, flags);
        self.wrote();
        Ok(())
    }

    fn remove_node_address(&mut self, address: &Address) -> Result<(), MapError> {
        self.state.node_addresses.remove(address);
        self.wrote();
        Ok(())
    }
}

/// What is live, as text: a line for each frontend, then its sets.
impl fmt::Display for State {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (key, (index, generation, kind)) in &self.frontends {
            let at = Endpoint { address: key.address, port: key.port, ..Endpoint::default() };
            let scope = match key.scope {
                scope::ADDRESS => "",
                scope::NODE_PORT => " node-port",
                _ => " cluster-address",
            };
            writeln!(
                f,
                "{}/{}{scope} kind {kind} -> {index}.{generation}",
                socket_address(&at),
                key.protocol
            )?;
            for which in Which::ALL {
                if key.scope != scope::CLUSTER_ADDRESS {
                    writeln!(f, "  {which:?} {:?}", self.lookup(key, which))?;
                }
            }
        }
        let sets = |one: &&Endpoint| one.sets & (endpoint::CLUSTER | endpoint::LOCAL) != 0;
        writeln!(f, "{} endpoints in sets", self.endpoints.iter().filter(sets).count())
    }
}

/// Maps of which every write may fail; one of several slots in the middle.
pub struct FaultyMaps {
    /// What works, if it does.
    pub maps: FakeMaps,
    /// From 0 to 1.
    pub probability: f64,
    random: u64,
}

impl FaultyMaps {
    /// The same failures for the same `seed`.
    pub fn new(maps: FakeMaps, seed: u64, probability: f64) -> FaultyMaps {
        FaultyMaps { maps, probability, random: seed }
    }

    /// splitmix64, to need no dependency outside tests.
    fn draw(&mut self) -> u64 {
        self.random = self.random.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut drawn = self.random;
        drawn = (drawn ^ (drawn >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        drawn = (drawn ^ (drawn >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        drawn ^ (drawn >> 31)
    }

    fn try_it(&mut self, map: &'static str) -> Result<(), MapError> {
        match (self.draw() >> 11) as f64 / (1_u64 << 53) as f64 >= self.probability {
            true => Ok(()),
            false => Err(MapError::Refused(map, "injected".to_owned())),
        }
    }
}

use lockgate_ebpf_common::maps as name;

impl Maps for FaultyMaps {
    fn capacity(&self) -> Capacity {
        self.maps.capacity()
    }

    fn frontends(&self) -> Result<Vec<(FrontendKey, Frontend)>, MapError> {
        self.maps.frontends()
    }

    fn source_ranges(&self) -> Result<Vec<(u32, SourceRange, Allowed)>, MapError> {
        self.maps.source_ranges()
    }

    fn node_addresses(&self) -> Result<Vec<(Address, u32)>, MapError> {
        self.maps.node_addresses()
    }

    fn service(&self, index: u32) -> Service {
        self.maps.service(index)
    }

    fn slot(&self, index: u32) -> Slot {
        self.maps.slot(index)
    }

    fn endpoint(&self, index: u32) -> Endpoint {
        self.maps.endpoint(index)
    }

    fn write_service(&mut self, index: u32, service: &Service) -> Result<(), MapError> {
        self.try_it(name::SERVICES)?;
        self.maps.write_service(index, service)
    }

    fn write_settings(&mut self, index: u32, service: &Service) -> Result<(), MapError> {
        self.try_it(name::SERVICES)?;
        self.maps.write_settings(index, service)
    }

    fn commit(&mut self, index: u32, which: Which, word: SetWord) -> Result<(), MapError> {
        self.try_it(name::SERVICES)?;
        self.maps.commit(index, which, word)
    }

    fn write_slots(&mut self, base: u32, slots: &[Slot]) -> Result<(), MapError> {
        if let Err(error) = self.try_it(name::SLOTS) {
            let done = (self.draw() as usize) % (slots.len() + 1);
            self.maps.write_slots(base, &slots[..done])?;
            return Err(error);
        }
        self.maps.write_slots(base, slots)
    }

    fn write_endpoint(&mut self, index: u32, endpoint: &Endpoint) -> Result<(), MapError> {
        self.try_it(name::ENDPOINTS)?;
        self.maps.write_endpoint(index, endpoint)
    }

    fn write_sets(&mut self, index: u32, sets: u8) -> Result<(), MapError> {
        self.try_it(name::ENDPOINTS)?;
        self.maps.write_sets(index, sets)
    }

    fn put_frontend(&mut self, key: &FrontendKey, value: &Frontend) -> Result<(), MapError> {
        self.try_it(name::FRONTENDS)?;
        self.maps.put_frontend(key, value)
    }

    fn remove_frontend(&mut self, key: &FrontendKey) -> Result<(), MapError> {
        self.try_it(name::FRONTENDS)?;
        self.maps.remove_frontend(key)
    }

    fn put_source_range(&mut self, prefix: u32, range: &SourceRange, value: Allowed) -> Result<(), MapError> {
        self.try_it(name::SOURCE_RANGES)?;
        self.maps.put_source_range(prefix, range, value)
    }

    fn remove_source_range(&mut self, prefix: u32, range: &SourceRange) -> Result<(), MapError> {
        self.try_it(name::SOURCE_RANGES)?;
        self.maps.remove_source_range(prefix, range)
    }

    fn put_node_address(&mut self, address: &Address, flags: u32) -> Result<(), MapError> {
        self.try_it(name::NODE_ADDRESSES)?;
        self.maps.put_node_address(address, flags)
    }

    fn remove_node_address(&mut self, address: &Address) -> Result<(), MapError> {
        self.try_it(name::NODE_ADDRESSES)?;
        self.maps.remove_node_address(address)
    }
}
