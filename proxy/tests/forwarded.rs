//! What endpoints are told of the client, and whose word is taken for it.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

#[path = "support/toy.rs"]
mod toy;

use std::net::{SocketAddr, TcpListener};

use lockgate_proxy::table::UpstreamProtocol;
use lockgate_proxy::{Config, Proxy, Publisher};
use toy::{config, echoes_heads, exchange, start, table};

fn trusting(nets: &[&str], listen: &str) -> (Proxy, Publisher, SocketAddr) {
    let trusted = nets.iter().map(|net| net.parse().unwrap()).collect();
    let config = Config { http: vec![listen.parse().unwrap()], trusted, ..config() };
    let (proxy, publisher) = start(config, table(&[echoes_heads()], UpstreamProtocol::Http1));
    let address = proxy.http_addrs()[0];
    (proxy, publisher, address)
}

/// The lines an endpoint receives for a request with these lines.
fn received(address: SocketAddr, lines: &str) -> Vec<String> {
    let answer = exchange(
        address,
        &format!("GET / HTTP/1.1\r\nHost: shop.example:81\r\nConnection: close\r\n{lines}\r\n"),
    );
    let (_, head) = answer.split_once("\r\n\r\n").unwrap();
    head.lines().map(str::to_owned).filter(|line| !line.is_empty()).collect()
}

fn value<'a>(lines: &'a [String], name: &str) -> Vec<&'a str> {
    let of_name = |line: &'a String| {
        let (n, v) = line.split_once(": ")?;
        n.eq_ignore_ascii_case(name).then_some(v)
    };
    lines.iter().filter_map(of_name).collect()
}

const CLAIMS: &str = "X-Forwarded-For: 203.0.113.9\r\nX-Forwarded-Proto: https\r\nX-Forwarded-Host: real.example\r\n\
                      X-Forwarded-Port: 8443\r\nX-Real-IP: 6.6.6.6\r\nForwarded: for=6.6.6.6\r\nX-Scheme: evil\r\n\
                      X-Forwarded-Scheme: evil\r\nX-Original-Forwarded-For: 6.6.6.6\r\n";

#[test]
fn by_default_nobody_is_believed() {
    let (_proxy, _publisher, address) = trusting(&[], "127.0.0.1:0");
    let port = address.port().to_string();
    for claims in ["", CLAIMS] {
        let lines = received(address, claims);
        for (name, expected) in [
            ("X-Forwarded-For", "127.0.0.1"),
            ("X-Real-IP", "127.0.0.1"),
            ("X-Forwarded-Proto", "http"),
            ("X-Forwarded-Scheme", "http"),
            ("X-Scheme", "http"),
            ("X-Forwarded-Port", &port),
            ("X-Forwarded-Host", "shop.example:81"),
            ("Host", "shop.example:81"),
        ] {
            assert_eq!(value(&lines, name), [expected], "{name} in {lines:?}");
        }
        assert!(!lines.concat().contains("6.6.6.6") && !lines.concat().contains("evil"), "{lines:?}");
    }
}

#[test]
fn a_peer_outside_the_trust_list_is_not_believed() {
    let (_proxy, _publisher, address) = trusting(&["10.0.0.0/8", "::1/128"], "127.0.0.1:0");
    assert_eq!(value(&received(address, CLAIMS), "X-Forwarded-For"), ["127.0.0.1"]);
}

#[test]
fn a_trusted_peer_is_believed() {
    let (_proxy, _publisher, address) = trusting(&["127.0.0.0/8"], "127.0.0.1:0");
    let lines = received(address, CLAIMS);
    for (name, expected) in [
        ("X-Forwarded-For", "203.0.113.9, 127.0.0.1"),
        ("X-Real-IP", "203.0.113.9"),
        ("X-Forwarded-Proto", "https"),
        ("X-Forwarded-Port", "8443"),
        ("X-Forwarded-Host", "real.example"),
        ("Host", "shop.example:81"),
    ] {
        assert_eq!(value(&lines, name), [expected], "{name} in {lines:?}");
    }
    assert!(!lines.concat().contains("6.6.6.6") && !lines.concat().contains("evil"), "{lines:?}");
}

/// Lines of one list are joined in their order: the last address is what the peer saw itself.
#[test]
fn several_lines_of_a_trusted_peer_are_one_list() {
    let (_proxy, _publisher, address) = trusting(&["127.0.0.0/8"], "127.0.0.1:0");
    for (lines, chain, real) in [
        (&["1.1.1.1", "2.2.2.2"][..], "1.1.1.1, 2.2.2.2, 127.0.0.1", "2.2.2.2"),
        (
            &["1.1.1.1, 2.2.2.2", "3.3.3.3, 4.4.4.4"],
            "1.1.1.1, 2.2.2.2, 3.3.3.3, 4.4.4.4, 127.0.0.1",
            "4.4.4.4",
        ),
        (
            &["1.1.1.1", "2.2.2.2", "3.3.3.3", "nobody"],
            "1.1.1.1, 2.2.2.2, 3.3.3.3, nobody, 127.0.0.1",
            "127.0.0.1",
        ),
    ] {
        let claims: String = lines.iter().map(|line| format!("X-Forwarded-For: {line}\r\n")).collect();
        let lines = received(address, &claims);
        assert_eq!(value(&lines, "X-Forwarded-For"), [chain]);
        assert_eq!(value(&lines, "X-Real-IP"), [real]);
    }
}

