//! WebSocket over HTTP/2 (RFC 8441) in the words of an endpoint that speaks
//! HTTP/1.1: the handshake that HTTP/2 does without.

use aws_lc_rs::digest::{SHA1_FOR_LEGACY_USE_ONLY, digest};
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use bytes::Bytes;
use h2::ext::Protocol;
use http::{HeaderMap, Method, Request, Response, StatusCode, header};

use crate::buffer::{Buffer, Output};
use crate::http::exchange::{Failure, Order};
use crate::http::forward::put;
use crate::http::head::{HeaderRoom, Reject};
use crate::http::response::{BadResponse, ResponseHead};
use crate::http::{chunked, map};

/// What an endpoint appends to the key before it hashes it (RFC 6455 section 1.3).
const GUID: &[u8] = b"258EAFA5-E914-47DA-95CA-C5AB0DC85B11";

/// `Sec-WebSocket-Key`: 16 random bytes in base64.
pub(super) struct Key([u8; 24]);

impl Key {
    pub(super) fn new(random: &mut fastrand::Rng) -> Key {
        let mut key = Key([0; 24]);
        let bytes = random.u128(..).to_ne_bytes();
        let written = STANDARD.encode_slice(bytes, &mut key.0);
        debug_assert_eq!(written, Ok(24));
        key
    }

    /// The `Sec-WebSocket-Accept` that proves an endpoint has read the key.
    fn accept(&self) -> [u8; 28] {
        let mut input = [0; 24 + GUID.len()];
        input[..24].copy_from_slice(&self.0);
        input[24..].copy_from_slice(GUID);
        let mut accept = [0; 28];
        let written = STANDARD.encode_slice(digest(&SHA1_FOR_LEGACY_USE_ONLY, &input), &mut accept);
        debug_assert_eq!(written, Ok(28));
        accept
    }

    /// The lines that ask an HTTP/1.1 endpoint to switch.
    pub(super) fn write_lines(&self, head: &mut Output) {
        put(head, &[b"Sec-WebSocket-Key: ", &self.0, b"\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n"]);
    }
}

/// Whether this is an extended CONNECT for WebSocket.
///
/// # Errors
/// A CONNECT for anything else: 405 for a plain one, 501 for an unknown protocol
/// (RFC 9220 section 3).
pub(super) fn is_wanted(request: &Request<()>) -> Result<bool, Reject> {
    if *request.method() != Method::CONNECT {
        return Ok(false);
    }
    match request.extensions().get::<Protocol>() {
        Some(protocol) if protocol.as_str().eq_ignore_ascii_case("websocket") => Ok(true),
        Some(_) => Err(Reject { status: 501, reason: "CONNECT for an unknown protocol" }),
        None => Err(Reject { status: 405, reason: "method not allowed" }),
    }
}

/// Fields of the handshake that mean nothing between two that speak HTTP/2
/// (RFC 8441 section 5).
pub(super) fn remove_handshake(headers: &mut HeaderMap) {
    headers.remove(header::SEC_WEBSOCKET_KEY);
    headers.remove(header::SEC_WEBSOCKET_ACCEPT);
    // A tunnel has no length.
    headers.remove(header::CONTENT_LENGTH);
}

/// The 101 in `answer` as the client gets it, consumed; `None`: the endpoint has
/// answered something else.
pub(super) fn switched(
    order: &Order<'_>,
    answer: &mut Buffer,
    key: &Key,
) -> Result<Option<Response<()>>, Failure> {
    let mut room = HeaderRoom::new();
    let bytes = Bytes::copy_from_slice(answer.filled());
    let parsed = ResponseHead::parse(&bytes, &mut room, false);
    let Some(head) = parsed.map_err(|BadResponse(reason)| Failure::Nonsense(reason))? else {
        return Err(Failure::Nonsense("malformed response head"));
    };
    match head.status {
        101 => {}
        // To the client this would mean that the tunnel stands.
        200..300 => return Err(Failure::Nonsense("endpoint did not switch protocols")),
        _ => return Ok(None),
    }
    let accepts = head.headers.iter().filter(|h| h.name.eq_ignore_ascii_case("sec-websocket-accept"));
    if !accepts.map(|h| h.value).eq([&key.accept() as &[u8]]) {
        return Err(Failure::Nonsense("endpoint switched without having read the key"));
    }
    if !head.upgrade.is_some_and(|protocol| protocol.eq_ignore_ascii_case(b"websocket")) {
        return Err(Failure::Nonsense("endpoint switched to another protocol"));
    }
    let mut response =
        map::response(&head, &bytes).map_err(|BadResponse(reason)| Failure::Nonsense(reason))?;
    *response.status_mut() = StatusCode::OK;
    remove_handshake(response.headers_mut());
    if let Some(edits) = order.response_edits() {
        edits.apply(response.headers_mut());
    }
    let bucket = order.cookie_lines();
    response.headers_mut().extend(chunked::header_map(&bucket).unwrap_or_default());
    let length = head.length;
    drop(head);
    answer.consume(length);
    Ok(Some(response))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_key_and_its_proof_are_those_of_the_rfc() {
        // RFC 6455 section 1.3.
        let key = Key(*b"dGhlIHNhbXBsZSBub25jZQ==");
        assert_eq!(&key.accept(), b"s3pPLMBiTxaQ9kYGzzhZRbK+xOo=");
        let mut random = fastrand::Rng::with_seed(1);
        assert_ne!(Key::new(&mut random).0, Key::new(&mut random).0);
    }
}
