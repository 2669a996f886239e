//! WebSocket over HTTP/2 (RFC 8441): extended CONNECT, towards endpoints of either protocol.
#![allow(clippy::unwrap_used, reason = "a test says what it expects by panicking")]

#[path = "support/peers.rs"]
mod peers;
#[path = "support/toy.rs"]
mod toy;

use std::io::{Read as _, Write as _};
use std::net::SocketAddr;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use bytes::Bytes;
use futures_util::{SinkExt as _, StreamExt as _};
use h2::client::SendRequest;
use h2::ext::Protocol;
use h2::{Reason, RecvStream, SendStream};
use http::{HeaderMap, Method, Request, Response, StatusCode};
use lockgate_proxy::table::{RoutingTable, UpstreamProtocol};
use lockgate_proxy::{Config, Proxy, Publisher};
use peers::{HOST, pattern, soon, tcp, tls, until, with_certificate};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _, DuplexStream};
use tokio::net::TcpListener;
use tokio_tungstenite::WebSocketStream;
use tokio_tungstenite::tungstenite::Message;
use tokio_tungstenite::tungstenite::protocol::Role;

/// An HTTP/1.1 endpoint that switches to WebSocket and echoes.
async fn echo_http1() -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    tokio::spawn(async move {
        while let Ok((tcp, _)) = listener.accept().await {
            tokio::spawn(async move {
                let Ok(socket) = tokio_tungstenite::accept_async(tcp).await else { return };
                echo(socket).await;
            });
        }
    });
    address
}

/// An HTTP/2 endpoint that does the same by extended CONNECT, if it says it does.
async fn echo_http2(offers: bool) -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    tokio::spawn(async move {
        while let Ok((tcp, _)) = listener.accept().await {
            let mut builder = h2::server::Builder::new();
            if offers {
                builder.enable_connect_protocol();
            }
            tokio::spawn(async move {
                let mut connection = builder.handshake(tcp).await.unwrap();
                while let Some(Ok((request, mut respond))) = connection.accept().await {
                    let (parts, body) = request.into_parts();
                    let protocol = parts.extensions.get::<Protocol>().map(Protocol::as_str);
                    assert_eq!((parts.method, protocol), (Method::CONNECT, Some("websocket")));
                    assert!(!parts.headers.contains_key("sec-websocket-key"));
                    assert!(parts.headers.contains_key("x-forwarded-for"));
                    let status = if parts.uri.path() == "/refused" { 403 } else { 200 };
                    let response = Response::builder().status(status).body(()).unwrap();
                    let Ok(send) = respond.send_response(response, status == 403) else { continue };
                    if status == 200 {
                        let io = bridge(send, body);
                        tokio::spawn(async move {
                            echo(WebSocketStream::from_raw_socket(io, Role::Server, None).await).await;
                        });
                    }
                }
            });
        }
    });
    address
}

async fn echo<S>(mut socket: WebSocketStream<S>)
where
    S: tokio::io::AsyncRead + tokio::io::AsyncWrite + Unpin,
{
    while let Some(Ok(message)) = socket.next().await {
        if (message.is_text() || message.is_binary()) && socket.send(message).await.is_err() {
            return;
        }
    }
}

/// The two halves of a stream as one byte stream.
fn bridge(mut send: SendStream<Bytes>, mut receive: RecvStream) -> DuplexStream {
    let (near, far) = tokio::io::duplex(64 << 10);
    let (mut from, mut to) = tokio::io::split(far);
    tokio::spawn(async move {
        let mut buffer = vec![0; 16 << 10];
        while let Ok(n) = from.read(&mut buffer).await {
            if send_all(&mut send, &buffer[..n], n == 0).await.is_none() || n == 0 {
                return;
            }
        }
    });
    tokio::spawn(async move {
        while let Some(Ok(data)) = receive.data().await {
            receive.flow_control().release_capacity(data.len()).unwrap();
            if to.write_all(&data).await.is_err() {
                return;
            }
        }
        let _ = to.shutdown().await;
    });
    near
}

async fn send_all(send: &mut SendStream<Bytes>, mut bytes: &[u8], end: bool) -> Option<()> {
    while !bytes.is_empty() {
        send.reserve_capacity(bytes.len());
        while send.capacity() == 0 {
            std::future::poll_fn(|cx| send.poll_capacity(cx)).await?.ok()?;
        }
        let (piece, rest) = bytes.split_at(send.capacity().min(bytes.len()));
        send.send_data(Bytes::copy_from_slice(piece), false).ok()?;
        bytes = rest;
    }
    if end {
        send.send_data(Bytes::new(), true).ok()?;
    }
    Some(())
}

