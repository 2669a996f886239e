//! Upgrades of the real binary under load: one process takes over from
//! another, and no request fails and no tunnel ends.
//!
//! `LOCKGATE_UPGRADE_TUNNELS` says how many WebSockets live through it (40).
#![allow(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

mod support {
    #![allow(dead_code, unreachable_pub, reason = "every test file uses its own part of this")]
    pub mod binary;
    pub mod clients;
    pub mod gate;
    pub mod manifests;
    pub mod toys;
    pub mod upgrading;
}

use std::collections::BTreeMap;
use std::fs;
use std::io::{Read, Write};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Command, Stdio};

use support::binary::Binary;
use support::clients::{Connection, Question, Version};
use support::toys::HOLD;
use support::upgrading::{Load, Place, Resuming, tunnels};

fn tunnel_count() -> usize {
    std::env::var("LOCKGATE_UPGRADE_TUNNELS").map_or(40, |count| count.parse().expect("a number"))
}

/// Requests from before the upgrade, answered after it: HTTP/1.1 and one HTTP/2 stream.
async fn held(place: &Place, binary: &Binary) -> Vec<tokio::task::JoinHandle<(u16, String)>> {
    let mut asking = Vec::new();
    for (version, host) in [(Version::Http1, "web.example"), (Version::Http2, "web.example")] {
        let mut connection = Connection::plain(binary.http, version).await.unwrap();
        asking.push(tokio::spawn(async move {
            let answer = connection.ask(&Question::new(host, HOLD)).await.unwrap();
            (answer.status, answer.body)
        }));
    }
    place.held.waiting(asking.len()).await;
    asking
}

async fn is_ready(binary: &Binary) -> bool {
    lockgate_controller::admin::get(binary.admin, "/readyz").await.unwrap().0 == 200
}

