//! TCP and UDP ports that are relayed as they are, as two ConfigMaps ask: a port
//! of ours to a port of a Service, in ingress-nginx's words
//! `"9000": "namespace/service:port:PROXY:PROXY"`.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::sync::Arc;

use lockgate_proxy::proxy_protocol::Version;
use lockgate_proxy::table::{
    Balance, Endpoint, L4Listener, ListenerKey, Origin, Pool, ProxyProtocol, Transport, UpstreamProtocol,
};

use super::endpoints::Selected;
use super::host::PoolId;
use crate::objects::{ConfigMap, Notice, PortRef, Protocol, ServiceKind, ServicePort, is_dns_name};
use crate::store::{Key, Store};

/// Where the ports are said, and where they are.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StreamOptions {
    /// A ConfigMap of TCP ports.
    pub tcp_services: Option<Key>,
    /// A ConfigMap of UDP ports.
    pub udp_services: Option<Key>,
    /// Each port is opened on each of these.
    pub addresses: Vec<IpAddr>,
    /// TCP ports that something else has.
    pub reserved: BTreeSet<u16>,
}

impl Default for StreamOptions {
    fn default() -> StreamOptions {
        let addresses = vec![Ipv4Addr::UNSPECIFIED.into()];
        StreamOptions { tcp_services: None, udp_services: None, addresses, reserved: BTreeSet::new() }
    }
}

impl StreamOptions {
    /// Whether `config_map` is one of the two.
    pub fn names(&self, config_map: &Key) -> bool {
        self.both().any(|(_, named)| named == config_map)
    }

    fn both(&self) -> impl Iterator<Item = (Transport, &Key)> {
        let tcp = self.tcp_services.iter().map(|key| (Transport::Tcp, key));
        tcp.chain(self.udp_services.iter().map(|key| (Transport::Udp, key)))
    }
}

/// What the ports need.
#[derive(Debug, Default)]
pub(super) struct Streams {
    pub(super) pools: BTreeSet<PoolId>,
    /// Those that are named, there or not.
    services: BTreeSet<Key>,
}

impl Streams {
    /// Whether a change of `service` may change the ports.
    pub(super) fn uses(&self, service: &Key) -> bool {
        self.services.contains(service)
    }
}

/// What the ConfigMaps come to.
#[derive(Default)]
pub(super) struct Made {
    pub(super) streams: Streams,
    pub(super) listeners: BTreeMap<ListenerKey, L4Listener>,
    /// By ConfigMap; each that is named has an entry.
    pub(super) notices: BTreeMap<Key, Vec<Notice>>,
}

pub(super) fn make(options: &StreamOptions, store: &Store) -> Made {
    let mut made = Made::default();
    for (transport, key) in options.both() {
        let mut notices = Vec::new();
        match store.config_maps.get(key) {
            Some(config_map) => read(options, transport, config_map, store, &mut made, &mut notices),
            None => notices.push(Notice::error(
                "",
                format!("ConfigMap {key} does not exist: no {} port is relayed", protocol(transport)),
                format!("create it, or correct --{}-services-configmap", transport.as_str()),
            )),
        }
        notices.sort_by_key(|notice| notice.level);
        made.notices.entry(key.clone()).or_default().append(&mut notices);
    }
    made
}

fn read(
    options: &StreamOptions,
    transport: Transport,
    config_map: &ConfigMap,
    store: &Store,
    made: &mut Made,
    notices: &mut Vec<Notice>,
) {
    let meta = &config_map.meta;
    let origin = Origin { kind: "ConfigMap", namespace: meta.namespace.clone(), name: meta.name.clone() };
    let origin = Arc::new(origin);
    for (key, text) in &config_map.data {
        let field = format!(".data[{key:?}]");
        let entry = number(options, transport, key).and_then(|port| Ok((port, Entry::parse(text)?)));
        let (port, entry) = match entry {
            Ok(entry) => entry,
            Err((message, remedy)) => {
                notices.push(Notice::error(field, format!("{message}: the port stays closed"), remedy));
                continue;
            }
        };
        entry.warnings(transport, &field, notices);
        made.streams.services.insert(entry.service.clone());
        let id = PoolId {
            service: entry.service.clone(),
            port: entry.port.clone(),
            protocol: Some(match transport {
                Transport::Tcp => UpstreamProtocol::Tcp,
                Transport::Udp => UpstreamProtocol::Udp,
            }),
        };
        if let Some((message, remedy)) = problem(&id, transport, store) {
            notices.push(Notice::error(field, format!("{message}: the port stays closed"), remedy));
            continue;
        }
        let listener = L4Listener {
            pool: id.key(),
            origin: origin.clone(),
            proxy_protocol: entry.proxy_protocol(transport),
            idle_timeout: None,
            responses: None,
        };
        made.streams.pools.insert(id);
        for address in &options.addresses {
            let key = ListenerKey { transport, address: SocketAddr::new(*address, port) };
            made.listeners.insert(key, listener.clone());
        }
    }
}

