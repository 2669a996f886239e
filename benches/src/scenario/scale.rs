//! Very many hosts, each with a backend of its own, from start to ready.

use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result};

use super::{of, paired};
use crate::bench::Bench;
use crate::machine;
use crate::raw::{Named, Outcome, Round};
use crate::subject::{Backend, Front, Kind, Subject, Task};

const HOSTS: usize = 50_000;
const ROUNDS: usize = 3;

pub(super) fn run(bench: &Bench) -> Result<Outcome> {
    let hosts = bench.size(HOSTS);
    let backend = Backend::http(1024)?;
    // As it would be deployed: one worker, but not one CPU.
    let task = Task { hosts, apart: true, loose: true, ..Task::new(Front::Http) };
    let mut kinds = vec![Kind::Lockgate, Kind::Haproxy];
    if bench.options.subjects.contains(&Kind::Nginx) {
        kinds.push(Kind::Nginx);
    }
    let mut kinds = bench.subjects(&kinds)?;
    let mut versions = Vec::new();
    let passes = bench.interleave(&mut kinds, ROUNDS, |(kind, program), _| {
        let (round, version) = one(bench, *kind, program, &backend, &task).with_context(|| kind.name())?;
        let name = kind.name().to_owned();
        if versions.iter().all(|named: &Named| named.name != name) {
            versions.push(Named { name, version });
        }
        Ok(round)
    })?;
    versions.sort_by_key(|named| kinds.iter().position(|(kind, _)| kind.name() == named.name));
    Ok(Outcome {
        title: format!(
            "{hosts} hosts of three paths, a backend each: from exec to the first 200 of the last host"
        ),
        columns: vec![
            paired("ready_s", "ready, s", 2),
            paired("rss_mib", "RSS, MiB", 1),
            paired("cpu_s", "CPU, s", 2),
        ],
        subjects: versions,
        wanted: ROUNDS,
        passes,
        bars: vec![
            of(&format!("{hosts} hosts cold to ready"), "ready_s", 0.5, &[Kind::Haproxy]),
            of(&format!("memory with {hosts} hosts"), "rss_mib", 0.10, &[Kind::Haproxy]),
        ],
        notes: vec![
            "HAProxy has one map file and a backend per host; Lockgate an Ingress, a Service and an \
                     EndpointSlice per host, in JSON, a hundred files of them. Nginx takes more than a minute: `--subjects`."
                .to_owned(),
        ],
        ..Outcome::default()
    })
}

fn one(bench: &Bench, kind: Kind, program: &Path, backend: &Backend, task: &Task) -> Result<(Round, String)> {
    let subject = Subject::start(bench, (kind, program), backend, task)?;
    // What was only for the start is given back by then.
    std::thread::sleep(Duration::from_secs(2));
    let rss = machine::rss(subject.pid())? as f64 / 1024.0 / 1024.0;
    let sample = machine::Sample::take(subject.pid())?;
    let cpu = sample.subject_ns() as f64 / 1e9;
    let mut round = Round::new(kind.name(), sample.since(&sample))
        .with("ready_s", subject.ready.as_secs_f64())
        .with("rss_mib", rss)
        .with("cpu_s", cpu);
    round.clean = true;
    std::fs::remove_dir_all(&subject.folder)?;
    Ok((round, subject.version.clone()))
}
