//! Active health checks: endpoints are asked whether they work before a client
//! has to find out.
//!
//! ```text
//!  compile ─► Checks: which pools want which probe ─► one thread: a probe of each
//!  address when it is due, so many at the same time ─► LiveEndpoint::set_up ─► pick
//! ```
//!
//! An address is probed once, however many pools name it; of different checks
//! that of the first pool by name counts. The thread starts with the first
//! check. Until probes say otherwise an endpoint is taken to work, and when
//! all of a pool are down, all of them are used.

use std::cell::{Cell, RefCell};
use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::rc::Rc;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::Duration;

use tokio::runtime::LocalOptions;
use tokio::sync::{Notify, Semaphore};
use tokio::time::Instant;

use crate::balance::CompiledEndpoint;
use crate::clock;
use crate::endpoint::LiveEndpoint;
use crate::table::{HealthCheck, PoolKey, UpstreamProtocol};

mod probe;

use probe::Prober;

/// Probes under way at the same time; the others wait for a place.
const AT_ONCE: usize = 64;

/// How long the thread sleeps at most before it looks whether it is still needed.
const SLEEP: Duration = Duration::from_secs(5);

/// Which endpoints are to be probed, and how.
#[derive(Debug, Default)]
pub struct Checks(Arc<Shared>);

#[derive(Debug, Default)]
struct Shared {
    /// False while nobody probes, as when a table is only explained.
    enabled: AtomicBool,
    /// Some pool wants it: spares the others the lock.
    used: AtomicBool,
    wanted: Mutex<Wanted>,
    changed: Arc<Notify>,
}

#[derive(Debug, Default)]
struct Wanted {
    pools: BTreeMap<PoolKey, Wish>,
    /// Counts changes.
    version: u64,
    running: bool,
}

#[derive(Clone, Debug)]
struct Wish {
    check: Arc<HealthCheck>,
    endpoints: Vec<Weak<LiveEndpoint>>,
}

impl Drop for Shared {
    fn drop(&mut self) {
        self.changed.notify_one();
    }
}

impl Shared {
    fn wanted(&self) -> MutexGuard<'_, Wanted> {
        self.wanted.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Checks {
    /// From now on what is wanted is done.
    pub(crate) fn enable(&self) {
        self.0.enabled.store(true, Relaxed);
    }

    /// Pool `key` has these endpoints now. Locks only where some pool is checked.
    pub(crate) fn set(
        &self,
        key: &PoolKey,
        check: Option<&Arc<HealthCheck>>,
        endpoints: &[CompiledEndpoint],
    ) {
        let shared = &self.0;
        if !shared.enabled.load(Relaxed) || check.is_none() && !shared.used.load(Relaxed) {
            return;
        }
        let mut wanted = shared.wanted();
        let changed = match check {
            Some(check) => {
                let endpoints = endpoints.iter().map(|endpoint| Arc::downgrade(&endpoint.live)).collect();
                wanted.pools.insert(key.clone(), Wish { check: check.clone(), endpoints });
                shared.used.store(true, Relaxed);
                true
            }
            None => wanted.pools.remove(key).is_some(),
        };
        if !changed {
            return;
        }
        wanted.version += 1;
        if !wanted.running {
            wanted.running = self.start();
        }
        shared.changed.notify_one();
    }

    /// Starts the thread. It ends when nobody holds these checks any more.
    fn start(&self) -> bool {
        let (shared, changed) = (Arc::downgrade(&self.0), self.0.changed.clone());
        let run = move || {
            let mut builder = tokio::runtime::Builder::new_current_thread();
            match builder.enable_all().build_local(LocalOptions::default()) {
                // Not seeded alike: replicas that start together must not probe together.
                Ok(runtime) => runtime.block_on(Runner::new(shared, changed, fastrand::u64(..)).run()),
                Err(error) => tracing::error!(%error, "cannot start health checks"),
            }
        };
        match std::thread::Builder::new().name("lockgate-health".to_owned()).spawn(run) {
            Ok(_) => true,
            Err(error) => {
                tracing::error!(%error, "cannot start health checks");
                false
            }
        }
    }
}

/// One address that is probed.
struct Target {
    live: Weak<LiveEndpoint>,
    check: Arc<HealthCheck>,
    tally: Rc<RefCell<Tally>>,
    /// The last probe has not ended yet.
    busy: Rc<Cell<bool>>,
    due: Instant,
}

/// The thread's side.
struct Runner {
    shared: Weak<Shared>,
    changed: Arc<Notify>,
    version: u64,
    /// By id of the endpoint.
    targets: HashMap<u64, Target>,
    due: BTreeSet<(Instant, u64)>,
    random: fastrand::Rng,
    places: Arc<Semaphore>,
    prober: Rc<Prober>,
}

impl Runner {
    fn new(shared: Weak<Shared>, changed: Arc<Notify>, seed: u64) -> Runner {
        Runner {
            shared,
            changed,
            version: 0,
            targets: HashMap::new(),
            due: BTreeSet::new(),
            random: fastrand::Rng::with_seed(seed),
            places: Arc::new(Semaphore::new(AT_ONCE)),
            prober: Rc::new(Prober::new()),
        }
    }

