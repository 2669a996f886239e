//! Connections that say whom they were opened for, and whose word is taken for it.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

#[path = "support/peers.rs"]
mod peers;
#[path = "support/toy.rs"]
mod toy;
#[path = "support/wire.rs"]
mod wire;

use std::io::{Read, Write};
use std::net::{Shutdown, SocketAddr};
use std::process::Command;
use std::time::Duration;

use lockgate_proxy::config::{Config, Limits, ProxyProtocol};
use lockgate_proxy::proxy_protocol::{Version, write_header, write_local};
use lockgate_proxy::table::UpstreamProtocol;
use lockgate_proxy::{Proxy, Publisher};
use toy::{PATIENCE, config, connect, echoes_heads, start, table};

const SHORT: Duration = Duration::from_millis(200);

fn expecting(trusted: &str, change: impl FnOnce(&mut Config)) -> (Proxy, Publisher) {
    let trusted = vec![trusted.parse().unwrap()];
    let proxy_protocol = Some(ProxyProtocol { trusted, header_timeout: PATIENCE });
    let mut config = Config { proxy_protocol, ..config() };
    change(&mut config);
    let table = table(&[echoes_heads()], UpstreamProtocol::Http1);
    start(config, peers::with_certificate(table, &["shop.example"]))
}

fn header(version: Version) -> Vec<u8> {
    let mut header = Vec::new();
    write_header(
        version,
        "203.0.113.9:4711".parse().unwrap(),
        "198.51.100.1:8443".parse().unwrap(),
        &mut header,
    );
    header
}

fn local(version: Version) -> Vec<u8> {
    let mut header = Vec::new();
    write_local(version, &mut header);
    header
}

const GET: &[u8] = b"GET / HTTP/1.1\r\nHost: shop.example\r\nConnection: close\r\n\r\n";

/// What the endpoint hears of the client; empty if the connection is closed before.
fn told(address: SocketAddr, opening: &[u8]) -> String {
    let mut stream = connect(address);
    stream.write_all(&[opening, GET].concat()).unwrap();
    let mut answer = String::new();
    // A reset is as good as an end.
    let _ = stream.read_to_string(&mut answer);
    answer
}

fn line<'a>(answer: &'a str, name: &str) -> Option<&'a str> {
    answer.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(": "))
}

fn refused(proxy: &Proxy) -> u64 {
    count(proxy, "lockgate_connections_refused_total{reason=\"proxy_header\"}")
}

fn count(proxy: &Proxy, name: &str) -> u64 {
    let metrics = proxy.metrics().encode();
    metrics.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' ')).unwrap().parse().unwrap()
}

/// Waits until as many connections were refused.
fn until_refused(proxy: &Proxy, many: u64) {
    while refused(proxy) < many {
        std::thread::yield_now();
    }
    assert_eq!(refused(proxy), many);
}

#[test]
fn the_address_in_a_trusted_header_is_the_clients() {
    let (proxy, _publisher) = expecting("127.0.0.0/8", |_| {});
    let address = proxy.http_addrs()[0];
    let port = address.port().to_string();
    for version in [Version::V1, Version::V2] {
        let answer = told(address, &header(version));
        assert_eq!(line(&answer, "X-Forwarded-For"), Some("203.0.113.9"), "{answer}");
        assert_eq!(line(&answer, "X-Real-IP"), Some("203.0.113.9"));
        assert_eq!(line(&answer, "X-Forwarded-Port"), Some("8443"), "where the client connected to");
        // A health check of the load balancer speaks for itself.
        let answer = told(address, &local(version));
        assert_eq!(line(&answer, "X-Forwarded-For"), Some("127.0.0.1"), "{answer}");
        assert_eq!(line(&answer, "X-Forwarded-Port"), Some(&*port));
    }
    assert_eq!(refused(&proxy), 0);
}

#[test]
fn without_a_header_or_with_a_wrong_one_the_connection_is_closed() {
    for trusted in ["127.0.0.0/8", "10.0.0.0/8"] {
        let (proxy, _publisher) = expecting(trusted, |_| {});
        let address = proxy.http_addrs()[0];
        let wrong: [&[u8]; 5] = [
            b"",
            b"PROXY TCP4 203.0.113.9 198.51.100.1 4711\r\n",
            b"PROXY TCP4 203.0.113.9 198.51.100.1 4711 99999\r\n",
            b"\r\n\r\n\0\r\nQUIT\n\x31\x11\0\0",
            b"\r\n",
        ];
        for (many, opening) in (1..).zip(wrong) {
            assert_eq!(told(address, opening), "", "{opening:?}");
            until_refused(&proxy, many);
        }
    }
}

/// As nginx does it: the header is due, and passed over.
#[test]
fn a_header_of_an_untrusted_peer_is_not_believed() {
    let (proxy, _publisher) = expecting("10.0.0.0/8", |_| {});
    let address = proxy.http_addrs()[0];
    for version in [Version::V1, Version::V2] {
        let answer = told(address, &header(version));
        assert_eq!(line(&answer, "X-Forwarded-For"), Some("127.0.0.1"), "{answer}");
        assert_eq!(line(&answer, "X-Forwarded-Port"), Some(&*address.port().to_string()));
    }
}

