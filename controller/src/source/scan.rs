//! Reading the folder: which files there are, whether one changed, what it says.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::ffi::OsStr;
use std::fs::{self, File, Metadata};
use std::io::{self, Read};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use crate::source::document::{Format, documents};
use crate::source::{Contents, FileProblem};

/// A file or directory whatever it is called: device and inode.
pub(crate) type Identity = (u64, u64);

/// Two equal signatures mean: not written in between.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Signature {
    pub(crate) identity: Identity,
    size: u64,
    modified: (i64, i64),
    changed: (i64, i64),
}

impl Signature {
    pub(crate) fn of(metadata: &Metadata) -> Signature {
        Signature {
            identity: identity(metadata),
            size: metadata.size(),
            modified: (metadata.mtime(), metadata.mtime_nsec()),
            changed: (metadata.ctime(), metadata.ctime_nsec()),
        }
    }
}

pub(crate) fn identity(metadata: &Metadata) -> Identity {
    (metadata.dev(), metadata.ino())
}

/// How a path is read, if it is a manifest by its name.
pub(crate) fn format(path: &Path) -> Option<Format> {
    match path.extension().and_then(OsStr::to_str)?.to_ascii_lowercase().as_str() {
        "yaml" | "yml" => Some(Format::Yaml),
        "json" => Some(Format::Json),
        _ => None,
    }
}

pub(crate) fn is_hidden(name: &OsStr) -> bool {
    name.as_encoded_bytes().starts_with(b".")
}

pub(crate) fn is_link(path: &Path) -> bool {
    fs::symlink_metadata(path).is_ok_and(|metadata| metadata.is_symlink())
}

/// What a walk found.
#[derive(Default)]
pub(crate) struct Found {
    /// Every manifest once, by the first path it is found under.
    pub(crate) files: BTreeMap<Arc<Path>, Signature>,
    /// Further paths of files that are in `files`.
    pub(crate) aliases: HashSet<PathBuf>,
    pub(crate) problems: Vec<FileProblem>,
}

/// Finds every manifest below `root`. `enter` is called with each directory
/// before it is listed, so that a watch placed there misses nothing.
pub(crate) fn walk(root: &Path, files_max: usize, enter: &mut dyn FnMut(&Path, Identity)) -> Found {
    let mut walk = Walk {
        found: Found::default(),
        files: HashMap::new(),
        directories: HashSet::new(),
        files_max,
        overflow: false,
    };
    match fs::metadata(root) {
        Ok(metadata) => walk.directory(root, &metadata, enter),
        Err(error) => walk.complain(root, format!("cannot be listed: {error}")),
    }
    if walk.overflow {
        let message = format!(
            "holds more than {files_max} manifests; the rest is not read (--max-files raises the limit)"
        );
        walk.complain(root, message);
    }
    walk.found
}

struct Walk {
    found: Found,
    files: HashMap<Identity, Arc<Path>>,
    directories: HashSet<Identity>,
    files_max: usize,
    overflow: bool,
}

impl Walk {
    fn directory(&mut self, path: &Path, metadata: &Metadata, enter: &mut dyn FnMut(&Path, Identity)) {
        // A directory that was already seen: a loop, or a second link to it.
        if !self.directories.insert(identity(metadata)) {
            return;
        }
        enter(path, identity(metadata));
        let mut entries: Vec<fs::DirEntry> = match fs::read_dir(path).and_then(Iterator::collect) {
            Ok(entries) => entries,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return,
            Err(error) => return self.complain(path, format!("cannot be listed: {error}")),
        };
        entries.sort_by_key(fs::DirEntry::file_name);
        for entry in entries {
            self.entry(&entry, enter);
        }
    }

