//! Fuzz targets: what must hold of every parser, whatever bytes a stranger sends.
//!
//! Each is a plain function that panics when it does not hold. The ordinary
//! tests replay `fuzz/corpus/TARGET` and mutate it from a fixed seed; the
//! runner in `fuzz/` looks for more with libFuzzer.

use std::net::SocketAddr;

use crate::client_hello;
use crate::config::{Limits, MAX_HEADERS};
use crate::http::chunked::{self, Decoder};
use crate::http::client::Client;
use crate::http::field::Field;
use crate::http::forward::{Delivery, RequestId, claims, write_request, write_response};
use crate::http::head::{Framing, HeaderRoom, Reject, RequestHead};
use crate::http::path::{normalise, normalise_path};
use crate::http::response::{BadResponse, ResponseHead};
use crate::proxy_protocol::{self, Origin, Parsed, Version};

#[cfg(test)]
pub(crate) mod tests;

/// A target.
pub type Target = fn(&[u8]);

/// Every target, by the name of its corpus.
pub const TARGETS: [(&str, Target); 6] = [
    ("request_head", request_head),
    ("response_head", response_head),
    ("chunked", chunked_body),
    ("path", path),
    ("proxy_header", proxy_header),
    ("client_hello", client_hello_name),
];

/// Prefixes looked at per input: all of a short one, some of a long one.
const PREFIXES: usize = 256;

/// A refusal is final, an acceptance stays the same however the bytes arrive,
/// and what is sent on means the same when it is read again.
pub fn request_head(bytes: &[u8]) {
    // Small, so that short inputs reach them.
    let limits = Limits { header_bytes: 1024, headers: 24, target_bytes: 256, ..Limits::default() };
    let whole = request_length(bytes, &limits);
    for cut in cuts(bytes) {
        agrees(request_length(&bytes[..cut], &limits), whole, cut);
    }
    for trusted in [false, true] {
        resent(bytes, &limits, trusted);
    }
}

fn request_length(bytes: &[u8], limits: &Limits) -> Result<Option<usize>, Reject> {
    let mut room = HeaderRoom::new();
    let head = RequestHead::parse(bytes, &mut room, limits)?;
    Ok(head.map(|head| head.length))
}

fn resent(bytes: &[u8], limits: &Limits, trusted: bool) {
    let mut room = HeaderRoom::new();
    let Ok(Some(head)) = RequestHead::parse(bytes, &mut room, limits) else { return };
    assert!(head.length <= bytes.len());
    normalise(head.path(), &mut Vec::new()).ok();
    let sent = written(&head, trusted);
    // With the lines a proxy adds.
    let wider = Limits {
        header_bytes: usize::MAX,
        target_bytes: usize::MAX / 2,
        headers: MAX_HEADERS,
        ..Limits::default()
    };
    let mut room = HeaderRoom::new();
    let again = match RequestHead::parse(&sent, &mut room, &wider) {
        Ok(Some(again)) => again,
        other => panic!("sent on, but not readable: {:?}", other.err()),
    };
    assert_eq!(again.length, sent.len(), "one message became two");
    assert_eq!((again.method, again.target, again.host), (head.method, head.target, head.host));
    assert_eq!((again.framing, again.upgrade), (head.framing, head.upgrade));
    assert!(again.keep_alive && again.minor == 1);
    assert!(again.fields.iter().filter(|f| **f == Field::Host).count() == 1);
    if !trusted {
        // A chain of proxies grows the list of addresses; nothing else changes at the second hop.
        assert_eq!(written(&again, false), sent);
    }
}

fn written(head: &RequestHead<'_, '_>, trusted: bool) -> Vec<u8> {
    let peer = SocketAddr::from(([192, 0, 2, 7], 4711));
    let trust = if trusted { vec![peer.ip().into()] } else { Vec::new() };
    let client = Client::new(peer, SocketAddr::from(([127, 0, 0, 1], 80)), &trust, None);
    let told = client.forwarded(|| claims(head));
    let id = RequestId::new(head.first(Field::XRequestId), &mut fastrand::Rng::with_seed(1));
    let mut out = Vec::new();
    write_request(&mut out, head, &client, &told, &id, None);
    out
}

/// As [`request_head`], for what an endpoint answers, to HEAD and to other methods.
pub fn response_head(bytes: &[u8]) {
    for to_head in [false, true] {
        let whole = response_length(bytes, to_head);
        for cut in cuts(bytes) {
            agrees(response_length(&bytes[..cut], to_head), whole, cut);
        }
        let mut room = HeaderRoom::new();
        let Ok(Some(head)) = ResponseHead::parse(bytes, &mut room, to_head) else { continue };
        assert!(head.length <= bytes.len());
        let sent = delivered(&head);
        let mut room = HeaderRoom::new();
        let again = match ResponseHead::parse(&sent, &mut room, to_head) {
            Ok(Some(again)) => again,
            other => panic!("sent on, but not readable: {:?}", other.err()),
        };
        assert_eq!(again.length, sent.len(), "one message became two");
        assert_eq!((again.status, again.reason), (head.status, head.reason));
        assert_eq!(again.framing, reframed(head.framing));
        assert_eq!(delivered(&again), sent);
    }
}

