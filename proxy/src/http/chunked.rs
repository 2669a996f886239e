//! The chunked transfer coding (RFC 9112 section 7.1): decoded in place, encoded anew.
//!
//! Chunk bytes are never passed through as they came, so what a chunk size
//! means cannot differ between us and the endpoint. Extensions are dropped.

use super::field::{Field, classify};

/// Longest chunk-size line, extensions included.
const MAX_LINE: usize = 256;

/// Trailer section kept at most; a larger one is an error.
const MAX_TRAILERS: usize = 8 << 10;

/// An incremental decoder.
#[derive(Debug, Default)]
pub(crate) struct Decoder {
    state: State,
    /// Bytes left of the chunk being read, or its size while the line is read.
    size: u64,
    line: usize,
    digits: u8,
    trailers: Vec<u8>,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum State {
    #[default]
    Size,
    Extension,
    SizeLf,
    Data,
    DataCr,
    DataLf,
    Trailer,
    /// In the empty line of an empty trailer section: nothing to keep, so nothing is allocated.
    NoTrailersLf,
    Done,
}

/// What a call to [`Decoder::decode`] did.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Decoded {
    /// Body bytes, moved to the front of the input.
    pub(crate) data: usize,
    /// Input bytes used; what follows belongs to the next message.
    pub(crate) consumed: usize,
    /// The last chunk and the trailers were seen.
    pub(crate) done: bool,
}

/// The peer's framing is wrong; nothing more can be read from it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct BadChunk(pub(crate) &'static str);

impl Decoder {
    /// Decodes `bytes`, compacting the body bytes to their front.
    pub(crate) fn decode(&mut self, bytes: &mut [u8]) -> Result<Decoded, BadChunk> {
        let (mut read, mut write) = (0, 0);
        while read < bytes.len() && self.state != State::Done {
            if self.state == State::Data {
                let n = usize::try_from(self.size).unwrap_or(usize::MAX).min(bytes.len() - read);
                bytes.copy_within(read..read + n, write);
                (read, write, self.size) = (read + n, write + n, self.size - n as u64);
                if self.size == 0 {
                    self.state = State::DataCr;
                }
                continue;
            }
            self.step(bytes[read])?;
            read += 1;
        }
        Ok(Decoded { data: write, consumed: read, done: self.state == State::Done })
    }

    pub(crate) fn is_done(&self) -> bool {
        self.state == State::Done
    }

    /// The trailer fields, each line ending in CRLF, without those that would
    /// change framing or routing after the fact (RFC 9110 section 6.5.1).
    pub(crate) fn trailers(&self) -> &[u8] {
        &self.trailers
    }

    fn step(&mut self, byte: u8) -> Result<(), BadChunk> {
        self.state = match (self.state, byte) {
            (State::Size, _) if byte.is_ascii_hexdigit() => {
                self.digits += 1;
                if self.digits > 15 {
                    return Err(BadChunk("chunk size too large"));
                }
                let digit = (byte as char).to_digit(16).unwrap_or_default();
                self.size = self.size << 4 | u64::from(digit);
                State::Size
            }
            (State::Size, _) if self.digits == 0 => return Err(BadChunk("malformed chunk size")),
            (State::Size, b';') => State::Extension,
            (State::Size | State::Extension, b'\r') => State::SizeLf,
            (State::Size, _) => return Err(BadChunk("malformed chunk size")),
            (State::Extension, b'\n' | 0) => return Err(BadChunk("malformed chunk extension")),
            (State::Extension, _) => {
                self.line += 1;
                if self.line > MAX_LINE {
                    return Err(BadChunk("chunk extension too long"));
                }
                State::Extension
            }
            (State::SizeLf, b'\n') => {
                (self.line, self.digits) = (0, 0);
                if self.size == 0 { State::Trailer } else { State::Data }
            }
            (State::DataCr, b'\r') => State::DataLf,
            (State::DataLf, b'\n') => State::Size,
            (State::Trailer, b'\r') if self.trailers.is_empty() => State::NoTrailersLf,
            (State::Trailer, _) => return self.trailer(byte),
            (State::NoTrailersLf, b'\n') => State::Done,
            (State::SizeLf | State::DataCr | State::DataLf | State::NoTrailersLf, _) => {
                return Err(BadChunk("malformed chunk end"));
            }
            (State::Data | State::Done, _) => self.state,
        };
        Ok(())
    }

    fn trailer(&mut self, byte: u8) -> Result<(), BadChunk> {
        self.trailers.push(byte);
        if self.trailers.len() > MAX_TRAILERS {
            return Err(BadChunk("trailers too large"));
        }
        if byte != b'\n' {
            return Ok(());
        }
        if !self.trailers.ends_with(b"\r\n") {
            return Err(BadChunk("bare LF in trailers"));
        }
        if self.trailers.ends_with(b"\r\n\r\n") {
            self.trailers = keep_allowed(&self.trailers)?;
            self.state = State::Done;
        }
        Ok(())
    }
}

fn keep_allowed(section: &[u8]) -> Result<Vec<u8>, BadChunk> {
    let mut room = [httparse::EMPTY_HEADER; 32];
    let fields = match httparse::parse_headers(section, &mut room) {
        Ok(httparse::Status::Complete((_, fields))) => fields,
        _ => return Err(BadChunk("malformed trailers")),
    };
    let mut kept = Vec::new();
    for field in fields {
        if classify(field.name.as_bytes()) == Field::Other && !is_forbidden(field.name) {
            kept.extend_from_slice(field.name.as_bytes());
            kept.extend_from_slice(b": ");
            kept.extend_from_slice(field.value);
            kept.extend_from_slice(b"\r\n");
        }
    }
    Ok(kept)
}

