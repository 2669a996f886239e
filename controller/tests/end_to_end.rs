//! The whole product over folders of manifests: what others wrote, unedited,
//! with toy endpoints behind the Services, asked through live sockets.
#![allow(clippy::unwrap_used)] // a test fails by panicking

mod support {
    #![allow(dead_code, unreachable_pub, reason = "every test file uses its own part of this")]
    pub mod clients;
    pub mod gate;
    pub mod manifests;
    pub mod toys;
}

#[path = "ingress_conformance/scenarios.rs"]
mod scenarios;

use std::collections::HashSet;
use std::fs;

use bytes::Bytes;
use scenarios::FEATURES;
use support::clients::{Answer, Connection, Question, Trust, Version};
use support::gate::Gate;
use support::manifests::{self, Identity};
use support::toys::{self, Speaks};
use tempfile::TempDir;

const BOTH: [Version; 2] = [Version::Http1, Version::Http2];

/// A Service with toys behind it.
struct Backend {
    namespace: &'static str,
    name: &'static str,
    /// Name, which may be empty, and number. Each port has a toy of its own that
    /// answers `service:number`.
    ports: &'static [(&'static str, u16)],
    /// The example presumes that it exists; otherwise the files bring it.
    presumed: bool,
}

/// The ports: one that is asked for and one that must not be.
const fn presumed(name: &'static str, ports: &'static [(&'static str, u16)]) -> Backend {
    Backend { namespace: "default", name, ports, presumed: true }
}

const fn brought(
    namespace: &'static str,
    name: &'static str,
    ports: &'static [(&'static str, u16)],
) -> Backend {
    Backend { namespace, name, ports, presumed: false }
}

