//! `lockgate explain`: which rule serves a request, and why. The winner is the
//! router's own answer; what stands here only puts the reasons into words.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{SystemTime, UNIX_EPOCH};

use lockgate_proxy::resilience::{Breaker, Hedge, Resilience};
use lockgate_proxy::table::{
    Action, ClientLimits, Host, HostPattern, PathMatch, Rule, RuleLimits, Split, When,
};

use crate::args::ExplainArgs;
use crate::check::{self, routes};
use crate::node;
use crate::text::{Text, Tone, count, printable};
use crate::translate::translate;
use lockgate_proxy::router::{Found, Live, Router};

mod question;

pub(crate) use question::Question;

/// Rules that did not win are listed up to this many.
const OTHERS_MAX: usize = 12;

/// Addresses listed of one backend.
const ADDRESSES_MAX: usize = 8;

/// Requests below this path are never redirected to https (RFC 8555 section 8.3).
const ACME: &str = "/.well-known/acme-challenge/";

/// Runs `lockgate explain`; returns the exit status.
pub async fn run(args: &ExplainArgs) -> u8 {
    if let Some(client) = args.client {
        return service(args, client).await;
    }
    let question = match Question::new(&args.url, &args.method, &args.headers) {
        Ok(question) => question,
        Err(error) => return fail(&error),
    };
    match (&args.admin, &args.manifests) {
        (Some(admin), _) => ask_admin(*admin, args).await,
        (None, Some(path)) => ask_files(path.clone(), args, &question),
        (None, None) => fail("name --manifests DIR or --admin ADDR"),
    }
}

/// What the service plane does with a connection of `client`.
async fn service(args: &ExplainArgs, client: std::net::IpAddr) -> u8 {
    let question = match node::explain::Question::new(&args.url, client) {
        Ok(question) => question,
        Err(error) => return fail(&error),
    };
    match (&args.admin, &args.manifests) {
        (Some(admin), _) => {
            let address = encode(&args.url);
            query_admin(
                *admin,
                &format!("/debug/explain?address={address}&client={}", encode(&client.to_string())),
            )
            .await
        }
        (None, Some(path)) => {
            let options = match args.view.options() {
                Ok(options) => options,
                Err(error) => return fail(&format!("{error:#}")),
            };
            let Some(node) = &options.node else { return fail("there is no node") };
            let snapshot = check::read_all(std::slice::from_ref(path), &args.objects).snapshot();
            snapshot.problems.iter().for_each(|problem| eprintln!("lockgate: {problem}"));
            let desired = translate(&snapshot.store, &options);
            let mut text = Text::for_stdout();
            let served =
                node::explain::explain(&mut text, &desired.services, &question, node, &snapshot.store);
            text.print();
            u8::from(!served)
        }
        (None, None) => fail("name --manifests DIR or --admin ADDR"),
    }
}

fn fail(error: &str) -> u8 {
    eprintln!("lockgate: {error}");
    2
}

fn ask_files(path: PathBuf, args: &ExplainArgs, question: &Question) -> u8 {
    let snapshot = check::read_all(&[path], &args.objects).snapshot();
    snapshot.problems.iter().for_each(|problem| eprintln!("lockgate: {problem}"));
    if snapshot.store.is_empty() {
        return fail("nothing was read that could serve a request");
    }
    let desired = translate(&snapshot.store, &args.objects.options());
    let router = Router::empty().compile(desired.routes, &Live::default());
    let mut text = Text::for_stdout();
    let served = explain(&mut text, &router, question);
    text.print();
    u8::from(!served)
}

async fn ask_admin(admin: SocketAddr, args: &ExplainArgs) -> u8 {
    let mut query = format!("/debug/explain?url={}&method={}", encode(&args.url), encode(&args.method));
    args.headers.iter().for_each(|header| query.push_str(&format!("&header={}", encode(header))));
    query_admin(admin, &query).await
}

async fn query_admin(admin: SocketAddr, query: &str) -> u8 {
    match crate::admin::get(admin, query).await {
        Ok((status @ (200 | 404), body)) => {
            let mut text = Text::for_stdout();
            text.plain(&body);
            text.print();
            u8::from(status != 200)
        }
        Ok((status, body)) => fail(&format!("{admin} answers {status}: {}", printable(body.trim()))),
        Err(error) => fail(&format!(
            "{admin} does not answer: {error}; is this the --admin-addr of a running Lockgate?"
        )),
    }
}

