//! Clients and endpoints that are not ours: hyper on both sides of the proxy.
#![allow(dead_code, unreachable_pub, reason = "every test file uses its own part of this")]

use std::convert::Infallible;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicUsize, Ordering::SeqCst};
use std::sync::{Arc, LazyLock};
use std::time::Duration;

use bytes::Bytes;
use futures_util::stream;
use http::{HeaderMap, HeaderValue, Method, Request, Response, StatusCode};
use http_body_util::combinators::UnsyncBoxBody;
use http_body_util::{BodyExt as _, Empty, Full, StreamBody};
use hyper::body::{Frame, Incoming};
use hyper::service::service_fn;
use hyper_util::rt::{TokioExecutor, TokioIo};
use lockgate_proxy::table::{HostPattern, RoutingTable, UpstreamProtocol};
use lockgate_proxy::{Certificate, Proxy, tls};
use rustls_pki_types::{PrivateKeyDer, ServerName};
use socket2::SockRef;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpListener, TcpStream};
use tokio_rustls::{TlsAcceptor, TlsConnector};

/// A body of any kind.
pub type Body = UnsyncBoxBody<Bytes, hyper::Error>;

/// The host all requests are for, unless a test says otherwise.
pub const HOST: &str = "a.example";

pub fn empty() -> Body {
    Empty::new().map_err(never).boxed_unsync()
}

pub fn full(bytes: impl Into<Bytes>) -> Body {
    Full::new(bytes.into()).map_err(never).boxed_unsync()
}

fn never(error: Infallible) -> hyper::Error {
    match error {}
}

/// `length` bytes in pieces, without a Content-Length, then trailers if there are any.
pub fn pieces(length: usize, trailers: Option<HeaderMap>) -> Body {
    const PIECE: usize = 10_000;
    let data = (0..length.div_ceil(PIECE))
        .map(move |n| Frame::data(pattern(n * PIECE, PIECE.min(length - n * PIECE))));
    let frames = data.chain(trailers.map(Frame::trailers)).map(Ok);
    StreamBody::new(stream::iter(frames)).boxed_unsync()
}

/// Bytes that depend on their position, so that a lost or doubled piece shows.
pub fn pattern(from: usize, length: usize) -> Bytes {
    const PERIOD: usize = 65_521;
    static TWICE: LazyLock<Bytes> =
        LazyLock::new(|| (0..2 * PERIOD).map(|at| ((at % PERIOD * 31) >> 4) as u8).collect());
    if length <= PERIOD {
        return TWICE.slice(from % PERIOD..from % PERIOD + length);
    }
    let mut bytes = Vec::with_capacity(length);
    while bytes.len() < length {
        bytes.extend_from_slice(&pattern(from + bytes.len(), PERIOD.min(length - bytes.len())));
    }
    bytes.into()
}

pub fn map(fields: &[(&'static str, &'static str)]) -> HeaderMap {
    fields.iter().map(|&(n, v)| (http::HeaderName::from_static(n), HeaderValue::from_static(v))).collect()
}

/// A future that would never end, or a bug.
pub async fn soon<F: Future>(future: F) -> F::Output {
    tokio::time::timeout(Duration::from_secs(20), future).await.expect("this should not take so long")
}

