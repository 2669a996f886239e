//! TCP and UDP ports of a folder, as users of ingress-nginx name them, through the whole product.
#![allow(clippy::unwrap_used)] // a test fails by panicking

mod support {
    #![allow(dead_code, unreachable_pub, reason = "every test file uses its own part of this")]
    pub mod binary;
    pub mod clients;
    pub mod gate;
    pub mod manifests;
    pub mod toys;
}

use std::fs;
use std::net::SocketAddr;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use lockgate_controller::admin;
use support::binary::Binary;
use support::clients::PATIENCE;
use support::gate::{self, Gate};
use tempfile::TempDir;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream, UdpSocket};
use tokio::time::timeout;

const FLAGS: [&str; 6] = [
    "--tcp-services-configmap",
    "ingress-nginx/tcp-services",
    "--udp-services-configmap",
    "ingress-nginx/udp-services",
    "--stream-addr",
    "127.0.0.1",
];

/// Says its name, then whatever it is told.
async fn tcp_endpoint(name: &'static str) -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    tokio::spawn(async move {
        while let Ok((mut stream, _)) = listener.accept().await {
            tokio::spawn(async move {
                stream.write_all(name.as_bytes()).await.unwrap();
                let (mut from, mut to) = stream.split();
                let _ = tokio::io::copy(&mut from, &mut to).await;
            });
        }
    });
    address
}

/// Answers each datagram with its name and what it was told.
async fn udp_endpoint(name: &'static str) -> SocketAddr {
    let socket = UdpSocket::bind("127.0.0.1:0").await.unwrap();
    let address = socket.local_addr().unwrap();
    tokio::spawn(async move {
        let mut datagram = [0; 1500];
        while let Ok((length, from)) = socket.recv_from(&mut datagram).await {
            let answer = [name.as_bytes(), &datagram[..length]].concat();
            socket.send_to(&answer, from).await.unwrap();
        }
    });
    address
}

/// A port that was free a moment ago.
async fn free_port() -> u16 {
    TcpListener::bind("127.0.0.1:0").await.unwrap().local_addr().unwrap().port()
}

fn service(name: &str, protocol: &str, endpoint: SocketAddr) -> String {
    format!(
        "apiVersion: v1\nkind: Service\nmetadata: {{name: {name}, namespace: shop}}\n\
         spec: {{ports: [{{name: main, port: 1000, protocol: {protocol}}}]}}\n---\n\
         apiVersion: discovery.k8s.io/v1\nkind: EndpointSlice\n\
         metadata: {{name: {name}-1, namespace: shop, labels: {{kubernetes.io/service-name: {name}}}}}\n\
         addressType: IPv4\nports: [{{name: main, port: {}, protocol: {protocol}}}]\n\
         endpoints: [{{addresses: [\"127.0.0.1\"]}}]\n---\n",
        endpoint.port()
    )
}

fn config_map(name: &str, ports: &[(u16, &str)]) -> String {
    let data: String = ports.iter().map(|(port, to)| format!("  {port}: \"{to}\"\n")).collect();
    let data = if data.is_empty() { "data: {}\n".to_owned() } else { format!("data:\n{data}") };
    format!(
        "apiVersion: v1\nkind: ConfigMap\nmetadata: {{name: {name}, namespace: ingress-nginx}}\n{data}---\n"
    )
}

/// Replaces a file at once, as editors do.
fn write(folder: &Path, file: &str, text: &str) {
    let new = folder.join(format!(".{file}.new"));
    fs::write(&new, text).unwrap();
    fs::rename(new, folder.join(file)).unwrap();
}

/// Waits until the admin endpoint says that `listener` is as `expected`.
async fn state(gate: &Gate, listener: &str, expected: Option<&str>) {
    let asking = async {
        loop {
            let (_, text) = admin::get(gate.admin, "/debug/listeners").await.unwrap();
            let line = text.lines().find(|line| line.contains(listener));
            match (line, expected) {
                (None, None) => return,
                (Some(line), Some(expected)) if line.contains(expected) => return,
                _ => tokio::time::sleep(Duration::from_millis(5)).await,
            }
        }
    };
    timeout(PATIENCE, asking).await.unwrap_or_else(|_| panic!("{listener} is not {expected:?}"));
}

/// What is said first on a new connection.
async fn greeting(port: u16) -> String {
    let mut client = TcpStream::connect(("127.0.0.1", port)).await.unwrap();
    let mut greeting = [0; 100];
    let read = timeout(PATIENCE, client.read(&mut greeting)).await.unwrap().unwrap();
    String::from_utf8(greeting[..read].to_vec()).unwrap()
}

