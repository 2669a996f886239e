//! Live state of endpoints, by address. It outlives every [`crate::Router`]:
//! health and load learnt under one table hold under the next.

use std::collections::HashMap;
use std::net::SocketAddr;
use std::sync::atomic::{
    AtomicBool, AtomicU32, AtomicU64,
    Ordering::{Acquire, Relaxed, Release},
};
use std::sync::{Arc, Mutex, PoisonError, Weak};

use crate::balance::ewma::Latency;
use crate::balance::slow_start;
use crate::clock;
use crate::table::UpstreamProtocol;

/// Below this many entries dead ones are not worth looking for.
const SWEEP_FROM: usize = 256;

/// All endpoints that some router or request still holds. Locked, so used only
/// while a table is compiled.
#[derive(Debug, Default)]
pub struct Endpoints(Mutex<Registry>);

#[derive(Debug, Default)]
struct Registry {
    known: HashMap<(SocketAddr, UpstreamProtocol), Weak<LiveEndpoint>, foldhash::fast::RandomState>,
    next_id: u64,
    /// Size at which the dead are swept out, so that no caller has to remember.
    sweep_at: usize,
}

impl Endpoints {
    /// The live state of `address`, made on first sight.
    pub fn get(&self, address: SocketAddr, protocol: UpstreamProtocol) -> Arc<LiveEndpoint> {
        let mut registry = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(known) = registry.known.get(&(address, protocol)).and_then(Weak::upgrade) {
            return known;
        }
        if registry.known.len() >= registry.sweep_at.max(SWEEP_FROM) {
            registry.sweep();
        }
        registry.next_id += 1;
        let endpoint = Arc::new(LiveEndpoint::new(registry.next_id, address, protocol));
        registry.known.insert((address, protocol), Arc::downgrade(&endpoint));
        endpoint
    }

    /// Forgets endpoints that nothing holds any more. [`Endpoints::get`] does
    /// it by itself whenever their number has doubled.
    pub fn sweep(&self) {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).sweep();
    }
}

impl Registry {
    fn sweep(&mut self) {
        self.known.retain(|_, endpoint| endpoint.strong_count() > 0);
        self.sweep_at = self.known.len() * 2;
    }
}

/// When an endpoint is taken out of the rotation, and for how long.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Ejection {
    /// Failures in a row; 0 never ejects.
    pub consecutive: u32,
    /// Milliseconds of the first ejection; each one without a success between doubles it.
    pub base_ms: u64,
    /// Milliseconds at most.
    pub max_ms: u64,
}

impl Default for Ejection {
    fn default() -> Ejection {
        Ejection { consecutive: 3, base_ms: 10_000, max_ms: 300_000 }
    }
}

/// What is known about one endpoint right now; shared by all workers.
#[derive(Debug)]
pub struct LiveEndpoint {
    /// Never reused in this process, so it can key connection pools.
    pub id: u64,
    /// Where it listens.
    pub address: SocketAddr,
    /// What it speaks.
    pub protocol: UpstreamProtocol,
    /// Failures in a row (low half) and ejections in a row (high half) in one
    /// word, so that a success looks at one word.
    failures: AtomicU64,
    /// Milliseconds on the caller's clock; 0 before the first ejection.
    ejected_until: AtomicU64,
    /// Answers of 502, 503 or 504 in a row; counted only where that ejects.
    gateway_errors: AtomicU32,
    /// Probes say that it does not work.
    down: AtomicBool,
    /// When it came, or came back, in milliseconds on the caller's clock.
    since: AtomicU64,
    /// How many [`Held`] there are.
    held: AtomicU32,
    /// Open, idle ones included.
    connections: AtomicU32,
    /// Requests that wait for a connection.
    pending: AtomicU32,
    load: OwnLine<Load>,
}

/// What requests do to it.
#[derive(Debug, Default)]
struct Load {
    in_flight: AtomicU32,
    latency: Latency,
}

/// Written by every request of every worker: apart from what they only read.
#[derive(Debug, Default)]
#[repr(align(64))]
struct OwnLine<T>(T);

const ONE_EJECTION: u64 = 1 << 32;

impl LiveEndpoint {
    fn new(id: u64, address: SocketAddr, protocol: UpstreamProtocol) -> LiveEndpoint {
        LiveEndpoint {
            id,
            address,
            protocol,
            failures: AtomicU64::new(0),
            ejected_until: AtomicU64::new(0),
            gateway_errors: AtomicU32::new(0),
            down: AtomicBool::new(false),
            since: AtomicU64::new(clock::now_ms()),
            held: AtomicU32::new(0),
            connections: AtomicU32::new(0),
            pending: AtomicU32::new(0),
            load: OwnLine::default(),
        }
    }

    /// Whether it may be chosen at `now_ms` (monotonic milliseconds, one clock for all callers).
    pub fn is_available(&self, now_ms: u64) -> bool {
        now_ms >= self.ejected_until.load(Relaxed) && self.is_up()
    }

