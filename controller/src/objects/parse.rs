//! One YAML or JSON document to objects, with the field path of whatever is wrong.

use std::sync::Arc;

use k8s_openapi::api::{core, discovery, networking};
use serde::de::DeserializeOwned;
use serde_yaml::{Mapping, Value};

use super::{Kind, Notice, Object, ObjectRef, Parsed, convert};

/// Reads one document. A `List`, or a list of any kind, yields its items; an
/// empty document yields nothing; an object without a namespace is in `default`.
/// Never fails: what cannot be read is [`Parsed::Invalid`].
pub fn parse(document: Value) -> Vec<Parsed> {
    let mut parsed = Vec::new();
    let mut document = document;
    match document.apply_merge() {
        Ok(()) => expand(document, None, &mut parsed),
        Err(error) => parsed.push(Parsed::Invalid {
            reference: None,
            notice: Notice::error("", format!("bad YAML merge key: {error}"), "write the fields out"),
        }),
    }
    parsed
}

/// `inherited`: apiVersion and kind that the items of a typed list leave out.
fn expand(document: Value, inherited: Option<(&str, &str)>, parsed: &mut Vec<Parsed>) {
    let mut mapping = match document {
        Value::Null => return,
        Value::Mapping(mapping) => mapping,
        _ => {
            return parsed.push(Parsed::Invalid {
                reference: None,
                notice: Notice::error(
                    "",
                    "not a Kubernetes object: the document is not a mapping",
                    "move the file elsewhere if it is not a manifest",
                ),
            });
        }
    };
    let text = |mapping: &Mapping, field: &str| mapping.get(field).and_then(Value::as_str).map(str::to_owned);
    let version = text(&mapping, "apiVersion").or(inherited.map(|(version, _)| version.to_owned()));
    let kind = text(&mapping, "kind").or(inherited.map(|(_, kind)| kind.to_owned()));
    let (Some(version), Some(kind)) = (&version, &kind) else {
        return parsed.push(Parsed::Invalid { reference: None, notice: untyped(&version, &kind) });
    };
    if let Some(singular) = kind.strip_suffix("List")
        && let Some(Value::Sequence(items)) = mapping.remove("items")
    {
        let inherited = (!singular.is_empty()).then_some((version.as_str(), singular));
        for item in items {
            expand(item, inherited, parsed);
        }
        return;
    }
    mapping.insert("apiVersion".into(), version.as_str().into());
    mapping.insert("kind".into(), kind.as_str().into());
    parsed.push(object(mapping, version, kind));
}

fn untyped(version: &Option<String>, kind: &Option<String>) -> Notice {
    match (version, kind) {
        (None, None) => Notice::warning(
            "",
            "not a Kubernetes object: neither apiVersion nor kind; ignored",
            "move the file elsewhere if it is not a manifest",
        ),
        (None, Some(kind)) => {
            Notice::error(".apiVersion", format!("missing, so this {kind} cannot be read"), "add it")
        }
        _ => Notice::error(".kind", "missing, so the object cannot be read", "add it"),
    }
}

/// The apiVersion Lockgate reads each kind in.
const KINDS: [(Kind, &str); 8] = [
    (Kind::Ingress, "networking.k8s.io/v1"),
    (Kind::IngressClass, "networking.k8s.io/v1"),
    (Kind::Service, "v1"),
    (Kind::EndpointSlice, "discovery.k8s.io/v1"),
    (Kind::Pod, "v1"),
    (Kind::Secret, "v1"),
    (Kind::Node, "v1"),
    (Kind::ConfigMap, "v1"),
];

const GATEWAY_API: [&str; 15] = [
    "GatewayClass",
    "Gateway",
    "HTTPRoute",
    "GRPCRoute",
    "TLSRoute",
    "TCPRoute",
    "UDPRoute",
    "ReferenceGrant",
    "BackendTLSPolicy",
    "BackendLBPolicy",
    "ListenerSet",
    "XListenerSet",
    "XBackendTrafficPolicy",
    "XBackend",
    "XMesh",
];

