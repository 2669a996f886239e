//! Bytes both ways between two connections, each direction ended on its own.
//!
//! Small messages are read into a pooled buffer and written: two calls each. Who fills a buffer has more to
//! say, and goes through a pipe instead (`splice`), until what comes is small again. A silent relay
//! owns neither.

use std::cell::Cell;
use std::future::poll_fn;
use std::io;
use std::pin::Pin;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use tokio::io::AsyncWrite as _;

use crate::buffer::Buffer;
use crate::clock;
use crate::conn::Conn;
use crate::splice::{Splice, SpliceError};
use crate::timer::Timer;

/// Below this many bytes at once, copying costs less than two splices.
const SMALL: usize = 4 << 10;

/// So many small transfers in a row end splicing.
const SMALL_IN_A_ROW: u8 = 4;

/// Bytes moved before the other connections of the worker have their turn.
const TURN: usize = 512 << 10;

/// How a relay ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum End {
    /// Both directions have ended.
    Finished,
    /// Neither side spoke for too long.
    Idle,
    /// One side broke off; the other is reset when it is closed, lest it takes a part for the whole.
    Reset,
}

/// Relays until both directions have ended, one side breaks off, or neither speaks for `idle`.
/// `from_client` and `from_endpoint` are bytes already read. `count` is told how many bytes reached the
/// endpoint, and how many the client, since it was told last.
pub(crate) async fn run(
    client: &mut Conn,
    endpoint: &mut Conn,
    from_client: Buffer,
    from_endpoint: Buffer,
    timer: &mut Timer,
    idle: Duration,
    count: impl Fn(usize, usize),
) -> End {
    let mut up = Direction::new(from_client);
    let mut down = Direction::new(from_endpoint);
    let spoken = Cell::new(clock::now());
    loop {
        let relaying = poll_fn(|cx| {
            let more = up.poll(cx, client, endpoint)? | down.poll(cx, endpoint, client)?;
            let (sent, received) = (std::mem::take(&mut up.moved), std::mem::take(&mut down.moved));
            if sent + received > 0 {
                count(sent, received);
                spoken.set(clock::now());
            }
            if up.state == State::Done && down.state == State::Done {
                return Poll::Ready(io::Result::Ok(()));
            }
            if more {
                cx.waker().wake_by_ref();
            }
            Poll::Pending
        });
        // The deadline moves with every message; it is looked at only when an earlier one has passed.
        match timer.within(spoken.get() + idle, relaying).await {
            Ok(Ok(())) => return End::Finished,
            Ok(Err(_)) => {
                for conn in [client, endpoint] {
                    // Fails on a connection that is gone already.
                    let _ = conn.tcp().set_zero_linger();
                }
                return End::Reset;
            }
            Err(_) if spoken.get() + idle <= clock::now() => return End::Idle,
            Err(_) => {}
        }
    }
}

struct Direction {
    buffer: Buffer,
    splice: Splice,
    /// Small transfers in a row while splicing; `None` while copying.
    spliced: Option<u8>,
    state: State,
    /// Bytes that reached the destination and are not counted yet.
    moved: usize,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum State {
    Open,
    /// The source has ended, the destination does not know yet.
    Ended,
    /// The destination knows, or does not want to.
    Done,
}

impl Direction {
    fn new(buffer: Buffer) -> Direction {
        Direction { buffer, splice: Splice::new(), spliced: None, state: State::Open, moved: 0 }
    }

    /// Moves what can be moved. True if there may be more at once; an error if the source broke off.
    fn poll(&mut self, cx: &mut Context<'_>, from: &mut Conn, to: &mut Conn) -> io::Result<bool> {
        while self.state != State::Done {
            match self.step(cx, from, to) {
                Poll::Pending => return Ok(false),
                Poll::Ready(Ok(())) if self.moved < TURN => {}
                Poll::Ready(Ok(())) => return Ok(true),
                Poll::Ready(Err(Broken::Source(error))) => return Err(error),
                Poll::Ready(Err(Broken::Destination)) => {
                    // It takes no more, but what it has said may still be on its way to the source.
                    self.state = State::Done;
                    self.buffer = Buffer::new();
                    self.splice = Splice::new();
                }
            }
        }
        Ok(false)
    }

    fn step(&mut self, cx: &mut Context<'_>, from: &mut Conn, to: &mut Conn) -> Poll<Result<(), Broken>> {
        while !self.buffer.is_empty() {
            match ready!(Pin::new(&mut *to).poll_write(cx, self.buffer.filled())) {
                Ok(n) if n > 0 => {
                    self.buffer.consume(n);
                    self.moved += n;
                }
                _ => return Poll::Ready(Err(Broken::Destination)),
            }
        }
        if self.state == State::Ended {
            ready!(Pin::new(&mut *to).poll_shutdown(cx)).map_err(|_| Broken::Destination)?;
            self.state = State::Done;
            return Poll::Ready(Ok(()));
        }
        if let Some(small) = self.spliced
            && let (Conn::Plain(from), Conn::Plain(to)) = (&*from, &*to)
        {
            match ready!(self.splice.poll(cx, from, to, u64::MAX)) {
                Ok(0) => self.state = State::Ended,
                Ok(n) => {
                    self.moved += n;
                    let small = if n < SMALL { small.saturating_add(1) } else { 0 };
                    let goes_on = small < SMALL_IN_A_ROW || self.splice.held() > 0;
                    self.spliced = goes_on.then_some(small);
                }
                Err(SpliceError::NoPipe) => self.spliced = None,
                Err(SpliceError::Source(error)) => return Poll::Ready(Err(Broken::Source(error))),
                Err(SpliceError::Destination(error)) => {
                    tracing::debug!(%error, "one side takes no more");
                    return Poll::Ready(Err(Broken::Destination));
                }
            }
            return Poll::Ready(Ok(()));
        }
        ready!(Pin::new(&mut *to).poll_flush(cx)).map_err(|_| Broken::Destination)?;
        match ready!(from.poll_fill(cx, &mut self.buffer)).map_err(Broken::Source)? {
            0 => self.state = State::Ended,
            _ if self.buffer.room().is_empty() => {
                self.spliced = matches!((&*from, &*to), (Conn::Plain(_), Conn::Plain(_))).then_some(0);
            }
            _ => {}
        }
        Poll::Ready(Ok(()))
    }
}

enum Broken {
    Source(io::Error),
    Destination,
}
