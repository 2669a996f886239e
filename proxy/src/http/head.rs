//! The head of an HTTP/1 request: parsed in place, strict, borrowed.
//!
//! What RFC 9112 lets a server be lenient about is refused here, because two
//! parsers that are lenient in different ways are how requests are smuggled.

use std::mem::MaybeUninit;
use std::net::IpAddr;
use std::sync::LazyLock;

use httparse::{Header, Status};
use memchr::memmem::Finder;
use smallvec::SmallVec;

use crate::config::{Limits, MAX_HEADERS};
use crate::view::RequestView;

use super::field::{Field, classify, is_token, tokens};

/// Why a message cannot be accepted: what the client is told, and what the log says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Reject {
    pub(crate) status: u16,
    pub(crate) reason: &'static str,
}

/// Bytes a request line may have besides its target, its version and what separates them.
const LINE_REST: usize = 53;

const fn bad(reason: &'static str) -> Reject {
    Reject { status: 400, reason }
}

/// How a message body is delimited (RFC 9112 section 6).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Framing {
    None,
    Length(u64),
    Chunked,
    /// Responses only: until the connection ends.
    Close,
}

/// Room for the header fields of one message, on the stack; nearly all of it is never initialised.
pub(crate) struct HeaderRoom<'b> {
    headers: [MaybeUninit<Header<'b>>; MAX_HEADERS],
    fields: [Field; MAX_HEADERS],
}

impl HeaderRoom<'_> {
    pub(crate) fn new() -> Self {
        let headers = [const { MaybeUninit::uninit() }; MAX_HEADERS];
        HeaderRoom { headers, fields: [Field::Other; MAX_HEADERS] }
    }
}

impl<'b> HeaderRoom<'b> {
    /// For so many headers, and for what each of them is.
    pub(super) fn slots(&mut self, count: usize) -> (&mut [MaybeUninit<Header<'b>>], &mut [Field]) {
        let count = count.min(MAX_HEADERS);
        (&mut self.headers[..count], &mut self.fields[..count])
    }
}

/// Where the empty line after a head begins (`\r\n\r\n`), if it is there.
pub(crate) fn end_of_head(bytes: &[u8]) -> Option<usize> {
    // Made once: making it takes longer than finding something.
    static EMPTY_LINE: LazyLock<Finder<'static>> = LazyLock::new(|| Finder::new(b"\r\n\r\n"));
    EMPTY_LINE.find(bytes)
}

/// A complete request head.
pub(crate) struct RequestHead<'h, 'b> {
    pub(crate) method: &'b [u8],
    /// As sent, but always origin-form (or `*`): what goes upstream.
    pub(crate) target: &'b [u8],
    /// 0 or 1: HTTP/1.0 or HTTP/1.1.
    pub(crate) minor: u8,
    pub(crate) headers: &'h [Header<'b>],
    /// What each header is, in the same order.
    pub(crate) fields: &'h mut [Field],
    /// Authority: from an absolute-form target, else the Host header, else empty (HTTP/1.0).
    pub(crate) host: &'b [u8],
    pub(crate) framing: Framing,
    pub(crate) keep_alive: bool,
    pub(crate) expects_continue: bool,
    /// The one protocol the client would switch to; never `h2c`.
    pub(crate) upgrade: Option<&'b [u8]>,
    /// Header names that `Connection` nominates: not forwarded.
    pub(crate) nominated: SmallVec<[&'b [u8]; 4]>,
    /// Bytes of the head, its empty line included.
    pub(crate) length: usize,
}

impl<'h, 'b> RequestHead<'h, 'b> {
    /// `Ok(None)`: more bytes are needed.
    pub(crate) fn parse(
        bytes: &'b [u8],
        room: &'h mut HeaderRoom<'b>,
        limits: &Limits,
    ) -> Result<Option<RequestHead<'h, 'b>>, Reject> {
        let mut request = httparse::Request::new(&mut []);
        let (headers, fields) = room.slots(limits.headers);
        let length = match request.parse_with_uninit_headers(bytes, headers) {
            Ok(Status::Complete(length)) => length,
            Ok(Status::Partial) => return partial(bytes, limits),
            Err(error) => return Err(refusal(error, bytes)),
        };
        require_crlf(&bytes[..length])?;
        let method = request.method.unwrap_or_default().as_bytes();
        let (Some(raw_target), Some(minor)) = (request.path, request.version) else {
            return Err(bad("malformed request line"));
        };
        let (target, authority) = split_target(method, raw_target.as_bytes(), limits)?;
        if length > limits.header_bytes {
            return Err(Reject { status: 431, reason: "headers too large" });
        }
        let mut head = RequestHead {
            method,
            target,
            minor,
            headers: request.headers,
            fields,
            host: authority.unwrap_or_default(),
            framing: Framing::None,
            keep_alive: minor == 1,
            expects_continue: false,
            upgrade: None,
            nominated: SmallVec::new(),
            length,
        };
        head.read_fields(authority.is_some())?;
        Ok(Some(head))
    }

