//! Tables in Markdown, as `README.md` shows them, and the refusal to print them when the machine was not quiet.

use crate::raw::{Bar, Limit, Outcome};
use crate::statistics::Spread;

/// Prints the tables of one scenario.
pub(crate) fn print(outcome: &Outcome) {
    println!("\n### {}: {}\n", outcome.name, outcome.title);
    let clean = outcome.clean().len();
    if clean < outcome.wanted {
        println!(
            "{clean} of {} passes were clean, {} are wanted: the machine is not quiet enough to quote a figure.",
            outcome.passes.len(),
            outcome.wanted,
        );
        return;
    }
    println!("{clean} clean passes of {}; median (min..max).\n", outcome.passes.len());
    figures(outcome);
    pairs(outcome);
    if !outcome.bars.is_empty() {
        println!("\n{BARS}");
        outcome.bars.iter().for_each(|bar| println!("{}", row(outcome, bar)));
    }
    for note in &outcome.notes {
        println!("\n{note}");
    }
    let versions: Vec<String> = outcome
        .subjects
        .iter()
        .filter(|subject| !subject.version.is_empty())
        .map(|subject| format!("{}: {}", subject.name, subject.version))
        .collect();
    println!("\n{}", versions.join("; "));
}

fn figures(outcome: &Outcome) {
    let titles: Vec<&str> = outcome.columns.iter().map(|column| &*column.title).collect();
    println!("| subject | {} |", titles.join(" | "));
    println!("|---|{}", "---|".repeat(titles.len()));
    for subject in &outcome.subjects {
        print!("| {} ", subject.name);
        for column in &outcome.columns {
            let digits = column.digits;
            match Spread::of(outcome.values(&subject.name, &column.figure)) {
                Some(spread) if column.paired => print!("| {spread:.digits$} "),
                Some(spread) => print!("| {:.digits$} ", spread.median),
                None => print!("| – "),
            }
        }
        println!("|");
    }
}

fn pairs(outcome: &Outcome) {
    let paired: Vec<_> = outcome.columns.iter().filter(|column| column.paired).collect();
    let Some((first, others)) = outcome.subjects.split_first() else { return };
    if paired.is_empty() || others.is_empty() {
        return;
    }
    let titles: Vec<String> = paired.iter().map(|c| format!("{} | 95 % interval", c.title)).collect();
    println!("\n| pairs of one pass | {} |", titles.join(" | "));
    println!("|---|{}", "---|---|".repeat(paired.len()));
    for other in others {
        let ratios =
            |figure: &str| Spread::of(outcome.ratios(&first.name, std::slice::from_ref(&other.name), figure));
        if paired.iter().all(|column| ratios(&column.figure).is_none()) {
            continue;
        }
        print!("| {} / {} ", first.name, other.name);
        for column in &paired {
            match ratios(&column.figure) {
                Some(spread) => print!("| {spread:.3} | {:.3}..{:.3} ", spread.low, spread.high),
                None => print!("| – | – "),
            }
        }
        println!("|");
    }
}

const BARS: &str = "| what | bar | measured | 95 % interval | |\n|---|---|---|---|---|";

/// Prints all bars in one table.
pub(crate) fn print_bars(outcomes: &[Outcome]) {
    println!("{BARS}");
    for outcome in outcomes {
        outcome.bars.iter().for_each(|bar| println!("{}", row(outcome, bar)));
    }
}

/// One line of the table of bars.
fn row(outcome: &Outcome, bar: &Bar) -> String {
    let (limit, values) = match &bar.to {
        Limit::Of(others) => {
            let limit = match &others[..] {
                [one] => format!("≤ {:.2} × {one}", bar.limit),
                several => format!("≤ {:.2} × the better of {}", bar.limit, several.join(" and ")),
            };
            (limit, outcome.ratios(&bar.subject, others, &bar.figure))
        }
        Limit::Absolute(unit) => {
            let limit = format!("≤ {} {unit}", bar.limit);
            (limit.trim_end().to_owned(), outcome.values(&bar.subject, &bar.figure))
        }
    };
    let enough = outcome.clean().len() >= outcome.wanted;
    match Spread::of(values).filter(|_| enough) {
        None => format!("| {} | {limit} | not measured | | |", bar.what),
        Some(spread) => {
            let verdict = if spread.median <= bar.limit { "met" } else { "**missed**" };
            let interval = format!("{:.3}..{:.3}", spread.low, spread.high);
            format!("| {} | {limit} | {:.3} | {interval} | {verdict} |", bar.what, spread.median)
        }
    }
}

#[cfg(test)]
mod tests {
    use crate::raw::Round;

    use super::*;

    fn outcome(wanted: usize) -> Outcome {
        let round = |subject: &str, us: f64| Round {
            subject: subject.to_owned(),
            figures: [("cpu_us".to_owned(), us)].into(),
            clean: true,
            ..Round::default()
        };
        Outcome { wanted, passes: vec![vec![round("a", 8.0), round("b", 10.0)]], ..Outcome::default() }
    }

    #[test]
    fn rows_of_bars() {
        let bar = |limit, to| Bar {
            what: "it".to_owned(),
            subject: "a".to_owned(),
            figure: "cpu_us".to_owned(),
            limit,
            to,
        };
        let of_b = || Limit::Of(vec!["b".to_owned()]);
        let row = |wanted, limit, to| row(&outcome(wanted), &bar(limit, to));
        assert_eq!(row(1, 0.8, of_b()), "| it | ≤ 0.80 × b | 0.800 | 0.800..0.800 | met |");
        assert_eq!(row(1, 0.75, of_b()), "| it | ≤ 0.75 × b | 0.800 | 0.800..0.800 | **missed** |");
        assert_eq!(row(1, 9.0, Limit::Absolute("µs".into())), "| it | ≤ 9 µs | 8.000 | 8.000..8.000 | met |");
        assert_eq!(row(2, 0.8, of_b()), "| it | ≤ 0.80 × b | not measured | | |");
    }
}
