//! What a scrape shows.

use std::collections::HashMap;

use super::*;

fn origin(name: &str) -> Origin {
    Origin { kind: "Ingress", namespace: "shop".into(), name: name.into() }
}

fn pool(key: &str) -> PoolKey {
    PoolKey(key.into())
}

fn answer(status: u16, duration_us: u64) -> Outcome {
    Outcome { status, duration_us, upstream_us: duration_us / 2, bytes_in: 10, bytes_out: 100, retries: 1 }
}

/// Series name with labels → value. Panics on a line that is not exposition format.
fn parse(text: &str) -> HashMap<String, f64> {
    let mut series = HashMap::new();
    let mut typed = String::new();
    for line in text.lines() {
        if let Some(comment) = line.strip_prefix("# ") {
            let mut words = comment.splitn(3, ' ');
            match (words.next(), words.next(), words.next()) {
                (Some("HELP"), Some(_), Some(help)) => assert!(help.ends_with('.'), "{line}"),
                (Some("TYPE"), Some(name), Some("counter")) => {
                    assert!(name.ends_with("_total"), "{line}");
                    typed = name.to_owned();
                }
                (Some("TYPE"), Some(name), Some("gauge" | "histogram")) => {
                    assert!(!name.ends_with("_total"), "{line}");
                    typed = name.to_owned();
                }
                _ => panic!("{line}"),
            }
            continue;
        }
        let (name, value) = line.rsplit_once(' ').expect(line);
        assert!(name.starts_with("lockgate_") && name.starts_with(&typed), "{line} below {typed}");
        if let Some((_, labels)) = name.split_once('{') {
            let labels = labels.strip_suffix('}').expect(line);
            for pair in labels.split("\",") {
                let (label, value) = pair.split_once("=\"").expect(line);
                assert!(label.bytes().all(|b| b.is_ascii_lowercase() || b == b'_'), "{line}");
                assert!(!value.trim_end_matches('"').contains('\n'), "{line}");
            }
        }
        assert!(series.insert(name.to_owned(), value.parse().expect(line)).is_none(), "twice: {name}");
    }
    series
}

#[test]
fn every_family_is_there_from_the_start_except_routes_and_certificates() {
    let series = parse(&Metrics::new(1).encode());
    for (name, _, labels) in worker::described() {
        assert!(series.keys().any(|k| k.split('{').next() == Some(name)), "{name} {labels:?}");
    }
    assert_eq!(series["lockgate_workers"], 1.0);
    assert_eq!(series[&format!("lockgate_build_info{{version=\"{}\"}}", env!("CARGO_PKG_VERSION"))], 1.0);
    assert!(
        !series.keys().any(|k| k.starts_with("lockgate_route_") || k.starts_with("lockgate_certificate_"))
    );
    assert!(series.len() < 70, "{} series per process", series.len());
}

#[test]
fn a_scrape_sums_over_workers() {
    let metrics = Metrics::new(3);
    for index in 0..3 {
        let worker = metrics.worker(index);
        worker.http.accepted.add(index as u64 + 1);
        worker.listener(true).http2.open.inc();
        worker.answered(200);
        worker.rejected(Reject::Misdirected);
    }
    // A gauge may be negative in one worker as long as the sum is right.
    metrics.worker(0).requests_in_flight.dec();
    metrics.worker(1).requests_in_flight.add(3);

    let series = parse(&metrics.encode());
    assert_eq!(series["lockgate_connections_accepted_total{listener=\"http\"}"], 6.0);
    assert_eq!(series["lockgate_connections_open{listener=\"https\",protocol=\"http2\"}"], 3.0);
    assert_eq!(series["lockgate_requests_total{code=\"2xx\"}"], 3.0);
    assert_eq!(series["lockgate_requests_total{code=\"5xx\"}"], 0.0);
    assert_eq!(series["lockgate_requests_rejected_total{reason=\"misdirected\"}"], 3.0);
    assert_eq!(series["lockgate_requests_in_flight"], 2.0);
}

#[test]
fn reject_reasons_are_shown_under_their_own_name() {
    for reason in Reject::ALL {
        let metrics = Metrics::new(1);
        metrics.worker(0).rejected(reason);
        let series = parse(&metrics.encode());
        let name = format!("lockgate_requests_rejected_total{{reason=\"{}\"}}", reason.as_str());
        assert_eq!(series[&name], 1.0);
    }
}

#[test]
fn status_classes() {
    for (status, expected) in
        [(0, 0), (101, 0), (200, 1), (308, 2), (404, 3), (499, 3), (503, 4), (599, 4), (999, 4)]
    {
        assert_eq!(worker::class(status), expected, "{status}");
    }
}

