//! Measures Lockgate beside its peers on one machine: same client, same
//! backend, same CPU, rounds interleaved. Method and results: `README.md`.
//!
//! ```text
//!  CPU 1: wrk ──► CPU 0: one subject at a time ──► CPU 1: backend (canned answers)
//!                        │
//!                        └─ µs of CPU per request, from the scheduler's own account
//! ```
#![expect(clippy::disallowed_methods, reason = "measures real time")]

mod backend;
mod load;
mod machine;
mod report;
mod subject;

use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use clap::{Args, Parser, Subcommand};

use crate::report::{Round, Verdict};
use crate::subject::{Kind, Subject};

#[derive(Parser)]
#[command(about = "Lockgate beside its peers: CPU per request, interleaved")]
struct Cli {
    #[command(subcommand)]
    case: Case,
}

#[derive(Subcommand)]
enum Case {
    /// HTTP/1.1 keep-alive, small answers, one worker.
    Http1(Http1),
    /// The canned backend alone (the other cases start it themselves).
    #[command(hide = true)]
    Backend {
        /// Where it listens.
        address: SocketAddr,
        /// Bytes of each answer's body.
        #[arg(long, default_value_t = 1024)]
        body: usize,
    },
}

#[derive(Args)]
struct Http1 {
    /// Clean rounds wanted of each subject.
    #[arg(long, default_value_t = 7)]
    rounds: usize,
    /// Seconds of load in each round.
    #[arg(long, default_value_t = 4)]
    seconds: u64,
    /// Client connections.
    #[arg(long, default_value_t = 64)]
    conns: usize,
    /// Bytes of each answer's body.
    #[arg(long, default_value_t = 1024)]
    body: usize,
    /// What to measure; ratios are of the first to each other one.
    #[arg(long, value_delimiter = ',', default_value = "lockgate,nginx,haproxy")]
    subjects: Vec<Kind>,
    /// The binary to measure [default: beside this one].
    #[arg(long)]
    lockgate: Option<PathBuf>,
    /// For the order of the rounds; printed, so that a run can be repeated.
    #[arg(long)]
    seed: Option<u64>,
}

/// Where the subject runs, alone.
const SUBJECT_CPU: usize = 0;
/// Where the load and the backend run.
const OTHERS_CPU: usize = 1;
/// Load before the first round, for pools, caches and allocators.
const WARM_UP: Duration = Duration::from_secs(1);

fn main() -> Result<()> {
    match Cli::parse().case {
        Case::Backend { address, body } => backend::run(address, body),
        Case::Http1(case) => http1(case),
    }
}

fn http1(case: Http1) -> Result<()> {
    ensure!(
        case.rounds > 0 && case.seconds > 0 && case.conns > 0,
        "rounds, seconds and conns are at least 1"
    );
    let _alone = machine::lock()?;
    let folder = tempfile::tempdir().context("a folder for configurations")?;
    let backend = subject::start_backend(case.body)?;
    let lockgate = match &case.lockgate {
        Some(path) => path.clone(),
        None => std::env::current_exe()?.with_file_name("lockgate"),
    };
    let mut subjects = Vec::new();
    for kind in &case.subjects {
        let subject = Subject::start(*kind, folder.path(), &backend, &lockgate)?;
        load::wrk(subject.address, case.conns, WARM_UP).with_context(|| subject.name().to_owned())?;
        subjects.push(subject);
    }
    let seed = case.seed.unwrap_or_else(|| fastrand::u64(..));
    let rounds = measure(&case, &subjects, seed)?;
    println!("{}", machine::describe());
    println!(
        "http1: {} connections, {} byte bodies, rounds of {} s, seed {seed}",
        case.conns, case.body, case.seconds
    );
    for subject in &subjects {
        println!("{}: {}", subject.name(), subject.version);
    }
    println!();
    report::print(&case.subjects, &rounds, case.rounds)
}

/// Interleaves the subjects, each pass in another order, until every pass
/// wanted is clean, or twice as many have run. A pass is kept or left out as a
/// whole, for its ratios are of neighbours in time.
fn measure(case: &Http1, subjects: &[Subject], seed: u64) -> Result<Vec<Vec<Round>>> {
    let mut random = fastrand::Rng::with_seed(seed);
    let mut passes = Vec::new();
    let mut clean = 0;
    while clean < case.rounds && passes.len() < 2 * case.rounds {
        let mut order: Vec<usize> = (0..subjects.len()).collect();
        random.shuffle(&mut order);
        let mut pass: Vec<Option<Round>> = subjects.iter().map(|_| None).collect();
        for index in order {
            let subject = &subjects[index];
            let round = one_round(case, subject).with_context(|| subject.name().to_owned())?;
            eprintln!("{:>8}  {round}", subject.name());
            pass[index] = Some(round);
        }
        let pass: Vec<Round> = pass.into_iter().flatten().collect();
        clean += usize::from(pass.iter().all(|round| round.verdict() == Verdict::Clean));
        passes.push(pass);
    }
    Ok(passes)
}

fn one_round(case: &Http1, subject: &Subject) -> Result<Round> {
    let before = machine::Sample::take(subject.pid())?;
    let load = load::wrk(subject.address, case.conns, Duration::from_secs(case.seconds))?;
    let spent = machine::Sample::take(subject.pid())?.since(&before);
    load::probe(subject.address, case.body)?;
    Ok(Round { requests: load.requests, per_second: load.per_second, spent })
}