async fn ask(port: u16, text: &str) -> String {
    let client = UdpSocket::bind("127.0.0.1:0").await.unwrap();
    client.connect(("127.0.0.1", port)).await.unwrap();
    client.send(text.as_bytes()).await.unwrap();
    let mut answer = [0; 1500];
    let read = timeout(PATIENCE, client.recv(&mut answer)).await.unwrap().unwrap();
    String::from_utf8(answer[..read].to_vec()).unwrap()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn ports_follow_the_config_maps_and_connections_outlive_them() {
    let folder = TempDir::new().unwrap();
    let (db, cache, dns) =
        (tcp_endpoint("db").await, tcp_endpoint("cache").await, udp_endpoint("dns:").await);
    let services = [service("db", "TCP", db), service("cache", "TCP", cache), service("dns", "UDP", dns)];
    write(folder.path(), "services.yaml", &services.concat());
    let (first, second) = (free_port().await, free_port().await);
    write(folder.path(), "tcp.yaml", &config_map("tcp-services", &[(first, "shop/db:1000")]));
    write(folder.path(), "udp.yaml", &config_map("udp-services", &[(first, "shop/dns:main")]));
    let mut gate = Gate::open(folder.path(), &FLAGS);
    let tcp = |port: u16| format!("tcp/127.0.0.1:{port}");

    state(&gate, &tcp(first), Some("open at")).await;
    assert_eq!(greeting(first).await, "db");
    assert_eq!(ask(first, "shop.example?").await, "dns:shop.example?");
    let mut early = TcpStream::connect(("127.0.0.1", first)).await.unwrap();
    early.read_exact(&mut [0; 2]).await.unwrap();

    // One port more, the other to another Service.
    let ports = [(first, "shop/cache:main"), (second, "shop/db:main:PROXY")];
    write(folder.path(), "tcp.yaml", &config_map("tcp-services", &ports));
    state(&gate, &tcp(second), Some("open at")).await;
    assert_eq!(greeting(first).await, "cache");
    let mut behind = TcpStream::connect(("127.0.0.1", second)).await.unwrap();
    behind.write_all(b"PROXY TCP4 192.0.2.1 192.0.2.2 1 2\r\nhello").await.unwrap();
    let mut said = [0; 7];
    timeout(PATIENCE, behind.read_exact(&mut said)).await.unwrap().unwrap();
    assert_eq!(&said, b"dbhello");

    // Mistakes close their port and no other, and are told.
    let ports = [(first, "shop/nobody:1000"), (second, "shop/db:main")];
    write(folder.path(), "tcp.yaml", &config_map("tcp-services", &ports));
    state(&gate, &tcp(first), None).await;
    let wanted = format!("ConfigMap ingress-nginx/tcp-services: Error .data[\"{first}\"]");
    gate.until(|seen| seen.notices.iter().any(|line| line.starts_with(&wanted))).await;
    assert_eq!(greeting(second).await, "db");
    assert!(TcpStream::connect(("127.0.0.1", first)).await.is_err(), "the port is still open");
    assert_eq!(ask(first, "again?").await, "dns:again?");

    early.write_all(b"still here?").await.unwrap();
    let mut answer = [0; 11];
    timeout(PATIENCE, early.read_exact(&mut answer)).await.unwrap().unwrap();
    assert_eq!(&answer, b"still here?");

    let (_, metrics) = admin::get(gate.admin, "/metrics").await.unwrap();
    let row = format!("lockgate_l4_connections_total{{transport=\"tcp\",address=\"127.0.0.1:{second}\"}} 2");
    assert!(metrics.contains(&row), "{row} is missing");
    let (_, routes) = admin::get(gate.admin, "/debug/routes").await.unwrap();
    assert!(routes.contains(&tcp(second)) && routes.contains("shop/db:main#tcp"), "{routes}");
    drop((early, behind));
    assert!(gate.close());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_port_that_somebody_else_has_is_opened_when_it_is_free() {
    let folder = TempDir::new().unwrap();
    let db = tcp_endpoint("db").await;
    write(folder.path(), "services.yaml", &service("db", "TCP", db));
    let taken = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let (port, other) = (taken.local_addr().unwrap().port(), free_port().await);
    let ports = [(port, "shop/db:1000"), (other, "shop/db:1000")];
    write(
        folder.path(),
        "ports.yaml",
        &[config_map("tcp-services", &ports), config_map("udp-services", &[])].concat(),
    );
    let gate = Gate::open(folder.path(), &FLAGS);
    state(&gate, &format!("tcp/127.0.0.1:{port}"), Some("cannot be opened")).await;
    assert_eq!(greeting(other).await, "db");
    drop(taken);
    state(&gate, &format!("tcp/127.0.0.1:{port}"), Some("open at")).await;
    assert_eq!(greeting(port).await, "db");
    assert!(gate.close());
}

/// Two processes after one another, to more workers and to fewer: every client is answered meanwhile.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_upgrade_hands_the_ports_over_and_loses_nobody() {
    let folder = TempDir::new().unwrap();
    let (db, dns) = (tcp_endpoint("db").await, udp_endpoint("dns:").await);
    let port = free_port().await;
    let manifests = [
        service("db", "TCP", db),
        service("dns", "UDP", dns),
        config_map("tcp-services", &[(port, "shop/db:1000")]),
        config_map("udp-services", &[(port, "shop/dns:1000")]),
    ];
    write(folder.path(), "all.yaml", &manifests.concat());
    let place = TempDir::new().unwrap();
    let socket = place.path().join("upgrade").to_str().unwrap().to_owned();
    let start = |workers: &str| {
        let more = [&FLAGS[..], &["--upgrade-socket", &socket, "--workers", workers]].concat();
        let mut flags = gate::flags(folder.path(), &more);
        // The flags of a test name a number already.
        let first = flags.iter().position(|flag| flag == "--workers").unwrap();
        flags.drain(first..first + 2);
        Binary::run(&flags, "info")
    };
    let mut binary = start("2");
    let mut early = TcpStream::connect(("127.0.0.1", port)).await.unwrap();
    early.read_exact(&mut [0; 2]).await.unwrap();
    let (stop, stopped) = tokio::sync::watch::channel(false);
    let asking: Vec<_> = (0..4)
        .map(|n| {
            let stopped = stopped.clone();
            tokio::spawn(async move {
                let mut answers = 0;
                while !*stopped.borrow() {
                    match n % 2 {
                        0 => assert_eq!(greeting(port).await, "db"),
                        _ => assert_eq!(ask(port, "who?").await, "dns:who?"),
                    }
                    answers += 1;
                }
                answers
            })
        })
        .collect();
    let mut ended = Vec::new();
    for workers in ["3", "1"] {
        tokio::time::sleep(Duration::from_millis(100)).await;
        let new = start(workers);
        tokio::time::sleep(Duration::from_millis(100)).await;
        early.write_all(b"still here?").await.unwrap();
        timeout(PATIENCE, early.read_exact(&mut [0; 11])).await.unwrap().unwrap();
        ended.push(std::mem::replace(&mut binary, new));
    }
    stop.send_replace(true);
    for asking in asking {
        assert!(asking.await.unwrap() > 10);
    }
    drop(early);
    binary.terminate();
    ended.push(binary);
    for binary in ended {
        let (status, said) = tokio::task::spawn_blocking(|| binary.wait()).await.unwrap();
        assert_eq!(status, Some(0), "{said}");
        assert!(said.contains("drained"), "{said}");
    }
}

#[test]
fn check_shows_the_ports_and_what_is_wrong_with_them() {
    let folder = TempDir::new().unwrap();
    let endpoint = SocketAddr::from(([127, 0, 0, 1], 5000));
    let ports = [(9000, "shop/db:1000:PROXY:PROXY"), (9001, "shop/db:2000")];
    let text = [service("db", "TCP", endpoint), config_map("tcp-services", &ports), config_map("other", &[])];
    fs::write(folder.path().join("all.yaml"), text.concat()).unwrap();
    let check = |flags: &[&str]| {
        let mut command = Command::new(env!("CARGO_BIN_EXE_lockgate"));
        let output =
            command.arg("check").arg(folder.path()).args(flags).env("NO_COLOR", "1").output().unwrap();
        (output.status.code(), String::from_utf8(output.stdout).unwrap())
    };
    let (code, out) = check(&["--tcp-services-configmap", "ingress-nginx/tcp-services"]);
    assert_eq!(code, Some(1), "{out}");
    for part in [
        "1 ConfigMap",
        "not used here: 1 ConfigMap",
        "refused   ConfigMap ingress-nginx/tcp-services",
        ".data[\"9001\"]: Service shop/db has no TCP port 2000: the port stays closed",
        "-> it has 1000/TCP (main)",
        "tcp/0.0.0.0:9000  shop/db:1000  (1 endpoint)  [PROXY header read and written]",
    ] {
        assert!(out.contains(part), "{part} is missing in\n{out}");
    }
    let (code, out) = check(&[]);
    assert_eq!(code, Some(0), "{out}");
    assert!(out.contains("not used here: 2 ConfigMaps") && !out.contains("Ports"), "{out}");
}
