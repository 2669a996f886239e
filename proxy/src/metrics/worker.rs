//! Counters of one worker, and the table that names them for a scrape.

use std::sync::Arc;

use prometheus::proto::{MetricFamily, MetricType};

use super::{Counter, Gauge, counter, family, gauge, label};

/// What one worker counts. It is the only writer; 128 bytes keep it off the
/// lines (and the line pairs the prefetcher fetches) of its neighbours.
#[derive(Debug, Default)]
#[repr(align(128))]
pub struct WorkerMetrics {
    /// Downstream connections on plain listeners.
    pub http: ConnectionMetrics,
    /// Downstream connections on TLS listeners.
    pub https: ConnectionMetrics,

    /// Connections closed for want of a good PROXY header in time.
    pub proxy_headers_refused: Counter,
    /// Connections closed because their client's address holds too many.
    pub address_limited: Counter,
    /// Connections passed through for which no endpoint could be reached.
    pub passthrough_failed: Counter,

    /// Full TLS handshakes that succeeded.
    pub handshakes_ok: Counter,
    /// TLS handshakes that succeeded by resuming a session.
    pub handshakes_resumed: Counter,
    /// TLS handshakes that failed or ran into their deadline.
    pub handshakes_failed: Counter,

    /// Answers by status class, 1xx (only 101) to 5xx; see [`WorkerMetrics::answered`].
    pub answers: [Counter; 5],
    /// Requests whose head was accepted and whose answer is not complete.
    pub requests_in_flight: Gauge,
    /// Requests answered by the proxy itself, see [`WorkerMetrics::rejected`].
    rejects: [Counter; Reject::ALL.len()],
    /// HTTP/2 clients that went too far, see [`WorkerMetrics::breached`].
    breaches: [Counter; Breach::ALL.len()],
    /// Bytes of request bodies read from clients.
    pub bytes_in: Counter,
    /// Bytes of response bodies written to clients.
    pub bytes_out: Counter,

    /// Connections to endpoints that were established.
    pub upstream_opened: Counter,
    /// Connections to endpoints that could not be established in time.
    pub upstream_failed: Counter,
    /// Requests sent on a pooled connection.
    pub upstream_reused: Counter,
    /// Connections to endpoints open now, in use or pooled.
    pub upstream_open: Gauge,
    /// Requests sent once more, to the same or another endpoint.
    pub retries: Counter,
    /// Times a request was not sent once more because the retry budget was used up.
    pub budget_exhausted: Counter,
    /// Second copies sent of requests that took long.
    pub hedges: Counter,
    /// Of those, the ones that answered first.
    pub hedges_won: Counter,
    /// Times an endpoint was taken out of balancing for failing.
    pub ejections: Counter,
    /// Times one was for how it answered, see [`WorkerMetrics::ejected`].
    outliers: [Counter; Outlier::ALL.len()],
    /// Times a full endpoint was passed over, see [`WorkerMetrics::passed_over`].
    full: [Counter; Limit::ALL.len()],

    /// Connections that switched protocols (WebSocket and other upgrades, CONNECT).
    pub upgrades: Counter,
    /// Such tunnels open now.
    pub tunnels_open: Gauge,

    /// Access log lines lost because their destination was too slow or failed.
    pub log_lines_dropped: Counter,
}

impl WorkerMetrics {
    /// The connections of plain or TLS listeners.
    pub fn listener(&self, tls: bool) -> &ConnectionMetrics {
        if tls { &self.https } else { &self.http }
    }

    /// Counts an answer by its class. Interim 1xx answers are not to be counted, 101 is.
    pub fn answered(&self, status: u16) {
        self.answers[class(status)].inc();
    }

    /// Counts a request the proxy answered itself, besides [`WorkerMetrics::answered`].
    pub fn rejected(&self, reason: Reject) {
        self.rejects[reason as usize].inc();
    }

    /// Counts an endpoint taken out of balancing for how it answers.
    pub fn ejected(&self, why: Outlier) {
        self.outliers[why as usize].inc();
    }

