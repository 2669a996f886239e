//! What Ingresses and Services say about how their endpoints are chosen and
//! looked after. A Service's own word comes first, then the oldest Ingress's.

use std::sync::Arc;
use std::time::Duration;

use lockgate_proxy::table::{Balance, HealthCheck, Probe};

use super::annotations::{field, is_of_service, unknown_own};
use super::settings::Reader;
use crate::objects::{Labels, Notice};

const CHECK: &str = "lockgate.io/health-check";
const BALANCE: &str = "lockgate.io/load-balance";
const SLOW_START: &str = "lockgate.io/slow-start";

/// Between two probes of an endpoint, unless said otherwise.
const INTERVAL: Duration = Duration::from_secs(10);
/// For its answer.
const TIMEOUT: Duration = Duration::from_secs(2);
/// Successes that bring it back, failures that take it out.
const THRESHOLDS: (u32, u32) = (2, 3);
/// Endpoints are not probed more often, nor waited for any shorter.
const SHORTEST: Duration = Duration::from_millis(100);
const LONGEST: Duration = Duration::from_secs(3600);

/// ingress-nginx's names, and one of ours.
pub(crate) fn balance(name: &str) -> Option<Balance> {
    match name {
        "round_robin" => Some(Balance::RoundRobin),
        "ewma" => Some(Balance::Ewma),
        "least_request" => Some(Balance::LeastRequest),
        _ => None,
    }
}

/// What is asked of a pool; `None` leaves it to others.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Wish {
    pub(super) balance: Option<Balance>,
    pub(super) slow_start: Option<Duration>,
    pub(super) check: Option<Arc<HealthCheck>>,
}

impl Wish {
    pub(super) fn of_service(annotations: &Labels, notices: &mut Vec<Notice>) -> Wish {
        for key in annotations.keys().filter(|key| !is_of_service(key)) {
            notices.push(unknown_own(key));
        }
        Reader { annotations, notices }.own_wish()
    }

    /// Takes from `other` what is not said here.
    pub(super) fn complete(&mut self, other: &Wish) {
        self.balance = self.balance.or(other.balance);
        self.slow_start = self.slow_start.or(other.slow_start);
        self.check = self.check.take().or_else(|| other.check.clone());
    }
}

impl Reader<'_> {
    pub(super) fn wish(&mut self) -> Wish {
        let (balance, own) = (self.balance(), self.own_wish());
        Wish { balance: own.balance.or(balance), ..own }
    }

    fn balance(&mut self) -> Option<Balance> {
        let value = self.value("load-balance")?;
        let balance = balance(value);
        if balance.is_none() {
            let message = format!("{value:?} is not implemented: the default is used");
            self.warn("load-balance", message, "use round_robin, ewma or least_request");
        }
        balance
    }

    fn own_wish(&mut self) -> Wish {
        let slow_start = self.span(SLOW_START, Duration::ZERO).filter(|span| !span.is_zero());
        Wish { balance: self.own_balance(), slow_start, check: self.check().map(Arc::new) }
    }

    fn own_balance(&mut self) -> Option<Balance> {
        let value = self.own(BALANCE)?;
        let balance = balance(value).or((value == "least_connections").then_some(Balance::LeastConnections));
        if balance.is_none() {
            let remedy = "use round_robin, ewma, least_request or least_connections";
            self.problem(BALANCE, format!("{value:?} is unknown: the default is used"), remedy);
        }
        balance
    }

    fn check(&mut self) -> Option<HealthCheck> {
        let Some(asked) = self.own(CHECK) else {
            let prefix = format!("{CHECK}-");
            for key in self.annotations.keys().filter(|key| key.starts_with(&prefix)) {
                let remedy = format!("add {CHECK}: tcp, or a path");
                self.notices.push(Notice::warning(
                    field(key),
                    format!("has no effect without {CHECK}"),
                    remedy,
                ));
            }
            return None;
        };
        let probe = match asked {
            "tcp" => Probe::Tcp,
            path if is_target(path) => Probe::Http { path: path.into(), host: self.probe_host() },
            other => {
                self.problem(
                    CHECK,
                    format!("{other:?} is no probe: endpoints are not probed"),
                    "use tcp, or a path that begins with '/'",
                );
                return None;
            }
        };
        let interval = self.span(&format!("{CHECK}-interval"), SHORTEST).unwrap_or(INTERVAL);
        let timeout = self.span(&format!("{CHECK}-timeout"), SHORTEST).unwrap_or(TIMEOUT);
        Some(HealthCheck {
            probe,
            interval,
            timeout,
            healthy: self.threshold(&format!("{CHECK}-healthy")).unwrap_or(THRESHOLDS.0),
            unhealthy: self.threshold(&format!("{CHECK}-unhealthy")).unwrap_or(THRESHOLDS.1),
        })
    }

    fn probe_host(&mut self) -> Option<Arc<str>> {
        let key = format!("{CHECK}-host");
        let host = self.own(&key)?;
        let is_name = |byte: u8| byte.is_ascii_alphanumeric() || b"-._:[]".contains(&byte);
        if host.len() <= 255 && host.bytes().all(is_name) {
            return Some(host.into());
        }
        self.problem(
            &key,
            format!("{host:?} is not a host: the endpoint's address is used"),
            "write a DNS name",
        );
        None
    }

    fn threshold(&mut self, key: &str) -> Option<u32> {
        let value = self.own(key)?;
        let number = value.parse().ok().filter(|number| (1..=1_000).contains(number));
        if number.is_none() {
            self.problem(
                key,
                format!("{value:?} is not a count: the default holds"),
                "write a whole number from 1 to 1000",
            );
        }
        number
    }

    fn span(&mut self, key: &str, shortest: Duration) -> Option<Duration> {
        let value = self.own(key)?;
        let span = parse_span(value).filter(|span| (shortest..=LONGEST).contains(span));
        if span.is_none() {
            let from = if shortest.is_zero() { "0s".to_owned() } else { format!("{shortest:?}") };
            let message = format!("{value:?} is not a duration from {from} to 1h: the default holds");
            self.problem(key, message, "write a number and a unit, as 500ms, 10s or 5m");
        }
        span
    }

    /// The value under our own prefix; empty counts as not written.
    fn own(&self, key: &str) -> Option<&str> {
        let value = self.annotations.get(key)?.trim();
        (!value.is_empty()).then_some(value)
    }

    fn problem(&mut self, key: &str, message: String, remedy: &str) {
        self.notices.push(Notice::warning(field(key), message, remedy));
    }
}

