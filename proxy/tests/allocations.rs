//! A warm HTTP/1.1 request neither allocates nor frees; an HTTP/2 request has a bound.
//!
//! Counted is what happens on worker threads while requests pass; the test's own client and
//! endpoints run on other threads. `LOCKGATE_SHOW_ALLOCATIONS=1` prints where the first ones happen.
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "tests say what they expect by panicking")]

use std::net::SocketAddr;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

use lockgate_proxy::Config;
use lockgate_proxy::access_log::{AccessLogConfig, Destination, Format};
use lockgate_proxy::table::{
    Action, Authority, Backend, FieldEdit, FieldEdits, FieldName, FieldValue, HeaderEdits, Host, HostPattern,
    Override, PathMatch, Persistence, RoutingTable, Rule, Sticky, UpstreamProtocol, When,
};

#[path = "support/frames.rs"]
mod frames;
#[path = "support/heap.rs"]
mod heap;
#[path = "support/toy.rs"]
mod toy;
#[path = "support/wire.rs"]
mod wire;

// Threads are identified while their calls are counted.
use heap::{Change, IDENTIFYING as COUNTING};
use wire::{Message, Wire, answers, named, ok};

static ALLOCATED: AtomicU64 = AtomicU64::new(0);
static FREED: AtomicU64 = AtomicU64::new(0);
/// Backtraces still to be printed.
static SHOWN: AtomicU64 = AtomicU64::new(0);

fn on_worker(change: Change) {
    if !COUNTING.load(Relaxed) {
        return;
    }
    for (counter, bytes) in [(&ALLOCATED, change.taken), (&FREED, change.given)] {
        let Some(bytes) = bytes else { continue };
        counter.fetch_add(1, Relaxed);
        if SHOWN.load(Relaxed) > 0 {
            SHOWN.fetch_sub(1, Relaxed);
            eprintln!("{bytes} bytes at\n{}", std::backtrace::Backtrace::force_capture());
        }
    }
}

/// Over so many connections at once, each with one request under way.
const CONNECTIONS: usize = 4;
const WARM_UP: usize = 60;
const ROUNDS: usize = 256;

/// What rustls may allocate for one request and its answers, of which there are two when one says 100.
const TLS_ALLOCATIONS: u64 = 3;
/// Also as a record arrives in more than one read.
const TLS_ALLOCATIONS_LARGE: u64 = 8;

/// Allocations and frees of the worker over `ROUNDS * CONNECTIONS` requests.
///
/// `settle` is called before counting: what the worker still does for the last answer, once the client
/// has it, must be over then.
fn measure<S: std::io::Read + std::io::Write>(
    connections: &mut [Wire<S>],
    request: &[u8],
    check: impl Fn(&Message),
    settle: impl FnOnce(),
) -> (u64, u64) {
    let mut round = |times: usize| {
        for _ in 0..times {
            connections.iter_mut().for_each(|c| c.send(request));
            connections.iter_mut().for_each(|c| check(&final_answer(c)));
        }
    };
    round(WARM_UP);
    settle();
    if std::env::var_os("LOCKGATE_SHOW_ALLOCATIONS").is_some() {
        SHOWN.store(4, Relaxed);
    }
    ALLOCATED.store(0, Relaxed);
    FREED.store(0, Relaxed);
    COUNTING.store(true, Relaxed);
    round(ROUNDS);
    COUNTING.store(false, Relaxed);
    SHOWN.store(0, Relaxed);
    (ALLOCATED.load(Relaxed), FREED.load(Relaxed))
}

fn final_answer<S: std::io::Read + std::io::Write>(connection: &mut Wire<S>) -> Message {
    loop {
        let answer = connection.receive().unwrap().unwrap();
        if answer.status() >= 200 {
            return answer;
        }
    }
}

struct Case {
    name: &'static str,
    /// Header lines after Host, an empty line, and the body.
    request: &'static str,
    target: &'static str,
    status: u16,
}

const fn case(name: &'static str, target: &'static str, request: &'static str) -> Case {
    Case { name, request, target, status: 200 }
}

