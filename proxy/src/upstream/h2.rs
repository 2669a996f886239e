//! HTTP/2 connections to an endpoint, shared by all requests of one worker.

use std::cell::{Cell, RefCell};
use std::io;
use std::rc::Rc;

use bytes::Bytes;
use h2::client::SendRequest;

use super::{Upstream, Upstreams};

/// Streams on one connection before another is opened, whatever the endpoint allows.
const STREAMS: usize = 100;

/// What an endpoint may send on one stream before we have passed it on.
const STREAM_WINDOW: u32 = 128 << 10;

/// The same for all streams of a connection together.
const CONNECTION_WINDOW: u32 = 1 << 20;

/// The open connections to one endpoint.
#[derive(Default)]
pub(crate) struct Shared {
    connections: RefCell<Vec<Rc<Connection>>>,
}

struct Connection {
    send: RefCell<SendRequest<Bytes>>,
    streams: Cell<usize>,
    closed: Cell<bool>,
}

/// Permission to open one stream; held until the stream has ended.
pub(crate) struct Lease(Rc<Connection>);

impl Lease {
    /// A handle that can send the request.
    pub(crate) fn sender(&self) -> SendRequest<Bytes> {
        self.0.send.borrow().clone()
    }

    /// No new streams on this connection; those under way finish.
    pub(crate) fn retire(&self) {
        self.0.closed.set(true);
    }
}

impl Drop for Lease {
    fn drop(&mut self) {
        self.0.streams.set(self.0.streams.get() - 1);
    }
}

impl Shared {
    /// A stream on an open connection, if one has room.
    pub(crate) fn lease(&self) -> Option<Lease> {
        let mut connections = self.connections.borrow_mut();
        connections.retain(|c| !c.closed.get());
        let roomy =
            |c: &&Rc<Connection>| c.streams.get() < c.send.borrow().current_max_send_streams().min(STREAMS);
        connections.iter().find(roomy).map(|c| open_stream(c.clone()))
    }

    pub(crate) fn is_idle(&self) -> bool {
        self.connections.borrow().iter().all(|c| c.streams.get() == 0)
    }

    fn add(&self, connection: Rc<Connection>) -> Lease {
        self.connections.borrow_mut().push(connection.clone());
        open_stream(connection)
    }
}

fn open_stream(connection: Rc<Connection>) -> Lease {
    connection.streams.set(connection.streams.get() + 1);
    Lease(connection)
}

impl Upstreams {
    /// Opens another HTTP/2 connection and takes a stream on it; the caller bounds the time.
    pub(crate) async fn connect_h2(&self, upstream: &Upstream) -> io::Result<Lease> {
        let peer = self.connect(upstream).await?;
        let (metrics, conn) = peer.into_parts();
        let (send, driver) = h2::client::Builder::new()
            .initial_window_size(STREAM_WINDOW)
            .initial_connection_window_size(CONNECTION_WINDOW)
            .max_send_buffer_size(64 << 10)
            .enable_push(false)
            .handshake::<_, Bytes>(conn)
            .await
            .map_err(io::Error::other)?;
        let connection =
            Rc::new(Connection { send: RefCell::new(send), streams: Cell::new(0), closed: Cell::new(false) });
        let lease = upstream.h2.add(connection.clone());
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
        Ok(lease)
    }
}
