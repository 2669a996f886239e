use super::*;

/// What a head means, or the status it is refused with; 0: more bytes are needed.
fn parse(text: impl AsRef<[u8]>) -> Result<String, u16> {
    parse_within(text.as_ref(), &Limits::default())
}

fn parse_within(text: &[u8], limits: &Limits) -> Result<String, u16> {
    let mut room = HeaderRoom::new();
    match RequestHead::parse(text, &mut room, limits) {
        Ok(None) => Err(0),
        Err(reject) => Err(reject.status),
        Ok(Some(head)) => Ok(format!(
            "{} {} at {} {:?}{}{}{}",
            head.method.escape_ascii(),
            head.target.escape_ascii(),
            head.host.escape_ascii(),
            head.framing,
            if head.keep_alive { " kept" } else { "" },
            if head.expects_continue { " expects" } else { "" },
            head.upgrade.map_or(String::new(), |p| format!(" to {}", p.escape_ascii())),
        )),
    }
}

/// A request with these lines besides `Host: a`.
fn with(lines: &str) -> String {
    format!("POST / HTTP/1.1\r\nHost: a\r\n{lines}\r\n")
}

fn refused(cases: &[(&str, u16)]) {
    for (text, status) in cases {
        assert_eq!(parse(text), Err(*status), "{text:?}");
    }
}

#[test]
fn accepted_heads() {
    for (text, meaning) in [
        ("GET / HTTP/1.1\r\nHost: a\r\n\r\n", "GET / at a None kept"),
        ("GET /a?b=c&d HTTP/1.1\r\nhOsT: A.example:8080\r\n\r\n", "GET /a?b=c&d at A.example:8080 None kept"),
        ("GET / HTTP/1.1\r\nHost:\ta \t\r\n\r\n", "GET / at a None kept"),
        ("GET / HTTP/1.1\r\nHost:\r\n\r\n", "GET / at  None kept"),
        ("GET / HTTP/1.1\r\nHost: [::1]:80\r\n\r\n", "GET / at [::1]:80 None kept"),
        ("GET / HTTP/1.1\r\nHost: a_b.c-d:\r\n\r\n", "GET / at a_b.c-d: None kept"),
        ("\r\nGET / HTTP/1.1\r\nHost: a\r\n\r\n", "GET / at a None kept"),
        ("\r\n\r\n\r\nGET / HTTP/1.1\r\nHost: a\r\n\r\n", "GET / at a None kept"),
        ("GET / HTTP/1.0\r\n\r\n", "GET / at  None"),
        ("GET / HTTP/1.0\r\nConnection: Keep-Alive\r\n\r\n", "GET / at  None kept"),
        ("GET / HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n", "GET / at a None"),
        ("GET / HTTP/1.1\r\nHost: a\r\nConnection: x , CLOSE\r\n\r\n", "GET / at a None"),
        ("OPTIONS * HTTP/1.1\r\nHost: a\r\n\r\n", "OPTIONS * at a None kept"),
        ("GET http://b:81/c?d HTTP/1.1\r\nHost: a\r\n\r\n", "GET /c?d at b:81 None kept"),
        ("GET HTTPS://b HTTP/1.1\r\nHost: a\r\n\r\n", "GET / at b None kept"),
        ("M-SEARCH / HTTP/1.1\r\nHost: a\r\n\r\n", "M-SEARCH / at a None kept"),
        ("POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 0\r\n\r\n", "POST / at a None kept"),
        ("POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 007\r\n\r\n", "POST / at a Length(7) kept"),
        ("POST / HTTP/1.0\r\nContent-Length: 7\r\n\r\n", "POST / at  Length(7)"),
        ("POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: Chunked\r\n\r\n", "POST / at a Chunked kept"),
        (
            "PUT / HTTP/1.1\r\nHost: a\r\nContent-Length: 1\r\nExpect: 100-Continue\r\n\r\n",
            "PUT / at a Length(1) kept expects",
        ),
        (
            "GET / HTTP/1.1\r\nHost: a\r\nConnection: keep-alive, Upgrade\r\nUpgrade: websocket\r\n\r\n",
            "GET / at a None kept to websocket",
        ),
        ("GET / HTTP/1.1\r\nHost: a\r\nUpgrade: websocket\r\n\r\n", "GET / at a None kept"),
        ("GET / HTTP/1.1\r\nHost: a\r\nConnection: upgrade\r\nUpgrade: H2C\r\n\r\n", "GET / at a None kept"),
        (
            "GET / HTTP/1.1\r\nHost: a\r\nConnection: upgrade\r\nUpgrade: websocket, h2c\r\n\r\n",
            "GET / at a None kept",
        ),
        ("GET / HTTP/1.0\r\nConnection: upgrade\r\nUpgrade: websocket\r\n\r\n", "GET / at  None"),
    ] {
        assert_eq!(parse(text).as_deref(), Ok(meaning), "{text:?}");
    }
}

