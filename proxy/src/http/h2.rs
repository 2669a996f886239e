//! A downstream HTTP/2 connection (RFC 9113): the `h2` crate speaks the
//! protocol, one task per stream carries the requests out. A stream may become a
//! tunnel for WebSocket (RFC 8441).

use std::cell::Cell;
use std::future::poll_fn;
use std::io;
use std::pin::Pin;
use std::rc::Rc;
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::Bytes;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::sync::Notify;
use tokio::time::Instant;

use crate::buffer::Buffer;
use crate::conn::Conn;
use crate::timer::{Late, Timer};
use crate::worker::{Presence, Worker};

use super::client::Client;

mod plan;
mod source;
mod stream;
mod tunnel;
mod websocket;

/// What a client may send on one stream before it has been passed on.
const STREAM_WINDOW: u32 = 128 << 10;

/// The same for all streams of a connection together.
const CONNECTION_WINDOW: u32 = 1 << 20;

/// Response bytes buffered per stream while the client grants no room.
const SEND_BUFFER: usize = 64 << 10;

/// Streams reset by the client before we accepted them (rapid reset, CVE-2023-44487).
const PENDING_RESETS: usize = 32;

/// Resets we were made to send (MadeYouReset, CVE-2025-8671).
const LOCAL_RESETS: usize = 256;

/// How long a connection stays open after GOAWAY once its last stream has ended.
const GOODBYE: Duration = Duration::from_secs(2);

/// Shared by the streams of one connection.
pub(crate) struct Http2 {
    pub(crate) worker: Rc<Worker>,
    pub(crate) client: Client,
    streams: Cell<usize>,
    /// Told when the last stream has ended, and when there is room for one again.
    changed: Notify,
}

/// Serves a connection until it ends. `input` was read already.
pub(crate) async fn serve(
    worker: Rc<Worker>,
    conn: Conn,
    client: Client,
    mut presence: Presence,
    input: Buffer,
) {
    let limits = &worker.config.limits;
    let mut timer = Timer::new(Instant::now() + worker.config.timeouts.header);
    let handshake = h2::server::Builder::new()
        .initial_window_size(STREAM_WINDOW)
        .initial_connection_window_size(CONNECTION_WINDOW)
        .max_concurrent_streams(limits.h2_streams)
        .max_header_list_size(limits.header_bytes as u32)
        .max_send_buffer_size(SEND_BUFFER)
        .max_pending_accept_reset_streams(PENDING_RESETS)
        .max_local_error_reset_streams(Some(LOCAL_RESETS))
        .enable_connect_protocol()
        .handshake::<_, Bytes>(Rewound { input, conn });
    let deadline = Instant::now() + worker.config.timeouts.header;
    let Ok(Ok(mut connection)) = timer.within(deadline, handshake).await else { return };
    let shared = Rc::new(Http2 { worker, client, streams: Cell::new(0), changed: Notify::new() });
    let mut ending = false;
    loop {
        let idle = shared.streams.get() == 0;
        let full = shared.streams.get() >= shared.streams_limit();
        let deadline = Instant::now()
            + match (ending, idle) {
                (true, true) => GOODBYE,
                (false, true) => shared.worker.config.timeouts.keep_alive,
                // Streams have deadlines of their own.
                (_, false) => shared.worker.config.timeouts.tunnel,
            };
        let next = poll_fn(|cx| {
            if !ending && shared.worker.is_draining() {
                return Poll::Ready(Event::Drain);
            }
            presence.wake_on_drain(cx.waker());
            poll_event(cx, &mut connection, full)
        });
        let event = tokio::select! {
            biased;
            event = timer.within(deadline, next) => event,
            // The idle deadline starts over when the last stream ends.
            () = shared.changed.notified(), if !idle => continue,
        };
        match event {
            Ok(Event::Request((request, respond))) => {
                shared.streams.set(shared.streams.get() + 1);
                tokio::task::spawn_local(stream::serve(shared.clone(), request, respond));
            }
            Ok(Event::Drain) => {
                ending = true;
                connection.graceful_shutdown();
            }
            Err(Late) if !ending && idle => {
                ending = true;
                connection.graceful_shutdown();
            }
            Err(Late) if !idle => {}
            Ok(Event::Broken(error)) => {
                tracing::debug!(%error, "HTTP/2 connection");
                return;
            }
            Ok(Event::End) | Err(Late) => return,
        }
    }
}

#[expect(
    clippy::large_enum_variant,
    reason = "lives for a moment on the stack; a box would be an allocation per request"
)]
enum Event {
    Request((http::Request<h2::RecvStream>, h2::server::SendResponse<Bytes>)),
    Drain,
    Broken(h2::Error),
    End,
}

fn poll_event(
    cx: &mut Context<'_>,
    connection: &mut h2::server::Connection<Rewound, Bytes>,
    full: bool,
) -> Poll<Event> {
    if full {
        // A stream the client has reset still occupies us for a moment: who resets
        // faster than we let go has its streams wait, and their resets counted.
        return connection.poll_closed(cx).map(|end| end.map_or_else(Event::Broken, |()| Event::End));
    }
    connection.poll_accept(cx).map(|accepted| match accepted {
        Some(Ok(accepted)) => Event::Request(accepted),
        Some(Err(error)) => Event::Broken(error),
        None => Event::End,
    })
}

impl Http2 {
    fn streams_limit(&self) -> usize {
        self.worker.config.limits.h2_streams as usize
    }

    fn stream_ended(&self) {
        let left = self.streams.get() - 1;
        self.streams.set(left);
        if left == 0 || left + 1 == self.streams_limit() {
            self.changed.notify_one();
        }
    }
}

/// A connection whose first bytes were read to recognise the protocol.
struct Rewound {
    input: Buffer,
    conn: Conn,
}

impl AsyncRead for Rewound {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        if self.input.is_empty() {
            return Pin::new(&mut self.conn).poll_read(cx, buf);
        }
        let n = self.input.len().min(buf.remaining());
        buf.put_slice(&self.input.filled()[..n]);
        self.input.consume(n);
        self.input.release();
        Poll::Ready(Ok(()))
    }
}

impl AsyncWrite for Rewound {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.conn).poll_write(cx, buf)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.conn).poll_write_vectored(cx, bufs)
    }

    fn is_write_vectored(&self) -> bool {
        self.conn.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.conn).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.conn).poll_shutdown(cx)
    }
}
