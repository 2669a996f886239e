//! Manifests in, verdicts out: what a client gets, by kube-proxy's contract.

use std::net::{IpAddr, SocketAddr};

use lockgate_ebpf::table::Protocol;
use lockgate_ebpf::verdict::{Set, Verdict};

use super::*;
use crate::objects::{Object, Parsed, parse};
use crate::translate::{Desired, Options, Translator, translate};

/// Three nodes in two zones; this is `n1`.
const NODES: &str = "
{apiVersion: v1, kind: Node, metadata: {name: n1, labels: {topology.kubernetes.io/zone: a}},
 spec: {podCIDRs: [10.1.1.0/24, 'fd00:1::/64']},
 status: {addresses: [{type: InternalIP, address: 192.168.50.1}, {type: InternalIP, address: 'fd00::1'},
                      {type: ExternalIP, address: 203.0.113.10}]}}
---
{apiVersion: v1, kind: Node, metadata: {name: n2, labels: {topology.kubernetes.io/zone: b}}}
---
";

fn options() -> NodeOptions {
    NodeOptions {
        name: "n1".into(),
        cluster_networks: vec!["10.1.0.0/16".parse().unwrap(), "fd00:1::/48".parse().unwrap()],
        service_networks: vec!["10.96.0.0/16".parse().unwrap()],
        ..NodeOptions::default()
    }
}

fn store(yaml: &str) -> Store {
    let mut store = Store::default();
    for document in serde_yaml::Deserializer::from_str(yaml) {
        for parsed in parse(serde::Deserialize::deserialize(document).unwrap()) {
            match parsed {
                Parsed::Object(object, _) => store.apply(object),
                other => panic!("{other:?}"),
            }
        }
    }
    store
}

fn desired(options: NodeOptions, yaml: &str) -> Desired {
    let options = Options { node: Some(options), ..Options::default() };
    translate(&store(&format!("{NODES}{yaml}")), &options)
}

/// Service `s` with one port 80 whose endpoints listen on 8080.
fn service(spec: &str) -> String {
    labelled("", spec)
}

fn labelled(labels: &str, spec: &str) -> String {
    format!(
        "{{apiVersion: v1, kind: Service, metadata: {{name: s, labels: {{{labels}}}}}, spec: {{{spec}}}}}\n---\n"
    )
}

const PORT: &str = "ports: [{port: 80, nodePort: 30080}]";

/// A slice of `s`; each endpoint as `LAST [n1|n2] [unready|terminating|gone] [zone:a] [node:n1]`,
/// in 10.1.1.0/24 on this node and 10.1.2.0/24 elsewhere.
fn slice(endpoints: &[&str]) -> String {
    let endpoint = |line: &&str| {
        let words: Vec<&str> = line.split_whitespace().collect();
        let node = words.iter().find(|word| word.starts_with('n') && word.len() == 2).unwrap_or(&"n2");
        let conditions = match () {
            () if words.contains(&"unready") => "{ready: false, serving: false}",
            () if words.contains(&"terminating") => "{ready: false, serving: true, terminating: true}",
            () if words.contains(&"gone") => "{ready: false, serving: false, terminating: true}",
            () => "{ready: true}",
        };
        let hints = |prefix: &str| {
            let names = words.iter().filter_map(|word| word.strip_prefix(prefix));
            names.map(|name| format!("{{name: {name}}}")).collect::<Vec<_>>().join(", ")
        };
        let network = if *node == "n1" { 1 } else { 2 };
        format!(
            "{{addresses: [10.1.{network}.{}], nodeName: {node}, conditions: {conditions},
              hints: {{forZones: [{}], forNodes: [{}]}}}}",
            words[0],
            hints("zone:"),
            hints("node:"),
        )
    };
    let endpoints: Vec<String> = endpoints.iter().map(endpoint).collect();
    format!(
        "{{apiVersion: discovery.k8s.io/v1, kind: EndpointSlice, addressType: IPv4,
          metadata: {{name: s-1, labels: {{kubernetes.io/service-name: s}}}},
          ports: [{{name: '', port: 8080}}], endpoints: [{}]}}\n---\n",
        endpoints.join(", ")
    )
}

