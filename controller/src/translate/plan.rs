//! One Ingress by itself: what it asks for, whatever else there is.

use std::collections::BTreeMap;
use std::fmt;
use std::net::IpAddr;
use std::sync::Arc;

use lockgate_proxy::table::{HostPattern, Origin, PathMatch};

use super::annotations::{Closed, classify};
use super::settings::{Settings, settings};
use crate::objects::{Ingress, IngressBackend, IngressPath, Notice, PortRef, is_dns_name};
use crate::store::Key;

/// Longer paths fit no request line that is accepted.
const MAX_PATH: usize = 4096;

/// Oldest first; without a timestamp last; then by name.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(super) struct Age {
    created: i64,
    pub(super) key: Key,
}

/// What one Ingress asks for.
#[derive(Debug)]
pub(super) struct Plan {
    pub(super) age: Age,
    pub(super) origin: Arc<Origin>,
    pub(super) settings: Settings,
    /// Why every route answers 503.
    pub(super) closed: Option<Closed>,
    /// In the order written. A host may have no path.
    pub(super) hosts: BTreeMap<HostPattern, Vec<Path>>,
    pub(super) default_backend: Option<Target>,
    pub(super) tls: Vec<Tls>,
    /// Hosts with rules that no `tls` entry names: any certificate of this
    /// Ingress that covers them is theirs.
    pub(super) unlisted: Vec<HostPattern>,
    pub(super) notices: Vec<Notice>,
}

/// One path of one host.
#[derive(Debug)]
pub(super) struct Path {
    pub(super) path: PathMatch,
    pub(super) target: Target,
    pub(super) place: Place,
}

/// Where requests go.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Target {
    /// A port of a Service, which may not exist.
    Service { service: Key, port: PortRef },
    /// Nowhere: these requests answer 503, and this is why.
    Refused(Arc<str>),
}

/// Where in the Ingress something is written.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Place {
    DefaultBackend,
    Path { rule: usize, path: usize },
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Place::DefaultBackend => f.write_str(".spec.defaultBackend"),
            Place::Path { rule, path } => write!(f, ".spec.rules[{rule}].http.paths[{path}]"),
        }
    }
}

/// One `tls` entry with a Secret.
#[derive(Debug)]
pub(super) struct Tls {
    /// In `.spec.tls`.
    pub(super) index: usize,
    pub(super) secret: Key,
    pub(super) hosts: Vec<HostPattern>,
    /// The entry names no host and the Ingress serves any.
    pub(super) any_host: bool,
}

impl Plan {
    pub(super) fn new(ingress: &Ingress) -> Plan {
        let key = Key::from(&ingress.meta);
        let mut notices = Vec::new();
        let mut settings = settings(&ingress.annotations, &mut notices);
        if let Some(limits) = &mut settings.limits.per_client {
            Arc::make_mut(limits).zone = key.to_string().into();
        }
        let closed = classify(&ingress.annotations, settings.canary.is_some(), &mut notices);
        let default_backend = ingress
            .default_backend
            .as_ref()
            .map(|backend| target(backend, &key.namespace, Place::DefaultBackend, &mut notices));
        let hosts = hosts(ingress, &key.namespace, &mut notices);
        if ingress.rules.is_empty() && default_backend.is_none() {
            notices.push(Notice::error(
                ".spec",
                "neither rules nor defaultBackend: nothing is served",
                "add one of them",
            ));
        }
        let mut plan = Plan {
            origin: Arc::new(Origin {
                kind: "Ingress",
                namespace: key.namespace.clone(),
                name: key.name.clone(),
            }),
            age: Age { created: ingress.meta.created.unwrap_or(i64::MAX), key },
            settings,
            closed,
            hosts,
            default_backend,
            tls: Vec::new(),
            unlisted: Vec::new(),
            notices,
        };
        plan.read_tls(ingress);
        plan
    }

