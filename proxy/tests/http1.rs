//! HTTP/1.1 through the proxy: persistence, framing, interim answers, upgrades, failures.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

#[path = "support/toy.rs"]
mod toy;

use std::io::{Read, Write};
use std::net::{Shutdown, SocketAddr, TcpStream};
use std::sync::Arc;
use std::sync::mpsc::sync_channel;

use lockgate_proxy::table::{Action, Host, HostPattern, PathMatch, Sticky, UpstreamProtocol};
use toy::{
    PATIENCE, config, connect, echoes_heads, endpoint, exchange, proxy_to, read_head, read_response, rule,
    says, start, table,
};

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
    client.shutdown(Shutdown::Write).unwrap();
    let mut rest = String::new();
    client.read_to_string(&mut rest).unwrap();
    assert_eq!(rest, "hi there");
}

/// An endpoint that gives the same answer to every request without a body, and
/// keeps the connection unless told to end it.
fn answers(answer: &'static str, close: bool) -> SocketAddr {
    endpoint(move |mut stream| {
        while !read_head(&mut stream).is_empty() {
            if stream.write_all(answer.as_bytes()).is_err() || close {
                return;
            }
        }
    })
}

/// Reads the data of a chunked body, its end included.
fn read_chunked(stream: &mut TcpStream) -> Vec<u8> {
    let mut data = Vec::new();
    loop {
        let mut line = Vec::new();
        let mut byte = [0];
        while !line.ends_with(b"\r\n") {
            stream.read_exact(&mut byte).unwrap();
            line.push(byte[0]);
        }
        let size = usize::from_str_radix(std::str::from_utf8(&line).unwrap().trim_end(), 16).unwrap();
        let at = data.len();
        data.resize(at + size + 2, 0);
        stream.read_exact(&mut data[at..]).unwrap();
        assert!(data.ends_with(b"\r\n"));
        data.truncate(at + size);
        if size == 0 {
            return data;
        }
    }
}

/// What follows until the proxy closes.
fn rest(client: &mut TcpStream) -> String {
    let mut rest = String::new();
    client.read_to_string(&mut rest).unwrap();
    rest
}

#[test]
fn answers_without_a_body_keep_the_connection() {
    for (method, answer, head) in [
        (
            "HEAD",
            "HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\n",
            "HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\n",
        ),
        ("HEAD", "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n", "HTTP/1.1 200 OK\r\n\r\n"),
        ("HEAD", "HTTP/1.1 200 OK\r\n\r\n", "HTTP/1.1 200 OK\r\n\r\n"),
        ("GET", "HTTP/1.1 204 No Content\r\n\r\n", "HTTP/1.1 204 No Content\r\n\r\n"),
        ("GET", "HTTP/1.1 204 No Content\r\nContent-Length: 0\r\n\r\n", "HTTP/1.1 204 No Content\r\n\r\n"),
        (
            "GET",
            "HTTP/1.1 304 Not Modified\r\nETag: e\r\nContent-Length: 5\r\n\r\n",
            "HTTP/1.1 304 Not Modified\r\nETag: e\r\nContent-Length: 5\r\n\r\n",
        ),
        ("GET", "HTTP/1.1 304 Not Modified\r\n\r\n", "HTTP/1.1 304 Not Modified\r\n\r\n"),
        (
            "GET",
            "HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n",
            "HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n",
        ),
    ] {
        let (proxy, _publisher) = proxy_to(&[answers(answer, false)]);
        let mut client = connect(proxy.http_addrs()[0]);
        for _ in 0..3 {
            client.write_all(format!("{method} / HTTP/1.1\r\nHost: a\r\n\r\n").as_bytes()).unwrap();
            assert_eq!(read_head(&mut client), head, "{method} {answer:?}");
        }
        let metrics = proxy.metrics().encode();
        assert!(metrics.contains("lockgate_upstream_connections_total{result=\"opened\"} 1\n"), "{answer:?}");
    }
}

