//! A persistent map from host names: 1,024 ways by the upper bits of a hash,
//! then an open-addressed table by its lower bits, shared between generations.
//!
//! Both levels are small enough to stay in the cache. What a slot points at is
//! one piece of memory: the value, bytes that go with it, and the name. So at
//! any number of hosts a lookup waits for memory about once. An edit copies the
//! upper level and one table: a thousandth of the names.

use std::hash::{BuildHasher, Hasher};
use std::sync::Arc;

use foldhash::quality::RandomState;
use triomphe::ThinArc;

use crate::table::HostPattern;

/// What host patterns name: exact hosts, wildcards by what follows their `*.`,
/// and any host.
#[derive(Clone, Debug)]
pub(super) struct ByHost<V> {
    exact: HostMap<V>,
    wildcard: HostMap<V>,
    any: Option<Entry<V>>,
}

/// A value, bytes that go with it, and the name it is found by.
#[derive(Debug)]
pub(super) struct Entry<V>(ThinArc<Head<V>, u8>);

/// Behind it the bytes, then the name: so the bytes are at a distance that is
/// known before the memory has answered.
#[derive(Debug)]
struct Head<V> {
    value: V,
    bytes: u32,
}

impl<V> Entry<V> {
    fn new(value: V, bytes: &[u8], name: &str) -> Entry<V> {
        let head = Head { value, bytes: bytes.len() as u32 };
        Entry(ThinArc::from_header_and_slice(head, &[bytes, name.as_bytes()].concat()))
    }

    pub(super) fn value(&self) -> &V {
        &self.0.header.header.value
    }

    /// What was inserted with the value.
    pub(super) fn bytes(&self) -> &[u8] {
        &self.0.slice[..self.0.header.header.bytes as usize]
    }

    /// Asks the memory for all of a small entry at once: what is read next
    /// depends on what is read before, and would be asked for one by one.
    fn touch(&self) {
        let slice = &self.0.slice;
        for line in [64, 128, 192] {
            std::hint::black_box(slice.get(line).copied());
        }
    }

    fn is(&self, name: &str) -> bool {
        self.0.slice[self.0.header.header.bytes as usize..] == *name.as_bytes()
    }
}

impl<V> Clone for Entry<V> {
    fn clone(&self) -> Entry<V> {
        Entry(self.0.clone())
    }
}

impl<V> ByHost<V> {
    /// The most precise value for `host`: itself, its first label replaced by
    /// `*`, any host.
    pub(super) fn find(&self, host: &str) -> Option<&Entry<V>> {
        let suffix = || host.split_once('.').filter(|(label, _)| !label.is_empty()).map(|(_, rest)| rest);
        let found = self.exact.get(host).or_else(|| self.wildcard.get(suffix()?));
        found.or(self.any.as_ref())
    }

    /// The same without the one for any host; `true`: of `host` itself.
    pub(super) fn find_named(&self, host: &str) -> Option<(&Entry<V>, bool)> {
        let suffix = || host.split_once('.').filter(|(label, _)| !label.is_empty()).map(|(_, rest)| rest);
        let exact = self.exact.get(host).map(|value| (value, true));
        exact.or_else(|| Some((self.wildcard.get(suffix()?)?, false)))
    }

    /// Whether there is a value of `host` itself.
    pub(super) fn has_exact(&self, host: &str) -> bool {
        self.exact.get(host).is_some()
    }

    /// The value of the pattern itself.
    pub(super) fn get(&self, pattern: &HostPattern) -> Option<&Entry<V>> {
        match Place::of(pattern) {
            Place::Exact(name) => self.exact.get(name),
            Place::Wildcard(suffix) => self.wildcard.get(suffix),
            Place::Any => self.any.as_ref(),
        }
    }

