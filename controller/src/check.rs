//! `lockgate check`: what manifests will do here, before they do it.

use std::collections::{BTreeMap, BTreeSet};
use std::io::Read;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use serde::{Serialize, Serializer};

use crate::args::{CheckArgs, ObjectArgs, Output};
use crate::objects::{Kind, Level, Notice, ObjectRef};
use crate::source::{Contents, FileProblem, Snapshot, read_into, walk};
use crate::store::{Key, Store};
use crate::text::{Text, Tone, count, printable};
use crate::translate::translate;

pub(crate) mod routes;

/// Longer names push what follows them to the right.
const NAME_WIDTH_MAX: usize = 48;

/// Names listed of each kind that is not supported.
const NAMES_MAX: usize = 3;

/// The annotation that names a ConfigMap.
const CUSTOM_HEADERS: &str = "nginx.ingress.kubernetes.io/custom-headers";

/// What becomes of one object. The order is that of severity.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Verdict {
    /// Served as written.
    Accepted,
    /// A kind that is not served yet.
    Unsupported,
    /// Served, but not exactly as written.
    Differs,
    /// Something it asks for is not done.
    Refused,
}

/// Everything `check` has to say.
#[derive(Serialize)]
pub struct Report {
    verdict: Verdict,
    files: usize,
    problems: Vec<Problem>,
    objects: Vec<Entry>,
    routes: Vec<routes::Route>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    ports: Vec<routes::Port>,
    /// Objects that are used, by kind.
    used: BTreeMap<&'static str, usize>,
    /// Objects that are not, by kind.
    unused: BTreeMap<String, usize>,
}

#[derive(Serialize)]
struct Entry {
    object: ObjectRef,
    #[serde(skip_serializing_if = "Option::is_none")]
    file: Option<PathBuf>,
    verdict: Verdict,
    notices: Vec<Notice>,
}

#[derive(Serialize)]
struct Problem {
    #[serde(serialize_with = "display")]
    at: FileProblem,
    unreadable: bool,
    level: Level,
}

fn display<S: Serializer>(problem: &FileProblem, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.collect_str(problem)
}

/// Runs `lockgate check`; returns the exit status.
pub fn run(args: &CheckArgs) -> u8 {
    let contents = read_all(&args.paths, &args.objects);
    let report = Report::new(&contents, &args.objects);
    match args.output {
        Output::Json => {
            let mut text = Text::new(false);
            match serde_json::to_string_pretty(&report) {
                Ok(json) => text.plain(&json).line(),
                Err(error) => {
                    text.plain(&format!("lockgate: the report cannot be written as JSON: {error}")).line()
                }
            };
            text.print();
        }
        Output::Text => {
            let mut text = Text::for_stdout();
            report.print(&mut text);
            text.print();
        }
    }
    report.exit_status(args.strict)
}

/// Reads files, folders and standard input (`-`) once.
pub(crate) fn read_all(paths: &[PathBuf], args: &ObjectArgs) -> Contents {
    let mut contents = Contents::default();
    for path in paths {
        if path.as_os_str() == "-" {
            read_stdin(&mut contents, args.max_file_size.0);
        } else if path.is_dir() {
            let found = walk(path, args.max_files, &mut |_, _| {});
            if found.files.is_empty() && found.problems.is_empty() {
                contents.fail(FileProblem::unreadable(
                    path.as_path().into(),
                    "holds no manifest; name a folder with .yaml, .yml or .json files",
                ));
            }
            found.files.keys().for_each(|file| read_into(&mut contents, file, args.max_file_size.0));
            for problem in found.problems {
                contents.fail(problem);
            }
        } else {
            read_into(&mut contents, &path.as_path().into(), args.max_file_size.0);
        }
    }
    contents
}

fn read_stdin(contents: &mut Contents, size_max: u64) {
    let path: Arc<Path> = Path::new("standard input").into();
    let mut bytes = Vec::new();
    match std::io::stdin().lock().take(size_max.saturating_add(1)).read_to_end(&mut bytes) {
        Ok(read) if read as u64 > size_max => {
            contents.fail(FileProblem::unreadable(path, "is too large; raise --max-file-size"));
        }
        Ok(_) => contents.load_text(&path, &bytes),
        Err(error) => {
            contents.fail(FileProblem::unreadable(path, format!("cannot be read: {error}")));
        }
    }
}

/// What was said about each object while reading and while translating.
pub(crate) fn all_notices(
    snapshot: &Snapshot,
    statuses: &imbl::OrdMap<ObjectRef, Arc<Vec<Notice>>>,
) -> BTreeMap<ObjectRef, Vec<Notice>> {
    let mut all: BTreeMap<ObjectRef, Vec<Notice>> = BTreeMap::new();
    for (reference, notices) in snapshot.object_notices.iter().chain(statuses) {
        all.entry(reference.clone()).or_default().extend(notices.iter().cloned());
    }
    all
}

