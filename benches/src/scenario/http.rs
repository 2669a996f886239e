//! Requests: how much CPU each costs.

use anyhow::{Result, ensure};

use super::loaded::{Loaded, start};
use super::{bar, column, of};
use crate::bench::Bench;
use crate::load::wrk::Wrk;
use crate::load::{h2load, handshake as client, probe};
use crate::raw::{Limit, Outcome};
use crate::subject::{Backend, Front, Kind, RESPONSE_EDIT, Subject, Task};

use Kind::{Caddy, Direct, Envoy, Haproxy, Hyper, Lockgate, Nginx, Pingora, Relay};

const CONNECTIONS: usize = 64;
const BODY: usize = 1024;
/// Connections that make handshakes at the same time.
const HANDSHAKES: usize = 16;
const STREAMS: usize = 32;
const H2_CONNECTIONS: usize = 8;

pub(super) fn wrk(subject: &Subject) -> Wrk<'_> {
    Wrk { connections: CONNECTIONS, tls: false, close: false, hosts: 1, prepared: 1, folder: &subject.folder }
}

fn loaded<'a>(title: &str, kinds: &'a [Kind], backend: Backend, task: Task) -> Loaded<'a> {
    Loaded { title: title.to_owned(), unit: "request", kinds, backend, task, bars: vec![], notes: vec![] }
}

pub(super) fn keep_alive(bench: &Bench) -> Result<Outcome> {
    let what = "HTTP/1.1 keep-alive 1 KB, 64 connections: CPU per request";
    let kinds = [Lockgate, Nginx, Haproxy, Pingora, Envoy, Hyper, Caddy, Relay, Direct];
    let mut this = loaded(
        "HTTP/1.1 keep-alive, 64 connections, 1,024 byte bodies",
        &kinds,
        Backend::http(BODY)?,
        Task::new(Front::Http),
    );
    this.bars = [(0.80, Nginx), (0.75, Haproxy), (0.50, Pingora), (0.45, Envoy)]
        .map(|(limit, kind)| of(what, "cpu_us", limit, &[kind]))
        .into();
    this.run(bench, |subject, time, _| wrk(subject).run(subject.address, time))
}

pub(super) fn full(bench: &Bench) -> Result<Outcome> {
    let hosts = bench.size(10_000);
    let task = Task { hosts, log: true, edits: true, ..Task::new(Front::Http) };
    let title = format!(
        "as http1, {hosts} hosts asked at random, JSON access log, metrics per route, two header edits"
    );
    let kinds = [Lockgate, Nginx, Haproxy];
    let mut this = loaded(&title, &kinds, Backend::expecting_edits(BODY)?, task);
    this.bars = vec![of("the same, everything on", "cpu_us", 0.85, &[Nginx])];
    this.notes = vec![
        "A header field is set in every request, besides the forwarding fields, and one in every response. Lockgate \
         counts per route; nginx (without a module or Lua, which ingress-nginx uses) and HAProxy count nothing per \
         route, so they do less."
            .to_owned(),
    ];
    let mut subjects = start(bench, this.kinds, &this.backend, &this.task)?;
    for subject in &subjects {
        let (name, value) = RESPONSE_EDIT;
        let head = probe::head(subject.address)?;
        let line = format!("{name}: {value}");
        ensure!(head.lines().any(|l| l.eq_ignore_ascii_case(&line)), "{}: no {line} in {head}", subject.name);
    }
    let mut outcome = this.rounds(bench, &mut subjects, |subject, time, _| {
        Wrk { hosts, prepared: hosts, ..wrk(subject) }.run(subject.address, time)
    })?;
    outcome.columns.push(column("logged", "requests logged, %", 1));
    Ok(outcome)
}

pub(super) fn close(bench: &Bench) -> Result<Outcome> {
    let kinds = [Lockgate, Nginx, Haproxy, Envoy];
    let mut this = loaded(
        "a connection per request, 64 at once, 1,024 byte bodies, pooled upstream",
        &kinds,
        Backend::http(BODY)?,
        Task::new(Front::Http),
    );
    this.bars = vec![of("connection per request", "cpu_us", 0.95, &[Nginx])];
    this.run(bench, |subject, time, _| Wrk { close: true, ..wrk(subject) }.run(subject.address, time))
}

