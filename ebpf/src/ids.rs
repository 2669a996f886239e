//! Indices and runs of slots: given out once, and again only after nobody in
//! the kernel can still hold them.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::time::Duration;

/// For how long what was given up is not given out again. A program that read
/// an index ends far sooner: this stands in for an RCU grace period.
pub const QUARANTINE: Duration = Duration::from_secs(1);

/// Indices of one map. Index 0 is never given out.
#[derive(Debug)]
pub(crate) struct Ids {
    capacity: u32,
    /// From here on none was ever given out.
    next: u32,
    free: Vec<u32>,
    /// Oldest first.
    parked: VecDeque<(Duration, u32)>,
}

impl Ids {
    /// All but those `used` are free, and those up to `touched` from
    /// [`QUARANTINE`] after `now` on: a predecessor may just have given them up.
    pub(crate) fn restore(capacity: u32, used: &BTreeSet<u32>, touched: u32, now: Duration) -> Ids {
        let next = touched.max(used.last().copied().unwrap_or(0)).saturating_add(1);
        let parked = (1..next).filter(|index| !used.contains(index)).map(|index| (now, index)).collect();
        Ids { capacity, next, free: Vec::new(), parked }
    }

    /// An index that nobody has; none if the map is full.
    pub(crate) fn take(&mut self, now: Duration) -> Option<u32> {
        while let Some((since, index)) = self.parked.front().copied()
            && since + QUARANTINE <= now
        {
            self.parked.pop_front();
            self.free.push(index);
        }
        self.free.pop().or_else(|| {
            let index = (self.next < self.capacity).then_some(self.next)?;
            self.next += 1;
            Some(index)
        })
    }

    /// Gives `index` up.
    pub(crate) fn give(&mut self, index: u32, now: Duration) {
        self.parked.push_back((now, index));
    }
}

/// A run of neighbouring slots.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Run {
    pub(crate) base: u32,
    /// Not 0.
    pub(crate) len: u32,
}

/// The slots map: the smallest free run that is long enough is cut.
#[derive(Debug, Default)]
pub(crate) struct Runs {
    /// By base; no two touch.
    free: BTreeMap<u32, u32>,
    /// The same as length and base.
    by_len: BTreeSet<(u32, u32)>,
    /// Oldest first.
    parked: VecDeque<(Duration, Run)>,
}

impl Runs {
    /// All but those `used` are free, which no two words share. What lies
    /// between them and below `touched` is parked as in [`Ids::restore`].
    pub(crate) fn restore(capacity: u32, used: &BTreeSet<Run>, touched: u32, now: Duration) -> Runs {
        let mut runs = Runs::default();
        let mut at = 0;
        for run in used {
            if run.base > at {
                runs.give(Run { base: at, len: run.base - at }, now);
            }
            at = at.max(run.base + run.len);
        }
        let touched = touched.min(capacity);
        if touched > at {
            runs.give(Run { base: at, len: touched - at }, now);
            at = touched;
        }
        if capacity > at {
            runs.insert(Run { base: at, len: capacity - at });
        }
        runs
    }

    /// A run of `len` slots; none if there is no such.
    pub(crate) fn take(&mut self, len: u32, now: Duration) -> Option<Run> {
        while let Some((since, run)) = self.parked.front().copied()
            && since + QUARANTINE <= now
        {
            self.parked.pop_front();
            self.insert(run);
        }
        let (found, base) = *self.by_len.range((len, 0)..).next()?;
        self.remove(base, found);
        if found > len {
            self.insert(Run { base: base + len, len: found - len });
        }
        Some(Run { base, len })
    }

    /// Gives a run up that a word has named.
    pub(crate) fn give(&mut self, run: Run, now: Duration) {
        self.parked.push_back((now, run));
    }

    fn insert(&mut self, mut run: Run) {
        if let Some((&base, &len)) = self.free.range(..run.base).next_back()
            && base + len == run.base
        {
            self.remove(base, len);
            run = Run { base, len: len + run.len };
        }
        let end = run.base + run.len;
        if let Some(&len) = self.free.get(&end) {
            self.remove(end, len);
            run.len += len;
        }
        self.free.insert(run.base, run.len);
        self.by_len.insert((run.len, run.base));
    }

    fn remove(&mut self, base: u32, len: u32) {
        self.free.remove(&base);
        self.by_len.remove(&(len, base));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn indices_rest_before_they_are_given_again() {
        let second = Duration::from_secs;
        let mut ids = Ids::restore(4, &[2].into(), 2, second(0));
        assert_eq!(ids.take(second(0)), Some(3));
        assert_eq!(ids.take(second(0)), None, "1 was a predecessor's");
        assert_eq!(ids.take(second(1)), Some(1));
        ids.give(2, second(1));
        assert_eq!(ids.take(second(1) + Duration::from_millis(999)), None);
        assert_eq!(ids.take(second(2)), Some(2));
    }

    #[test]
    fn random_runs_never_overlap_and_join_again() {
        for seed in 0..200 {
            let mut rng = fastrand::Rng::with_seed(seed);
            let mut runs = Runs::restore(64, &BTreeSet::new(), 0, Duration::ZERO);
            let mut held: Vec<Run> = Vec::new();
            let mut now = Duration::ZERO;
            for _ in 0..200 {
                now += Duration::from_millis(rng.u64(..700));
                if rng.bool() && !held.is_empty() {
                    let run = held.swap_remove(rng.usize(..held.len()));
                    if rng.bool() { runs.give(run, now) } else { runs.insert(run) }
                } else if let Some(run) = runs.take(rng.u32(1..9), now) {
                    assert!(run.base + run.len <= 64);
                    let apart =
                        |other: &Run| run.base + run.len <= other.base || other.base + other.len <= run.base;
                    assert!(held.iter().all(apart), "{run:?} overlaps, seed {seed}");
                    held.push(run);
                }
            }
            held.drain(..).for_each(|run| runs.insert(run));
            assert_eq!(runs.take(64, now + QUARANTINE), Some(Run { base: 0, len: 64 }), "seed {seed}");
        }
    }

    #[test]
    fn a_restored_map_keeps_what_is_used() {
        let used = [Run { base: 2, len: 3 }, Run { base: 5, len: 1 }].into();
        let mut runs = Runs::restore(9, &used, 7, Duration::ZERO);
        assert_eq!(runs.take(2, Duration::ZERO), Some(Run { base: 7, len: 2 }));
        assert_eq!(runs.take(1, Duration::ZERO), None, "a predecessor may just have given up the rest");
        assert_eq!(runs.take(2, QUARANTINE), Some(Run { base: 0, len: 2 }));
        assert_eq!(runs.take(1, QUARANTINE), Some(Run { base: 6, len: 1 }));
    }
}
