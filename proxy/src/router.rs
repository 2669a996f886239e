//! The compiled table: host to rule to backend to endpoint, immutable, shared
//! between generations wherever nothing changed, and live by one store.
//!
//! ```text
//!  hosts:  exact ─► wildcard ─► any     1,024 ways by hash, then fingerprint and value
//!            └─► path trie ─► rule ─► split ─► backend ─► pool slot
//!  pools:  slot ─► endpoints ─► live state     changing one compiles no host
//! ```

use std::sync::Arc;

use arc_swap::ArcSwap;
use imbl::OrdMap;
use tokio::sync::watch;

use crate::balance::CompiledPool;
use crate::certificate::Certificate;
use crate::endpoint::Endpoints;
use crate::health::Checks;
use crate::l4::ListenerStates;
use crate::metrics::{ListenerStats, Metrics};
use crate::split::CompiledSplit;
use crate::table::{
    HeaderEdits, L4Listener, ListenerKey, Origin, Passthrough, PathMatch, RoutingTable, RuleLimits,
};
use crate::tls::{Candidates, CertificateLookup};

mod compile;
mod host_map;
mod path_trie;
mod slots;

use host_map::{ByHost, Entry};
use path_trie::SharedTries;
use slots::{Numbers, Pools, Slots};

/// What outlives generations: one per process.
#[derive(Debug, Default)]
pub struct Live {
    /// Health and load by address.
    pub endpoints: Endpoints,
    /// Counters.
    pub metrics: Metrics,
    /// Which L4 listeners are open, and why others are not.
    pub listeners: ListenerStates,
    /// Where this process runs, if that is known (`topology.kubernetes.io/zone`).
    pub zone: Option<Arc<str>>,
    /// Probes of endpoints.
    pub checks: Checks,
}

/// One generation of hosts, rules, endpoints and certificates. A request that
/// holds it sees all of them as they were published together.
pub struct Router {
    table: RoutingTable,
    generation: u64,
    hosts: ByHost<CompiledHost>,
    passthrough: ByHost<CompiledPassthrough>,
    certificates: ByHost<Arc<Vec<Arc<Certificate>>>>,
    listeners: OrdMap<ListenerKey, CompiledListener>,
    pools: Pools,
    slots: Slots,
    /// Of [`crate::balance::Turns`], for splits.
    turns: Numbers,
    /// One for all generations.
    tries: Arc<SharedTries>,
    vacant: Arc<CompiledPool>,
}

/// The rules of one host.
#[derive(Clone, Debug)]
struct CompiledHost {
    /// Sorted by path, each path once; the trie names them by index.
    rules: Arc<[CompiledRule]>,
    /// The trie of their paths, if other hosts have the same; else it is beside
    /// the host. Boxed, because a pointer of one word takes fewer lines of the cache.
    trie: Option<Arc<Box<[u8]>>>,
}

impl<'r> Entry<'r, CompiledHost> {
    fn trie(&self) -> &'r [u8] {
        match &self.value.trie {
            Some(trie) => trie,
            None => self.bytes,
        }
    }
}

/// An L4 listener, ready to act on.
#[derive(Clone, Debug)]
pub struct CompiledListener {
    /// What is asked of it.
    pub desired: Arc<L4Listener>,
    /// The argument of [`Router::pool`].
    pub pool: u32,
    /// What is counted.
    pub stats: Arc<ListenerStats>,
}

/// What [`Router::find`] found.
#[derive(Clone, Copy, Debug)]
pub enum Found<'a> {
    /// The rule for the path.
    Rule(&'a CompiledRule),
    /// The host has rules, but none for the path.
    NoPath,
    /// No pattern matches the host.
    NoHost,
}

/// A rule, ready to act on.
#[derive(Clone, Debug)]
pub struct CompiledRule {
    /// Which paths.
    pub path: PathMatch,
    /// Who asked for it.
    pub origin: Arc<Origin>,
    /// A plaintext request is redirected to https.
    pub https_redirect: bool,
    /// Where it differs from the process-wide limits.
    pub limits: RuleLimits,
    /// As in the table.
    pub edits: Option<Arc<HeaderEdits>>,
    /// What is done.
    pub action: CompiledAction,
}

