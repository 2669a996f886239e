//! Endpoints that answer worse than their neighbours.

use std::cell::Cell;
use std::rc::Rc;
use std::sync::{Mutex, PoisonError};

use super::Outliers;
use crate::balance::CompiledPool;
use crate::clock;
use crate::endpoint::LiveEndpoint;
use crate::metrics::Outlier;
use crate::upstream::Upstream;
use crate::worker::Worker;

/// What one worker saw of one endpoint since it last compared.
#[derive(Debug, Default)]
pub(crate) struct Seen {
    requests: Cell<u32>,
    /// Answers of 500 and above, and failures.
    bad: Cell<u32>,
    /// Of those whose time says something: requests without a body that were answered.
    timed: Cell<u32>,
    us: Cell<u64>,
    /// The pool it was last chosen from.
    slot: Cell<u32>,
}

/// [`Seen`], as numbers.
#[derive(Clone, Copy, Debug, Default)]
struct Sample {
    requests: u32,
    bad: u32,
    timed: u32,
    us: u64,
}

impl Seen {
    /// One more request; `us` is its time to an answer, if that says something.
    pub(crate) fn add(&self, slot: u32, bad: bool, us: Option<u64>) {
        self.slot.set(slot);
        self.requests.set(self.requests.get().saturating_add(1));
        self.bad.set(self.bad.get().saturating_add(bad.into()));
        if let Some(us) = us {
            self.timed.set(self.timed.get().saturating_add(1));
            self.us.set(self.us.get().saturating_add(us));
        }
    }

    fn sample(&self) -> Sample {
        Sample {
            requests: self.requests.get(),
            bad: self.bad.get(),
            timed: self.timed.get(),
            us: self.us.get(),
        }
    }

    fn clear(&self) {
        self.requests.set(0);
        self.bad.set(0);
        self.timed.set(0);
        self.us.set(0);
    }
}

/// Compares the endpoints of every pool this worker sent something to, and
/// starts a new interval. Once per interval, so it may allocate.
pub(crate) fn compare(worker: &Worker) {
    let policy = &worker.config.outliers;
    let seen: Vec<Rc<Upstream>> = worker.upstreams.all();
    let mut slots: Vec<u32> =
        seen.iter().filter(|u| u.seen.requests.get() > 0).map(|u| u.seen.slot.get()).collect();
    slots.sort_unstable();
    slots.dedup();
    let router = worker.router();
    for slot in slots {
        let pool = router.pool(slot);
        let known = pool.endpoints.iter().filter_map(|e| worker.upstreams.known(e.live.id));
        let members: Vec<Rc<Upstream>> = known.collect();
        let samples: Vec<Sample> = members.iter().map(|u| u.seen.sample()).collect();
        for (index, why) in find(policy, &samples) {
            eject(worker, pool, &members[index].live, why);
        }
    }
    seen.iter().for_each(|upstream| upstream.seen.clear());
}

/// Takes an endpoint out of `pool`, unless enough of them are.
pub(crate) fn eject(worker: &Worker, pool: &CompiledPool, live: &LiveEndpoint, why: Outlier) {
    /// Two workers that find different endpoints at the same time must not
    /// both take the last place. Rare: nothing waits for it on the way of a request.
    static ONE_AT_A_TIME: Mutex<()> = Mutex::new(());

    let _turn = ONE_AT_A_TIME.lock().unwrap_or_else(PoisonError::into_inner);
    let now_ms = clock::now_ms();
    let out = pool.endpoints.iter().filter(|e| !e.live.is_available(now_ms)).count();
    let share = worker.config.outliers.share_percent as usize;
    let may = (out + 1) * 100 <= share * pool.endpoints.len();
    if may && live.eject(now_ms, &worker.config.ejection) {
        worker.metrics.ejected(why);
        tracing::warn!(endpoint = %live.address, why = why.as_str(), "endpoint answers badly: left alone for a while");
    }
}

