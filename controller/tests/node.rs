//! `lockgate node` as an operator runs it, with its maps in memory.
#![allow(clippy::unwrap_used)] // a test fails by panicking

use std::fs;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use serde_json::Value;
use tempfile::TempDir;

fn service(check: u16) -> String {
    format!(
        "{{apiVersion: v1, kind: Node, metadata: {{name: n1}},
  status: {{addresses: [{{type: InternalIP, address: 127.0.0.1}}]}}}}
---
{{apiVersion: v1, kind: Service, metadata: {{name: web}}, spec: {{type: LoadBalancer, clusterIP: 10.96.0.1,
  externalTrafficPolicy: Local, healthCheckNodePort: {check}, ports: [{{port: 80, nodePort: 30080}}]}}}}
---
"
    )
}

fn slice(last: &[u8]) -> String {
    let endpoints: Vec<String> =
        last.iter().map(|last| format!("{{addresses: [10.1.1.{last}], nodeName: n1}}")).collect();
    format!(
        "{{apiVersion: discovery.k8s.io/v1, kind: EndpointSlice, addressType: IPv4,
  metadata: {{name: web-1, labels: {{kubernetes.io/service-name: web}},
             annotations: {{endpoints.kubernetes.io/last-change-trigger-time: '2026-01-01T00:00:00Z'}}}},
  ports: [{{port: 8080}}], endpoints: [{}]}}\n",
        endpoints.join(", ")
    )
}

struct Node {
    child: Child,
    health: SocketAddr,
    metrics: SocketAddr,
}

impl Node {
    fn start(folder: &TempDir) -> Node {
        let mut child = Command::new(env!("CARGO_BIN_EXE_lockgate"))
            .args(["node", "--dry-run", "--hostname-override", "n1", "--cluster-cidr", "10.1.0.0/16"])
            .args(["--healthz-bind-address", "127.0.0.1:0", "--metrics-bind-address", "127.0.0.1:0"])
            // The loopback address is the node's only one that a test can rely on.
            .args(["--nodeport-addresses", "127.0.0.0/8"])
            .arg("--manifests")
            .arg(folder.path())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let mut lines = BufReader::new(child.stderr.take().unwrap()).lines();
        let mut heard = String::new();
        let mut address = |wanted: &str| {
            for line in lines.by_ref().map_while(Result::ok) {
                heard += &format!("{line}\n");
                let mut words = line.split_whitespace();
                if let (Some(first), Some(Ok(address))) = (words.next(), words.next().map(str::parse))
                    && first == wanted
                {
                    return address;
                }
            }
            panic!("no {wanted} in:\n{heard}");
        };
        let (health, metrics) = (address("health"), address("metrics"));
        // Nobody reads the rest but the kernel's buffer, which must not fill.
        std::thread::spawn(move || lines.map_while(Result::ok).for_each(|line| eprintln!("{line}")));
        Node { child, health, metrics }
    }

    fn services(&self, query: &str) -> Value {
        let (status, body) = get(self.metrics, &format!("/debug/services{query}")).unwrap();
        assert_eq!(status, 200, "{body}");
        serde_json::from_str(&body).unwrap()
    }
}

