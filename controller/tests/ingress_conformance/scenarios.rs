// The scenarios of kubernetes-sigs/ingress-controller-conformance, in our own
// words: plain data, included by every test that can answer a request.

/// One request to the Ingress of a feature.
pub(crate) struct Scenario {
    /// What it shows.
    pub(crate) name: &'static str,
    /// `https` also expects the certificate of the host.
    pub(crate) scheme: &'static str,
    /// The `Host` header.
    pub(crate) host: &'static str,
    /// The request target.
    pub(crate) path: &'static str,
    /// The Service that answers with 200; `None` is 404.
    pub(crate) served_by: Option<&'static str>,
}

/// An Ingress and the requests made to it.
pub(crate) struct Feature {
    /// As the suite names it.
    pub(crate) name: &'static str,
    /// The object.
    pub(crate) ingress: &'static str,
    /// The Services it names, each with a port 8080 named `http`, and how many
    /// endpoints each has.
    pub(crate) services: &'static [(&'static str, usize)],
    /// Only Ingresses of this class are served.
    pub(crate) ingress_class: Option<&'static str>,
    /// The requests.
    pub(crate) scenarios: &'static [Scenario],
}

const fn http(
    name: &'static str,
    host: &'static str,
    path: &'static str,
    served_by: Option<&'static str>,
) -> Scenario {
    Scenario { name, scheme: "http", host, path, served_by }
}

