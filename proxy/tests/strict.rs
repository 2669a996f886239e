//! What RFC 9112 lets a server refuse is refused: one answer, then the end of
//! the connection, and the endpoint hears nothing of it.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

#[path = "support/toy.rs"]
mod toy;

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::sync::{Arc, Mutex};

use toy::{connect, endpoint, exchange, proxy_to, read_head, read_response};

/// Request heads by connection, in the order they came.
type Heard = Arc<Mutex<Vec<Vec<String>>>>;

/// An endpoint that notes every head it receives, before it has seen the body, and answers 200.
fn recorder() -> (SocketAddr, Heard) {
    let heard = Heard::default();
    let notes = heard.clone();
    let address = endpoint(move |mut stream| {
        let connection = {
            let mut all = notes.lock().unwrap();
            all.push(Vec::new());
            all.len() - 1
        };
        loop {
            let head = read_head(&mut stream);
            if head.is_empty() {
                return;
            }
            notes.lock().unwrap()[connection].push(head.clone());
            if !read_body(&mut stream, &head) {
                return;
            }
            if stream.write_all(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok").is_err() {
                return;
            }
        }
    });
    (address, heard)
}

/// Reads the body that `head` announces; false if it breaks off.
fn read_body(stream: &mut TcpStream, head: &str) -> bool {
    let value = |name: &str| head.lines().find_map(|l| l.strip_prefix(name).map(str::to_owned));
    if value("Transfer-Encoding: ").is_some() {
        let mut body = Vec::new();
        let mut byte = [0];
        while !body.ends_with(b"0\r\n\r\n") {
            if stream.read_exact(&mut byte).is_err() {
                return false;
            }
            body.push(byte[0]);
        }
    }
    let length = value("Content-Length: ").map_or(0, |v| v.parse().unwrap());
    stream.read_exact(&mut vec![0; length]).is_ok()
}

fn heads(heard: &Heard) -> Vec<String> {
    heard.lock().unwrap().concat()
}

/// A request with these header lines besides `Host: a`.
fn post(lines: &str, body: &str) -> String {
    format!("POST /bad HTTP/1.1\r\nHost: a\r\n{lines}\r\n\r\n{body}")
}

