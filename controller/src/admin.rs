//! The admin endpoint: health, metrics and what is live, for operators and
//! probes. Read only, on loopback unless told otherwise.

use std::collections::BTreeMap;
use std::io;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock};

use bytes::Bytes;
use http_body_util::{BodyExt, Empty, Limited};
use hyper::header::{ALLOW, HOST};
use hyper::{Method, Request, StatusCode};
use hyper_util::rt::TokioIo;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Notify;
use tokio::time::{sleep, timeout};

use crate::explain::{Question, explain};
use crate::http::{self, Answer, CONNECTION_TIMEOUT, HEADER_TIMEOUT, Reply, parameters};
use crate::text::Text;
use lockgate_proxy::handover::Sockets;
use lockgate_proxy::l4::ListenerState;
use lockgate_proxy::router::{Live, Routes};

/// Bytes of an answer that `explain --admin` is ready to read.
const ANSWER_MAX: usize = 1 << 20;

const INDEX: &str = "\
lockgate admin

  /livez          200 while the process lives
  /readyz         200 when the first full table is live, 503 before that and while draining
  /metrics        Prometheus
  /debug/routes   the live table as JSON; ?host=shop.example for one host
  /debug/listeners  TCP and UDP ports: open, or why not
  /debug/explain  ?url=https://shop.example/cart&method=GET&header=Name:%20value
";

/// What the admin endpoint shows. Shared with whoever starts, publishes and stops.
#[derive(Default)]
pub struct AdminState {
    live: OnceLock<(Routes, Arc<Live>)>,
    ready: AtomicBool,
    draining: AtomicBool,
    relieved: Notify,
}

impl AdminState {
    /// The proxy runs: there are metrics and routes to show.
    pub fn started(&self, routes: Routes, live: Arc<Live>) {
        // A process starts one proxy; a second one would not be shown.
        let _ = self.live.set((routes, live));
    }

    /// The first full table is live.
    pub fn ready(&self) {
        self.ready.store(true, Ordering::Release);
    }

    /// The process is about to stop; load balancers should look elsewhere.
    pub fn draining(&self) {
        self.draining.store(true, Ordering::Release);
    }

    /// Another process has the endpoint's socket: this one accepts no more from it.
    /// It still says ready on connections it has: who asks means the address, and that is served.
    pub fn relieved(&self) {
        self.relieved.notify_one();
    }

    fn readiness(&self) -> Result<(), &'static str> {
        match (self.draining.load(Ordering::Acquire), self.ready.load(Ordering::Acquire)) {
            (true, _) => Err("draining\n"),
            (false, false) => Err("the first table is not live yet\n"),
            (false, true) => Ok(()),
        }
    }
}

/// The admin endpoint's socket, from the process before this one or new.
pub struct Admin {
    address: SocketAddr,
    /// Until it is served.
    listener: Option<std::net::TcpListener>,
}

impl Admin {
    /// # Errors
    /// The address cannot be bound.
    pub fn bind(address: SocketAddr, sockets: &Sockets) -> io::Result<Admin> {
        let name = format!("admin {address}");
        let inherited = sockets.take(&name).into_iter().next().map(std::net::TcpListener::from);
        let listener = inherited.map_or_else(|| std::net::TcpListener::bind(address), Ok)?;
        listener.set_nonblocking(true)?;
        sockets.keep(&name, &listener)?;
        Ok(Admin { address: listener.local_addr()?, listener: Some(listener) })
    }

    /// The address it really has.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Serves it on a thread of its own, so that a busy controller does not look
    /// dead. Does nothing the second time.
    ///
    /// # Errors
    /// A thread cannot be started.
    pub fn start(&mut self, state: &Arc<AdminState>) -> io::Result<()> {
        let Some(listener) = self.listener.take() else { return Ok(()) };
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        let state = state.clone();
        let serving = async move {
            match TcpListener::from_std(listener) {
                Ok(listener) => serve_until_relieved(listener, state).await,
                Err(error) => tracing::error!("the admin endpoint cannot be served: {error}"),
            }
        };
        let thread = std::thread::Builder::new().name("lockgate-admin".into());
        thread.spawn(move || runtime.block_on(serving))?;
        Ok(())
    }
}

/// Serves the admin endpoint; returns the address it really has.
///
/// # Errors
/// The address cannot be bound, or a thread cannot be started.
pub fn start(address: SocketAddr, state: Arc<AdminState>) -> io::Result<SocketAddr> {
    let mut admin = Admin::bind(address, &Sockets::default())?;
    admin.start(&state)?;
    Ok(admin.address())
}

async fn serve_until_relieved(listener: TcpListener, state: Arc<AdminState>) {
    tokio::select! {
        () = serve(listener, state.clone()) => {}
        () = state.relieved.notified() => {}
    }
    // Who is connected may go on asking this process, who comes now asks the new one.
    sleep(CONNECTION_TIMEOUT).await;
}

async fn serve(listener: TcpListener, state: Arc<AdminState>) {
    http::serve(listener, move |request| {
        let answer = answer(&state, &request);
        async move { answer }
    })
    .await;
}