/// Two upgrades one after the other, to more workers and to fewer.
#[test]
fn no_upgrade_fails_a_request_or_drops_a_tunnel() {
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
    runtime.block_on(async {
        let place = Place::new().await;
        let mut old = place.start(2);
        let mut oldest_tunnels = tunnels(&old, tunnel_count()).await;
        let held = held(&place, &old).await;
        let load = Load::start(&place, &old);
        load.has_answers(200).await;
        let mut resuming = Resuming::new(&place);
        assert!(!resuming.connects(old.https).await);
        assert!(resuming.connects(old.https).await, "the client does resume");

        let mut ended = Vec::new();
        for (workers, generation) in [(3, 1), (1, 2)] {
            let new = place.start(workers);
            assert_eq!((new.http, new.https, new.admin), (old.http, old.https, old.admin));
            assert!(is_ready(&new).await);
            assert!(resuming.connects(new.https).await, "generation {generation}: the keys came along");
            load.has_answers(200).await;
            for tunnel in &mut oldest_tunnels {
                tunnel.speaks().await;
            }
            ended.push(std::mem::replace(&mut old, new));
        }
        assert!(ended[0].is_running(), "it has requests and tunnels yet");
        place.held.release();
        for asked in held {
            assert_eq!(asked.await.unwrap(), (200, "web".to_owned()));
        }
        for tunnel in &mut oldest_tunnels {
            tunnel.speaks().await;
        }
        for tunnel in oldest_tunnels {
            tunnel.close().await;
        }
        load.stop().await;
        for binary in ended {
            let (status, said) = tokio::task::spawn_blocking(|| binary.wait()).await.unwrap();
            assert_eq!(status, Some(0), "{said}");
            assert!(said.contains("a new process has taken over: draining"), "{said}");
            assert!(said.contains("drained"), "{said}");
        }
        old.terminate();
        let (status, said) = tokio::task::spawn_blocking(|| old.wait()).await.unwrap();
        assert_eq!(status, Some(0), "{said}");
        assert!(!place.socket.exists(), "the last one takes its socket along");
    });
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn one_that_fails_before_it_is_ready_changes_nothing() {
    let place = Place::new().await;
    let mut old = place.start(2);
    let load = Load::start(&place, &old);
    load.has_answers(20).await;
    let mut flags = place.flags(2);
    let folder = flags.iter().position(|flag| flag == "--manifests").unwrap() + 1;
    flags[folder] = "/nowhere/at/all".to_owned();
    let output = Command::new(env!("CARGO_BIN_EXE_lockgate")).args(&flags).output().unwrap();
    assert_eq!(output.status.code(), Some(1));
    load.has_answers(50).await;
    assert!(old.is_running() && is_ready(&old).await);
    // Nor does it cost the next one anything.
    let new = place.start(2);
    load.has_answers(50).await;
    load.stop().await;
    let (status, said) = tokio::task::spawn_blocking(|| old.wait()).await.unwrap();
    assert_eq!(status, Some(0), "{said}");
    assert!(said.contains("not upgraded, this process serves on"), "{said}");
    new.terminate();
    tokio::task::spawn_blocking(|| new.wait()).await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn secrets_stay_out_of_the_logs_of_both() {
    let place = Place::new().await;
    let mut traced = Vec::new();
    for _ in 0..2 {
        traced.push(place.start_logging(1, "trace"));
    }
    traced[1].terminate();
    for binary in traced {
        let (status, said) = tokio::task::spawn_blocking(|| binary.wait()).await.unwrap();
        assert_eq!(status, Some(0), "{said}");
        place.identity.assert_is_secret_in(&said, "the log");
        assert!(!said.contains("secret: ["), "{said}");
    }
}

const NOBODY: u32 = 65534;

/// Run by the test below as another user.
#[test]
#[ignore = "asks a running process as somebody else would"]
fn a_stranger_asks() {
    let mut stream = UnixStream::connect(std::env::var("LOCKGATE_STRANGER_ASKS").unwrap()).unwrap();
    // It may have hung up already.
    let _ = stream.write_all(b"H\0\0\0\x14lockgate handover \0\x01");
    let mut heard = Vec::new();
    let _ = stream.read_to_end(&mut heard);
    assert_eq!(heard, b"");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn only_the_same_user_gets_the_sockets() {
    let place = Place::new().await;
    let old = place.start(1);
    let mode = |path: &Path| fs::metadata(path).unwrap().permissions().mode() & 0o777;
    assert_eq!(mode(&place.socket), 0o600);
    if !fs::metadata("/proc/self").is_ok_and(|own| std::os::unix::fs::MetadataExt::uid(&own) == 0) {
        eprintln!("SKIPPED: only root can try as somebody else");
        return;
    }
    // The mode alone would keep strangers out.
    fs::set_permissions(&place.socket, fs::Permissions::from_mode(0o777)).unwrap();
    let folder = place.folder.path();
    fs::set_permissions(folder, fs::Permissions::from_mode(0o777)).unwrap();
    let as_nobody = |program: &Path| {
        let copy = folder.join(program.file_name().unwrap());
        fs::copy(program, &copy).unwrap();
        let mut command = Command::new(copy);
        command.uid(NOBODY).gid(NOBODY).stdin(Stdio::null());
        command
    };
    let asked = as_nobody(&std::env::current_exe().unwrap())
        .args(["--ignored", "--exact", "a_stranger_asks"])
        .env("LOCKGATE_STRANGER_ASKS", &place.socket)
        .output()
        .unwrap();
    assert!(asked.status.success(), "{}", String::from_utf8_lossy(&asked.stdout));
    let started = as_nobody(Path::new(env!("CARGO_BIN_EXE_lockgate"))).args(place.flags(1)).output().unwrap();
    assert_eq!(started.status.code(), Some(1));
    let said = String::from_utf8_lossy(&started.stderr);
    assert!(said.contains("runs as user 0, this one as 65534"), "{said}");
    assert!(is_ready(&old).await);
    old.terminate();
    let (status, said) = tokio::task::spawn_blocking(|| old.wait()).await.unwrap();
    assert_eq!(status, Some(0));
    assert!(said.contains("runs as user 65534, this one as 0"), "{said}");
}

/// Lines go to the file that has the log's name when the signal comes.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_rotated_access_log_is_reopened() {
    let place = Place::new().await;
    let log = place.folder.path().join("access.log");
    let mut flags = place.flags(1);
    flags.extend(["--access-log", "json", "--access-log-file", log.to_str().unwrap()].map(str::to_owned));
    let binary = Binary::run(&flags, "info");
    let mut connection = Connection::plain(binary.http, Version::Http1).await.unwrap();
    let mut lines = BTreeMap::new();
    for (turn, signal) in ["-USR1", "-HUP"].into_iter().enumerate() {
        let rotated = log.with_extension(turn.to_string());
        for path in [&rotated, &log] {
            while fs::read_to_string(path).unwrap_or_default().is_empty() {
                assert_eq!(connection.ask(&Question::new("web.example", "/")).await.unwrap().status, 200);
                if path == &rotated && log.exists() {
                    fs::rename(&log, &rotated).unwrap();
                    binary.signal(signal);
                }
            }
        }
        lines.insert(turn, fs::read_to_string(rotated).unwrap().lines().count());
    }
    assert!(lines.values().all(|&count| count > 0), "{lines:?}");
    drop(connection);
    binary.terminate();
    tokio::task::spawn_blocking(|| binary.wait()).await.unwrap();
}