/// Percent-encodes everything that could end a query parameter.
fn encode(text: &str) -> String {
    let plain = |byte: u8| byte.is_ascii_alphanumeric() || b"-._~/".contains(&byte);
    text.bytes()
        .map(|byte| if plain(byte) { (byte as char).to_string() } else { format!("%{byte:02X}") })
        .collect()
}

/// Writes down how `router` decides; says whether a rule serves the request.
pub(crate) fn explain(text: &mut Text, router: &Router, question: &Question) -> bool {
    let mut answer = Answer { text, router, question };
    answer
        .text
        .put(Tone::Heading, &format!("{} {}", question.method, printable(&question.url())))
        .line()
        .line();
    if question.https && answer.passthrough() {
        return true;
    }
    if question.https {
        answer.certificate();
    }
    let Some(host) = answer.host() else { return false };
    let path = match normalise(&question.path) {
        Ok(path) => path,
        Err(reason) => {
            answer.step("path", Tone::Bad, &format!("400: {reason}"));
            return false;
        }
    };
    let Some(rule) = answer.path(&host, &path) else { return false };
    if rule.https_redirect && !question.https {
        if !path.starts_with(ACME) {
            let query = question.query.as_ref().map(|query| format!("?{query}")).unwrap_or_default();
            let location = format!("https://{}{}{query}", question.host, question.path);
            answer.step("https", Tone::Good, &format!("308 to {}", printable(&location)));
            return true;
        }
        answer.step("https", Tone::Plain, "not redirected: certificate authorities ask in the clear here");
    }
    match &rule.action {
        Action::Respond { status, reason } => {
            answer.step("answer", Tone::Bad, &format!("{status}: {}", printable(reason)));
        }
        Action::Forward(split) => answer.split(split),
    }
    answer.limits(&rule.limits);
    answer.headers(&rule);
    true
}

struct Answer<'a> {
    text: &'a mut Text,
    router: &'a Router,
    question: &'a Question,
}

