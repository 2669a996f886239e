//! Connections to endpoints: opened, kept, reused. One set per worker, no locks.

use std::cell::RefCell;
use std::collections::HashMap;
use std::io;
use std::rc::Rc;
use std::sync::Arc;

use rustls_pki_types::ServerName;
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;

use crate::conn::Conn;
use crate::endpoint::{Held, LiveEndpoint};
use crate::metrics::{Limit, WorkerMetrics};
use crate::resilience::Breaker;
use crate::resilience::outliers::Seen;
use crate::table::UpstreamProtocol;
use crate::tls;

pub(crate) mod h2;

/// A worker's connections, by endpoint.
pub(crate) struct Upstreams {
    by_id: RefCell<HashMap<u64, Rc<Upstream>, foldhash::fast::FixedState>>,
    http1_tls: TlsConnector,
    h2_tls: TlsConnector,
    idle_limit: usize,
    idle_ms: u64,
    metrics: Arc<WorkerMetrics>,
}

/// The connections to one endpoint. An address that leaves the table keeps
/// serving what it has; its idle connections go with the next sweep.
pub(crate) struct Upstream {
    pub(crate) live: Held,
    idle: RefCell<Vec<Idle>>,
    pub(crate) h2: h2::Shared,
    /// How it answered this worker.
    pub(crate) seen: Seen,
}

/// A connection to an endpoint, counted as open for as long as it lives.
pub(crate) struct Peer {
    pub(crate) conn: Conn,
    open: Open,
    /// While it carries a request, or the tunnel that one became.
    busy: Option<InFlight>,
}

/// A request occupies its endpoint for as long as this lives: head, body or tunnel.
pub(crate) struct InFlight(Rc<Upstream>);

impl InFlight {
    pub(crate) fn new(upstream: Rc<Upstream>) -> InFlight {
        upstream.live.begin();
        InFlight(upstream)
    }

    /// A place among the requests under way, of which there may be `limit`; 0 is no limit.
    pub(crate) fn try_new(upstream: &Rc<Upstream>, limit: u32) -> Option<InFlight> {
        upstream.live.try_begin(limit).then(|| InFlight(upstream.clone()))
    }
}

impl Drop for InFlight {
    fn drop(&mut self) {
        self.0.live.end();
    }
}

impl Peer {
    /// Occupies the endpoint until this connection is idle again, or gone.
    pub(crate) fn occupy(&mut self, busy: InFlight) {
        self.busy = Some(busy);
    }

    fn into_parts(self) -> (Open, Conn) {
        (self.open, self.conn)
    }
}

/// Counts a connection as open.
struct Open {
    metrics: Arc<WorkerMetrics>,
    _place: Place,
}

impl Open {
    fn new(metrics: Arc<WorkerMetrics>, place: Place) -> Open {
        metrics.upstream_opened.inc();
        metrics.upstream_open.inc();
        Open { metrics, _place: place }
    }
}

impl Drop for Open {
    fn drop(&mut self) {
        self.metrics.upstream_open.dec();
    }
}

/// A place among an endpoint's connections, from before one is opened until it is closed.
struct Place(Held);

impl Place {
    /// `None`: there are `limit`, which is above 0.
    fn take(upstream: &Upstream, limit: u32) -> Option<Place> {
        upstream.live.try_open(limit).then(|| Place(upstream.live.clone()))
    }

    fn unlimited(upstream: &Upstream) -> Place {
        upstream.live.try_open(0);
        Place(upstream.live.clone())
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        self.0.closed();
    }
}

/// A request that waits for a connection.
struct Waiting<'u>(&'u Upstream);

impl Drop for Waiting<'_> {
    fn drop(&mut self) {
        self.0.live.waited();
    }
}

/// Why there is no connection.
#[derive(Debug)]
pub(crate) enum NoConnection {
    /// There are enough of them, or enough requests that wait for one.
    Full(Limit),
    /// It could not be established.
    Failed(io::Error),
}

impl From<io::Error> for NoConnection {
    fn from(error: io::Error) -> NoConnection {
        NoConnection::Failed(error)
    }
}

struct Idle {
    peer: Peer,
    since_ms: u64,
}

impl Upstreams {
    pub(crate) fn new(idle_limit: usize, idle_ms: u64, metrics: Arc<WorkerMetrics>) -> Upstreams {
        Upstreams {
            by_id: RefCell::default(),
            http1_tls: TlsConnector::from(tls::client_config(false)),
            h2_tls: TlsConnector::from(tls::client_config(true)),
            idle_limit,
            idle_ms,
            metrics,
        }
    }

    /// This worker's side of an endpoint.
    pub(crate) fn of(&self, live: &Arc<LiveEndpoint>) -> Rc<Upstream> {
        if let Some(upstream) = self.by_id.borrow().get(&live.id) {
            return upstream.clone();
        }
        let upstream = Rc::new(Upstream::new(live.clone()));
        self.by_id.borrow_mut().insert(live.id, upstream.clone());
        upstream
    }

