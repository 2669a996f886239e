//! Weights made into cycles: who takes which turn, spread out.

/// Turns of a cycle over backends: any 1,000 consecutive turns are whole cycles.
const CYCLE: u64 = 1_000;

/// A cycle over backends, by index, for three or more nonzero weights. Its
/// length divides 1,000, so over any 1,000 consecutive turns each share is
/// exact, or within 1 where `weight / sum` is no whole number of 1,000ths.
/// A nonzero weight has at least one turn in 1,000.
pub(crate) fn of_backends(weights: &[u64]) -> Box<[u8]> {
    let reduced = reduce(weights);
    let total: u64 = reduced.iter().sum();
    let counts = if total > 0 && CYCLE.is_multiple_of(total) { reduced } else { apportion(&reduced, CYCLE) };
    spread(&counts).map(|index| index as u8).collect()
}

/// A cycle over endpoints, by index; `None` when all weigh the same.
pub(crate) fn of_endpoints(weights: &[u64]) -> Option<Box<[u16]>> {
    if weights.windows(2).all(|pair| pair[0] == pair[1]) || weights.len() > usize::from(u16::MAX) {
        return None;
    }
    let counts = reduced(weights, CYCLE.max(4 * weights.len() as u64));
    Some(spread(&counts).map(|index| index as u16).collect())
}

/// The same shares in numbers that add up to no more than `most`, which is at
/// least the number of weights. A nonzero weight stays one.
pub(super) fn reduced(weights: &[u64], most: u64) -> Vec<u64> {
    let reduced = reduce(weights);
    if reduced.iter().sum::<u64>() <= most { reduced } else { apportion(&reduced, most) }
}

/// Divides by the greatest common divisor.
fn reduce(weights: &[u64]) -> Vec<u64> {
    let divisor = weights.iter().copied().fold(0, gcd).max(1);
    weights.iter().map(|weight| weight / divisor).collect()
}

fn gcd(a: u64, b: u64) -> u64 {
    if b == 0 { a } else { gcd(b, a % b) }
}

/// `seats` divided by weight: largest remainder, at least one seat for a
/// nonzero weight. Wants no more nonzero weights than seats.
fn apportion(weights: &[u64], seats: u64) -> Vec<u64> {
    let total: u128 = weights.iter().map(|w| u128::from(*w)).sum::<u128>().max(1);
    let exact = |index: usize| u128::from(weights[index]) * u128::from(seats);
    let mut counts: Vec<u64> = (0..weights.len())
        .map(|index| ((exact(index) / total) as u64).max(u64::from(weights[index] > 0)))
        .collect();
    // Positive: has more than its exact share, in 1/total seats.
    let surplus =
        |counts: &[u64], index: usize| (u128::from(counts[index]) * total) as i128 - exact(index) as i128;
    let mut sum: u64 = counts.iter().sum();
    let mut neediest: Vec<usize> = (0..weights.len()).filter(|index| weights[*index] > 0).collect();
    neediest.sort_by_key(|index| surplus(&counts, *index));
    for index in neediest {
        if sum >= seats {
            break;
        }
        counts[index] += 1;
        sum += 1;
    }
    while sum > seats {
        let richest = (0..counts.len()).filter(|index| counts[*index] > 1);
        let Some(richest) = richest.max_by_key(|index| surplus(&counts, *index)) else { break };
        counts[richest] -= 1;
        sum -= 1;
    }
    counts
}

/// Index `i` occurs `counts[i]` times, each occurrence as near to the middle
/// of its own nth part of the cycle as the others allow.
fn spread(counts: &[u64]) -> impl Iterator<Item = usize> {
    let mut turns: Vec<(u64, usize)> = Vec::with_capacity(counts.iter().sum::<u64>() as usize);
    for (index, count) in counts.iter().enumerate() {
        turns.extend((0..*count).map(|nth| (((2 * nth + 1) << 32) / count, index)));
    }
    turns.sort_unstable();
    turns.into_iter().map(|(_, index)| index)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn count(cycle: &[u8], index: u8) -> u64 {
        cycle.iter().filter(|i| **i == index).count() as u64
    }

    #[test]
    fn cycles_of_backends_divide_a_thousand() {
        let cases: &[(&[u64], &[u64])] = &[
            (&[90, 5, 5], &[18, 1, 1]),
            (&[1, 1, 2], &[1, 1, 2]),
            (&[50, 30, 0, 20], &[5, 3, 0, 2]),
            (&[1, 1, 1], &[334, 333, 333]),
            (&[3, 2, 2], &[428, 286, 286]),
            (&[1_000_000, 1, 1], &[998, 1, 1]),
        ];
        for (weights, expected) in cases {
            let cycle = of_backends(weights);
            assert!(1_000_usize.is_multiple_of(cycle.len()), "{weights:?}");
            let counts: Vec<u64> = (0..weights.len()).map(|i| count(&cycle, i as u8)).collect();
            assert_eq!(counts, *expected, "{weights:?}");
        }
    }

    #[test]
    fn occurrences_are_spread_out() {
        let cycle = of_backends(&[90, 5, 5]);
        for canary in [1, 2] {
            let at: Vec<usize> = (0..1_000).filter(|turn| cycle[turn % cycle.len()] == canary).collect();
            assert!(at.windows(2).all(|pair| (19..=21).contains(&(pair[1] - pair[0]))), "{canary}: {at:?}");
        }
    }

    #[test]
    fn equal_endpoints_need_no_cycle() {
        assert_eq!(of_endpoints(&[]), None);
        assert_eq!(of_endpoints(&[7, 7, 7]), None);
        assert_eq!(of_endpoints(&[2, 4]).as_deref(), Some([1, 0, 1].as_slice()));
    }
}
