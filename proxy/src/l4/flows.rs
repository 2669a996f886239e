//! Flows by client, with those that have been silent longest at hand.

use std::collections::HashMap;
use std::net::SocketAddr;

use slab::Slab;

/// Flows of one listener and worker. Each is in one of two lists, ordered by when somebody last spoke.
pub(super) struct Flows<T> {
    entries: Slab<Entry<T>>,
    by_client: HashMap<SocketAddr, usize, foldhash::fast::RandomState>,
    lists: [Option<Ends>; 2],
}

/// Which list a flow is in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Phase {
    /// More is expected.
    Waiting = 0,
    /// It has everything that was expected.
    Finished = 1,
}

/// First and last of a list.
#[derive(Clone, Copy)]
struct Ends {
    oldest: usize,
    newest: usize,
}

struct Entry<T> {
    flow: T,
    client: SocketAddr,
    phase: Phase,
    spoke_ms: u64,
    older: Option<usize>,
    newer: Option<usize>,
}

impl<T> Flows<T> {
    pub(super) fn new() -> Flows<T> {
        Flows { entries: Slab::new(), by_client: HashMap::default(), lists: [None; 2] }
    }

    pub(super) fn len(&self) -> usize {
        self.entries.len()
    }

    pub(super) fn find(&self, client: &SocketAddr) -> Option<usize> {
        self.by_client.get(client).copied()
    }

    pub(super) fn client(&self, index: usize) -> SocketAddr {
        self.entries[index].client
    }

    pub(super) fn get(&self, index: usize) -> &T {
        &self.entries[index].flow
    }

    pub(super) fn get_mut(&mut self, index: usize) -> &mut T {
        &mut self.entries[index].flow
    }

    /// Where the next flow will be; it may be told before it is there.
    pub(super) fn next_index(&self) -> usize {
        self.entries.vacant_key()
    }

    /// The client must not have one.
    pub(super) fn insert(&mut self, client: SocketAddr, flow: T, now_ms: u64) -> usize {
        let entry = Entry { flow, client, phase: Phase::Waiting, spoke_ms: now_ms, older: None, newer: None };
        let index = self.entries.insert(entry);
        let replaced = self.by_client.insert(client, index);
        debug_assert!(replaced.is_none(), "{client} has two flows");
        self.link(index);
        index
    }

    /// Somebody spoke, and this is how it stands now.
    pub(super) fn touch(&mut self, index: usize, phase: Phase, now_ms: u64) {
        self.unlink(index);
        let entry = &mut self.entries[index];
        (entry.phase, entry.spoke_ms) = (phase, now_ms);
        self.link(index);
    }

    pub(super) fn remove(&mut self, index: usize) -> T {
        self.unlink(index);
        let entry = self.entries.remove(index);
        self.by_client.remove(&entry.client);
        entry.flow
    }

    /// The one that has been silent longest in a phase, and since when.
    pub(super) fn oldest(&self, phase: Phase) -> Option<(usize, u64)> {
        let index = self.lists[phase as usize]?.oldest;
        Some((index, self.entries[index].spoke_ms))
    }

    fn link(&mut self, index: usize) {
        let list = self.entries[index].phase as usize;
        let older = self.lists[list].map(|ends| ends.newest);
        (self.entries[index].older, self.entries[index].newer) = (older, None);
        if let Some(older) = older {
            self.entries[older].newer = Some(index);
        }
        let oldest = self.lists[list].map_or(index, |ends| ends.oldest);
        self.lists[list] = Some(Ends { oldest, newest: index });
    }

    fn unlink(&mut self, index: usize) {
        let Entry { phase, older, newer, .. } = self.entries[index];
        if let Some(older) = older {
            self.entries[older].newer = newer;
        }
        if let Some(newer) = newer {
            self.entries[newer].older = older;
        }
        let ends = &mut self.lists[phase as usize];
        *ends = match (*ends, older, newer) {
            (Some(ends), ..) if ends.oldest == ends.newest => None,
            (Some(ends), None, Some(newer)) => Some(Ends { oldest: newer, ..ends }),
            (Some(ends), Some(older), None) => Some(Ends { newest: older, ..ends }),
            (ends, ..) => ends,
        };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn client(n: usize) -> SocketAddr {
        ([127, 0, 0, 1], n as u16).into()
    }

    /// Against the obvious: a vector of (client, phase, time), oldest first.
    #[test]
    fn the_oldest_of_each_phase_is_known_whatever_happens() {
        let mut random = fastrand::Rng::with_seed(11);
        let mut flows = Flows::new();
        let mut model: Vec<(usize, Phase, u64)> = Vec::new();
        for now in 0..20_000 {
            let n = random.usize(1..40);
            let known = flows.find(&client(n));
            assert_eq!(known.is_some(), model.iter().any(|(m, ..)| *m == n));
            match known {
                None => {
                    assert_eq!(flows.next_index(), flows.insert(client(n), n, now));
                    model.push((n, Phase::Waiting, now));
                }
                Some(index) => {
                    assert_eq!((*flows.get(index), flows.client(index)), (n, client(n)));
                    model.retain(|(m, ..)| *m != n);
                    if random.u8(0..3) == 0 {
                        assert_eq!(flows.remove(index), n);
                    } else {
                        let phase = if random.bool() { Phase::Waiting } else { Phase::Finished };
                        flows.touch(index, phase, now);
                        model.push((n, phase, now));
                    }
                }
            }
            assert_eq!(flows.len(), model.len());
            for phase in [Phase::Waiting, Phase::Finished] {
                let expected = model.iter().find(|(_, p, _)| *p == phase).map(|(n, _, at)| (*n, *at));
                let found = flows.oldest(phase).map(|(index, at)| (*flows.get(index), at));
                assert_eq!(found, expected, "at {now}");
            }
        }
    }
}