    /// Counts an endpoint that was not asked because it has enough to do.
    pub fn passed_over(&self, limit: Limit) {
        self.full[limit as usize].inc();
    }

    /// Counts an HTTP/2 connection or stream that was ended for what its client did.
    pub fn breached(&self, breach: Breach) {
        self.breaches[breach as usize].inc();
    }

    /// Connections and streams ended for `breach` so far.
    pub fn breaches(&self, breach: Breach) -> u64 {
        self.breaches[breach as usize].value()
    }

    /// Requests rejected for `reason` so far.
    pub fn rejects(&self, reason: Reject) -> u64 {
        self.rejects[reason as usize].value()
    }
}

/// What made us end an HTTP/2 connection, or a stream.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Breach {
    /// Streams opened and reset, over and over (CVE-2023-44487).
    Resets,
    /// Frames that carry nothing (CVE-2019-9512, -9513, -9515).
    ControlFrames,
    /// More than the protocol library puts up with: resets it was made to send
    /// (CVE-2025-8671), resets before a stream was looked at, CONTINUATION
    /// frames (CVE-2024-27316), bodies in crumbs (CVE-2019-9518).
    Excess,
    /// Any other violation of the protocol.
    Protocol,
    /// A stream on which the client took nothing in time (CVE-2019-9511, -9517).
    Stalled,
}

impl Breach {
    /// Every breach, in the order of its number.
    pub const ALL: [Breach; 5] =
        [Breach::Resets, Breach::ControlFrames, Breach::Excess, Breach::Protocol, Breach::Stalled];

    /// The breach as metrics show it.
    pub const fn as_str(self) -> &'static str {
        match self {
            Breach::Resets => "resets",
            Breach::ControlFrames => "control_frames",
            Breach::Excess => "excess",
            Breach::Protocol => "protocol",
            Breach::Stalled => "stalled",
        }
    }
}

/// Downstream connections of one kind of listener.
#[derive(Debug, Default)]
pub struct ConnectionMetrics {
    /// Accepted so far.
    pub accepted: Counter,
    /// Open, protocol not yet known: in the TLS handshake, or before the first bytes.
    pub pending: Gauge,
    /// Those that speak HTTP/1.
    pub http1: ProtocolMetrics,
    /// Those that speak HTTP/2.
    pub http2: ProtocolMetrics,
    /// Those whose TLS ends at an endpoint.
    pub passthrough: ProtocolMetrics,
}

impl ConnectionMetrics {
    /// Those that speak `protocol`.
    pub fn protocol(&self, protocol: Protocol) -> &ProtocolMetrics {
        match protocol {
            Protocol::Http1 => &self.http1,
            Protocol::Http2 => &self.http2,
            Protocol::Passthrough => &self.passthrough,
        }
    }
}

/// What a downstream connection speaks, as far as it is ours to know.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Protocol {
    /// HTTP/1.
    Http1,
    /// HTTP/2.
    Http2,
    /// TLS that ends at an endpoint.
    Passthrough,
}

/// Downstream connections of one protocol.
#[derive(Debug, Default)]
pub struct ProtocolMetrics {
    /// Those whose protocol became known so far.
    pub total: Counter,
    /// Open now.
    pub open: Gauge,
}

/// Why a request was answered by the proxy itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Reject {
    /// Malformed or ambiguous message (400).
    BadRequest,
    /// The header did not arrive in time (408).
    HeaderTimeout,
    /// Too many header bytes or fields (431).
    HeaderTooLarge,
    /// The request target is too long (414).
    UriTooLong,
    /// The body is larger than the rule allows (413).
    BodyTooLarge,
    /// The connection's certificate does not cover the host (421).
    Misdirected,
    /// No rule for host and path (404).
    NoRoute,
    /// No endpoint to send it to (503).
    NoEndpoint,
    /// Every endpoint has enough to do (503).
    EndpointsFull,
    /// The client sends faster than the rule allows (503, or as configured).
    RateLimited,
    /// The client has as many requests under way as the rule allows (503, or as configured).
    TooManyRequests,
}

