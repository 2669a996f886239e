//! Header edits, whatever the client and the endpoint speak.
#![allow(clippy::unwrap_used, reason = "a test says what it expects by panicking")]

#[path = "support/peers.rs"]
mod peers;
#[path = "support/toy.rs"]
mod toy;

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering::SeqCst};

use http::{HeaderMap, Method, Request, Response};
use hyper::body::Incoming;
use lockgate_proxy::table::{
    Action, Authority, FieldEdit, FieldEdits, FieldName, FieldValue, HeaderEdits, Host, HostPattern,
    PathMatch, Persistence, RoutingTable, UpstreamProtocol,
};
use peers::*;

fn set(name: &str, value: &str) -> FieldEdit {
    FieldEdit::Set(FieldName::new(name).unwrap(), FieldValue::new(value).unwrap())
}

fn add(name: &str, value: &str) -> FieldEdit {
    FieldEdit::Add(FieldName::new(name).unwrap(), FieldValue::new(value).unwrap())
}

fn remove(name: &str) -> FieldEdit {
    FieldEdit::Remove(FieldName::new(name).unwrap())
}

fn request(edits: impl IntoIterator<Item = FieldEdit>) -> HeaderEdits {
    HeaderEdits { request: FieldEdits::new(edits), ..HeaderEdits::default() }
}

fn response(edits: impl IntoIterator<Item = FieldEdit>) -> HeaderEdits {
    HeaderEdits { response: FieldEdits::new(edits), ..HeaderEdits::default() }
}

/// One rule for everything, with these edits.
fn table(endpoints: &[SocketAddr], speaks: UpstreamProtocol, edits: HeaderEdits) -> RoutingTable {
    let mut table = toy::table(endpoints, speaks);
    let mut rule = toy::rule(PathMatch::Prefix("/".into()), "default/app:80");
    rule.edits = Some(Arc::new(edits));
    table.hosts.insert(HostPattern::any(), Arc::new(Host { rules: vec![rule] }));
    with_certificate(table, &[HOST])
}

/// Answers with the head it got, and with fields to be edited.
async fn edited(request: Request<Incoming>) -> Response<Body> {
    let answer = Response::builder()
        .header("server", "app")
        .header("x-old", "1")
        .header("x-old", "2")
        .header("x-kept", "1")
        .header("set-cookie", "a=1")
        .header("set-cookie", "b=2");
    let answer = answer.body(()).unwrap();
    let (parts, ()) = answer.into_parts();
    let body = app(request).await.into_body();
    Response::from_parts(parts, body)
}

fn all<'a>(headers: &'a HeaderMap, name: &str) -> Vec<&'a str> {
    headers.get_all(name).iter().map(|value| value.to_str().unwrap()).collect()
}

fn lines<'a>(text: &'a str, name: &str) -> Vec<&'a str> {
    let of_name = |line: &'a str| line.split_once(": ").filter(|(n, _)| *n == name).map(|(_, value)| value);
    text.lines().filter_map(of_name).collect()
}

/// What a request carries, the edits, and what reaches the endpoint of which name.
type RequestCase = (Vec<FieldEdit>, &'static [(&'static str, &'static [&'static str])]);

