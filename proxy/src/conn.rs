//! One byte stream, plaintext or TLS, towards a client or an endpoint.

use std::future::Future as _;
use std::io;
use std::pin::{Pin, pin};
use std::task::{Context, Poll, Waker, ready};

use tokio::io::{AsyncRead, AsyncWrite, Interest, ReadBuf};
use tokio::net::TcpStream;
use tokio_rustls::TlsStream;

use crate::buffer::Buffer;

/// A connection. An enum rather than a type parameter: the engine is compiled
/// once, and the branch is always predicted.
pub(crate) enum Conn {
    Plain(TcpStream),
    Tls(Box<TlsStream<TcpStream>>),
}

impl Conn {
    pub(crate) fn tcp(&self) -> &TcpStream {
        match self {
            Conn::Plain(tcp) => tcp,
            Conn::Tls(tls) => tls.get_ref().0,
        }
    }

    /// Ready when a read would not wait, without needing a buffer to try it.
    pub(crate) fn poll_readable(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match self {
            Conn::Plain(tcp) => tcp.poll_read_ready(cx),
            Conn::Tls(tls) => {
                // rustls hands out what it has decrypted before asking the socket.
                let (tcp, session) = tls.get_mut();
                if session.wants_read() { tcp.poll_read_ready(cx) } else { Poll::Ready(Ok(())) }
            }
        }
    }

    /// Ready when the peer has sent something, an end or a reset; true if it
    /// was a reset, or both directions have ended (`EPOLLHUP`): nobody is there
    /// to be written to. Asks the reactor, not the kernel.
    pub(crate) fn poll_hangup(&mut self, cx: &mut Context<'_>) -> Poll<bool> {
        let tcp = self.tcp();
        if ready!(tcp.poll_read_ready(cx)).is_err() {
            return Poll::Ready(true);
        }
        // Known already, so this never waits; what to look for decides which flags it shows.
        let flags = pin!(tcp.ready(Interest::READABLE | Interest::WRITABLE));
        let flags = flags.poll(&mut Context::from_waker(Waker::noop()));
        Poll::Ready(matches!(flags, Poll::Ready(Ok(flags)) if flags.is_write_closed()))
    }

    /// Reads into the buffer's room; 0 is the end of the stream. An empty
    /// buffer owns storage only while there is something to put into it.
    pub(crate) fn poll_fill(&mut self, cx: &mut Context<'_>, buffer: &mut Buffer) -> Poll<io::Result<usize>> {
        if !buffer.has_storage() {
            ready!(self.poll_readable(cx))?;
            buffer.acquire();
        }
        let mut into = ReadBuf::new(buffer.room());
        match Pin::new(&mut *self).poll_read(cx, &mut into) {
            Poll::Pending => {
                buffer.release();
                Poll::Pending
            }
            Poll::Ready(Err(error)) => Poll::Ready(Err(error)),
            Poll::Ready(Ok(())) => {
                let n = into.filled().len();
                buffer.advance(n);
                Poll::Ready(Ok(n))
            }
        }
    }

    /// Writes all parts in order, in as few calls as the socket takes, and flushes.
    pub(crate) fn send(&mut self, mut parts: [&[u8]; 3]) -> impl Future<Output = io::Result<()>> {
        std::future::poll_fn(move |cx| self.poll_send(cx, &mut parts))
    }

    /// As [`Conn::send`]; `parts` keep what is still to be written.
    pub(crate) fn poll_send(&mut self, cx: &mut Context<'_>, parts: &mut [&[u8]; 3]) -> Poll<io::Result<()>> {
        while let Some(first) = parts.iter().position(|p| !p.is_empty()) {
            let written = match &parts[first + 1..] {
                rest if rest.iter().all(|p| p.is_empty()) => {
                    ready!(Pin::new(&mut *self).poll_write(cx, parts[first]))?
                }
                _ => {
                    let slices = parts.map(io::IoSlice::new);
                    ready!(Pin::new(&mut *self).poll_write_vectored(cx, &slices[first..]))?
                }
            };
            if written == 0 {
                return Poll::Ready(Err(io::ErrorKind::WriteZero.into()));
            }
            skip(parts, written);
        }
        Pin::new(&mut *self).poll_flush(cx)
    }

    /// Whether a pooled connection can carry another request. Costs no syscall
    /// unless the reactor has already seen bytes or an end on it.
    pub(crate) fn is_reusable(&mut self) -> bool {
        let mut byte = [0];
        match self {
            Conn::Plain(tcp) => {
                matches!(tcp.try_read(&mut byte), Err(e) if e.kind() == io::ErrorKind::WouldBlock)
            }
            // Session tickets may arrive while idle: rustls must see them, and only
            // application data or an end makes the connection unfit.
            Conn::Tls(tls) => {
                let mut cx = Context::from_waker(Waker::noop());
                Pin::new(tls.as_mut()).poll_read(&mut cx, &mut ReadBuf::new(&mut byte)).is_pending()
            }
        }
    }
}

fn skip(parts: &mut [&[u8]; 3], mut written: usize) {
    for part in parts {
        let n = written.min(part.len());
        *part = &part[n..];
        written -= n;
    }
}

macro_rules! forward {
    ($self:ident, $io:ident => $call:expr) => {
        match $self.get_mut() {
            Conn::Plain(tcp) => {
                let $io = Pin::new(tcp);
                $call
            }
            Conn::Tls(tls) => {
                let $io = Pin::new(tls.as_mut());
                $call
            }
        }
    };
}

impl AsyncRead for Conn {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        forward!(self, io => io.poll_read(cx, buf))
    }
}

impl AsyncWrite for Conn {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        forward!(self, io => io.poll_write(cx, buf))
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        forward!(self, io => io.poll_write_vectored(cx, bufs))
    }

    fn is_write_vectored(&self) -> bool {
        true
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        forward!(self, io => io.poll_flush(cx))
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        forward!(self, io => io.poll_shutdown(cx))
    }
}
