//! What of the service plane is counted, under kube-proxy's names where it has one.
//!
//! Labels are fixed in code: Services and endpoints are never labels.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use lockgate_ebpf::ServiceTable;
use lockgate_ebpf::table::Service;
use prometheus::core::Collector;
use prometheus::{
    Gauge, Histogram, HistogramOpts, IntCounter, IntCounterVec, IntGauge, IntGaugeVec, Opts, Registry,
    TextEncoder, exponential_buckets,
};

/// Every counter, gauge and histogram.
#[derive(Clone)]
pub(crate) struct Metrics {
    registry: Registry,
    sync: Histogram,
    full: Histogram,
    partial: Histogram,
    programming: Histogram,
    last: Gauge,
    last_queued: Gauge,
    pub(crate) services: Changes,
    pub(crate) endpoints: Changes,
    no_local: IntGaugeVec,
    healthz: IntCounterVec,
    livez: IntCounterVec,
    frontends: IntGauge,
    ports: IntGauge,
    not_live: IntGauge,
    failures: IntCounter,
}

/// Changes seen, and those that are not live yet.
#[derive(Clone)]
pub(crate) struct Changes {
    pending: IntGauge,
    total: IntCounter,
}

impl Changes {
    /// So many came.
    pub(crate) fn came(&self, count: usize) {
        self.pending.add(count as i64);
        self.total.inc_by(count as u64);
    }
}

impl Metrics {
    /// Nothing has happened yet.
    pub(crate) fn new() -> Metrics {
        let registry = Registry::new();
        let made = Maker(&registry);
        let changes = |kind: &str| Changes {
            pending: made.gauge(
                &format!("kubeproxy_sync_proxy_rules_{kind}_changes_pending"),
                &format!("Pending proxy rules {kind} changes"),
            ),
            total: made.counter(
                &format!("kubeproxy_sync_proxy_rules_{kind}_changes_total"),
                &format!("Cumulative proxy rules {kind} changes"),
            ),
        };
        // Milliseconds as kube-proxy has them, and below what it can do.
        let steps = exponential_buckets(0.000_062_5, 2.0, 19).unwrap_or_default();
        Metrics {
            sync: made.histogram(
                "kubeproxy_sync_proxy_rules_duration_seconds",
                "Making a table live",
                steps.clone(),
            ),
            full: made.histogram(
                "kubeproxy_sync_full_proxy_rules_duration_seconds",
                "Making a table live, everything compared",
                steps.clone(),
            ),
            partial: made.histogram(
                "kubeproxy_sync_partial_proxy_rules_duration_seconds",
                "Making a table live, of which a part changed",
                steps,
            ),
            programming: made.histogram(
                "kubeproxy_network_programming_duration_seconds",
                "From the change of a Service or Pod until its endpoints are live",
                programming_buckets(),
            ),
            last: made.seconds(
                "kubeproxy_sync_proxy_rules_last_timestamp_seconds",
                "The last time proxy rules were successfully synced",
            ),
            last_queued: made.seconds(
                "kubeproxy_sync_proxy_rules_last_queued_timestamp_seconds",
                "The last time a sync of proxy rules was queued",
            ),
            services: changes("service"),
            endpoints: changes("endpoint"),
            no_local: made.gauges(
                "kubeproxy_sync_proxy_rules_no_local_endpoints_total",
                "Service ports whose traffic policy is Local, with endpoints, but none on this node",
                "traffic_policy",
            ),
            healthz: made.counters("kubeproxy_proxy_healthz_total", "Answers to /healthz", "code"),
            livez: made.counters("kubeproxy_proxy_livez_total", "Answers to /livez", "code"),
            frontends: made.gauge("lockgate_service_frontends", "Addresses and ports of Services"),
            ports: made.gauge("lockgate_service_ports", "Ports of Services, in each address family"),
            not_live: made
                .gauge("lockgate_service_not_live", "Services and frontends not yet as they should be"),
            failures: made.counter("lockgate_service_write_failures_total", "Writes to maps that failed"),
            registry,
        }
    }

    /// A change has come that is to be made live.
    pub(crate) fn queued(&self) {
        self.last_queued.set(now());
    }

    /// A table was applied in `took`; so much of it is `pending` after `failures`.
    pub(crate) fn synced(&self, took: Duration, is_full: bool, pending: usize, failures: usize) {
        let seconds = took.as_secs_f64();
        self.sync.observe(seconds);
        if is_full {
            self.full.observe(seconds)
        } else {
            self.partial.observe(seconds)
        }
        self.not_live.set(pending as i64);
        self.failures.inc_by(failures as u64);
        if pending == 0 {
            self.last.set(now());
            self.services.pending.set(0);
            self.endpoints.pending.set(0);
        }
    }

    /// Endpoints are live of which the cause happened `since` ago.
    pub(crate) fn programmed(&self, since: Duration) {
        self.programming.observe(since.as_secs_f64());
    }

    /// What is desired now; `no_local` counts internal and external policies.
    pub(crate) fn set_table(&self, table: &ServiceTable, no_local: NoLocal) {
        self.frontends.set(table.frontends.len() as i64);
        self.ports.set(table.services.len() as i64);
        self.no_local.with_label_values(&["internal"]).set(no_local.internal);
        self.no_local.with_label_values(&["external"]).set(no_local.external);
    }

