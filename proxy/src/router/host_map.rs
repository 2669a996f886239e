//! A persistent map from host names: 1,024 ways by the upper bits of a hash,
//! each an open-addressed table by its lower bits, shared between generations.
//!
//! How long a lookup takes among many is a matter of how much memory it touches.
//! So a name is not kept: its [`Fingerprint`] stands for it, beside the value,
//! and 100,000 entries fit the cache. Bytes that go with a value lie in one
//! array per way. An edit copies one way, a thousandth of the names, and the
//! pointers of 32 of them.

use std::hash::{BuildHasher, RandomState};
use std::sync::Arc;

use siphasher::sip128::SipHasher13;

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

/// Ways in a group, and groups in a map: an edit copies the pointers of one
/// group and of the map, not of all ways.
const FAN: usize = 32;

type Root<V> = [Arc<Group<V>>; FAN];
type Group<V> = [Way<V>; FAN];

#[derive(Debug)]
struct HostMap<V> {
    root: Option<Arc<Root<V>>>,
    /// Drawn once and handed down: all generations agree.
    key: Key,
}

impl<V> Default for HostMap<V> {
    fn default() -> HostMap<V> {
        HostMap { root: None, key: Key::random() }
    }
}

impl<V> Clone for HostMap<V> {
    fn clone(&self) -> HostMap<V> {
        HostMap { root: self.root.clone(), key: self.key }
    }
}

/// What a name is taken for: 106 bits of SipHash-1-3 under a key nobody else
/// knows. An unknown name passes for one of 100,000 once in 2^89 tries, and
/// without the key none can be looked for.
#[derive(Clone, Copy, Debug)]
struct Fingerprint {
    /// Five bits of it.
    group: usize,
    /// Five more: which way of the group.
    way: usize,
    tag: Tag,
}

/// The rest of a fingerprint. The last word says where in its way an entry is looked for first.
type Tag = [u32; 3];

#[derive(Clone, Copy)]
struct Key(u64, u64);

impl Key {
    fn random() -> Key {
        // The standard library's keys come from the operating system.
        let draw = || RandomState::new().hash_one(());
        Key(draw(), draw())
    }

    fn fingerprint(self, name: &str) -> Fingerprint {
        let hash = SipHasher13::new_with_keys(self.0, self.1).hash(name.as_bytes());
        let (upper, lower) = ((hash.h2 >> 32) as u32, hash.h2 as u32);
        let place = (hash.h1 >> 54) as usize;
        Fingerprint { group: place / FAN, way: place % FAN, tag: [upper, lower, hash.h1 as u32] }
    }
}

impl std::fmt::Debug for Key {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Key(..)")
    }
}

impl<V> HostMap<V> {
    fn get(&self, name: &str) -> Option<Entry<'_, V>> {
        let root = self.root.as_ref()?;
        let print = self.key.fingerprint(name);
        root[print.group][print.way].get(print.tag)
    }
}

impl<V: Clone> HostMap<V> {
    fn insert(&mut self, name: &str, value: V, bytes: &[u8]) {
        let Fingerprint { group, way, tag } = self.key.fingerprint(name);
        let root = self.root.get_or_insert_with(|| {
            let way = Way::with_room_for(0, 0);
            let group: Arc<Group<V>> = Arc::new(std::array::from_fn(|_| way.clone()));
            Arc::new(std::array::from_fn(|_| group.clone()))
        });
        let way = &mut Arc::make_mut(&mut Arc::make_mut(root)[group])[way];
        let known = way.get(tag).is_some();
        // What is replaced leaves its bytes behind: not for long.
        if known || !way.has_room_for(bytes.len()) {
            let more = if known { bytes.len() } else { bytes.len() + way.used / 4 };
            *way = way.rebuilt(way.len + usize::from(!known), more, tag);
        }
        way.put(Slot { tag, at: NONE, value }, bytes);
    }

    fn remove(&mut self, name: &str) {
        if self.get(name).is_none() {
            return;
        }
        let Fingerprint { group, way, tag } = self.key.fingerprint(name);
        let Some(root) = &mut self.root else { return };
        let way = &mut Arc::make_mut(&mut Arc::make_mut(root)[group])[way];
        // Rebuilt, because a gap would end the search for names behind it.
        *way = way.rebuilt(way.len - 1, 0, tag);
    }
}

/// Linear probing, with two thirds to four fifths of the slots taken, or no
/// slots at all: fewer pages of memory matter more than shorter searches.
#[derive(Debug)]
struct Way<V> {
    slots: Arc<[Option<Slot<V>>]>,
    len: usize,
    /// What goes with the values, each behind its length in 4 bytes.
    bytes: Arc<[u8]>,
    used: usize,
}

