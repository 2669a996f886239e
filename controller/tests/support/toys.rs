//! Endpoints that say who they are: HTTP/1.1 with WebSocket, or HTTP/2 in the clear.

use std::convert::Infallible;
use std::net::SocketAddr;

use bytes::Bytes;
use futures_util::{SinkExt, StreamExt};
use http_body_util::combinators::BoxBody;
use http_body_util::{BodyExt, Full};
use hyper::body::Incoming;
use hyper::header::{CONNECTION, CONTENT_TYPE, SEC_WEBSOCKET_ACCEPT, SEC_WEBSOCKET_KEY, UPGRADE};
use hyper::header::{HeaderMap, HeaderValue};
use hyper::service::service_fn;
use hyper::{Request, Response, StatusCode};
use hyper_util::rt::{TokioExecutor, TokioIo};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;
use tokio_tungstenite::WebSocketStream;
use tokio_tungstenite::tungstenite::Message;
use tokio_tungstenite::tungstenite::handshake::derive_accept_key;
use tokio_tungstenite::tungstenite::protocol::Role;

/// What an endpoint understands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Speaks {
    Http1,
    /// HTTP/2 by prior knowledge, nothing else.
    H2c,
}

/// A request to this path is answered when [`Held::release`] is called.
pub const HOLD: &str = "/hold";

/// Requests that wait.
pub struct Held {
    waiting: watch::Sender<usize>,
    released: watch::Sender<bool>,
}

impl Held {
    fn new() -> Held {
        Held { waiting: watch::Sender::new(0), released: watch::Sender::new(false) }
    }

    /// Returns when `n` requests have arrived and wait.
    pub async fn waiting(&self, n: usize) {
        // The sender lives as long as this.
        let _ = self.waiting.subscribe().wait_for(|waiting| *waiting >= n).await;
    }

    /// They and all later ones are answered.
    pub fn release(&self) {
        self.released.send_replace(true);
    }
}

/// Starts an endpoint that answers every request with `name`, for as long as the runtime lives.
pub async fn start(name: impl Into<String>, speaks: Speaks) -> SocketAddr {
    start_holding(name, speaks).await.0
}

/// As [`start`]; the second part lets go of requests to [`HOLD`].
pub async fn start_holding(name: impl Into<String>, speaks: Speaks) -> (SocketAddr, std::sync::Arc<Held>) {
    let name: std::sync::Arc<str> = name.into().into();
    let held = std::sync::Arc::new(Held::new());
    let listener = TcpListener::bind(("127.0.0.1", 0)).await.expect("a free port on loopback");
    let address = listener.local_addr().expect("bound");
    let waits = held.clone();
    tokio::spawn(async move {
        while let Ok((stream, _)) = listener.accept().await {
            let _ = stream.set_nodelay(true);
            tokio::spawn(serve(stream, speaks, name.clone(), waits.clone()));
        }
    });
    (address, held)
}

async fn serve(stream: TcpStream, speaks: Speaks, name: std::sync::Arc<str>, held: std::sync::Arc<Held>) {
    let stream = TokioIo::new(stream);
    let service = service_fn(move |request| {
        let (name, held) = (name.clone(), held.clone());
        async move {
            if request.uri().path() == HOLD {
                held.waiting.send_modify(|waiting| *waiting += 1);
                let _ = held.released.subscribe().wait_for(|released| *released).await;
            }
            Ok::<_, Infallible>(match speaks {
                Speaks::Http1 => answer(request, &name).await,
                Speaks::H2c => echo(request, &name).await,
            })
        }
    });
    // How a connection ends is the proxy's business; the clients see to the answers.
    match speaks {
        Speaks::Http1 => {
            let builder = hyper::server::conn::http1::Builder::new();
            let _ = builder.serve_connection(stream, service).with_upgrades().await;
        }
        Speaks::H2c => {
            let builder = hyper::server::conn::http2::Builder::new(TokioExecutor::new());
            let _ = builder.serve_connection(stream, service).await;
        }
    }
}

type Body = BoxBody<Bytes, Infallible>;

async fn answer(mut request: Request<Incoming>, name: &str) -> Response<Body> {
    if let Some(key) = request.headers().get(SEC_WEBSOCKET_KEY) {
        let accept = derive_accept_key(key.as_bytes());
        let name = name.to_owned();
        tokio::spawn(async move {
            if let Ok(tunnel) = hyper::upgrade::on(&mut request).await {
                converse(
                    WebSocketStream::from_raw_socket(TokioIo::new(tunnel), Role::Server, None).await,
                    &name,
                )
                .await;
            }
        });
        let response = Response::builder()
            .status(StatusCode::SWITCHING_PROTOCOLS)
            .header(CONNECTION, "upgrade")
            .header(UPGRADE, "websocket")
            .header(SEC_WEBSOCKET_ACCEPT, accept);
        return response.body(Full::default().boxed()).expect("valid headers");
    }
    // Bodies are read, or the connection could not be used again.
    let _ = request.into_body().collect().await;
    Response::new(Full::from(name.to_owned()).boxed())
}

/// Every message comes back with the name before it.
async fn converse(mut tunnel: WebSocketStream<TokioIo<hyper::upgrade::Upgraded>>, name: &str) {
    while let Some(Ok(message)) = tunnel.next().await {
        let Message::Text(text) = message else { continue };
        if tunnel.send(Message::text(format!("{name} {text}"))).await.is_err() {
            return;
        }
    }
}

/// As a unary gRPC call: the message comes back, the name is a header, the
/// status is a trailer.
async fn echo(request: Request<Incoming>, name: &str) -> Response<Body> {
    let sent = match request.into_body().collect().await {
        Ok(sent) => sent.to_bytes(),
        Err(_) => Bytes::new(),
    };
    let trailers = HeaderMap::from_iter([(
        hyper::header::HeaderName::from_static("grpc-status"),
        HeaderValue::from_static("0"),
    )]);
    let mut response =
        Response::new(Full::new(sent).with_trailers(async move { Some(Ok(trailers)) }).boxed());
    response.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static("application/grpc"));
    response.headers_mut().insert("x-served-by", name.parse().expect("a name of letters"));
    response
}
