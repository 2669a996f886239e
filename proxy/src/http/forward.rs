//! What is sent on: heads written anew from their parsed form, field by field,
//! without what ends at this hop and with what this hop adds (RFC 9110 section 7.6).

use crate::buffer::Output;
use crate::table::{FieldEdits, HeaderEdits};

use super::client::{Claims, Client, Forwarded};
use super::edit::drops;
use super::field::Field;
use super::head::{Framing, RequestHead};
use super::response::ResponseHead;

/// A request id: the client's if it is harmless, else 128 random bits in hex.
#[derive(Clone, Copy)]
pub(crate) struct RequestId {
    bytes: [u8; 64],
    length: u8,
}

impl RequestId {
    pub(crate) fn new(sent: Option<&[u8]>, random: &mut fastrand::Rng) -> RequestId {
        let mut id = RequestId { bytes: [0; 64], length: 32 };
        match sent {
            Some(value) if is_harmless(value) => {
                id.bytes[..value.len()].copy_from_slice(value);
                id.length = value.len() as u8;
            }
            _ => {
                let bits = random.u128(..);
                for (at, slot) in id.bytes[..32].iter_mut().enumerate() {
                    *slot = b"0123456789abcdef"[(bits >> (at * 4)) as usize & 15];
                }
            }
        }
        id
    }

    pub(crate) fn as_bytes(&self) -> &[u8] {
        &self.bytes[..usize::from(self.length)]
    }
}

fn is_harmless(value: &[u8]) -> bool {
    (1..=64).contains(&value.len())
        && value.iter().all(|b| b.is_ascii_alphanumeric() || b"-_.:/+=".contains(b))
}

/// The forwarded headers of a request.
pub(crate) fn claims<'b>(head: &RequestHead<'_, 'b>) -> Claims<'b> {
    let mut claims = Claims::default();
    for (header, field) in head.headers.iter().zip(&*head.fields) {
        match field {
            Field::XForwardedFor => claims.for_.push(header.value),
            Field::XForwardedProto => claims.proto = Some(header.value),
            Field::XForwardedHost => claims.host = Some(header.value),
            Field::XForwardedPort => claims.port = Some(header.value),
            _ => {}
        }
    }
    claims
}

/// Appends what endpoints are told of the client and of the request, where it is not edited away.
/// `host` is the client's.
pub(crate) fn write_told(
    out: &mut Vec<u8>,
    client: &Client,
    forwarded: &Forwarded<'_>,
    host: &[u8],
    id: &RequestId,
    edits: Option<&FieldEdits>,
) {
    if let Some(edits) = edits.filter(|edits| edits.replaces_ours) {
        let mut lines = Output::take();
        write_told(&mut lines, client, forwarded, host, id, None);
        return edits.write_kept(out, &lines);
    }
    client.write_forwarded(out, forwarded);
    let host = forwarded.claims.host.unwrap_or(host);
    put(out, &[b"X-Forwarded-Host: ", host, b"\r\nX-Request-ID: ", id.as_bytes(), b"\r\n"]);
}

/// Writes the head of the upstream request, up to and including its empty line.
pub(crate) fn write_request(
    out: &mut Vec<u8>,
    head: &RequestHead<'_, '_>,
    client: &Client,
    forwarded: &Forwarded<'_>,
    id: &RequestId,
    edits: Option<&HeaderEdits>,
) {
    let host = edits.map_or(head.host, |edits| edits.host_or(head.host));
    let fields = edits.map(|edits| &edits.request);
    put(out, &[head.method, b" ", head.target, b" HTTP/1.1\r\nHost: ", host, b"\r\n"]);
    write_told(out, client, forwarded, head.host, id, fields);
    for (header, field) in head.headers.iter().zip(&*head.fields) {
        let keep = match field {
            Field::Other => !is_nominated(&head.nominated, header.name.as_bytes()),
            Field::Expect | Field::UserAgent | Field::Referer => true,
            // Rewritten below or replaced above; a Content-Length of 0 is worth saying.
            Field::ContentLength => head.framing == Framing::None,
            Field::Te => header.value.eq_ignore_ascii_case(b"trailers"),
            _ => false,
        };
        if keep && !drops(fields, header.name.as_bytes()) {
            put(out, &[header.name.as_bytes(), b": ", header.value, b"\r\n"]);
        }
    }
    if let Some(edits) = edits {
        out.extend_from_slice(&edits.request.lines);
    }
    write_framing(out, head.framing);
    match (head.upgrade, edits) {
        (Some(protocol), _) => put(out, &[b"Connection: Upgrade\r\nUpgrade: ", protocol, b"\r\n"]),
        (None, Some(edits)) => out.extend_from_slice(edits.connection_line()),
        (None, None) => {}
    }
    out.extend_from_slice(b"\r\n");
}

