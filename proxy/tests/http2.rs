//! HTTP/2 on either side of the proxy, with hyper as client and as endpoint.
#![allow(clippy::unwrap_used, reason = "a test says what it expects by panicking")]

#[path = "support/peers.rs"]
mod peers;
#[path = "support/toy.rs"]
mod toy;

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering::SeqCst};

use bytes::Bytes;
use futures_util::stream;
use http::{Method, Request, Response, StatusCode};
use http_body_util::{BodyExt as _, StreamBody};
use hyper::body::{Frame, Incoming};
use lockgate_proxy::table::UpstreamProtocol;
use lockgate_proxy::{Proxy, Publisher};
use peers::*;

/// A proxy in front of the small application.
async fn proxy(speaks: UpstreamProtocol) -> (Proxy, Publisher) {
    let app = endpoint(speaks, app).await;
    toy::start(toy::config(), with_certificate(toy::table(&[app], speaks), &[HOST]))
}

const BIG: usize = 8 << 20;

#[tokio::test(flavor = "multi_thread")]
async fn every_client_with_every_endpoint() {
    for speaks in EVERY_ENDPOINT {
        let (proxy, _publisher) = proxy(speaks).await;
        for comes in EVERY_CLIENT {
            println!("client {comes:?}, endpoint {speaks:?}");
            exchanges(&mut Client::connect(&proxy, comes).await).await;
            // The answer begins before its request has ended: HTTP/1 does not go on after that.
            let trailers = map(&[("x-end", "yes")]);
            for (body, length, trailers) in
                [(pieces(70_000, Some(trailers)), 70_000, 1), (full(pattern(0, 9)), 9, 0), (empty(), 0, 0)]
            {
                let mut client = Client::connect(&proxy, comes).await;
                let request = client.request(Method::POST, "/echo").header("te", "trailers");
                let request = request.header("trailer", "x-end").body(body).unwrap();
                let answer = Answer::of(client.send(request).await.unwrap()).await;
                assert_eq!(answer.body, pattern(0, length));
                // hyper names no trailers in its HTTP/1 answer, and then sends none.
                let lost = matches!(speaks, UpstreamProtocol::Http1 | UpstreamProtocol::Https);
                assert_eq!(answer.trailers.len(), if lost { 0 } else { trailers });
            }
            for body in [full(pattern(0, BIG)), pieces(BIG, None)] {
                let mut client = Client::connect(&proxy, comes).await;
                assert_eq!(client.ask(Method::PUT, "/echo", body).await.body, pattern(0, BIG));
            }
        }
    }
}

