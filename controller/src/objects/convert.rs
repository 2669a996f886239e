//! From the full Kubernetes types to those of [`super`].

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::sync::Arc;

use k8s_openapi::api::{core::v1 as core, discovery::v1 as discovery, networking::v1 as networking};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use k8s_openapi::apimachinery::pkg::util::intstr::IntOrString;
use k8s_openapi::jiff::Timestamp;

use super::parse::Name;
use super::*;

mod exposure;

const ZONE: &str = "topology.kubernetes.io/zone";
const SERVICE_NAME: &str = "kubernetes.io/service-name";
const TRIGGER_TIME: &str = "endpoints.kubernetes.io/last-change-trigger-time";
const DEFAULT_CLASS: &str = "ingressclass.kubernetes.io/is-default-class";

fn meta((namespace, name): Name, meta: &ObjectMeta) -> Meta {
    let created = meta.creation_timestamp.as_ref().map(|time| time.0.as_microsecond());
    Meta { namespace, name, created }
}

fn labels(labels: Option<BTreeMap<String, String>>) -> Labels {
    labels.unwrap_or_default().into_iter().map(|(key, value)| (key.into(), value.into())).collect()
}

fn label(labels: &Option<BTreeMap<String, String>>, key: &str) -> Option<Arc<str>> {
    labels.as_ref()?.get(key).map(|value| value.as_str().into())
}

/// Empty means not written, as everywhere in Kubernetes.
fn text(text: Option<String>) -> Option<Arc<str>> {
    text.filter(|text| !text.is_empty()).map(Arc::from)
}

pub(super) fn ingress(name: Name, object: networking::Ingress) -> Ingress {
    let spec = object.spec.unwrap_or_default();
    let mut annotations = labels(object.metadata.annotations.clone());
    annotations.retain(|key, _| {
        key.starts_with("nginx.ingress.kubernetes.io/")
            || key.starts_with("lockgate.io/")
            || &**key == "kubernetes.io/ingress.class"
    });
    Ingress {
        meta: meta(name, &object.metadata),
        annotations,
        class: text(spec.ingress_class_name),
        default_backend: spec.default_backend.map(backend),
        rules: spec.rules.unwrap_or_default().into_iter().map(rule).collect(),
        tls: spec
            .tls
            .unwrap_or_default()
            .into_iter()
            .map(|tls| IngressTls {
                hosts: tls.hosts.unwrap_or_default().into_iter().map(Arc::from).collect(),
                secret: text(tls.secret_name),
            })
            .collect(),
    }
}

fn rule(rule: networking::IngressRule) -> IngressRule {
    let paths = rule.http.map(|http| http.paths).unwrap_or_default();
    IngressRule {
        host: rule.host.unwrap_or_default().into(),
        paths: paths
            .into_iter()
            .map(|path| IngressPath {
                path: path.path.unwrap_or_default().into(),
                path_type: path.path_type.into(),
                backend: backend(path.backend),
            })
            .collect(),
    }
}

fn backend(backend: networking::IngressBackend) -> IngressBackend {
    if let Some(resource) = backend.resource {
        return IngressBackend::Resource { kind: resource.kind.into(), name: resource.name.into() };
    }
    let Some(service) = backend.service else { return IngressBackend::Missing };
    let port = service.port.and_then(|port| match (text(port.name), port.number) {
        (Some(name), _) => Some(PortRef::Name(name)),
        (None, Some(number)) => Some(PortRef::Number(number)),
        (None, None) => None,
    });
    IngressBackend::Service { name: service.name.into(), port }
}

pub(super) fn class(name: Name, object: networking::IngressClass) -> IngressClass {
    IngressClass {
        controller: object.spec.and_then(|spec| spec.controller).unwrap_or_default().into(),
        is_default: label(&object.metadata.annotations, DEFAULT_CLASS).as_deref() == Some("true"),
        meta: meta(name, &object.metadata),
    }
}

/// A port that Kubernetes would accept; otherwise a notice.
fn port(number: i32, field: impl FnOnce() -> String, notices: &mut Vec<Notice>) -> Option<u16> {
    let port = u16::try_from(number).ok().filter(|port| *port != 0);
    if port.is_none() {
        let message = format!("{number} is not a port: ignored");
        notices.push(Notice::error(field(), message, "use 1 to 65535"));
    }
    port
}

fn protocol(
    text: Option<&str>,
    field: impl FnOnce() -> String,
    notices: &mut Vec<Notice>,
) -> Option<Protocol> {
    match text {
        None | Some("" | "TCP") => Some(Protocol::Tcp),
        Some("UDP") => Some(Protocol::Udp),
        Some("SCTP") => Some(Protocol::Sctp),
        Some(other) => {
            let message = format!("{other:?} is not a protocol: the port is ignored");
            notices.push(Notice::error(field(), message, "use TCP, UDP or SCTP"));
            None
        }
    }
}