/// Path and perhaps query, of visible ASCII.
fn is_target(text: &str) -> bool {
    text.starts_with('/') && text.len() <= 1024 && text.bytes().all(|byte| byte.is_ascii_graphic())
}

/// Digits, perhaps with a fraction, and `ms`, `s`, `m` or `h`; seconds without.
fn parse_span(text: &str) -> Option<Duration> {
    let end = text.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(text.len());
    let number: f64 = text[..end].parse().ok()?;
    let seconds = match &text[end..] {
        "ms" => number / 1e3,
        "s" | "" => number,
        "m" => number * 60.0,
        "h" => number * 3600.0,
        _ => return None,
    };
    Duration::try_from_secs_f64(seconds).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(pairs: &[(&str, &str)]) -> (Wish, usize) {
        let annotations = pairs
            .iter()
            .map(|(name, value)| (format!("lockgate.io/{name}").into(), (*value).into()))
            .collect();
        let mut notices = Vec::new();
        let wish = Wish::of_service(&annotations, &mut notices);
        (wish, notices.len())
    }

    #[test]
    fn spans() {
        let cases = [
            ("5", Some(5_000)),
            ("250ms", Some(250)),
            ("1.5s", Some(1_500)),
            ("2m", Some(120_000)),
            ("1h", Some(3_600_000)),
            ("", None),
            ("s", None),
            ("-1s", None),
            ("1d", None),
            ("1e9s", None),
            (".", None),
        ];
        for (text, millis) in cases {
            assert_eq!(parse_span(text), millis.map(Duration::from_millis), "{text}");
        }
    }

    #[test]
    fn checks() {
        let http =
            |path: &str, host: Option<&str>| Probe::Http { path: path.into(), host: host.map(Arc::from) };
        let standard =
            |probe| HealthCheck { probe, interval: INTERVAL, timeout: TIMEOUT, healthy: 2, unhealthy: 3 };
        let cases: [(&[(&str, &str)], Option<HealthCheck>, usize); 8] = [
            (&[("health-check", "tcp")], Some(standard(Probe::Tcp)), 0),
            (&[("health-check", "/healthz?a=b")], Some(standard(http("/healthz?a=b", None))), 0),
            (&[("health-check", "healthz")], None, 1),
            (&[("health-check", "/a b")], None, 1),
            (&[("health-check-interval", "5s")], None, 1),
            (
                &[
                    ("health-check", "/"),
                    ("health-check-host", "a.example"),
                    ("health-check-interval", "500ms"),
                    ("health-check-timeout", "1s"),
                    ("health-check-healthy", "1"),
                    ("health-check-unhealthy", "5"),
                ],
                Some(HealthCheck {
                    probe: http("/", Some("a.example")),
                    interval: Duration::from_millis(500),
                    timeout: Duration::from_secs(1),
                    healthy: 1,
                    unhealthy: 5,
                }),
                0,
            ),
            (
                &[
                    ("health-check", "/"),
                    ("health-check-host", "a\r\nb"),
                    ("health-check-interval", "1ms"),
                    ("health-check-timeout", "2h"),
                    ("health-check-healthy", "0"),
                    ("health-check-unhealthy", "many"),
                ],
                Some(standard(http("/", None))),
                5,
            ),
            (&[("helth-check", "/"), ("canary-sticky", "cookie")], None, 2),
        ];
        for (pairs, expected, warnings) in cases {
            let (wish, notices) = read(pairs);
            assert_eq!((wish.check.as_deref(), notices), (expected.as_ref(), warnings), "{pairs:?}");
        }
    }

    #[test]
    fn balances() {
        assert_eq!(read(&[("load-balance", "least_connections")]).0.balance, Some(Balance::LeastConnections));
        assert_eq!(read(&[("load-balance", "ewma")]).0.balance, Some(Balance::Ewma));
        assert_eq!(read(&[("load-balance", "chash")]), (Wish::default(), 1));
    }

    #[test]
    fn slow_starts() {
        assert_eq!(read(&[("slow-start", "30s")]).0.slow_start, Some(Duration::from_secs(30)));
        assert_eq!(read(&[("slow-start", "0")]), (Wish::default(), 0));
        assert_eq!(read(&[("slow-start", "soon")]), (Wish::default(), 1));
    }
}
