//! The bytes below the `h2` crate, and a count of the frames in them: it bounds
//! what frames may hold in memory, but not how many that carry nothing it is
//! made to read (CVE-2019-9512, -9513, -9515 and their kin).

use std::cell::{Cell, RefCell};
use std::io;
use std::pin::Pin;
use std::rc::Rc;
use std::task::{Context, Poll, ready};

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

use crate::buffer::Buffer;
use crate::clock;
use crate::conn::Conn;

/// What a frame begins with (RFC 9113 section 4.1), and a connection (section 3.4).
const FRAME_HEADER: usize = 9;
const PREFACE: u32 = 24;

/// Frames that carry nothing which a request, or a piece of its body, makes up for.
/// Clients open a window twice for each piece of a response, and some rank each request.
const PER_USEFUL_FRAME: u32 = 4;

/// The same for each piece of a response body, and so many bytes of it: some
/// clients open their windows again for every frame.
const PER_PIECE: usize = 4;
const PER_BYTES: usize = 4096;

/// What passing time makes up for, in frames each second: pings of a quiet connection.
const PER_SECOND: u64 = 10;

/// Counts frames that carry nothing against those that do.
pub(super) struct Frames {
    /// How many may come that nothing makes up for.
    limit: u32,
    left: Cell<u32>,
    /// When time was last counted in, in milliseconds of [`clock::now_ms`].
    refilled: Cell<u64>,
    /// Bytes to pass over before the next frame begins.
    skip: Cell<u32>,
    /// The part of a frame header that has come.
    header: RefCell<([u8; FRAME_HEADER], usize)>,
    exceeded: Cell<bool>,
}

impl Frames {
    pub(super) fn new(limit: u32) -> Frames {
        Frames {
            limit,
            left: Cell::new(limit),
            refilled: Cell::new(clock::now_ms()),
            skip: Cell::new(PREFACE),
            header: RefCell::new(([0; FRAME_HEADER], 0)),
            exceeded: Cell::new(false),
        }
    }

    /// There were too many that carry nothing. Nothing more is read then.
    pub(super) fn exceeded(&self) -> bool {
        self.exceeded.get()
    }

    fn saw(&self, mut bytes: &[u8]) {
        let mut partial = self.header.borrow_mut();
        loop {
            let skipped = bytes.len().min(self.skip.get() as usize);
            self.skip.set(self.skip.get() - skipped as u32);
            bytes = &bytes[skipped..];
            if bytes.is_empty() {
                return;
            }
            let (header, have) = &mut *partial;
            let taken = bytes.len().min(FRAME_HEADER - *have);
            header[*have..*have + taken].copy_from_slice(&bytes[..taken]);
            bytes = &bytes[taken..];
            *have += taken;
            if *have < FRAME_HEADER {
                return;
            }
            *have = 0;
            let length = u32::from_be_bytes([0, header[0], header[1], header[2]]);
            self.skip.set(length);
            self.count(header[3], header[4], length);
        }
    }

    fn count(&self, kind: u8, flags: u8, length: u32) {
        const DATA: u8 = 0;
        const HEADERS: u8 = 1;
        const END_STREAM: u8 = 1;
        let useful = match kind {
            DATA => length > 0 || flags & END_STREAM != 0,
            // The `h2` crate bounds how many headers, and bodies in crumbs, it takes.
            _ => kind == HEADERS,
        };
        if useful {
            return self.earn(PER_USEFUL_FRAME);
        }
        if self.left.get() == 0 {
            let now = clock::now_ms();
            let earned = now.saturating_sub(self.refilled.replace(now)) * PER_SECOND / 1000;
            self.earn(earned.min(u64::from(self.limit)) as u32);
        }
        match self.left.get() {
            0 => self.exceeded.set(true),
            left => self.left.set(left - 1),
        }
    }

    /// A piece of a response body was sent.
    pub(super) fn sent(&self, bytes: usize) {
        self.earn((PER_PIECE + bytes / PER_BYTES) as u32);
    }

    fn earn(&self, frames: u32) {
        self.left.set(self.left.get().saturating_add(frames).min(self.limit));
    }
}

/// The bytes of a connection. What the `h2` crate writes, a frame of a response body at
/// a time, is gathered here, so that all that is ready leaves in one TLS record
/// and one call: whoever polls the connection calls [`Line::poll_send`] after it.
pub(super) struct Line {
    conn: Conn,
    /// Read to recognise the protocol, and not yet handed on.
    input: Buffer,
    output: Buffer,
    frames: Rc<Frames>,
}

