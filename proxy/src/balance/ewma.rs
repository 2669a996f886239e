//! How long an endpoint's answers take: an average that forgets, and that
//! follows peaks at once (as in finagle's `PeakEwma`, which ingress-nginx's
//! `ewma` comes from).

use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

/// Milliseconds after which a measurement counts for 1/e: ingress-nginx's 10 s.
const DECAY_MS: f32 = 10_000.0;

/// A decaying average, shared by all workers without a lock: of two that
/// measure at the same time one is lost, which no average notices.
///
/// One word holds both parts, so that they always belong together: above, the
/// low half of the time of the last measurement in milliseconds; below, the
/// average in microseconds as `f32`. 0 before the first.
#[derive(Debug, Default)]
pub struct Latency(AtomicU64);

impl Latency {
    /// An answer took `micros`. `now_ms` is one clock for all callers.
    pub fn record(&self, now_ms: u64, micros: u64) {
        let before = self.0.load(Relaxed);
        let (average, weight) = parts(before, now_ms);
        let measured = micros as f32;
        let next = if before == 0 || measured > average {
            measured
        } else {
            average * weight + measured * (1.0 - weight)
        };
        self.0.store(pack(now_ms, next), Relaxed);
    }

    /// The average in microseconds. It falls while nothing is measured, so
    /// that an endpoint that was slow is asked again. 0 before the first
    /// measurement.
    pub fn micros(&self, now_ms: u64) -> f32 {
        let (average, weight) = parts(self.0.load(Relaxed), now_ms);
        average * weight
    }

    /// Whether anything was measured or assumed.
    pub fn is_known(&self) -> bool {
        self.0.load(Relaxed) != 0
    }

    /// Assumes `micros` unless something was measured already.
    pub fn assume(&self, now_ms: u64, micros: f32) {
        // If a measurement comes in between, it is the one to keep.
        let _ = self.0.compare_exchange(0, pack(now_ms, micros), Relaxed, Relaxed);
    }
}

/// The average, and what of it is left by now.
fn parts(packed: u64, now_ms: u64) -> (f32, f32) {
    // Workers read the clock one after another: a step back is no time at all.
    let age = ((now_ms as u32).wrapping_sub((packed >> 32) as u32) as i32).max(0);
    (f32::from_bits(packed as u32), (-(age as f32) / DECAY_MS).exp())
}

fn pack(now_ms: u64, average: f32) -> u64 {
    // Never 0, which means nothing is known.
    (now_ms << 32 | u64::from(average.to_bits())).max(1)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The same in the words of the definition.
    #[derive(Default)]
    struct Model(Option<(u64, f64)>);

    impl Model {
        fn record(&mut self, now: u64, micros: u64) {
            let measured = micros as f64;
            let next = match self.0 {
                None => measured,
                Some((_, average)) if measured > average => measured,
                Some((at, average)) => {
                    let weight = (-((now - at) as f64) / 10_000.0).exp();
                    average * weight + measured * (1.0 - weight)
                }
            };
            self.0 = Some((now, next));
        }

        fn micros(&self, now: u64) -> f64 {
            self.0.map_or(0.0, |(at, average)| average * (-((now - at) as f64) / 10_000.0).exp())
        }
    }

    #[test]
    fn agrees_with_the_definition() {
        for seed in 0..50 {
            let mut random = fastrand::Rng::with_seed(seed);
            let (latency, mut model) = (Latency::default(), Model::default());
            // Across the end of the low half of the clock, too.
            let mut now = u64::from(u32::MAX) - 60_000;
            for step in 0..500 {
                now += random.u64(0..2_000);
                if random.bool() {
                    let micros = random.u64(1..1_000_000);
                    latency.record(now, micros);
                    model.record(now, micros);
                }
                let (got, expected) = (f64::from(latency.micros(now)), model.micros(now));
                assert!(
                    (got - expected).abs() <= expected * 1e-3 + 1e-3,
                    "seed {seed} step {step}: {got} {expected}"
                );
            }
        }
    }

    #[test]
    fn a_peak_counts_at_once_and_is_forgotten_in_time() {
        let latency = Latency::default();
        assert!(!latency.is_known());
        latency.record(1_000, 500);
        latency.record(1_001, 80_000);
        assert_eq!(latency.micros(1_001), 80_000.0);
        latency.record(1_002, 500);
        assert!(latency.micros(1_002) > 79_000.0);
        assert!(latency.micros(101_002) < 10.0);
        latency.assume(1_002, 7.0);
        assert!(latency.micros(1_002) > 79_000.0);
        // A clock that steps back.
        assert!(latency.micros(900) > 79_000.0);
    }
}
