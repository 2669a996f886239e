//! An upgrade of the binary that drops nothing: the new process takes the
//! listening sockets of the old one over a UNIX socket, the old one drains.
//!
//! ```text
//!  new process                                   old process, listening at PATH
//!    connects to PATH ── Hello ─────────────────► same user? same version?
//!                     ◄─ Offer ────────────────── ticket keys, number of sockets
//!                     ◄─ Sockets ──────────────── names and descriptors, in batches
//!    binds what is new, publishes its first table, accepts
//!                     ── Ready ─────────────────►
//!                     ◄─ Agreed ─────────────────
//!    renames its own socket to PATH
//!                     ── Taken ─────────────────► accepts no more, drains, ends
//! ```
//!
//! Until `Taken` the old process serves as if nothing were: a new one that dies
//! before costs nothing. Both hold the same sockets, so no queue is ever closed
//! and nothing is bound again; what waits in a queue is accepted by either.
//! Sockets go by name ([`Sockets`]), so the two need not agree on what there is.

use std::fs;
use std::io;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use rustix::fs::Mode;
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType};
use tokio::net::{UnixListener, UnixStream};
use tracing::{info, warn};

use crate::tls::tickets::{Exported, TicketKeys};

mod sockets;
mod wire;

pub use sockets::Sockets;
use wire::{Message, Wire};

/// For each message that the other process has nothing to do for first.
const EXCHANGE: Duration = Duration::from_secs(10);

/// From the last socket to `Ready`: the new process reads and translates everything in between.
const READY: Duration = Duration::from_secs(600);

/// After an accept failed for want of descriptors.
const BREATHER: Duration = Duration::from_millis(50);

