//! Every counter, gauge, histogram and label that `/metrics` shows.
//!
//! The hot path shares nothing: each worker owns its counters, on cache lines
//! of its own, and is their only writer, so an increment is a relaxed load and
//! a relaxed store. A scrape sums over the workers; it never stops them.
//!
//! ```text
//!  worker 0 ─► WorkerMetrics ─┐                    ┌─► lockgate_requests_total …
//!  worker 1 ─► WorkerMetrics ─┼─ sum when scraped ─┤
//!  worker n ─► RouteStats[n] ─┘                    └─► lockgate_route_request_duration_seconds …
//! ```
//!
//! # Cardinality
//!
//! | family | series |
//! |---|---|
//! | per process (connections, handshakes, rejections, …) | about 75, fixed |
//! | per route | at most [`Metrics::MAX_ROUTES`] label sets and one shared by all beyond (its four labels are `other`); each 5 series, and 15 for every status class it has answered with |
//! | per L4 listener | at most [`Metrics::MAX_LISTENERS`] and one shared by all beyond (`other`); each 10 series |
//! | certificate expiry | at most [`Metrics::MAX_CERTIFICATES`], those that expire first |
//! | `lockgate_objects` | kinds × states, both fixed in code |
//!
//! Hosts, paths, client addresses and endpoint addresses are never labels: a
//! client or an autoscaler could make as many as it likes. A route's label set
//! goes away [`Metrics::ROUTE_LINGER`] after the last table that names it.

mod listener;
mod route;
mod worker;

use std::collections::BTreeMap;
use std::fmt;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use prometheus::core::{Collector, Desc};
use prometheus::proto::{self, LabelPair, MetricFamily, MetricType};
use prometheus::{Registry, TEXT_FORMAT, TextEncoder};

pub use self::listener::{ListenerSlot, ListenerStats};
pub use self::route::{Outcome, RouteStats};
pub use self::worker::{
    Breach, ConnectionMetrics, Limit, Outlier, Protocol, ProtocolMetrics, Reject, WorkerMetrics,
};

use self::listener::ListenerSet;
use self::route::RouteSet;
use crate::clock;
use crate::table::{ListenerKey, Origin, PoolKey};

/// All metrics of one proxy. Shared by the workers, the publisher and the
/// admin endpoint; a clone shows the same numbers.
#[derive(Clone)]
pub struct Metrics {
    state: Arc<State>,
    registry: Registry,
}

/// When a certificate stops being valid.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CertificateExpiry {
    /// The object it came from, `namespace/name`.
    pub name: String,
    /// Its SHA-256 fingerprint in hexadecimal: two certificates of one name during a rotation stay apart.
    pub fingerprint: String,
    /// Its `notAfter`, in seconds since the Unix epoch.
    pub not_after: i64,
}

impl Metrics {
    /// Route label sets that are told apart.
    pub const MAX_ROUTES: usize = 10_000;
    /// Certificates whose expiry is shown.
    pub const MAX_CERTIFICATES: usize = 1_000;
    /// L4 listeners that are told apart.
    pub const MAX_LISTENERS: usize = 1_000;
    /// How long the counters of a route outlive the last table that names it:
    /// long enough to be scraped once more, and to survive an object that is
    /// deleted and applied again.
    pub const ROUTE_LINGER: Duration = Duration::from_secs(300);
    /// The `Content-Type` of [`Metrics::encode`].
    pub const CONTENT_TYPE: &'static str = TEXT_FORMAT;

    /// Metrics for `workers` workers (at least one).
    pub fn new(workers: usize) -> Metrics {
        Metrics::with_max_routes(workers, Metrics::MAX_ROUTES)
    }

    /// As [`Metrics::new`], with room for `max_routes` route label sets.
    pub fn with_max_routes(workers: usize, max_routes: usize) -> Metrics {
        let workers = workers.max(1);
        let state = Arc::new(State {
            workers: (0..workers).map(|_| Arc::default()).collect(),
            routes: Mutex::new(RouteSet::new(workers, max_routes)),
            listeners: Mutex::new(ListenerSet::new(workers, Metrics::MAX_LISTENERS)),
            generation: AtomicU64::new(0),
            published_at: AtomicU64::new(0),
            objects: Mutex::default(),
            certificates: Mutex::default(),
        });
        let registry = Registry::new();
        // Fails only on names that are malformed or twice there, and those are constants: a test encodes them.
        let registered =
            registry.register(Box::new(Scrape { state: state.clone(), descriptions: descriptions() }));
        debug_assert!(registered.is_ok(), "{registered:?}");
        Metrics { state, registry }
    }