    async fn run(mut self) {
        while let Some(shared) = self.shared.upgrade() {
            let wishes = {
                let wanted = shared.wanted();
                let changed = wanted.version != self.version;
                self.version = wanted.version;
                changed.then(|| wanted.pools.values().cloned().collect::<Vec<Wish>>())
            };
            drop(shared);
            if let Some(wishes) = wishes {
                self.follow(wishes);
            }
            let now = Instant::now();
            while let Some((at, id)) = self.due.first().copied().filter(|(at, _)| *at <= now) {
                self.due.remove(&(at, id));
                self.launch(id, now);
            }
            let next = self.due.first().map_or(now + SLEEP, |(at, _)| (*at).min(now + SLEEP));
            tokio::select! {
                () = tokio::time::sleep_until(next) => {}
                () = self.changed.notified() => {}
            }
        }
    }

    /// Takes over what is wanted now. What stays keeps its state and its place
    /// in time; what is no longer probed is taken to work.
    fn follow(&mut self, wishes: Vec<Wish>) {
        let now = Instant::now();
        let mut before = std::mem::take(&mut self.targets);
        for wish in wishes {
            for endpoint in wish.endpoints {
                let Some(live) = endpoint.upgrade() else { continue };
                if live.protocol == UpstreamProtocol::Udp || self.targets.contains_key(&live.id) {
                    continue;
                }
                let target = match before.remove(&live.id) {
                    Some(known) if known.check == wish.check => known,
                    known => {
                        let check = wish.check.clone();
                        let tally = known.map_or_else(
                            || Rc::new(RefCell::new(Tally::new(live.is_up()))),
                            |known| known.tally,
                        );
                        let due = now + check.interval.mul_f64(self.random.f64());
                        Target { live: endpoint, check, tally, busy: Rc::default(), due }
                    }
                };
                self.targets.insert(live.id, target);
            }
        }
        for live in before.into_values().filter_map(|target| target.live.upgrade()) {
            live.set_up(true, clock::now_ms());
        }
        self.due = self.targets.iter().map(|(id, target)| (target.due, *id)).collect();
    }