/// Why an upgrade cannot proceed. The old process serves on.
#[derive(Debug, thiserror::Error)]
pub enum HandoverError {
    /// The path is taken by something that is not a socket.
    #[error("{0} exists and is not a socket: remove it or choose another path")]
    NotASocket(PathBuf),
    /// The process at the other end runs as another user.
    #[error("the process at the other end runs as user {theirs}, this one as {ours}: run both as the same")]
    OtherUser {
        /// Its effective user id.
        theirs: u32,
        /// Our effective user id.
        ours: u32,
    },
    /// The other process says no, and why.
    #[error("the other process refuses: {0}")]
    Refused(String),
    /// The other process says something else than it should.
    #[error("the other process does not keep to the protocol: {0}")]
    Protocol(&'static str),
    /// The other process has gone or cannot be reached.
    #[error("while {during}: {source}")]
    Io {
        /// What was being done.
        during: &'static str,
        /// The system's answer.
        source: io::Error,
    },
    /// The other process took too long.
    #[error("no answer within {limit:?} while {during}")]
    Late {
        /// What was being waited for.
        during: &'static str,
        /// How long.
        limit: Duration,
    },
}

/// What a proxy starts with. The default is nothing, and nothing is kept for a
/// process after this one.
#[derive(Debug, Default)]
pub struct Inheritance {
    pub(crate) sockets: Arc<Sockets>,
    pub(crate) tickets: Vec<Exported>,
}

impl Inheritance {
    /// The sockets, for listeners that the proxy knows nothing of.
    pub fn sockets(&self) -> &Arc<Sockets> {
        &self.sockets
    }
}

/// What a running proxy has for the process after it.
#[derive(Clone, Debug)]
pub struct Estate {
    pub(crate) sockets: Arc<Sockets>,
    pub(crate) tickets: Arc<TicketKeys>,
}

/// The old process, seen from the new one.
pub struct Predecessor {
    wire: Wire,
    sockets: Arc<Sockets>,
}

/// Asks the process that listens at `path` for its sockets. Without one there
/// is no predecessor, and this is the first process of a chain.
///
/// # Errors
/// Something is there that does not hand over; it serves on, and this process
/// should not start: it would share the ports.
pub async fn inherit(path: &Path) -> Result<(Inheritance, Option<Predecessor>), HandoverError> {
    let first = |sockets| Inheritance { sockets: Arc::new(sockets), tickets: Vec::new() };
    let connecting = async {
        match UnixStream::connect(path).await {
            Ok(stream) => Ok(Some(stream)),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            // Left behind by a process that did not end in order, unless it is no socket at all.
            Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => {
                match fs::symlink_metadata(path).is_ok_and(|found| !found.file_type().is_socket()) {
                    true => Err(HandoverError::NotASocket(path.to_owned())),
                    false => Ok(None),
                }
            }
            Err(source) => Err(HandoverError::Io { during: "connecting to the running process", source }),
        }
    };
    let Some(stream) = within(EXCHANGE, "connecting to the running process", connecting).await? else {
        return Ok((first(Sockets::kept(Vec::new())), None));
    };
    let mut wire = Wire::new(checked(stream)?);
    within(EXCHANGE, "greeting the running process", wire.send(&Message::Hello)).await?;
    let offer = within(EXCHANGE, "waiting for the running process's offer", wire.receive()).await?;
    let (tickets, count) = match offer {
        Message::Offer { tickets, sockets } => (tickets, sockets),
        Message::Refused(why) => return Err(HandoverError::Refused(why)),
        _ => return Err(HandoverError::Protocol("an offer was expected")),
    };
    let mut named = Vec::new();
    while named.len() < count {
        match within(EXCHANGE, "waiting for the running process's sockets", wire.receive()).await? {
            Message::Sockets(more) if !more.is_empty() && named.len() + more.len() <= count => {
                named.extend(more);
            }
            _ => return Err(HandoverError::Protocol("sockets were expected")),
        }
    }
    let sockets = Arc::new(Sockets::kept(named));
    Ok((Inheritance { sockets: sockets.clone(), tickets }, Some(Predecessor { wire, sockets })))
}

impl Predecessor {
    /// Tells the old process that this one serves; when this returns, it drains.
    /// `ours` is where the next process will ask.
    ///
    /// Sockets nobody has taken are closed: their addresses are no longer served.
    ///
    /// # Errors
    /// `ours` cannot be put in place: the old process serves on, and this one should end.
    pub async fn relieve(mut self, ours: &UpgradeSocket) -> io::Result<()> {
        for name in self.sockets.close_inherited() {
            warn!("{name} is no longer served: the process before this one takes what waits there");
        }
        let agreed = async {
            within(EXCHANGE, "telling the old process", self.wire.send(&Message::Ready)).await?;
            match within(EXCHANGE, "waiting for the old process to agree", self.wire.receive()).await? {
                Message::Agreed => Ok(()),
                _ => Err(HandoverError::Protocol("an agreement was expected")),
            }
        };
        let agreed = agreed.await;
        ours.show()?;
        let taken = match agreed {
            Ok(()) => within(EXCHANGE, "telling the old process", self.wire.send(&Message::Taken)).await,
            failed => failed,
        };
        // This process has every socket: whatever has become of the old one, it can serve.
        if let Err(error) = taken {
            warn!("the process before this one may still be there: {error}");
        }
        Ok(())
    }
}

/// Where this process waits for the one that replaces it.
pub struct UpgradeSocket {
    listener: UnixListener,
    path: PathBuf,
    /// Its name until it is shown.
    hidden: PathBuf,
    /// Device and inode: the file at `path` may be another process's.
    file: (u64, u64),
    left: AtomicBool,
}

impl UpgradeSocket {
    /// Creates the socket, mode 0600, beside `path`; [`UpgradeSocket::show`] puts it there.
    ///
    /// # Errors
    /// The folder is missing or read-only, or the path too long for a socket.
    pub fn prepare(path: &Path) -> io::Result<UpgradeSocket> {
        let mut hidden = path.as_os_str().to_owned();
        hidden.push(format!(".{}", std::process::id()));
        let hidden = PathBuf::from(hidden);
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        let socket = rustix::net::socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)?;
        let address = SocketAddrUnix::new(&hidden)?;
        match rustix::net::bind(&socket, &address) {
            // A process that had our id has left it.
            Err(rustix::io::Errno::ADDRINUSE) => {
                fs::remove_file(&hidden)?;
                rustix::net::bind(&socket, &address)?;
            }
            bound => bound?,
        }
        // Nobody can connect before it listens, and it does not before the mode is set.
        rustix::fs::chmod(&hidden, Mode::RUSR | Mode::WUSR)?;
        rustix::net::listen(&socket, 16)?;
        let found = fs::symlink_metadata(&hidden)?;
        Ok(UpgradeSocket {
            listener: UnixListener::from_std(socket.into())?,
            path: path.to_owned(),
            hidden,
            file: (found.dev(), found.ino()),
            left: AtomicBool::new(false),
        })
    }