fn address(text: &str, field: impl FnOnce() -> String, notices: &mut Vec<Notice>) -> Option<IpAddr> {
    let address = text.parse().ok();
    if address.is_none() {
        let message = format!("{text:?} is not an IP address: ignored");
        notices.push(Notice::error(field(), message, "write an IPv4 or IPv6 address"));
    }
    address
}

pub(super) fn service(name: Name, object: core::Service, notices: &mut Vec<Notice>) -> Service {
    let mut spec = object.spec.unwrap_or_default();
    let exposure = exposure::read(&object.metadata, &mut spec, object.status, notices);
    let mut ips = spec.cluster_ips.unwrap_or_default();
    if let Some(ip) = spec.cluster_ip
        && ips.is_empty()
    {
        ips.push(ip);
    }
    ips.retain(|ip| !ip.is_empty() && ip != "None");
    let addresses =
        ips.iter().filter_map(|ip| address(ip, || ".spec.clusterIP".to_owned(), notices)).collect();
    let mut ports = Vec::new();
    for (index, entry) in spec.ports.unwrap_or_default().into_iter().enumerate() {
        let field = |name: &str| format!(".spec.ports[{index}].{name}");
        let number = port(entry.port, || field("port"), notices);
        let protocol = protocol(entry.protocol.as_deref(), || field("protocol"), notices);
        let target = match entry.target_port {
            None => Some(TargetPort::Same),
            Some(IntOrString::Int(0)) => Some(TargetPort::Same),
            Some(IntOrString::Int(number)) => {
                port(number, || field("targetPort"), notices).map(TargetPort::Number)
            }
            Some(IntOrString::String(name)) => Some(TargetPort::Name(name.into())),
        };
        if let (Some(port), Some(protocol), Some(target)) = (number, protocol, target) {
            let name = entry.name.unwrap_or_default().into();
            let node_port = match entry.node_port {
                None | Some(0) => None,
                Some(number) => self::port(number, || field("nodePort"), notices),
            };
            let app_protocol = text(entry.app_protocol);
            ports.push(ServicePort { name, port, target, protocol, app_protocol, node_port });
        }
    }
    let mut annotations = labels(object.metadata.annotations.clone());
    annotations.retain(|key, _| key.starts_with("lockgate.io/"));
    Service {
        meta: meta(name, &object.metadata),
        uid: text(object.metadata.uid.clone()),
        annotations,
        exposure,
        prefers_zone: prefers_zone(spec.traffic_distribution.as_deref(), notices),
        kind: match spec.type_.as_deref() {
            Some("ExternalName") => ServiceKind::ExternalName,
            _ => ServiceKind::Endpoints,
        },
        addresses,
        selector: labels(spec.selector),
        ports,
        publish_not_ready: spec.publish_not_ready_addresses.unwrap_or(false),
    }
}

/// The same node is in the same zone, and nearer than that is nothing here.
fn prefers_zone(distribution: Option<&str>, notices: &mut Vec<Notice>) -> bool {
    match distribution {
        None | Some("") => false,
        Some("PreferClose" | "PreferSameZone" | "PreferSameNode") => true,
        Some(other) => {
            let message = format!("{other:?} is unknown: endpoints of all zones are used alike");
            let remedy = "use PreferSameZone, or remove it";
            notices.push(Notice::warning(".spec.trafficDistribution", message, remedy));
            false
        }
    }
}

pub(super) fn slice(
    name: Name,
    object: discovery::EndpointSlice,
    notices: &mut Vec<Notice>,
) -> EndpointSlice {
    let mut ports = Vec::new();
    for (index, entry) in object.ports.unwrap_or_default().into_iter().enumerate() {
        let field = |name: &str| format!(".ports[{index}].{name}");
        let Some(number) = entry.port else { continue };
        let number = port(number, || field("port"), notices);
        let protocol = protocol(entry.protocol.as_deref(), || field("protocol"), notices);
        if let (Some(port), Some(protocol)) = (number, protocol) {
            let name = entry.name.unwrap_or_default().into();
            ports.push(SlicePort { name, port, protocol, app_protocol: text(entry.app_protocol) });
        }
    }
    let service = label(&object.metadata.labels, SERVICE_NAME).filter(|name| !name.is_empty());
    if service.is_none() {
        notices.push(Notice::warning(
            ".metadata.labels",
            "belongs to no Service: ignored",
            format!("add the label {SERVICE_NAME}"),
        ));
    }
    let is_ip = matches!(&*object.address_type, "IPv4" | "IPv6");
    if !is_ip {
        notices.push(Notice::error(
            ".addressType",
            format!("{:?} is not served: its endpoints are ignored", object.address_type),
            "use IPv4 or IPv6",
        ));
    }
    let endpoints = object.endpoints.into_iter().enumerate().filter(|_| is_ip);
    let triggered = label(&object.metadata.annotations, TRIGGER_TIME);
    EndpointSlice {
        meta: meta(name, &object.metadata),
        service,
        triggered: triggered.and_then(|time| Some(time.parse::<Timestamp>().ok()?.as_microsecond())),
        ports,
        endpoints: endpoints.filter_map(|(index, entry)| slice_endpoint(index, entry, notices)).collect(),
    }
}

