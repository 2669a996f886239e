//! The desired routing state: plain data, comparable, serialisable, without a
//! single handle to anything live.
//!
//! Every map is persistent (`imbl::OrdMap`): a publish that changes one host
//! shares all others with its predecessor, and the difference between two
//! tables costs what changed, not what exists.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use imbl::OrdMap;
use serde::Serialize;

use crate::certificate::Certificate;
use crate::resilience::Resilience;

/// Everything the proxy should serve. Made by the controller, compiled by
/// [`crate::Router`].
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct RoutingTable {
    /// Rules by host pattern. A host that is found but has no rule for a path
    /// answers 404; it does not fall back to a less precise host.
    pub hosts: OrdMap<HostPattern, Arc<Host>>,
    /// Endpoints by the key that rules name. A key without an entry answers 503.
    pub pools: OrdMap<PoolKey, Arc<Pool>>,
    /// Certificates by host pattern, at most one per key algorithm.
    pub certificates: OrdMap<HostPattern, Arc<Vec<Arc<Certificate>>>>,
    /// For a client whose SNI matches nothing. `None`: a self-signed one made at start.
    pub default_certificate: Option<Arc<Certificate>>,
}

/// A host as written in a rule, lower case, without port: `shop.example`,
/// `*.shop.example` (exactly one more label), or empty for any host.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize)]
#[serde(transparent)]
pub struct HostPattern(Arc<str>);

impl HostPattern {
    /// Lower-cases `pattern` and drops one trailing dot.
    pub fn new(pattern: &str) -> HostPattern {
        let pattern = pattern.strip_suffix('.').unwrap_or(pattern);
        HostPattern(pattern.to_ascii_lowercase().into())
    }

    /// The pattern that matches every host.
    pub fn any() -> HostPattern {
        HostPattern("".into())
    }

    /// The pattern as text.
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// Whether this is `*.` and a suffix.
    pub fn is_wildcard(&self) -> bool {
        self.0.starts_with("*.")
    }
}

/// The rules of one host.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Host {
    /// At most one per [`PathMatch`]; their order does not matter.
    pub rules: Vec<Rule>,
}

/// What happens to requests whose path matches.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Rule {
    /// Which paths.
    pub path: PathMatch,
    /// Who asked for it, for logs, metrics and `explain`.
    pub origin: Arc<Origin>,
    /// A plaintext request is answered 308 to the same URL on https, except
    /// below `/.well-known/acme-challenge/`.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub https_redirect: bool,
    /// What is done.
    pub action: Action,
    /// Deadlines and limits, where they differ from the process-wide ones.
    #[serde(skip_serializing_if = "RuleLimits::is_default")]
    pub limits: RuleLimits,
}

/// Which paths a rule matches, on the percent-decoded path with dot segments
/// resolved and slashes merged. Exact wins over the others, then the longest.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum PathMatch {
    /// The whole path, byte for byte.
    Exact(Arc<str>),
    /// Whole path elements: `/a` matches `/a`, `/a/` and `/a/b`, not `/ab`.
    Prefix(Arc<str>),
    /// Bytes: `/a` also matches `/ab` (what ingress-nginx makes of
    /// `ImplementationSpecific`).
    StringPrefix(Arc<str>),
}

impl PathMatch {
    /// The path as written.
    pub fn as_str(&self) -> &str {
        match self {
            PathMatch::Exact(p) | PathMatch::Prefix(p) | PathMatch::StringPrefix(p) => p,
        }
    }
}

/// The object a rule came from.
#[derive(Clone, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize)]
pub struct Origin {
    /// Its kind, as `Ingress`.
    pub kind: &'static str,
    /// Its namespace.
    pub namespace: Arc<str>,
    /// Its name.
    pub name: Arc<str>,
}

/// What a rule does with a request.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Action {
    /// Send it to an endpoint of one of the backends.
    Forward(Split),
    /// Answer with this status and an empty body. 503 closes a route whose
    /// protection is not implemented.
    Respond {
        /// The HTTP status.
        status: u16,
        /// Why, for the access log and `explain`.
        reason: Arc<str>,
    },
}

