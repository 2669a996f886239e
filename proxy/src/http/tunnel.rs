//! An upgraded connection: bytes both ways, each direction ended on its own.
//! A silent tunnel owns no buffer.

use std::future::poll_fn;
use std::io;
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use tokio::io::AsyncWrite as _;
use tokio::time::Instant;

use crate::buffer::Buffer;
use crate::conn::Conn;
use crate::timer::Timer;
use crate::upstream::Peer;
use crate::worker::Worker;

/// One direction.
struct Pipe {
    buffer: Buffer,
    ended: bool,
    shut: bool,
}

/// Relays until both directions have ended, one breaks, or neither speaks for too long.
/// `from_client` and `from_endpoint` are bytes already read.
pub(crate) async fn run(
    worker: &Worker,
    mut client: Conn,
    mut peer: Peer,
    from_client: Buffer,
    from_endpoint: Buffer,
    mut timer: Timer,
) {
    worker.metrics.tunnels_open.inc();
    let endpoint = &mut peer.conn;
    let mut up = Pipe { buffer: from_client, ended: false, shut: false };
    let mut down = Pipe { buffer: from_endpoint, ended: false, shut: false };
    loop {
        let deadline = Instant::now() + worker.config.timeouts.tunnel;
        let moved = poll_fn(|cx| {
            let first = up.poll(cx, &mut client, endpoint)?;
            let second = down.poll(cx, endpoint, &mut client)?;
            match first.is_ready() || second.is_ready() {
                true => Poll::Ready(io::Result::Ok(())),
                false => Poll::Pending,
            }
        });
        match timer.within(deadline, moved).await {
            Ok(Ok(())) if !(up.shut && down.shut) => {}
            _ => break,
        }
    }
    worker.metrics.tunnels_open.dec();
}

impl Pipe {
    /// `Ready` when something moved.
    fn poll(&mut self, cx: &mut Context<'_>, from: &mut Conn, to: &mut Conn) -> Poll<io::Result<()>> {
        if self.shut {
            return Poll::Pending;
        }
        let mut moved = false;
        loop {
            while !self.buffer.is_empty() {
                match Pin::new(&mut *to).poll_write(cx, self.buffer.filled())? {
                    Poll::Ready(0) => return Poll::Ready(Err(io::ErrorKind::WriteZero.into())),
                    Poll::Ready(n) => self.buffer.consume(n),
                    Poll::Pending => return progress(moved),
                }
                moved = true;
            }
            if self.ended {
                ready!(Pin::new(&mut *to).poll_shutdown(cx))?;
                self.shut = true;
                return Poll::Ready(Ok(()));
            }
            if Pin::new(&mut *to).poll_flush(cx)?.is_pending() {
                return progress(moved);
            }
            match from.poll_fill(cx, &mut self.buffer)? {
                Poll::Ready(0) => self.ended = true,
                Poll::Ready(_) => {}
                Poll::Pending => return progress(moved),
            }
        }
    }
}

fn progress(moved: bool) -> Poll<io::Result<()>> {
    if moved { Poll::Ready(Ok(())) } else { Poll::Pending }
}
