//! Medians and their spread, and the refusal to print them when the machine was not quiet.

use std::fmt;

use anyhow::{Result, bail};

use crate::machine::Spent;
use crate::subject::Kind;

/// One subject under load for a while.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Round {
    /// Requests answered.
    pub(crate) requests: u64,
    /// The same per second.
    pub(crate) per_second: f64,
    /// What that cost, and what else went on.
    pub(crate) spent: Spent,
}

/// Whether a round may be quoted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Verdict {
    /// Yes.
    Clean,
    /// The hypervisor gave the CPU to someone else.
    Stolen,
    /// Something else ran on the subject's CPU.
    Disturbed,
}

/// Share of CPU time withheld by the hypervisor beyond which nothing is quoted.
const MAX_STEAL: f64 = 0.01;
/// Share of the subject's CPU used by others beyond which nothing is quoted:
/// interrupts and the kernel's own threads stay below.
const MAX_FOREIGN: f64 = 0.06;

impl Round {
    /// CPU time of the subject per request, in µs.
    pub(crate) fn us_per_request(&self) -> f64 {
        self.spent.subject_ns as f64 / 1e3 / self.requests as f64
    }

    /// Whether it may be quoted.
    pub(crate) fn verdict(&self) -> Verdict {
        if self.spent.steal > MAX_STEAL {
            Verdict::Stolen
        } else if self.spent.foreign > MAX_FOREIGN {
            Verdict::Disturbed
        } else {
            Verdict::Clean
        }
    }
}

impl fmt::Display for Round {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{:6.2} µs/request  {:7.0} requests/s  CPU {:5.1} %, others {:4.1} %, steal {:4.1} %",
            self.us_per_request(),
            self.per_second,
            self.spent.busy * 100.0,
            self.spent.foreign * 100.0,
            self.spent.steal * 100.0,
        )?;
        match self.verdict() {
            Verdict::Clean => Ok(()),
            Verdict::Stolen => write!(f, "  left out: CPU time stolen"),
            Verdict::Disturbed => write!(f, "  left out: disturbed"),
        }
    }
}

/// Prints the tables. `passes` hold one round per subject, in the order of `subjects`.
///
/// # Errors
/// When fewer than `wanted` passes were clean: then there is nothing to quote.
pub(crate) fn print(subjects: &[Kind], passes: &[Vec<Round>], wanted: usize) -> Result<()> {
    let clean: Vec<_> = passes.iter().filter(|p| p.iter().all(|r| r.verdict() == Verdict::Clean)).collect();
    if clean.len() < wanted {
        bail!(
            "{} of {} passes were clean, {wanted} are wanted: the machine is not quiet enough to quote a figure",
            clean.len(),
            passes.len()
        );
    }
    println!("{} clean passes of {}; median (min..max)\n", clean.len(), passes.len());
    println!("| subject | CPU µs per request | requests per second | CPU used |");
    println!("|---|---|---|---|");
    for (index, subject) in subjects.iter().enumerate() {
        let of =
            |value: fn(&Round) -> f64| Spread::of(clean.iter().map(|pass| value(&pass[index])).collect());
        let (us, rate, busy) =
            (of(Round::us_per_request), of(|r| r.per_second), of(|r| r.spent.busy * 100.0));
        println!("| {} | {us:.2} | {rate:.0} | {busy:.0} % |", subject.name());
    }
    if let Some((first, others)) = subjects.split_first().filter(|(_, others)| !others.is_empty()) {
        println!("\n| pairs of one pass | CPU per request | requests per second |");
        println!("|---|---|---|");
        for (index, other) in others.iter().enumerate() {
            let of = |value: fn(&Round) -> f64| {
                Spread::of(clean.iter().map(|pass| value(&pass[0]) / value(&pass[index + 1])).collect())
            };
            let (us, rate) = (of(Round::us_per_request), of(|r| r.per_second));
            println!("| {} / {} | {us:.3} | {rate:.3} |", first.name(), other.name());
        }
    }
    Ok(())
}

/// Median, smallest and largest.
#[derive(Clone, Copy, Debug, PartialEq)]
struct Spread {
    median: f64,
    min: f64,
    max: f64,
}

impl Spread {
    /// Of at least one value.
    fn of(mut values: Vec<f64>) -> Spread {
        values.sort_by(f64::total_cmp);
        let last = values.len() - 1;
        Spread {
            median: (values[last / 2] + values[last.div_ceil(2)]) / 2.0,
            min: values[0],
            max: values[last],
        }
    }
}

impl fmt::Display for Spread {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let digits = f.precision().unwrap_or(2);
        write!(f, "{:.digits$} ({:.digits$}..{:.digits$})", self.median, self.min, self.max)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn round(us: f64, steal: f64, foreign: f64) -> Round {
        let spent = Spent { subject_ns: (us * 1e6) as u64, busy: 0.9, foreign, steal };
        Round { requests: 1_000, per_second: 1e6 / us, spent }
    }

    #[test]
    fn spread() {
        assert_eq!(Spread::of(vec![3.0, 1.0, 2.0]), Spread { median: 2.0, min: 1.0, max: 3.0 });
        assert_eq!(Spread::of(vec![4.0, 1.0]), Spread { median: 2.5, min: 1.0, max: 4.0 });
        assert_eq!(format!("{:.1}", Spread::of(vec![1.0])), "1.0 (1.0..1.0)");
    }

    #[test]
    fn a_noisy_machine_is_not_quoted() {
        let (quiet, stolen, disturbed) =
            (round(9.0, 0.0, 0.01), round(9.0, 0.011, 0.0), round(9.0, 0.0, 0.07));
        assert_eq!(quiet.verdict(), Verdict::Clean);
        assert_eq!(stolen.verdict(), Verdict::Stolen);
        assert_eq!(disturbed.verdict(), Verdict::Disturbed);
        assert!((quiet.us_per_request() - 9.0).abs() < 1e-9);

        let subjects = [Kind::Lockgate, Kind::Nginx];
        assert!(print(&subjects, &[vec![quiet, quiet]], 1).is_ok());
        assert!(print(&subjects, &[vec![quiet, stolen], vec![disturbed, quiet]], 1).is_err());
    }
}
