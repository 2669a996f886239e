//! A UDP listener: one flow for each client, with a socket of its own towards an endpoint.
//!
//! ```text
//!  client ─► listener's socket ─► flow of this client ─► its own connected socket ─► endpoint
//!  client ◄─ listener's socket ◄─ the flow's task     ◄─ its own connected socket ◄─ endpoint
//! ```
//!
//! Nothing here waits for anyone: a datagram that cannot be passed on at once is dropped and counted.

use std::cell::RefCell;
use std::io;
use std::net::SocketAddr;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use smallvec::SmallVec;
use socket2::{Domain, Protocol, SockRef, Socket, Type};
use tokio::io::{Interest, Ready};
use tokio::net::UdpSocket;
use tokio::sync::watch;
use tokio::task::AbortHandle;
use tokio::time::{Instant, MissedTickBehavior};

use super::flows::{Flows, Phase};
use super::{Closing, failed};
use crate::clock;
use crate::listener::{BREATHER, is_exhaustion};
use crate::metrics::{ListenerSlot, ListenerStats};
use crate::router::CompiledListener;
use crate::table::ListenerKey;
use crate::upstream::{InFlight, Upstream};
use crate::worker::Worker;

/// The longest datagram there is, in bytes.
const DATAGRAM: usize = 64 << 10;

/// Datagrams taken from a socket before others have their turn.
const BATCH: usize = 64;

/// How often flows are looked through for those that have been silent for too long.
const SWEEP: Duration = Duration::from_millis(500);

/// The first datagram of a flow is kept for the next endpoint, should this one refuse it, if it is not
/// longer: what a path without fragments carries.
const KEPT_BYTES: usize = 1500;

thread_local! {
    static SCRATCH: RefCell<Box<[u8]>> = RefCell::new(vec![0; DATAGRAM].into());
}

/// Serves until `closing` says that nothing new is to be taken, and the flows that there are have ended.
pub(super) async fn serve(
    worker: Rc<Worker>,
    key: ListenerKey,
    socket: Rc<UdpSocket>,
    mut closing: watch::Receiver<Closing>,
) -> io::Result<()> {
    // Without one the listener has left the table already, and is about to be closed.
    let Some(stats) = worker.router().listener(&key).map(|listener| listener.stats.clone()) else {
        return Ok(());
    };
    let flows = RefCell::new(Flows::new());
    let listener = Rc::new(Listener { worker, key, socket, stats, flows });
    let mut sweep = tokio::time::interval(SWEEP);
    sweep.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        let phase = *closing.borrow_and_update();
        if phase == Closing::Drained {
            break;
        }
        if phase == Closing::NothingNew && listener.flows.borrow().len() == 0 {
            return Ok(());
        }
        tokio::select! {
            biased;
            changed = closing.changed() => if changed.is_err() { return Ok(()) },
            _ = sweep.tick(), if listener.flows.borrow().len() > 0 => listener.sweep(),
            ready = listener.socket.readable() => {
                ready?;
                listener.take(phase == Closing::No).await;
            }
        }
    }
    listener.last_answers().await;
    Ok(())
}

struct Listener {
    worker: Rc<Worker>,
    key: ListenerKey,
    socket: Rc<UdpSocket>,
    stats: Arc<ListenerStats>,
    flows: RefCell<Flows<Flow>>,
}

/// What one client and one endpoint have to do with each other.
struct Flow {
    socket: Rc<UdpSocket>,
    upstream: Rc<Upstream>,
    busy: InFlight,
    task: AbortHandle,
    /// Of the client, and answers to them.
    requests: u32,
    responses: u32,
    /// Answers to each request; 0 if nobody knows.
    expected: u32,
    idle_ms: u64,
    /// The first datagram, until there is an answer.
    first: Option<Box<[u8]>>,
    /// Endpoints that refused it, by id.
    tried: SmallVec<[u64; 4]>,
}

