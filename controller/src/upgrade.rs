//! `--upgrade-socket`: this process in a chain of upgrades of the binary.

use std::path::Path;

use anyhow::Context;
use lockgate_proxy::handover::{Estate, Inheritance, Predecessor, UpgradeSocket, inherit};
use tracing::info;

/// The process before this one, and where the one after it will ask.
#[derive(Default)]
pub(crate) struct Upgrade {
    predecessor: Option<Predecessor>,
    socket: Option<UpgradeSocket>,
}

impl Upgrade {
    /// Takes what the process at `path` has, if there is one. Without a path
    /// there is neither a process before this one nor one after it.
    ///
    /// # Errors
    /// A process is there and does not hand over, or no socket can be made beside `path`.
    pub(crate) async fn begin(path: Option<&Path>) -> anyhow::Result<(Inheritance, Upgrade)> {
        let Some(path) = path else { return Ok(Default::default()) };
        let socket = UpgradeSocket::prepare(path)
            .with_context(|| format!("cannot create --upgrade-socket {}", path.display()))?;
        let (inherited, predecessor) = inherit(path)
            .await
            .with_context(|| format!("cannot take over through --upgrade-socket {}", path.display()))?;
        if predecessor.is_some() {
            info!("taking over from the process at {}", path.display());
        }
        Ok((inherited, Upgrade { predecessor, socket: Some(socket) }))
    }

    /// Whether another process still serves.
    pub(crate) fn has_predecessor(&self) -> bool {
        self.predecessor.is_some()
    }

    /// This process serves: the one before it drains, the one after it may come.
    ///
    /// # Errors
    /// The socket cannot be put at its path. A process before this one serves on.
    pub(crate) async fn ready(&mut self) -> anyhow::Result<()> {
        let Some(socket) = &self.socket else { return Ok(()) };
        match self.predecessor.take() {
            None => socket.show(),
            Some(predecessor) => predecessor.relieve(socket).await,
        }
        .context("cannot put --upgrade-socket in place")
    }

    /// Returns when another process has taken over from this one.
    pub(crate) async fn successor(&self, estate: &Estate) {
        match &self.socket {
            None => std::future::pending().await,
            Some(socket) => socket.successor(estate).await,
        }
    }
}
