//! Which endpoint a request names by key or session, seen by real clients and endpoints: over
//! HTTP/1 and HTTP/2, across workers, publishes and proxies.
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "tests say what they expect by panicking")]

use std::collections::{BTreeMap, BTreeSet};
use std::net::SocketAddr;
use std::sync::Arc;

use http::Method;
use lockgate_proxy::config::Timeouts;
use lockgate_proxy::endpoint::Ejection;
use lockgate_proxy::table::{
    Action, Affinity, Backend, HashBy, Host, HostPattern, KeyPart, NamingKey, PathMatch, Pool, RoutingTable,
    Session, Split, Steering, UpstreamProtocol, Variable,
};
use lockgate_proxy::{Config, Proxy, Publisher};

#[path = "support/peers.rs"]
mod peers;
#[path = "support/toy.rs"]
mod toy;
#[path = "support/wire.rs"]
mod wire;

use wire::{Message, Plain};

const APP: &str = "default/app:80";
const CANARY: &str = "default/canary:80";

/// An endpoint that answers with its own address, and hangs up on `/break/` and that.
fn station() -> SocketAddr {
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    std::thread::spawn(move || {
        for stream in listener.incoming().map_while(Result::ok) {
            std::thread::spawn(move || {
                let mut wire = wire::Wire::new(stream);
                while let Ok(Some(request)) = wire.receive() {
                    if request.head.contains(&format!("/break/{address}")) {
                        return;
                    }
                    wire.send(&wire::ok(address.to_string().as_bytes()));
                }
            });
        }
    });
    address
}

fn stations(count: usize) -> Vec<SocketAddr> {
    let mut stations: Vec<SocketAddr> = (0..count).map(|_| station()).collect();
    stations.sort();
    stations
}

fn session(affinity: Affinity) -> Session {
    Session::new("INGRESSCOOKIE", affinity)
}

fn by(variable: Variable, subset: u16) -> Steering {
    Steering::Hash(HashBy { key: vec![KeyPart::Variable(variable)], subset })
}

fn pool(endpoints: &[SocketAddr], protocol: UpstreamProtocol) -> Arc<Pool> {
    let seating = Some(NamingKey("6f0c1f1e-6a2e-4a52-9d1c-0e8a3d0f1b11".into()));
    Arc::new(Pool { seating, ..toy::pool(endpoints, protocol) })
}

fn backend(pool: &str, weight: u32, steering: &Steering) -> Backend {
    let canary = if pool == CANARY { "canary".into() } else { "".into() };
    Backend { pool: toy::key(pool), weight, canary, steering: Some(Arc::new(steering.clone())) }
}

fn table(endpoints: &[SocketAddr], steering: &Steering) -> RoutingTable {
    split(endpoints, UpstreamProtocol::Http1, vec![backend(APP, 1, steering)])
}

fn split(endpoints: &[SocketAddr], protocol: UpstreamProtocol, backends: Vec<Backend>) -> RoutingTable {
    let mut table = RoutingTable::default();
    table.pools.insert(toy::key(APP), pool(endpoints, protocol));
    let mut rule = toy::rule(PathMatch::Prefix("/".into()), APP);
    rule.action = Action::Forward(Split { backends, overrides: Vec::new(), sticky: None });
    table.hosts.insert(HostPattern::any(), Arc::new(Host { rules: vec![rule] }));
    table
}

/// A proxy of two workers, whose connection failures eject at once.
fn start(table: RoutingTable) -> (Proxy, Publisher) {
    let ejection = Ejection { consecutive: 1, base_ms: 600_000, max_ms: 600_000 };
    let timeouts = Timeouts::default();
    toy::start(Config { workers: 2, ejection, timeouts, ..toy::config() }, table)
}

fn get(client: &mut Plain, path: &str, header: &str) -> Message {
    let answer = client.ask(format!("GET {path} HTTP/1.1\r\nHost: a\r\n{header}\r\n").as_bytes());
    assert_eq!(answer.status(), 200, "{}", answer.head);
    answer
}

/// The `name=value` that an answer sets.
fn cookie(answer: &Message) -> Option<String> {
    answer.header("set-cookie").map(|line| line.split(';').next().unwrap().to_owned())
}