impl Answer<'_> {
    fn step(&mut self, name: &str, tone: Tone, what: &str) {
        self.text.put(Tone::Faint, &format!("  {name:12}")).put(tone, what).line();
    }

    fn more(&mut self, tone: Tone, what: &str) {
        self.step("", tone, what);
    }

    /// Whether the connection goes to an endpoint before there is a request to look at.
    fn passthrough(&mut self) -> bool {
        let Some(found) = self.router.passthrough(&self.question.host) else { return false };
        let route = found.desired.clone();
        let what = format!("passed through unopened, as {} wants it", routes::origin_text(&route.origin));
        self.step("tls", Tone::Good, &what);
        let endpoints = routes::endpoints(self.router.table(), &route.pool);
        let tone = if endpoints > 0 { Tone::Good } else { Tone::Bad };
        self.step("backend", tone, &route.pool.0);
        self.endpoints(&route.pool, false);
        true
    }

    fn certificate(&mut self) {
        let table = self.router.table();
        match routes::certificate_pattern(table, &self.question.host) {
            Some(pattern) => {
                let name = quoted(&routes::host_text(&pattern));
                let certificates = table.certificates.get(&pattern).cloned().unwrap_or_default();
                for certificate in certificates.iter() {
                    let (tone, until) = validity(certificate.not_after());
                    let what = format!("{:?} for {name}, {until}", certificate.algorithm());
                    self.step("certificate", tone, &what);
                    if !certificate.covers(&self.question.host) {
                        let names: Vec<&str> = certificate.names().iter().map(|name| &**name).collect();
                        let what =
                            format!("clients refuse it: it is made out to {}", printable(&names.join(", ")));
                        self.more(Tone::Bad, &what);
                    }
                }
            }
            None if table.default_certificate.is_some() => {
                self.step(
                    "certificate",
                    Tone::Warning,
                    "none for this host: the default certificate is shown",
                );
            }
            None => {
                let what = "none for this host: a self-signed certificate is shown, which clients refuse";
                self.step("certificate", Tone::Bad, what);
            }
        }
    }

    fn host(&mut self) -> Option<Arc<Host>> {
        let host = self.question.host.clone();
        let wildcard = host.split_once('.').map(|(_, parent)| format!("*.{parent}"));
        let patterns = [Some(host.clone()), wildcard, Some(String::new())];
        let mut missed: Vec<String> = Vec::new();
        for (pattern, kind) in patterns.iter().zip(["exact", "wildcard", "any host"]) {
            let Some(pattern) = pattern else { continue };
            let pattern = HostPattern::new(pattern);
            let name = routes::host_text(&pattern);
            if let Some(host) = self.router.table().hosts.get(&pattern).cloned() {
                let missed = if missed.is_empty() {
                    String::new()
                } else {
                    format!("; none for {}", missed.join(", "))
                };
                let rules = count(host.rules.len(), "rule");
                self.step("host", Tone::Good, &format!("{rules} for {} ({kind}){missed}", quoted(&name)));
                return Some(host);
            }
            missed.push(quoted(&name));
        }
        self.step("host", Tone::Bad, &format!("404: no rules for {}", missed.join(", ")));
        let hosts = &self.router.table().hosts;
        let mut known: Vec<String> = hosts.keys().take(OTHERS_MAX).map(routes::host_text).collect();
        if hosts.len() > known.len() {
            known.push(format!("and {} more", hosts.len() - known.len()));
        }
        let known = if known.is_empty() { "no host at all".to_owned() } else { known.join(", ") };
        self.more(Tone::Faint, &format!("there are rules for {}", printable(&known)));
        None
    }

    fn path(&mut self, host: &Host, path: &str) -> Option<Rule> {
        if path != self.question.path {
            self.step("path", Tone::Plain, &format!("matched as {}", printable(path)));
        }
        let Found::Rule(winner) = self.router.find(&self.question.host, path.as_bytes()) else {
            self.step(
                "path",
                Tone::Bad,
                "404: no rule of this host matches; less precise hosts are not asked",
            );
            self.others(host, None, path);
            return None;
        };
        let rule = host.rules.iter().find(|rule| rule.path == winner.path)?.clone();
        let matching = host.rules.iter().filter(|rule| matches(&rule.path, path)).count();
        let why = match (&rule.path, matching) {
            (_, 1) => "the only rule that matches".to_owned(),
            (PathMatch::Exact(_), n) => format!("exact, which wins over the longest of {n} matches"),
            (_, n) => format!("the longest of {n} matches"),
        };
        let (kind, written) = (routes::path_type(&rule.path), printable(rule.path.as_str()));
        self.step(
            "path",
            Tone::Good,
            &format!("{kind} {written} of {}: {why}", routes::origin_text(&rule.origin)),
        );
        self.others(host, Some(&rule.path), path);
        Some(rule)
    }

    /// The rules that did not win, those that match first.
    fn others(&mut self, host: &Host, winner: Option<&PathMatch>, path: &str) {
        let mut others: Vec<&Rule> = host.rules.iter().filter(|rule| Some(&rule.path) != winner).collect();
        others.sort_by_key(|rule| (!matches(&rule.path, path), std::cmp::Reverse(rule.path.as_str().len())));
        let rows: Vec<Vec<(Tone, String)>> = others
            .iter()
            .take(OTHERS_MAX)
            .map(|rule| {
                let reason = if !matches(&rule.path, path) {
                    why_not(&rule.path, path)
                } else if matches!(winner, Some(PathMatch::Exact(_))) {
                    "matches, but exact wins"
                } else if winner.is_some_and(|w| {
                    w.as_str().trim_end_matches('/').len() == rule.path.as_str().trim_end_matches('/').len()
                }) {
                    "matches, but whole elements win over bytes"
                } else {
                    "matches, but is shorter"
                };
                [routes::path_type(&rule.path).to_owned(), printable(rule.path.as_str()), reason.to_owned()]
                    .map(|cell| (Tone::Faint, cell))
                    .to_vec()
            })
            .collect();
        self.text.table(16, &rows);
        if others.len() > OTHERS_MAX {
            self.more(Tone::Faint, &format!("  and {} more rules", others.len() - OTHERS_MAX));
        }
    }

    fn split(&mut self, split: &Split) {
        let decided = self.overrides(split);
        let table = self.router.table();
        let shares = routes::shares(table, split);
        let primary_lives = shares.first().is_some_and(|share| share.endpoints > 0);
        if let (None, Some(sticky)) = (decided, &split.sticky) {
            self.step("sticky", Tone::Plain, &routes::sticky_text(sticky));
        }
        let mut name = "backend";
        for (index, share) in shares.iter().enumerate() {
            if decided.is_some_and(|decided| decided != index) {
                continue;
            }
            let percent = if decided.is_some() { 100.0 } else { share.percent };
            let mut line = format!("{:>6}  {}", routes::percent(percent), share.service);
            if !share.canary.is_empty() {
                line.push_str(&format!("  canary {}", share.canary));
            }
            let tone = if share.endpoints > 0 { Tone::Good } else { Tone::Bad };
            self.step(name, tone, &line);
            name = "";
            self.endpoints(&split.backends[index].pool, index > 0 && primary_lives);
        }
    }

    /// Asks the conditions in their order; the canary that one of them takes.
    fn overrides(&mut self, split: &Split) -> Option<usize> {
        let mut excluded: Vec<usize> = Vec::new();
        for condition in &split.overrides {
            let says = ask(&condition.when, self.question);
            let canary =
                split.backends.get(condition.backend).map_or("?", |backend| &*backend.pool.0).to_owned();
            let asked = routes::when_text(&condition.when);
            match says {
                Says::Take if !excluded.contains(&condition.backend) => {
                    self.step("condition", Tone::Good, &format!("{asked}: yes, so {canary} takes it"));
                    return Some(condition.backend);
                }
                Says::Take => {
                    self.step("condition", Tone::Plain, &format!("{asked}: yes, but {canary} is excluded"))
                }
                Says::Exclude => {
                    excluded.push(condition.backend);
                    self.step(
                        "condition",
                        Tone::Good,
                        &format!("{asked}: it says never, so {canary} is excluded"),
                    );
                }
                Says::Nothing => self.step("condition", Tone::Faint, &format!("{asked}: no")),
            }
        }
        // What an excluded canary would have got goes to the primary.
        let remaining = (1..split.backends.len()).filter(|index| !excluded.contains(index)).count();
        (!excluded.is_empty() && remaining == 0).then_some(0)
    }

    fn endpoints(&mut self, pool: &lockgate_proxy::table::PoolKey, has_primary: bool) {
        let Some(pool) = self.router.table().pools.get(pool).filter(|pool| !pool.endpoints.is_empty()) else {
            let what = if has_primary {
                "        no endpoints: its share goes to the primary"
            } else {
                "        no endpoints: answered 503 until one is ready"
            };
            return self.more(Tone::Bad, what);
        };
        let mut addresses: Vec<String> =
            pool.endpoints.iter().take(ADDRESSES_MAX).map(|endpoint| endpoint.address.to_string()).collect();
        if pool.endpoints.len() > addresses.len() {
            addresses.push(format!("and {} more", pool.endpoints.len() - addresses.len()));
        }
        let what = format!(
            "        {} by {:?}, {:?}: {}",
            count(pool.endpoints.len(), "endpoint"),
            pool.balance,
            pool.protocol,
            addresses.join(", ")
        );
        self.more(Tone::Faint, &what);
    }

    fn headers(&mut self, rule: &Rule) {
        for (index, line) in routes::headers(self.router.table(), rule).iter().enumerate() {
            self.step(if index == 0 { "headers" } else { "" }, Tone::Plain, &printable(line));
        }
    }

    fn limits(&mut self, limits: &RuleLimits) {
        let seconds =
            |name: &str, limit: Option<std::time::Duration>| limit.map(|limit| format!("{name} {limit:?}"));
        let body = limits.max_body.map(|bytes| match bytes {
            0 => "no body limit".to_owned(),
            bytes => format!("body {bytes} bytes"),
        });
        let own: Vec<String> = [
            seconds("connect", limits.connect_timeout),
            seconds("send", limits.send_timeout),
            seconds("read", limits.read_timeout),
            body,
        ]
        .into_iter()
        .flatten()
        .chain(limits.per_client.iter().flat_map(|limits| per_client(limits)))
        .chain(limits.resilience.iter().flat_map(|own| resilience(own)))
        .collect();
        if !own.is_empty() {
            self.step("limits", Tone::Plain, &own.join(", "));
        }
    }
}

