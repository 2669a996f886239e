//! Files in, one store out: which file an object comes from, what happens when
//! two files hold the same one, and what stays when a file turns bad. Pure.

use std::collections::{BTreeMap, HashMap};
use std::path::Path;
use std::sync::Arc;

use imbl::OrdMap;

use crate::objects::{Notice, Object, ObjectRef, Parsed, parse};
use crate::source::document::{Document, Format, documents};
use crate::source::{FileProblem, Snapshot};
use crate::store::Store;

/// What every file holds, and the objects that follow from it.
#[derive(Default)]
pub(crate) struct Contents {
    files: HashMap<Arc<Path>, File>,
    /// The files that hold an object, sorted. The last one wins.
    holders: HashMap<ObjectRef, Vec<Arc<Path>>>,
    store: Store,
    notices: OrdMap<ObjectRef, Arc<Vec<Notice>>>,
    problems: BTreeMap<Arc<Path>, Vec<FileProblem>>,
    unused: BTreeMap<String, usize>,
}

#[derive(Default)]
struct File {
    objects: HashMap<ObjectRef, Held>,
    unused: Vec<String>,
}

/// An object as one file has it.
struct Held {
    /// `None`: the file has it, but it never was valid.
    object: Option<Object>,
    notices: Vec<Notice>,
}

impl Contents {
    /// Replaces what `path` holds.
    pub(crate) fn load(&mut self, path: &Arc<Path>, documents: Vec<Document>) {
        let mut old = self.files.remove(path).unwrap_or_default();
        self.count_unused(&old.unused, false);
        let mut problems = Vec::new();
        let mut file = File::default();
        for document in documents {
            let line = document.line;
            for parsed in parse(document.value) {
                file.take_in(parsed, &mut old, |notice| {
                    problems.push(FileProblem {
                        path: path.clone(),
                        line: Some(line),
                        column: None,
                        level: notice.level,
                        unreadable: false,
                        message: notice.to_string(),
                    });
                });
            }
        }
        let gone: Vec<ObjectRef> =
            old.objects.into_keys().filter(|reference| !file.objects.contains_key(reference)).collect();
        let held: Vec<ObjectRef> = file.objects.keys().cloned().collect();
        self.count_unused(&file.unused, true);
        self.files.insert(path.clone(), file);
        self.set_problems(path, problems);
        for reference in gone {
            self.release(&reference, path);
        }
        for reference in held {
            self.hold(reference, path);
        }
    }

    /// Replaces what `path` holds by what a text says, if it is YAML.
    pub(crate) fn load_text(&mut self, path: &Arc<Path>, text: &[u8]) {
        match documents(text, Format::Yaml) {
            Ok(documents) => self.load(path, documents),
            Err(error) => {
                let problem = FileProblem::unreadable(path.clone(), error.message);
                self.fail(FileProblem { line: error.line, column: error.column, ..problem });
            }
        }
    }

    /// Keeps what `path` held and says why it could not be replaced.
    /// Says whether that is news.
    pub(crate) fn fail(&mut self, problem: FileProblem) -> bool {
        let path = problem.path.clone();
        self.files.entry(path.clone()).or_default();
        let news = self.problems.get(&path).is_none_or(|known| *known != [problem.clone()]);
        self.set_problems(&path, vec![problem]);
        news
    }

    /// Forgets `path` and all that only it held.
    pub(crate) fn remove(&mut self, path: &Arc<Path>) {
        self.problems.remove(path);
        let Some(file) = self.files.remove(path) else { return };
        self.count_unused(&file.unused, false);
        for reference in file.objects.into_keys() {
            self.release(&reference, path);
        }
    }

    /// Whether `path` holds objects that are worth keeping.
    pub(crate) fn holds_objects(&self, path: &Path) -> bool {
        self.files.get(path).is_some_and(|file| !file.objects.is_empty())
    }

    /// The file that an object is taken from, if there is one.
    pub(crate) fn file_of(&self, reference: &ObjectRef) -> Option<&Path> {
        self.holders.get(reference)?.last().map(|path| &**path)
    }

    pub(crate) fn snapshot(&self) -> Snapshot {
        Snapshot {
            store: self.store.clone(),
            problems: self.problems.values().flatten().cloned().collect(),
            object_notices: self.notices.clone(),
            unused: self.unused.clone(),
            files: self.files.len(),
        }
    }

