//! The maps, named as in `lockgate_ebpf_common::maps`. The loader may make them larger than said here.

use aya_ebpf::bindings::{BPF_F_MMAPABLE, BPF_F_NO_PREALLOC};
use aya_ebpf::btf_maps::{Array, HashMap, LpmTrie, LruHashMap, PerCpuArray, SkStorage};
use aya_ebpf::macros::btf_map;
use lockgate_ebpf_common::{
    Address, Affinity, AffinityKey, Allowed, Endpoint, Event, Frontend, FrontendKey, Reverse, Service,
    Settings, Slot, SourceRange, capacity,
};

const MMAPABLE: usize = BPF_F_MMAPABLE as usize;
const NO_PREALLOC: usize = BPF_F_NO_PREALLOC as usize;

#[btf_map]
pub static FRONTENDS: HashMap<FrontendKey, Frontend, { capacity::FRONTENDS as usize }, NO_PREALLOC> =
    HashMap::new();

#[btf_map]
pub static SERVICES: Array<Service, { capacity::SERVICES as usize }, MMAPABLE> = Array::new();

#[btf_map]
pub static SLOTS: Array<Slot, { capacity::SLOTS as usize }, MMAPABLE> = Array::new();

#[btf_map]
pub static ENDPOINTS: Array<Endpoint, { capacity::ENDPOINTS as usize }, MMAPABLE> = Array::new();

#[btf_map]
pub static AFFINITY: LruHashMap<AffinityKey, Affinity, { capacity::AFFINITY as usize }> = LruHashMap::new();

#[btf_map]
pub static REVERSE: SkStorage<Reverse> = SkStorage::new();

#[btf_map]
pub static SOURCE_RANGES: LpmTrie<SourceRange, Allowed, { capacity::SOURCE_RANGES as usize }> =
    LpmTrie::new();

#[btf_map]
pub static NODE_ADDRESSES: HashMap<Address, u32, { capacity::NODE_ADDRESSES as usize }, NO_PREALLOC> =
    HashMap::new();

#[btf_map]
pub static OPTED_OUT: HashMap<u64, u32, { capacity::OPTED_OUT as usize }, NO_PREALLOC> = HashMap::new();

#[btf_map]
pub static SETTINGS: Array<Settings, 1> = Array::new();

#[btf_map]
pub static EVENTS: PerCpuArray<u64, { Event::ALL.len() }> = PerCpuArray::new();

/// Counts `event` on this CPU.
#[inline(always)]
pub fn count(event: Event) {
    if let Some(counter) = EVENTS.get_ptr_mut(event as u32) {
        // SAFETY: the verifier knows the pointer as a value of the map, and a program is not interrupted on its
        // CPU by another that counts here, save in softirq, where a lost count is all that can come of it.
        unsafe { *counter = (*counter).wrapping_add(1) }
    }
}