    /// Puts the socket at its path, in place of whatever was there, at once.
    ///
    /// # Errors
    /// The folder does not let it.
    pub fn show(&self) -> io::Result<()> {
        fs::rename(&self.hidden, &self.path)
    }

    /// Hands `estate` to whoever asks; returns when a new process has taken over.
    /// One that fails before costs nothing but a line in the log.
    pub async fn successor(&self, estate: &Estate) {
        loop {
            match self.listener.accept().await {
                Ok((stream, _)) => match bequeath(stream, estate).await {
                    Ok(()) => return self.left.store(true, Ordering::Relaxed),
                    Err(error) => warn!("not upgraded, this process serves on: {error}"),
                },
                Err(error) => {
                    warn!(%error, "upgrade socket");
                    tokio::time::sleep(BREATHER).await;
                }
            }
        }
    }
}

impl Drop for UpgradeSocket {
    fn drop(&mut self) {
        if self.left.load(Ordering::Relaxed) {
            return;
        }
        for path in [&self.hidden, &self.path] {
            let found = fs::symlink_metadata(path);
            if found.is_ok_and(|found| (found.dev(), found.ino()) == self.file) {
                // What cannot be removed is replaced by the next process.
                let _ = fs::remove_file(path);
            }
        }
    }
}

async fn bequeath(stream: UnixStream, estate: &Estate) -> Result<(), HandoverError> {
    let mut wire = Wire::new(checked(stream)?);
    match within(EXCHANGE, "waiting for the new process's greeting", wire.receive()).await {
        Ok(Message::Hello) => {}
        Ok(_) => return Err(HandoverError::Protocol("a greeting was expected")),
        Err(error) => {
            if let HandoverError::Refused(why) = &error {
                // It fails by itself, but better with the reason.
                let _ = within(EXCHANGE, "refusing", wire.send(&Message::Refused(why.clone()))).await;
            }
            return Err(error);
        }
    }
    info!("a new process asks for the sockets");
    let sockets = estate.sockets.offer();
    let offer = Message::Offer { tickets: estate.tickets.export(), sockets: sockets.len() };
    within(EXCHANGE, "offering", wire.send(&offer)).await?;
    for batch in sockets.chunks(wire::BATCH) {
        within(EXCHANGE, "handing over the sockets", wire.send_sockets(batch)).await?;
    }
    drop(sockets);
    match within(READY, "waiting until the new process is ready", wire.receive()).await? {
        Message::Ready => {}
        _ => return Err(HandoverError::Protocol("readiness was expected")),
    }
    within(EXCHANGE, "agreeing", wire.send(&Message::Agreed)).await?;
    match within(EXCHANGE, "waiting until the new process has taken over", wire.receive()).await? {
        Message::Taken => Ok(()),
        _ => Err(HandoverError::Protocol("the end was expected")),
    }
}

/// Only our own user gets the sockets and the ticket keys, and is believed to be who it says.
fn checked(stream: UnixStream) -> Result<UnixStream, HandoverError> {
    let credentials = stream.peer_cred();
    let theirs = credentials
        .map_err(|source| HandoverError::Io { during: "looking who is at the other end", source })?
        .uid();
    let ours = rustix::process::geteuid().as_raw();
    if theirs == ours { Ok(stream) } else { Err(HandoverError::OtherUser { theirs, ours }) }
}

async fn within<T>(
    limit: Duration,
    during: &'static str,
    step: impl Future<Output = Result<T, impl Into<StepError>>>,
) -> Result<T, HandoverError> {
    match tokio::time::timeout(limit, step).await {
        Err(_) => Err(HandoverError::Late { during, limit }),
        Ok(Ok(done)) => Ok(done),
        Ok(Err(error)) => Err(match error.into() {
            StepError::Io(source) => HandoverError::Io { during, source },
            StepError::Other(error) => error,
        }),
    }
}

/// What a step fails with, before it is known during which.
enum StepError {
    Io(io::Error),
    Other(HandoverError),
}

impl From<io::Error> for StepError {
    fn from(error: io::Error) -> StepError {
        StepError::Io(error)
    }
}

impl From<HandoverError> for StepError {
    fn from(error: HandoverError) -> StepError {
        StepError::Other(error)
    }
}

#[cfg(test)]
mod tests;
