#![allow(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

use std::fs;

use super::*;

/// Mutated inputs: seconds, not minutes.
const ROUNDS: usize = 300;

/// Pieces that decide what an object means.
const WORDS: [&str; 20] = [
    "\n---\n",
    "null",
    "{}",
    "[]",
    "\"\"",
    "-1",
    "99999999999",
    "true",
    "~",
    "&a ",
    "*a",
    "<<: ",
    "!!binary ",
    "\t",
    ": ",
    "- ",
    "kind: Service\n",
    "nginx.ingress.kubernetes.io/",
    "*.a",
    "#",
];

fn corpus() -> Vec<Vec<u8>> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("fuzz/corpus/manifests");
    let mut files: Vec<_> = fs::read_dir(&folder).unwrap().map(|entry| entry.unwrap().path()).collect();
    files.sort();
    assert!(files.len() >= 8, "{} is next to empty", folder.display());
    files.iter().map(|file| fs::read(file).unwrap()).collect()
}

#[test]
fn corpus_is_replayed() {
    corpus().iter().for_each(|input| manifests(input));
}

#[test]
fn a_mutated_corpus_holds_as_well() {
    let inputs = corpus();
    let mut random = fastrand::Rng::with_seed(0x10c_6a7e);
    for _ in 0..ROUNDS {
        let mut input = inputs[random.usize(..inputs.len())].clone();
        for _ in 0..random.usize(1..5) {
            mutate(&mut input, &inputs, &mut random);
        }
        input.truncate(4_000);
        let caught = std::panic::catch_unwind(|| manifests(&input));
        assert!(caught.is_ok(), "b\"{}\"", input.escape_ascii());
    }
}

fn mutate(input: &mut Vec<u8>, others: &[Vec<u8>], random: &mut fastrand::Rng) {
    let at = random.usize(..=input.len());
    let end = at + random.usize(..=(input.len() - at).min(24));
    match random.u8(..5) {
        0 => drop(input.drain(at..end)),
        1 => drop(input.splice(at..end, WORDS[random.usize(..WORDS.len())].bytes())),
        2 => {
            let piece = input[at..end].to_vec();
            drop(input.splice(at..at, piece));
        }
        3 if at < input.len() => input[at] = random.u8(..),
        _ => {
            let other = &others[random.usize(..others.len())];
            let from = random.usize(..=other.len());
            input.truncate(at);
            input.extend_from_slice(b"\n---\n");
            input.extend_from_slice(&other[from..]);
        }
    }
}
