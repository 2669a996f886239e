//! Sockets, and the loop that turns accepted connections into tasks.
//!
//! Every worker binds each address itself (`SO_REUSEPORT`): the kernel spreads
//! connections, and no worker waits for another.

use std::io;
use std::net::SocketAddr;
use std::pin::Pin;
use std::rc::Rc;
use std::sync::Arc;
use std::task::Poll;
use std::time::Duration;

use socket2::{Domain, Protocol, Socket, Type};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;
use tokio::time::Instant;

use crate::buffer::Buffer;
use crate::clock;
use crate::conn::Conn;
use crate::http::client::{Client, ClientTls};
use crate::http::{h1, h2};
use crate::limit::Held;
use crate::metrics::{Protocol as Speaks, WorkerMetrics};
use crate::timer::Timer;
use crate::worker::{Presence, Worker};

pub(crate) mod opening;
mod passthrough;

use opening::Opening;

/// Connections the kernel holds for us before they are accepted.
const BACKLOG: i32 = 4096;

/// After an accept failed for want of descriptors or memory.
pub(crate) const BREATHER: Duration = Duration::from_millis(20);

/// What every HTTP/2 connection begins with (RFC 9113 section 3.4).
const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";

/// Binds `address` for one of several workers.
pub(crate) fn bind(address: SocketAddr) -> io::Result<std::net::TcpListener> {
    let socket = Socket::new(Domain::for_address(address), Type::STREAM, Some(Protocol::TCP))?;
    socket.set_reuse_address(true)?;
    socket.set_reuse_port(true)?;
    if address.is_ipv6() {
        socket.set_only_v6(false)?;
    }
    socket.set_nonblocking(true)?;
    socket.bind(&address.into())?;
    socket.listen(BACKLOG)?;
    Ok(socket.into())
}

/// Accepts until `stop` turns true, and then what waits in the kernel's queue:
/// closing the listener would reset it.
pub(crate) async fn accept(
    worker: Rc<Worker>,
    listener: std::net::TcpListener,
    tls: bool,
    mut stop: watch::Receiver<bool>,
) -> io::Result<()> {
    let listener = TcpListener::from_std(listener)?;
    loop {
        let accepted = tokio::select! {
            biased;
            () = stopped(&mut stop) => return take_queued(&worker, listener, tls),
            accepted = room_for_one(&worker, &listener) => accepted,
        };
        match accepted {
            Ok((tcp, peer)) => admit(&worker, tcp, peer, tls),
            Err(error) if is_exhaustion(&error) => {
                tracing::warn!(%error, "cannot accept; raise the limit on open files (ulimit -n)");
                tokio::time::sleep(BREATHER).await;
            }
            // The client was gone before we got to it.
            Err(error) => tracing::debug!(%error, "accept"),
        }
    }
}

/// Ready once `stop` is true; never if nobody can tell any more.
pub(crate) async fn stopped(stop: &mut watch::Receiver<bool>) {
    if stop.wait_for(|stop| *stop).await.is_err() {
        std::future::pending::<()>().await;
    }
}

fn take_queued(worker: &Rc<Worker>, listener: TcpListener, tls: bool) -> io::Result<()> {
    let listener = listener.into_std()?;
    loop {
        match listener.accept() {
            Ok((tcp, peer)) => {
                tcp.set_nonblocking(true)?;
                admit(worker, TcpStream::from_std(tcp)?, peer, tls);
            }
            Err(error) if error.kind() == io::ErrorKind::ConnectionAborted => {}
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(()),
            Err(error) => return Err(error),
        }
    }
}

/// Gives a connection its task. It counts as open at once, so that a drain waits for it.
fn admit(worker: &Rc<Worker>, tcp: TcpStream, peer: SocketAddr, tls: bool) {
    worker.metrics.listener(tls).accepted.inc();
    let presence = Presence::new(worker.clone());
    tokio::task::spawn_local(clock::in_turns(connection(worker.clone(), presence, tcp, peer, tls)));
}

/// Accepts once this worker has room; until then the kernel's queue holds the clients.
pub(crate) async fn room_for_one(
    worker: &Worker,
    listener: &TcpListener,
) -> io::Result<(TcpStream, SocketAddr)> {
    while worker.connections() >= worker.config.limits.connections {
        tokio::time::sleep(BREATHER).await;
    }
    listener.accept().await
}