#[test]
fn nonsense_of_a_trusted_peer_is_replaced() {
    let (_proxy, _publisher, address) = trusting(&["127.0.0.1/32"], "127.0.0.1:0");
    let lines = received(
        address,
        "X-Forwarded-For: unknown\r\nX-Forwarded-Proto: gopher\r\nX-Forwarded-Port: 99999\r\n",
    );
    assert_eq!(value(&lines, "X-Real-IP"), ["127.0.0.1"]);
    assert_eq!(value(&lines, "X-Forwarded-Proto"), ["http"]);
    assert_eq!(value(&lines, "X-Forwarded-Port"), [address.port().to_string()]);
}

/// A trusted proxy may pass on what its client sent under a name like its own.
#[test]
fn underscore_variants_are_dropped_and_believed_from_nobody() {
    let variants = "X_Forwarded_For: 6.6.6.6\r\nX-Forwarded_Proto: https\r\nX_Real_IP: 6.6.6.6\r\n\
                    X_Forwarded_Host: evil\r\nX_FORWARDED-PORT: 666\r\nX_Request_ID: evil\r\n";
    for trusted in [&[][..], &["127.0.0.0/8"]] {
        let (_proxy, _publisher, address) = trusting(trusted, "127.0.0.1:0");
        for lines in [variants.to_owned(), format!("X-Forwarded-For: 127.0.0.1\r\n{variants}")] {
            let lines = received(address, &lines);
            assert_eq!(value(&lines, "X-Real-IP"), ["127.0.0.1"]);
            assert_eq!(value(&lines, "X-Forwarded-Proto"), ["http"]);
            let all = lines.concat();
            assert!(!["6.6.6.6", "evil", "666", "_"].iter().any(|gone| all.contains(gone)), "{lines:?}");
        }
    }
}

#[test]
fn request_ids_are_kept_or_made() {
    let (_proxy, _publisher, address) = trusting(&[], "127.0.0.1:0");
    let id = |lines: &str| {
        let lines = received(address, lines);
        let ids = value(&lines, "X-Request-ID");
        assert_eq!(ids.len(), 1, "{lines:?}");
        ids[0].to_owned()
    };
    assert_eq!(id("X-Request-ID: 7f-a_1.b\r\n"), "7f-a_1.b");
    assert_eq!(id("x-request-id: first\r\nX-Request-ID: second\r\n"), "first");
    let mut made = Vec::new();
    for sent in [
        "",
        "X-Request-ID: a b\r\n",
        "X-Request-ID: \"\r\n",
        &format!("X-Request-ID: {}\r\n", "x".repeat(65)),
    ] {
        let id = id(sent);
        assert!(id.len() == 32 && id.bytes().all(|b| b.is_ascii_hexdigit()), "{sent:?}: {id}");
        made.push(id);
    }
    made.sort();
    made.dedup();
    assert_eq!(made.len(), 4, "each is another");
}

#[test]
fn ipv6() {
    if TcpListener::bind("[::1]:0").is_err() {
        return;
    }
    let (_proxy, _publisher, address) = trusting(&[], "[::1]:0");
    let lines = received(address, CLAIMS);
    assert_eq!(value(&lines, "X-Forwarded-For"), ["::1"]);
    assert_eq!(value(&lines, "X-Real-IP"), ["::1"]);

    let (_proxy, _publisher, address) = trusting(&["::1/128"], "[::1]:0");
    for (claimed, real) in
        [("2001:db8::9", "2001:db8::9"), ("[2001:db8::9]:4711", "2001:db8::9"), ("[::", "::1")]
    {
        let lines = received(address, &format!("X-Forwarded-For: {claimed}\r\n"));
        assert_eq!(value(&lines, "X-Forwarded-For"), [format!("{claimed}, ::1")]);
        assert_eq!(value(&lines, "X-Real-IP"), [real]);
    }

    // A dual-stack listener sees IPv4 clients as IPv4, also for the trust list.
    let (_proxy, _publisher, address) = trusting(&["127.0.0.0/8"], "[::]:0");
    let lines = received(SocketAddr::new("127.0.0.1".parse().unwrap(), address.port()), CLAIMS);
    assert_eq!(value(&lines, "X-Forwarded-For"), ["203.0.113.9, 127.0.0.1"]);
}
