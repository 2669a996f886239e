//! Which ports are open: bound here, once for each worker, so that a port is open in all of them or in none.

use std::collections::BTreeMap;
use std::io;
use std::net::{SocketAddr, TcpListener, UdpSocket};
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::Duration;

use socket2::{Domain, Protocol, SockRef, Socket as AnySocket, Type};
use tokio::sync::{mpsc, oneshot, watch};
use tokio::time::{Instant, timeout, timeout_at};

use crate::handover::Sockets;
use crate::listener;
use crate::router::{Listeners, Live};
use crate::table::{ListenerKey, Transport};

/// How long a port that could not be bound is left alone at first; doubles up to [`RETRY_MAX`].
const RETRY: Duration = Duration::from_millis(250);
const RETRY_MAX: Duration = Duration::from_secs(10);

/// How long workers may take to say which sockets of a port they still read.
const ANSWER: Duration = Duration::from_secs(5);

/// Commands a worker may be behind with.
const COMMANDS: usize = 64;

/// Bytes of datagrams the kernel holds for us before they are read, if the host allows it
/// (`net.core.rmem_max`).
const RECEIVE_BUFFER: usize = 4 << 20;

/// What a worker is to do.
#[derive(Debug)]
pub(crate) enum Command {
    Open(ListenerKey, Socket),
    /// Take new clients again on the UDP sockets of this key that flows still hold, and answer with
    /// copies of them.
    Resume(ListenerKey, oneshot::Sender<Vec<OwnedFd>>),
    Close(ListenerKey),
}

/// One worker's socket of a listener.
#[derive(Debug)]
pub(crate) enum Socket {
    Tcp(TcpListener),
    Udp(UdpSocket),
}

/// Whether an L4 listener of the table is open.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ListenerState {
    /// It is, at this address, whose port is a real one.
    Open(SocketAddr),
    /// It cannot be opened, for this reason; tried again within 10 s.
    Failed(String),
}

/// The state of every L4 listener of the table. Shared; for whoever shows it.
#[derive(Debug)]
pub struct ListenerStates(watch::Sender<BTreeMap<ListenerKey, ListenerState>>);

impl Default for ListenerStates {
    fn default() -> ListenerStates {
        ListenerStates(watch::Sender::new(BTreeMap::new()))
    }
}

impl ListenerStates {
    /// Those of the newest table that has been taken up.
    pub fn get(&self) -> BTreeMap<ListenerKey, ListenerState> {
        self.0.borrow().clone()
    }

    /// As [`ListenerStates::get`], and tells when it changes.
    pub fn subscribe(&self) -> watch::Receiver<BTreeMap<ListenerKey, ListenerState>> {
        self.0.subscribe()
    }
}

/// Opens and closes listeners as tables come.
pub(crate) struct Opener {
    wanted: watch::Receiver<Listeners>,
    workers: Vec<mpsc::Sender<Command>>,
    /// Where the proxy itself listens. With `SO_REUSEPORT` a second bind would take half its clients.
    taken: Vec<SocketAddr>,
    /// What the process before had, and what is kept for the one after.
    named: Arc<Sockets>,
    live: Arc<Live>,
    open: BTreeMap<ListenerKey, SocketAddr>,
    failed: BTreeMap<ListenerKey, String>,
}

impl Opener {
    /// Starts on a thread of its own; ends when the publisher has. What it returns is for
    /// [`super::serve`], one for each worker.
    pub(crate) fn start(
        wanted: watch::Receiver<Listeners>,
        workers: usize,
        taken: Vec<SocketAddr>,
        named: Arc<Sockets>,
        live: Arc<Live>,
    ) -> io::Result<Vec<mpsc::Receiver<Command>>> {
        let (workers, commands) = (0..workers).map(|_| mpsc::channel(COMMANDS)).unzip();
        let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build()?;
        let (open, failed) = (BTreeMap::new(), BTreeMap::new());
        let opener = Opener { wanted, workers, taken, named, live, open, failed };
        let thread = std::thread::Builder::new().name("lockgate-open".to_owned());
        thread.spawn(move || runtime.block_on(opener.run()))?;
        Ok(commands)
    }

    async fn run(mut self) {
        let mut retry = RETRY;
        loop {
            let wait = if self.failed.is_empty() { None } else { Some(retry) };
            let changed = match wait {
                None => self.wanted.changed().await,
                Some(wait) => match timeout(wait, self.wanted.changed()).await {
                    Ok(changed) => changed,
                    Err(_) => Ok(()),
                },
            };
            if changed.is_err() {
                return;
            }
            let before = self.failed.len();
            self.follow().await;
            let grew = self.failed.len() > before;
            retry = if grew { RETRY } else { (retry * 2).min(RETRY_MAX) };
        }
    }

    /// Makes what is open equal to what is wanted, as far as that is possible now.
    async fn follow(&mut self) {
        let wanted = self.wanted.borrow_and_update().clone();
        let gone: Vec<ListenerKey> =
            self.open.keys().filter(|key| !wanted.contains_key(*key)).copied().collect();
        for key in gone {
            self.open.remove(&key);
            self.live.metrics.listener(&key).set_open(None);
            tracing::info!(listener = %key, "listener closes");
            self.named.forget(&key.to_string());
            for worker in &self.workers {
                // A worker that is gone has closed it.
                let _ = worker.send(Command::Close(key)).await;
            }
        }
        let gone: Vec<ListenerKey> =
            self.failed.keys().filter(|key| !wanted.contains_key(*key)).copied().collect();
        for key in gone {
            self.failed.remove(&key);
            self.live.metrics.listener(&key).set_open(None);
        }
        let missing = wanted.keys().filter(|key| !self.open.contains_key(key)).copied();
        for key in missing.collect::<Vec<_>>() {
            self.open(key).await;
        }
        let open = self.open.iter().map(|(key, address)| (*key, ListenerState::Open(*address)));
        let failed = self.failed.iter().map(|(key, why)| (*key, ListenerState::Failed(why.clone())));
        self.live.listeners.0.send_replace(open.chain(failed).collect());
    }

