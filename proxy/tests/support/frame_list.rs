//! The HTTP/2 messages of the lists, as frames that no library would send.
#![allow(dead_code, unreachable_pub, reason = "every test file uses its own part of this")]

use std::io::Write as _;
use std::net::{SocketAddr, TcpStream};
use std::time::Duration;

use super::frames::*;
use super::messages::{Case, unescape};
use super::toy::{PATIENCE, connect};

/// What is sent behind a message, to see that the connection still serves.
const LAST: &str = ":method=GET :scheme=http :authority=a :path=/last";

/// Sends a message on stream 1 and a good request on stream 3. What becomes of
/// the first: a status, `reset`, `goaway` or `close`; then of the second, unless it is 200.
pub fn exchange(address: SocketAddr, case: &Case, silence: Option<Duration>) -> String {
    let mut stream = connect(address);
    stream.set_read_timeout(silence.or(Some(PATIENCE))).unwrap();
    let sent = [PREFACE, &frame(SETTINGS, 0, 0, &[]), &message(1, &case.written)].concat();
    stream.write_all(&sent).unwrap();
    let first = outcome(&mut stream, 1);
    if first.parse::<u16>().is_err() && first != "reset" {
        return first;
    }
    // Its end may already be on its way here.
    let _ = stream.write_all(&message(3, LAST));
    match outcome(&mut stream, 3).as_str() {
        "200" => first,
        second => format!("{first},{second}"),
    }
}

/// Reads until it is clear what becomes of a stream.
fn outcome(stream: &mut TcpStream, id: u32) -> String {
    let mut status = None;
    loop {
        let Ok(Frame { kind, flags, stream: on, payload }) = read_frame(stream) else {
            return status.map_or("close".to_owned(), |s| format!("{s},close"));
        };
        match kind {
            SETTINGS if flags & ACK == 0 => {
                let _ = stream.write_all(&frame(SETTINGS, ACK, 0, &[]));
            }
            GOAWAY if payload[4..8] != [0; 4] => return "goaway".to_owned(),
            RST_STREAM if on == id && status.is_none() => return "reset".to_owned(),
            HEADERS if on == id && status.is_none() => status = Some(status_of(&payload)),
            _ => {}
        }
        let ended = matches!(kind, HEADERS | DATA) && flags & END_STREAM != 0 || kind == RST_STREAM;
        if on == id && ended {
            return status.unwrap_or("close".to_owned());
        }
    }
}

/// The frames of a message as the lists write it: fields, then ` ; ` between data and trailers.
fn message(stream: u32, text: &str) -> Vec<u8> {
    let parts: Vec<_> = text.split(" ; ").collect();
    let last = parts.len() - 1;
    let frames = parts.iter().enumerate().flat_map(|(index, part)| {
        let end = if index == last { END_STREAM } else { 0 };
        match part.strip_prefix("DATA ") {
            Some(data) => frame(DATA, end, stream, &unescape(data)),
            None => frame(HEADERS, end | END_HEADERS, stream, &block(part)),
        }
    });
    frames.collect()
}

/// Header fields, each a literal never indexed, without Huffman (RFC 7541 section 6.2.3).
fn block(fields: &str) -> Vec<u8> {
    let mut block = Vec::new();
    for field in fields.split(' ').filter(|f| !f.is_empty()) {
        let (name, value) = field.split_once('=').expect("name=value");
        block.push(0x10);
        string(&mut block, &unescape(name));
        string(&mut block, &unescape(value));
    }
    block
}

/// `:status`, the first field of a response: indexed, or a literal with an indexed name.
fn status_of(block: &[u8]) -> String {
    // Changes of the dynamic table's size may stand before it.
    let skipped = block.iter().take_while(|b| **b & 0xe0 == 0x20).count();
    let block = &block[skipped..];
    match block {
        [indexed @ 0x88..=0x8e, ..] => {
            [200, 204, 206, 304, 400, 404, 500][usize::from(*indexed - 0x88)].to_string()
        }
        [0x08 | 0x18 | 0x48, length, value @ ..] if length & 0x80 == 0 => {
            String::from_utf8_lossy(&value[..usize::from(*length)]).into_owned()
        }
        [0x08 | 0x18 | 0x48, length, value @ ..] => huffman_digits(&value[..usize::from(length & 0x7f)]),
        _ => "?".to_owned(),
    }
}

/// Three digits (RFC 7541 appendix B): 0 to 2 have five bits, the others six.
fn huffman_digits(bytes: &[u8]) -> String {
    let bits: Vec<u8> = bytes.iter().flat_map(|b| (0..8).rev().map(move |at| b >> at & 1)).collect();
    let mut digits = String::new();
    let mut at = 0;
    while digits.len() < 3 {
        let number = |n: usize| bits[at..at + n].iter().fold(0, |value, bit| value << 1 | bit);
        let (digit, used) = match number(5) {
            short @ 0..=2 => (short, 5),
            _ => (number(6) - 0b01_1001 + 3, 6),
        };
        digits.push((b'0' + digit) as char);
        at += used;
    }
    digits
}
