//! gRPC through the proxy, with tonic as client and as server.
#![allow(clippy::unwrap_used, reason = "a test says what it expects by panicking")]

#[path = "support/peers.rs"]
mod peers;
#[path = "support/toy.rs"]
mod toy;

use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering::SeqCst};
use std::time::Duration;

use futures_util::{Stream, StreamExt as _, stream};
use http_body_util::BodyExt as _;
use hyper::body::Incoming;
use lockgate_proxy::table::UpstreamProtocol;
use lockgate_proxy::{Proxy, Publisher};
use peers::{Alive, Body, endpoint, soon, until};
use tonic::codegen::http;
use tonic::metadata::MetadataMap;
use tonic::transport::{Channel, Endpoint};
use tonic::{Code, Request, Response, Status, Streaming};
use tonic_prost::ProstCodec;

type Future_<T> = Pin<Box<dyn Future<Output = Result<Response<T>, Status>> + Send>>;
type Messages = Pin<Box<dyn Stream<Item = Result<String, Status>> + Send>>;

fn codec() -> ProstCodec<String, String> {
    ProstCodec::default()
}

fn metadata(value: &'static str) -> MetadataMap {
    let mut metadata = MetadataMap::new();
    metadata.insert("x-answer", value.parse().unwrap());
    metadata
}

/// Says hello; fails when asked to, with metadata.
struct Unary;

impl tonic::server::UnaryService<String> for Unary {
    type Response = String;
    type Future = Future_<String>;

    fn call(&mut self, request: Request<String>) -> Self::Future {
        Box::pin(async move {
            let sent = request.metadata().get("x-ask").map_or("", |v| v.to_str().unwrap()).to_owned();
            let binary = request.metadata().get_bin("x-raw-bin").map(|v| v.to_bytes().unwrap().to_vec());
            match request.into_inner().as_str() {
                "fail" => Err(Status::with_metadata(
                    Code::FailedPrecondition,
                    "not now, später",
                    metadata("failed"),
                )),
                "panic" => Err(Status::unavailable("gone")),
                name => {
                    let text = format!("hello {name} {sent} {binary:?}");
                    Ok(Response::from_parts(metadata("fine"), text, Default::default()))
                }
            }
        })
    }
}

/// Joins what it is sent.
struct Join;

impl tonic::server::ClientStreamingService<String> for Join {
    type Response = String;
    type Future = Future_<String>;

    fn call(&mut self, request: Request<Streaming<String>>) -> Self::Future {
        Box::pin(async move {
            let mut messages = request.into_inner();
            let mut joined = String::new();
            while let Some(message) = messages.message().await? {
                joined += &message;
            }
            Ok(Response::new(joined))
        })
    }
}

/// Counts up to the number asked for, then fails; `endless` keeps silent after the first.
struct Count(Arc<AtomicUsize>);

impl tonic::server::ServerStreamingService<String> for Count {
    type Response = String;
    type ResponseStream = Messages;
    type Future = Future_<Messages>;

    fn call(&mut self, request: Request<String>) -> Self::Future {
        let alive = Alive::new(&self.0);
        Box::pin(async move {
            let asked = request.into_inner();
            let messages: Messages = match asked.parse::<usize>() {
                Ok(n) => {
                    let end = Err(Status::out_of_range("that is all"));
                    Box::pin(stream::iter((0..n).map(|n| Ok(n.to_string())).chain([end])))
                }
                Err(_) => Box::pin(stream::unfold((alive, true), |(alive, first)| async move {
                    if !first {
                        std::future::pending::<()>().await;
                    }
                    Some((Ok("first".to_owned()), (alive, false)))
                })),
            };
            Ok(Response::new(messages))
        })
    }
}

/// Answers each message before it looks at the next.
struct Pong;

impl tonic::server::StreamingService<String> for Pong {
    type Response = String;
    type ResponseStream = Messages;
    type Future = Future_<Messages>;

    fn call(&mut self, request: Request<Streaming<String>>) -> Self::Future {
        Box::pin(async move {
            let pongs = request.into_inner().map(|message| Ok(format!("pong {}", message?)));
            Ok(Response::new(Box::pin(pongs) as Messages))
        })
    }
}