/// Who answers each of a hundred keys.
fn map(proxy: &Proxy, header: bool) -> BTreeMap<usize, String> {
    // Some connections to each worker.
    let mut clients: Vec<Plain> = (0..8).map(|_| wire::plain(proxy.http_addrs()[0])).collect();
    let ask = |key: usize| {
        let client = &mut clients[key % 8];
        let answer = match header {
            true => get(client, "/", &format!("X-Key: {key}\r\n")),
            false => get(client, &format!("/page/{key}?q=1"), ""),
        };
        (key, answer.text().to_owned())
    };
    (0..100).map(ask).collect()
}

#[test]
fn a_key_has_one_endpoint_in_every_worker_generation_and_process() {
    let all = stations(5);
    for (variable, header) in [(Variable::RequestUri, false), (Variable::Header("x-key".into()), true)] {
        let steering = by(variable, 1);
        let (proxy, mut publisher) = start(table(&all, &steering));
        let first = map(&proxy, header);
        assert_eq!(first.values().collect::<BTreeSet<_>>().len(), 5);
        assert_eq!(map(&proxy, header), first);

        // One more takes some keys; nothing moves between the others, and all is as before without it.
        let more = station();
        let both: Vec<SocketAddr> = all.iter().copied().chain([more]).collect();
        publisher.publish(table(&both, &steering));
        let now = map(&proxy, header);
        let moved: Vec<_> = first.iter().filter(|(key, was)| now[*key] != **was).collect();
        assert!((4..=40).contains(&moved.len()), "{}", moved.len());
        assert!(moved.iter().all(|(key, _)| now[*key] == more.to_string()));
        publisher.publish(table(&all, &steering));
        assert_eq!(map(&proxy, header), first);

        let (other, _publisher) = start(table(&all, &steering));
        assert_eq!(map(&other, header), first);
    }
}

#[test]
fn a_key_has_a_subset_of_endpoints() {
    let all = stations(6);
    let (proxy, _publisher) = start(table(&all, &by(Variable::RequestUri, 2)));
    let mut client = wire::plain(proxy.http_addrs()[0]);
    let mut used = BTreeSet::new();
    for key in 0..20 {
        let asked = (0..40).map(|_| get(&mut client, &format!("/{key}"), "").text().to_owned());
        let of_key: BTreeSet<String> = asked.collect();
        assert_eq!(of_key.len(), 2, "{key}");
        used.extend(of_key);
    }
    assert!(used.len() > 3);
}

#[test]
fn a_key_whose_endpoint_fails_goes_to_the_next() {
    let mut all = stations(3);
    let gone = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    all.push(gone);
    all.sort();
    let (proxy, _publisher) = start(table(&all, &by(Variable::RequestUri, 1)));
    let served = map(&proxy, false);
    assert!(served.values().all(|by| *by != gone.to_string()));
    assert_eq!(map(&proxy, false), served);
}

#[test]
fn a_session_stays_where_it_began() {
    let all = stations(4);
    for affinity in [Affinity::Balanced, Affinity::Persistent] {
        let steering = Steering::Session(session(affinity));
        let (proxy, mut publisher) = start(table(&all, &steering));
        let (other, _publisher) = start(table(&all, &steering));
        let mut visitors = Vec::new();
        for _ in 0..20 {
            let answer = get(&mut wire::plain(proxy.http_addrs()[0]), "/", "");
            let line = answer.header("set-cookie").unwrap();
            assert!(line.ends_with("; Path=/; HttpOnly"), "{line}");
            visitors.push((cookie(&answer).unwrap(), answer.text().to_owned()));
        }
        assert!(visitors.iter().map(|(_, by)| by).collect::<BTreeSet<_>>().len() > 1);
        publisher.publish(RoutingTable::default());
        publisher.publish(table(&all, &steering));
        for (cookie, by) in &visitors {
            for proxy in [&proxy, &other] {
                let mut client = wire::plain(proxy.http_addrs()[0]);
                let again = get(&mut client, "/", &format!("Cookie: a=b; {cookie}\r\n"));
                assert_eq!(again.text(), by);
                assert_eq!(again.header("set-cookie"), None);
            }
        }
    }
}

