//! A TCP listener: accept, read who the client is if it is told, connect to an endpoint, relay.

use std::io;
use std::net::SocketAddr;
use std::rc::Rc;
use std::sync::Arc;

use smallvec::SmallVec;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;

use super::{Closing, failed};
use crate::balance::CompiledPool;
use crate::buffer::{Buffer, Output};
use crate::clock;
use crate::conn::Conn;
use crate::limit::Held;
use crate::listener::opening::Opening;
use crate::listener::{BREATHER, is_exhaustion, room_for_one};
use crate::metrics::{ListenerSlot, ListenerStats};
use crate::proxy_protocol;
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
            let connection = connection(worker.clone(), presence, target, client, peer);
            tokio::task::spawn_local(clock::in_turns(connection));
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
    let Ok(local) = client.local_addr() else { return };
    if client.set_nodelay(true).is_err() {
        return;
    }
    let mut opening = Opening { tcp: client, source: peer, destination: local, input: Buffer::new() };
    let Some(_held) = identify(&worker, &target, &mut opening).await else { return reset(&opening.tcp) };
    let idle = target.listener.desired.idle_timeout.unwrap_or(worker.config.l4.idle);
    let mut timer = Timer::new(clock::now() + worker.config.timeouts.connect);
    let Some((mut peer, _busy)) = reach(&worker, target, &opening, &mut timer).await else {
        counted.slot().failed.inc();
        return reset(&opening.tcp);
    };
    let Opening { tcp, input: from_client, .. } = opening;
    let mut client = Conn::Plain(tcp);
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

/// Who the client is, by a PROXY header if the port has one, and whether it may have one more connection:
/// that is held by what is returned. `None`: it is to be closed.
async fn identify(worker: &Worker, target: &Target, opening: &mut Opening) -> Option<Option<Held>> {
    if target.listener.desired.proxy_protocol.accept {
        let expected = worker.config.proxy_protocol.as_ref().unwrap_or(&worker.config.l4.proxy_protocol);
        if !Box::pin(opening.take_proxy_header(worker, expected)).await {
            return None;
        }
    }
    let held = worker.limiter.connect(opening.source.ip());
    if held.is_err() {
        worker.metrics.address_limited.inc();
    }
    held.ok()
}

/// A connection to an endpoint, which knows who the client is if it wants to. Lets go of the target: what
/// follows may last for days.
async fn reach(
    worker: &Worker,
    target: Target,
    opening: &Opening,
    timer: &mut Timer,
) -> Option<(Peer, InFlight)> {
    let (mut peer, busy) = connect(worker, &target.pool, timer).await?;
    if let Some(version) = target.listener.desired.proxy_protocol.send {
        let mut header = Output::take();
        proxy_protocol::write_header(version, opening.source, opening.destination, &mut header);
        let deadline = clock::now() + worker.config.timeouts.send;
        timer.within(deadline, peer.conn.send([&header, b"", b""])).await.ok()?.ok()?;
    }
    Some((peer, busy))
}

/// Connects to an endpoint of the pool, or to another one if that fails.
async fn connect(worker: &Worker, pool: &CompiledPool, timer: &mut Timer) -> Option<(Peer, InFlight)> {
    let mut tried = SmallVec::<[u64; 4]>::new();
    for _ in 0..worker.config.limits.tries {
        let endpoint = pool.pick(&worker.turns, clock::now_ms(), &tried)?;
        let upstream = worker.upstreams.of(&endpoint.live);
        // It counts from the first packet: many that come at once must see one another.
        let busy = InFlight::new(upstream.clone());
        let deadline = clock::now() + worker.config.timeouts.connect;
        match timer.within(deadline, worker.upstreams.connect_tcp(&upstream)).await {
            Ok(Ok(peer)) => {
                upstream.live.succeeded();
                return Some((peer, busy));
            }
            failure => {
                // What failed in time was counted where it failed.
                if failure.is_err() {
                    worker.metrics.upstream_failed.inc();
                }
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
