//! A downstream HTTP/2 connection (RFC 9113): the `h2` crate speaks the
//! protocol, one task per stream carries the requests out. A stream may become a
//! tunnel for WebSocket (RFC 8441).

use std::cell::Cell;
use std::future::poll_fn;
use std::rc::Rc;
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::Bytes;
use h2::Reason;
use tokio::sync::Notify;
use tokio::time::Instant;

use crate::buffer::Buffer;
use crate::conn::Conn;
use crate::metrics::Breach;
use crate::timer::{Late, Timer};
use crate::worker::{Presence, Worker};

use super::client::Client;

mod plan;
mod source;
mod stream;
mod tunnel;
mod websocket;
mod wire;

use wire::{Frames, Wire};

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
    frames: Rc<Frames>,
    streams: Cell<usize>,
    /// Streams so far, and those of them that the client has reset.
    opened: Cell<u32>,
    reset: Cell<u32>,
    /// Told when the last stream has ended, when there is room for one again, and
    /// when the client has reset too many.
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
    let frames = Rc::new(Frames::new(limits.h2_control_frames));
    let handshake = h2::server::Builder::new()
        .initial_window_size(STREAM_WINDOW)
        .initial_connection_window_size(CONNECTION_WINDOW)
        .max_concurrent_streams(limits.h2_streams)
        .max_header_list_size(limits.header_bytes as u32)
        .max_send_buffer_size(SEND_BUFFER)
        .max_pending_accept_reset_streams(PENDING_RESETS)
        .max_local_error_reset_streams(Some(LOCAL_RESETS))
        .enable_connect_protocol()
        .handshake::<_, Bytes>(Wire { input, conn, frames: frames.clone() });
    let deadline = Instant::now() + worker.config.timeouts.header;
    let Ok(Ok(mut connection)) = timer.within(deadline, Box::pin(handshake)).await else { return };
    let shared = Rc::new(Http2::new(worker, client, frames));
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
            if shared.resets_too_many() {
                return Poll::Ready(Event::Breach(Breach::Resets));
            }
            if !ending && shared.worker.is_draining() {
                return Poll::Ready(Event::Drain);
            }
            presence.wake_on_drain(cx.waker());
            match poll_event(cx, &mut connection, full) {
                Poll::Pending if shared.frames.exceeded() => {
                    Poll::Ready(Event::Breach(Breach::ControlFrames))
                }
                event => event,
            }
        });
        let event = tokio::select! {
            biased;
            event = timer.within(deadline, next) => event,
            // The idle deadline starts over when the last stream ends.
            () = shared.changed.notified(), if !idle => continue,
        };
        match event {
            Ok(Event::Request((request, respond))) => {
                shared.stream_begins();
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
            Ok(Event::Breach(breach)) => {
                shared.worker.metrics.breached(breach);
                connection.abrupt_shutdown(Reason::ENHANCE_YOUR_CALM);
                let goodbye = poll_fn(|cx| connection.poll_closed(cx));
                // Whether the client hears of it is its own affair.
                let _ = timer.within(Instant::now() + GOODBYE, goodbye).await;
                return;
            }
            Ok(Event::Broken(error)) => {
                if error.is_go_away() && error.is_library() {
                    shared.worker.metrics.breached(match error.reason() {
                        Some(Reason::ENHANCE_YOUR_CALM) => Breach::Excess,
                        _ => Breach::Protocol,
                    });
                }
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
    /// The client has gone too far, by a count of ours.
    Breach(Breach),
    Broken(h2::Error),
    End,
}

fn poll_event(
    cx: &mut Context<'_>,
    connection: &mut h2::server::Connection<Wire, Bytes>,
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
    fn new(worker: Rc<Worker>, client: Client, frames: Rc<Frames>) -> Http2 {
        Http2 {
            worker,
            client,
            frames,
            streams: Cell::new(0),
            opened: Cell::new(0),
            reset: Cell::new(0),
            changed: Notify::new(),
        }
    }

    fn streams_limit(&self) -> usize {
        self.worker.config.limits.h2_streams as usize
    }

    fn stream_begins(&self) {
        self.streams.set(self.streams.get() + 1);
        self.opened.set(self.opened.get().saturating_add(1));
    }

    fn stream_ended(&self) {
        let left = self.streams.get() - 1;
        self.streams.set(left);
        if left == 0 || left + 1 == self.streams_limit() || self.resets_too_many() {
            self.changed.notify_one();
        }
    }

    /// The client has lost interest in a request that was under way.
    fn stream_was_reset(&self) {
        self.reset.set(self.reset.get().saturating_add(1));
    }

    /// Most of what the client asks for it does not want: rapid reset, at whatever pace.
    fn resets_too_many(&self) -> bool {
        let (opened, reset) = (self.opened.get(), self.reset.get());
        reset > self.worker.config.limits.h2_resets && reset > opened / 2
    }
}
