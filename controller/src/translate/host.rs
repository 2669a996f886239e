//! One host: the rules of every Ingress that names it, merged.

use std::collections::BTreeMap;
use std::sync::Arc;

use lockgate_proxy::table::{
    Action, Backend, Host, HostPattern, Passthrough, PathMatch, PoolKey, Rule, Session, Split, Steering,
    UpstreamProtocol,
};

use super::annotations::{PREFIX, field};
use super::canary::{self, Member};
use super::headers::Headers;
use super::plan::{Age, Path, Place, Plan, Target};
use super::wish::Wish;
use crate::objects::{Notice, PortRef};
use crate::store::Key;

/// Why another Ingress won.
pub(super) const FIRST: &str = "comes first (by age, then by name)";

/// One port of a Service as one rule wants it.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(super) struct PoolId {
    pub(super) service: Key,
    pub(super) port: PortRef,
    /// Overrides the Service's own.
    pub(super) protocol: Option<UpstreamProtocol>,
}

impl PoolId {
    pub(super) fn key(&self) -> PoolKey {
        let protocol = match self.protocol {
            None => "",
            Some(UpstreamProtocol::Http1) => "#http",
            Some(UpstreamProtocol::H2c) => "#h2c",
            Some(UpstreamProtocol::Https) => "#https",
            Some(UpstreamProtocol::H2) => "#h2",
            Some(UpstreamProtocol::Tcp) => "#tcp",
            Some(UpstreamProtocol::Udp) => "#udp",
        };
        PoolKey(format!("{}:{}{protocol}", self.service, self.port).into())
    }
}

/// What became of one host.
#[derive(Debug, Default)]
pub(super) struct Outcome {
    /// `None` if no Ingress has a rule for it.
    pub(super) host: Option<Host>,
    /// Where its TLS goes unopened.
    pub(super) passthrough: Option<Passthrough>,
    pub(super) found: Found,
}

/// What else was found on the way.
#[derive(Debug, Default)]
pub(super) struct Found {
    /// By Ingress.
    pub(super) notices: BTreeMap<Key, Vec<Notice>>,
    /// The pools its rules name.
    pub(super) pools: BTreeMap<PoolId, Wanted>,
}

/// What the rules of one host want of a pool.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Wanted {
    /// Of the Ingresses that wish for something.
    pub(super) wishes: BTreeMap<Age, Wish>,
    /// Requests have keys or sessions.
    pub(super) steered: bool,
}

/// Merges `plans`, oldest first; their headers are loaded.
pub(super) fn build(host: &HostPattern, plans: &[Arc<Plan>], headers: &mut Headers) -> Outcome {
    let (canaries, mainlines): (Vec<_>, Vec<_>) =
        plans.iter().partition(|plan| plan.settings.canary.is_some());
    let closes = |plan: &&&Arc<Plan>| {
        plan.closed.as_ref().is_some_and(|closed| closed.whole_host)
            // A default backend beside rules protects the hosts of those rules only.
            && (plan.hosts.contains_key(host) || plan.hosts.is_empty())
    };
    let closed_by = mainlines.iter().find(closes).copied();
    let mut builder = Builder {
        host,
        closed_by,
        headers,
        rules: BTreeMap::new(),
        canaries: BTreeMap::new(),
        found: Found::default(),
    };
    for plan in &mainlines {
        for path in plan.hosts.get(host).into_iter().flatten() {
            builder.add(plan, path);
        }
    }
    for plan in &mainlines {
        builder.add_default(plan);
    }
    for plan in &canaries {
        builder.add_canary(plan);
    }
    for plan in &mainlines {
        builder.report_closed(plan);
    }
    let passthrough = builder.passthrough(&mainlines);
    let known = !builder.rules.is_empty() || mainlines.iter().any(|plan| plan.hosts.contains_key(host));
    builder.finish(known, passthrough)
}

/// A rule in the making.
struct Draft<'a> {
    plan: &'a Arc<Plan>,
    target: &'a Target,
    place: Place,
}