async fn serve(request: http::Request<Incoming>, alive: Arc<AtomicUsize>) -> http::Response<Body> {
    let mut grpc = tonic::server::Grpc::new(codec());
    let response = match request.uri().path() {
        "/test.Toy/Unary" => grpc.unary(Unary, request).await,
        "/test.Toy/Join" => grpc.client_streaming(Join, request).await,
        "/test.Toy/Count" => grpc.server_streaming(Count(alive), request).await,
        "/test.Toy/Pong" => grpc.streaming(Pong, request).await,
        "/test.Toy/Never" => {
            let _alive = Alive::new(&alive);
            std::future::pending().await
        }
        _ => Status::unimplemented("no such method").into_http(),
    };
    response.map(|body| body.map_err(|status| -> hyper::Error { unreachable!("{status}") }).boxed_unsync())
}

struct Setup {
    proxy: Proxy,
    publisher: Publisher,
    /// Server streams and calls that have not ended.
    alive: Arc<AtomicUsize>,
    client: tonic::client::Grpc<Channel>,
}

async fn setup(speaks: UpstreamProtocol) -> Setup {
    let alive = Arc::new(AtomicUsize::new(0));
    let count = alive.clone();
    let server = endpoint(speaks, move |request| serve(request, count.clone())).await;
    let (proxy, publisher) = toy::start(toy::config(), toy::table(&[server], speaks));
    let client = client(&proxy).await;
    Setup { proxy, publisher, alive, client }
}

async fn client(proxy: &Proxy) -> tonic::client::Grpc<Channel> {
    let address = format!("http://{}", proxy.http_addrs()[0]);
    let channel = Endpoint::from_shared(address).unwrap().connect().await.unwrap();
    let mut client = tonic::client::Grpc::new(channel);
    soon(client.ready()).await.unwrap();
    client
}

fn path(method: &str) -> http::uri::PathAndQuery {
    format!("/test.Toy/{method}").parse().unwrap()
}

async fn unary(client: &mut tonic::client::Grpc<Channel>, message: &str) -> Result<Response<String>, Status> {
    soon(client.ready()).await.unwrap();
    soon(client.unary(Request::new(message.to_owned()), path("Unary"), codec())).await
}

const BOTH: [UpstreamProtocol; 2] = [UpstreamProtocol::H2c, UpstreamProtocol::H2];