    /// Whether probes say that it works; true if there are none.
    pub fn is_up(&self) -> bool {
        !self.down.load(Relaxed)
    }

    /// What probes found. True if that is news. Back up, it starts slowly
    /// where its pool says so.
    pub fn set_up(&self, up: bool, now_ms: u64) -> bool {
        let changed = self.down.swap(!up, Relaxed) == up;
        if changed && up {
            self.restart(now_ms);
        }
        changed
    }

    /// From now on it counts as new.
    pub(crate) fn restart(&self, now_ms: u64) {
        self.since.store(now_ms, Relaxed);
    }

    /// Which part of its share it takes, from a tenth to all of it, if it
    /// comes to that within `window_ms` after it came or came back.
    pub fn ramp(&self, now_ms: u64, window_ms: u64) -> f64 {
        let since = self.since.load(Relaxed).max(self.ejected_until.load(Relaxed));
        slow_start::part(now_ms.saturating_sub(since), window_ms)
    }

    /// How long its answers take.
    pub fn latency(&self) -> &Latency {
        &self.load.0.latency
    }

    /// An exchange went well: failures no longer follow one another. A running
    /// ejection stays, as the success may be that of an exchange begun before it.
    pub fn succeeded(&self) {
        if self.failures.load(Relaxed) != 0 {
            self.failures.store(0, Relaxed);
        }
    }

    /// An exchange failed for a reason that lies with the endpoint. True when
    /// this ejected it just now. Back from an ejection it is on probation: the
    /// next failure ejects it again, for twice as long.
    pub fn failed(&self, now_ms: u64, policy: &Ejection) -> bool {
        if !self.is_available(now_ms) {
            return false;
        }
        let failures = self.failures.fetch_add(1, Relaxed) + 1;
        policy.consecutive > 0 && failures as u32 >= policy.consecutive && self.eject(now_ms, policy)
    }

    /// An answer of 502, 503 or 504 (`bad`), or another one. True when it is
    /// the `limit`th bad one in a row, and for every `limit`th after it.
    pub(crate) fn gateway_error(&self, bad: bool, limit: u32) -> bool {
        if bad {
            return (self.gateway_errors.fetch_add(1, Relaxed) + 1).is_multiple_of(limit);
        }
        if self.gateway_errors.load(Relaxed) != 0 {
            self.gateway_errors.store(0, Relaxed);
        }
        false
    }

    /// Takes it out of the rotation. True when this did it, just now.
    pub(crate) fn eject(&self, now_ms: u64, policy: &Ejection) -> bool {
        let until = self.ejected_until.load(Relaxed);
        if now_ms < until {
            return false;
        }
        let doublings = (self.failures.load(Relaxed) >> 32).min(63) as u32;
        let duration = policy.base_ms.checked_shl(doublings).filter(|d| d >> doublings == policy.base_ms);
        let duration = duration.unwrap_or(u64::MAX).min(policy.max_ms);
        // Of workers that fail at the same time one ejects.
        let ejected = self
            .ejected_until
            .compare_exchange(until, now_ms.saturating_add(duration), Relaxed, Relaxed)
            .is_ok();
        if ejected {
            self.failures.fetch_add(ONE_EJECTION, Relaxed);
            self.gateway_errors.store(0, Relaxed);
        }
        ejected
    }

    /// A request starts to occupy it.
    pub fn begin(&self) {
        self.load.0.in_flight.fetch_add(1, Relaxed);
    }

    /// As [`LiveEndpoint::begin`], unless `limit` of them have begun; 0 is no limit.
    pub(crate) fn try_begin(&self, limit: u32) -> bool {
        try_count(&self.load.0.in_flight, limit)
    }

    /// A connection is about to be opened, unless `limit` of them are; 0 is no limit.
    pub(crate) fn try_open(&self, limit: u32) -> bool {
        try_count(&self.connections, limit)
    }

    /// A connection was closed, or not opened.
    pub(crate) fn closed(&self) {
        self.connections.fetch_sub(1, Relaxed);
    }

    /// A request begins to wait for a connection, unless `limit` of them do; 0 is no limit.
    pub(crate) fn try_wait(&self, limit: u32) -> bool {
        try_count(&self.pending, limit)
    }

    /// It waits no longer.
    pub(crate) fn waited(&self) {
        self.pending.fetch_sub(1, Relaxed);
    }

    /// A request that began has ended, in whatever way.
    pub fn end(&self) {
        let before = self.load.0.in_flight.fetch_sub(1, Relaxed);
        debug_assert!(before > 0, "end without begin on {}", self.address);
    }

    /// Requests that began and have not ended, of all workers.
    pub fn in_flight(&self) -> u32 {
        self.load.0.in_flight.load(Relaxed)
    }
}

/// One more, unless there are `limit` already. Whoever comes too late has counted for a moment:
/// two that race for the last place may both lose it, but never both have it.
fn try_count(counter: &AtomicU32, limit: u32) -> bool {
    if counter.fetch_add(1, Relaxed) < limit || limit == 0 {
        return true;
    }
    counter.fetch_sub(1, Relaxed);
    false
}

