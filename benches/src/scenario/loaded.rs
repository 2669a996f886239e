//! Scenarios that load a subject for some seconds and look at what it cost.

use std::time::Duration;

use anyhow::{Context, Result};

use super::{column, paired};
use crate::bench::{Bench, skip};
use crate::load::Load;
use crate::machine;
use crate::raw::{Bar, Column, Named, Outcome, Round};
use crate::subject::{Backend, Kind, Subject, Task};

/// Load before the first round, for pools, caches and allocators.
const WARM_UP: Duration = Duration::from_secs(1);

/// One such scenario.
pub(super) struct Loaded<'a> {
    pub(super) title: String,
    /// What is counted.
    pub(super) unit: &'a str,
    pub(super) kinds: &'a [Kind],
    pub(super) backend: Backend,
    pub(super) task: Task,
    pub(super) bars: Vec<Bar>,
    pub(super) notes: Vec<String>,
}

/// Starts the subjects that can be had and follow the task; at least one.
pub(super) fn start(bench: &Bench, kinds: &[Kind], backend: &Backend, task: &Task) -> Result<Vec<Subject>> {
    let mut subjects = Vec::new();
    for (kind, program) in bench.subjects(kinds)? {
        match Subject::start(bench, (kind, &program), backend, task) {
            Ok(subject) => subjects.push(subject),
            Err(error) => skip(kind.name(), &error)?,
        }
    }
    anyhow::ensure!(!subjects.is_empty(), "no subject is left");
    Ok(subjects)
}

impl Loaded<'_> {
    /// Starts all, warms them up, and interleaves their rounds of `load`.
    pub(super) fn run(
        self,
        bench: &Bench,
        load: impl Fn(&Subject, Duration, u64) -> Result<Load>,
    ) -> Result<Outcome> {
        let mut subjects = start(bench, self.kinds, &self.backend, &self.task)?;
        self.rounds(bench, &mut subjects, load)
    }

    /// The same for subjects that run.
    pub(super) fn rounds(
        self,
        bench: &Bench,
        subjects: &mut [Subject],
        load: impl Fn(&Subject, Duration, u64) -> Result<Load>,
    ) -> Result<Outcome> {
        for subject in subjects.iter() {
            load(subject, WARM_UP, 0).with_context(|| format!("{}: warm-up", subject.name))?;
            if self.task.log && subject.kind != Kind::Direct {
                subject.take_log()?;
            }
        }
        let passes = bench.interleave(subjects, bench.options.rounds, |subject, seed| {
            one(subject, &self.task, |time| load(subject, time, seed), bench.round_time())
                .with_context(|| subject.name.clone())
        })?;
        Ok(Outcome {
            title: self.title,
            columns: columns(self.unit),
            subjects: named(subjects),
            wanted: bench.options.rounds,
            passes,
            bars: self.bars,
            notes: self.notes,
            ..Outcome::default()
        })
    }
}

/// One round of one subject.
fn one(
    subject: &Subject,
    task: &Task,
    load: impl Fn(Duration) -> Result<Load>,
    time: Duration,
) -> Result<Round> {
    let before = machine::Sample::take(subject.pid())?;
    let load = load(time)?;
    let spent = machine::Sample::take(subject.pid())?.since(&before);
    let mut round = Round::new(&subject.name, spent).with("per_second", load.per_second);
    if subject.kind != Kind::Direct {
        round = round
            .with("cpu_us", spent.subject_ns as f64 / 1e3 / load.units as f64)
            .with("busy", spent.busy * 100.0)
            .with("rss_mib", machine::rss(subject.pid())? as f64 / 1024.0 / 1024.0);
    }
    if let Some(latency) = load.latency {
        round = round.with("p50_us", latency.p50).with("p99_us", latency.p99).with("p999_us", latency.p999);
    }
    if task.log && subject.kind != Kind::Direct {
        // Buffers are written out within a second or two.
        std::thread::sleep(Duration::from_millis(1500));
        round = round.with("logged", subject.take_log()? as f64 / load.units as f64 * 100.0);
    }
    Ok(round)
}

pub(super) fn columns(unit: &str) -> Vec<Column> {
    vec![
        paired("cpu_us", &format!("CPU µs per {unit}"), 2),
        paired("per_second", &format!("{unit}s per second"), 0),
        column("busy", "CPU used, %", 0),
        column("p50_us", "p50, µs", 0),
        column("p99_us", "p99, µs", 0),
        column("p999_us", "p99.9, µs", 0),
        column("rss_mib", "RSS, MiB", 1),
    ]
}

pub(super) fn named(subjects: &[Subject]) -> Vec<Named> {
    let named = |subject: &Subject| Named { name: subject.name.clone(), version: subject.version.clone() };
    subjects.iter().map(named).collect()
}