/// In short: the last two numbers of the endpoints, `L` before those of the local set, `m` behind
/// them if masqueraded.
fn short(table: &ServiceTable, client: &str, destination: &str) -> String {
    let client = table.node.client(client.parse().unwrap());
    match table.verdict(client, destination.parse().unwrap(), Protocol::Tcp) {
        Verdict::Pass => "pass".to_owned(),
        Verdict::Reject(_) => "reject".to_owned(),
        Verdict::Drop(_) => "drop".to_owned(),
        Verdict::Forward { set, endpoints, masquerade, .. } => {
            let mut text = if set == Set::Local { "L".to_owned() } else { String::new() };
            for endpoint in endpoints {
                assert_eq!(endpoint.address.port(), 8080);
                let ip = endpoint.address.ip().to_string();
                text = format!("{text} {}", ip.strip_prefix("10.1.").unwrap_or(&ip));
            }
            text + if masquerade { " m" } else { "" }
        }
    }
    .trim_start()
    .to_owned()
}

const NODE: &str = "192.168.50.1";
const POD: &str = "10.1.1.9";
const OUTSIDE: &str = "198.51.100.7";
const VIP: &str = "10.96.0.1:80";
const BALANCER: &str = "203.0.113.1:80";
const NODE_PORT: &str = "192.168.50.1:30080";

/// A load balancer's Service on all of its addresses.
fn balanced(more: &str) -> String {
    format!(
        "{{apiVersion: v1, kind: Service, metadata: {{name: s}},
          spec: {{type: LoadBalancer, clusterIP: 10.96.0.1, {PORT}{more}}},
          status: {{loadBalancer: {{ingress: [{{ip: 203.0.113.1}}]}}}}}}\n---\n"
    )
}

/// For Node, Pod, outside: cluster IP, load balancer, node port.
fn matrix(yaml: &str) -> [[String; 3]; 3] {
    let desired = desired(options(), yaml);
    [NODE, POD, OUTSIDE].map(|client| {
        [VIP, BALANCER, NODE_PORT].map(|destination| short(&desired.services, client, destination))
    })
}

/// Scenarios 5 to 11, 17, 22 to 24, 42 to 46 of kube-proxy's contract.
#[test]
fn policies_and_terminating_endpoints() {
    let both = "1.1 2.1";
    let both_m = "1.1 2.1 m";
    let cases: &[(&str, &str, &[&str], [[&str; 3]; 3])] = &[
        (
            "policies Cluster",
            "",
            &["1 n1", "1 n2"],
            [[both, both_m, both_m], [both, both_m, both_m], [both_m, both_m, both_m]],
        ),
        (
            "external policy Local",
            ", externalTrafficPolicy: Local",
            &["1 n1", "1 n2"],
            [[both, both_m, both_m], [both, both, both], [both_m, "L 1.1", "L 1.1"]],
        ),
        (
            "external policy Local, none here",
            ", externalTrafficPolicy: Local",
            &["1 n2"],
            [["2.1", "2.1 m", "2.1 m"], ["2.1", "2.1", "2.1"], ["2.1 m", "drop", "drop"]],
        ),
        (
            "internal policy Local",
            ", internalTrafficPolicy: Local",
            &["1 n1", "1 n2"],
            [["L 1.1", both_m, both_m], ["L 1.1", both_m, both_m], ["L 1.1 m", both_m, both_m]],
        ),
        (
            "internal policy Local, none here",
            ", internalTrafficPolicy: Local",
            &["1 n2"],
            [["drop", "2.1 m", "2.1 m"], ["drop", "2.1 m", "2.1 m"], ["drop", "2.1 m", "2.1 m"]],
        ),
        (
            "both Local",
            ", internalTrafficPolicy: Local, externalTrafficPolicy: Local",
            &["1 n1", "1 n2"],
            [["L 1.1", both_m, both_m], ["L 1.1", both, both], ["L 1.1 m", "L 1.1", "L 1.1"]],
        ),
        ("no endpoints", "", &[], [["reject"; 3]; 3]),
        ("none ready", "", &["1 n1 unready", "2 n2 gone"], [["reject"; 3]; 3]),
        ("both Local, no endpoints", ", externalTrafficPolicy: Local", &[], [["reject"; 3]; 3]),
        (
            "all terminating",
            ", externalTrafficPolicy: Local",
            &["1 n1 terminating", "1 n2 terminating"],
            [[both, both_m, both_m], [both, both, both], [both_m, "L 1.1", "L 1.1"]],
        ),
        (
            "those here terminate, others are ready: each set falls back by itself",
            ", externalTrafficPolicy: Local",
            &["1 n1 terminating", "1 n2"],
            [["2.1", "2.1 m", "2.1 m"], ["2.1", "2.1", "2.1"], ["2.1 m", "L 1.1", "L 1.1"]],
        ),
    ];
    for (name, more, endpoints, expected) in cases {
        let yaml = balanced(more) + &slice(endpoints);
        assert_eq!(matrix(&yaml), expected.map(|row| row.map(str::to_owned)), "{name}");
    }
}