    async fn open(&mut self, key: ListenerKey) {
        let resumed = match key.transport {
            Transport::Tcp => self.workers.iter().map(|_| Vec::new()).collect(),
            Transport::Udp => self.resume(key).await,
        };
        match self.bind(key, &resumed) {
            Ok((address, sockets)) => {
                self.failed.remove(&key);
                self.open.insert(key, address);
                self.live.metrics.listener(&key).set_open(Some(true));
                tracing::info!(listener = %key, %address, "listener open");
                for (worker, socket) in sockets {
                    // A worker that is gone drains: it takes no new listener, and nobody else should wait for it.
                    if self.workers[worker].send(Command::Open(key, socket)).await.is_err() {
                        self.named.forget(&key.to_string());
                    }
                }
            }
            Err(error) => {
                self.named.forget(&key.to_string());
                let why = error.to_string();
                self.live.metrics.listener(&key).set_open(Some(false));
                if self.failed.get(&key) != Some(&why) {
                    tracing::error!(listener = %key, error = why, "cannot listen; it is tried again");
                }
                self.failed.insert(key, why);
                for (worker, _) in
                    self.workers.iter().zip(&resumed).filter(|(_, sockets)| !sockets.is_empty())
                {
                    let _ = worker.send(Command::Close(key)).await;
                }
            }
        }
    }

    /// The sockets on which each worker goes on, because flows of the port's life before hold them. A new
    /// socket beside one would be bound for nothing: with `SO_REUSEPORT` it takes datagrams from the moment
    /// it is, and as a copy for the next process it would do so with nobody to read them.
    async fn resume(&self, key: ListenerKey) -> Vec<Vec<OwnedFd>> {
        let mut answers = Vec::with_capacity(self.workers.len());
        for worker in &self.workers {
            let (answer, answered) = oneshot::channel();
            // A worker that is gone has no socket, and says so by dropping the answer.
            let _ = worker.send(Command::Resume(key, answer)).await;
            answers.push(answered);
        }
        let deadline = Instant::now() + ANSWER;
        let mut resumed = Vec::with_capacity(answers.len());
        for answered in answers {
            // One that answers later reads its old socket and a new one, and only the new one is handed over.
            resumed.push(timeout_at(deadline, answered).await.ok().and_then(Result::ok).unwrap_or_default());
        }
        resumed
    }

    /// Where the port is, and the sockets that workers, by index, have to be given: those inherited, and a
    /// new one for each that has neither one of them nor one that it goes on with.
    fn bind(
        &self,
        key: ListenerKey,
        resumed: &[Vec<OwnedFd>],
    ) -> io::Result<(SocketAddr, Vec<(usize, Socket)>)> {
        let is_taken = |taken: &&SocketAddr| {
            let wide = taken.ip().is_unspecified() || key.address.ip().is_unspecified();
            taken.port() == key.address.port() && (wide || taken.ip() == key.address.ip())
        };
        if key.transport == Transport::Tcp
            && let Some(taken) = self.taken.iter().find(is_taken)
        {
            return Err(io::Error::other(format!("{taken} serves HTTP or HTTPS here: choose another port")));
        }
        let name = key.to_string();
        let mut address = key.address;
        for socket in resumed.iter().flatten() {
            address = SockRef::from(socket).local_addr()?.as_socket().unwrap_or(address);
            self.named.keep(&name, socket)?;
        }
        let mut without = (0..self.workers.len()).filter(|worker| resumed[*worker].is_empty());
        let mut sockets = Vec::new();
        // Each has a queue of its own: with fewer workers than before, some have several.
        let mut inherited = self.named.take(&name).into_iter();
        loop {
            let (inherited, worker) = (inherited.next(), without.next());
            if inherited.is_none() && worker.is_none() {
                return Ok((address, sockets));
            }
            let worker = worker.unwrap_or(sockets.len() % self.workers.len());
            let socket = match key.transport {
                Transport::Tcp => Socket::Tcp(match inherited {
                    Some(socket) => socket.into(),
                    None => listener::bind(address)?,
                }),
                Transport::Udp => Socket::Udp(match inherited {
                    Some(socket) => socket.into(),
                    None => bind_udp(address)?,
                }),
            };
            // Port 0 is resolved once; the other workers share what it became.
            address = match &socket {
                Socket::Tcp(socket) => {
                    socket.local_addr().and_then(|real| self.named.keep(&name, socket).map(|()| real))
                }
                Socket::Udp(socket) => {
                    socket.local_addr().and_then(|real| self.named.keep(&name, socket).map(|()| real))
                }
            }?;
            sockets.push((worker, socket));
        }
    }
}

fn bind_udp(address: SocketAddr) -> io::Result<UdpSocket> {
    let socket = AnySocket::new(Domain::for_address(address), Type::DGRAM, Some(Protocol::UDP))?;
    socket.set_reuse_port(true)?;
    if address.is_ipv6() {
        socket.set_only_v6(false)?;
    }
    socket.set_recv_buffer_size(RECEIVE_BUFFER)?;
    socket.set_nonblocking(true)?;
    socket.bind(&address.into())?;
    Ok(socket.into())
}