    /// An answer to `/healthz`, or to `/livez`.
    pub(crate) fn health_answered(&self, is_healthz: bool, status: u16) {
        let counter = if is_healthz { &self.healthz } else { &self.livez };
        counter.with_label_values(&[if status == 200 { "200" } else { "503" }]).inc();
    }

    /// For Prometheus.
    pub(crate) fn encode(&self) -> String {
        TextEncoder::new().encode_to_string(&self.registry.gather()).unwrap_or_default()
    }
}

/// Service ports with a policy `Local` that this node can not serve.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct NoLocal {
    internal: i64,
    external: i64,
}

impl NoLocal {
    /// Counts `service` in, or with -1 out.
    pub(crate) fn count(&mut self, service: &Service, times: i64) {
        if service.has_endpoints && service.local.is_empty() {
            self.internal += times * i64::from(service.internal_local);
            self.external += times * i64::from(service.external_local);
        }
    }
}

/// A quarter and a half second, each second to a minute, every five to two minutes, then half minutes.
fn programming_buckets() -> Vec<f64> {
    let seconds = (1..60).chain((60..120).step_by(5)).chain((120..=300).step_by(30));
    [0.25, 0.5].into_iter().chain(seconds.map(f64::from)).collect()
}

fn now() -> f64 {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs_f64()
}

/// Makes and registers. Names and labels are constants of this file, so neither can fail; the test below
/// makes them all.
struct Maker<'a>(&'a Registry);

impl Maker<'_> {
    fn register<C: Collector + Clone + 'static>(&self, made: prometheus::Result<C>) -> C {
        let made = made.expect("names and labels are constants that the test makes");
        self.0.register(Box::new(made.clone())).expect("each name is there once");
        made
    }

    fn histogram(&self, name: &str, help: &str, buckets: Vec<f64>) -> Histogram {
        self.register(Histogram::with_opts(HistogramOpts::new(name, help).buckets(buckets)))
    }

    fn seconds(&self, name: &str, help: &str) -> Gauge {
        self.register(Gauge::new(name, help))
    }

    fn gauge(&self, name: &str, help: &str) -> IntGauge {
        self.register(IntGauge::new(name, help))
    }

    fn counter(&self, name: &str, help: &str) -> IntCounter {
        self.register(IntCounter::new(name, help))
    }

    fn gauges(&self, name: &str, help: &str, label: &str) -> IntGaugeVec {
        self.register(IntGaugeVec::new(Opts::new(name, help), &[label]))
    }

    fn counters(&self, name: &str, help: &str, label: &str) -> IntCounterVec {
        self.register(IntCounterVec::new(Opts::new(name, help), &[label]))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_of_kube_proxy() {
        let metrics = Metrics::new();
        metrics.services.came(3);
        metrics.endpoints.came(2);
        metrics.queued();
        metrics.health_answered(true, 503);
        metrics.health_answered(false, 200);
        metrics.programmed(Duration::from_millis(300));
        let mut no_local = NoLocal::default();
        let local = Service { internal_local: true, has_endpoints: true, ..Service::default() };
        no_local.count(&local, 1);
        metrics.set_table(&ServiceTable::default(), no_local);
        let text = metrics.encode();
        for line in [
            "kubeproxy_sync_proxy_rules_service_changes_pending 3",
            "kubeproxy_sync_proxy_rules_service_changes_total 3",
            "kubeproxy_sync_proxy_rules_endpoint_changes_pending 2",
            "kubeproxy_proxy_healthz_total{code=\"503\"} 1",
            "kubeproxy_proxy_livez_total{code=\"200\"} 1",
            "kubeproxy_network_programming_duration_seconds_bucket{le=\"0.25\"} 0",
            "kubeproxy_network_programming_duration_seconds_bucket{le=\"0.5\"} 1",
            "kubeproxy_network_programming_duration_seconds_bucket{le=\"300\"} 1",
            "kubeproxy_sync_proxy_rules_no_local_endpoints_total{traffic_policy=\"internal\"} 1",
            "kubeproxy_sync_proxy_rules_no_local_endpoints_total{traffic_policy=\"external\"} 0",
            "kubeproxy_sync_proxy_rules_last_timestamp_seconds 0",
        ] {
            assert!(text.lines().any(|one| one == line), "{line} is not in\n{text}");
        }
        metrics.synced(Duration::from_micros(800), true, 1, 2);
        assert!(metrics.encode().contains("service_changes_pending 3\n"), "not all of it is live");
        metrics.synced(Duration::from_micros(200), false, 0, 0);
        no_local.count(&local, -1);
        metrics.set_table(&ServiceTable::default(), no_local);
        let text = metrics.encode();
        for line in [
            "kubeproxy_sync_proxy_rules_service_changes_pending 0",
            "kubeproxy_sync_full_proxy_rules_duration_seconds_count 1",
            "kubeproxy_sync_partial_proxy_rules_duration_seconds_count 1",
            "kubeproxy_sync_proxy_rules_duration_seconds_bucket{le=\"0.001\"} 2",
            "kubeproxy_sync_proxy_rules_no_local_endpoints_total{traffic_policy=\"internal\"} 0",
            "lockgate_service_write_failures_total 2",
        ] {
            assert!(text.lines().any(|one| one == line), "{line} is not in\n{text}");
        }
    }
}