    /// The counters of worker `index` (from 0). That worker is their only writer.
    pub fn worker(&self, index: usize) -> Arc<WorkerMetrics> {
        let workers = &self.state.workers;
        debug_assert!(index < workers.len(), "worker {index} of {}", workers.len());
        workers[index % workers.len()].clone()
    }

    /// How many workers there are.
    pub fn workers(&self) -> usize {
        self.state.workers.len()
    }

    /// The statistics of requests that `origin` sends to `pool`, as `canary`
    /// (empty: the primary). The same labels give the same statistics, across
    /// tables. Takes a lock: for compiling a table, not for requests.
    pub fn route(&self, origin: &Origin, pool: &PoolKey, canary: &str) -> Arc<RouteStats> {
        lock(&self.state.routes).intern(origin, pool, canary, clock::now_ms())
    }

    /// The statistics of the L4 listener `key`; the same key gives the same ones, across tables. Takes a
    /// lock: for compiling a table.
    pub fn listener(&self, key: &ListenerKey) -> Arc<ListenerStats> {
        lock(&self.state.listeners).intern(key)
    }

    /// The table that requests see now, counted from 1; called at each publish.
    pub fn set_generation(&self, generation: u64) {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        self.state.generation.store(generation, Ordering::Relaxed);
        self.state.published_at.store(now.as_millis() as u64, Ordering::Relaxed);
    }

    /// How many objects of `kind` (`Ingress`, `Service`, …) are in `state`
    /// (`accepted`, `refused`, …), as of the last translation.
    pub fn set_objects(&self, kind: &'static str, state: &'static str, count: u64) {
        lock(&self.state.objects).insert((kind, state), count);
    }

    /// The certificates that are served, in place of those set before. Beyond
    /// [`Metrics::MAX_CERTIFICATES`] those that expire last are left out.
    pub fn set_certificates(&self, mut certificates: Vec<CertificateExpiry>) {
        let order = |c: &CertificateExpiry| (c.not_after, c.name.clone(), c.fingerprint.clone());
        let served = certificates.len() as u64;
        certificates.sort_by_cached_key(order);
        certificates.dedup_by(|a, b| a.name == b.name && a.fingerprint == b.fingerprint);
        certificates.truncate(Metrics::MAX_CERTIFICATES);
        *lock(&self.state.certificates) = Certificates { served, shown: certificates };
    }

    /// Everything as Prometheus text, of type [`Metrics::CONTENT_TYPE`].
    pub fn encode(&self) -> String {
        let mut text = String::new();
        // Fails only on a family without a name or without a metric; neither leaves a collector.
        let encoded = TextEncoder::new().encode_utf8(&self.registry.gather(), &mut text);
        debug_assert!(encoded.is_ok(), "{encoded:?}");
        text
    }
}

impl Default for Metrics {
    /// For one worker.
    fn default() -> Metrics {
        Metrics::new(1)
    }
}

impl fmt::Debug for Metrics {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Metrics").field("workers", &self.workers()).finish_non_exhaustive()
    }
}

/// A number that only grows. One thread writes, any reads.
#[derive(Debug, Default)]
pub struct Counter(AtomicU64);

impl Counter {
    /// Adds one.
    pub fn inc(&self) {
        self.add(1);
    }

    /// Adds `n`.
    pub fn add(&self, n: u64) {
        // Not fetch_add: with one writer, a load and a store need no locked instruction.
        self.0.store(self.0.load(Ordering::Relaxed).wrapping_add(n), Ordering::Relaxed);
    }

