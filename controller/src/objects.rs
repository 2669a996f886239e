//! The Kubernetes objects Lockgate reads, reduced to what it uses: owned,
//! comparable, cheap to share. Made from YAML or JSON by [`parse`].

use std::collections::BTreeMap;
use std::fmt;
use std::net::IpAddr;
use std::sync::Arc;

use ipnet::IpNet;
use serde::Serialize;

mod convert;
mod parse;

pub(crate) use parse::is_dns_name;
pub use parse::parse;

/// Labels or annotations.
pub type Labels = BTreeMap<Arc<str>, Arc<str>>;

/// The kind of an object, as far as Lockgate tells kinds apart.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Kind {
    /// `networking.k8s.io/v1`
    Ingress,
    /// `networking.k8s.io/v1`, cluster-scoped
    IngressClass,
    /// `v1`
    Service,
    /// `discovery.k8s.io/v1`
    EndpointSlice,
    /// `v1`
    Pod,
    /// `v1`
    Secret,
    /// `v1`, cluster-scoped
    Node,
    /// `v1`
    ConfigMap,
    /// Known and reported, but not served: the Gateway API, `Endpoints`.
    Unsupported(&'static str),
}

impl Kind {
    /// The kind as manifests spell it.
    pub fn as_str(self) -> &'static str {
        match self {
            Kind::Ingress => "Ingress",
            Kind::IngressClass => "IngressClass",
            Kind::Service => "Service",
            Kind::EndpointSlice => "EndpointSlice",
            Kind::Pod => "Pod",
            Kind::Secret => "Secret",
            Kind::Node => "Node",
            Kind::ConfigMap => "ConfigMap",
            Kind::Unsupported(kind) => kind,
        }
    }

    /// Whether its objects live in a namespace.
    pub fn is_namespaced(self) -> bool {
        !matches!(self, Kind::IngressClass | Kind::Node | Kind::Unsupported("GatewayClass"))
    }
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// Names one object: `Ingress shop/web`, `Node worker-1`.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ObjectRef {
    /// Its kind.
    pub kind: Kind,
    /// Its namespace; empty for a cluster-scoped kind.
    pub namespace: Arc<str>,
    /// Its name.
    pub name: Arc<str>,
}

impl fmt::Display for ObjectRef {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.namespace.is_empty() {
            write!(f, "{} {}", self.kind, self.name)
        } else {
            write!(f, "{} {}/{}", self.kind, self.namespace, self.name)
        }
    }
}

impl Serialize for ObjectRef {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

/// How bad a [`Notice`] is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Level {
    /// Something asked for is not done.
    Error,
    /// Done, but not as written or not as expected.
    Warning,
    /// Worth knowing.
    Info,
}

/// Something to tell the author of an object.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
pub struct Notice {
    /// How bad it is.
    pub level: Level,
    /// Where: `.spec.rules[0].http.paths[1].backend`; empty for the whole object.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub field: String,
    /// What is wrong and what Lockgate does about it.
    pub message: String,
    /// What the author can do; empty if nothing needs doing.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub remedy: String,
}

impl Notice {
    /// A notice of level `Error`.
    pub fn error(field: impl Into<String>, message: impl Into<String>, remedy: impl Into<String>) -> Notice {
        Notice { level: Level::Error, field: field.into(), message: message.into(), remedy: remedy.into() }
    }

    /// A notice of level `Warning`.
    pub fn warning(
        field: impl Into<String>,
        message: impl Into<String>,
        remedy: impl Into<String>,
    ) -> Notice {
        Notice { level: Level::Warning, ..Notice::error(field, message, remedy) }
    }

    /// A notice of level `Info`, which needs no remedy.
    pub fn info(field: impl Into<String>, message: impl Into<String>) -> Notice {
        Notice { level: Level::Info, ..Notice::error(field, message, "") }
    }
}

impl fmt::Display for Notice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if !self.field.is_empty() {
            write!(f, "{}: ", self.field)?;
        }
        f.write_str(&self.message)?;
        if !self.remedy.is_empty() {
            write!(f, "; {}", self.remedy)?;
        }
        Ok(())
    }
}

