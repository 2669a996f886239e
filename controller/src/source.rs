//! Where objects come from. A source lists everything once, then watches; each
//! time something changed it hands out a [`Snapshot`], never a difference.

use std::collections::BTreeMap;
use std::fmt;
use std::path::Path;
use std::sync::Arc;

use imbl::OrdMap;

use crate::objects::{Level, Notice, ObjectRef};
use crate::store::Store;

mod contents;
mod document;
mod folder;
mod pending;
mod scan;
mod watch;

pub(crate) use contents::Contents;
#[cfg(any(test, feature = "fuzzing"))]
pub(crate) use document::{Format, documents};
pub use folder::{Folder, FolderError, FolderOptions};
pub(crate) use scan::{read_into, walk};

/// All that a source knows at one moment. Cloning is cheap: the large parts are shared.
#[derive(Clone, Default)]
pub struct Snapshot {
    /// The objects.
    pub store: Store,
    /// Files that could not be used, by path. Their last good objects are still in `store`.
    pub problems: Vec<FileProblem>,
    /// What was found while reading an object, before it met the others.
    pub object_notices: OrdMap<ObjectRef, Arc<Vec<Notice>>>,
    /// How many objects there are of each kind that is not used here.
    pub unused: BTreeMap<String, usize>,
    /// How many files were read successfully.
    pub files: usize,
}

/// Why a file is not used, or not entirely.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FileProblem {
    /// The file, as it is found from the folder that was named.
    pub path: Arc<Path>,
    /// Counted from 1; `None` when it concerns the whole file.
    pub line: Option<usize>,
    /// Counted from 1.
    pub column: Option<usize>,
    /// How bad it is.
    pub level: Level,
    /// Nothing of the file could be used; otherwise only one document could not.
    pub unreadable: bool,
    /// What is wrong and what to do.
    pub message: String,
}

impl FileProblem {
    pub(crate) fn unreadable(path: Arc<Path>, message: impl Into<String>) -> FileProblem {
        FileProblem {
            path,
            line: None,
            column: None,
            level: Level::Error,
            unreadable: true,
            message: message.into(),
        }
    }
}

impl fmt::Display for FileProblem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.path.display())?;
        if let Some(line) = self.line {
            write!(f, ":{line}")?;
            if let Some(column) = self.column {
                write!(f, ":{column}")?;
            }
        }
        write!(f, ": {}", self.message)
    }
}
