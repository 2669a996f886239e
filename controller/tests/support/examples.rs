//! The Ingresses that others wrote, and the answers they meant.

/// A Service with toys behind it.
pub struct Backend {
    pub namespace: &'static str,
    pub name: &'static str,
    /// Name, which may be empty, and number. Each port has a toy of its own that
    /// answers `service:number`.
    pub ports: &'static [(&'static str, u16)],
    /// The example presumes that it exists; otherwise the files bring it.
    pub presumed: bool,
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
pub enum Right {
    /// 200 by this `service:port`.
    By(&'static str),
    /// 200 by this `service:port`, with a cookie that has these parts.
    Sticky(&'static str, &'static [&'static str]),
    /// This status, by the gate itself.
    Status(u16),
    /// 308 to the same by https.
    ToHttps,
}

use Right::{By, Status, Sticky, ToHttps};

/// One request.
pub enum Ask {
    Plain(&'static str, &'static str, Right),
    /// With only the certificate in this Secret trusted.
    Tls(&'static str, &'static str, &'static str, Right),
    /// The certificate in this Secret is not shown for this host.
    OtherCertificate(&'static str, &'static str),
}

use Ask::{OtherCertificate, Plain, Tls};

/// A file and what its author meant.
pub struct Example {
    /// Below the shared manifests.
    pub file: &'static str,
    /// Other files that belong to it.
    pub with: &'static [&'static str],
    pub backends: &'static [Backend],
    /// Namespace, name and hosts of the Secrets that must exist beforehand.
    pub secrets: &'static [(&'static str, &'static str, &'static [&'static str])],
    pub asks: &'static [Ask],
    /// Parts of what has to be said about it.
    pub said: &'static [&'static str],
}

const DECOY: (&str, u16) = ("decoy", 81);
const HTTP_SVC: &[&str] = &["ingress-nginx/http-svc.yaml"];
const BEHIND_HTTP_SVC: &[Backend] = &[brought("default", "http-svc", &[("http", 80)])];

/// Every file with an Ingress.
pub const EXAMPLES: &[Example] = &[
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
            Plain("stickyingress.example.com", "/", Sticky("http-svc:80", &["route=", "Max-Age=172800"])),
            Plain("example.com", "/", Status(404)),
        ],
        said: &[],
    },
    Example {
        file: "ingress-nginx/affinity-cookie-ingress-samesite.yaml",
        with: HTTP_SVC,
        backends: BEHIND_HTTP_SVC,
        secrets: &[],
        asks: &[
            Plain(
                "stickyingress-samesite-none.example.com",
                "/",
                Sticky("http-svc:80", &["SSNONE=", "Secure", "SameSite=None"]),
            ),
            Plain(
                "stickyingress-samesite-strict.example.com",
                "/x",
                Sticky("http-svc:80", &["STRICTCOOKIENAME=", "SameSite=Strict"]),
            ),
            Plain("stickyingress.example.com", "/", Status(404)),
        ],
        said: &[],
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
