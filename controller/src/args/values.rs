//! What stands behind flags: durations, sizes, networks, names.

use std::fmt;
use std::net::IpAddr;
use std::str::FromStr;
use std::time::Duration;

use ipnet::IpNet;

use crate::store::Key;
use lockgate_proxy::table::{Balance, FieldName};

/// A duration on the command line.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Span(pub Duration);

pub(super) fn parse_balance(text: &str) -> Result<Balance, String> {
    crate::translate::balance(text).ok_or_else(|| "use round_robin, ewma or least_request".to_owned())
}

impl FromStr for Span {
    type Err = String;

    fn from_str(text: &str) -> Result<Span, String> {
        let (number, unit) = split_unit(text);
        let number: f64 =
            number.parse().map_err(|_| "write a number and a unit, as 250ms, 30s, 5m or 1h".to_owned())?;
        let seconds = match unit {
            "ms" => number / 1e3,
            "s" => number,
            "m" => number * 60.0,
            "h" => number * 3600.0,
            "" => return Err(format!("has no unit; write {text}s for seconds")),
            other => return Err(format!("{other:?} is no unit; use ms, s, m or h")),
        };
        Duration::try_from_secs_f64(seconds)
            .ok()
            .filter(|span| *span <= Duration::from_secs(30 * 24 * 3600))
            .map(Span)
            .ok_or_else(|| "must lie between 0s and 720h".to_owned())
    }
}

/// A number of bytes on the command line.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Size(pub u64);

impl FromStr for Size {
    type Err = String;

    fn from_str(text: &str) -> Result<Size, String> {
        let (number, unit) = split_unit(text);
        let number: u64 =
            number.parse().map_err(|_| "write a number of bytes, as 8192, 64KiB or 32MiB".to_owned())?;
        let factor: u64 = match unit.to_ascii_lowercase().as_str() {
            "" | "b" => 1,
            // nginx counts k, m and g in powers of 1024.
            "k" | "ki" | "kib" => 1 << 10,
            "m" | "mi" | "mib" => 1 << 20,
            "g" | "gi" | "gib" => 1 << 30,
            _ => return Err(format!("{unit:?} is no unit; use KiB, MiB or GiB")),
        };
        number.checked_mul(factor).map(Size).ok_or_else(|| "is too large".to_owned())
    }
}

impl fmt::Display for Size {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0 {
            bytes if bytes >= 1 << 20 && bytes % (1 << 20) == 0 => write!(f, "{}MiB", bytes >> 20),
            bytes if bytes >= 1 << 10 && bytes % (1 << 10) == 0 => write!(f, "{}KiB", bytes >> 10),
            bytes => write!(f, "{bytes}"),
        }
    }
}

fn split_unit(text: &str) -> (&str, &str) {
    let end = text.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(text.len());
    (&text[..end], text[end..].trim())
}

pub(super) fn parse_network(text: &str) -> Result<IpNet, String> {
    let single = || text.parse::<IpAddr>().map(IpNet::from);
    text.parse().or_else(|_| single()).map_err(|_| "write a network, as 10.0.0.0/8 or fd00::/8".to_owned())
}

pub(super) fn parse_key(text: &str) -> Result<Key, String> {
    match text.split_once('/') {
        Some((namespace, name)) if !namespace.is_empty() && !name.is_empty() && !name.contains('/') => {
            Ok(Key::new(namespace, name))
        }
        _ => Err("write NAMESPACE/NAME".to_owned()),
    }
}

/// Lower case.
pub(super) fn parse_header_name(text: &str) -> Result<String, String> {
    match FieldName::new(text.trim()) {
        Ok(name) => Ok(name.as_str().to_ascii_lowercase()),
        Err(problem) => Err(format!("it {problem}")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn durations() {
        for (text, expected) in
            [("250ms", 250), ("30s", 30_000), ("1.5m", 90_000), ("1h", 3_600_000), ("0s", 0)]
        {
            assert_eq!(text.parse(), Ok(Span(Duration::from_millis(expected))), "{text}");
        }
        for (text, expected) in [
            ("30", "has no unit; write 30s for seconds"),
            ("30d", "\"d\" is no unit; use ms, s, m or h"),
            ("s", "write a number and a unit, as 250ms, 30s, 5m or 1h"),
            ("-1s", "write a number and a unit, as 250ms, 30s, 5m or 1h"),
            ("9999h", "must lie between 0s and 720h"),
        ] {
            assert_eq!(text.parse::<Span>(), Err(expected.to_owned()), "{text}");
        }
    }

    #[test]
    fn sizes() {
        for (text, expected) in
            [("0", 0), ("8192", 8192), ("64KiB", 65536), ("8m", 8 << 20), ("1Gi", 1 << 30)]
        {
            assert_eq!(text.parse(), Ok(Size(expected)), "{text}");
        }
        for text in ["", "k", "1TB", "99999999999999999999", "99999999999g", "-1"] {
            assert!(text.parse::<Size>().is_err(), "{text}");
        }
    }

    #[test]
    fn networks_and_names() {
        assert_eq!(parse_network("10.0.0.1").map(|n| n.to_string()), Ok("10.0.0.1/32".to_owned()));
        assert_eq!(parse_network("fd00::/8").map(|n| n.to_string()), Ok("fd00::/8".to_owned()));
        assert!(parse_network("everyone").is_err());
        assert_eq!(parse_key("a/b"), Ok(Key::new("a", "b")));
        for text in ["a", "/b", "a/", "a/b/c"] {
            assert!(parse_key(text).is_err(), "{text}");
        }
    }
}