fn answer<B>(state: &AdminState, request: &Request<B>) -> Reply {
    if !matches!(*request.method(), Method::GET | Method::HEAD) {
        let mut refusal = plain(StatusCode::METHOD_NOT_ALLOWED, "only GET and HEAD\n");
        refusal.headers_mut().insert(ALLOW, hyper::header::HeaderValue::from_static("GET, HEAD"));
        return refusal;
    }
    let query = request.uri().query().unwrap_or_default();
    match (request.uri().path(), state.live.get()) {
        ("/", _) => plain(StatusCode::OK, INDEX),
        ("/livez" | "/healthz", _) => plain(StatusCode::OK, "ok\n"),
        ("/readyz", _) => match state.readiness() {
            Ok(()) => plain(StatusCode::OK, "ok\n"),
            Err(reason) => plain(StatusCode::SERVICE_UNAVAILABLE, reason),
        },
        ("/metrics", Some((_, live))) => {
            body(StatusCode::OK, "text/plain; version=0.0.4; charset=utf-8", live.metrics.encode())
        }
        ("/debug/routes", Some((routes, _))) => show_routes(routes, query),
        ("/debug/listeners", Some((_, live))) => show_listeners(live),
        ("/debug/explain", Some((routes, _))) => show_explanation(routes, query),
        ("/metrics" | "/debug/routes" | "/debug/listeners" | "/debug/explain", None) => {
            plain(StatusCode::SERVICE_UNAVAILABLE, "the proxy has not started yet\n")
        }
        _ => plain(StatusCode::NOT_FOUND, INDEX),
    }
}

/// Certificates appear by fingerprint: their `Serialize` knows nothing else.
fn show_routes(routes: &Routes, query: &str) -> Reply {
    let router = routes.load_full();
    let json = match parameters(query).find(|(name, _)| *name == "host") {
        None => serde_json::to_string_pretty(router.table()),
        Some((_, host)) => {
            let host = if host == "*" { String::new() } else { host };
            let pattern = lockgate_proxy::table::HostPattern::new(&host);
            match router.table().hosts.get(&pattern) {
                Some(host) => serde_json::to_string_pretty(host),
                None => return plain(StatusCode::NOT_FOUND, "no rules for this host\n"),
            }
        }
    };
    match json {
        Ok(json) => body(StatusCode::OK, "application/json", json),
        Err(error) => plain(StatusCode::INTERNAL_SERVER_ERROR, &format!("{error}\n")),
    }
}

/// By listener: the address that is open, or why none is.
fn show_listeners(live: &Live) -> Reply {
    let states = live.listeners.get();
    let text = |state: &ListenerState| match state {
        ListenerState::Open(address) => format!("open at {address}"),
        ListenerState::Failed(why) => format!("cannot be opened: {why}"),
    };
    let states: BTreeMap<String, String> =
        states.iter().map(|(key, state)| (key.to_string(), text(state))).collect();
    match serde_json::to_string_pretty(&states) {
        Ok(json) => body(StatusCode::OK, "application/json", json),
        Err(error) => plain(StatusCode::INTERNAL_SERVER_ERROR, &format!("{error}\n")),
    }
}

fn show_explanation(routes: &Routes, query: &str) -> Reply {
    let (mut url, mut method, mut headers) = (String::new(), "GET".to_owned(), Vec::new());
    for (name, value) in parameters(query) {
        match name {
            "url" => url = value,
            "method" => method = value,
            "header" => headers.push(value),
            _ => {}
        }
    }
    match Question::new(&url, &method, &headers) {
        Err(error) => plain(StatusCode::BAD_REQUEST, &format!("{error}\n")),
        Ok(question) => {
            let mut text = Text::new(false);
            let served = explain(&mut text, &routes.load_full(), &question);
            plain(if served { StatusCode::OK } else { StatusCode::NOT_FOUND }, &text.finish())
        }
    }
}

fn plain(status: StatusCode, text: &str) -> Reply {
    Answer::text(status, text).into()
}

fn body(status: StatusCode, kind: &'static str, text: String) -> Reply {
    Answer::new(status, kind, text).no_store().into()
}

/// Asks the admin endpoint of another Lockgate: status and body.
///
/// # Errors
/// In words: what failed.
pub async fn get(address: SocketAddr, path_and_query: &str) -> Result<(u16, String), String> {
    let asking = async {
        let stream = TcpStream::connect(address).await.map_err(|error| error.to_string())?;
        let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream))
            .await
            .map_err(|error| error.to_string())?;
        tokio::spawn(connection);
        let request = Request::get(path_and_query)
            .header(HOST, address.to_string())
            .body(Empty::<Bytes>::new())
            .map_err(|error| error.to_string())?;
        let response = sender.send_request(request).await.map_err(|error| error.to_string())?;
        let status = response.status().as_u16();
        let body = Limited::new(response.into_body(), ANSWER_MAX).collect().await;
        let body = body.map_err(|error| error.to_string())?.to_bytes();
        Ok((status, String::from_utf8_lossy(&body).into_owned()))
    };
    timeout(HEADER_TIMEOUT, asking).await.unwrap_or_else(|_| Err("no answer in time".to_owned()))
}
