use super::*;
use crate::objects::{Parsed, parse};
use crate::translate::{Options, translate};

const OBJECTS: &str = "
{apiVersion: v1, kind: Node, metadata: {name: n1, labels: {topology.kubernetes.io/zone: a}},
 status: {addresses: [{type: InternalIP, address: 192.168.50.1}]}}
---
{apiVersion: v1, kind: Service, metadata: {name: web}, spec: {type: LoadBalancer, clusterIP: 10.96.0.1,
 externalTrafficPolicy: Local, sessionAffinity: ClientIP, loadBalancerSourceRanges: [198.51.100.0/24],
 ports: [{name: http, port: 80, nodePort: 30080}]}, status: {loadBalancer: {ingress: [{ip: 203.0.113.1}]}}}
---
{apiVersion: discovery.k8s.io/v1, kind: EndpointSlice, addressType: IPv4,
 metadata: {name: web-1, labels: {kubernetes.io/service-name: web}}, ports: [{name: http, port: 8080}],
 endpoints: [
  {addresses: [10.1.1.1], nodeName: n1, conditions: {ready: false, serving: true, terminating: true}},
  {addresses: [10.1.2.1], nodeName: n2, hints: {forZones: [{name: a}]}},
  {addresses: [10.1.2.2], nodeName: n2, hints: {forZones: [{name: b}]}},
  {addresses: [10.1.2.3], nodeName: n2, conditions: {ready: false}}]}
---
{apiVersion: v1, kind: Service, metadata: {name: empty}, spec: {clusterIP: 10.96.0.2, ports: [{port: 53, protocol: UDP}]}}
";

fn asked(destination: &str, client: &str) -> (bool, String) {
    let mut store = Store::default();
    for document in serde_yaml::Deserializer::from_str(OBJECTS) {
        for parsed in parse(serde::Deserialize::deserialize(document).unwrap()) {
            let Parsed::Object(object, _) = parsed else { panic!("{parsed:?}") };
            store.apply(object);
        }
    }
    let node = NodeOptions {
        name: "n1".into(),
        cluster_networks: vec!["10.1.0.0/16".parse().unwrap()],
        service_networks: vec!["10.96.0.0/16".parse().unwrap()],
        ..NodeOptions::default()
    };
    let desired = translate(&store, &Options { node: Some(node.clone()), ..Options::default() });
    let question = Question::new(destination, client.parse().unwrap()).unwrap();
    let mut text = Text::new(false);
    let served = explain(&mut text, &desired.services, &question, &node, &store);
    (served, text.finish())
}

#[test]
fn a_pod_asks_a_cluster_ip() {
    let (served, text) = asked("10.96.0.1:80", "10.1.1.9");
    assert!(served);
    assert_eq!(
        text.trim_end(),
        "10.96.0.1:80/tcp for 10.1.1.9, on node n1

  frontend    a cluster IP of default/web:http/tcp+ipv4
  client      a Pod: in 10.1.0.0/16
  policy      internalTrafficPolicy Cluster: endpoints of every node
  verdict     forwarded to one of 1 endpoint
              10.1.2.1:8080
  not used    10.1.1.1:8080 terminates while others are ready
              10.1.2.2:8080 is meant for clients in zone b
              10.1.2.3:8080 is not ready
  chosen      each alike, at random
  affinity    the same as before, within 10800s of the last connection
  source      the endpoint sees the client's address, unless it is the client"
    );
}

#[test]
fn others_ask() {
    let cases = [
        // The endpoints here are terminating, and still better than none.
        (
            "192.168.50.1:30080",
            "198.51.100.1",
            true,
            "externalTrafficPolicy Local, from outside: endpoints of this node",
        ),
        (
            "192.168.50.1:30080",
            "198.51.100.1",
            true,
            "10.1.2.1:8080 is on n2, and the traffic policy is Local",
        ),
        (
            "203.0.113.1:80",
            "10.1.1.9",
            false,
            "dropped: the client is in none of the Service's loadBalancerSourceRanges",
        ),
        ("203.0.113.1:80", "10.1.1.9", false, "ranges      198.51.100.0/24"),
        (
            "192.168.50.1:30080",
            "10.1.1.9",
            true,
            "externalTrafficPolicy Local does not bind Pods: endpoints of every node",
        ),
        ("192.168.50.1:30080", "192.168.50.1", true, "source      the endpoint sees an address of this node"),
        ("10.96.0.2:53/udp", "10.1.1.9", false, "rejected: no node has a usable endpoint"),
        ("10.96.0.2:53/tcp", "10.1.1.9", false, "rejected: the cluster IP has no such port"),
        ("10.96.0.9:53", "10.1.1.9", false, "dropped: no Service has this address of the Service network"),
        ("192.0.2.1:53", "10.1.1.9", false, "left alone: it is no Service's address and port on this node"),
    ];
    for (destination, client, served, expected) in cases {
        let (is_served, text) = asked(destination, client);
        assert_eq!(is_served, served, "{text}");
        assert!(text.contains(expected), "{expected:?} is not in:\n{text}");
    }
}

#[test]
fn questions_that_make_no_sense() {
    let client = [10, 1, 1, 9].into();
    for (destination, expected) in
        [("10.96.0.1", "is no address"), ("10.96.0.1:80/icmp", "is no protocol"), ("", "is no address")]
    {
        let error = Question::new(destination, client).unwrap_err();
        assert!(error.contains(expected), "{error}");
    }
}
