//! WebSocket through the proxy, with tungstenite on both sides.
#![allow(clippy::unwrap_used, reason = "a test says what it expects by panicking")]

#[path = "support/peers.rs"]
mod peers;
#[path = "support/toy.rs"]
mod toy;

use std::net::SocketAddr;

use futures_util::{SinkExt as _, StreamExt as _};
use lockgate_proxy::Proxy;
use lockgate_proxy::table::{RoutingTable, UpstreamProtocol};
use peers::{HOST, pattern, soon, tcp, tls, until, with_certificate};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::TcpListener;
use tokio_tungstenite::WebSocketStream;
use tokio_tungstenite::tungstenite::protocol::CloseFrame;
use tokio_tungstenite::tungstenite::protocol::frame::coding::CloseCode;
use tokio_tungstenite::tungstenite::{Error, Message};

/// Echoes text and binary messages; on the text `bye` it closes the conversation.
async fn echo_server() -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    tokio::spawn(async move {
        while let Ok((tcp, _)) = listener.accept().await {
            tokio::spawn(async move {
                let Ok(mut socket) = tokio_tungstenite::accept_async(tcp).await else { return };
                while let Some(Ok(message)) = socket.next().await {
                    match &message {
                        Message::Text(text) if text.as_str() == "bye" => {
                            let frame = CloseFrame { code: CloseCode::Away, reason: "bye".into() };
                            let _ = socket.close(Some(frame)).await;
                        }
                        Message::Text(_) | Message::Binary(_) => socket.send(message).await.unwrap(),
                        _ => {}
                    }
                }
            });
        }
    });
    address
}

async fn setup() -> (Proxy, lockgate_proxy::Publisher, RoutingTable) {
    let server = echo_server().await;
    let table = with_certificate(toy::table(&[server], UpstreamProtocol::Http1), &[HOST]);
    let (proxy, publisher) = toy::start(toy::config(), table.clone());
    (proxy, publisher, table)
}

trait Io: AsyncRead + AsyncWrite + Send + Unpin {}
impl<T: AsyncRead + AsyncWrite + Send + Unpin> Io for T {}

type Socket = WebSocketStream<Box<dyn Io>>;

/// A conversation in the clear, and one over TLS.
async fn both(proxy: &Proxy) -> [Socket; 2] {
    let plain: Box<dyn Io> = Box::new(tcp(proxy.http_addrs()[0]).await);
    let secure: Box<dyn Io> = Box::new(tls(proxy, HOST, false).await);
    [open(plain, "ws").await, open(secure, "wss").await]
}

async fn open(io: Box<dyn Io>, scheme: &str) -> Socket {
    let (socket, response) =
        soon(tokio_tungstenite::client_async(format!("{scheme}://{HOST}/chat"), io)).await.unwrap();
    assert_eq!(response.status(), 101);
    socket
}

async fn echo(socket: &mut Socket, message: Message) {
    socket.send(message.clone()).await.unwrap();
    assert_eq!(soon(socket.next()).await.unwrap().unwrap(), message);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_thousand_messages_of_every_size() {
    let (proxy, _publisher, _) = setup().await;
    for mut socket in both(&proxy).await {
        for n in 0..1_000 {
            let length = match n % 100 {
                0 => 1 << 20,
                at => at * at,
            };
            echo(&mut socket, Message::Binary(pattern(n, length))).await;
        }
        echo(&mut socket, Message::text("grüße")).await;
        socket.send(Message::Ping("are you there".into())).await.unwrap();
        assert_eq!(soon(socket.next()).await.unwrap().unwrap(), Message::Pong("are you there".into()));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn either_side_may_close() {
    let (proxy, _publisher, _) = setup().await;
    let metrics = proxy.metrics().worker(0);
    let [mut by_client, mut by_client_tls] = both(&proxy).await;
    for socket in [&mut by_client, &mut by_client_tls] {
        socket.close(None).await.unwrap();
        assert!(matches!(soon(socket.next()).await, Some(Ok(Message::Close(None)))));
        assert!(soon(socket.next()).await.is_none());
    }
    for mut socket in both(&proxy).await {
        socket.send(Message::text("bye")).await.unwrap();
        let Some(Ok(Message::Close(Some(frame)))) = soon(socket.next()).await else { panic!("no close") };
        assert_eq!((frame.code, frame.reason.as_str()), (CloseCode::Away, "bye"));
        assert!(soon(socket.next()).await.is_none());
    }
    drop((by_client, by_client_tls));
    until(|| metrics.tunnels_open.value() == 0).await;
    assert_eq!(metrics.upgrades.value(), 4);
    until(|| metrics.upstream_open.value() == 0).await;
    assert_eq!((metrics.http.http1.open.value(), metrics.https.http1.open.value()), (0, 0));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_tunnel_outlives_its_route() {
    let (proxy, mut publisher, table) = setup().await;
    let mut sockets = both(&proxy).await;
    publisher.publish(RoutingTable::default());
    for socket in &mut sockets {
        echo(socket, Message::text("still here")).await;
    }
    // New conversations find nobody.
    let refused =
        tokio_tungstenite::client_async(format!("ws://{HOST}/chat"), tcp(proxy.http_addrs()[0]).await);
    let Err(Error::Http(response)) = soon(refused).await else { panic!("not refused") };
    assert_eq!(response.status(), 404);
    publisher.publish(table);
    for socket in &mut sockets {
        echo(socket, Message::Binary(pattern(0, 1 << 20))).await;
    }
    both(&proxy).await;
}
