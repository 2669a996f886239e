//! The paths of one host as a compressed byte trie: one walk finds the exact
//! rule, the longest element prefix and the longest string prefix.
//!
//! Nodes lie in one array, the children of a node side by side and sorted by
//! first byte; the bytes of all nodes lie in another.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError, Weak};

use crate::table::PathMatch;

const NONE: u32 = u32::MAX;

#[derive(Debug)]
pub(super) struct PathTrie {
    nodes: Box<[Node]>,
    /// For each node the first bytes of its children, then its label. Tables
    /// come from files and objects far smaller than the 4 GiB this can index.
    text: Box<[u8]>,
}

#[derive(Clone, Debug)]
struct Node {
    /// Start in `text`.
    text: u32,
    label: u32,
    first_child: u32,
    /// Rules that end here, or `NONE`.
    exact: u32,
    prefix: u32,
    string_prefix: u32,
    children: u16,
    /// The prefix was written with a slash behind it, which counts as length.
    prefix_slash: bool,
}

impl PathTrie {
    /// Of rules that match the same paths the first is taken, but `/a/` before
    /// `/a` where both are prefixes: the longer one wins, and they match alike.
    pub(super) fn new<'a>(paths: impl Iterator<Item = &'a PathMatch>) -> PathTrie {
        let mut keys: Vec<Key> = paths.zip(0..).map(|(path, rule)| Key::new(path, rule)).collect();
        keys.sort_by_key(|key| (key.bytes, key.rule));
        let mut build = Build { nodes: vec![Node::EMPTY], spans: vec![(0, keys.len(), 0)], text: Vec::new() };
        let mut next = 0;
        while next < build.nodes.len() {
            build.node(next, &keys);
            next += 1;
        }
        PathTrie { nodes: build.nodes.into(), text: build.text.into() }
    }

    /// The index of the rule for `path`: exact, else the longest; of equal
    /// length an element prefix before a string prefix.
    pub(super) fn find(&self, path: &[u8]) -> Option<u32> {
        let mut node = &self.nodes[0];
        let mut at = 0;
        // Length of the best prefix as written, and its rule.
        let mut best = (0, NONE);
        loop {
            let text = &self.text[node.text as usize..];
            let (children, text) = text.split_at(node.children.into());
            let label = &text[..node.label as usize];
            if !path[at..].starts_with(label) {
                break;
            }
            at += label.len();
            if at == path.len() && node.exact != NONE {
                return Some(node.exact);
            }
            if node.string_prefix != NONE && (at > best.0 || best.1 == NONE) {
                best = (at, node.string_prefix);
            }
            // Nothing found on the way here is longer than this.
            if node.prefix != NONE && path.get(at).is_none_or(|byte| *byte == b'/') {
                best = (at + usize::from(node.prefix_slash), node.prefix);
            }
            let Some(byte) = path.get(at) else { break };
            let Some(child) = position(children, *byte) else { break };
            node = &self.nodes[node.first_child as usize + child];
        }
        (best.1 != NONE).then_some(best.1)
    }
}

/// The tries in use, by their paths. Locked, so used only while a table is compiled.
#[derive(Debug, Default)]
pub(super) struct PathTries(Mutex<Known>);

#[derive(Debug, Default)]
struct Known {
    tries: HashMap<Box<[PathMatch]>, Weak<PathTrie>, foldhash::fast::RandomState>,
    /// Size at which the dead are swept out.
    sweep_at: usize,
}

/// Below this many entries dead ones are not worth looking for.
const SWEEP_FROM: usize = 256;

impl PathTries {
    /// The trie of `paths`, made if no host has it.
    pub(super) fn get<'a>(&self, paths: impl Iterator<Item = &'a PathMatch> + Clone) -> Arc<PathTrie> {
        let key: Box<[PathMatch]> = paths.clone().cloned().collect();
        let mut known = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(trie) = known.tries.get(&key).and_then(Weak::upgrade) {
            return trie;
        }
        if known.tries.len() >= known.sweep_at.max(SWEEP_FROM) {
            known.tries.retain(|_, trie| trie.strong_count() > 0);
            known.sweep_at = known.tries.len() * 2;
        }
        let trie = Arc::new(PathTrie::new(paths));
        known.tries.insert(key, Arc::downgrade(&trie));
        trie
    }
}

fn position(children: &[u8], byte: u8) -> Option<usize> {
    if children.len() <= 16 {
        children.iter().position(|first| *first == byte)
    } else {
        children.binary_search(&byte).ok()
    }
}

impl Node {
    const EMPTY: Node = Node {
        text: 0,
        label: 0,
        first_child: 0,
        exact: NONE,
        prefix: NONE,
        string_prefix: NONE,
        children: 0,
        prefix_slash: false,
    };
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

struct Build {
    nodes: Vec<Node>,
    /// For each node the range of sorted keys below it, and how many bytes they share before it.
    spans: Vec<(usize, usize, usize)>,
    text: Vec<u8>,
}

impl Build {
    fn node(&mut self, index: usize, keys: &[Key]) {
        let (from, to, depth) = self.spans[index];
        let keys_below = &keys[from..to];
        let end = match keys_below {
            [] => depth,
            [only] => only.bytes.len(),
            // Sorted, so what the first and the last share, all share.
            [first, .., last] => shared(first.bytes, last.bytes),
        };
        let ending = keys_below.iter().take_while(|key| key.bytes.len() == end).count();
        let mut node = Node::EMPTY;
        keys_below[..ending].iter().for_each(|key| node.end(key));
        node.text = self.text.len() as u32;
        node.label = (end - depth) as u32;
        node.first_child = self.nodes.len() as u32;
        let mut start = from + ending;
        for group in keys[start..to].chunk_by(|a, b| a.bytes[end] == b.bytes[end]) {
            self.text.push(group[0].bytes[end]);
            self.nodes.push(Node::EMPTY);
            self.spans.push((start, start + group.len(), end));
            start += group.len();
            node.children += 1;
        }
        if let Some(key) = keys_below.first() {
            self.text.extend_from_slice(&key.bytes[depth..end]);
        }
        self.nodes[index] = node;
    }
}

impl Node {
    fn end(&mut self, key: &Key) {
        match key.path {
            PathMatch::Exact(_) if self.exact == NONE => self.exact = key.rule,
            PathMatch::StringPrefix(_) if self.string_prefix == NONE => self.string_prefix = key.rule,
            PathMatch::Prefix(written) => {
                let slash = written.ends_with('/');
                if self.prefix == NONE || (slash && !self.prefix_slash) {
                    (self.prefix, self.prefix_slash) = (key.rule, slash);
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
