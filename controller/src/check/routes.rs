//! The routes of a table as rows for people and programs.

use std::sync::Arc;

use lockgate_proxy::RoutingTable;
use lockgate_proxy::table::{
    Action, Backend, HostPattern, L4Listener, ListenerKey, Origin, PathMatch, Persistence, PoolKey, Rule,
    Split, Sticky, When,
};
use serde::Serialize;

use crate::text::{Text, Tone, count, printable};

/// One rule of one host.
#[derive(Debug, PartialEq, Serialize)]
pub(crate) struct Route {
    /// As written; `*` for any host.
    pub(crate) host: String,
    pub(crate) path: String,
    /// `Exact`, `Prefix`, or `StringPrefix` for bytes.
    #[serde(rename = "type")]
    pub(crate) path_type: &'static str,
    /// The object that asked for it: `Ingress shop/web`.
    pub(crate) origin: String,
    /// A certificate of the table covers the host.
    pub(crate) tls: bool,
    /// TLS goes unopened to endpoints of this pool.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) passthrough: Option<String>,
    /// Plaintext requests are sent to https.
    pub(crate) https_redirect: bool,
    /// What is answered instead of forwarding.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) answer: Option<String>,
    pub(crate) backends: Vec<Share>,
    /// Header and cookie conditions, asked in this order before the shares.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub(crate) conditions: Vec<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) sticky: Option<String>,
    /// What is changed in heads.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub(crate) headers: Vec<String>,
}

/// One backend and how much it gets.
#[derive(Debug, PartialEq, Serialize)]
pub(crate) struct Share {
    /// `namespace/service:port`
    pub(crate) service: String,
    pub(crate) weight: u32,
    /// Of the requests that no condition decides.
    pub(crate) percent: f64,
    /// The canary's name; empty for the primary.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub(crate) canary: String,
    /// How many endpoints may receive requests now.
    pub(crate) endpoints: usize,
}

/// One port that is relayed as it is.
#[derive(Debug, PartialEq, Serialize)]
pub(crate) struct Port {
    /// `tcp/0.0.0.0:5432`
    pub(crate) listener: String,
    /// The object that asked for it: `ConfigMap ingress-nginx/tcp-services`.
    pub(crate) origin: String,
    /// `namespace/service:port`
    pub(crate) service: String,
    /// How many endpoints there are now.
    pub(crate) endpoints: usize,
    /// Clients begin with a PROXY header.
    pub(crate) reads_proxy_header: bool,
    /// Endpoints are sent one.
    pub(crate) writes_proxy_header: bool,
}

/// Every port, TCP first.
pub(crate) fn ports(table: &RoutingTable) -> Vec<Port> {
    let port = |(key, listener): (&ListenerKey, &Arc<L4Listener>)| Port {
        listener: key.to_string(),
        origin: origin_text(&listener.origin),
        service: listener.pool.0.split('#').next().unwrap_or_default().to_owned(),
        endpoints: endpoints(table, &listener.pool),
        reads_proxy_header: listener.proxy_protocol.accept,
        writes_proxy_header: listener.proxy_protocol.send.is_some(),
    };
    table.listeners.iter().map(port).collect()
}

/// Every rule, by host and path.
pub(crate) fn routes(table: &RoutingTable) -> Vec<Route> {
    let mut routes = Vec::new();
    for (pattern, host) in &table.hosts {
        let mut rules: Vec<&Rule> = host.rules.iter().collect();
        rules.sort_by(|a, b| (a.path.as_str(), &a.path).cmp(&(b.path.as_str(), &b.path)));
        routes.extend(rules.into_iter().map(|rule| route(table, pattern, rule)));
    }
    // Hosts by name with those that match more behind those that match less.
    routes.sort_by_key(|route| (route.host == "*", route.host.starts_with("*.")));
    routes
}

