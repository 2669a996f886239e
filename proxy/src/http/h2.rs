//! A downstream HTTP/2 connection (RFC 9113): the `h2` crate speaks the
//! protocol, a task for each stream under way carries its request out. A stream
//! may become a tunnel for WebSocket (RFC 8441).
//!
//! What bounds a hostile client: the windows, and the send buffer of a stream,
//! bound bytes; the limits below and in [`crate::config::Limits`] bound what costs
//! work without bytes; deadlines bound time. Going too far is counted by
//! [`crate::metrics::Breach`].

use std::cell::{Cell, RefCell};
use std::future::{Future as _, poll_fn};
use std::rc::Rc;
use std::task::{Context, Poll, Waker};
use std::time::Duration;

use bytes::Bytes;
use h2::Reason;
use tokio::time::Instant;

use crate::buffer::Buffer;
use crate::conn::Conn;
use crate::metrics::Breach;
use crate::timer::{Late, Timer};
use crate::worker::{Presence, Worker};

use super::client::Client;

mod plan;
mod runner;
mod source;
mod stream;
mod tunnel;
mod websocket;
mod wire;

use runner::Work;
use wire::{Frames, Line, Wire};

/// What a client may send on one stream before it has been passed on.
const STREAM_WINDOW: u32 = 128 << 10;

/// The same for all streams of a connection together.
const CONNECTION_WINDOW: u32 = 1 << 20;

/// Response bytes that the `h2` crate buffers per stream, at most: four frames
/// keep a fast client busy, and a client that grants everything and reads
/// nothing holds no more than this of each stream.
const SEND_BUFFER: usize = 64 << 10;

/// Streams the client has reset before they had a task (rapid reset,
/// CVE-2023-44487). More than come in one read of honest cancelling; those with
/// a task count towards [`crate::config::Limits::h2_resets`].
const PENDING_RESETS: usize = 32;

/// Resets we were made to send (MadeYouReset, CVE-2025-8671), and streams refused
/// for being too many. Some clients open as many as they like before they have
/// read our limit: about twice that is let pass. The stream that breaks this limit is
/// in the crate's table too, which then has 256 places: one more, and it would have 512.
const LOCAL_RESETS: usize = 255;

/// How long a connection stays open after GOAWAY once its last stream has ended.
const GOODBYE: Duration = Duration::from_secs(2);

type Connection = h2::server::Connection<Wire, Bytes>;

/// Shared by the streams of one connection.
pub(crate) struct Http2 {
    pub(crate) worker: Rc<Worker>,
    pub(crate) client: Client,
    frames: Rc<Frames>,
    streams: Cell<usize>,
    /// Streams so far, and those of them that the client has reset.
    opened: Cell<u32>,
    reset: Cell<u32>,
    /// The connection's task: woken when the last stream has ended, when there is
    /// room for one again, and when the client has reset too many.
    waker: RefCell<Option<Waker>>,
}

/// Serves a connection until it ends. `input` was read already.
pub(crate) async fn serve(
    worker: Rc<Worker>,
    conn: Conn,
    client: Client,
    mut presence: Presence,
    input: Buffer,
) {
    let mut timer = Timer::new(Instant::now() + worker.config.timeouts.header);
    let frames = Rc::new(Frames::new(worker.config.limits.h2_control_frames));
    let wire = Wire::new(conn, input, frames.clone());
    let line = wire.0.clone();
    let Some(mut connection) = handshake(&worker, wire, &mut timer).await else { return };
    let shared = Rc::new(Http2::new(worker, client, frames));
    let mut ending = false;
    loop {
        let idle = shared.is_idle();
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
            shared.watch(cx.waker());
            let event = poll_event(cx, &mut connection, &shared);
            match line.borrow_mut().poll_send(cx) {
                _ if event.is_ready() => event,
                Poll::Ready(Err(_)) => Poll::Ready(Event::End),
                // Another deadline holds from here on.
                _ if idle != shared.is_idle() => Poll::Ready(Event::Turn),
                _ => Poll::Pending,
            }
        });
        match timer.within(deadline, next).await {
            Ok(Event::Turn) => {}
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
                return hang_up(&mut connection, &line, &mut timer).await;
            }
            Ok(Event::Broken(error)) => return shared.broken(&error),
            Ok(Event::End) | Err(Late) => return,
        }
    }
}

