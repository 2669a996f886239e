//! A persistent map from host names: 1,024 ways by the upper bits of a hash,
//! each an open-addressed table by its lower bits, shared between generations.
//!
//! What a lookup reads lies close together, whatever else was allocated in
//! between: 8 bytes a slot, then one record of name and bytes, and the value.
//! Names of 100,000 hosts take a few megabytes and a thousand pages so, and at
//! any number a lookup waits for memory about once. An edit copies one way: a
//! thousandth of the names.

use std::hash::{BuildHasher, Hasher};
use std::sync::Arc;

use foldhash::quality::RandomState;

use crate::table::HostPattern;

/// What host patterns name: exact hosts, wildcards by what follows their `*.`,
/// and any host.
#[derive(Clone, Debug)]
pub(super) struct ByHost<V> {
    exact: HostMap<V>,
    wildcard: HostMap<V>,
    any: Option<(V, Arc<[u8]>)>,
}

/// What a name stands for.
#[derive(Debug)]
pub(super) struct Entry<'m, V> {
    pub(super) value: &'m V,
    /// What was inserted with the value.
    pub(super) bytes: &'m [u8],
}

impl<V> ByHost<V> {
    /// The most precise value for `host`: itself, its first label replaced by
    /// `*`, any host.
    pub(super) fn find(&self, host: &str) -> Option<Entry<'_, V>> {
        self.find_named(host).map(|(entry, _)| entry).or_else(|| self.any())
    }

    /// The same without the one for any host; `true`: of `host` itself.
    pub(super) fn find_named(&self, host: &str) -> Option<(Entry<'_, V>, bool)> {
        let suffix = || host.split_once('.').filter(|(label, _)| !label.is_empty()).map(|(_, rest)| rest);
        let exact = self.exact.get(host).map(|entry| (entry, true));
        exact.or_else(|| Some((self.wildcard.get(suffix()?)?, false)))
    }

    /// Whether there is a value of `host` itself.
    pub(super) fn has_exact(&self, host: &str) -> bool {
        self.exact.get(host).is_some()
    }

    /// The value of the pattern itself.
    pub(super) fn get(&self, pattern: &HostPattern) -> Option<Entry<'_, V>> {
        match Place::of(pattern) {
            Place::Exact(name) => self.exact.get(name),
            Place::Wildcard(suffix) => self.wildcard.get(suffix),
            Place::Any => self.any(),
        }
    }

    fn any(&self) -> Option<Entry<'_, V>> {
        self.any.as_ref().map(|(value, bytes)| Entry { value, bytes })
    }
}

impl<V: Clone> ByHost<V> {
    pub(super) fn insert(&mut self, pattern: &HostPattern, value: V, bytes: &[u8]) {
        match Place::of(pattern) {
            Place::Exact(name) => self.exact.insert(name, value, bytes),
            Place::Wildcard(suffix) => self.wildcard.insert(suffix, value, bytes),
            Place::Any => self.any = Some((value, bytes.into())),
        }
    }

    pub(super) fn remove(&mut self, pattern: &HostPattern) {
        match Place::of(pattern) {
            Place::Exact(name) => self.exact.remove(name),
            Place::Wildcard(suffix) => self.wildcard.remove(suffix),
            Place::Any => self.any = None,
        }
    }
}

impl<V> Default for ByHost<V> {
    fn default() -> ByHost<V> {
        ByHost { exact: HostMap::default(), wildcard: HostMap::default(), any: None }
    }
}

enum Place<'a> {
    Exact(&'a str),
    Wildcard(&'a str),
    Any,
}

impl Place<'_> {
    fn of(pattern: &HostPattern) -> Place<'_> {
        match pattern.as_str() {
            "" => Place::Any,
            name => name.strip_prefix("*.").map_or(Place::Exact(name), Place::Wildcard),
        }
    }
}

const WAYS: usize = 1024;

type Root<V> = [Arc<Way<V>>; WAYS];

#[derive(Debug)]
struct HostMap<V> {
    root: Option<Arc<Root<V>>>,
    /// Seeded once and handed down: all generations agree, strangers cannot aim at a way.
    hasher: RandomState,
}

impl<V> Default for HostMap<V> {
    fn default() -> HostMap<V> {
        HostMap { root: None, hasher: RandomState::default() }
    }
}

impl<V> Clone for HostMap<V> {
    fn clone(&self) -> HostMap<V> {
        HostMap { root: self.root.clone(), hasher: self.hasher.clone() }
    }
}

impl<V> HostMap<V> {
    fn get(&self, name: &str) -> Option<Entry<'_, V>> {
        let hash = self.hash(name);
        let way = &self.root.as_ref()?[way(hash)];
        let slot = way.find(hash as u32, name)?;
        let bytes = way.record(way.slots[slot].at).1;
        Some(Entry { value: way.values[slot].as_ref()?, bytes })
    }

    fn hash(&self, name: &str) -> u64 {
        let mut hasher = self.hasher.build_hasher();
        hasher.write(name.as_bytes());
        hasher.finish()
    }
}