#[test]
fn a_session_over_https_has_a_secure_cookie() {
    let all = stations(2);
    let steering = Steering::Session(session(Affinity::Persistent));
    let (proxy, _publisher) = start(peers::with_certificate(table(&all, &steering), &["a"]));
    let mut client = wire::secure(proxy.https_addrs()[0], "a", &lockgate_proxy::tls::client_config(false));
    let answer = client.ask(b"GET / HTTP/1.1\r\nHost: a\r\n\r\n");
    assert!(answer.header("set-cookie").unwrap().ends_with("; Path=/; Secure; HttpOnly"));
}

#[test]
fn a_failure_moves_a_session_only_if_it_may() {
    let all = stations(3);
    for change_on_failure in [false, true] {
        let session = Session { change_on_failure, ..session(Affinity::Persistent) };
        let (proxy, _publisher) = start(table(&all, &Steering::Session(session)));
        let mut client = wire::plain(proxy.http_addrs()[0]);
        let first = get(&mut client, "/", "");
        let (own, by) = (cookie(&first).unwrap(), first.text().to_owned());
        let header = format!("Cookie: {own}\r\n");
        // Its endpoint hangs up on this one: another answers.
        let other = get(&mut client, &format!("/break/{by}"), &header);
        assert_ne!(other.text(), by);
        assert_eq!(cookie(&other).is_some(), change_on_failure);
        let next = get(&mut client, "/", &header);
        match change_on_failure {
            false => assert_eq!((next.text(), cookie(&next)), (&*by, None)),
            true => {
                // Ejected, so that the old cookie leads elsewhere, and the new one to who answered.
                assert_ne!(next.text(), by);
                let moved = format!("Cookie: {}\r\n", cookie(&other).unwrap());
                let moved = get(&mut client, "/", &moved);
                assert_eq!((moved.text(), cookie(&moved)), (other.text(), None));
            }
        }
    }
}

#[test]
fn a_session_holds_on_to_its_backend() {
    let (stable, next) = (stations(2), stations(2));
    let table = |holds_backend: bool, weights: [u32; 2]| {
        let steering = Steering::Session(Session { holds_backend, ..session(Affinity::Balanced) });
        let backends = vec![backend(APP, weights[0], &steering), backend(CANARY, weights[1], &steering)];
        let mut table = split(&stable, UpstreamProtocol::Http1, backends);
        table.pools.insert(toy::key(CANARY), pool(&next, UpstreamProtocol::Http1));
        table
    };
    let (proxy, mut publisher) = start(table(true, [0, 1]));
    let mut client = wire::plain(proxy.http_addrs()[0]);
    let first = get(&mut client, "/", "");
    let is_next = |by: &str| next.iter().any(|address| address.to_string() == by);
    assert!(is_next(first.text()));
    let header = format!("Cookie: {}\r\n", cookie(&first).unwrap());

    publisher.publish(table(true, [1, 0]));
    let held = get(&mut client, "/", &header);
    assert_eq!((held.text(), cookie(&held)), (first.text(), None));
    assert!(!is_next(get(&mut client, "/", "").text()));
    // affinity-canary-behavior: legacy
    publisher.publish(table(false, [1, 0]));
    let freed = get(&mut client, "/", &header);
    assert!(!is_next(freed.text()) && cookie(&freed).is_some());
}

#[tokio::test(flavor = "multi_thread")]
async fn sessions_work_for_every_client_with_every_endpoint() {
    for speaks in peers::EVERY_ENDPOINT {
        let mut endpoints = Vec::new();
        for _ in 0..3 {
            endpoints.push(peers::endpoint(speaks, peers::app).await);
        }
        let steering = Steering::Session(session(Affinity::Persistent));
        let table = split(&endpoints, speaks, vec![backend(APP, 1, &steering)]);
        let (proxy, _publisher) = start(peers::with_certificate(table, &[peers::HOST]));
        for comes in peers::EVERY_CLIENT {
            let mut client = peers::Client::connect(&proxy, comes).await;
            let first = client.get("/bytes/10").await;
            let set = first.headers.get("set-cookie").unwrap().to_str().unwrap().to_owned();
            let own = set.split(';').next().unwrap().to_owned();
            let request = client.request(Method::GET, "/bytes/10").header("cookie", &own);
            let again = client.send(request.body(peers::empty()).unwrap()).await.unwrap();
            assert!(!again.headers().contains_key("set-cookie"), "{speaks:?} {comes:?}");
        }
    }
}
