//! A folder whose files never rest, though what it means for some hosts stays
//! the same throughout.

use std::collections::BTreeMap;
use std::fs;
use std::io::Write;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::thread::JoinHandle;
use std::time::Duration;

use tokio::time::Instant;

use super::manifests::{self, Identity};

/// Services, and whether they speak HTTP/2.
pub const SERVICES: [(&str, bool); 10] = [
    ("keep", false),
    ("a", false),
    ("b", false),
    ("c", false),
    ("main", false),
    ("canary", false),
    ("torn", false),
    ("tls", false),
    ("ws", false),
    ("grpc", true),
];

/// Endpoints of each Service, half of which are in use at a time.
pub const ENDPOINTS: usize = 4;

/// Hosts that come and go: `flap-0.example`, …
pub const FLAPS: usize = 6;

/// The longest that a file stays half written. A folder waits longer than this
/// for a writer to close it.
const HALF_WRITTEN_MAX: Duration = Duration::from_millis(300);

/// What is edited, and the state of it.
pub struct Edits {
    folder: PathBuf,
    rng: fastrand::Rng,
    toys: BTreeMap<&'static str, Vec<SocketAddr>>,
    identities: Vec<Identity>,
    flaps: [bool; FLAPS],
    weight: u32,
    identity: usize,
    number: usize,
    /// A file that is being written slowly.
    slow: Option<JoinHandle<()>>,
    /// How often each kind of edit was made.
    pub made: BTreeMap<&'static str, usize>,
}

impl Edits {
    /// Writes everything a first time.
    pub fn new(
        folder: &Path,
        seed: u64,
        toys: BTreeMap<&'static str, Vec<SocketAddr>>,
        identities: Vec<Identity>,
    ) -> Edits {
        let mut edits = Edits {
            folder: folder.to_owned(),
            rng: fastrand::Rng::with_seed(seed),
            toys,
            identities,
            flaps: [false; FLAPS],
            weight: 0,
            identity: 0,
            number: 0,
            slow: None,
            made: BTreeMap::new(),
        };
        edits.fixed();
        edits.reorder();
        edits.weigh();
        edits.rotate();
        edits.replace_endpoints();
        edits.written_at_once();
        edits.broken();
        edits.made.clear();
        edits
    }

    /// Edits until `end`, `every` so often. Returns with no edit half done.
    pub fn run(&mut self, every: Duration, end: Instant) {
        let mut next = Instant::now();
        while next < end {
            std::thread::sleep(next.saturating_duration_since(Instant::now()));
            // Late edits are not caught up with: in a burst they would merge.
            next = next.max(Instant::now()) + every;
            self.one();
        }
        self.finish();
    }

    /// The hosts that come and go, and whether they are there.
    pub fn flaps(&self) -> [bool; FLAPS] {
        self.flaps
    }

    /// Adds a host that was never there before, after all other edits.
    pub fn mark(&mut self, host: &str) {
        self.place("marker.yaml", &ingress("marker", "", &[rule(host, &[("/", "Prefix", "keep")])]));
    }

    fn one(&mut self) {
        self.number += 1;
        match self.rng.u32(0..9) {
            0 | 1 => self.flap(),
            2 => self.reorder(),
            3 => self.weigh(),
            4 => self.rotate(),
            5 => self.replace_endpoints(),
            6 if self.is_half_written() => self.flap(),
            6 => self.half_written(),
            7 => self.written_at_once(),
            _ => self.broken(),
        }
    }

    fn is_half_written(&self) -> bool {
        self.slow.as_ref().is_some_and(|slow| !slow.is_finished())
    }

    fn finish(&mut self) {
        if let Some(slow) = self.slow.take() {
            slow.join().expect("writes");
        }
    }

    fn count(&mut self, what: &'static str) {
        *self.made.entry(what).or_default() += 1;
    }

    /// In one step, as careful editors and ConfigMap mounts do.
    fn place(&self, name: &str, text: &str) {
        let part = self.folder.join(format!(".{name}.part"));
        fs::write(&part, text).expect("writes");
        fs::rename(part, self.folder.join(name)).expect("renames");
    }

    /// Truncated and written, as most editors do.
    fn overwrite(&self, name: &str, text: &str) {
        fs::write(self.folder.join(name), text).expect("writes");
    }

    fn either(&mut self, name: &str, text: &str) {
        if self.rng.bool() { self.place(name, text) } else { self.overwrite(name, text) }
    }

    /// What is never edited.
    fn fixed(&self) {
        let mut text = String::new();
        for (name, h2) in SERVICES {
            let service = manifests::service("default", name, &[("web", 80)]);
            text += &if h2 {
                service.replace("port: 80}", "port: 80, appProtocol: kubernetes.io/h2c}")
            } else {
                service
            };
        }
        for (host, service) in [("keep", "keep"), ("ws", "ws"), ("grpc", "grpc")] {
            text += &ingress(host, "", &[rule(&format!("{host}.example"), &[("/", "Prefix", service)])]);
        }
        let tls = "  tls: [{hosts: [tls.example], secretName: tls}]\n";
        text +=
            &ingress("tls", tls, &[rule("tls.example", &[("/", "Prefix", "tls"), ("/a", "Prefix", "a")])]);
        text += &ingress("canary-main", "", &[rule("canary.example", &[("/", "Prefix", "main")])]);
        self.place("fixed.yaml", &text);
    }