/// The right answer.
#[derive(Clone, Copy, Debug)]
enum Right {
    /// 200 by this `service:port`.
    By(&'static str),
    /// This status, by the gate itself.
    Status(u16),
    /// 308 to the same by https.
    ToHttps,
}

use Right::{By, Status, ToHttps};

/// One request.
enum Ask {
    Plain(&'static str, &'static str, Right),
    /// With only the certificate in this Secret trusted.
    Tls(&'static str, &'static str, &'static str, Right),
    /// The certificate in this Secret is not shown for this host.
    OtherCertificate(&'static str, &'static str),
}

use Ask::{OtherCertificate, Plain, Tls};

struct Example {
    /// Below the shared manifests.
    file: &'static str,
    /// Other files that belong to it.
    with: &'static [&'static str],
    backends: &'static [Backend],
    /// Namespace, name and hosts of the Secrets that must exist beforehand.
    secrets: &'static [(&'static str, &'static str, &'static [&'static str])],
    asks: &'static [Ask],
    /// Parts of what has to be said about it.
    said: &'static [&'static str],
}

const DECOY: (&str, u16) = ("decoy", 81);
const HTTP_SVC: &[&str] = &["ingress-nginx/http-svc.yaml"];
const BEHIND_HTTP_SVC: &[Backend] = &[brought("default", "http-svc", &[("http", 80)])];

const EXAMPLES: &[Example] = &[
    Example {
        file: "kubernetes-docs/minimal-ingress.yaml",
        with: &[],
        backends: &[presumed("test", &[DECOY, ("web", 80)])],
        secrets: &[],
        asks: &[
            Plain("any.example", "/testpath", By("test:80")),
            Plain("192.0.2.1", "/testpath/", By("test:80")),
            Plain("any.example", "/testpath/below?q=/x", By("test:80")),
            Plain("any.example", "/testpathX", Status(404)),
            Plain("any.example", "/Testpath", Status(404)),
            Plain("any.example", "/", Status(404)),
            Plain("any.example", "/x/testpath", Status(404)),
        ],
        said: &[],
    },
    Example {
        file: "kubernetes-docs/test-ingress.yaml",
        with: &[],
        backends: &[presumed("test", &[DECOY, ("web", 80)])],
        secrets: &[],
        asks: &[Plain("any.example", "/", By("test:80")), Plain("other.example", "/whatever", By("test:80"))],
        said: &[],
    },
    Example {
        file: "kubernetes-docs/simple-fanout-example.yaml",
        with: &[],
        backends: &[
            presumed("service1", &[DECOY, ("web", 4200)]),
            presumed("service2", &[DECOY, ("web", 8080)]),
        ],
        secrets: &[],
        asks: &[
            Plain("foo.bar.com", "/foo", By("service1:4200")),
            Plain("FOO.bar.com", "/foo/x", By("service1:4200")),
            Plain("foo.bar.com:8080", "/bar", By("service2:8080")),
            Plain("foo.bar.com", "/bar/foo", By("service2:8080")),
            Plain("foo.bar.com", "/", Status(404)),
            Plain("foo.bar.com", "/foobar", Status(404)),
            Plain("bar.com", "/foo", Status(404)),
        ],
        said: &[],
    },
    Example {
        file: "kubernetes-docs/ingress-wildcard-host.yaml",
        with: &[],
        backends: &[presumed("service1", &[DECOY, ("web", 80)]), presumed("service2", &[DECOY, ("web", 80)])],
        secrets: &[],
        asks: &[
            Plain("foo.bar.com", "/bar", By("service1:80")),
            Plain("foo.bar.com", "/foo", Status(404)),
            Plain("bar.foo.com", "/foo", By("service2:80")),
            Plain("bar.foo.com", "/bar", Status(404)),
            Plain("baz.bar.foo.com", "/foo", Status(404)),
            Plain("foo.com", "/foo", Status(404)),
            Plain("barfoo.com", "/foo", Status(404)),
        ],
        said: &[],
    },
    Example {
        file: "kubernetes-docs/name-virtual-host-ingress-no-third-host.yaml",
        with: &[],
        backends: &[
            presumed("service1", &[DECOY, ("web", 80)]),
            presumed("service2", &[DECOY, ("web", 80)]),
            presumed("service3", &[DECOY, ("web", 80)]),
        ],
        secrets: &[],
        asks: &[
            Plain("first.bar.com", "/", By("service1:80")),
            Plain("second.bar.com", "/deep/below", By("service2:80")),
            Plain("third.bar.com", "/", By("service3:80")),
            Plain("bar.com", "/", By("service3:80")),
            Plain("x.first.bar.com", "/", By("service3:80")),
        ],
        said: &[],
    },
    Example {
        file: "kubernetes-docs/tls-example-ingress.yaml",
        with: &[],
        backends: &[presumed("service1", &[DECOY, ("web", 80)])],
        secrets: &[("default", "testsecret-tls", &["https-example.foo.com"])],
        asks: &[
            Plain("https-example.foo.com", "/", ToHttps),
            Plain("https-example.foo.com", "/a?b=c", ToHttps),
            Plain("other.foo.com", "/", Status(404)),
            Tls("testsecret-tls", "https-example.foo.com", "/", By("service1:80")),
            OtherCertificate("testsecret-tls", "other.foo.com"),
        ],
        said: &[],
    },
    Example {
        file: "kubernetes-docs/ingress-resource-backend.yaml",
        with: &[],
        backends: &[],
        secrets: &[],
        asks: &[
            Plain("any.example", "/icons", Status(503)),
            Plain("any.example", "/icons/a.png", Status(503)),
            Plain("any.example", "/", Status(503)),
        ],
        said: &["Ingress default/ingress-resource-backend: Error .spec.defaultBackend"],
    },
    Example {
        file: "ingress-nginx/multi-tls-multi-tls.yaml",
        with: &[],
        backends: &[
            brought("default", "http-svc", &[("http", 80)]),
            brought("default", "nginx", &[("http", 80)]),
        ],
        secrets: &[("default", "foobar", &["foo.bar.com"]), ("default", "barbaz", &["bar.baz.com"])],
        asks: &[
            Tls("foobar", "foo.bar.com", "/", By("http-svc:80")),
            Tls("barbaz", "bar.baz.com", "/x", By("nginx:80")),
            OtherCertificate("foobar", "bar.baz.com"),
            OtherCertificate("barbaz", "foo.bar.com"),
            Plain("foo.bar.com", "/", ToHttps),
            Plain("bar.baz.com", "/", ToHttps),
            Plain("baz.com", "/", Status(404)),
        ],
        said: &[],
    },
    Example {
        file: "ingress-nginx/tls-termination-ingress.yaml",
        with: HTTP_SVC,
        backends: BEHIND_HTTP_SVC,
        secrets: &[("default", "tls-secret", &["foo.bar.com"])],
        asks: &[
            Tls("tls-secret", "foo.bar.com", "/", By("http-svc:80")),
            Plain("foo.bar.com", "/", ToHttps),
            Plain("bar.com", "/", Status(404)),
        ],
        said: &[],
    },
    Example {
        file: "ingress-nginx/static-ip-nginx-ingress.yaml",
        with: &["ingress-nginx/http-svc.yaml", "ingress-nginx/static-ip-static-ip-svc.yaml"],
        backends: BEHIND_HTTP_SVC,
        secrets: &[("default", "tls-secret", &["shop.example", "other.example"])],
        asks: &[
            Tls("tls-secret", "shop.example", "/", By("http-svc:80")),
            Tls("tls-secret", "other.example", "/x", By("http-svc:80")),
            Plain("any.example", "/", ToHttps),
        ],
        said: &[],
    },
    Example {
        file: "ingress-nginx/affinity-cookie-ingress.yaml",
        with: HTTP_SVC,
        backends: BEHIND_HTTP_SVC,
        secrets: &[],
        asks: &[
            Plain("stickyingress.example.com", "/", By("http-svc:80")),
            Plain("example.com", "/", Status(404)),
        ],
        said: &["Ingress default/nginx-test: Warning", "affinity is not implemented yet"],
    },
    Example {
        file: "ingress-nginx/affinity-cookie-ingress-samesite.yaml",
        with: HTTP_SVC,
        backends: BEHIND_HTTP_SVC,
        secrets: &[],
        asks: &[
            Plain("stickyingress-samesite-none.example.com", "/", By("http-svc:80")),
            Plain("stickyingress-samesite-strict.example.com", "/x", By("http-svc:80")),
            Plain("stickyingress.example.com", "/", Status(404)),
        ],
        said: &["session-cookie-samesite is not implemented yet"],
    },
    Example {
        file: "ingress-nginx/auth-external-auth-ingress.yaml",
        with: HTTP_SVC,
        backends: BEHIND_HTTP_SVC,
        secrets: &[],
        asks: &[
            Plain("external-auth-01.sample.com", "/", Status(503)),
            Plain("external-auth-01.sample.com", "/x", Status(503)),
            Plain("sample.com", "/", Status(404)),
        ],
        said: &["Ingress default/external-auth: Error", "auth-url restricts access"],
    },
    Example {
        file: "ingress-nginx/customization-external-auth-headers-echo-service.yaml",
        with: &[],
        backends: &[brought("default", "demo-echo-service", &[("", 80)])],
        secrets: &[],
        asks: &[
            Plain("public-demo-echo-service.kube.local", "/", Status(503)),
            Plain("secure-demo-echo-service.kube.local", "/", Status(503)),
        ],
        said: &["Ingress default/public-demo-echo-service: Error", "auth-url restricts access"],
    },
    Example {
        file: "ingress-nginx/auth-client-certs-ingress.yaml",
        with: HTTP_SVC,
        backends: BEHIND_HTTP_SVC,
        secrets: &[("default", "tls-secret", &["mydomain.com"])],
        asks: &[
            Tls("tls-secret", "mydomain.com", "/", Status(503)),
            Tls("tls-secret", "mydomain.com", "/x", Status(503)),
            Plain("mydomain.com", "/", ToHttps),
        ],
        said: &["Ingress default/nginx-test: Error", "restricts access"],
    },
    Example {
        file: "ingress-nginx/docker-registry-ingress-with-tls.yaml",
        with: &["ingress-nginx/docker-registry-deployment.yaml"],
        backends: &[brought("docker-registry", "docker-registry", &[("http", 5000)])],
        secrets: &[("docker-registry", "registry-tls", &["registry.example"])],
        asks: &[
            Plain("registry.example", "/v2/", Status(404)),
            OtherCertificate("registry-tls", "registry.example"),
        ],
        said: &[
            "Ingress docker-registry/docker-registry: Error .spec.rules[0].host: \"registry.<your domain>\"",
        ],
    },
];

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