fn route(table: &RoutingTable, pattern: &HostPattern, rule: &Rule) -> Route {
    let (answer, split) = match &rule.action {
        Action::Respond { status, reason } => (Some(format!("{status}: {reason}")), None),
        Action::Forward(split) => (None, Some(split)),
    };
    Route {
        host: host_text(pattern),
        path: rule.path.as_str().to_owned(),
        path_type: path_type(&rule.path),
        origin: origin_text(&rule.origin),
        tls: certificate_pattern(table, pattern.as_str()).is_some(),
        passthrough: table.passthrough.get(pattern).map(|passed| passed.pool.0.to_string()),
        https_redirect: rule.https_redirect,
        answer,
        backends: split.map(|split| shares(table, split)).unwrap_or_default(),
        conditions: split.map(conditions).unwrap_or_default(),
        sticky: split.and_then(|split| split.sticky.as_ref()).map(sticky_text),
        headers: headers(table, rule),
    }
}

/// What a rule changes in the heads of requests and responses, as lines.
pub(crate) fn headers(table: &RoutingTable, rule: &Rule) -> Vec<String> {
    let Some(edits) = rule.edits.as_ref().or(table.edits.as_ref()) else { return Vec::new() };
    let host = edits.host.iter().map(|host| format!("request: Host {}", host.as_str()));
    let connection = edits.connection.iter().map(|persistence| match persistence {
        Persistence::KeepAlive => "request: Connection keep-alive".to_owned(),
        Persistence::Close => "request: Connection close".to_owned(),
    });
    let request = edits.request.iter().map(|edit| format!("request: {edit}"));
    let response = edits.response.iter().map(|edit| format!("response: {edit}"));
    host.chain(connection).chain(request).chain(response).collect()
}

pub(crate) fn host_text(pattern: &HostPattern) -> String {
    if pattern.as_str().is_empty() { "*".to_owned() } else { pattern.as_str().to_owned() }
}

pub(crate) fn path_type(path: &PathMatch) -> &'static str {
    match path {
        PathMatch::Exact(_) => "Exact",
        PathMatch::Prefix(_) => "Prefix",
        PathMatch::StringPrefix(_) => "StringPrefix",
    }
}

pub(crate) fn origin_text(origin: &Origin) -> String {
    format!("{} {}/{}", origin.kind, origin.namespace, origin.name)
}

/// The certificate entry for a host: its own, else the wildcard's one label up,
/// else the one for any host.
pub(crate) fn certificate_pattern(table: &RoutingTable, host: &str) -> Option<HostPattern> {
    let wildcard = host.split_once('.').map(|(_, parent)| HostPattern::new(&format!("*.{parent}")));
    [Some(HostPattern::new(host)), wildcard, Some(HostPattern::any())]
        .into_iter()
        .flatten()
        .find(|pattern| table.certificates.contains_key(pattern))
}

pub(crate) fn shares(table: &RoutingTable, split: &Split) -> Vec<Share> {
    let total: u64 = split.backends.iter().map(|backend| u64::from(backend.weight)).sum();
    let percent = |index: usize, backend: &Backend| match total {
        0 if index == 0 => 100.0,
        0 => 0.0,
        total => f64::from(backend.weight) * 100.0 / total as f64,
    };
    let share = |(index, backend): (usize, &Backend)| Share {
        service: backend.pool.0.to_string(),
        weight: backend.weight,
        percent: percent(index, backend),
        canary: backend.canary.to_string(),
        endpoints: endpoints(table, &backend.pool),
    };
    split.backends.iter().enumerate().map(share).collect()
}

pub(crate) fn endpoints(table: &RoutingTable, pool: &PoolKey) -> usize {
    table.pools.get(pool).map_or(0, |pool| pool.endpoints.len())
}

fn conditions(split: &Split) -> Vec<String> {
    let target = |index: usize| split.backends.get(index).map_or("?", |backend| backend.pool.0.as_ref());
    split.overrides.iter().map(|o| format!("{} -> {}", when_text(&o.when), target(o.backend))).collect()
}

