//! Bytes from one socket to another without passing through this process:
//! `splice(2)` into a pipe and out of it again.
//!
//! Each worker thread keeps a free list of pipes. A [`Splice`] holds one only
//! while there are bytes in it, so thousands of transfers that wait for their
//! peers share few pipes.

use std::cell::{Cell, RefCell};
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::task::{Context, Poll, ready};

use rustix::pipe::{PipeFlags, SpliceFlags, pipe_with, splice};
use tokio::io::Interest;
use tokio::net::TcpStream;

/// Pipes of one worker, in use or free: beyond it bytes are copied. A user without privileges gets
/// pipes of full size only as long as all of them have fewer than 16,384 pages (`pipe-user-pages-soft`);
/// these have 16 each.
const PIPES: usize = 256;

/// Most bytes taken from a socket at once. A pipe of 16 slots holds 64 KiB of small segments, and more
/// if the segments lie in compound pages, as those of a fast sender do.
const BYTES_AT_ONCE: usize = 1 << 20;

thread_local! {
    static FREE: RefCell<Vec<Pipe>> = const { RefCell::new(Vec::new()) };
    static OPEN: Cell<usize> = const { Cell::new(0) };
}

/// One direction of a transfer. Dropping it drops what it holds.
pub(crate) struct Splice {
    /// There while `held > 0`.
    pipe: Option<Pipe>,
    /// Bytes taken from the source that the destination has not taken yet.
    held: usize,
}

/// Why nothing moved.
#[derive(Debug)]
pub(crate) enum SpliceError {
    /// Reading failed.
    Source(io::Error),
    /// Writing failed; what was held is lost.
    Destination(io::Error),
    /// This worker has no pipe left, and has taken nothing: copy instead.
    NoPipe,
}

impl Splice {
    pub(crate) fn new() -> Splice {
        Splice { pipe: None, held: 0 }
    }

    /// Bytes on their way. After `Pending` they say who is waited for: the destination if there are
    /// any, else the source.
    pub(crate) fn held(&self) -> usize {
        self.held
    }

    /// Moves bytes and says how many reached `to`; 0: `from` has ended, and nothing is held. At most
    /// `limit` (not 0), those already held included. After [`SpliceError::NoPipe`] it may be tried again.
    pub(crate) fn poll(
        &mut self,
        cx: &mut Context<'_>,
        from: &TcpStream,
        to: &TcpStream,
        limit: u64,
    ) -> Poll<Result<usize, SpliceError>> {
        if self.held == 0 {
            let limit = usize::try_from(limit).unwrap_or(usize::MAX).min(BYTES_AT_ONCE);
            debug_assert!(limit > 0);
            let Some((pipe, filled)) = ready!(fill(cx, from, limit))? else { return Poll::Ready(Ok(0)) };
            (self.pipe, self.held) = (Some(pipe), filled);
        }
        self.drain(cx, to)
    }

    fn drain(&mut self, cx: &mut Context<'_>, to: &TcpStream) -> Poll<Result<usize, SpliceError>> {
        let before = self.held;
        while let Some(pipe) = self.pipe.as_ref().filter(|_| self.held > 0) {
            match to.poll_write_ready(cx) {
                Poll::Ready(ready) => ready.map_err(SpliceError::Destination)?,
                Poll::Pending if self.held < before => break,
                Poll::Pending => return Poll::Pending,
            }
            let held = self.held;
            match to.try_io(Interest::WRITABLE, || transfer(&pipe.output, to, held)) {
                Ok(n) => self.held -= n.min(held),
                Err(error) if is_not_ready(&error) => {}
                Err(error) => return Poll::Ready(Err(SpliceError::Destination(error))),
            }
        }
        if self.held == 0
            && let Some(pipe) = self.pipe.take()
        {
            pipe.give_back();
        }
        Poll::Ready(Ok(before - self.held))
    }
}

/// Takes bytes from `from` into an empty pipe, so that `EAGAIN` can only mean that the socket has none.
/// `None` is its end.
fn fill(
    cx: &mut Context<'_>,
    from: &TcpStream,
    limit: usize,
) -> Poll<Result<Option<(Pipe, usize)>, SpliceError>> {
    loop {
        ready!(from.poll_read_ready(cx)).map_err(SpliceError::Source)?;
        let Some(pipe) = Pipe::take() else { return Poll::Ready(Err(SpliceError::NoPipe)) };
        let result = match from.try_io(Interest::READABLE, || transfer(from, &pipe.input, limit)) {
            Ok(0) => Ok(None),
            Ok(n) => return Poll::Ready(Ok(Some((pipe, n)))),
            Err(error) => Err(error),
        };
        pipe.give_back();
        match result {
            Ok(end) => return Poll::Ready(Ok(end)),
            Err(error) if is_not_ready(&error) => {}
            Err(error) => return Poll::Ready(Err(SpliceError::Source(error))),
        }
    }
}

fn transfer(from: impl AsFd, to: impl AsFd, bytes: usize) -> io::Result<usize> {
    let flags = SpliceFlags::NONBLOCK | SpliceFlags::MOVE;
    Ok(splice(from, None, to, None, bytes, flags)?)
}

/// tokio has taken note and waits for the next event, or nothing happened at all.
fn is_not_ready(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted)
}

/// Counted as open for as long as it lives.
struct Pipe {
    output: OwnedFd,
    input: OwnedFd,
}

impl Pipe {
    fn take() -> Option<Pipe> {
        FREE.with_borrow_mut(Vec::pop).or_else(Pipe::open)
    }

