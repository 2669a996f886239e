use super::*;
use crate::objects::{Object, Parsed, parse};

/// Selects the endpoints of the first port of Service `a` in `yaml`.
fn selected(yaml: &str) -> String {
    let mut store = Store::default();
    let mut index = Index::default();
    for document in serde_yaml::Deserializer::from_str(yaml) {
        for parsed in parse(serde::Deserialize::deserialize(document).unwrap()) {
            match parsed {
                Parsed::Object(object, notices) if notices.is_empty() => store.apply(object),
                other => panic!("{other:?}"),
            }
        }
    }
    for slice in store.slices.values() {
        index.slice(slice, true);
    }
    for service in store.services.values() {
        index.service(service, true);
    }
    for pod in store.pods.values() {
        index.pod(pod, true, &store);
    }
    let reference = Key::new("default", "a").reference(crate::objects::Kind::Service);
    let Some(Object::Service(service)) = store.get(&reference) else { panic!("no Service a") };
    let selected = index.select(&store, &service, &service.ports[0]);
    let text: Vec<String> = selected
        .endpoints
        .iter()
        .map(|(address, zone)| match zone {
            Some(zone) => format!("{address}@{zone}"),
            None => address.to_string(),
        })
        .collect();
    text.join(" ")
}

const SERVICE: &str = "
{apiVersion: v1, kind: Service, metadata: {name: a}, spec: {ports: [{name: http, port: 80}]}}
---
{apiVersion: v1, kind: Node, metadata: {name: n, labels: {topology.kubernetes.io/zone: west}}}
---
";

fn slice(name: &str, port: &str, endpoints: &str) -> String {
    format!(
        "{{apiVersion: discovery.k8s.io/v1, kind: EndpointSlice, addressType: IPv4,
          metadata: {{name: {name}, labels: {{kubernetes.io/service-name: a}}}},
          ports: [{{{port}}}], endpoints: [{endpoints}]}}\n---\n"
    )
}

#[test]
fn slices() {
    let up = "{addresses: [10.0.0.1]}";
    let cases = [
        ("name: http, port: 8080", up, "10.0.0.1:8080"),
        ("name: other, port: 8080", up, ""),
        ("name: http, port: 8080, protocol: UDP", up, ""),
        ("name: http", up, ""),
        ("name: http, port: 1", "{addresses: [10.0.0.1], conditions: {ready: false}}", ""),
        ("name: http, port: 1", "{addresses: [10.0.0.1], conditions: {ready: null}}", "10.0.0.1:1"),
        ("name: http, port: 1", "{addresses: [10.0.0.1, 10.0.0.2]}", "10.0.0.1:1"),
        ("name: http, port: 1", "{addresses: [10.0.0.1], zone: east, nodeName: n}", "10.0.0.1:1@east"),
        ("name: http, port: 1", "{addresses: [10.0.0.1], nodeName: n}", "10.0.0.1:1@west"),
        ("name: http, port: 1", "{addresses: []}", ""),
        (
            "name: http, port: 1",
            "{addresses: [10.0.0.1], conditions: {ready: false, serving: true, terminating: true}},
             {addresses: [10.0.0.2], conditions: {ready: false, serving: false, terminating: true}}",
            "10.0.0.1:1",
        ),
        (
            "name: http, port: 1",
            "{addresses: [10.0.0.1], conditions: {ready: false, serving: true, terminating: true}},
             {addresses: [10.0.0.2]}",
            "10.0.0.2:1",
        ),
    ];
    for (port, endpoints, expected) in cases {
        let yaml = format!("{SERVICE}{}", slice("s", port, endpoints));
        assert_eq!(selected(&yaml), expected, "{port} {endpoints}");
    }
}

#[test]
fn slices_merge_and_an_address_counts_once() {
    let one =
        slice("one", "name: http, port: 1", "{addresses: [10.0.0.2]}, {addresses: [10.0.0.1], zone: z}");
    let two = slice("two", "name: http, port: 1", "{addresses: [10.0.0.1]}, {addresses: [10.0.0.3]}");
    assert_eq!(selected(&format!("{SERVICE}{one}{two}")), "10.0.0.1:1@z 10.0.0.2:1 10.0.0.3:1");
}