/// Where the TLS of a host goes unopened.
#[derive(Clone, Debug)]
pub struct CompiledPassthrough {
    /// The argument of [`Router::pool`].
    pub pool: u32,
    /// As it is in the table.
    pub desired: Arc<Passthrough>,
}

/// What a rule does with a request.
#[derive(Clone, Debug)]
pub enum CompiledAction {
    /// Send it to an endpoint of one of the backends.
    Forward(CompiledSplit),
    /// Answer with this status and an empty body.
    Respond {
        /// The HTTP status.
        status: u16,
        /// Why.
        reason: Arc<str>,
    },
}

impl Router {
    /// Generation 0: knows no host.
    pub fn empty() -> Router {
        Router {
            table: RoutingTable::default(),
            generation: 0,
            hosts: ByHost::default(),
            passthrough: ByHost::default(),
            certificates: ByHost::default(),
            listeners: OrdMap::new(),
            pools: Pools::default(),
            slots: Slots::default(),
            turns: Numbers::default(),
            tries: Arc::default(),
            vacant: Arc::new(CompiledPool::empty(u32::MAX)),
        }
    }

    /// The next generation: this one, patched by the difference between its
    /// table and `table`. Costs what changed (and one pass over the pointers
    /// to pool chunks), if `table` was made from [`Router::table`] by edits.
    pub fn compile(&self, table: RoutingTable, live: &Live) -> Router {
        compile::Patch::new(self.fork(), live).apply(table)
    }

    fn fork(&self) -> Router {
        Router {
            table: self.table.clone(),
            generation: self.generation,
            hosts: self.hosts.clone(),
            passthrough: self.passthrough.clone(),
            certificates: self.certificates.clone(),
            listeners: self.listeners.clone(),
            pools: self.pools.clone(),
            slots: self.slots.clone(),
            turns: self.turns.clone(),
            tries: self.tries.clone(),
            vacant: self.vacant.clone(),
        }
    }

    /// The rule for a request. `host` is lower case, without port and trailing
    /// dot, empty if unknown; `path` is percent-decoded and normalised, and
    /// starts with `/`. A host that is found has the last word: a less precise
    /// one is not asked for the path.
    pub fn find(&self, host: &str, path: &[u8]) -> Found<'_> {
        let Some(host) = self.hosts.find(host) else { return Found::NoHost };
        match path_trie::find(host.trie(), path) {
            Some(rule) => Found::Rule(&host.value.rules[rule as usize]),
            None => Found::NoPath,
        }
    }

    /// Whether any host is passed through: only then is it worth asking which.
    pub fn has_passthrough(&self) -> bool {
        !self.table.passthrough.is_empty()
    }

    /// Where TLS for an SNI name (lower case, no trailing dot) goes unopened.
    /// `None`: it ends here, as it does for an exact host with rules below a
    /// wildcard that is passed through.
    pub fn passthrough(&self, server_name: &str) -> Option<&CompiledPassthrough> {
        let (found, exact) = self.passthrough.find_named(server_name)?;
        (exact || !self.hosts.has_exact(server_name)).then_some(found.value)
    }

    /// The pool in `slot`, as found in a [`crate::split::CompiledBackend`] of this router.
    pub fn pool(&self, slot: u32) -> &CompiledPool {
        self.pools.get(slot).unwrap_or(&self.vacant)
    }

    /// As [`Router::pool`], to be held beyond this generation.
    pub(crate) fn share_pool(&self, slot: u32) -> Arc<CompiledPool> {
        self.pools.share(slot).unwrap_or_else(|| self.vacant.clone())
    }

    /// What becomes of what arrives at an L4 listener; `None` once it is no longer in the table.
    pub fn listener(&self, key: &ListenerKey) -> Option<&CompiledListener> {
        self.listeners.get(key)
    }

    /// Certificates for an SNI name (lower case, no trailing dot): the host's
    /// own, else the wildcard's one label up, else any host's. `None`: use
    /// [`RoutingTable::default_certificate`].
    pub fn certificates(&self, server_name: &str) -> Option<&[Arc<Certificate>]> {
        self.certificates.find(server_name).map(|entry| entry.value.as_slice())
    }

    /// What is changed in heads where no rule says anything of its own.
    pub(crate) fn edits(&self) -> Option<&HeaderEdits> {
        self.table.edits.as_deref()
    }

    /// What this was compiled from.
    pub fn table(&self) -> &RoutingTable {
        &self.table
    }

    /// Counts publishes that changed something, from 0.
    pub fn generation(&self) -> u64 {
        self.generation
    }
}

