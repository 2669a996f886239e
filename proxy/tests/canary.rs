//! Canary splits through real sockets: exact shares, who decides first, who stays where.
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "tests say what they expect by panicking")]

use std::net::SocketAddr;
use std::sync::Arc;

use lockgate_proxy::table::{
    Action, Backend, Host, HostPattern, Override, PathMatch, RoutingTable, Split, Sticky, UpstreamProtocol,
    When,
};
use lockgate_proxy::{Proxy, Publisher};

#[path = "support/toy.rs"]
mod toy;
#[path = "support/wire.rs"]
mod wire;

use wire::{Plain, named};

/// Over so many consecutive requests every share is exact to one request.
const WINDOW: usize = 1_000;

/// Backends by name; each endpoint answers with the name of its backend.
const NAMES: [&str; 3] = ["primary", "canary", "third"];

struct Stage {
    proxy: Proxy,
    publisher: Publisher,
    endpoints: Vec<SocketAddr>,
}

impl Stage {
    fn new() -> Stage {
        let endpoints = NAMES.map(named).to_vec();
        let (proxy, publisher) = toy::start(toy::config(), RoutingTable::default());
        Stage { proxy, publisher, endpoints }
    }

    /// Publishes one rule that divides as `split` says; `serving` are the backends with an endpoint.
    fn publish(&mut self, split: Split, serving: &[usize]) {
        let mut table = RoutingTable::default();
        for (index, name) in NAMES.iter().enumerate() {
            let endpoint = &self.endpoints[index..=index];
            let endpoints = if serving.contains(&index) { endpoint } else { &[] };
            let pool = toy::pool(endpoints, UpstreamProtocol::Http1);
            table.pools.insert(toy::key(name), Arc::new(pool));
        }
        let mut rule = toy::rule(PathMatch::Prefix("/".into()), "primary");
        rule.action = Action::Forward(split);
        table.hosts.insert(HostPattern::any(), Arc::new(Host { rules: vec![rule] }));
        self.publisher.publish(table);
    }

    fn connect(&self) -> Plain {
        wire::plain(self.proxy.http_addrs()[0])
    }
}

fn split(weights: &[u32]) -> Split {
    let backend = |(name, weight): (&&str, &u32)| Backend {
        pool: toy::key(name),
        weight: *weight,
        canary: if *name == "primary" { "".into() } else { (*name).into() },
        steering: None,
    };
    Split { backends: NAMES.iter().zip(weights).map(backend).collect(), overrides: Vec::new(), sticky: None }
}

/// Who answers `count` requests in a row on one connection, pipelined.
fn served(client: &mut Plain, count: usize) -> Vec<usize> {
    const BATCH: usize = 100;
    let mut served = Vec::with_capacity(count);
    while served.len() < count {
        let batch = BATCH.min(count - served.len());
        client.send("GET / HTTP/1.1\r\nHost: a\r\n\r\n".repeat(batch).as_bytes());
        for _ in 0..batch {
            let answer = client.receive().unwrap().unwrap();
            let backend = NAMES.iter().position(|name| *name == answer.text());
            served.push(backend.unwrap_or_else(|| panic!("{} {}", answer.head, answer.text())));
        }
    }
    served
}

/// Asserts the share of every backend in every window.
fn assert_shares(weights: &[u32], served: &[usize]) {
    let total: u64 = weights.iter().map(|w| u64::from(*w)).sum();
    for (backend, weight) in weights.iter().enumerate() {
        let mut inside = served[..WINDOW].iter().filter(|s| **s == backend).count() as u64;
        for end in WINDOW..=served.len() {
            // |inside - window * weight / total| <= 1, without fractions.
            let exact = WINDOW as u64 * u64::from(*weight);
            let off = (inside * total).abs_diff(exact);
            assert!(off <= total, "{weights:?}: {inside} to {} in the window before {end}", NAMES[backend]);
            if end < served.len() {
                inside += u64::from(served[end] == backend);
                inside -= u64::from(served[end - WINDOW] == backend);
            }
        }
    }
}

#[test]
fn any_thousand_requests_are_divided_within_one() {
    let mut stage = Stage::new();
    let mut client = stage.connect();
    let mut splits: Vec<(Vec<u32>, usize)> = (0..=100).map(|w| (vec![100 - w, w], WINDOW + 60)).collect();
    let odd: [&[u32]; 13] = [
        &[99, 1],
        &[2, 1],
        &[6, 1],
        &[993, 7],
        &[9_973, 27],
        &[999_999, 1],
        &[1_000_000_007, 998_244_353],
        &[1, 1, 1],
        &[90, 5, 5],
        &[50, 30, 20],
        &[997, 2, 1],
        &[3_331, 3_333, 3_337],
        &[0, 7, 4],
    ];
    splits.extend(odd.into_iter().map(|weights| (weights.to_vec(), 2 * WINDOW + WINDOW / 2)));
    for (weights, requests) in splits {
        stage.publish(split(&weights), &[0, 1, 2]);
        // The window may begin anywhere in the cycle, also right where the weights changed.
        assert_shares(&weights, &served(&mut client, requests));
    }
}