pub(crate) fn is_exhaustion(error: &io::Error) -> bool {
    const ENFILE: i32 = 23;
    const EMFILE: i32 = 24;
    const ENOBUFS: i32 = 105;
    const ENOMEM: i32 = 12;
    matches!(error.raw_os_error(), Some(ENFILE | EMFILE | ENOBUFS | ENOMEM))
}

/// One downstream connection, from accept to close. Its task keeps the size of
/// its largest state, idle or not: what is rare or large goes into a box.
#[expect(clippy::manual_async_fn, reason = "an async fn would hold its arguments twice")]
fn connection(
    worker: Rc<Worker>,
    mut presence: Presence,
    tcp: TcpStream,
    peer: SocketAddr,
    tls: bool,
) -> impl Future<Output = ()> {
    async move {
        let mut counted = Counted::new(worker.metrics.clone(), tls);
        let mut held = None;
        let beginning = begin(&worker, &mut presence, &mut counted, &mut held, tcp, peer, tls);
        let Some(begun) = Box::pin(beginning).await else { return };
        counted.speaks(if begun.h2 { Speaks::Http2 } else { Speaks::Http1 });
        // Moved as a whole: taken apart here, it would keep its room.
        match begun.h2 {
            true => begun.serve_h2(worker, presence).await,
            false => begun.serve_h1(worker, presence).await,
        }
    }
}

/// A connection of which is known what it speaks.
struct Begun {
    conn: Conn,
    client: Client,
    input: Buffer,
    h2: bool,
}

impl Begun {
    fn serve_h1(self, worker: Rc<Worker>, presence: Presence) -> impl Future<Output = ()> {
        h1::serve(worker, self.conn, self.client, presence, self.input)
    }

    fn serve_h2(self, worker: Rc<Worker>, presence: Presence) -> Pin<Box<impl Future<Output = ()>>> {
        Box::pin(h2::serve(worker, self.conn, self.client, presence, self.input))
    }
}

/// Everything before the first request. `None`: there will be none.
async fn begin(
    worker: &Rc<Worker>,
    presence: &mut Presence,
    counted: &mut Counted,
    held: &mut Option<Held>,
    tcp: TcpStream,
    peer: SocketAddr,
    tls: bool,
) -> Option<Begun> {
    let local = tcp.local_addr().ok()?;
    tcp.set_nodelay(true).ok()?;
    let mut opening = Opening { tcp, source: peer, destination: local, input: Buffer::new() };
    if let Some(expected) = &worker.config.proxy_protocol
        && !Box::pin(opening.take_proxy_header(worker, expected)).await
    {
        return None;
    }
    match worker.limiter.connect(opening.source.ip()) {
        Ok(place) => *held = place,
        Err(_) => {
            worker.metrics.address_limited.inc();
            return None;
        }
    }
    if !tls {
        let Opening { tcp, source, destination, mut input } = opening;
        let client = Client::new(source, destination, &worker.config.trusted, None);
        let mut conn = Conn::Plain(tcp);
        let h2 = is_http2(worker, &mut conn, &mut input, presence).await?;
        return Some(Begun { conn, client, input, h2 });
    }
    let deadline = clock::now() + worker.config.timeouts.handshake;
    if worker.router().has_passthrough() {
        opening = pass_through(worker, opening, deadline, counted).await?;
    }
    let (conn, client, h2) = handshake(worker, opening, deadline).await?;
    Some(Begun { conn, client, input: Buffer::new(), h2 })
}

/// Counts a connection under what it speaks, for as long as it lives.
struct Counted {
    metrics: Arc<WorkerMetrics>,
    tls: bool,
    speaks: Option<Speaks>,
}

impl Counted {
    fn new(metrics: Arc<WorkerMetrics>, tls: bool) -> Counted {
        metrics.listener(tls).pending.inc();
        Counted { metrics, tls, speaks: None }
    }

    fn speaks(&mut self, speaks: Speaks) {
        self.speaks = Some(speaks);
        let listener = self.metrics.listener(self.tls);
        listener.pending.dec();
        let protocol = listener.protocol(speaks);
        protocol.total.inc();
        protocol.open.inc();
    }
}

impl Drop for Counted {
    fn drop(&mut self) {
        let listener = self.metrics.listener(self.tls);
        match self.speaks {
            None => listener.pending.dec(),
            Some(speaks) => listener.protocol(speaks).open.dec(),
        }
    }
}