/// The two halves of what is live: who publishes, and everyone who reads.
pub fn routes(live: Arc<Live>) -> (Publisher, Routes) {
    let routes = Routes(Arc::new(ArcSwap::from_pointee(Router::empty())));
    let (listeners, _) = watch::channel(Listeners::default());
    (Publisher { live, routes: routes.clone(), retired: Vec::new(), listeners }, routes)
}

/// The read half.
#[derive(Clone)]
pub struct Routes(Arc<ArcSwap<Router>>);

impl std::fmt::Debug for Routes {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Routes").field("generation", &self.0.load().generation()).finish()
    }
}

impl CertificateLookup for Routes {
    fn certificates(&self, server_name: Option<&str>) -> Candidates {
        let router = self.0.load();
        let found = router.certificates(server_name.unwrap_or_default());
        match found {
            Some(found) => found.iter().cloned().collect(),
            None => router.table().default_certificate.iter().cloned().collect(),
        }
    }
}

impl Routes {
    /// The live generation, to be held for long or by the few who ask rarely.
    pub fn load_full(&self) -> Arc<Router> {
        self.0.load_full()
    }

    /// For a worker: as good as a plain reference while nothing is published.
    pub fn cache(&self) -> RouterCache {
        RouterCache(arc_swap::Cache::new(self.0.clone()))
    }
}

/// One worker's view of the live generation.
pub struct RouterCache(arc_swap::Cache<Arc<ArcSwap<Router>>, Arc<Router>>);

impl RouterCache {
    /// The live generation: one relaxed load unless there is a new one. Ask
    /// once per request; a second answer may be a different generation.
    pub fn load(&mut self) -> &Arc<Router> {
        self.0.load()
    }
}

/// The write half; there is one.
pub struct Publisher {
    live: Arc<Live>,
    routes: Routes,
    /// Generations that some worker may hold. Whoever lets go of one last
    /// frees it; kept here until no other does, that is never a worker.
    retired: Vec<Arc<Router>>,
    /// For whoever opens and closes them.
    listeners: watch::Sender<Listeners>,
}

/// The L4 listeners of a table.
pub(crate) type Listeners = OrdMap<ListenerKey, Arc<L4Listener>>;

impl Publisher {
    /// Makes `table` live: compiles, then stores once. Returns the generation
    /// that is live; it is the old one if the table is equal to the live one.
    pub fn publish(&mut self, table: RoutingTable) -> u64 {
        self.collect();
        let current = self.routes.load_full();
        if *current.table() == table {
            return current.generation();
        }
        let next = current.compile(table, &self.live);
        let generation = next.generation();
        self.routes.0.store(Arc::new(next));
        self.retired.push(current);
        // After the store: a connection to a new listener finds it in the table.
        let listeners = &self.routes.0.load().table().listeners.clone();
        self.listeners.send_if_modified(|known| {
            let differs = !known.ptr_eq(listeners) && known != listeners;
            known.clone_from(listeners);
            differs
        });
        generation
    }

    /// The L4 listeners that should be open.
    pub(crate) fn listeners(&self) -> watch::Receiver<Listeners> {
        self.listeners.subscribe()
    }

    /// Frees old generations that no worker holds any more. Publishing does it
    /// too; call it once in a while if publishes are rare and tables large.
    pub fn collect(&mut self) {
        self.retired.retain(|router| Arc::strong_count(router) > 1);
    }

    /// The read half.
    pub fn routes(&self) -> &Routes {
        &self.routes
    }
}

#[cfg(test)]
mod tests;