/// Scenarios 36 to 41, and a Service whose `trafficDistribution` nobody has turned into hints.
#[test]
fn topology() {
    let plain = format!("clusterIP: 10.96.0.1, {PORT}");
    let preferring = format!("trafficDistribution: PreferSameNode, {plain}");
    let cases: &[(&str, &[&str], &str)] = &[
        (&plain, &["1 n1 zone:a", "1 n2 zone:b"], "1.1"),
        (&plain, &["1 n1 zone:a", "1 n2"], "1.1 2.1"),
        (&plain, &["1 n1 zone:b", "1 n2 zone:b"], "1.1 2.1"),
        (&plain, &["1 n1 zone:a", "1 n2 unready"], "1.1"),
        (&plain, &["1 n1 zone:a unready", "1 n2 zone:b"], "2.1"),
        (&plain, &["1 n1 zone:a node:n1", "2 n1 zone:a node:n2", "1 n2 zone:b node:n2"], "1.1"),
        (&plain, &["2 n1 zone:a node:n3", "1 n2 zone:b node:n2"], "1.2"),
        (&plain, &["1 n1 zone:a terminating", "1 n2 zone:b terminating"], "1.1 2.1"),
        (&preferring, &["1 n1", "1 n2"], "1.1 2.1"),
    ];
    for (spec, endpoints, expected) in cases {
        let desired = desired(options(), &(service(spec) + &slice(endpoints)));
        assert_eq!(short(&desired.services, POD, VIP), *expected, "{spec} {endpoints:?}");
    }
    let local = format!("internalTrafficPolicy: Local, {plain}");
    let desired = desired(options(), &(service(&local) + &slice(&["1 n1 zone:b", "1 n2 zone:a"])));
    assert_eq!(short(&desired.services, POD, VIP), "L 1.1", "Local knows no hints");
}

/// Scenarios 20 and 21.
#[test]
fn source_ranges() {
    let at = |ranges: &str, client: &str, destination: &str| {
        let yaml = balanced(&format!(", loadBalancerSourceRanges: [{ranges}]")) + &slice(&["1 n2"]);
        short(&desired(options(), &yaml).services, client, destination)
    };
    let range = "' 198.51.100.0/24 '";
    assert_eq!(at(range, OUTSIDE, BALANCER), "2.1 m");
    assert_eq!(at(range, "198.51.101.1", BALANCER), "drop");
    assert_eq!(at(range, POD, BALANCER), "drop");
    assert_eq!(at(range, "198.51.101.1", NODE_PORT), "2.1 m", "node ports are not guarded");
    assert_eq!(at(range, "198.51.101.1", VIP), "2.1 m", "nor are cluster IPs");
    assert_eq!(at(range, "203.0.113.1", BALANCER), "drop", "the node is not in the ranges");
    assert_eq!(
        at("192.168.50.0/24", "203.0.113.1", BALANCER),
        "2.1 m",
        "the node comes with the VIP's address"
    );
    assert_eq!(at("everyone", OUTSIDE, BALANCER), "drop", "what is no network lets nobody in");
    assert_eq!(at("'fd00::/8'", OUTSIDE, BALANCER), "2.1 m", "ranges of the other family");
}

