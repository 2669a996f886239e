//! Deadlines of the whole request, retries, hedging and limits per endpoint, as annotations say.

use std::sync::Arc;
use std::time::Duration;

use lockgate_proxy::resilience::{Breaker, Hedge, Resilience, RetryOn};

use super::annotations::{PREFIX, field};
use crate::objects::{Labels, Notice};

pub(super) const REQUEST_TIMEOUT: &str = "lockgate.io/request-timeout";
pub(super) const TRY_TIMEOUT: &str = "lockgate.io/try-timeout";
pub(super) const HEDGE_AFTER: &str = "lockgate.io/hedge-after";
pub(super) const MAX_CONNECTIONS: &str = "lockgate.io/endpoint-max-connections";
pub(super) const MAX_PENDING: &str = "lockgate.io/endpoint-max-pending";
pub(super) const MAX_REQUESTS: &str = "lockgate.io/endpoint-max-requests";

/// Keys of our own that this reads.
pub(super) const KEYS: [&str; 6] =
    [REQUEST_TIMEOUT, TRY_TIMEOUT, HEDGE_AFTER, MAX_CONNECTIONS, MAX_PENDING, MAX_REQUESTS];

/// What the annotations ask for; a value that cannot be read takes its default and leaves a notice.
pub(super) fn resilience(annotations: &Labels, notices: &mut Vec<Notice>) -> Option<Arc<Resilience>> {
    let mut reader = Reader { annotations, notices };
    let asked = Resilience {
        request_timeout: reader.timeout(REQUEST_TIMEOUT),
        try_timeout: reader.timeout(TRY_TIMEOUT),
        retry_on: reader.retry_on(),
        tries: reader.number(&nginx("proxy-next-upstream-tries")),
        retry_within: reader
            .number(&nginx("proxy-next-upstream-timeout"))
            .map(|seconds| Duration::from_secs(seconds.into())),
        hedge: reader.hedge(),
        breaker: reader.breaker(),
    };
    (asked != Resilience::default()).then(|| Arc::new(asked))
}

fn nginx(name: &str) -> String {
    format!("{PREFIX}{name}")
}

struct Reader<'a> {
    annotations: &'a Labels,
    notices: &'a mut Vec<Notice>,
}

impl<'a> Reader<'a> {
    /// The value; empty counts as not written.
    fn value(&self, key: &str) -> Option<&'a str> {
        let value = self.annotations.get(key)?.trim();
        (!value.is_empty()).then_some(value)
    }

    fn warn(&mut self, key: &str, message: String, remedy: &str) {
        self.notices.push(Notice::warning(field(key), message, remedy));
    }

    fn number(&mut self, key: &str) -> Option<u32> {
        let value = self.value(key)?;
        let number = value.parse().ok();
        if number.is_none() {
            let message = format!("{value:?} is not a number: the default holds");
            self.warn(key, message, "write a whole number, 0 or more, without a unit");
        }
        number
    }

    /// Zero is none, as in Gateway API.
    fn timeout(&mut self, key: &str) -> Option<Duration> {
        let value = self.value(key)?;
        let duration = parse_duration(value);
        if duration.is_none() {
            let message = format!("{value:?} is not a duration: there is no such timeout");
            self.warn(key, message, "write numbers with units, as 500ms, 30s or 1m30s");
        }
        duration.filter(|duration| !duration.is_zero())
    }

    fn retry_on(&mut self) -> Option<RetryOn> {
        let key = nginx("proxy-next-upstream");
        let value = self.value(&key)?;
        let mut on = RetryOn::OFF;
        for word in value.split_whitespace() {
            let Some(known) = RetryOn::word(word) else {
                let message = format!("{word:?} is nothing to retry on: the default holds");
                let remedy = "use error, timeout, invalid_header, http_500, http_502, http_503, http_504, \
                    http_403, http_404, http_429, non_idempotent or off";
                self.warn(&key, message, remedy);
                return None;
            };
            on = on.and(known);
        }
        // nginx, too, takes `off` to outweigh what stands beside it.
        let off = value.split_whitespace().any(|word| word == "off");
        Some(if off { RetryOn::OFF } else { on })
    }

    fn hedge(&mut self) -> Option<Hedge> {
        let value = self.value(HEDGE_AFTER)?;
        if value == "p95" {
            return Some(Hedge::P95);
        }
        let delay = parse_duration(value).filter(|delay| !delay.is_zero());
        if delay.is_none() {
            let message = format!("{value:?} is neither a duration nor p95: nothing is sent twice");
            self.warn(HEDGE_AFTER, message, "write p95, or a number with a unit, as 50ms");
        }
        delay.map(Hedge::After)
    }

    fn breaker(&mut self) -> Option<Breaker> {
        let limits = [MAX_CONNECTIONS, MAX_PENDING, MAX_REQUESTS].map(|key| self.number(key));
        if limits == [None; 3] {
            return None;
        }
        let [connections, pending, requests] = limits.map(Option::unwrap_or_default);
        Some(Breaker { connections, pending, requests })
    }
}

