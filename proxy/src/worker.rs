//! One worker: a thread, a runtime, and everything its connections share without a lock.

use std::cell::{Cell, RefCell};
use std::rc::Rc;
use std::sync::Arc;
use std::task::Waker;
use std::time::Duration;

use slab::Slab;
use tokio::time::Instant;

use crate::access_log::WorkerLog;
use crate::balance::Turns;
use crate::clock;
use crate::config::Config;
use crate::limit::Limiter;
use crate::metrics::WorkerMetrics;
use crate::resilience::budget::Budgets;
use crate::resilience::delay::Delays;
use crate::resilience::outliers;
use crate::router::{Router, RouterCache};
use crate::tls::Tls;
use crate::upstream::Upstreams;

/// How long an idle connection may still ask something once a drain has begun.
const DRAIN_IDLE: Duration = Duration::from_secs(2);

/// Shared by the connections of one worker, through an `Rc`.
pub(crate) struct Worker {
    pub(crate) index: usize,
    pub(crate) config: Arc<Config>,
    pub(crate) metrics: Arc<WorkerMetrics>,
    pub(crate) turns: Turns,
    /// Those of second and further attempts, which take nobody's turn: of two
    /// endpoints the bad one would have every first attempt.
    pub(crate) again: Turns,
    pub(crate) budgets: Budgets,
    pub(crate) delays: Delays,
    pub(crate) upstreams: Upstreams,
    pub(crate) tls: Tls,
    pub(crate) limiter: Arc<Limiter>,
    pub(crate) random: RefCell<fastrand::Rng>,
    /// For a path that has to be rewritten before it is matched.
    pub(crate) scratch: RefCell<Vec<u8>>,
    pub(crate) log: RefCell<Option<WorkerLog>>,
    /// Where `https` is, for redirects of clients that named a port.
    pub(crate) https_port: Option<u16>,
    routes: RefCell<RouterCache>,
    generation: RefCell<Rc<Generation>>,
    draining: Cell<bool>,
    /// While draining: how long a client that is idle may still ask something.
    drain_idle: Cell<Duration>,
    idle: RefCell<Slab<Waker>>,
    connections: Cell<usize>,
    /// When endpoints are compared next, in milliseconds of [`clock::now_ms`].
    compare_at: Cell<u64>,
}

/// A router as one worker holds it. Its requests count their hold in the `Rc`
/// around it, on a line of memory that no other core touches.
pub(crate) struct Generation(Arc<Router>);

impl std::ops::Deref for Generation {
    type Target = Router;

    fn deref(&self) -> &Router {
        &self.0
    }
}

/// What a worker starts with.
pub(crate) struct Parts {
    pub(crate) index: usize,
    pub(crate) config: Arc<Config>,
    pub(crate) metrics: Arc<WorkerMetrics>,
    pub(crate) tls: Tls,
    pub(crate) limiter: Arc<Limiter>,
    pub(crate) routes: RouterCache,
    pub(crate) log: Option<WorkerLog>,
    pub(crate) https_port: Option<u16>,
}

impl Worker {
    pub(crate) fn new(parts: Parts) -> Rc<Worker> {
        let Parts { index, config, metrics, tls, limiter, mut routes, log, https_port } = parts;
        let generation = RefCell::new(Rc::new(Generation(routes.load().clone())));
        let idle_ms = config.timeouts.idle_upstream.as_millis() as u64;
        Rc::new(Worker {
            index,
            upstreams: Upstreams::new(config.limits.idle_upstream, idle_ms, metrics.clone()),
            config,
            metrics,
            turns: Turns::for_worker(index as u32),
            again: Turns::for_worker(index as u32),
            budgets: Budgets::new(clock::now_ms()),
            delays: Delays::default(),
            tls,
            limiter,
            random: RefCell::new(fastrand::Rng::new()),
            scratch: RefCell::default(),
            log: RefCell::new(log),
            https_port,
            routes: RefCell::new(routes),
            generation,
            draining: Cell::new(false),
            drain_idle: Cell::new(DRAIN_IDLE),
            idle: RefCell::default(),
            connections: Cell::new(0),
            compare_at: Cell::new(clock::now_ms()),
        })
    }

    /// The live generation: one atomic load, and a count that no other thread touches.
    pub(crate) fn router(&self) -> Rc<Generation> {
        let mut routes = self.routes.borrow_mut();
        let newest = routes.load();
        let mut current = self.generation.borrow_mut();
        if !Arc::ptr_eq(newest, &current.0) {
            *current = Rc::new(Generation(newest.clone()));
        }
        current.clone()
    }

    pub(crate) fn is_draining(&self) -> bool {
        self.draining.get()
    }

    /// Until when a connection that is idle now may stay, once a drain has begun.
    pub(crate) fn idle_until(&self, deadline: Instant) -> Instant {
        deadline.min(Instant::now() + self.drain_idle.get())
    }

    /// Tells every connection to finish: idle ones are woken to close soon, or,
    /// if another process has taken over, when their time is up anyway: a client
    /// may be about to use one.
    pub(crate) fn drain(&self, relieved: bool) {
        self.draining.set(true);
        if relieved {
            self.drain_idle.set(self.config.timeouts.keep_alive);
        }
        for (_, waker) in self.idle.borrow().iter() {
            waker.wake_by_ref();
        }
    }

    pub(crate) fn connections(&self) -> usize {
        self.connections.get()
    }

    /// Once a second: lets go of an outdated generation, closes stale upstream connections,
    /// hands over log lines.
    pub(crate) fn tick(&self) {
        drop(self.router());
        let now_ms = clock::now_ms();
        self.upstreams.sweep(now_ms);
        self.budgets.turn(now_ms);
        if self.config.outliers.compares() && now_ms >= self.compare_at.get() {
            self.compare_at.set(now_ms + self.config.outliers.interval.as_millis() as u64);
            outliers::compare(self);
        }
        if let Some(log) = self.log.borrow_mut().as_mut() {
            log.flush();
        }
    }
}

/// Counts a connection as open for as long as it lives, and lets a drain wake it.
pub(crate) struct Presence {
    worker: Rc<Worker>,
    slot: Option<usize>,
}

impl Presence {
    pub(crate) fn new(worker: Rc<Worker>) -> Presence {
        worker.connections.set(worker.connections.get() + 1);
        Presence { worker, slot: None }
    }

    /// Registers the task for [`Worker::drain`]. Cheap to repeat: a task keeps its waker.
    pub(crate) fn wake_on_drain(&mut self, waker: &Waker) {
        let mut idle = self.worker.idle.borrow_mut();
        match self.slot {
            Some(slot) if idle[slot].will_wake(waker) => {}
            Some(slot) => idle[slot] = waker.clone(),
            None => self.slot = Some(idle.insert(waker.clone())),
        }
    }
}

impl Drop for Presence {
    fn drop(&mut self) {
        self.worker.connections.set(self.worker.connections.get() - 1);
        if let Some(slot) = self.slot {
            self.worker.idle.borrow_mut().remove(slot);
        }
    }
}