fn response_length(bytes: &[u8], to_head: bool) -> Result<Option<usize>, BadResponse> {
    let mut room = HeaderRoom::new();
    let head = ResponseHead::parse(bytes, &mut room, to_head)?;
    Ok(head.map(|head| head.length))
}

fn reframed(framing: Framing) -> Framing {
    if framing == Framing::Close { Framing::Chunked } else { framing }
}

fn delivered(head: &ResponseHead<'_, '_>) -> Vec<u8> {
    let mut out = Vec::new();
    let to = Delivery { framing: reframed(head.framing), keep_alive: true, minor: 1 };
    write_response(&mut out, head, to, b"", None);
    out
}

/// Where an input is cut in two.
fn cuts(bytes: &[u8]) -> impl Iterator<Item = usize> {
    (0..bytes.len()).step_by(bytes.len().div_ceil(PREFIXES).max(1))
}

/// What the first `cut` bytes say must not be taken back by those that follow.
fn agrees<E: Copy + std::fmt::Debug>(
    prefix: Result<Option<usize>, E>,
    whole: Result<Option<usize>, E>,
    cut: usize,
) {
    match (prefix, whole) {
        (Err(error), Ok(_)) => panic!("refused at {cut}, accepted as a whole: {error:?}"),
        (Ok(Some(length)), Ok(Some(same))) if length == same => {}
        (Ok(Some(length)), other) => panic!("{length} bytes long at {cut}, then {other:?}"),
        (Ok(None), Ok(Some(length))) => assert!(length > cut, "incomplete at {cut}, yet of {length} bytes"),
        (Ok(None) | Err(_), _) => {}
    }
}

/// Decoding in pieces says the same as decoding at once, and what is encoded
/// anew decodes to the same body and trailers.
pub fn chunked_body(bytes: &[u8]) {
    let mut whole = bytes.to_vec();
    let mut at_once = Decoder::default();
    let expected = at_once.decode(&mut whole).map(|d| (whole[..d.data].to_vec(), d.consumed, d.done));
    let (mut body, mut consumed, mut decoder) = (Vec::new(), 0, Decoder::default());
    for &byte in bytes {
        match decoder.decode(&mut [byte]) {
            Err(error) => return assert_eq!(Err(error), expected),
            Ok(decoded) => {
                consumed += decoded.consumed;
                if decoded.data == 1 {
                    body.push(byte);
                }
            }
        }
    }
    assert_eq!(Ok((body.clone(), consumed, decoder.is_done())), expected);
    if !decoder.is_done() {
        return;
    }
    let trailers = decoder.trailers();
    let mut anew = Vec::new();
    if !body.is_empty() {
        anew.extend_from_slice(chunked::size_line(body.len(), &mut [0; 18]));
        anew.extend_from_slice(&body);
        anew.extend_from_slice(b"\r\n");
    }
    anew.extend_from_slice(b"0\r\n");
    anew.extend_from_slice(trailers);
    anew.extend_from_slice(b"\r\n");
    let mut again = Decoder::default();
    let mut bytes = anew.clone();
    match again.decode(&mut bytes) {
        Ok(d) if d.done => {
            assert_eq!((&bytes[..d.data], d.consumed), (body.as_slice(), anew.len()));
            assert_eq!(again.trailers(), trailers);
        }
        other => panic!("sent on, but not readable: {other:?}"),
    }
    let lines = trailers.iter().filter(|&&b| b == b'\n').count();
    assert_eq!(chunked::header_map(trailers).map_or(0, |map| map.len()), lines, "trailers to HTTP/2");
}

/// The same as an obvious model, and nothing in it that routing must not see.
pub fn path(bytes: &[u8]) {
    let path = [b"/", bytes].concat();
    let found = normalise_path(&path);
    assert_eq!(found.as_deref().ok(), model_path(&path).as_deref(), "{}", path.escape_ascii());
    if let Ok(normal) = found {
        // One that was not encoded never gets here.
        assert!(normal.starts_with(b"/") && (path.contains(&0) || !normal.contains(&0)));
        let segments: Vec<_> = normal[1..].split(|&b| b == b'/').collect();
        assert!(!segments.iter().any(|s| matches!(*s, b"." | b"..")));
        assert!(!segments[..segments.len() - 1].iter().any(|s| s.is_empty()));
    }
}