/// Every feature of the suite.
pub(crate) const FEATURES: [Feature; 5] = [
    Feature {
        name: "default backend",
        ingress: "
apiVersion: networking.k8s.io/v1
kind: Ingress
metadata: {name: default-backend}
spec:
  defaultBackend: {service: {name: echo-service, port: {number: 8080}}}",
        services: &[("echo-service", 1)],
        ingress_class: None,
        // One outline with six examples; the methods make no difference to the route.
        scenarios: &[
            http("root of one host", "my-host", "/", Some("echo-service")),
            http("path of one host", "my-host", "/sub-path", Some("echo-service")),
            http("root of another host", "some-host", "/", Some("echo-service")),
            http("path without a known host", "10.0.0.1", "/resource", Some("echo-service")),
            http("path of another host", "some-host", "/resource", Some("echo-service")),
            http("another path of one host", "my-host", "/resource", Some("echo-service")),
        ],
    },
    Feature {
        name: "host rules",
        ingress: "
apiVersion: networking.k8s.io/v1
kind: Ingress
metadata: {name: host-rules}
spec:
  tls: [{hosts: [foo.bar.com], secretName: conformance-tls}]
  rules:
  - host: '*.foo.com'
    http:
      paths:
      - {path: /, pathType: Prefix, backend: {service: {name: wildcard-foo-com, port: {number: 8080}}}}
  - host: foo.bar.com
    http:
      paths:
      - {path: /, pathType: Prefix, backend: {service: {name: foo-bar-com, port: {name: http}}}}",
        services: &[("wildcard-foo-com", 1), ("foo-bar-com", 1)],
        ingress_class: None,
        scenarios: &[
            Scenario {
                name: "a host is served over TLS with its own certificate",
                scheme: "https",
                host: "foo.bar.com",
                path: "/",
                served_by: Some("foo-bar-com"),
            },
            http("a host is served", "foo.bar.com", "/", Some("foo-bar-com")),
            http("another host is not", "subdomain.bar.com", "/", None),
            http("a wildcard stands for one label", "bar.foo.com", "/", Some("wildcard-foo-com")),
            http("and not for two", "baz.bar.foo.com", "/", None),
            http("and not for none", "foo.com", "/", None),
        ],
    },
    Feature {
        name: "ingress class",
        ingress: "
apiVersion: networking.k8s.io/v1
kind: Ingress
metadata: {name: test-ingress-class}
spec:
  ingressClassName: some-invalid-class-name
  rules:
  - host: ingress-class
    http:
      paths:
      - {path: /, pathType: Prefix, backend: {service: {name: ingress-class-prefix, port: {number: 8080}}}}",
        services: &[("ingress-class-prefix", 1)],
        ingress_class: Some("lockgate"),
        scenarios: &[http("an Ingress of another class is not served", "ingress-class", "/", None)],
    },
    Feature {
        name: "load balancing",
        ingress: "
apiVersion: networking.k8s.io/v1
kind: Ingress
metadata: {name: load-balancing}
spec:
  defaultBackend: {service: {name: echo-service, port: {number: 8080}}}",
        services: &[("echo-service", 10)],
        ingress_class: None,
        scenarios: &[http("every endpoint is used", "load-balancing", "/", Some("echo-service"))],
    },
    Feature {
        name: "path rules",
        ingress: "
apiVersion: networking.k8s.io/v1
kind: Ingress
metadata: {name: path-rules}
spec:
  rules:
  - host: exact-path-rules
    http:
      paths:
      - {path: /foo, pathType: Exact, backend: {service: {name: foo-exact, port: {number: 8080}}}}
  - host: prefix-path-rules
    http:
      paths:
      - {path: /foo, pathType: Prefix, backend: {service: {name: foo-prefix, port: {number: 8080}}}}
      - {path: /aaa/bbb, pathType: Prefix, backend: {service: {name: aaa-slash-bbb-prefix, port: {number: 8080}}}}
      - {path: /aaa, pathType: Prefix, backend: {service: {name: aaa-prefix, port: {number: 8080}}}}
  - host: mixed-path-rules
    http:
      paths:
      - {path: /foo, pathType: Prefix, backend: {service: {name: foo-prefix, port: {number: 8080}}}}
      - {path: /foo, pathType: Exact, backend: {service: {name: foo-exact, port: {number: 8080}}}}
  - host: trailing-slash-path-rules
    http:
      paths:
      - {path: /aaa/bbb/, pathType: Prefix, backend: {service: {name: aaa-slash-bbb-slash-prefix, port: {number: 8080}}}}
      - {path: /foo/, pathType: Exact, backend: {service: {name: foo-slash-exact, port: {number: 8080}}}}",
        services: &[
            ("foo-exact", 1),
            ("foo-prefix", 1),
            ("aaa-slash-bbb-prefix", 1),
            ("aaa-prefix", 1),
            ("aaa-slash-bbb-slash-prefix", 1),
            ("foo-slash-exact", 1),
        ],
        ingress_class: None,
        scenarios: &[
            http("an exact path matches itself", "exact-path-rules", "/foo", Some("foo-exact")),
            http("not with a slash behind it", "exact-path-rules", "/foo/", None),
            http("not in another case", "exact-path-rules", "/FOO", None),
            http("not another path", "exact-path-rules", "/bar", None),
            http("a prefix matches itself", "prefix-path-rules", "/foo", Some("foo-prefix")),
            http("and with a slash behind it", "prefix-path-rules", "/foo/", Some("foo-prefix")),
            http("not in another case", "prefix-path-rules", "/FOO", None),
            http("the longer prefix wins", "prefix-path-rules", "/aaa/bbb", Some("aaa-slash-bbb-prefix")),
            http("below it too", "prefix-path-rules", "/aaa/bbb/ccc", Some("aaa-slash-bbb-prefix")),
            http("the shorter one takes the rest", "prefix-path-rules", "/aaa/ccc", Some("aaa-prefix")),
            http("a prefix is made of whole elements", "prefix-path-rules", "/aaaccc", None),
            http("a slash at the end of the request", "prefix-path-rules", "/foo/", Some("foo-prefix")),
            http("exact wins over prefix", "mixed-path-rules", "/foo", Some("foo-exact")),
            http(
                "a slash at the end of a prefix does not count",
                "trailing-slash-path-rules",
                "/aaa/bbb",
                Some("aaa-slash-bbb-slash-prefix"),
            ),
            http(
                "whether the request has it or not",
                "trailing-slash-path-rules",
                "/aaa/bbb/",
                Some("aaa-slash-bbb-slash-prefix"),
            ),
            http("a slash at the end of an exact path counts", "trailing-slash-path-rules", "/foo", None),
        ],
    },
];