/// The client's preface, and ours. `None`: it did not come.
async fn handshake(worker: &Worker, wire: Wire, timer: &mut Timer) -> Option<Connection> {
    let limits = &worker.config.limits;
    let line = wire.0.clone();
    let handshake = h2::server::Builder::new()
        .initial_window_size(STREAM_WINDOW)
        .initial_connection_window_size(CONNECTION_WINDOW)
        .max_concurrent_streams(limits.h2_streams)
        .max_header_list_size(limits.header_bytes as u32)
        .max_send_buffer_size(SEND_BUFFER)
        .max_pending_accept_reset_streams(PENDING_RESETS)
        .max_local_error_reset_streams(Some(LOCAL_RESETS))
        .enable_connect_protocol()
        .handshake::<_, Bytes>(wire);
    // Boxed, as it is large and over soon.
    let mut handshake = Box::pin(handshake);
    let handshake = poll_fn(move |cx| {
        let done = handshake.as_mut().poll(cx);
        // An error will show when the client's preface does not come.
        let _ = line.borrow_mut().poll_send(cx);
        done
    });
    let deadline = Instant::now() + worker.config.timeouts.header;
    timer.within(deadline, handshake).await.ok()?.ok()
}

/// Ends a connection whose client has gone too far.
async fn hang_up(connection: &mut Connection, line: &RefCell<Line>, timer: &mut Timer) {
    connection.abrupt_shutdown(Reason::ENHANCE_YOUR_CALM);
    let goodbye = poll_fn(|cx| {
        let closed = connection.poll_closed(cx);
        let _ = line.borrow_mut().poll_send(cx);
        closed
    });
    // Whether the client hears of it is its own affair.
    let _ = timer.within(Instant::now() + GOODBYE, goodbye).await;
}

enum Event {
    /// The first stream has begun, or the last one ended.
    Turn,
    Drain,
    /// The client has gone too far, by a count of ours.
    Breach(Breach),
    Broken(h2::Error),
    End,
}

/// Gives every stream that has come to a task.
fn poll_event(cx: &mut Context<'_>, connection: &mut Connection, shared: &Rc<Http2>) -> Poll<Event> {
    while shared.streams.get() < shared.streams_limit() {
        match connection.poll_accept(cx) {
            Poll::Ready(Some(Ok((request, respond)))) => {
                shared.stream_begins();
                runner::serve(Work { shared: shared.clone(), request, respond });
            }
            Poll::Ready(Some(Err(error))) => return Poll::Ready(Event::Broken(error)),
            Poll::Ready(None) => return Poll::Ready(Event::End),
            Poll::Pending => return poll_breach(shared),
        }
    }
    // A stream the client has reset still occupies us for a moment: who resets
    // faster than we let go has its streams wait, and their resets counted.
    match connection.poll_closed(cx) {
        Poll::Pending => poll_breach(shared),
        Poll::Ready(end) => Poll::Ready(end.map_or_else(Event::Broken, |()| Event::End)),
    }
}

fn poll_breach(shared: &Http2) -> Poll<Event> {
    match shared.frames.exceeded() {
        true => Poll::Ready(Event::Breach(Breach::ControlFrames)),
        false => Poll::Pending,
    }
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
            waker: RefCell::default(),
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
            self.waker.borrow().iter().for_each(Waker::wake_by_ref);
        }
    }

    fn is_idle(&self) -> bool {
        self.streams.get() == 0
    }

    fn watch(&self, waker: &Waker) {
        let mut watching = self.waker.borrow_mut();
        if !watching.as_ref().is_some_and(|w| w.will_wake(waker)) {
            *watching = Some(waker.clone());
        }
    }

    /// The connection has failed, and if that was the client's doing, it is counted.
    fn broken(&self, error: &h2::Error) {
        if error.is_go_away() && error.is_library() {
            self.worker.metrics.breached(match error.reason() {
                Some(Reason::ENHANCE_YOUR_CALM) => Breach::Excess,
                _ => Breach::Protocol,
            });
        }
        tracing::debug!(%error, "HTTP/2 connection");
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
