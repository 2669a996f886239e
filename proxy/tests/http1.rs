//! HTTP/1.1 through the proxy: persistence, framing, interim answers, upgrades, failures.

#[path = "support/toy.rs"]
mod toy;

use std::io::{Read, Write};

use toy::{connect, echoes_heads, endpoint, exchange, proxy_to, read_head, read_response, says};

#[test]
fn keeps_both_connections_alive() {
    let (proxy, _publisher) = proxy_to(&[says("hello")]);
    let mut client = connect(proxy.http_addrs()[0]);
    for _ in 0..3 {
        client.write_all(b"GET / HTTP/1.1\r\nHost: a\r\n\r\n").unwrap();
        let (head, body) = read_response(&mut client);
        assert!(head.starts_with("HTTP/1.1 200 OK\r\n"), "{head}");
        assert_eq!(body, "hello");
    }
    let metrics = proxy.metrics().encode();
    assert!(metrics.contains("lockgate_upstream_connections_total{result=\"opened\"} 1\n"), "{metrics}");
}

#[test]
fn answers_pipelined_requests_in_order() {
    let (proxy, _publisher) = proxy_to(&[echoes_heads()]);
    let mut client = connect(proxy.http_addrs()[0]);
    client
        .write_all(
            b"GET /1 HTTP/1.1\r\nHost: a\r\n\r\nPOST /2 HTTP/1.1\r\nHost: a\r\nContent-Length: 3\r\n\r\nabc\
              GET /3 HTTP/1.1\r\nHost: a\r\n\r\n",
        )
        .unwrap();
    for path in ["/1", "/2", "/3"] {
        let (_, body) = read_response(&mut client);
        assert!(body.contains(&format!(" {path} HTTP/1.1\r\n")), "{body}");
    }
}

#[test]
fn tells_the_endpoint_who_asks() {
    let (proxy, _publisher) = proxy_to(&[echoes_heads()]);
    let head = exchange(
        proxy.http_addrs()[0],
        "GET /x?y=z HTTP/1.1\r\nHost: Shop.Example:8080\r\nX-Forwarded-For: 6.6.6.6\r\nX-Real-IP: 6.6.6.6\r\n\
         Connection: close, X-Drop\r\nX-Drop: 1\r\nX-Keep: 2\r\nProxy: evil\r\nTE: gzip\r\n\r\n",
    );
    for line in [
        "GET /x?y=z HTTP/1.1",
        "Host: Shop.Example:8080",
        "X-Forwarded-For: 127.0.0.1",
        "X-Real-IP: 127.0.0.1",
        "X-Forwarded-Proto: http",
        "X-Forwarded-Host: Shop.Example:8080",
        "X-Keep: 2",
    ] {
        assert!(head.contains(&format!("{line}\r\n")), "{line} missing in {head}");
    }
    for gone in ["6.6.6.6", "X-Drop", "Proxy:", "TE:", "evil"] {
        assert!(!head.contains(gone), "{gone} in {head}");
    }
}

#[test]
fn relays_chunked_bodies_both_ways_with_trailers() {
    let upstream = endpoint(|mut stream| {
        let head = read_head(&mut stream);
        assert!(head.contains("Transfer-Encoding: chunked\r\n"), "{head}");
        let mut body = Vec::new();
        let mut byte = [0];
        while !body.ends_with(b"X-Sum: 9\r\n\r\n") {
            stream.read_exact(&mut byte).unwrap();
            body.push(byte[0]);
        }
        assert!(body.starts_with(b"5\r\nhello\r\n"), "{:?}", String::from_utf8_lossy(&body));
        stream
            .write_all(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\nTrailer: X-End\r\n\r\n3\r\nabc\r\n0\r\nX-End: yes\r\n\r\n")
            .unwrap();
    });
    let (proxy, _publisher) = proxy_to(&[upstream]);
    let answer = exchange(
        proxy.http_addrs()[0],
        "POST / HTTP/1.1\r\nHost: a\r\nConnection: close\r\nTransfer-Encoding: chunked\r\n\r\n\
         5;ext=1\r\nhello\r\n0\r\nX-Sum: 9\r\n\r\n",
    );
    assert!(answer.ends_with("\r\n\r\n3\r\nabc\r\n0\r\nX-End: yes\r\n\r\n"), "{answer}");
}

#[test]
fn retries_a_request_that_a_stale_connection_lost() {
    // Each connection answers once, then closes when the next request arrives.
    let upstream = endpoint(|mut stream| {
        read_head(&mut stream);
        stream.write_all(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok").unwrap();
        read_head(&mut stream);
    });
    let (proxy, _publisher) = proxy_to(&[upstream]);
    let mut client = connect(proxy.http_addrs()[0]);
    for _ in 0..5 {
        client.write_all(b"GET / HTTP/1.1\r\nHost: a\r\n\r\n").unwrap();
        let (head, body) = read_response(&mut client);
        assert!(head.starts_with("HTTP/1.1 200"), "{head}");
        assert_eq!(body, "ok");
    }
}

#[test]
fn does_not_send_a_post_twice() {
    let upstream = endpoint(|mut stream| {
        read_response(&mut stream);
        stream.write_all(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok").unwrap();
        read_response(&mut stream);
    });
    let (proxy, _publisher) = proxy_to(&[upstream]);
    let mut client = connect(proxy.http_addrs()[0]);
    let mut statuses = Vec::new();
    for _ in 0..2 {
        client.write_all(b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 1\r\n\r\nx").unwrap();
        statuses.push(read_response(&mut client).0[9..12].to_owned());
    }
    assert_eq!(statuses, ["200", "502"]);
}

#[test]
fn takes_the_next_endpoint_when_one_refuses() {
    let gone = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let (proxy, _publisher) = proxy_to(&[gone, says("alive")]);
    let mut client = connect(proxy.http_addrs()[0]);
    for _ in 0..4 {
        client.write_all(b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 1\r\n\r\nx").unwrap();
        assert_eq!(read_response(&mut client).1, "alive");
    }
}

#[test]
fn passes_interim_responses_and_tunnels_upgrades() {
    let upstream = endpoint(|mut stream| {
        let head = read_head(&mut stream);
        assert!(head.contains("Upgrade: echo\r\n"), "{head}");
        stream
            .write_all(b"HTTP/1.1 103 Early Hints\r\nLink: </a>\r\n\r\nHTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: echo\r\n\r\nhi ")
            .unwrap();
        let mut bytes = Vec::new();
        stream.read_to_end(&mut bytes).unwrap();
        stream.write_all(&bytes).unwrap();
    });
    let (proxy, _publisher) = proxy_to(&[upstream]);
    let mut client = connect(proxy.http_addrs()[0]);
    client.write_all(b"GET / HTTP/1.1\r\nHost: a\r\nConnection: upgrade\r\nUpgrade: echo\r\n\r\n").unwrap();
    assert!(read_head(&mut client).starts_with("HTTP/1.1 103 Early Hints\r\nLink: </a>\r\n"));
    assert!(read_head(&mut client).starts_with("HTTP/1.1 101 Switching Protocols\r\n"));
    client.write_all(b"there").unwrap();
    // Half-close travels on; the other direction stays open until its own end.
    client.shutdown(std::net::Shutdown::Write).unwrap();
    let mut rest = String::new();
    client.read_to_string(&mut rest).unwrap();
    assert_eq!(rest, "hi there");
}