/// Scenarios 15, 17 to 19, 25 to 27 and what is none of the Services' business.
#[test]
fn which_addresses() {
    let up = slice(&["1 n2"]);
    let at = |options: NodeOptions, service: &str, destination: &str| {
        short(&desired(options, &format!("{service}{up}")).services, OUTSIDE, destination)
    };
    let cluster = service(&format!("clusterIP: 10.96.0.1, {PORT}"));
    assert_eq!(at(options(), &cluster, "10.96.0.1:81"), "reject", "a port that nobody has");
    assert_eq!(at(options(), &cluster, "10.96.0.2:80"), "drop", "an address that nobody has");
    assert_eq!(at(options(), &cluster, NODE_PORT), "pass", "type ClusterIP has no node ports");
    let node_port = service(&format!("type: NodePort, clusterIP: 10.96.0.1, {PORT}"));
    assert_eq!(at(options(), &node_port, NODE_PORT), "2.1 m");
    assert_eq!(at(options(), &node_port, "192.168.50.1:30081"), "pass");
    assert_eq!(at(options(), &balanced(""), BALANCER), "2.1 m");
    let proxied = balanced("").replace("{ip: 203.0.113.1}", "{ip: 203.0.113.1, ipMode: Proxy}");
    assert_eq!(at(options(), &proxied, BALANCER), "pass", "its packets are for the load balancer");
    let named = balanced("").replace("{ip: 203.0.113.1}", "{hostname: lb.example}");
    assert_eq!(at(options(), &named, BALANCER), "pass");
    let not_yet = balanced("").replace("type: LoadBalancer", "type: NodePort");
    assert_eq!(at(options(), &not_yet, BALANCER), "pass", "a status of an earlier type");
    let external = service(&format!("clusterIP: 10.96.0.1, externalIPs: [203.0.113.9], {PORT}"));
    let enabled = NodeOptions { external_ips: true, ..options() };
    assert_eq!(at(options(), &external, "203.0.113.9:80"), "pass");
    assert_eq!(at(enabled, &external, "203.0.113.9:80"), "2.1 m");
    for skipped in [
        service(&format!("clusterIP: None, {PORT}")),
        service(&format!("type: ExternalName, externalName: x.example, clusterIP: 10.96.0.1, {PORT}")),
        labelled("service.kubernetes.io/headless: ''", &format!("clusterIP: 10.96.0.1, {PORT}")),
        labelled("service.kubernetes.io/service-proxy-name: other", &format!("clusterIP: 10.96.0.1, {PORT}")),
        service(PORT),
    ] {
        assert_eq!(desired(options(), &format!("{skipped}{up}")).services.services.len(), 0, "{skipped}");
    }
    let other =
        labelled("service.kubernetes.io/service-proxy-name: other", &format!("clusterIP: 10.96.0.1, {PORT}"));
    let named = NodeOptions { proxy_name: Some("other".into()), ..options() };
    assert_eq!(at(named.clone(), &other, VIP), "2.1 m");
    assert_eq!(at(named, &cluster, VIP), "drop", "one without the label is another proxy's");
}

/// Scenarios 12 and 13.
#[test]
fn node_port_addresses() {
    let yaml = service(&format!("type: NodePort, clusterIPs: [10.96.0.1, 'fd00:96::1'], {PORT}"))
        + &slice(&["1 n2"]);
    let own = ["192.168.50.1", "203.0.113.10", "127.0.0.1", "fd00::1", "::1"];
    let serving = |node_ports: NodePorts, on_loopback| {
        let options = NodeOptions {
            addresses: own.iter().map(|one| one.parse().unwrap()).collect(),
            node_ports,
            node_ports_on_loopback: on_loopback,
            ..options()
        };
        let table = desired(options, &yaml).services;
        let serves = |one: &&&str| {
            let destination = SocketAddr::new(one.parse().unwrap(), 30080);
            table.find(destination, Protocol::Tcp).is_some()
        };
        own.iter().filter(serves).copied().collect::<Vec<_>>().join(" ")
    };
    let networks = |networks: &[&str]| {
        NodePorts::Networks(networks.iter().map(|network| network.parse().unwrap()).collect())
    };
    assert_eq!(serving(NodePorts::Primary, false), "192.168.50.1 fd00::1");
    assert_eq!(serving(networks(&[]), false), "192.168.50.1 203.0.113.10 fd00::1");
    assert_eq!(
        serving(networks(&["203.0.113.0/24"]), false),
        "203.0.113.10 fd00::1",
        "no network of IPv6: all"
    );
    assert_eq!(serving(networks(&["203.0.113.0/24", "fd01::/64"]), false), "203.0.113.10");
    assert_eq!(serving(NodePorts::Primary, true), "192.168.50.1 127.0.0.1 fd00::1 ::1");
}

