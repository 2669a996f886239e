//! Fuzz target: what must hold of any text that lies in the folder of manifests.
//!
//! A plain function that panics when it does not hold. The ordinary tests
//! replay `fuzz/corpus` and mutate it from a fixed seed; the runner in `fuzz/`
//! looks for more with libFuzzer.

use std::path::Path;
use std::sync::Arc;

use lockgate_proxy::Router;
use lockgate_proxy::router::Live;

use crate::source::{Contents, Format, Snapshot, documents};
use crate::translate::{Desired, Options, Translator, translate};

#[cfg(test)]
mod tests;

/// Any text is objects or a problem, never a panic; reading it again changes
/// nothing; translating its documents one after another comes to the same as
/// all at once; and when it is gone, so is what it made.
pub fn manifests(bytes: &[u8]) {
    let lines = 1 + bytes.iter().filter(|&&b| b == b'\n').count();
    for format in [Format::Yaml, Format::Json] {
        for document in documents(bytes, format).unwrap_or_default() {
            assert!((1..=lines).contains(&document.line), "line {} of {lines}", document.line);
        }
    }
    let path: Arc<Path> = Path::new("fuzz.yaml").into();
    let mut contents = Contents::default();
    contents.load_text(&path, bytes);
    let all = contents.snapshot();
    contents.load_text(&path, bytes);
    assert!(contents.snapshot().store == all.store, "the same text twice");

    let options = Options::default();
    let mut translator = Translator::new(options.clone());
    let mut pieces = Contents::default();
    let mut last = Snapshot::default();
    let mut desired = Desired::default();
    for (index, piece) in in_pieces(bytes).into_iter().enumerate() {
        pieces.load_text(&Path::new(&format!("{index:03}.yaml")).into(), piece);
        last = pieces.snapshot();
        desired = translator.translate(&last.store);
    }
    assert!(desired == translate(&last.store, &options), "piece by piece and at once differ");
    assert!(translate(&all.store, &options) == translate(&all.store, &options), "not deterministic");
    drop(Router::empty().compile(desired.routes, &Live::default()));

    contents.remove(&path);
    let nothing = contents.snapshot();
    assert!(nothing.store.is_empty() && nothing.problems.is_empty());
    assert!(translator.translate(&nothing.store) == translate(&nothing.store, &options), "something is left");
}

/// The text cut before every line that begins a document, in a few pieces at most.
fn in_pieces(bytes: &[u8]) -> Vec<&[u8]> {
    const MAX: usize = 8;
    let mut pieces = Vec::new();
    let mut rest = bytes;
    while pieces.len() < MAX {
        let Some(at) = rest.windows(4).position(|w| w == b"\n---") else { break };
        let (piece, behind) = rest.split_at(at + 1);
        pieces.push(piece);
        rest = behind;
    }
    pieces.push(rest);
    pieces
}