#[test]
fn no_weight_at_all_is_the_primarys() {
    let mut stage = Stage::new();
    let mut client = stage.connect();
    stage.publish(split(&[0, 0, 0]), &[0, 1, 2]);
    assert_eq!(served(&mut client, 20), [0; 20]);
}

/// One row of the table: conditions of the canary, its weight of 100, the request's headers, who serves.
type Row = (&'static str, &'static [When2], u32, &'static str, &'static str);

/// [`When`] as a constant.
enum When2 {
    Header,
    Value(&'static str),
    Pattern(&'static str),
    Cookie,
}
use When2::{Cookie, Header, Pattern, Value};

const ROWS: &[Row] = &[
    ("header always takes the canary at weight 0", &[Header], 0, "X-Canary: always", "canary"),
    ("header never excludes it at weight 100", &[Header], 100, "X-Canary: never", "primary"),
    ("header with another value falls through to weight 0", &[Header], 0, "X-Canary: yes", "primary"),
    ("header with another value falls through to weight 100", &[Header], 100, "X-Canary: yes", "canary"),
    ("no header falls through", &[Header], 100, "X-Other: never", "canary"),
    ("header names know no case", &[Header], 0, "x-cAnArY: always", "canary"),
    ("header values do", &[Header], 0, "X-Canary: Always", "primary"),
    ("an empty header says nothing", &[Header], 0, "X-Canary:", "primary"),
    ("the value takes the canary", &[Value("blue")], 0, "X-Canary: blue", "canary"),
    ("another value falls through to weight 0", &[Value("blue")], 0, "X-Canary: red", "primary"),
    ("another value falls through to weight 100", &[Value("blue")], 100, "X-Canary: red", "canary"),
    ("with a value, always means nothing", &[Value("blue")], 0, "X-Canary: always", "primary"),
    ("with a value, never means nothing", &[Value("blue")], 100, "X-Canary: never", "canary"),
    ("the value `always` is just a value", &[Value("always")], 0, "X-Canary: always", "canary"),
    ("a pattern is searched for", &[Pattern("gr(a|e)y")], 0, "X-Canary: dark grey", "canary"),
    ("a pattern may be anchored", &[Pattern("^grey$")], 0, "X-Canary: dark grey", "primary"),
    ("no match falls through to weight 100", &[Pattern("^grey$")], 100, "X-Canary: x", "canary"),
    ("with a pattern, always means nothing", &[Pattern("^grey$")], 0, "X-Canary: always", "primary"),
    ("with a pattern, never means nothing", &[Pattern("^grey$")], 100, "X-Canary: never", "canary"),
    ("cookie always takes the canary at weight 0", &[Cookie], 0, "Cookie: a=b; try=always", "canary"),
    ("cookie never excludes it at weight 100", &[Cookie], 100, "Cookie: try=never", "primary"),
    ("cookie with another value falls through", &[Cookie], 100, "Cookie: try=yes", "canary"),
    ("cookie names know case", &[Cookie], 0, "Cookie: Try=always", "primary"),
    (
        "header always beats cookie never",
        &[Header, Cookie],
        0,
        "X-Canary: always\r\nCookie: try=never",
        "canary",
    ),
    (
        "header never beats cookie always",
        &[Header, Cookie],
        100,
        "X-Canary: never\r\nCookie: try=always",
        "primary",
    ),
    (
        "a header that says nothing leaves it to the cookie",
        &[Header, Cookie],
        0,
        "X-Canary: x\r\nCookie: try=always",
        "canary",
    ),
    (
        "a value that differs leaves it to the cookie",
        &[Value("blue"), Cookie],
        100,
        "X-Canary: red\r\nCookie: try=never",
        "primary",
    ),
    (
        "a pattern that fails leaves it to the cookie",
        &[Pattern("^b"), Cookie],
        0,
        "X-Canary: red\r\nCookie: try=always",
        "canary",
    ),
    ("neither header nor cookie leaves it to weight 0", &[Header, Cookie], 0, "X-Other: 1", "primary"),
    ("neither header nor cookie leaves it to weight 100", &[Header, Cookie], 100, "X-Other: 1", "canary"),
];

#[test]
fn header_then_cookie_then_weight() {
    let mut stage = Stage::new();
    let mut client = stage.connect();
    for (name, conditions, weight, headers, expected) in ROWS {
        let mut split = split(&[100 - weight, *weight]);
        split.overrides = conditions
            .iter()
            .map(|condition| Override {
                backend: 1,
                when: match condition {
                    Header => When::Header("X-Canary".into()),
                    Value(value) => When::HeaderValue("X-Canary".into(), (*value).into()),
                    Pattern(pattern) => When::HeaderPattern("X-Canary".into(), (*pattern).into()),
                    Cookie => When::Cookie("try".into()),
                },
            })
            .collect();
        stage.publish(split, &[0, 1]);
        for _ in 0..3 {
            let answer = client.ask(format!("GET / HTTP/1.1\r\nHost: a\r\n{headers}\r\n\r\n").as_bytes());
            assert_eq!(answer.text(), *expected, "{name}");
            assert_eq!(answer.header("set-cookie"), None, "{name}");
        }
    }
}

#[test]
fn each_of_several_canaries_has_its_own_header() {
    let mut stage = Stage::new();
    let mut client = stage.connect();
    let mut split = split(&[100, 0, 0]);
    let header = |backend, name: &str| Override { backend, when: When::Header(name.into()) };
    split.overrides = vec![header(1, "X-One"), header(2, "X-Two")];
    stage.publish(split, &[0, 1, 2]);
    for (headers, expected) in [
        ("X-One: always", "canary"),
        ("X-Two: always", "third"),
        ("X-Two: always\r\nX-One: always", "canary"),
        ("X-One: never\r\nX-Two: always", "third"),
        ("X-One: never\r\nX-Two: never", "primary"),
    ] {
        let answer = client.ask(format!("GET / HTTP/1.1\r\nHost: a\r\n{headers}\r\n\r\n").as_bytes());
        assert_eq!(answer.text(), expected, "{headers}");
    }
}

/// The value of the cookie that an answer sets.
fn cookie(answer: &wire::Message) -> Option<String> {
    let value = answer.header("set-cookie")?.strip_prefix("version=")?;
    Some(value.split(';').next()?.to_owned())
}

#[test]
fn users_stay_while_the_weight_rises_and_only_move_to_the_canary() {
    const USERS: usize = 400;
    let mut stage = Stage::new();
    let mut client = stage.connect();
    let sticky =
        |weight| Split { sticky: Some(Sticky::Cookie("version".into())), ..split(&[100 - weight, weight]) };
    stage.publish(sticky(5), &[0, 1]);
    let mut users: Vec<(String, String)> = (0..USERS)
        .map(|_| {
            let answer = client.ask(b"GET / HTTP/1.1\r\nHost: a\r\n\r\n");
            (cookie(&answer).expect("a cookie for a new user"), answer.text().to_owned())
        })
        .collect();
    for weight in [5, 25, 50, 100] {
        stage.publish(sticky(weight), &[0, 1]);
        for (cookie, version) in &mut users {
            // Twice: it does not depend on who asked in between.
            for _ in 0..2 {
                let request = format!("GET / HTTP/1.1\r\nHost: a\r\nCookie: x=1; version={cookie}\r\n\r\n");
                let answer = client.ask(request.as_bytes());
                assert_eq!(answer.header("set-cookie"), None, "a known user keeps its cookie");
                let moved = (version.as_str(), answer.text());
                assert!(matches!(moved, ("primary", _) | ("canary", "canary")), "{weight} %: {moved:?}");
                *version = answer.text().to_owned();
            }
        }
        let canary = users.iter().filter(|(_, version)| version == "canary").count();
        let exact = USERS * weight as usize / 100;
        assert!(canary.abs_diff(exact) <= USERS / 100, "{weight} %: {canary} of {USERS} users");
    }
}

#[test]
fn a_cookie_that_is_no_bucket_is_replaced() {
    let mut stage = Stage::new();
    let mut client = stage.connect();
    let split = Split { sticky: Some(Sticky::Cookie("version".into())), ..split(&[50, 50]) };
    stage.publish(split, &[0, 1]);
    for value in ["", "x", "-1", "10000", "99999999999999999999", "1 2"] {
        let answer =
            client.ask(format!("GET / HTTP/1.1\r\nHost: a\r\nCookie: version={value}\r\n\r\n").as_bytes());
        let bucket: u16 = cookie(&answer).unwrap_or_else(|| panic!("{value:?} was taken")).parse().unwrap();
        assert!(bucket < 10_000, "{bucket}");
    }
}

#[test]
fn a_backend_without_endpoints() {
    let mut stage = Stage::new();
    let mut client = stage.connect();
    let mut with_header = split(&[50, 50]);
    with_header.overrides = vec![Override { backend: 1, when: When::Header("X-Canary".into()) }];
    let request = b"GET / HTTP/1.1\r\nHost: a\r\nX-Canary: always\r\n\r\n";

    // A canary without: the primary takes its part, also of those who asked for the canary.
    stage.publish(with_header.clone(), &[0]);
    assert_eq!(served(&mut client, 20), [0; 20]);
    assert_eq!(client.ask(request).text(), "primary");

    // The primary without: its part is refused, the canary's is served.
    stage.publish(with_header.clone(), &[1]);
    assert_eq!(client.ask(request).text(), "canary");
    let get = b"GET / HTTP/1.1\r\nHost: a\r\n\r\n";
    let statuses: Vec<u16> = (0..20).map(|_| client.ask(get).status()).collect();
    assert_eq!(statuses.iter().filter(|s| **s == 503).count(), 10, "{statuses:?}");
    assert_eq!(statuses.iter().filter(|s| **s == 200).count(), 10, "{statuses:?}");

    // Neither.
    stage.publish(with_header, &[]);
    assert_eq!(client.ask(get).status(), 503);
    assert_eq!(client.ask(request).status(), 503);

    // And back, on the same connection.
    stage.publish(split(&[50, 50]), &[0, 1]);
    let back = served(&mut client, 20);
    assert_eq!(back.iter().filter(|s| **s == 1).count(), 10, "{back:?}");
}