/// Waits for something that is to happen on another thread.
pub async fn until(mut happened: impl FnMut() -> bool) {
    soon(async {
        while !happened() {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    })
    .await;
}

/// Adds a certificate for `names` to a table, under each of them.
pub fn with_certificate(mut table: RoutingTable, names: &[&str]) -> RoutingTable {
    let certificates = Arc::new(vec![Arc::new(Certificate::self_signed(names).unwrap())]);
    for name in names {
        table.certificates.insert(HostPattern::new(name), certificates.clone());
    }
    table
}

/// Serves every connection with hyper, each request by `answer`.
pub async fn endpoint<F, R>(speaks: UpstreamProtocol, answer: F) -> SocketAddr
where
    F: Fn(Request<Incoming>) -> R + Clone + Send + 'static,
    R: Future<Output = Response<Body>> + Send + 'static,
{
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    small_buffers(SockRef::from(&listener));
    let address = listener.local_addr().unwrap();
    let (tls, http2) = match speaks {
        UpstreamProtocol::Http1 => (false, false),
        UpstreamProtocol::H2c => (false, true),
        UpstreamProtocol::Https => (true, false),
        UpstreamProtocol::H2 => (true, true),
        UpstreamProtocol::Tcp | UpstreamProtocol::Udp => unreachable!("speaks no HTTP"),
    };
    let acceptor = tls.then(|| acceptor(http2));
    tokio::spawn(async move {
        while let Ok((tcp, _)) = listener.accept().await {
            tcp.set_nodelay(true).unwrap();
            let (acceptor, answer) = (acceptor.clone(), answer.clone());
            tokio::spawn(async move {
                match acceptor {
                    None => serve(tcp, http2, answer).await,
                    Some(acceptor) => match acceptor.accept(tcp).await {
                        Ok(tls) => serve(tls, http2, answer).await,
                        Err(error) => panic!("handshake with the proxy: {error}"),
                    },
                }
            });
        }
    });
    address
}

async fn serve<I, F, R>(io: I, http2: bool, answer: F)
where
    I: AsyncRead + AsyncWrite + Send + Unpin + 'static,
    F: Fn(Request<Incoming>) -> R + Clone + Send + 'static,
    R: Future<Output = Response<Body>> + Send + 'static,
{
    let service = service_fn(move |request| {
        let answer = answer(request);
        async move { Ok::<_, Infallible>(answer.await) }
    });
    // How a connection ends is not the business of an endpoint.
    let _ = match http2 {
        true => {
            hyper::server::conn::http2::Builder::new(TokioExecutor::new())
                .serve_connection(TokioIo::new(io), service)
                .await
        }
        false => hyper::server::conn::http1::Builder::new().serve_connection(TokioIo::new(io), service).await,
    };
}

/// TLS for an endpoint, with a certificate of its own.
pub fn acceptor(http2: bool) -> TlsAcceptor {
    let made = rcgen::generate_simple_self_signed(vec!["endpoint.internal".to_owned()]).unwrap();
    let key = PrivateKeyDer::try_from(made.signing_key.serialize_der()).unwrap();
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let mut config = rustls::ServerConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_no_client_auth()
        .with_single_cert(vec![made.cert.der().clone()], key)
        .unwrap();
    config.alpn_protocols = vec![if http2 { b"h2".to_vec() } else { b"http/1.1".to_vec() }];
    TlsAcceptor::from(Arc::new(config))
}

/// A small application: what it does is in the path.
pub async fn app(request: Request<Incoming>) -> Response<Body> {
    let path = request.uri().path().to_owned();
    match path.split('/').skip(1).collect::<Vec<_>>()[..] {
        // The body and its trailers come back as they are.
        ["echo"] => Response::new(request.into_body().boxed_unsync()),
        // The request's head as lines of text.
        ["head"] => Response::new(full(head_lines(&request))),
        ["bytes", n] => Response::new(full(pattern(0, n.parse().unwrap()))),
        ["pieces", n] => Response::new(pieces(n.parse().unwrap(), None)),
        ["trailers"] => Response::builder()
            .header("trailer", "x-sum")
            .body(pieces(25_000, Some(map(&[("x-sum", "42")]))))
            .unwrap(),
        // The number of body bytes, and of trailers.
        ["count"] => {
            let collected = request.into_body().collect().await.unwrap();
            let trailers = collected.trailers().map_or(0, HeaderMap::len);
            Response::new(full(format!("{} {trailers}", collected.to_bytes().len())))
        }
        ["status", status] => Response::builder().status(status).header("x-kept", "1").body(empty()).unwrap(),
        _ => Response::builder().status(404).body(empty()).unwrap(),
    }
}

fn head_lines(request: &Request<Incoming>) -> String {
    let mut lines = format!("{} {}\n", request.method(), request.uri());
    for (name, value) in request.headers() {
        lines += &format!("{name}: {}\n", value.to_str().unwrap());
    }
    lines
}

/// Counts itself for as long as it lives.
pub struct Alive(Arc<AtomicUsize>);

impl Alive {
    pub fn new(count: &Arc<AtomicUsize>) -> Alive {
        count.fetch_add(1, SeqCst);
        Alive(count.clone())
    }
}

impl Drop for Alive {
    fn drop(&mut self) {
        self.0.fetch_sub(1, SeqCst);
    }
}

/// How a client comes to the proxy.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Comes {
    Http1,
    H2c,
    Https,
    H2,
}

pub const EVERY_CLIENT: [Comes; 4] = [Comes::Http1, Comes::H2c, Comes::Https, Comes::H2];
pub const EVERY_ENDPOINT: [UpstreamProtocol; 4] =
    [UpstreamProtocol::Http1, UpstreamProtocol::H2c, UpstreamProtocol::Https, UpstreamProtocol::H2];