#[test]
fn route_histograms_are_cumulative_and_add_up() {
    let metrics = Metrics::new(2);
    let stats = metrics.route(&origin("web"), &pool("shop/cart:80"), "cart-v2");
    stats.record(0, &answer(200, 400));
    stats.record(1, &answer(204, 3_000));
    stats.record(1, &answer(200, 60_000_000));
    stats.record(0, &answer(502, 900));

    let series = parse(&metrics.encode());
    let labels = "namespace=\"shop\",ingress=\"web\",service=\"cart\",canary=\"cart-v2\"";
    let duration = |suffix: &str, more: &str| {
        series[&format!("lockgate_route_request_duration_seconds_{suffix}{{{labels},code={more}}}")]
    };
    assert_eq!(duration("bucket", "\"2xx\",le=\"0.0005\""), 1.0);
    assert_eq!(duration("bucket", "\"2xx\",le=\"0.005\""), 2.0);
    assert_eq!(duration("bucket", "\"2xx\",le=\"10\""), 2.0);
    assert_eq!(duration("bucket", "\"2xx\",le=\"+Inf\""), 3.0);
    assert_eq!(duration("count", "\"2xx\""), 3.0);
    assert_eq!(duration("count", "\"5xx\""), 1.0);
    assert!((duration("sum", "\"2xx\"") - 60.0034).abs() < 1e-9);
    assert_eq!(series[&format!("lockgate_route_response_body_bytes_total{{{labels}}}")], 400.0);
    assert_eq!(series[&format!("lockgate_route_retries_total{{{labels}}}")], 4.0);
    assert!(
        !series.keys().any(|k| k.contains("4xx") && k.starts_with("lockgate_route_")),
        "classes never seen"
    );
}

#[test]
fn the_same_labels_are_the_same_statistics() {
    let metrics = Metrics::new(1);
    let first = metrics.route(&origin("web"), &pool("shop/cart:80"), "");
    assert!(Arc::ptr_eq(&first, &metrics.route(&origin("web"), &pool("shop/cart:http"), "")));
    assert!(!Arc::ptr_eq(&first, &metrics.route(&origin("web"), &pool("shop/cart:80"), "v2")));
    assert!(!Arc::ptr_eq(&first, &metrics.route(&origin("api"), &pool("shop/cart:80"), "")));
}

#[test]
fn route_label_sets_are_bounded() {
    let metrics = Metrics::with_max_routes(1, 10);
    let routes: Vec<_> =
        (0..1_000).map(|i| metrics.route(&origin(&format!("web-{i}")), &pool("shop/cart:80"), "")).collect();
    for route in &routes {
        route.record(0, &answer(200, 1));
    }
    let series = parse(&metrics.encode());
    let counts: Vec<_> = series.iter().filter(|(k, _)| k.contains("duration_seconds_count")).collect();
    assert_eq!(counts.len(), 11);
    assert_eq!(counts.iter().map(|(_, n)| **n).sum::<f64>(), 1_000.0, "nothing is lost to the bound");
    assert!(counts.iter().any(|(k, n)| k.contains("ingress=\"other\"") && **n == 990.0));
}

#[test]
fn hostile_label_values_stay_inside_their_quotes() {
    let metrics = Metrics::new(1);
    let stats = metrics.route(&origin("a\"} 1\nlockgate_evil 1\n\\"), &pool("shop/cart:80"), "");
    stats.record(0, &answer(200, 1));
    assert!(!metrics.encode().lines().any(|l| l.starts_with("lockgate_evil")));
}

#[test]
fn gauges_set_by_the_publisher() {
    let metrics = Metrics::new(1);
    metrics.set_generation(7);
    metrics.set_objects("Ingress", "accepted", 3);
    metrics.set_objects("Ingress", "accepted", 2);
    metrics.set_objects("Ingress", "refused", 1);
    let series = parse(&metrics.encode());
    assert_eq!(series["lockgate_generation"], 7.0);
    assert!(series["lockgate_generation_timestamp_seconds"] > 1.7e9);
    assert_eq!(series["lockgate_objects{kind=\"Ingress\",state=\"accepted\"}"], 2.0);
    assert_eq!(series["lockgate_objects{kind=\"Ingress\",state=\"refused\"}"], 1.0);
}

#[test]
fn certificates_that_expire_first_are_shown() {
    let expiry = |i: i64| CertificateExpiry {
        name: format!("shop/tls-{i}"),
        fingerprint: format!("{i:064x}"),
        not_after: 2_000_000_000 - i,
    };
    let metrics = Metrics::new(1);
    metrics.set_certificates((0..1_500).map(expiry).collect());
    let series = parse(&metrics.encode());
    assert_eq!(series["lockgate_certificates"], 1_500.0);
    let shown: Vec<_> = series.keys().filter(|k| k.starts_with("lockgate_certificate_not_after")).collect();
    assert_eq!(shown.len(), Metrics::MAX_CERTIFICATES);
    assert!(shown.iter().any(|k| k.contains("tls-1499\"")) && !shown.iter().any(|k| k.contains("tls-499\"")));

    metrics.set_certificates(vec![expiry(1), expiry(1)]);
    let series = parse(&metrics.encode());
    assert_eq!(series.keys().filter(|k| k.starts_with("lockgate_certificate_not_after")).count(), 1);
}
