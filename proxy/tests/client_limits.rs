//! What one client may do at most, and what it gets beyond that.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

#[path = "support/peers.rs"]
mod peers;
#[path = "support/toy.rs"]
mod toy;

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::sync::{Arc, mpsc};
use std::time::Duration;

use lockgate_proxy::config::{Config, Limits};
use lockgate_proxy::table::{
    ClientLimits, Host, HostPattern, PathMatch, Rate, RoutingTable, UpstreamProtocol,
};
use lockgate_proxy::{Proxy, Publisher};
use peers::{Client, Comes, empty, soon};
use toy::{config, connect, endpoint, exchange, read_head, read_response, rule, says, start, table};

fn limited(endpoint: SocketAddr, limits: ClientLimits) -> RoutingTable {
    let mut table = table(&[endpoint], UpstreamProtocol::Http1);
    let mut rule = rule(PathMatch::Prefix("/".into()), "default/app:80");
    rule.limits.per_client = Some(Arc::new(limits));
    let mut host = Host::default();
    host.rules.push(rule);
    table.hosts.insert(HostPattern::any(), Arc::new(host));
    table
}

/// Believes what loopback says of its clients.
fn proxy(table: RoutingTable, limits: Limits) -> (Proxy, Publisher) {
    let trusted = vec!["127.0.0.0/8".parse().unwrap()];
    start(Config { limits, trusted, workers: 2, ..config() }, table)
}

/// So slow that none becomes free while a test runs.
fn rate(burst: u32) -> Rate {
    Rate { requests: 1, per: Duration::from_secs(3600), burst }
}

fn get(client: &str) -> String {
    format!("GET / HTTP/1.1\r\nHost: a\r\nX-Forwarded-For: {client}\r\nConnection: close\r\n\r\n")
}

fn status(address: SocketAddr, request: &str) -> u16 {
    exchange(address, request).get(9..12).and_then(|s| s.parse().ok()).unwrap_or(0)
}

fn count(proxy: &Proxy, name: &str) -> u64 {
    let metrics = proxy.metrics().encode();
    metrics.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' ')).unwrap().parse().unwrap()
}

const RATE_LIMITED: &str = "lockgate_requests_rejected_total{reason=\"rate_limited\"}";
const TOO_MANY: &str = "lockgate_requests_rejected_total{reason=\"too_many_requests\"}";

#[test]
fn a_rate_is_for_each_client_over_all_workers() {
    let exempt = vec!["198.51.100.0/24".parse().unwrap()];
    let limits = ClientLimits { zone: "a/b".into(), rates: vec![rate(3)], exempt, requests: None };
    let (proxy, _publisher) = proxy(limited(says("ok"), limits), Limits::default());
    let address = proxy.http_addrs()[0];
    for client in ["192.0.2.1", "192.0.2.2", "2001:db8::1"] {
        let answers: Vec<u16> = (0..6).map(|_| status(address, &get(client))).collect();
        assert_eq!(answers, [200, 200, 200, 200, 503, 503], "{client}");
    }
    assert_eq!(status(address, &get("2001:db8::ffff:0:0:1")), 503, "another address of the same /64");
    assert_eq!(status(address, &get("2001:db8:0:1::1")), 200, "and of another");
    for _ in 0..10 {
        assert_eq!(status(address, &get("198.51.100.7")), 200);
    }
    assert_eq!(count(&proxy, RATE_LIMITED), 7);
}

#[test]
fn the_answer_is_as_configured_and_the_connection_lives_on() {
    let limits = ClientLimits { zone: "a/b".into(), rates: vec![rate(0)], ..ClientLimits::default() };
    let configured = Limits { rate_status: 429, ..Limits::default() };
    let (proxy, mut publisher) = proxy(limited(says("ok"), limits.clone()), configured);
    let mut stream = connect(proxy.http_addrs()[0]);
    let mut ask = |path: &str| {
        stream.write_all(format!("GET {path} HTTP/1.1\r\nHost: a\r\n\r\n").as_bytes()).unwrap();
        read_response(&mut stream).0
    };
    assert!(ask("/").starts_with("HTTP/1.1 200"));
    assert!(ask("/").starts_with("HTTP/1.1 429"));
    // Another zone is another account; the old one is not forgotten by a publish.
    let other = ClientLimits { zone: "a/c".into(), ..limits.clone() };
    publisher.publish(limited(says("ok"), other));
    assert!(ask("/").starts_with("HTTP/1.1 200"));
    publisher.publish(limited(says("ok"), limits));
    assert!(ask("/").starts_with("HTTP/1.1 429"));
}