impl Drop for Flow {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl Flow {
    fn phase(&self) -> Phase {
        let wanted = u64::from(self.requests) * u64::from(self.expected);
        match self.expected > 0 && u64::from(self.responses) >= wanted {
            true => Phase::Finished,
            false => Phase::Waiting,
        }
    }
}

impl Listener {
    fn slot(&self) -> &ListenerSlot {
        self.stats.worker(self.worker.index)
    }

    /// Takes what clients have sent, up to a batch.
    async fn take(self: &Rc<Self>, takes_new: bool) {
        let taken = SCRATCH.with_borrow_mut(|scratch| {
            for _ in 0..BATCH {
                match self.socket.try_recv_from(scratch) {
                    Ok((length, client)) => self.request(client, &scratch[..length], takes_new),
                    Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(false),
                    // An ICMP message about an answer of ours: its client has gone, others have not.
                    Err(error) if is_icmp(&error) => {}
                    Err(error) => return Err(error),
                }
            }
            Ok(true)
        });
        match taken {
            Ok(false) => {}
            Ok(true) => tokio::task::yield_now().await,
            Err(error) => {
                tracing::warn!(%error, listener = %self.key, "cannot receive");
                tokio::time::sleep(BREATHER).await;
            }
        }
    }

    fn request(self: &Rc<Self>, client: SocketAddr, datagram: &[u8], takes_new: bool) {
        let found = self.flows.borrow().find(&client);
        let Some(index) = found else {
            if !takes_new || self.begin(client, datagram).is_none() {
                self.slot().dropped.inc();
            }
            return;
        };
        let sent = send(&self.flows.borrow().get(index).socket, datagram);
        match sent {
            Ok(_) => self.requested(index, datagram.len()),
            Err(error) if is_icmp(&error) => {
                // The error is of an earlier datagram; this one was not sent.
                self.flows.borrow_mut().get_mut(index).first = Some(datagram.into());
                self.refused(index);
            }
            Err(_) => self.slot().dropped.inc(),
        }
    }

    fn requested(&self, index: usize, bytes: usize) {
        let mut flows = self.flows.borrow_mut();
        let flow = flows.get_mut(index);
        flow.requests = flow.requests.saturating_add(1);
        let phase = flow.phase();
        flows.touch(index, phase, clock::now_ms());
        self.slot().datagrams_in.inc();
        self.slot().bytes_in.add(bytes as u64);
    }

    /// A client that has no flow yet. `None`: there is no endpoint that takes its datagram.
    fn begin(self: &Rc<Self>, client: SocketAddr, datagram: &[u8]) -> Option<()> {
        // In the live table for as long as new clients are taken, but for an instant.
        let listener = self.worker.router().listener(&self.key)?.clone();
        self.make_room();
        let index = self.flows.borrow().next_index();
        let mut tried = SmallVec::new();
        let Some((socket, upstream)) = self.connect(&listener, datagram, &mut tried) else {
            self.slot().failed.inc();
            return None;
        };
        let options = &self.worker.config.l4;
        let idle = listener.desired.idle_timeout.unwrap_or(options.idle);
        let flow = Flow {
            task: self.spawn(index, socket.clone()),
            socket,
            busy: InFlight::new(upstream.clone()),
            upstream,
            requests: 0,
            responses: 0,
            expected: listener.desired.responses.unwrap_or(options.udp_responses),
            idle_ms: idle.as_millis() as u64,
            first: (datagram.len() <= KEPT_BYTES).then(|| datagram.into()),
            tried,
        };
        let inserted = self.flows.borrow_mut().insert(client, flow, clock::now_ms());
        debug_assert_eq!(inserted, index);
        self.slot().opened.inc();
        self.slot().open.inc();
        self.requested(index, datagram.len());
        Some(())
    }