    /// Every host whose rules this Ingress has a part in.
    pub(super) fn contributes_to(&self) -> impl Iterator<Item = HostPattern> {
        let any = HostPattern::any();
        let implied = self.default_backend.is_some() && !self.hosts.contains_key(&any);
        self.hosts.keys().cloned().chain(implied.then_some(any))
    }

    /// Every host whose certificates this Ingress has a part in.
    pub(super) fn certified_hosts(&self) -> impl Iterator<Item = HostPattern> {
        self.tls.iter().flat_map(|tls| &tls.hosts).chain(&self.unlisted).cloned()
    }

    /// Every backend that names a Service, in the order written.
    pub(super) fn services(&self) -> impl Iterator<Item = (Place, &Key, &PortRef)> {
        let default = self.default_backend.iter().map(|target| (Place::DefaultBackend, target));
        let paths = self.hosts.values().flatten().map(|path| (path.place, &path.target));
        default.chain(paths).filter_map(|(place, target)| match target {
            Target::Service { service, port } => Some((place, service, port)),
            Target::Refused(_) => None,
        })
    }

    /// Whether plaintext requests to `host` are redirected to https.
    pub(super) fn redirects(&self, host: &HostPattern) -> bool {
        self.settings.force_redirect
            || self.settings.redirect
                && self.tls.iter().any(|tls| {
                    if tls.hosts.is_empty() {
                        self.hosts.contains_key(host) || tls.any_host
                    } else {
                        tls.hosts.iter().any(|listed| listed == host || covers(listed, host))
                    }
                })
    }

    fn read_tls(&mut self, ingress: &Ingress) {
        for (index, tls) in ingress.tls.iter().enumerate() {
            let mut hosts = Vec::new();
            for (position, host) in tls.hosts.iter().enumerate() {
                match read_host(host) {
                    Ok(host) if host != HostPattern::any() => hosts.push(host),
                    Ok(_) => {}
                    Err(problem) => self.notices.push(Notice::error(
                        format!(".spec.tls[{index}].hosts[{position}]"),
                        format!("{host:?} {problem}: no certificate is served for it"),
                        "write a DNS name",
                    )),
                }
            }
            let Some(secret) = &tls.secret else {
                let message = "no secretName: the default certificate is served";
                self.notices.push(Notice::info(format!(".spec.tls[{index}]"), message));
                continue;
            };
            if tls.hosts.is_empty() || !hosts.is_empty() {
                let serves_any =
                    self.default_backend.is_some() || self.hosts.contains_key(&HostPattern::any());
                self.tls.push(Tls {
                    index,
                    secret: Key::new(self.age.key.namespace.clone(), secret.clone()),
                    any_host: hosts.is_empty() && serves_any,
                    hosts,
                });
            }
        }
        let listed = |host: &HostPattern| self.tls.iter().any(|tls| tls.hosts.contains(host));
        if !self.tls.is_empty() {
            let hosts = self.hosts.keys().filter(|host| !host.as_str().is_empty() && !listed(host));
            self.unlisted = hosts.cloned().collect();
        }
    }
}

/// Whether `pattern` is a wildcard and `host` a name it stands for.
fn covers(pattern: &HostPattern, host: &HostPattern) -> bool {
    let suffix = pattern.as_str().strip_prefix("*.");
    suffix.is_some_and(|suffix| host.as_str().split_once('.').is_some_and(|(_, rest)| rest == suffix))
}