#[test]
fn ambiguous_framing_is_refused() {
    for lines in [
        "Content-Length: 1\r\nContent-Length: 2\r\n",
        "Content-Length: 1\r\nContent-Length: 1\r\n",
        "Content-Length: 1, 1\r\n",
        "Content-Length: \r\n",
        "Content-Length: +1\r\n",
        "Content-Length: -1\r\n",
        "Content-Length: 1 1\r\n",
        "Content-Length: 0x1\r\n",
        "Content-Length: 1e3\r\n",
        "Content-Length: 1;\r\n",
        "Content-Length: \"1\"\r\n",
        "Content-Length: 99999999999999999999\r\n",
        "Content-Length: 1\r\nTransfer-Encoding: chunked\r\n",
        "Transfer-Encoding: chunked\r\nContent-Length: 0\r\n",
        "Transfer-Encoding: xchunked\r\n",
        "Transfer-Encoding: chunkedx\r\n",
        "Transfer-Encoding: chunked, chunked\r\n",
        "Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked\r\n",
        "Transfer-Encoding: chunked\r\nTransfer-Encoding: identity\r\n",
        "Transfer-Encoding: identity\r\n",
        "Transfer-Encoding: identity, chunked\r\n",
        "Transfer-Encoding: gzip, chunked\r\n",
        "Transfer-Encoding: gzip\r\n",
        "Transfer-Encoding: chunked, identity\r\n",
        "Transfer-Encoding: chunked;x=1\r\n",
        "Transfer-Encoding: ,chunked\r\n",
        "Transfer-Encoding: chunked,\r\n",
        "Transfer-Encoding: \"chunked\"\r\n",
        "Transfer-Encoding:\r\n",
        "Transfer-Encoding: \x0bchunked\r\n",
        "Transfer-Encoding: chunked\x0c\r\n",
        "Transfer-Encoding : chunked\r\n",
        "Transfer-Encoding\t: chunked\r\n",
        " Transfer-Encoding: chunked\r\n",
        "\tTransfer-Encoding: chunked\r\n",
        "Transfer-Encoding:\r\n chunked\r\n",
        "Transfer-Encoding\r\n: chunked\r\n",
        "Transfer-Encoding: chunked\rX: y\r\n",
        "Content-Length : 1\r\n",
    ] {
        assert_eq!(parse(with(lines)), Err(400), "{lines:?}");
    }
    // White space around a value is not part of it (RFC 9110 section 5.5).
    for lines in ["Transfer-Encoding:chunked\r\n", "Transfer-Encoding: \t chunked\t \r\n"] {
        assert_eq!(parse(with(lines)).as_deref(), Ok("POST / at a Chunked kept"), "{lines:?}");
    }
    refused(&[("POST / HTTP/1.0\r\nTransfer-Encoding: chunked\r\n\r\n", 400)]);
}

