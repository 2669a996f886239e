//! The PROXY protocol, versions 1 and 2: who a connection comes from, told by
//! whoever passed it on in front of its first byte.
//!
//! Specification: `doc/proxy-protocol.txt` of HAProxy. Read strictly: a header
//! is what the specification says or an error, so that no two readers of the
//! same bytes can see different clients.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

/// Longest header that is accepted, in bytes. The addresses need 232 of them
/// at most; the rest is for extensions, which are checked and passed over.
pub const MAX_BYTES: usize = 4096;

/// Which of the two encodings to write. Both are read.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, serde::Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Version {
    /// One line of text.
    #[default]
    V1,
    /// Binary.
    V2,
}

/// What the first bytes of a connection are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Parsed {
    /// All of them belong to a header that goes on.
    Incomplete,
    /// A whole header, which ends after `length` bytes.
    Header {
        /// In bytes.
        length: usize,
        /// On whose behalf.
        origin: Origin,
    },
}

/// On whose behalf a connection was opened.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Origin {
    /// The sender's own (`LOCAL`: its health check), or of somebody without an
    /// IP address (`UNKNOWN`, `UNSPEC`, a UNIX socket): the connection's own
    /// addresses hold.
    Local,
    /// A client's.
    Proxied {
        /// Where the client is.
        source: SocketAddr,
        /// Where it connected to.
        destination: SocketAddr,
    },
}

/// Why bytes are no header.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    /// Neither version begins like this.
    #[error("not a PROXY header")]
    NotAHeader,
    /// Longer than its version, or [`MAX_BYTES`], allows.
    #[error("the PROXY header is too long")]
    TooLong,
    /// The line of version 1 is not one.
    #[error("malformed PROXY header of version 1")]
    Line,
    /// A version, command, family or transport that version 2 does not know.
    #[error("PROXY header of version 2 with unknown values")]
    Unknown,
    /// The addresses need more bytes than there are.
    #[error("the PROXY header ends within its addresses")]
    Addresses,
    /// An extension does not end where the header does.
    #[error("malformed extension in the PROXY header")]
    Extension,
    /// The header says it was damaged (CRC32c).
    #[error("the checksum of the PROXY header is wrong")]
    Checksum,
}

/// Reads the header at the front of `input`. Pure, and total in what it reads:
/// at most [`MAX_BYTES`] bytes.
///
/// # Errors
/// As soon as what is there cannot become a header any more.
pub fn parse(input: &[u8]) -> Result<Parsed, Error> {
    let begins = |with: &[u8]| {
        let compared = input.len().min(with.len());
        input[..compared] == with[..compared]
    };
    match (begins(SIGNATURE), begins(LINE_START)) {
        (true, _) => parse_v2(input),
        (_, true) => parse_v1(input),
        _ => Err(Error::NotAHeader),
    }
}

/// Appends a header of `version` for a TCP connection from `source` to
/// `destination`. Addresses of different families are both written as IPv6.
pub fn write_header(version: Version, source: SocketAddr, destination: SocketAddr, out: &mut Vec<u8>) {
    let (from, to) = (source.ip().to_canonical(), destination.ip().to_canonical());
    let (ports, family) = ((source.port(), destination.port()), (from, to));
    match (version, family) {
        (Version::V1, (IpAddr::V4(from), IpAddr::V4(to))) => write_line(out, "TCP4", &from, &to, ports),
        (Version::V1, (from, to)) => write_line(out, "TCP6", &mapped(from), &mapped(to), ports),
        (Version::V2, (IpAddr::V4(from), IpAddr::V4(to))) => {
            write_block(out, TCP4, [&from.octets(), &to.octets()], ports);
        }
        (Version::V2, (from, to)) => {
            write_block(out, TCP6, [&mapped(from).octets(), &mapped(to).octets()], ports);
        }
    }
}

/// Appends a header of `version` for a connection of our own, as a health check is.
pub fn write_local(version: Version, out: &mut Vec<u8>) {
    match version {
        Version::V1 => out.extend_from_slice(b"PROXY UNKNOWN\r\n"),
        Version::V2 => {
            out.extend_from_slice(SIGNATURE);
            out.extend_from_slice(&[VERSION_2 | LOCAL, UNSPEC, 0, 0]);
        }
    }
}