    fn entry(&mut self, entry: &fs::DirEntry, enter: &mut dyn FnMut(&Path, Identity)) {
        // Kubernetes mounts a ConfigMap as links into `..data`; editors keep
        // their copies in dot files. Neither is a manifest of its own.
        if is_hidden(&entry.file_name()) {
            return;
        }
        let path = entry.path();
        let is_link = entry.file_type().is_ok_and(|kind| kind.is_symlink());
        let is_plain = entry.file_type().is_ok_and(|kind| kind.is_file());
        if is_plain && format(&path).is_none() {
            return;
        }
        match fs::metadata(&path) {
            Ok(metadata) if metadata.is_dir() => self.directory(&path, &metadata, enter),
            Ok(metadata) if metadata.is_file() && format(&path).is_some() => {
                if is_link {
                    follow(&path, enter);
                }
                self.file(path, &metadata);
            }
            Ok(_) => {}
            Err(error) if error.kind() == io::ErrorKind::NotFound && !is_link => {}
            Err(error) if format(&path).is_some() => self.complain(&path, format!("cannot be read: {error}")),
            Err(_) => {}
        }
    }

    fn file(&mut self, path: PathBuf, metadata: &Metadata) {
        if self.files.contains_key(&identity(metadata)) {
            self.found.aliases.insert(path);
            return;
        }
        if self.found.files.len() >= self.files_max {
            self.overflow = true;
            return;
        }
        let path: Arc<Path> = path.into();
        self.files.insert(identity(metadata), path.clone());
        self.found.files.insert(path, Signature::of(metadata));
    }

    fn complain(&mut self, path: &Path, message: String) {
        self.found.problems.push(FileProblem::unreadable(path.into(), message));
    }
}

/// A linked file is written where it really is: that directory is watched too.
pub(crate) fn follow(link: &Path, enter: &mut dyn FnMut(&Path, Identity)) {
    let Ok(target) = fs::canonicalize(link) else { return };
    let Some(directory) = target.parent() else { return };
    if let Ok(metadata) = fs::metadata(directory) {
        enter(directory, identity(&metadata));
    }
}

/// Why a file could not be read.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum ReadError {
    /// There is no such file any more.
    Gone,
    /// What is wrong and what to do.
    Failed(String),
}

/// Reads a file of at most `size_max` bytes. The signature is from before the
/// first byte was read, so a later write makes it differ.
pub(crate) fn read(path: &Path, size_max: u64) -> Result<(Vec<u8>, Signature), ReadError> {
    let failed = |error: io::Error| match error.kind() {
        io::ErrorKind::NotFound => ReadError::Gone,
        _ => ReadError::Failed(format!("cannot be read: {error}")),
    };
    // Asked before opening: opening a named pipe would wait for its writer.
    if !fs::metadata(path).map_err(failed)?.is_file() {
        return Err(ReadError::Failed("is not a regular file".into()));
    }
    let file = File::open(path).map_err(failed)?;
    let metadata = file.metadata().map_err(failed)?;
    let mut bytes = Vec::with_capacity(metadata.len().min(size_max) as usize);
    file.take(size_max.saturating_add(1)).read_to_end(&mut bytes).map_err(failed)?;
    if bytes.len() as u64 > size_max {
        return Err(ReadError::Failed(format!(
            "is larger than {size_max} bytes ({} bytes); split it, or raise --max-file-size",
            metadata.len().max(bytes.len() as u64)
        )));
    }
    Ok((bytes, Signature::of(&metadata)))
}

/// Reads `path` into `contents`, whatever its name; for `check`, which looks once.
pub(crate) fn read_into(contents: &mut Contents, path: &Arc<Path>, size_max: u64) {
    let problem = |message: String| FileProblem::unreadable(path.clone(), message);
    match read(path, size_max) {
        Ok((bytes, _)) => match documents(&bytes, format(path).unwrap_or(Format::Yaml)) {
            Ok(documents) => contents.load(path, documents),
            Err(error) => {
                let problem = problem(error.message);
                contents.fail(FileProblem { line: error.line, column: error.column, ..problem });
            }
        },
        Err(ReadError::Gone) => {
            contents.fail(problem("does not exist".into()));
        }
        Err(ReadError::Failed(message)) => {
            contents.fail(problem(message));
        }
    }
}