/// One connection, one exchange of every shape.
async fn exchanges(client: &mut Client) {
    let answer = client.get("/bytes/1000").await;
    assert_eq!((answer.status, &answer.body), (StatusCode::OK, &pattern(0, 1000)));
    assert_eq!(answer.headers["content-length"], "1000");

    let answer = client.ask(Method::HEAD, "/bytes/1000", empty()).await;
    assert_eq!((answer.status, answer.body.len()), (StatusCode::OK, 0));
    assert_eq!(answer.headers["content-length"], "1000");

    for status in [204, 304] {
        let answer = client.get(&format!("/status/{status}")).await;
        assert_eq!((answer.status.as_u16(), answer.body.len()), (status, 0));
        assert_eq!(answer.headers["x-kept"], "1");
    }

    let request = client.request(Method::GET, "/trailers").header("te", "trailers").body(empty()).unwrap();
    let answer = Answer::of(client.send(request).await.unwrap()).await;
    assert_eq!(answer.body, pattern(0, 25_000));
    assert_eq!(answer.trailers["x-sum"], "42");

    assert_eq!(client.ask(Method::POST, "/count", full("hello")).await.text(), "5 0");
    assert_eq!(client.ask(Method::POST, "/count", empty()).await.text(), "0 0");
    assert_eq!(client.get(&format!("/bytes/{BIG}")).await.body, pattern(0, BIG));
    assert_eq!(client.get(&format!("/pieces/{BIG}")).await.body, pattern(0, BIG));

    assert_eq!(client.get("/nowhere").await.status, StatusCode::NOT_FOUND);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_hundred_streams_at_once() {
    for speaks in EVERY_ENDPOINT {
        let (proxy, _publisher) = proxy(speaks).await;
        for comes in [Comes::H2c, Comes::H2] {
            let Client::Http2(send, scheme) = Client::connect(&proxy, comes).await else { unreachable!() };
            let all = (0..100).map(|n| {
                let mut client = Client::Http2(send.clone(), scheme);
                tokio::spawn(async move {
                    let length = 1000 * n;
                    let answer = client.ask(Method::POST, "/echo", pieces(length, None)).await;
                    assert_eq!(answer.body, pattern(0, length));
                })
            });
            for stream in all.collect::<Vec<_>>() {
                soon(stream).await.unwrap();
            }
        }
        let metrics = proxy.metrics().worker(0);
        if matches!(speaks, UpstreamProtocol::H2c | UpstreamProtocol::H2) {
            let opened = metrics.upstream_opened.value();
            assert!(opened <= 3, "connections are shared, but {opened} were opened");
        }
        assert_eq!(metrics.http.http2.total.value(), 1);
        assert_eq!(metrics.https.http2.total.value(), 1);
        until(|| metrics.requests_in_flight.value() == 0).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn heads_are_translated() {
    for speaks in EVERY_ENDPOINT {
        let (proxy, _publisher) = proxy(speaks).await;
        for comes in EVERY_CLIENT {
            let mut client = Client::connect(&proxy, comes).await;
            let request = client
                .request(Method::GET, "/head?q=1")
                .header("te", "trailers")
                .header("cookie", "a=1")
                .header("cookie", "b=2")
                .header("x-forwarded-for", "203.0.113.9")
                .header("x-real-ip", "203.0.113.9")
                .header("x-request-id", "abc-1")
                .header("x-mine", "kept")
                .body(empty())
                .unwrap();
            let answer = Answer::of(client.send(request).await.unwrap()).await;
            let text = answer.text();
            let has =
                |line: &str| assert!(text.lines().any(|l| l == line), "{comes:?} {speaks:?} {line}: {text}");
            match speaks {
                UpstreamProtocol::Http1 | UpstreamProtocol::Https => {
                    has("GET /head?q=1");
                    has("host: a.example");
                    if matches!(comes, Comes::H2c | Comes::H2) {
                        has("cookie: a=1; b=2");
                    }
                }
                UpstreamProtocol::H2c => has("GET http://a.example/head?q=1"),
                UpstreamProtocol::H2 => has("GET https://a.example/head?q=1"),
                UpstreamProtocol::Tcp | UpstreamProtocol::Udp => unreachable!("speaks no HTTP"),
            }
            let scheme = if matches!(comes, Comes::Https | Comes::H2) { "https" } else { "http" };
            has("te: trailers");
            has("x-mine: kept");
            has("x-request-id: abc-1");
            has("x-forwarded-for: 127.0.0.1");
            has("x-real-ip: 127.0.0.1");
            has("x-forwarded-host: a.example");
            has(&format!("x-forwarded-proto: {scheme}"));
            for absent in ["connection:", "transfer-encoding:", "203.0.113.9", "content-length:"] {
                assert!(!text.contains(absent), "{comes:?} {speaks:?} {absent}: {text}");
            }
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn connection_specific_fields_of_an_http1_endpoint_stay_there() {
    let app = toy::endpoint(|mut stream| {
        use std::io::Write as _;
        toy::read_head(&mut stream);
        let _ = stream.write_all(
            b"HTTP/1.1 200 OK\r\nConnection: close, x-hop\r\nKeep-Alive: timeout=5\r\nX-Hop: 1\r\nTE: gzip\r\n\
              Proxy-Connection: x\r\nUpgrade: h2c\r\nSet-Cookie: a\r\nSet-Cookie: b\r\n\r\nbody until close",
        );
    });
    let (proxy, _publisher) = toy::proxy_to(&[app]);
    let answer = Client::connect(&proxy, Comes::H2c).await.get("/").await;
    assert_eq!(answer.text(), "body until close");
    let names: Vec<_> = answer.headers.keys().map(http::HeaderName::as_str).collect();
    assert_eq!(names, ["set-cookie"]);
    assert_eq!(answer.headers.get_all("set-cookie").iter().count(), 2);
}

#[tokio::test(flavor = "multi_thread")]
async fn what_it_answers_itself() {
    let (proxy, mut publisher) = proxy(UpstreamProtocol::Http1).await;
    let mut client = Client::connect(&proxy, Comes::H2c).await;
    for (status, method, uri, fields) in [
        (400, "GET", "http://a.example/", &[("host", "b.example")] as &[(&str, &str)]),
        (200, "GET", "http://a.example/bytes/1", &[("host", "a.example")]),
        (405, "CONNECT", "a.example:443", &[]),
        (400, "GET", "http://a.example/%zz", &[]),
    ] {
        let mut request = Request::builder().method(method).uri(uri);
        for &(name, value) in fields {
            request = request.header(name, value);
        }
        let answer = Answer::of(client.send(request.body(empty()).unwrap()).await.unwrap()).await;
        assert_eq!(answer.status.as_u16(), status, "{method} {uri} {fields:?}");
    }
    let long = "x".repeat(9_000);
    assert_eq!(client.get(&format!("/{long}")).await.status, StatusCode::URI_TOO_LONG);
    let mut many = client.request(Method::GET, "/");
    for n in 0..101 {
        many = many.header(format!("x-{n}"), "1");
    }
    let answer = Answer::of(client.send(many.body(empty()).unwrap()).await.unwrap()).await;
    assert_eq!(answer.status, StatusCode::REQUEST_HEADER_FIELDS_TOO_LARGE);
    let large = client.request(Method::GET, "/").header("x-large", "x".repeat(40_000)).body(empty()).unwrap();
    match client.send(large).await {
        Ok(response) => assert_eq!(response.status(), StatusCode::REQUEST_HEADER_FIELDS_TOO_LARGE),
        Err(error) => assert!(!error.is_timeout(), "{error}"),
    }

    publisher.publish(toy::table(&[], UpstreamProtocol::H2c));
    for method in [Method::GET, Method::HEAD, Method::POST] {
        let answer = client.ask(method.clone(), "/", empty()).await;
        assert_eq!(answer.status, StatusCode::SERVICE_UNAVAILABLE);
        assert_eq!(answer.body.is_empty(), method == Method::HEAD);
    }
    let mut table = toy::table(&[], UpstreamProtocol::H2c);
    table.hosts = Default::default();
    publisher.publish(table);
    assert_eq!(client.get("/").await.status, StatusCode::NOT_FOUND);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_body_over_the_limit_is_refused() {
    let app = endpoint(UpstreamProtocol::Http1, app).await;
    let mut config = toy::config();
    config.limits.body_bytes = Some(100_000);
    let (proxy, _publisher) = toy::start(config, toy::table(&[app], UpstreamProtocol::Http1));
    let mut client = Client::connect(&proxy, Comes::H2c).await;
    for body in [full(pattern(0, 100_001)), pieces(500_000, None)] {
        let request = client.request(Method::POST, "/count").body(body).unwrap();
        let answer = client.send(request).await.unwrap();
        assert_eq!(answer.status(), StatusCode::PAYLOAD_TOO_LARGE);
    }
    assert_eq!(client.ask(Method::POST, "/count", pieces(100_000, None)).await.text(), "100000 0");
}

#[tokio::test(flavor = "multi_thread")]
async fn another_host_than_the_certificates_is_misdirected() {
    let app = endpoint(UpstreamProtocol::Http1, app).await;
    let table = toy::table(&[app], UpstreamProtocol::Http1);
    let table = with_certificate(with_certificate(table, &[HOST, "also.example"]), &["b.example"]);
    let (proxy, _publisher) = toy::start(toy::config(), table);
    let mut client = Client::connect(&proxy, Comes::H2).await;
    for (host, status) in [(HOST, 200), ("also.example", 200), ("b.example", 421), (HOST, 200)] {
        let request = Request::get(format!("https://{host}/bytes/1")).body(empty()).unwrap();
        assert_eq!(client.send(request).await.unwrap().status().as_u16(), status, "{host}");
    }
}

/// A body that never ends, and counts what was taken of it.
fn endless(taken: Arc<AtomicUsize>) -> Body {
    let piece = pattern(0, 16 << 10);
    let frames = stream::repeat_with(move || {
        taken.fetch_add(piece.len(), SeqCst);
        Ok(Frame::data(piece.clone()))
    });
    StreamBody::new(frames).boxed_unsync()
}

/// A body of `length` bytes that counts what was taken of it.
fn counted(length: usize, taken: Arc<AtomicUsize>) -> Body {
    const PIECE: usize = 16 << 10;
    let frames = (0..length / PIECE).map(move |n| {
        taken.fetch_add(PIECE, SeqCst);
        Ok(Frame::data(pattern(n * PIECE, PIECE)))
    });
    StreamBody::new(stream::iter(frames)).boxed_unsync()
}

/// Waits until `taken` no longer moves.
async fn settled(taken: &AtomicUsize) -> usize {
    let mut seen = taken.load(SeqCst);
    loop {
        tokio::time::sleep(std::time::Duration::from_millis(300)).await;
        let now = taken.load(SeqCst);
        if now == seen && now > 0 {
            return now;
        }
        seen = now;
    }
}

const HUGE: usize = 48 << 20;

/// Our windows and buffers, and those of our sockets and of hyper: far from everything.
const HELD: usize = 16 << 20;

#[tokio::test(flavor = "multi_thread")]
async fn a_client_that_does_not_read_holds_up_the_endpoint() {
    for speaks in EVERY_ENDPOINT {
        let taken = Arc::new(AtomicUsize::new(0));
        let count = taken.clone();
        let app = endpoint(speaks, move |_| {
            let body = counted(HUGE, count.clone());
            async { Response::new(body) }
        })
        .await;
        let (proxy, _publisher) =
            toy::start(toy::config(), with_certificate(toy::table(&[app], speaks), &[HOST]));
        for comes in EVERY_CLIENT {
            taken.store(0, SeqCst);
            let mut client = Client::connect(&proxy, comes).await;
            let request = client.request(Method::GET, "/").body(empty()).unwrap();
            let mut body = client.send(request).await.unwrap().into_body();
            let held = soon(settled(&taken)).await;
            println!("{comes:?} {speaks:?}: {held} bytes taken");
            let limit = match (comes, speaks) {
                // Here every buffer is one of ours or of hyper.
                (Comes::H2c | Comes::H2, UpstreamProtocol::H2c | UpstreamProtocol::H2) => 4 << 20,
                _ => HELD,
            };
            assert!(held < limit, "{comes:?} {speaks:?}: {held}");
            let mut at = 0;
            while let Some(frame) = soon(body.frame()).await {
                let data = frame.unwrap().into_data().unwrap();
                assert_eq!(data, pattern(at, data.len()));
                at += data.len();
            }
            assert_eq!(at, HUGE);
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_endpoint_that_does_not_read_holds_up_the_client() {
    for speaks in EVERY_ENDPOINT {
        let (go, wait) = tokio::sync::watch::channel(false);
        let app = endpoint(speaks, move |request: Request<Incoming>| {
            let mut wait = wait.clone();
            async move {
                wait.wait_for(|go| *go).await.unwrap();
                let mut body = request.into_body();
                let mut at = 0;
                while let Some(Ok(frame)) = body.frame().await {
                    let data = frame.into_data().unwrap();
                    assert_eq!(data, pattern(at, data.len()));
                    at += data.len();
                }
                Response::new(full(at.to_string()))
            }
        })
        .await;
        let (proxy, _publisher) =
            toy::start(toy::config(), with_certificate(toy::table(&[app], speaks), &[HOST]));
        for comes in EVERY_CLIENT {
            go.send_replace(false);
            let taken = Arc::new(AtomicUsize::new(0));
            let mut client = Client::connect(&proxy, comes).await;
            let body = counted(HUGE, taken.clone());
            let answer = tokio::spawn(async move { client.ask(Method::POST, "/", body).await });
            let held = soon(settled(&taken)).await;
            println!("{comes:?} {speaks:?}: {held} bytes taken");
            assert!(held < HELD, "{comes:?} {speaks:?}: {held}");
            go.send_replace(true);
            assert_eq!(soon(answer).await.unwrap().text(), HUGE.to_string());
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_client_that_does_not_read_does_not_hold_up_others() {
    let taken = Arc::new(AtomicUsize::new(0));
    let count = taken.clone();
    let app = endpoint(UpstreamProtocol::H2c, move |request: Request<Incoming>| {
        let count = count.clone();
        async move {
            match request.uri().path() {
                "/endless" => Response::new(endless(count)),
                _ => app(request).await,
            }
        }
    })
    .await;
    let (proxy, _publisher) = toy::start(toy::config(), toy::table(&[app], UpstreamProtocol::H2c));
    let mut stalled = Vec::new();
    for _ in 0..40 {
        let mut client = Client::connect(&proxy, Comes::H2c).await;
        let request = client.request(Method::GET, "/endless").body(empty()).unwrap();
        stalled.push((client.send(request).await.unwrap(), client));
    }
    soon(settled(&taken)).await;
    let mut client = Client::connect(&proxy, Comes::H2c).await;
    assert_eq!(client.get("/bytes/1000000").await.body, pattern(0, 1_000_000));
    assert_eq!(proxy.metrics().worker(0).upstream_opened.value(), 1);
}

/// A client may upload all of its body before it looks at the response, though
/// the response began long before.
#[tokio::test(flavor = "multi_thread")]
async fn an_upload_goes_on_while_the_response_waits_for_the_client() {
    for speaks in EVERY_ENDPOINT {
        let app = endpoint(speaks, |request: Request<Incoming>| async {
            // Reads on by itself, whatever becomes of the response.
            tokio::spawn(request.into_body().collect());
            Response::new(pieces(32 << 20, None))
        })
        .await;
        let (proxy, _publisher) =
            toy::start(toy::config(), with_certificate(toy::table(&[app], speaks), &[HOST]));
        for comes in [Comes::H2c, Comes::H2] {
            let taken = Arc::new(AtomicUsize::new(0));
            let mut client = Client::connect(&proxy, comes).await;
            let request = client.request(Method::POST, "/").body(counted(16 << 20, taken.clone())).unwrap();
            let response = client.send(request).await.unwrap();
            until(|| taken.load(SeqCst) == 16 << 20).await;
            assert_eq!(soon(response.into_body().collect()).await.unwrap().to_bytes().len(), 32 << 20);
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_reset_by_the_client_reaches_the_endpoint() {
    for speaks in EVERY_ENDPOINT {
        let alive = Arc::new(AtomicUsize::new(0));
        let count = alive.clone();
        let app = endpoint(speaks, move |request: Request<Incoming>| {
            let guard = Alive::new(&count);
            async move {
                // Either before the head of an answer, or (below) within its body.
                if request.uri().path() == "/silent" {
                    std::future::pending::<()>().await;
                }
                let frames = stream::unfold((guard, true), |(guard, first)| async move {
                    if !first {
                        std::future::pending::<()>().await;
                    }
                    Some((Ok(Frame::data(Bytes::from_static(b"a"))), (guard, false)))
                });
                Response::new(StreamBody::new(frames).boxed_unsync())
            }
        })
        .await;
        let (proxy, _publisher) =
            toy::start(toy::config(), with_certificate(toy::table(&[app], speaks), &[HOST]));
        for comes in [Comes::H2c, Comes::H2] {
            let mut client = Client::connect(&proxy, comes).await;
            let request = client.request(Method::GET, "/silent").body(empty()).unwrap();
            let Client::Http2(send, _) = &mut client else { unreachable!() };
            let asking = tokio::spawn(send.send_request(request));
            until(|| alive.load(SeqCst) == 1).await;
            asking.abort();
            until(|| alive.load(SeqCst) == 0).await;

            let request = client.request(Method::GET, "/body").body(empty()).unwrap();
            let mut response = client.send(request).await.unwrap();
            soon(response.body_mut().frame()).await.unwrap().unwrap();
            assert_eq!(alive.load(SeqCst), 1);
            drop(response);
            until(|| alive.load(SeqCst) == 0).await;
        }
        let metrics = proxy.metrics().worker(0);
        until(|| metrics.requests_in_flight.value() == 0).await;
        assert_eq!(metrics.ejections.value(), 0);
    }
}

/// An endpoint of raw HTTP/2 that goes by a script. Each connection is told its number.
async fn scripted<F, R>(script: F) -> std::net::SocketAddr
where
    F: Fn(usize, h2::server::Connection<tokio::net::TcpStream, Bytes>) -> R + Send + 'static,
    R: Future<Output = ()> + Send + 'static,
{
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    tokio::spawn(async move {
        for number in 0.. {
            let (tcp, _) = listener.accept().await.unwrap();
            let connection = h2::server::handshake(tcp).await.unwrap();
            tokio::spawn(script(number, connection));
        }
    });
    address
}

fn answer_ok(respond: &mut h2::server::SendResponse<Bytes>) {
    respond.send_response(Response::new(()), false).unwrap().send_data("ok".into(), true).unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn an_endpoint_that_says_goodbye_fails_no_request() {
    // Each connection takes three streams and then goes.
    let app = scripted(|_, mut connection| async move {
        for _ in 0..3 {
            let Some(Ok((_, mut respond))) = connection.accept().await else { return };
            answer_ok(&mut respond);
        }
        connection.graceful_shutdown();
        while let Some(Ok((_, mut respond))) = connection.accept().await {
            answer_ok(&mut respond);
        }
    })
    .await;
    let (proxy, _publisher) = toy::start(toy::config(), toy::table(&[app], UpstreamProtocol::H2c));
    for comes in [Comes::Http1, Comes::H2c] {
        let mut client = Client::connect(&proxy, comes).await;
        for n in 0..50 {
            for (method, body) in
                [(Method::GET, empty()), (Method::POST, full("a")), (Method::POST, pieces(9, None))]
            {
                let answer = client.ask(method.clone(), "/", body).await;
                assert_eq!((answer.status, answer.text()), (StatusCode::OK, "ok"), "{comes:?} {n} {method}");
            }
        }
    }
    assert_eq!(proxy.metrics().worker(0).ejections.value(), 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_refused_stream_is_sent_again_with_its_body() {
    let app = scripted(|_, mut connection| async move {
        let mut refuse = true;
        while let Some(Ok((request, mut respond))) = connection.accept().await {
            if refuse {
                respond.send_reset(h2::Reason::REFUSED_STREAM);
            } else {
                tokio::spawn(async move {
                    let mut body = request.into_body();
                    let mut length = 0;
                    while let Some(Ok(data)) = body.data().await {
                        length += data.len();
                        body.flow_control().release_capacity(data.len()).unwrap();
                    }
                    let mut stream = respond.send_response(Response::new(()), false).unwrap();
                    stream.send_data(length.to_string().into(), true).unwrap();
                });
            }
            refuse = !refuse;
        }
    })
    .await;
    let (proxy, _publisher) = toy::start(toy::config(), toy::table(&[app], UpstreamProtocol::H2c));
    for comes in [Comes::Http1, Comes::H2c] {
        let mut client = Client::connect(&proxy, comes).await;
        for length in [0, 5, 20_000, 60_000] {
            let answer = client.ask(Method::POST, "/", pieces(length, None)).await;
            assert_eq!((answer.status, answer.text()), (StatusCode::OK, &*length.to_string()), "{comes:?}");
        }
    }
    let metrics = proxy.metrics().worker(0);
    assert_eq!((metrics.retries.value(), metrics.ejections.value()), (8, 0));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stream_the_endpoint_breaks() {
    let calls = Arc::new(AtomicUsize::new(0));
    let count = calls.clone();
    let app = scripted(move |_, mut connection| {
        let count = count.clone();
        async move {
            let mut open = Vec::new();
            while let Some(Ok((request, mut respond))) = connection.accept().await {
                count.fetch_add(1, SeqCst);
                if request.uri().path() == "/early" {
                    respond.send_reset(h2::Reason::INTERNAL_ERROR);
                    continue;
                }
                let mut stream = respond.send_response(Response::new(()), false).unwrap();
                stream.send_data("part".into(), false).unwrap();
                open.push(tokio::spawn(async move {
                    tokio::time::sleep(std::time::Duration::from_millis(50)).await;
                    stream.send_reset(h2::Reason::CANCEL);
                }));
            }
        }
    })
    .await;
    let mut config = toy::config();
    config.ejection.consecutive = 0;
    let (proxy, _publisher) = toy::start(config, toy::table(&[app], UpstreamProtocol::H2c));
    for comes in [Comes::Http1, Comes::H2c] {
        let mut client = Client::connect(&proxy, comes).await;
        calls.store(0, SeqCst);
        for method in [Method::GET, Method::POST] {
            let answer = client.ask(method, "/early", empty()).await;
            assert_eq!(answer.status, StatusCode::BAD_GATEWAY);
        }
        assert_eq!(calls.load(SeqCst), 2, "there is no other endpoint to ask");
        let request = client.request(Method::GET, "/late").body(empty()).unwrap();
        let response = client.send(request).await.unwrap();
        assert_eq!(response.status(), StatusCode::OK);
        let error = soon(response.into_body().collect()).await.unwrap_err();
        if comes == Comes::H2c {
            use std::error::Error as _;
            let cause = error.source().unwrap().downcast_ref::<h2::Error>().unwrap();
            assert_eq!(cause.reason(), Some(h2::Reason::INTERNAL_ERROR));
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_http1_endpoint_that_hangs_up() {
    let app = toy::endpoint(|mut stream| {
        use std::io::Write as _;
        if toy::read_head(&mut stream).contains("/late") {
            stream.write_all(b"HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\npart").unwrap();
        }
    });
    let mut config = toy::config();
    config.ejection.consecutive = 0;
    let (proxy, _publisher) = toy::start(config, toy::table(&[app], UpstreamProtocol::Http1));
    let mut client = Client::connect(&proxy, Comes::H2c).await;
    assert_eq!(client.get("/early").await.status, StatusCode::BAD_GATEWAY);
    let request = client.request(Method::GET, "/late").body(empty()).unwrap();
    // The reset may overtake the head.
    if let Ok(response) = client.send(request).await {
        soon(response.into_body().collect()).await.unwrap_err();
    }
    assert_eq!(client.get("/early").await.status, StatusCode::BAD_GATEWAY);
}

#[tokio::test(flavor = "multi_thread")]
async fn interim_answers_and_expectations_pass() {
    let app = toy::endpoint(|mut stream| {
        use std::io::{Read as _, Write as _};
        loop {
            let head = toy::read_head(&mut stream);
            if head.is_empty() {
                return;
            }
            stream.write_all(b"HTTP/1.1 103 Early Hints\r\nLink: </a>\r\n\r\n").unwrap();
            if head.contains("expect: 100-continue") {
                stream.write_all(b"HTTP/1.1 100 Continue\r\n\r\n").unwrap();
                stream.read_exact(&mut [0; 5]).unwrap();
            }
            stream.write_all(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok").unwrap();
        }
    });
    let (proxy, _publisher) = toy::proxy_to(&[app]);
    let (mut send, connection) = h2::client::handshake(tcp(proxy.http_addrs()[0]).await).await.unwrap();
    tokio::spawn(connection);
    let request =
        Request::post("http://a.example/").header("expect", "100-continue").header("content-length", "5");
    let (mut response, mut body) = send.send_request(request.body(()).unwrap(), false).unwrap();
    for status in [103, 100] {
        let interim =
            soon(std::future::poll_fn(|cx| response.poll_informational(cx))).await.unwrap().unwrap();
        assert_eq!(interim.status().as_u16(), status);
    }
    body.send_data("12345".into(), true).unwrap();
    assert_eq!(soon(response).await.unwrap().status(), StatusCode::OK);
}

/// From an endpoint that speaks HTTP/2, whose other streams go on.
#[tokio::test(flavor = "multi_thread")]
async fn so_many_interim_answers_and_no_more() {
    let app = scripted(|_, mut connection| async move {
        while let Some(Ok((request, mut respond))) = connection.accept().await {
            let hints: usize = request.uri().path()[1..].parse().unwrap();
            for _ in 0..hints {
                let hint = Response::builder().status(103).body(()).unwrap();
                respond.send_informational(hint).unwrap();
            }
            answer_ok(&mut respond);
        }
    })
    .await;
    let (proxy, _publisher) = toy::start(toy::config(), toy::table(&[app], UpstreamProtocol::H2c));
    let (mut send, connection) = h2::client::handshake(tcp(proxy.http_addrs()[0]).await).await.unwrap();
    tokio::spawn(connection);
    for (hints, status) in [(64, 200), (65, 502), (0, 200)] {
        let request = Request::get(format!("http://a.example/{hints}")).body(()).unwrap();
        let (mut response, _) = send.send_request(request, true).unwrap();
        let mut heard = 0;
        while let Some(interim) = soon(std::future::poll_fn(|cx| response.poll_informational(cx))).await {
            assert_eq!(interim.unwrap().status().as_u16(), 103);
            heard += 1;
        }
        assert_eq!(heard, hints.min(64));
        assert_eq!(soon(response).await.unwrap().status().as_u16(), status, "after {hints}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_drain_fails_no_stream() {
    let (go, wait) = tokio::sync::watch::channel(false);
    let app = endpoint(UpstreamProtocol::Http1, move |_| {
        let mut wait = wait.clone();
        async move {
            wait.wait_for(|go| *go).await.unwrap();
            Response::new(pieces(1_000_000, None))
        }
    })
    .await;
    let (proxy, _publisher) =
        toy::start(toy::config(), with_certificate(toy::table(&[app], UpstreamProtocol::Http1), &[HOST]));
    let mut answers = Vec::new();
    for comes in [Comes::H2c, Comes::H2] {
        let mut client = Client::connect(&proxy, comes).await;
        answers.push(tokio::spawn(async move { client.get("/").await }));
    }
    let idle = Client::connect(&proxy, Comes::H2c).await;
    let metrics = proxy.live().metrics.worker(0);
    until(|| metrics.requests_in_flight.value() == 2).await;
    let drained = tokio::spawn(proxy.drain());
    // The connection without a stream is told to go, and goes.
    let Client::Http2(idle, _) = idle else { unreachable!() };
    until(|| metrics.http.http2.open.value() == 1).await;
    until(|| idle.is_closed()).await;
    go.send_replace(true);
    for answer in answers {
        assert_eq!(soon(answer).await.unwrap().body, pattern(0, 1_000_000));
    }
    assert!(soon(drained).await.unwrap());
    assert_eq!((metrics.http.http2.open.value(), metrics.https.http2.open.value()), (0, 0));
}

#[tokio::test(flavor = "multi_thread")]
async fn an_idle_connection_is_closed_with_a_goodbye() {
    let mut config = toy::config();
    config.timeouts.keep_alive = std::time::Duration::from_millis(200);
    let (proxy, _publisher) = toy::start(config, toy::table(&[], UpstreamProtocol::Http1));
    let (mut send, mut connection) = h2::client::handshake(tcp(proxy.http_addrs()[0]).await).await.unwrap();
    let request = Request::get("http://a.example/").body(()).unwrap();
    let (response, _) = send.send_request(request, true).unwrap();
    let metrics = proxy.metrics().worker(0);
    let ended = tokio::spawn(async move {
        let ended = std::future::poll_fn(|cx| std::pin::Pin::new(&mut connection).poll(cx)).await;
        (ended, connection.max_concurrent_send_streams())
    });
    assert_eq!(soon(response).await.unwrap().status(), StatusCode::SERVICE_UNAVAILABLE);
    let (ended, streams) = soon(ended).await.unwrap();
    ended.unwrap();
    assert_eq!(streams, 128);
    until(|| metrics.http.http2.open.value() == 0).await;
    assert_eq!(metrics.http.pending.value(), 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn slow_endpoints_and_slow_clients_are_told_apart() {
    for speaks in [UpstreamProtocol::Http1, UpstreamProtocol::H2c] {
        let app = endpoint(speaks, |request: Request<Incoming>| async {
            // Answers when it has the whole body, and never to one without.
            if request.method() == Method::GET {
                std::future::pending::<()>().await;
            }
            let length = request.into_body().collect().await.map_or(0, |body| body.to_bytes().len());
            Response::new(full(length.to_string()))
        })
        .await;
        let mut config = toy::config();
        config.timeouts.read = std::time::Duration::from_millis(400);
        config.timeouts.send = std::time::Duration::from_millis(400);
        config.timeouts.client = std::time::Duration::from_millis(400);
        config.ejection.consecutive = 1;
        let (proxy, _publisher) = toy::start(config, toy::table(&[app], speaks));
        for comes in [Comes::Http1, Comes::H2c] {
            println!("{comes:?} {speaks:?}");
            let paced = |pieces: usize, stuck: bool| {
                let frames = stream::unfold(0, move |n| async move {
                    if n == pieces {
                        if stuck {
                            std::future::pending::<()>().await;
                        }
                        return None;
                    }
                    tokio::time::sleep(std::time::Duration::from_millis(100)).await;
                    Some((Ok(Frame::data(Bytes::from_static(b"12345"))), n + 1))
                });
                StreamBody::new(frames).boxed_unsync()
            };
            // Longer than any timeout, but never silent.
            let mut client = Client::connect(&proxy, comes).await;
            assert_eq!(client.ask(Method::POST, "/", paced(12, false)).await.text(), "60");
            let request = client.request(Method::POST, "/").body(paced(1, true)).unwrap();
            assert_eq!(client.send(request).await.unwrap().status(), StatusCode::REQUEST_TIMEOUT);
            assert_eq!(proxy.metrics().worker(0).ejections.value(), 0, "not the endpoint's fault");
        }
        let mut client = Client::connect(&proxy, Comes::H2c).await;
        assert_eq!(client.get("/").await.status, StatusCode::GATEWAY_TIMEOUT);
        assert_eq!(proxy.metrics().worker(0).ejections.value(), 1);
    }
}
