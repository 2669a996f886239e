//! The annotations that change header fields.

use std::sync::Arc;

use lockgate_proxy::table::{Authority, FieldValue, Persistence};

use super::Reader;
use crate::store::Key;

/// What one Ingress says of the headers of its requests and responses.
#[derive(Clone, Debug, Default, PartialEq)]
pub(in super::super) struct HeaderWish {
    /// Host for the endpoint.
    pub(in super::super) vhost: Option<Arc<[Part]>>,
    pub(in super::super) prefix: Option<Prefix>,
    pub(in super::super) connection: Option<Persistence>,
    /// A ConfigMap of response headers. Without namespace if the annotation names none.
    pub(in super::super) custom: Option<Key>,
}

/// `X-Forwarded-Prefix`.
#[derive(Clone, Debug, PartialEq)]
pub(in super::super) struct Prefix {
    pub(in super::super) value: FieldValue,
    /// The path it is rewritten to: a rule for that very path rewrites nothing.
    pub(in super::super) rewrite: Arc<str>,
}

/// A part of a host; the variables are nginx's that are the same for every request of a rule.
#[derive(Clone, Debug, PartialEq)]
pub(in super::super) enum Part {
    Text(Arc<str>),
    Namespace,
    IngressName,
    ServiceName,
}

impl Reader<'_> {
    pub(super) fn headers(&mut self) -> HeaderWish {
        HeaderWish {
            vhost: self.vhost(),
            prefix: self.prefix(),
            connection: self.connection(),
            custom: self.value("custom-headers").map(|text| match text.split_once('/') {
                Some((namespace, name)) if !namespace.is_empty() && !name.is_empty() => {
                    Key::new(namespace, name)
                }
                _ => Key::new("", text),
            }),
        }
    }

    fn vhost(&mut self) -> Option<Arc<[Part]>> {
        let text = self.value("upstream-vhost")?;
        let parts = parts(text);
        // Whatever DNS names its variables stand for.
        let sample: Option<String> = parts.as_ref().map(|parts| {
            let shown = |part: &Part| if let Part::Text(text) = part { text.to_string() } else { "a".into() };
            parts.iter().map(shown).collect()
        });
        if sample.is_some_and(|sample| Authority::new(&sample).is_ok()) {
            return parts;
        }
        let message = format!("{text:?} is not a host: endpoints get the client's");
        let remedy = "write a DNS name, perhaps with a port; \
                      $namespace, $service_name and $ingress_name are expanded";
        self.warn("upstream-vhost", message, remedy);
        None
    }

    /// As in ingress-nginx, which sends it only along with a rewrite.
    fn prefix(&mut self) -> Option<Prefix> {
        let text = self.value("x-forwarded-prefix")?;
        let Some(rewrite) = self.value("rewrite-target") else {
            let message = "has no effect without rewrite-target, as in ingress-nginx".to_owned();
            self.warn("x-forwarded-prefix", message, "remove it, or add rewrite-target");
            return None;
        };
        // What ingress-nginx takes, less the captures of a regular expression.
        let plain = |byte: u8| byte.is_ascii_alphanumeric() || b"-._~/:".contains(&byte);
        match FieldValue::new(text) {
            Ok(value) if text.bytes().all(plain) => Some(Prefix { value, rewrite: rewrite.into() }),
            _ => {
                let message = format!("{text:?} is not a plain path: X-Forwarded-Prefix is not set");
                let remedy = "write a path; parts of a regular expression ($1) are not implemented yet";
                self.warn("x-forwarded-prefix", message, remedy);
                None
            }
        }
    }

    fn connection(&mut self) -> Option<Persistence> {
        match self.value("connection-proxy-header")? {
            "keep-alive" => Some(Persistence::KeepAlive),
            "close" => Some(Persistence::Close),
            other => {
                let message = format!("{other:?} is neither keep-alive nor close: connections are kept");
                self.warn("connection-proxy-header", message, "write keep-alive or close");
                None
            }
        }
    }
}

/// `None`: there is a variable that a host cannot have.
fn parts(text: &str) -> Option<Arc<[Part]>> {
    let mut parts = Vec::new();
    let mut rest = text;
    while let Some(at) = rest.find('$') {
        let (before, after) = (&rest[..at], &rest[at + 1..]);
        if !before.is_empty() {
            parts.push(Part::Text(before.into()));
        }
        let is_name = |c: char| c.is_ascii_alphanumeric() || c == '_';
        let (name, behind) = match after.strip_prefix('{') {
            Some(braced) => braced.split_once('}')?,
            None => after.split_at(after.find(|c| !is_name(c)).unwrap_or(after.len())),
        };
        parts.push(match name {
            "namespace" => Part::Namespace,
            "ingress_name" => Part::IngressName,
            "service_name" => Part::ServiceName,
            _ => return None,
        });
        rest = behind;
    }
    if !rest.is_empty() {
        parts.push(Part::Text(rest.into()));
    }
    Some(parts.into())
}