#[derive(Clone, Debug)]
struct Slot<V> {
    tag: Tag,
    /// Where its bytes are in those of the way, or `NONE`. A way is a
    /// thousandth of a table, so 4 GiB are plenty.
    at: u32,
    value: V,
}

const NONE: u32 = u32::MAX;

impl<V> Clone for Way<V> {
    fn clone(&self) -> Way<V> {
        Way { slots: self.slots.clone(), len: self.len, bytes: self.bytes.clone(), used: self.used }
    }
}

impl<V> Way<V> {
    fn with_room_for(len: usize, bytes: usize) -> Way<V> {
        let slots = if len == 0 { 0 } else { len * 3 / 2 + 1 };
        let slots = std::iter::repeat_with(|| None).take(slots).collect();
        Way { slots, len: 0, bytes: vec![0; bytes].into(), used: 0 }
    }

    fn has_room_for(&self, bytes: usize) -> bool {
        let fits = bytes == 0 || self.used + LENGTH + bytes <= self.bytes.len();
        fits && (self.len + 1) * 5 <= self.slots.len() * 4
    }

    fn get(&self, tag: Tag) -> Option<Entry<'_, V>> {
        let mut at = home(tag, self.slots.len());
        loop {
            // Ends at an empty slot, of which there is one, or at once if there are no slots.
            let slot = self.slots.get(at)?.as_ref()?;
            if slot.tag == tag {
                return Some(Entry { value: &slot.value, bytes: self.bytes(slot) });
            }
            at = next(at, self.slots.len());
        }
    }

    fn bytes(&self, slot: &Slot<V>) -> &[u8] {
        if slot.at == NONE {
            return &[];
        }
        let bytes = &self.bytes[slot.at as usize..];
        // All of a few lines at once: what is read next depends on what is read
        // before, and would be asked of the memory line by line.
        for line in [64, 128, 192] {
            std::hint::black_box(bytes.get(line).copied());
        }
        part(bytes)
    }
}

impl<V: Clone> Way<V> {
    /// There must be room, and no entry of the same name.
    fn put(&mut self, mut slot: Slot<V>, bytes: &[u8]) {
        slot.at = NONE;
        if !bytes.is_empty() {
            slot.at = self.used as u32;
            let (length, rest) = Arc::make_mut(&mut self.bytes)[self.used..].split_at_mut(LENGTH);
            length.copy_from_slice(&(bytes.len() as u32).to_le_bytes());
            rest[..bytes.len()].copy_from_slice(bytes);
            self.used += LENGTH + bytes.len();
        }
        let slots = Arc::make_mut(&mut self.slots);
        let mut at = home(slot.tag, slots.len());
        while slots[at].is_some() {
            at = next(at, slots.len());
        }
        slots[at] = Some(slot);
        self.len += 1;
    }

    /// The entries but the one of this tag, with room for `len` of them, and
    /// for an entry of `more` bytes.
    fn rebuilt(&self, len: usize, more: usize, tag: Tag) -> Way<V> {
        let kept = || self.slots.iter().flatten().filter(|slot| slot.tag != tag);
        let bytes: usize = kept().map(|slot| record(self.bytes(slot).len())).sum();
        let mut way = Way::with_room_for(len, bytes + record(more));
        kept().for_each(|slot| way.put(slot.clone(), self.bytes(slot)));
        way
    }
}

/// Bytes before those of a value.
const LENGTH: usize = 4;

/// What `bytes` of them take.
fn record(bytes: usize) -> usize {
    if bytes == 0 { 0 } else { LENGTH + bytes }
}

/// The front of `record`, as long as its first bytes say.
fn part(record: &[u8]) -> &[u8] {
    let (length, rest) = record.split_first_chunk().unwrap_or((&[0; LENGTH], &[]));
    &rest[..u32::from_le_bytes(*length) as usize]
}

/// Where the search for a tag begins: scaled to the slots.
fn home(tag: Tag, slots: usize) -> usize {
    ((u64::from(tag[2]) * slots as u64) >> 32) as usize
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
        let used =
            map.root.iter().flat_map(|root| root.iter()).flat_map(|group| group.iter()).map(|way| way.used);
        // Nothing of what was replaced.
        let expected: usize = (0..5_000).map(|n| record(n % 300)).sum();
        assert_eq!(used.sum::<usize>(), expected);
    }

    #[test]
    fn a_slot_of_the_router_is_small() {
        type Slots = Option<Slot<(Arc<[u8]>, Option<Arc<()>>)>>;
        assert_eq!(size_of::<Slots>(), 40);
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
        let place = |name: &str| {
            let print = map.key.fingerprint(name);
            (print.group, print.way, print.tag[2] >> 28)
        };
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