    /// The bound on flows: the oldest of those that have their answers goes first.
    fn make_room(&self) {
        let mut flows = self.flows.borrow_mut();
        while flows.len() >= self.worker.config.l4.udp_flows.max(1) {
            let (index, evicted) = match (flows.oldest(Phase::Finished), flows.oldest(Phase::Waiting)) {
                (Some((index, _)), _) => (index, false),
                (None, Some((index, _))) => (index, true),
                (None, None) => return,
            };
            self.end(&mut flows, index);
            if evicted {
                self.slot().evicted.inc();
            }
        }
    }

    /// A socket to an endpoint that is not among `tried`, with `datagram` sent.
    fn connect(
        &self,
        listener: &CompiledListener,
        datagram: &[u8],
        tried: &mut SmallVec<[u64; 4]>,
    ) -> Option<(Rc<UdpSocket>, Rc<Upstream>)> {
        let router = self.worker.router();
        let pool = router.pool(listener.pool);
        while tried.len() < self.worker.config.limits.tries as usize {
            let endpoint = pool.pick(&self.worker.turns, clock::now_ms(), tried)?;
            let connected = connect(endpoint.live.address)
                .and_then(|socket| send(&socket, datagram).map(|_| Rc::new(socket)));
            match connected {
                Ok(socket) => return Some((socket, self.worker.upstreams.of(&endpoint.live))),
                // Says nothing about the endpoint.
                Err(error) if is_exhaustion(&error) => {
                    tracing::debug!(%error, "no socket for a flow");
                    return None;
                }
                Err(error) => {
                    tracing::debug!(%error, endpoint = %endpoint.live.address, "cannot send");
                    tried.push(endpoint.live.id);
                    self.worker.metrics.upstream_failed.inc();
                    failed(&self.worker, &endpoint.live);
                }
            }
        }
        None
    }

    /// The endpoint's host says that nobody listens there: on to the next one, which gets the first
    /// datagram unless there has been an answer since.
    fn refused(self: &Rc<Self>, index: usize) {
        let mut flows = self.flows.borrow_mut();
        let flow = flows.get_mut(index);
        self.worker.metrics.upstream_failed.inc();
        failed(&self.worker, &flow.upstream.live);
        flow.tried.push(flow.upstream.live.id);
        let router = self.worker.router();
        let next = router.listener(&self.key).zip(flow.first.as_deref()).and_then(|(listener, datagram)| {
            let mut tried = flow.tried.clone();
            let connected = self.connect(listener, datagram, &mut tried);
            connected.map(|connected| (connected, tried))
        });
        let Some(((socket, upstream), tried)) = next else {
            if flow.first.is_some() {
                self.slot().failed.inc();
                self.slot().dropped.inc();
            }
            return self.end(&mut flows, index);
        };
        // What the endpoint before has not answered it never will.
        (flow.requests, flow.responses) = (1, 0);
        flow.tried = tried;
        flow.busy = InFlight::new(upstream.clone());
        flow.upstream = upstream;
        let before = std::mem::replace(&mut flow.task, self.spawn(index, socket.clone()));
        flow.socket = socket;
        flows.touch(index, Phase::Waiting, clock::now_ms());
        // It may be the task that runs right now; it returns after this.
        before.abort();
    }

    fn spawn(self: &Rc<Self>, index: usize, socket: Rc<UdpSocket>) -> AbortHandle {
        let listener = self.clone();
        tokio::task::spawn_local(async move { listener.answers(index, &socket).await }).abort_handle()
    }

    /// Passes on what the endpoint sends, until the flow ends: then this task is aborted.
    async fn answers(self: Rc<Self>, index: usize, socket: &UdpSocket) {
        loop {
            // Alone, an ICMP message makes a socket no more readable.
            let ready = socket.ready(Interest::READABLE | Interest::ERROR).await;
            if ready.is_ok_and(Ready::is_error) && has_failed(socket) {
                return self.refused(index);
            }
            let more = SCRATCH.with_borrow_mut(|scratch| {
                for _ in 0..BATCH {
                    match socket.try_recv(scratch) {
                        Ok(length) => self.answer(index, &scratch[..length]),
                        Err(error) if error.kind() == io::ErrorKind::WouldBlock => return true,
                        Err(_) => return false,
                    }
                }
                true
            });
            if !more {
                return self.refused(index);
            }
            tokio::task::coop::consume_budget().await;
        }
    }