#[test]
fn malformed_lines_are_refused() {
    for lines in [
        "A: b\r\n c\r\n",
        "A: b\r\n\tc\r\n",
        "A: b\rc\r\n",
        "A: b\r\r\n",
        "A: b\nC: d\r\n",
        "A: b\n\r\n",
        "A: \0\r\n",
        "A: b\x01\r\n",
        "A: b\x7f\r\n",
        "A\0: b\r\n",
        "A b: c\r\n",
        "A : b\r\n",
        ": b\r\n",
        "A\r\n",
        "(A): b\r\n",
        "A\u{e9}: b\r\n",
        "Connection: a b\r\n",
        "Connection: @\r\n",
    ] {
        assert_eq!(parse(with(lines)), Err(400), "{lines:?}");
    }
    refused(&[
        ("GET / HTTP/1.1\nHost: a\n\n", 400),
        ("GET / HTTP/1.1\r\nHost: a\r\n\n", 400),
        ("\nGET / HTTP/1.1\r\nHost: a\r\n\r\n", 400),
        ("\rGET / HTTP/1.1\r\nHost: a\r\n\r\n", 400),
        ("GET / HTTP/1.1\rHost: a\r\n\r\n", 400),
    ]);
    // Already wrong before it is complete.
    refused(&[("GET / HTTP/1.1\nHost", 400), ("GET / HTTP/1.1\r\nHost: a\r\nA : ", 400), ("GE\0", 400)]);
}

#[test]
fn malformed_request_lines_are_refused() {
    refused(&[
        ("GET /\r\n\r\n", 400),
        ("GET / \r\n\r\n", 400),
        ("GET  / HTTP/1.1\r\nHost: a\r\n\r\n", 400),
        ("GET /  HTTP/1.1\r\nHost: a\r\n\r\n", 400),
        ("GET\t/ HTTP/1.1\r\nHost: a\r\n\r\n", 400),
        ("GET /a b\r\n\r\n", 400),
        (" GET / HTTP/1.1\r\nHost: a\r\n\r\n", 400),
        ("GET / HTTP/1.1 \r\nHost: a\r\n\r\n", 400),
        ("GET / HTTP/1.11\r\nHost: a\r\n\r\n", 400),
        ("GET / HTTP/2.0\r\nHost: a\r\n\r\n", 505),
        ("GET / HTTP/1.2\r\nHost: a\r\n\r\n", 505),
        ("GET / HTTP/0.9\r\nHost: a\r\n\r\n", 505),
        ("GET / HTTPS/1.1\r\nHost: a\r\n\r\n", 400),
        ("GET / http/1.1\r\nHost: a\r\n\r\n", 400),
        ("PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", 505),
        ("G(T / HTTP/1.1\r\nHost: a\r\n\r\n", 400),
        ("GET /a b HTTP/1.1\r\nHost: a\r\n\r\n", 400),
        ("GET /\0 HTTP/1.1\r\nHost: a\r\n\r\n", 400),
        ("GET /\x7f HTTP/1.1\r\nHost: a\r\n\r\n", 400),
        ("GET /\u{e9} HTTP/1.1\r\nHost: a\r\n\r\n", 400),
        ("GET /a#b HTTP/1.1\r\nHost: a\r\n\r\n", 400),
        ("GET a HTTP/1.1\r\nHost: a\r\n\r\n", 400),
        ("GET * HTTP/1.1\r\nHost: a\r\n\r\n", 400),
        ("GET ?a HTTP/1.1\r\nHost: a\r\n\r\n", 400),
        ("GET http:///a HTTP/1.1\r\nHost: a\r\n\r\n", 400),
        ("GET http://u@b/ HTTP/1.1\r\nHost: a\r\n\r\n", 400),
        ("GET http://b:x/ HTTP/1.1\r\nHost: a\r\n\r\n", 400),
        ("GET http:/b HTTP/1.1\r\nHost: a\r\n\r\n", 400),
        ("GET ftp://b/ HTTP/1.1\r\nHost: a\r\n\r\n", 400),
        ("GET http://b/ HTTP/1.1\r\nHost: a b\r\n\r\n", 400),
        ("GET http://b/ HTTP/1.1\r\n\r\n", 400),
        ("CONNECT a:443 HTTP/1.1\r\nHost: a:443\r\n\r\n", 405),
        ("CONNECT / HTTP/1.1\r\nHost: a\r\n\r\n", 405),
        ("TRACE / HTTP/1.1\r\nHost: a\r\n\r\n", 405),
    ]);
}