/// How requests of one rule are divided among its backends.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Split {
    /// The first is the primary: it takes what the canaries do not, and what
    /// a canary without endpoints cannot. Never empty, at most 256.
    pub backends: Vec<Backend>,
    /// Header and cookie rules, asked in this order before the weights.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub overrides: Vec<Override>,
    /// Keep one user on one backend. `None`: every request is divided anew, exactly.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub sticky: Option<Sticky>,
}

/// One weighted target.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Backend {
    /// Where its endpoints are.
    pub pool: PoolKey,
    /// Its share is `weight` of the sum of all weights. All zero: the primary takes everything.
    pub weight: u32,
    /// The canary this backend is, by object name; empty for the primary.
    #[serde(skip_serializing_if = "str::is_empty")]
    pub canary: Arc<str>,
}

/// A request property that decides before the weights do.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Override {
    /// Index into [`Split::backends`] of the canary this belongs to.
    pub backend: usize,
    /// The property.
    pub when: When,
}

/// ingress-nginx's canary conditions (reference: its `balancer.lua`).
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum When {
    /// `always` takes the canary, `never` excludes it, anything else says nothing.
    Header(Arc<str>),
    /// Exactly this value takes the canary.
    HeaderValue(Arc<str>, Arc<str>),
    /// A value the regular expression is found in takes the canary. The text
    /// was compiled once by the translator, so it is valid.
    HeaderPattern(Arc<str>, Arc<str>),
    /// As `Header`, on a cookie.
    Cookie(Arc<str>),
}

/// What identifies a user for a sticky split.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Sticky {
    /// A cookie of this name, set on the first response: one of 10,000 buckets.
    Cookie(Arc<str>),
    /// The value of a request header; a request without it is divided by weight.
    Header(Arc<str>),
    /// The client's address.
    Address,
}

/// Deadlines and limits of one rule; `None` takes the process-wide value.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct RuleLimits {
    /// Until a connection to an endpoint is established.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub connect_timeout: Option<Duration>,
    /// Between two successful writes to the endpoint.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub send_timeout: Option<Duration>,
    /// Between two successful reads from the endpoint.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub read_timeout: Option<Duration>,
    /// Largest request body in bytes, answered 413 beyond; `Some(0)` is no limit.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub max_body: Option<u64>,
    /// The whole request's deadline, retries, hedging, circuit breaking. Apart,
    /// as few rules have any of it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub resilience: Option<Arc<Resilience>>,
}

impl RuleLimits {
    fn is_default(&self) -> bool {
        *self == RuleLimits::default()
    }
}

/// Names a pool: `namespace/service:port`, with `#protocol` behind it when a
/// rule overrides the Service's own application protocol.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize)]
#[serde(transparent)]
pub struct PoolKey(pub Arc<str>);

/// The endpoints behind one Service port.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Pool {
    /// What the endpoints speak.
    pub protocol: UpstreamProtocol,
    /// How one of them is chosen.
    pub balance: Balance,
    /// Those that may receive new requests, sorted by address, each once.
    pub endpoints: Vec<Endpoint>,
}

/// What an endpoint speaks.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum UpstreamProtocol {
    /// HTTP/1.1 in the clear.
    #[default]
    Http1,
    /// HTTP/2 in the clear, by prior knowledge (`kubernetes.io/h2c`, gRPC).
    H2c,
    /// TLS, HTTP/1.1 inside. The certificate is not verified, as in ingress-nginx.
    Https,
    /// TLS, HTTP/2 by ALPN.
    H2,
}

/// How an endpoint is chosen.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Balance {
    /// In turn, by weight.
    #[default]
    RoundRobin,
    /// The less loaded of two taken at random (requests in flight over weight).
    LeastRequest,
}

/// One address that serves.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
pub struct Endpoint {
    /// Where it listens.
    pub address: SocketAddr,
    /// Its share among its pool's endpoints, at least 1.
    pub weight: u16,
    /// `topology.kubernetes.io/zone` of its node.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub zone: Option<Arc<str>>,
}
