//! HTTP/2 connections to an endpoint, shared by all requests of one worker.

use std::cell::{Cell, RefCell};
use std::future::poll_fn;
use std::io;
use std::rc::Rc;
use std::task::{Context, Poll, Waker};
use std::time::Duration;

use bytes::Bytes;
use h2::client::SendRequest;
use h2::{Ping, PingPong};
use socket2::SockRef;
use tokio::sync::Notify;

use crate::clock;
use crate::http::exchange::RESPONSE_HEAD_BYTES;
use crate::metrics::Limit;
use crate::resilience::Breaker;

use super::{InFlight, NoConnection, Upstream, Upstreams};

/// Streams on one connection before another is opened, whatever the endpoint allows.
const STREAMS: usize = 100;

/// What an endpoint may send on one stream before we have passed it on.
const STREAM_WINDOW: u32 = 128 << 10;

/// Enough for every stream to be full: a client that does not read must not
/// hold up the others that share the connection.
const CONNECTION_WINDOW: u32 = STREAM_WINDOW * STREAMS as u32;

/// How long the kernel tries to deliver before it gives up a connection. One
/// to a node that vanished would otherwise take requests for a quarter of an hour.
const UNACKNOWLEDGED: Duration = Duration::from_secs(20);

/// The open connections to one endpoint.
pub(crate) struct Shared {
    connections: RefCell<Vec<Rc<Connection>>>,
    /// Somebody is opening one; the others wait for it.
    connecting: Cell<bool>,
    /// Attempts that failed, so that those who waited for one know.
    failures: Cell<u64>,
    changed: Notify,
    /// Streams the endpoint allowed last: a new connection is used before it says so again.
    allowed: Cell<usize>,
}

impl Default for Shared {
    fn default() -> Shared {
        Shared {
            connections: RefCell::default(),
            connecting: Cell::new(false),
            failures: Cell::new(0),
            changed: Notify::new(),
            allowed: Cell::new(STREAMS),
        }
    }
}

struct Connection {
    send: RefCell<SendRequest<Bytes>>,
    streams: Cell<usize>,
    closed: Cell<bool>,
    /// When the last stream ended, in milliseconds of [`clock::now_ms`].
    idle_since: Cell<u64>,
    settings: Settings,
}

/// Whether the endpoint's SETTINGS have come. They are the first it sends
/// (RFC 9113 section 3.4), so whatever it answers comes after them.
#[derive(Default)]
struct Settings {
    known: Cell<bool>,
    /// `None`: somebody is asking; the others wait for the answer.
    pings: RefCell<Option<PingPong>>,
    changed: Notify,
}

/// The turn to ask; whoever waits for it learns of its end.
struct Asking<'s>(&'s Settings, Option<PingPong>);

impl Drop for Asking<'_> {
    fn drop(&mut self) {
        *self.0.pings.borrow_mut() = self.1.take();
        self.0.changed.notify_waiters();
    }
}

impl Settings {
    /// Waits until they are there, or never will be. The caller bounds the time.
    async fn arrived(&self) {
        while !self.known.get() {
            let Some(pings) = self.pings.borrow_mut().take() else {
                self.changed.notified().await;
                continue;
            };
            let mut asking = Asking(self, Some(pings));
            let Asking(_, Some(pings)) = &mut asking else { return };
            // Refused while the ping of one who gave up is still under way: its answer will do.
            let _ = pings.send_ping(Ping::opaque());
            // An error is the end of the connection: the next to use it will see that.
            let _ = poll_fn(|cx| pings.poll_pong(cx)).await;
            self.known.set(true);
        }
    }
}

/// Permission to open one stream; held until the stream has ended.
pub(crate) struct Lease {
    connection: Rc<Connection>,
    /// The connection was there before.
    pub(crate) reused: bool,
    _busy: InFlight,
}

impl Lease {
    fn new(connection: Rc<Connection>, reused: bool, busy: InFlight) -> Lease {
        connection.streams.set(connection.streams.get() + 1);
        Lease { connection, reused, _busy: busy }
    }

    /// A handle that can send the request.
    pub(crate) fn sender(&self) -> SendRequest<Bytes> {
        self.connection.send.borrow().clone()
    }

    /// Whether the endpoint takes extended CONNECT (RFC 8441 section 3). The caller bounds the time.
    pub(crate) async fn offers_tunnels(&self) -> bool {
        self.connection.settings.arrived().await;
        self.connection.send.borrow().is_extended_connect_protocol_enabled()
    }

    /// No new streams on this connection; those under way finish.
    pub(crate) fn retire(&self) {
        self.connection.closed.set(true);
    }
}

impl Drop for Lease {
    fn drop(&mut self) {
        let connection = &self.connection;
        connection.streams.set(connection.streams.get() - 1);
        connection.idle_since.set(clock::now_ms());
    }
}

