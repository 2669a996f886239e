//! The annotations that limit what one client may do.

use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;

use ipnet::IpNet;
use lockgate_proxy::table::{ClientLimits, Rate};

use super::Reader;

/// What ingress-nginx multiplies a rate by to get its burst.
const BURST: u32 = 5;

/// Networks of one allowlist; each costs every request a comparison.
const MOST_NETWORKS: usize = 256;

impl Reader<'_> {
    /// Without the zone, which is the Ingress: all its rules share their accounts.
    pub(super) fn per_client(&mut self) -> Option<Arc<ClientLimits>> {
        let requests = self.positive("limit-connections");
        let rps = self.positive("limit-rps");
        let rpm = self.positive("limit-rpm");
        let multiplier = self.number("limit-burst-multiplier").unwrap_or(BURST);
        let exempt = self.networks();
        let rate = |requests: u32, seconds| Rate {
            requests,
            per: Duration::from_secs(seconds),
            burst: requests.saturating_mul(multiplier),
        };
        // Minutes before seconds: who has used up the minute is not charged for the second.
        let rates: Vec<Rate> =
            [rpm.map(|rpm| rate(rpm, 60)), rps.map(|rps| rate(rps, 1))].into_iter().flatten().collect();
        if requests.is_none() && rates.is_empty() {
            return None;
        }
        Some(Arc::new(ClientLimits { zone: "".into(), requests, rates, exempt }))
    }

    /// 0 is no limit; what is no number closes the routes, see [`super::super::annotations`].
    fn positive(&self, name: &str) -> Option<u32> {
        self.value(name)?.parse::<u64>().ok().filter(|n| *n > 0).map(|n| n.try_into().unwrap_or(u32::MAX))
    }

    /// What cannot be read exempts nobody.
    fn networks(&mut self) -> Vec<IpNet> {
        let name = ["limit-whitelist", "limit-allowlist"].into_iter().find(|name| self.value(name).is_some());
        let Some(name) = name else { return Vec::new() };
        let mut networks = Vec::new();
        for text in self.value(name).unwrap_or_default().split(',').map(str::trim).filter(|t| !t.is_empty()) {
            let address = || text.parse::<IpAddr>().map(IpNet::from);
            match text.parse::<IpNet>().or_else(|_| address()) {
                Ok(_) if networks.len() == MOST_NETWORKS => {
                    let message =
                        format!("more than {MOST_NETWORKS} networks: {text} and what follows is limited");
                    self.warn(name, message, "write larger networks");
                    break;
                }
                Ok(network) => networks.push(network.trunc()),
                Err(_) => {
                    let message = format!("{text:?} is not a network: its clients are limited");
                    self.warn(name, message, "write a network, as 10.0.0.0/8 or fd00::/8");
                }
            }
        }
        networks
    }
}

#[cfg(test)]
mod tests {
    use super::super::super::annotations::PREFIX;
    use super::*;

    fn read(pairs: &[(&str, &str)]) -> (Option<Arc<ClientLimits>>, usize) {
        let annotations =
            pairs.iter().map(|(key, value)| (format!("{PREFIX}{key}").into(), (*value).into())).collect();
        let mut notices = Vec::new();
        let mut reader = Reader { annotations: &annotations, notices: &mut notices };
        let limits = reader.per_client();
        (limits, notices.len())
    }

    #[test]
    fn limits() {
        let rate = |requests, seconds, burst| Rate { requests, per: Duration::from_secs(seconds), burst };
        let cases: [(&[(&str, &str)], Option<(Option<u32>, Vec<Rate>)>, usize); 9] = [
            (&[], None, 0),
            (&[("limit-rps", "0"), ("limit-connections", "0")], None, 0),
            (&[("limit-burst-multiplier", "3"), ("limit-whitelist", "10.0.0.0/8")], None, 0),
            (&[("limit-connections", "7")], Some((Some(7), vec![])), 0),
            (&[("limit-rps", "2")], Some((None, vec![rate(2, 1, 10)])), 0),
            (
                &[("limit-rpm", "30"), ("limit-burst-multiplier", "2")],
                Some((None, vec![rate(30, 60, 60)])),
                0,
            ),
            (
                &[("limit-rps", "1"), ("limit-rpm", "9"), ("limit-connections", "1")],
                Some((Some(1), vec![rate(9, 60, 45), rate(1, 1, 5)])),
                0,
            ),
            (&[("limit-rps", "2"), ("limit-burst-multiplier", "x")], Some((None, vec![rate(2, 1, 10)])), 1),
            (&[("limit-rps", "99999999999")], Some((None, vec![rate(u32::MAX, 1, u32::MAX)])), 0),
        ];
        for (pairs, expected, warnings) in cases {
            let (limits, notices) = read(pairs);
            assert_eq!(limits.map(|l| (l.requests, l.rates.clone())), expected, "{pairs:?}");
            assert_eq!(notices, warnings, "{pairs:?}");
        }
    }

    #[test]
    fn exempt_networks() {
        for (name, text, expected, warnings) in [
            (
                "limit-whitelist",
                "10.1.2.3/8, 192.0.2.1,fd00::/8",
                vec!["10.0.0.0/8", "192.0.2.1/32", "fd00::/8"],
                0,
            ),
            ("limit-allowlist", "10.0.0.0/8,,", vec!["10.0.0.0/8"], 0),
            ("limit-whitelist", "everybody, 10.0.0.0/33,192.0.2.0/24", vec!["192.0.2.0/24"], 2),
        ] {
            let (limits, notices) = read(&[("limit-rps", "1"), (name, text)]);
            let exempt: Vec<String> = limits.unwrap().exempt.iter().map(IpNet::to_string).collect();
            assert_eq!(exempt, expected);
            assert_eq!(notices, warnings, "{text}");
        }
        let many = (0..300).map(|n| format!("10.0.{}.{}", n / 256, n % 256)).collect::<Vec<_>>().join(",");
        let (limits, notices) = read(&[("limit-rps", "1"), ("limit-allowlist", &many)]);
        assert_eq!((limits.unwrap().exempt.len(), notices), (MOST_NETWORKS, 1));
    }
}
