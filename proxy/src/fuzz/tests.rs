use std::fs;
use std::path::Path;

use super::*;

/// Mutated inputs per target: seconds, not minutes.
const ROUNDS: usize = 4_000;

/// Pieces that parsers decide on.
const WORDS: [&[u8]; 28] = [
    b"\r\n",
    b"\r\n\r\n",
    b"\n",
    b"\r",
    b"\0",
    b" ",
    b"\t",
    b":",
    b",",
    b";",
    b"0",
    b"%2e",
    b"%00",
    b"/../",
    b"//",
    b"Host: b\r\n",
    b"Content-Length: 5\r\n",
    b"Content-Length: 0\r\n",
    b"Transfer-Encoding: chunked\r\n",
    b"Connection: close, x\r\n",
    b"Connection: Upgrade\r\n",
    b"Upgrade: websocket\r\n",
    b"HTTP/1.1",
    b"HTTP/1.0",
    b"http://b",
    b"chunked",
    b"\xff",
    b"0\r\n\r\n",
];

/// The inputs of a corpus, in the order of their names.
fn corpus(target: &str) -> Vec<Vec<u8>> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("fuzz/corpus").join(target);
    let mut files: Vec<_> = fs::read_dir(&folder).unwrap().map(|entry| entry.unwrap().path()).collect();
    files.sort();
    assert!(files.len() >= 8, "{} is next to empty", folder.display());
    files.iter().map(|file| fs::read(file).unwrap()).collect()
}

#[test]
fn corpora_are_replayed() {
    for (name, target) in TARGETS {
        corpus(name).iter().for_each(|input| target(input));
    }
}

#[test]
fn mutated_corpora_hold_as_well() {
    for (name, target) in TARGETS {
        let inputs = corpus(name);
        let mut random = fastrand::Rng::with_seed(0x10c_6a7e);
        for _ in 0..ROUNDS {
            let mut input = inputs[random.usize(..inputs.len())].clone();
            for _ in 0..random.usize(1..5) {
                mutate(&mut input, &inputs, &mut random);
            }
            input.truncate(2_000);
            let caught = std::panic::catch_unwind(|| target(&input));
            assert!(caught.is_ok(), "{name}: b\"{}\"", input.escape_ascii());
        }
    }
}

/// Bytes close to what `seed` makes are read without a panic, and the answer for a
/// beginning never contradicts the answer for the whole.
pub(crate) fn anything_may_come<T: PartialEq + std::fmt::Debug>(
    rounds: usize,
    mut random: fastrand::Rng,
    mut seed: impl FnMut(&mut fastrand::Rng) -> Vec<u8>,
    parse: impl Fn(&[u8]) -> T,
    is_incomplete: impl Fn(&T) -> bool,
) {
    for _ in 0..rounds {
        let mut input = seed(&mut random);
        for _ in 0..random.usize(..4) {
            let at = random.usize(..input.len());
            input[at] = random.u8(..);
        }
        input.truncate(random.usize(..=input.len()));
        let whole = parse(&input);
        for end in 0..input.len() {
            let decided = parse(&input[..end]);
            assert!(is_incomplete(&decided) || decided == whole, "{decided:?} at {end} of {input:?}");
        }
    }
}

fn mutate(input: &mut Vec<u8>, others: &[Vec<u8>], random: &mut fastrand::Rng) {
    let at = random.usize(..=input.len());
    let end = at + random.usize(..=(input.len() - at).min(16));
    match random.u8(..6) {
        0 => drop(input.drain(at..end)),
        1 => drop(input.splice(at..at, WORDS[random.usize(..WORDS.len())].iter().copied())),
        2 => {
            let piece = input[at..end].to_vec();
            drop(input.splice(at..at, piece));
        }
        3 if at < input.len() => input[at] = random.u8(..),
        4 if at < input.len() => input[at] ^= 1 << random.u8(..8),
        _ => {
            let other = &others[random.usize(..others.len())];
            let from = random.usize(..=other.len());
            input.truncate(at);
            input.extend_from_slice(&other[from..]);
        }
    }
}