    /// One pass over the headers: what they are, and what the rules of framing say of them.
    fn read_fields(&mut self, absolute: bool) -> Result<(), Reject> {
        let (mut length, mut chunked, mut hosts) = (None, false, 0);
        let (mut upgrade, mut wants_upgrade) = (None, false);
        for (header, slot) in self.headers.iter().zip(&mut *self.fields) {
            let field = classify(header.name.as_bytes());
            *slot = field;
            match field {
                Field::Host => {
                    hosts += 1;
                    // An absolute-form target overrules it; that does not make nonsense acceptable.
                    if !is_authority(header.value) {
                        return Err(bad("malformed Host"));
                    }
                    if !absolute {
                        self.host = header.value;
                    }
                }
                Field::ContentLength => {
                    if length.is_some() {
                        return Err(bad("duplicate Content-Length"));
                    }
                    length = Some(parse_length(header.value)?);
                }
                Field::TransferEncoding => {
                    if chunked || !header.value.eq_ignore_ascii_case(b"chunked") {
                        return Err(bad("Transfer-Encoding other than one chunked"));
                    }
                    chunked = true;
                }
                Field::Connection => {
                    for token in tokens(header.value) {
                        match token {
                            t if t.eq_ignore_ascii_case(b"close") => self.keep_alive = false,
                            t if t.eq_ignore_ascii_case(b"keep-alive") => {
                                self.keep_alive |= self.minor == 0;
                            }
                            t if t.eq_ignore_ascii_case(b"upgrade") => wants_upgrade = true,
                            t if !is_token(t) => return Err(bad("malformed Connection header")),
                            t => self.nominated.push(t),
                        }
                    }
                }
                Field::Upgrade => upgrade = Some(header.value),
                Field::Expect => self.expects_continue |= header.value.eq_ignore_ascii_case(b"100-continue"),
                _ => {}
            }
        }
        self.framing = match (chunked, length) {
            (true, Some(_)) => return Err(bad("Transfer-Encoding with Content-Length")),
            (true, None) if self.minor == 0 => return Err(bad("Transfer-Encoding in HTTP/1.0")),
            (true, None) => Framing::Chunked,
            (false, Some(0)) | (false, None) => Framing::None,
            (false, Some(n)) => Framing::Length(n),
        };
        if hosts > 1 {
            return Err(bad("duplicate Host"));
        }
        if hosts == 0 && self.minor == 1 {
            return Err(bad("missing Host"));
        }
        if !is_authority(self.host) {
            return Err(bad("malformed Host"));
        }
        // A switch to h2c would leave us relaying frames we never looked into.
        self.upgrade = upgrade
            .filter(|p| wants_upgrade && self.minor == 1 && is_token(p) && !p.eq_ignore_ascii_case(b"h2c"));
        Ok(())
    }

    /// Path and query of the target.
    pub(crate) fn path(&self) -> &'b [u8] {
        let end = self.target.iter().position(|&b| b == b'?').unwrap_or(self.target.len());
        &self.target[..end]
    }

    /// The first header of this kind.
    pub(crate) fn first(&self, field: Field) -> Option<&'b [u8]> {
        self.headers.iter().zip(&*self.fields).find(|(_, f)| **f == field).map(|(h, _)| h.value)
    }
}

/// A request head together with who sent it: what routing may look at.
pub(crate) struct Http1View<'a, 'h, 'b> {
    pub(crate) head: &'a RequestHead<'h, 'b>,
    pub(crate) client: IpAddr,
}

impl RequestView for Http1View<'_, '_, '_> {
    fn header(&self, name: &str) -> Option<&[u8]> {
        self.head.headers.iter().find(|h| h.name.eq_ignore_ascii_case(name)).map(|h| h.value)
    }

    fn for_each_header<'a>(&'a self, name: &str, visit: &mut dyn FnMut(&'a [u8])) {
        for header in self.head.headers.iter().filter(|h| h.name.eq_ignore_ascii_case(name)) {
            visit(header.value);
        }
    }

    fn client(&self) -> IpAddr {
        self.client
    }
}

/// More bytes are needed, unless the limits already say no.
fn partial<T>(bytes: &[u8], limits: &Limits) -> Result<Option<T>, Reject> {
    // Ended or not: what is refused while it arrives stays refused.
    let begun = bytes.iter().position(|byte| !matches!(byte, b'\r' | b'\n')).unwrap_or(bytes.len());
    let line = bytes[begun..].split(|byte| *byte == b'\n').next().unwrap_or_default();
    if line.len() > limits.target_bytes + LINE_REST + 11 {
        return Err(Reject { status: 414, reason: "target too long" });
    }
    if bytes.len() >= limits.header_bytes {
        return Err(Reject { status: 431, reason: "headers too large" });
    }
    require_crlf(bytes)?;
    Ok(None)
}

