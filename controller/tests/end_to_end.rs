//! The whole product over folders of manifests: what others wrote, unedited,
//! with toy endpoints behind the Services, asked through live sockets.
#![allow(clippy::unwrap_used)] // a test fails by panicking

mod support {
    #![allow(dead_code, unreachable_pub, reason = "every test file uses its own part of this")]
    pub mod binary;
    pub mod clients;
    pub mod examples;
    pub mod gate;
    pub mod manifests;
    pub mod toys;
}

#[path = "ingress_conformance/scenarios.rs"]
mod scenarios;

use std::collections::HashSet;
use std::fs;

use bytes::Bytes;
use lockgate_controller::admin;
use scenarios::FEATURES;
use support::binary::{Binary, curl};
use support::clients::{Answer, Connection, Question, Trust, Version};
use support::examples::Ask::{OtherCertificate, Plain, Tls};
use support::examples::Right::{self, By, Status, Sticky, ToHttps};
use support::examples::{EXAMPLES, Example};
use support::gate::Gate;
use support::manifests::{self, Identity};
use support::toys::{self, Speaks};
use tempfile::TempDir;

const BOTH: [Version; 2] = [Version::Http1, Version::Http2];

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn every_ingress_that_others_wrote_answers_as_its_author_meant() {
    let Some(shared) = manifests::shared() else { return };
    let mut unproved: HashSet<String> = HashSet::new();
    for folder in ["kubernetes-docs", "ingress-nginx", "online-boutique"] {
        for entry in fs::read_dir(shared.join(folder)).unwrap() {
            let entry = entry.unwrap();
            let text = fs::read_to_string(entry.path()).unwrap();
            if text.lines().any(|line| line.replace(['"', ','], "").trim() == "kind: Ingress") {
                unproved.insert(format!("{folder}/{}", entry.file_name().to_str().unwrap()));
            }
        }
    }
    for example in EXAMPLES {
        unproved.remove(example.file);
        let mut asked = 0;
        for version in BOTH {
            asked += prove(example, &shared, version).await;
        }
        println!("{}: {asked} requests", example.file);
    }
    assert!(unproved.is_empty(), "nothing is proved of {unproved:?}");
}

async fn prove(example: &Example, shared: &std::path::Path, version: Version) -> usize {
    let folder = TempDir::new().unwrap();
    manifests::copy(shared, example.file, folder.path());
    for file in example.with {
        manifests::copy(shared, file, folder.path());
    }
    let mut around = String::new();
    for backend in example.backends {
        if backend.presumed {
            around += &manifests::service(backend.namespace, backend.name, backend.ports);
        }
        for (name, port) in backend.ports {
            let toy = toys::start(format!("{}:{port}", backend.name), Speaks::Http1).await;
            around += &manifests::slices(backend.namespace, backend.name, name, &[toy]);
        }
    }
    let mut identities = Vec::new();
    for (namespace, name, hosts) in example.secrets {
        let identity = Identity::new(hosts);
        around += &manifests::secret(namespace, name, &identity);
        identities.push((*name, identity));
    }
    fs::write(folder.path().join("around.yaml"), around).unwrap();
    let gate = Gate::open(folder.path(), &[]);
    let trust = |secret: &str| {
        let found = identities.iter().find(|(name, _)| *name == secret).unwrap();
        Trust::only([found.1.certificate.as_str()])
    };
    for ask in example.asks {
        match ask {
            Plain(host, path, right) => {
                let mut connection = Connection::plain(gate.http, version).await.unwrap();
                let answer = connection.ask(&Question::new(host, path)).await.unwrap();
                check(example.file, version, &gate, (host, path), *right, &answer);
            }
            Tls(secret, host, path, right) => {
                let trust = trust(secret);
                let mut connection = Connection::tls(gate.https, host, &trust, version)
                    .await
                    .unwrap_or_else(|error| panic!("{}: {host}: {error}", example.file));
                let answer = connection.ask(&Question::new(host, path)).await.unwrap();
                check(example.file, version, &gate, (host, path), *right, &answer);
            }
            OtherCertificate(secret, host) => {
                let refused = Connection::tls(gate.https, host, &trust(secret), version).await.err();
                let refused =
                    refused.unwrap_or_else(|| panic!("{}: {host}: {secret} is shown", example.file));
                assert!(refused.contains("certificate"), "{}: {host}: {refused}", example.file);
            }
        }
    }
    let seen = gate.seen.borrow().clone();
    assert_eq!(seen.problems, [] as [&str; 0], "{}", example.file);
    for part in example.said {
        assert!(
            seen.notices.iter().any(|line| line.contains(part)),
            "{}: {part}: {:#?}",
            example.file,
            seen.notices
        );
    }
    if example.said.is_empty() {
        assert_eq!(seen.notices, [] as [&str; 0], "{}", example.file);
    }
    assert!(gate.close(), "{}: connections had to be cut", example.file);
    example.asks.len()
}