    pub(super) fn insert(&mut self, pattern: &HostPattern, value: V, bytes: &[u8]) {
        match Place::of(pattern) {
            Place::Exact(name) => self.exact.insert(name, Entry::new(value, bytes, name)),
            Place::Wildcard(suffix) => self.wildcard.insert(suffix, Entry::new(value, bytes, suffix)),
            Place::Any => self.any = Some(Entry::new(value, bytes, "")),
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

/// Tables by the upper bits of the hash.
const WAYS: usize = 1024;

type Root<V> = [Table<V>; WAYS];

#[derive(Debug)]
struct HostMap<V> {
    root: Option<Arc<Root<V>>>,
    /// Seeded once and handed down: all generations agree, strangers cannot aim at a table.
    hasher: RandomState,
}

/// Linear probing, with two thirds to four fifths of the slots taken, or no
/// slots at all: fewer pages of memory matter more than shorter searches.
#[derive(Debug)]
struct Table<V> {
    slots: Arc<[Option<Slot<V>>]>,
    len: u32,
}

/// A quarter of a cache line.
#[derive(Debug)]
struct Slot<V> {
    hash: u64,
    entry: Entry<V>,
}

impl<V> Clone for Slot<V> {
    fn clone(&self) -> Slot<V> {
        Slot { hash: self.hash, entry: self.entry.clone() }
    }
}

impl<V> Clone for Table<V> {
    fn clone(&self) -> Table<V> {
        Table { slots: self.slots.clone(), len: self.len }
    }
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
    fn get(&self, name: &str) -> Option<&Entry<V>> {
        let hash = self.hash(name);
        self.root.as_ref()?[way(hash)].get(hash, name)
    }

    fn hash(&self, name: &str) -> u64 {
        let mut hasher = self.hasher.build_hasher();
        hasher.write(name.as_bytes());
        hasher.finish()
    }
}

impl<V> HostMap<V> {
    fn insert(&mut self, name: &str, entry: Entry<V>) {
        let hash = self.hash(name);
        let root = self.root.get_or_insert_with(|| {
            let empty = Table::with_room_for(0);
            Arc::new(std::array::from_fn(|_| empty.clone()))
        });
        let table = &mut Arc::make_mut(root)[way(hash)];
        if table.get(hash, name).is_none() && (table.len as usize + 1) * 5 > table.slots.len() * 4 {
            *table = table.rebuilt(table.len as usize + 1, None);
        }
        table.put(Slot { hash, entry }, name);
    }

    fn remove(&mut self, name: &str) {
        if self.get(name).is_none() {
            return;
        }
        let hash = self.hash(name);
        let Some(root) = &mut self.root else { return };
        let table = &mut Arc::make_mut(root)[way(hash)];
        // Rebuilt, because a gap would end the search for names behind it.
        *table = table.rebuilt(table.len as usize - 1, Some(name));
    }
}

impl<V> Table<V> {
    fn with_room_for(len: usize) -> Table<V> {
        let slots = if len == 0 { 0 } else { len * 3 / 2 + 1 };
        Table { slots: std::iter::repeat_with(|| None).take(slots).collect(), len: 0 }
    }

    fn get(&self, hash: u64, name: &str) -> Option<&Entry<V>> {
        let mut at = home(hash, self.slots.len());
        loop {
            // Ends at an empty slot, of which there is one, or at once if there are no slots.
            let slot = self.slots.get(at)?.as_ref()?;
            if slot.hash == hash {
                slot.entry.touch();
                if slot.entry.is(name) {
                    return Some(&slot.entry);
                }
            }
            at = next(at, self.slots.len());
        }
    }

    /// There must be room, or an entry of the same name to take the place of.
    fn put(&mut self, slot: Slot<V>, name: &str) {
        let slots = Arc::make_mut(&mut self.slots);
        let mut at = home(slot.hash, slots.len());
        while slots[at].as_ref().is_some_and(|s| s.hash != slot.hash || !s.entry.is(name)) {
            at = next(at, slots.len());
        }
        self.len += u32::from(slots[at].is_none());
        slots[at] = Some(slot);
    }

    /// The entries but the one named `without`, in a table with room for `len`.
    fn rebuilt(&self, len: usize, without: Option<&str>) -> Table<V> {
        let mut table = Table::with_room_for(len);
        let slots = Arc::make_mut(&mut table.slots);
        for slot in self.slots.iter().flatten() {
            if without.is_some_and(|name| slot.entry.is(name)) {
                continue;
            }
            let mut at = home(slot.hash, slots.len());
            while slots[at].is_some() {
                at = next(at, slots.len());
            }
            slots[at] = Some(slot.clone());
            table.len += 1;
        }
        table
    }
}

fn way(hash: u64) -> usize {
    (hash >> 54) as usize
}

/// Where the search for a hash begins: its lower half, scaled to the slots.
fn home(hash: u64, slots: usize) -> usize {
    (((hash & 0xffff_ffff) * slots as u64) >> 32) as usize
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
            let found = map.find(host).map(|entry| (*entry.value(), entry.bytes()));
            assert_eq!(found, Some((expected, expected.as_bytes())), "{host}");
        }
        for pattern in patterns {
            let pattern = HostPattern::new(pattern);
            assert_eq!(map.get(&pattern).map(Entry::value), Some(&pattern.as_str()));
            map.remove(&pattern);
            assert!(map.get(&pattern).is_none());
        }
        assert!(map.find("a.example").is_none());
    }

    fn value_in<V: Copy>(map: &HostMap<V>, name: &str) -> Option<V> {
        map.get(name).map(|entry| *entry.value())
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
                    map.insert(&name, Entry::new(step, &vec![7; step % 70], &name));
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
    fn four_slots_fit_one_cache_line() {
        assert_eq!(size_of::<Option<Slot<Arc<[u8]>>>>(), 16);
    }

    #[test]
    fn names_of_any_length() {
        let mut map = HostMap::default();
        for len in [0, 1, 63, 64, 253, 1_000] {
            let name = "x".repeat(len);
            map.insert(&name, Entry::new(len, b"bytes", &name));
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
            map.insert(name, Entry::new(name.len(), b"", name));
        }
        map.remove(same[0]);
        assert_eq!(value_in(&map, same[0]), None);
        assert_eq!(value_in(&map, same[1]), Some(same[1].len()));
    }
}