/// A client connection that knows what the proxy offers.
async fn connect(proxy: &Proxy, secure: bool) -> SendRequest<Bytes> {
    async fn start(
        io: impl tokio::io::AsyncRead + tokio::io::AsyncWrite + Send + Unpin + 'static,
    ) -> SendRequest<Bytes> {
        let (send, connection) = h2::client::handshake(io).await.unwrap();
        tokio::spawn(connection);
        send
    }
    let send = match secure {
        false => start(tcp(proxy.http_addrs()[0]).await).await,
        true => start(tls(proxy, HOST, true).await).await,
    };
    until(|| send.is_extended_connect_protocol_enabled()).await;
    send
}

struct Opened {
    status: StatusCode,
    headers: HeaderMap,
    send: SendStream<Bytes>,
    receive: RecvStream,
}

async fn ask(client: &mut SendRequest<Bytes>, protocol: Option<&'static str>, path: &str) -> Opened {
    let uri = match protocol {
        Some(_) => format!("http://{HOST}{path}"),
        None => format!("{HOST}:80"),
    };
    let request = Request::connect(uri).header("sec-websocket-version", "13").header("x-mine", "kept");
    let mut request = request.header("sec-websocket-protocol", "chat").body(()).unwrap();
    request.extensions_mut().extend(
        protocol
            .map(Protocol::from_static)
            .map(|protocol| {
                let mut extensions = http::Extensions::new();
                extensions.insert(protocol);
                extensions
            })
            .unwrap_or_default(),
    );
    let (response, send) = client.send_request(request, false).unwrap();
    let (parts, receive) = soon(response).await.unwrap().into_parts();
    Opened { status: parts.status, headers: parts.headers, send, receive }
}

async fn open(client: &mut SendRequest<Bytes>) -> WebSocketStream<DuplexStream> {
    let opened = ask(client, Some("websocket"), "/chat").await;
    assert_eq!(opened.status, StatusCode::OK);
    for absent in ["sec-websocket-accept", "connection", "upgrade", "content-length", "transfer-encoding"] {
        assert!(!opened.headers.contains_key(absent), "{absent}");
    }
    WebSocketStream::from_raw_socket(bridge(opened.send, opened.receive), Role::Client, None).await
}

fn start(app: SocketAddr, speaks: UpstreamProtocol, config: Config) -> (Proxy, Publisher) {
    toy::start(config, with_certificate(toy::table(&[app], speaks), &[HOST]))
}