#[test]
fn malformed_requests_are_answered_once_and_never_forwarded() {
    let (upstream, heard) = recorder();
    let (proxy, _publisher) = proxy_to(&[upstream]);
    let address = proxy.http_addrs()[0];
    let mut cases: Vec<(u16, String)> = Vec::new();
    for lines in [
        // Which length is it?
        "Content-Length: 1\r\nContent-Length: 2",
        "Content-Length: 1\r\nContent-Length: 1",
        "Content-Length: 1, 1",
        "Content-Length: 1, 2",
        "Content-Length:",
        "Content-Length: +1",
        "Content-Length: -1",
        "Content-Length: 0x1",
        "Content-Length: 1 1",
        "Content-Length: one",
        "Content-Length: 1.0",
        "Content-Length: 99999999999999999999999",
        // Length or chunks?
        "Content-Length: 5\r\nTransfer-Encoding: chunked",
        "Transfer-Encoding: chunked\r\nContent-Length: 5",
        "Transfer-Encoding: chunked\r\nContent-Length: 0",
        "Content-Length : 5",
        "Transfer-Encoding : chunked",
        "Transfer-Encoding\t: chunked",
        "Transfer-Encoding: xchunked",
        "Transfer-Encoding: chunked, chunked",
        "Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked",
        "Transfer-Encoding: chunked\r\nTransfer-Encoding: x",
        "Transfer-Encoding: identity",
        "Transfer-Encoding: identity, chunked",
        "Transfer-Encoding: gzip, chunked",
        "Transfer-Encoding: chunked, identity",
        "Transfer-Encoding: chunked;q=1",
        "Transfer-Encoding: \x0bchunked",
        "Transfer-Encoding:\r\n chunked",
        "Transfer-Encoding:\n chunked",
        "X: y\nTransfer-Encoding: chunked",
        "X: y\rTransfer-Encoding: chunked",
        "X: y\r\n Transfer-Encoding: chunked",
        " Transfer-Encoding: chunked",
        // Lines that are none.
        "X: a\r\n b",
        "X: a\r\n\tb",
        "X: a\rb",
        "X: a\nY: b",
        "X: a\0b",
        "X: a\x08b",
        "X : a",
        "X\0: a",
        "X Y: a",
        ": a",
        "X",
        "[X]: a",
        "Connection: a b",
        // Whose request is it?
        "Host: a",
        "Host: b",
        "host: b",
    ] {
        cases.push((400, post(lines, "0\r\n\r\nGET /smuggled HTTP/1.1\r\nHost: a\r\n\r\n")));
    }
    for host in ["a b", "u@a", "a/b", "a,b", "a:b", "a:99999", "a:1:2", "[::1", "a\\b", "a?b", "\u{e9}"] {
        cases.push((400, format!("GET /bad HTTP/1.1\r\nHost: {host}\r\n\r\n")));
    }
    for (status, text) in [
        (400, "GET /bad HTTP/1.1\r\n\r\n"),
        (400, "GET /bad\r\n\r\n"),
        (400, "GET  /bad HTTP/1.1\r\nHost: a\r\n\r\n"),
        (400, "GET /bad HTTP/1.1 \r\nHost: a\r\n\r\n"),
        (400, "GET /bad HTTP/1.1\nHost: a\n\n"),
        (400, "GET /bad HTTP/1.1\r\nHost: a\r\n\n"),
        (400, "\nGET /bad HTTP/1.1\r\nHost: a\r\n\r\n"),
        (400, " GET /bad HTTP/1.1\r\nHost: a\r\n\r\n"),
        (400, "G(T /bad HTTP/1.1\r\nHost: a\r\n\r\n"),
        (400, "GET bad HTTP/1.1\r\nHost: a\r\n\r\n"),
        (400, "GET * HTTP/1.1\r\nHost: a\r\n\r\n"),
        (400, "GET /bad#x HTTP/1.1\r\nHost: a\r\n\r\n"),
        (400, "GET /b\0d HTTP/1.1\r\nHost: a\r\n\r\n"),
        (400, "GET /b\u{e9}d HTTP/1.1\r\nHost: a\r\n\r\n"),
        (400, "GET /bad%0 HTTP/1.1\r\nHost: a\r\n\r\n"),
        (400, "GET /bad%00 HTTP/1.1\r\nHost: a\r\n\r\n"),
        (400, "GET /bad/../../etc HTTP/1.1\r\nHost: a\r\n\r\n"),
        (400, "GET /bad/%2e%2e/%2E./etc HTTP/1.1\r\nHost: a\r\n\r\n"),
        (400, "GET http://u@b/bad HTTP/1.1\r\nHost: a\r\n\r\n"),
        (400, "GET http:///bad HTTP/1.1\r\nHost: a\r\n\r\n"),
        (400, "GET http://b/bad HTTP/1.1\r\nHost: a b\r\n\r\n"),
        (400, "GET ftp://b/bad HTTP/1.1\r\nHost: a\r\n\r\n"),
        (400, "POST /bad HTTP/1.0\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n"),
        (400, "\x16\x03\x01\x02\x00\x01\x00\x01\u{fc}\x03\x03"),
        (405, "CONNECT a:443 HTTP/1.1\r\nHost: a:443\r\n\r\n"),
        (405, "TRACE /bad HTTP/1.1\r\nHost: a\r\n\r\n"),
        (505, "GET /bad HTTP/2.0\r\nHost: a\r\n\r\n"),
        (505, "GET /bad HTTP/1.2\r\nHost: a\r\n\r\n"),
        (505, "GET /bad HTTP/0.9\r\n\r\n"),
        (400, "GET /bad http/1.1\r\nHost: a\r\n\r\n"),
        (505, "PRI * HTTP/2.0\r\n\r\nMS\r\n\r\n"),
    ] {
        cases.push((status, text.to_owned()));
    }
    assert!(cases.len() > 60);
    for (status, text) in &cases {
        let answer = exchange(address, text);
        assert!(answer.starts_with(&format!("HTTP/1.1 {status} ")), "{text:?}: {answer:?}");
        assert!(answer.contains("\r\nConnection: close\r\n"), "{text:?}: {answer:?}");
        assert_eq!(answer.matches("HTTP/1.1 ").count(), 1, "{text:?}: {answer:?}");
        assert_eq!(heads(&heard), [""; 0], "{text:?}");
    }
    let metrics = proxy.metrics().encode();
    assert!(metrics.contains("lockgate_upstream_connections_total{result=\"opened\"} 0\n"), "{metrics}");
}

