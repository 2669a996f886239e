//! The kernel's events about the folder, reduced to what should be looked at.

use std::collections::{HashMap, HashSet};
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use notify::event::{AccessKind, AccessMode, CreateKind, Flag, ModifyKind, RemoveKind, RenameMode};
use notify::{EventKind, RecommendedWatcher, RecursiveMode, Watcher};
use tokio::sync::Notify;
use tokio::time::Instant;
use tracing::warn;

use crate::source::pending::{Change, Due, Pending};
use crate::source::scan::{self, Identity};

/// Watches directories one by one; which ones, the walk decides.
pub(crate) struct Watch {
    /// `None`: the system offers no events.
    watcher: Option<RecommendedWatcher>,
    shared: Arc<Shared>,
    directories: HashMap<PathBuf, Identity>,
    /// The system's limit of watches was reached.
    incomplete: bool,
}

struct Shared {
    root: PathBuf,
    state: Mutex<State>,
    noticed: Notify,
}

struct State {
    pending: Pending,
    /// Directories with a watch, to tell a directory that vanished from a file.
    directories: HashSet<PathBuf>,
    /// Directories whose watch may have gone with them.
    moved: HashSet<PathBuf>,
}

impl Watch {
    pub(crate) fn start(root: &Path, debounce: Duration) -> Watch {
        let shared = Arc::new(Shared {
            root: root.to_owned(),
            state: Mutex::new(State {
                pending: Pending::new(debounce),
                directories: HashSet::new(),
                moved: HashSet::new(),
            }),
            noticed: Notify::new(),
        });
        let listener = shared.clone();
        let watcher = notify::recommended_watcher(move |event| listener.hear(event));
        if let Err(error) = &watcher {
            warn!("changes of {} are noticed by looking every few seconds only: {error}", root.display());
        }
        Watch { watcher: watcher.ok(), shared, directories: HashMap::new(), incomplete: false }
    }

    /// Whether every directory is watched.
    pub(crate) fn is_reliable(&self) -> bool {
        self.watcher.is_some() && !self.incomplete
    }

    /// When there will be something to take, if nothing else happens.
    pub(crate) fn next(&self) -> Option<Instant> {
        self.shared.state().pending.next()
    }

    /// Waits until an event may have changed [`Watch::next`].
    pub(crate) async fn noticed(&self) {
        self.shared.noticed.notified().await;
    }

    pub(crate) fn take(&self, now: Instant) -> Due {
        self.shared.state().pending.take(now)
    }

    /// Whether a writer is known to be at work on this file.
    pub(crate) fn is_open(&self, path: &Path) -> bool {
        self.shared.state().pending.is_open(path)
    }

    /// Begins a walk that says which directories there are.
    pub(crate) fn round(&mut self) -> Round<'_> {
        let moved = std::mem::take(&mut self.shared.state().moved);
        if !moved.is_empty() {
            let gone = |path: &Path| path.ancestors().any(|ancestor| moved.contains(ancestor));
            let gone: Vec<PathBuf> = self.directories.keys().filter(|path| gone(path)).cloned().collect();
            for path in gone {
                self.unwatch(&path);
            }
        }
        let watched = self.directories.iter().map(|(path, identity)| (*identity, path.clone())).collect();
        self.incomplete = false;
        let mut round = Round { watch: self, watched, entered: HashSet::new() };
        // When the root is a link that is pointed elsewhere, only its parent knows.
        let root = round.watch.shared.root.clone();
        if let Some(parent) = root.parent().filter(|_| scan::is_link(&root)) {
            let parent = if parent.as_os_str().is_empty() { Path::new(".") } else { parent };
            if let Ok(metadata) = fs::metadata(parent) {
                round.enter(parent, scan::identity(&metadata));
            }
        }
        round
    }

    fn watch(&mut self, path: &Path, identity: Identity) {
        let Some(watcher) = &mut self.watcher else { return };
        if self.directories.contains_key(path) {
            // The same name, another directory: the old watch is of no use.
            let _ = watcher.unwatch(path);
        }
        match watcher.watch(path, RecursiveMode::NonRecursive) {
            Ok(()) => {
                self.directories.insert(path.to_owned(), identity);
                self.shared.state().directories.insert(path.to_owned());
            }
            // It vanished between being listed and being watched.
            Err(error) if matches!(error.kind, notify::ErrorKind::PathNotFound) => {}
            Err(error) => {
                self.incomplete = true;
                if matches!(error.kind, notify::ErrorKind::MaxFilesWatch) {
                    warn!(
                        "{} is looked at every few seconds only: the system's limit of watches is reached; \
                         raise fs.inotify.max_user_watches",
                        path.display()
                    );
                } else {
                    warn!("{} is looked at every few seconds only: {error}", path.display());
                }
            }
        }
    }

    fn unwatch(&mut self, path: &Path) {
        self.directories.remove(path);
        self.shared.state().directories.remove(path);
        if let Some(watcher) = &mut self.watcher {
            // Fails when the directory is gone, and its watch with it.
            let _ = watcher.unwatch(path);
        }
    }
}

