//! Statistics per route: interned by label set, one slot per worker.

use std::collections::HashMap;
use std::sync::{Arc, OnceLock};

use prometheus::proto::{self, LabelPair, MetricFamily, MetricType};

use super::worker::{CLASSES, class};
use super::{Counter, Metrics, counter, family, label};
use crate::table::{Origin, PoolKey};

/// Upper bounds of the latency buckets in µs; the last bucket (`+Inf`) is implied.
const BOUNDS_US: [u64; 12] =
    [500, 1_000, 2_500, 5_000, 10_000, 25_000, 50_000, 100_000, 250_000, 1_000_000, 2_500_000, 10_000_000];

/// How one request of a route went.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Outcome {
    /// The status the client saw; 499 when it left before there was one.
    pub status: u16,
    /// From the first byte of the request to the last of the answer, in µs.
    pub duration_us: u64,
    /// From choosing an endpoint to the last byte it sent, in µs; 0 when none was asked.
    pub upstream_us: u64,
    /// Bytes of the request body.
    pub bytes_in: u64,
    /// Bytes of the response body.
    pub bytes_out: u64,
    /// Attempts beyond the first.
    pub retries: u32,
}

/// What is counted for one (namespace, ingress, service, canary). Cheap while
/// idle: a worker's slot is allocated by its first request.
#[derive(Debug)]
pub struct RouteStats {
    slots: Box<[OnceLock<Box<Slot>>]>,
}

impl RouteStats {
    fn new(workers: usize) -> RouteStats {
        RouteStats { slots: (0..workers).map(|_| OnceLock::new()).collect() }
    }

    /// Counts a finished request. `worker` must be the calling worker's own
    /// index: each slot has one writer. Allocates on a worker's first request.
    pub fn record(&self, worker: usize, outcome: &Outcome) {
        debug_assert!(worker < self.slots.len(), "worker {worker} of {}", self.slots.len());
        let Some(slot) = self.slots.get(worker) else { return };
        let slot = slot.get_or_init(Box::default);
        let answers = &slot.classes[class(outcome.status)];
        answers.buckets[bucket(outcome.duration_us)].inc();
        answers.duration_us.add(outcome.duration_us);
        slot.upstream_us.add(outcome.upstream_us);
        slot.bytes_in.add(outcome.bytes_in);
        slot.bytes_out.add(outcome.bytes_out);
        if outcome.retries > 0 {
            slot.retries.add(outcome.retries.into());
        }
    }

    /// Requests counted so far, over all workers.
    pub fn requests(&self) -> u64 {
        self.sum().classes.iter().map(|c| c.buckets.iter().sum::<u64>()).sum()
    }

    fn sum(&self) -> Sums {
        let mut sums = Sums::default();
        for slot in self.slots.iter().filter_map(OnceLock::get) {
            for (sum, class) in sums.classes.iter_mut().zip(&slot.classes) {
                for (sum, bucket) in sum.buckets.iter_mut().zip(&class.buckets) {
                    *sum += bucket.value();
                }
                sum.duration_us += class.duration_us.value();
            }
            sums.upstream_us += slot.upstream_us.value();
            sums.bytes_in += slot.bytes_in.value();
            sums.bytes_out += slot.bytes_out.value();
            sums.retries += slot.retries.value();
        }
        sums
    }
}

impl Default for RouteStats {
    /// For one worker, and shown by no scrape.
    fn default() -> RouteStats {
        RouteStats::new(1)
    }
}

/// One worker's part, on cache lines of its own.
#[derive(Debug, Default)]
#[repr(align(64))]
struct Slot {
    classes: [Class; CLASSES.len()],
    upstream_us: Counter,
    bytes_in: Counter,
    bytes_out: Counter,
    retries: Counter,
}

#[derive(Debug, Default)]
struct Class {
    /// Not cumulative; the last one is `+Inf`.
    buckets: [Counter; BOUNDS_US.len() + 1],
    duration_us: Counter,
}

#[derive(Default)]
struct Sums {
    classes: [ClassSums; CLASSES.len()],
    upstream_us: u64,
    bytes_in: u64,
    bytes_out: u64,
    retries: u64,
}

#[derive(Clone, Copy, Default)]
struct ClassSums {
    buckets: [u64; BOUNDS_US.len() + 1],
    duration_us: u64,
}