#[test]
fn requests_before_a_malformed_one_are_answered() {
    let (upstream, heard) = recorder();
    let (proxy, _publisher) = proxy_to(&[upstream]);
    let answer = exchange(
        proxy.http_addrs()[0],
        "GET /1 HTTP/1.1\r\nHost: a\r\n\r\nGET /2 HTTP/1.1\r\nHost : a\r\n\r\nGET /3 HTTP/1.1\r\nHost: a\r\n\r\n",
    );
    assert!(answer.starts_with("HTTP/1.1 200 OK\r\n"), "{answer}");
    assert_eq!(answer.matches("HTTP/1.1 400 ").count(), 1, "{answer}");
    assert_eq!(heads(&heard).len(), 1);
}

#[test]
fn malformed_chunks_end_both_connections() {
    let (upstream, heard) = recorder();
    let (proxy, _publisher) = proxy_to(&[upstream]);
    let address = proxy.http_addrs()[0];
    let smuggled = "GET /smuggled HTTP/1.1\r\nHost: a\r\n\r\n";
    for body in [
        "x\r\n",
        "\r\n",
        "0x5\r\nhello\r\n0\r\n\r\n",
        "+5\r\nhello\r\n0\r\n\r\n",
        "-1\r\nhello\r\n0\r\n\r\n",
        " 5\r\nhello\r\n0\r\n\r\n",
        "5 \r\nhello\r\n0\r\n\r\n",
        "5\t;x\r\nhello\r\n0\r\n\r\n",
        "5\nhello\r\n0\r\n\r\n",
        "5\rhello\r\n0\r\n\r\n",
        "5\r\nhello0\r\n\r\n",
        "5\r\nhello\n0\r\n\r\n",
        "5\r\nhello\r0\r\n\r\n",
        "5\r\nhello!\r\n0\r\n\r\n",
        "5;a\nb\r\nhello\r\n0\r\n\r\n",
        "5;a\rb\r\nhello\r\n0\r\n\r\n",
        "FFFFFFFFFFFFFFFF\r\nhello\r\n",
        "10000000000000000\r\nhello\r\n",
        "00000000000000000000005\r\nhello\r\n0\r\n\r\n",
        "5\r\nhello\r\n0\r\nA : b\r\n\r\n",
        "5\r\nhello\r\n0\r\nA: b\n\r\n",
        "5\r\nhello\r\n0\r\nA: b\r\n c\r\n\r\n",
        "5\r\nhello\r\n0\n\n",
        ";x\r\n",
        "5,5\r\nhello\r\n0\r\n\r\n",
        "\u{ff15}\r\nhello\r\n0\r\n\r\n",
    ] {
        // A good request before it leaves a connection to the endpoint behind.
        let mut client = connect(address);
        client.write_all(b"GET /good HTTP/1.1\r\nHost: a\r\n\r\n").unwrap();
        assert_eq!(read_response(&mut client).1, "ok");
        client
            .write_all(post("Transfer-Encoding: chunked", &format!("{body}{smuggled}")).as_bytes())
            .unwrap();
        let mut answer = String::new();
        let _ = client.read_to_string(&mut answer);
        assert!(answer.starts_with("HTTP/1.1 400 "), "{body:?}: {answer:?}");
        assert_eq!(answer.matches("HTTP/1.1 ").count(), 1, "{body:?}: {answer:?}");
    }
    assert!(
        exchange(address, "GET /last HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n").contains(" 200 ")
    );
    for connection in heard.lock().unwrap().iter() {
        let bad = connection.iter().position(|head| head.starts_with("POST /bad "));
        assert!(bad.is_none_or(|at| at + 1 == connection.len()), "used after it: {connection:?}");
        assert!(!connection.concat().contains("smuggled"), "{connection:?}");
    }
    let metrics = proxy.metrics().encode();
    assert!(metrics.contains("lockgate_endpoint_ejections_total 0\n"), "the endpoint is not to blame");
}