impl Drop for Node {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn get(address: SocketAddr, path: &str) -> std::io::Result<(u16, String)> {
    let mut stream = TcpStream::connect(address)?;
    stream.set_read_timeout(Some(Duration::from_secs(30)))?;
    stream.write_all(format!("GET {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n").as_bytes())?;
    let mut text = String::new();
    stream.read_to_string(&mut text)?;
    let (head, body) = text.split_once("\r\n\r\n").unwrap();
    Ok((head.split(' ').nth(1).unwrap().parse().unwrap(), body.to_owned()))
}

/// Asks until the answer is as expected.
fn eventually<T: std::fmt::Debug>(mut ask: impl FnMut() -> T, expected: impl Fn(&T) -> bool) -> T {
    for _ in 0..3000 {
        let found = ask();
        if expected(&found) {
            return found;
        }
        std::thread::sleep(Duration::from_millis(10));
    }
    panic!("never as expected: {:?}", ask());
}

#[test]
fn a_dry_run_shows_what_would_be_live() {
    let folder = TempDir::new().unwrap();
    let free = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap().local_addr().unwrap();
    fs::write(folder.path().join("service.yaml"), service(free.port())).unwrap();
    fs::write(folder.path().join("slice.yaml"), slice(&[1, 2])).unwrap();
    let node = Node::start(&folder);

    let shown = node.services("");
    assert_eq!(shown["difference"], serde_json::json!([]), "{shown}");
    assert_eq!(shown["desired"]["frontends"]["10.96.0.1:80/tcp"]["role"], "cluster_ip", "{shown}");
    let set = &shown["live"]["frontends"]["10.96.0.1:80/tcp"]["cluster"]["endpoints"];
    assert_eq!(*set, serde_json::json!(["10.1.1.1:8080", "10.1.1.2:8080"]), "{shown}");
    assert_eq!(node.services("?service=default/web")["live"]["cluster_ips"], serde_json::json!([]));
    assert_eq!(get(node.metrics, "/debug/services?service=default/other").unwrap().0, 404);

    let (status, text) = get(node.metrics, "/debug/explain?address=10.96.0.1:80&client=10.1.1.9").unwrap();
    assert_eq!(status, 200);
    assert!(text.contains("forwarded to one of 2 endpoints"), "{text}");
    assert_eq!(get(node.metrics, "/debug/explain?address=nonsense&client=10.1.1.9").unwrap().0, 400);

    assert_eq!(get(node.health, "/healthz").unwrap().0, 200);
    assert_eq!(get(node.health, "/livez").unwrap().0, 200);
    let check = |weight: &str| {
        let weight = format!("\"localEndpoints\": {weight},");
        eventually(|| get(free, "/"), |found| found.as_ref().is_ok_and(|(_, body)| body.contains(&weight)))
    };
    assert_eq!(check("2").unwrap().0, 200);

    // A change of the folder is live, and measured.
    fs::write(folder.path().join("slice.yaml"), slice(&[3])).unwrap();
    assert_eq!(check("1").unwrap().0, 200);
    let set = node.services("")["live"]["frontends"]["10.96.0.1:80/tcp"]["cluster"]["endpoints"].clone();
    assert_eq!(set, serde_json::json!(["10.1.1.3:8080"]));
    let metrics = get(node.metrics, "/metrics").unwrap().1;
    for line in [
        "kubeproxy_sync_proxy_rules_endpoint_changes_total 2",
        "kubeproxy_sync_proxy_rules_endpoint_changes_pending 0",
        "kubeproxy_sync_proxy_rules_service_changes_total 1",
        "kubeproxy_network_programming_duration_seconds_count 1",
        "kubeproxy_sync_full_proxy_rules_duration_seconds_count 1",
        "kubeproxy_proxy_healthz_total{code=\"200\"} 1",
        "lockgate_service_not_live 0",
    ] {
        assert!(metrics.lines().any(|one| one == line), "{line} is not in\n{metrics}");
    }

    // None left: load balancers look elsewhere.
    fs::write(folder.path().join("slice.yaml"), slice(&[])).unwrap();
    assert_eq!(check("0").unwrap().0, 503);
    // The node is about to go.
    let leaving = service(free.port()).replace(
        "{name: n1},",
        "{name: n1}, spec: {taints: [{key: ToBeDeletedByClusterAutoscaler, effect: NoSchedule}]},",
    );
    fs::write(folder.path().join("service.yaml"), leaving).unwrap();
    eventually(|| get(node.health, "/healthz").unwrap().0, |status| *status == 503);
    assert_eq!(get(node.health, "/livez").unwrap().0, 200);
    fs::remove_file(folder.path().join("service.yaml")).unwrap();
    eventually(|| get(free, "/").is_err(), |closed| *closed);
    assert_eq!(node.services("")["live"]["frontends"], serde_json::json!({}));
}

#[test]
fn explain_answers_from_a_folder_and_from_an_agent() {
    let folder = TempDir::new().unwrap();
    fs::write(folder.path().join("all.yaml"), service(32000) + "---\n" + &slice(&[1])).unwrap();
    let node = Node::start(&folder);
    let explain = |more: &[&str]| {
        let output = Command::new(env!("CARGO_BIN_EXE_lockgate"))
            .args(["explain", "10.96.0.1:80/tcp", "--client", "10.1.1.9"])
            .args(more)
            .output()
            .unwrap();
        let text = String::from_utf8(output.stdout).unwrap() + &String::from_utf8(output.stderr).unwrap();
        (output.status.code(), text)
    };
    let folder = folder.path().to_str().unwrap();
    let (status, text) =
        explain(&["--manifests", folder, "--hostname-override", "n1", "--cluster-cidr", "10.1.0.0/16"]);
    assert_eq!(status, Some(0), "{text}");
    assert!(text.contains("forwarded to one of 1 endpoint\n"), "{text}");
    let (status, asked) = explain(&["--admin", &node.metrics.to_string()]);
    assert_eq!((status, asked), (Some(0), text), "the agent says the same");
}

#[test]
fn a_configuration_that_is_none() {
    let folder = TempDir::new().unwrap();
    let file = folder.path().join("config");
    fs::write(&file, "kind: Pod\napiVersion: v1\n").unwrap();
    let output = Command::new(env!("CARGO_BIN_EXE_lockgate"))
        .args(["node", "--dry-run", "--manifests"])
        .arg(folder.path())
        .arg("--config")
        .arg(&file)
        .output()
        .unwrap();
    let text = String::from_utf8(output.stderr).unwrap();
    assert!(!output.status.success() && text.contains("not a KubeProxyConfiguration"), "{text}");
}