impl Reject {
    /// Every reason, in the order of its number.
    pub const ALL: [Reject; 11] = [
        Reject::BadRequest,
        Reject::HeaderTimeout,
        Reject::HeaderTooLarge,
        Reject::UriTooLong,
        Reject::BodyTooLarge,
        Reject::Misdirected,
        Reject::NoRoute,
        Reject::NoEndpoint,
        Reject::EndpointsFull,
        Reject::RateLimited,
        Reject::TooManyRequests,
    ];

    /// The reason as metrics and the access log show it.
    pub const fn as_str(self) -> &'static str {
        match self {
            Reject::BadRequest => "bad_request",
            Reject::HeaderTimeout => "header_timeout",
            Reject::HeaderTooLarge => "header_too_large",
            Reject::UriTooLong => "uri_too_long",
            Reject::BodyTooLarge => "body_too_large",
            Reject::Misdirected => "misdirected",
            Reject::NoRoute => "no_route",
            Reject::NoEndpoint => "no_endpoint",
            Reject::EndpointsFull => "endpoints_full",
            Reject::RateLimited => "rate_limited",
            Reject::TooManyRequests => "too_many_requests",
        }
    }
}

/// What about its answers took an endpoint out of balancing.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Outlier {
    /// Answers of 502, 503 or 504 in a row.
    GatewayErrors,
    /// Fewer good answers than its neighbours.
    SuccessRate,
    /// Later answers than its neighbours.
    Latency,
}

impl Outlier {
    /// All of them, in the order of their numbers.
    pub const ALL: [Outlier; 3] = [Outlier::GatewayErrors, Outlier::SuccessRate, Outlier::Latency];

    /// As metrics and logs show it.
    pub const fn as_str(self) -> &'static str {
        match self {
            Outlier::GatewayErrors => "gateway_errors",
            Outlier::SuccessRate => "success_rate",
            Outlier::Latency => "latency",
        }
    }
}

/// What an endpoint had enough of ([`crate::resilience::Breaker`]).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Limit {
    /// Connections.
    Connections,
    /// Requests that wait for one.
    Pending,
    /// Requests under way.
    Requests,
}

impl Limit {
    /// All of them, in the order of their numbers.
    pub const ALL: [Limit; 3] = [Limit::Connections, Limit::Pending, Limit::Requests];

    /// As metrics show it.
    pub const fn as_str(self) -> &'static str {
        match self {
            Limit::Connections => "connections",
            Limit::Pending => "pending",
            Limit::Requests => "requests",
        }
    }
}

/// Status classes, as label values.
pub(super) const CLASSES: [&str; 5] = ["1xx", "2xx", "3xx", "4xx", "5xx"];

/// Index into [`CLASSES`]. A status outside 100..=599 counts to the nearer end.
pub(super) fn class(status: u16) -> usize {
    usize::from(status / 100).clamp(1, 5) - 1
}

/// One series of a family: its label values, in the order of the family's names, and where its value is.
type Series = (&'static [&'static str], fn(&WorkerMetrics) -> Value);

#[derive(Clone, Copy)]
enum Value {
    Counter(u64),
    Gauge(i64),
}

struct Family {
    name: &'static str,
    help: &'static str,
    labels: &'static [&'static str],
    series: &'static [Series],
}

/// `count!(a.b)` reads the counter at field `a.b`, `level!` the gauge.
macro_rules! count {
    ($($field:tt)+) => { |w| Value::Counter(w.$($field)+.value()) };
}
macro_rules! level {
    ($($field:tt)+) => { |w| Value::Gauge(w.$($field)+.value()) };
}
macro_rules! one_of {
    ($kind:ident::$which:ident in $field:ident) => {
        (&[$kind::$which.as_str()], |w| Value::Counter(w.$field[$kind::$which as usize].value()))
    };
}
macro_rules! reject {
    ($reason:ident) => {
        (&[Reject::$reason.as_str()], |w| Value::Counter(w.rejects(Reject::$reason)))
    };
}

