//! Snapshots in, the live table out: translate, publish only what differs, and
//! say once what became of the objects.

use std::collections::BTreeSet;
use std::fmt;
use std::sync::Arc;

use imbl::OrdMap;
use imbl::ordmap::DiffItem;
use lockgate_proxy::metrics::CertificateExpiry;
use lockgate_proxy::table::RoutingTable;
use tracing::{error, info, warn};

use crate::objects::{Kind, Level, Notice, ObjectRef};

use crate::source::{FileProblem, Snapshot};
use crate::text::printable;
use crate::translate::{Desired, Options, Translator};
use lockgate_proxy::router::{Live, Publisher};

/// Lines logged about one change; a folder that goes wrong as a whole must not
/// bury everything else.
const LINES_MAX: usize = 100;

type Notices = OrdMap<ObjectRef, Arc<Vec<Notice>>>;

/// Translates one snapshot after another and tells what changed.
pub struct Translation {
    translator: Translator,
    desired: Desired,
    told: Told,
    tallies: Tallies,
}

/// What was already said.
#[derive(Default)]
struct Told {
    statuses: Notices,
    object_notices: Notices,
    problems: Vec<FileProblem>,
}

/// How many objects are served as written, differently, or not.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Tallies {
    /// Ingresses without errors and warnings.
    pub accepted: usize,
    /// Ingresses with warnings.
    pub differing: usize,
    /// Ingresses with errors.
    pub refused: usize,
}

impl Translation {
    /// Nothing is translated yet.
    pub fn new(options: Options) -> Translation {
        Translation {
            translator: Translator::new(options),
            desired: Desired::default(),
            told: Told::default(),
            tallies: Tallies::default(),
        }
    }

    /// From the next update on, the node has these addresses.
    pub fn set_node_addresses(&mut self, addresses: Vec<std::net::IpAddr>) {
        self.translator.set_node_addresses(addresses);
    }

    /// Takes up a snapshot and logs what is new about its objects and files.
    pub fn update(&mut self, snapshot: &Snapshot) -> &Desired {
        self.desired = self.translator.translate(&snapshot.store);
        self.news(snapshot).finish();
        self.tallies.update(&self.told.statuses, &self.desired.statuses);
        self.told = Told {
            statuses: self.desired.statuses.clone(),
            object_notices: snapshot.object_notices.clone(),
            problems: snapshot.problems.clone(),
        };
        &self.desired
    }

    fn news(&self, snapshot: &Snapshot) -> Lines {
        let mut lines = Lines::default();
        lines.problems(&self.told.problems, &snapshot.problems);
        lines.notices(&self.told.object_notices, &snapshot.object_notices);
        lines.notices(&self.told.statuses, &self.desired.statuses);
        lines
    }

    /// What should be live now.
    pub fn desired(&self) -> &Desired {
        &self.desired
    }

    /// How many Ingresses are served.
    pub fn tallies(&self) -> Tallies {
        self.tallies
    }
}

impl Tallies {
    fn update(&mut self, old: &Notices, new: &Notices) {
        for difference in old.diff(new) {
            let (gone, come) = match difference {
                DiffItem::Add(reference, notices) => (None, Some((reference, notices))),
                DiffItem::Update { old, new } => (Some(old), Some(new)),
                DiffItem::Remove(reference, notices) => (Some((reference, notices)), None),
            };
            if let Some((_, notices)) = gone.filter(|(reference, _)| reference.kind == Kind::Ingress) {
                *self.of(notices) -= 1;
            }
            if let Some((_, notices)) = come.filter(|(reference, _)| reference.kind == Kind::Ingress) {
                *self.of(notices) += 1;
            }
        }
    }

    fn of(&mut self, notices: &[Notice]) -> &mut usize {
        match notices.iter().map(|notice| notice.level).min() {
            Some(Level::Error) => &mut self.refused,
            Some(Level::Warning) => &mut self.differing,
            Some(Level::Info) | None => &mut self.accepted,
        }
    }
}

