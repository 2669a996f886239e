//! Which endpoints may receive new connections: kube-proxy's
//! `CategorizeEndpoints`, for both data planes.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::Arc;

/// An endpoint as an EndpointSlice or a Pod shows it.
#[derive(Clone, Copy, Debug)]
pub(in crate::translate) struct Candidate<'a> {
    pub(in crate::translate) address: SocketAddr,
    pub(in crate::translate) ready: bool,
    pub(in crate::translate) serving: bool,
    pub(in crate::translate) terminating: bool,
    pub(in crate::translate) zone: Option<&'a Arc<str>>,
    pub(in crate::translate) node: Option<&'a Arc<str>>,
    /// Hints.
    pub(in crate::translate) for_zones: &'a [Arc<str>],
    pub(in crate::translate) for_nodes: &'a [Arc<str>],
}

impl Candidate<'_> {
    /// Not ready, but still good for traffic if nothing is (KEP-1669).
    fn is_last_resort(&self) -> bool {
        !self.ready && self.serving && self.terminating
    }

    fn is_on(&self, node: &str) -> bool {
        self.node.is_some_and(|own| **own == *node)
    }
}

/// Those of one family or both that may serve at all, each address once, in order;
/// and whether their zone hints count. The gateway takes it from here: its proxy
/// keeps to a zone as far as that one's endpoints can carry it.
pub(in crate::translate) fn anywhere<'a>(candidates: &[Candidate<'a>]) -> (Vec<Candidate<'a>>, bool) {
    let once = once(candidates, "");
    let hinted = once.iter().any(|one| one.ready) && all_ready(&once, has_zone_hint);
    (usable(once.iter()).copied().collect(), hinted)
}

/// Those that are ready; if there is none, those that serve while they terminate.
fn usable<'c, 'a>(
    candidates: impl Iterator<Item = &'c Candidate<'a>> + Clone,
) -> impl Iterator<Item = &'c Candidate<'a>>
where
    'a: 'c,
{
    let any_ready = candidates.clone().any(|candidate| candidate.ready);
    candidates.filter(move |candidate| if any_ready { candidate.ready } else { candidate.is_last_resort() })
}

/// Where traffic comes from.
#[derive(Clone, Copy, Debug)]
pub(in crate::translate) struct View<'a> {
    /// The own node's name.
    pub(in crate::translate) node: &'a str,
    /// Its zone.
    pub(in crate::translate) zone: Option<&'a str>,
}

/// Which sets a Service port uses; the other one stays empty.
#[derive(Clone, Copy, Debug)]
pub(in crate::translate) struct Uses {
    pub(in crate::translate) cluster: bool,
    pub(in crate::translate) local: bool,
}

/// The sets of one service port in one family, sorted.
#[derive(Debug, Default, PartialEq, Eq)]
pub(in crate::translate) struct Categorized {
    /// For traffic policy `Cluster`, after topology.
    pub(in crate::translate) cluster: Vec<SocketAddr>,
    /// For traffic policy `Local`.
    pub(in crate::translate) local: Vec<SocketAddr>,
    /// Any node has a usable endpoint.
    pub(in crate::translate) has_endpoints: bool,
}

/// The sets of `candidates`, which are of one family.
pub(in crate::translate) fn categorize(
    candidates: &[Candidate<'_>],
    view: View<'_>,
    uses: Uses,
) -> Categorized {
    let once = once(candidates, view.node);
    let mut categorized = Categorized {
        has_endpoints: once.iter().any(|candidate| candidate.ready || candidate.is_last_resort()),
        ..Categorized::default()
    };
    let addresses =
        |chosen: &mut dyn Iterator<Item = &Candidate<'_>>| chosen.map(|one| one.address).collect();
    if uses.cluster {
        let near = topology(&once, view);
        // If some are near, these are ready; otherwise none is asked to be.
        categorized.cluster = addresses(&mut usable(once.iter().filter(|one| near.admits(one, view))));
    }
    if uses.local {
        categorized.local = addresses(&mut usable(once.iter().filter(|one| one.is_on(view.node))));
    }
    categorized
}

/// The endpoints that are not in the set [`categorize`] makes, each with the reason.
pub(in crate::translate) fn left_out(
    candidates: &[Candidate<'_>],
    view: View<'_>,
    is_local: bool,
) -> Vec<(SocketAddr, String)> {
    let once = once(candidates, view.node);
    let near = if is_local { Topology::Anywhere } else { topology(&once, view) };
    let counts = |one: &Candidate<'_>| near.admits(one, view) && (!is_local || one.is_on(view.node));
    let any_ready = once.iter().any(|one| one.ready && counts(one));
    let why = |one: &Candidate<'_>| {
        let of = |names: &[Arc<str>]| names.join(", ");
        Some(match near {
            _ if is_local && !one.is_on(view.node) => {
                let node = one.node.map_or("no node", |node| node);
                format!("is on {node}, and the traffic policy is Local")
            }
            _ if !one.ready && !one.is_last_resort() => {
                let state = if one.terminating { "terminates and no longer serves" } else { "is not ready" };
                state.to_owned()
            }
            _ if !one.ready && any_ready => "terminates while others are ready".to_owned(),
            Topology::SameNode if !counts(one) => format!("is meant for clients on {}", of(one.for_nodes)),
            Topology::SameZone if !counts(one) => {
                format!("is meant for clients in zone {}", of(one.for_zones))
            }
            _ => return None,
        })
    };
    once.iter().filter_map(|one| Some((one.address, why(one)?))).collect()
}

/// An address in several slices is one endpoint: that on this node, then the readiest.
fn once<'a>(candidates: &[Candidate<'a>], node: &str) -> Vec<Candidate<'a>> {
    let rank = |one: &Candidate<'_>| (one.is_on(node), one.ready, one.is_last_resort());
    let mut by_address: BTreeMap<SocketAddr, Candidate<'a>> = BTreeMap::new();
    for candidate in candidates {
        let known = by_address.entry(candidate.address).or_insert(*candidate);
        let zone = known.zone.or(candidate.zone);
        if rank(candidate) > rank(known) {
            *known = *candidate;
        }
        known.zone = known.zone.or(zone);
    }
    by_address.into_values().collect()
}

/// What hints ask for. All or nothing: one ready endpoint without a hint, and
/// none counts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Topology {
    SameNode,
    SameZone,
    Anywhere,
}

fn topology(candidates: &[Candidate<'_>], view: View<'_>) -> Topology {
    let near = |mode: Topology| candidates.iter().any(|one| one.ready && mode.admits(one, view));
    if all_ready(candidates, |one| !one.for_nodes.is_empty()) && near(Topology::SameNode) {
        Topology::SameNode
    } else if all_ready(candidates, has_zone_hint) && near(Topology::SameZone) {
        Topology::SameZone
    } else {
        Topology::Anywhere
    }
}

fn all_ready(candidates: &[Candidate<'_>], hinted: impl Fn(&Candidate<'_>) -> bool) -> bool {
    candidates.iter().filter(|candidate| candidate.ready).all(hinted)
}

fn has_zone_hint(candidate: &Candidate<'_>) -> bool {
    !candidate.for_zones.is_empty()
}

impl Topology {
    fn admits(self, candidate: &Candidate<'_>, view: View<'_>) -> bool {
        match self {
            Topology::SameNode => candidate.for_nodes.iter().any(|node| **node == *view.node),
            Topology::SameZone => {
                view.zone.is_some_and(|zone| candidate.for_zones.iter().any(|own| **own == *zone))
            }
            Topology::Anywhere => true,
        }
    }
}

#[cfg(test)]
mod tests;
