//! The two line formats. Whatever a client sends, a line is printable ASCII
//! and one newline at its end.

use std::io::Write;

use super::Entry;
use crate::clock::WallClock;

/// Bytes of one untrusted field that are logged; what is cut off is marked by `...`.
const MAX_FIELD: usize = 4096;

/// One JSON object. Absent fields are left out.
pub(super) fn json(out: &mut Vec<u8>, clock: &mut WallClock, entry: &Entry<'_>) {
    out.extend_from_slice(b"{\"time\":\"");
    out.extend_from_slice(clock.rfc3339(entry.time));
    out.extend_from_slice(b"\",\"client\":\"");
    display(out, entry.client);
    out.push(b'"');
    text(out, "method", entry.method);
    text(out, "host", entry.host);
    text(out, "path", entry.path);
    text(out, "protocol", entry.protocol.as_bytes());
    number(out, "status", entry.status.into());
    number(out, "bytes_in", entry.bytes_in);
    number(out, "bytes_out", entry.bytes_out);
    number(out, "duration_us", entry.duration_us);
    if let Some(upstream) = entry.upstream {
        out.extend_from_slice(b",\"upstream\":\"");
        display(out, upstream);
        out.push(b'"');
        number(out, "upstream_status", entry.upstream_status.into());
        number(out, "connect_us", entry.connect_us);
        number(out, "first_byte_us", entry.first_byte_us);
        number(out, "upstream_us", entry.upstream_us);
        number(out, "retries", entry.retries.into());
    }
    if let Some(origin) = entry.origin {
        text(out, "kind", origin.kind.as_bytes());
        text(out, "namespace", origin.namespace.as_bytes());
        text(out, "name", origin.name.as_bytes());
    }
    text(out, "service", entry.service.unwrap_or_default().as_bytes());
    text(out, "canary", entry.canary.as_bytes());
    text(out, "request_id", entry.request_id);
    text(out, "user_agent", entry.user_agent);
    text(out, "referer", entry.referer);
    text(out, "tls", entry.tls.unwrap_or_default().as_bytes());
    text(out, "reason", entry.reason.as_bytes());
    out.extend_from_slice(b"}\n");
}

/// The layout of ingress-nginx's default, so that its parsers read on:
///
/// ```text
/// client - - [time] "request" status bytes_out "referer" "user agent" bytes_in duration
///     [service] [canary] upstream bytes_out upstream_time upstream_status request_id
/// ```
///
/// Times are in seconds with milliseconds; absent fields are `-`, or nothing between brackets.
pub(super) fn combined(out: &mut Vec<u8>, clock: &mut WallClock, entry: &Entry<'_>) {
    display(out, entry.client);
    out.extend_from_slice(b" - - [");
    out.extend_from_slice(clock.log_date(entry.time));
    out.extend_from_slice(b"] \"");
    for (i, part) in [entry.method, entry.path, entry.protocol.as_bytes()].into_iter().enumerate() {
        if i > 0 {
            out.push(b' ');
        }
        hex_escaped(out, part);
    }
    out.extend_from_slice(b"\" ");
    decimal(out, entry.status.into());
    out.push(b' ');
    decimal(out, entry.bytes_out);
    for quoted in [entry.referer, entry.user_agent] {
        out.extend_from_slice(b" \"");
        hex_escaped(out, if quoted.is_empty() { b"-" } else { quoted });
        out.push(b'"');
    }
    out.push(b' ');
    decimal(out, entry.bytes_in);
    out.push(b' ');
    seconds(out, entry.duration_us);
    for bracketed in [entry.service.unwrap_or_default(), entry.canary] {
        out.extend_from_slice(b" [");
        hex_escaped(out, bracketed.as_bytes());
        out.push(b']');
    }
    out.push(b' ');
    match entry.upstream {
        Some(upstream) => {
            display(out, upstream);
            out.push(b' ');
            decimal(out, entry.bytes_out);
            out.push(b' ');
            seconds(out, entry.upstream_us);
            out.push(b' ');
            match entry.upstream_status {
                0 => out.push(b'-'),
                status => decimal(out, status.into()),
            }
        }
        None => out.extend_from_slice(b"- - - -"),
    }
    out.push(b' ');
    hex_escaped(out, if entry.request_id.is_empty() { b"-" } else { entry.request_id });
    out.push(b'\n');
}

/// `,"name":"value"`, or nothing for an empty value.
fn text(out: &mut Vec<u8>, name: &str, value: &[u8]) {
    if value.is_empty() {
        return;
    }
    key(out, name);
    out.push(b'"');
    json_escaped(out, value);
    out.push(b'"');
}

/// `,"name":value`.
fn number(out: &mut Vec<u8>, name: &str, value: u64) {
    key(out, name);
    decimal(out, value);
}

fn key(out: &mut Vec<u8>, name: &str) {
    out.extend_from_slice(b",\"");
    out.extend_from_slice(name.as_bytes());
    out.extend_from_slice(b"\":");
}

/// The inside of a JSON string (RFC 8259 section 7), in ASCII: no character
/// can move a terminal's cursor, reverse its text or end the line for a
/// reader of Unicode. A sequence that is not UTF-8 becomes U+FFFD.
fn json_escaped(out: &mut Vec<u8>, value: &[u8]) {
    let (value, cut) = bounded(value);
    if value.iter().all(|b| matches!(b, b' '..=b'~') && *b != b'"' && *b != b'\\') {
        out.extend_from_slice(value);
    } else {
        for chunk in value.utf8_chunks() {
            for c in chunk.valid().chars() {
                json_char(out, c);
            }
            if !chunk.invalid().is_empty() {
                json_char(out, char::REPLACEMENT_CHARACTER);
            }
        }
    }
    out.extend_from_slice(cut);
}