fn per_client(limits: &ClientLimits) -> Vec<String> {
    let requests =
        limits.requests.map(|most| format!("{} at once per client", count(most as usize, "request")));
    let rates = limits.rates.iter().map(|rate| {
        let requests = count(rate.requests as usize, "request");
        format!("{requests} per client in {:?}, and {} at once", rate.per, u64::from(rate.burst) + 1)
    });
    let exempt = (!limits.exempt.is_empty()).then(|| count(limits.exempt.len(), "network") + " exempt");
    requests.into_iter().chain(rates).chain(exempt).collect()
}

/// What a rule says about endpoints that fail, are slow or have enough to do.
fn resilience(own: &Resilience) -> Vec<String> {
    let timeout =
        |name: &str, limit: Option<std::time::Duration>| limit.map(|limit| format!("{name} {limit:?}"));
    let hedge = own.hedge.map(|hedge| match hedge {
        Hedge::After(delay) => format!("sent twice after {delay:?}"),
        Hedge::P95 => "sent twice after its p95".to_owned(),
    });
    let breaker = own.breaker.map(|limits| {
        let Breaker { connections, pending, requests } = limits;
        format!("each endpoint {connections} connections, {pending} pending, {requests} requests (0: any)")
    });
    let all = [
        timeout("request", own.request_timeout),
        timeout("try", own.try_timeout),
        own.retry_on.map(|on| format!("retries on {on}")),
        own.tries.map(|tries| format!("{tries} tries")),
        timeout("tries within", own.retry_within),
        hedge,
        breaker,
    ];
    all.into_iter().flatten().collect()
}

