//! What is done about endpoints that fail, are slow or have enough to do:
//! plain settings. The state behind them is in the modules below, one set per
//! worker; ejection and load are per endpoint address, shared by all.

use std::fmt;
use std::time::Duration;

use serde::{Serialize, Serializer};

pub(crate) mod budget;
pub(crate) mod delay;
pub(crate) mod outliers;

/// What one rule asks for where it differs from the process; `None` takes the
/// process-wide value, which for the two timeouts and hedging is "none".
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Resilience {
    /// From the first byte of a request to the last of its answer: 504 while
    /// no answer has begun, a cut connection (or a reset stream) after that.
    /// Gateway API: `timeouts.request`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub request_timeout: Option<Duration>,
    /// One attempt, from the choice of an endpoint to the head of its answer:
    /// the next endpoint, as `timeout` of [`RetryOn`] has it, else 504. The
    /// body after it has the read timeout. Gateway API: `timeouts.backendRequest`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub try_timeout: Option<Duration>,
    /// What is tried again on another endpoint.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub retry_on: Option<RetryOn>,
    /// Attempts at most, the first included; 0 is as many as [`MAX_TRIES`].
    #[serde(skip_serializing_if = "Option::is_none")]
    pub tries: Option<u32>,
    /// No further attempt begins when the request began this long ago; zero is no limit.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub retry_within: Option<Duration>,
    /// A second copy of a request that takes long. `None`: never.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub hedge: Option<Hedge>,
    /// Most of one endpoint's time that requests of this rule take part in.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub breaker: Option<Breaker>,
}

/// The most attempts one request has, whatever its rule says.
pub const MAX_TRIES: u32 = 16;

/// What is tried again: the words of nginx's `proxy_next_upstream`.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct RetryOn(u16);

impl RetryOn {
    /// Nothing is tried again, not even a refused connection.
    pub const OFF: RetryOn = RetryOn(0);
    /// Cannot connect, cannot send, or no answer before the connection ended.
    pub const ERROR: RetryOn = RetryOn(1);
    /// Connecting, sending or answering took too long.
    pub const TIMEOUT: RetryOn = RetryOn(1 << 1);
    /// The answer is none.
    pub const INVALID_HEADER: RetryOn = RetryOn(1 << 2);
    /// Also methods that may not be sent twice (RFC 9110 section 9.2.2).
    /// Without it they are tried again only while nothing has been sent.
    pub const NON_IDEMPOTENT: RetryOn = RetryOn(1 << 3);

    /// Every word but `off`, in the order they are shown.
    const WORDS: [(&str, RetryOn); 11] = [
        ("error", RetryOn::ERROR),
        ("timeout", RetryOn::TIMEOUT),
        ("invalid_header", RetryOn::INVALID_HEADER),
        ("http_500", RetryOn(1 << 4)),
        ("http_502", RetryOn(1 << 5)),
        ("http_503", RetryOn(1 << 6)),
        ("http_504", RetryOn(1 << 7)),
        ("http_403", RetryOn(1 << 8)),
        ("http_404", RetryOn(1 << 9)),
        ("http_429", RetryOn(1 << 10)),
        ("non_idempotent", RetryOn::NON_IDEMPOTENT),
    ];

    /// What `word` stands for; `off` is [`RetryOn::OFF`].
    pub fn word(word: &str) -> Option<RetryOn> {
        let known = RetryOn::WORDS.iter().find(|(known, _)| *known == word);
        known.map(|(_, on)| *on).or((word == "off").then_some(RetryOn::OFF))
    }

    /// Both.
    pub const fn and(self, other: RetryOn) -> RetryOn {
        RetryOn(self.0 | other.0)
    }

    /// Whether all of `other` is in this.
    pub const fn has(self, other: RetryOn) -> bool {
        self.0 & other.0 == other.0
    }

    /// Whether an answer of this status is not passed on while there is another endpoint to ask.
    pub fn has_status(self, status: u16) -> bool {
        let bit = match status {
            500 => 4,
            502 => 5,
            503 => 6,
            504 => 7,
            403 => 8,
            404 => 9,
            429 => 10,
            _ => return false,
        };
        self.0 & 1 << bit != 0
    }

    fn words(self) -> impl Iterator<Item = &'static str> {
        let off = (self == RetryOn::OFF).then_some("off");
        RetryOn::WORDS.iter().filter(move |(_, on)| self.has(*on)).map(|(word, _)| *word).chain(off)
    }
}

impl Default for RetryOn {
    /// ingress-nginx's: `error timeout`.
    fn default() -> RetryOn {
        RetryOn::ERROR.and(RetryOn::TIMEOUT)
    }
}

