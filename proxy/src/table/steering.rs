//! What of a request names its endpoint, and how endpoints are probed.

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use serde::{Serialize, Serializer};

/// What of a request names its endpoint.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Steering {
    /// The same key, the same endpoint (ingress-nginx's `upstream-hash-by`).
    Hash(HashBy),
    /// A cookie that the first response sets (ingress-nginx's `affinity`).
    Session(Session),
}

/// Consistent hashing, on the ring that nginx's `hash ... consistent` makes of
/// the same addresses and weights.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct HashBy {
    /// The key: these parts, one after another.
    pub key: Vec<KeyPart>,
    /// A key belongs to so many endpoints, each request of it to one of them
    /// at random. 1 for a single endpoint; at most 64 count.
    #[serde(skip_serializing_if = "is_one")]
    pub subset: u16,
}

fn is_one(number: &u16) -> bool {
    *number == 1
}

/// A part of a hash key. Shown as nginx writes it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum KeyPart {
    /// These bytes.
    Text(Arc<str>),
    /// What the request has; nothing if it has none.
    Variable(Variable),
}

impl fmt::Display for KeyPart {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            KeyPart::Text(text) => f.write_str(text),
            KeyPart::Variable(variable) => write!(f, "${{{variable}}}"),
        }
    }
}

impl Serialize for KeyPart {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

/// A property of a request, by the name nginx has for it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Variable {
    /// `$request_uri`: path and query as sent.
    RequestUri,
    /// `$uri`: the path, percent-decoded and normalised.
    Uri,
    /// `$args`: the query as sent, without `?`.
    Args,
    /// `$is_args`: `?` if there is a query.
    IsArgs,
    /// `$arg_NAME`: the first argument of this name (its case does not count), as sent.
    Arg(Arc<str>),
    /// `$host`: lower case, without port.
    Host,
    /// `$scheme`: `http` or `https`, as the client came.
    Scheme,
    /// `$request_method`.
    Method,
    /// `$remote_addr`: the client, or whom a trusted peer names, as text.
    RemoteAddr,
    /// `$binary_remote_addr`: the same as 4 or 16 bytes.
    BinaryRemoteAddr,
    /// `$http_NAME`: the first header of this name (lower case, `-` for `_`).
    Header(Arc<str>),
    /// `$cookie_NAME`.
    Cookie(Arc<str>),
}

impl fmt::Display for Variable {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Variable::RequestUri => "request_uri",
            Variable::Uri => "uri",
            Variable::Args => "args",
            Variable::IsArgs => "is_args",
            Variable::Host => "host",
            Variable::Scheme => "scheme",
            Variable::Method => "request_method",
            Variable::RemoteAddr => "remote_addr",
            Variable::BinaryRemoteAddr => "binary_remote_addr",
            Variable::Arg(name) => return write!(f, "arg_{name}"),
            Variable::Cookie(name) => return write!(f, "cookie_{name}"),
            Variable::Header(name) => return write!(f, "http_{}", name.replace('-', "_")),
        })
    }
}

/// A session cookie.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Session {
    /// Name of the cookie: a token of RFC 9110.
    pub cookie: Arc<str>,
    /// What the cookie holds on to.
    pub affinity: Affinity,
    /// `Path`; `None`: that of the rule.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub path: Option<Arc<str>>,
    /// `Domain`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub domain: Option<Arc<str>>,
    /// `Expires`, in seconds from now.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub expires: Option<i64>,
    /// `Max-Age`, in seconds.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub max_age: Option<i64>,
    /// `SameSite`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub same_site: Option<SameSite>,
    /// No `SameSite=None` for browsers known to take it for `Strict`.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub conditional_none: bool,
    /// `Secure`; `None`: if the client came by https.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub secure: Option<bool>,
    /// `Partitioned`.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub partitioned: bool,
    /// When the endpoint is not available the session moves to the one that
    /// answers. Otherwise that one stands in for it, and the cookie stays.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub change_on_failure: bool,
    /// The cookie also holds on to the backend of a split that it came from,
    /// before any other rule is asked (`affinity-canary-behavior: sticky`).
    pub holds_backend: bool,
}

impl Session {
    /// A cookie with no attribute that was asked for, which holds on to its backend.
    pub fn new(cookie: &str, affinity: Affinity) -> Session {
        Session {
            cookie: cookie.into(),
            affinity,
            path: None,
            domain: None,
            expires: None,
            max_age: None,
            same_site: None,
            conditional_none: false,
            secure: None,
            partitioned: false,
            change_on_failure: false,
            holds_backend: true,
        }
    }
}

/// What a session cookie holds on to.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Affinity {
    /// A place on the ring: when endpoints come, they take their share of the sessions.
    #[default]
    Balanced,
    /// An endpoint, for as long as there is one of this address.
    Persistent,
}

/// `SameSite` of a cookie.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[allow(missing_docs)] // the variants are their names
pub enum SameSite {
    None,
    Lax,
    Strict,
}

/// What session cookies name endpoints with: whoever does not know it cannot
/// tell an address by its name. Not shown in `Debug` or `/debug/routes`.
#[derive(Clone, PartialEq, Eq)]
pub struct NamingKey(pub Arc<str>);

impl fmt::Debug for NamingKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("NamingKey")
    }
}

impl Serialize for NamingKey {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str("(hidden)")
    }
}

/// How endpoints are probed, whoever uses them.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize)]
pub struct HealthCheck {
    /// What is asked.
    pub probe: Probe,
    /// From one probe of an endpoint to the next, give or take a tenth.
    pub interval: Duration,
    /// Until an answer has come, connecting included.
    pub timeout: Duration,
    /// Successes in a row that bring an endpoint back; at least 1.
    pub healthy: u32,
    /// Failures in a row that take it out; at least 1.
    pub unhealthy: u32,
}

/// What is asked of an endpoint.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Probe {
    /// It accepts a connection.
    Tcp,
    /// It answers a GET by 200 to 399, in the protocol of its pool.
    Http {
        /// Path and query.
        path: Arc<str>,
        /// `Host`; `None`: the endpoint's address.
        #[serde(skip_serializing_if = "Option::is_none")]
        host: Option<Arc<str>>,
    },
}
