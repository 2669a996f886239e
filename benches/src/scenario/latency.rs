//! What a proxy adds to latency when it has time to spare.

use std::time::Duration;

use anyhow::{Context, Result};

use super::http::wrk;
use super::loaded::{Loaded, start};
use super::{column, of, paired};
use crate::bench::Bench;
use crate::load::open::Open;
use crate::raw::{Outcome, Round};
use crate::subject::{Backend, Front, Kind, Subject, Task};

use Kind::{Direct, Haproxy, Lockgate, Nginx};

const CONNECTIONS: usize = 64;
const BODY: usize = 1024;
/// Of what the slowest subject can do.
const SHARE: f64 = 0.30;
/// Seconds, to find that.
const TRIAL: Duration = Duration::from_secs(2);

pub(super) fn run(bench: &Bench) -> Result<Outcome> {
    let backend = Backend::http(BODY)?;
    let task = Task::new(Front::Http);
    let mut subjects = start(bench, &[Lockgate, Nginx, Haproxy, Direct], &backend, &task)?;
    let rate = match bench.options.rate {
        Some(rate) => rate,
        None => (slowest(&subjects)? * SHARE / 100.0).round() * 100.0,
    };
    let title = format!(
        "open loop, {rate:.0} requests per second at random moments, 64 connections, 1,024 byte bodies; \
         from the moment a request was due"
    );
    let this = Loaded {
        title,
        unit: "request",
        kinds: &[],
        backend,
        task,
        bars: vec![of(
            "added p99 at 30 % load over a direct connection",
            "added_p99_us",
            0.7,
            &[Nginx, Haproxy],
        )],
        notes: vec![],
    };
    let mut outcome = this.rounds(bench, &mut subjects, |subject, time, seed| {
        Open { connections: CONNECTIONS, rate, seed, body: BODY }.run(subject.address, time)
    })?;
    outcome.passes.iter_mut().for_each(|pass| subtract(pass));
    outcome.columns.retain(|column| column.figure != "per_second");
    outcome.columns.extend([
        paired("added_p50_us", "added p50, µs", 0),
        paired("added_p99_us", "added p99, µs", 0),
        column("added_p999_us", "added p99.9, µs", 0),
    ]);
    Ok(outcome)
}

/// Requests per second of the slowest proxy, in a closed loop.
fn slowest(subjects: &[Subject]) -> Result<f64> {
    let mut slowest = f64::INFINITY;
    for subject in subjects.iter().filter(|subject| subject.kind != Direct) {
        let load = wrk(subject).run(subject.address, TRIAL).with_context(|| subject.name.clone())?;
        slowest = slowest.min(load.per_second);
    }
    Ok(slowest)
}

/// From each proxy's figures those of the direct connection in the same pass.
fn subtract(pass: &mut [Round]) {
    let direct = pass.iter().find(|round| round.subject == Direct.name());
    let Some(direct) = direct.map(|round| round.figures.clone()) else { return };
    for round in pass.iter_mut().filter(|round| round.subject != Direct.name()) {
        for figure in ["p50_us", "p99_us", "p999_us"] {
            if let (Some(own), Some(floor)) = (round.figures.get(figure), direct.get(figure)) {
                let added = own - floor;
                round.figures.insert(format!("added_{figure}"), added);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn added_is_over_the_direct_connection_of_the_same_pass() {
        let round = |subject: &str, p99: f64| {
            let round = Round { subject: subject.to_owned(), ..Round::default() };
            round.with("p99_us", p99)
        };
        let mut pass = [round("direct", 100.0), round("nginx", 250.0)];
        subtract(&mut pass);
        assert_eq!(pass[1].figures["added_p99_us"], 150.0);
        assert!(!pass[0].figures.contains_key("added_p99_us"));
    }
}
