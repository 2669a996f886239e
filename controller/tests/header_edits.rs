//! Header edits as users of ingress-nginx write them, through the whole product, while they change.
#![allow(clippy::unwrap_used)] // a test fails by panicking

mod support {
    #![allow(dead_code, unreachable_pub, reason = "every test file uses its own part of this")]
    pub mod clients;
    pub mod gate;
    pub mod manifests;
}

use std::fs;
use std::net::SocketAddr;

use support::clients::{Answer, Connection, Question, Version};
use support::gate::Gate;
use support::manifests;
use tempfile::TempDir;
use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader};
use tokio::net::TcpListener;

/// Answers with the head it got, in lower case.
async fn echo() -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    tokio::spawn(async move {
        while let Ok((mut stream, _)) = listener.accept().await {
            tokio::spawn(async move {
                let (from, mut to) = stream.split();
                let mut lines = BufReader::new(from).lines();
                let mut head = String::new();
                while let Ok(Some(line)) = lines.next_line().await {
                    if !line.is_empty() {
                        head += &format!("{}\n", line.to_ascii_lowercase());
                        continue;
                    }
                    let length = head.len();
                    let fields = "X-Frame-Options: SAMEORIGIN\r\nX-Powered-By: app";
                    let answer =
                        format!("HTTP/1.1 200 OK\r\nContent-Length: {length}\r\n{fields}\r\n\r\n{head}");
                    to.write_all(answer.as_bytes()).await.unwrap();
                    head.clear();
                }
            });
        }
    });
    address
}

fn config_map(namespace: &str, name: &str, data: &str) -> String {
    format!(
        "apiVersion: v1\nkind: ConfigMap\nmetadata: {{name: {name}, namespace: {namespace}}}\ndata: {{{data}}}\n---\n"
    )
}

fn ingress(name: &str, annotations: &str) -> String {
    format!(
        "apiVersion: networking.k8s.io/v1\nkind: Ingress\n\
         metadata: {{name: {name}, namespace: shop, annotations: {{{annotations}}}}}\n\
         spec: {{rules: [{{host: {name}.example, http: {{paths: [{{path: /, pathType: Prefix, \
         backend: {{service: {{name: web, port: {{number: 80}}}}}}}}]}}}}]}}\n---\n"
    )
}

const FLAGS: [&str; 6] = [
    "--proxy-set-headers",
    "gate/requests",
    "--add-headers",
    "gate/responses",
    "--global-allowed-response-headers",
    "X-Frame-Options, X-Team",
];

async fn ask(gate: &Gate, host: &str, version: Version) -> Answer {
    let mut connection = Connection::plain(gate.http, version).await.unwrap();
    connection.ask(&Question::new(host, "/").with("x-mine", "1")).await.unwrap()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn edits_of_operator_and_ingress_are_followed() {
    let folder = TempDir::new().unwrap();
    let write = |file: &str, text: String| {
        let new = folder.path().join(format!(".{file}.new"));
        fs::write(&new, text).unwrap();
        fs::rename(new, folder.path().join(file)).unwrap();
    };
    let mut web = manifests::service("shop", "web", &[("http", 80)]);
    web += &manifests::slices("shop", "web", "http", &[echo().await]);
    web += "---\n";
    web += &ingress("plain", "");
    let prefix = "nginx.ingress.kubernetes.io";
    web += &ingress(
        "custom",
        &format!("{prefix}/custom-headers: shop/team, {prefix}/upstream-vhost: $service_name.internal"),
    );
    write("web.yaml", web);
    write("requests.yaml", config_map("gate", "requests", "X-Mine: \"2\", X-Gate: \"yes\""));
    write("responses.yaml", config_map("gate", "responses", "X-Powered-By: \"\""));
    write("team.yaml", config_map("shop", "team", "X-Frame-Options: DENY, X-Team: shop"));
    let mut gate = Gate::open(folder.path(), &FLAGS);
    assert_eq!(gate.seen.borrow().notices, [] as [&str; 0]);
    assert_eq!(gate.seen.borrow().problems, [] as [&str; 0]);
    for version in [Version::Http1, Version::Http2] {
        let plain = ask(&gate, "plain.example", version).await;
        assert!(plain.body.contains("x-mine: 2\n") && plain.body.contains("x-gate: yes\n"), "{}", plain.body);
        assert!(!plain.body.contains("x-mine: 1\n") && plain.body.contains("host: plain.example\n"));
        assert_eq!(
            (plain.header("x-frame-options"), plain.header("x-powered-by")),
            (Some("SAMEORIGIN"), None)
        );
        let custom = ask(&gate, "custom.example", version).await;
        assert!(custom.body.contains("host: web.internal\n") && custom.body.contains("x-gate: yes\n"));
        assert_eq!((custom.header("x-frame-options"), custom.header("x-powered-by")), (Some("DENY"), None));
        assert_eq!(custom.header("x-team"), Some("shop"));
    }
    // What is changed is changed for all, also beside edits of their own.
    let before = gate.seen.borrow().generation;
    write("requests.yaml", config_map("gate", "requests", "X-Gate: \"no\""));
    gate.until(|seen| seen.generation > before).await;
    for host in ["plain.example", "custom.example"] {
        let answer = ask(&gate, host, Version::Http1).await;
        assert!(
            answer.body.contains("x-mine: 1\n") && answer.body.contains("x-gate: no\n"),
            "{}",
            answer.body
        );
    }
    // What was not allowed closes the routes of those who name it, and of nobody else.
    let before = gate.seen.borrow().generation;
    write("team.yaml", config_map("shop", "team", "X-Frame-Options: DENY, Set-Cookie: a=b"));
    gate.until(|seen| seen.generation > before).await;
    assert_eq!(ask(&gate, "custom.example", Version::Http1).await.status, 503);
    assert_eq!(ask(&gate, "plain.example", Version::Http1).await.status, 200);
    let notices = gate.seen.borrow().notices.clone();
    assert!(notices.len() == 1 && notices[0].contains("custom-headers"), "{notices:?}");
    let before = gate.seen.borrow().generation;
    write("team.yaml", config_map("shop", "team", "X-Team: again"));
    gate.until(|seen| seen.generation > before).await;
    assert_eq!(ask(&gate, "custom.example", Version::Http1).await.header("x-team"), Some("again"));
    assert!(gate.close());
}
