//! The name in a TLS ClientHello, read without taking part in the handshake.
//!
//! A connection may be passed on by this name alone, so it is read strictly:
//! what two readers could understand differently is an error. What does not
//! bear on the name (versions, ciphers, GREASE, an encrypted inner hello) is
//! the endpoint's to judge and passed over.

use std::borrow::Cow;

/// Longest ClientHello that is read, in bytes, without record headers. With
/// post-quantum key shares they have about 2,000.
pub const MAX_BYTES: usize = 16 << 10;

/// What the first bytes of a TLS connection say.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Parsed {
    /// They belong to a ClientHello that goes on.
    Incomplete {
        /// At least so many bytes are missing. Whoever waits for them before it asks again
        /// asks seldom, however small the pieces.
        missing: usize,
    },
    /// The name it asks for, in lower case and without a trailing dot.
    /// `None`: it asks for none.
    Named(Option<String>),
}

/// Why bytes are no ClientHello whose name can be relied on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    /// Not a TLS handshake, or one that does not begin with a ClientHello.
    #[error("not a TLS ClientHello")]
    NotAHello,
    /// Longer than [`MAX_BYTES`].
    #[error("the ClientHello is too long")]
    TooLong,
    /// Lengths that contradict each other.
    #[error("malformed ClientHello")]
    Malformed,
    /// More than one name, a kind of name nobody defined, or no DNS name.
    #[error("malformed server name in the ClientHello")]
    Name,
}

/// Reads the ClientHello at the front of `input`: TLS records (RFC 8446
/// section 5.1), in any number of which it may be divided. Pure; looks at most
/// at the records that hold [`MAX_BYTES`].
///
/// # Errors
/// As soon as what is there cannot become a ClientHello any more.
pub fn parse(input: &[u8]) -> Result<Parsed, Error> {
    match message(input)? {
        Ok(message) => server_name(&message).map(Parsed::Named),
        Err(missing) => Ok(Parsed::Incomplete { missing }),
    }
}

const HANDSHAKE: u8 = 22;
const CLIENT_HELLO: u8 = 1;
const SERVER_NAME: u16 = 0;
const HOST_NAME: u8 = 0;

/// Type, version and length.
const RECORD_HEADER: usize = 5;
const RECORD_BYTES: usize = 1 << 14;

/// Type and length.
const MESSAGE_HEADER: usize = 4;

/// The body of the first handshake message, or at least how many bytes of it are missing.
fn message(input: &[u8]) -> Result<Result<Cow<'_, [u8]>, usize>, Error> {
    let mut joined: Cow<'_, [u8]> = Cow::Borrowed(&[]);
    let mut rest = input;
    loop {
        // Every byte is judged as soon as it is there.
        if rest.first().is_some_and(|kind| *kind != HANDSHAKE) || rest.get(1).is_some_and(|major| *major != 3)
        {
            return Err(Error::NotAHello);
        }
        let Some(&[high, low]) = rest.get(3..RECORD_HEADER) else {
            return Ok(Err(RECORD_HEADER - rest.len()));
        };
        let length = usize::from(u16::from_be_bytes([high, low]));
        if length == 0 || length > RECORD_BYTES {
            return Err(Error::NotAHello);
        }
        let end = rest.len().min(RECORD_HEADER + length);
        let fragment = &rest[RECORD_HEADER..end];
        if joined.is_empty() {
            joined = Cow::Borrowed(fragment);
        } else {
            joined.to_mut().extend_from_slice(fragment);
        }
        if joined.first().is_some_and(|kind| *kind != CLIENT_HELLO) {
            return Err(Error::NotAHello);
        }
        let mut missing = MESSAGE_HEADER.saturating_sub(joined.len());
        if let Some(&[a, b, c]) = joined.get(1..MESSAGE_HEADER) {
            let length = u32::from_be_bytes([0, a, b, c]) as usize;
            if length > MAX_BYTES {
                return Err(Error::TooLong);
            }
            let range = MESSAGE_HEADER..MESSAGE_HEADER + length;
            if joined.len() >= range.end {
                return Ok(Ok(match joined {
                    Cow::Borrowed(bytes) => Cow::Borrowed(&bytes[range]),
                    Cow::Owned(bytes) => Cow::Owned(bytes[range].to_vec()),
                }));
            }
            missing = range.end - joined.len();
        }
        if end < RECORD_HEADER + length {
            return Ok(Err(missing));
        }
        rest = &rest[end..];
    }
}

/// RFC 8446 section 4.1.2 and RFC 6066 section 3.
fn server_name(message: &[u8]) -> Result<Option<String>, Error> {
    let mut hello = Reader(message);
    let _version_and_random = hello.take(2 + 32)?;
    let session_id = hello.vector8()?;
    let ciphers = hello.vector16()?;
    let compression = hello.vector8()?;
    if session_id.len() > 32 || ciphers.len() < 2 || ciphers.len() % 2 != 0 || compression.is_empty() {
        return Err(Error::Malformed);
    }
    if hello.0.is_empty() {
        // Before TLS 1.3 there need be no extensions at all.
        return Ok(None);
    }
    let mut extensions = Reader(hello.vector16()?);
    if !hello.0.is_empty() {
        return Err(Error::Malformed);
    }
    let mut name = None;
    while !extensions.0.is_empty() {
        let kind = extensions.u16()?;
        let value = extensions.vector16()?;
        if kind == SERVER_NAME && name.replace(host_name(value)?).is_some() {
            return Err(Error::Name);
        }
    }
    Ok(name)
}

/// The one name of a server name list.
fn host_name(extension: &[u8]) -> Result<String, Error> {
    let entry = || -> Result<&[u8], Error> {
        let mut extension = Reader(extension);
        let mut list = Reader(extension.vector16()?);
        let [kind] = list.take(1)? else { return Err(Error::Name) };
        let name = list.vector16()?;
        let alone = *kind == HOST_NAME && list.0.is_empty() && extension.0.is_empty();
        if alone { Ok(name) } else { Err(Error::Name) }
    };
    let name = entry().map_err(|_| Error::Name)?;
    let name = name.strip_suffix(b".").unwrap_or(name);
    let is_label = |label: &[u8]| {
        let known = |byte: &u8| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'_');
        (1..=63).contains(&label.len()) && label.iter().all(known)
    };
    match std::str::from_utf8(name) {
        Ok(text) if name.len() <= 253 && name.split(|byte| *byte == b'.').all(is_label) => {
            Ok(text.to_ascii_lowercase())
        }
        _ => Err(Error::Name),
    }
}

/// What is left to read.
struct Reader<'a>(&'a [u8]);

impl<'a> Reader<'a> {
    fn take(&mut self, n: usize) -> Result<&'a [u8], Error> {
        let (taken, rest) = self.0.split_at_checked(n).ok_or(Error::Malformed)?;
        self.0 = rest;
        Ok(taken)
    }

    fn u16(&mut self) -> Result<u16, Error> {
        let bytes = self.take(2)?;
        Ok(u16::from_be_bytes([bytes[0], bytes[1]]))
    }

    /// A vector whose length stands before it in one byte.
    fn vector8(&mut self) -> Result<&'a [u8], Error> {
        let length = self.take(1)?[0];
        self.take(length.into())
    }

    /// The same in two bytes.
    fn vector16(&mut self) -> Result<&'a [u8], Error> {
        let length = self.u16()?;
        self.take(length.into())
    }
}

#[cfg(test)]
mod tests;