/// An endpoint held by a worker for its connections' sake, told apart from who names it.
#[derive(Debug)]
pub(crate) struct Held(Arc<LiveEndpoint>);

impl Held {
    pub(crate) fn new(live: Arc<LiveEndpoint>) -> Held {
        live.held.fetch_add(1, Release);
        Held(live)
    }

    /// Whether anyone else holds it, as a router does that names it. Wrong for an instant when a
    /// worker comes or goes right now; that costs a connection opened anew, at most.
    pub(crate) fn is_named(&self) -> bool {
        let held = self.0.held.load(Acquire);
        Arc::strong_count(&self.0) > held as usize
    }
}

impl Clone for Held {
    fn clone(&self) -> Held {
        Held::new(self.0.clone())
    }
}

impl std::ops::Deref for Held {
    type Target = LiveEndpoint;
    fn deref(&self) -> &LiveEndpoint {
        &self.0
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        self.0.held.fetch_sub(1, Release);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const POLICY: Ejection = Ejection { consecutive: 3, base_ms: 10, max_ms: 50 };

    fn address(n: u16) -> SocketAddr {
        ([10, 0, (n >> 8) as u8, n as u8], 80).into()
    }

    #[test]
    fn an_address_keeps_its_state_while_anyone_holds_it() {
        let endpoints = Endpoints::default();
        let first = endpoints.get(address(1), UpstreamProtocol::Http1);
        assert_eq!(endpoints.get(address(1), UpstreamProtocol::Http1).id, first.id);
        assert_ne!(endpoints.get(address(1), UpstreamProtocol::H2c).id, first.id);
        let id = first.id;
        drop(first);
        endpoints.sweep();
        assert!(endpoints.get(address(1), UpstreamProtocol::Http1).id > id);
    }

    #[test]
    fn the_registry_stays_within_twice_what_is_alive() {
        let endpoints = Endpoints::default();
        let held: Vec<_> = (0..300).map(|n| endpoints.get(address(n), UpstreamProtocol::Http1)).collect();
        for n in 300..5_000 {
            endpoints.get(address(n), UpstreamProtocol::Http1);
        }
        assert!(endpoints.0.lock().unwrap().known.len() <= 2 * held.len());
    }

    /// Steps: (time, what happened, ejected by it, available after it).
    #[test]
    fn ejection_lifecycle() {
        enum Event {
            Ok,
            Fail,
            Tick,
        }
        use Event::{Fail, Ok, Tick};
        let steps = [
            (0, Fail, false, true),
            (0, Fail, false, true),
            (0, Ok, false, true),
            (1, Fail, false, true),
            (1, Fail, false, true),
            (1, Fail, true, false),
            (5, Fail, false, false),
            (10, Tick, false, false),
            (11, Tick, false, true),
            // Probation: one failure is enough, and the time doubles up to the limit.
            (12, Fail, true, false),
            (31, Tick, false, false),
            (32, Fail, true, false),
            (71, Tick, false, false),
            (72, Fail, true, false),
            (121, Tick, false, false),
            (122, Tick, false, true),
            // A success starts over.
            (122, Ok, false, true),
            (122, Fail, false, true),
            (122, Fail, false, true),
            (122, Fail, true, false),
            (131, Tick, false, false),
            // A success of an exchange begun earlier does not end the ejection.
            (131, Ok, false, false),
            (132, Tick, false, true),
        ];
        let endpoint = LiveEndpoint::new(1, address(1), UpstreamProtocol::Http1);
        for (step, (now, event, ejected, available)) in steps.into_iter().enumerate() {
            let outcome = match event {
                Ok => {
                    endpoint.succeeded();
                    false
                }
                Fail => endpoint.failed(now, &POLICY),
                Tick => false,
            };
            assert_eq!(outcome, ejected, "step {step} at {now} ms");
            assert_eq!(endpoint.is_available(now), available, "step {step} at {now} ms");
        }
    }

    #[test]
    fn a_policy_of_zero_never_ejects_and_durations_never_overflow() {
        let endpoint = LiveEndpoint::new(1, address(1), UpstreamProtocol::Http1);
        let never = Ejection { consecutive: 0, ..POLICY };
        assert!((0..100).all(|now| !endpoint.failed(now, &never)));

        let endless = Ejection { consecutive: 1, base_ms: 3, max_ms: 1_000 };
        let mut now = 0;
        for _ in 0..200 {
            assert!(endpoint.failed(now, &endless));
            now += 1_000;
            assert!(endpoint.is_available(now));
        }
    }

    #[test]
    fn in_flight_counts() {
        let endpoint = LiveEndpoint::new(1, address(1), UpstreamProtocol::Http1);
        endpoint.begin();
        endpoint.begin();
        endpoint.end();
        assert_eq!(endpoint.in_flight(), 1);
    }
}