    fn hold(&mut self, reference: ObjectRef, path: &Arc<Path>) {
        let holders = self.holders.entry(reference.clone()).or_default();
        if let Err(at) = holders.binary_search(path) {
            holders.insert(at, path.clone());
        }
        self.resolve(&reference);
    }

    fn release(&mut self, reference: &ObjectRef, path: &Arc<Path>) {
        if let Some(holders) = self.holders.get_mut(reference) {
            holders.retain(|holder| holder != path);
            if holders.is_empty() {
                self.holders.remove(reference);
            }
        }
        self.resolve(reference);
    }

    /// Makes the store and the notices say of one object what its holders say.
    fn resolve(&mut self, reference: &ObjectRef) {
        let holders = self.holders.get(reference).map_or(&[][..], Vec::as_slice);
        let is_valid = |path: &&Arc<Path>| self.held(path, reference).is_some_and(|h| h.object.is_some());
        let winner = holders.iter().rev().find(is_valid);
        let Some(held) = winner.or(holders.last()).and_then(|path| self.held(path, reference)) else {
            self.store.remove(reference);
            self.notices.remove(reference);
            return;
        };
        let mut notices = held.notices.clone();
        if let (Some(winner), true) = (winner, holders.len() > 1) {
            let invalid =
                holders.iter().filter_map(|path| self.held(path, reference)).filter(|h| h.object.is_none());
            notices.extend(invalid.flat_map(|held| held.notices.iter().cloned()));
            notices.push(duplicate(winner, holders));
        }
        match &held.object {
            Some(object) => self.store.apply(object.clone()),
            None => self.store.remove(reference),
        }
        if notices.is_empty() {
            self.notices.remove(reference);
        } else {
            self.notices.insert(reference.clone(), Arc::new(notices));
        }
    }

    fn held(&self, path: &Arc<Path>, reference: &ObjectRef) -> Option<&Held> {
        self.files.get(path)?.objects.get(reference)
    }

    fn set_problems(&mut self, path: &Arc<Path>, problems: Vec<FileProblem>) {
        if problems.is_empty() {
            self.problems.remove(path);
        } else {
            self.problems.insert(path.clone(), problems);
        }
    }

    fn count_unused(&mut self, kinds: &[String], add: bool) {
        for kind in kinds {
            let count = self.unused.entry(kind.clone()).or_default();
            *count = if add { *count + 1 } else { count.saturating_sub(1) };
            if *count == 0 {
                self.unused.remove(kind);
            }
        }
    }
}

impl File {
    /// Adds one parsed object. `old` is what the file held before; what cannot
    /// be put on an object goes to `complain`.
    fn take_in(&mut self, parsed: Parsed, old: &mut File, complain: impl FnOnce(Notice)) {
        let (reference, mut held) = match parsed {
            Parsed::Unused(kind) => return self.unused.push(kind),
            Parsed::Object(object, notices) => (object.reference(), Held { object: Some(object), notices }),
            Parsed::Unsupported { reference, notice, .. } => {
                (reference, Held { object: None, notices: vec![notice] })
            }
            Parsed::Invalid { reference: None, notice } => return complain(notice),
            Parsed::Invalid { reference: Some(reference), notice } => {
                let kept = old.objects.remove(&reference).and_then(|held| held.object);
                let mut notices = vec![notice];
                if kept.is_some() {
                    notices.push(kept_notice());
                }
                // Put back, so that the caller still sees it as an object this file had.
                old.objects.insert(reference.clone(), Held { object: None, notices: Vec::new() });
                (reference, Held { object: kept, notices })
            }
        };
        if self.objects.contains_key(&reference) {
            held.notices.push(Notice::warning(
                ".metadata.name",
                "is in this file more than once; the last one is used",
                "remove the others or give them names of their own",
            ));
        }
        self.objects.insert(reference, held);
    }
}

fn duplicate(winner: &Arc<Path>, holders: &[Arc<Path>]) -> Notice {
    let others: Vec<String> =
        holders.iter().filter(|path| *path != winner).map(|path| path.display().to_string()).collect();
    Notice::warning(
        ".metadata.name",
        format!("is in {} and in {}; the first is used", winner.display(), others.join(", ")),
        "keep it in one file",
    )
}

fn kept_notice() -> Notice {
    Notice::warning("", "its last valid version stays in use", "correct the file")
}

#[cfg(test)]
mod tests;