impl Line {
    /// Sends what was gathered.
    pub(super) fn poll_send(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        if self.output.is_empty() {
            return Poll::Ready(Ok(()));
        }
        while !self.output.is_empty() {
            match ready!(Pin::new(&mut self.conn).poll_write(cx, self.output.filled()))? {
                0 => return Poll::Ready(Err(io::ErrorKind::WriteZero.into())),
                written => self.output.consume(written),
            }
        }
        self.output.release();
        Pin::new(&mut self.conn).poll_flush(cx)
    }

    fn poll_read(&mut self, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        if self.frames.exceeded() {
            // Whoever polls the connection looks at this next.
            return Poll::Pending;
        }
        let before = buf.filled().len();
        if self.input.is_empty() {
            ready!(Pin::new(&mut self.conn).poll_read(cx, buf))?;
        } else {
            let n = self.input.len().min(buf.remaining());
            buf.put_slice(&self.input.filled()[..n]);
            self.input.consume(n);
            self.input.release();
        }
        self.frames.saw(&buf.filled()[before..]);
        Poll::Ready(Ok(()))
    }

    /// Takes what there is room for; sends only when there is none.
    fn poll_write(&mut self, cx: &mut Context<'_>, bufs: &[io::IoSlice<'_>]) -> Poll<io::Result<usize>> {
        let wanted = bufs.iter().map(|buf| buf.len()).sum();
        self.output.acquire();
        if self.output.room().len() < wanted {
            ready!(self.poll_send(cx))?;
            self.output.acquire();
        }
        let mut taken = 0;
        for buf in bufs {
            let room = self.output.room();
            let n = buf.len().min(room.len());
            room[..n].copy_from_slice(&buf[..n]);
            self.output.advance(n);
            taken += n;
        }
        Poll::Ready(Ok(taken))
    }
}

/// A [`Line`] in the hands of the `h2` crate.
pub(super) struct Wire(pub(super) Rc<RefCell<Line>>);

impl Wire {
    pub(super) fn new(conn: Conn, input: Buffer, frames: Rc<Frames>) -> Wire {
        Wire(Rc::new(RefCell::new(Line { conn, input, output: Buffer::new(), frames })))
    }
}

impl AsyncRead for Wire {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        self.0.borrow_mut().poll_read(cx, buf)
    }
}

impl AsyncWrite for Wire {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        self.0.borrow_mut().poll_write(cx, &[io::IoSlice::new(buf)])
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        self.0.borrow_mut().poll_write(cx, bufs)
    }

    fn is_write_vectored(&self) -> bool {
        true
    }

    /// Nothing yet: more may be ready to go with it.
    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let mut line = self.0.borrow_mut();
        ready!(line.poll_send(cx))?;
        Pin::new(&mut line.conn).poll_shutdown(cx)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn frame(kind: u8, flags: u8, payload: usize) -> Vec<u8> {
        let length = (payload as u32).to_be_bytes();
        let mut bytes = vec![length[1], length[2], length[3], kind, flags, 0, 0, 0, 1];
        bytes.resize(FRAME_HEADER + payload, 0);
        bytes
    }

    #[test]
    fn frames_are_told_apart_however_they_come() {
        let mut bytes = vec![0; PREFACE as usize];
        for (kind, payload) in [(4, 18), (1, 30), (0, 5), (6, 8), (8, 4), (2, 5), (99, 300), (0, 0)] {
            bytes.extend(frame(kind, 0, payload));
        }
        for piece in [1, 2, 7, 9, 10, 64, bytes.len()] {
            let frames = Frames::new(100);
            bytes.chunks(piece).for_each(|piece| frames.saw(piece));
            // SETTINGS, then HEADERS and DATA which make up for it, then five that carry nothing.
            assert_eq!(frames.left.get(), 95, "in pieces of {piece}");
            assert_eq!(frames.skip.get(), 0);
        }
    }

    #[test]
    fn what_is_useful_makes_up_for_what_is_not() {
        let frames = Frames::new(10);
        frames.saw(&[0; PREFACE as usize]);
        for _ in 0..1000 {
            frames.saw(&frame(1, 0, 20));
            (0..PER_USEFUL_FRAME).for_each(|_| frames.saw(&frame(8, 0, 4)));
        }
        assert!(!frames.exceeded());
        // Time earns nothing here.
        frames.refilled.set(u64::MAX);
        for _ in 0..frames.left.get() {
            frames.saw(&frame(8, 0, 4));
        }
        assert!(!frames.exceeded());
        frames.sent(PER_BYTES);
        for _ in 0..PER_PIECE + 1 {
            frames.saw(&frame(6, 0, 8));
        }
        assert!(!frames.exceeded());
        frames.saw(&frame(6, 0, 8));
        assert!(frames.exceeded());
    }
}