/// Percent-decoding, then segments on a stack (RFC 3986 section 5.2.4).
fn model_path(path: &[u8]) -> Option<Vec<u8>> {
    let mut decoded = Vec::new();
    let mut at = 0;
    while at < path.len() {
        let (byte, used) = match path[at] {
            b'%' => {
                let digits = path.get(at + 1..at + 3).filter(|d| d.iter().all(u8::is_ascii_hexdigit))?;
                (u8::from_str_radix(std::str::from_utf8(digits).ok()?, 16).ok()?, 3)
            }
            byte => (byte, 1),
        };
        if byte == 0 && used == 3 {
            return None;
        }
        decoded.push(byte);
        at += used;
    }
    let mut stack: Vec<&[u8]> = Vec::new();
    let mut is_folder = false;
    for segment in decoded[1..].split(|&b| b == b'/') {
        is_folder = matches!(segment, b"" | b"." | b"..");
        match segment {
            b"" | b"." => {}
            b".." => drop(stack.pop()?),
            name => stack.push(name),
        }
    }
    let mut normal = b"/".to_vec();
    normal.extend_from_slice(&stack.join(&b'/'));
    if is_folder && !stack.is_empty() {
        normal.push(b'/');
    }
    Some(normal)
}

/// A header stays what it is however its bytes arrive, nothing behind its longest
/// form is looked at, and what is written of it is read as the same client.
pub fn proxy_header(bytes: &[u8]) {
    let length = |bytes: &[u8]| {
        proxy_protocol::parse(bytes).map(|parsed| match parsed {
            Parsed::Incomplete => None,
            Parsed::Header { length, .. } => Some(length),
        })
    };
    let whole = proxy_protocol::parse(bytes);
    for cut in cuts(bytes) {
        agrees(length(&bytes[..cut]), length(bytes), cut);
    }
    assert_eq!(proxy_protocol::parse(&bytes[..bytes.len().min(proxy_protocol::MAX_BYTES)]), whole);
    let Ok(Parsed::Header { length, origin }) = whole else { return };
    assert!(length <= bytes.len().min(proxy_protocol::MAX_BYTES));
    assert_eq!(proxy_protocol::parse(&bytes[..length]), whole);
    let Origin::Proxied { source, destination } = origin else { return };
    let canonical = |a: SocketAddr| (a.ip().to_canonical(), a.port());
    for version in [Version::V1, Version::V2] {
        let mut written = Vec::new();
        proxy_protocol::write_header(version, source, destination, &mut written);
        match proxy_protocol::parse(&written) {
            Ok(Parsed::Header { length, origin: Origin::Proxied { source: from, destination: to } }) => {
                assert_eq!(length, written.len());
                assert_eq!(canonical(from), canonical(source));
                assert_eq!(canonical(to), canonical(destination));
            }
            other => panic!("written, but not readable: {other:?}"),
        }
    }
}

/// A name stays what it is however its bytes arrive and are divided into records,
/// never before as many bytes as were said to be missing, and is a name.
pub fn client_hello_name(bytes: &[u8]) {
    use client_hello::Parsed::{Incomplete, Named};
    let whole = client_hello::parse(bytes);
    for cut in cuts(bytes) {
        match (client_hello::parse(&bytes[..cut]), &whole) {
            (Err(error), Ok(_)) => panic!("refused at {cut}, accepted as a whole: {error:?}"),
            (Ok(Named(name)), whole) => assert_eq!(*whole, Ok(Named(name)), "taken back after {cut}"),
            (Ok(Incomplete { missing }), Ok(Named(_))) => {
                assert!((1..=bytes.len() - cut).contains(&missing), "{missing} missing at {cut}");
            }
            (Ok(Incomplete { .. }) | Err(_), _) => {}
        }
    }
    if let Ok(Named(Some(name))) = &whole {
        assert!(!name.is_empty() && name.len() <= 253 && !name.ends_with('.') && !name.contains(".."));
        assert!(name.bytes().all(|b| b.is_ascii_digit() || b.is_ascii_lowercase() || b"-._".contains(&b)));
    }
    // The first record in two.
    let Some(&[kind, major, minor, high, low]) = bytes.get(..5) else { return };
    let length = usize::from(u16::from_be_bytes([high, low]));
    let Some((fragment, rest)) = bytes[5..].split_at_checked(length).filter(|_| length > 1) else { return };
    if let Ok(Named(_)) = &whole {
        let mut divided = vec![kind, major, minor, 0, 1, fragment[0], kind, major, minor];
        divided.extend_from_slice(&(length as u16 - 1).to_be_bytes());
        divided.extend_from_slice(&fragment[1..]);
        divided.extend_from_slice(rest);
        assert_eq!(client_hello::parse(&divided), whole, "in other records");
    }
}
