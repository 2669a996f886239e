//! A folder of manifests: read once, then watched.
//!
//! An event costs the file it names. Only what says nothing precise (a
//! directory that moved, an overflow of the kernel's queue, a link) makes the
//! whole folder be compared by `stat`, and a slow timer does so as well, for
//! file systems whose events never arrive.

use std::collections::{HashMap, HashSet};
use std::fs;
use std::hash::{BuildHasher, RandomState};
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use thiserror::Error;
use tokio::time::{Instant, sleep_until};

use crate::source::document::documents;
use crate::source::scan::{self, Identity, ReadError, Signature};
use crate::source::watch::Watch;
use crate::source::{Contents, FileProblem, Snapshot};

/// How a folder is read and watched.
#[derive(Clone, Debug)]
pub struct FolderOptions {
    /// A change is read once nothing has changed for this long, or after a second.
    pub debounce: Duration,
    /// Larger files are refused, in bytes.
    pub file_size_max: u64,
    /// Further files are refused.
    pub files_max: usize,
    /// How often everything is compared with what was read, events or not.
    pub rescan: Duration,
}

impl Default for FolderOptions {
    fn default() -> FolderOptions {
        FolderOptions {
            debounce: Duration::from_millis(100),
            file_size_max: 32 << 20,
            files_max: 100_000,
            rescan: Duration::from_secs(30),
        }
    }
}

/// Why a folder cannot be a source at all.
#[derive(Debug, Error)]
pub enum FolderError {
    /// It is not there, or may not be entered.
    #[error("{path} cannot be opened: {source}; name an existing folder of manifests")]
    Open {
        /// The folder as it was named.
        path: PathBuf,
        /// What the system says.
        source: io::Error,
    },
    /// It is a file.
    #[error("{0} is not a folder; name the folder that holds your manifests")]
    NotAFolder(PathBuf),
}

/// Without events the folder is compared this often.
const RESCAN_WITHOUT_EVENTS: Duration = Duration::from_secs(2);

/// A watched folder of manifests.
pub struct Folder {
    root: PathBuf,
    options: FolderOptions,
    watch: Watch,
    contents: Contents,
    known: HashMap<Arc<Path>, Known>,
    /// The path each known file is read under; it may have others.
    names: HashMap<Identity, Arc<Path>>,
    aliases: HashSet<PathBuf>,
    /// Directories that could not be listed; what they held is kept.
    unlisted: Vec<FileProblem>,
    hasher: RandomState,
    next_rescan: Instant,
}

/// What is remembered of a file between two looks at it.
struct Known {
    /// `None`: it could not be read.
    signature: Option<Signature>,
    /// Of its bytes; `None` when they were not used.
    hash: Option<u64>,
}

impl Folder {
    /// Reads everything below `root` and starts watching it.
    pub fn open(root: &Path, options: FolderOptions) -> Result<(Folder, Snapshot), FolderError> {
        let metadata =
            fs::metadata(root).map_err(|source| FolderError::Open { path: root.into(), source })?;
        if !metadata.is_dir() {
            return Err(FolderError::NotAFolder(root.into()));
        }
        fs::read_dir(root).map_err(|source| FolderError::Open { path: root.into(), source })?;
        let mut folder = Folder {
            root: root.to_owned(),
            watch: Watch::start(root, options.debounce),
            next_rescan: Instant::now(),
            options,
            contents: Contents::default(),
            known: HashMap::new(),
            names: HashMap::new(),
            aliases: HashSet::new(),
            unlisted: Vec::new(),
            hasher: RandomState::new(),
        };
        folder.scan();
        let snapshot = folder.snapshot();
        Ok((folder, snapshot))
    }

    /// Waits until something changed and was read. Cancelling it loses nothing.
    pub async fn changed(&mut self) -> Snapshot {
        loop {
            let due_at = self.watch.next().map_or(self.next_rescan, |at| at.min(self.next_rescan));
            tokio::select! {
                () = sleep_until(due_at) => {}
                () = self.watch.noticed() => continue,
            }
            let now = Instant::now();
            let mut due = self.watch.take(now);
            due.rescan |= now >= self.next_rescan;
            let mut changed = self.look_at(due.paths, &mut due.rescan);
            if due.rescan {
                changed |= self.scan();
            }
            if changed {
                return self.snapshot();
            }
        }
    }

    fn snapshot(&self) -> Snapshot {
        let mut snapshot = self.contents.snapshot();
        snapshot.problems.splice(0..0, self.unlisted.iter().cloned());
        snapshot
    }

