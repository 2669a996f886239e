//! How requests divide where that depends on how endpoints do, where they are, and how long they have
//! been there: counts over many requests through a proxy. Its draws are seeded with the worker's number,
//! so with one worker only time differs from run to run.
#![allow(clippy::unwrap_used, reason = "a test says what it expects by panicking")]

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::SeqCst};
use std::time::Duration;

use lockgate_proxy::Config;
use lockgate_proxy::endpoint::Ejection;
use lockgate_proxy::table::{Balance, Endpoint, Pool, RoutingTable, UpstreamProtocol};
use tokio::time::Instant;

#[path = "support/toy.rs"]
mod toy;
#[path = "support/wire.rs"]
mod wire;

use toy::PATIENCE;
use wire::{Plain, named, ok};

/// Everything to these endpoints, each with its zone.
fn table(endpoints: &[(SocketAddr, &str)], with: impl Fn(&mut Pool)) -> RoutingTable {
    let mut table = toy::table(&[], UpstreamProtocol::Http1);
    let endpoint = |(address, zone): &(SocketAddr, &str)| Endpoint {
        address: *address,
        weight: 1,
        zone: (!zone.is_empty()).then(|| (*zone).into()),
    };
    let mut endpoints: Vec<_> = endpoints.iter().map(endpoint).collect();
    endpoints.sort();
    let mut pool = Pool { protocol: UpstreamProtocol::Http1, endpoints, ..Pool::default() };
    with(&mut pool);
    table.pools.insert(toy::key("default/app:80"), Arc::new(pool));
    table
}

/// Asks once: the name of the endpoint that answered.
fn ask(client: &mut Plain) -> String {
    let answer = client.ask(b"GET / HTTP/1.1\r\nHost: a\r\n\r\n");
    assert_eq!(answer.status(), 200, "{}", answer.head);
    answer.text().to_owned()
}

/// Answers by the name of the endpoint.
fn shares(client: &mut Plain, requests: usize) -> BTreeMap<String, usize> {
    let mut shares = BTreeMap::new();
    for _ in 0..requests {
        *shares.entry(ask(client)).or_default() += 1;
    }
    shares
}

/// Five standard deviations of `requests` independent draws with the chance `p`: exceeded by chance once
/// in two million runs, were the draws not seeded.
fn margin(requests: usize, p: f64) -> usize {
    (5.0 * (requests as f64 * p * (1.0 - p)).sqrt()).ceil() as usize
}

/// The slow endpoint always takes four times as long as the fast one ever took, however slow this machine
/// is right now. So it is asked while nothing is known of it, and again only when a hiccup has made the
/// other one look slower still, for one request each: a tenth is far more than that, and far from half.
#[test]
fn ewma_prefers_the_faster() {
    const REQUESTS: usize = 400;
    for slow_is_first in [true, false] {
        let pause = Arc::new(AtomicU64::new(10_000));
        let theirs = pause.clone();
        let slow = wire::answers(move |_| {
            std::thread::sleep(Duration::from_micros(theirs.load(SeqCst)));
            ok(b"slow")
        });
        // Of two that the system has given ports, the one before the slow one or behind it.
        let fast = loop {
            let fast = named("fast");
            if (slow < fast) == slow_is_first {
                break fast;
            }
        };
        let table = table(&[(slow, ""), (fast, "")], |pool| pool.balance = Balance::Ewma);
        let (proxy, _publisher) = toy::start(toy::config(), table);
        let mut client = wire::plain(proxy.http_addrs()[0]);
        let mut slow = 0;
        for _ in 0..REQUESTS {
            let began = Instant::now();
            match ask(&mut client).as_str() {
                "slow" => slow += 1,
                _ => {
                    pause.fetch_max(4 * began.elapsed().as_micros() as u64, SeqCst);
                }
            }
        }
        assert!((1..=REQUESTS / 10).contains(&slow), "{slow} of {REQUESTS} went to the slow one");
    }
}

fn in_zone_a() -> Config {
    // Who refuses is found out once, and not tried again in this test.
    let ejection = Ejection { consecutive: 1, base_ms: 600_000, max_ms: 600_000 };
    Config { zone: Some("a".into()), ejection, ..toy::config() }
}