/// One object that Lockgate uses.
#[derive(Clone, Debug, PartialEq, Eq)]
#[allow(missing_docs)] // the variants are their kinds
pub enum Object {
    Ingress(Ingress),
    IngressClass(IngressClass),
    Service(Service),
    EndpointSlice(EndpointSlice),
    Pod(Pod),
    Secret(Secret),
    Node(Node),
    ConfigMap(ConfigMap),
}

impl Object {
    /// What names this object.
    pub fn reference(&self) -> ObjectRef {
        let (kind, meta) = match self {
            Object::Ingress(o) => (Kind::Ingress, &o.meta),
            Object::IngressClass(o) => (Kind::IngressClass, &o.meta),
            Object::Service(o) => (Kind::Service, &o.meta),
            Object::EndpointSlice(o) => (Kind::EndpointSlice, &o.meta),
            Object::Pod(o) => (Kind::Pod, &o.meta),
            Object::Secret(o) => (Kind::Secret, &o.meta),
            Object::Node(o) => (Kind::Node, &o.meta),
            Object::ConfigMap(o) => (Kind::ConfigMap, &o.meta),
        };
        ObjectRef { kind, namespace: meta.namespace.clone(), name: meta.name.clone() }
    }
}

/// What became of one document.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Parsed {
    /// An object, with warnings such as unknown fields.
    Object(Object, Vec<Notice>),
    /// A kind that Lockgate has no use for.
    Unused(String),
    /// A kind that Lockgate knows but does not serve yet.
    Unsupported {
        /// What names it.
        reference: ObjectRef,
        /// Its kind as written.
        kind: String,
        /// What to tell its author.
        notice: Notice,
    },
    /// Not an object that Kubernetes would accept.
    Invalid {
        /// What names it, if that much could be read.
        reference: Option<ObjectRef>,
        /// What is wrong.
        notice: Notice,
    },
}

/// What every object has.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Meta {
    /// Empty for a cluster-scoped kind.
    pub namespace: Arc<str>,
    /// A DNS label or subdomain.
    pub name: Arc<str>,
    /// `creationTimestamp` in microseconds since 1970; objects from a folder rarely have one.
    pub created: Option<i64>,
}

/// `networking.k8s.io/v1` Ingress.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Ingress {
    /// Name and age.
    pub meta: Meta,
    /// Those Lockgate looks at: `nginx.ingress.kubernetes.io/…`, `lockgate.io/…`, the legacy class.
    pub annotations: Labels,
    /// `spec.ingressClassName`
    pub class: Option<Arc<str>>,
    /// `spec.defaultBackend`
    pub default_backend: Option<IngressBackend>,
    /// `spec.rules`
    pub rules: Vec<IngressRule>,
    /// `spec.tls`
    pub tls: Vec<IngressTls>,
}

/// One entry of `spec.rules`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct IngressRule {
    /// As written; empty for any host.
    pub host: Arc<str>,
    /// `http.paths`
    pub paths: Vec<IngressPath>,
}

/// One entry of `http.paths`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct IngressPath {
    /// As written; may be empty.
    pub path: Arc<str>,
    /// As written: `Exact`, `Prefix`, `ImplementationSpecific`, or a mistake.
    pub path_type: Arc<str>,
    /// Where matching requests go.
    pub backend: IngressBackend,
}

/// What a path or `defaultBackend` points at.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum IngressBackend {
    /// A port of a Service in the same namespace.
    Service {
        /// The Service.
        name: Arc<str>,
        /// The port, if one was written.
        port: Option<PortRef>,
    },
    /// Another object, such as a storage bucket.
    Resource {
        /// Its kind.
        kind: Arc<str>,
        /// Its name.
        name: Arc<str>,
    },
    /// Neither was written.
    #[default]
    Missing,
}

/// A port as written.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum PortRef {
    /// By number; not checked for range, since a Service has no port out of range.
    Number(i32),
    /// By name.
    Name(Arc<str>),
}