#[tokio::test(flavor = "multi_thread")]
async fn requests_reach_every_endpoint_as_edited() {
    let cases: Vec<RequestCase> = vec![
        (vec![], &[("x-sent", &["1", "2"]), ("user-agent", &["test"]), ("cookie", &["a=1"])]),
        (vec![set("X-New", "n")], &[("x-new", &["n"]), ("x-sent", &["1", "2"])]),
        (vec![set("X-SENT", "3")], &[("x-sent", &["3"]), ("x-sense", &["5"])]),
        (vec![add("X-Sent", "3")], &[("x-sent", &["1", "2", "3"])]),
        (vec![remove("x-Sent")], &[("x-sent", &[]), ("x-sense", &["5"])]),
        (vec![add("X-New", "1"), add("X-New", "2")], &[("x-new", &["1", "2"])]),
        (
            vec![set("User-Agent", "lockgate"), remove("Cookie")],
            &[("user-agent", &["lockgate"]), ("cookie", &[])],
        ),
        // What the proxy says itself.
        (
            vec![set("X-Forwarded-Proto", "gopher"), set("X-Request-ID", "fixed"), remove("X-Scheme")],
            &[
                ("x-forwarded-proto", &["gopher"]),
                ("x-request-id", &["fixed"]),
                ("x-scheme", &[]),
                ("x-forwarded-for", &["127.0.0.1"]),
                ("x-forwarded-host", &[HOST]),
            ],
        ),
        // What the client nominates for this hop is not what the rule sets.
        (vec![set("X-Hop", "ours")], &[("x-hop", &["ours"])]),
    ];
    for speaks in EVERY_ENDPOINT {
        let endpoint = endpoint(speaks, edited).await;
        let (proxy, mut publisher) = toy::start(toy::config(), RoutingTable::default());
        for (edits, expected) in &cases {
            publisher.publish(table(&[endpoint], speaks, request(edits.iter().cloned())));
            for comes in EVERY_CLIENT {
                let mut client = Client::connect(&proxy, comes).await;
                let mut request = client.request(Method::GET, "/head");
                for (name, value) in [
                    ("x-sent", "1"),
                    ("X-Sent", "2"),
                    ("x-sense", "5"),
                    ("user-agent", "test"),
                    ("cookie", "a=1"),
                ] {
                    request = request.header(name, value);
                }
                if comes == Comes::Http1 {
                    request = request.header("connection", "x-hop").header("x-hop", "theirs");
                }
                let answer = Answer::of(client.send(request.body(empty()).unwrap()).await.unwrap()).await;
                for (name, values) in *expected {
                    let found = lines(answer.text(), name);
                    assert_eq!(found, *values, "{name}, {comes:?}, {speaks:?}, {edits:?}");
                }
            }
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn responses_reach_every_client_as_edited() {
    let cases: Vec<RequestCase> = vec![
        (vec![], &[("x-old", &["1", "2"]), ("server", &["app"]), ("set-cookie", &["a=1", "b=2"])]),
        (vec![set("X-New", "n")], &[("x-new", &["n"]), ("x-old", &["1", "2"])]),
        (vec![set("X-OLD", "3")], &[("x-old", &["3"]), ("x-kept", &["1"])]),
        (vec![add("x-old", "3")], &[("x-old", &["1", "2", "3"])]),
        (vec![remove("Server"), remove("X-Absent")], &[("server", &[]), ("x-kept", &["1"])]),
        (vec![add("Set-Cookie", "c=3")], &[("set-cookie", &["a=1", "b=2", "c=3"])]),
        (
            vec![
                set("Strict-Transport-Security", "max-age=31536000; includeSubDomains"),
                set("server", "gate"),
            ],
            &[("strict-transport-security", &["max-age=31536000; includeSubDomains"]), ("server", &["gate"])],
        ),
    ];
    for speaks in EVERY_ENDPOINT {
        let endpoint = endpoint(speaks, edited).await;
        let (proxy, mut publisher) = toy::start(toy::config(), RoutingTable::default());
        for (edits, expected) in &cases {
            publisher.publish(table(&[endpoint], speaks, response(edits.iter().cloned())));
            for comes in EVERY_CLIENT {
                let mut client = Client::connect(&proxy, comes).await;
                // With a body, and on the same connection without one.
                for method in [Method::GET, Method::HEAD] {
                    let answer = client.ask(method, "/bytes/5", empty()).await;
                    assert_eq!(answer.status, 200);
                    for (name, values) in *expected {
                        let found = all(&answer.headers, name);
                        assert_eq!(found, *values, "{name}, {comes:?}, {speaks:?}, {edits:?}");
                    }
                }
            }
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn endpoints_are_asked_for_another_host() {
    let edits =
        HeaderEdits { host: Some(Authority::new("app.internal:81").unwrap()), ..HeaderEdits::default() };
    for speaks in EVERY_ENDPOINT {
        let endpoint = endpoint(speaks, app).await;
        let (proxy, _publisher) = toy::start(toy::config(), table(&[endpoint], speaks, edits.clone()));
        for comes in EVERY_CLIENT {
            let answer = Client::connect(&proxy, comes).await.get("/head").await;
            let text = answer.text();
            match speaks {
                UpstreamProtocol::Http1 | UpstreamProtocol::Https => {
                    assert_eq!(lines(text, "host"), ["app.internal:81"], "{comes:?} {speaks:?}: {text}");
                }
                _ => assert!(text.contains("://app.internal:81/head"), "{comes:?} {speaks:?}: {text}"),
            }
            assert_eq!(lines(text, "x-forwarded-host"), [HOST], "{comes:?} {speaks:?}: {text}");
        }
    }
}

/// A rule's edits take the place of those for all rules; both are in answers of our own, too.
#[tokio::test(flavor = "multi_thread")]
async fn what_it_answers_itself_is_edited() {
    let endpoint = endpoint(UpstreamProtocol::Http1, app).await;
    let mut table = toy::table(&[endpoint], UpstreamProtocol::Http1);
    table.pools.insert(toy::key("default/none:80"), Arc::default());
    let everywhere = response([set("X-Gate", "everywhere"), set("Content-Type", "text/html")]);
    table.edits = Some(Arc::new(everywhere));
    let edits = Arc::new(response([set("X-Gate", "rule"), remove("date")]));
    let rule = |path: &str, own: bool, pool: &str| {
        let mut rule = toy::rule(PathMatch::Prefix(path.into()), pool);
        rule.edits = own.then(|| edits.clone());
        rule
    };
    let mut refused = rule("/refused", true, "default/app:80");
    refused.action = Action::Respond { status: 403, reason: "a rule says so".into() };
    let mut secure = rule("/secure", true, "default/app:80");
    secure.https_redirect = true;
    let mut small = rule("/echo", true, "default/app:80");
    small.limits.max_body = Some(3);
    let rules = vec![
        refused,
        secure,
        small,
        rule("/status", true, "default/app:80"),
        rule("/bytes", false, "default/app:80"),
        rule("/none", true, "default/none:80"),
    ];
    table.hosts.insert(HostPattern::any(), Arc::new(Host { rules }));
    let (proxy, _publisher) = toy::start(toy::config(), with_certificate(table, &[HOST]));
    for comes in [Comes::Http1, Comes::H2c] {
        for (method, path, body, status, gate) in [
            (Method::GET, "/elsewhere", "", 404, "everywhere"),
            (Method::GET, "/bytes/1", "", 200, "everywhere"),
            (Method::GET, "/status/201", "", 201, "rule"),
            (Method::GET, "/refused", "", 403, "rule"),
            (Method::HEAD, "/refused", "", 403, "rule"),
            (Method::GET, "/secure", "", 308, "rule"),
            (Method::GET, "/none", "", 503, "rule"),
            (Method::POST, "/echo", "four", 413, "rule"),
        ] {
            let mut client = Client::connect(&proxy, comes).await;
            let answer = client.ask(method, path, full(body)).await;
            assert_eq!(answer.status, status, "{path}");
            assert_eq!(all(&answer.headers, "x-gate"), [gate], "{comes:?} {path}");
            if gate == "everywhere" {
                assert_eq!(all(&answer.headers, "content-type"), ["text/html"], "{comes:?} {path}");
            } else if status > 300 {
                assert_eq!(all(&answer.headers, "content-type"), ["text/plain"], "{comes:?} {path}");
                assert!(all(&answer.headers, "date").is_empty(), "{comes:?} {path}");
            }
            if status == 308 {
                assert_eq!(all(&answer.headers, "location").len(), 1);
            }
        }
    }
}

/// `Connection: close` to the endpoint means it: even one that does not close is not asked again.
#[tokio::test(flavor = "multi_thread")]
async fn an_endpoints_connection_is_kept_or_not() {
    for (connection, line, per_request) in [
        (None, None, false),
        (Some(Persistence::KeepAlive), Some("keep-alive"), false),
        (Some(Persistence::Close), Some("close"), true),
    ] {
        let opened = Arc::new(AtomicUsize::new(0));
        let count = opened.clone();
        let endpoint = toy::endpoint(move |mut stream| {
            use std::io::Write as _;
            count.fetch_add(1, SeqCst);
            loop {
                let head = toy::read_head(&mut stream);
                if head.is_empty() {
                    return;
                }
                let answer = format!("HTTP/1.1 200 OK\r\nContent-Length: {}\r\n\r\n{head}", head.len());
                if stream.write_all(answer.as_bytes()).is_err() {
                    return;
                }
            }
        });
        let edits = HeaderEdits { connection, ..HeaderEdits::default() };
        let (proxy, _publisher) =
            toy::start(toy::config(), table(&[endpoint], UpstreamProtocol::Http1, edits));
        for comes in [Comes::Http1, Comes::H2c] {
            let mut client = Client::connect(&proxy, comes).await;
            let before = opened.load(SeqCst);
            for _ in 0..5 {
                let text = client.get("/").await.text().to_ascii_lowercase();
                assert_eq!(lines(&text, "connection").first().copied(), line, "{comes:?}: {text}");
            }
            let opened = opened.load(SeqCst) - before;
            assert_eq!(opened, if per_request { 5 } else { usize::from(before == 0) }, "{comes:?}");
        }
    }
}