#[test]
fn http_1_0_clients() {
    let length = "HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhello";
    let chunked =
        "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nhel\r\n2\r\nlo\r\n0\r\nX: y\r\n\r\n";
    let close = "HTTP/1.1 200 OK\r\n\r\nhello";
    let old = "HTTP/1.0 200 OK\r\n\r\nhello";
    let keep = "Connection: keep-alive\r\n";
    for (lines, answer, ends, kept) in [
        ("", length, false, false),
        (keep, length, false, true),
        ("", chunked, false, false),
        (keep, chunked, false, false),
        ("", close, true, false),
        (keep, close, true, false),
        (keep, old, true, false),
    ] {
        let (proxy, _publisher) = proxy_to(&[answers(answer, ends)]);
        let mut client = connect(proxy.http_addrs()[0]);
        let request = format!("GET / HTTP/1.0\r\nHost: a\r\n{lines}\r\n");
        client.write_all(request.as_bytes()).unwrap();
        let head = read_head(&mut client);
        assert!(!head.contains("Transfer-Encoding"), "{head}");
        let connection = if kept { "\r\nConnection: keep-alive\r\n" } else { "\r\nConnection: close\r\n" };
        assert!(head.contains(connection), "{lines:?} {answer:?}: {head}");
        let mut body = [0; 5];
        client.read_exact(&mut body).unwrap();
        assert_eq!(&body, b"hello");
        if kept {
            client.write_all(request.as_bytes()).unwrap();
            assert_eq!(read_response(&mut client).1, "hello");
        } else {
            assert_eq!(rest(&mut client), "", "{lines:?} {answer:?}");
        }
    }
}

#[test]
fn a_body_that_ends_with_the_connection_becomes_chunked() {
    for answer in ["HTTP/1.1 200 OK\r\n\r\nhello", "HTTP/1.0 200 OK\r\n\r\nhello", "HTTP/1.1 200 OK\r\n\r\n"]
    {
        let (proxy, _publisher) = proxy_to(&[answers(answer, true)]);
        let mut client = connect(proxy.http_addrs()[0]);
        for _ in 0..3 {
            client.write_all(b"GET / HTTP/1.1\r\nHost: a\r\n\r\n").unwrap();
            assert_eq!(read_head(&mut client), "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n");
            assert_eq!(read_chunked(&mut client), answer.split_once("\r\n\r\n").unwrap().1.as_bytes());
        }
    }
}

