//! A proxy on loopback with tables made by hand, and endpoints that do as they are told.
#![allow(dead_code, unreachable_pub, reason = "every test file uses its own part of this")]

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::sync::Arc;
use std::time::Duration;

use lockgate_proxy::config::{Config, Drain};
use lockgate_proxy::table::{
    Action, Backend, Endpoint, Host, HostPattern, Origin, PathMatch, Pool, PoolKey, RoutingTable, Rule,
    RuleLimits, Split, UpstreamProtocol,
};
use lockgate_proxy::{Proxy, Publisher};

/// What no test should ever wait for in vain.
pub const PATIENCE: Duration = Duration::from_secs(20);

/// A configuration on free loopback ports with one worker and no grace.
pub fn config() -> Config {
    let any = "127.0.0.1:0".parse().unwrap();
    Config {
        http: vec![any],
        https: vec![any],
        workers: 1,
        drain: Drain { grace: Duration::ZERO, deadline: Duration::from_secs(10) },
        ..Config::default()
    }
}

/// Starts a proxy that sends everything to `endpoints`.
pub fn proxy_to(endpoints: &[SocketAddr]) -> (Proxy, Publisher) {
    start(config(), table(endpoints, UpstreamProtocol::Http1))
}

/// Starts a proxy with a table.
pub fn start(config: Config, table: RoutingTable) -> (Proxy, Publisher) {
    let (proxy, mut publisher) = Proxy::start(config).unwrap();
    publisher.publish(table);
    (proxy, publisher)
}

/// A table with one rule: any host, any path, to `endpoints`.
pub fn table(endpoints: &[SocketAddr], protocol: UpstreamProtocol) -> RoutingTable {
    let mut table = RoutingTable::default();
    table.pools.insert(key("default/app:80"), Arc::new(pool(endpoints, protocol)));
    let rule = rule(PathMatch::Prefix("/".into()), "default/app:80");
    table.hosts.insert(HostPattern::any(), Arc::new(Host { rules: vec![rule] }));
    table
}

pub fn key(name: &str) -> PoolKey {
    PoolKey(name.into())
}

pub fn pool(endpoints: &[SocketAddr], protocol: UpstreamProtocol) -> Pool {
    let endpoint = |&address| Endpoint { address, weight: 1, zone: None };
    let mut endpoints: Vec<_> = endpoints.iter().map(endpoint).collect();
    endpoints.sort();
    Pool { protocol, endpoints, ..Pool::default() }
}

/// A rule that forwards to one pool.
pub fn rule(path: PathMatch, pool: &str) -> Rule {
    let backend = Backend { pool: key(pool), weight: 1, canary: "".into(), steering: None };
    Rule {
        path,
        origin: Arc::new(Origin { kind: "Ingress", namespace: "default".into(), name: "app".into() }),
        https_redirect: false,
        action: Action::Forward(Split { backends: vec![backend], overrides: Vec::new(), sticky: None }),
        limits: RuleLimits::default(),
        edits: None,
    }
}

/// A raw client connection with a deadline on every read.
pub fn connect(address: SocketAddr) -> TcpStream {
    let stream = TcpStream::connect(address).unwrap();
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    stream
}

/// Sends `request` and reads until the proxy closes.
pub fn exchange(address: SocketAddr, request: &str) -> String {
    let mut stream = connect(address);
    stream.write_all(request.as_bytes()).unwrap();
    let mut answer = Vec::new();
    // A reset after the answer is as good as an end.
    let _ = stream.read_to_end(&mut answer);
    String::from_utf8_lossy(&answer).into_owned()
}

/// Reads one response with a Content-Length: head and body.
pub fn read_response(stream: &mut TcpStream) -> (String, String) {
    let head = read_head(stream);
    let length = head
        .lines()
        .find_map(|l| l.to_ascii_lowercase().strip_prefix("content-length:")?.trim().parse().ok())
        .unwrap_or(0);
    let mut body = vec![0; length];
    stream.read_exact(&mut body).unwrap();
    (head, String::from_utf8_lossy(&body).into_owned())
}

/// Reads up to and including the empty line; nothing at the end of the stream.
pub fn read_head(stream: &mut TcpStream) -> String {
    let mut head = Vec::new();
    let mut byte = [0];
    while !head.ends_with(b"\r\n\r\n") {
        match stream.read(&mut byte) {
            Ok(1) => head.push(byte[0]),
            _ => break,
        }
    }
    String::from_utf8_lossy(&head).into_owned()
}

/// An endpoint that hands each accepted connection to `serve` on a thread of its own.
pub fn endpoint(serve: impl Fn(TcpStream) + Send + Sync + 'static) -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    let serve = Arc::new(serve);
    std::thread::spawn(move || {
        for stream in listener.incoming() {
            let Ok(stream) = stream else { return };
            let serve = serve.clone();
            std::thread::spawn(move || {
                let _ = stream.set_read_timeout(Some(PATIENCE));
                serve(stream);
            });
        }
    });
    address
}

/// An endpoint that answers every request with `body` and keeps the connection.
/// Request bodies with a Content-Length are read and dropped.
pub fn says(body: &'static str) -> SocketAddr {
    endpoint(move |mut stream| {
        loop {
            let (head, _) = read_response(&mut stream);
            if head.is_empty() {
                return;
            }
            let answer = format!("HTTP/1.1 200 OK\r\nContent-Length: {}\r\n\r\n{body}", body.len());
            if stream.write_all(answer.as_bytes()).is_err() {
                return;
            }
        }
    })
}

/// An endpoint that answers every request with the head it received.
pub fn echoes_heads() -> SocketAddr {
    endpoint(|mut stream| {
        loop {
            let (head, _) = read_response(&mut stream);
            if head.is_empty() {
                return;
            }
            let answer = format!("HTTP/1.1 200 OK\r\nContent-Length: {}\r\n\r\n{head}", head.len());
            if stream.write_all(answer.as_bytes()).is_err() {
                return;
            }
        }
    })
}
