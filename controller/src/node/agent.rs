//! Snapshots in, live maps out: translate, reconcile, and tell whoever wants to know.

use std::collections::BTreeSet;
use std::net::IpAddr;
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use imbl::ordmap::DiffItem;
use lockgate_ebpf::maps::{MapError, Maps};
use lockgate_ebpf::{Outcome, Reconciler};
use tokio::sync::watch;
use tokio::time::Instant;
use tracing::{info, warn};

use super::checks::Wanted;
use super::health::Health;
use super::metrics::{Metrics, NoLocal};
use crate::publish::Translation;
use crate::source::Snapshot;
use crate::store::{Key, Store};
use crate::translate::{NodeOptions, NodePorts, Options};

/// What could not be written is tried again after this long, then after twice as long, up to
/// [`RETRY_MOST`].
const RETRY_FIRST: Duration = Duration::from_secs(1);
const RETRY_MOST: Duration = Duration::from_secs(30);

/// Times of changes that are kept until they are live; further ones are not measured.
const CAUSES_MAX: usize = 100_000;

/// What the agent shares with the threads that answer requests.
#[derive(Clone)]
pub(crate) struct Shared {
    pub(crate) health: Arc<Health>,
    pub(crate) metrics: Metrics,
    pub(crate) checks: watch::Sender<Wanted>,
}

/// Keeps the maps of one node as its objects say.
pub(crate) struct Agent<M> {
    options: NodeOptions,
    translation: Translation,
    reconciler: Reconciler<M>,
    snapshot: Snapshot,
    shared: Shared,
    /// The moment from which the reconciler counts.
    started: Instant,
    no_local: NoLocal,
    is_first: bool,
    /// When these were changed of which the result is not live, in microseconds since 1970.
    causes: Vec<i64>,
    /// How long to wait before the next try; `None` if everything is live.
    retry: Option<Duration>,
    /// What failed, as it was told.
    told: BTreeSet<String>,
}

impl<M: Maps> Agent<M> {
    /// Takes over what `maps` hold.
    ///
    /// # Errors
    /// The maps cannot be read.
    pub(crate) fn new(maps: M, options: NodeOptions, shared: Shared) -> Result<Agent<M>, MapError> {
        Ok(Agent {
            translation: Translation::new(Options { node: Some(options.clone()), ..Options::default() }),
            options,
            reconciler: Reconciler::new(maps, Duration::ZERO)?,
            snapshot: Snapshot::default(),
            shared,
            started: Instant::now(),
            no_local: NoLocal::default(),
            is_first: true,
            causes: Vec::new(),
            retry: None,
            told: BTreeSet::new(),
        })
    }

    /// Makes a snapshot live.
    pub(crate) fn update(&mut self, snapshot: &Snapshot) {
        let snapshot = Snapshot { store: of_services(&snapshot.store), ..snapshot.clone() };
        self.notice(&snapshot.store);
        self.snapshot = snapshot;
        self.apply();
    }

    /// The node has other addresses now.
    pub(crate) fn set_addresses(&mut self, addresses: Vec<IpAddr>) {
        self.options.addresses.clone_from(&addresses);
        self.translation.set_node_addresses(addresses);
        if !self.is_first {
            self.apply();
        }
    }

    /// Tries again what could not be written.
    pub(crate) fn again(&mut self) {
        self.reconcile();
    }

    /// When to try again what could not be written.
    pub(crate) fn retry(&self) -> Option<Duration> {
        self.retry
    }

    /// What the last snapshot said.
    pub(crate) fn snapshot(&self) -> &Snapshot {
        &self.snapshot
    }

    /// The node as the operator named it.
    pub(crate) fn options(&self) -> &NodeOptions {
        &self.options
    }

    /// The reconciler, to look at.
    pub(crate) fn reconciler(&self) -> &Reconciler<M> {
        &self.reconciler
    }