impl fmt::Display for PortRef {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            PortRef::Number(number) => number.fmt(f),
            PortRef::Name(name) => name.fmt(f),
        }
    }
}

/// One entry of `spec.tls`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct IngressTls {
    /// As written.
    pub hosts: Vec<Arc<str>>,
    /// A Secret in the same namespace.
    pub secret: Option<Arc<str>>,
}

/// `networking.k8s.io/v1` IngressClass.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct IngressClass {
    /// Name and age.
    pub meta: Meta,
    /// `spec.controller`
    pub controller: Arc<str>,
    /// `ingressclass.kubernetes.io/is-default-class: "true"`
    pub is_default: bool,
}

/// A transport protocol.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[allow(missing_docs)] // the variants are their names
pub enum Protocol {
    #[default]
    Tcp,
    Udp,
    Sctp,
}

impl fmt::Display for Protocol {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Protocol::Tcp => "TCP",
            Protocol::Udp => "UDP",
            Protocol::Sctp => "SCTP",
        })
    }
}

/// `v1` Service.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Service {
    /// Name and age.
    pub meta: Meta,
    /// `spec.type`
    pub kind: ServiceKind,
    /// Cluster IPs; empty for a headless Service and for one no API server has seen.
    pub addresses: Vec<IpAddr>,
    /// Pods that belong to it; empty if someone else writes its EndpointSlices.
    pub selector: Labels,
    /// `spec.ports`
    pub ports: Vec<ServicePort>,
    /// `spec.publishNotReadyAddresses`
    pub publish_not_ready: bool,
    /// `metadata.uid`; objects from a folder rarely have one.
    pub uid: Option<Arc<str>>,
    /// Those Lockgate looks at: `lockgate.io/…`.
    pub annotations: Labels,
    /// `spec.trafficDistribution` asks for endpoints of the same zone.
    pub prefers_zone: bool,
    /// What only the service plane looks at.
    pub exposure: Exposure,
}

/// How a Service is reached by its addresses.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Exposure {
    /// `spec.type`, if that is not `ExternalName`.
    pub via: Via,
    /// The label `service.kubernetes.io/service-proxy-name`: whose Service it is.
    pub proxy_name: Option<Arc<str>>,
    /// The label `service.kubernetes.io/headless` is set, or `spec.clusterIP` is `None`.
    pub headless: bool,
    /// `spec.externalIPs`
    pub external_ips: Vec<IpAddr>,
    /// `status.loadBalancer.ingress[].ip` whose `ipMode` is `VIP`, also the default.
    pub load_balancer_ips: Vec<IpAddr>,
    /// `spec.loadBalancerSourceRanges`; `None` if nothing is written there, and
    /// empty if nothing there is a network, which then lets nobody in.
    pub source_ranges: Option<Vec<IpNet>>,
    /// `spec.internalTrafficPolicy: Local`
    pub internal_local: bool,
    /// `spec.externalTrafficPolicy: Local`
    pub external_local: bool,
    /// `spec.sessionAffinity: ClientIP`, and for how many seconds.
    pub affinity: Option<u32>,
    /// `spec.healthCheckNodePort`
    pub health_check_port: Option<u16>,
}

/// From where a Service is reached.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[allow(missing_docs)] // the variants are their names
pub enum Via {
    #[default]
    ClusterIp,
    NodePort,
    LoadBalancer,
}

/// `spec.type` of a Service.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum ServiceKind {
    /// `ClusterIP`, `NodePort` and `LoadBalancer`: Lockgate reaches the endpoints of all alike.
    #[default]
    Endpoints,
    /// `ExternalName`: a DNS alias.
    ExternalName,
}

/// One entry of a Service's `spec.ports`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ServicePort {
    /// Empty only if it is the only port.
    pub name: Arc<str>,
    /// The Service's port.
    pub port: u16,
    /// The Pods' port.
    pub target: TargetPort,
    /// `protocol`
    pub protocol: Protocol,
    /// `appProtocol`
    pub app_protocol: Option<Arc<str>>,
    /// `nodePort`
    pub node_port: Option<u16>,
}