/// Serves a connection whose name is passed through; gives back any other.
async fn pass_through(
    worker: &Worker,
    mut opening: Opening,
    deadline: Instant,
    counted: &mut Counted,
) -> Option<Opening> {
    match tokio::time::timeout_at(deadline, passthrough::asked(worker, &mut opening)).await {
        Ok(None) => Some(opening),
        Ok(Some(name)) => {
            counted.speaks(Speaks::Passthrough);
            passthrough::serve(worker, opening, &name).await;
            None
        }
        Err(_) => {
            worker.metrics.handshakes_failed.inc();
            None
        }
    }
}

/// The TLS handshake, and whether the client chose HTTP/2.
async fn handshake(worker: &Worker, opening: Opening, deadline: Instant) -> Option<(Conn, Client, bool)> {
    let Opening { tcp, source, destination, mut input } = opening;
    let accepting = worker.tls.acceptor().accept_with(tcp, |session| feed(session, &mut input));
    let handshake = tokio::time::timeout_at(deadline, accepting).await;
    let stream = match handshake {
        Ok(Ok(stream)) => stream,
        failed => {
            worker.metrics.handshakes_failed.inc();
            if let Ok(Err(error)) = failed {
                tracing::debug!(%error, "TLS handshake");
            }
            return None;
        }
    };
    let session = stream.get_ref().1;
    worker.metrics.handshakes_ok.inc();
    if session.handshake_kind() == Some(rustls::HandshakeKind::Resumed) {
        worker.metrics.handshakes_resumed.inc();
    }
    let h2 = session.alpn_protocol() == Some(b"h2");
    let server_name = session.server_name().map(|n| n.trim_end_matches('.').to_ascii_lowercase());
    let version = match session.protocol_version() {
        Some(rustls::ProtocolVersion::TLSv1_3) => "TLSv1.3",
        _ => "TLSv1.2",
    };
    let certificate = Some(worker.tls.served_for(server_name.as_deref()));
    let tls = ClientTls { server_name, certificate, version };
    let client = Client::new(source, destination, &worker.config.trusted, Some(tls));
    Some((Conn::Tls(Box::new(stream.into())), client, h2))
}

/// Lets a session begin with what was read already.
fn feed(session: &mut rustls::ServerConnection, input: &mut Buffer) {
    while !input.is_empty() {
        let read = session.read_tls(&mut input.filled());
        let Ok(read @ 1..) = read else { return };
        input.consume(read);
        if session.process_new_packets().is_err() {
            // It keeps the error, and has an alert to send first.
            return;
        }
    }
}

/// Whether a plaintext connection speaks HTTP/2: it begins with the preface then.
/// `None`: it says nothing in time, or has ended.
async fn is_http2(
    worker: &Worker,
    conn: &mut Conn,
    input: &mut Buffer,
    presence: &mut Presence,
) -> Option<bool> {
    let mut timer = Timer::new(clock::now() + worker.config.timeouts.keep_alive);
    let mut deadline = clock::now() + worker.config.timeouts.header;
    loop {
        let compared = input.len().min(PREFACE.len());
        if input.filled()[..compared] != PREFACE[..compared] {
            return Some(false);
        }
        if compared == PREFACE.len() {
            return Some(true);
        }
        let draining = worker.is_draining();
        if draining {
            deadline = worker.idle_until(deadline);
        }
        let filled = timer.within(
            deadline,
            std::future::poll_fn(|cx| {
                if let Poll::Ready(read) = conn.poll_fill(cx, input) {
                    return Poll::Ready(Some(read));
                }
                if !draining && worker.is_draining() {
                    return Poll::Ready(None);
                }
                presence.wake_on_drain(cx.waker());
                Poll::Pending
            }),
        );
        match filled.await {
            Ok(None) => continue,
            Ok(Some(Ok(n))) if n > 0 => {}
            _ => return None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn size_of_future<A, B, C, D, E, F>(_: impl FnOnce(A, B, C, D, E) -> F) -> usize {
        size_of::<F>()
    }

    /// Every idle connection has one of these; the task around it adds some 200
    /// bytes. If it has grown, see which state is the largest (-Zprint-type-sizes)
    /// and whether it is rare enough for a box.
    #[test]
    fn a_connection_fits_its_room() {
        let size = size_of_future(connection);
        assert!(size <= 2_136, "{size}");
    }
}
