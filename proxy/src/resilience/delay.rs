//! How long nineteen of twenty requests to a pool take: an estimate in one word.

use std::cell::RefCell;
use std::time::Duration;

/// Requests seen before the estimate is believed.
const SEEN: u32 = 20;

/// By pool slot, for those with a hedged rule. One set per worker.
#[derive(Debug, Default)]
pub(crate) struct Delays(RefCell<Vec<Delay>>);

#[derive(Clone, Copy, Debug, Default)]
struct Delay {
    us: f32,
    seen: u32,
}

impl Delays {
    /// The 95th percentile; `None` while too little is known.
    pub(crate) fn p95(&self, slot: u32) -> Option<Duration> {
        let delay = self.0.borrow().get(slot as usize).copied().unwrap_or_default();
        (delay.seen >= SEEN).then(|| Duration::from_micros(delay.us as u64))
    }

    /// A request took this long.
    pub(crate) fn saw(&self, slot: u32, took: Duration) {
        let mut delays = self.0.borrow_mut();
        let slot = slot as usize;
        if slot >= delays.len() {
            delays.resize((slot + 1).next_power_of_two(), Delay::default());
        }
        delays[slot].saw(took.as_micros() as f32);
    }
}

impl Delay {
    /// Up by nineteen steps for one that took longer, down by one for one that
    /// did not: at rest where one of twenty takes longer. A step is a part of
    /// the estimate, so that it follows microseconds and minutes alike.
    fn saw(&mut self, us: f32) {
        const STEP: f32 = 0.002;
        self.us = match self.seen {
            0 => us,
            _ if us > self.us => (self.us * (1.0 + 19.0 * STEP)).max(1.0),
            _ => self.us * (1.0 - STEP),
        };
        self.seen = self.seen.saturating_add(1);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn comes_to_rest_near_the_95th_percentile_and_follows_it() {
        let mut random = fastrand::Rng::with_seed(7);
        let delays = Delays::default();
        for scale in [100, 10_000, 50] {
            for _ in 0..20_000 {
                delays.saw(5, Duration::from_micros(random.u64(0..100 * scale)));
            }
            let p95 = delays.p95(5).unwrap().as_micros() as u64 / scale;
            assert!((88..=102).contains(&p95), "{p95}");
        }
    }

    #[test]
    fn says_nothing_before_it_has_seen_some() {
        let delays = Delays::default();
        for _ in 0..SEEN {
            assert_eq!(delays.p95(1), None);
            delays.saw(1, Duration::from_millis(1));
        }
        assert!(delays.p95(1).is_some());
    }
}
