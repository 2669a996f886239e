//! Listening sockets by name.
//!
//! A name says what a socket is for, as `http 0.0.0.0:8080`; the sockets of
//! several workers for one address share it. Who listens asks by name for what
//! the process before had, binds only what is missing, and leaves a copy for
//! the process after. Copies exist only where an upgrade is possible at all.

use std::collections::BTreeSet;
use std::fmt;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::{Arc, Mutex, PoisonError};

use rustix::net::getsockname;

/// A socket and its name, at most 255 bytes.
pub(super) type Named = (Arc<str>, Arc<OwnedFd>);

/// Sockets inherited and not yet taken, and those in use that are to be passed on.
#[derive(Default)]
pub struct Sockets {
    inherited: Mutex<Vec<(Arc<str>, OwnedFd)>>,
    /// `None`: nobody will ask for them.
    live: Option<Mutex<Vec<Named>>>,
}

impl Sockets {
    /// These were inherited, and those in use are kept for the next process.
    pub(super) fn kept(inherited: Vec<(Arc<str>, OwnedFd)>) -> Sockets {
        Sockets { inherited: Mutex::new(inherited), live: Some(Mutex::default()) }
    }

    /// The inherited sockets of this name and one address, which are then no longer here.
    /// Every one of them must be accepted from (or read): clients wait in each.
    pub fn take(&self, name: &str) -> Vec<OwnedFd> {
        let mut inherited = self.inherited.lock().unwrap_or_else(PoisonError::into_inner);
        // Port 0 asked for twice is one name and two addresses.
        let Some(first) = inherited.iter().find(|(of, _)| **of == *name) else { return Vec::new() };
        let address = getsockname(&first.1).ok();
        let is_wanted =
            |(of, socket): &mut (Arc<str>, OwnedFd)| **of == *name && getsockname(&*socket).ok() == address;
        inherited.extract_if(.., is_wanted).map(|(_, socket)| socket).collect()
    }

    /// Keeps a copy of a socket in use for the next process. Does nothing where none can ask.
    ///
    /// # Errors
    /// There are no more file descriptors, or the name is longer than 255 bytes.
    pub fn keep(&self, name: &str, socket: &impl AsFd) -> io::Result<()> {
        let Some(live) = &self.live else { return Ok(()) };
        if name.len() > usize::from(u8::MAX) {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        let copy = socket.as_fd().try_clone_to_owned()?;
        live.lock().unwrap_or_else(PoisonError::into_inner).push((name.into(), Arc::new(copy)));
        Ok(())
    }

    /// Lets go of the copies of this name. To be called before a listener takes
    /// what waits in its queue and closes: with a copy left, clients would go on connecting.
    pub fn forget(&self, name: &str) {
        if let Some(live) = &self.live {
            live.lock().unwrap_or_else(PoisonError::into_inner).retain(|(of, _)| **of != *name);
        }
    }

    /// As [`Sockets::forget`], of all names.
    pub(crate) fn forget_all(&self) {
        if let Some(live) = &self.live {
            live.lock().unwrap_or_else(PoisonError::into_inner).clear();
        }
    }

    /// Closes what was inherited and nobody took: its names.
    pub(super) fn close_inherited(&self) -> BTreeSet<Arc<str>> {
        let mut inherited = self.inherited.lock().unwrap_or_else(PoisonError::into_inner);
        inherited.drain(..).map(|(name, _)| name).collect()
    }

    /// What the next process gets, at most as much as the protocol can say.
    pub(super) fn offer(&self) -> Vec<Named> {
        let Some(live) = &self.live else { return Vec::new() };
        let live = live.lock().unwrap_or_else(PoisonError::into_inner);
        live.iter().take(super::wire::SOCKETS).cloned().collect()
    }
}

impl fmt::Debug for Sockets {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Sockets").finish_non_exhaustive()
    }
}