/// Files that are checked before they are applied have no Pods, so a Service
/// without endpoints is nothing unusual among them.
fn among_files(object: &ObjectRef, notice: Notice) -> Notice {
    let of_endpoints = object.kind == Kind::Service && notice.message.contains("no ready endpoint");
    if of_endpoints && notice.level == Level::Warning {
        return Notice { level: Level::Info, remedy: String::new(), ..notice };
    }
    notice
}

fn verdict(reference: &ObjectRef, notices: &[Notice]) -> Verdict {
    match notices.iter().map(|notice| notice.level).min() {
        Some(Level::Error) => Verdict::Refused,
        _ if matches!(reference.kind, Kind::Unsupported(_)) => Verdict::Unsupported,
        Some(Level::Warning) => Verdict::Differs,
        Some(Level::Info) | None => Verdict::Accepted,
    }
}

impl Report {
    fn new(contents: &Contents, args: &ObjectArgs) -> Report {
        let snapshot = contents.snapshot();
        let desired = translate(&snapshot.store, &args.options());
        let objects: Vec<Entry> = all_notices(&snapshot, &desired.statuses)
            .into_iter()
            .map(|(object, notices)| (notices.into_iter().map(|n| among_files(&object, n)).collect(), object))
            .map(|(notices, object): (Vec<Notice>, _)| Entry {
                file: contents.file_of(&object).map(Path::to_owned),
                verdict: verdict(&object, &notices),
                notices,
                object,
            })
            .collect();
        let problems: Vec<Problem> = snapshot
            .problems
            .iter()
            .map(|at| Problem { at: at.clone(), unreadable: at.unreadable, level: at.level })
            .collect();
        let of_problem = |problem: &Problem| match problem.level {
            Level::Error => Verdict::Refused,
            Level::Warning => Verdict::Differs,
            Level::Info => Verdict::Accepted,
        };
        let worst = objects.iter().map(|entry| entry.verdict).chain(problems.iter().map(of_problem)).max();
        let mut unused = snapshot.unused.clone();
        let (store, options) = (&snapshot.store, args.options());
        let custom = custom_headers(store);
        let is_used =
            |key: &&Key| options.streams.names(key) || options.headers.names(key) || custom.contains(*key);
        let config_maps = store.config_maps.keys().filter(is_used).count();
        if store.config_maps.len() > config_maps {
            unused.insert("ConfigMap".to_owned(), store.config_maps.len() - config_maps);
        }
        Report {
            verdict: worst.unwrap_or(Verdict::Accepted),
            files: snapshot.files,
            problems,
            objects,
            routes: routes::routes(&desired.routes),
            ports: routes::ports(&desired.routes),
            used: used(&snapshot, config_maps),
            unused,
        }
    }

    fn exit_status(&self, strict: bool) -> u8 {
        let unreadable = self.problems.iter().any(|problem| problem.unreadable);
        let fails = if strict { Verdict::Unsupported } else { Verdict::Refused };
        if unreadable { 2 } else { u8::from(self.verdict >= fails) }
    }

    fn print(&self, text: &mut Text) {
        let used: Vec<String> = self.used.iter().map(|(kind, n)| count(*n, kind)).collect();
        let used = if used.is_empty() { "nothing to serve".to_owned() } else { used.join(", ") };
        text.put(Tone::Heading, &count(self.files, "file")).plain(&format!(": {used}")).line();
        if !self.unused.is_empty() {
            let unused: Vec<String> =
                self.unused.iter().map(|(kind, n)| count(*n, &printable(kind))).collect();
            text.put(Tone::Faint, &format!("not used here: {}", unused.join(", "))).line();
        }
        self.print_problems(text);
        self.print_objects(text);
        if !self.routes.is_empty() {
            text.line().put(Tone::Heading, "Routes").line();
            routes::print(text, &self.routes);
        }
        if !self.ports.is_empty() {
            text.line().put(Tone::Heading, "Ports").line();
            routes::print_ports(text, &self.ports);
        }
        self.print_sum(text);
    }

    fn print_problems(&self, text: &mut Text) {
        if !self.problems.is_empty() {
            text.line().put(Tone::Heading, "Files").line();
        }
        for problem in &self.problems {
            let (tone, word) = match (problem.unreadable, problem.level) {
                (true, _) => (Tone::Bad, "unreadable"),
                (false, Level::Error) => (Tone::Bad, "refused"),
                (false, _) => (Tone::Warning, "ignored"),
            };
            text.plain("  ").put(tone, &format!("{word:10}")).plain("  ");
            text.plain(&printable(&problem.at.to_string())).line();
        }
    }

