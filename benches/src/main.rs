//! Measures Lockgate beside its peers on one machine: same client, same
//! backend, same CPU, rounds interleaved. Method and results: `README.md`.
//!
//! ```text
//!  CPU 1: load ──► CPU 0: one subject at a time ──► CPU 1: backend (canned answers)
//!                         │
//!                         └─ µs of CPU per request, from the scheduler's own account
//! ```
#![expect(clippy::disallowed_methods, reason = "measures real time")]

mod backend;
mod bench;
mod load;
mod machine;
mod picture;
mod raw;
mod report;
mod scenario;
mod statistics;
mod stream;
mod subject;

use std::net::SocketAddr;
use std::path::PathBuf;

use anyhow::{Result, ensure};
use clap::{Parser, Subcommand};

use crate::bench::{Bench, Options};
use crate::scenario::Scenario;

#[derive(Parser)]
#[command(about = "Lockgate beside its peers: CPU per request, interleaved")]
#[command(args_conflicts_with_subcommands = true)]
struct Cli {
    #[command(subcommand)]
    part: Option<Part>,
    /// What to measure, or `all`.
    scenarios: Vec<Scenario>,
    #[command(flatten)]
    options: Options,
}

/// The programs that scenarios start for themselves, and what is done with their results.
#[derive(Subcommand)]
enum Part {
    /// Draw a comparison from the rounds that `--json` wrote.
    Picture {
        /// What `--json` wrote.
        #[arg(long)]
        json: PathBuf,
        /// The picture.
        #[arg(long)]
        svg: PathBuf,
    },
    /// Print the tables of rounds that `--json` wrote.
    Tables {
        /// What `--json` wrote.
        #[arg(long)]
        json: PathBuf,
    },
    /// The canned backend.
    #[command(hide = true)]
    Backend {
        address: SocketAddr,
        #[arg(long, default_value_t = 1024)]
        body: usize,
        /// A header field without which it answers no proxy.
        #[arg(long)]
        require: Option<String>,
    },
    /// Sends back what it gets.
    #[command(hide = true)]
    Echo { address: SocketAddr },
    /// Sends without end.
    #[command(hide = true)]
    Source { address: SocketAddr },
    /// The floor of any proxy: moves bytes both ways and looks at none of them.
    #[command(hide = true)]
    Relay { address: SocketAddr, to: SocketAddr },
}

/// Where the subject runs, alone.
const SUBJECT_CPU: usize = 0;
/// Where the load and the backend run.
const OTHERS_CPU: usize = 1;

fn main() -> Result<()> {
    let cli = Cli::parse();
    match cli.part {
        Some(Part::Picture { json, svg }) => picture::draw(&json, &svg),
        Some(Part::Tables { json }) => {
            raw::read(&json)?.scenarios.iter().for_each(report::print);
            Ok(())
        }
        Some(Part::Backend { address, body, require }) => backend::run(address, body, require),
        Some(Part::Echo { address }) => stream::echo(address),
        Some(Part::Source { address }) => stream::source(address),
        Some(Part::Relay { address, to }) => stream::relay(address, to),
        None => {
            ensure!(!cli.scenarios.is_empty(), "name a scenario, or `all`: see --help");
            measure(&cli.scenarios, cli.options)
        }
    }
}

/// One after the other; a scenario that fails does not take the results of the others with it.
fn measure(scenarios: &[Scenario], options: Options) -> Result<()> {
    let bench = Bench::new(options)?;
    let mut run = raw::Run::new(&bench);
    let mut failed = Vec::new();
    for scenario in scenario::chosen(scenarios) {
        eprintln!("\n== {}", scenario.name());
        match scenario.run(&bench) {
            Ok(outcome) => {
                report::print(&outcome);
                run.scenarios.push(outcome);
                run.write(bench.options.json.as_deref())?;
            }
            Err(error) => {
                eprintln!("{}: {error:#}", scenario.name());
                failed.push(scenario.name());
            }
        }
    }
    println!("\n{}; seed {}\n", run.machine, bench.seed);
    report::print_bars(&run.scenarios);
    ensure!(failed.is_empty(), "not measured: {}", failed.join(", "));
    Ok(())
}