impl<V: Clone> HostMap<V> {
    fn insert(&mut self, name: &str, value: V, bytes: &[u8]) {
        let hash = self.hash(name);
        let root = self.root.get_or_insert_with(|| {
            let empty = Arc::new(Way::with_room_for(0));
            Arc::new(std::array::from_fn(|_| empty.clone()))
        });
        let way = Arc::make_mut(&mut Arc::make_mut(root)[way(hash)]);
        // What is replaced leaves its record behind: not for long.
        let known = way.find(hash as u32, name).is_some();
        if known || (way.len + 1) * 5 > way.slots.len() * 4 {
            *way = way.rebuilt(way.len + usize::from(!known), hash as u32, name);
        }
        way.put(hash as u32, name, value, bytes);
    }

    fn remove(&mut self, name: &str) {
        if self.get(name).is_none() {
            return;
        }
        let hash = self.hash(name);
        let Some(root) = &mut self.root else { return };
        let way = Arc::make_mut(&mut Arc::make_mut(root)[way(hash)]);
        // Rebuilt, because a gap would end the search for names behind it.
        *way = way.rebuilt(way.len - 1, hash as u32, name);
    }
}

/// Linear probing, with two thirds to four fifths of the slots taken, or no
/// slots at all: fewer pages of memory matter more than shorter searches.
#[derive(Clone, Debug)]
struct Way<V> {
    slots: Vec<Slot>,
    /// By slot.
    values: Vec<Option<V>>,
    records: Vec<u8>,
    len: usize,
}

#[derive(Clone, Copy, Debug)]
struct Slot {
    /// Lower half of the hash.
    hash: u32,
    /// Where in `records`: name length, name, length of bytes, bytes; lengths
    /// in 4 bytes. A way is a thousandth of a table, so 4 GiB are plenty.
    at: u32,
}

const VACANT: u32 = u32::MAX;

impl<V> Way<V> {
    fn with_room_for(len: usize) -> Way<V> {
        let slots = if len == 0 { 0 } else { len * 3 / 2 + 1 };
        let values = std::iter::repeat_with(|| None).take(slots).collect();
        Way { slots: vec![Slot { hash: 0, at: VACANT }; slots], values, records: Vec::new(), len: 0 }
    }

    fn find(&self, hash: u32, name: &str) -> Option<usize> {
        let mut at = home(hash, self.slots.len());
        loop {
            // Ends at a vacant slot, of which there is one, or at once if there are no slots.
            let slot = self.slots.get(at)?;
            if slot.at == VACANT {
                return None;
            }
            if slot.hash == hash {
                self.touch(slot.at, at);
                if self.record(slot.at).0 == name.as_bytes() {
                    return Some(at);
                }
            }
            at = next(at, self.slots.len());
        }
    }

    /// Asks the memory for all of a small record and its value at once: what is
    /// read next depends on what is read before, and would be asked for one by one.
    fn touch(&self, at: u32, slot: usize) {
        let record = &self.records[at as usize..];
        for line in [64, 128, 192] {
            std::hint::black_box(record.get(line).copied());
        }
        std::hint::black_box(self.values[slot].is_some());
    }

    /// Name and bytes of the record at `at`.
    fn record(&self, at: u32) -> (&[u8], &[u8]) {
        let (name, rest) = part(&self.records[at as usize..]);
        (name, part(rest).0)
    }
}

impl<V: Clone> Way<V> {
    /// There must be room, and no entry of the same name.
    fn put(&mut self, hash: u32, name: &str, value: V, bytes: &[u8]) {
        let mut at = home(hash, self.slots.len());
        while self.slots[at].at != VACANT {
            at = next(at, self.slots.len());
        }
        self.slots[at] = Slot { hash, at: self.records.len() as u32 };
        self.values[at] = Some(value);
        self.len += 1;
        for part in [name.as_bytes(), bytes] {
            self.records.extend_from_slice(&(part.len() as u32).to_le_bytes());
            self.records.extend_from_slice(part);
        }
    }

    /// The entries but the one of this hash and name, in a way with room for `len`.
    fn rebuilt(&self, len: usize, hash: u32, name: &str) -> Way<V> {
        let mut way = Way::with_room_for(len);
        way.records.reserve_exact(self.records.len() * len / self.len.max(1));
        for (slot, value) in self.slots.iter().zip(&self.values) {
            let Some(value) = value else { continue };
            let (known, bytes) = self.record(slot.at);
            // Names came in as text.
            let Ok(known) = std::str::from_utf8(known) else { continue };
            if slot.hash != hash || known != name {
                way.put(slot.hash, known, value.clone(), bytes);
            }
        }
        way
    }
}

/// The first part of `bytes`, its length before it, and what follows.
fn part(bytes: &[u8]) -> (&[u8], &[u8]) {
    let (length, rest) = bytes.split_first_chunk().unwrap_or((&[0; 4], &[]));
    rest.split_at(u32::from_le_bytes(*length) as usize)
}