/// How a response leaves for the client.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Delivery {
    /// As it is framed on the client's connection.
    pub(crate) framing: Framing,
    /// Whether the client's connection stays open afterwards.
    pub(crate) keep_alive: bool,
    /// The client's HTTP/1 minor version.
    pub(crate) minor: u8,
}

/// Writes the head of the response. `extra` are complete header lines to add.
pub(crate) fn write_response(
    out: &mut Vec<u8>,
    head: &ResponseHead<'_, '_>,
    to: Delivery,
    extra: &[u8],
    edits: Option<&FieldEdits>,
) {
    let mut status = [0; 3];
    put(out, &[b"HTTP/1.1 ", digits(head.status, &mut status), b" ", head.reason, b"\r\n"]);
    // HEAD and 304 tell the length of a body that does not follow; 1xx and 204 must not
    // (RFC 9110 section 8.6). Said twice, it is told once.
    let mut keep_length = to.framing == Framing::None && !matches!(head.status, 100..200 | 204);
    for (header, field) in head.headers.iter().zip(&*head.fields) {
        let keep = match field {
            Field::Connection | Field::TransferEncoding | Field::HopByHop | Field::Upgrade => false,
            Field::ContentLength => std::mem::take(&mut keep_length),
            _ => !is_nominated(&head.nominated, header.name.as_bytes()),
        };
        if keep && !drops(edits, header.name.as_bytes()) {
            put(out, &[header.name.as_bytes(), b": ", header.value, b"\r\n"]);
        }
    }
    if let Some(edits) = edits {
        out.extend_from_slice(&edits.lines);
    }
    out.extend_from_slice(extra);
    write_framing(out, to.framing);
    match (head.status, head.upgrade) {
        (101, Some(protocol)) => put(out, &[b"Connection: Upgrade\r\nUpgrade: ", protocol, b"\r\n"]),
        (100..200, _) => {}
        _ => out.extend_from_slice(connection_line(to.keep_alive, to.minor)),
    }
    out.extend_from_slice(b"\r\n");
}

/// What must be said about persistence; HTTP/1.1 keep-alive goes without saying.
pub(crate) fn connection_line(keep_alive: bool, minor: u8) -> &'static [u8] {
    match (keep_alive, minor) {
        (true, 1..) => b"",
        (true, 0) => b"Connection: keep-alive\r\n",
        (false, _) => b"Connection: close\r\n",
    }
}

pub(crate) fn write_framing(out: &mut Vec<u8>, framing: Framing) {
    match framing {
        Framing::Length(n) => put(out, &[b"Content-Length: ", decimal(n, &mut [0; 20]), b"\r\n"]),
        Framing::Chunked => out.extend_from_slice(b"Transfer-Encoding: chunked\r\n"),
        Framing::None | Framing::Close => {}
    }
}

fn is_nominated(nominated: &[&[u8]], name: &[u8]) -> bool {
    nominated.iter().any(|n| n.eq_ignore_ascii_case(name))
}

pub(crate) fn put(out: &mut Vec<u8>, parts: &[&[u8]]) {
    for part in parts {
        out.extend_from_slice(part);
    }
}

/// `n` in decimal, at the end of `room`.
pub(crate) fn decimal(mut n: u64, room: &mut [u8; 20]) -> &[u8] {
    let mut at = room.len();
    loop {
        at -= 1;
        room[at] = b'0' + (n % 10) as u8;
        n /= 10;
        if n == 0 {
            return &room[at..];
        }
    }
}

fn digits(status: u16, room: &mut [u8; 3]) -> &[u8] {
    *room = [b'0' + (status / 100) as u8, b'0' + (status / 10 % 10) as u8, b'0' + (status % 10) as u8];
    room
}

#[cfg(test)]
#[path = "forward/tests.rs"]
mod tests;