/// One walk over the directories: new ones gain a watch, lost ones lose it.
pub(crate) struct Round<'a> {
    watch: &'a mut Watch,
    watched: HashMap<Identity, PathBuf>,
    entered: HashSet<PathBuf>,
}

impl Round<'_> {
    /// Makes sure that this directory is watched, under this or another name.
    pub(crate) fn enter(&mut self, path: &Path, identity: Identity) {
        if let Some(known) = self.watched.get(&identity) {
            self.entered.insert(known.clone());
            return;
        }
        self.watch.watch(path, identity);
        self.watched.insert(identity, path.to_owned());
        self.entered.insert(path.to_owned());
    }

    pub(crate) fn finish(self) {
        let lost: Vec<PathBuf> =
            self.watch.directories.keys().filter(|path| !self.entered.contains(*path)).cloned().collect();
        for path in lost {
            self.watch.unwatch(&path);
        }
    }
}

impl Shared {
    fn state(&self) -> MutexGuard<'_, State> {
        // Every update is complete in itself, so a panic elsewhere leaves nothing half done.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn hear(&self, event: notify::Result<notify::Event>) {
        let now = Instant::now();
        match event {
            Ok(event) if event.flag() == Some(Flag::Rescan) => self.state().pending.note_rescan(now),
            Ok(event) => {
                for path in event.paths {
                    self.hear_of(event.kind, path, now);
                }
            }
            Err(_) => self.state().pending.note_rescan(now),
        }
        self.noticed.notify_one();
    }

    fn hear_of(&self, kind: EventKind, path: PathBuf, now: Instant) {
        use EventKind::{Access, Create, Modify, Remove};
        // Reading is also an event; ours would wake us forever.
        let ends_write = matches!(kind, Access(AccessKind::Close(AccessMode::Write)));
        if matches!(kind, Access(_)) && !ends_write
            || matches!(kind, Modify(ModifyKind::Name(RenameMode::Both)))
        {
            return;
        }
        let name = path.file_name().unwrap_or_default();
        let moves = matches!(kind, Create(_) | Remove(_) | Modify(ModifyKind::Name(_)));
        if moves && (name.as_encoded_bytes().starts_with(b"..") || path == self.root) {
            // `..data` of a ConfigMap mount was pointed at the next version.
            return self.structure(path, now);
        }
        if scan::is_hidden(name) {
            return;
        }
        if matches!(kind, Create(CreateKind::Folder) | Remove(RemoveKind::Folder))
            || moves && self.state().directories.contains(&path)
        {
            return self.structure(path, now);
        }
        if scan::format(&path).is_none() {
            let arrives = matches!(kind, Create(_) | Modify(ModifyKind::Name(RenameMode::To)));
            if arrives && fs::symlink_metadata(&path).is_ok_and(|m| m.is_dir() || m.is_symlink()) {
                self.structure(path, now);
            }
            return;
        }
        let change = match kind {
            Modify(ModifyKind::Data(_)) => Change::Written,
            Access(_) | Remove(_) | Modify(ModifyKind::Name(_)) => Change::Settled,
            _ => Change::Touched,
        };
        self.state().pending.note(path, change, now);
    }

    fn structure(&self, path: PathBuf, now: Instant) {
        let mut state = self.state();
        state.moved.insert(path);
        state.pending.note_rescan(now);
    }
}
