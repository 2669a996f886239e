//! The kernel's maps, opened from their pins. Writes only; in which order is the reconciler's matter.

use std::io;
use std::mem::offset_of;
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;

use lockgate_ebpf_common::{
    Address, Allowed, Endpoint, Event, Frontend, FrontendKey, Service, SetWord, Settings, Slot, SourceRange,
    maps,
};
use rustix::thread::{MembarrierCommand, membarrier};

use crate::shared::SharedArray;
use crate::sys::{
    self, Plain, Prefixed, delete_batch, dump, lookup_each_cpu, map_info, open_pin, update, update_batch,
};

mod seam;

/// Every map the agent writes.
pub struct KernelMaps {
    frontends: OwnedFd,
    services: SharedArray<Service>,
    slots: SharedArray<Slot>,
    endpoints: SharedArray<Endpoint>,
    source_ranges: OwnedFd,
    node_addresses: OwnedFd,
    opted_out: OwnedFd,
    settings: OwnedFd,
    events: OwnedFd,
}

impl KernelMaps {
    /// Opens what is pinned below `pins`. `NotFound` before anything was loaded, `InvalidData` for another layout.
    pub fn open(pins: &Path) -> io::Result<Self> {
        Ok(Self {
            frontends: open::<FrontendKey, Frontend>(pins, maps::FRONTENDS)?,
            services: SharedArray::new(open::<u32, Service>(pins, maps::SERVICES)?)?,
            slots: SharedArray::new(open::<u32, Slot>(pins, maps::SLOTS)?)?,
            endpoints: SharedArray::new(open::<u32, Endpoint>(pins, maps::ENDPOINTS)?)?,
            source_ranges: open::<Prefixed<SourceRange>, Allowed>(pins, maps::SOURCE_RANGES)?,
            node_addresses: open::<Address, u32>(pins, maps::NODE_ADDRESSES)?,
            opted_out: open::<u64, u32>(pins, maps::OPTED_OUT)?,
            settings: open::<u32, Settings>(pins, maps::SETTINGS)?,
            events: open::<u32, u64>(pins, maps::EVENTS)?,
        })
    }

    /// Every frontend.
    pub fn frontends(&self) -> io::Result<Vec<(FrontendKey, Frontend)>> {
        dump(self.frontends.as_fd())
    }

    /// Writes frontends, new ones and others; an error says how many were written before it.
    pub fn put_frontends(
        &mut self,
        keys: &[FrontendKey],
        values: &[Frontend],
    ) -> Result<(), (usize, io::Error)> {
        update_batch(self.frontends.as_fd(), keys, values)
    }

    /// Removes frontends; an error says how many were removed before it.
    pub fn delete_frontends(&mut self, keys: &[FrontendKey]) -> Result<(), (usize, io::Error)> {
        delete_batch(self.frontends.as_fd(), keys)
    }

    /// The elements of `SERVICES`, `SLOTS` and `ENDPOINTS`.
    pub fn arrays(
        &mut self,
    ) -> (&mut SharedArray<Service>, &mut SharedArray<Slot>, &mut SharedArray<Endpoint>) {
        (&mut self.services, &mut self.slots, &mut self.endpoints)
    }

    /// The commit: from now on, who reads the Service's set reads what `word` names. False beyond the end.
    #[must_use]
    pub fn commit(&mut self, service: u32, local: bool, word: SetWord) -> bool {
        let offset = if local { offset_of!(Service, local) } else { offset_of!(Service, cluster) };
        self.services.commit(service, offset, word.0)
    }

    /// Stores what of a Service may change while it serves: flags, affinity timeout, algorithm. False beyond the
    /// end.
    #[must_use]
    pub fn store_settings(&mut self, index: u32, service: &Service) -> bool {
        self.services.store(index, offset_of!(Service, flags), service.flags)
            && self.services.store(index, offset_of!(Service, affinity_timeout), service.affinity_timeout)
            && self.services.store(index, offset_of!(Service, algorithm), service.algorithm)
    }

    /// Stores [`Endpoint::sets`]. False beyond the end.
    #[must_use]
    pub fn store_sets(&mut self, index: u32, sets: u8) -> bool {
        self.endpoints.store(index, offset_of!(Endpoint, sets), sets)
    }

    /// Every source range with its prefix length.
    pub fn source_ranges(&self) -> io::Result<Vec<(Prefixed<SourceRange>, Allowed)>> {
        dump(self.source_ranges.as_fd())
    }

    /// Writes a source range.
    pub fn put_source_range(&mut self, range: &Prefixed<SourceRange>, value: Allowed) -> io::Result<()> {
        update(self.source_ranges.as_fd(), range, &value)
    }

    /// Removes a source range.
    pub fn delete_source_range(&mut self, range: &Prefixed<SourceRange>) -> io::Result<()> {
        delete_batch(self.source_ranges.as_fd(), &[*range]).map_err(|(_, error)| error)
    }

    /// Writes [`lockgate_ebpf_common::node_address`] flags.
    pub fn put_node_address(&mut self, address: &Address, flags: u32) -> io::Result<()> {
        update(self.node_addresses.as_fd(), address, &flags)
    }

    /// Removes an address of the node.
    pub fn delete_node_address(&mut self, address: &Address) -> io::Result<()> {
        delete_batch(self.node_addresses.as_fd(), &[*address]).map_err(|(_, error)| error)
    }

    /// Every address of the node.
    pub fn node_addresses(&self) -> io::Result<Vec<(Address, u32)>> {
        dump(self.node_addresses.as_fd())
    }

    /// Leaves the sockets of the network namespace with this cookie alone.
    pub fn opt_out(&mut self, cookie: u64) -> io::Result<()> {
        update(self.opted_out.as_fd(), &cookie, &0_u32)
    }

    /// Writes the settings.
    pub fn put_settings(&mut self, settings: &Settings) -> io::Result<()> {
        update(self.settings.as_fd(), &0_u32, settings)
    }

    /// How often each [`Event`] was, over all CPUs, in the order of [`Event::ALL`].
    pub fn events(&self) -> io::Result<[u64; Event::ALL.len()]> {
        let cpus = aya::util::nr_cpus().map_err(|(_, error)| error)?;
        let mut counts = [0; Event::ALL.len()];
        for (index, count) in counts.iter_mut().enumerate() {
            *count = lookup_each_cpu(self.events.as_fd(), index as u32, cpus)?.iter().sum();
        }
        Ok(counts)
    }

    /// Returns after every program that could still see what was replaced before has ended: the kernel waits for
    /// an RCU grace period in this membarrier, some milliseconds. On one CPU it does not wait; there, a program
    /// that was preempted meanwhile is caught by [`Slot::owner`].
    pub fn grace_period(&self) -> io::Result<()> {
        Ok(membarrier(MembarrierCommand::Global)?)
    }
}

/// Opens the map of this name, if its keys and values have these sizes.
fn open<K: Plain, V: Plain>(pins: &Path, name: &str) -> io::Result<OwnedFd> {
    let map = open_pin(&pins.join(name))?;
    let sys::MapInfo { key_size, value_size, .. } = map_info(map.as_fd())?;
    if (key_size as usize, value_size as usize) != (size_of::<K>(), size_of::<V>()) {
        return Err(io::Error::new(
            io::ErrorKind::InvalidData,
            format!("pinned map {name} has another layout"),
        ));
    }
    Ok(map)
}
