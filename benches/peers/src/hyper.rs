//! A gateway on hyper: `hyper-proxy LISTEN BACKEND`, one thread.
//!
//! Connections to the backend are kept in a stack; each is driven by a task of its own.

use std::cell::RefCell;
use std::convert::Infallible;
use std::net::SocketAddr;
use std::rc::Rc;
use std::time::Duration;

use http::header::{CONNECTION, HOST, HeaderName, HeaderValue};
use hyper::body::Incoming;
use hyper::client::conn::http1::SendRequest;
use hyper::service::service_fn;
use hyper::{Request, Response, StatusCode};
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::net::{TcpListener, TcpStream};
use tokio::time::timeout;

mod routes;

use routes::Routes;

#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

/// Most idle connections kept.
const MAX_IDLE: usize = 1024;
const CONNECT: Duration = Duration::from_secs(5);
const ANSWER: Duration = Duration::from_secs(60);

type Error = Box<dyn std::error::Error + Send + Sync>;

struct Gateway {
    routes: Routes,
    port: HeaderValue,
    idle: RefCell<Vec<SendRequest<Incoming>>>,
}

impl Gateway {
    async fn forward(
        self: &Rc<Self>,
        client: &HeaderValue,
        mut request: Request<Incoming>,
    ) -> Result<Response<Incoming>, Error> {
        let host = request.headers().get(HOST).cloned().ok_or("no host")?;
        let backend = self.routes.find(host.to_str()?, request.uri().path()).ok_or("no route")?;
        let fields = request.headers_mut();
        fields.remove(CONNECTION);
        let mut set = |name: &'static str, value| fields.insert(HeaderName::from_static(name), value);
        set("x-real-ip", client.clone());
        set("x-forwarded-for", client.clone());
        set("x-forwarded-host", host);
        set("x-forwarded-port", self.port.clone());
        set("x-forwarded-proto", HeaderValue::from_static("http"));
        set("x-request-id", HeaderValue::from_str(&routes::request_id())?);

        let idle = self.idle.borrow_mut().pop();
        let mut sender = match idle {
            Some(sender) if sender.is_ready() => sender,
            _ => connect(backend).await?,
        };
        let mut response = timeout(ANSWER, sender.send_request(request)).await??;
        response.headers_mut().remove(CONNECTION);
        // Ready again when the answer's body has been read.
        let gateway = Rc::clone(self);
        if sender.is_ready() {
            gateway.keep(sender);
        } else {
            tokio::task::spawn_local(async move {
                if sender.ready().await.is_ok() {
                    gateway.keep(sender);
                }
            });
        }
        Ok(response)
    }

    fn keep(&self, sender: SendRequest<Incoming>) {
        let mut idle = self.idle.borrow_mut();
        if idle.len() < MAX_IDLE {
            idle.push(sender);
        }
    }
}

async fn connect(backend: SocketAddr) -> Result<SendRequest<Incoming>, Error> {
    let stream = timeout(CONNECT, TcpStream::connect(backend)).await??;
    stream.set_nodelay(true)?;
    let (sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream)).await?;
    tokio::task::spawn_local(connection);
    Ok(sender)
}

async fn serve(gateway: Rc<Gateway>, stream: TcpStream, client: SocketAddr) {
    let Ok(client) = HeaderValue::from_str(&client.ip().to_string()) else { return };
    let service = service_fn(move |request| {
        let (gateway, client) = (Rc::clone(&gateway), client.clone());
        async move {
            let answer: Result<_, Infallible> = Ok(match gateway.forward(&client, request).await {
                Ok(response) => response.map(Body::Upstream),
                Err(_) => {
                    let mut response = Response::new(Body::Empty);
                    *response.status_mut() = StatusCode::BAD_GATEWAY;
                    response
                }
            });
            answer
        }
    });
    // An error is the client's: it left, or spoke something else.
    let _ = hyper::server::conn::http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(Duration::from_secs(60))
        .serve_connection(TokioIo::new(stream), service)
        .await;
}

/// The backend's body, or none.
enum Body {
    Upstream(Incoming),
    Empty,
}

impl hyper::body::Body for Body {
    type Data = hyper::body::Bytes;
    type Error = hyper::Error;

    fn poll_frame(
        self: std::pin::Pin<&mut Self>,
        cx: &mut std::task::Context<'_>,
    ) -> std::task::Poll<Option<Result<hyper::body::Frame<Self::Data>, Self::Error>>> {
        match self.get_mut() {
            Body::Upstream(body) => std::pin::Pin::new(body).poll_frame(cx),
            Body::Empty => std::task::Poll::Ready(None),
        }
    }

    fn is_end_stream(&self) -> bool {
        match self {
            Body::Upstream(body) => body.is_end_stream(),
            Body::Empty => true,
        }
    }

    fn size_hint(&self) -> hyper::body::SizeHint {
        match self {
            Body::Upstream(body) => body.size_hint(),
            Body::Empty => hyper::body::SizeHint::with_exact(0),
        }
    }
}

fn main() -> Result<(), Error> {
    let mut addresses = std::env::args().skip(1);
    let mut next = || addresses.next().and_then(|a| a.parse::<SocketAddr>().ok());
    let (Some(listen), Some(backend)) = (next(), next()) else {
        return Err("usage: hyper-proxy LISTEN BACKEND".into());
    };
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    tokio::task::LocalSet::new().block_on(&runtime, async move {
        let gateway = Rc::new(Gateway {
            routes: Routes::new(backend),
            port: HeaderValue::from(listen.port()),
            idle: RefCell::default(),
        });
        let socket = tokio::net::TcpSocket::new_v4()?;
        socket.set_reuseaddr(true)?;
        socket.bind(listen)?;
        let listener: TcpListener = socket.listen(4096)?;
        loop {
            let (stream, client) = listener.accept().await?;
            stream.set_nodelay(true)?;
            tokio::task::spawn_local(serve(Rc::clone(&gateway), stream, client));
        }
    })
}
