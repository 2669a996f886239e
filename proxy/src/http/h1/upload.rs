//! A request body on its way from the client to an HTTP/1 endpoint.

use std::pin::Pin;
use std::task::{Context, Poll, ready};

use bytes::Bytes;
use http::HeaderMap;
use tokio::io::AsyncWrite as _;

use crate::buffer::{Buffer, Output};
use crate::conn::Conn;
use crate::http::chunked::{Decoder, header_map, size_line};
use crate::http::exchange::{Piece, UploadError};
use crate::http::head::Framing;
use crate::http::kept::Kept;

use super::Shape;

/// Moves the body piece by piece; nothing is read from the client that the
/// endpoint has not made room for.
pub(super) struct Upload {
    body: Body,
    /// Encoded and not yet written.
    encoded: Output,
    written: usize,
    /// Body bytes so far, and the most there may be.
    pub(super) bytes: u64,
    limit: u64,
    done: bool,
    abandoned: bool,
    /// Anything was taken from the client.
    started: bool,
    /// The latest poll ended waiting for the client, not for the endpoint.
    awaits_client: bool,
    /// What the endpoint got, framed as it was.
    kept: Kept,
}

enum Body {
    Length(u64),
    Chunked(Decoder),
}

impl Upload {
    /// `limit`: most body bytes; `kept`: up to how many can be sent again.
    pub(super) fn new(framing: Framing, limit: u64, kept: usize) -> Upload {
        let body = match framing {
            Framing::Chunked => Body::Chunked(Decoder::default()),
            Framing::Length(n) => Body::Length(n),
            Framing::None | Framing::Close => Body::Length(0),
        };
        let done = matches!(body, Body::Length(0));
        Upload {
            body,
            encoded: Output::take(),
            written: 0,
            bytes: 0,
            limit,
            done,
            abandoned: false,
            started: false,
            awaits_client: false,
            kept: Kept::new(kept),
        }
    }

    /// The whole body is through.
    pub(super) fn is_done(&self) -> bool {
        self.done
    }

    /// There is more to move.
    pub(super) fn is_active(&self) -> bool {
        !self.done && !self.abandoned
    }

    /// The endpoint takes no more.
    pub(super) fn abandon(&mut self) {
        self.abandoned = true;
    }

    /// Something was taken from the client.
    pub(super) fn has_started(&self) -> bool {
        self.started
    }

    /// All that was taken from the client can be sent again.
    pub(super) fn is_repeatable(&self) -> bool {
        !self.started || self.kept.is_whole()
    }

    /// The next endpoint gets the body from its beginning.
    pub(super) fn rewind(&mut self) {
        self.kept.rewind();
        // All that was encoded is kept.
        self.written = self.encoded.len();
        self.abandoned = false;
        self.done &= self.kept.unwritten().is_empty();
    }

    /// Nothing more is to come from the client.
    fn is_taken(&self) -> bool {
        match &self.body {
            Body::Length(left) => *left == 0,
            Body::Chunked(decoder) => decoder.is_done(),
        }
    }

    /// It is the client that nothing comes from.
    pub(super) fn awaits_client(&self) -> bool {
        self.awaits_client
    }

    /// The request as far as an answer is concerned, given how much of its body is still to come.
    pub(super) fn shape_left(&self, shape: Shape) -> Shape {
        // An unfinished body may have any length left.
        let framing = if self.is_taken() { Framing::None } else { Framing::Chunked };
        Shape { framing, ..shape }
    }

    /// Moves bytes to an HTTP/1 endpoint: `Ready(Ok)` when some were written or the body is through.
    pub(super) fn poll(
        &mut self,
        cx: &mut Context<'_>,
        client: &mut Conn,
        input: &mut Buffer,
        endpoint: &mut Conn,
    ) -> Poll<Result<(), UploadError>> {
        loop {
            self.awaits_client = false;
            if self.done {
                ready!(Pin::new(&mut *endpoint).poll_flush(cx)).map_err(|_| UploadError::Endpoint)?;
                return Poll::Ready(Ok(()));
            }
            if self.poll_write(cx, input, endpoint)?.is_ready() {
                return Poll::Ready(Ok(()));
            }
            if self.has_unwritten(input) {
                return Poll::Pending;
            }
            // All that came has left; make sure it really has before waiting for more.
            if Pin::new(&mut *endpoint).poll_flush(cx).map_err(|_| UploadError::Endpoint)?.is_pending() {
                return Poll::Pending;
            }
            self.awaits_client = true;
            match ready!(client.poll_fill(cx, input)) {
                Ok(0) | Err(_) => return Poll::Ready(Err(UploadError::Client)),
                Ok(_) => self.started = true,
            }
        }
    }