fn object(mapping: Mapping, version: &str, kind: &str) -> Parsed {
    let group = version.rsplit_once('/').map_or("", |(group, _)| group);
    if matches!(group, "gateway.networking.k8s.io" | "gateway.networking.x-k8s.io") {
        let known = GATEWAY_API.into_iter().find(|known| *known == kind).unwrap_or("Gateway API object");
        let notice = Notice::warning(
            ".kind",
            format!("{kind} is not supported yet: ignored"),
            "use an Ingress for now",
        );
        return unsupported(mapping, known, kind, notice);
    }
    if (version, kind) == ("v1", "Endpoints") {
        let notice = Notice::warning(".kind", "Endpoints is deprecated: ignored", "write an EndpointSlice");
        return unsupported(mapping, "Endpoints", kind, notice);
    }
    let Some((known, expected)) = KINDS.into_iter().find(|(known, _)| known.as_str() == kind) else {
        return Parsed::Unused(kind.to_owned());
    };
    if version != expected {
        // `Service` of Knative and the like: someone else's object of the same name.
        if group.contains('.') && !group.ends_with(".k8s.io") {
            return Parsed::Unused(kind.to_owned());
        }
        let notice = Notice::error(
            ".apiVersion",
            format!("{kind} is not served as {version} by any current Kubernetes: ignored"),
            format!("write it as {expected}"),
        );
        return Parsed::Invalid { reference: reference(known, &mapping).ok(), notice };
    }
    let reference = match reference(known, &mapping) {
        Ok(reference) => reference,
        Err(notice) => return Parsed::Invalid { reference: None, notice },
    };
    let mut notices = Vec::new();
    match typed(known, &reference, mapping, &mut notices) {
        Ok(object) => Parsed::Object(object, notices),
        Err(notice) => Parsed::Invalid { reference: Some(reference), notice },
    }
}

fn unsupported(mapping: Mapping, known: &'static str, kind: &str, notice: Notice) -> Parsed {
    match reference(Kind::Unsupported(known), &mapping) {
        Ok(reference) => Parsed::Unsupported { reference, kind: kind.to_owned(), notice },
        Err(notice) => Parsed::Invalid { reference: None, notice },
    }
}

fn typed(
    kind: Kind,
    reference: &ObjectRef,
    mut mapping: Mapping,
    notices: &mut Vec<Notice>,
) -> Result<Object, Notice> {
    let name = (reference.namespace.clone(), reference.name.clone());
    Ok(match kind {
        Kind::Ingress => {
            Object::Ingress(convert::ingress(name, read::<networking::v1::Ingress>(mapping, notices)?))
        }
        Kind::IngressClass => Object::IngressClass(convert::class(name, read(mapping, notices)?)),
        Kind::Service => {
            let service = read::<core::v1::Service>(mapping, notices)?;
            Object::Service(convert::service(name, service, notices))
        }
        Kind::EndpointSlice => {
            let slice = read::<discovery::v1::EndpointSlice>(mapping, notices)?;
            Object::EndpointSlice(convert::slice(name, slice, notices))
        }
        Kind::Pod => {
            prune_pod(&mut mapping);
            Object::Pod(convert::pod(name, read(mapping, notices)?, notices))
        }
        Kind::Secret => {
            Object::Secret(convert::secret(name, read(mapping, notices).map_err(without_contents)?))
        }
        Kind::Node => {
            prune_node(&mut mapping);
            Object::Node(convert::node(name, read(mapping, notices)?, notices))
        }
        Kind::ConfigMap => {
            keep(&mut mapping, &["apiVersion", "kind", "metadata", "data"]);
            spell_out_keys(&mut mapping);
            Object::ConfigMap(convert::config_map(name, read(mapping, notices)?))
        }
        Kind::Unsupported(_) => unreachable!("only the kinds of KINDS get here"),
    })
}

/// What names the object, checked as the API server would: everything that is
/// later put together from names relies on it.
fn reference(kind: Kind, mapping: &Mapping) -> Result<ObjectRef, Notice> {
    let metadata = mapping.get("metadata");
    let field =
        |field: &str| metadata.and_then(|metadata| metadata.get(field)).filter(|value| !value.is_null());
    let Some(name) = field("name") else {
        let remedy = match field("generateName") {
            Some(_) => "generateName works only with an API server; write a name",
            None => "add it",
        };
        return Err(Notice::error(".metadata.name", format!("missing: the {kind} is ignored"), remedy));
    };
    let name = name.as_str().filter(|name| is_dns_name(name, 253, true)).ok_or_else(|| {
        Notice::error(
            ".metadata.name",
            format!("not a DNS name: the {kind} is ignored"),
            "use lower-case letters, digits, '-' and '.', at most 253",
        )
    })?;
    let namespace = match field("namespace") {
        _ if !kind.is_namespaced() => "",
        None => "default",
        Some(namespace) => {
            namespace.as_str().filter(|name| is_dns_name(name, 63, false)).ok_or_else(|| {
                Notice::error(
                    ".metadata.namespace",
                    format!("not a DNS label: the {kind} is ignored"),
                    "use lower-case letters, digits and '-', at most 63",
                )
            })?
        }
    };
    Ok(ObjectRef { kind, namespace: namespace.into(), name: name.into() })
}

/// RFC 1123 label, or several joined by dots.
pub(crate) fn is_dns_name(name: &str, longest: usize, dots: bool) -> bool {
    let label = |label: &str| {
        let bytes = label.as_bytes();
        let inner = |byte: &u8| byte.is_ascii_lowercase() || byte.is_ascii_digit() || *byte == b'-';
        matches!((bytes.first(), bytes.last()), (Some(first), Some(last)) if *first != b'-' && *last != b'-')
            && bytes.iter().all(inner)
    };
    name.len() <= longest && if dots { name.split('.').all(label) } else { label(name) }
}