#[tokio::test(flavor = "multi_thread")]
async fn unary_calls_with_metadata_both_ways() {
    for speaks in BOTH {
        let mut setup = setup(speaks).await;
        let mut request = Request::new("you".to_owned());
        request.metadata_mut().insert("x-ask", "please".parse().unwrap());
        request.metadata_mut().insert_bin("x-raw-bin", tonic::metadata::MetadataValue::from_bytes(&[0, 255]));
        let response = soon(setup.client.unary(request, path("Unary"), codec())).await.unwrap();
        assert_eq!(response.metadata().get("x-answer").unwrap(), "fine");
        assert_eq!(response.into_inner(), "hello you please Some([0, 255])");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn statuses_in_trailers_and_in_heads() {
    for speaks in BOTH {
        let mut setup = setup(speaks).await;
        // Without a message there is only a head ("trailers-only").
        let status = unary(&mut setup.client, "fail").await.unwrap_err();
        assert_eq!((status.code(), status.message()), (Code::FailedPrecondition, "not now, später"));
        assert_eq!(status.metadata().get("x-answer").unwrap(), "failed");
        assert_eq!(unary(&mut setup.client, "panic").await.unwrap_err().code(), Code::Unavailable);

        soon(setup.client.ready()).await.unwrap();
        let request = Request::new("3".to_owned());
        let response = setup.client.server_streaming(request, path("Count"), codec()).await.unwrap();
        let mut messages = response.into_inner();
        for expected in ["0", "1", "2"] {
            assert_eq!(soon(messages.message()).await.unwrap().as_deref(), Some(expected));
        }
        let status = soon(messages.message()).await.unwrap_err();
        assert_eq!((status.code(), status.message()), (Code::OutOfRange, "that is all"));

        soon(setup.client.ready()).await.unwrap();
        let request = Request::new(String::new());
        let status = setup.client.unary(request, path("Unknown"), codec()).await.unwrap_err();
        assert_eq!(status.code(), Code::Unimplemented);
        until(|| setup.proxy.metrics().worker(0).requests_in_flight.value() == 0).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn streams_in_either_direction() {
    for speaks in BOTH {
        let mut setup = setup(speaks).await;
        let piece = "x".repeat(10_000);
        let messages = stream::iter(vec![piece.clone(); 400]);
        let joined = setup.client.client_streaming(Request::new(messages), path("Join"), codec());
        assert_eq!(soon(joined).await.unwrap().into_inner().len(), 4_000_000);

        soon(setup.client.ready()).await.unwrap();
        let request = Request::new("20000".to_owned());
        let response = setup.client.server_streaming(request, path("Count"), codec()).await.unwrap();
        let all = soon(response.into_inner().filter(|m| std::future::ready(m.is_ok())).count()).await;
        assert_eq!(all, 20_000);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn ping_and_pong_in_turn() {
    for speaks in BOTH {
        let mut setup = setup(speaks).await;
        let (ping, pings) = tokio::sync::mpsc::channel(1);
        let pings = stream::unfold(pings, |mut pings| async move { Some((pings.recv().await?, pings)) });
        let response =
            soon(setup.client.streaming(Request::new(pings), path("Pong"), codec())).await.unwrap();
        let mut pongs: Streaming<String> = response.into_inner();
        for n in 0..200 {
            ping.send(n.to_string()).await.unwrap();
            assert_eq!(soon(pongs.message()).await.unwrap(), Some(format!("pong {n}")));
        }
        drop(ping);
        assert_eq!(soon(pongs.message()).await.unwrap(), None);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn cancellation_and_deadlines_reach_the_server() {
    for speaks in BOTH {
        let mut setup = setup(speaks).await;
        // The client lets go of a stream.
        let request = Request::new("endless".to_owned());
        let response = setup.client.server_streaming(request, path("Count"), codec()).await.unwrap();
        let mut messages: Streaming<String> = response.into_inner();
        assert_eq!(soon(messages.message()).await.unwrap().as_deref(), Some("first"));
        assert_eq!(setup.alive.load(SeqCst), 1);
        drop(messages);
        until(|| setup.alive.load(SeqCst) == 0).await;

        // The client's own deadline passes while it waits.
        soon(setup.client.ready()).await.unwrap();
        let request = Request::new(String::new());
        let call = setup.client.unary::<String, String, _>(request, path("Never"), codec());
        assert!(tokio::time::timeout(Duration::from_millis(200), call).await.is_err());
        until(|| setup.alive.load(SeqCst) == 0).await;
        assert_eq!(setup.proxy.metrics().worker(0).ejections.value(), 0);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn nobody_there_is_unavailable() {
    let mut setup = setup(UpstreamProtocol::H2c).await;
    setup.publisher.publish(toy::table(&[], UpstreamProtocol::H2c));
    assert_eq!(unary(&mut setup.client, "you").await.unwrap_err().code(), Code::Unavailable);

    let gone = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    setup.publisher.publish(toy::table(&[gone], UpstreamProtocol::H2c));
    assert_eq!(unary(&mut setup.client, "you").await.unwrap_err().code(), Code::Unavailable);

    let mut table = toy::table(&[], UpstreamProtocol::H2c);
    table.hosts = Default::default();
    setup.publisher.publish(table);
    assert_eq!(unary(&mut setup.client, "you").await.unwrap_err().code(), Code::Unimplemented);
}

/// `grpc_read_timeout` of nginx: silence ends a call, however long it has been going on.
#[tokio::test(flavor = "multi_thread")]
async fn a_stream_that_falls_silent_is_ended() {
    let alive = Arc::new(AtomicUsize::new(0));
    let count = alive.clone();
    let server = endpoint(UpstreamProtocol::H2c, move |request| serve(request, count.clone())).await;
    let mut config = toy::config();
    config.timeouts.read = Duration::from_millis(300);
    let (proxy, _publisher) = toy::start(config, toy::table(&[server], UpstreamProtocol::H2c));
    let mut client = client(&proxy).await;
    let request = Request::new("endless".to_owned());
    let response = client.server_streaming(request, path("Count"), codec()).await.unwrap();
    let mut messages: Streaming<String> = response.into_inner();
    assert_eq!(soon(messages.message()).await.unwrap().as_deref(), Some("first"));
    assert_eq!(soon(messages.message()).await.unwrap_err().code(), Code::Internal);
    until(|| alive.load(SeqCst) == 0).await;

    // Either side's messages keep it alive.
    let (ping, pings) = tokio::sync::mpsc::channel::<String>(1);
    let pings = stream::unfold(pings, |mut pings| async move { Some((pings.recv().await?, pings)) });
    soon(client.ready()).await.unwrap();
    let joined = tokio::spawn(async move {
        client.client_streaming::<_, String, String, _>(Request::new(pings), path("Join"), codec()).await
    });
    for _ in 0..10 {
        tokio::time::sleep(Duration::from_millis(100)).await;
        ping.send("a".to_owned()).await.unwrap();
    }
    drop(ping);
    assert_eq!(soon(joined).await.unwrap().unwrap().into_inner(), "aaaaaaaaaa");
}
