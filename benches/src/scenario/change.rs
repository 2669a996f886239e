//! One changed Ingress among very many: how soon it is live, and what that costs.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};

use super::loaded::{named, start};
use super::{bar, column, paired};
use crate::bench::Bench;
use crate::load::{Percentiles, histogram, request};
use crate::machine;
use crate::raw::{Limit, Outcome, Round};
use crate::subject::{Backend, EDITED, Edits, Front, Kind, Subject, Task};

const HOSTS: [usize; 2] = [100_000, 1_000];
const ROUNDS: usize = 3;
/// In each round.
const CHANGES: usize = 100;
/// As set for the runs, and taken off what is measured.
const DEBOUNCE: Duration = Duration::from_millis(10);
/// Between two changes: the first has been taken up, whatever it took.
const PAUSE: Duration = Duration::from_millis(60);
const PATIENCE: Duration = Duration::from_secs(30);

pub(super) fn run(bench: &Bench) -> Result<Outcome> {
    let backend = Backend::http(1024)?;
    let mut subjects = Vec::new();
    for hosts in HOSTS.map(|hosts| bench.size(hosts)) {
        let arguments = vec!["--debounce".to_owned(), format!("{}ms", DEBOUNCE.as_millis())];
        let task = Task { hosts, arguments, ..Task::new(Front::Http) };
        for mut subject in start(bench, &[Kind::Lockgate], &backend, &task)? {
            subject.name = format!("{hosts} Ingresses");
            let edits = Edits::of(&subject.folder)?;
            let mut changing = Changing { subject, edits };
            // The first change brings the object, its host and the watch.
            changing.live()?;
            subjects.push(changing);
        }
    }
    let passes = bench.interleave(&mut subjects, ROUNDS, |changing, _| changing.round())?;
    let subjects: Vec<Subject> = subjects.into_iter().map(|changing| changing.subject).collect();
    let [many, few] = &subjects[..] else { anyhow::bail!("only Lockgate is measured here") };
    let what = format!("one changed Ingress among {}", many.name.trim_end_matches(" Ingresses"));
    let absolute = |unit: &str| Limit::Absolute(unit.to_owned());
    Ok(Outcome {
        title: format!(
            "one changed Ingress: from the file to the first answer by its new rule, less {DEBOUNCE:?} debounce"
        ),
        columns: vec![
            column("p50_ms", "p50, ms", 2),
            column("p99_ms", "p99, ms", 2),
            paired("cpu_ms", "CPU per change, ms", 2),
        ],
        bars: vec![
            bar(&what, &many.name, "p99_ms", 10.0, absolute("ms, p99")),
            bar(
                "CPU of a change independent of the table's size",
                &many.name,
                "cpu_ms",
                1.2,
                Limit::Of(vec![few.name.clone()]),
            ),
        ],
        wanted: ROUNDS,
        passes,
        notes: vec![format!("{CHANGES} changes in each round; the changed Ingress has a file of its own.")],
        subjects: named(&subjects),
        ..Outcome::default()
    })
}

struct Changing {
    subject: Subject,
    edits: Edits,
}

impl Changing {
    fn round(&mut self) -> Result<Round> {
        let mut latency = histogram();
        let before = machine::Sample::take(self.subject.pid())?;
        for _ in 0..CHANGES {
            let took = self.live()?.saturating_sub(DEBOUNCE);
            latency.saturating_record(took.as_nanos() as u64);
            std::thread::sleep(PAUSE);
        }
        let spent = machine::Sample::take(self.subject.pid())?.since(&before);
        let Percentiles { p50, p99, .. } = Percentiles::of(&latency);
        Ok(Round::new(&self.subject.name, spent)
            .with("p50_ms", p50 / 1e3)
            .with("p99_ms", p99 / 1e3)
            .with("cpu_ms", self.cost()?))
    }

    /// CPU time of a change in ms, without that of anyone asking for it.
    fn cost(&mut self) -> Result<f64> {
        let pid = self.subject.pid();
        let over = |changes: &mut dyn FnMut() -> Result<()>| -> Result<f64> {
            let before = machine::Sample::take(pid)?;
            for _ in 0..CHANGES {
                changes()?;
                std::thread::sleep(PAUSE);
            }
            Ok(machine::Sample::take(pid)?.since(&before).subject_ns as f64 / 1e6)
        };
        let generation = self.edits.generation()?;
        let changing = over(&mut || self.edits.write().map(drop))?;
        let published = self.edits.generation()? - generation;
        // One may be under way at each end.
        ensure!((published - CHANGES as f64).abs() <= 2.0, "{CHANGES} changes, {published} published");
        let idle = over(&mut || Ok(()))?;
        Ok((changing - idle) / CHANGES as f64)
    }

    /// Changes the Ingress; how long until a request is answered by its new rule.
    fn live(&mut self) -> Result<Duration> {
        let mut client = Client::connect(self.subject.address)?;
        let written = Instant::now();
        let path = self.edits.write()?;
        let request = request(EDITED, &path, false);
        loop {
            let status = client.ask(&request)?;
            let took = written.elapsed();
            match &*status {
                "200" => return Ok(took),
                "404" => ensure!(took < PATIENCE, "{path} is not served after {PATIENCE:?}"),
                other => anyhow::bail!("answered {other}"),
            }
            // Nobody asks before anything can have happened: that would cost the proxy's CPU.
            if took < DEBOUNCE {
                std::thread::sleep(DEBOUNCE - took);
            } else {
                std::thread::sleep(Duration::from_micros(100));
            }
        }
    }
}

/// One connection, kept.
struct Client(BufReader<TcpStream>);

impl Client {
    fn connect(address: SocketAddr) -> Result<Client> {
        let stream = TcpStream::connect(address)?;
        stream.set_nodelay(true)?;
        stream.set_read_timeout(Some(Duration::from_secs(5)))?;
        Ok(Client(BufReader::new(stream)))
    }

    /// The status of the answer.
    fn ask(&mut self, request: &[u8]) -> Result<String> {
        self.0.get_mut().write_all(request)?;
        let (mut status, mut length) = (None, 0);
        loop {
            let mut line = String::new();
            ensure!(self.0.read_line(&mut line)? > 0, "closed");
            let line = line.trim_end();
            if line.is_empty() {
                break;
            }
            match line.split_once(": ") {
                None => status = line.split(' ').nth(1).map(str::to_owned),
                Some((name, value)) if name.eq_ignore_ascii_case("content-length") => {
                    length = value.parse()?
                }
                Some(_) => {}
            }
        }
        let mut body = vec![0; length];
        self.0.read_exact(&mut body)?;
        status.context("no status")
    }
}