fn way(hash: u64) -> usize {
    (hash >> 54) as usize
}

/// Where the search for a hash begins: scaled to the slots.
fn home(hash: u32, slots: usize) -> usize {
    ((u64::from(hash) * slots as u64) >> 32) as usize
}

fn next(at: usize, slots: usize) -> usize {
    if at + 1 == slots { 0 } else { at + 1 }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;

    #[test]
    fn the_most_precise_pattern_wins() {
        let mut map = ByHost::default();
        let patterns = ["", "a.example", "*.a.example", "b.a.example", "*.example", "*.x.a.example"];
        for pattern in patterns {
            map.insert(&HostPattern::new(pattern), pattern, pattern.as_bytes());
        }
        let cases = [
            ("a.example", "a.example"),
            ("b.a.example", "b.a.example"),
            ("c.a.example", "*.a.example"),
            ("z.example", "*.example"),
            // One label only, and not none.
            ("d.c.a.example", ""),
            ("y.x.a.example", "*.x.a.example"),
            ("x.a.example", "*.a.example"),
            (".a.example", ""),
            ("example", ""),
            ("", ""),
            ("*.a.example", "*.a.example"),
        ];
        for (host, expected) in cases {
            let found = map.find(host).map(|entry| (*entry.value, entry.bytes));
            assert_eq!(found, Some((expected, expected.as_bytes())), "{host}");
        }
        for pattern in patterns {
            let pattern = HostPattern::new(pattern);
            assert_eq!(map.get(&pattern).map(|entry| *entry.value), Some(pattern.as_str()));
            map.remove(&pattern);
            assert!(map.get(&pattern).is_none());
        }
        assert!(map.find("a.example").is_none());
    }

    fn value_in<V: Copy>(map: &HostMap<V>, name: &str) -> Option<V> {
        map.get(name).map(|entry| *entry.value)
    }

    #[test]
    fn agrees_with_an_ordinary_map_and_leaves_old_generations_alone() {
        for seed in 0..8 {
            let mut random = fastrand::Rng::with_seed(seed);
            let (mut map, mut model) = (HostMap::default(), BTreeMap::new());
            for step in 0..2_000 {
                let name = format!("h{}.example", random.u32(0..300));
                let (before, expected) = (map.clone(), model.get(&name).copied());
                if random.bool() {
                    map.insert(&name, step, &vec![step as u8; step % 70]);
                    model.insert(name.clone(), step);
                } else {
                    map.remove(&name);
                    model.remove(&name);
                }
                assert_eq!(value_in(&before, &name), expected, "seed {seed} step {step}");
                assert_eq!(value_in(&map, &name), model.get(&name).copied(), "seed {seed} step {step}");
            }
            for n in 0..300 {
                let name = format!("h{n}.example");
                assert_eq!(value_in(&map, &name), model.get(&name).copied(), "seed {seed} {name}");
            }
        }
    }

    #[test]
    fn bytes_stay_with_their_name() {
        let mut map = HostMap::default();
        for round in 0..3_u8 {
            for n in 0..5_000_usize {
                map.insert(&n.to_string(), n, &vec![round; n % 300]);
            }
        }
        for n in 0..5_000 {
            let entry = map.get(&n.to_string()).unwrap();
            assert_eq!((*entry.value, entry.bytes), (n, vec![2; n % 300].as_slice()));
        }
        let records = map.root.iter().flat_map(|root| root.iter()).map(|way| way.records.len());
        // Names, lengths and bytes, and nothing that was replaced.
        let expected: usize = (0..5_000).map(|n| 8 + n.to_string().len() + n % 300).sum();
        assert_eq!(records.sum::<usize>(), expected);
    }

    #[test]
    fn names_of_any_length() {
        let mut map = HostMap::default();
        for len in [0, 1, 63, 64, 253, 1_000] {
            let name = "x".repeat(len);
            map.insert(&name, len, b"bytes");
        }
        for len in [0, 1, 63, 64, 253, 1_000] {
            assert_eq!(value_in(&map, &"x".repeat(len)), Some(len));
        }
        assert_eq!(value_in(&map, &"x".repeat(28)), None);
    }

    #[test]
    fn names_that_meet_in_one_slot_are_told_apart() {
        let mut map = HostMap::default();
        let names: Vec<String> = (0..200_000).map(|n| n.to_string()).collect();
        let place = |name: &str| (way(map.hash(name)), map.hash(name) & 15);
        let wanted = place(&names[0]);
        let same: Vec<&String> = names.iter().filter(|name| place(name) == wanted).collect();
        assert!(same.len() > 1, "16,384 places cannot hold 200,000 names one by one");
        for name in &same {
            map.insert(name, name.len(), b"");
        }
        map.remove(same[0]);
        assert_eq!(value_in(&map, same[0]), None);
        assert_eq!(value_in(&map, same[1]), Some(same[1].len()));
    }
}