const CASES: &[Case] = &[
    case("GET", "GET /", "\r\n"),
    case("GET as browsers do", "GET /deep/path?with=query&and=more", BROWSER),
    Case { status: 204, ..case("HEAD", "HEAD /", "\r\n") },
    case("POST", "POST /", "Content-Length: 11\r\n\r\nhello world"),
    case(
        "POST in chunks",
        "POST /",
        "Transfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n6\r\n world\r\n0\r\n\r\n",
    ),
    case("POST asking to continue", "POST /", "Expect: 100-continue\r\nContent-Length: 5\r\n\r\nhello"),
    case("PUT with a larger body", "PUT /", LARGE),
    case("path in need of normalisation", "GET /a/%62/./c/..//d%20e", "\r\n"),
    case("chunked response", "GET /chunked", "\r\n"),
    case("response of 64 KiB", "GET /large", "\r\n"),
    case("canary by weight", "GET /canary/weight", "\r\n"),
    case("canary among three by weight", "GET /canary/three", "\r\n"),
    case("canary by header", "GET /canary/header", "X-Canary: always\r\n\r\n"),
    case("canary by header value", "GET /canary/value", "X-Canary: blue\r\n\r\n"),
    case("canary by header pattern", "GET /canary/pattern", "X-Canary: green-7\r\n\r\n"),
    case("canary by cookie", "GET /canary/cookie", "Cookie: a=b; canary=always; c=d\r\n\r\n"),
    case("sticky by cookie, a new user", "GET /sticky/cookie", "\r\n"),
    case("sticky by cookie, a known user", "GET /sticky/cookie", "Cookie: version=123\r\n\r\n"),
    case("sticky by header", "GET /sticky/header", "X-User: 4711\r\n\r\n"),
    case("least request", "GET /least", "\r\n"),
    case("headers edited", "GET /edited", BROWSER),
    Case { status: 403, ..case("headers edited of our answer", "GET /edited/refused", "\r\n") },
    Case { status: 404, ..case("no rule", "GET /elsewhere", "Host2: x\r\n\r\n") },
    Case { status: 403, ..case("answered by a rule", "GET /refused", "\r\n") },
    Case { status: 503, ..case("no endpoint", "GET /vacant", "\r\n") },
    Case { status: 308, ..case("redirect to https", "GET /secure", "\r\n") },
];

const BROWSER: &str = "User-Agent: Mozilla/5.0 (X11; Linux x86_64; rv:140.0) Gecko/20100101 Firefox/140.0\r\n\
    Accept: text/html,application/xhtml+xml,application/xml;q=0.9,*/*;q=0.8\r\n\
    Accept-Language: en-US,en;q=0.5\r\nAccept-Encoding: gzip, deflate, br, zstd\r\nReferer: https://shop.example/\r\n\
    Connection: keep-alive, X-Gone\r\nX-Gone: 1\r\nCookie: a=1; b=2\r\nX-Request-ID: 0123456789abcdef\r\n\
    X-Forwarded-For: 203.0.113.9, 10.0.0.1\r\nX-Forwarded-Proto: https\r\n\r\n";

/// More than is sent along with the head.
const LARGE: &str = {
    const BODY: &[u8; 12_000] = &[b'x'; 12_000];
    const HEAD: &[u8] = b"Content-Length: 12000\r\n\r\n";
    const BOTH: &[u8; HEAD.len() + BODY.len()] = &{
        let mut both = [0; HEAD.len() + BODY.len()];
        let (head, body) = both.split_at_mut(HEAD.len());
        head.copy_from_slice(HEAD);
        body.copy_from_slice(BODY);
        both
    };
    match std::str::from_utf8(BOTH) {
        Ok(text) => text,
        Err(_) => panic!(),
    }
};

/// Answers each kind of request that is asked of it.
fn primary() -> SocketAddr {
    let chunked: &[u8] =
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n6;x=y\r\n world\r\n0\r\n\r\n";
    let large = ok(&vec![b'x'; 64 << 10]);
    answers(move |request| match &request.head {
        head if head.starts_with("GET /chunked ") => chunked.to_vec(),
        head if head.starts_with("GET /large ") => large.clone(),
        head if head.starts_with("HEAD ") => b"HTTP/1.1 204 No Content\r\n\r\n".to_vec(),
        head if head.contains("Expect:") => {
            let mut answer = b"HTTP/1.1 100 Continue\r\n\r\n".to_vec();
            answer.extend_from_slice(&ok(b"hello"));
            answer
        }
        _ => ok(b"primary"),
    })
}

