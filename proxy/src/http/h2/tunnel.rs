//! A stream that has become a tunnel (RFC 8441): bytes both ways, each direction
//! ended on its own. The rules are those of [`crate::http::tunnel`]; an orderly
//! end is END_STREAM here, anything else a reset (RFC 8441 section 5).

use std::future::poll_fn;
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use bytes::{Buf as _, Bytes};
use h2::{Reason, RecvStream, SendStream};
use tokio::io::AsyncWrite as _;
use tokio::time::Instant;

use crate::buffer::Buffer;
use crate::conn::Conn;
use crate::http::over_h2::poll_room;
use crate::timer::Timer;
use crate::upstream::Peer;
use crate::upstream::h2::Lease;

use super::Http2;
use super::wire::Frames;

/// Most bytes taken from an HTTP/1 endpoint at once: a frame.
const PIECE: usize = 16 << 10;

/// The client's stream.
pub(super) struct Near {
    pub(super) receive: RecvStream,
    pub(super) send: SendStream<Bytes>,
}

/// The endpoint's end.
pub(super) enum Far {
    /// A connection that has switched, and what was read behind its 101.
    Http1(Box<Peer>, Buffer),
    /// A stream; the lease keeps its place.
    Http2 { receive: RecvStream, send: SendStream<Bytes>, _lease: Lease },
}

/// One direction.
#[derive(Default)]
struct Pipe {
    /// Received and not yet passed on.
    pending: Bytes,
    /// Bytes to release once that has happened.
    held: usize,
    ended: bool,
    shut: bool,
}

/// One side has broken.
struct Broken;

/// Relays until both directions have ended, one breaks, or neither speaks for too long.
pub(super) async fn run(shared: &Http2, mut near: Near, mut far: Far, timer: &mut Timer) {
    let Http2 { worker, frames, .. } = shared;
    worker.metrics.tunnels_open.inc();
    let (mut up, mut down) = (Pipe::default(), Pipe::default());
    loop {
        let deadline = Instant::now() + worker.config.timeouts.tunnel;
        let moved = poll_fn(|cx| poll(cx, frames, &mut near, &mut far, &mut up, &mut down));
        match timer.within(deadline, moved).await {
            Ok(Ok(())) if !(up.shut && down.shut) => {}
            Ok(Ok(())) => break,
            _ => {
                near.send.send_reset(Reason::CANCEL);
                if let Far::Http2 { send, .. } = &mut far {
                    send.send_reset(Reason::CANCEL);
                }
                break;
            }
        }
    }
    worker.metrics.tunnels_open.dec();
}

/// `Ready` when something moved.
fn poll(
    cx: &mut Context<'_>,
    frames: &Frames,
    near: &mut Near,
    far: &mut Far,
    up: &mut Pipe,
    down: &mut Pipe,
) -> Poll<Result<(), Broken>> {
    let (first, second) = match far {
        Far::Http1(peer, buffer) => (
            up.poll_to_conn(cx, &mut near.receive, &mut peer.conn)?,
            down.poll_from_conn(cx, &mut peer.conn, buffer, &mut near.send)?,
        ),
        Far::Http2 { receive, send, .. } => {
            (up.poll_stream(cx, &mut near.receive, send)?, down.poll_stream(cx, receive, &mut near.send)?)
        }
    };
    if second.is_ready() {
        frames.sent(0);
    }
    // A client that has said all it had to say can still break off.
    if near.send.poll_reset(cx).is_ready() && !down.shut {
        return Poll::Ready(Err(Broken));
    }
    if first.is_ready() || second.is_ready() { Poll::Ready(Ok(())) } else { Poll::Pending }
}

