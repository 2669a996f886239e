//! A hundred publishes a second while every request must be answered.

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};

use super::http::wrk;
use super::loaded::{named, start};
use super::{bar, column};
use crate::bench::Bench;
use crate::machine;
use crate::raw::{Limit, Outcome, Round};
use crate::subject::{Backend, Edits, Front, Kind, Subject, Task};

const HOSTS: usize = 1_000;
const PER_SECOND: u32 = 100;
/// All rounds together, so that publishes go on for a minute.
const TOTAL: Duration = Duration::from_secs(60);
const ROUNDS: usize = 6;

pub(super) fn run(bench: &Bench) -> Result<Outcome> {
    let backend = Backend::http(1024)?;
    // A file is taken up when it has rested for this long: as good as at once.
    let arguments = vec!["--debounce".to_owned(), "1ms".to_owned()];
    let task = Task { hosts: bench.size(HOSTS), arguments, ..Task::new(Front::Http) };
    let mut subjects = start(bench, &[Kind::Lockgate], &backend, &task)?;
    let time = if bench.options.small { Duration::from_secs(2) } else { TOTAL / ROUNDS as u32 };
    for subject in &subjects {
        wrk(subject).run(subject.address, Duration::from_secs(1))?;
    }
    let mut edits = Edits::of(&subjects.first().context("Lockgate")?.folder)?;
    let passes = bench.interleave(&mut subjects, ROUNDS, |subject, _| one(subject, &mut edits, time))?;
    let absolute = |unit: &str| Limit::Absolute(unit.to_owned());
    Ok(Outcome {
        title: format!("{PER_SECOND} publishes a second under full load, beside none; wrk, 64 connections"),
        columns: vec![
            column("published", "publishes per second", 0),
            column("failed", "failed requests", 0),
            column("steady_p99_us", "p99 without, µs", 0),
            column("p99_us", "p99 with, µs", 0),
            column("p99_ratio", "p99 with / without", 2),
            column("rate_ratio", "requests per second with / without", 2),
        ],
        subjects: named(&subjects),
        wanted: ROUNDS,
        passes,
        bars: vec![
            bar("failed requests under 100 publishes/s", "lockgate", "failed", 0.0, absolute("")),
            bar("p99 under 100 publishes/s", "lockgate", "p99_ratio", 1.5, absolute("× steady")),
        ],
        ..Outcome::default()
    })
}

/// With and without, one after the other: a ratio is of neighbours in time.
fn one(subject: &Subject, edits: &mut Edits, time: Duration) -> Result<Round> {
    let before = machine::Sample::take(subject.pid())?;
    let steady = wrk(subject).run(subject.address, time)?;
    let generation = edits.generation()?;
    let over = AtomicBool::new(false);
    let (load, written) = std::thread::scope(|scope| {
        let writer = scope.spawn(|| publish(edits, &over));
        // A request that fails is an error here, as everywhere: there is no round to print.
        let load = wrk(subject).run(subject.address, time);
        over.store(true, Ordering::Relaxed);
        (load, writer.join().expect("the writer does not panic"))
    });
    let (load, written) = (load.context("under publishes")?, written?);
    let spent = machine::Sample::take(subject.pid())?.since(&before);
    let published = edits.generation()? - generation;
    ensure!(published > 0.0, "{written} edits, none published");
    let (steady_p99, p99) = (steady.latency.context("p99")?.p99, load.latency.context("p99")?.p99);
    Ok(Round::new(&subject.name, spent)
        .with("published", published / time.as_secs_f64())
        .with("failed", 0.0)
        .with("steady_p99_us", steady_p99)
        .with("p99_us", p99)
        .with("p99_ratio", p99 / steady_p99)
        .with("rate_ratio", load.per_second / steady.per_second))
}

/// Edits at an even pace until it is `over`; how many.
fn publish(edits: &mut Edits, over: &AtomicBool) -> Result<u32> {
    machine::pin(crate::OTHERS_CPU)?;
    let started = Instant::now();
    let mut written = 0;
    while !over.load(Ordering::Relaxed) {
        edits.write()?;
        written += 1;
        let next = started + Duration::from_secs(1) * written / PER_SECOND;
        std::thread::sleep(next.saturating_duration_since(Instant::now()));
    }
    Ok(written)
}
