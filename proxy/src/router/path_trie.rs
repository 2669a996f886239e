//! The paths of one host as a compressed byte trie: one walk finds the exact
//! rule, the longest element prefix and the longest string prefix.
//!
//! A trie is a run of bytes without a pointer in it, so that it can lie beside
//! the name of its host, where a lookup is reading already. Numbers are little
//! endian and `W` bytes wide, which the first byte says: 2, or 4 for large tries.
//!
//! ```text
//! node:  ends  label length  children: u16     what ends here, how many bytes and nodes follow
//!        rule: W  …                            for each bit of ENDS set in `ends`
//!        label byte  …
//!        first byte  …                         of each child, sorted; their labels go on behind it
//!        offset: W  …                          of each child, from the first byte of the trie
//! ```

use std::collections::{HashMap, HashSet};
use std::hash::BuildHasher;
use std::sync::{Arc, Mutex, PoisonError, Weak};

use foldhash::fast::RandomState;

use crate::table::PathMatch;

const EXACT: u8 = 1;
const STRING_PREFIX: u8 = 2;
const PREFIX: u8 = 4;
/// The element prefix was written with a slash behind it, which counts as length.
const SLASH: u8 = 8;

/// Labels are split beyond this.
const LABEL: usize = 255;

const NONE: u32 = u32::MAX;

/// The trie of `paths`, numbered from 0. Of rules that match the same paths the
/// first is taken, but `/a/` before `/a` where both are prefixes: the longer
/// one wins, and they match alike.
///
/// Tables come from files and objects far smaller than the 4 GiB this can index.
pub(super) fn encode<'a>(paths: impl Iterator<Item = &'a PathMatch>) -> Vec<u8> {
    let mut keys: Vec<Key> = paths.zip(0..).map(|(path, rule)| Key::new(path, rule)).collect();
    keys.sort_by_key(|key| (key.bytes, key.rule));
    let narrow = Build::<2>::trie_of(&keys);
    // The last rule and the last byte have the largest numbers.
    let fits = narrow.len() <= usize::from(u16::MAX) && keys.len() <= usize::from(u16::MAX);
    if fits { narrow } else { Build::<4>::trie_of(&keys) }
}

/// The number of the rule for `path`: exact, else the longest; of equal length
/// an element prefix before a string prefix.
pub(super) fn find(trie: &[u8], path: &[u8]) -> Option<u32> {
    match trie.first()? {
        2 => walk::<2>(trie, path),
        _ => walk::<4>(trie, path),
    }
}

fn walk<const W: usize>(trie: &[u8], path: &[u8]) -> Option<u32> {
    let mut node = 1;
    let mut at = 0;
    // Length of the best prefix as written, and its rule.
    let mut best = (0, NONE);
    loop {
        let (&[ends, label, low, high], mut rest) = trie[node..].split_first_chunk()?;
        let rules = rest;
        rest = &rest[(ends & (EXACT | STRING_PREFIX | PREFIX)).count_ones() as usize * W..];
        let (label, rest) = rest.split_at(label.into());
        if !path[at..].starts_with(label) {
            break;
        }
        at += label.len();
        if ends != 0 {
            let rule = |before: u8| number::<W>(rules, (ends & before).count_ones() as usize);
            if ends & EXACT != 0 && at == path.len() {
                return Some(rule(0));
            }
            if ends & STRING_PREFIX != 0 && (at > best.0 || best.1 == NONE) {
                best = (at, rule(EXACT));
            }
            // Nothing found on the way here is longer than this.
            if ends & PREFIX != 0 && path.get(at).is_none_or(|byte| *byte == b'/') {
                best = (at + usize::from(ends & SLASH != 0), rule(EXACT | STRING_PREFIX));
            }
        }
        let (children, offsets) = rest.split_at(u16::from_le_bytes([low, high]).into());
        let Some(byte) = path.get(at) else { break };
        let Some(child) = position(children, *byte) else { break };
        node = number::<W>(offsets, child) as usize;
        at += 1;
    }
    (best.1 != NONE).then_some(best.1)
}

/// Number `index` of an array of them.
fn number<const W: usize>(array: &[u8], index: usize) -> u32 {
    let mut bytes = [0; 4];
    bytes[..W].copy_from_slice(&array[index * W..][..W]);
    u32::from_le_bytes(bytes)
}

/// The tries that several hosts have, which stay in the cache for it. Locked,
/// so used only while a table is compiled.
#[derive(Debug, Default)]
pub(super) struct SharedTries(Mutex<Known>);

#[derive(Debug, Default)]
struct Known {
    shared: HashMap<u64, Weak<Box<[u8]>>, RandomState>,
    /// Hashes of tries that one host has.
    once: HashSet<u64, RandomState>,
}

/// Beyond this many, tries seen once are forgotten (16 MiB), and shared ones looked through for dead ones.
const KNOWN: usize = 1 << 20;