fn hosts(
    ingress: &Ingress,
    namespace: &Arc<str>,
    notices: &mut Vec<Notice>,
) -> BTreeMap<HostPattern, Vec<Path>> {
    let mut hosts: BTreeMap<HostPattern, Vec<Path>> = BTreeMap::new();
    for (index, rule) in ingress.rules.iter().enumerate() {
        let host = match read_host(&rule.host) {
            Ok(host) => host,
            Err(problem) => {
                notices.push(Notice::error(
                    format!(".spec.rules[{index}].host"),
                    format!("{:?} {problem}: the rule is not served", rule.host),
                    "write a DNS name, `*.` and a DNS name, or leave host out to serve any",
                ));
                continue;
            }
        };
        let paths = hosts.entry(host).or_default();
        for (position, path) in rule.paths.iter().enumerate() {
            let place = Place::Path { rule: index, path: position };
            match read_path(path) {
                Ok(matched) => {
                    if has_escape(&path.path) {
                        let message =
                            "requests are compared after percent-decoding, so this matches hardly any";
                        let remedy = "write the character itself";
                        notices.push(Notice::warning(format!("{place}.path"), message, remedy));
                    }
                    let target = target(&path.backend, namespace, place, notices);
                    paths.push(Path { path: matched, target, place });
                }
                Err((field, problem, remedy)) => notices.push(Notice::error(
                    format!("{place}.{field}"),
                    format!("{problem}: the path is not served"),
                    remedy,
                )),
            }
        }
    }
    hosts
}

/// As the API server judges a host, except that upper case and a trailing dot pass.
fn read_host(host: &str) -> Result<HostPattern, &'static str> {
    let pattern = HostPattern::new(host);
    let name = pattern.as_str().strip_prefix("*.").unwrap_or(pattern.as_str());
    if name.parse::<IpAddr>().is_ok() {
        return Err("is an IP address, which no rule can name");
    }
    if host.is_empty() || is_dns_name(name, 253, true) {
        return Ok(pattern);
    }
    Err(match host.rsplit_once(':') {
        Some((_, port)) if port.bytes().all(|byte| byte.is_ascii_digit()) => {
            "has a port, which no rule can name"
        }
        _ => "is not a DNS name",
    })
}

/// Whether there is a `%` with two hexadecimal digits behind it.
fn has_escape(path: &str) -> bool {
    path.as_bytes().windows(3).any(|bytes| bytes[0] == b'%' && bytes[1..].iter().all(u8::is_ascii_hexdigit))
}

/// As the API server judges a path, except that its length is bounded. An
/// error is the field, what is wrong with it, and the remedy.
fn read_path(path: &IngressPath) -> Result<PathMatch, (&'static str, String, &'static str)> {
    let text = &path.path;
    if text.len() > MAX_PATH {
        let problem = format!("{} bytes, more than {MAX_PATH}", text.len());
        return Err(("path", problem, "shorten it"));
    }
    if text.chars().any(char::is_control) {
        return Err(("path", "has a control character".to_owned(), "remove it; write it on one line"));
    }
    let specific = &*path.path_type == "ImplementationSpecific";
    let empty = specific && text.is_empty();
    if !empty && !text.starts_with('/') {
        return Err(("path", format!("{text:?} does not begin with '/'"), "begin it with '/'"));
    }
    let never = ["//", "/./", "/../", "%2f", "%2F"].into_iter().find(|part| text.contains(part));
    let never = never.or(["/..", "/."].into_iter().find(|end| text.ends_with(end)));
    if let (Some(part), false) = (never, specific) {
        let remedy = "write it as it is after normalisation";
        return Err(("path", format!("{text:?} has {part:?}, so it matches no request"), remedy));
    }
    match &*path.path_type {
        "Exact" => Ok(PathMatch::Exact(text.clone())),
        "Prefix" => Ok(PathMatch::Prefix(match text.trim_end_matches('/') {
            "" => "/".into(),
            trimmed if trimmed.len() == text.len() => text.clone(),
            trimmed => trimmed.into(),
        })),
        "ImplementationSpecific" if text.is_empty() => Ok(PathMatch::StringPrefix("/".into())),
        "ImplementationSpecific" => Ok(PathMatch::StringPrefix(text.clone())),
        other => {
            let problem =
                if other.is_empty() { "missing".to_owned() } else { format!("{other:?} is unknown") };
            Err(("pathType", problem, "use Exact, Prefix or ImplementationSpecific"))
        }
    }
}