/// Scenario 68 and 2: each family and protocol by itself.
#[test]
fn families_and_protocols() {
    let yaml = "
{apiVersion: v1, kind: Service, metadata: {name: s}, spec: {clusterIPs: [10.96.0.1, 'fd00:96::1'],
 ports: [{name: dns, port: 80}, {name: dns-udp, port: 80, protocol: UDP}]}}
---
{apiVersion: discovery.k8s.io/v1, kind: EndpointSlice, addressType: IPv4,
 metadata: {name: four, labels: {kubernetes.io/service-name: s}},
 ports: [{name: dns, port: 8080}, {name: dns-udp, port: 8053, protocol: UDP}],
 endpoints: [{addresses: [10.1.2.1]}]}
---
{apiVersion: discovery.k8s.io/v1, kind: EndpointSlice, addressType: FQDN,
 metadata: {name: none, labels: {kubernetes.io/service-name: s}},
 ports: [{name: dns, port: 8080}], endpoints: [{addresses: [x.example]}]}
";
    let desired = desired(options(), yaml);
    assert_eq!(short(&desired.services, POD, "10.96.0.1:80"), "2.1");
    assert_eq!(
        short(&desired.services, "fd00:1::9", "[fd00:96::1]:80"),
        "reject",
        "no endpoint of the family"
    );
    let client = desired.services.node.client(POD.parse().unwrap());
    let verdict = desired.services.verdict(client, "10.96.0.1:80".parse().unwrap(), Protocol::Udp);
    assert_eq!(verdict.to_string(), "default/s:dns-udp/udp+ipv4 cluster 10.1.2.1:8053");
    assert_eq!(desired.services.services.len(), 4);
}

#[test]
fn affinity_and_algorithms() {
    let made = |more: &str, annotations: &str| {
        let yaml = service(&format!("clusterIP: 10.96.0.1, {PORT}{more}"))
            .replace("labels: {}", &format!("annotations: {{{annotations}}}"));
        let desired = desired(options(), &yaml);
        let service = desired.services.services.values().next().unwrap().clone();
        let notices: Vec<String> =
            desired.statuses.values().flat_map(|all| all.iter()).map(ToString::to_string).collect();
        (service.affinity, service.algorithm, notices)
    };
    let algorithm = |name: &str| made("", &format!("lockgate.io/service-algorithm: {name}")).1;
    assert_eq!(made("", "").0, None);
    assert_eq!(made(", sessionAffinity: None", "").0, None);
    assert_eq!(made(", sessionAffinity: ClientIP", "").0, Some(10_800));
    let seconds = |seconds: &str| {
        let config = format!(
            ", sessionAffinity: ClientIP, sessionAffinityConfig: {{clientIP: {{timeoutSeconds: {seconds}}}}}"
        );
        made(&config, "").0
    };
    assert_eq!((seconds("3"), seconds("86400")), (Some(3), Some(86_400)));
    assert_eq!((seconds("0"), seconds("86401")), (Some(10_800), Some(10_800)), "out of range");
    use lockgate_ebpf::table::Algorithm::*;
    let names = ["random", "rr", "wrr", "lc", "sh", "mh", "round_robin", "least_connections"];
    assert_eq!(
        names.map(algorithm),
        [Random, RoundRobin, Weighted, LeastConnections, SourceHash, Maglev, RoundRobin, LeastConnections]
    );
    let (_, algorithm, notices) = made("", "lockgate.io/service-algorithm: fastest");
    assert_eq!(algorithm, Random);
    assert!(notices[0].contains("\"fastest\" is unknown"), "{notices:?}");
}

