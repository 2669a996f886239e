//! A TCP listener: accept, read who the client is if it is told, connect to an endpoint, relay.

use std::io;
use std::net::SocketAddr;
use std::rc::Rc;
use std::sync::Arc;

use smallvec::SmallVec;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;
use tokio::time::Instant;

use super::{Closing, failed};
use crate::balance::CompiledPool;
use crate::buffer::{Buffer, Output};
use crate::clock;
use crate::conn::Conn;
use crate::listener::{BREATHER, is_exhaustion, room_for_one};
use crate::metrics::{ListenerSlot, ListenerStats};
use crate::proxy_protocol::{self, Origin, Parsed, Version};
use crate::relay::{self, End};
use crate::router::{CompiledListener, Router};
use crate::table::ListenerKey;
use crate::timer::Timer;
use crate::upstream::{InFlight, Peer};
use crate::worker::{Presence, Worker};

/// Accepts until `closing` says otherwise, and then what waits in the kernel's queue.
pub(super) async fn accept(
    worker: Rc<Worker>,
    key: ListenerKey,
    listener: std::net::TcpListener,
    mut closing: watch::Receiver<Closing>,
) -> io::Result<()> {
    let listener = TcpListener::from_std(listener)?;
    let mut last = Target::find(&worker.router(), &key);
    loop {
        let accepted = tokio::select! {
            biased;
            _ = closing.wait_for(|closing| *closing != Closing::No) => return take_queued(&worker, &key, listener, last),
            accepted = room_for_one(&worker, &listener) => accepted,
        };
        match accepted {
            Ok((tcp, peer)) => admit(&worker, &key, &mut last, tcp, peer),
            Err(error) if is_exhaustion(&error) => {
                tracing::warn!(%error, "cannot accept; raise the limit on open files (ulimit -n)");
                tokio::time::sleep(BREATHER).await;
            }
            // The client was gone before we got to it.
            Err(error) => tracing::debug!(%error, "accept"),
        }
    }
}

fn take_queued(
    worker: &Rc<Worker>,
    key: &ListenerKey,
    listener: TcpListener,
    mut last: Option<Target>,
) -> io::Result<()> {
    let listener = listener.into_std()?;
    loop {
        match listener.accept() {
            Ok((tcp, peer)) => {
                tcp.set_nonblocking(true)?;
                admit(worker, key, &mut last, TcpStream::from_std(tcp)?, peer);
            }
            Err(error) if error.kind() == io::ErrorKind::ConnectionAborted => {}
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(()),
            Err(error) => return Err(error),
        }
    }
}

/// Where the connections of a listener go. Held by the accept loop for clients that were there before the
/// table that has no such listener any more.
#[derive(Clone)]
struct Target {
    generation: u64,
    listener: CompiledListener,
    pool: Arc<CompiledPool>,
}

impl Target {
    fn find(router: &Router, key: &ListenerKey) -> Option<Target> {
        let listener = router.listener(key)?.clone();
        Some(Target { generation: router.generation(), pool: router.share_pool(listener.pool), listener })
    }
}

/// Gives a connection its task, and the target that the live table has for it.
fn admit(
    worker: &Rc<Worker>,
    key: &ListenerKey,
    last: &mut Option<Target>,
    client: TcpStream,
    peer: SocketAddr,
) {
    let router = worker.router();
    if last.as_ref().is_none_or(|last| last.generation != router.generation())
        && let Some(newer) = Target::find(&router, key)
    {
        *last = Some(newer);
    }
    match last.clone() {
        Some(target) => {
            let presence = Presence::new(worker.clone());
            tokio::task::spawn_local(connection(worker.clone(), presence, target, client, peer));
        }
        None => reset(&client),
    }
}