/// Makes tables live.
pub struct Publishing {
    publisher: Publisher,
    live: Arc<Live>,
    /// What is live, to tell what changed.
    table: RoutingTable,
    generation: u64,
}

impl Publishing {
    /// Nothing is live yet.
    pub fn new(publisher: Publisher, live: Arc<Live>) -> Publishing {
        Publishing { publisher, live, table: RoutingTable::default(), generation: 0 }
    }

    /// Makes the translation live if its routes differ from those that are;
    /// says whether they did.
    pub fn publish(&mut self, translation: &Translation) -> bool {
        let tallies = translation.tallies();
        let states =
            [("accepted", tallies.accepted), ("differs", tallies.differing), ("refused", tallies.refused)];
        for (state, count) in states {
            self.live.metrics.set_objects("Ingress", state, count as u64);
        }
        let routes = &translation.desired().routes;
        // Equal parts are shared, so this compares what changed.
        if self.table.certificates != routes.certificates {
            self.live.metrics.set_certificates(expiries(routes));
        }
        self.table = routes.clone();
        let before = std::mem::replace(&mut self.generation, self.publisher.publish(routes.clone()));
        self.live.metrics.set_generation(self.generation);
        self.generation != before
    }

    /// Frees what only old generations needed; for quiet times.
    pub fn collect(&mut self) {
        self.publisher.collect();
    }

    /// Counts what was published, as the proxy does.
    pub fn generation(&self) -> u64 {
        self.generation
    }
}

fn expiries(table: &RoutingTable) -> Vec<CertificateExpiry> {
    let of_host = table.certificates.iter().flat_map(|(host, certificates)| {
        certificates.iter().map(move |certificate| CertificateExpiry {
            name: host.as_str().to_owned(),
            fingerprint: certificate.fingerprint().to_owned(),
            not_after: certificate.not_after(),
        })
    });
    of_host.collect()
}

/// The lines logged about one change.
#[derive(Default)]
struct Lines {
    lines: Vec<(Level, String)>,
    left_out: usize,
}

impl Lines {
    fn problems(&mut self, old: &[FileProblem], new: &[FileProblem]) {
        for problem in new.iter().filter(|problem| !old.contains(problem)) {
            self.log(problem.level, problem);
        }
        let paths: BTreeSet<_> = new.iter().map(|problem| &problem.path).collect();
        let solved: BTreeSet<_> =
            old.iter().map(|problem| &problem.path).filter(|path| !paths.contains(path)).collect();
        for path in solved {
            self.log(Level::Info, &format_args!("{}: no longer a problem", path.display()));
        }
    }

    fn notices(&mut self, old: &Notices, new: &Notices) {
        for difference in old.diff(new) {
            match difference {
                DiffItem::Add(reference, notices) => self.object(reference, &[], notices),
                DiffItem::Update { old: (_, old), new: (reference, new) } => self.object(reference, old, new),
                // The object is gone, or there is nothing to say about it any more.
                DiffItem::Remove(..) => {}
            }
        }
    }

    fn object(&mut self, reference: &ObjectRef, old: &[Notice], new: &[Notice]) {
        for notice in new.iter().filter(|notice| !old.contains(notice)) {
            self.log(notice.level, &format_args!("{reference}: {notice}"));
        }
        let bad = |notices: &[Notice]| notices.iter().any(|notice| notice.level != Level::Info);
        if bad(old) && !bad(new) {
            self.log(Level::Info, &format_args!("{reference}: served as written now"));
        }
    }

    fn log(&mut self, level: Level, line: &dyn fmt::Display) {
        if self.lines.len() == LINES_MAX {
            self.left_out += 1;
        } else {
            // One line each, whatever a manifest has in its strings.
            self.lines.push((level, printable(&line.to_string())));
        }
    }

    fn finish(self) {
        for (level, line) in self.lines {
            match level {
                Level::Error => error!("{line}"),
                Level::Warning => warn!("{line}"),
                Level::Info => info!("{line}"),
            }
        }
        if self.left_out > 0 {
            warn!("{} more such lines are left out; `lockgate check DIR` shows everything", self.left_out);
        }
    }
}

#[cfg(test)]
mod tests;