/// The first bucket whose bound is not below `duration_us` (`le` in Prometheus).
fn bucket(duration_us: u64) -> usize {
    BOUNDS_US.iter().position(|bound| duration_us <= *bound).unwrap_or(BOUNDS_US.len())
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
struct Labels {
    namespace: Arc<str>,
    ingress: Arc<str>,
    service: Box<str>,
    canary: Box<str>,
}

impl Labels {
    fn new(origin: &Origin, pool: &PoolKey, canary: &str) -> Labels {
        Labels {
            namespace: origin.namespace.clone(),
            ingress: origin.name.clone(),
            service: service_name(pool).into(),
            canary: canary.into(),
        }
    }

    fn other() -> Labels {
        Labels {
            namespace: "other".into(),
            ingress: "other".into(),
            service: "other".into(),
            canary: "other".into(),
        }
    }

    fn pairs(&self) -> Vec<LabelPair> {
        let values = [&*self.namespace, &self.ingress, &self.service, &self.canary];
        LABELS.iter().zip(values).map(|(name, value)| label(name, value)).collect()
    }
}

/// The Service's name in `namespace/service:port#protocol`: ports share a label set.
fn service_name(pool: &PoolKey) -> &str {
    let name = pool.0.split_once('/').map_or(&*pool.0, |(_, rest)| rest);
    name.split_once(':').map_or(name, |(service, _)| service)
}

/// Every label set there is, and the one for those that find no room.
pub(super) struct RouteSet {
    workers: usize,
    max: usize,
    entries: HashMap<Labels, Entry, foldhash::fast::RandomState>,
    other: Arc<RouteStats>,
    /// When room was last made for a label set that found none: a table with
    /// a hundred thousand of them must not sweep as often.
    swept_at_ms: u64,
}

struct Entry {
    stats: Arc<RouteStats>,
    /// Since when no table holds it, as far as a sweep has seen.
    unused_since_ms: Option<u64>,
}

impl RouteSet {
    /// Least time between two sweeps for room.
    const SWEEP_INTERVAL_MS: u64 = 1_000;

    pub(super) fn new(workers: usize, max: usize) -> RouteSet {
        let other = Arc::new(RouteStats::new(workers));
        RouteSet { workers, max, entries: HashMap::default(), other, swept_at_ms: 0 }
    }

    pub(super) fn intern(
        &mut self,
        origin: &Origin,
        pool: &PoolKey,
        canary: &str,
        now_ms: u64,
    ) -> Arc<RouteStats> {
        let labels = Labels::new(origin, pool, canary);
        if let Some(entry) = self.entries.get_mut(&labels) {
            entry.unused_since_ms = None;
            return entry.stats.clone();
        }
        if self.entries.len() >= self.max
            && now_ms.saturating_sub(self.swept_at_ms) >= Self::SWEEP_INTERVAL_MS
        {
            self.sweep(now_ms);
        }
        if self.entries.len() >= self.max {
            return self.other.clone();
        }
        let stats = Arc::new(RouteStats::new(self.workers));
        self.entries.insert(labels, Entry { stats: stats.clone(), unused_since_ms: None });
        stats
    }

    /// Forgets label sets that no table has held for [`Metrics::ROUTE_LINGER`].
    fn sweep(&mut self, now_ms: u64) {
        let linger_ms = Metrics::ROUTE_LINGER.as_millis() as u64;
        self.swept_at_ms = now_ms;
        self.entries.retain(|_, entry| {
            if Arc::strong_count(&entry.stats) > 1 {
                entry.unused_since_ms = None;
                return true;
            }
            let since = *entry.unused_since_ms.get_or_insert(now_ms);
            now_ms.saturating_sub(since) < linger_ms
        });
    }

    pub(super) fn collect(&mut self, now_ms: u64) -> Vec<MetricFamily> {
        self.sweep(now_ms);
        let mut rows: Vec<_> =
            self.entries.iter().map(|(labels, entry)| (labels.pairs(), entry.stats.sum())).collect();
        rows.push((Labels::other().pairs(), self.other.sum()));
        rows.retain(|(_, sums)| sums.classes.iter().any(|c| c.buckets.iter().any(|n| *n > 0)));

        let mut durations = Vec::new();
        for (labels, sums) in &rows {
            for (code, class) in CLASSES.iter().zip(&sums.classes) {
                durations.extend(histogram(labels, code, class));
            }
        }
        let each = |value: fn(&Sums) -> f64| -> Vec<proto::Metric> {
            rows.iter().map(|(labels, sums)| counter(labels.clone(), value(sums))).collect()
        };
        let series = [
            durations,
            each(|s| s.upstream_us as f64 / 1e6),
            each(|s| s.bytes_in as f64),
            each(|s| s.bytes_out as f64),
            each(|s| s.retries as f64),
        ];
        let kinds = std::iter::once(MetricType::HISTOGRAM).chain(std::iter::repeat(MetricType::COUNTER));
        let families = described().zip(kinds).zip(series);
        families.map(|(((name, help, _), kind), series)| family(name, help, kind, series)).collect()
    }
}

const LABELS: [&str; 4] = ["namespace", "ingress", "service", "canary"];

pub(super) fn described() -> impl Iterator<Item = (&'static str, &'static str, &'static [&'static str])> {
    const WITH_CODE: &[&str] = &[LABELS[0], LABELS[1], LABELS[2], LABELS[3], "code"];
    [
        (
            "lockgate_route_request_duration_seconds",
            "Time from a request's first byte to its answer's last; the count is the route's requests.",
            WITH_CODE,
        ),
        (
            "lockgate_route_upstream_seconds_total",
            "Time spent with endpoints, from choosing one to its last byte.",
            &LABELS,
        ),
        ("lockgate_route_request_body_bytes_total", "Bytes of request bodies.", &LABELS),
        ("lockgate_route_response_body_bytes_total", "Bytes of response bodies.", &LABELS),
        ("lockgate_route_retries_total", "Attempts beyond the first.", &LABELS),
    ]
    .into_iter()
}