    /// Counts what changed, and when its cause was.
    fn notice(&mut self, store: &Store) {
        let Shared { health, metrics, .. } = &self.shared;
        let services = self.snapshot.store.services.diff(&store.services).count();
        let mut slices = 0;
        for item in self.snapshot.store.slices.diff(&store.slices) {
            slices += 1;
            let (DiffItem::Add(_, new) | DiffItem::Update { new: (_, new), .. }) = item else { continue };
            // What was there when the agent started has been waiting for nobody.
            if !self.is_first && self.causes.len() < CAUSES_MAX {
                self.causes.extend(new.triggered);
            }
        }
        metrics.services.came(services);
        metrics.endpoints.came(slices);
        if services + slices > 0 || self.is_first {
            health.queued();
            metrics.queued();
        }
        let node = store.nodes.get(&Key::new("", self.options.name.clone()));
        // Without a Node object there is nobody who would want it gone.
        health.set_eligible(node.is_none_or(|node| !node.leaving));
    }

    fn apply(&mut self) {
        self.translation.update(&self.snapshot);
        self.reconcile();
        self.is_first = false;
    }

    fn reconcile(&mut self) {
        let table = self.translation.desired().services.clone();
        for item in self.reconciler.table().services.diff(&table.services) {
            let (gone, come) = match item {
                DiffItem::Add(_, new) => (None, Some(new)),
                DiffItem::Update { old: (_, old), new: (_, new) } => (Some(old), Some(new)),
                DiffItem::Remove(_, old) => (Some(old), None),
            };
            gone.into_iter().for_each(|old| self.no_local.count(old, -1));
            come.into_iter().for_each(|new| self.no_local.count(new, 1));
        }
        let begun = Instant::now();
        let outcome = self.reconciler.apply(&table, self.started.elapsed());
        let metrics = &self.shared.metrics;
        metrics.synced(begun.elapsed(), self.is_first, outcome.pending, outcome.failures);
        metrics.set_table(&table, self.no_local);
        self.shared.checks.send_if_modified(|wanted| {
            let checks = table.health_checks.clone();
            let now = Wanted { checks, addresses: self.check_addresses(&table.node.addresses) };
            let differs = *wanted != now;
            *wanted = now;
            differs
        });
        // A full map does not make the node a bad one: what fits is served.
        if outcome.refusals == 0 {
            self.shared.health.updated();
        }
        if outcome.pending == 0 {
            self.measure();
        }
        self.tell(&outcome);
        self.retry = match (outcome.pending, self.retry) {
            (0, _) => None,
            (_, None) => Some(RETRY_FIRST),
            (_, Some(waited)) => Some((waited * 2).min(RETRY_MOST)),
        };
    }

    /// As kube-proxy: all addresses, unless only some serve node ports.
    fn check_addresses(&self, own: &std::collections::BTreeMap<IpAddr, bool>) -> Vec<IpAddr> {
        match &self.options.node_ports {
            NodePorts::Networks(networks) if networks.iter().all(|network| network.prefix_len() == 0) => {
                Vec::new()
            }
            _ => own.iter().filter(|(_, serves)| **serves).map(|(address, _)| *address).collect(),
        }
    }

    fn measure(&mut self) {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_micros() as i64;
        for cause in self.causes.drain(..) {
            let since = u64::try_from(now.saturating_sub(cause)).unwrap_or(0);
            self.shared.metrics.programmed(Duration::from_micros(since));
        }
    }

    fn tell(&mut self, outcome: &Outcome) {
        let failed: BTreeSet<String> =
            outcome.errors.iter().map(|(what, error)| format!("{what}: {error}")).collect();
        for line in failed.difference(&self.told) {
            warn!("{line}");
        }
        match (outcome.pending, self.told.is_empty()) {
            (0, false) => info!("everything is live again"),
            (pending, _) if pending > 0 && failed != self.told => {
                warn!("{pending} of the services and frontends are not live; tried again");
            }
            _ => {}
        }
        self.told = failed;
    }
}

/// Without what only the gateway reads.
fn of_services(store: &Store) -> Store {
    Store {
        services: store.services.clone(),
        slices: store.slices.clone(),
        pods: store.pods.clone(),
        nodes: store.nodes.clone(),
        ..Store::default()
    }
}