    fn print_objects(&self, text: &mut Text) {
        let (unsupported, objects): (Vec<&Entry>, Vec<&Entry>) =
            self.objects.iter().partition(|entry| entry.verdict == Verdict::Unsupported);
        if !objects.is_empty() {
            text.line().put(Tone::Heading, "Objects").line();
        }
        let width = objects.iter().map(|entry| entry.object.to_string().chars().count()).max().unwrap_or(0);
        let width = width.min(NAME_WIDTH_MAX);
        for entry in objects {
            let (tone, word) = match entry.verdict {
                Verdict::Accepted | Verdict::Unsupported => (Tone::Good, "accepted"),
                Verdict::Differs => (Tone::Warning, "differs"),
                Verdict::Refused => (Tone::Bad, "refused"),
            };
            text.plain("  ").put(tone, &format!("{word:8}")).plain("  ");
            text.plain(&format!("{:width$}", entry.object.to_string()));
            if let Some(file) = entry.file.as_ref().filter(|_| self.files > 1) {
                text.plain("  ").put(Tone::Faint, &printable(&file.display().to_string()));
            }
            text.line();
            for notice in &entry.notices {
                print_notice(text, notice);
            }
        }
        print_unsupported(text, &unsupported);
    }

    fn print_sum(&self, text: &mut Text) {
        let sum = |verdict: Verdict| self.objects.iter().filter(|entry| entry.verdict == verdict).count();
        text.line();
        let mut first = true;
        for (verdict, tone, word) in [
            (Verdict::Accepted, Tone::Good, "accepted"),
            (Verdict::Differs, Tone::Warning, "differs"),
            (Verdict::Unsupported, Tone::Warning, "not supported yet"),
            (Verdict::Refused, Tone::Bad, "refused"),
        ] {
            let n = sum(verdict);
            if n > 0 || verdict == Verdict::Accepted {
                text.plain(if first { "" } else { ", " }).put(tone, &format!("{n} {word}"));
                first = false;
            }
        }
        let bad = self.problems.iter().filter(|problem| problem.unreadable).count();
        if bad > 0 {
            text.plain(", ").put(Tone::Bad, &format!("{} unreadable", count(bad, "file")));
        }
        text.line();
    }
}

/// One line for each kind: there is the same to say about all of them.
fn print_unsupported(text: &mut Text, entries: &[&Entry]) {
    let mut kinds: BTreeMap<&str, Vec<String>> = BTreeMap::new();
    for entry in entries {
        let ObjectRef { kind, namespace, name } = &entry.object;
        let name = if namespace.is_empty() { name.to_string() } else { format!("{namespace}/{name}") };
        kinds.entry(kind.as_str()).or_default().push(name);
    }
    if !kinds.is_empty() {
        text.line().put(Tone::Heading, "Not supported yet").line();
    }
    let row = |(kind, mut names): (&str, Vec<String>)| {
        let total = names.len();
        names.truncate(NAMES_MAX);
        if total > NAMES_MAX {
            names.push(format!("and {} more", total - NAMES_MAX));
        }
        vec![(Tone::Warning, count(total, kind)), (Tone::Plain, names.join(", "))]
    };
    let rows: Vec<_> = kinds.into_iter().map(row).collect();
    text.table(2, &rows);
}

fn print_notice(text: &mut Text, notice: &Notice) {
    let tone = match notice.level {
        Level::Error => Tone::Bad,
        Level::Warning => Tone::Warning,
        Level::Info => Tone::Faint,
    };
    text.plain("            ");
    if !notice.field.is_empty() {
        text.put(tone, &printable(&notice.field)).plain(": ");
    }
    text.plain(&printable(&notice.message)).line();
    if !notice.remedy.is_empty() {
        text.plain("            ").put(Tone::Faint, &format!("-> {}", printable(&notice.remedy))).line();
    }
}

/// The ConfigMaps that Ingresses name.
fn custom_headers(store: &Store) -> BTreeSet<Key> {
    let named = store.ingresses.values().filter_map(|ingress| {
        let (namespace, name) = ingress.annotations.get(CUSTOM_HEADERS)?.trim().split_once('/')?;
        Some(Key::new(namespace, name))
    });
    named.collect()
}

fn used(snapshot: &Snapshot, config_maps: usize) -> BTreeMap<&'static str, usize> {
    let store = &snapshot.store;
    [
        ("Ingress", store.ingresses.len()),
        ("IngressClass", store.classes.len()),
        ("Service", store.services.len()),
        ("EndpointSlice", store.slices.len()),
        ("Pod", store.pods.len()),
        ("Secret", store.secrets.len()),
        ("Node", store.nodes.len()),
        ("ConfigMap", config_maps),
    ]
    .into_iter()
    .filter(|(_, n)| *n > 0)
    .collect()
}