/// What is wrong, and what to do about it.
type Problem = (String, String);

/// The port of ours.
fn number(options: &StreamOptions, transport: Transport, key: &str) -> Result<u16, Problem> {
    // Not `+80` or `080`, which would be another spelling of a port that is there already.
    let port = key.parse::<u16>().ok().filter(|port| *port != 0 && port.to_string() == *key);
    let problem = |message: String, remedy: &str| Err((message, remedy.to_owned()));
    match port {
        None => problem(format!("{key:?} is not a port"), "use a number from 1 to 65535"),
        Some(port) if transport == Transport::Tcp && options.reserved.contains(&port) => problem(
            format!("Lockgate itself listens on port {port}"),
            "use another port, or move HTTP, HTTPS or the admin endpoint",
        ),
        Some(port) => Ok(port),
    }
}

/// One value.
struct Entry<'a> {
    service: Key,
    port: PortRef,
    /// What stands behind the port, at most two of which mean something.
    options: Vec<&'a str>,
}

impl<'a> Entry<'a> {
    fn parse(text: &'a str) -> Result<Entry<'a>, Problem> {
        let malformed = || {
            let message = format!("{text:?} does not name a port of a Service");
            (message, "write \"namespace/service:port\", and :PROXY behind it if needed".to_owned())
        };
        let mut parts = text.trim().split(':');
        let (service, port) = parts.next().zip(parts.next()).ok_or_else(malformed)?;
        let (namespace, name) = service.split_once('/').ok_or_else(malformed)?;
        if !is_dns_name(namespace, 63, false) || !is_dns_name(name, 253, true) || port.is_empty() {
            return Err(malformed());
        }
        let port = match port.parse() {
            Ok(number) => PortRef::Number(number),
            Err(_) => PortRef::Name(port.into()),
        };
        Ok(Entry { service: Key::new(namespace, name), port, options: parts.collect() })
    }

    fn has(&self, index: usize) -> bool {
        self.options.get(index).is_some_and(|option| option.eq_ignore_ascii_case("PROXY"))
    }

    fn proxy_protocol(&self, transport: Transport) -> ProxyProtocol {
        match transport {
            // Version 1 is what nginx writes.
            Transport::Tcp => ProxyProtocol { accept: self.has(0), send: self.has(1).then_some(Version::V1) },
            Transport::Udp => ProxyProtocol::default(),
        }
    }

    fn warnings(&self, transport: Transport, field: &str, notices: &mut Vec<Notice>) {
        let is_odd = |(index, option): (usize, &&str)| {
            index >= 2 || !option.is_empty() && !option.eq_ignore_ascii_case("PROXY")
        };
        if transport == Transport::Udp && (self.has(0) || self.has(1)) {
            let message = "there is no PROXY protocol for UDP: ignored";
            notices.push(Notice::warning(field, message, "leave :PROXY out"));
        } else if self.options.iter().enumerate().any(is_odd) {
            let message = "only PROXY may stand behind the port, twice at most: the rest is ignored";
            let remedy = "the first :PROXY reads the header of clients, the second writes one to endpoints";
            notices.push(Notice::warning(field, message, remedy));
        }
    }
}

/// Why there is nothing that the port could be relayed to.
fn problem(id: &PoolId, transport: Transport, store: &Store) -> Option<Problem> {
    let key = &id.service;
    let Some(service) = store.services.get(key) else {
        return Some((format!("Service {key} does not exist"), "create it or correct the name".to_owned()));
    };
    if service.kind == ServiceKind::ExternalName {
        let message =
            format!("Service {key} is of type ExternalName, which can name any host and is refused");
        return Some((message, "use a Service without selector and an EndpointSlice".to_owned()));
    }
    if service.ports.iter().any(|port| is_port(port, id)) {
        return None;
    }
    let ports: Vec<String> = service
        .ports
        .iter()
        .take(8)
        .map(|port| match &*port.name {
            "" => format!("{}/{}", port.port, port.protocol),
            name => format!("{}/{} ({name})", port.port, port.protocol),
        })
        .collect();
    let remedy = match ports.as_slice() {
        [] => "add the port to the Service".to_owned(),
        ports => format!("it has {}", ports.join(", ")),
    };
    Some((format!("Service {key} has no {} port {}", protocol(transport), id.port), remedy))
}

fn protocol(transport: Transport) -> Protocol {
    match transport {
        Transport::Tcp => Protocol::Tcp,
        Transport::Udp => Protocol::Udp,
    }
}

/// Whether `port` is the one that an L4 listener names.
pub(super) fn is_port(port: &ServicePort, id: &PoolId) -> bool {
    let udp = id.protocol == Some(UpstreamProtocol::Udp);
    port.protocol == if udp { Protocol::Udp } else { Protocol::Tcp }
        && match &id.port {
            PortRef::Number(number) => i32::from(port.port) == *number,
            PortRef::Name(name) => port.name == *name,
        }
}

/// Connections last, so it is how many there are that counts, and not whose turn it is.
pub(super) fn pool(id: &PoolId, selected: &Selected) -> Pool {
    let endpoint = |(address, zone): (&_, &Option<Arc<str>>)| Endpoint {
        address: *address,
        weight: 1,
        zone: zone.clone(),
    };
    Pool {
        protocol: id.protocol.unwrap_or_default(),
        balance: Balance::LeastConnections,
        endpoints: selected.endpoints.iter().map(endpoint).collect(),
        ..Pool::default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn entries() {
        let proxy = |accept, send: bool| ProxyProtocol { accept, send: send.then_some(Version::V1) };
        let number = |number| PortRef::Number(number);
        for (text, service, port, expected, warns) in [
            ("a/b:80", "a/b", number(80), proxy(false, false), false),
            ("a/b:http", "a/b", PortRef::Name("http".into()), proxy(false, false), false),
            (" a/b.c:80 ", "a/b.c", number(80), proxy(false, false), false),
            ("a/b:80:PROXY", "a/b", number(80), proxy(true, false), false),
            ("a/b:80:proxy:Proxy", "a/b", number(80), proxy(true, true), false),
            ("a/b:80::PROXY", "a/b", number(80), proxy(false, true), false),
            ("a/b:80:", "a/b", number(80), proxy(false, false), false),
            ("a/b:80:HTTP", "a/b", number(80), proxy(false, false), true),
            ("a/b:80:PROXY:PROXY:PROXY", "a/b", number(80), proxy(true, true), true),
        ] {
            let entry = Entry::parse(text).unwrap_or_else(|(message, _)| panic!("{text}: {message}"));
            assert_eq!((entry.service.to_string().as_str(), &entry.port), (service, &port), "{text}");
            assert_eq!(entry.proxy_protocol(Transport::Tcp), expected, "{text}");
            assert_eq!(entry.proxy_protocol(Transport::Udp), proxy(false, false), "{text}");
            let mut notices = Vec::new();
            entry.warnings(Transport::Tcp, "", &mut notices);
            assert_eq!(!notices.is_empty(), warns, "{text}");
        }
        for text in ["", "b:80", "a/b", "a/b:", "/b:80", "a/:80", "a/b/c:80", "A/b:80", "a/b c:80"] {
            assert!(Entry::parse(text).is_err(), "{text}");
        }
    }

    #[test]
    fn ports_of_ours() {
        let options = StreamOptions { reserved: [8080].into(), ..StreamOptions::default() };
        let ok = |transport, text| number(&options, transport, text).ok();
        assert_eq!(ok(Transport::Tcp, "9000"), Some(9000));
        assert_eq!(ok(Transport::Udp, "8080"), Some(8080));
        for text in ["8080", "0", "65536", "-1", "+9000", "09000", "http", "", " 9000"] {
            assert_eq!(ok(Transport::Tcp, text), None, "{text}");
        }
    }
}
