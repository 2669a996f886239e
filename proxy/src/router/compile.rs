//! Table to router, by difference.
//!
//! Everything new is acquired before anything old is released, so a pool that
//! merely moves from one rule to another keeps its slot.

use std::collections::HashMap;
use std::sync::Arc;

use imbl::ordmap::DiffItem;

use super::{
    CompiledAction, CompiledHost, CompiledListener, CompiledPassthrough, CompiledRule, Live, Router,
    path_trie,
};
use crate::balance::{CompiledEndpoint, CompiledPool};
use crate::certificate::Certificate;
use crate::split::{CompiledBackend, CompiledSplit};
use crate::table::{
    Action, Host, HostPattern, L4Listener, ListenerKey, Passthrough, PathMatch, Pool, PoolKey, RoutingTable,
    Rule, Split,
};

/// A router in the making: a copy of its predecessor, and what that copy no longer needs.
pub(super) struct Patch<'a> {
    router: Router,
    live: &'a Live,
    old_keys: Vec<PoolKey>,
    old_turns: Vec<u32>,
}

impl<'a> Patch<'a> {
    pub(super) fn new(router: Router, live: &'a Live) -> Patch<'a> {
        Patch { router, live, old_keys: Vec::new(), old_turns: Vec::new() }
    }

    pub(super) fn apply(mut self, table: RoutingTable) -> Router {
        let old = std::mem::take(&mut self.router.table);
        for change in old.pools.diff(&table.pools) {
            self.pool(change);
        }
        for change in old.hosts.diff(&table.hosts) {
            self.host(change);
        }
        for change in old.passthrough.diff(&table.passthrough) {
            self.passthrough(change);
        }
        for change in old.certificates.diff(&table.certificates) {
            self.certificates(change);
        }
        for change in old.listeners.diff(&table.listeners) {
            self.listener(change);
        }
        for key in self.old_keys {
            self.router.slots.release(&key);
        }
        for turn in self.old_turns {
            self.router.turns.give_back(turn);
        }
        self.router.table = table;
        self.router.generation += 1;
        self.router
    }

    fn pool(&mut self, change: DiffItem<PoolKey, Arc<Pool>>) {
        match change {
            DiffItem::Add(key, pool) => {
                let slot = self.acquire(key);
                self.set_pool(slot, key, pool);
            }
            DiffItem::Update { new: (key, pool), .. } => {
                if let Some(slot) = self.router.slots.get(key) {
                    self.set_pool(slot, key, pool);
                }
            }
            DiffItem::Remove(key, _) => {
                if let Some(slot) = self.router.slots.get(key) {
                    self.router.pools.set(CompiledPool::empty(slot));
                }
                self.live.checks.set(key, None, &[]);
                self.old_keys.push(key.clone());
            }
        }
    }

    fn set_pool(&mut self, slot: u32, key: &PoolKey, pool: &Pool) {
        let endpoints = pool.endpoints.iter().map(|endpoint| CompiledEndpoint {
            live: self.live.endpoints.get(endpoint.address, pool.protocol),
            weight: endpoint.weight.max(1),
            zone: endpoint.zone.clone(),
        });
        let own = self.live.zone.as_deref();
        let compiled = CompiledPool::compile(slot, pool, endpoints.collect(), own);
        self.live.checks.set(key, pool.check.as_ref(), &compiled.endpoints);
        self.router.pools.set(compiled);
    }

    fn acquire(&mut self, key: &PoolKey) -> u32 {
        let (slot, is_new) = self.router.slots.acquire(key);
        if is_new {
            self.router.pools.set(CompiledPool::empty(slot));
        }
        slot
    }

    fn host(&mut self, change: DiffItem<HostPattern, Arc<Host>>) {
        match change {
            DiffItem::Add(pattern, host) => {
                let compiled = self.compile_host(host, &OldRules::default());
                self.set_host(pattern, compiled);
            }
            DiffItem::Update { old: (_, old), new: (pattern, host) } => {
                let before = self.router.hosts.get(pattern).map(|host| host.value.clone());
                let rules = OldRules::new(old, before.as_ref());
                let compiled = self.compile_host(host, &rules);
                self.retire(before.as_ref(), Some((&rules, host)));
                self.set_host(pattern, compiled);
            }
            DiffItem::Remove(pattern, _) => {
                let before = self.router.hosts.get(pattern).map(|host| host.value.clone());
                self.retire(before.as_ref(), None);
                self.router.hosts.remove(pattern);
            }
        }
    }

    fn set_host(&mut self, pattern: &HostPattern, rules: Arc<[CompiledRule]>) {
        let trie = path_trie::encode(rules.iter().map(|rule| &rule.path));
        // Where it is does not change with what its rules do.
        let before = self.router.hosts.get(pattern).filter(|before| *before.trie() == *trie);
        let shared = match before {
            Some(before) => before.value.trie.clone(),
            None => self.router.tries.get(&trie),
        };
        let beside: &[u8] = if shared.is_some() { &[] } else { &trie };
        self.router.hosts.insert(pattern, CompiledHost { rules, trie: shared }, beside);
    }

    fn compile_host(&mut self, host: &Host, old: &OldRules) -> Arc<[CompiledRule]> {
        sorted(host)
            .into_iter()
            .map(|rule| match old.unchanged(rule) {
                Some(compiled) => compiled.clone(),
                None => self.compile_rule(rule, old.turn(&rule.path)),
            })
            .collect()
    }

    fn compile_rule(&mut self, rule: &Rule, turn: Option<u32>) -> CompiledRule {
        let action = match &rule.action {
            Action::Forward(split) if split.backends.is_empty() => {
                CompiledAction::Respond { status: 503, reason: "the rule has no backend".into() }
            }
            Action::Forward(split) => CompiledAction::Forward(self.compile_split(rule, split, turn)),
            Action::Respond { status, reason } => {
                CompiledAction::Respond { status: *status, reason: reason.clone() }
            }
        };
        CompiledRule {
            path: rule.path.clone(),
            origin: rule.origin.clone(),
            https_redirect: rule.https_redirect,
            limits: rule.limits.clone(),
            edits: rule.edits.clone(),
            action,
        }
    }

    fn compile_split(&mut self, rule: &Rule, split: &Split, turn: Option<u32>) -> CompiledSplit {
        let backends = split.backends.iter().map(|backend| CompiledBackend {
            pool_key: backend.pool.clone(),
            pool: self.acquire(&backend.pool),
            canary: backend.canary.clone(),
            stats: self.live.metrics.route(&rule.origin, &backend.pool, &backend.canary),
            steering: backend.steering.clone(),
        });
        let backends = backends.collect();
        let turn = CompiledSplit::needs_turn(split).then(|| turn.unwrap_or_else(|| self.router.turns.take()));
        CompiledSplit::new(split, backends, turn)
    }

    /// Notes what `before` held and its successor does not: slots are named
    /// anew by every rule that was compiled anew, turns stay with their path.
    fn retire(&mut self, before: Option<&CompiledHost>, after: Option<(&OldRules, &Host)>) {
        let kept: HashMap<&PathMatch, &Rule> = match after {
            Some((_, host)) => sorted(host).into_iter().map(|rule| (&rule.path, rule)).collect(),
            None => HashMap::new(),
        };
        for rule in before.iter().flat_map(|host| host.rules.iter()) {
            let CompiledAction::Forward(split) = &rule.action else { continue };
            let successor = kept.get(&rule.path).copied();
            let unchanged =
                after.zip(successor).is_some_and(|((old, _), successor)| old.unchanged(successor).is_some());
            if unchanged {
                continue;
            }
            self.old_keys.extend(split.backends.iter().map(|backend| backend.pool_key.clone()));
            if !successor.is_some_and(takes_turn) {
                self.old_turns.extend(split.turn());
            }
        }
    }

    fn listener(&mut self, change: DiffItem<ListenerKey, Arc<L4Listener>>) {
        let (old, new) = match change {
            DiffItem::Add(key, new) => (None, Some((key, new))),
            DiffItem::Update { old: (_, old), new } => (Some(old), Some(new)),
            DiffItem::Remove(key, old) => {
                self.router.listeners.remove(key);
                (Some(old), None)
            }
        };
        if let Some((key, new)) = new {
            let pool = self.acquire(&new.pool);
            let stats = self.live.metrics.listener(key);
            let compiled = CompiledListener { desired: new.clone(), pool, stats };
            self.router.listeners.insert(*key, compiled);
        }
        self.old_keys.extend(old.map(|old| old.pool.clone()));
    }

    fn passthrough(&mut self, change: DiffItem<HostPattern, Arc<Passthrough>>) {
        let (new, old) = match change {
            DiffItem::Add(pattern, new) => (Some((pattern, new)), None),
            DiffItem::Update { old: (_, old), new: (pattern, new) } => (Some((pattern, new)), Some(old)),
            DiffItem::Remove(pattern, old) => {
                self.router.passthrough.remove(pattern);
                (None, Some(old))
            }
        };
        if let Some((pattern, new)) = new {
            let compiled = CompiledPassthrough { pool: self.acquire(&new.pool), desired: new.clone() };
            self.router.passthrough.insert(pattern, compiled, b"");
        }
        self.old_keys.extend(old.map(|old| old.pool.clone()));
    }

    fn certificates(&mut self, change: DiffItem<HostPattern, Arc<Vec<Arc<Certificate>>>>) {
        match change {
            DiffItem::Add(pattern, certificates) | DiffItem::Update { new: (pattern, certificates), .. } => {
                self.router.certificates.insert(pattern, certificates.clone(), b"");
            }
            DiffItem::Remove(pattern, _) => self.router.certificates.remove(pattern),
        }
    }
}

fn takes_turn(rule: &Rule) -> bool {
    matches!(&rule.action, Action::Forward(split) if CompiledSplit::needs_turn(split))
}

/// By path, each once (the first).
fn sorted(host: &Host) -> Vec<&Rule> {
    let mut rules: Vec<&Rule> = host.rules.iter().collect();
    rules.sort_by_key(|rule| &rule.path);
    rules.dedup_by_key(|rule| &rule.path);
    rules
}

/// The rules of a host before the change, desired and compiled, by path.
#[derive(Default)]
struct OldRules<'a>(HashMap<&'a PathMatch, (&'a Rule, &'a CompiledRule)>);

impl<'a> OldRules<'a> {
    fn new(desired: &'a Host, compiled: Option<&'a CompiledHost>) -> OldRules<'a> {
        let compiled = compiled.iter().flat_map(|host| host.rules.iter());
        // Both are sorted by path and have each once.
        let pairs = sorted(desired).into_iter().zip(compiled);
        OldRules(pairs.map(|(desired, compiled)| (&desired.path, (desired, compiled))).collect())
    }

    fn unchanged(&self, rule: &Rule) -> Option<&'a CompiledRule> {
        self.0.get(&rule.path).filter(|(desired, _)| *desired == rule).map(|(_, compiled)| *compiled)
    }

    fn turn(&self, path: &PathMatch) -> Option<u32> {
        match self.0.get(path) {
            Some((_, CompiledRule { action: CompiledAction::Forward(split), .. })) => split.turn(),
            _ => None,
        }
    }
}