const LINE_START: &[u8] = b"PROXY ";

/// With its line end; the longest that two IPv6 addresses or `UNKNOWN` need (section 2.1).
const LINE_BYTES: usize = 107;

const SIGNATURE: &[u8] = b"\r\n\r\n\0\r\nQUIT\n";
const VERSION_2: u8 = 0x20;
const LOCAL: u8 = 0;
const PROXY: u8 = 1;
const UNSPEC: u8 = 0x00;
const TCP4: u8 = 0x11;
const UDP4: u8 = 0x12;
const TCP6: u8 = 0x21;
const UDP6: u8 = 0x22;
const UNIX_STREAM: u8 = 0x31;
const UNIX_DATAGRAM: u8 = 0x32;

/// The signature, version and command, family and transport, length.
const FIXED: usize = 16;

/// `PP2_TYPE_CRC32C`.
const TYPE_CRC32C: u8 = 0x03;

fn parse_v1(input: &[u8]) -> Result<Parsed, Error> {
    let window = &input[..input.len().min(LINE_BYTES)];
    let Some(end) = memchr::memchr2(b'\r', b'\n', window) else {
        return if window.len() == LINE_BYTES { Err(Error::TooLong) } else { Ok(Parsed::Incomplete) };
    };
    if window[end] == b'\n' {
        return Err(Error::Line);
    }
    match window.get(end + 1) {
        None if end + 1 == LINE_BYTES => return Err(Error::TooLong),
        None => return Ok(Parsed::Incomplete),
        Some(b'\n') => {}
        Some(_) => return Err(Error::Line),
    }
    let length = end + 2;
    let line = std::str::from_utf8(&window[LINE_START.len()..end]).map_err(|_| Error::Line)?;
    // Whatever follows the word is to be ignored (section 2.1).
    if line == "UNKNOWN" || line.starts_with("UNKNOWN ") {
        return Ok(Parsed::Header { length, origin: Origin::Local });
    }
    let mut words = line.split(' ');
    let mut next = || words.next().ok_or(Error::Line);
    let (family, from, to, from_port, to_port) = (next()?, next()?, next()?, next()?, next()?);
    if words.next().is_some() {
        return Err(Error::Line);
    }
    let address = |text: &str| -> Result<IpAddr, Error> {
        match family {
            "TCP4" => text.parse().map(IpAddr::V4),
            "TCP6" => text.parse().map(IpAddr::V6),
            _ => return Err(Error::Line),
        }
        .map_err(|_| Error::Line)
    };
    let source = SocketAddr::new(address(from)?, port(from_port)?);
    let destination = SocketAddr::new(address(to)?, port(to_port)?);
    Ok(Parsed::Header { length, origin: Origin::Proxied { source, destination } })
}

/// Digits without a leading zero, which some would read as octal.
fn port(text: &str) -> Result<u16, Error> {
    let digits = text.bytes().all(|byte| byte.is_ascii_digit());
    let plain = digits && (text == "0" || !text.starts_with('0'));
    text.parse().ok().filter(|_| plain).ok_or(Error::Line)
}