#[test]
fn requests_stay_in_the_zone_and_what_it_cannot_carry_spills_over() {
    const REQUESTS: usize = 1_000;
    let cases: &[(&[&'static str], f64)] = &[
        (&["a", "a", "b", "b"], 1.0),
        (&["a", "b", "c"], 1.0),
        // One of four, where each zone sends half; one of six, where each sends a third.
        (&["a", "b", "b", "b"], 0.5),
        (&["a", "b", "b", "c", "c", "c"], 0.5),
        (&["a", "b", "b", "b", "b"], 0.4),
        // None.
        (&["b", "b", "c"], 0.0),
    ];
    for balance in [Balance::RoundRobin, Balance::LeastRequest] {
        for (zones, near) in cases {
            let in_zone = |zone: &&'static str| (named(if *zone == "a" { "near" } else { "far" }), *zone);
            let endpoints: Vec<_> = zones.iter().map(in_zone).collect();
            let table = table(&endpoints, |pool| (pool.balance, pool.prefer_zone) = (balance, true));
            let (proxy, _publisher) = toy::start(in_zone_a(), table);
            let shares = shares(&mut wire::plain(proxy.http_addrs()[0]), REQUESTS);
            let (got, expected) = (shares.get("near").copied().unwrap_or(0), near * REQUESTS as f64);
            let within = margin(REQUESTS, *near);
            assert!(got.abs_diff(expected as usize) <= within, "{balance:?} {zones:?}: {shares:?}");
        }
    }
}

/// Half of the zone refuses: no client sees it, and its other half keeps what one of three can carry of
/// half of the requests.
#[test]
fn a_zone_that_loses_an_endpoint_keeps_what_the_others_can_carry() {
    const REQUESTS: usize = 3_000;
    let refusing = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let endpoints = [(refusing, "a"), (named("near"), "a"), (named("far"), "b"), (named("far"), "b")];
    let (proxy, _publisher) = toy::start(in_zone_a(), table(&endpoints, |pool| pool.prefer_zone = true));
    let mut client = wire::plain(proxy.http_addrs()[0]);
    let deadline = Instant::now() + PATIENCE;
    // What a zone carries is looked at anew a few times a second: whatever spills over is the sign.
    while ask(&mut client) != "far" {
        assert!(Instant::now() < deadline, "nothing spills over");
    }
    let shares = shares(&mut client, REQUESTS);
    let within = margin(REQUESTS, 2.0 / 3.0);
    assert!(shares["near"].abs_diff(REQUESTS * 2 / 3) <= within, "{shares:?}");
}

/// The share of a new endpoint beside two old ones, `age` after it came, if it should have a third after
/// `window`: in its turn it takes a request with a chance that grows from a tenth to one.
fn ramp(age: Duration, window: Duration) -> f64 {
    let part = (age.as_secs_f64() / window.as_secs_f64()).clamp(0.1, 1.0);
    part / (2.0 + part)
}

/// No time is assumed: of each request it is known how old the endpoint was at least and at most when it
/// was chosen, and the count must lie between the sums of both chances.
#[test]
fn a_new_endpoint_comes_to_its_share_slowly() {
    const WINDOW: Duration = Duration::from_secs(1);
    let slowly = |pool: &mut Pool| (pool.balance, pool.slow_start) = (Balance::RoundRobin, Some(WINDOW));
    let olds = [(named("old"), ""), (named("old"), "")];
    let (proxy, mut publisher) = toy::start(toy::config(), table(&olds, slowly));
    let mut client = wire::plain(proxy.http_addrs()[0]);
    let came = Instant::now();
    while came.elapsed() <= WINDOW {
        assert_eq!(ask(&mut client), "old");
    }
    let new = (named("new"), "");
    let before = Instant::now();
    publisher.publish(table(&[olds[0], olds[1], new], slowly));
    let after = Instant::now();
    let (mut requests, mut taken, mut least, mut most) = (0, 0, 0.0, 0.0);
    while after.elapsed() <= WINDOW {
        least += ramp(after.elapsed(), WINDOW);
        taken += usize::from(ask(&mut client) == "new");
        most += ramp(before.elapsed(), WINDOW);
        requests += 1;
    }
    // As `margin`: the variance of a sum of draws is at most the sum of their chances.
    let within = 5.0 * f64::sqrt(most) + 2.0;
    let bounds = least - within..=most + within;
    assert!(bounds.contains(&(taken as f64)), "{taken} of {requests}, not {bounds:?}");
    // Then it is one of three, in turn.
    let shares = shares(&mut client, 300);
    assert_eq!(shares["new"], 100, "{shares:?}");
}