/// Who does worse than all others of `samples` together, by index; the worst first.
fn find(policy: &Outliers, samples: &[Sample]) -> Vec<(usize, Outlier)> {
    let mut found: Vec<(f64, usize, Outlier)> = Vec::new();
    let enough = |n: u32| n >= policy.requests.max(1);
    for (index, own) in samples.iter().enumerate() {
        let others =
            samples.iter().enumerate().filter(|(other, _)| *other != index).map(|(_, sample)| sample);
        let mut rest = Sample::default();
        for other in others {
            rest.requests = rest.requests.saturating_add(other.requests);
            rest.bad = rest.bad.saturating_add(other.bad);
            rest.timed = rest.timed.saturating_add(other.timed);
            rest.us = rest.us.saturating_add(other.us);
        }
        let success = |s: &Sample| f64::from(s.requests - s.bad.min(s.requests)) / f64::from(s.requests);
        if policy.success_percent > 0 && enough(own.requests) && enough(rest.requests) {
            let ratio = success(own) / success(&rest).max(f64::MIN_POSITIVE);
            if ratio * 100.0 < f64::from(policy.success_percent) {
                found.push((ratio, index, Outlier::SuccessRate));
                continue;
            }
        }
        let mean = |s: &Sample| s.us as f64 / f64::from(s.timed);
        if policy.latency_percent > 0 && enough(own.timed) && enough(rest.timed) {
            let ratio = mean(&rest) / mean(own).max(f64::MIN_POSITIVE);
            let slow = mean(own) > policy.latency_floor.as_micros() as f64;
            if slow && ratio * f64::from(policy.latency_percent) < 100.0 {
                found.push((ratio, index, Outlier::Latency));
            }
        }
    }
    found.sort_by(|a, b| a.0.total_cmp(&b.0));
    found.into_iter().map(|(_, index, why)| (index, why)).collect()
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    /// Requests, bad ones, and the mean time in ms of the others.
    fn sample((requests, bad, ms): (u32, u32, u64)) -> Sample {
        let timed = requests - bad;
        Sample { requests, bad, timed, us: u64::from(timed) * ms * 1_000 }
    }

    #[test]
    fn who_does_worse() {
        use Outlier::{Latency, SuccessRate};
        let policy = Outliers {
            success_percent: 80,
            latency_percent: 300,
            latency_floor: Duration::from_millis(10),
            requests: 20,
            ..Outliers::default()
        };
        type Case<'a> = (&'a [(u32, u32, u64)], &'a [(usize, Outlier)]);
        let cases: [Case<'_>; 10] = [
            (&[], &[]),
            (&[(100, 100, 1)], &[]),
            (&[(100, 30, 1), (100, 0, 1)], &[(0, SuccessRate)]),
            (&[(100, 19, 1), (100, 0, 1)], &[]),
            // All are bad: nobody is worse.
            (&[(100, 50, 1), (100, 50, 1), (100, 45, 1)], &[]),
            // Too few to tell.
            (&[(19, 19, 1), (100, 0, 1)], &[]),
            (&[(100, 0, 1), (100, 90, 1), (100, 30, 1)], &[(1, SuccessRate)]),
            (&[(100, 0, 50), (100, 0, 10), (100, 0, 12)], &[(0, Latency)]),
            // Slower by as much, but never slow.
            (&[(100, 0, 9), (100, 0, 1), (100, 0, 1)], &[]),
            (&[(100, 0, 400), (100, 60, 5), (100, 0, 5), (100, 0, 5)], &[(0, Latency), (1, SuccessRate)]),
        ];
        for (samples, expected) in cases {
            let samples: Vec<Sample> = samples.iter().copied().map(sample).collect();
            let mut found = find(&policy, &samples);
            found.sort_by_key(|(index, _)| *index);
            assert_eq!(found, expected, "{samples:?}");
            assert_eq!(find(&Outliers::default(), &samples), [], "off by default");
        }
    }
}