#[test]
fn hosts() {
    refused(&[
        ("GET / HTTP/1.1\r\n\r\n", 400),
        ("GET / HTTP/1.1\r\nHost: a\r\nHost: a\r\n\r\n", 400),
        ("GET / HTTP/1.1\r\nHost: a\r\nhost: b\r\n\r\n", 400),
        ("GET / HTTP/1.0\r\nHost: a\r\nHost: b\r\n\r\n", 400),
    ]);
    for host in [
        "a b", "u@a", "u:p@a", "a/b", "a?b", "a#b", "a,b", "a\\b", "a:x", "a:-1", "a:70000", "a:123456",
        "a:1:2", "[::1", "::1", "[::1]x", "[]", "[g::1]", "a%2eb", "\u{e9}", "<a>", "a'",
    ] {
        assert_eq!(parse(format!("GET / HTTP/1.1\r\nHost: {host}\r\n\r\n")), Err(400), "{host:?}");
    }
    let long = "a".repeat(300);
    assert_eq!(parse(format!("GET / HTTP/1.1\r\nHost: {long}\r\n\r\n")), Err(400));
}

#[test]
fn limits_hold_for_whole_and_for_partial_heads() {
    let limits = Limits { header_bytes: 512, headers: 4, target_bytes: 64, ..Limits::default() };
    let target = |n: usize| format!("GET /{} HTTP/1.1\r\nHost: a\r\n\r\n", "x".repeat(n - 1));
    let bytes = |n: usize| format!("GET / HTTP/1.1\r\nHost: a\r\nB: {}\r\n\r\n", "x".repeat(n - 32));
    let count = |n: usize| format!("GET / HTTP/1.1\r\nHost: a\r\n{}\r\n", "B: c\r\n".repeat(n - 1));
    for (text, status) in [
        (target(64), None),
        (target(65), Some(414)),
        (bytes(512), None),
        (bytes(513), Some(431)),
        (count(4), None),
        (count(5), Some(431)),
        ("x".repeat(129), Some(414)),
        (format!("GET /{}", "x".repeat(130)), Some(414)),
        ("x".repeat(512), Some(414)),
        (bytes(600)[..512].to_owned(), Some(431)),
        (count(6)[..count(6).len() - 2].to_owned(), Some(431)),
    ] {
        assert_eq!(parse_within(text.as_bytes(), &limits).err(), status, "{text:?}");
    }
    let target = format!("GET /{} HTTP/1.1\r\nHost: a\r\n\r\n", "x".repeat(8 << 10));
    assert_eq!(parse(target), Err(414));
    let count = |n: usize| format!("GET / HTTP/1.1\r\nHost: a\r\n{}\r\n", "B: c\r\n".repeat(n - 1));
    assert_eq!(parse(count(100)).err(), None);
    assert_eq!(parse(count(101)), Err(431));
    // No limit asks for more room than there is.
    let limits = Limits { headers: usize::MAX, ..Limits::default() };
    assert_eq!(parse_within(count(MAX_HEADERS + 1).as_bytes(), &limits), Err(431));
}

#[test]
fn a_piece_of_a_good_head_is_never_refused_and_never_complete() {
    let text = "POST /a?b HTTP/1.1\r\nHost: a.example:80\r\nContent-Length: 3\r\nA:  b\t\r\nExpect: 100-continue\r\n\r\n";
    for end in 1..text.len() {
        assert_eq!(parse(&text[..end]), Err(0), "{:?}", &text[..end]);
    }
    assert!(parse(text).is_ok());
}

#[test]
fn what_connection_nominates() {
    let text = with("Connection: close, X-A,, x-b\r\nConnection: X-C\r\n");
    let mut room = HeaderRoom::new();
    let head = RequestHead::parse(text.as_bytes(), &mut room, &Limits::default()).unwrap().unwrap();
    assert_eq!(head.nominated.as_slice(), [b"X-A", b"x-b", b"X-C"]);
    assert_eq!(head.length, text.len());
}

#[test]
fn ports_are_split_off() {
    for (authority, host, port) in [
        ("a", "a", None),
        ("a:80", "a", Some("80")),
        ("a:", "a", Some("")),
        ("[::1]", "[::1]", None),
        ("[::1]:80", "[::1]", Some("80")),
        ("", "", None),
    ] {
        let split = split_port(authority.as_bytes());
        assert_eq!(split, (host.as_bytes(), port.map(str::as_bytes)), "{authority}");
    }
}
