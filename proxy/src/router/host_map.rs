//! A persistent map from host names: 256 ways, 256 ways again, then a small
//! bucket, all by bits of one hash and all shared between generations.
//!
//! A lookup is three dependent loads and a comparison; an edit copies one node
//! of each level, whatever the number of names.

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

type Root<V> = [Option<Arc<Middle<V>>>; 256];
type Middle<V> = [Option<Arc<[Entry<V>]>>; 256];

#[derive(Debug)]
struct HostMap<V> {
    root: Option<Arc<Root<V>>>,
    /// Seeded once and handed down: all generations agree, strangers cannot aim at a bucket.
    hasher: RandomState,
}

#[derive(Clone, Debug)]
struct Entry<V> {
    hash: u64,
    name: Arc<str>,
    value: V,
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
        let root = self.root.as_ref()?;
        let hash = self.hash(name);
        let bucket = root[first(hash)].as_ref()?[second(hash)].as_ref()?;
        bucket.iter().find(|entry| entry.hash == hash && *entry.name == *name).map(|entry| &entry.value)
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
        let root = self.root.get_or_insert_with(|| Arc::new([const { None }; 256]));
        let middle = Arc::make_mut(root)[first(hash)].get_or_insert_with(|| Arc::new([const { None }; 256]));
        let slot = &mut Arc::make_mut(middle)[second(hash)];
        let others = slot.iter().flat_map(|bucket| bucket.iter()).filter(|entry| *entry.name != *name);
        let added = Entry { hash, name: name.into(), value };
        let bucket: Arc<[Entry<V>]> = others.cloned().chain([added]).collect();
        *slot = Some(bucket);
    }

    fn remove(&mut self, name: &str) {
        if self.get(name).is_none() {
            return;
        }
        let hash = self.hash(name);
        let Some(root) = &mut self.root else { return };
        let Some(middle) = &mut Arc::make_mut(root)[first(hash)] else { return };
        let slot = &mut Arc::make_mut(middle)[second(hash)];
        let rest = slot.iter().flat_map(|bucket| bucket.iter()).filter(|entry| *entry.name != *name);
        let rest: Arc<[Entry<V>]> = rest.cloned().collect();
        *slot = (!rest.is_empty()).then_some(rest);
    }
}

fn first(hash: u64) -> usize {
    (hash >> 56) as usize
}

fn second(hash: u64) -> usize {
    (hash >> 48) as usize & 0xff
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
    fn names_with_equal_bits_share_a_bucket() {
        let mut map = HostMap::default();
        let names: Vec<String> = (0..200_000).map(|n| n.to_string()).collect();
        let place = |name: &str| map.hash(name) >> 48;
        let wanted = place(&names[0]);
        let same: Vec<&String> = names.iter().filter(|name| place(name) == wanted).collect();
        assert!(same.len() > 1, "65,536 places cannot hold 200,000 names one by one");
        for name in &same {
            map.insert(name, name.len());
        }
        map.remove(same[0]);
        assert_eq!(map.get(same[0]), None);
        assert_eq!(map.get(same[1]), Some(&same[1].len()));
    }
}