impl Connection {
    /// The endpoint has neither hung up nor said goodbye.
    fn is_open(&self) -> bool {
        let mut cx = Context::from_waker(Waker::noop());
        !self.closed.get() && !matches!(self.send.borrow_mut().poll_ready(&mut cx), Poll::Ready(Err(_)))
    }
}

impl Shared {
    /// An open connection with room for one more stream.
    fn roomy(&self) -> Option<Rc<Connection>> {
        let mut connections = self.connections.borrow_mut();
        connections.retain(|c| c.is_open());
        let roomy = connections.iter().find(|c| {
            let allowed = c.send.borrow().current_max_send_streams().min(STREAMS);
            self.allowed.set(allowed.max(1));
            c.streams.get() < allowed
        });
        roomy.cloned()
    }

    pub(crate) fn is_idle(&self) -> bool {
        self.connections.borrow().iter().all(|c| c.streams.get() == 0)
    }

    /// Lets go of connections that ended, or had no stream for `idle_ms`.
    pub(super) fn sweep(&self, now_ms: u64, idle_ms: u64) {
        let is_fresh =
            |c: &Connection| c.streams.get() > 0 || now_ms.saturating_sub(c.idle_since.get()) < idle_ms;
        self.connections.borrow_mut().retain(|c| c.is_open() && is_fresh(c));
    }
}

/// The turn to open a connection; whoever waits for it learns of its end.
struct Turn<'s>(&'s Shared);

impl<'s> Turn<'s> {
    fn take(shared: &'s Shared) -> Option<Turn<'s>> {
        (!shared.connecting.replace(true)).then(|| Turn(shared))
    }
}

impl Drop for Turn<'_> {
    fn drop(&mut self) {
        self.0.connecting.set(false);
        self.0.changed.notify_waiters();
    }
}

/// Why there is no stream.
pub(crate) enum NotConnected {
    Full(Limit),
    /// A connection could not be opened. One attempt may fail many requests,
    /// and `counts` against the endpoint only once.
    Failed {
        counts: bool,
    },
}

impl Upstreams {
    /// A stream on an open connection or, failing that, on a new one; requests
    /// that need one at the same time wait for the same. The caller bounds the time.
    pub(crate) async fn lease(
        &self,
        upstream: &Upstream,
        limits: &Breaker,
        busy: InFlight,
    ) -> Result<Lease, NotConnected> {
        let shared = &upstream.h2;
        loop {
            if let Some(connection) = shared.roomy() {
                self.metrics.upstream_reused.inc();
                return Ok(Lease::new(connection, true, busy));
            }
            if let Some(_turn) = Turn::take(shared) {
                return match self.connect_h2(upstream, limits).await {
                    Ok(connection) => Ok(Lease::new(connection, false, busy)),
                    Err(NoConnection::Full(limit)) => Err(NotConnected::Full(limit)),
                    Err(NoConnection::Failed(error)) => {
                        tracing::debug!(endpoint = %upstream.live.address, %error, "cannot connect");
                        shared.failures.set(shared.failures.get() + 1);
                        Err(NotConnected::Failed { counts: true })
                    }
                };
            }
            let _waiting = upstream.wait(limits).map_err(|_| NotConnected::Full(Limit::Pending))?;
            let failures = shared.failures.get();
            shared.changed.notified().await;
            if shared.failures.get() != failures {
                return Err(NotConnected::Failed { counts: false });
            }
        }
    }

    async fn connect_h2(
        &self,
        upstream: &Upstream,
        limits: &Breaker,
    ) -> Result<Rc<Connection>, NoConnection> {
        let peer = self.connect(upstream, limits).await?;
        let (metrics, conn) = peer.into_parts();
        SockRef::from(conn.tcp()).set_tcp_user_timeout(Some(UNACKNOWLEDGED))?;
        let (send, mut driver) = h2::client::Builder::new()
            .initial_window_size(STREAM_WINDOW)
            .initial_connection_window_size(CONNECTION_WINDOW)
            .initial_max_send_streams(upstream.h2.allowed.get())
            .max_send_buffer_size(64 << 10)
            .max_header_list_size(RESPONSE_HEAD_BYTES as u32)
            .enable_push(false)
            .handshake::<_, Bytes>(conn)
            .await
            .map_err(io::Error::other)?;
        let connection = Rc::new(Connection {
            send: RefCell::new(send),
            streams: Cell::new(0),
            closed: Cell::new(false),
            idle_since: Cell::new(clock::now_ms()),
            settings: Settings { pings: RefCell::new(driver.ping_pong()), ..Settings::default() },
        });
        upstream.h2.connections.borrow_mut().push(connection.clone());
        // The driver ends when the endpoint hangs up, or when we have dropped every handle.
        let weak = Rc::downgrade(&connection);
        tokio::task::spawn_local(async move {
            if let Err(error) = driver.await {
                tracing::debug!(%error, "HTTP/2 connection to an endpoint ended");
            }
            if let Some(connection) = weak.upgrade() {
                connection.closed.set(true);
            }
            drop(metrics);
        });
        Ok(connection)
    }
}
