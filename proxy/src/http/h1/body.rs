//! A response body on its way to the client: what each piece of input means,
//! and how it is framed for a client of either HTTP/1 version.

use crate::buffer::Buffer;
use crate::http::chunked::{BadChunk, Decoder, size_line};
use crate::http::head::Framing;

/// A body as the endpoint frames it.
pub(crate) enum Incoming {
    None,
    Length(u64),
    Chunked(Decoder),
    UntilClose,
}

/// A piece of body at the front of the buffer.
#[derive(Clone, Copy)]
pub(crate) struct Piece {
    pub(crate) data: usize,
    pub(crate) consumed: usize,
    pub(crate) done: bool,
}

impl Incoming {
    pub(crate) fn new(framing: Framing) -> Incoming {
        match framing {
            Framing::None => Incoming::None,
            Framing::Length(n) => Incoming::Length(n),
            Framing::Chunked => Incoming::Chunked(Decoder::default()),
            Framing::Close => Incoming::UntilClose,
        }
    }

    /// What the buffer holds of the body; its bytes stand at the buffer's front.
    pub(crate) fn next(&mut self, buffer: &mut Buffer) -> Result<Piece, BadChunk> {
        Ok(match self {
            Incoming::None => Piece { data: 0, consumed: 0, done: true },
            Incoming::Length(left) => {
                let n = usize::try_from(*left).unwrap_or(usize::MAX).min(buffer.len());
                *left -= n as u64;
                Piece { data: n, consumed: n, done: *left == 0 }
            }
            Incoming::Chunked(decoder) => {
                let decoded = decoder.decode(buffer.filled_mut())?;
                Piece { data: decoded.data, consumed: decoded.consumed, done: decoded.done }
            }
            Incoming::UntilClose => Piece { data: buffer.len(), consumed: buffer.len(), done: false },
        })
    }

    /// `n` bytes of a body of known length went past the buffer.
    pub(crate) fn passed(&mut self, n: u64) {
        if let Incoming::Length(left) = self {
            *left -= n;
        }
    }

    /// A body of known length has no byte left.
    pub(crate) fn is_through(&self) -> bool {
        matches!(self, Incoming::Length(0))
    }

    /// Whether the end of the connection is the end of the body.
    pub(crate) fn ends_at_close(&self) -> bool {
        matches!(self, Incoming::UntilClose)
    }

    /// Trailer lines of a chunked body, once it is done.
    pub(crate) fn trailers(&self) -> &[u8] {
        match self {
            Incoming::Chunked(decoder) => decoder.trailers(),
            _ => &[],
        }
    }

    /// Appends what stands before `piece` to `before`, and returns what follows it.
    pub(crate) fn frame(&self, chunked: bool, piece: Piece, before: &mut Vec<u8>, after: &mut Vec<u8>) {
        after.clear();
        if !chunked {
            return;
        }
        if piece.data > 0 {
            before.extend_from_slice(size_line(piece.data, &mut [0; 18]));
            after.extend_from_slice(b"\r\n");
        }
        if piece.done {
            after.extend_from_slice(b"0\r\n");
            after.extend_from_slice(self.trailers());
            after.extend_from_slice(b"\r\n");
        }
    }
}