struct Builder<'a> {
    host: &'a HostPattern,
    /// An Ingress that restricts the whole host in a way that is not implemented.
    closed_by: Option<&'a Arc<Plan>>,
    headers: &'a mut Headers,
    rules: BTreeMap<PathMatch, Draft<'a>>,
    /// Oldest first.
    canaries: BTreeMap<PathMatch, Vec<Draft<'a>>>,
    found: Found,
}

impl<'a> Builder<'a> {
    fn notice(&mut self, plan: &Plan, notice: Notice) {
        self.found.notices.entry(plan.age.key.clone()).or_default().push(notice);
    }

    /// Why the routes of `plan` answer 503.
    fn closed(&self, plan: &Plan) -> Option<Arc<str>> {
        let closed = plan.closed.as_ref().or_else(|| self.closed_by?.closed.as_ref());
        closed.map(|closed| closed.reason.clone()).or_else(|| self.headers.refusal(plan))
    }

    /// To the Ingresses that are closed by another.
    fn report_closed(&mut self, plan: &Plan) {
        let Some(closing) = self.closed_by.filter(|closing| closing.age != plan.age) else { return };
        let message = format!(
            "every route of {} answers 503: Ingress {} restricts access to the host in a way that is not implemented yet",
            self.shown(),
            closing.age.key
        );
        self.notice(plan, Notice::error(".spec.rules", message, "see the other Ingress"));
    }

    fn add(&mut self, plan: &'a Arc<Plan>, path: &'a Path) {
        let Some(winner) = self.rules.get(&path.path) else {
            self.rules.insert(path.path.clone(), Draft { plan, target: &path.target, place: path.place });
            return;
        };
        let message = if winner.plan.age == plan.age {
            format!(
                "the same path of {} is at {} already: this one is not served",
                self.shown(),
                winner.place
            )
        } else {
            let winner = &winner.plan.age.key;
            format!(
                "{} of {} belongs to Ingress {winner}, which {FIRST}",
                shown_path(&path.path),
                self.shown()
            )
        };
        let remedy = "change the path, or remove it from one of the two";
        self.notice(plan, Notice::warning(path.place.to_string(), message, remedy));
    }

    fn shown(&self) -> &str {
        match self.host.as_str() {
            "" => "any host",
            host => host,
        }
    }

    /// A default backend takes what no path of its hosts takes, and what no
    /// other host takes.
    fn add_default(&mut self, plan: &'a Arc<Plan>) {
        let Some(target) = &plan.default_backend else { return };
        let everything: Arc<str> = "/".into();
        let root = PathMatch::Prefix(everything.clone());
        if !self.rules.contains_key(&root) && !self.rules.contains_key(&PathMatch::StringPrefix(everything)) {
            self.rules.insert(root, Draft { plan, target, place: Place::DefaultBackend });
            return;
        }
        let Some(winner) = self.rules.get(&root).filter(|winner| winner.place == Place::DefaultBackend)
        else {
            return;
        };
        if self.host.as_str().is_empty() {
            let message =
                format!("requests for other hosts go to Ingress {}, which {FIRST}", winner.plan.age.key);
            self.notice(plan, Notice::warning(".spec.defaultBackend", message, "keep one default backend"));
        }
    }

    fn add_canary(&mut self, plan: &'a Arc<Plan>) {
        let paths = plan.hosts.get(self.host).into_iter().flatten();
        for path in paths {
            self.add_canary_path(plan, &path.path, &path.target, path.place);
        }
        let Some(target) = &plan.default_backend else { return };
        let root = PathMatch::Prefix("/".into());
        if self.rules.get(&root).is_some_and(|rule| rule.place == Place::DefaultBackend) {
            self.add_canary_path(plan, &root, target, Place::DefaultBackend);
        } else if self.host.as_str().is_empty() {
            let message = "a canary without a mainline: no other Ingress has a default backend; ignored";
            let remedy = "add the mainline, or remove the canary annotation";
            self.notice(plan, Notice::warning(".spec.defaultBackend", message, remedy));
        }
    }