fn canary_table() -> RoutingTable {
    let canary = [named("canary"), named("canary")];
    let mut table = RoutingTable::default();
    let mut pool = |name: &str, endpoints: &[_]| {
        table.pools.insert(toy::key(name), Arc::new(toy::pool(endpoints, UpstreamProtocol::Http1)));
    };
    pool("default/app:80", &[primary()]);
    pool("default/canary:80", &canary[..1]);
    pool("default/third:80", &canary[1..]);
    pool("default/none:80", &[]);
    let mut least = toy::pool(&canary, UpstreamProtocol::Http1);
    least.balance = lockgate_proxy::table::Balance::LeastRequest;
    table.pools.insert(toy::key("default/least:80"), Arc::new(least));

    let answer = |path: &str, status| {
        let mut rule = toy::rule(PathMatch::Exact(path.into()), "default/app:80");
        rule.action = Action::Respond { status, reason: "a rule says so".into() };
        rule
    };
    let header = || "X-Canary".into();
    let mut rules = vec![
        split("/canary/weight", &[90, 10], None, None),
        split("/canary/three", &[50, 30, 20], None, None),
        split("/canary/header", &[100, 0], Some(When::Header(header())), None),
        split("/canary/value", &[100, 0], Some(When::HeaderValue(header(), "blue".into())), None),
        split(
            "/canary/pattern",
            &[100, 0],
            Some(When::HeaderPattern(header(), "^gr(e+)n-[0-9]".into())),
            None,
        ),
        split("/canary/cookie", &[100, 0], Some(When::Cookie("canary".into())), None),
        split("/sticky/cookie", &[50, 50], None, Some(Sticky::Cookie("version".into()))),
        split("/sticky/header", &[50, 50], None, Some(Sticky::Header("X-User".into()))),
        toy::rule(PathMatch::Prefix("/least".into()), "default/least:80"),
        toy::rule(PathMatch::Prefix("/vacant".into()), "default/none:80"),
        answer("/refused", 403),
    ];
    for path in ["/", "/deep", "/a/b/d e", "/chunked", "/large"] {
        rules.push(toy::rule(PathMatch::Exact(path.into()), "default/app:80"));
    }
    rules.push(toy::rule(PathMatch::Prefix("/deep/path".into()), "default/app:80"));
    for mut rule in
        [toy::rule(PathMatch::Prefix("/edited".into()), "default/app:80"), answer("/edited/refused", 403)]
    {
        rule.edits = Some(edits());
        rules.push(rule);
    }
    let mut secure = toy::rule(PathMatch::Prefix("/secure".into()), "default/app:80");
    secure.https_redirect = true;
    rules.push(secure);
    table.hosts.insert(HostPattern::new("app.example"), Arc::new(Host { rules }));
    table
}

/// A rule for `path` over the three versions of the application.
fn split(path: &str, weights: &[u32], when: Option<When>, sticky: Option<Sticky>) -> Rule {
    let mut rule = toy::rule(PathMatch::Prefix(path.into()), "default/app:80");
    let Action::Forward(split) = &mut rule.action else { unreachable!() };
    let pools = ["default/app:80", "default/canary:80", "default/third:80"];
    split.backends = pools
        .iter()
        .zip(weights)
        .map(|(pool, &weight)| Backend {
            pool: toy::key(pool),
            weight,
            canary: pool[8..11].into(),
            steering: None,
        })
        .collect();
    split.overrides = when.map(|when| Override { backend: 1, when }).into_iter().collect();
    split.sticky = sticky;
    rule
}

/// Some of every kind, also of what the proxy says itself.
fn edits() -> Arc<HeaderEdits> {
    let name = |name| FieldName::new(name).unwrap();
    let set = |field, value| FieldEdit::Set(name(field), FieldValue::new(value).unwrap());
    let add = |field, value| FieldEdit::Add(name(field), FieldValue::new(value).unwrap());
    let request =
        [set("X-Forwarded-Proto", "https"), add("X-Team", "shop"), FieldEdit::Remove(name("Accept"))];
    let response = [set("X-Frame-Options", "DENY"), add("Vary", "X-Team"), set("Content-Type", "text/html")];
    Arc::new(HeaderEdits {
        host: Some(Authority::new("app.internal").unwrap()),
        connection: Some(Persistence::KeepAlive),
        request: FieldEdits::new(request),
        response: FieldEdits::new(response),
    })
}

fn log(format: Format) -> Config {
    let destination = Destination::File(Path::new("/dev/null").to_owned());
    Config { access_log: Some(AccessLogConfig { format, destination }), ..toy::config() }
}

/// One test: two at once would count each other.
#[test]
fn warm_requests_allocate_nothing() {
    let trusting = Config { trusted: vec!["127.0.0.0/8".parse().unwrap()], ..toy::config() };
    let configs = [
        ("no log", toy::config()),
        ("JSON log", log(Format::Json)),
        ("combined log", log(Format::Combined)),
        ("trusted peer", trusting),
    ];
    let mut found = Vec::new();
    for (name, config) in configs {
        let (proxy, _publisher) = toy::start(config, canary_table());
        let mut clients: Vec<_> = (0..CONNECTIONS).map(|_| wire::plain(proxy.http_addrs()[0])).collect();
        for case in CASES {
            let request = format!("{} HTTP/1.1\r\nHost: app.example\r\n{}", case.target, case.request);
            let check = |answer: &Message| {
                assert_eq!(answer.status(), case.status, "{name}, {}: {}", case.name, answer.head);
            };
            let counts = measure(&mut clients, request.as_bytes(), check, || {});
            if counts != (0, 0) {
                found.push(format!("{name}, {}: {counts:?} in {} requests", case.name, ROUNDS * CONNECTIONS));
            }
        }
    }
    assert!(found.is_empty(), "allocations and frees of the worker:\n{}", found.join("\n"));
    over_tls();
    over_h2();
}