impl Pipe {
    /// The next bytes of a stream into `pending`; its window opens again for
    /// those before. `Ready` when there are some, or it has ended.
    fn poll_receive(&mut self, cx: &mut Context<'_>, from: &mut RecvStream) -> Poll<Result<(), Broken>> {
        let held = std::mem::take(&mut self.held);
        if held > 0 {
            from.flow_control().release_capacity(held).map_err(|_| Broken)?;
        }
        match ready!(from.poll_data(cx)) {
            Some(Ok(data)) => {
                self.held = data.len();
                self.pending = data;
            }
            Some(Err(_)) => return Poll::Ready(Err(Broken)),
            None => self.ended = true,
        }
        Poll::Ready(Ok(()))
    }

    fn poll_to_conn(
        &mut self,
        cx: &mut Context<'_>,
        from: &mut RecvStream,
        to: &mut Conn,
    ) -> Poll<Result<(), Broken>> {
        self.poll_steps(|pipe| {
            if !pipe.pending.is_empty() {
                return match ready!(Pin::new(&mut *to).poll_write(cx, &pipe.pending)) {
                    Ok(n @ 1..) => {
                        pipe.pending.advance(n);
                        Poll::Ready(Ok(true))
                    }
                    Ok(0) | Err(_) => Poll::Ready(Err(Broken)),
                };
            }
            if pipe.ended {
                ready!(Pin::new(&mut *to).poll_shutdown(cx)).map_err(|_| Broken)?;
                pipe.shut = true;
                return Poll::Ready(Ok(true));
            }
            ready!(Pin::new(&mut *to).poll_flush(cx)).map_err(|_| Broken)?;
            pipe.poll_receive(cx, from).map_ok(|()| false)
        })
    }

    fn poll_from_conn(
        &mut self,
        cx: &mut Context<'_>,
        from: &mut Conn,
        buffer: &mut Buffer,
        to: &mut SendStream<Bytes>,
    ) -> Poll<Result<(), Broken>> {
        self.poll_steps(|pipe| {
            if !buffer.is_empty() {
                let room = ready!(poll_room(cx, to, buffer.len().min(PIECE))).ok_or(Broken)?;
                let piece = Bytes::copy_from_slice(&buffer.filled()[..room]);
                to.send_data(piece, false).map_err(|_| Broken)?;
                buffer.consume(room);
                return Poll::Ready(Ok(true));
            }
            buffer.release();
            if pipe.ended {
                return Poll::Ready(pipe.end(to));
            }
            pipe.ended = ready!(from.poll_fill(cx, buffer)).map_err(|_| Broken)? == 0;
            Poll::Ready(Ok(false))
        })
    }

    fn poll_stream(
        &mut self,
        cx: &mut Context<'_>,
        from: &mut RecvStream,
        to: &mut SendStream<Bytes>,
    ) -> Poll<Result<(), Broken>> {
        self.poll_steps(|pipe| {
            if !pipe.pending.is_empty() {
                let room = ready!(poll_room(cx, to, pipe.pending.len())).ok_or(Broken)?;
                let piece = pipe.pending.split_to(room);
                to.send_data(piece, false).map_err(|_| Broken)?;
                return Poll::Ready(Ok(true));
            }
            if pipe.ended {
                return Poll::Ready(pipe.end(to));
            }
            pipe.poll_receive(cx, from).map_ok(|()| false)
        })
    }

    /// Takes steps, which say whether they passed something on, until one has to
    /// wait. `Ready` when any did.
    fn poll_steps(
        &mut self,
        mut step: impl FnMut(&mut Pipe) -> Poll<Result<bool, Broken>>,
    ) -> Poll<Result<(), Broken>> {
        let mut moved = false;
        while !self.shut {
            match step(self)? {
                Poll::Ready(passed) => moved |= passed,
                Poll::Pending => break,
            }
        }
        if moved { Poll::Ready(Ok(())) } else { Poll::Pending }
    }

    fn end(&mut self, to: &mut SendStream<Bytes>) -> Result<bool, Broken> {
        self.shut = true;
        to.send_data(Bytes::new(), true).map(|()| true).map_err(|_| Broken)
    }
}