/// `None` for a class without an answer: most routes see one or two classes.
fn histogram(labels: &[LabelPair], code: &str, class: &ClassSums) -> Option<proto::Metric> {
    let count: u64 = class.buckets.iter().sum();
    if count == 0 {
        return None;
    }
    let mut cumulative = 0;
    let buckets = BOUNDS_US.iter().zip(&class.buckets).map(|(bound, n)| {
        cumulative += n;
        let mut bucket = proto::Bucket::default();
        bucket.set_upper_bound(*bound as f64 / 1e6);
        bucket.set_cumulative_count(cumulative);
        bucket
    });
    let mut histogram = proto::Histogram::default();
    histogram.set_bucket(buckets.collect());
    histogram.set_sample_count(count);
    histogram.set_sample_sum(class.duration_us as f64 / 1e6);
    let mut metric = proto::Metric::from_label(labels.iter().cloned().chain([label("code", code)]).collect());
    metric.set_histogram(histogram);
    Some(metric)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bucket_bounds_are_inclusive() {
        for (us, expected) in [(0, 0), (500, 0), (501, 1), (1_000, 1), (10_000_000, 11), (10_000_001, 12)] {
            assert_eq!(bucket(us), expected, "{us} µs");
        }
        assert!(BOUNDS_US.is_sorted());
    }

    #[test]
    fn service_name_of_a_pool_key() {
        for (key, expected) in [
            ("shop/cart:80", "cart"),
            ("shop/cart:http", "cart"),
            ("shop/cart:443#h2", "cart"),
            ("cart", "cart"),
            ("", ""),
        ] {
            assert_eq!(service_name(&PoolKey(key.into())), expected, "{key}");
        }
    }

    #[test]
    fn unused_label_sets_linger_then_make_room() {
        let origin = |name: &str| Origin { kind: "Ingress", namespace: "shop".into(), name: name.into() };
        let pool = PoolKey("shop/cart:80".into());
        let linger = Metrics::ROUTE_LINGER.as_millis() as u64;
        let mut set = RouteSet::new(1, 2);

        let a = set.intern(&origin("a"), &pool, "", 0);
        let b = set.intern(&origin("b"), &pool, "", 0);
        let overflow = set.intern(&origin("c"), &pool, "", 5_000);
        assert!(Arc::ptr_eq(&overflow, &set.other));

        a.record(0, &Outcome { status: 200, ..Outcome::default() });
        drop(a);
        set.sweep(10_000);
        let a = set.intern(&origin("a"), &pool, "", 20_000);
        assert_eq!(a.requests(), 1, "applied again within the linger: counts go on");
        drop(a);

        set.sweep(30_000);
        assert_eq!(set.entries.len(), 2);
        let c = set.intern(&origin("c"), &pool, "", 30_000 + linger);
        assert!(!Arc::ptr_eq(&c, &set.other), "the unused one made room");
        assert!(Arc::ptr_eq(&b, &set.intern(&origin("b"), &pool, "", 31_000 + linger)));
        assert_eq!(set.entries.len(), 2);
    }
}