impl fmt::Display for RetryOn {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (i, word) in self.words().enumerate() {
            f.write_str(if i > 0 { " " } else { "" })?;
            f.write_str(word)?;
        }
        Ok(())
    }
}

impl fmt::Debug for RetryOn {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl Serialize for RetryOn {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

/// When a second copy of a request is sent: one without a body and of a method
/// that may be sent twice, once, to another endpoint, inside the retry budget.
/// The first answer wins; the other copy is cancelled and held against nobody.
/// Both share the first's [`Resilience::try_timeout`]. For endpoints that speak
/// HTTP/1; those that speak HTTP/2 are asked once.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Hedge {
    /// After this long without a byte of an answer.
    After(Duration),
    /// When it takes longer than nineteen of twenty did, as estimated by each
    /// worker for the pool; nothing is sent twice before it has seen
    /// some requests.
    P95,
}

/// Most that one endpoint has to do at a time; 0 is no limit. Counted over all
/// workers and rules in the endpoint's shared state, so the limits are those
/// of the process. A request that finds an endpoint full goes to the next;
/// when all are full it is answered 503.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Breaker {
    /// Connections, idle ones included: those another worker keeps idle are in
    /// the way until their idle timeout.
    pub connections: u32,
    /// Requests that wait for a connection to be established.
    pub pending: u32,
    /// Requests under way, tunnels included.
    pub requests: u32,
}

/// Retries, where a rule says nothing else, and what bounds all of them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Retry {
    /// What is tried again.
    pub on: RetryOn,
    /// As if every rule said [`RetryOn::NON_IDEMPOTENT`] (ingress-nginx's `retry-non-idempotent`).
    pub non_idempotent: bool,
    /// No further attempt begins when the request began this long ago; zero is no limit.
    pub within: Duration,
    /// Requests sent once more, in percent of the requests to the same pool in
    /// the last ten seconds; beyond it the failure is the answer. Counted per
    /// worker. A request that never reached an endpoint does not count.
    pub budget_percent: u32,
    /// So many a second are sent once more in any case, per worker and pool.
    pub budget_floor: u32,
    /// Bytes of a request body that are kept until an answer has begun, so
    /// that the body can be sent again; a larger one is sent once.
    pub replay_bytes: usize,
}

impl Default for Retry {
    fn default() -> Retry {
        Retry {
            on: RetryOn::default(),
            non_idempotent: false,
            within: Duration::ZERO,
            budget_percent: 20,
            budget_floor: 3,
            replay_bytes: 64 << 10,
        }
    }
}

/// When an endpoint is left alone for how it answers; how long, says
/// [`crate::endpoint::Ejection`]. Everything is off by default: unlike a
/// connection that fails, an answer may be the client's doing.
///
/// Rates and times are those one worker saw in one interval, compared with
/// what it saw of the other endpoints of the same pool.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Outliers {
    /// Answers of 502, 503 or 504 in a row; 0 never.
    pub gateway_errors: u32,
    /// Percent of the others' share of answers below 500: whoever has less is left alone; 0 never.
    pub success_percent: u32,
    /// Percent of the others' mean time to an answer: whoever takes longer is left alone; 0 never.
    pub latency_percent: u32,
    /// Shorter mean times are never too long.
    pub latency_floor: Duration,
    /// How often rates and times are compared.
    pub interval: Duration,
    /// Requests to an endpoint in an interval for its rates and times to count.
    pub requests: u32,
    /// Percent of a pool's endpoints left alone at a time, rounded down. Of
    /// those that cannot be reached any number are left alone, without this limit.
    pub share_percent: u32,
}

impl Default for Outliers {
    fn default() -> Outliers {
        Outliers {
            gateway_errors: 0,
            success_percent: 0,
            latency_percent: 0,
            latency_floor: Duration::from_millis(10),
            interval: Duration::from_secs(10),
            requests: 20,
            share_percent: 50,
        }
    }
}

impl Outliers {
    /// Whether rates or times are compared at all.
    pub(crate) fn compares(&self) -> bool {
        self.success_percent > 0 || self.latency_percent > 0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_are_read_as_they_are_shown() {
        for (word, on) in RetryOn::WORDS {
            assert_eq!(RetryOn::word(word), Some(on));
            assert_eq!(on.to_string(), word);
            let status = word.strip_prefix("http_").map(|status| status.parse().unwrap());
            for other in 100..600 {
                assert_eq!(on.has_status(other), status == Some(other), "{word} {other}");
            }
        }
        assert_eq!(RetryOn::word("off"), Some(RetryOn::OFF));
        assert_eq!(RetryOn::word("http_418"), None);
        assert_eq!(RetryOn::OFF.to_string(), "off");
        assert_eq!(RetryOn::default().to_string(), "error timeout");
    }
}
