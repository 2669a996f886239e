use super::super::head::HeaderRoom;
use super::*;
use crate::config::Limits;

/// The head that leaves for the endpoint, without what every request gets.
fn forwarded(text: &str) -> String {
    let out = String::from_utf8(reserialised(text.as_bytes()).unwrap()).unwrap();
    let ours = ["X-Forwarded-", "X-Real-IP: ", "X-Scheme: ", "X-Request-ID: "];
    out.split_inclusive("\r\n").filter(|line| !ours.iter().any(|o| line.starts_with(o))).collect()
}

/// `None`: not accepted, or not complete.
fn reserialised(bytes: &[u8]) -> Option<Vec<u8>> {
    let mut room = HeaderRoom::new();
    let head = RequestHead::parse(bytes, &mut room, &Limits::default()).ok()??;
    let client = Client::new("192.0.2.7:4711".parse().unwrap(), "127.0.0.1:80".parse().unwrap(), &[], None);
    let told = client.forwarded(|| claims(&head));
    let id = RequestId::new(head.first(Field::XRequestId), &mut fastrand::Rng::with_seed(1));
    let mut out = Vec::new();
    write_request(&mut out, &head, &client, &told, &id, None);
    Some(out)
}

#[test]
fn requests() {
    for (sent, expected) in [
        ("GET / HTTP/1.1\r\nHost: a\r\n\r\n", "GET / HTTP/1.1\r\nHost: a\r\n\r\n"),
        ("GET http://B:81/c HTTP/1.1\r\nHost: a\r\n\r\n", "GET /c HTTP/1.1\r\nHost: B:81\r\n\r\n"),
        ("GET / HTTP/1.0\r\nHost: a\r\nConnection: keep-alive\r\n\r\n", "GET / HTTP/1.1\r\nHost: a\r\n\r\n"),
        // Order and spelling stay, also of what is said twice.
        (
            "GET / HTTP/1.1\r\nb: 2\r\nHost: a\r\nCookie: c=1\r\nA:1 \r\nCOOKIE: d=2\r\nUser-Agent: u\r\nReferer: r\r\n\r\n",
            "GET / HTTP/1.1\r\nHost: a\r\nb: 2\r\nCookie: c=1\r\nA: 1\r\nCOOKIE: d=2\r\nUser-Agent: u\r\nReferer: r\r\n\r\n",
        ),
        // What ends at this hop, by name and by nomination.
        (
            "GET / HTTP/1.1\r\nHost: a\r\nConnection: close, X-Hop, x-other\r\nX-Hop: 1\r\nX-OTHER: 2\r\nX-Hops: 3\r\n\
             Keep-Alive: timeout=5\r\nProxy-Connection: close\r\nHTTP2-Settings: AAA\r\nProxy: x\r\nTE: gzip\r\n\r\n",
            "GET / HTTP/1.1\r\nHost: a\r\nX-Hops: 3\r\n\r\n",
        ),
        // Nomination takes away nothing that framing and routing rest on.
        (
            "POST / HTTP/1.1\r\nHost: a\r\nConnection: Host, Content-Length\r\nContent-Length: 3\r\n\r\n",
            "POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 3\r\n\r\n",
        ),
        (
            "POST / HTTP/1.1\r\nHost: a\r\nConnection: Transfer-Encoding\r\nTransfer-Encoding: CHUNKED\r\n\r\n",
            "POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n",
        ),
        // Names that a CGI-style endpoint would take for the real ones.
        (
            "POST / HTTP/1.1\r\nHost: a\r\nContent_Length: 3\r\nTransfer_Encoding: chunked\r\nX_Real_IP: 6.6.6.6\r\n\
             X_Forwarded_For: 6.6.6.6\r\nX-Forwarded_Proto: https\r\nX_Request_ID: x\r\n\r\n",
            "POST / HTTP/1.1\r\nHost: a\r\n\r\n",
        ),
        (
            "GET / HTTP/1.1\r\nHost: a\r\nTE: Trailers\r\n\r\n",
            "GET / HTTP/1.1\r\nHost: a\r\nTE: Trailers\r\n\r\n",
        ),
        (
            "POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 0\r\n\r\n",
            "POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 0\r\n\r\n",
        ),
        (
            "POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 007\r\nExpect: 100-continue\r\n\r\n",
            "POST / HTTP/1.1\r\nHost: a\r\nExpect: 100-continue\r\nContent-Length: 7\r\n\r\n",
        ),
        (
            "GET / HTTP/1.1\r\nHost: a\r\nConnection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Key: k\r\n\r\n",
            "GET / HTTP/1.1\r\nHost: a\r\nSec-WebSocket-Key: k\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n",
        ),
        (
            "GET / HTTP/1.1\r\nHost: a\r\nConnection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: A\r\n\r\n",
            "GET / HTTP/1.1\r\nHost: a\r\n\r\n",
        ),
    ] {
        assert_eq!(forwarded(sent), expected, "{sent:?}");
    }
}

