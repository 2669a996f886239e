use std::sync::LazyLock;

use fastrand::Rng;
use lockgate_proxy::table::{Action, HostPattern};

use super::*;
use crate::objects::*;

/// PEM chain and key; the names overlap, the algorithms differ.
static CERTIFICATES: LazyLock<Vec<(Vec<u8>, Vec<u8>)>> = LazyLock::new(|| {
    let make = |names: &[&str], rsa: bool| {
        let names: Vec<String> = names.iter().map(|name| (*name).to_owned()).collect();
        let algorithm = if rsa { &rcgen::PKCS_RSA_SHA256 } else { &rcgen::PKCS_ECDSA_P256_SHA256 };
        let key = rcgen::KeyPair::generate_for(algorithm).unwrap();
        let certificate = rcgen::CertificateParams::new(names).unwrap().self_signed(&key).unwrap();
        (certificate.pem().into_bytes(), key.serialize_pem().into_bytes())
    };
    vec![make(&["a.x", "b.x"], false), make(&["*.x"], false), make(&["a.x"], true)]
});

const HOSTS: [&str; 6] = ["a.x", "b.x", "*.x", "", "A.x:80", "10.0.0.1"];
const PATHS: [&str; 6] = ["/", "/a", "/a/", "/a/b", "", "a"];
const TYPES: [&str; 4] = ["Prefix", "Exact", "ImplementationSpecific", "prefix"];
const NAMES: [&str; 5] = ["one", "two", "three", "four", "five"];
const ANNOTATIONS: [(&str, &str); 30] = [
    ("nginx.ingress.kubernetes.io/affinity", "cookie"),
    ("nginx.ingress.kubernetes.io/affinity-canary-behavior", "legacy"),
    ("nginx.ingress.kubernetes.io/upstream-hash-by", "$request_uri"),
    ("lockgate.io/health-check", "tcp"),
    ("nginx.ingress.kubernetes.io/canary", "true"),
    ("nginx.ingress.kubernetes.io/canary", "true"),
    ("nginx.ingress.kubernetes.io/canary-weight", "30"),
    ("nginx.ingress.kubernetes.io/canary-weight", "80"),
    ("nginx.ingress.kubernetes.io/canary-weight-total", "300"),
    ("nginx.ingress.kubernetes.io/canary-by-header", "x-canary"),
    ("nginx.ingress.kubernetes.io/load-balance", "ewma"),
    ("nginx.ingress.kubernetes.io/load-balance", "round_robin"),
    ("nginx.ingress.kubernetes.io/backend-protocol", "GRPC"),
    ("nginx.ingress.kubernetes.io/ssl-redirect", "false"),
    ("nginx.ingress.kubernetes.io/auth-url", "http://auth"),
    ("nginx.ingress.kubernetes.io/limit-rps", "5"),
    ("nginx.ingress.kubernetes.io/ssl-passthrough", "true"),
    ("nginx.ingress.kubernetes.io/rewrite-target", "/"),
    ("nginx.ingress.kubernetes.io/custom-headers", "n/one"),
    ("nginx.ingress.kubernetes.io/custom-headers", "m/two"),
    ("nginx.ingress.kubernetes.io/custom-headers", "one"),
    ("nginx.ingress.kubernetes.io/upstream-vhost", "$service_name.internal"),
    ("nginx.ingress.kubernetes.io/upstream-vhost", "$host"),
    ("nginx.ingress.kubernetes.io/x-forwarded-prefix", "/app"),
    ("nginx.ingress.kubernetes.io/connection-proxy-header", "close"),
    ("lockgate.io/canary-sticky", "cookie"),
    ("lockgate.io/request-timeout", "30s"),
    ("lockgate.io/endpoint-max-requests", "many"),
    ("nginx.ingress.kubernetes.io/proxy-next-upstream", "error http_503"),
    ("kubernetes.io/ingress.class", "other"),
];

fn pick<'a>(rng: &mut Rng, from: &[&'a str]) -> &'a str {
    from[rng.usize(..from.len())]
}

fn maybe<T>(rng: &mut Rng, odds: f64, make: impl FnOnce(&mut Rng) -> T) -> Option<T> {
    (rng.f64() < odds).then(|| make(rng))
}