pub(crate) fn when_text(when: &When) -> String {
    match when {
        When::Header(name) => format!("header {name}: always"),
        When::HeaderValue(name, value) => format!("header {name}: {}", printable(value)),
        When::HeaderPattern(name, pattern) => format!("header {name} ~ {}", printable(pattern)),
        When::Cookie(name) => format!("cookie {name}=always"),
    }
}

pub(crate) fn sticky_text(sticky: &Sticky) -> String {
    match sticky {
        Sticky::Cookie(name) => format!("each user stays, by cookie {name}"),
        Sticky::Header(name) => format!("each user stays, by header {name}"),
        Sticky::Address => "each user stays, by address".to_owned(),
    }
}

/// `33.3%`, `5%`.
pub(crate) fn percent(share: f64) -> String {
    if (share - share.round()).abs() < 0.05 { format!("{share:.0}%") } else { format!("{share:.1}%") }
}

/// The table of routes as text. Names each host once.
pub(crate) fn print(text: &mut Text, routes: &[Route]) {
    let head = ["HOST", "PATH", "TYPE", "TO"].map(|title| (Tone::Faint, title.to_owned()));
    let mut rows = vec![head.to_vec()];
    let mut last_host = None;
    for route in routes {
        let host = if last_host == Some(&route.host) { String::new() } else { printable(&route.host) };
        last_host = Some(&route.host);
        let mut start = vec![
            (Tone::Plain, host),
            (Tone::Plain, printable(&route.path)),
            (Tone::Plain, route.path_type.into()),
        ];
        for (tone, target) in targets(route) {
            let row = std::mem::replace(&mut start, vec![(Tone::Plain, String::new()); 3]);
            rows.push([row, vec![(tone, target)]].concat());
        }
    }
    text.table(2, &rows);
}

/// The table of ports as text.
pub(crate) fn print_ports(text: &mut Text, ports: &[Port]) {
    let head = ["LISTENER", "TO"].map(|title| (Tone::Faint, title.to_owned()));
    let row = |port: &Port| {
        let mut to = format!("{}  {}", port.service, endpoint_text(port.endpoints));
        to.push_str(match (port.reads_proxy_header, port.writes_proxy_header) {
            (true, true) => "  [PROXY header read and written]",
            (true, false) => "  [PROXY header read]",
            (false, true) => "  [PROXY header written]",
            (false, false) => "",
        });
        vec![(Tone::Plain, port.listener.clone()), (Tone::Plain, printable(&to))]
    };
    let rows: Vec<_> = std::iter::once(head.to_vec()).chain(ports.iter().map(row)).collect();
    text.table(2, &rows);
}

fn targets(route: &Route) -> Vec<(Tone, String)> {
    let mut lines = Vec::new();
    if let Some(answer) = &route.answer {
        lines.push((Tone::Bad, format!("answers {}", printable(answer))));
    }
    for share in &route.backends {
        let mut line = share.service.clone();
        if route.backends.len() > 1 {
            line = format!("{line}  {}", percent(share.percent));
        }
        if !share.canary.is_empty() {
            line = format!("{line}  canary {}", share.canary);
        }
        lines.push((Tone::Plain, format!("{line}  {}", endpoint_text(share.endpoints))));
    }
    lines.extend(route.conditions.iter().map(|condition| (Tone::Faint, format!("when {condition}"))));
    lines.extend(route.sticky.iter().map(|sticky| (Tone::Faint, sticky.clone())));
    if let Some((_, first)) = lines.first_mut() {
        match (route.tls, route.https_redirect) {
            (_, true) if route.passthrough.is_some() => {
                first.push_str("  [tls passed through, http redirected]")
            }
            (_, false) if route.passthrough.is_some() => first.push_str("  [tls passed through]"),
            (true, true) => first.push_str("  [tls, http redirected]"),
            (true, false) => first.push_str("  [tls]"),
            (false, true) => first.push_str("  [http redirected]"),
            (false, false) => {}
        }
    }
    lines
}

fn endpoint_text(endpoints: usize) -> String {
    match endpoints {
        0 => "(no endpoints)".to_owned(),
        n => format!("({})", count(n, "endpoint")),
    }
}
