//! The head of an HTTP/1 response from an endpoint.

use httparse::{Header, ParserConfig, Status};
use smallvec::SmallVec;

use crate::config::MAX_HEADERS;

use super::field::{Field, classify, tokens};
use super::head::{Framing, HeaderRoom, parse_length};

/// A complete response head.
pub(crate) struct ResponseHead<'h, 'b> {
    pub(crate) status: u16,
    pub(crate) reason: &'b [u8],
    pub(crate) headers: &'h [Header<'b>],
    pub(crate) fields: &'h mut [Field],
    pub(crate) framing: Framing,
    /// Whether the endpoint's connection can carry another request after the body.
    pub(crate) keep_alive: bool,
    /// The protocol a 101 switches to.
    pub(crate) upgrade: Option<&'b [u8]>,
    pub(crate) nominated: SmallVec<[&'b [u8]; 4]>,
    /// Bytes of the head, its empty line included.
    pub(crate) length: usize,
}

/// What is wrong with an answer; the client gets 502.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct BadResponse(pub(crate) &'static str);

impl<'h, 'b> ResponseHead<'h, 'b> {
    /// `Ok(None)`: more bytes are needed. `to_head`: the request was HEAD, so no body follows.
    pub(crate) fn parse(
        bytes: &'b [u8],
        room: &'h mut HeaderRoom<'b>,
        to_head: bool,
    ) -> Result<Option<ResponseHead<'h, 'b>>, BadResponse> {
        let mut response = httparse::Response::new(&mut []);
        let (headers, fields) = room.slots(MAX_HEADERS);
        let parsed =
            ParserConfig::default().parse_response_with_uninit_headers(&mut response, bytes, headers);
        let length = match parsed {
            Ok(Status::Complete(length)) => length,
            Ok(Status::Partial) => return Ok(None),
            Err(_) => return Err(BadResponse("malformed response head")),
        };
        let (Some(status), Some(minor)) = (response.code, response.version) else {
            return Err(BadResponse("malformed status line"));
        };
        if status < 100 {
            return Err(BadResponse("malformed status line"));
        }
        let mut head = ResponseHead {
            status,
            reason: response.reason.unwrap_or_default().as_bytes(),
            headers: response.headers,
            fields,
            framing: Framing::Close,
            keep_alive: minor == 1,
            upgrade: None,
            nominated: SmallVec::new(),
            length,
        };
        head.read_fields(minor, to_head)?;
        Ok(Some(head))
    }

    fn read_fields(&mut self, minor: u8, to_head: bool) -> Result<(), BadResponse> {
        let (mut length, mut chunked) = (None, false);
        for (header, slot) in self.headers.iter().zip(&mut *self.fields) {
            let field = classify(header.name.as_bytes());
            *slot = field;
            match field {
                Field::ContentLength => {
                    let value = parse_length(header.value).map_err(|r| BadResponse(r.reason))?;
                    if length.is_some_and(|other| other != value) {
                        return Err(BadResponse("conflicting Content-Length"));
                    }
                    length = Some(value);
                }
                Field::TransferEncoding if chunked || !header.value.eq_ignore_ascii_case(b"chunked") => {
                    return Err(BadResponse("Transfer-Encoding other than one chunked"));
                }
                Field::TransferEncoding => chunked = true,
                Field::Connection => {
                    for token in tokens(header.value) {
                        if token.eq_ignore_ascii_case(b"close") {
                            self.keep_alive = false;
                        } else if token.eq_ignore_ascii_case(b"keep-alive") {
                            self.keep_alive |= minor == 0;
                        } else if !token.eq_ignore_ascii_case(b"upgrade") {
                            self.nominated.push(token);
                        }
                    }
                }
                Field::Upgrade => self.upgrade = Some(header.value),
                _ => {}
            }
        }
        let bodiless = to_head || matches!(self.status, 100..200 | 204 | 304);
        self.framing = match (chunked, length) {
            _ if bodiless => Framing::None,
            // Chunked wins (RFC 9112 section 6.3), but a peer that sends both is not trusted
            // with a second request on this connection.
            (true, Some(_)) => {
                self.keep_alive = false;
                Framing::Chunked
            }
            (true, None) => Framing::Chunked,
            (false, Some(0)) => Framing::None,
            (false, Some(n)) => Framing::Length(n),
            (false, None) => {
                self.keep_alive = false;
                Framing::Close
            }
        };
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(text: &str, to_head: bool) -> Result<(u16, Framing, bool), &'static str> {
        let mut room = HeaderRoom::new();
        match ResponseHead::parse(text.as_bytes(), &mut room, to_head) {
            Ok(Some(head)) => Ok((head.status, head.framing, head.keep_alive)),
            Ok(None) => Err("partial"),
            Err(BadResponse(reason)) => Err(reason),
        }
    }

    #[test]
    fn framing_follows_status_and_headers() {
        for (text, to_head, expected) in [
            ("HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\n", false, Ok((200, Framing::Length(5), true))),
            ("HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\n", true, Ok((200, Framing::None, true))),
            ("HTTP/1.1 304 NM\r\nContent-Length: 5\r\n\r\n", false, Ok((304, Framing::None, true))),
            ("HTTP/1.1 204 NC\r\n\r\n", false, Ok((204, Framing::None, true))),
            ("HTTP/1.1 200 OK\r\n\r\n", false, Ok((200, Framing::Close, false))),
            (
                "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n",
                false,
                Ok((200, Framing::Chunked, true)),
            ),
            (
                "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\nContent-Length: 3\r\n\r\n",
                false,
                Ok((200, Framing::Chunked, false)),
            ),
            ("HTTP/1.0 200 OK\r\nContent-Length: 0\r\n\r\n", false, Ok((200, Framing::None, false))),
            (
                "HTTP/1.0 200 OK\r\nConnection: keep-alive\r\nContent-Length: 0\r\n\r\n",
                false,
                Ok((200, Framing::None, true)),
            ),
            (
                "HTTP/1.1 200 OK\r\nContent-Length: 5\r\nContent-Length: 6\r\n\r\n",
                false,
                Err("conflicting Content-Length"),
            ),
            (
                "HTTP/1.1 200 OK\r\nTransfer-Encoding: gzip, chunked\r\n\r\n",
                false,
                Err("Transfer-Encoding other than one chunked"),
            ),
            ("HTTP/1.1 200 OK\r\nX", false, Err("partial")),
            ("SSH-2.0-OpenSSH\r\n\r\n", false, Err("malformed response head")),
        ] {
            assert_eq!(parse(text, to_head), expected, "{text:?}");
        }
    }
}
