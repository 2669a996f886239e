//! What a predecessor left in the maps.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::time::Duration;

use lockgate_ebpf_common::{Frontend, FrontendKey, Slot, scope};

use super::Pools;
use super::service::{Entry, Live, RangeKey, run_of, source};
use crate::ids::{Ids, Run, Runs};
use crate::maps::{MapError, Maps, Which, socket_address};

pub(super) struct Restored {
    pub(super) services: HashMap<u32, Live>,
    pub(super) frontends: HashMap<FrontendKey, Frontend>,
    pub(super) strays: Strays,
    pub(super) ids: Pools,
}

/// What a predecessor left half-way and nothing leads to. Its indices are
/// nobody's before it is cleared: a range of an earlier Service that is longer
/// than one of the next would keep that one's clients out.
#[derive(Debug, Default)]
pub(super) struct Strays {
    /// Indices into `ENDPOINTS` of elements that say they are in a set.
    endpoints: BTreeSet<u32>,
    /// By index into `SERVICES`.
    ranges: BTreeMap<u32, Vec<RangeKey>>,
}

impl Strays {
    /// How many are left.
    pub(super) fn len(&self) -> usize {
        self.endpoints.len() + self.ranges.len()
    }

    /// Clears them. What fails is left for the next call; returns its first error.
    pub(super) fn clear(&mut self, maps: &mut impl Maps, ids: &mut Pools) -> Result<(), MapError> {
        let mut result = Ok(());
        let now = ids.now;
        self.endpoints.retain(|index| match maps.write_sets(*index, 0) {
            Ok(()) => {
                ids.endpoints.give(*index, now);
                false
            }
            Err(error) => {
                keep_first(&mut result, error);
                true
            }
        });
        self.ranges.retain(|index, ranges| {
            ranges.retain(|range| match maps.remove_source_range(range.0, &source(*range)) {
                Ok(()) => false,
                Err(error) => {
                    keep_first(&mut result, error);
                    true
                }
            });
            if ranges.is_empty() && (1..maps.capacity().services).contains(index) {
                ids.services.give(*index, now);
            }
            !ranges.is_empty()
        });
        result
    }
}

fn keep_first(result: &mut Result<(), MapError>, error: MapError) {
    if result.is_ok() {
        *result = Err(error);
    }
}

/// Reads everything that frontends lead to, and what is left beside it.
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
    let mut strays = Strays::default();
    for (prefix, range, value) in maps.source_ranges()? {
        let index = u32::from_be_bytes(range.service);
        let key = (prefix, range.service, range.address);
        match services.get_mut(&index) {
            Some(live) => drop(live.ranges.insert(key, value.generation)),
            None => strays.ranges.entry(index).or_default().push(key),
        }
    }
    let last = |is: &dyn Fn(u32) -> bool, top: u32| (1..top).rev().find(|index| is(*index)).unwrap_or(0);
    let last_service = last(&|index| maps.service(index).generation != 0, capacity.services);
    let last_endpoint = last(&|index| maps.endpoint(index).generation != 0, capacity.endpoints);
    let touched = (0..capacity.slots).rev().find(|at| maps.slot(*at).endpoint != 0).map_or(0, |at| at + 1);
    let of_nobody = (1..=last_endpoint).filter(|index| !taken.endpoints.contains(index));
    strays.endpoints = of_nobody.filter(|index| maps.endpoint(*index).sets != 0).collect();
    taken.endpoints.extend(&strays.endpoints);
    let with_ranges = strays.ranges.keys().filter(|index| (1..capacity.services).contains(*index));
    let used: BTreeSet<u32> = services.keys().chain(with_ranges).copied().collect();
    let ids = Pools {
        services: Ids::restore(capacity.services, &used, last_service, now),
        endpoints: Ids::restore(capacity.endpoints, &taken.endpoints, last_endpoint, now),
        slots: Runs::restore(capacity.slots, &taken.runs, touched, now),
        now,
    };
    Ok(Restored { services, frontends, strays, ids })
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
        let other = |slot: &Slot| {
            let known = live.endpoints.get(&socket_address(&maps.endpoint(slot.endpoint)));
            known.is_some_and(|entry| entry.index != slot.endpoint)
        };
        let sound = |slot: &Slot| {
            slot.owner == owner && (1..capacity.endpoints).contains(&slot.endpoint) && !other(slot)
        };
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