fn many<T>(rng: &mut Rng, most: usize, mut make: impl FnMut(&mut Rng) -> T) -> Vec<T> {
    (0..rng.usize(..=most)).map(|_| make(rng)).collect()
}

fn meta(rng: &mut Rng) -> Meta {
    Meta {
        namespace: pick(rng, &["n", "m"]).into(),
        name: pick(rng, &NAMES).into(),
        created: maybe(rng, 0.7, |rng| rng.i64(0..3)),
    }
}

fn backend(rng: &mut Rng) -> IngressBackend {
    match rng.u8(..12) {
        0 => IngressBackend::Missing,
        1 => IngressBackend::Resource { kind: "Bucket".into(), name: "b".into() },
        2 => IngressBackend::Service { name: "Bad name".into(), port: None },
        _ => IngressBackend::Service {
            name: pick(rng, &NAMES).into(),
            port: Some(match rng.u8(..4) {
                0 => PortRef::Name("http".into()),
                1 => PortRef::Number(81),
                _ => PortRef::Number(80),
            }),
        },
    }
}

fn ingress(rng: &mut Rng) -> Object {
    let annotations = many(rng, 3, |rng| ANNOTATIONS[rng.usize(..ANNOTATIONS.len())]);
    Object::Ingress(Ingress {
        meta: meta(rng),
        annotations: annotations.into_iter().map(|(key, value)| (key.into(), value.into())).collect(),
        class: maybe(rng, 0.3, |rng| pick(rng, &["own", "other"]).into()),
        default_backend: maybe(rng, 0.3, backend),
        rules: many(rng, 3, |rng| IngressRule {
            host: pick(rng, &HOSTS).into(),
            paths: many(rng, 3, |rng| IngressPath {
                path: pick(rng, &PATHS).into(),
                path_type: TYPES[rng.usize(..TYPES.len()).saturating_sub(1)].into(),
                backend: backend(rng),
            }),
        }),
        tls: many(rng, 2, |rng| IngressTls {
            hosts: many(rng, 2, |rng| pick(rng, &HOSTS).into()),
            secret: maybe(rng, 0.9, |rng| pick(rng, &NAMES).into()),
        }),
    })
}

fn labels(rng: &mut Rng) -> Labels {
    many(rng, 2, |rng| (pick(rng, &["app", "tier"]).into(), pick(rng, &["v", "w"]).into()))
        .into_iter()
        .collect()
}

fn service_port(rng: &mut Rng) -> ServicePort {
    ServicePort {
        name: pick(rng, &["http", ""]).into(),
        port: rng.u16(80..82),
        target: match rng.u8(..3) {
            0 => TargetPort::Same,
            1 => TargetPort::Number(8080),
            _ => TargetPort::Name("web".into()),
        },
        protocol: if rng.u8(..6) == 0 { Protocol::Udp } else { Protocol::Tcp },
        app_protocol: maybe(rng, 0.2, |rng| pick(rng, &["https", "grpc"]).into()),
        node_port: maybe(rng, 0.5, |rng| rng.u16(30000..30002)),
    }
}

fn labels_of_service(rng: &mut Rng) -> Labels {
    let slow = maybe(rng, 0.3, |rng| pick(rng, &["10s", "soon"]).into());
    slow.into_iter().map(|value| ("lockgate.io/slow-start".into(), value)).collect()
}

fn exposure(rng: &mut Rng) -> Exposure {
    Exposure {
        via: [Via::ClusterIp, Via::NodePort, Via::LoadBalancer][rng.usize(..3)],
        headless: rng.u8(..8) == 0,
        load_balancer_ips: many(rng, 2, |rng| [10, 97, 0, rng.u8(..2)].into()),
        source_ranges: maybe(rng, 0.3, |rng| many(rng, 1, |_| "192.168.0.0/16".parse().unwrap())),
        internal_local: rng.u8(..4) == 0,
        external_local: rng.u8(..3) == 0,
        health_check_port: maybe(rng, 0.5, |rng| rng.u16(32000..32002)),
        affinity: maybe(rng, 0.2, |rng| rng.u32(1..3)),
        proxy_name: maybe(rng, 0.1, |_| "other".into()),
        external_ips: many(rng, 1, |rng| [10, 98, 0, rng.u8(..2)].into()),
    }
}