/// rustls keeps each record in a `Vec` of its own, one for what was received and one for what is
/// to be sent. More than that would be ours.
fn over_tls() {
    let (proxy, _publisher) = toy::start(toy::config(), canary_table());
    let config = lockgate_proxy::tls::client_config(false);
    let connect = |_| wire::secure(proxy.https_addrs()[0], "app.example", &config);
    let mut clients: Vec<_> = (0..CONNECTIONS).map(connect).collect();
    let mut plain = wire::plain(proxy.http_addrs()[0]);
    let mut found = Vec::new();
    for case in CASES.iter().filter(|case| !case.target.contains("large") && case.status < 300) {
        let request = format!("{} HTTP/1.1\r\nHost: app.example\r\n{}", case.target, case.request);
        let check = |answer: &Message| {
            assert_eq!(answer.status(), case.status, "TLS, {}: {}", case.name, answer.head);
        };
        // Another connection of the one worker: when it has answered there, it is through here. In the
        // clear, where nothing is freed.
        let settle = || drop(plain.ask(b"GET / HTTP/1.1\r\nHost: app.example\r\n\r\n"));
        let (allocated, freed) = measure(&mut clients, request.as_bytes(), check, settle);
        let requests = (ROUNDS * CONNECTIONS) as u64;
        println!("TLS, {}: {:.2} allocations per request", case.name, allocated as f64 / requests as f64);
        let large = case.request.len() > 4 << 10;
        let bound = requests * if large { TLS_ALLOCATIONS_LARGE } else { TLS_ALLOCATIONS };
        if allocated > bound || freed > bound {
            found.push(format!("{}: {allocated}, {freed} in {requests} requests", case.name));
        }
    }
    assert!(found.is_empty(), "allocations and frees of the worker:\n{}", found.join("\n"));
}

/// What one HTTP/2 request of each kind may allocate.
const H2_CASES: &[(&str, &str, f64)] =
    &[("GET", "/", 6.0), ("chunked response", "/chunked", 6.0), ("no rule", "/elsewhere", 16.0)];

/// Streams under way at once.
const STREAMS: u32 = 16;

/// The `h2` crate builds a map of each request's fields (two allocations, and one for each value that
/// is in no table); we build one of the response's. All else comes from pools.
fn over_h2() {
    let (proxy, _publisher) = toy::start(toy::config(), canary_table());
    let mut found = Vec::new();
    for (name, path, bound) in H2_CASES {
        let mut peer = frames::Peer::connect(proxy.http_addrs()[0], &[(4, 1 << 30)]);
        peer.send(&frames::window_update(0, 1 << 30)).unwrap();
        let mut fields = frames::request("GET", path);
        let at = fields.windows(9).position(|w| w == b"a.example").unwrap();
        fields.splice(at - 1..at + 9, *b"\x0bapp.example");
        fields.extend(frames::field(b"user-agent", b"h2load nghttp2/1.52.0"));
        peer.read();
        let mut id = 1;
        let mut round = |times: usize| {
            for _ in 0..times {
                let batch: Vec<u8> = (0..STREAMS)
                    .flat_map(|n| frames::frame(frames::HEADERS, 5, id + 2 * n, &fields))
                    .collect();
                peer.send(&batch).unwrap();
                for n in 0..STREAMS {
                    let stream = id + 2 * n;
                    let end = |f: &frames::Frame| f.stream == stream && f.flags & frames::END_STREAM != 0;
                    peer.wait(end).unwrap();
                }
                peer.forget();
                id += 2 * STREAMS;
            }
        };
        round(20);
        if std::env::var_os("LOCKGATE_SHOW_ALLOCATIONS").is_some() {
            SHOWN.store(150, Relaxed);
        }
        ALLOCATED.store(0, Relaxed);
        COUNTING.store(true, Relaxed);
        round(64);
        COUNTING.store(false, Relaxed);
        let allocated = ALLOCATED.load(Relaxed) as f64 / f64::from(64 * STREAMS);
        println!("HTTP/2, {name}: {allocated:.2} allocations per request");
        if allocated > *bound {
            found.push(format!("{name}: {allocated:.2} per request"));
        }
    }
    assert!(found.is_empty(), "allocations of the worker:\n{}", found.join("\n"));
}
