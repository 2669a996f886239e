//! Medians and how far they can be trusted.

use std::fmt;

/// Median, smallest and largest, and where the median would lie if the rounds were drawn again.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Spread {
    pub(crate) median: f64,
    pub(crate) min: f64,
    pub(crate) max: f64,
    /// Bootstrap interval of the median, 95 %.
    pub(crate) low: f64,
    pub(crate) high: f64,
}

/// Times that the rounds are drawn again.
const DRAWS: usize = 2_000;

impl Spread {
    /// None of no values.
    pub(crate) fn of(mut values: Vec<f64>) -> Option<Spread> {
        if values.is_empty() {
            return None;
        }
        values.sort_by(f64::total_cmp);
        // The same rounds always give the same interval.
        let mut random = fastrand::Rng::with_seed(values.len() as u64);
        let mut medians: Vec<f64> = (0..DRAWS)
            .map(|_| {
                let mut drawn: Vec<f64> =
                    values.iter().map(|_| values[random.usize(..values.len())]).collect();
                drawn.sort_by(f64::total_cmp);
                median(&drawn)
            })
            .collect();
        medians.sort_by(f64::total_cmp);
        Some(Spread {
            median: median(&values),
            min: values[0],
            max: values[values.len() - 1],
            low: medians[DRAWS / 40],
            high: medians[DRAWS - 1 - DRAWS / 40],
        })
    }
}

/// Of sorted values, at least one.
fn median(sorted: &[f64]) -> f64 {
    let last = sorted.len() - 1;
    f64::midpoint(sorted[last / 2], sorted[last.div_ceil(2)])
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

    #[test]
    fn spread() {
        let of = |values: &[f64]| {
            let spread = Spread::of(values.to_vec()).unwrap();
            (spread.median, spread.min, spread.max)
        };
        assert_eq!(of(&[3.0, 1.0, 2.0]), (2.0, 1.0, 3.0));
        assert_eq!(of(&[4.0, 1.0]), (2.5, 1.0, 4.0));
        assert_eq!(Spread::of(Vec::new()), None);
        assert_eq!(format!("{:.1}", Spread::of(vec![1.0]).unwrap()), "1.0 (1.0..1.0)");
    }

    #[test]
    fn the_interval_lies_within_the_range_and_around_the_median() {
        let spread = Spread::of((0..21).map(f64::from).collect()).unwrap();
        assert!(spread.min < spread.low && spread.low < spread.median);
        assert!(spread.median < spread.high && spread.high < spread.max);
    }
}