fn service(rng: &mut Rng) -> Object {
    Object::Service(Service {
        meta: meta(rng),
        kind: if rng.u8(..8) == 0 { ServiceKind::ExternalName } else { ServiceKind::Endpoints },
        addresses: many(rng, 1, |rng| [10, 96, 0, rng.u8(..2)].into()),
        selector: labels(rng),
        ports: many(rng, 3, service_port),
        publish_not_ready: rng.u8(..8) == 0,
        uid: maybe(rng, 0.5, |rng| pick(rng, &["u1", "u2"]).into()),
        annotations: labels_of_service(rng),
        prefers_zone: rng.bool(),
        exposure: exposure(rng),
    })
}

fn slice(rng: &mut Rng) -> Object {
    Object::EndpointSlice(EndpointSlice {
        meta: meta(rng),
        service: maybe(rng, 0.9, |rng| pick(rng, &NAMES).into()),
        ports: many(rng, 2, |rng| SlicePort {
            name: pick(rng, &["http", ""]).into(),
            port: 8080,
            protocol: Protocol::Tcp,
            app_protocol: maybe(rng, 0.2, |_| "kubernetes.io/h2c".into()),
        }),
        endpoints: many(rng, 3, |rng| SliceEndpoint {
            address: [10, 0, 0, rng.u8(..3)].into(),
            ready: rng.bool(),
            serving: rng.bool(),
            terminating: rng.bool(),
            zone: maybe(rng, 0.2, |_| "east".into()),
            for_zones: maybe(rng, 0.7, |_| "west".into()).into_iter().collect(),
            for_nodes: maybe(rng, 0.5, |rng| pick(rng, &NAMES).into()).into_iter().collect(),
            node: maybe(rng, 0.5, |rng| pick(rng, &NAMES).into()),
        }),
        triggered: None,
    })
}

fn pod(rng: &mut Rng) -> Object {
    Object::Pod(Pod {
        meta: meta(rng),
        labels: labels(rng),
        addresses: many(rng, 1, |rng| [10, 0, 1, rng.u8(..3)].into()),
        phase: pick(rng, &["Running", "", "Failed"]).into(),
        ready: maybe(rng, 0.5, |rng| rng.bool()),
        terminating: rng.u8(..4) == 0,
        node: maybe(rng, 0.5, |rng| pick(rng, &NAMES).into()),
        ports: many(rng, 1, |_| ContainerPort { name: "web".into(), port: 8081, protocol: Protocol::Tcp }),
    })
}

fn secret(rng: &mut Rng) -> Object {
    let (chain, _) = &CERTIFICATES[rng.usize(..CERTIFICATES.len())];
    let (_, key) = &CERTIFICATES[rng.usize(..CERTIFICATES.len())];
    let matching = CERTIFICATES.iter().find(|(other, _)| other == chain).map(|(_, key)| key).unwrap();
    let key = if rng.u8(..4) == 0 { key } else { matching };
    Object::Secret(Secret {
        meta: meta(rng),
        kind: if rng.u8(..8) == 0 { "Opaque" } else { "kubernetes.io/tls" }.into(),
        certificate: maybe(rng, 0.9, |_| chain.as_slice().into()),
        key: maybe(rng, 0.9, |_| key.as_slice().into()),
    })
}

fn cluster_scoped(mut meta: Meta) -> Meta {
    meta.namespace = "".into();
    meta
}

fn config_map(rng: &mut Rng) -> Object {
    let data = many(rng, 3, |rng| {
        let port = pick(rng, &["9000", "9001", "53", "port"]);
        let text = format!("n/{}:{}", pick(rng, &NAMES), pick(rng, &["80", "http", "81:PROXY"]));
        (port.into(), if rng.u8(..8) == 0 { "nothing".into() } else { text.into() })
    });
    let headers = many(rng, 2, |rng| {
        let name = pick(rng, &["X-Frame-Options", "X-Team", "Connection"]);
        (name.into(), pick(rng, &["DENY", "", "a\nb"]).into())
    });
    let data = if rng.bool() { data } else { headers };
    Object::ConfigMap(ConfigMap { meta: meta(rng), data: data.into_iter().collect() })
}