    /// Opens a connection; the caller bounds the time.
    pub(crate) async fn connect(&self, upstream: &Upstream, limits: &Breaker) -> Result<Peer, NoConnection> {
        let _waiting = upstream.wait(limits)?;
        let place =
            Place::take(upstream, limits.connections).ok_or(NoConnection::Full(Limit::Connections))?;
        let opened = self.open(upstream).await;
        if opened.is_err() {
            self.metrics.upstream_failed.inc();
        }
        Ok(Peer { conn: opened?, open: Open::new(self.metrics.clone(), place), busy: None })
    }

    /// As [`Upstreams::connect`], but for bytes that are not ours to understand:
    /// whatever the endpoint speaks, nothing is spoken here.
    pub(crate) async fn connect_tcp(&self, upstream: &Upstream) -> io::Result<Peer> {
        let tcp = open_tcp(upstream).await;
        if tcp.is_err() {
            self.metrics.upstream_failed.inc();
        }
        let place = Place::unlimited(upstream);
        Ok(Peer { conn: Conn::Plain(tcp?), open: Open::new(self.metrics.clone(), place), busy: None })
    }

    async fn open(&self, upstream: &Upstream) -> io::Result<Conn> {
        let tcp = open_tcp(upstream).await?;
        let connector = match upstream.live.protocol {
            UpstreamProtocol::Http1
            | UpstreamProtocol::H2c
            | UpstreamProtocol::Tcp
            | UpstreamProtocol::Udp => {
                return Ok(Conn::Plain(tcp));
            }
            UpstreamProtocol::Https => &self.http1_tls,
            UpstreamProtocol::H2 => &self.h2_tls,
        };
        let name = ServerName::IpAddress(upstream.live.address.ip().into());
        let tls = connector.connect(name, tcp).await?;
        Ok(Conn::Tls(Box::new(tls.into())))
    }

    /// The most recently used idle connection that is still good.
    pub(crate) fn checkout(&self, upstream: &Upstream) -> Option<Peer> {
        loop {
            let mut idle = upstream.idle.borrow_mut().pop()?;
            if idle.peer.conn.is_reusable() {
                self.metrics.upstream_reused.inc();
                return Some(idle.peer);
            }
        }
    }

    /// Keeps a connection for the next request.
    pub(crate) fn keep(&self, upstream: &Upstream, mut peer: Peer, now_ms: u64) {
        peer.busy = None;
        let mut idle = upstream.idle.borrow_mut();
        if idle.len() < self.idle_limit {
            idle.push(Idle { peer, since_ms: now_ms });
        }
    }

    /// A pooled connection turned out dead: its siblings have most likely died with it.
    pub(crate) fn discard_idle(&self, upstream: &Upstream) {
        upstream.idle.take();
    }

    /// The endpoints this worker has anything to do with.
    pub(crate) fn all(&self) -> Vec<Rc<Upstream>> {
        self.by_id.borrow().values().cloned().collect()
    }

    /// The endpoint of this id, if this worker has anything to do with it.
    pub(crate) fn known(&self, id: u64) -> Option<Rc<Upstream>> {
        self.by_id.borrow().get(&id).cloned()
    }

    /// Closes what has been idle too long, and forgets endpoints no table names any more.
    pub(crate) fn sweep(&self, now_ms: u64) {
        self.by_id.borrow_mut().retain(|_, upstream| {
            let named = upstream.live.is_named();
            // Nothing new will go to what no table names.
            let idle_ms = if named { self.idle_ms } else { 0 };
            upstream.idle.borrow_mut().retain(|i| now_ms.saturating_sub(i.since_ms) < idle_ms);
            upstream.h2.sweep(now_ms, idle_ms);
            // Requests under way, and tunnels, hold it by its count.
            named || Rc::strong_count(upstream) > 1 || !upstream.h2.is_idle()
        });
    }
}

async fn open_tcp(upstream: &Upstream) -> io::Result<TcpStream> {
    let tcp = TcpStream::connect(upstream.live.address).await?;
    tcp.set_nodelay(true)?;
    Ok(tcp)
}

impl Upstream {
    fn new(live: Arc<LiveEndpoint>) -> Upstream {
        Upstream {
            live: Held::new(live),
            idle: RefCell::default(),
            h2: h2::Shared::default(),
            seen: Seen::default(),
        }
    }

    /// Joins the requests that wait for a connection, while there is room.
    fn wait(&self, limits: &Breaker) -> Result<Waiting<'_>, NoConnection> {
        match self.live.try_wait(limits.pending) {
            true => Ok(Waiting(self)),
            false => Err(NoConnection::Full(Limit::Pending)),
        }
    }
}