#[tokio::test(flavor = "multi_thread")]
async fn messages_of_every_size_beside_each_other() {
    for speaks in [UpstreamProtocol::Http1, UpstreamProtocol::H2c] {
        let app = match speaks {
            UpstreamProtocol::Http1 => echo_http1().await,
            _ => echo_http2(true).await,
        };
        let (proxy, _publisher) = start(app, speaks, toy::config());
        for secure in [false, true] {
            let mut client = connect(&proxy, secure).await;
            let mut conversations = Vec::new();
            for at in 0..8 {
                let mut socket = open(&mut client).await;
                conversations.push(tokio::spawn(async move {
                    for n in 0..60 {
                        let length = if n == 30 { 1 << 20 } else { n * n * 7 };
                        let message = Message::Binary(pattern(at + n, length));
                        socket.send(message.clone()).await.unwrap();
                        assert_eq!(soon(socket.next()).await.unwrap().unwrap(), message);
                    }
                    socket.close(None).await.unwrap();
                    while let Some(last) = soon(socket.next()).await {
                        assert!(last.unwrap().is_close());
                    }
                }));
            }
            for conversation in conversations {
                soon(conversation).await.unwrap();
            }
        }
        let metrics = proxy.metrics().worker(0);
        until(|| metrics.tunnels_open.value() == 0).await;
        assert_eq!((metrics.upgrades.value(), metrics.requests_in_flight.value()), (16, 0));
        assert_eq!(metrics.ejections.value(), 0);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_an_http1_endpoint_is_asked() {
    let seen = Arc::new(Mutex::new(String::new()));
    let store = seen.clone();
    let app = toy::endpoint(move |mut stream| {
        *store.lock().unwrap() = toy::read_head(&mut stream);
        stream.write_all(b"HTTP/1.1 426 Upgrade Required\r\nContent-Length: 2\r\n\r\nno").unwrap();
    });
    let (proxy, _publisher) = start(app, UpstreamProtocol::Http1, toy::config());
    let mut client = connect(&proxy, false).await;
    let mut opened = ask(&mut client, Some("websocket"), "/chat?room=1").await;
    assert_eq!(opened.status, StatusCode::UPGRADE_REQUIRED);
    assert_eq!(soon(opened.receive.data()).await.unwrap().unwrap(), "no");
    let head = seen.lock().unwrap().to_ascii_lowercase();
    for line in [
        "get /chat?room=1 http/1.1",
        "host: a.example",
        "connection: upgrade",
        "upgrade: websocket",
        "sec-websocket-version: 13",
        "sec-websocket-protocol: chat",
        "x-mine: kept",
        "x-forwarded-for: 127.0.0.1",
    ] {
        assert!(head.lines().any(|l| l == line), "{line}: {head}");
    }
    let key = head.lines().find_map(|l| l.strip_prefix("sec-websocket-key: ")).unwrap();
    assert!(key.len() == 24 && key.ends_with("=="), "{key}");
    for absent in ["transfer-encoding", "content-length", ":protocol"] {
        assert!(!head.contains(absent), "{absent}: {head}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_refused() {
    let answer = |text: &'static str| {
        toy::endpoint(move |mut stream| {
            toy::read_head(&mut stream);
            stream.write_all(text.as_bytes()).unwrap();
            // Until the proxy hangs up.
            let _ = stream.read(&mut [0]);
        })
    };
    let http1 = UpstreamProtocol::Http1;
    let websocket = Some("websocket");
    let switching = "HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n";
    let no_accept: &'static str = format!("{switching}\r\n").leak();
    let wrong: &'static str =
        format!("{switching}Sec-WebSocket-Accept: s3pPLMBiTxaQ9kYGzzhZRbK+xOo=\r\n\r\n").leak();
    for (app, speaks, protocol, path, status) in [
        (answer(""), http1, None, "", 405),
        (answer(""), http1, Some("connect-udp"), "/", 501),
        (answer("HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"), http1, websocket, "/", 502),
        (answer(no_accept), http1, websocket, "/", 502),
        (answer(wrong), http1, websocket, "/", 502),
        (answer("HTTP/1.1 403 Forbidden\r\nContent-Length: 0\r\n\r\n"), http1, websocket, "/", 403),
        (answer(""), http1, websocket, "/%zz", 400),
        (echo_http2(true).await, UpstreamProtocol::H2c, websocket, "/refused", 403),
        (echo_http2(false).await, UpstreamProtocol::H2c, websocket, "/", 502),
    ] {
        let (proxy, _publisher) = start(app, speaks, toy::config());
        let mut client = connect(&proxy, false).await;
        let opened = ask(&mut client, protocol, path).await;
        assert_eq!(opened.status.as_u16(), status, "{speaks:?} {protocol:?} {path}");
        let metrics = proxy.metrics().worker(0);
        assert_eq!((metrics.upgrades.value(), metrics.tunnels_open.value()), (0, 0));
    }
}

/// Switches, whatever it is asked, and hands over the stream.
fn raw_endpoint(serve: impl Fn(std::net::TcpStream) + Send + Sync + 'static) -> SocketAddr {
    toy::endpoint(move |mut stream| {
        let head = toy::read_head(&mut stream);
        let key = head.lines().find_map(|l| l.strip_prefix("Sec-WebSocket-Key: ")).unwrap();
        let accept = tokio_tungstenite::tungstenite::handshake::derive_accept_key(key.as_bytes());
        let answer = format!(
            "HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\
             Sec-WebSocket-Accept: {accept}\r\n\r\nearly"
        );
        stream.write_all(answer.as_bytes()).unwrap();
        serve(stream);
    })
}

async fn read_to_end(receive: &mut RecvStream) -> Result<Vec<u8>, h2::Error> {
    let mut all = Vec::new();
    while let Some(data) = soon(receive.data()).await {
        let data = data?;
        receive.flow_control().release_capacity(data.len()).unwrap();
        all.extend_from_slice(&data);
    }
    Ok(all)
}

#[tokio::test(flavor = "multi_thread")]
async fn each_direction_ends_on_its_own() {
    // Reads to the end before it answers.
    let app = raw_endpoint(|mut stream| {
        let mut all = Vec::new();
        stream.read_to_end(&mut all).unwrap();
        stream.write_all(&all).unwrap();
    });
    let (proxy, _publisher) = start(app, UpstreamProtocol::Http1, toy::config());
    let mut client = connect(&proxy, false).await;
    let mut opened = ask(&mut client, Some("websocket"), "/").await;
    assert_eq!(opened.headers.get("content-length"), None);
    let sent = pattern(0, 300_000);
    let sending = tokio::spawn(async move { send_all(&mut opened.send, &sent, true).await.unwrap() });
    let received = read_to_end(&mut opened.receive).await.unwrap();
    sending.await.unwrap();
    assert_eq!(received, [b"early", &*pattern(0, 300_000)].concat());
    until(|| proxy.metrics().worker(0).tunnels_open.value() == 0).await;
    until(|| proxy.metrics().worker(0).upstream_open.value() == 0).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_break_on_one_side_is_one_on_the_other() {
    let app = raw_endpoint(|mut stream| {
        let mut byte = [0];
        while stream.read(&mut byte).is_ok_and(|n| n > 0) {
            if byte[0] == b'x' {
                // Closing with this set is a reset.
                socket2::SockRef::from(&stream).set_linger(Some(Duration::ZERO)).unwrap();
                return;
            }
        }
    });
    let (proxy, _publisher) = start(app, UpstreamProtocol::Http1, toy::config());
    let metrics = proxy.metrics().worker(0);
    let mut client = connect(&proxy, false).await;
    // By the client.
    let mut opened = ask(&mut client, Some("websocket"), "/").await;
    until(|| metrics.tunnels_open.value() == 1).await;
    opened.send.send_reset(Reason::CANCEL);
    until(|| metrics.tunnels_open.value() == 0 && metrics.upstream_open.value() == 0).await;
    // By the endpoint.
    let mut opened = ask(&mut client, Some("websocket"), "/").await;
    send_all(&mut opened.send, b"x", false).await.unwrap();
    let error = read_to_end(&mut opened.receive).await.unwrap_err();
    assert_eq!(error.reason(), Some(Reason::CANCEL));
    until(|| metrics.tunnels_open.value() == 0).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_silent_tunnel_ends_at_its_deadline() {
    let app = raw_endpoint(|mut stream| while stream.read(&mut [0]).is_ok_and(|n| n > 0) {});
    let mut config = toy::config();
    config.timeouts.tunnel = Duration::from_millis(200);
    // It is not the deadline of a request that ends it.
    config.timeouts.read = Duration::from_secs(600);
    let (proxy, _publisher) = start(app, UpstreamProtocol::Http1, config);
    let mut client = connect(&proxy, false).await;
    let mut opened = ask(&mut client, Some("websocket"), "/").await;
    assert_eq!(read_to_end(&mut opened.receive).await.unwrap_err().reason(), Some(Reason::CANCEL));
    until(|| proxy.metrics().worker(0).upstream_open.value() == 0).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_tunnel_outlives_its_route_and_a_drain_waits_for_it() {
    let (proxy, mut publisher) = start(echo_http1().await, UpstreamProtocol::Http1, toy::config());
    let mut client = connect(&proxy, true).await;
    let mut socket = open(&mut client).await;
    publisher.publish(RoutingTable::default());
    let mut say = async |text: &'static str| {
        socket.send(Message::text(text)).await.unwrap();
        assert_eq!(soon(socket.next()).await.unwrap().unwrap(), Message::text(text));
    };
    say("without a route").await;
    let draining = tokio::spawn(proxy.drain());
    // No new streams once the goodbye has come.
    until(|| {
        let mut cx = std::task::Context::from_waker(std::task::Waker::noop());
        matches!(client.poll_ready(&mut cx), std::task::Poll::Ready(Err(_)))
    })
    .await;
    say("while it drains").await;
    assert!(!draining.is_finished());
    socket.close(None).await.unwrap();
    while let Some(Ok(_)) = soon(socket.next()).await {}
    // Both sides have said goodbye; this ends our direction.
    drop(socket);
    assert!(soon(draining).await.unwrap(), "nothing was cut");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_drain_cuts_a_tunnel_at_its_deadline() {
    let mut config = toy::config();
    config.drain.deadline = Duration::from_millis(200);
    let (proxy, _publisher) = start(echo_http1().await, UpstreamProtocol::Http1, config);
    let mut client = connect(&proxy, false).await;
    let mut socket = open(&mut client).await;
    assert!(!soon(proxy.drain()).await);
    assert!(!matches!(soon(socket.next()).await, Some(Ok(_))));
}
