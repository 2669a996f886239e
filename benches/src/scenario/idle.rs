//! Memory of connections that wait.

use std::io::{Read, Write};
use std::net::TcpStream;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result};

use super::{bar, column};
use crate::bench::{Bench, skip};
use crate::load::{PATH, probe, request, tls};
use crate::machine;
use crate::raw::{Limit, Named, Outcome, Round};
use crate::subject::{Backend, Front, HOST, Kind, Subject, Task};

const BODY: usize = 1024;
const CONNECTIONS: usize = 5_000;
/// Each is a new process, so that none has memory left over from the round before.
const ROUNDS: usize = 3;
/// For buffers to be given back.
const SETTLE: Duration = Duration::from_secs(2);

pub(super) fn run(bench: &Bench) -> Result<Outcome> {
    let backend = Backend::http(BODY)?;
    let mut outcome = Outcome {
        title: format!("{CONNECTIONS} idle connections, each after one request; growth of RSS"),
        columns: vec![
            column("start_mib", "RSS after 64 connections, MiB", 1),
            column("plain_kib", "plain, KiB each", 2),
            column("tls_kib", "TLS, KiB each", 2),
        ],
        wanted: ROUNDS,
        bars: vec![
            bar("idle connection, plain", "lockgate", "plain_kib", 3.0, Limit::Absolute("KiB".into())),
            bar("idle connection, TLS", "lockgate", "tls_kib", 14.0, Limit::Absolute("KiB".into())),
        ],
        ..Outcome::default()
    };
    let mut kinds = bench.subjects(&[Kind::Lockgate, Kind::Nginx, Kind::Haproxy, Kind::Envoy])?;
    // One that cannot do it is found before the rounds.
    let mut fit = Vec::new();
    for (kind, program) in kinds {
        match Subject::start(bench, (kind, &program), &backend, &Task::new(Front::Https)) {
            Ok(subject) => {
                outcome.subjects.push(Named { name: subject.name.clone(), version: subject.version.clone() });
                fit.push((kind, program));
            }
            Err(error) => skip(kind.name(), &error)?,
        }
    }
    kinds = fit;
    outcome.passes = bench.interleave(&mut kinds, ROUNDS, |(kind, program), _| {
        one(bench, *kind, program, &backend).with_context(|| kind.name())
    })?;
    Ok(outcome)
}

fn one(bench: &Bench, kind: Kind, program: &Path, backend: &Backend) -> Result<Round> {
    let mut figures = Vec::new();
    let mut spent = None;
    for (front, figure) in [(Front::Http, "plain_kib"), (Front::Https, "tls_kib")] {
        let subject = Subject::start(bench, (kind, program), backend, &Task::new(front))?;
        let sample = machine::Sample::take(subject.pid())?;
        let client = tls::Client::new(false)?;
        let open = |count| -> Result<Vec<Connection>> {
            (0..count).map(|_| Connection::open(&subject, front, &client)).collect()
        };
        let first = open(64)?;
        std::thread::sleep(SETTLE);
        let before = machine::rss(subject.pid())?;
        let idle = open(CONNECTIONS)?;
        std::thread::sleep(SETTLE);
        let after = machine::rss(subject.pid())?;
        drop((first, idle));
        if front == Front::Http {
            figures.push(("start_mib", before as f64 / 1024.0 / 1024.0));
        }
        figures.push((figure, after.saturating_sub(before) as f64 / 1024.0 / CONNECTIONS as f64));
        spent = Some(machine::Sample::take(subject.pid())?.since(&sample));
    }
    let mut round = Round::new(kind.name(), spent.context("two fronts")?);
    // Memory does not depend on who else used the CPU.
    round.clean = true;
    Ok(figures.into_iter().fold(round, |round, (name, value)| round.with(name, value)))
}

/// Held, not used again.
enum Connection {
    Plain(#[expect(dead_code, reason = "held open")] TcpStream),
    Tls(#[expect(dead_code, reason = "held open")] Box<dyn Held>),
}

trait Held: Read + Write {}
impl<T: Read + Write> Held for T {}

impl Connection {
    /// Open, and one request made.
    fn open(subject: &Subject, front: Front, client: &tls::Client) -> Result<Connection> {
        let mut stream = TcpStream::connect(subject.address)?;
        stream.set_read_timeout(Some(Duration::from_secs(5)))?;
        stream.set_nodelay(true)?;
        let request = request(HOST, PATH, false);
        if front == Front::Https {
            let mut stream = client.connect(stream)?;
            probe::exchange(&mut stream, &request, BODY)?;
            return Ok(Connection::Tls(Box::new(stream)));
        }
        probe::exchange(&mut stream, &request, BODY)?;
        Ok(Connection::Plain(stream))
    }
}
