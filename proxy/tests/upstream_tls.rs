//! Endpoints that speak TLS: by which protocol, and what happens when they cannot.
#![allow(clippy::unwrap_used, reason = "a test says what it expects by panicking")]

#[path = "support/peers.rs"]
mod peers;
#[path = "support/toy.rs"]
mod toy;

use http::{Method, StatusCode};
use lockgate_proxy::table::UpstreamProtocol;
use peers::{Client, Comes, EVERY_CLIENT, HOST, app, empty, endpoint, full, says_nothing, with_certificate};

#[tokio::test(flavor = "multi_thread")]
async fn the_protocol_is_agreed_on_by_alpn() {
    for (speaks, first_line) in
        [(UpstreamProtocol::Https, "GET /head"), (UpstreamProtocol::H2, "GET https://a.example/head")]
    {
        // The endpoint accepts only the protocol it speaks.
        let app = endpoint(speaks, app).await;
        let (proxy, _publisher) =
            toy::start(toy::config(), with_certificate(toy::table(&[app], speaks), &[HOST]));
        for comes in EVERY_CLIENT {
            let mut client = Client::connect(&proxy, comes).await;
            for _ in 0..3 {
                let answer = client.get("/head").await;
                assert_eq!(answer.text().lines().next(), Some(first_line), "{comes:?} {speaks:?}");
            }
        }
        let metrics = proxy.metrics().worker(0);
        assert_eq!((metrics.upstream_opened.value(), metrics.upstream_reused.value()), (1, 11), "{speaks:?}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_endpoint_without_tls_is_a_bad_gateway() {
    for (speaks, real) in [
        (UpstreamProtocol::Https, UpstreamProtocol::Http1),
        (UpstreamProtocol::H2, UpstreamProtocol::H2c),
        (UpstreamProtocol::H2, UpstreamProtocol::Http1),
    ] {
        let app = endpoint(real, app).await;
        let (proxy, _publisher) = toy::start(toy::config(), toy::table(&[app], speaks));
        for comes in [Comes::Http1, Comes::H2c] {
            let mut client = Client::connect(&proxy, comes).await;
            assert_eq!(client.get("/").await.status, StatusCode::BAD_GATEWAY, "{speaks:?} {real:?}");
        }
        assert_eq!(proxy.metrics().worker(0).upstream_open.value(), 0);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_endpoint_that_never_shakes_hands_is_left_for_the_next() {
    for speaks in [UpstreamProtocol::Https, UpstreamProtocol::H2] {
        let endpoints = [says_nothing().await, endpoint(speaks, app).await];
        let mut config = toy::config();
        config.timeouts.connect = std::time::Duration::from_millis(300);
        let (proxy, _publisher) = toy::start(config, toy::table(&endpoints, speaks));
        for comes in [Comes::Http1, Comes::H2c] {
            let mut client = Client::connect(&proxy, comes).await;
            for (method, body) in [(Method::GET, empty()), (Method::POST, full("a")), (Method::GET, empty())]
            {
                assert_eq!(client.ask(method, "/bytes/1", body).await.status, StatusCode::OK);
            }
        }
    }
}