fn object(rng: &mut Rng) -> Object {
    match rng.u8(..22) {
        0..8 => ingress(rng),
        8..11 => service(rng),
        11..13 => slice(rng),
        13..15 => pod(rng),
        15..18 => secret(rng),
        18 => {
            let class = IngressClass {
                meta: cluster_scoped(meta(rng)),
                is_default: rng.bool(),
                ..IngressClass::default()
            };
            Object::IngressClass(IngressClass { meta: Meta { name: "own".into(), ..class.meta }, ..class })
        }
        19..21 => config_map(rng),
        _ => Object::Node(Node {
            meta: cluster_scoped(meta(rng)),
            zone: maybe(rng, 0.7, |rng| pick(rng, &["west", "north"]).into()),
            addresses: many(rng, 2, |rng| [192, 168, 0, rng.u8(..2)].into()),
            ..Node::default()
        }),
    }
}

fn options(rng: &mut Rng) -> Options {
    Options {
        ingress_class: maybe(rng, 0.4, |_| "own".to_owned()),
        require_class: rng.u8(..4) == 0,
        default_certificate: maybe(rng, 0.4, |rng| Key::new("n", pick(rng, &NAMES))),
        streams: StreamOptions {
            tcp_services: maybe(rng, 0.6, |rng| Key::new("n", pick(rng, &NAMES))),
            udp_services: maybe(rng, 0.6, |rng| Key::new("n", pick(rng, &NAMES))),
            reserved: [9001].into(),
            ..StreamOptions::default()
        },
        headers: HeaderOptions {
            proxy_set_headers: maybe(rng, 0.5, |rng| Key::new("n", pick(rng, &NAMES))),
            add_headers: maybe(rng, 0.5, |rng| Key::new("n", pick(rng, &NAMES))),
            allowed_response_headers: many(rng, 2, |rng| {
                pick(rng, &["x-frame-options", "x-team"]).to_owned()
            }),
        },
        load_balance: Balance::default(),
        node: maybe(rng, 0.7, |rng| NodeOptions {
            name: "one".into(),
            external_ips: rng.bool(),
            ..NodeOptions::default()
        }),
    }
}

/// What holds for every table, whatever the objects.
fn check_invariants(desired: &Desired, store: &Store) {
    let services = &desired.services;
    for (frontend, target) in &services.frontends {
        assert!(services.services.contains_key(&target.service), "{frontend} leads nowhere");
    }
    let mut named = BTreeSet::new();
    for host in desired.routes.hosts.values() {
        let paths: BTreeSet<_> = host.rules.iter().map(|rule| &rule.path).collect();
        assert_eq!(paths.len(), host.rules.len(), "a path is there twice");
        for rule in &host.rules {
            let Action::Forward(split) = &rule.action else { continue };
            assert!(!split.backends.is_empty());
            assert!(split.backends[0].canary.is_empty());
            assert!(split.backends[1..].iter().all(|backend| !backend.canary.is_empty()));
            assert!(split.backends.iter().map(|backend| u64::from(backend.weight)).sum::<u64>() > 0);
            assert!(split.overrides.iter().all(|one| (1..split.backends.len()).contains(&one.backend)));
            named.extend(split.backends.iter().map(|backend| backend.pool.clone()));
        }
    }
    for (key, listener) in &desired.routes.listeners {
        assert!(desired.routes.pools.contains_key(&listener.pool), "{key} goes nowhere");
        named.insert(listener.pool.clone());
    }
    for (key, pool) in &desired.routes.pools {
        assert!(named.contains(key), "no rule names {key:?}");
        assert!(pool.endpoints.is_sorted());
    }
    for certificates in desired.routes.certificates.values() {
        let algorithms: BTreeSet<_> = certificates.iter().map(|one| one.algorithm()).collect();
        assert_eq!(algorithms.len(), certificates.len());
        assert!(!certificates.is_empty());
    }
    for key in store.ingresses.keys() {
        assert!(desired.statuses.contains_key(&key.reference(Kind::Ingress)), "{key} has no status");
    }
}

