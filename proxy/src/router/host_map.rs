//! A persistent map from host names: 1,024 ways by the upper bits of a hash,
//! then an open-addressed table by its lower bits, shared between generations.
//!
//! The upper level stays in the cache, and an entry holds its name and value
//! side by side, so at any number of hosts a lookup waits for memory about
//! once. An edit copies the upper level and one table: a thousandth of the names.

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
    any: Option<V>,
}

impl<V> ByHost<V> {
    /// The most precise value for `host`: itself, its first label replaced by
    /// `*`, any host.
    pub(super) fn find(&self, host: &str) -> Option<&V> {
        let suffix = || host.split_once('.').filter(|(label, _)| !label.is_empty()).map(|(_, rest)| rest);
        let found = self.exact.get(host).or_else(|| self.wildcard.get(suffix()?));
        found.or(self.any.as_ref())
    }

    /// The same without the one for any host; `true`: of `host` itself.
    pub(super) fn find_named(&self, host: &str) -> Option<(&V, bool)> {
        let suffix = || host.split_once('.').filter(|(label, _)| !label.is_empty()).map(|(_, rest)| rest);
        let exact = self.exact.get(host).map(|value| (value, true));
        exact.or_else(|| Some((self.wildcard.get(suffix()?)?, false)))
    }

    /// Whether there is a value of `host` itself.
    pub(super) fn has_exact(&self, host: &str) -> bool {
        self.exact.get(host).is_some()
    }

    /// The value of the pattern itself.
    pub(super) fn get(&self, pattern: &HostPattern) -> Option<&V> {
        match Place::of(pattern) {
            Place::Exact(name) => self.exact.get(name),
            Place::Wildcard(suffix) => self.wildcard.get(suffix),
            Place::Any => self.any.as_ref(),
        }
    }
}

impl<V: Clone> ByHost<V> {
    pub(super) fn insert(&mut self, pattern: &HostPattern, value: V) {
        match Place::of(pattern) {
            Place::Exact(name) => self.exact.insert(name, value),
            Place::Wildcard(suffix) => self.wildcard.insert(suffix, value),
            Place::Any => self.any = Some(value),
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
#[derive(Clone, Debug)]
struct Table<V> {
    slots: Arc<[Option<Entry<V>>]>,
    len: u32,
}

/// With the values of the router exactly one cache line.
#[derive(Clone, Debug)]
#[repr(align(64))]
struct Entry<V> {
    hash: u64,
    name: Name,
    value: V,
}

/// A name that, unless it is long, needs no look elsewhere.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Name {
    Short { len: u8, bytes: [u8; 30] },
    Long(Box<str>),
}

impl Name {
    fn new(name: &str) -> Name {
        let mut bytes = [0; 30];
        match bytes.get_mut(..name.len()) {
            Some(short) => {
                short.copy_from_slice(name.as_bytes());
                Name::Short { len: name.len() as u8, bytes }
            }
            None => Name::Long(name.into()),
        }
    }

    fn is(&self, name: &str) -> bool {
        match self {
            Name::Short { len, bytes } => bytes[..usize::from(*len)] == *name.as_bytes(),
            Name::Long(long) => **long == *name,
        }
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
    fn get(&self, name: &str) -> Option<&V> {
        let hash = self.hash(name);
        self.root.as_ref()?[way(hash)].get(hash, name).map(|entry| &entry.value)
    }

    fn hash(&self, name: &str) -> u64 {
        let mut hasher = self.hasher.build_hasher();
        hasher.write(name.as_bytes());
        hasher.finish()
    }
}

impl<V: Clone> HostMap<V> {
    fn insert(&mut self, name: &str, value: V) {
        let hash = self.hash(name);
        let root = self.root.get_or_insert_with(|| {
            let empty = Table::with_room_for(0);
            Arc::new(std::array::from_fn(|_| empty.clone()))
        });
        let table = &mut Arc::make_mut(root)[way(hash)];
        if table.get(hash, name).is_none() && (table.len as usize + 1) * 5 > table.slots.len() * 4 {
            *table = table.rebuilt(table.len as usize + 1, |_| true);
        }
        table.put(Entry { hash, name: Name::new(name), value });
    }

    fn remove(&mut self, name: &str) {
        if self.get(name).is_none() {
            return;
        }
        let hash = self.hash(name);
        let Some(root) = &mut self.root else { return };
        let table = &mut Arc::make_mut(root)[way(hash)];
        // Rebuilt, because a gap would end the search for names behind it.
        *table = table.rebuilt(table.len as usize - 1, |entry| !entry.name.is(name));
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
            let entry = self.slots.get(at)?.as_ref()?;
            if entry.hash == hash && entry.name.is(name) {
                return Some(entry);
            }
            at = next(at, self.slots.len());
        }
    }
}

impl<V: Clone> Table<V> {
    /// There must be room, or an entry of the same name to take the place of.
    fn put(&mut self, entry: Entry<V>) {
        let slots = Arc::make_mut(&mut self.slots);
        let mut at = home(entry.hash, slots.len());
        while slots[at].as_ref().is_some_and(|e| e.hash != entry.hash || e.name != entry.name) {
            at = next(at, slots.len());
        }
        self.len += u32::from(slots[at].is_none());
        slots[at] = Some(entry);
    }

    /// The entries to `keep`, in a table with room for `len` of them.
    fn rebuilt(&self, len: usize, keep: impl Fn(&Entry<V>) -> bool) -> Table<V> {
        let mut table = Table::with_room_for(len);
        for entry in self.slots.iter().flatten().filter(|entry| keep(entry)) {
            table.put(entry.clone());
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
            map.insert(&HostPattern::new(pattern), pattern);
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
            assert_eq!(map.find(host), Some(&expected), "{host}");
        }
        for pattern in patterns {
            let pattern = HostPattern::new(pattern);
            assert_eq!(map.get(&pattern), Some(&pattern.as_str()));
            map.remove(&pattern);
            assert_eq!(map.get(&pattern), None);
        }
        assert_eq!(map.find("a.example"), None);
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
                    map.insert(&name, step);
                    model.insert(name.clone(), step);
                } else {
                    map.remove(&name);
                    model.remove(&name);
                }
                assert_eq!(before.get(&name).copied(), expected, "seed {seed} step {step}");
                assert_eq!(map.get(&name), model.get(&name), "seed {seed} step {step}");
            }
            for n in 0..300 {
                let name = format!("h{n}.example");
                assert_eq!(map.get(&name), model.get(&name), "seed {seed} {name}");
            }
        }
    }

    #[test]
    fn an_entry_of_the_router_is_one_cache_line() {
        type Slot = Option<Entry<(Arc<()>, Arc<[u8]>)>>;
        assert_eq!((size_of::<Slot>(), align_of::<Slot>()), (64, 64));
    }

    #[test]
    fn long_names_are_names_too() {
        let mut map = HostMap::default();
        for len in [1, 29, 30, 31, 32, 200, 253] {
            map.insert(&"x".repeat(len), len);
        }
        for len in [1, 29, 30, 31, 32, 200, 253] {
            assert_eq!(map.get(&"x".repeat(len)), Some(&len));
        }
        assert_eq!(map.get(&"x".repeat(28)), None);
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
            map.insert(name, name.len());
        }
        map.remove(same[0]);
        assert_eq!(map.get(same[0]), None);
        assert_eq!(map.get(same[1]), Some(&same[1].len()));
    }
}