pub(super) fn tls(bench: &Bench) -> Result<Outcome> {
    let kinds = [Lockgate, Nginx, Haproxy, Envoy];
    let mut this = loaded(
        "HTTP/1.1 keep-alive over TLS 1.3, 64 connections, 1,024 byte bodies",
        &kinds,
        Backend::http(BODY)?,
        Task::new(Front::Https),
    );
    this.bars = vec![of("TLS keep-alive", "cpu_us", 0.75, &[Nginx])];
    this.run(bench, |subject, time, _| Wrk { tls: true, ..wrk(subject) }.run(subject.address, time))
}

pub(super) fn handshake(bench: &Bench, resumed: bool) -> Result<Outcome> {
    let (kind, limit) = if resumed { ("resumed", 0.65) } else { ("full", 0.50) };
    let title = format!(
        "TLS 1.3 handshakes, X25519, ECDSA P-256, {kind}, one request on each connection, {HANDSHAKES} at once"
    );
    let kinds = [Lockgate, Nginx, Haproxy, Envoy];
    let mut this = loaded(&title, &kinds, Backend::http(BODY)?, Task::new(Front::Https));
    this.unit = "handshake";
    this.bars = vec![of(&format!("TLS 1.3 {kind} handshake, ECDSA"), "cpu_us", limit, &[Nginx])];
    this.run(bench, |subject, time, _| client::run(subject.address, BODY, resumed, HANDSHAKES, time))
}

pub(super) fn h2(bench: &Bench) -> Result<Outcome> {
    let kinds = [Lockgate, Nginx, Haproxy, Envoy];
    let mut this = loaded(
        "HTTP/2 over TLS, 8 connections of 32 streams, 1,024 byte bodies, HTTP/1.1 upstream",
        &kinds,
        Backend::http(BODY)?,
        Task::new(Front::Https),
    );
    let what = "h2 over TLS, 32 streams";
    this.bars = [1.0, 0.80].map(|limit| of(what, "cpu_us", limit, &[Haproxy])).into();
    this.run(bench, |subject, time, _| h2load::run(subject.address, H2_CONNECTIONS, STREAMS, time))
}

pub(super) fn body(bench: &Bench, body: usize) -> Result<Outcome> {
    let large = body >= 1024 * 1024;
    let (size, limit, other) = if large { ("1 MiB", 0.80, Haproxy) } else { ("64 KiB", 0.95, Nginx) };
    let kinds = [Lockgate, Nginx, Haproxy, Envoy, Hyper, Relay, Direct];
    let title = format!("HTTP/1.1 keep-alive, 64 connections, bodies of {size}");
    let mut this = loaded(&title, &kinds, Backend::http(body)?, Task::new(Front::Http));
    this.bars = vec![of(&format!("{size} bodies"), "cpu_us", limit, &[other])];
    this.run(bench, |subject, time, _| wrk(subject).run(subject.address, time))
}

/// The same binary with one host and with very many, asked at random.
pub(super) fn host_scale(bench: &Bench) -> Result<Outcome> {
    let many = bench.size(100_000);
    let backend = Backend::http(BODY)?;
    let kinds = [Lockgate];
    let mut subjects = Vec::new();
    for hosts in [many, 1] {
        let task = Task { hosts, ..Task::new(Front::Http) };
        for mut subject in start(bench, &kinds, &backend, &task)? {
            subject.name = if hosts == 1 { "1 host".to_owned() } else { format!("{hosts} hosts") };
            subjects.push(subject);
        }
    }
    let [large, small] = &mut subjects[..] else { anyhow::bail!("only Lockgate is measured here") };
    ensure!(large.name != small.name, "two sizes");
    let mut this =
        loaded("as http1, many hosts asked at random beside one", &kinds, backend, Task::new(Front::Http));
    this.bars = vec![bar(
        &format!("CPU per request with {many} hosts"),
        &large.name,
        "cpu_us",
        1.05,
        Limit::Of(vec![small.name.clone()]),
    )];
    // The client prepares as many requests for both: it must not be the client that differs.
    this.rounds(bench, &mut subjects, |subject, time, _| {
        let hosts = if subject.name == "1 host" { 1 } else { many };
        Wrk { hosts, prepared: many, ..wrk(subject) }.run(subject.address, time)
    })
}