#[test]
fn any_sequence_of_edits_ends_where_a_fresh_start_does() {
    for seed in 0..80 {
        let mut rng = Rng::with_seed(seed);
        let options = options(&mut rng);
        let mut translator = Translator::new(options.clone());
        let mut store = Store::default();
        for step in 0..40 {
            for _ in 0..rng.usize(1..4) {
                let object = object(&mut rng);
                if rng.u8(..3) == 0 {
                    store.remove(&object.reference());
                } else {
                    store.apply(object);
                }
            }
            let incremental = translator.translate(&store);
            let fresh = translate(&store, &options);
            assert_eq!(incremental, fresh, "seed {seed}, step {step}");
            check_invariants(&fresh, &store);
        }
        assert_eq!(translator.translate(&Store::default()), translate(&Store::default(), &options));
        let nothing_stayed = translator.hosts.is_empty()
            && translator.pools.is_empty()
            && translator.ingresses.is_empty()
            && translator.endpoints.is_empty()
            && translator.services.is_empty();
        assert!(nothing_stayed, "seed {seed}: something stayed behind");
    }
}

fn numbered_ingress(number: usize, service: &str) -> Object {
    Object::Ingress(Ingress {
        meta: Meta { namespace: "n".into(), name: format!("i{number}").into(), created: None },
        rules: vec![IngressRule {
            host: format!("h{number}.example").into(),
            paths: vec![IngressPath {
                path: "/".into(),
                path_type: "Prefix".into(),
                backend: IngressBackend::Service { name: service.into(), port: Some(PortRef::Number(80)) },
            }],
        }],
        ..Ingress::default()
    })
}

fn numbered_service(number: usize, port: u16) -> Object {
    Object::Service(Service {
        meta: Meta { namespace: "n".into(), name: format!("s{number}").into(), created: None },
        ports: vec![ServicePort { port, ..ServicePort::default() }],
        ..Service::default()
    })
}

#[test]
fn the_work_follows_the_change() {
    let mut store = Store::default();
    for number in 0..2000 {
        store.apply(numbered_ingress(number, &format!("s{}", number / 2)));
    }
    for number in 0..1000 {
        store.apply(numbered_service(number, 80));
    }
    let mut translator = Translator::new(Options::default());
    translator.translate(&store);
    // Hosts, Services, certificates, statuses made again.
    let mut work = |store: &Store| {
        let before = translator.made;
        translator.translate(store);
        let after = translator.made;
        [after.hosts - before.hosts, after.services - before.services, after.statuses - before.statuses]
    };
    assert_eq!(work(&store), [0, 0, 0]);
    store.apply(numbered_ingress(7, "s3"));
    assert_eq!(work(&store), [0, 0, 0], "an equal object is no change");
    store.apply(numbered_ingress(7, "s9"));
    assert_eq!(work(&store), [1, 2, 1], "its host; the old and the new Service; its status");
    store.apply(numbered_service(5, 81));
    assert_eq!(work(&store), [0, 1, 2], "two Ingresses name it");
    store.remove(&numbered_ingress(7, "s9").reference());
    assert_eq!(work(&store), [1, 1, 1]);
}

#[test]
fn hosts_that_did_not_change_are_shared() {
    let mut store = Store::default();
    (0..10).for_each(|number| store.apply(numbered_ingress(number, "s")));
    let mut translator = Translator::new(Options::default());
    let before = translator.translate(&store);
    store.apply(numbered_ingress(3, "t"));
    let after = translator.translate(&store);
    for number in 0..10 {
        let host = HostPattern::new(&format!("h{number}.example"));
        let shared = Arc::ptr_eq(&before.routes.hosts[&host], &after.routes.hosts[&host]);
        assert_eq!(shared, number != 3);
    }
}

