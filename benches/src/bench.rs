//! What every scenario needs: the options, a folder, the peers' programs, and the interleaving of rounds.

use std::cell::RefCell;
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use clap::Args;
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use tempfile::TempDir;

use crate::machine;
use crate::raw::Round;
use crate::subject::{Kind, programs};

#[derive(Args)]
pub(crate) struct Options {
    /// Clean rounds wanted of each subject.
    #[arg(long, default_value_t = 7)]
    pub(crate) rounds: usize,
    /// Seconds of load in each round.
    #[arg(long, default_value_t = 4)]
    pub(crate) seconds: u64,
    /// What to measure [default: those the scenario's bars name]. The others are left out.
    #[arg(long, value_delimiter = ',')]
    pub(crate) subjects: Vec<Kind>,
    /// The binary to measure [default: beside this one].
    #[arg(long)]
    pub(crate) lockgate: Option<PathBuf>,
    /// For the order of the rounds; printed, so that a run can be repeated.
    #[arg(long)]
    pub(crate) seed: Option<u64>,
    /// Write every round to this file.
    #[arg(long)]
    pub(crate) json: Option<PathBuf>,
    /// Requests per second of `latency` [default: 30 % of what the slowest subject can do].
    #[arg(long)]
    pub(crate) rate: Option<f64>,
    /// Hosts of the scenarios about size: a hundredth, to try them.
    #[arg(long)]
    pub(crate) small: bool,
    /// Count disturbed rounds too: to try the harness, never to quote.
    #[arg(long)]
    pub(crate) noisy: bool,
}

pub(crate) struct Bench {
    pub(crate) options: Options,
    pub(crate) seed: u64,
    pub(crate) random: RefCell<fastrand::Rng>,
    /// In memory where that can be: logs and tables must not wait for a disk.
    folder: TempDir,
    /// Programs of peers, kept between runs.
    pub(crate) cache: PathBuf,
    _alone: File,
}

impl Bench {
    pub(crate) fn new(options: Options) -> Result<Bench> {
        ensure!(options.rounds > 0 && options.seconds > 0, "rounds and seconds are at least 1");
        let alone = machine::lock()?;
        // Thousands of connections; children inherit it.
        let most = getrlimit(Resource::Nofile).maximum;
        setrlimit(Resource::Nofile, Rlimit { current: most, maximum: most })?;
        let memory = Path::new("/dev/shm");
        let parent = if memory.is_dir() { memory.to_owned() } else { std::env::temp_dir() };
        let folder = tempfile::Builder::new().prefix("lockgate-bench").tempdir_in(parent)?;
        let cache = match std::env::var_os("XDG_CACHE_HOME") {
            Some(cache) => PathBuf::from(cache),
            None => PathBuf::from(std::env::var_os("HOME").context("HOME is not set")?).join(".cache"),
        };
        let seed = options.seed.unwrap_or_else(|| fastrand::u64(..));
        Ok(Bench {
            seed,
            random: RefCell::new(fastrand::Rng::with_seed(seed)),
            folder,
            cache: cache.join("lockgate-bench"),
            _alone: alone,
            options,
        })
    }

    pub(crate) fn round_time(&self) -> Duration {
        Duration::from_secs(self.options.seconds)
    }

    /// A new empty folder.
    pub(crate) fn folder(&self, name: &str) -> Result<PathBuf> {
        let folder = self.folder.path().join(format!("{name}-{:08x}", fastrand::u32(..)));
        fs::create_dir(&folder).with_context(|| folder.display().to_string())?;
        Ok(folder)
    }

    pub(crate) fn lockgate(&self) -> Result<PathBuf> {
        match &self.options.lockgate {
            Some(path) => Ok(path.clone()),
            None => Ok(std::env::current_exe()?.with_file_name("lockgate")),
        }
    }

    /// A hundredth of it with `--small`.
    pub(crate) fn size(&self, hosts: usize) -> usize {
        if self.options.small { (hosts / 100).max(2) } else { hosts }
    }

    /// Of the scenario's own subjects those that were asked for and can be had, with their programs.
    pub(crate) fn subjects(&self, of: &[Kind]) -> Result<Vec<(Kind, PathBuf)>> {
        let mut found = Vec::new();
        for &kind in of {
            let asked = self.options.subjects.is_empty() || self.options.subjects.contains(&kind);
            if !asked {
                continue;
            }
            match programs::find(self, kind) {
                Ok(program) => found.push((kind, program)),
                Err(error) => skip(kind.name(), &error)?,
            }
        }
        ensure!(!found.is_empty(), "no subject is left");
        Ok(found)
    }

    /// Rounds of `subjects`, each pass in another order, until every pass
    /// wanted is clean, or twice as many have run. A pass is kept or left out as a
    /// whole, for its ratios are of neighbours in time.
    pub(crate) fn interleave<S>(
        &self,
        subjects: &mut [S],
        rounds: usize,
        mut one: impl FnMut(&mut S, u64) -> Result<Round>,
    ) -> Result<Vec<Vec<Round>>> {
        let mut passes = Vec::new();
        let mut clean = 0;
        while clean < rounds && passes.len() < 2 * rounds {
            let mut order: Vec<usize> = (0..subjects.len()).collect();
            // The same for all subjects of a pass, for what a round draws at random.
            let seed = {
                let mut random = self.random.borrow_mut();
                random.shuffle(&mut order);
                random.u64(..)
            };
            let mut pass: Vec<Option<Round>> = subjects.iter().map(|_| None).collect();
            for index in order {
                let mut round = one(&mut subjects[index], seed)?;
                round.clean |= self.options.noisy;
                eprintln!("{round}");
                pass[index] = Some(round);
            }
            let pass: Vec<Round> = pass.into_iter().flatten().collect();
            clean += usize::from(pass.iter().all(|round| round.clean));
            passes.push(pass);
        }
        Ok(passes)
    }
}

/// Says loudly that something is left out; where it must not be (`CI=true`), it is an error.
pub(crate) fn skip(what: &str, why: &anyhow::Error) -> Result<()> {
    if std::env::var("CI").is_ok_and(|ci| ci == "true") {
        bail!("{what} cannot be left out here: {why:#}");
    }
    eprintln!("\n!!! SKIPPED {what}: {why:#}\n");
    Ok(())
}
