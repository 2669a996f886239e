//! Endpoints that answer worse than their neighbours are left alone for a while, but never too many.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

#[path = "support/script.rs"]
mod script;
#[path = "support/toy.rs"]
mod toy;
#[path = "support/wire.rs"]
mod wire;

use std::time::Duration;

use lockgate_proxy::Config;
use lockgate_proxy::resilience::{Outliers, Resilience};

use script::{Act, Script, metric, ruled, until};
use toy::{config, start};
use wire::Plain;

const GET: &[u8] = b"GET / HTTP/1.1\r\nHost: a\r\n\r\n";
const OK: &str = "HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n";
const BAD: &str = "HTTP/1.1 503 No\r\nContent-Length: 0\r\n\r\n";
const WRONG: &str = "HTTP/1.1 500 No\r\nContent-Length: 0\r\n\r\n";

fn watching(outliers: Outliers) -> Config {
    Config { outliers, ..config() }
}

/// Asks `count` times and says how many answers were below 500.
fn ask(client: &mut Plain, count: usize) -> usize {
    (0..count).filter(|_| client.ask(GET).status() < 500).count()
}

#[test]
fn gateway_errors_in_a_row() {
    let outliers = Outliers { gateway_errors: 5, ..Outliers::default() };
    let (bad, good) = (Script::says(BAD), Script::says(OK));
    let (proxy, _publisher) = start(watching(outliers), ruled(&[&bad, &good], Resilience::default()));
    let mut client = wire::plain(proxy.http_addrs()[0]);
    assert_eq!(ask(&mut client, 10), 5);
    assert_eq!(ask(&mut client, 50), 50);
    assert_eq!(metric(&proxy, "lockgate_outlier_ejections_total{reason=\"gateway_errors\"}"), 1);
    // In a row means that nothing else came between; and 500 is the application's own affair.
    for answers in [[BAD, BAD, BAD, BAD, OK], [WRONG; 5]] {
        let mixed = Script::new(move |n| Act::Say(answers[n % 5]));
        let (proxy, _publisher) = start(watching(outliers), ruled(&[&mixed, &good], Resilience::default()));
        ask(&mut wire::plain(proxy.http_addrs()[0]), 60);
        assert_eq!(metric(&proxy, "lockgate_outlier_ejections_total{reason=\"gateway_errors\"}"), 0);
        assert_eq!(mixed.asked(), 30);
    }
    // Nothing of it unless asked for.
    let bad = Script::says(BAD);
    let (proxy, _publisher) = start(config(), ruled(&[&bad, &good], Resilience::default()));
    assert_eq!(ask(&mut wire::plain(proxy.http_addrs()[0]), 60), 30);
}

#[test]
fn never_more_than_a_share_of_the_pool() {
    for (endpoints, share, ejected) in
        [(1, 50, 0), (2, 50, 1), (3, 50, 1), (4, 50, 2), (4, 100, 4), (4, 0, 0)]
    {
        let outliers = Outliers { gateway_errors: 3, share_percent: share, ..Outliers::default() };
        let all: Vec<Script> = (0..endpoints).map(|_| Script::says(BAD)).collect();
        let table = ruled(&all.iter().collect::<Vec<_>>(), Resilience::default());
        let (proxy, _publisher) = start(watching(outliers), table);
        assert_eq!(ask(&mut wire::plain(proxy.http_addrs()[0]), 60), 0);
        let found = metric(&proxy, "lockgate_outlier_ejections_total{reason=\"gateway_errors\"}");
        assert_eq!(found, ejected, "{endpoints} endpoints, {share} %");
    }
}

/// Ejected by one worker, left alone by all; and what is known of an address outlives the table.
#[test]
fn a_share_of_good_answers_far_below_that_of_the_others() {
    let outliers = Outliers {
        success_percent: 80,
        interval: Duration::from_millis(1),
        requests: 10,
        ..Outliers::default()
    };
    let half = Script::new(|n| Act::Say(if n % 2 == 0 { WRONG } else { OK }));
    let good = [(); 2].map(|()| Script::says(OK));
    let table = ruled(&[&half, &good[0], &good[1]], Resilience::default());
    let (proxy, mut publisher) = start(watching(outliers), table);
    let mut client = wire::plain(proxy.http_addrs()[0]);
    until("the worker to compare", || {
        ask(&mut client, 30);
        metric(&proxy, "lockgate_outlier_ejections_total{reason=\"success_rate\"}") == 1
    });
    let before = half.asked();
    publisher.publish(ruled(&[&half, &good[1]], Resilience::default()));
    assert_eq!(ask(&mut client, 60), 60);
    assert_eq!(half.asked(), before);
    assert_eq!(metric(&proxy, "lockgate_endpoint_ejections_total"), 0, "nothing has failed");
}

#[test]
fn answers_far_later_than_those_of_the_others() {
    let outliers = Outliers {
        latency_percent: 300,
        latency_floor: Duration::from_millis(5),
        interval: Duration::from_millis(1),
        requests: 5,
        ..Outliers::default()
    };
    let late = Script::new(|_| Act::Wait(Duration::from_millis(40)));
    let good = Script::says(OK);
    let (proxy, _publisher) = start(watching(outliers), ruled(&[&late, &good], Resilience::default()));
    let mut client = wire::plain(proxy.http_addrs()[0]);
    until("the worker to compare", || {
        ask(&mut client, 20);
        metric(&proxy, "lockgate_outlier_ejections_total{reason=\"latency\"}") == 1
    });
    let before = late.asked();
    ask(&mut client, 20);
    assert_eq!(late.asked(), before);
}