    fn answer(&self, index: usize, datagram: &[u8]) {
        let mut flows = self.flows.borrow_mut();
        let client = flows.client(index);
        let flow = flows.get_mut(index);
        if flow.first.take().is_some() {
            flow.tried.clear();
            flow.upstream.live.succeeded();
        }
        flow.responses = flow.responses.saturating_add(1);
        let phase = flow.phase();
        flows.touch(index, phase, clock::now_ms());
        match SockRef::from(&self.socket).send_to(datagram, &client.into()) {
            Ok(_) => {
                self.slot().datagrams_out.inc();
                self.slot().bytes_out.add(datagram.len() as u64);
            }
            Err(_) => self.slot().dropped.inc(),
        }
    }

    /// Ends flows that have been silent for too long.
    fn sweep(&self) {
        let mut flows = self.flows.borrow_mut();
        let now = clock::now_ms();
        let linger = self.worker.config.l4.udp_linger.as_millis() as u64;
        while let Some((index, spoke)) = flows.oldest(Phase::Finished)
            && now.saturating_sub(spoke) >= linger
        {
            self.end(&mut flows, index);
        }
        // Those of an older table may have had longer: they only go a little later.
        while let Some((index, spoke)) = flows.oldest(Phase::Waiting)
            && now.saturating_sub(spoke) >= flows.get(index).idle_ms
        {
            self.end(&mut flows, index);
            self.slot().idle.inc();
        }
    }

    fn end(&self, flows: &mut Flows<Flow>, index: usize) {
        drop(flows.remove(index));
        self.slot().open.dec();
    }

    /// After the last request was taken: answers that are on their way, for a moment.
    async fn last_answers(&self) {
        let last = Instant::now() + self.worker.config.l4.udp_linger;
        let waits = || self.flows.borrow().oldest(Phase::Waiting).is_some();
        while waits() && Instant::now() < last {
            tokio::time::sleep(BREATHER).await;
        }
        let mut flows = self.flows.borrow_mut();
        for phase in [Phase::Finished, Phase::Waiting] {
            while let Some((index, _)) = flows.oldest(phase) {
                self.end(&mut flows, index);
            }
        }
    }
}

/// A socket that takes datagrams only from `endpoint`, and learns if its host refuses them.
fn connect(endpoint: SocketAddr) -> io::Result<UdpSocket> {
    let kind = Type::DGRAM.nonblocking();
    let socket = Socket::new(Domain::for_address(endpoint), kind, Some(Protocol::UDP))?;
    socket.connect(&endpoint.into())?;
    UdpSocket::from_std(socket.into())
}

/// Whether there is an error that nobody has been told of, as a send may have been.
fn has_failed(socket: &UdpSocket) -> bool {
    let error = socket.try_io(Interest::ERROR, || match SockRef::from(socket).take_error()? {
        Some(error) => Ok(error),
        None => Err(io::ErrorKind::WouldBlock.into()),
    });
    error.is_ok()
}

/// Past tokio, which does not believe that a socket can be written to before it has seen so, and would
/// drop the first datagram of every flow.
fn send(socket: &UdpSocket, datagram: &[u8]) -> io::Result<usize> {
    SockRef::from(socket).send(datagram)
}

/// What the host or a router on the way said about an earlier datagram.
fn is_icmp(error: &io::Error) -> bool {
    use io::ErrorKind::{ConnectionRefused, ConnectionReset, HostUnreachable, NetworkUnreachable};
    matches!(error.kind(), ConnectionRefused | ConnectionReset | HostUnreachable | NetworkUnreachable)
}
