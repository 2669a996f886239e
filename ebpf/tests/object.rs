//! The committed object is made from the committed sources.
#![allow(clippy::unwrap_used, reason = "a test says what it expects by panicking")]

use std::path::Path;
use std::process::Command;

#[test]
fn the_object_is_not_stale() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR"));
    let output = Command::new(folder.join("build")).arg("hash").output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let recorded = std::fs::read_to_string(folder.join("programs/lockgate.o.sources")).unwrap();
    assert_eq!(String::from_utf8_lossy(&output.stdout), recorded, "run ebpf/build and commit what it writes");
}