fn refusal(error: httparse::Error, bytes: &[u8]) -> Reject {
    match error {
        httparse::Error::TooManyHeaders => Reject { status: 431, reason: "too many headers" },
        httparse::Error::Version if !names_version(bytes) => bad("malformed request line"),
        httparse::Error::Version => Reject { status: 505, reason: "HTTP version not supported" },
        httparse::Error::HeaderName => bad("illegal character in a header name"),
        httparse::Error::HeaderValue => bad("illegal character in a header value"),
        httparse::Error::NewLine => bad("malformed line end"),
        httparse::Error::Token => bad("illegal character in the request line"),
        httparse::Error::Status => bad("malformed request line"),
    }
}

/// Whether the request line is of three parts, the last of which is some HTTP version.
fn names_version(head: &[u8]) -> bool {
    let head = head.trim_ascii_start();
    let end = memchr::memchr(b'\r', head).unwrap_or(head.len());
    let mut parts = head[..end].split(|&b| b == b' ');
    let version = parts.nth(2).and_then(|v| v.strip_prefix(b"HTTP/"));
    let version =
        version.is_some_and(|v| matches!(v, [a, b'.', b] if a.is_ascii_digit() && b.is_ascii_digit()));
    version && parts.next().is_none()
}

/// httparse takes a bare LF for a line end; a bare CR it refuses itself.
fn require_crlf(head: &[u8]) -> Result<(), Reject> {
    for at in memchr::memchr_iter(b'\n', head) {
        if at == 0 || head[at - 1] != b'\r' {
            return Err(bad("bare LF"));
        }
    }
    Ok(())
}

/// Origin-form target and, for absolute-form, its authority (RFC 9112 section 3.2).
fn split_target<'b>(
    method: &[u8],
    target: &'b [u8],
    limits: &Limits,
) -> Result<(&'b [u8], Option<&'b [u8]>), Reject> {
    // With a method of any length the line is bounded as in `partial`.
    if target.len() > limits.target_bytes || method.len() + target.len() > limits.target_bytes + LINE_REST {
        return Err(Reject { status: 414, reason: "target too long" });
    }
    if matches!(method, b"CONNECT" | b"TRACE") {
        return Err(Reject { status: 405, reason: "method not allowed" });
    }
    if target.iter().any(|&b| !(0x21..=0x7e).contains(&b) || b == b'#') {
        return Err(bad("illegal character in the target"));
    }
    match target {
        [b'/', ..] => Ok((target, None)),
        b"*" if method == b"OPTIONS" => Ok((target, None)),
        _ => {
            let rest = ["http://", "https://"]
                .iter()
                .find_map(|scheme| strip_prefix_ignore_case(target, scheme.as_bytes()))
                .ok_or(bad("malformed target"))?;
            let end = rest.iter().position(|b| matches!(b, b'/' | b'?')).unwrap_or(rest.len());
            let (authority, path) = rest.split_at(end);
            if authority.is_empty() || path.first() == Some(&b'?') {
                return Err(bad("malformed target"));
            }
            Ok((if path.is_empty() { b"/" } else { path }, Some(authority)))
        }
    }
}

fn strip_prefix_ignore_case<'b>(bytes: &'b [u8], prefix: &[u8]) -> Option<&'b [u8]> {
    let (start, rest) = bytes.split_at_checked(prefix.len())?;
    start.eq_ignore_ascii_case(prefix).then_some(rest)
}

/// Digits only; a sign, a list or more than 18 digits is refused.
pub(crate) fn parse_length(value: &[u8]) -> Result<u64, Reject> {
    if value.is_empty() || value.len() > 18 || !value.iter().all(u8::is_ascii_digit) {
        return Err(bad("malformed Content-Length"));
    }
    Ok(value.iter().fold(0, |n, d| n * 10 + u64::from(d - b'0')))
}

/// `host [":" port]`, where the host is a name, an IPv4 address or `[IPv6]`; empty is allowed.
pub(crate) fn is_authority(value: &[u8]) -> bool {
    let (host, port) = split_port(value);
    let port_ok = port.is_none_or(is_port);
    let host_ok = match host {
        [b'[', inner @ .., b']'] => {
            !inner.is_empty() && inner.iter().all(|b| b.is_ascii_hexdigit() || matches!(b, b':' | b'.'))
        }
        _ => host.iter().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'.' | b'_')),
    };
    host_ok && port_ok && value.len() <= 255 + 6
}

/// A port number, or nothing (RFC 3986 section 3.2.3).
fn is_port(port: &[u8]) -> bool {
    let digits = port.len() <= 5 && port.iter().all(u8::is_ascii_digit);
    digits && port.iter().fold(0, |n, d| n * 10 + u32::from(d - b'0')) <= u32::from(u16::MAX)
}

/// Host and port of an authority; brackets stay with the host.
pub(crate) fn split_port(authority: &[u8]) -> (&[u8], Option<&[u8]>) {
    let search = if authority.first() == Some(&b'[') {
        authority.iter().position(|&b| b == b']').map_or(authority.len(), |at| at + 1)
    } else {
        0
    };
    match authority[search..].iter().position(|&b| b == b':') {
        Some(at) => (&authority[..search + at], Some(&authority[search + at + 1..])),
        None => (authority, None),
    }
}

#[cfg(test)]
#[path = "head/tests.rs"]
mod tests;