/// A connection of hyper's to the proxy.
#[derive(Debug)]
pub enum Client {
    Http1(hyper::client::conn::http1::SendRequest<Body>),
    Http2(hyper::client::conn::http2::SendRequest<Body>, &'static str),
}

impl Client {
    pub async fn connect(proxy: &Proxy, comes: Comes) -> Client {
        match comes {
            Comes::Http1 => Client::http1(tcp(proxy.http_addrs()[0]).await).await,
            Comes::H2c => Client::http2(tcp(proxy.http_addrs()[0]).await, "http").await,
            Comes::Https => Client::http1(tls(proxy, HOST, false).await).await,
            Comes::H2 => Client::http2(tls(proxy, HOST, true).await, "https").await,
        }
    }

    pub async fn http1(io: impl AsyncRead + AsyncWrite + Send + Unpin + 'static) -> Client {
        let (send, connection) = hyper::client::conn::http1::handshake(TokioIo::new(io)).await.unwrap();
        tokio::spawn(connection);
        Client::Http1(send)
    }

    pub async fn http2(
        io: impl AsyncRead + AsyncWrite + Send + Unpin + 'static,
        scheme: &'static str,
    ) -> Client {
        let (send, connection) = hyper::client::conn::http2::Builder::new(TokioExecutor::new())
            .handshake(TokioIo::new(io))
            .await
            .unwrap();
        tokio::spawn(connection);
        Client::Http2(send, scheme)
    }

    /// A request of the form this protocol wants.
    pub fn request(&self, method: Method, path: &str) -> http::request::Builder {
        match self {
            Client::Http1(_) => Request::builder().method(method).uri(path).header("host", HOST),
            Client::Http2(_, scheme) => {
                Request::builder().method(method).uri(format!("{scheme}://{HOST}{path}"))
            }
        }
    }

    pub async fn send(&mut self, request: Request<Body>) -> Result<Response<Incoming>, hyper::Error> {
        soon(async {
            match self {
                Client::Http1(send) => {
                    send.ready().await?;
                    send.send_request(request).await
                }
                Client::Http2(send, _) => {
                    send.ready().await?;
                    send.send_request(request).await
                }
            }
        })
        .await
    }

    /// Sends, and reads the whole answer.
    pub async fn ask(&mut self, method: Method, path: &str, body: Body) -> Answer {
        let request = self.request(method, path).body(body).unwrap();
        Answer::of(self.send(request).await.unwrap()).await
    }

    pub async fn get(&mut self, path: &str) -> Answer {
        self.ask(Method::GET, path, empty()).await
    }
}

/// A whole answer.
#[derive(Debug)]
pub struct Answer {
    pub status: StatusCode,
    pub headers: HeaderMap,
    pub body: Bytes,
    pub trailers: HeaderMap,
}

impl Answer {
    pub async fn of(response: Response<Incoming>) -> Answer {
        let (parts, body) = response.into_parts();
        let collected = soon(body.collect()).await.unwrap();
        let trailers = collected.trailers().cloned().unwrap_or_default();
        Answer { status: parts.status, headers: parts.headers, body: collected.to_bytes(), trailers }
    }

    pub fn text(&self) -> &str {
        std::str::from_utf8(&self.body).unwrap()
    }
}

pub async fn tcp(address: SocketAddr) -> TcpStream {
    let tcp = TcpStream::connect(address).await.unwrap();
    tcp.set_nodelay(true).unwrap();
    small_buffers(SockRef::from(&tcp));
    tcp
}

/// Left to itself the kernel holds up to 32 MiB per socket, and hides what the proxy holds.
fn small_buffers(socket: SockRef<'_>) {
    socket.set_recv_buffer_size(128 << 10).unwrap();
    socket.set_send_buffer_size(128 << 10).unwrap();
}

/// A TLS connection to the proxy that speaks HTTP/2 or HTTP/1.1.
pub async fn tls(
    proxy: &Proxy,
    name: &'static str,
    http2: bool,
) -> tokio_rustls::client::TlsStream<TcpStream> {
    let connector = TlsConnector::from(tls::client_config(http2));
    let name = ServerName::try_from(name).unwrap();
    let tls = connector.connect(name, tcp(proxy.https_addrs()[0]).await).await.unwrap();
    let expected: &[u8] = if http2 { b"h2" } else { b"http/1.1" };
    assert_eq!(tls.get_ref().1.alpn_protocol(), Some(expected));
    tls
}

/// An endpoint that accepts connections, and that is all.
pub async fn says_nothing() -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    tokio::spawn(async move {
        let mut held = Vec::new();
        while let Ok((tcp, _)) = listener.accept().await {
            held.push(tcp);
        }
    });
    address
}