/// `not_after` in seconds since 1970.
fn validity(not_after: i64) -> (Tone, String) {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs() as i64);
    match (not_after - now) / 86_400 {
        _ if not_after <= now => (Tone::Bad, "expired: clients refuse it".to_owned()),
        days @ ..14 => (Tone::Warning, format!("expires in {}", count(days as usize, "day"))),
        days => (Tone::Good, format!("valid for {}", count(days as usize, "day"))),
    }
}

fn quoted(name: &str) -> String {
    if name == "*" { "any host".to_owned() } else { printable(name) }
}

/// Whether a rule's path matches at all; which of several wins, the router says.
fn matches(rule: &PathMatch, path: &str) -> bool {
    match rule {
        PathMatch::Exact(exact) => **exact == *path,
        PathMatch::StringPrefix(prefix) => path.starts_with(&**prefix),
        PathMatch::Prefix(prefix) => {
            let elements = prefix.strip_suffix('/').unwrap_or(prefix);
            path.strip_prefix(elements).is_some_and(|rest| rest.is_empty() || rest.starts_with('/'))
        }
    }
}

fn why_not(rule: &PathMatch, path: &str) -> &'static str {
    match rule {
        PathMatch::Exact(exact) if exact.trim_end_matches('/') == path.trim_end_matches('/') => {
            "no: Exact minds the trailing slash"
        }
        PathMatch::Exact(prefix) if path.starts_with(&**prefix) => "no: Exact is not a prefix",
        PathMatch::Prefix(prefix) if path.starts_with(prefix.trim_end_matches('/')) => {
            "no: Prefix matches whole elements"
        }
        rule if rule.as_str().eq_ignore_ascii_case(path) => "no: case counts",
        _ => "no",
    }
}

enum Says {
    Take,
    Exclude,
    Nothing,
}

/// What a condition says of a request (ingress-nginx, `balancer.lua`).
fn ask(when: &When, question: &Question) -> Says {
    let always = |value: Option<&str>| match value {
        Some("always") => Says::Take,
        Some("never") => Says::Exclude,
        _ => Says::Nothing,
    };
    let take = |taken: bool| if taken { Says::Take } else { Says::Nothing };
    match when {
        When::Header(name) => always(question.header(name)),
        When::Cookie(name) => always(question.cookie(name)),
        When::HeaderValue(name, value) => take(question.header(name) == Some(value)),
        When::HeaderPattern(name, pattern) => {
            let pattern = regex::Regex::new(pattern).ok();
            take(
                question
                    .header(name)
                    .is_some_and(|value| pattern.is_some_and(|pattern| pattern.is_match(value))),
            )
        }
    }
}

/// As the proxy sees a path; or why it answers 400.
fn normalise(path: &str) -> Result<String, &'static str> {
    lockgate_proxy::normalise_path(path.as_bytes()).map(|path| String::from_utf8_lossy(&path).into_owned())
}

pub(crate) fn decode(text: &str) -> String {
    let bytes = text.as_bytes();
    let mut out = Vec::with_capacity(bytes.len());
    let mut at = 0;
    while at < bytes.len() {
        let hex = bytes.get(at + 1..at + 3).and_then(|hex| std::str::from_utf8(hex).ok());
        match hex.filter(|_| bytes[at] == b'%').and_then(|hex| u8::from_str_radix(hex, 16).ok()) {
            Some(byte) => {
                out.push(byte);
                at += 3;
            }
            None => {
                out.push(bytes[at]);
                at += 1;
            }
        }
    }
    String::from_utf8_lossy(&out).into_owned()
}

#[cfg(test)]
mod tests;
