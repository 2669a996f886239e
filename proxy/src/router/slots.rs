//! Small numbers for names, so that the hot path indexes arrays. Numbers are
//! stable while anything names them and reused after, lowest first.

use std::sync::Arc;

use imbl::{OrdMap, OrdSet};

use crate::balance::CompiledPool;
use crate::table::PoolKey;

/// Hands out numbers. Persistent: a clone is a snapshot.
#[derive(Clone, Debug, Default)]
pub(super) struct Numbers {
    next: u32,
    free: OrdSet<u32>,
}

impl Numbers {
    pub(super) fn take(&mut self) -> u32 {
        if let Some(number) = self.free.get_min().copied() {
            self.free.remove(&number);
            return number;
        }
        self.next += 1;
        self.next - 1
    }

    pub(super) fn give_back(&mut self, number: u32) {
        debug_assert!(number < self.next && !self.free.contains(&number), "{number} was not taken");
        self.free.insert(number);
    }

    #[cfg(test)]
    pub(super) fn taken(&self) -> usize {
        self.next as usize - self.free.len()
    }
}

/// The slot of every pool key that a rule or the table's pools name.
#[derive(Clone, Debug, Default)]
pub(super) struct Slots {
    by_key: OrdMap<PoolKey, Slot>,
    numbers: Numbers,
}

#[derive(Clone, Copy, Debug, PartialEq)]
struct Slot {
    index: u32,
    /// How often the key is named: by each backend of each rule, and by the pools.
    names: u32,
}

impl Slots {
    pub(super) fn get(&self, key: &PoolKey) -> Option<u32> {
        self.by_key.get(key).map(|slot| slot.index)
    }

    /// One more name for `key`. The flag is set when this gave it its slot.
    pub(super) fn acquire(&mut self, key: &PoolKey) -> (u32, bool) {
        if let Some(slot) = self.by_key.get_mut(key) {
            slot.names += 1;
            return (slot.index, false);
        }
        let index = self.numbers.take();
        self.by_key.insert(key.clone(), Slot { index, names: 1 });
        (index, true)
    }

    /// One name less.
    pub(super) fn release(&mut self, key: &PoolKey) {
        let Some(slot) = self.by_key.get_mut(key) else {
            debug_assert!(false, "{key:?} was released more often than acquired");
            return;
        };
        slot.names -= 1;
        if slot.names == 0 {
            self.numbers.give_back(slot.index);
            self.by_key.remove(key);
        }
    }

    #[cfg(test)]
    pub(super) fn len(&self) -> usize {
        assert_eq!(self.by_key.len(), self.numbers.taken());
        self.by_key.len()
    }
}

const CHUNK: usize = 256;

type Chunk = [Arc<CompiledPool>; CHUNK];

/// Pools by slot, in chunks that generations share.
#[derive(Clone, Debug, Default)]
pub(super) struct Pools {
    chunks: Arc<[Arc<Chunk>]>,
}

impl Pools {
    pub(super) fn get(&self, slot: u32) -> Option<&CompiledPool> {
        let chunk = self.chunks.get(slot as usize / CHUNK)?;
        Some(&chunk[slot as usize % CHUNK])
    }

    /// As [`Pools::get`], to be held.
    pub(super) fn share(&self, slot: u32) -> Option<Arc<CompiledPool>> {
        let chunk = self.chunks.get(slot as usize / CHUNK)?;
        Some(chunk[slot as usize % CHUNK].clone())
    }

    pub(super) fn set(&mut self, pool: CompiledPool) {
        let slot = pool.slot as usize;
        if slot / CHUNK >= self.chunks.len() {
            self.grow(slot / CHUNK + 1);
        }
        let chunk = &mut Arc::make_mut(&mut self.chunks)[slot / CHUNK];
        Arc::make_mut(chunk)[slot % CHUNK] = Arc::new(pool);
    }

    /// Doubles, so that a first compile of many pools copies each chunk pointer few times.
    fn grow(&mut self, chunks: usize) {
        let chunks = chunks.next_power_of_two();
        let nothing = Arc::new(CompiledPool::empty(u32::MAX));
        let vacant: Arc<Chunk> = Arc::new(std::array::from_fn(|_| nothing.clone()));
        let added = std::iter::repeat_n(vacant, chunks - self.chunks.len());
        self.chunks = self.chunks.iter().cloned().chain(added).collect();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn key(n: u32) -> PoolKey {
        PoolKey(n.to_string().into())
    }

    #[test]
    fn slots_live_as_long_as_a_name() {
        let mut slots = Slots::default();
        assert_eq!(slots.acquire(&key(1)), (0, true));
        assert_eq!(slots.acquire(&key(2)), (1, true));
        assert_eq!(slots.acquire(&key(1)), (0, false));
        slots.release(&key(1));
        assert_eq!(slots.get(&key(1)), Some(0));
        slots.release(&key(1));
        assert_eq!(slots.get(&key(1)), None);
        assert_eq!(slots.acquire(&key(3)), (0, true), "the lowest free slot is reused");
        assert_eq!(slots.len(), 2);
    }

    #[test]
    fn pools_grow_and_share_chunks() {
        let mut pools = Pools::default();
        assert!(pools.get(0).is_none());
        for slot in 0..1_000 {
            pools.set(CompiledPool::empty(slot));
        }
        let before = pools.clone();
        pools.set(CompiledPool::empty(700));
        let shared = pools.chunks.iter().zip(before.chunks.iter()).filter(|(a, b)| Arc::ptr_eq(a, b)).count();
        assert_eq!(shared, pools.chunks.len() - 1);
        assert!((0..1_000).all(|slot| pools.get(slot).unwrap().slot == slot));
    }
}