/// Whether a trailer field could change what was decided by the head.
pub(crate) fn is_forbidden(name: &str) -> bool {
    const FORBIDDEN: [&str; 9] = [
        "authorization",
        "cache-control",
        "content-encoding",
        "content-range",
        "content-type",
        "cookie",
        "set-cookie",
        "trailer",
        "max-forwards",
    ];
    FORBIDDEN.iter().any(|f| f.eq_ignore_ascii_case(name))
}

/// Trailer lines as a map, for HTTP/2; `None` if there are none.
pub(crate) fn header_map(lines: &[u8]) -> Option<http::HeaderMap> {
    let mut map = http::HeaderMap::new();
    for line in lines.split(|&b| b == b'\n') {
        let line = line.trim_ascii();
        let Some(colon) = line.iter().position(|&b| b == b':') else { continue };
        let name = http::HeaderName::from_bytes(&line[..colon]);
        let value = http::HeaderValue::from_bytes(line[colon + 1..].trim_ascii());
        if let (Ok(name), Ok(value)) = (name, value) {
            map.append(name, value);
        }
    }
    (!map.is_empty()).then_some(map)
}

/// The line before a chunk of `n` bytes, at the end of `room`.
pub(crate) fn size_line(n: usize, room: &mut [u8; 18]) -> &[u8] {
    const HEX: &[u8; 16] = b"0123456789abcdef";
    room[16..].copy_from_slice(b"\r\n");
    let (mut at, mut rest) = (16, n);
    loop {
        at -= 1;
        room[at] = HEX[rest & 15];
        rest >>= 4;
        if rest == 0 {
            return &room[at..];
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fuzz::chunked_body as fuzz;

    fn decode(text: &str) -> Result<(String, usize, bool, String), &'static str> {
        let mut bytes = text.as_bytes().to_vec();
        let mut decoder = Decoder::default();
        let decoded = decoder.decode(&mut bytes).map_err(|e| e.0)?;
        let body = String::from_utf8_lossy(&bytes[..decoded.data]).into_owned();
        let trailers = String::from_utf8_lossy(decoder.trailers()).into_owned();
        Ok((body, text.len() - decoded.consumed, decoded.done, trailers))
    }

    #[test]
    fn table() {
        let ok =
            |body: &str, left, done, trailers: &str| Ok((body.to_owned(), left, done, trailers.to_owned()));
        for (text, expected) in [
            ("5\r\nhello\r\n0\r\n\r\n", ok("hello", 0, true, "")),
            ("5\r\nhello\r\n6\r\n world\r\n0\r\n\r\nGET", ok("hello world", 3, true, "")),
            ("5;a=b\r\nhello\r\n0\r\n\r\n", ok("hello", 0, true, "")),
            ("A\r\n0123456789\r\n0\r\nX-Sum: 7\r\n\r\n", ok("0123456789", 0, true, "X-Sum: 7\r\n")),
            ("0\r\nContent-Length: 7\r\nHost: x\r\nA: b\r\n\r\n", ok("", 0, true, "A: b\r\n")),
            ("5\r\nhel", ok("hel", 0, false, "")),
            ("5\nhello\r\n0\r\n\r\n", Err("malformed chunk size")),
            ("5\r\nhelloX\r\n", Err("malformed chunk end")),
            ("\r\n", Err("malformed chunk size")),
            ("0x5\r\nhello\r\n", Err("malformed chunk size")),
            ("-5\r\nhello\r\n", Err("malformed chunk size")),
            (" 5\r\nhello\r\n", Err("malformed chunk size")),
            ("5 \r\nhello\r\n", Err("malformed chunk size")),
            ("FFFFFFFFFFFFFFFF\r\n", Err("chunk size too large")),
            ("0\r\nA: b\n\r\n", Err("bare LF in trailers")),
            ("0\r\n: b\r\n\r\n", Err("malformed trailers")),
            ("5;\n\r\nhello", Err("malformed chunk extension")),
        ] {
            assert_eq!(decode(text), expected, "{text:?}");
        }
    }

    #[test]
    fn pieces_and_whole_agree() {
        for text in
            ["5\r\nhello\r\n0\r\n\r\n", "5;x\r\nhello\r\n1\r\n!\r\n0\r\nA: b\r\n\r\nrest", "zz", "3\r\nab"]
        {
            fuzz(text.as_bytes());
        }
        let mut random = fastrand::Rng::with_seed(11);
        let pieces = ["5\r\n", "hello", "\r\n", "0\r\n", "\r\n", "A: b\r\n", ";x", "\n", "f", "\0"];
        for _ in 0..5_000 {
            let text: String =
                (0..random.usize(0..10)).map(|_| pieces[random.usize(0..pieces.len())]).collect();
            fuzz(text.as_bytes());
        }
    }

    #[test]
    fn size_lines() {
        for (n, line) in [(0, "0\r\n"), (10, "a\r\n"), (16_384, "4000\r\n")] {
            assert_eq!(size_line(n, &mut [0; 18]), line.as_bytes());
        }
    }
}