/// GEP-2257: up to four numbers of up to five digits, each with h, m, s or ms behind it.
fn parse_duration(text: &str) -> Option<Duration> {
    let mut rest = text;
    let mut total = Duration::ZERO;
    let mut parts = 0;
    while !rest.is_empty() {
        let digits = rest.find(|c: char| !c.is_ascii_digit())?;
        let (number, unit) = rest.split_at(digits);
        let end = unit.find(|c: char| c.is_ascii_digit()).unwrap_or(unit.len());
        let ms = match &unit[..end] {
            "h" => 3_600_000,
            "m" => 60_000,
            "s" => 1_000,
            "ms" => 1,
            _ => return None,
        };
        if number.is_empty() || number.len() > 5 || parts == 4 {
            return None;
        }
        total += Duration::from_millis(number.parse::<u64>().ok()? * ms);
        rest = &unit[end..];
        parts += 1;
    }
    (parts > 0).then_some(total)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(pairs: &[(&str, &str)]) -> (Resilience, usize) {
        let annotations = pairs
            .iter()
            .map(|(key, value)| match key.contains('/') {
                true => ((*key).into(), (*value).into()),
                false => (nginx(key).into(), (*value).into()),
            })
            .collect();
        let mut notices = Vec::new();
        let read = resilience(&annotations, &mut notices).map(|read| (*read).clone());
        (read.unwrap_or_default(), notices.len())
    }

    #[test]
    fn durations() {
        for (text, ms) in [
            ("10s", Some(10_000)),
            ("500ms", Some(500)),
            ("1h2m3s4ms", Some(3_723_004)),
            ("0s", Some(0)),
            ("1m1m", Some(120_000)),
            ("", None),
            ("10", None),
            ("s", None),
            ("1.5s", None),
            ("-1s", None),
            ("1d", None),
            ("123456s", None),
            ("1s1s1s1s1s", None),
            ("10s ", None),
            ("1é", None),
        ] {
            assert_eq!(parse_duration(text), ms.map(Duration::from_millis), "{text}");
        }
    }

    #[test]
    fn what_is_retried() {
        for (value, on, notices) in [
            ("error timeout http_502", Some("error timeout http_502"), 0),
            ("http_404  non_idempotent ", Some("http_404 non_idempotent"), 0),
            ("off", Some("off"), 0),
            ("error off", Some("off"), 0),
            ("", None, 0),
            ("error http_418", None, 1),
            ("error,timeout", None, 1),
        ] {
            let (read, count) = read(&[("proxy-next-upstream", value)]);
            assert_eq!((read.retry_on.map(|on| on.to_string()).as_deref(), count), (on, notices), "{value}");
        }
    }

    #[test]
    fn values_that_cannot_be_read_take_the_default() {
        let (read, notices) = read(&[
            ("proxy-next-upstream-tries", "many"),
            ("proxy-next-upstream-timeout", "5s"),
            (REQUEST_TIMEOUT, "30"),
            (TRY_TIMEOUT, "soon"),
            (HEDGE_AFTER, "p99"),
            (MAX_CONNECTIONS, "-1"),
            (MAX_PENDING, "10"),
        ]);
        let breaker = Some(Breaker { pending: 10, ..Breaker::default() });
        assert_eq!(read, Resilience { breaker, ..Resilience::default() });
        assert_eq!(notices, 6);
    }
}
