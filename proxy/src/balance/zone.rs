//! Zones: endpoints of the proxy's own zone first, as long as they can carry
//! their zone's part of the requests.
//!
//! Of `z` zones each sends a `z`th of all requests, as far as a proxy knows.
//! If the own zone has at least a `z`th of the available endpoints (by
//! weight), it keeps everything. If it has less, it keeps what makes its
//! endpoints as busy as all others, and the rest spills over. So losing
//! endpoints one by one moves requests one by one, and none is ever overrun.

use std::sync::atomic::{AtomicU32, AtomicU64, Ordering::Relaxed};

use super::CompiledEndpoint;

/// How long a share holds until availability is looked at again.
const HOLDS_MS: u64 = 100;

/// The endpoints of a pool, divided by zone.
#[derive(Debug)]
pub(crate) struct Zones {
    /// Indices of endpoints, each as often as its weight.
    pub(crate) near: Box<[u16]>,
    pub(crate) far: Box<[u16]>,
    is_near: Box<[bool]>,
    zones: usize,
    /// In 2^-32ths, rounded down. Whoever finds it outdated makes it anew; two
    /// at the same time come to the same.
    share: AtomicU32,
    outdated_at: AtomicU64,
}

impl Zones {
    /// `None` if all endpoints are in the same position: in `own`, or not.
    pub(crate) fn new(own: &str, endpoints: &[CompiledEndpoint]) -> Option<Zones> {
        if endpoints.len() > usize::from(u16::MAX) {
            return None;
        }
        let is_near: Box<[bool]> =
            endpoints.iter().map(|endpoint| endpoint.zone.as_deref() == Some(own)).collect();
        let mut names: Vec<&str> = endpoints.iter().filter_map(|e| e.zone.as_deref()).collect();
        names.push(own);
        names.sort_unstable();
        names.dedup();
        let zones = names.len();
        let cycle = |near: bool| -> Box<[u16]> {
            let of: Vec<u16> =
                (0..endpoints.len() as u16).filter(|i| is_near[usize::from(*i)] == near).collect();
            let weights: Vec<u64> =
                of.iter().map(|i| u64::from(endpoints[usize::from(*i)].weight.max(1))).collect();
            match super::schedule::of_endpoints(&weights) {
                Some(schedule) => schedule.iter().map(|position| of[usize::from(*position)]).collect(),
                None => of.into(),
            }
        };
        let (near, far) = (cycle(true), cycle(false));
        if near.is_empty() || far.is_empty() {
            return None;
        }
        let (share, outdated_at) = (AtomicU32::new(0), AtomicU64::new(0));
        Some(Zones { near, far, is_near, zones, share, outdated_at })
    }

    /// Whether a request stays near, if `random` is evenly spread. `available`
    /// tells which endpoints may be chosen.
    pub(crate) fn stays(
        &self,
        random: u32,
        now_ms: u64,
        endpoints: &[CompiledEndpoint],
        available: impl Fn(&CompiledEndpoint) -> bool,
    ) -> bool {
        if now_ms >= self.outdated_at.load(Relaxed) {
            let share = self.share_of(endpoints, available);
            self.share.store((share * f64::from(u32::MAX)) as u32, Relaxed);
            self.outdated_at.store(now_ms + HOLDS_MS, Relaxed);
        }
        random <= self.share.load(Relaxed)
    }

    /// Which part of the requests stays near.
    fn share_of(&self, endpoints: &[CompiledEndpoint], available: impl Fn(&CompiledEndpoint) -> bool) -> f64 {
        let sum = |near: bool, all: bool| -> u64 {
            let counts =
                endpoints.iter().zip(&self.is_near).filter(|(e, n)| **n == near && (all || available(e)));
            counts.map(|(endpoint, _)| u64::from(endpoint.weight.max(1))).sum()
        };
        let (near, far) = match (sum(true, false), sum(false, false)) {
            // All are tried when none is available.
            (0, 0) => (sum(true, true), sum(false, true)),
            sums => sums,
        };
        (near as f64 * self.zones as f64 / (near + far) as f64).min(1.0)
    }
}

#[cfg(test)]
#[path = "zone/tests.rs"]
mod tests;