    fn flap(&mut self) {
        let which = self.rng.usize(0..FLAPS);
        let name = format!("flap-{which}.yaml");
        self.flaps[which] = !self.flaps[which];
        if self.flaps[which] {
            self.count("Ingress added");
            let host = format!("flap-{which}.example");
            self.either(
                &name,
                &ingress(&format!("flap-{which}"), "", &[rule(&host, &[("/", "Prefix", "keep")])]),
            );
        } else {
            self.count("Ingress removed");
            fs::remove_file(self.folder.join(name)).expect("removes");
        }
    }

    /// The same rules in another order, and one that differs each time.
    fn reorder(&mut self) {
        self.count("rules reordered");
        let extra = format!("/extra-{}", self.number);
        let mut paths = [
            ("/", "Prefix", "c"),
            ("/a", "Prefix", "a"),
            ("/a/b", "Prefix", "b"),
            ("/a/exact", "Exact", "c"),
            (extra.as_str(), "Exact", "a"),
        ];
        self.rng.shuffle(&mut paths);
        let mut rules = [rule("order.example", &paths[..2]), rule("order.example", &paths[2..])];
        self.rng.shuffle(&mut rules);
        self.either("order.yaml", &ingress("order", "", &rules));
    }

    fn weigh(&mut self) {
        self.count("canary weighed");
        // Another one than last time.
        self.weight = (self.weight + self.rng.u32(1..=100)) % 101;
        let weight = self.weight;
        let text = ingress("canary", "", &[rule("canary.example", &[("/", "Prefix", "canary")])]).replace(
            "name: canary}",
            &format!(
                "name: canary, annotations: {{\
                 nginx.ingress.kubernetes.io/canary: \"true\", \
                 nginx.ingress.kubernetes.io/canary-by-header: x-canary, \
                 nginx.ingress.kubernetes.io/canary-weight: \"{weight}\"}}}}"
            ),
        );
        self.either("canary.yaml", &text);
    }

    fn rotate(&mut self) {
        self.count("Secret rotated");
        self.identity = (self.identity + self.rng.usize(1..self.identities.len())) % self.identities.len();
        let identity = &self.identities[self.identity];
        let text = manifests::secret("default", "tls", identity);
        self.either("secret.yaml", &text);
    }

    fn replace_endpoints(&mut self) {
        self.count("all endpoints replaced");
        let from = ENDPOINTS / 2 * (self.made["all endpoints replaced"] % 2);
        let slices = self
            .toys
            .iter()
            .map(|(name, toys)| manifests::slices("default", name, "web", &toys[from..from + ENDPOINTS / 2]));
        self.place("slices.yaml", &slices.collect::<String>());
    }

    /// Two Ingresses, so that half of the file may be good YAML.
    fn torn(&self) -> String {
        let extra = format!("/extra-{}", self.number);
        let ingresses = ["torn-1", "torn-2"].map(|name| {
            ingress(
                name,
                "",
                &[rule(&format!("{name}.example"), &[(&extra, "Exact", "a"), ("/", "Prefix", "torn")])],
            )
        });
        ingresses.concat()
    }

    fn half_written(&mut self) {
        self.count("file half written for a while");
        let text = self.torn();
        let cut = self.rng.usize(1..text.len());
        let pause = Duration::from_millis(self.rng.u64(0..HALF_WRITTEN_MAX.as_millis() as u64));
        let mut file = fs::File::create(self.folder.join("torn.yaml")).expect("opens");
        self.slow = Some(std::thread::spawn(move || {
            file.write_all(&text.as_bytes()[..cut]).expect("writes");
            std::thread::sleep(pause);
            file.write_all(&text.as_bytes()[cut..]).expect("writes");
        }));
    }

    fn written_at_once(&mut self) {
        let text = self.torn();
        if self.is_half_written() {
            self.count("half written file replaced");
            self.place("torn.yaml", &text);
        } else {
            self.count("file written at once");
            self.either("torn.yaml", &text);
        }
    }

    /// Good, then nonsense that is not YAML, then good again: the last good one stays.
    fn broken(&mut self) {
        let extra = format!("/extra-{}", self.number);
        let paths = [(extra.as_str(), "Exact", "a"), ("/", "Prefix", "keep")];
        let good = ingress("broken", "", &[rule("broken.example", &paths)]);
        if self.made.get("file made good") == self.made.get("file spoilt") {
            self.count("file made good");
            self.either("broken.yaml", &good);
        } else {
            self.count("file spoilt");
            let text = good.replace("kind: Ingress", "kind: [Ingress");
            self.either("broken.yaml", &text);
        }
    }
}

fn ingress(name: &str, more: &str, rules: &[String]) -> String {
    format!(
        "---\napiVersion: networking.k8s.io/v1\nkind: Ingress\nmetadata: {{name: {name}}}\nspec:\n{more}  rules:\n{}",
        rules.concat()
    )
}

fn rule(host: &str, paths: &[(&str, &str, &str)]) -> String {
    let path = |(path, kind, service): &(&str, &str, &str)| {
        format!(
            "      - {{path: {path}, pathType: {kind}, backend: {{service: {{name: {service}, port: {{number: 80}}}}}}}}\n"
        )
    };
    format!("  - host: {host}\n    http:\n      paths:\n{}", paths.iter().map(path).collect::<String>())
}
