//! The kernel's maps as the reconciler wants them: single writes, each visible when the next one is.

use std::io;
use std::mem::offset_of;

use lockgate_ebpf_common::{
    Address, Allowed, Endpoint, Event, Frontend, FrontendKey, Service, SetWord, Slot, SourceRange,
    maps as name,
};

use super::KernelMaps;
use crate::maps::{Capacity, MapError, Maps, Which};
use crate::sys::Prefixed;

impl Maps for KernelMaps {
    fn capacity(&self) -> Capacity {
        Capacity {
            services: self.services.len(),
            // A word has no room for more.
            slots: self.slots.len().min(SetWord::LIMIT),
            endpoints: self.endpoints.len(),
        }
    }

    fn frontends(&self) -> Result<Vec<(FrontendKey, Frontend)>, MapError> {
        self.frontends().map_err(refused(name::FRONTENDS))
    }

    fn source_ranges(&self) -> Result<Vec<(u32, SourceRange, Allowed)>, MapError> {
        let ranges = self.source_ranges().map_err(refused(name::SOURCE_RANGES))?;
        Ok(ranges.into_iter().map(|(key, allowed)| (key.prefix_length, key.data, allowed)).collect())
    }

    fn node_addresses(&self) -> Result<Vec<(Address, u32)>, MapError> {
        self.node_addresses().map_err(refused(name::NODE_ADDRESSES))
    }

    fn service(&self, index: u32) -> Service {
        self.services.read(index).unwrap_or_default()
    }

    fn slot(&self, index: u32) -> Slot {
        self.slots.read(index).unwrap_or_default()
    }

    fn endpoint(&self, index: u32) -> Endpoint {
        self.endpoints.read(index).unwrap_or_default()
    }

    fn events(&self) -> Result<Vec<(&'static str, u64)>, MapError> {
        let counts = self.events().map_err(refused(name::EVENTS))?;
        Ok(Event::ALL.iter().zip(counts).map(|(event, count)| (event.name(), count)).collect())
    }

    fn write_service(&mut self, index: u32, service: &Service) -> Result<(), MapError> {
        inside(self.services.write(index, &[*service]), name::SERVICES)
    }

    fn write_settings(&mut self, index: u32, service: &Service) -> Result<(), MapError> {
        // Flags last: what they switch on is there.
        let stored = self.services.store(index, offset_of!(Service, algorithm), service.algorithm)
            && self.services.store(index, offset_of!(Service, affinity_timeout), service.affinity_timeout)
            && self.services.store(index, offset_of!(Service, flags), service.flags);
        inside(stored, name::SERVICES)
    }

    fn commit(&mut self, index: u32, which: Which, word: SetWord) -> Result<(), MapError> {
        inside(self.commit(index, which == Which::Local, word), name::SERVICES)
    }

    fn write_slots(&mut self, base: u32, slots: &[Slot]) -> Result<(), MapError> {
        inside(self.slots.write(base, slots), name::SLOTS)
    }

    fn write_endpoint(&mut self, index: u32, endpoint: &Endpoint) -> Result<(), MapError> {
        inside(self.endpoints.write(index, &[*endpoint]), name::ENDPOINTS)
    }

    fn write_sets(&mut self, index: u32, sets: u8) -> Result<(), MapError> {
        inside(self.store_sets(index, sets), name::ENDPOINTS)
    }

    fn put_frontend(&mut self, key: &FrontendKey, value: &Frontend) -> Result<(), MapError> {
        self.put_frontends(&[*key], &[*value]).map_err(|(_, error)| refused(name::FRONTENDS)(error))
    }

    fn remove_frontend(&mut self, key: &FrontendKey) -> Result<(), MapError> {
        absent(self.delete_frontends(&[*key]).map_err(|(_, error)| error), name::FRONTENDS)
    }

    fn put_source_range(&mut self, prefix: u32, range: &SourceRange, value: Allowed) -> Result<(), MapError> {
        self.put_source_range(&prefixed(prefix, range), value).map_err(refused(name::SOURCE_RANGES))
    }

    fn remove_source_range(&mut self, prefix: u32, range: &SourceRange) -> Result<(), MapError> {
        absent(self.delete_source_range(&prefixed(prefix, range)), name::SOURCE_RANGES)
    }

    fn put_node_address(&mut self, address: &Address, flags: u32) -> Result<(), MapError> {
        self.put_node_address(address, flags).map_err(refused(name::NODE_ADDRESSES))
    }

    fn remove_node_address(&mut self, address: &Address) -> Result<(), MapError> {
        absent(self.delete_node_address(address), name::NODE_ADDRESSES)
    }
}

fn prefixed(prefix_length: u32, range: &SourceRange) -> Prefixed<SourceRange> {
    Prefixed { prefix_length, data: *range }
}

/// An index beyond the end finds no room.
fn inside(written: bool, map: &'static str) -> Result<(), MapError> {
    written.then_some(()).ok_or(MapError::Full(map))
}

/// Hashes say `E2BIG` when they are full, tries `ENOSPC`.
fn refused(map: &'static str) -> impl Fn(io::Error) -> MapError {
    move |error| match error.raw_os_error() {
        Some(libc::E2BIG | libc::ENOSPC) => MapError::Full(map),
        _ => MapError::Refused(map, error.to_string()),
    }
}

/// What is gone already is no error.
fn absent(result: io::Result<()>, map: &'static str) -> Result<(), MapError> {
    match result {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(refused(map)(error)),
        _ => Ok(()),
    }
}