fn check(
    file: &str,
    version: Version,
    gate: &Gate,
    (host, path): (&str, &str),
    right: Right,
    answer: &Answer,
) {
    let at = format!("{file}: {version:?} {host}{path}");
    match right {
        By(name) => assert_eq!((answer.status, answer.body.as_str()), (200, name), "{at}"),
        Sticky(name, parts) => {
            assert_eq!((answer.status, answer.body.as_str()), (200, name), "{at}");
            let cookie = answer.header("set-cookie").unwrap_or_else(|| panic!("{at}: no cookie"));
            assert!(parts.iter().all(|part| cookie.contains(part)), "{at}: {cookie}");
        }
        Status(status) => assert_eq!(answer.status, status, "{at}: {}", answer.body),
        ToHttps => {
            assert_eq!(answer.status, 308, "{at}: {}", answer.body);
            let to = match host.split_once(':') {
                Some((host, _)) => format!("https://{host}:{}{path}", gate.https.port()),
                None => format!("https://{host}{path}"),
            };
            assert_eq!(answer.header("location"), Some(to.as_str()), "{at}");
        }
    }
}

/// The ports of Online Boutique's gRPC Services.
const GRPC: [(&str, u16, &str); 9] = [
    ("adservice", 9555, "AdService"),
    ("cartservice", 7070, "CartService"),
    ("checkoutservice", 5050, "CheckoutService"),
    ("currencyservice", 7000, "CurrencyService"),
    ("emailservice", 5000, "EmailService"),
    ("paymentservice", 50051, "PaymentService"),
    ("productcatalogservice", 3550, "ProductCatalogService"),
    ("recommendationservice", 8080, "RecommendationService"),
    ("shippingservice", 50051, "ShippingService"),
];

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn online_boutique_runs_with_only_an_ingress_added() {
    let Some(shared) = manifests::shared() else { return };
    let folder = TempDir::new().unwrap();
    manifests::copy(&shared, "online-boutique/kubernetes-manifests.yaml", folder.path());
    let mut ingress = "\
apiVersion: networking.k8s.io/v1
kind: Ingress
metadata: {name: shop}
spec:
  rules:
  - host: shop.example
    http:
      paths:
      - {path: /, pathType: Prefix, backend: {service: {name: frontend, port: {name: http}}}}
---
apiVersion: networking.k8s.io/v1
kind: Ingress
metadata: {name: calls, annotations: {nginx.ingress.kubernetes.io/backend-protocol: GRPC}}
spec:
  rules:
  - host: calls.example
    http:
      paths:
"
    .to_owned();
    let frontend = toys::start("frontend", Speaks::Http1).await;
    let mut slices = manifests::slices("default", "frontend", "http", &[frontend]);
    for (name, port, service) in GRPC {
        ingress += &format!(
            "      - {{path: /hipstershop.{service}, pathType: Prefix, \
             backend: {{service: {{name: {name}, port: {{number: {port}}}}}}}}}\n"
        );
        let toy = toys::start(name, Speaks::H2c).await;
        slices += &manifests::slices("default", name, "grpc", &[toy]);
    }
    fs::write(folder.path().join("ingress.yaml"), ingress).unwrap();
    fs::write(folder.path().join("slices.yaml"), slices).unwrap();
    let gate = Gate::open(folder.path(), &[]);
    for version in BOTH {
        let mut connection = Connection::plain(gate.http, version).await.unwrap();
        for path in ["/", "/product/OLJCESPC7Z", "/cart"] {
            let answer = connection.ask(&Question::new("shop.example", path)).await.unwrap();
            assert_eq!((answer.status, answer.body.as_str()), (200, "frontend"), "{path}");
        }
        let answer = connection.ask(&Question::new("other.example", "/")).await.unwrap();
        assert_eq!(answer.status, 404);
    }
    let mut connection = Connection::plain(gate.http, Version::Http2).await.unwrap();
    for (name, _, service) in GRPC {
        let message = Bytes::from_static(b"\0\0\0\0\x04\x0a\x02hi");
        let question = Question::new("calls.example", &format!("/hipstershop.{service}/Call"))
            .with("content-type", "application/grpc")
            .with("te", "trailers")
            .posting(message.clone());
        let answer = connection.ask(&question).await.unwrap();
        assert_eq!((answer.status, answer.header("x-served-by")), (200, Some(name)), "{service}");
        assert_eq!(answer.body.as_bytes(), message, "{service}");
        let trailers = answer.trailers.unwrap();
        assert_eq!(trailers.get("grpc-status").unwrap(), "0", "{service}");
    }
    drop(connection);
    assert_eq!(gate.seen.borrow().problems, [] as [&str; 0]);
    assert!(gate.close());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn every_conformance_scenario_over_live_sockets() {
    for feature in &FEATURES {
        for version in BOTH {
            let folder = TempDir::new().unwrap();
            let identity = Identity::new(&["foo.bar.com"]);
            let mut objects = format!("{}\n", feature.ingress.trim_start());
            objects += &manifests::secret("default", "conformance-tls", &identity);
            for (name, endpoints) in feature.services {
                objects += &manifests::service("default", name, &[("http", 8080)]);
                let mut addresses = Vec::new();
                for number in 0..*endpoints {
                    addresses.push(toys::start(format!("{name} {number}"), Speaks::Http1).await);
                }
                objects += &manifests::slices("default", name, "http", &addresses);
            }
            fs::write(folder.path().join("feature.yaml"), objects).unwrap();
            let class: Vec<&str> =
                feature.ingress_class.into_iter().flat_map(|c| ["--ingress-class", c]).collect();
            let gate = Gate::open(folder.path(), &class);
            for scenario in feature.scenarios {
                let at = format!("{}: {} ({version:?})", feature.name, scenario.name);
                let connection = match scenario.scheme {
                    "https" => {
                        let trust = Trust::only([identity.certificate.as_str()]);
                        Connection::tls(gate.https, scenario.host, &trust, version).await
                    }
                    _ => Connection::plain(gate.http, version).await,
                };
                let mut connection = connection.unwrap_or_else(|error| panic!("{at}: {error}"));
                // A host with TLS is redirected there, which another scenario asks.
                let redirected =
                    scenario.scheme == "http" && feature.ingress.contains(&format!("[{}]", scenario.host));
                let question = Question::new(scenario.host, scenario.path);
                let endpoints = feature.services.iter().map(|(_, n)| *n).max().unwrap();
                let mut who = HashSet::new();
                // Each of two workers takes turns of its own, on one connection there is one.
                for _ in 0..endpoints {
                    let answer =
                        connection.ask(&question).await.unwrap_or_else(|error| panic!("{at}: {error}"));
                    match scenario.served_by {
                        _ if redirected => assert_eq!(answer.status, 308, "{at}"),
                        None => assert_eq!(answer.status, 404, "{at}"),
                        Some(name) => {
                            assert_eq!(answer.status, 200, "{at}");
                            assert_eq!(answer.body.split(' ').next(), Some(name), "{at}");
                            who.insert(answer.body);
                        }
                    }
                }
                if scenario.served_by.is_some() && !redirected {
                    assert_eq!(who.len(), endpoints, "{at}: every endpoint is used");
                }
            }
            assert!(gate.close(), "{}", feature.name);
        }
    }
}

/// One Lockgate passes TLS through to another, which insists on being told of
/// the client, ends it, and limits what that client may do.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn tls_is_passed_through_with_a_proxy_header_and_clients_are_limited() {
    let host = |name: &str, annotations: &str, port: &str| {
        format!(
            "---\n{{apiVersion: networking.k8s.io/v1, kind: Ingress, metadata: {{name: {name}, annotations: {{{annotations}}}}}, \
             spec: {{rules: [{{host: {name}.example, http: {{paths: [{{path: /, pathType: Prefix, \
             backend: {{service: {{name: {name}, port: {{name: {port}}}}}}}}}]}}}}]}}}}\n"
        )
    };
    let toy = toys::start("behind both", Speaks::Http1).await;
    let identity = Identity::new(&["passed.example"]);
    let behind = TempDir::new().unwrap();
    let limits = "nginx.ingress.kubernetes.io/limit-rpm: '1', nginx.ingress.kubernetes.io/limit-burst-multiplier: '1', \
                  nginx.ingress.kubernetes.io/ssl-redirect: 'false'";
    let objects = host("passed", limits, "web")
        .replace("spec: {", "spec: {tls: [{secretName: passed, hosts: [passed.example]}], ")
        + &manifests::service("default", "passed", &[("web", 80)])
        + &manifests::slices("default", "passed", "web", &[toy])
        + &manifests::secret("default", "passed", &identity);
    fs::write(behind.path().join("objects.yaml"), objects).unwrap();
    let behind = Gate::open(behind.path(), &["--use-proxy-protocol", "--proxy-real-ip-cidr", "127.0.0.0/8"]);

    let front = TempDir::new().unwrap();
    let passed =
        "nginx.ingress.kubernetes.io/ssl-passthrough: 'true', lockgate.io/ssl-passthrough-proxy-protocol: v2";
    let other = toys::start("other", Speaks::Http1).await;
    let objects = host("passed", passed, "tls")
        + &host("other", "", "web")
        + &manifests::service("default", "passed", &[("tls", 443)])
        + &manifests::slices("default", "passed", "tls", &[behind.https])
        + &manifests::service("default", "other", &[("web", 80)])
        + &manifests::slices("default", "other", "web", &[other]);
    fs::write(front.path().join("objects.yaml"), objects).unwrap();
    let front = Gate::open(front.path(), &["--enable-ssl-passthrough"]);

    let trust = Trust::only([identity.certificate.as_str()]);
    let mut answers = Vec::new();
    for version in [Version::Http1, Version::Http2, Version::Http1] {
        let mut connection = Connection::tls(front.https, "passed.example", &trust, version).await.unwrap();
        let answer = connection.ask(&Question::new("passed.example", "/")).await.unwrap();
        answers.push((answer.status, answer.body));
    }
    assert_eq!(answers[..2], vec![(200, "behind both".to_owned()); 2]);
    assert_eq!(answers[2].0, 503, "one a minute, and a burst of one");
    // The certificate of the host behind is not the front's to show.
    assert!(Connection::tls(front.https, "other.example", &trust, Version::Http1).await.is_err());
    let mut plain = Connection::plain(front.http, Version::Http1).await.unwrap();
    assert_eq!(plain.ask(&Question::new("passed.example", "/")).await.unwrap().status, 308);
    assert_eq!(plain.ask(&Question::new("other.example", "/")).await.unwrap().body, "other");
    // Nobody comes to the one behind without a header.
    let mut direct = Connection::plain(behind.http, Version::Http1).await.unwrap();
    assert!(direct.ask(&Question::new("passed.example", "/")).await.is_err());
    drop((plain, direct));
    assert!(front.close() && behind.close());
}

