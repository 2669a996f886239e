//! From a changed object to a live route: translate, compile, one store.
//!
//! `one_change/N` edits one Ingress among N; its cost must follow the change,
//! not N. `cold/N` is the first table of N Ingresses.

use std::sync::Arc;

use criterion::{BatchSize, BenchmarkId, Criterion, criterion_group, criterion_main};
use lockgate_controller::objects::{Object, Parsed, parse};
use lockgate_controller::store::Store;
use lockgate_controller::translate::{Options, Translator};
use lockgate_proxy::metrics::Metrics;
use lockgate_proxy::router::{Found, Live, routes};

/// An Ingress with ten paths on a host of its own.
fn ingress(number: usize, service: &str) -> Object {
    let paths: String = (0..10)
        .map(|p| {
            format!(
                "{{path: /p{p}, pathType: Prefix, backend: {{service: {{name: {service}, port: {{number: 80}}}}}}}},"
            )
        })
        .collect();
    object(&format!(
        "{{apiVersion: networking.k8s.io/v1, kind: Ingress, metadata: {{name: i{number}, namespace: default}}, \
         spec: {{rules: [{{host: h{number}.example, http: {{paths: [{paths}]}}}}]}}}}"
    ))
}

fn object(yaml: &str) -> Object {
    let value = serde_yaml::from_str(yaml).expect("YAML made here");
    match parse(value).pop() {
        Some(Parsed::Object(object, _)) => object,
        _ => panic!("not an object: {yaml}"),
    }
}

fn services() -> Vec<Object> {
    ["a", "b"]
        .iter()
        .flat_map(|name| {
            [
                object(&format!(
                    "{{apiVersion: v1, kind: Service, metadata: {{name: {name}, namespace: default}}, \
                     spec: {{clusterIP: 10.0.0.1, ports: [{{port: 80}}]}}}}"
                )),
                object(&format!(
                    "{{apiVersion: discovery.k8s.io/v1, kind: EndpointSlice, addressType: IPv4, \
                     metadata: {{name: {name}-1, namespace: default, labels: {{kubernetes.io/service-name: {name}}}}}, \
                     ports: [{{port: 8080}}], endpoints: [{{addresses: [10.1.0.1], conditions: {{ready: true}}}}]}}"
                )),
            ]
        })
        .collect()
}

fn store(count: usize) -> Store {
    let mut store = Store::default();
    for object in services() {
        store.apply(object);
    }
    for number in 0..count {
        store.apply(ingress(number, "a"));
    }
    store
}

fn one_change(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("one_change");
    for count in [1_000, 10_000, 100_000] {
        let mut store = store(count);
        let mut translator = Translator::new(Options::default());
        let live = Arc::new(Live { metrics: Metrics::new(1), ..Live::default() });
        let (mut publisher, routes) = routes(live);
        publisher.publish(translator.translate(&store).routes);
        let changed = count / 2;
        let versions = [ingress(changed, "b"), ingress(changed, "a")];
        let mut turn = 0;
        group.bench_function(BenchmarkId::from_parameter(count), |bencher| {
            bencher.iter(|| {
                store.apply(versions[turn % 2].clone());
                turn += 1;
                publisher.publish(translator.translate(&store).routes)
            });
        });
        let router = routes.load_full();
        assert!(matches!(router.find(&format!("h{changed}.example"), b"/p7"), Found::Rule(_)));
    }
    group.finish();
}

fn cold(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("cold");
    group.sample_size(10);
    for count in [1_000, 10_000, 100_000] {
        let store = store(count);
        group.bench_function(BenchmarkId::from_parameter(count), |bencher| {
            bencher.iter_batched(
                || routes(Arc::new(Live { metrics: Metrics::new(1), ..Live::default() })),
                |(mut publisher, routes)| {
                    publisher.publish(Translator::new(Options::default()).translate(&store).routes);
                    (publisher, routes)
                },
                BatchSize::PerIteration,
            );
        });
    }
    group.finish();
}

criterion_group!(benches, one_change, cold);
criterion_main!(benches);