    /// The next piece of body, for an HTTP/2 endpoint.
    pub(super) fn poll_piece(
        &mut self,
        cx: &mut Context<'_>,
        client: &mut Conn,
        input: &mut Buffer,
    ) -> Poll<Result<Piece, UploadError>> {
        loop {
            if self.done {
                return Poll::Ready(Ok(Piece::End(self.trailers())));
            }
            if !input.is_empty() {
                self.started = true;
                let piece = self.take_piece(input)?;
                self.bytes += piece.len() as u64;
                if self.bytes > self.limit {
                    return Poll::Ready(Err(UploadError::TooLarge));
                }
                if !piece.is_empty() {
                    return Poll::Ready(Ok(Piece::Data(piece)));
                }
                continue;
            }
            match ready!(client.poll_fill(cx, input)) {
                Ok(0) | Err(_) => return Poll::Ready(Err(UploadError::Client)),
                Ok(_) => {}
            }
        }
    }

    fn take_piece(&mut self, input: &mut Buffer) -> Result<Bytes, UploadError> {
        let (data, consumed) = match &mut self.body {
            Body::Length(left) => {
                let n = usize::try_from(*left).unwrap_or(usize::MAX).min(input.len());
                *left -= n as u64;
                self.done = *left == 0;
                (n, n)
            }
            Body::Chunked(decoder) => {
                let decoded = decoder.decode(input.filled_mut()).map_err(|e| UploadError::Malformed(e.0))?;
                self.done = decoded.done;
                (decoded.data, decoded.consumed)
            }
        };
        let piece = Bytes::copy_from_slice(&input.filled()[..data]);
        input.consume(consumed);
        Ok(piece)
    }

    fn trailers(&self) -> Option<HeaderMap> {
        match &self.body {
            Body::Chunked(decoder) => header_map(decoder.trailers()),
            Body::Length(_) => None,
        }
    }

    fn has_unwritten(&self, input: &Buffer) -> bool {
        match self.body {
            _ if !self.kept.unwritten().is_empty() => true,
            Body::Length(_) => !input.is_empty(),
            Body::Chunked(_) => self.written < self.encoded.len(),
        }
    }

    /// `Ready(Ok)` when something was written or the body ended.
    fn poll_write(
        &mut self,
        cx: &mut Context<'_>,
        input: &mut Buffer,
        endpoint: &mut Conn,
    ) -> Result<Poll<()>, UploadError> {
        if !self.kept.unwritten().is_empty() {
            let written = Pin::new(&mut *endpoint).poll_write(cx, self.kept.unwritten());
            let Poll::Ready(n) = written.map_err(|_| UploadError::Endpoint)? else {
                return Ok(Poll::Pending);
            };
            self.kept.wrote(n);
            let written = self.kept.unwritten().is_empty() && self.written == self.encoded.len();
            self.done = written && self.is_taken();
            return Ok(Poll::Ready(()));
        }
        match &mut self.body {
            Body::Length(left) => {
                let available = usize::try_from(*left).unwrap_or(usize::MAX).min(input.len());
                if available == 0 {
                    return Ok(Poll::Pending);
                }
                let written = Pin::new(&mut *endpoint).poll_write(cx, &input.filled()[..available]);
                let Poll::Ready(n) = written.map_err(|_| UploadError::Endpoint)? else {
                    return Ok(Poll::Pending);
                };
                self.started = true;
                self.kept.add(&input.filled()[..n]);
                input.consume(n);
                *left -= n as u64;
                self.bytes += n as u64;
                self.done = *left == 0;
                Ok(Poll::Ready(()))
            }
            Body::Chunked(decoder) => {
                if self.written == self.encoded.len() && !input.is_empty() {
                    self.encoded.clear();
                    self.written = 0;
                    self.bytes += encode(decoder, input, &mut self.encoded)?;
                    self.kept.add(&self.encoded);
                    if self.bytes > self.limit {
                        return Err(UploadError::TooLarge);
                    }
                    self.started = true;
                }
                if self.written == self.encoded.len() {
                    return Ok(Poll::Pending);
                }
                let written = Pin::new(&mut *endpoint).poll_write(cx, &self.encoded[self.written..]);
                let Poll::Ready(n) = written.map_err(|_| UploadError::Endpoint)? else {
                    return Ok(Poll::Pending);
                };
                self.written += n;
                self.done = self.written == self.encoded.len() && decoder.is_done();
                Ok(Poll::Ready(()))
            }
        }
    }
}

/// Decodes what is in `input` and encodes it anew. Returns the body bytes.
fn encode(decoder: &mut Decoder, input: &mut Buffer, out: &mut Vec<u8>) -> Result<u64, UploadError> {
    let decoded = decoder.decode(input.filled_mut()).map_err(|e| UploadError::Malformed(e.0))?;
    if decoded.data > 0 {
        out.extend_from_slice(size_line(decoded.data, &mut [0; 18]));
        out.extend_from_slice(&input.filled()[..decoded.data]);
        out.extend_from_slice(b"\r\n");
    }
    if decoded.done {
        out.extend_from_slice(b"0\r\n");
        out.extend_from_slice(decoder.trailers());
        out.extend_from_slice(b"\r\n");
    }
    input.consume(decoded.consumed);
    Ok(decoded.data as u64)
}