    fn add_canary_path(&mut self, plan: &'a Arc<Plan>, path: &PathMatch, target: &'a Target, place: Place) {
        let remedy = "give both the same host, path and pathType";
        let Some(rule) = self.rules.get(path) else {
            let message = format!(
                "a canary without a mainline: no other Ingress has {} of {}; ignored",
                shown_path(path),
                self.shown()
            );
            return self.notice(plan, Notice::warning(place.to_string(), message, remedy));
        };
        if self.closed(rule.plan).is_some() || matches!(rule.target, Target::Refused(_)) {
            let message =
                format!("its mainline, Ingress {}, answers 503, and so does this", rule.plan.age.key);
            return self.notice(plan, Notice::warning(place.to_string(), message, "see the mainline"));
        }
        if matches!(target, Target::Refused(_)) {
            return;
        }
        let members = self.canaries.entry(path.clone()).or_default();
        if let Some(twin) = members.iter().find(|member| member.plan.age == plan.age) {
            let message = format!("the same path is at {} already: ignored", twin.place);
            return self.notice(plan, Notice::warning(place.to_string(), message, "remove it"));
        }
        if members.len() == canary::MOST {
            let message = format!("more than {} canaries of one path: ignored", canary::MOST);
            return self.notice(plan, Notice::error(place.to_string(), message, "remove some"));
        }
        members.push(Draft { plan, target, place });
    }

    /// Where TLS of this host goes unopened. As in ingress-nginx, the first
    /// Ingress that names the host decides.
    fn passthrough(&mut self, mainlines: &[&'a Arc<Plan>]) -> Option<Passthrough> {
        let mut naming = mainlines.iter().copied().filter(|plan| plan.hosts.contains_key(self.host));
        let first = naming.next()?;
        if !first.settings.passthrough {
            for other in naming.filter(|other| other.settings.passthrough) {
                let (host, first) = (self.shown(), &first.age.key);
                let message = format!("TLS of {host} ends here: so Ingress {first} wants it, which {FIRST}");
                self.notice(other, Notice::warning(passthrough_field(), message, "use another host"));
            }
            return None;
        }
        if self.closed(first).is_some() {
            return None;
        }
        let host = self.shown();
        let (owner, service, port) = match self.everything() {
            Ok(target) => target,
            Err((problem, remedy)) => {
                let message = format!("TLS of {host} ends here: {problem}");
                self.notice(first, Notice::error(passthrough_field(), message, remedy));
                return None;
            }
        };
        let message = format!(
            "TLS of {host} goes to endpoints unopened; ingress-nginx does that only with --enable-ssl-passthrough"
        );
        self.notice(first, Notice::info(passthrough_field(), message));
        for other in naming.filter(|other| !other.settings.passthrough) {
            let (host, first) = (self.shown(), &first.age.key);
            let message =
                format!("Ingress {first} passes TLS of {host} through: these routes take plain HTTP alone");
            self.notice(other, Notice::warning(".spec.rules", message, "use another host"));
        }
        Some(Passthrough {
            pool: self.pool(owner, service, port, owner.settings.protocol, false),
            origin: first.origin.clone(),
            connect_timeout: first.settings.limits.connect_timeout,
            proxy_protocol: first.settings.passthrough_header,
        })
    }

    /// The Service of path `/`, to which everything can go. An error is the problem and its remedy.
    fn everything(&self) -> Result<(&'a Arc<Plan>, &'a Key, &'a PortRef), (&'static str, &'static str)> {
        if self.host.as_str().is_empty() {
            return Err(("a rule without host cannot be known by its name", "name a host"));
        }
        let root: Arc<str> = "/".into();
        let paths =
            [PathMatch::Prefix(root.clone()), PathMatch::StringPrefix(root.clone()), PathMatch::Exact(root)];
        match paths.iter().find_map(|path| self.rules.get(path)).map(|draft| (draft.plan, draft.target)) {
            // Its other annotations would not be asked.
            Some((owner, _)) if !owner.settings.passthrough || self.closed(owner).is_some() => {
                Err(("its path / belongs to another Ingress", "annotate that one, too"))
            }
            Some((owner, Target::Service { service, port })) => Ok((owner, service, port)),
            _ => Err(("it has no path / with a Service to go to", "add path /, of type Prefix")),
        }
    }

    fn finish(mut self, known: bool, passthrough: Option<Passthrough>) -> Outcome {
        let mut rules = Vec::with_capacity(self.rules.len());
        for (path, draft) in std::mem::take(&mut self.rules) {
            let canaries = self.canaries.remove(&path).unwrap_or_default();
            rules.push(Rule {
                edits: self.headers.of_rule(draft.plan, &path, draft.target),
                path,
                origin: draft.plan.origin.clone(),
                // What speaks TLS behind it does not understand HTTP in the clear.
                https_redirect: draft.plan.redirects(self.host)
                    || passthrough.is_some()
                        && draft.plan.settings.passthrough
                        && draft.plan.settings.redirect,
                action: self.action(&draft, &canaries),
                limits: draft.plan.settings.limits.clone(),
            });
        }
        Outcome { host: known.then_some(Host { rules }), passthrough, found: self.found }
    }

    fn action(&mut self, draft: &Draft<'_>, canaries: &[Draft<'_>]) -> Action {
        let refused = |reason: &Arc<str>| Action::Respond { status: 503, reason: reason.clone() };
        if let Some(reason) = self.closed(draft.plan) {
            return refused(&reason);
        }
        // A canary is a location of its mainline, so it speaks the mainline's protocol.
        let protocol = draft.plan.settings.protocol;
        let steering = held(draft.plan.settings.steering.as_ref(), canaries);
        let primary = match draft.target {
            Target::Refused(reason) => return refused(reason),
            Target::Service { service, port } => {
                self.pool(draft.plan, service, port, protocol, steering.is_some())
            }
        };
        if canaries.is_empty() {
            let backends = vec![Backend { pool: primary, weight: 1, canary: "".into(), steering }];
            return Action::Forward(Split { backends, overrides: Vec::new(), sticky: None });
        }
        let mut members = Vec::with_capacity(canaries.len());
        for member in canaries {
            if let (Some(canary), Target::Service { service, port }) =
                (&member.plan.settings.canary, member.target)
            {
                let settings = &member.plan.settings;
                let of_mainline = steering.clone().filter(|steering| {
                    matches!(**steering, Steering::Session(_)) && !settings.ignores_sessions
                });
                let steering = of_mainline.or_else(|| settings.steering.clone());
                let pool = self.pool(member.plan, service, port, protocol, steering.is_some());
                members.push(Member { name: member.plan.origin.name.clone(), pool, canary, steering });
            }
        }
        let (split, problems) = canary::split(primary, steering, &members);
        for (member, message) in problems {
            let member = &canaries[member];
            let notice = Notice::warning(member.place.to_string(), message, "");
            self.notice(member.plan, notice);
        }
        Action::Forward(split)
    }

