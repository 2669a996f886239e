//! What was measured, as it is written to `--json` and read again.

use std::collections::BTreeMap;
use std::fmt;
use std::path::Path;

use anyhow::{Context, Result};
use serde::{Deserialize, Serialize};

use crate::bench::Bench;
use crate::machine::{self, Spent};

/// All scenarios of one run.
#[derive(Serialize, Deserialize)]
pub(crate) struct Run {
    pub(crate) machine: String,
    pub(crate) seed: u64,
    pub(crate) scenarios: Vec<Outcome>,
}

/// One scenario.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub(crate) struct Outcome {
    pub(crate) name: String,
    /// What was done, in a line.
    pub(crate) title: String,
    /// Columns of its table.
    pub(crate) columns: Vec<Column>,
    /// In the order of the rounds of a pass.
    pub(crate) subjects: Vec<Named>,
    /// Clean passes wanted.
    pub(crate) wanted: usize,
    /// One round of each subject in each.
    pub(crate) passes: Vec<Vec<Round>>,
    pub(crate) bars: Vec<Bar>,
    /// What a reader must know.
    pub(crate) notes: Vec<String>,
}

/// A subject in tables, and what it says it is.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct Named {
    pub(crate) name: String,
    pub(crate) version: String,
}

#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct Column {
    /// Of the figure in [`Round::figures`].
    pub(crate) figure: String,
    pub(crate) title: String,
    pub(crate) digits: usize,
    /// Also as ratios of the first subject to each other one.
    pub(crate) paired: bool,
}

/// What is to be shown.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct Bar {
    pub(crate) what: String,
    pub(crate) subject: String,
    pub(crate) figure: String,
    pub(crate) limit: f64,
    pub(crate) to: Limit,
}

/// What the limit is a multiple of.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) enum Limit {
    /// The same figure of another subject; the better one of several.
    Of(Vec<String>),
    /// One of this unit.
    Absolute(String),
}

/// One subject, once.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub(crate) struct Round {
    pub(crate) subject: String,
    pub(crate) figures: BTreeMap<String, f64>,
    /// Whether it may be quoted.
    pub(crate) clean: bool,
    /// Shares of CPU time: used by others on the subject's CPU, and withheld by the hypervisor.
    pub(crate) foreign: f64,
    pub(crate) steal: f64,
}

/// Share of CPU time withheld by the hypervisor beyond which nothing is quoted.
const MAX_STEAL: f64 = 0.01;
/// Share of the subject's CPU used by others beyond which nothing is quoted:
/// interrupts and the kernel's own threads stay below.
const MAX_FOREIGN: f64 = 0.06;

impl Round {
    pub(crate) fn new(subject: &str, spent: Spent) -> Round {
        Round {
            subject: subject.to_owned(),
            figures: BTreeMap::new(),
            clean: spent.steal <= MAX_STEAL && spent.foreign <= MAX_FOREIGN,
            foreign: spent.foreign,
            steal: spent.steal,
        }
    }

    pub(crate) fn with(mut self, figure: &str, value: f64) -> Round {
        self.figures.insert(figure.to_owned(), value);
        self
    }
}

impl fmt::Display for Round {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:>22}", self.subject)?;
        for (name, value) in &self.figures {
            write!(f, "  {name} {value:.2}")?;
        }
        write!(f, "  others {:.1} %, steal {:.1} %", self.foreign * 100.0, self.steal * 100.0)?;
        if !self.clean {
            write!(f, "  LEFT OUT")?;
        }
        Ok(())
    }
}

impl Outcome {
    /// Passes that may be quoted.
    pub(crate) fn clean(&self) -> Vec<&[Round]> {
        let clean = |pass: &&Vec<Round>| pass.iter().all(|round| round.clean);
        self.passes.iter().filter(clean).map(Vec::as_slice).collect()
    }

    /// A figure of a subject in every clean pass; none where it was not taken.
    pub(crate) fn values(&self, subject: &str, figure: &str) -> Vec<f64> {
        let of = |pass: &&[Round]| value(pass, subject, figure);
        self.clean().iter().filter_map(of).collect()
    }

    /// Ratios of two subjects, pass by pass; of several others the better (smaller) one counts.
    pub(crate) fn ratios(&self, subject: &str, others: &[String], figure: &str) -> Vec<f64> {
        let of = |pass: &&[Round]| {
            let other = others.iter().filter_map(|other| value(pass, other, figure));
            Some(value(pass, subject, figure)? / other.min_by(f64::total_cmp)?)
        };
        self.clean().iter().filter_map(of).collect()
    }
}

fn value(pass: &[Round], subject: &str, figure: &str) -> Option<f64> {
    pass.iter().find(|round| round.subject == subject)?.figures.get(figure).copied()
}

impl Run {
    pub(crate) fn new(bench: &Bench) -> Run {
        Run { machine: machine::describe(), seed: bench.seed, scenarios: Vec::new() }
    }

    pub(crate) fn write(&self, file: Option<&Path>) -> Result<()> {
        let Some(file) = file else { return Ok(()) };
        std::fs::write(file, serde_json::to_string_pretty(self)?).with_context(|| file.display().to_string())
    }
}

pub(crate) fn read(file: &Path) -> Result<Run> {
    let text = std::fs::read(file).with_context(|| file.display().to_string())?;
    serde_json::from_slice(&text).with_context(|| file.display().to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn round(subject: &str, us: f64, steal: f64, foreign: f64) -> Round {
        let spent = Spent { subject_ns: 0, busy: 0.9, foreign, steal };
        Round::new(subject, spent).with("cpu_us", us)
    }

    #[test]
    fn a_disturbed_round_leaves_its_pass_out() {
        for (steal, foreign, clean) in [(0.0, 0.01, true), (0.011, 0.0, false), (0.0, 0.07, false)] {
            assert_eq!(round("a", 1.0, steal, foreign).clean, clean);
        }
        let outcome = Outcome {
            passes: vec![
                vec![round("a", 8.0, 0.0, 0.0), round("b", 10.0, 0.0, 0.0), round("c", 16.0, 0.0, 0.0)],
                vec![round("a", 1.0, 0.0, 0.0), round("b", 9.0, 0.5, 0.0), round("c", 9.0, 0.0, 0.0)],
            ],
            ..Outcome::default()
        };
        let others = ["c".to_owned(), "b".to_owned()];
        assert_eq!(outcome.values("a", "cpu_us"), [8.0]);
        assert_eq!(outcome.ratios("a", &others, "cpu_us"), [0.8]);
        assert_eq!(outcome.ratios("a", &others[..1], "cpu_us"), [0.5]);
        assert!(outcome.ratios("a", &["d".to_owned()], "cpu_us").is_empty());
    }
}