fn target(backend: &IngressBackend, namespace: &Arc<str>, place: Place, notices: &mut Vec<Notice>) -> Target {
    let field = match place {
        Place::DefaultBackend => place.to_string(),
        Place::Path { .. } => format!("{place}.backend"),
    };
    let mut refuse = |field: String, reason: String, remedy: &str| {
        notices.push(Notice::error(field, format!("{reason}: these requests answer 503"), remedy));
        Target::Refused(reason.into())
    };
    match backend {
        IngressBackend::Service { name, .. } if !is_dns_name(name, 253, true) => {
            refuse(format!("{field}.service.name"), format!("{name:?} is not a Service name"), "correct it")
        }
        IngressBackend::Service { port: None, .. } => {
            let reason = "the backend names no port".to_owned();
            refuse(format!("{field}.service.port"), reason, "add a number or a name")
        }
        IngressBackend::Service { port: Some(PortRef::Name(port)), .. } if !is_dns_name(port, 63, false) => {
            refuse(format!("{field}.service.port.name"), format!("{port:?} is not a port name"), "correct it")
        }
        IngressBackend::Service { name, port: Some(port) } => {
            Target::Service { service: Key::new(namespace.clone(), name.clone()), port: port.clone() }
        }
        IngressBackend::Resource { kind, name } => {
            let reason = format!("resource backend {kind} {name} is not supported");
            refuse(format!("{field}.resource"), reason, "use a service backend")
        }
        IngressBackend::Missing => {
            refuse(field, "the backend names no service".to_owned(), "add service.name and service.port")
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hosts() {
        let cases = [
            ("Shop.Example", Ok("shop.example")),
            ("shop.example.", Ok("shop.example")),
            ("*.Shop.example", Ok("*.shop.example")),
            ("localhost", Ok("localhost")),
            ("", Ok("")),
            ("*", Err("is not a DNS name")),
            ("*.", Err("is not a DNS name")),
            (".", Err("is not a DNS name")),
            ("*.*.example", Err("is not a DNS name")),
            ("a_b.example", Err("is not a DNS name")),
            ("-a.example", Err("is not a DNS name")),
            ("a..example", Err("is not a DNS name")),
            ("shöp.example", Err("is not a DNS name")),
            ("shop.example:80", Err("has a port, which no rule can name")),
            ("10.0.0.1", Err("is an IP address, which no rule can name")),
            ("::1", Err("is an IP address, which no rule can name")),
        ];
        for (host, expected) in cases {
            assert_eq!(
                read_host(host).as_ref().map(HostPattern::as_str),
                expected.as_ref().copied(),
                "{host}"
            );
        }
        assert!(read_host(&"a".repeat(254)).is_err());
    }

    #[test]
    fn paths() {
        let cases = [
            ("Prefix", "/", "/"),
            ("Prefix", "/a/", "/a"),
            ("Prefix", "/a", "/a"),
            ("Exact", "/a/", "/a/"),
            ("ImplementationSpecific", "", "/"),
            ("ImplementationSpecific", "/a(/|$)(.*)", "/a(/|$)(.*)"),
            ("ImplementationSpecific", "/a//b", "/a//b"),
            ("Prefix", "", ""),
            ("Exact", "a", ""),
            ("ImplementationSpecific", "a", ""),
            ("Prefix", "//", ""),
            ("Prefix", "/a/../b", ""),
            ("Exact", "/a/.", ""),
            ("Prefix", "/a%2fb", ""),
            ("Prefix", "/a\tb", ""),
            ("ImplementationSpecific", "/a\u{0}", ""),
            ("exact", "/", ""),
            ("", "/", ""),
        ];
        let read = |path_type: &str, path: &str| {
            let backend = IngressBackend::Missing;
            read_path(&IngressPath { path: path.into(), path_type: path_type.into(), backend })
        };
        for (path_type, path, expected) in cases {
            let read = read(path_type, path);
            assert_eq!(read.as_ref().map_or("", PathMatch::as_str), expected, "{path_type} {path:?}");
        }
        assert!(read("Exact", &format!("/{}", "a".repeat(MAX_PATH - 1))).is_ok());
        assert!(read("Exact", &format!("/{}", "a".repeat(MAX_PATH))).is_err());
    }
}