fn read<T: DeserializeOwned>(mapping: Mapping, notices: &mut Vec<Notice>) -> Result<T, Notice> {
    let mut unknown = |path: serde_ignored::Path<'_>| {
        let field = ignored_path(&path);
        // Written by controllers newer than our types, not by the manifest's author.
        if !field.starts_with(".status") && !field.starts_with(".metadata.managedFields") {
            notices.push(Notice::warning(
                field,
                "unknown field: ignored",
                "remove it or correct its spelling",
            ));
        }
    };
    let mut track = serde_path_to_error::Track::new();
    let tracked = serde_path_to_error::Deserializer::new(Value::Mapping(mapping), &mut track);
    T::deserialize(serde_ignored::Deserializer::new(tracked, &mut unknown)).map_err(|error| {
        let field = error_path(&track.path());
        let message = error.to_string();
        let remedy = if message.ends_with("expected a string") {
            "write the value in quotes"
        } else {
            "correct the field; `kubectl explain` shows its form"
        };
        Notice::error(field, format!("{message}: the object is ignored"), remedy)
    })
}

/// serde's messages quote what they found, which in a Secret may be the key.
fn without_contents(notice: Notice) -> Notice {
    if !notice.field.starts_with(".data") && !notice.field.starts_with(".stringData") {
        return notice;
    }
    Notice {
        message: "not base64 text under a name: the Secret is ignored".to_owned(),
        remedy: "encode the value with base64, or write it as it is under stringData".to_owned(),
        ..notice
    }
}

fn ignored_path(path: &serde_ignored::Path<'_>) -> String {
    use serde_ignored::Path;
    match path {
        Path::Root => String::new(),
        Path::Seq { parent, index } => format!("{}[{index}]", ignored_path(parent)),
        Path::Map { parent, key } => format!("{}{}", ignored_path(parent), member(key)),
        Path::Some { parent } | Path::NewtypeStruct { parent } | Path::NewtypeVariant { parent } => {
            ignored_path(parent)
        }
    }
}

fn error_path(path: &serde_path_to_error::Path) -> String {
    use serde_path_to_error::Segment;
    path.iter()
        .map(|segment| match segment {
            Segment::Seq { index } => format!("[{index}]"),
            Segment::Map { key } => member(key),
            Segment::Enum { variant } => member(variant),
            Segment::Unknown => String::new(),
        })
        .collect()
}

/// `.name`, or `["a.dotted/name"]`.
fn member(key: &str) -> String {
    if key.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'_' || byte == b'-') {
        format!(".{key}")
    } else {
        format!("[{key:?}]")
    }
}

fn keep(mapping: &mut Mapping, fields: &[&str]) {
    mapping.retain(|key, _| key.as_str().is_some_and(|key| fields.contains(&key)));
}

/// `9000: "shop/db:5432"` is good YAML, and `kubectl` makes the key a string.
fn spell_out_keys(mapping: &mut Mapping) {
    let Some(Value::Mapping(data)) = mapping.get_mut("data") else { return };
    let spelt = |(key, value)| match key {
        Value::Number(number) => (Value::String(number.to_string()), value),
        Value::Bool(truth) => (Value::String(truth.to_string()), value),
        key => (key, value),
    };
    *data = std::mem::take(data).into_iter().map(spelt).collect();
}

/// Leaves what [`convert::node`] reads; the rest of a Node is long.
fn prune_node(mapping: &mut Mapping) {
    keep(mapping, &["apiVersion", "kind", "metadata", "spec", "status"]);
    if let Some(Value::Mapping(spec)) = mapping.get_mut("spec") {
        keep(spec, &["podCIDR", "podCIDRs", "taints"]);
    }
    if let Some(Value::Mapping(status)) = mapping.get_mut("status") {
        keep(status, &["addresses"]);
    }
}

/// Leaves what [`convert::pod`] reads: a mistake elsewhere in a Pod is not
/// Lockgate's business, and resources may be written as numbers.
fn prune_pod(mapping: &mut Mapping) {
    keep(mapping, &["apiVersion", "kind", "metadata", "spec", "status"]);
    if let Some(Value::Mapping(status)) = mapping.get_mut("status") {
        keep(status, &["phase", "podIP", "podIPs", "conditions"]);
    }
    let Some(Value::Mapping(spec)) = mapping.get_mut("spec") else { return };
    keep(spec, &["nodeName", "containers"]);
    let Some(Value::Sequence(containers)) = spec.get_mut("containers") else { return };
    for container in containers {
        if let Value::Mapping(container) = container {
            keep(container, &["name", "ports"]);
        }
    }
}

/// Namespace and name, already checked.
pub(super) type Name = (Arc<str>, Arc<str>);

#[cfg(test)]
mod tests;