/// `targetPort`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum TargetPort {
    /// Not written: the Service's own port.
    #[default]
    Same,
    /// A number.
    Number(u16),
    /// A container port's name, resolved for each Pod.
    Name(Arc<str>),
}

/// `discovery.k8s.io/v1` EndpointSlice.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct EndpointSlice {
    /// Name and age.
    pub meta: Meta,
    /// Label `kubernetes.io/service-name`.
    pub service: Option<Arc<str>>,
    /// `ports`
    pub ports: Vec<SlicePort>,
    /// `endpoints`; empty if `addressType` is `FQDN`.
    pub endpoints: Vec<SliceEndpoint>,
    /// Annotation `endpoints.kubernetes.io/last-change-trigger-time`: when that happened
    /// of which this is the result, in microseconds since 1970.
    pub triggered: Option<i64>,
}

/// One entry of an EndpointSlice's `ports`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct SlicePort {
    /// The Service port's name.
    pub name: Arc<str>,
    /// The endpoints' port.
    pub port: u16,
    /// `protocol`
    pub protocol: Protocol,
    /// `appProtocol`
    pub app_protocol: Option<Arc<str>>,
}

/// One entry of an EndpointSlice's `endpoints`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SliceEndpoint {
    /// The first of `addresses`; kube-proxy uses no other either.
    pub address: IpAddr,
    /// `conditions.ready`, true if not written
    pub ready: bool,
    /// `conditions.serving`, true if not written, as to kube-proxy
    pub serving: bool,
    /// `conditions.terminating`, false if not written
    pub terminating: bool,
    /// `zone`
    pub zone: Option<Arc<str>>,
    /// `hints.forZones`: the zones whose traffic is meant for it.
    pub for_zones: Vec<Arc<str>>,
    /// `hints.forNodes`: the nodes whose traffic is meant for it.
    pub for_nodes: Vec<Arc<str>>,
    /// `nodeName`
    pub node: Option<Arc<str>>,
}

/// `v1` Pod.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Pod {
    /// Name and age.
    pub meta: Meta,
    /// `metadata.labels`
    pub labels: Labels,
    /// `status.podIPs`, or `podIP`
    pub addresses: Vec<IpAddr>,
    /// `status.phase`; empty in a folder that has none.
    pub phase: Arc<str>,
    /// Condition `Ready`; `None` if the Pod has no conditions at all.
    pub ready: Option<bool>,
    /// `metadata.deletionTimestamp` is set.
    pub terminating: bool,
    /// `spec.nodeName`
    pub node: Option<Arc<str>>,
    /// The named ports of all its containers.
    pub ports: Vec<ContainerPort>,
}

/// One named entry of a container's `ports`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ContainerPort {
    /// Its name.
    pub name: Arc<str>,
    /// `containerPort`
    pub port: u16,
    /// `protocol`
    pub protocol: Protocol,
}

/// `v1` Secret. Its `Debug` shows no key.
#[derive(Clone, Default, PartialEq, Eq)]
pub struct Secret {
    /// Name and age.
    pub meta: Meta,
    /// `type`
    pub kind: Arc<str>,
    /// `tls.crt`, PEM.
    pub certificate: Option<Arc<[u8]>>,
    /// `tls.key`, PEM.
    pub key: Option<Arc<[u8]>>,
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Secret").field("meta", &self.meta).field("kind", &self.kind).finish_non_exhaustive()
    }
}

/// `v1` Node.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Node {
    /// Name and age.
    pub meta: Meta,
    /// Label `topology.kubernetes.io/zone`.
    pub zone: Option<Arc<str>>,
    /// Of `status.addresses`: those of type `InternalIP`, then `ExternalIP`, in their order.
    pub addresses: Vec<IpAddr>,
    /// `spec.podCIDRs`
    pub pod_networks: Vec<IpNet>,
    /// It is being deleted, or has the taint `ToBeDeletedByClusterAutoscaler`:
    /// load balancers shall stop sending to it.
    pub leaving: bool,
}

/// `v1` ConfigMap.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ConfigMap {
    /// Name and age.
    pub meta: Meta,
    /// `data`
    pub data: Labels,
}
