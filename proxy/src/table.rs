//! The desired routing state: plain data, comparable, serialisable, without a
//! single handle to anything live.
//!
//! Every map is persistent (`imbl::OrdMap`): a publish that changes one host
//! shares all others with its predecessor, and the difference between two
//! tables costs what changed, not what exists.

use std::fmt;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use imbl::OrdMap;
use ipnet::IpNet;
use serde::Serialize;

use crate::certificate::Certificate;
use crate::proxy_protocol;
use crate::resilience::Resilience;

mod edits;
mod steering;

pub use edits::{Authority, FieldEdit, FieldEdits, FieldName, FieldValue, HeaderEdits, Persistence};
pub use steering::{
    Affinity, HashBy, HealthCheck, KeyPart, NamingKey, Probe, SameSite, Session, Steering, Variable,
};

/// Everything the proxy should serve. Made by the controller, compiled by
/// [`crate::Router`].
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct RoutingTable {
    /// Rules by host pattern. A host that is found but has no rule for a path
    /// answers 404; it does not fall back to a less precise host.
    pub hosts: OrdMap<HostPattern, Arc<Host>>,
    /// Endpoints by the key that rules name. A key without an entry answers 503.
    pub pools: OrdMap<PoolKey, Arc<Pool>>,
    /// Hosts whose TLS is passed to an endpoint unopened, by the name in the
    /// handshake. An exact host of `hosts` is more precise than a wildcard here.
    #[serde(skip_serializing_if = "OrdMap::is_empty")]
    pub passthrough: OrdMap<HostPattern, Arc<Passthrough>>,
    /// Certificates by host pattern, at most one per key algorithm.
    pub certificates: OrdMap<HostPattern, Arc<Vec<Arc<Certificate>>>>,
    /// For a client whose SNI matches nothing. `None`: a self-signed one made at start.
    pub default_certificate: Option<Arc<Certificate>>,
    /// What is changed in heads where no rule says anything of its own.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub edits: Option<Arc<HeaderEdits>>,
    /// TCP and UDP ports that are relayed as they are. They open and close as the table says.
    #[serde(skip_serializing_if = "OrdMap::is_empty")]
    pub listeners: OrdMap<ListenerKey, Arc<L4Listener>>,
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
    /// What is changed in heads, [`RoutingTable::edits`] included; `None`: only those.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub edits: Option<Arc<HeaderEdits>>,
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
    /// What of a request names its endpoint; `None`: [`Pool::balance`] chooses.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub steering: Option<Arc<Steering>>,
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
    /// What each client may do at most.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub per_client: Option<Arc<ClientLimits>>,
}

impl RuleLimits {
    fn is_default(&self) -> bool {
        *self == RuleLimits::default()
    }
}

/// Where the TLS of a host goes unopened.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Passthrough {
    /// Where its endpoints are. What they speak is theirs and the client's to know.
    pub pool: PoolKey,
    /// Who asked for it.
    pub origin: Arc<Origin>,
    /// Until a connection to an endpoint is established; `None` takes the process-wide value.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub connect_timeout: Option<Duration>,
    /// Tell the endpoint by a PROXY header who the client is.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub proxy_protocol: Option<proxy_protocol::Version>,
}

/// What each client may do at most; IPv6 clients are /64s. Answered with
/// [`crate::config::Limits::rate_status`] and
/// [`crate::config::Limits::requests_status`] beyond.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct ClientLimits {
    /// Names the accounts: rules with the same zone share them.
    pub zone: Arc<str>,
    /// Requests under way at the same time, tunnels included.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub requests: Option<u32>,
    /// All of them hold, in this order, behind `requests`: what one refuses is not charged
    /// to those behind it.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub rates: Vec<Rate>,
    /// Clients that are not limited.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub exempt: Vec<IpNet>,
}

/// So many requests in a time.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct Rate {
    /// At least 1.
    pub requests: u32,
    /// In this time.
    pub per: Duration,
    /// How many may come before their time.
    pub burst: u32,
}

impl Rate {
    /// Nanoseconds from one request to the next.
    pub(crate) fn interval_ns(&self) -> u64 {
        self.per.as_nanos() as u64 / u64::from(self.requests.max(1))
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
    /// Set if some backend has [`Backend::steering`]: what session cookies
    /// name endpoints with.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub seating: Option<NamingKey>,
    /// Endpoints of the proxy's own zone first, as long as they are not too
    /// few for their zone's part of the requests.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub prefer_zone: bool,
    /// A new or recovered endpoint comes to its full share over this time,
    /// from a tenth of it. `None`: at once.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub slow_start: Option<Duration>,
    /// How its endpoints are probed. `None`: they are not.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub check: Option<Arc<HealthCheck>>,
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
    /// Whatever the client speaks, over TCP: only for [`L4Listener::pool`].
    Tcp,
    /// Datagrams: only for [`L4Listener::pool`].
    Udp,
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
    /// The better of two taken at random: latency, as a decaying average that
    /// follows peaks at once, times requests in flight over weight
    /// (ingress-nginx's `ewma`, with a decay of 10 s).
    Ewma,
    /// The least loaded of all (in flight over weight): for pools that carry
    /// few, long connections, as TCP does. Costs a look at every endpoint.
    LeastConnections,
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

/// What an L4 listener listens on; as text `tcp/0.0.0.0:9000`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ListenerKey {
    /// TCP or UDP: a port of one has nothing to do with the same port of the other.
    pub transport: Transport,
    /// Unspecified (`0.0.0.0`, `[::]`) for every address of the host. Port 0 takes a free one.
    pub address: SocketAddr,
}

impl fmt::Display for ListenerKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.transport.as_str(), self.address)
    }
}

impl Serialize for ListenerKey {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

/// What carries the bytes of an L4 listener.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Transport {
    /// Connections.
    Tcp,
    /// Datagrams.
    Udp,
}

impl Transport {
    /// `tcp` or `udp`.
    pub fn as_str(self) -> &'static str {
        match self {
            Transport::Tcp => "tcp",
            Transport::Udp => "udp",
        }
    }
}

/// Where the connections or flows of one port go.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct L4Listener {
    /// Its endpoints. Without any, connections are reset and datagrams dropped.
    pub pool: PoolKey,
    /// Who asked for it.
    pub origin: Arc<Origin>,
    /// Whether the client's address travels in front of the bytes; of TCP only.
    #[serde(skip_serializing_if = "ProxyProtocol::is_off")]
    pub proxy_protocol: ProxyProtocol,
    /// A connection or flow on which nobody speaks ends after this long; `None`: the process-wide value.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub idle_timeout: Option<Duration>,
    /// Datagrams expected in response to each one of a client, of UDP; `None`: the process-wide value.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub responses: Option<u32>,
}

/// The PROXY protocol at an L4 listener.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct ProxyProtocol {
    /// Every connection begins with a header that says who the client is.
    pub accept: bool,
    /// Every connection to an endpoint does, in this version.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub send: Option<proxy_protocol::Version>,
}

impl ProxyProtocol {
    fn is_off(&self) -> bool {
        *self == ProxyProtocol::default()
    }
}