fn slice_endpoint(
    index: usize,
    entry: discovery::Endpoint,
    notices: &mut Vec<Notice>,
) -> Option<SliceEndpoint> {
    let first = entry.addresses.first()?;
    let address = address(first, || format!(".endpoints[{index}].addresses[0]"), notices)?;
    let conditions = entry.conditions.unwrap_or_default();
    let hints = entry.hints.unwrap_or_default();
    Some(SliceEndpoint {
        address,
        ready: conditions.ready.unwrap_or(true),
        serving: conditions.serving.unwrap_or(true),
        terminating: conditions.terminating.unwrap_or(false),
        zone: text(entry.zone),
        for_zones: names(hints.for_zones.into_iter().flatten().map(|zone| zone.name)),
        for_nodes: names(hints.for_nodes.into_iter().flatten().map(|node| node.name)),
        node: text(entry.node_name),
    })
}

fn names(names: impl Iterator<Item = String>) -> Vec<Arc<str>> {
    names.filter_map(|name| text(Some(name))).collect()
}

pub(super) fn pod(name: Name, object: core::Pod, notices: &mut Vec<Notice>) -> Pod {
    let spec = object.spec.unwrap_or_default();
    let status = object.status.unwrap_or_default();
    let mut ips: Vec<String> = status.pod_ips.unwrap_or_default().into_iter().map(|ip| ip.ip).collect();
    if let Some(ip) = status.pod_ip
        && ips.is_empty()
    {
        ips.push(ip);
    }
    let mut ports = Vec::new();
    for (container, entries) in spec.containers.into_iter().map(|container| container.ports).enumerate() {
        for (index, entry) in entries.unwrap_or_default().into_iter().enumerate() {
            let Some(name) = text(entry.name) else { continue };
            let field = |name: &str| format!(".spec.containers[{container}].ports[{index}].{name}");
            let number = port(entry.container_port, || field("containerPort"), notices);
            let protocol = protocol(entry.protocol.as_deref(), || field("protocol"), notices);
            if let (Some(port), Some(protocol)) = (number, protocol) {
                ports.push(ContainerPort { name, port, protocol });
            }
        }
    }
    let conditions = status.conditions.unwrap_or_default();
    let ready = conditions.iter().find(|condition| condition.type_ == "Ready");
    Pod {
        addresses: ips
            .iter()
            .filter(|ip| !ip.is_empty())
            .filter_map(|ip| address(ip, || ".status.podIP".to_owned(), notices))
            .collect(),
        phase: status.phase.unwrap_or_default().into(),
        ready: (!conditions.is_empty()).then(|| ready.is_some_and(|ready| ready.status == "True")),
        terminating: object.metadata.deletion_timestamp.is_some(),
        node: text(spec.node_name),
        ports,
        labels: labels(object.metadata.labels.clone()),
        meta: meta(name, &object.metadata),
    }
}

pub(super) fn secret(name: Name, object: core::Secret) -> Secret {
    let mut data = object.data.unwrap_or_default();
    let mut plain = object.string_data.unwrap_or_default();
    // stringData wins, as in the API server.
    let mut take = |key: &str| -> Option<Arc<[u8]>> {
        let plain = plain.remove(key).map(String::into_bytes);
        plain.or_else(|| data.remove(key).map(|bytes| bytes.0)).map(Arc::from)
    };
    Secret {
        certificate: take("tls.crt"),
        key: take("tls.key"),
        kind: object.type_.unwrap_or_default().into(),
        meta: meta(name, &object.metadata),
    }
}

pub(super) fn config_map(name: Name, object: core::ConfigMap) -> ConfigMap {
    ConfigMap { meta: meta(name, &object.metadata), data: labels(object.data) }
}

pub(super) fn node(name: Name, object: core::Node, notices: &mut Vec<Notice>) -> Node {
    let spec = object.spec.unwrap_or_default();
    let reported = object.status.and_then(|status| status.addresses).unwrap_or_default();
    let mut addresses = Vec::new();
    for wanted in ["InternalIP", "ExternalIP"] {
        for (index, entry) in reported.iter().enumerate().filter(|(_, entry)| entry.type_ == wanted) {
            let field = || format!(".status.addresses[{index}].address");
            addresses.extend(address(&entry.address, field, notices));
        }
    }
    let mut networks = spec.pod_cidrs.unwrap_or_default();
    if networks.is_empty() {
        networks.extend(spec.pod_cidr);
    }
    let taints = spec.taints.unwrap_or_default();
    Node {
        zone: label(&object.metadata.labels, ZONE),
        addresses,
        pod_networks: networks.iter().filter_map(|network| network.parse().ok()).collect(),
        leaving: object.metadata.deletion_timestamp.is_some()
            || taints.iter().any(|taint| taint.key == "ToBeDeletedByClusterAutoscaler"),
        meta: meta(name, &object.metadata),
    }
}
