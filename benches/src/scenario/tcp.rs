//! Relaying bytes.

use anyhow::Result;

use super::loaded::Loaded;
use super::of;
use crate::bench::Bench;
use crate::load::tcp;
use crate::raw::Outcome;
use crate::subject::{Backend, Front, Kind, Task};

use Kind::{Direct, Envoy, Haproxy, Lockgate, Relay};

const KINDS: [Kind; 5] = [Lockgate, Haproxy, Envoy, Relay, Direct];
const CONNECTIONS: usize = 64;
/// Enough to fill a core, few enough that none starves.
const BULK_CONNECTIONS: usize = 4;

fn loaded<'a>(title: &str, unit: &'a str, backend: Backend, limit: f64) -> Loaded<'a> {
    let bar = of(title, "cpu_us", limit, &[Haproxy]);
    let task = Task::new(Front::Tcp);
    Loaded { title: title.to_owned(), unit, kinds: &KINDS, backend, task, bars: vec![bar], notes: vec![] }
}

pub(super) fn ping_pong(bench: &Bench) -> Result<Outcome> {
    let this = loaded("TCP relay, 64 B ping-pong, 64 connections", "message", Backend::echo()?, 0.85);
    this.run(bench, |subject, time, _| tcp::ping_pong(subject.address, CONNECTIONS, time))
}

pub(super) fn bulk(bench: &Bench) -> Result<Outcome> {
    let this = loaded("TCP relay, bulk, 4 connections", "MiB", Backend::source()?, 1.0);
    this.run(bench, |subject, time, _| tcp::bulk(subject.address, BULK_CONNECTIONS, time))
}
