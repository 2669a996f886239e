//! Whether the service plane keeps up: `/healthz` and `/livez` as kube-proxy answers them.

use std::collections::BTreeMap;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use hyper::StatusCode;
use k8s_openapi::jiff::Timestamp;
use serde::Serialize;

use super::metrics::Metrics;
use crate::http::{Answer, Reply};

/// When changes came and when they were live.
pub(crate) struct Health {
    /// A change that is not live after this long is too late.
    timeout: Duration,
    times: Mutex<Times>,
}

struct Times {
    updated: Timestamp,
    /// The oldest change that is not live.
    queued: Option<Timestamp>,
    /// The Node is neither being deleted nor about to be.
    eligible: bool,
}

/// The body of an answer. kube-proxy has a proxier for each family; here both are one.
#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct Body {
    last_updated: Timestamp,
    current_time: Timestamp,
    #[serde(skip_serializing_if = "Option::is_none")]
    node_eligible: Option<bool>,
    healthy: bool,
    status: BTreeMap<&'static str, OfFamily>,
}

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct OfFamily {
    last_updated: Timestamp,
    healthy: bool,
}

impl Health {
    /// Healthy, though nothing is live yet.
    pub(crate) fn new(timeout: Duration) -> Health {
        let times = Times { updated: now(), queued: None, eligible: true };
        Health { timeout, times: Mutex::new(times) }
    }

    fn times(&self) -> MutexGuard<'_, Times> {
        self.times.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// There is something to be made live.
    pub(crate) fn queued(&self) {
        let mut times = self.times();
        times.queued.get_or_insert_with(now);
    }

    /// Everything is live.
    pub(crate) fn updated(&self) {
        let mut times = self.times();
        (times.updated, times.queued) = (now(), None);
    }

    /// Whether load balancers may send to this node, as far as its Node object tells.
    pub(crate) fn set_eligible(&self, eligible: bool) {
        self.times().eligible = eligible;
    }

    /// Whether the service plane keeps up, whatever becomes of the node.
    pub(crate) fn is_healthy(&self) -> bool {
        self.is_in_time(&self.times(), now())
    }

    fn is_in_time(&self, times: &Times, now: Timestamp) -> bool {
        let late = |queued: Timestamp| now.duration_since(queued).unsigned_abs() >= self.timeout;
        !times.queued.is_some_and(late)
    }

    fn body(&self, with_node: bool) -> (bool, Body) {
        let now = now();
        let times = self.times();
        let healthy = self.is_in_time(&times, now);
        let ok = healthy && (!with_node || times.eligible);
        let families =
            ["IPv4", "IPv6"].map(|family| (family, OfFamily { last_updated: times.updated, healthy }));
        let body = Body {
            // kube-proxy says so for those who look how old it is.
            last_updated: if ok { now } else { times.updated },
            current_time: now,
            node_eligible: with_node.then_some(times.eligible),
            healthy,
            status: families.into(),
        };
        (ok, body)
    }

    /// Answers `path`, and counts it.
    pub(crate) fn answer(&self, path: &str, metrics: &Metrics) -> Reply {
        let with_node = match path {
            "/healthz" => true,
            "/livez" => false,
            _ => return Answer::text(StatusCode::NOT_FOUND, "404 page not found\n").into(),
        };
        let (ok, body) = self.body(with_node);
        let status = if ok { StatusCode::OK } else { StatusCode::SERVICE_UNAVAILABLE };
        metrics.health_answered(with_node, status.as_u16());
        match serde_json::to_string(&body) {
            Ok(json) => Answer::json(status, json).header("X-Content-Type-Options", "nosniff").into(),
            Err(error) => Answer::text(StatusCode::INTERNAL_SERVER_ERROR, &format!("{error}\n")).into(),
        }
    }
}

fn now() -> Timestamp {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    // Out of range in about 8,000 years.
    Timestamp::from_microsecond(since.as_micros() as i64).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::http::parts;

    fn ask(health: &Health, path: &str) -> (u16, serde_json::Value) {
        let (status, text) = parts(health.answer(path, &Metrics::new()));
        (status, serde_json::from_str(&text).unwrap())
    }

    /// Scenario 49.
    #[test]
    fn what_makes_it_fail() {
        let health = Health::new(Duration::from_secs(60));
        let (status, body) = ask(&health, "/healthz");
        assert_eq!((status, &body["nodeEligible"], &body["healthy"]), (200, &true.into(), &true.into()));
        assert_eq!(body["lastUpdated"], body["currentTime"]);
        assert!(body["status"]["IPv6"]["lastUpdated"].as_str().unwrap().ends_with('Z'));
        let (status, body) = ask(&health, "/livez");
        assert_eq!((status, body.get("nodeEligible")), (200, None));

        health.set_eligible(false);
        let (status, body) = ask(&health, "/healthz");
        assert_eq!((status, &body["nodeEligible"], &body["healthy"]), (503, &false.into(), &true.into()));
        assert_eq!(ask(&health, "/livez").0, 200, "the node's state is not looked at");
        health.set_eligible(true);

        health.queued();
        assert_eq!((ask(&health, "/healthz").0, ask(&health, "/livez").0), (200, 200), "not late yet");
        let late = Health::new(Duration::ZERO);
        late.queued();
        let (status, body) = ask(&late, "/livez");
        assert_eq!(
            (status, &body["healthy"], &body["status"]["IPv4"]["healthy"]),
            (503, &false.into(), &false.into())
        );
        assert!(!late.is_healthy() && ask(&late, "/healthz").0 == 503);
        late.updated();
        assert!(late.is_healthy() && ask(&late, "/healthz").0 == 200);
    }
}
