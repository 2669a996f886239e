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
use std::rc::Rc;

use tokio::sync::{mpsc, watch};
use tokio::task::JoinHandle;

use crate::clock;
use crate::endpoint::LiveEndpoint;
use crate::listener::stopped;
use crate::table::{ListenerKey, Transport};
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
                let sockets = listening.entry(key).or_default();
                let is_closing = |listening: &&Listening| *listening.closing.borrow() != Closing::No;
                match sockets.iter().find(is_closing).filter(|_| key.transport == Transport::Udp) {
                    // Flows of its first life still go on: they and the new ones share the old socket.
                    Some(listening) => drop(listening.closing.send_replace(Closing::No)),
                    None => sockets.push(Listening::new(&worker, key, socket)),
                }
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
}

impl Listening {
    fn new(worker: &Rc<Worker>, key: ListenerKey, socket: Socket) -> Listening {
        let (closing, closed) = watch::channel(Closing::No);
        let worker = worker.clone();
        let task = tokio::task::spawn_local(async move {
            let result = match socket {
                Socket::Tcp(socket) => tcp::accept(worker, key, socket, closed).await,
                Socket::Udp(socket) => udp::serve(worker, key, socket, closed).await,
            };
            if let Err(error) = result {
                tracing::error!(%error, listener = %key, "listener failed");
            }
        });
        Listening { closing, task }
    }
}

/// Counts a failure against an endpoint.
fn failed(worker: &Worker, endpoint: &LiveEndpoint) {
    if endpoint.failed(clock::now_ms(), &worker.config.ejection) {
        worker.metrics.ejections.inc();
        tracing::warn!(endpoint = %endpoint.address, "endpoint keeps failing: left alone for a while");
    }
}
