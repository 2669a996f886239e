//! kubernetes-sigs/ingress-controller-conformance at the level of tables: the
//! route that each request would take. The matcher here is the plainest that
//! can be read off the documentation of `RoutingTable`.
#![allow(clippy::unwrap_used)] // a test fails by panicking

use lockgate_controller::objects::{Object, Parsed, parse};
use lockgate_controller::store::Store;
use lockgate_controller::translate::{Options, translate};
use lockgate_proxy::RoutingTable;
use lockgate_proxy::table::{Action, HostPattern, PathMatch, Rule};

#[path = "ingress_conformance/scenarios.rs"]
mod scenarios;

use scenarios::{FEATURES, Feature};

#[test]
fn every_scenario() {
    // The suite counts an outline with its examples as one scenario.
    let outline = FEATURES.iter().find(|feature| feature.name == "default backend").unwrap();
    let scenarios: usize = FEATURES.iter().map(|feature| feature.scenarios.len()).sum();
    assert_eq!(scenarios - outline.scenarios.len() + 1, 25);

    for feature in &FEATURES {
        let options =
            Options { ingress_class: feature.ingress_class.map(str::to_owned), ..Options::default() };
        let desired = translate(&store(feature), &options);
        for scenario in feature.scenarios {
            let at = format!("{}: {}", feature.name, scenario.name);
            let served_by =
                find(&desired.routes, scenario.host, scenario.path).map(|rule| service(rule, &at));
            let expected = scenario.served_by.map(|name| format!("default/{name}"));
            assert_eq!(served_by, expected, "{at}");
            if let Some(name) = scenario.served_by {
                let pool = desired
                    .routes
                    .pools
                    .iter()
                    .find(|(key, _)| key.0.strip_prefix(&format!("default/{name}:")).is_some());
                let expected = feature.services.iter().find(|service| service.0 == name).unwrap().1;
                assert_eq!(pool.unwrap().1.endpoints.len(), expected, "{at}");
            }
            if scenario.scheme == "https" {
                let certificates = &desired.routes.certificates[&HostPattern::new(scenario.host)];
                assert!(certificates[0].covers(scenario.host), "{at}");
            }
        }
    }
}

fn apply(store: &mut Store, yaml: &str) {
    for parsed in parse(serde_yaml::from_str(yaml).unwrap()) {
        match parsed {
            Parsed::Object(object, notices) if notices.is_empty() => store.apply(object),
            other => panic!("{other:?}"),
        }
    }
}

fn store(feature: &Feature) -> Store {
    let mut store = Store::default();
    apply(&mut store, feature.ingress);
    for (position, (name, endpoints)) in feature.services.iter().enumerate() {
        apply(
            &mut store,
            &format!(
                "{{apiVersion: v1, kind: Service, metadata: {{name: {name}}},
                   spec: {{ports: [{{name: http, port: 8080}}]}}}}"
            ),
        );
        let endpoints: String =
            (0..*endpoints).map(|number| format!("{{addresses: [10.0.{position}.{number}]}},")).collect();
        apply(
            &mut store,
            &format!(
                "{{apiVersion: discovery.k8s.io/v1, kind: EndpointSlice, addressType: IPv4,
                   metadata: {{name: {name}, labels: {{kubernetes.io/service-name: {name}}}}},
                   ports: [{{name: http, port: 3000}}], endpoints: [{endpoints}]}}"
            ),
        );
    }
    let issued = rcgen::generate_simple_self_signed(["foo.bar.com".to_owned()]).unwrap();
    let mut secret = lockgate_controller::objects::Secret::default();
    secret.meta.namespace = "default".into();
    secret.meta.name = "conformance-tls".into();
    secret.kind = "kubernetes.io/tls".into();
    secret.certificate = Some(issued.cert.pem().into_bytes().into());
    secret.key = Some(issued.signing_key.serialize_pem().into_bytes().into());
    store.apply(Object::Secret(secret));
    store
}

/// Precise host before wildcard before any; a host that is found decides.
fn find<'a>(table: &'a RoutingTable, host: &str, path: &str) -> Option<&'a Rule> {
    let wildcard = host.split_once('.').map(|(_, rest)| HostPattern::new(&format!("*.{rest}")));
    let patterns = [Some(HostPattern::new(host)), wildcard, Some(HostPattern::any())];
    let rules = &patterns.into_iter().flatten().find_map(|pattern| table.hosts.get(&pattern))?.rules;
    let precedence = |rule: &&Rule| {
        let exact = matches!(rule.path, PathMatch::Exact(_));
        (exact, rule.path.as_str().len())
    };
    rules.iter().filter(|rule| matches(&rule.path, path)).max_by_key(precedence)
}

fn matches(rule: &PathMatch, path: &str) -> bool {
    match rule {
        PathMatch::Exact(exact) => **exact == *path,
        PathMatch::StringPrefix(prefix) => path.starts_with(&**prefix),
        PathMatch::Prefix(prefix) => {
            let rest = path.strip_prefix(prefix.trim_end_matches('/'));
            rest.is_some_and(|rest| rest.is_empty() || rest.starts_with('/'))
        }
    }
}

/// Namespace and name of the Service behind the rule's primary.
fn service(rule: &Rule, at: &str) -> String {
    let Action::Forward(split) = &rule.action else { panic!("{at}: {:?}", rule.action) };
    split.backends[0].pool.0.split(':').next().unwrap().to_owned()
}