    /// Starts the probe of `id`, and says when the next is due.
    fn launch(&mut self, id: u64, now: Instant) {
        let Some(target) = self.targets.get_mut(&id) else { return };
        // Up to a tenth earlier or later, so that probes do not gather.
        target.due = now + target.check.interval.mul_f64(0.9 + 0.2 * self.random.f64());
        self.due.insert((target.due, id));
        let Some(live) = target.live.upgrade() else { return };
        if target.busy.replace(true) {
            return;
        }
        let (check, busy) = (target.check.clone(), target.busy.clone());
        let tally = Rc::downgrade(&target.tally);
        let (places, prober) = (self.places.clone(), self.prober.clone());
        tokio::task::spawn_local(async move {
            // Never closed.
            let _place = places.acquire().await;
            let probe = prober.probe(&live, &check.probe);
            let outcome = tokio::time::timeout(check.timeout, probe).await;
            let outcome = outcome.unwrap_or_else(|_| Err("no answer in time".to_owned()));
            busy.set(false);
            // Nobody would find out that an endpoint is back which is no longer probed.
            let Some(tally) = tally.upgrade() else { return };
            if let Some(up) = tally.borrow_mut().record(outcome.is_ok(), &check)
                && live.set_up(up, clock::now_ms())
            {
                report(&live, outcome);
            }
        });
    }
}

fn report(live: &LiveEndpoint, outcome: Result<(), String>) {
    let endpoint = live.address;
    match outcome {
        Ok(()) => tracing::info!(%endpoint, "endpoint is back: its health check succeeds"),
        Err(reason) => tracing::warn!(%endpoint, reason, "endpoint is taken out: its health check fails"),
    }
}

/// Outcomes in a row, and what follows from them.
#[derive(Debug)]
struct Tally {
    up: bool,
    /// Outcomes in a row that say the opposite.
    against: u32,
}

impl Tally {
    fn new(up: bool) -> Tally {
        Tally { up, against: 0 }
    }

    /// The new state, if this changed it.
    fn record(&mut self, success: bool, check: &HealthCheck) -> Option<bool> {
        if success == self.up {
            self.against = 0;
            return None;
        }
        self.against += 1;
        let needed = if success { check.healthy } else { check.unhealthy };
        if self.against < needed {
            return None;
        }
        *self = Tally::new(success);
        Some(success)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::endpoint::Endpoints;
    use crate::table::Probe;

    /// A probe under way fails after its check has left the table: with nobody to find out that the
    /// endpoint is back, it would stay out for ever.
    #[tokio::test]
    async fn a_probe_that_outlives_its_check_says_nothing() {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let live = Endpoints::default().get(listener.local_addr().unwrap(), UpstreamProtocol::Http1);
        let check = HealthCheck {
            probe: Probe::Http { path: "/".into(), host: None },
            interval: Duration::from_secs(10),
            timeout: Duration::from_secs(60),
            healthy: 1,
            unhealthy: 1,
        };
        let wish = Wish { check: Arc::new(check), endpoints: vec![Arc::downgrade(&live)] };
        let probes = async |runner: &mut Runner| {
            runner.launch(live.id, Instant::now());
            listener.accept().await.unwrap()
        };
        let ended = async |runner: &Runner| drop(runner.places.acquire_many(AT_ONCE as u32).await);
        let local = tokio::task::LocalSet::new();
        let watched = local.run_until(async {
            let mut runner = Runner::new(Weak::new(), Arc::default(), 1);
            runner.follow(vec![wish.clone()]);
            let probe = probes(&mut runner).await;
            runner.follow(Vec::new());
            drop(probe);
            ended(&runner).await;
            assert!(live.is_up());
            // While it is wanted it does say something.
            runner.follow(vec![wish]);
            drop(probes(&mut runner).await);
            ended(&runner).await;
            assert!(!live.is_up());
        });
        watched.await;
    }

    #[test]
    fn a_state_changes_after_so_many_outcomes_in_a_row() {
        for seed in 0..100 {
            let mut random = fastrand::Rng::with_seed(seed);
            let (healthy, unhealthy) = (random.u32(1..5), random.u32(1..5));
            let span = Duration::from_secs(1);
            let check = HealthCheck { probe: Probe::Tcp, interval: span, timeout: span, healthy, unhealthy };
            let mut tally = Tally::new(true);
            let (mut up, mut history) = (true, Vec::new());
            for _ in 0..300 {
                let success = random.bool();
                history.push(success);
                let row = history.iter().rev().take_while(|outcome| **outcome == success).count() as u32;
                let turned = success != up && row >= if success { healthy } else { unhealthy };
                up ^= turned;
                assert_eq!(tally.record(success, &check), turned.then_some(up), "seed {seed}: {history:?}");
            }
        }
    }
}
