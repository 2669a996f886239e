use super::*;

fn one(yaml: &str) -> Parsed {
    let mut parsed = parse(serde_yaml::from_str(yaml).unwrap());
    assert_eq!(parsed.len(), 1, "{parsed:?}");
    parsed.remove(0)
}

/// The field and message of what is wrong with `yaml`.
fn wrong(yaml: &str) -> (String, String) {
    match one(yaml) {
        Parsed::Invalid { notice, .. } | Parsed::Unsupported { notice, .. } => (notice.field, notice.message),
        other => panic!("{other:?}"),
    }
}

#[test]
fn unknown_fields_are_warnings_with_their_path() {
    let Parsed::Object(Object::Ingress(ingress), notices) = one("
        apiVersion: networking.k8s.io/v1
        kind: Ingress
        metadata: {name: web, annotations: {other.example/x: dropped}}
        spec: {rules: [{host: a.example, http: {paths: [{path: /, pathTyp: Prefix}]}}]}
        status: {fromTheFuture: 1}")
    else {
        panic!()
    };
    assert_eq!(&*ingress.meta.namespace, "default");
    assert!(ingress.annotations.is_empty());
    assert_eq!(notices.len(), 1);
    assert_eq!(notices[0].field, ".spec.rules[0].http.paths[0].pathTyp");
    assert_eq!(notices[0].level, super::super::Level::Warning);
}

#[test]
fn mistakes_have_a_field_path() {
    let cases = [
        ("[1, 2]", ""),
        ("a: 1", ""),
        ("kind: Service", ".apiVersion"),
        ("apiVersion: v1", ".kind"),
        ("{apiVersion: v1, kind: Service}", ".metadata.name"),
        ("{apiVersion: v1, kind: Service, metadata: {generateName: a-}}", ".metadata.name"),
        ("{apiVersion: v1, kind: Service, metadata: {name: A_b}}", ".metadata.name"),
        ("{apiVersion: v1, kind: Service, metadata: {name: a/b}}", ".metadata.name"),
        ("{apiVersion: v1, kind: Service, metadata: {name: a, namespace: a.b}}", ".metadata.namespace"),
        (
            "{apiVersion: v1, kind: Service, metadata: {name: a}, spec: {ports: [{port: http}]}}",
            ".spec.ports[0].port",
        ),
        (
            "{apiVersion: networking.k8s.io/v1, kind: Ingress, metadata: {name: a, annotations: {b.c/d: 5}}}",
            ".metadata.annotations[\"b.c/d\"]",
        ),
        ("{apiVersion: extensions/v1beta1, kind: Ingress, metadata: {name: a}}", ".apiVersion"),
        ("{apiVersion: v1, kind: Ingress, metadata: {name: a}}", ".apiVersion"),
        ("{apiVersion: v1, kind: Endpoints, metadata: {name: a}}", ".kind"),
        ("{apiVersion: gateway.networking.k8s.io/v1, kind: HTTPRoute, metadata: {name: a}}", ".kind"),
        ("{apiVersion: v1, kind: Secret, metadata: {name: a}, data: {tls.key: '???'}}", ".data[\"tls.key\"]"),
    ];
    for (yaml, field) in cases {
        assert_eq!(wrong(yaml).0, field, "{yaml}");
    }
}

#[test]
fn a_broken_secret_never_shows_its_contents() {
    for data in ["hunter2", "{tls.key: hunter2}", "{tls.key: [hunter2]}", "[hunter2]"] {
        let yaml = format!("{{apiVersion: v1, kind: Secret, metadata: {{name: a}}, data: {data}}}");
        let parsed = one(&yaml);
        assert!(matches!(parsed, Parsed::Invalid { .. }));
        assert!(!format!("{parsed:?}").contains("hunter2"), "{parsed:?}");
    }
}

#[test]
fn other_kinds_and_other_groups_are_unused() {
    for yaml in [
        "{apiVersion: apps/v1, kind: Deployment, metadata: {name: a}}",
        "{apiVersion: serving.knative.dev/v1, kind: Service, metadata: {name: a}}",
        "{apiVersion: example.com/v1, kind: PriceList, spec: {}}",
    ] {
        assert!(matches!(one(yaml), Parsed::Unused(_)), "{yaml}");
    }
    assert!(parse(Value::Null).is_empty());
}

#[test]
fn lists_expand() {
    let parsed = parse(
        serde_yaml::from_str(
            "{apiVersion: v1, kind: List, items: [
                {apiVersion: v1, kind: ServiceList, items: [{metadata: {name: a}}, {metadata: {name: b}}]},
                {apiVersion: v1, kind: Node, metadata: {name: n, labels: {topology.kubernetes.io/zone: z}},
                 status: {capacity: {cpu: 4}}}]}",
        )
        .unwrap(),
    );
    let names: Vec<String> = parsed
        .iter()
        .map(|parsed| match parsed {
            Parsed::Object(object, notices) if notices.is_empty() => object.reference().to_string(),
            other => panic!("{other:?}"),
        })
        .collect();
    assert_eq!(names, ["Service default/a", "Service default/b", "Node n"]);
}

#[test]
fn a_pod_is_read_past_what_does_not_matter() {
    let Parsed::Object(Object::Pod(pod), notices) = one("
        apiVersion: v1
        kind: Pod
        metadata: {name: web, labels: {app: web}, creationTimestamp: null}
        spec: {containers: [{name: a, resources: {limits: {cpu: 1}}, ports: [{name: http, containerPort: 8080}]}]}
        status: {podIP: 10.0.0.1}")
    else {
        panic!()
    };
    assert!(notices.is_empty());
    assert_eq!((pod.ready, pod.addresses.len(), pod.ports.len()), (None, 1, 1));
}