fn delivered(text: &str, to_head: bool, to: Delivery, extra: &str) -> String {
    let mut room = HeaderRoom::new();
    let head = ResponseHead::parse(text.as_bytes(), &mut room, to_head).unwrap().unwrap();
    let mut out = Vec::new();
    write_response(&mut out, &head, to, extra.as_bytes(), None);
    String::from_utf8(out).unwrap()
}

#[test]
fn responses() {
    let kept = Delivery { framing: Framing::None, keep_alive: true, minor: 1 };
    let closed = Delivery { keep_alive: false, ..kept };
    let length = Delivery { framing: Framing::Length(5), ..kept };
    let chunked = Delivery { framing: Framing::Chunked, ..kept };
    for (sent, to, expected) in [
        (
            "HTTP/1.1 200 Fine\r\nContent-Length: 5\r\n\r\n",
            length,
            "HTTP/1.1 200 Fine\r\nContent-Length: 5\r\n\r\n",
        ),
        ("HTTP/1.1 200\r\nContent-Length: 0\r\n\r\n", kept, "HTTP/1.1 200 \r\nContent-Length: 0\r\n\r\n"),
        (
            "HTTP/1.1 200 OK\r\nContent-Length: 0\r\nContent-Length: 0\r\n\r\n",
            closed,
            "HTTP/1.1 200 OK\r\nContent-Length: 0\r\nConnection: close\r\n\r\n",
        ),
        // An endpoint's HTTP/1.0 is none of the client's business.
        (
            "HTTP/1.0 200 OK\r\nServer: s\r\nDate: Thu, 01 Jan 1970 00:00:00 GMT\r\n\r\n",
            chunked,
            "HTTP/1.1 200 OK\r\nServer: s\r\nDate: Thu, 01 Jan 1970 00:00:00 GMT\r\nTransfer-Encoding: chunked\r\n\r\n",
        ),
        (
            "HTTP/1.1 200 OK\r\nSet-Cookie: a=1\r\nTransfer-Encoding: chunked\r\nSet-Cookie: b=2\r\nset-cookie: a=3\r\n\r\n",
            chunked,
            "HTTP/1.1 200 OK\r\nSet-Cookie: a=1\r\nSet-Cookie: b=2\r\nset-cookie: a=3\r\nTransfer-Encoding: chunked\r\n\r\n",
        ),
        (
            "HTTP/1.1 200 OK\r\nConnection: close, X-Hop\r\nX-Hop: 1\r\nKeep-Alive: x\r\nUpgrade: h2c\r\nContent-Length: 5\r\n\r\n",
            length,
            "HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\n",
        ),
        ("HTTP/1.1 204 No Content\r\nContent-Length: 0\r\n\r\n", kept, "HTTP/1.1 204 No Content\r\n\r\n"),
        (
            "HTTP/1.1 304 NM\r\nContent-Length: 5\r\nETag: e\r\n\r\n",
            kept,
            "HTTP/1.1 304 NM\r\nContent-Length: 5\r\nETag: e\r\n\r\n",
        ),
        (
            "HTTP/1.1 103 EH\r\nContent-Length: 0\r\nLink: l\r\n\r\n",
            kept,
            "HTTP/1.1 103 EH\r\nLink: l\r\n\r\n",
        ),
        (
            "HTTP/1.1 101 SP\r\nConnection: upgrade\r\nUpgrade: echo\r\n\r\n",
            kept,
            "HTTP/1.1 101 SP\r\nConnection: Upgrade\r\nUpgrade: echo\r\n\r\n",
        ),
    ] {
        assert_eq!(delivered(sent, false, to, ""), expected, "{sent:?}");
    }
    let to_head = "HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\n";
    assert_eq!(delivered(to_head, true, kept, ""), to_head);
    let old = Delivery { minor: 0, ..length };
    assert_eq!(
        delivered("HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\n", false, old, "Set-Cookie: s=1\r\n"),
        "HTTP/1.1 200 OK\r\nSet-Cookie: s=1\r\nContent-Length: 5\r\nConnection: keep-alive\r\n\r\n"
    );
}