    /// Reads the files that events named; says whether anything changed, and
    /// through `rescan` whether a whole scan is needed to know.
    fn look_at(&mut self, paths: Vec<(PathBuf, bool)>, rescan: &mut bool) -> bool {
        let mut changed = false;
        let (gone, there): (Vec<_>, Vec<_>) =
            paths.into_iter().partition(|(path, _)| fs::metadata(path).is_err());
        for (path, _) in gone {
            if self.known.contains_key(path.as_path()) {
                changed |= self.read(&path.as_path().into(), false);
                *rescan |= !self.aliases.is_empty();
            } else {
                // What a link led to, or a link that leads nowhere.
                *rescan |= !self.aliases.remove(&path) && (!self.is_visible(&path) || scan::is_link(&path));
            }
        }
        for (path, open) in there {
            let Ok(metadata) = fs::metadata(&path) else { continue };
            if metadata.is_dir() {
                *rescan = true;
            } else if self.known.contains_key(path.as_path()) {
                changed |= self.read(&path.as_path().into(), open);
            } else if let Some(name) = self.names.get(&scan::identity(&metadata)).cloned() {
                if self.is_visible(&path) {
                    self.aliases.insert(path);
                }
                changed |= self.read(&name, open);
            } else if self.is_visible(&path)
                && !scan::is_link(&path)
                && self.known.len() < self.options.files_max
            {
                changed |= self.read(&path.into(), open);
            } else {
                *rescan = true;
            }
        }
        changed
    }

    /// Whether a walk from the root would find this path.
    fn is_visible(&self, path: &Path) -> bool {
        path.strip_prefix(&self.root).is_ok_and(|below| !below.iter().any(scan::is_hidden))
    }

    /// Compares the whole folder with what is known.
    fn scan(&mut self) -> bool {
        let found = {
            let mut round = self.watch.round();
            let found = scan::walk(&self.root, self.options.files_max, &mut |path, identity| {
                round.enter(path, identity);
            });
            round.finish();
            found
        };
        let mut changed = false;
        let lost: Vec<Arc<Path>> = self
            .known
            .keys()
            .filter(|path| !found.files.contains_key(*path))
            .filter(|path| !found.problems.iter().any(|problem| path.starts_with(&problem.path)))
            .cloned()
            .collect();
        for path in lost {
            self.forget(&path);
            changed = true;
        }
        for (path, signature) in &found.files {
            let same = self.known.get(path).is_some_and(|known| known.signature == Some(*signature));
            if !same && !self.watch.is_open(path) {
                changed |= self.read(path, false);
            }
        }
        self.aliases = found.aliases;
        changed |= self.unlisted != found.problems;
        let period = if self.watch.is_reliable() { self.options.rescan } else { RESCAN_WITHOUT_EVENTS };
        self.next_rescan =
            Instant::now() + if found.problems.is_empty() { period } else { RESCAN_WITHOUT_EVENTS };
        self.unlisted = found.problems;
        changed
    }

    /// Reads one file again; says whether that changed anything. `open`: its
    /// writer may not be done.
    fn read(&mut self, path: &Arc<Path>, open: bool) -> bool {
        let (bytes, signature) = match scan::read(path, self.options.file_size_max) {
            Ok(read) => read,
            Err(ReadError::Gone) => return self.forget(path),
            Err(ReadError::Failed(message)) => {
                let signature = fs::metadata(path).ok().as_ref().map(Signature::of);
                self.remember(path, signature, None);
                return self.fail(path, None, None, message);
            }
        };
        let hash = self.hasher.hash_one(&bytes);
        if self.known.get(path).is_some_and(|known| known.hash == Some(hash)) {
            self.remember(path, Some(signature), Some(hash));
            return false;
        }
        if open && bytes.trim_ascii().is_empty() && self.contents.holds_objects(path) {
            self.remember(path, Some(signature), None);
            let message =
                "is empty, but still open for writing; its last objects stay in use until it is closed";
            return self.fail(path, None, None, message.into());
        }
        self.remember(path, Some(signature), Some(hash));
        let format = scan::format(path).unwrap_or(crate::source::document::Format::Yaml);
        match documents(&bytes, format) {
            Ok(documents) => self.contents.load(path, documents),
            Err(error) => {
                let kept = if self.contents.holds_objects(path) {
                    "; its last good objects stay in use"
                } else {
                    ""
                };
                return self.fail(path, error.line, error.column, format!("{}{kept}", error.message));
            }
        }
        true
    }

    fn fail(
        &mut self,
        path: &Arc<Path>,
        line: Option<usize>,
        column: Option<usize>,
        message: String,
    ) -> bool {
        let problem = FileProblem::unreadable(path.clone(), message);
        self.contents.fail(FileProblem { line, column, ..problem })
    }

    fn remember(&mut self, path: &Arc<Path>, signature: Option<Signature>, hash: Option<u64>) {
        let known = Known { signature, hash };
        if let Some(old) = self.known.insert(path.clone(), known) {
            self.unname(path, old);
        }
        if let Some(signature) = signature {
            self.names.insert(signature.identity, path.clone());
        }
    }

    fn forget(&mut self, path: &Arc<Path>) -> bool {
        let Some(old) = self.known.remove(path) else { return false };
        self.unname(path, old);
        self.contents.remove(path);
        true
    }

    fn unname(&mut self, path: &Arc<Path>, old: Known) {
        if let Some(identity) = old.signature.map(|signature| signature.identity) {
            // Unless the file has moved on to another path in the meantime.
            if self.names.get(&identity) == Some(path) {
                self.names.remove(&identity);
            }
        }
    }
}
