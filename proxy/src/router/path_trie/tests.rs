use std::collections::BTreeSet;

use super::*;

/// Kubernetes' definitions, one rule at a time.
fn matches(rule: &PathMatch, path: &str) -> bool {
    match rule {
        PathMatch::Exact(p) => path == &**p,
        PathMatch::StringPrefix(p) => path.starts_with(&**p),
        PathMatch::Prefix(p) => {
            let rest = path.strip_prefix(p.trim_end_matches('/'));
            rest.is_some_and(|rest| rest.is_empty() || rest.starts_with('/'))
        }
    }
}

/// Exact, then length, then element before string; slashes behind an element
/// prefix count as one.
fn rank(rule: &PathMatch) -> (bool, usize, bool) {
    match rule {
        PathMatch::Exact(p) => (true, p.len(), false),
        PathMatch::StringPrefix(p) => (false, p.len(), false),
        PathMatch::Prefix(p) => (false, p.trim_end_matches('/').len() + usize::from(p.ends_with('/')), true),
    }
}

/// The obvious matcher: the index of the best rule, of equal ones the first.
pub(crate) fn naive(rules: &[PathMatch], path: &str) -> Option<u32> {
    let found = (0..rules.len()).filter(|rule| matches(&rules[*rule], path)).rev();
    found.max_by_key(|rule| rank(&rules[*rule])).map(|rule| rule as u32)
}

pub(crate) fn random_path(random: &mut fastrand::Rng) -> String {
    const PIECES: [&str; 9] = ["/", "/", "a", "b", "ab", "aa", "/a", "/b/", "é"];
    (0..random.usize(0..7)).fold("/".to_owned(), |path, _| path + PIECES[random.usize(0..PIECES.len())])
}

pub(crate) fn random_rule(random: &mut fastrand::Rng) -> PathMatch {
    let path = random_path(random).into();
    match random.u8(0..3) {
        0 => PathMatch::Exact(path),
        1 => PathMatch::Prefix(path),
        _ => PathMatch::StringPrefix(path),
    }
}

#[test]
fn agrees_with_trying_every_rule() {
    for seed in 0..400 {
        let mut random = fastrand::Rng::with_seed(seed);
        let rules: BTreeSet<PathMatch> = (0..random.usize(0..40)).map(|_| random_rule(&mut random)).collect();
        let rules: Vec<PathMatch> = rules.into_iter().collect();
        let trie = encode(rules.iter());
        for _ in 0..200 {
            let path = random_path(&mut random);
            assert_eq!(
                find(&trie, path.as_bytes()),
                naive(&rules, &path),
                "seed {seed}, path {path:?}, rules {rules:?}"
            );
        }
    }
}

#[test]
fn precedence() {
    use PathMatch::{Exact, Prefix, StringPrefix};
    let rules: &[PathMatch] = &[
        Prefix("/".into()),
        StringPrefix("/".into()),
        Exact("/a".into()),
        Prefix("/a".into()),
        StringPrefix("/a".into()),
        StringPrefix("/a/b".into()),
        Prefix("/s/".into()),
        StringPrefix("/s/".into()),
        Exact("/s/".into()),
    ];
    let cases: &[(&str, PathMatch)] = &[
        ("/", Prefix("/".into())),
        ("/x", Prefix("/".into())),
        ("/a", Exact("/a".into())),
        ("/a/", Prefix("/a".into())),
        ("/a/c", Prefix("/a".into())),
        ("/ab", StringPrefix("/a".into())),
        ("/a/b", StringPrefix("/a/b".into())),
        ("/a/bc", StringPrefix("/a/b".into())),
        ("/s", Prefix("/s/".into())),
        ("/s/", Exact("/s/".into())),
        ("/s/x", Prefix("/s/".into())),
        ("/sx", Prefix("/".into())),
    ];
    let trie = encode(rules.iter());
    for (path, expected) in cases {
        let found = find(&trie, path.as_bytes()).map(|rule| &rules[rule as usize]);
        assert_eq!(found, Some(expected), "{path}");
    }
}

#[test]
fn no_rule_and_bytes_that_are_no_text() {
    assert_eq!(find(&encode([].into_iter()), b"/"), None);
    assert_eq!(find(&[], b"/"), None);
    let rules = [PathMatch::Prefix("/a".into())];
    let trie = encode(rules.iter());
    assert_eq!(find(&trie, b"/a/\xff\x00"), Some(0));
    assert_eq!(find(&trie, b"/a\xff"), None);
    assert_eq!(find(&trie, b"/"), None);
    assert_eq!(find(&trie, b"*"), None);
}

/// Depth and breadth that recursion or a scan would not survive.
#[test]
fn many_and_deep_paths() {
    let mut rules: Vec<PathMatch> = (0..10_000).map(|n| PathMatch::Prefix(format!("/p{n}").into())).collect();
    rules.extend((0..2_000).map(|n| PathMatch::Exact("/d".repeat(n).into())));
    let trie = encode(rules.iter());
    for n in (0..10_000).step_by(7) {
        assert_eq!(find(&trie, format!("/p{n}/x").as_bytes()), Some(n));
    }
    assert_eq!(find(&trie, b"/p10000/x"), None);
    for n in 1..2_000 {
        assert_eq!(find(&trie, "/d".repeat(n as usize).as_bytes()), Some(10_000 + n));
    }
}

#[test]
fn labels_longer_than_a_node_holds() {
    let long = |n: usize| format!("/{}", "x".repeat(n));
    let lengths = [1, 253, 254, 255, 256, 509, 510, 511, 512, 2_000];
    let rules: Vec<PathMatch> = lengths.iter().map(|n| PathMatch::Exact(long(*n).into())).collect();
    let trie = encode(rules.iter());
    for n in 0..2_100 {
        let expected = lengths.iter().position(|length| *length == n).map(|rule| rule as u32);
        assert_eq!(find(&trie, long(n).as_bytes()), expected, "{n}");
    }
    let one = encode(rules[9..].iter());
    assert_eq!(find(&one, long(2_000).as_bytes()), Some(0));
    assert_eq!(find(&one, long(1_999).as_bytes()), None);
}

/// Ten short paths, as an application has them, fit a few cache lines.
#[test]
fn a_small_trie_is_small() {
    let rules: Vec<PathMatch> = (0..10).map(|n| PathMatch::Prefix(format!("/part{n}").into())).collect();
    assert!(encode(rules.iter()).len() <= 128);
}