    fn pool(
        &mut self,
        plan: &Plan,
        service: &Key,
        port: &PortRef,
        protocol: Option<UpstreamProtocol>,
        steered: bool,
    ) -> PoolKey {
        let id = PoolId { service: service.clone(), port: port.clone(), protocol };
        let key = id.key();
        let wanted = self.found.pools.entry(id).or_default();
        wanted.steered |= steered;
        if plan.settings.wish != Wish::default() {
            wanted.wishes.insert(plan.age.clone(), plan.settings.wish.clone());
        }
        key
    }
}

fn passthrough_field() -> String {
    field(&format!("{PREFIX}ssl-passthrough"))
}

/// A session holds on to its backend unless a canary has it otherwise
/// (`affinity-canary-behavior: legacy`).
fn held(steering: Option<&Arc<Steering>>, canaries: &[Draft<'_>]) -> Option<Arc<Steering>> {
    let steering = steering?;
    match &**steering {
        Steering::Session(session)
            if session.holds_backend && canaries.iter().any(|c| c.plan.settings.ignores_sessions) =>
        {
            let session = Session { holds_backend: false, ..session.clone() };
            Some(Arc::new(Steering::Session(session)))
        }
        _ => Some(steering.clone()),
    }
}

fn shown_path(path: &PathMatch) -> String {
    let kind = match path {
        PathMatch::Exact(_) => "Exact",
        PathMatch::Prefix(_) => "Prefix",
        PathMatch::StringPrefix(_) => "ImplementationSpecific",
    };
    format!("{kind} {}", path.as_str())
}