/// Scenarios 47 and 48.
#[test]
fn health_checks() {
    let checks = |more: &str, endpoints: &[&str]| {
        let yaml = balanced(more) + &slice(endpoints);
        let table = desired(options(), &yaml).services;
        let check = |(port, check): (&u16, &Arc<HealthCheck>)| (*port, check.local_endpoints);
        table.health_checks.iter().map(check).collect::<Vec<_>>()
    };
    let local = ", externalTrafficPolicy: Local, healthCheckNodePort: 32000";
    assert_eq!(checks(local, &["1 n1", "2 n1", "1 n2", "3 n1 unready"]), [(32000, 2)]);
    assert_eq!(checks(local, &["1 n1 terminating", "1 n2"]), [(32000, 0)], "served, but not for long");
    assert_eq!(checks(", healthCheckNodePort: 32000", &["1 n1"]), [], "policy Cluster has no check");
    assert_eq!(checks(", externalTrafficPolicy: Local", &["1 n1"]), [], "no port, no server");
}

/// The oldest Service has what two want; the other one is told.
#[test]
fn what_two_services_want() {
    let of = |name: &str, created: &str, spec: &str| {
        format!(
            "{{apiVersion: v1, kind: Service, metadata: {{name: {name}, creationTimestamp: '{created}'}},
              spec: {{{spec}}}}}\n---\n"
        )
    };
    let (old, new) = ("2026-01-01T00:00:00Z", "2026-01-02T00:00:00Z");
    let spec = format!("type: NodePort, clusterIP: 10.96.0.1, {PORT}");
    let both = of("b", old, &spec) + &of("a", new, &spec.replace("10.96.0.1", "10.96.0.2"));
    let desired = desired(options(), &both);
    let owner = |table: &ServiceTable| {
        let (_, target) = table.find(NODE_PORT.parse().unwrap(), Protocol::Tcp).unwrap();
        target.service.to_string()
    };
    assert_eq!(owner(&desired.services), "default/b:80/tcp+ipv4");
    let told: Vec<String> = desired
        .statuses
        .iter()
        .flat_map(|(object, notices)| notices.iter().map(move |notice| format!("{object}: {notice}")))
        .collect();
    assert_eq!(
        told,
        [
            "Service default/a: .spec.ports[0].nodePort: node port 30080/tcp is that of the older Service default/b: \
          not served for this one; choose another, or remove one of the two"
        ]
    );
    // The younger one takes over when the older one goes.
    let options = Options { node: Some(options()), ..Options::default() };
    let mut translator = Translator::new(options);
    let mut store = store(&format!("{NODES}{both}"));
    translator.translate(&store);
    store.remove(&Key::new("default", "b").reference(crate::objects::Kind::Service));
    let after = translator.translate(&store);
    assert_eq!(owner(&after.services), "default/a:80/tcp+ipv4");
    assert!(after.statuses.is_empty());
}

/// Scenarios 28 and 80: addresses of Services and of the node change.
#[test]
fn addresses_that_change() {
    let yaml = service(&format!("type: NodePort, clusterIP: 10.96.0.1, {PORT}")) + &slice(&["1 n2"]);
    let mut translator = Translator::new(Options { node: Some(options()), ..Options::default() });
    let mut store = store(&format!("{NODES}{yaml}"));
    let before = translator.translate(&store);
    assert_eq!(short(&before.services, OUTSIDE, NODE_PORT), "2.1 m");
    translator.set_node_addresses(vec!["192.168.50.7".parse::<IpAddr>().unwrap()]);
    let after = translator.translate(&store);
    assert_eq!(short(&after.services, OUTSIDE, NODE_PORT), "pass", "no longer an address of the node");
    let Some(Object::Service(mut service)) =
        store.get(&Key::new("default", "s").reference(crate::objects::Kind::Service))
    else {
        panic!("no Service");
    };
    service.addresses = vec!["10.96.0.5".parse().unwrap()];
    store.apply(Object::Service(service));
    let after = translator.translate(&store);
    assert_eq!(short(&after.services, POD, VIP), "drop");
    assert_eq!(short(&after.services, POD, "10.96.0.5:80"), "2.1");
    assert_eq!(after.services.cluster_ips.len(), 1);
}