#[test]
fn a_header_that_does_not_come_is_not_waited_for() {
    let (proxy, _publisher) = expecting("127.0.0.0/8", |config| {
        config.proxy_protocol.as_mut().unwrap().header_timeout = SHORT;
    });
    for address in [proxy.http_addrs()[0], proxy.https_addrs()[0]] {
        let before = refused(&proxy);
        let mut silent = connect(address);
        let mut slow = connect(address);
        slow.write_all(&header(Version::V1)[..20]).unwrap();
        let mut gone = connect(address);
        gone.shutdown(Shutdown::Write).unwrap();
        for stream in [&mut silent, &mut slow, &mut gone] {
            assert_eq!(stream.read(&mut [0; 16]).unwrap(), 0);
        }
        until_refused(&proxy, before + 3);
    }
}

#[test]
fn headers_may_come_in_pieces_and_with_what_follows_them() {
    let (proxy, _publisher) = expecting("127.0.0.0/8", |_| {});
    for version in [Version::V1, Version::V2] {
        let bytes = [&header(version), GET].concat();
        for at in [1, 5, 12, 16, 20, bytes.len() - GET.len(), bytes.len() - 3] {
            let mut stream = connect(proxy.http_addrs()[0]);
            stream.set_nodelay(true).unwrap();
            for piece in [&bytes[..at], &bytes[at..]] {
                stream.write_all(piece).unwrap();
                std::thread::sleep(Duration::from_millis(2));
            }
            let mut answer = String::new();
            stream.read_to_string(&mut answer).unwrap();
            assert_eq!(line(&answer, "X-Forwarded-For"), Some("203.0.113.9"), "{version:?} cut at {at}");
        }
    }
}

/// The hello comes in one packet with the header, or after it, or both in pieces.
#[test]
fn over_tls() {
    let (proxy, _publisher) = expecting("127.0.0.0/8", |_| {});
    let config = lockgate_proxy::tls::client_config(false);
    for (version, at) in [(Version::V1, 1), (Version::V1, 60), (Version::V2, 28), (Version::V2, 100)] {
        let name = "shop.example".to_owned().try_into().unwrap();
        let mut session = rustls::ClientConnection::new(config.clone(), name).unwrap();
        let mut bytes = header(version);
        session.write_tls(&mut bytes).unwrap();
        let mut tcp = connect(proxy.https_addrs()[0]);
        tcp.set_nodelay(true).unwrap();
        for piece in [&bytes[..at], &bytes[at..]] {
            tcp.write_all(piece).unwrap();
            std::thread::sleep(Duration::from_millis(2));
        }
        let mut stream = rustls::StreamOwned::new(session, tcp);
        stream.write_all(GET).unwrap();
        let mut answer = String::new();
        let _ = stream.read_to_string(&mut answer);
        assert_eq!(line(&answer, "X-Forwarded-For"), Some("203.0.113.9"), "{version:?} {at}: {answer}");
        assert_eq!(line(&answer, "X-Forwarded-Proto"), Some("https"));
        assert_eq!(line(&answer, "X-Forwarded-Port"), Some("8443"));
    }
}

#[test]
fn limits_per_address_are_the_clients() {
    let (proxy, _publisher) = expecting("127.0.0.0/8", |config| {
        config.limits = Limits { connections_per_address: Some(1), ..Limits::default() };
    });
    let address = proxy.http_addrs()[0];
    let mut first = wire::plain(address);
    first.send(&header(Version::V1));
    let get = b"GET / HTTP/1.1\r\nHost: shop.example\r\n\r\n";
    assert_eq!(first.ask(get).status(), 200);
    assert_eq!(told(address, &header(Version::V2)), "");
    assert_eq!(count(&proxy, "lockgate_connections_refused_total{reason=\"address_limit\"}"), 1);
    assert!(told(address, &local(Version::V2)).contains("200 OK"));
}

/// curl knows version 1.
#[test]
fn curl() {
    if Command::new("curl").arg("--version").output().is_err() {
        assert!(std::env::var_os("CI").is_none(), "CI needs curl");
        return eprintln!("SKIPPED: no curl on this machine");
    }
    let curl = |args: &[&str]| {
        let output = Command::new("curl").args(["-sS", "-k", "--max-time", "20"]).args(args).output();
        let output = output.unwrap();
        assert!(output.status.success(), "{output:?}");
        String::from_utf8(output.stdout).unwrap()
    };
    let (proxy, _publisher) = expecting("127.0.0.0/8", |_| {});
    let (http, https) = (proxy.http_addrs()[0], proxy.https_addrs()[0]);
    for (url, version) in [
        (format!("http://{http}/"), "--http1.1"),
        (format!("https://{https}/"), "--http1.1"),
        (format!("https://{https}/"), "--http2"),
        (format!("http://{http}/"), "--http2-prior-knowledge"),
    ] {
        let answer = curl(&["--haproxy-protocol", version, &url]);
        assert_eq!(line(&answer.to_ascii_lowercase(), "x-forwarded-for"), Some("127.0.0.1"), "{answer}");
    }
    assert_eq!(refused(&proxy), 0);
}