#[test]
fn request_ids_are_kept_if_harmless() {
    let id = |sent: Option<&str>| {
        let id = RequestId::new(sent.map(str::as_bytes), &mut fastrand::Rng::with_seed(3));
        String::from_utf8(id.as_bytes().to_vec()).unwrap()
    };
    for kept in ["a", "0f-_.:/+=Z", &"x".repeat(64)] {
        assert_eq!(id(Some(kept)), kept);
    }
    for replaced in
        [None, Some(""), Some("a b"), Some("a\"b"), Some("a,b"), Some("\u{e9}"), Some(&*"x".repeat(65))]
    {
        let made = id(replaced);
        assert!(made.len() == 32 && made.bytes().all(|b| b.is_ascii_hexdigit()), "{replaced:?}: {made}");
    }
}

/// What both sides must agree on.
#[derive(Debug, PartialEq, Eq)]
struct Meaning {
    method: Vec<u8>,
    target: Vec<u8>,
    host: Vec<u8>,
    framing: Framing,
    upgrade: Option<Vec<u8>>,
}

fn meaning(bytes: &[u8]) -> Option<(Meaning, usize)> {
    let mut room = HeaderRoom::new();
    // What we add may exceed what a client may send.
    let limits = Limits { headers: usize::MAX, header_bytes: 1 << 20, ..Limits::default() };
    let head = RequestHead::parse(bytes, &mut room, &limits).ok()??;
    let meaning = Meaning {
        method: head.method.to_vec(),
        target: head.target.to_vec(),
        host: head.host.to_vec(),
        framing: head.framing,
        upgrade: head.upgrade.map(<[u8]>::to_vec),
    };
    Some((meaning, head.length))
}

const SEEDS: [&str; 6] = [
    "GET /a/b?c=d HTTP/1.1\r\nHost: a.example:8080\r\nAccept: */*\r\nCookie: a=b; c=d\r\n\r\n",
    "POST http://b.example/x HTTP/1.1\r\nHost: a\r\nContent-Length: 12\r\nConnection: close, X-A\r\nX-A: 1\r\n\r\n",
    "PUT / HTTP/1.1\r\nHost: [::1]:80\r\nTransfer-Encoding: chunked\r\nExpect: 100-continue\r\nTE: trailers\r\n\r\n",
    "GET / HTTP/1.0\r\nConnection: keep-alive\r\nX-Forwarded-For: 1.2.3.4\r\nX-Request-ID: abc\r\n\r\n",
    "OPTIONS * HTTP/1.1\r\nHost: a\r\nContent-Length: 0\r\n\r\n",
    "\r\nGET /ws HTTP/1.1\r\nHost: a\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n",
];

/// Pieces worth finding in odd places.
const PIECES: [&str; 24] = [
    "\r\n",
    "\n",
    "\r",
    "\r\n\r\n",
    " ",
    "\t",
    ":",
    "\0",
    "\r\n ",
    ",",
    "#",
    "@",
    "\u{e9}",
    "Host: b\r\n",
    "Content-Length: 5\r\n",
    "Transfer-Encoding: chunked\r\n",
    "Connection: ",
    "Upgrade: h2c\r\n",
    "HTTP/1.0",
    "http://",
    "chunked",
    "0",
    "_",
    "\x7f",
];

fn mutated(random: &mut fastrand::Rng) -> Vec<u8> {
    let mut bytes = SEEDS[random.usize(..SEEDS.len())].as_bytes().to_vec();
    for _ in 0..random.usize(0..4) {
        let at = random.usize(..=bytes.len());
        let end = (at + random.usize(0..6)).min(bytes.len());
        match random.u8(0..4) {
            0 => drop(bytes.drain(at..end)),
            1 => drop(bytes.splice(at..at, PIECES[random.usize(..PIECES.len())].bytes())),
            2 => drop(bytes.splice(at..end, [random.u8(..)])),
            _ => {
                let copy = bytes[at..].to_vec();
                let to = random.usize(..=bytes.len());
                bytes.splice(to..to, copy.into_iter().take(40));
            }
        }
    }
    bytes
}

/// Whatever is accepted says the same to the endpoint as it said to us, and is
/// one request: nothing of it is left over to be taken for the next.
#[test]
fn mutated_requests_mean_the_same_on_both_sides() {
    let mut random = fastrand::Rng::with_seed(20);
    let mut accepted = 0;
    for _ in 0..20_000 {
        let bytes = mutated(&mut random);
        let Some(out) = reserialised(&bytes) else { continue };
        accepted += 1;
        let shown = || format!("{} became {}", bytes.escape_ascii(), out.escape_ascii());
        let (sent, _) = meaning(&bytes).unwrap();
        let (received, length) = meaning(&out).unwrap_or_else(|| panic!("{}", shown()));
        assert_eq!(sent, received, "{}", shown());
        assert_eq!(length, out.len(), "{}", shown());
    }
    assert!(accepted > 4_000, "{accepted} accepted: the mutations are too coarse");
}