/// One downstream connection, from accept to close.
async fn connection(
    worker: Rc<Worker>,
    _presence: Presence,
    target: Target,
    client: TcpStream,
    peer: SocketAddr,
) {
    let counted = Counted::new(target.listener.stats.clone(), worker.index);
    if client.set_nodelay(true).is_err() {
        return;
    }
    let idle = target.listener.desired.idle_timeout.unwrap_or(worker.config.l4.idle);
    let mut timer = Timer::new(Instant::now() + worker.config.timeouts.connect);
    let mut client = Conn::Plain(client);
    let Some((mut peer, from_client, _busy)) = prepare(&worker, target, &mut client, peer, &mut timer).await
    else {
        counted.slot().failed.inc();
        return reset(client.tcp());
    };
    let end = relay::run(
        &mut client,
        &mut peer.conn,
        from_client,
        Buffer::new(),
        &mut timer,
        idle,
        |sent, received| {
            counted.slot().bytes_in.add(sent as u64);
            counted.slot().bytes_out.add(received as u64);
        },
    );
    if end.await == End::Idle {
        counted.slot().idle.inc();
    }
}

/// Everything before the first byte is relayed. Lets go of the target: what follows may last for days.
async fn prepare(
    worker: &Worker,
    target: Target,
    client: &mut Conn,
    peer: SocketAddr,
    timer: &mut Timer,
) -> Option<(Peer, Buffer, InFlight)> {
    let proxied = target.listener.desired.proxy_protocol;
    let mut from_client = Buffer::new();
    let mut addresses = (peer, client.tcp().local_addr().ok()?);
    if proxied.accept
        && let Origin::Proxied { source, destination } =
            read_header(client, &mut from_client, timer, Instant::now() + worker.config.timeouts.header)
                .await?
    {
        addresses = (source, destination);
    }
    let (mut endpoint, busy) = connect(worker, &target.pool, timer).await?;
    if proxied.send {
        let mut header = Output::take();
        proxy_protocol::write_header(Version::V1, addresses.0, addresses.1, &mut header);
        let deadline = Instant::now() + worker.config.timeouts.send;
        let sending = endpoint.conn.send([&header, from_client.filled(), &[]]);
        timer.within(deadline, sending).await.ok()?.ok()?;
        from_client = Buffer::new();
    }
    Some((endpoint, from_client, busy))
}

/// The PROXY header that the connection must begin with. `None`: it does not, or not in time.
async fn read_header(
    client: &mut Conn,
    input: &mut Buffer,
    timer: &mut Timer,
    deadline: Instant,
) -> Option<Origin> {
    loop {
        let filling = std::future::poll_fn(|cx| client.poll_fill(cx, input));
        match timer.within(deadline, filling).await {
            Ok(Ok(read)) if read > 0 => {}
            _ => return None,
        }
        match proxy_protocol::parse(input.filled()) {
            Ok(Parsed::Header { length, origin }) => {
                input.consume(length);
                return Some(origin);
            }
            Ok(Parsed::Incomplete) => {}
            Err(error) => {
                tracing::debug!(%error, "PROXY header");
                return None;
            }
        }
    }
}

/// Connects to an endpoint of the pool, or to another one if that fails.
async fn connect(worker: &Worker, pool: &CompiledPool, timer: &mut Timer) -> Option<(Peer, InFlight)> {
    let mut tried = SmallVec::<[u64; 4]>::new();
    for _ in 0..worker.config.limits.tries {
        let endpoint = pool.pick(&worker.turns, clock::now_ms(), &tried)?;
        let upstream = worker.upstreams.of(&endpoint.live);
        // It counts from the first packet: many that come at once must see one another.
        let busy = InFlight::new(upstream.clone());
        let deadline = Instant::now() + worker.config.timeouts.connect;
        match timer.within(deadline, worker.upstreams.connect(&upstream)).await {
            Ok(Ok(peer)) => {
                upstream.live.succeeded();
                return Some((peer, busy));
            }
            _ => {
                failed(worker, &upstream.live);
                tried.push(upstream.live.id);
            }
        }
    }
    None
}

/// Has the client see an error rather than an end when the connection is closed.
fn reset(client: &TcpStream) {
    // Fails on a connection that is gone already.
    let _ = client.set_zero_linger();
}

/// Counts a connection as open for as long as it lives.
struct Counted {
    stats: Arc<ListenerStats>,
    worker: usize,
}

impl Counted {
    fn new(stats: Arc<ListenerStats>, worker: usize) -> Counted {
        stats.worker(worker).opened.inc();
        stats.worker(worker).open.inc();
        Counted { stats, worker }
    }

    fn slot(&self) -> &ListenerSlot {
        self.stats.worker(self.worker)
    }
}

impl Drop for Counted {
    fn drop(&mut self) {
        self.slot().open.dec();
    }
}