#[test]
fn expectations_are_relayed() {
    let upstream = endpoint(|mut stream| {
        loop {
            let head = read_head(&mut stream);
            if head.is_empty() {
                return;
            }
            assert!(head.contains("Expect: 100-continue\r\n"), "{head}");
            stream.write_all(b"HTTP/1.1 100 Continue\r\n\r\n").unwrap();
            let mut body = [0; 5];
            stream.read_exact(&mut body).unwrap();
            assert_eq!(&body, b"hello");
            stream.write_all(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok").unwrap();
        }
    });
    let (proxy, _publisher) = proxy_to(&[upstream]);
    let mut client = connect(proxy.http_addrs()[0]);
    for _ in 0..2 {
        let head = b"POST / HTTP/1.1\r\nHost: a\r\nExpect: 100-continue\r\nContent-Length: 5\r\n\r\n";
        client.write_all(head).unwrap();
        assert_eq!(read_head(&mut client), "HTTP/1.1 100 Continue\r\n\r\n");
        client.write_all(b"hello").unwrap();
        assert_eq!(read_response(&mut client).1, "ok");
    }
}

#[test]
fn a_final_answer_instead_of_100_ends_the_connection() {
    let (proxy, _publisher) =
        proxy_to(&[answers("HTTP/1.1 417 Expectation Failed\r\nContent-Length: 2\r\n\r\nno", false)]);
    let mut client = connect(proxy.http_addrs()[0]);
    let head = b"POST / HTTP/1.1\r\nHost: a\r\nExpect: 100-continue\r\nContent-Length: 5\r\n\r\n";
    client.write_all(head).unwrap();
    let (head, body) = read_response(&mut client);
    // Whether the body still comes cannot be known, so nothing can follow it.
    assert!(head.starts_with("HTTP/1.1 417 ") && head.contains("\r\nConnection: close\r\n"), "{head}");
    assert_eq!(body, "no");
    assert_eq!(rest(&mut client), "");
}

/// Each interim answer is one more time that the endpoint may take.
#[test]
fn so_many_interim_answers_and_no_more() {
    let hint = "HTTP/1.1 103 Early Hints\r\n\r\n";
    for (hints, status) in [(64, 200), (65, 502), (10_000, 502)] {
        let upstream = endpoint(move |mut stream| {
            read_head(&mut stream);
            // The proxy may hang up in the middle of it.
            let _ = stream.write_all(hint.repeat(hints).as_bytes());
            let _ = stream.write_all(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n");
        });
        let (proxy, _publisher) = proxy_to(&[upstream]);
        let mut client = connect(proxy.http_addrs()[0]);
        // The count is of each request.
        for _ in 0..2 {
            client.write_all(b"GET / HTTP/1.1\r\nHost: a\r\n\r\n").unwrap();
            for n in 0..64 {
                let head = read_head(&mut client);
                assert!(head.starts_with("HTTP/1.1 103 "), "{n} of {hints}: {head}");
            }
            let (head, _) = read_response(&mut client);
            assert!(head.starts_with(&format!("HTTP/1.1 {status} ")), "after {hints}: {head}");
        }
    }
}

#[test]
fn interim_answers_are_not_for_http_1_0() {
    let answer = "HTTP/1.1 103 Early Hints\r\nLink: l\r\n\r\nHTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok";
    let (proxy, _publisher) = proxy_to(&[answers(answer, false)]);
    let answer = exchange(proxy.http_addrs()[0], "GET / HTTP/1.0\r\n\r\n");
    assert!(answer.starts_with("HTTP/1.1 200 OK\r\n") && answer.ends_with("\r\n\r\nok"), "{answer}");
}

/// An endpoint that answers on sight of the head and then reads on, or only waits for the end.
fn hasty(answer: &'static str, reads_on: bool) -> SocketAddr {
    endpoint(move |mut stream| {
        read_head(&mut stream);
        stream.write_all(answer.as_bytes()).unwrap();
        if reads_on {
            while matches!(stream.read(&mut [0; 8192]), Ok(1..)) {}
        } else {
            stream.shutdown(Shutdown::Write).unwrap();
            let mut byte = [0];
            while matches!(stream.peek(&mut byte), Ok(1)) {
                std::thread::sleep(std::time::Duration::from_millis(10));
            }
        }
    })
}

#[test]
fn an_early_answer_does_not_stop_an_upload_that_the_endpoint_still_takes() {
    let answer = "HTTP/1.1 403 Forbidden\r\nContent-Length: 2\r\n\r\nno";
    for up in [false, true] {
        let (proxy, _publisher) = proxy_to(&[hasty(answer, true)]);
        let mut client = connect(proxy.http_addrs()[0]);
        let head = format!("POST / HTTP/1.1\r\nHost: a\r\n{}\r\n\r\n", framing(up));
        client.write_all(head.as_bytes()).unwrap();
        let body = noise(1);
        // All of it is sent before the answer is looked at.
        client.write_all(&if up { chunks(&body) } else { body }).unwrap();
        let (head, body) = read_response(&mut client);
        assert!(head.starts_with("HTTP/1.1 403 "), "{head}");
        assert_eq!(body, "no");
    }
}

#[test]
fn an_early_answer_and_a_close_reach_a_client_that_is_still_sending() {
    let answer = "HTTP/1.1 403 Forbidden\r\nConnection: close\r\nContent-Length: 2\r\n\r\nno";
    let (proxy, _publisher) = proxy_to(&[hasty(answer, false)]);
    let mut client = connect(proxy.http_addrs()[0]);
    client.write_all(b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 8388608\r\n\r\n").unwrap();
    client.write_all(&[b'x'; 100_000]).unwrap();
    let (head, body) = read_response(&mut client);
    assert!(head.starts_with("HTTP/1.1 403 ") && head.contains("\r\nConnection: close\r\n"), "{head}");
    assert_eq!(body, "no");
    // What still comes is read and dropped: it must not turn the end into a reset.
    client.write_all(&[b'x'; 100_000]).unwrap();
    assert_eq!(rest(&mut client), "");
}

#[test]
fn a_half_closed_client_gets_its_answer() {
    let (closed, is_closed) = sync_channel::<()>(1);
    let is_closed = std::sync::Mutex::new(is_closed);
    let upstream = endpoint(move |mut stream| {
        loop {
            let (head, body) = read_response(&mut stream);
            if head.is_empty() {
                return;
            }
            // Answers only after the client has shut its side.
            is_closed.lock().unwrap().recv_timeout(PATIENCE).unwrap();
            let answer = format!("HTTP/1.1 200 OK\r\nContent-Length: {}\r\n\r\n{body}", body.len());
            stream.write_all(answer.as_bytes()).unwrap();
        }
    });
    let (proxy, _publisher) = proxy_to(&[upstream]);
    for body in ["", "hello"] {
        let mut client = connect(proxy.http_addrs()[0]);
        let request = format!("POST / HTTP/1.1\r\nHost: a\r\nContent-Length: {}\r\n\r\n{body}", body.len());
        client.write_all(request.as_bytes()).unwrap();
        client.shutdown(Shutdown::Write).unwrap();
        closed.send(()).unwrap();
        assert_eq!(read_response(&mut client).1, body);
        assert_eq!(rest(&mut client), "");
    }
}

const LARGE: usize = 8 << 20;

fn noise(seed: u64) -> Vec<u8> {
    let mut random = fastrand::Rng::with_seed(seed);
    let mut bytes = vec![0; LARGE];
    random.fill(&mut bytes);
    bytes
}

fn chunks(bytes: &[u8]) -> Vec<u8> {
    let mut out = Vec::with_capacity(bytes.len() + bytes.len() / 100);
    for piece in bytes.chunks(10_007) {
        out.extend_from_slice(format!("{:x}\r\n", piece.len()).as_bytes());
        out.extend_from_slice(piece);
        out.extend_from_slice(b"\r\n");
    }
    out.extend_from_slice(b"0\r\n\r\n");
    out
}

fn framing(is_chunked: bool) -> String {
    if is_chunked { "Transfer-Encoding: chunked".to_owned() } else { format!("Content-Length: {LARGE}") }
}

fn read_large(stream: &mut TcpStream, is_chunked: bool) -> Vec<u8> {
    if is_chunked {
        return read_chunked(stream);
    }
    let mut bytes = vec![0; LARGE];
    stream.read_exact(&mut bytes).unwrap();
    bytes
}

/// Both directions at once, neither waiting for the other, in every framing.
#[test]
fn large_bodies_both_ways_at_once() {
    for (up, down) in [(false, false), (true, true), (true, false), (false, true)] {
        let upstream = endpoint(move |mut stream| {
            loop {
                if read_head(&mut stream).is_empty() {
                    return;
                }
                let mut sender = stream.try_clone().unwrap();
                let sending = std::thread::spawn(move || {
                    let head = format!("HTTP/1.1 200 OK\r\n{}\r\n\r\n", framing(down));
                    sender.write_all(head.as_bytes()).unwrap();
                    let body = noise(2);
                    sender.write_all(&if down { chunks(&body) } else { body }).unwrap();
                });
                assert!(read_large(&mut stream, up) == noise(1), "upload");
                sending.join().unwrap();
            }
        });
        let (proxy, _publisher) = proxy_to(&[upstream]);
        let mut client = connect(proxy.http_addrs()[0]);
        let mut sender = client.try_clone().unwrap();
        let sending = std::thread::spawn(move || {
            let head = format!("POST / HTTP/1.1\r\nHost: a\r\n{}\r\n\r\n", framing(up));
            sender.write_all(head.as_bytes()).unwrap();
            let body = noise(1);
            sender.write_all(&if up { chunks(&body) } else { body }).unwrap();
        });
        let head = read_head(&mut client);
        assert!(head.contains(&framing(down)), "{head}");
        assert!(read_large(&mut client, down) == noise(2), "download");
        sending.join().unwrap();
    }
}

#[test]
fn large_bodies_one_after_the_other_keep_the_connection() {
    for is_chunked in [false, true] {
        let upstream = endpoint(move |mut stream| {
            while !read_head(&mut stream).is_empty() {
                let body = read_large(&mut stream, is_chunked);
                let head = format!("HTTP/1.1 200 OK\r\n{}\r\n\r\n", framing(is_chunked));
                stream.write_all(head.as_bytes()).unwrap();
                stream.write_all(&if is_chunked { chunks(&body) } else { body }).unwrap();
            }
        });
        let (proxy, _publisher) = proxy_to(&[upstream]);
        let mut client = connect(proxy.http_addrs()[0]);
        for seed in 0..2 {
            let body = noise(seed);
            let head = format!("PUT / HTTP/1.1\r\nHost: a\r\n{}\r\n\r\n", framing(is_chunked));
            client.write_all(head.as_bytes()).unwrap();
            client.write_all(&if is_chunked { chunks(&body) } else { body.clone() }).unwrap();
            read_head(&mut client);
            assert!(read_large(&mut client, is_chunked) == body);
        }
        let metrics = proxy.metrics().encode();
        assert!(metrics.contains("lockgate_upstream_connections_total{result=\"opened\"} 1\n"));
    }
}

#[test]
fn a_hundred_pipelined_requests() {
    let (proxy, _publisher) = proxy_to(&[echoes_heads()]);
    let mut client = connect(proxy.http_addrs()[0]);
    let mut sender = client.try_clone().unwrap();
    let sending = std::thread::spawn(move || {
        let mut all = String::new();
        for n in 0..100 {
            // Heads that straddle buffers, and empty lines between requests.
            let padding = "x".repeat(n * 37 % 1000);
            all += &format!("GET /{n} HTTP/1.1\r\nHost: a\r\nX: {padding}\r\n\r\n");
            if n % 7 == 0 {
                all += "\r\n";
            }
            if n % 5 == 0 {
                all += "POST /b HTTP/1.1\r\nHost: a\r\nContent-Length: 5\r\n\r\nhello";
            }
        }
        sender.write_all(all.as_bytes()).unwrap();
    });
    for n in 0..100 {
        let (_, body) = read_response(&mut client);
        assert!(body.starts_with(&format!("GET /{n} HTTP/1.1\r\n")), "{n}: {body}");
        if n % 5 == 0 {
            assert!(read_response(&mut client).1.starts_with("POST /b "));
        }
    }
    sending.join().unwrap();
}

#[test]
fn cookies_arrive_one_by_one_in_order() {
    let answer = "HTTP/1.1 200 OK\r\nSet-Cookie: a=1; Expires=Thu, 01 Jan 1970 00:00:00 GMT\r\nDate: x\r\n\
                  set-cookie: b=2\r\nSet-Cookie: a=3\r\nContent-Length: 0\r\n\r\n";
    let (proxy, _publisher) = proxy_to(&[answers(answer, false)]);
    let mut client = connect(proxy.http_addrs()[0]);
    client.write_all(b"GET / HTTP/1.1\r\nHost: a\r\n\r\n").unwrap();
    assert_eq!(read_head(&mut client), answer);
}

#[test]
fn a_refused_upgrade_leaves_http() {
    let (proxy, _publisher) = proxy_to(&[echoes_heads()]);
    let mut client = connect(proxy.http_addrs()[0]);
    client.write_all(b"GET /1 HTTP/1.1\r\nHost: a\r\nConnection: upgrade\r\nUpgrade: echo\r\n\r\n").unwrap();
    let (head, body) = read_response(&mut client);
    assert!(head.starts_with("HTTP/1.1 200 OK\r\n") && body.contains("Upgrade: echo\r\n"), "{head}{body}");
    client.write_all(b"GET /2 HTTP/1.1\r\nHost: a\r\n\r\n").unwrap();
    assert!(read_response(&mut client).1.starts_with("GET /2 "));
}

#[test]
fn an_upgrade_to_h2c_is_never_passed_on() {
    let (proxy, _publisher) = proxy_to(&[echoes_heads()]);
    for protocol in ["h2c", "H2C", "h2c, websocket", "websocket,h2c", " h2c"] {
        let answer = exchange(
            proxy.http_addrs()[0],
            &format!(
                "GET / HTTP/1.1\r\nHost: a\r\nConnection: Upgrade, HTTP2-Settings, close\r\nUpgrade: {protocol}\r\n\
                 HTTP2-Settings: AAMAAABkAAQAoAAAAAIAAAAA\r\n\r\n"
            ),
        );
        assert!(answer.starts_with("HTTP/1.1 200 OK\r\n"), "{answer}");
        for gone in ["h2c", "H2C", "Upgrade", "HTTP2-Settings"] {
            assert!(!answer.contains(gone), "{protocol:?}: {answer}");
        }
    }
}

#[test]
fn empty_lines_before_a_request_are_skipped_and_never_spun_on() {
    let (proxy, _publisher) = proxy_to(&[says("ok")]);
    let mut client = connect(proxy.http_addrs()[0]);
    client.write_all(b"\r\n\r\n\r\n").unwrap();
    // The one worker is still there for others.
    let mut other = connect(proxy.http_addrs()[0]);
    other.write_all(b"GET / HTTP/1.1\r\nHost: a\r\n\r\n").unwrap();
    assert_eq!(read_response(&mut other).1, "ok");
    for piece in ["\r\n", "GET / HTTP/1.1\r", "\nHost: a\r\n", "\r", "\n"] {
        client.write_all(piece.as_bytes()).unwrap();
    }
    assert_eq!(read_response(&mut client).1, "ok");
}

#[test]
fn a_sticky_split_sets_its_cookie_once() {
    let mut sticky = table(
        &[answers("HTTP/1.1 200 OK\r\nSet-Cookie: own=1\r\nContent-Length: 2\r\n\r\nok", false)],
        UpstreamProtocol::Http1,
    );
    let mut rule = rule(PathMatch::Prefix("/".into()), "default/app:80");
    let Action::Forward(split) = &mut rule.action else { unreachable!("rules of the toy forward") };
    split.sticky = Some(Sticky::Cookie("route".into()));
    // A split of one has nothing to remember.
    split
        .backends
        .push(lockgate_proxy::table::Backend { canary: "canary".into(), ..split.backends[0].clone() });
    sticky.hosts.insert(HostPattern::any(), Arc::new(Host { rules: vec![rule] }));
    let (proxy, _publisher) = start(config(), sticky);
    let mut client = connect(proxy.http_addrs()[0]);
    client.write_all(b"GET / HTTP/1.1\r\nHost: a\r\n\r\n").unwrap();
    let (head, _) = read_response(&mut client);
    let cookie =
        head.lines().find_map(|l| l.strip_prefix("Set-Cookie: route=")).unwrap_or_else(|| panic!("{head}"));
    assert!(
        cookie.ends_with("; Path=/; HttpOnly; SameSite=Lax") && head.contains("Set-Cookie: own=1\r\n"),
        "{head}"
    );
    let bucket = cookie.split(';').next().unwrap();
    let again = format!("GET / HTTP/1.1\r\nHost: a\r\nCookie: x=y; route={bucket}\r\n\r\n");
    client.write_all(again.as_bytes()).unwrap();
    let (head, _) = read_response(&mut client);
    assert!(!head.contains("route="), "{head}");
}

#[test]
fn a_client_may_write_all_before_it_reads() {
    const UP: usize = 8 << 20;
    const DOWN: usize = 16 << 20;
    // Answers at once, and reads on while it does: more both ways than sockets hold.
    let upstream = endpoint(|mut stream| {
        read_head(&mut stream);
        let mut writing = stream.try_clone().unwrap();
        let writer = std::thread::spawn(move || {
            write!(writing, "HTTP/1.1 200 OK\r\nContent-Length: {DOWN}\r\n\r\n").unwrap();
            writing.write_all(&vec![b'd'; DOWN]).unwrap();
        });
        let mut body = vec![0; UP];
        stream.read_exact(&mut body).unwrap();
        assert!(body.iter().all(|&b| b == b'u'));
        writer.join().unwrap();
    });
    let (proxy, _publisher) = proxy_to(&[upstream]);
    let mut client = connect(proxy.http_addrs()[0]);
    client.set_write_timeout(Some(PATIENCE)).unwrap();
    write!(client, "POST / HTTP/1.1\r\nHost: a\r\nContent-Length: {UP}\r\n\r\n").unwrap();
    client.write_all(&vec![b'u'; UP]).unwrap();
    let (head, body) = read_response(&mut client);
    assert!(head.starts_with("HTTP/1.1 200 OK\r\n"), "{head}");
    assert!(body.len() == DOWN && body.bytes().all(|b| b == b'd'));
}