#[test]
fn ten_thousand_rules_in_one_ingress() {
    let paths = (0..10_000).map(|number| IngressPath {
        path: format!("/{number}").into(),
        path_type: "Prefix".into(),
        backend: IngressBackend::Service { name: "s".into(), port: Some(PortRef::Number(80)) },
    });
    let ingress = Ingress {
        meta: Meta { namespace: "n".into(), name: "big".into(), created: None },
        rules: vec![IngressRule { host: "h.example".into(), paths: paths.collect() }],
        ..Ingress::default()
    };
    let mut store = Store::default();
    store.apply(Object::Ingress(ingress));
    let desired = translate(&store, &Options::default());
    assert_eq!(desired.routes.hosts.values().next().unwrap().rules.len(), 10_000);
    let status = desired.statuses.values().next().unwrap();
    assert_eq!(status.len(), 1, "one notice for one missing Service");
    assert!(status[0].message.ends_with("(the same in 9999 more places)"));
}

/// Replaces a random node.
fn mutate(rng: &mut Rng, value: &mut serde_yaml::Value) {
    use serde_yaml::Value;
    let deeper = match value {
        Value::Mapping(mapping) if !mapping.is_empty() && rng.u8(..8) > 0 => {
            let position = rng.usize(..mapping.len());
            mapping.iter_mut().nth(position).map(|(_, value)| value)
        }
        Value::Sequence(sequence) if !sequence.is_empty() && rng.u8(..8) > 0 => {
            let position = rng.usize(..sequence.len());
            sequence.get_mut(position)
        }
        _ => None,
    };
    if let Some(deeper) = deeper {
        return mutate(rng, deeper);
    }
    *value = match rng.u8(..9) {
        0 => Value::Null,
        1 => Value::from(rng.i64(..)),
        2 => Value::from("é/%00\n*"),
        3 => Value::from("/".repeat(5000)),
        4 => Value::Sequence(vec![value.clone(), value.clone()]),
        5 => Value::Bool(true),
        6 => Value::from(rng.f64()),
        7 => Value::from(i64::from(rng.u16(..))),
        _ => Value::Mapping([("a".into(), value.clone())].into_iter().collect()),
    };
}

#[test]
fn no_document_makes_it_panic() {
    let golden = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/golden");
    let mut documents: Vec<serde_yaml::Value> = Vec::new();
    for case in std::fs::read_dir(golden).unwrap() {
        let file = case.unwrap().path().join("in/objects.yaml");
        let Ok(text) = std::fs::read_to_string(file) else { continue };
        let all = serde_yaml::Deserializer::from_str(&text);
        documents.extend(all.map(|document| serde::Deserialize::deserialize(document).unwrap()));
    }
    assert!(documents.len() > 50);
    let mut rng = Rng::with_seed(1);
    let mut translator = Translator::new(Options::default());
    let mut store = Store::default();
    for _ in 0..3000 {
        let mut document = documents[rng.usize(..documents.len())].clone();
        (0..rng.u8(1..4)).for_each(|_| mutate(&mut rng, &mut document));
        for parsed in parse(document) {
            if let Parsed::Object(object, _) = parsed {
                store.apply(object);
            }
        }
        check_invariants(&translator.translate(&store), &store);
    }
}

#[test]
fn canaries_of_one_path_are_bounded() {
    let mut store = Store::default();
    store.apply(numbered_ingress(0, "s"));
    for number in 0..70 {
        let Object::Ingress(mut canary) = numbered_ingress(0, "s") else { unreachable!() };
        canary.meta.name = format!("canary{number:02}").into();
        let annotations = [("canary", "true"), ("canary-weight", "1")];
        let prefixed =
            |(key, value): (&str, &str)| (format!("{}{key}", annotations::PREFIX).into(), value.into());
        canary.annotations = annotations.map(prefixed).into_iter().collect();
        store.apply(Object::Ingress(canary));
    }
    let desired = translate(&store, &Options::default());
    let host = desired.routes.hosts.values().next().unwrap();
    let Action::Forward(split) = &host.rules[0].action else { panic!() };
    assert_eq!(split.backends.len(), 1 + canary::MOST);
    assert_eq!(split.backends[0].weight, 36);
    let refused =
        |notices: &&Arc<Vec<Notice>>| notices.iter().any(|one| one.message.starts_with("more than 64"));
    assert_eq!(desired.statuses.values().filter(refused).count(), 6);
}
