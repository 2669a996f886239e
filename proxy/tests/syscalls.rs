//! A warm HTTP/1.1 request costs hardly more than the system calls that move it: read and write at each side.
//!
//! The proxy runs in a process of its own below strace, which counts until that process ends. So it is run twice,
//! with fewer and with more requests, and the difference belongs to the requests alone.
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "tests say what they expect by panicking")]

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Read};
use std::net::SocketAddr;
use std::path::Path;
use std::process::{Command, Stdio};

#[path = "support/toy.rs"]
mod toy;
#[path = "support/wire.rs"]
mod wire;

/// All have a request under way at the same time, so that one wait serves several.
const CONNECTIONS: usize = 32;
/// Each of one request on every connection.
const ROUNDS: [usize; 2] = [20, 120];
/// Two reads, two writes, and half a wait.
const MOST: f64 = 4.5;

/// Tells the process below strace where its endpoint is.
const ENDPOINT: &str = "LOCKGATE_SYSCALLS_ENDPOINT";
const LISTENS: &str = "the proxy listens on ";
const TEST: &str = "a_warm_request_costs_few_system_calls";

#[test]
fn a_warm_request_costs_few_system_calls() {
    if let Ok(endpoint) = std::env::var(ENDPOINT) {
        return serve(endpoint.parse().unwrap());
    }
    if Command::new("strace").arg("-V").stdout(Stdio::null()).status().is_err() {
        assert!(std::env::var("CI").is_err(), "strace is missing, and must not be here");
        eprintln!("\n!!! SKIPPED: strace is not installed, no system call was counted\n");
        return;
    }
    let [fewer, more] = ROUNDS.map(count);
    let requests = ((ROUNDS[1] - ROUNDS[0]) * CONNECTIONS) as f64;
    let mut per_request: Vec<(f64, &str)> = more
        .iter()
        .map(|(name, &calls)| (calls as f64 - fewer.get(name).copied().unwrap_or(0) as f64, &**name))
        .map(|(calls, name)| (calls / requests, name))
        .filter(|(calls, _)| calls.abs() >= 0.005)
        .collect();
    per_request.sort_by(|a, b| b.0.total_cmp(&a.0));
    let total: f64 = per_request.iter().map(|(calls, _)| calls).sum();
    eprintln!("{total:.2} system calls per request: {per_request:.2?}");
    assert!(total >= 3.9, "fewer than move a request: something was not counted");
    assert!(total <= MOST, "{total:.2} system calls per request, more than {MOST}: {per_request:.2?}");
}

/// Below strace: a proxy to `endpoint`, until standard input ends.
fn serve(endpoint: SocketAddr) {
    let (proxy, _publisher) = toy::proxy_to(&[endpoint]);
    println!("{LISTENS}{}", proxy.http_addrs()[0]);
    let _ = std::io::stdin().read(&mut [0]);
}

/// System calls of a proxy from its start to its end, by name, over `rounds`.
fn count(rounds: usize) -> BTreeMap<String, u64> {
    let folder = std::env::temp_dir().join(format!("lockgate-syscalls-{}-{rounds}", std::process::id()));
    let endpoint = wire::answers(|_| wire::ok(&[b'x'; 1024]));
    let mut strace = Command::new("strace");
    strace.args(["-f", "-c", "-o"]).arg(&folder).arg(std::env::current_exe().unwrap());
    strace.args(["--exact", TEST, "--nocapture"]).env(ENDPOINT, endpoint.to_string());
    let mut child = strace.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
    // Held to the end, for the harness has last words. Its first ones are on the same line.
    let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
    let address =
        lines.by_ref().map_while(Result::ok).find_map(|line| Some(line.split_once(LISTENS)?.1.to_owned()));
    let address: SocketAddr = address.expect("strace may trace here, and the proxy starts").parse().unwrap();
    let mut clients: Vec<_> = (0..CONNECTIONS).map(|_| wire::plain(address)).collect();
    for _ in 0..rounds {
        clients.iter_mut().for_each(|client| client.send(REQUEST));
        for client in &mut clients {
            assert_eq!(client.receive().unwrap().unwrap().status(), 200);
        }
    }
    drop(child.stdin.take());
    assert!(child.wait().unwrap().success());
    let counts = read(&folder);
    std::fs::remove_file(folder).unwrap();
    counts
}

const REQUEST: &[u8] = b"GET /catalogue/items/4711?currency=EUR HTTP/1.1\r\nHost: app.example\r\n\
    User-Agent: Mozilla/5.0\r\nAccept: application/json\r\nAccept-Encoding: gzip, br\r\nCookie: a=b\r\n\r\n";

/// `% time  seconds  usecs/call  calls  [errors]  syscall`, between two lines of dashes.
fn read(table: &Path) -> BTreeMap<String, u64> {
    let text = std::fs::read_to_string(table).unwrap();
    let lines = text.lines().skip_while(|line| !line.starts_with('-')).skip(1);
    let mut counts = BTreeMap::new();
    for line in lines.take_while(|line| !line.starts_with('-')) {
        let words: Vec<&str> = line.split_ascii_whitespace().collect();
        let name = *words.last().unwrap();
        *counts.entry(name.to_owned()).or_default() += words[3].parse::<u64>().unwrap();
    }
    assert!(counts.len() > 5, "strace counted: {text}");
    counts
}