/// An endpoint that answers when it is told to, and says when it was asked.
fn patient() -> (SocketAddr, mpsc::Receiver<()>, mpsc::SyncSender<()>) {
    let (asked, was_asked) = mpsc::sync_channel(16);
    let (answer, may_answer) = mpsc::sync_channel(16);
    let may_answer = std::sync::Mutex::new(may_answer);
    let address = endpoint(move |mut stream: TcpStream| {
        while !read_head(&mut stream).is_empty() {
            asked.send(()).unwrap();
            may_answer.lock().unwrap().recv().unwrap();
            stream.write_all(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok").unwrap();
        }
    });
    (address, was_asked, answer)
}

#[test]
fn requests_under_way() {
    let (app, asked, answer) = patient();
    let limits = ClientLimits { zone: "a/b".into(), requests: Some(2), ..ClientLimits::default() };
    let (proxy, _publisher) = proxy(limited(app, limits), Limits::default());
    let address = proxy.http_addrs()[0];
    let under_way = |client: &str| {
        let request = get(client);
        let thread = std::thread::spawn(move || status(address, &request));
        asked.recv().unwrap();
        thread
    };
    for _ in 0..3 {
        let (first, second) = (under_way("192.0.2.1"), under_way("192.0.2.1"));
        assert_eq!(status(address, &get("192.0.2.1")), 503);
        let other = under_way("192.0.2.2");
        for _ in 0..3 {
            answer.send(()).unwrap();
        }
        for thread in [first, second, other] {
            assert_eq!(thread.join().unwrap(), 200);
        }
    }
    assert_eq!(count(&proxy, TOO_MANY), 3);
}

#[test]
fn a_tunnel_is_under_way_until_it_ends() {
    let app = endpoint(|mut stream| {
        let head = read_head(&mut stream);
        if head.contains("Upgrade: x") {
            stream.write_all(b"HTTP/1.1 101 OK\r\nConnection: Upgrade\r\nUpgrade: x\r\n\r\n").unwrap();
            let _ = stream.read(&mut [0]);
        } else {
            stream.write_all(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\nConnection: close\r\n\r\n").unwrap();
        }
    });
    let limits = ClientLimits { zone: "a/b".into(), requests: Some(1), ..ClientLimits::default() };
    let (proxy, _publisher) = proxy(limited(app, limits), Limits::default());
    let address = proxy.http_addrs()[0];
    let mut tunnel = connect(address);
    tunnel.write_all(b"GET / HTTP/1.1\r\nHost: a\r\nConnection: Upgrade\r\nUpgrade: x\r\n\r\n").unwrap();
    assert!(read_head(&mut tunnel).starts_with("HTTP/1.1 101"));
    assert_eq!(status(address, &get("127.0.0.1")), 503);
    drop(tunnel);
    while status(address, &get("127.0.0.1")) != 200 {
        std::thread::yield_now();
    }
}

/// Streams of one HTTP/2 connection are requests like any other.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn http2_streams() {
    let (app, asked, answer) = patient();
    let rates = vec![rate(1)];
    let limits = ClientLimits { zone: "a/b".into(), requests: Some(1), rates, ..ClientLimits::default() };
    let (proxy, _publisher) = proxy(limited(app, limits), Limits::default());
    let mut client = Client::connect(&proxy, Comes::H2c).await;
    let first = client.request(http::Method::GET, "/").body(empty()).unwrap();
    let mut other = Client::connect(&proxy, Comes::H2c).await;
    let first = tokio::spawn(async move { client.send(first).await.unwrap().status() });
    tokio::task::block_in_place(|| asked.recv().unwrap());
    assert_eq!(other.get("/").await.status, 503, "one is under way");
    answer.send(()).unwrap();
    assert_eq!(soon(first).await.unwrap(), 200);
    // The stream has ended for its client a moment before it has for the proxy.
    for status in [200, 503] {
        answer.send(()).unwrap();
        peers::until(|| count(&proxy, "lockgate_requests_in_flight") == 0).await;
        assert_eq!(other.get("/").await.status, status, "the burst is 1");
    }
    assert_eq!((count(&proxy, TOO_MANY), count(&proxy, RATE_LIMITED)), (1, 1));
}

#[test]
fn connections_of_one_address() {
    let limits = Limits { connections_per_address: Some(3), ..Limits::default() };
    let (proxy, _publisher) =
        start(Config { limits, workers: 2, ..config() }, table(&[says("ok")], UpstreamProtocol::Http1));
    let address = proxy.http_addrs()[0];
    let ask = |stream: &mut TcpStream| {
        stream.write_all(b"GET / HTTP/1.1\r\nHost: a\r\n\r\n").is_ok() && !read_head(stream).is_empty()
    };
    let mut open: Vec<TcpStream> = (0..3).map(|_| connect(address)).collect();
    assert!(open.iter_mut().all(ask));
    // On whichever worker, plain or TLS.
    for listener in [address, proxy.https_addrs()[0]] {
        for _ in 0..4 {
            assert!(matches!(connect(listener).read(&mut [0]), Ok(0) | Err(_)));
        }
    }
    assert_eq!(count(&proxy, "lockgate_connections_refused_total{reason=\"address_limit\"}"), 8);
    if TcpListener::bind("127.0.0.2:0").is_ok() {
        let socket = socket2::Socket::new(socket2::Domain::IPV4, socket2::Type::STREAM, None).unwrap();
        socket.bind(&"127.0.0.2:0".parse::<SocketAddr>().unwrap().into()).unwrap();
        socket.connect(&address.into()).unwrap();
        assert!(ask(&mut socket.into()), "another address");
    }
    open.pop();
    while !ask(&mut connect(address)) {
        std::thread::yield_now();
    }
}
