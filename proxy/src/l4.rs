//! TCP and UDP ports that are relayed as they are, opened and closed while the proxy runs.
//!
//! ```text
//!  publish ─► watch ─► opener (one thread): binds every port once per worker, tries again what fails
//!                         │ a socket to each worker        └─► ListenerStates, metrics
//!                         ▼
//!                      worker: accept ─► the listener's pool in the live router ─► relay
//! ```
//!
//! A listener lives as long as its key is in the table: what it points at may change under it. What it
//! has accepted outlives it, and every generation.

mod flows;
mod open;
mod tcp;
mod udp;

use std::collections::HashMap;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::rc::{Rc, Weak};

use tokio::net::UdpSocket;
use tokio::sync::{mpsc, watch};
use tokio::task::JoinHandle;

use crate::clock;
use crate::endpoint::LiveEndpoint;
use crate::listener::stopped;
use crate::table::ListenerKey;
use crate::worker::Worker;

pub(crate) use open::{Command, Opener, Socket};
pub use open::{ListenerState, ListenerStates};

/// Carries out what the opener says until `stop` turns true, then closes every listener.
pub(crate) async fn serve(
    worker: Rc<Worker>,
    mut commands: mpsc::Receiver<Command>,
    mut stop: watch::Receiver<bool>,
) {
    // Several for one key, if a process before had more workers.
    let mut listening: HashMap<ListenerKey, Vec<Listening>> = HashMap::new();
    loop {
        let command = tokio::select! {
            biased;
            () = stopped(&mut stop) => break,
            command = commands.recv() => command,
        };
        match command {
            Some(Command::Open(key, socket)) => {
                listening.retain(|_, sockets| {
                    sockets.retain(|listening| !listening.task.is_finished());
                    !sockets.is_empty()
                });
                match Listening::new(&worker, key, socket) {
                    Ok(new) => listening.entry(key).or_default().push(new),
                    Err(error) => tracing::error!(%error, listener = %key, "listener failed"),
                }
            }
            Some(Command::Resume(key, answer)) => {
                let sockets = listening.get(&key).into_iter().flatten();
                let resumed = sockets.filter_map(Listening::resume).collect();
                // If nobody waits any more: the opener has bound another socket, and both are read.
                let _ = answer.send(resumed);
            }
            Some(Command::Close(key)) => {
                for listening in listening.get(&key).into_iter().flatten() {
                    listening.closing.send_replace(Closing::NothingNew);
                }
            }
            // Nothing will be published any more: serve on as it is.
            None => {
                stopped(&mut stop).await;
                break;
            }
        }
    }
    // Whoever waits for an answer to one of them need not wait any longer.
    drop(commands);
    for listening in listening.values().flatten() {
        listening.closing.send_replace(Closing::Drained);
    }
    for listening in listening.into_values().flatten() {
        // A task that panicked has said so.
        let _ = listening.task.await;
    }
}

/// What a listener may still take.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Closing {
    /// Everything.
    No,
    /// It has left the table: what is established goes on.
    NothingNew,
    /// The process ends, and another may have the same socket by now: not a single datagram.
    Drained,
}

/// One listener of one worker.
struct Listening {
    closing: watch::Sender<Closing>,
    task: JoinHandle<()>,
    /// The task's. Nowhere for TCP, where what is accepted needs no listener.
    socket: Weak<UdpSocket>,
}

impl Listening {
    fn new(worker: &Rc<Worker>, key: ListenerKey, socket: Socket) -> io::Result<Listening> {
        let (closing, closed) = watch::channel(Closing::No);
        let worker = worker.clone();
        let said = move |result: io::Result<()>| {
            if let Err(error) = result {
                tracing::error!(%error, listener = %key, "listener failed");
            }
        };
        Ok(match socket {
            Socket::Tcp(socket) => {
                let serving = tcp::accept(worker, key, socket, closed);
                let task = tokio::task::spawn_local(async move { said(serving.await) });
                Listening { closing, task, socket: Weak::new() }
            }
            Socket::Udp(socket) => {
                let socket = Rc::new(UdpSocket::from_std(socket)?);
                let weak = Rc::downgrade(&socket);
                let serving = udp::serve(worker, key, socket, closed);
                let task = tokio::task::spawn_local(async move { said(serving.await) });
                Listening { closing, task, socket: weak }
            }
        })
    }

    /// Takes new clients again, beside the flows that still go on: a copy of the socket they share.
    fn resume(&self) -> Option<OwnedFd> {
        let socket = self.socket.upgrade().filter(|_| !self.task.is_finished())?;
        let copy = socket.as_fd().try_clone_to_owned();
        // Without a copy there is nothing to hand over, and a new socket is bound beside it: both are read.
        self.closing.send_replace(Closing::No);
        copy.inspect_err(|error| tracing::warn!(%error, "cannot copy a socket in use")).ok()
    }
}

/// Counts a failure against an endpoint.
fn failed(worker: &Worker, endpoint: &LiveEndpoint) {
    if endpoint.failed(clock::now_ms(), &worker.config.ejection) {
        worker.metrics.ejections.inc();
        tracing::warn!(endpoint = %endpoint.address, "endpoint keeps failing: left alone for a while");
    }
}