    fn open() -> Option<Pipe> {
        if OPEN.get() >= PIPES {
            return None;
        }
        // Fails for want of descriptors; copying needs none.
        let (output, input) = pipe_with(PipeFlags::NONBLOCK | PipeFlags::CLOEXEC).ok()?;
        OPEN.set(OPEN.get() + 1);
        Some(Pipe { output, input })
    }

    /// For the next transfer; it must be empty.
    fn give_back(self) {
        FREE.with_borrow_mut(|free| free.push(self));
    }
}

impl Drop for Pipe {
    fn drop(&mut self) {
        // A worker's thread that ends drops its free list after the count.
        let _ = OPEN.try_with(|open| open.set(open.get() - 1));
    }
}

#[cfg(test)]
mod tests {
    use std::future::poll_fn;

    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    use tokio::net::TcpListener;

    use super::*;

    async fn pair() -> (TcpStream, TcpStream) {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let near = TcpStream::connect(listener.local_addr().unwrap()).await.unwrap();
        (near, listener.accept().await.unwrap().0)
    }

    fn free() -> usize {
        FREE.with_borrow(Vec::len)
    }

    #[tokio::test]
    async fn moves_everything_up_to_the_limit_and_no_more() {
        const TOTAL: usize = 3 << 20;
        let ((mut sender, from), (to, mut receiver)) = (pair().await, pair().await);
        let bytes: Vec<u8> = (0..TOTAL + 100).map(|i| ((i * 31) >> 7) as u8).collect();
        let sent = bytes.clone();
        let sending = tokio::spawn(async move {
            sender.write_all(&sent).await.unwrap();
            sender
        });
        let receiving = tokio::spawn(async move {
            let mut received = vec![0; TOTAL];
            receiver.read_exact(&mut received).await.unwrap();
            (received, receiver)
        });
        let mut splice = Splice::new();
        let mut left = TOTAL as u64;
        while left > 0 {
            left -= poll_fn(|cx| splice.poll(cx, &from, &to, left)).await.unwrap() as u64;
        }
        let (received, mut receiver) = receiving.await.unwrap();
        assert!(received == bytes[..TOTAL], "bytes were lost or reordered");
        assert_eq!((splice.held(), free()), (0, 1), "the pipe is back");
        // What lies behind the limit is still in the socket.
        let mut rest = [0; 100];
        let mut from = from;
        from.read_exact(&mut rest).await.unwrap();
        assert_eq!(rest, bytes[TOTAL..]);
        drop((to, sending.await.unwrap()));
        assert_eq!(receiver.read(&mut rest).await.unwrap(), 0);
    }

    #[tokio::test]
    async fn tells_the_end_and_holds_no_pipe_while_it_waits() {
        let ((mut sender, from), (to, mut receiver)) = (pair().await, pair().await);
        let mut splice = Splice::new();
        let mut cx = Context::from_waker(std::task::Waker::noop());
        assert!(splice.poll(&mut cx, &from, &to, 10).is_pending());
        sender.write_all(b"last").await.unwrap();
        sender.shutdown().await.unwrap();
        assert_eq!(poll_fn(|cx| splice.poll(cx, &from, &to, 10)).await.unwrap(), 4);
        assert_eq!(poll_fn(|cx| splice.poll(cx, &from, &to, 10)).await.unwrap(), 0);
        assert_eq!((OPEN.get(), free()), (1, 1));
        let mut read = [0; 4];
        receiver.read_exact(&mut read).await.unwrap();
        assert_eq!(&read, b"last");
    }

    #[tokio::test]
    async fn a_destination_that_does_not_read_is_waited_for() {
        let ((mut sender, from), (to, receiver)) = (pair().await, pair().await);
        let sending = tokio::spawn(async move {
            // Ends when the transfer is given up.
            let _ = sender.write_all(&vec![0; 64 << 20]).await;
        });
        let mut splice = Splice::new();
        let mut moved = 0;
        // Until a fill finds no room in the destination for a while.
        while let Ok(n) = tokio::time::timeout(
            std::time::Duration::from_millis(200),
            poll_fn(|cx| splice.poll(cx, &from, &to, u64::MAX)),
        )
        .await
        {
            moved += n.unwrap();
        }
        assert!(moved > 0 && splice.held() > 0, "{moved} moved, {} held", splice.held());
        // A pipe with bytes in it is not used again.
        drop(splice);
        assert_eq!((OPEN.get(), free()), (0, 0));
        drop((from, receiver));
        sending.await.unwrap();
    }

    #[tokio::test]
    async fn a_destination_that_is_gone_is_told_from_a_source() {
        let ((mut sender, from), (to, receiver)) = (pair().await, pair().await);
        drop(receiver);
        let mut splice = Splice::new();
        let error = loop {
            sender.write_all(b"x").await.unwrap();
            if let Err(error) = poll_fn(|cx| splice.poll(cx, &from, &to, 1)).await {
                break error;
            }
        };
        assert!(matches!(error, SpliceError::Destination(_)), "{error:?}");
    }

    #[tokio::test]
    async fn without_a_pipe_nothing_is_taken() {
        let ((mut sender, mut from), (to, _receiver)) = (pair().await, pair().await);
        sender.write_all(b"kept").await.unwrap();
        OPEN.set(PIPES);
        let mut splice = Splice::new();
        let moved = poll_fn(|cx| splice.poll(cx, &from, &to, 10)).await;
        assert!(matches!(moved, Err(SpliceError::NoPipe)), "{moved:?}");
        OPEN.set(0);
        let mut read = [0; 4];
        from.read_exact(&mut read).await.unwrap();
        assert_eq!(&read, b"kept");
    }
}