    /// The sum so far.
    pub fn value(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

/// A number that goes up and down. One thread writes, any reads.
#[derive(Debug, Default)]
pub struct Gauge(AtomicU64);

impl Gauge {
    /// Adds one.
    pub fn inc(&self) {
        self.add(1);
    }

    /// Takes one away.
    pub fn dec(&self) {
        self.add(-1);
    }

    /// Adds `n`, which may be negative.
    pub fn add(&self, n: i64) {
        self.0.store(self.0.load(Ordering::Relaxed).wrapping_add_signed(n), Ordering::Relaxed);
    }

    /// The present value.
    pub fn value(&self) -> i64 {
        self.0.load(Ordering::Relaxed) as i64
    }
}

struct State {
    workers: Vec<Arc<WorkerMetrics>>,
    routes: Mutex<RouteSet>,
    listeners: Mutex<ListenerSet>,
    generation: AtomicU64,
    /// Milliseconds since the Unix epoch.
    published_at: AtomicU64,
    objects: Mutex<BTreeMap<(&'static str, &'static str), u64>>,
    certificates: Mutex<Certificates>,
}

#[derive(Default)]
struct Certificates {
    served: u64,
    shown: Vec<CertificateExpiry>,
}

/// Reads all of it when the registry gathers.
struct Scrape {
    state: Arc<State>,
    descriptions: Vec<Desc>,
}

impl Collector for Scrape {
    fn desc(&self) -> Vec<&Desc> {
        self.descriptions.iter().collect()
    }

    fn collect(&self) -> Vec<MetricFamily> {
        let state = &self.state;
        let mut families = worker::collect(&state.workers);
        families.extend(lock(&state.routes).collect(clock::now_ms()));
        families.extend(lock(&state.listeners).collect());
        families.extend(process(state));
        families
    }
}

const PROCESS_FAMILIES: &[(&str, &str, &[&str])] = &[
    ("lockgate_build_info", "Always 1; the version is a label.", &["version"]),
    ("lockgate_workers", "Worker threads.", &[]),
    ("lockgate_generation", "Number of the routing table that requests see.", &[]),
    (
        "lockgate_generation_timestamp_seconds",
        "When that table was published, in seconds since the Unix epoch.",
        &[],
    ),
    ("lockgate_objects", "Objects the last translation saw, by kind and outcome.", &["kind", "state"]),
    ("lockgate_certificates", "Certificates served.", &[]),
    (
        "lockgate_certificate_not_after_seconds",
        "End of a certificate's validity, in seconds since the Unix epoch.",
        &["name", "fingerprint"],
    ),
];

fn process(state: &State) -> Vec<MetricFamily> {
    let published_at = state.published_at.load(Ordering::Relaxed) as f64 / 1e3;
    let objects = lock(&state.objects);
    let certificates = lock(&state.certificates);
    let metrics = [
        vec![gauge(vec![label("version", env!("CARGO_PKG_VERSION"))], 1.0)],
        vec![gauge(vec![], state.workers.len() as f64)],
        vec![gauge(vec![], state.generation.load(Ordering::Relaxed) as f64)],
        vec![gauge(vec![], published_at)],
        objects
            .iter()
            .map(|((kind, state), count)| {
                gauge(vec![label("kind", kind), label("state", state)], *count as f64)
            })
            .collect(),
        vec![gauge(vec![], certificates.served as f64)],
        certificates
            .shown
            .iter()
            .map(|c| {
                let labels = vec![label("name", &c.name), label("fingerprint", &c.fingerprint)];
                gauge(labels, c.not_after as f64)
            })
            .collect(),
    ];
    let named = PROCESS_FAMILIES.iter().zip(metrics);
    named.map(|((name, help, _), metrics)| family(name, help, MetricType::GAUGE, metrics)).collect()
}

fn descriptions() -> Vec<Desc> {
    let names = worker::described()
        .chain(route::described())
        .chain(listener::described())
        .chain(PROCESS_FAMILIES.iter().copied());
    names
        .filter_map(|(name, help, labels)| {
            let labels = labels.iter().map(|l| l.to_string()).collect();
            Desc::new(name.to_owned(), help.to_owned(), labels, Default::default()).ok()
        })
        .collect()
}

fn family(name: &str, help: &str, kind: MetricType, metrics: Vec<proto::Metric>) -> MetricFamily {
    let mut family = MetricFamily::default();
    family.set_name(name.to_owned());
    family.set_help(help.to_owned());
    family.set_field_type(kind);
    family.set_metric(metrics);
    family
}

fn label(name: &str, value: &str) -> LabelPair {
    let mut pair = LabelPair::default();
    pair.set_name(name.to_owned());
    pair.set_value(value.to_owned());
    pair
}

fn counter(labels: Vec<LabelPair>, value: f64) -> proto::Metric {
    let mut counter = proto::Counter::default();
    counter.set_value(value);
    let mut metric = proto::Metric::from_label(labels);
    metric.set_counter(counter);
    metric
}

fn gauge(labels: Vec<LabelPair>, value: f64) -> proto::Metric {
    let mut gauge = proto::Gauge::default();
    gauge.set_value(value);
    let mut metric = proto::Metric::from_label(labels);
    metric.set_gauge(gauge);
    metric
}

/// What is behind these locks stays meaningful when a holder panicked: plain
/// maps, each changed by a single call.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests;