fn json_char(out: &mut Vec<u8>, c: char) {
    match c {
        '"' | '\\' => out.extend_from_slice(&[b'\\', c as u8]),
        ' '..='~' => out.push(c as u8),
        _ => {
            for unit in c.encode_utf16(&mut [0; 2]) {
                let [high, low] = unit.to_be_bytes();
                out.extend_from_slice(b"\\u");
                hex(out, high);
                hex(out, low);
            }
        }
    }
}

/// As nginx escapes log variables: `\xHH` for anything but printable ASCII,
/// and for the characters that delimit fields.
fn hex_escaped(out: &mut Vec<u8>, value: &[u8]) {
    let (value, cut) = bounded(value);
    for &byte in value {
        match byte {
            b'"' | b'\\' | b'[' | b']' => {}
            b' '..=b'~' => {
                out.push(byte);
                continue;
            }
            _ => {}
        }
        out.extend_from_slice(b"\\x");
        hex(out, byte);
    }
    out.extend_from_slice(cut);
}

fn bounded(value: &[u8]) -> (&[u8], &'static [u8]) {
    match value.split_at_checked(MAX_FIELD) {
        Some((kept, rest)) if !rest.is_empty() => (kept, b"..."),
        _ => (value, b""),
    }
}

fn hex(out: &mut Vec<u8>, byte: u8) {
    const DIGITS: &[u8; 16] = b"0123456789ABCDEF";
    out.extend_from_slice(&[DIGITS[usize::from(byte >> 4)], DIGITS[usize::from(byte & 15)]]);
}

/// Without `core::fmt`, which costs several times as much and is used a dozen times a line.
fn decimal(out: &mut Vec<u8>, mut value: u64) {
    let mut text = [0; 20];
    let mut start = text.len();
    loop {
        start -= 1;
        text[start] = b'0' + (value % 10) as u8;
        value /= 10;
        if value == 0 {
            break;
        }
    }
    out.extend_from_slice(&text[start..]);
}

/// µs as seconds with milliseconds, rounded down, as nginx does.
fn seconds(out: &mut Vec<u8>, us: u64) {
    decimal(out, us / 1_000_000);
    let ms = us / 1_000 % 1_000;
    out.push(b'.');
    out.extend_from_slice(&[ms / 100, ms / 10 % 10, ms % 10].map(|digit| b'0' + digit as u8));
}

fn display(out: &mut Vec<u8>, value: impl std::fmt::Display) {
    // Writing to a Vec does not fail.
    let _ = write!(out, "{value}");
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn escaping() {
        let cases: &[(&[u8], &str, &str)] = &[
            (b"", "", ""),
            (b"/plain?q=1&r=~", "/plain?q=1&r=~", "/plain?q=1&r=~"),
            (b"a\"b", "a\\\"b", "a\\x22b"),
            (b"a\\b", "a\\\\b", "a\\x5Cb"),
            (b"a] [b", "a] [b", "a\\x5D \\x5Bb"),
            (b"a\nb\r\t\0", "a\\u000Ab\\u000D\\u0009\\u0000", "a\\x0Ab\\x0D\\x09\\x00"),
            (b"\x1b[31m\x7f", "\\u001B[31m\\u007F", "\\x1B\\x5B31m\\x7F"),
            ("é".as_bytes(), "\\u00E9", "\\xC3\\xA9"),
            (
                "\u{85}\u{9b}\u{2028}\u{202e}".as_bytes(),
                "\\u0085\\u009B\\u2028\\u202E",
                "\\xC2\\x85\\xC2\\x9B\\xE2\\x80\\xA8\\xE2\\x80\\xAE",
            ),
            ("😀".as_bytes(), "\\uD83D\\uDE00", "\\xF0\\x9F\\x98\\x80"),
            (b"a\xffb", "a\\uFFFDb", "a\\xFFb"),
            (b"\xed\xa0\x80", "\\uFFFD\\uFFFD\\uFFFD", "\\xED\\xA0\\x80"),
            (b"\xe2\x82", "\\uFFFD", "\\xE2\\x82"),
        ];
        for (input, as_json, as_hex) in cases {
            let (mut json, mut hex) = (Vec::new(), Vec::new());
            json_escaped(&mut json, input);
            hex_escaped(&mut hex, input);
            assert_eq!(String::from_utf8(json).unwrap(), *as_json, "{input:?}");
            assert_eq!(String::from_utf8(hex).unwrap(), *as_hex, "{input:?}");
        }
    }

    #[test]
    fn long_fields_are_cut() {
        let long = vec![b'a'; MAX_FIELD + 1];
        for escape in [json_escaped, hex_escaped] {
            let mut out = Vec::new();
            escape(&mut out, &long[..MAX_FIELD]);
            assert_eq!(out, &long[..MAX_FIELD]);
            out.clear();
            escape(&mut out, &long);
            assert_eq!(out.len(), MAX_FIELD + 3);
            assert!(out.ends_with(b"a..."));
        }
    }

    #[test]
    fn numbers() {
        for value in [0, 9, 10, 12_345, u64::MAX] {
            let mut out = Vec::new();
            decimal(&mut out, value);
            assert_eq!(out, value.to_string().into_bytes());
        }
        for (us, expected) in [(0, "0.000"), (999, "0.000"), (1_000, "0.001"), (61_234_567, "61.234")] {
            let mut out = Vec::new();
            seconds(&mut out, us);
            assert_eq!(out, expected.as_bytes());
        }
    }
}
