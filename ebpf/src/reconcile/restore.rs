//! What a predecessor left in the maps.

use std::collections::{BTreeSet, HashMap};
use std::time::Duration;

use lockgate_ebpf_common::{Frontend, FrontendKey, Slot, scope};

use super::Pools;
use super::service::{Entry, Live, run_of};
use crate::ids::{Ids, Run, Runs};
use crate::maps::{MapError, Maps, Which, socket_address};

pub(super) struct Restored {
    pub(super) services: HashMap<u32, Live>,
    pub(super) frontends: HashMap<FrontendKey, Frontend>,
    pub(super) ids: Pools,
}

/// Reads everything that frontends lead to. What they do not lead to is free.
pub(super) fn read(maps: &impl Maps, now: Duration) -> Result<Restored, MapError> {
    let capacity = maps.capacity();
    let frontends: HashMap<FrontendKey, Frontend> = maps.frontends()?.into_iter().collect();
    let mut taken = Taken::default();
    let mut services: HashMap<u32, Live> = HashMap::new();
    let mut found: Vec<&Frontend> = frontends
        .iter()
        .filter(|(key, _)| key.scope != scope::CLUSTER_ADDRESS)
        .map(|(_, frontend)| frontend)
        .filter(|one| (1..capacity.services).contains(&one.service))
        .filter(|one| maps.service(one.service).generation == one.generation)
        .collect();
    found.sort_unstable_by_key(|one| one.service);
    found.dedup_by_key(|one| one.service);
    for frontend in found {
        services.insert(frontend.service, service(maps, frontend.service, &mut taken));
    }
    for (prefix, range) in maps.source_ranges()? {
        let index = u32::from_be_bytes(range.service);
        // Those of nobody do no harm: their generation is another's.
        if let Some(live) = services.get_mut(&index) {
            live.ranges.insert((prefix, range.service, range.address));
        }
    }
    let last = |is: &dyn Fn(u32) -> bool, top: u32| (1..top).rev().find(|index| is(*index)).unwrap_or(0);
    let last_service = last(&|index| maps.service(index).generation != 0, capacity.services);
    let last_endpoint = last(&|index| maps.endpoint(index).generation != 0, capacity.endpoints);
    let used: BTreeSet<u32> = services.keys().copied().collect();
    let ids = Pools {
        services: Ids::restore(capacity.services, &used, last_service, now),
        endpoints: Ids::restore(capacity.endpoints, &taken.endpoints, last_endpoint, now),
        slots: Runs::restore(capacity.slots, &taken.runs, now),
        now,
    };
    Ok(Restored { services, frontends, ids })
}

#[derive(Default)]
struct Taken {
    endpoints: BTreeSet<u32>,
    runs: BTreeSet<Run>,
}

impl Taken {
    /// Whether no Service before has a part of `run`.
    fn is_free(&self, run: Run) -> bool {
        let after = self.runs.range(run..).next();
        let before = self.runs.range(..run).next_back();
        before.is_none_or(|one| one.base + one.len <= run.base)
            && after.is_none_or(|one| run.base + run.len <= one.base)
    }
}

/// A set whose run is damaged or shared counts as empty, and is written anew.
fn service(maps: &impl Maps, index: u32, taken: &mut Taken) -> Live {
    let capacity = maps.capacity();
    let mut live = Live::found(index, maps.service(index), false);
    for which in Which::ALL {
        let word = *live.word(which);
        let Some(run) = run_of(word) else { continue };
        if run.base + run.len > capacity.slots || !taken.is_free(run) {
            continue;
        }
        let owner = Slot::owner_of(index, which == Which::Local, word);
        let slots: Vec<Slot> = (run.base..run.base + run.len).map(|at| maps.slot(at)).collect();
        let sound = |slot: &Slot| slot.owner == owner && (1..capacity.endpoints).contains(&slot.endpoint);
        if !slots.iter().all(sound) {
            continue;
        }
        for slot in &slots {
            let element = maps.endpoint(slot.endpoint);
            let entry = Entry { index: slot.endpoint, element };
            live.endpoints.entry(socket_address(&element)).or_insert(entry);
            taken.endpoints.insert(slot.endpoint);
        }
        taken.runs.insert(run);
        live.runs[which as usize] = Some(run);
        live.slots[which as usize] = slots.iter().map(|slot| slot.endpoint).collect();
    }
    live
}
