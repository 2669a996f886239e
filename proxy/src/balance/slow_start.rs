//! Slow start: a new endpoint is cold, and one that is back from a failure may
//! fail again. It takes a tenth of its share at first, and all of it in the end.

/// Of its share, at first.
const FIRST: f64 = 0.1;

/// Which part of its share an endpoint takes `age_ms` after it came.
pub(crate) fn part(age_ms: u64, window_ms: u64) -> f64 {
    if age_ms >= window_ms {
        return 1.0;
    }
    (age_ms as f64 / window_ms as f64).max(FIRST)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_tenth_at_first_then_in_proportion() {
        let cases = [
            (0, 0, 1.0),
            (0, 100, 0.1),
            (10, 100, 0.1),
            (50, 100, 0.5),
            (100, 100, 1.0),
            (u64::MAX, 100, 1.0),
        ];
        for (age, window, expected) in cases {
            assert!((part(age, window) - expected).abs() < 1e-9, "{age} of {window}");
        }
    }
}