macro_rules! breach {
    ($breach:ident) => {
        (&[Breach::$breach.as_str()], |w| Value::Counter(w.breaches(Breach::$breach)))
    };
}

const FAMILIES: &[Family] = &[
    Family {
        name: "lockgate_connections_accepted_total",
        help: "Downstream connections accepted.",
        labels: &["listener"],
        series: &[(&["http"], count!(http.accepted)), (&["https"], count!(https.accepted))],
    },
    Family {
        name: "lockgate_connections_total",
        help: "Downstream connections whose protocol became known.",
        labels: &["listener", "protocol"],
        series: &[
            (&["http", "http1"], count!(http.http1.total)),
            (&["http", "http2"], count!(http.http2.total)),
            (&["https", "http1"], count!(https.http1.total)),
            (&["https", "http2"], count!(https.http2.total)),
            (&["https", "passthrough"], count!(https.passthrough.total)),
        ],
    },
    Family {
        name: "lockgate_connections_open",
        help: "Downstream connections open; pending ones have not shown their protocol yet.",
        labels: &["listener", "protocol"],
        series: &[
            (&["http", "pending"], level!(http.pending)),
            (&["http", "http1"], level!(http.http1.open)),
            (&["http", "http2"], level!(http.http2.open)),
            (&["https", "pending"], level!(https.pending)),
            (&["https", "http1"], level!(https.http1.open)),
            (&["https", "http2"], level!(https.http2.open)),
            (&["https", "passthrough"], level!(https.passthrough.open)),
        ],
    },
    Family {
        name: "lockgate_connections_refused_total",
        help: "Downstream connections closed before they were served, by reason.",
        labels: &["reason"],
        series: &[
            (&["proxy_header"], count!(proxy_headers_refused)),
            (&["address_limit"], count!(address_limited)),
            (&["passthrough"], count!(passthrough_failed)),
        ],
    },
    Family {
        name: "lockgate_tls_handshakes_total",
        help: "TLS handshakes with clients: full (ok), resumed and failed.",
        labels: &["result"],
        series: &[
            (&["ok"], count!(handshakes_ok)),
            (&["resumed"], count!(handshakes_resumed)),
            (&["failed"], count!(handshakes_failed)),
        ],
    },
    Family {
        name: "lockgate_requests_total",
        help: "Requests answered, by status class.",
        labels: &["code"],
        series: &[
            (&[CLASSES[0]], count!(answers[0])),
            (&[CLASSES[1]], count!(answers[1])),
            (&[CLASSES[2]], count!(answers[2])),
            (&[CLASSES[3]], count!(answers[3])),
            (&[CLASSES[4]], count!(answers[4])),
        ],
    },
    Family {
        name: "lockgate_requests_in_flight",
        help: "Requests accepted and not completely answered.",
        labels: &[],
        series: &[(&[], level!(requests_in_flight))],
    },
    Family {
        name: "lockgate_requests_rejected_total",
        help: "Requests the proxy answered itself, by reason.",
        labels: &["reason"],
        series: &[
            reject!(BadRequest),
            reject!(HeaderTimeout),
            reject!(HeaderTooLarge),
            reject!(UriTooLong),
            reject!(BodyTooLarge),
            reject!(Misdirected),
            reject!(NoRoute),
            reject!(NoEndpoint),
            reject!(EndpointsFull),
            reject!(RateLimited),
            reject!(TooManyRequests),
        ],
    },
    Family {
        name: "lockgate_http2_breaches_total",
        help: "HTTP/2 connections (stalled: streams) ended for what their client did, by reason.",
        labels: &["reason"],
        series: &[
            breach!(Resets),
            breach!(ControlFrames),
            breach!(Excess),
            breach!(Protocol),
            breach!(Stalled),
        ],
    },
    Family {
        name: "lockgate_request_body_bytes_total",
        help: "Bytes of request bodies read from clients.",
        labels: &[],
        series: &[(&[], count!(bytes_in))],
    },
    Family {
        name: "lockgate_response_body_bytes_total",
        help: "Bytes of response bodies written to clients.",
        labels: &[],
        series: &[(&[], count!(bytes_out))],
    },
    Family {
        name: "lockgate_upstream_connections_total",
        help: "Connections to endpoints: newly opened, failed to open, and pooled ones used again.",
        labels: &["result"],
        series: &[
            (&["opened"], count!(upstream_opened)),
            (&["failed"], count!(upstream_failed)),
            (&["reused"], count!(upstream_reused)),
        ],
    },
    Family {
        name: "lockgate_upstream_connections_open",
        help: "Connections to endpoints open, in use or pooled.",
        labels: &[],
        series: &[(&[], level!(upstream_open))],
    },
    Family {
        name: "lockgate_retries_total",
        help: "Requests sent once more.",
        labels: &[],
        series: &[(&[], count!(retries))],
    },
    Family {
        name: "lockgate_retry_budget_exhausted_total",
        help: "Requests not sent once more because the retry budget was used up.",
        labels: &[],
        series: &[(&[], count!(budget_exhausted))],
    },
    Family {
        name: "lockgate_hedges_total",
        help: "Second copies of requests that took long: sent, and those of them that answered first.",
        labels: &["result"],
        series: &[(&["sent"], count!(hedges)), (&["won"], count!(hedges_won))],
    },
    Family {
        name: "lockgate_endpoint_full_total",
        help: "Times an endpoint was not asked because it was at a limit.",
        labels: &["limit"],
        series: &[
            one_of!(Limit::Connections in full),
            one_of!(Limit::Pending in full),
            one_of!(Limit::Requests in full),
        ],
    },
    Family {
        name: "lockgate_outlier_ejections_total",
        help: "Times an endpoint was taken out of balancing for how it answers.",
        labels: &["reason"],
        series: &[
            one_of!(Outlier::GatewayErrors in outliers),
            one_of!(Outlier::SuccessRate in outliers),
            one_of!(Outlier::Latency in outliers),
        ],
    },
    Family {
        name: "lockgate_endpoint_ejections_total",
        help: "Times an endpoint was taken out of balancing for failing.",
        labels: &[],
        series: &[(&[], count!(ejections))],
    },
    Family {
        name: "lockgate_upgrades_total",
        help: "Connections that switched protocols.",
        labels: &[],
        series: &[(&[], count!(upgrades))],
    },
    Family {
        name: "lockgate_tunnels_open",
        help: "Upgraded connections open.",
        labels: &[],
        series: &[(&[], level!(tunnels_open))],
    },
    Family {
        name: "lockgate_access_log_dropped_lines_total",
        help: "Access log lines lost because their destination was too slow or failed.",
        labels: &[],
        series: &[(&[], count!(log_lines_dropped))],
    },
];

pub(super) fn described() -> impl Iterator<Item = (&'static str, &'static str, &'static [&'static str])> {
    FAMILIES.iter().map(|f| (f.name, f.help, f.labels))
}

/// Every family, each series summed over the workers.
pub(super) fn collect(workers: &[Arc<WorkerMetrics>]) -> Vec<MetricFamily> {
    let families = FAMILIES.iter().map(|f| {
        let mut kind = MetricType::COUNTER;
        let series = f.series.iter().map(|(values, read)| {
            let labels = f.labels.iter().zip(*values).map(|(name, value)| label(name, value)).collect();
            let (mut count, mut level) = (0u64, 0i64);
            for worker in workers {
                match read(worker) {
                    Value::Counter(n) => count = count.wrapping_add(n),
                    Value::Gauge(n) => {
                        kind = MetricType::GAUGE;
                        level += n;
                    }
                }
            }
            if kind == MetricType::GAUGE {
                gauge(labels, level as f64)
            } else {
                counter(labels, count as f64)
            }
        });
        let series = series.collect();
        family(f.name, f.help, kind, series)
    });
    families.collect()
}