fn parse_v2(input: &[u8]) -> Result<Parsed, Error> {
    let known = |at: usize, values: &[u8]| input.get(at).is_none_or(|byte| values.contains(byte));
    let families = [UNSPEC, TCP4, UDP4, TCP6, UDP6, UNIX_STREAM, UNIX_DATAGRAM];
    if !known(12, &[VERSION_2 | LOCAL, VERSION_2 | PROXY]) || !known(13, &families) {
        return Err(Error::Unknown);
    }
    let Some(&[command, family, high, low]) = input.get(12..FIXED) else { return Ok(Parsed::Incomplete) };
    let length = FIXED + usize::from(u16::from_be_bytes([high, low]));
    if length > MAX_BYTES {
        return Err(Error::TooLong);
    }
    let local = Ok(Parsed::Header { length, origin: Origin::Local });
    let is_local = command == VERSION_2 | LOCAL || family == UNSPEC;
    let addresses = match family {
        // The block has no known shape: passed over (section 2.2).
        _ if is_local => 0,
        TCP4 | UDP4 => 12,
        TCP6 | UDP6 => 36,
        _ => 216,
    };
    if length < FIXED + addresses {
        return Err(Error::Addresses);
    }
    let Some(header) = input.get(..length) else { return Ok(Parsed::Incomplete) };
    if is_local {
        return local;
    }
    let (block, _) = header[FIXED..].split_at(addresses);
    check_extensions(header, FIXED + addresses)?;
    let (from, to, ports) = match block.len() {
        12 => (IpAddr::V4(v4(&block[..4])), IpAddr::V4(v4(&block[4..8])), &block[8..]),
        36 => (IpAddr::V6(v6(&block[..16])), IpAddr::V6(v6(&block[16..32])), &block[32..]),
        _ => return local,
    };
    let port = |at: usize| u16::from_be_bytes([ports[at], ports[at + 1]]);
    let (source, destination) = (SocketAddr::new(from, port(0)), SocketAddr::new(to, port(2)));
    Ok(Parsed::Header { length, origin: Origin::Proxied { source, destination } })
}

/// Type, length and value, one after another, up to the end exactly.
fn check_extensions(header: &[u8], start: usize) -> Result<(), Error> {
    let mut at = start;
    let mut summed = false;
    while at < header.len() {
        let Some(&[kind, high, low]) = header.get(at..at + 3) else { return Err(Error::Extension) };
        let value = at + 3..at + 3 + usize::from(u16::from_be_bytes([high, low]));
        let bytes = header.get(value.clone()).ok_or(Error::Extension)?;
        if kind == TYPE_CRC32C {
            let sum: [u8; 4] = bytes.try_into().map_err(|_| Error::Extension)?;
            if std::mem::replace(&mut summed, true) {
                return Err(Error::Extension);
            }
            // Of the whole header, with zeros in place of the sum itself (section 2.2.3).
            let parts = [&header[..value.start], &[0; 4], &header[value.end..]];
            if crc32c(&parts) != u32::from_be_bytes(sum) {
                return Err(Error::Checksum);
            }
        }
        at = value.end;
    }
    Ok(())
}

fn v4(octets: &[u8]) -> Ipv4Addr {
    let mut room = [0; 4];
    room.copy_from_slice(octets);
    room.into()
}

fn v6(octets: &[u8]) -> Ipv6Addr {
    let mut room = [0; 16];
    room.copy_from_slice(octets);
    room.into()
}

fn mapped(address: IpAddr) -> Ipv6Addr {
    match address {
        IpAddr::V4(v4) => v4.to_ipv6_mapped(),
        IpAddr::V6(v6) => v6,
    }
}

fn write_line(
    out: &mut Vec<u8>,
    family: &str,
    from: &dyn std::fmt::Display,
    to: &dyn std::fmt::Display,
    (from_port, to_port): (u16, u16),
) {
    use std::io::Write as _;
    // Writing to a Vec cannot fail.
    let _ = write!(out, "PROXY {family} {from} {to} {from_port} {to_port}\r\n");
}

fn write_block(out: &mut Vec<u8>, family: u8, addresses: [&[u8]; 2], ports: (u16, u16)) {
    let length = addresses[0].len() as u16 * 2 + 4;
    out.extend_from_slice(SIGNATURE);
    out.extend_from_slice(&[VERSION_2 | PROXY, family]);
    out.extend_from_slice(&length.to_be_bytes());
    out.extend_from_slice(addresses[0]);
    out.extend_from_slice(addresses[1]);
    out.extend_from_slice(&ports.0.to_be_bytes());
    out.extend_from_slice(&ports.1.to_be_bytes());
}

/// CRC-32C (Castagnoli, RFC 3720 appendix B.4). Few headers carry one, and they are short.
fn crc32c(parts: &[&[u8]]) -> u32 {
    let mut crc = !0u32;
    for byte in parts.iter().copied().flatten() {
        crc ^= u32::from(*byte);
        for _ in 0..8 {
            crc = (crc >> 1) ^ (0x82F6_3B78 & (crc & 1).wrapping_neg());
        }
    }
    !crc
}

#[cfg(test)]
mod tests;