/// A folder with a plain host and a TLS host in front of `toy`.
fn shop(toy: std::net::SocketAddr, identity: &Identity) -> TempDir {
    let folder = TempDir::new().unwrap();
    let mut objects = "\
apiVersion: networking.k8s.io/v1
kind: Ingress
metadata: {name: shop}
spec:
  tls: [{hosts: [secure.example], secretName: shop}]
  rules:
  - host: plain.example
    http: {paths: [{path: /, pathType: Prefix, backend: {service: {name: shop, port: {number: 80}}}}]}
  - host: secure.example
    http: {paths: [{path: /, pathType: Prefix, backend: {service: {name: shop, port: {number: 80}}}}]}
"
    .to_owned();
    objects += &manifests::service("default", "shop", &[("web", 80)]);
    objects += &manifests::slices("default", "shop", "web", &[toy]);
    objects += &manifests::secret("default", "shop", identity);
    // A Secret whose key is not its certificate's is complained about.
    let mixed = Identity { key: Identity::new(&["x"]).key, ..identity.clone() };
    objects += &manifests::secret("default", "mixed", &mixed);
    fs::write(folder.path().join("shop.yaml"), objects).unwrap();
    fs::write(folder.path().join("secure.pem"), &identity.certificate).unwrap();
    folder
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_sigterm_lets_requests_finish_and_no_key_is_ever_shown() {
    let (toy, held) = toys::start_holding("shop", Speaks::Http1).await;
    let identity = Identity::new(&["secure.example"]);
    let folder = shop(toy, &identity);
    // A file with a key that does not parse: what is said of it must not quote it.
    let nonsense = manifests::secret("default", "torn", &identity).replace("}}", "}");
    fs::write(folder.path().join("nonsense.yaml"), nonsense).unwrap();
    let ingress = "apiVersion: networking.k8s.io/v1\nkind: Ingress\nmetadata: {name: mixed}\n\
                   spec: {tls: [{hosts: [mixed.example], secretName: mixed}]}\n";
    fs::write(folder.path().join("mixed.yaml"), ingress).unwrap();
    let binary = Binary::start(folder.path(), &["--access-log", "json"]);
    let ready = async || admin::get(binary.admin, "/readyz").await.unwrap();
    assert_eq!(ready().await, (200, "ok\n".to_owned()));
    for path in ["/debug/routes", "/metrics", "/debug/explain?url=https://secure.example/", "/"] {
        let (status, text) = admin::get(binary.admin, path).await.unwrap();
        assert_eq!(status, 200, "{path}");
        identity.assert_is_secret_in(&text, path);
    }
    let mut slow = Vec::new();
    for version in BOTH {
        let mut connection = Connection::plain(binary.http, version).await.unwrap();
        slow.push(tokio::spawn(
            async move { connection.ask(&Question::new("plain.example", toys::HOLD)).await },
        ));
    }
    held.waiting(2).await;
    binary.terminate();
    // The next probe may be ahead of the signal.
    let mut answer = ready().await;
    while answer.0 == 200 {
        answer = ready().await;
    }
    assert_eq!(answer, (503, "draining\n".to_owned()));
    assert_eq!(admin::get(binary.admin, "/livez").await.unwrap().0, 200);
    held.release();
    for slow in slow {
        let answer = slow.await.unwrap().unwrap();
        assert_eq!((answer.status, answer.body.as_str()), (200, "shop"));
    }
    let (status, logged) = tokio::task::spawn_blocking(|| binary.wait()).await.unwrap();
    assert_eq!(status, Some(0), "{logged}");
    assert!(logged.contains("Secret default/mixed"), "{logged}");
    assert!(logged.contains("nonsense.yaml:"), "{logged}");
    assert!(logged.contains("plain.example"), "the access log is empty: {logged}");
    identity.assert_is_secret_in(&logged, "the log");
}

#[tokio::test]
async fn ready_is_what_has_its_first_table_and_is_not_draining() {
    let state = std::sync::Arc::new(admin::AdminState::default());
    let address = admin::start("127.0.0.1:0".parse().unwrap(), state.clone()).unwrap();
    let get = async |path| admin::get(address, path).await.unwrap().0;
    assert_eq!((get("/livez").await, get("/readyz").await, get("/metrics").await), (200, 503, 503));
    let config = lockgate_proxy::Config { workers: 1, ..lockgate_proxy::Config::default() };
    let (proxy, mut publisher) = lockgate_proxy::Proxy::start(config).unwrap();
    state.started(proxy.routes().clone(), proxy.live().clone());
    assert_eq!((get("/readyz").await, get("/metrics").await), (503, 200));
    publisher.publish(lockgate_proxy::RoutingTable::default());
    state.ready();
    assert_eq!((get("/livez").await, get("/readyz").await), (200, 200));
    state.draining();
    assert_eq!((get("/livez").await, get("/readyz").await), (200, 503));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn curl_is_answered_by_the_real_binary() {
    let toy = toys::start("shop", Speaks::Http1).await;
    let identity = Identity::new(&["secure.example"]);
    let folder = shop(toy, &identity);
    let binary = Binary::start(folder.path(), &[]);
    let plain = format!("plain.example:{}", binary.http.port());
    let secure = format!("secure.example:{}", binary.https.port());
    let (to_plain, to_secure) = (format!("{plain}:127.0.0.1"), format!("{secure}:127.0.0.1"));
    let ca = folder.path().join("secure.pem");
    let resolve = ["--resolve", &to_plain, "--resolve", &to_secure, "--cacert", ca.to_str().unwrap()];
    let (http, https) = (format!("http://{plain}/"), format!("https://{secure}/"));
    let to_https = format!("http://secure.example:{}/", binary.http.port());
    let to_https_resolve = format!("secure.example:{}:127.0.0.1", binary.http.port());
    let websocket = [
        "--http1.1",
        "-H",
        "Connection: Upgrade",
        "-H",
        "Upgrade: websocket",
        "-H",
        "Sec-WebSocket-Version: 13",
    ];
    let key = ["-H", "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==", "--max-time", "1", http.as_str()];
    let report = ["--write-out", " %{http_version} %{http_code}"];
    // Arguments, what curl prints; a tunnel never ends by itself, so curl gives up on it.
    let cases: [(&str, Vec<&str>, &str); 7] = [
        ("HTTP/1.1", vec!["--http1.1", &http], "shop 1.1 200"),
        ("HTTP/1.0", vec!["--http1.0", &http], "shop 1.1 200"),
        ("h2c", vec!["--http2-prior-knowledge", &http], "shop 2 200"),
        ("HTTPS", vec!["--http1.1", &https], "shop 1.1 200"),
        ("h2", vec!["--http2", &https], "shop 2 200"),
        ("redirect", vec!["--location", "--resolve", &to_https_resolve, &to_https], "shop 2 200"),
        ("WebSocket", [&websocket[..], &key].concat(), " 1.1 101"),
    ];
    for (what, arguments, expected) in cases {
        let arguments = [&resolve[..], &report, &arguments].concat();
        let asking = arguments.iter().map(|&argument| argument.to_owned()).collect::<Vec<String>>();
        let asked =
            tokio::task::spawn_blocking(move || curl(&asking.iter().map(String::as_str).collect::<Vec<_>>()));
        let Some(output) = asked.await.unwrap() else { return };
        let printed = String::from_utf8_lossy(&output.stdout);
        assert_eq!(printed, expected, "{what}: {}", String::from_utf8_lossy(&output.stderr));
    }
    binary.terminate();
    let (status, logged) = tokio::task::spawn_blocking(|| binary.wait()).await.unwrap();
    assert_eq!(status, Some(0), "{logged}");
    identity.assert_is_secret_in(&logged, "the log");
}