impl SharedTries {
    /// `trie` as others have it, if any do: from the second one on it is shared.
    pub(super) fn get(&self, trie: &[u8]) -> Option<Arc<Box<[u8]>>> {
        let mut known = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let Known { shared, once } = &mut *known;
        let hash = shared.hasher().hash_one(trie);
        let found = shared.get(&hash).and_then(Weak::upgrade);
        if found.is_some() || once.insert(hash) {
            // Another trie of the same hash is not shared.
            return found.filter(|found| ***found == *trie);
        }
        let made = Arc::new(Box::from(trie));
        shared.insert(hash, Arc::downgrade(&made));
        if once.len() > KNOWN {
            once.clear();
            shared.retain(|_, trie| trie.strong_count() > 0);
        }
        Some(made)
    }
}

fn position(children: &[u8], byte: u8) -> Option<usize> {
    if children.len() <= 16 {
        children.iter().position(|first| *first == byte)
    } else {
        children.binary_search(&byte).ok()
    }
}

struct Key<'a> {
    /// An element prefix without the slashes behind it.
    bytes: &'a [u8],
    path: &'a PathMatch,
    rule: u32,
}

impl<'a> Key<'a> {
    fn new(path: &'a PathMatch, rule: u32) -> Key<'a> {
        let text = path.as_str();
        let text = if let PathMatch::Prefix(_) = path { text.trim_end_matches('/') } else { text };
        Key { bytes: text.as_bytes(), path, rule }
    }
}

/// Nodes that have a number but are not yet written: the range of sorted keys
/// below each, how many bytes lead to it, and where its offset belongs.
struct Build<'k, const W: usize> {
    keys: &'k [Key<'k>],
    waiting: std::collections::VecDeque<(usize, usize, usize, usize)>,
    trie: Vec<u8>,
}

impl<'k, const W: usize> Build<'k, W> {
    fn trie_of(keys: &'k [Key<'k>]) -> Vec<u8> {
        let mut build = Build::<W> { keys, waiting: [(0, keys.len(), 0, 1)].into(), trie: vec![W as u8] };
        while let Some((from, to, depth, offset)) = build.waiting.pop_front() {
            if offset > 1 {
                let here = (build.trie.len() as u32).to_le_bytes();
                build.trie[offset..][..W].copy_from_slice(&here[..W]);
            }
            build.node(from, to, depth);
        }
        build.trie
    }

    fn node(&mut self, from: usize, to: usize, depth: usize) {
        let keys = &self.keys[from..to];
        let end = match keys {
            [] => depth,
            [only] => only.bytes.len(),
            // Sorted, so what the first and the last share, all share.
            [first, .., last] => shared(first.bytes, last.bytes),
        };
        let end = end.min(depth + LABEL);
        let ending = keys.iter().take_while(|key| key.bytes.len() == end).count();
        let mut ends = Ends::default();
        keys[..ending].iter().for_each(|key| ends.add(key));
        let groups = || keys[ending..].chunk_by(|a, b| a.bytes[end] == b.bytes[end]);
        let [low, high] = (groups().count() as u16).to_le_bytes();
        self.trie.extend([ends.bits, (end - depth) as u8, low, high]);
        for rule in [ends.exact, ends.string_prefix, ends.prefix].into_iter().flatten() {
            self.trie.extend_from_slice(&rule.to_le_bytes()[..W]);
        }
        if let Some(key) = keys.first() {
            self.trie.extend_from_slice(&key.bytes[depth..end]);
        }
        self.trie.extend(groups().map(|group| group[0].bytes[end]));
        let mut start = from + ending;
        for group in groups() {
            self.waiting.push_back((start, start + group.len(), end + 1, self.trie.len()));
            self.trie.extend([0; W]);
            start += group.len();
        }
    }
}

/// The rules that end at one node.
#[derive(Default)]
struct Ends {
    bits: u8,
    exact: Option<u32>,
    string_prefix: Option<u32>,
    prefix: Option<u32>,
}

impl Ends {
    fn add(&mut self, key: &Key) {
        match key.path {
            PathMatch::Exact(_) if self.bits & EXACT == 0 => {
                (self.exact, self.bits) = (Some(key.rule), self.bits | EXACT);
            }
            PathMatch::StringPrefix(_) if self.bits & STRING_PREFIX == 0 => {
                (self.string_prefix, self.bits) = (Some(key.rule), self.bits | STRING_PREFIX);
            }
            PathMatch::Prefix(written) => {
                let slash = if written.ends_with('/') { SLASH } else { 0 };
                if self.bits & PREFIX == 0 || slash > self.bits & SLASH {
                    (self.prefix, self.bits) = (Some(key.rule), self.bits | PREFIX | slash);
                }
            }
            _ => {}
        }
    }
}

fn shared(a: &[u8], b: &[u8]) -> usize {
    a.iter().zip(b).take_while(|(a, b)| a == b).count()
}

#[cfg(test)]
pub(super) mod tests;