fn with_pods(service: &str, pods: &[&str]) -> String {
    let mut yaml =
        format!("{{apiVersion: v1, kind: Service, metadata: {{name: a}}, spec: {{{service}}}}}\n---\n");
    for (index, pod) in pods.iter().enumerate() {
        let (metadata, rest) = pod.split_once('|').unwrap();
        yaml += &format!(
            "{{apiVersion: v1, kind: Pod, metadata: {{name: p{index}, labels: {{app: a, i: '{index}'}}{metadata}}}, {rest}}}\n---\n"
        );
    }
    yaml
}

#[test]
fn pods() {
    let plain = "selector: {app: a}, ports: [{port: 80}]";
    let up = "|status: {podIP: 10.0.0.1}";
    let ready = "|status: {podIP: 10.0.0.1, phase: Running, conditions: [{type: Ready, status: 'True'}]}";
    let unready = "|status: {podIP: 10.0.0.1, phase: Running, conditions: [{type: Ready, status: 'False'}]}";
    let gone = ", deletionTimestamp: '2026-01-01T00:00:00Z'";
    let leaving = format!("{gone}{ready}");
    let named = "|spec: {containers: [{name: c, ports: [{name: web, containerPort: 81}]}]}, status: {podIP: 10.0.0.2}";
    let cases: [(&str, &[&str], &str); 15] = [
        (plain, &[up], "10.0.0.1:80"),
        (plain, &[ready], "10.0.0.1:80"),
        (plain, &[unready], ""),
        (plain, &["|status: {phase: Running}"], ""),
        (plain, &["|status: {podIP: 10.0.0.1, phase: Pending}"], ""),
        (plain, &["|status: {podIP: 10.0.0.1, phase: Succeeded}"], ""),
        (plain, &["|status: {podIP: 10.0.0.1, conditions: [{type: Initialized, status: 'True'}]}"], ""),
        (plain, &[&leaving], "10.0.0.1:80"),
        (plain, &[&leaving, "|status: {podIP: 10.0.0.2}"], "10.0.0.2:80"),
        (
            "selector: {app: a}, ports: [{port: 80}], publishNotReadyAddresses: true",
            &[unready],
            "10.0.0.1:80",
        ),
        (
            "selector: {app: a, i: '1'}, ports: [{port: 80}]",
            &[up, "|status: {podIP: 10.0.0.2}"],
            "10.0.0.2:80",
        ),
        ("selector: {app: a, i: '9'}, ports: [{port: 80}]", &[up], ""),
        ("selector: {app: a}, ports: [{port: 80, targetPort: 8080}]", &[up], "10.0.0.1:8080"),
        ("selector: {app: a}, ports: [{port: 80, targetPort: web}]", &[up, named], "10.0.0.2:81"),
        ("ports: [{port: 80}]", &[up], ""),
    ];
    for (service, pods, expected) in cases {
        assert_eq!(selected(&with_pods(service, pods)), expected, "{service} {pods:?}");
    }
}

#[test]
fn address_families_follow_the_service() {
    let pod = "|status: {podIP: '10.0.0.1', podIPs: [{ip: 10.0.0.1}, {ip: 'fd00::1'}]}";
    let cases = [
        ("", "10.0.0.1:80"),
        (", clusterIP: 10.96.0.1", "10.0.0.1:80"),
        (", clusterIP: 'fd01::1'", "[fd00::1]:80"),
        (", clusterIP: 10.96.0.1, clusterIPs: [10.96.0.1, 'fd01::1']", "10.0.0.1:80 [fd00::1]:80"),
        (", clusterIP: None", "10.0.0.1:80"),
    ];
    for (address, expected) in cases {
        let service = format!("selector: {{app: a}}, ports: [{{port: 80}}]{address}");
        assert_eq!(selected(&with_pods(&service, &[pod])), expected, "{address}");
    }
}

#[test]
fn one_slice_switches_pods_off_and_external_names_have_no_endpoints() {
    let pods = with_pods("selector: {app: a}, ports: [{port: 80}]", &["|status: {podIP: 10.0.0.1}"]);
    assert_eq!(selected(&format!("{pods}{}", slice("s", "name: '', port: 1", ""))), "");
    let external = "type: ExternalName, externalName: x.example, selector: {app: a}, ports: [{port: 80}]";
    assert_eq!(selected(&with_pods(external, &["|status: {podIP: 10.0.0.1}"])), "");
}