/// Each is one request to us; it must be one to the endpoint, whatever a lenient parser makes of it.
#[test]
fn smuggling_probes_arrive_as_one_request() {
    let hidden = "GET /smuggled HTTP/1.1\r\nHost: a\r\n\r\n";
    let n = hidden.len();
    for probe in [
        post(&format!("Content-Length: {n}"), hidden),
        post("Transfer-Encoding: chunked", &format!("{n:x}\r\n{hidden}\r\n0\r\n\r\n")),
        post("Transfer-Encoding: chunked", &format!("{n:x};\u{e9}=\"\r\"\r\n{hidden}\r\n0\r\n\r\n")),
        post(&format!("Content-Length: {n}\r\nTransfer_Encoding: chunked"), hidden),
        post(&format!("Content_Length: 0\r\nContent-Length: {n}"), hidden),
        post(&format!("Content-Length: {n}\r\nConnection: Content-Length"), hidden),
        post(
            "Transfer-Encoding: chunked\r\nConnection: Transfer-Encoding",
            &format!("{n:x}\r\n{hidden}\r\n0\r\n\r\n"),
        ),
        post(
            "Transfer-Encoding: chunked",
            &format!("0\r\nContent-Length: {n}\r\nTransfer-Encoding: chunked\r\nHost: b\r\n\r\n"),
        ),
        format!("GET /bad HTTP/1.1\r\nHost: a\r\nContent-Length: {n}\r\n\r\n{hidden}"),
        format!("HEAD /bad HTTP/1.1\r\nHost: a\r\nContent-Length: {n}\r\n\r\n{hidden}"),
        format!("POST /bad HTTP/1.0\r\nConnection: keep-alive\r\nContent-Length: {n}\r\n\r\n{hidden}"),
        format!(
            "GET /bad HTTP/1.1\r\nHost: a\r\nConnection: Upgrade\r\nUpgrade: h2c\r\nContent-Length: {n}\r\n\r\n{hidden}"
        ),
        format!("GET http://a/bad HTTP/1.1\r\nHost: b\r\nContent-Length: {n}\r\n\r\n{hidden}"),
    ] {
        let (upstream, heard) = recorder();
        let (proxy, _publisher) = proxy_to(&[upstream]);
        let mut client = connect(proxy.http_addrs()[0]);
        client.write_all(probe.as_bytes()).unwrap();
        client.write_all(b"GET /last HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n").unwrap();
        let mut answers = String::new();
        let _ = client.read_to_string(&mut answers);
        let heads = heads(&heard);
        let lines: Vec<_> = heads.iter().filter_map(|h| h.split_whitespace().nth(1)).collect();
        let expected: &[&str] = if answers.starts_with("HTTP/1.1 400 ") { &[] } else { &["/bad", "/last"] };
        if !expected.is_empty() || lines.contains(&"/smuggled") {
            assert_eq!(lines, expected, "{probe:?}");
        }
        assert!(heads.iter().all(|h| h.matches("\r\nHost: ").count() == 1), "{heads:?}");
    }
}
