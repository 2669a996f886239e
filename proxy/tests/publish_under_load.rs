//! Everything changes while everyone asks: no request fails, none is served by a wrong backend,
//! no tunnel drops, and nothing is left behind.
//!
//! `LOCKGATE_TORTURE_SECONDS=60` makes the run of 1,000 publishes; by default it is shorter.
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "tests say what they expect by panicking")]

use std::collections::BTreeMap;
use std::io;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::sync::{Arc, Mutex, Weak};
use std::time::Duration;

use bytes::Bytes;
use lockgate_proxy::{Config, Proxy, Router};
use rustls::HandshakeKind;
use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _};
use tokio::net::TcpStream;
use tokio::time::{Instant, MissedTickBehavior, interval, sleep, timeout};
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;

#[path = "support/pod.rs"]
mod pod;
#[path = "support/toy.rs"]
mod toy;
#[path = "support/world.rs"]
mod world;

use toy::PATIENCE;
use world::{HOSTS, HTTP2_HOST, History, PATHS, World, host_name};

/// 1,000 in 60 s, and a few more.
const PUBLISHES_PER_SECOND: f64 = 17.0;

const TUNNELS: usize = 50;

/// What all clients share.
struct Load {
    http: SocketAddr,
    https: SocketAddr,
    history: Arc<History>,
    stop: AtomicBool,
    /// For tunnels, which are held longer.
    hang_up: AtomicBool,
    /// Answers by kind of client, and what went wrong.
    tally: Mutex<Tally>,
}

#[derive(Default)]
struct Tally {
    good: BTreeMap<&'static str, usize>,
    failed: Vec<String>,
    wrong: Vec<String>,
    dropped: Vec<String>,
}

/// A request in the making: where to, and since when its answer may be right.
struct Question {
    host: usize,
    path: usize,
    target: String,
    since: usize,
}

impl Load {
    fn goes_on(&self) -> bool {
        !self.stop.load(Relaxed)
    }

    /// A random question, to `host` if given. No two have the same target.
    fn question(&self, host: Option<usize>, suffix: &str) -> Question {
        let host = host.unwrap_or_else(|| fastrand::usize(..HOSTS));
        let path = fastrand::usize(..PATHS.len());
        let target = match PATHS[path] {
            // Nothing may be below an exact path.
            "/exact" => format!("/exact?{:x}{suffix}", fastrand::u64(..)),
            path => format!("{}/{:x}{suffix}", path.trim_end_matches('/'), fastrand::u64(..)),
        };
        Question { host, path, target, since: self.history.now() }
    }

    /// Judges an answer.
    fn check(&self, kind: &'static str, question: &Question, answer: io::Result<(u16, String)>) -> bool {
        let asked = || format!("{kind}: {} {}", host_name(question.host), question.target);
        let mut tally = self.tally.lock().unwrap();
        let (status, body) = match answer {
            Ok(answer) => answer,
            Err(error) => {
                tally.failed.push(format!("{}: {error}", asked()));
                return false;
            }
        };
        let pod = body.strip_suffix(&question.target).map(str::trim_end);
        match pod {
            _ if status != 200 => tally.failed.push(format!("{}: {status} {body}", asked())),
            Some(pod) if self.history.may_serve(question.since, question.host, question.path, pod) => {
                *tally.good.entry(kind).or_default() += 1;
            }
            _ => tally.wrong.push(format!("{}: {body}", asked())),
        }
        status == 200
    }

    fn failed(&self, kind: &str, what: &str, error: &io::Error) {
        self.tally.lock().unwrap().failed.push(format!("{kind}: {what}: {error}"));
    }
}

impl Question {
    /// As HTTP/1.1 says it; every third with a body.
    fn bytes(&self, more: &str) -> Vec<u8> {
        let host = host_name(self.host);
        let start = |method| format!("{method} {} HTTP/1.1\r\nHost: {host}\r\n{more}", self.target);
        match fastrand::u8(..3) {
            0 => format!("{}Content-Length: 11\r\n\r\nhello world", start("POST")).into_bytes(),
            _ => format!("{}\r\n", start("GET")).into_bytes(),
        }
    }
}

/// The client's end of an HTTP/1 connection.
struct Client<S> {
    stream: S,
    bytes: Vec<u8>,
}

impl<S: AsyncRead + AsyncWrite + Unpin> Client<S> {
    fn new(stream: S) -> Client<S> {
        Client { stream, bytes: Vec::new() }
    }

    async fn ask(&mut self, request: &[u8]) -> io::Result<(u16, String)> {
        self.stream.write_all(request).await?;
        self.stream.flush().await?;
        self.receive().await
    }

    /// The next answer: status and decoded body.
    async fn receive(&mut self) -> io::Result<(u16, String)> {
        let head = self.until(b"\r\n\r\n").await?;
        let head = String::from_utf8(head).map_err(io::Error::other)?.to_ascii_lowercase();
        let status = head.get(9..12).and_then(|s| s.parse().ok()).ok_or(io::ErrorKind::InvalidData)?;
        let length = head.lines().find_map(|l| l.strip_prefix("content-length: ")?.parse().ok());
        let mut body = Vec::new();
        if let Some(length) = length {
            body = self.exactly(length).await?;
        } else if head.contains("transfer-encoding: chunked") {
            loop {
                let line = self.until(b"\r\n").await?;
                let size =
                    std::str::from_utf8(&line).ok().and_then(|l| usize::from_str_radix(l.trim(), 16).ok());
                let size = size.ok_or(io::ErrorKind::InvalidData)?;
                body.extend_from_slice(&self.exactly(size + 2).await?[..size]);
                if size == 0 {
                    break;
                }
            }
        }
        Ok((status, String::from_utf8_lossy(&body).into_owned()))
    }

    async fn until(&mut self, end: &[u8]) -> io::Result<Vec<u8>> {
        loop {
            if let Some(at) = self.bytes.windows(end.len()).position(|w| w == end) {
                return Ok(self.bytes.drain(..at + end.len()).collect());
            }
            self.fill().await?;
        }
    }

    async fn exactly(&mut self, n: usize) -> io::Result<Vec<u8>> {
        while self.bytes.len() < n {
            self.fill().await?;
        }
        Ok(self.bytes.drain(..n).collect())
    }

    async fn fill(&mut self) -> io::Result<()> {
        match timeout(PATIENCE, self.stream.read_buf(&mut self.bytes)).await?? {
            0 => Err(io::ErrorKind::UnexpectedEof.into()),
            _ => Ok(()),
        }
    }
}

async fn plain(load: &Load) -> io::Result<TcpStream> {
    let stream = TcpStream::connect(load.http).await?;
    stream.set_nodelay(true)?;
    Ok(stream)
}

/// A new handshake, and a look at the certificate.
async fn secure(load: &Load, host: usize, http2: bool) -> io::Result<TlsStream<TcpStream>> {
    let since = load.history.now();
    let tcp = TcpStream::connect(load.https).await?;
    tcp.set_nodelay(true)?;
    let connector = TlsConnector::from(lockgate_proxy::tls::client_config(http2));
    let name = host_name(host).try_into().map_err(io::Error::other)?;
    let stream = timeout(PATIENCE, connector.connect(name, tcp)).await??;
    let session = stream.get_ref().1;
    let shown = session.peer_certificates().and_then(|chain| chain.first());
    let right = shown.is_some_and(|certificate| load.history.may_show(since, host, certificate));
    if !right || session.handshake_kind() == Some(HandshakeKind::Resumed) {
        load.tally.lock().unwrap().wrong.push(format!("{}: wrong certificate", host_name(host)));
    }
    Ok(stream)
}

/// Request after request on one connection, which must never close.
async fn keep_alive<S>(load: &Load, kind: &'static str, stream: S, host: Option<usize>, suffix: &str)
where
    S: AsyncRead + AsyncWrite + Unpin,
{
    let mut client = Client::new(stream);
    while load.goes_on() {
        let question = load.question(host, suffix);
        let answer = client.ask(&question.bytes("")).await;
        let ended = answer.is_err();
        load.check(kind, &question, answer);
        if ended {
            return;
        }
    }
}

async fn keep_alive_plain(load: Arc<Load>, kind: &'static str, suffix: &'static str) {
    match plain(&load).await {
        Ok(stream) => keep_alive(&load, kind, stream, None, suffix).await,
        Err(error) => load.failed(kind, "connect", &error),
    }
}

async fn keep_alive_tls(load: Arc<Load>, host: usize) {
    match secure(&load, host, false).await {
        Ok(stream) => keep_alive(&load, "TLS keep-alive", stream, Some(host), "").await,
        Err(error) => load.failed("TLS keep-alive", "connect", &error),
    }
}

/// Ten questions at once, again and again.
async fn pipelined(load: Arc<Load>) {
    let mut client = Client::new(plain(&load).await.unwrap());
    while load.goes_on() {
        let questions: Vec<Question> = (0..10).map(|_| load.question(None, "")).collect();
        let bytes: Vec<u8> = questions.iter().flat_map(|question| question.bytes("")).collect();
        let sent = client.stream.write_all(&bytes).await;
        for question in &questions {
            let answer = match &sent {
                Ok(()) => client.receive().await,
                Err(error) => Err(error.kind().into()),
            };
            if !load.check("pipelined", question, answer) {
                return;
            }
        }
    }
}

/// A connection for every request.
async fn one_shot(load: Arc<Load>, tls: bool) {
    let kind = if tls { "TLS connection per request" } else { "connection per request" };
    while load.goes_on() {
        let question = load.question(None, "");
        let close = if fastrand::bool() { "Connection: close\r\n" } else { "" };
        let bytes = question.bytes(close);
        let answer = async {
            match tls {
                true => Client::new(secure(&load, question.host, false).await?).ask(&bytes).await,
                false => Client::new(plain(&load).await?).ask(&bytes).await,
            }
        };
        let answer = answer.await;
        load.check(kind, &question, answer);
    }
}

/// Several streams at once on one HTTP/2 connection, which must never close.
async fn http2(load: Arc<Load>, tls: Option<usize>) {
    let kind = if tls.is_some() { "h2 over TLS" } else { "h2c" };
    let connected = async {
        match tls {
            Some(host) => handshake(secure(&load, host, true).await?).await,
            None => handshake(plain(&load).await?).await,
        }
    };
    let sender = match connected.await {
        Ok(sender) => sender,
        Err(error) => return load.failed(kind, "connect", &error),
    };
    let streams = (0..4).map(|_| async {
        while load.goes_on() {
            let suffix = if fastrand::u8(..8) == 0 { "/drip" } else { "" };
            let question = load.question(tls, suffix);
            let answer = stream(sender.clone(), &question, tls.is_some()).await;
            let ended = answer.is_err();
            load.check(kind, &question, answer.map_err(io::Error::other));
            if ended {
                return;
            }
        }
    });
    futures_util::future::join_all(streams).await;
}

type Sender = h2::client::SendRequest<Bytes>;

async fn handshake<S>(io: S) -> io::Result<Sender>
where
    S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let (sender, connection) = h2::client::handshake(io).await.map_err(io::Error::other)?;
    tokio::spawn(connection);
    Ok(sender)
}

async fn stream(sender: Sender, question: &Question, tls: bool) -> Result<(u16, String), h2::Error> {
    let scheme = if tls { "https" } else { "http" };
    let uri = format!("{scheme}://{}{}", host_name(question.host), question.target);
    let posts = fastrand::u8(..3) == 0;
    let request =
        http::Request::builder().method(if posts { "POST" } else { "GET" }).uri(uri).body(()).unwrap();
    let (answer, mut upload) = sender.ready().await?.send_request(request, !posts)?;
    if posts {
        upload.send_data(Bytes::from_static(b"hello world"), true)?;
    }
    let answer = answer.await?;
    let status = answer.status().as_u16();
    let mut body = answer.into_body();
    let mut bytes = Vec::new();
    while let Some(data) = body.data().await {
        let data = data?;
        body.flow_control().release_capacity(data.len())?;
        bytes.extend_from_slice(&data);
    }
    Ok((status, String::from_utf8_lossy(&bytes).into_owned()))
}

/// A tunnel that is open the whole time, and in use.
async fn tunnel(load: Arc<Load>, number: usize) {
    // There are no upgrades to an endpoint that speaks HTTP/2.
    let question = load.question(Some(number % HTTP2_HOST), "");
    let opened = match number % 2 {
        0 => match plain(&load).await {
            Ok(stream) => talk(&load, &question, stream).await,
            Err(error) => Err(error),
        },
        _ => match secure(&load, question.host, false).await {
            Ok(stream) => talk(&load, &question, stream).await,
            Err(error) => Err(error),
        },
    };
    if let Err(error) = opened {
        load.tally.lock().unwrap().dropped.push(format!("tunnel {number}: {error}"));
    }
}

async fn talk<S>(load: &Load, question: &Question, stream: S) -> io::Result<()>
where
    S: AsyncRead + AsyncWrite + Unpin,
{
    let mut client = Client::new(stream);
    let (host, target) = (host_name(question.host), &question.target);
    let request =
        format!("GET {target} HTTP/1.1\r\nHost: {host}\r\nConnection: Upgrade\r\nUpgrade: echo\r\n\r\n");
    let (status, _) = client.ask(request.as_bytes()).await?;
    if status != 101 {
        return Err(io::Error::other(format!("status {status}")));
    }
    let pod = String::from_utf8_lossy(&client.until(b" ").await?).trim_end().to_owned();
    let answer = Ok((200, format!("{pod} {target}")));
    load.check("tunnel", question, answer);
    while !load.hang_up.load(Relaxed) {
        let message = "x".repeat(1 + fastrand::usize(..2_000));
        client.stream.write_all(message.as_bytes()).await?;
        client.stream.flush().await?;
        if client.exactly(message.len()).await? != message.as_bytes() {
            return Err(io::Error::other("another echo"));
        }
        *load.tally.lock().unwrap().good.entry("message in a tunnel").or_default() += 1;
        sleep(Duration::from_millis(50)).await;
    }
    Ok(())
}

fn start_clients(load: &Arc<Load>) -> Vec<tokio::task::JoinHandle<()>> {
    let mut tasks = Vec::new();
    tasks.extend((0..6).map(|_| tokio::spawn(keep_alive_plain(load.clone(), "keep-alive", ""))));
    tasks.extend((0..4).map(|_| tokio::spawn(keep_alive_plain(load.clone(), "slow answer", "/slow"))));
    tasks.extend((0..4).map(|_| tokio::spawn(keep_alive_plain(load.clone(), "slow body", "/drip"))));
    tasks.extend((0..3).map(|n| tokio::spawn(keep_alive_tls(load.clone(), n))));
    tasks.extend((0..2).map(|_| tokio::spawn(pipelined(load.clone()))));
    tasks.extend((0..3).map(|_| tokio::spawn(one_shot(load.clone(), false))));
    tasks.extend((0..2).map(|_| tokio::spawn(one_shot(load.clone(), true))));
    tasks.extend((0..2).map(|n| tokio::spawn(http2(load.clone(), Some(n)))));
    tasks.extend((0..2).map(|_| tokio::spawn(http2(load.clone(), None))));
    tasks
}

/// Publishes at the pace until the time is over. Returns the generations published.
async fn churn(world: &mut World, proxy: &Proxy, seconds: u64) -> Vec<Weak<Router>> {
    let mut generations = Vec::new();
    let mut pace = interval(Duration::from_secs_f64(1.0 / PUBLISHES_PER_SECOND));
    pace.set_missed_tick_behavior(MissedTickBehavior::Burst);
    let end = Instant::now() + Duration::from_secs(seconds);
    while Instant::now() < end {
        pace.tick().await;
        world.change().await;
        world.reap();
        generations.push(Arc::downgrade(&proxy.routes().load_full()));
    }
    generations
}

/// Connections to endpoints, as the proxy counts them.
fn open_upstreams(proxy: &Proxy) -> usize {
    let metrics = proxy.metrics().encode();
    let line = metrics.lines().find_map(|line| line.strip_prefix("lockgate_upstream_connections_open "));
    line.expect("there is such a metric").parse().unwrap()
}

/// Waits until all that is removed has been let go, but for what `tunnels` hold: no generation, and
/// no more than their own connections.
async fn settle(
    world: &mut World,
    proxy: &Proxy,
    generations: &[Weak<Router>],
    tunnels: usize,
) -> Result<(), String> {
    let end = Instant::now() + PATIENCE;
    loop {
        world.collect();
        world.reap();
        let newest = proxy.routes().load_full().generation();
        let others =
            generations.iter().filter_map(Weak::upgrade).filter(|g| g.generation() != newest).count();
        let held: usize = world.retired.iter().map(pod::Pod::open).sum();
        let listening = if tunnels == 0 { world.retired.len() } else { 0 };
        let remembered = if tunnels == 0 { world.remembered() } else { 0 };
        let counted = open_upstreams(proxy);
        let open = held + world.serving().map(pod::Pod::open).sum::<usize>();
        if others == 0 && listening == 0 && held <= tunnels && remembered == 0 && counted == open {
            return Ok(());
        }
        if Instant::now() > end {
            return Err(format!(
                "{others} old generations, {remembered} removed endpoints known, {held} connections to them; \
                 {counted} connections counted, {open} open"
            ));
        }
        sleep(Duration::from_millis(50)).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn publishing_under_load_harms_nobody() {
    let seconds = std::env::var("LOCKGATE_TORTURE_SECONDS").ok().and_then(|s| s.parse().ok()).unwrap_or(10);
    let config = Config { workers: 2, ..toy::config() };
    let (proxy, publisher) = Proxy::start(config).unwrap();
    let history = Arc::new(History::default());
    let mut world = World::new(proxy.live().clone(), publisher, history.clone()).await;
    let load = Arc::new(Load {
        http: proxy.http_addrs()[0],
        https: proxy.https_addrs()[0],
        history,
        stop: AtomicBool::new(false),
        hang_up: AtomicBool::new(false),
        tally: Mutex::default(),
    });
    let tunnels: Vec<_> = (0..TUNNELS).map(|n| tokio::spawn(tunnel(load.clone(), n))).collect();
    let clients = start_clients(&load);
    let generations = churn(&mut world, &proxy, seconds).await;
    load.stop.store(true, Relaxed);
    for client in clients {
        client.await.unwrap();
    }
    let settled = settle(&mut world, &proxy, &generations, TUNNELS).await;
    load.hang_up.store(true, Relaxed);
    for tunnel in tunnels {
        tunnel.await.unwrap();
    }
    let settled = [settled, settle(&mut world, &proxy, &generations, 0).await];

    let tally = std::mem::take(&mut *load.tally.lock().unwrap());
    let (publishes, requests) = (generations.len(), tally.good.values().sum::<usize>());
    println!("{publishes} publishes in {seconds} s: {:?}", world.changes);
    println!("{requests} good answers: {:#?}", tally.good);
    println!("{} endpoints came and went, {} serve", world.reaped, world.serving().count());
    let few = |all: &[String]| format!("{}: {:#?}", all.len(), &all[..all.len().min(10)]);
    assert!(tally.failed.is_empty(), "failed requests {}", few(&tally.failed));
    assert!(tally.wrong.is_empty(), "wrong backends {}", few(&tally.wrong));
    assert!(tally.dropped.is_empty(), "dropped tunnels {}", few(&tally.dropped));
    assert_eq!(tally.good["tunnel"], TUNNELS);
    assert_eq!(settled, [Ok(()), Ok(())]);
    assert!(publishes as u64 * 60 >= seconds * 1_000, "{publishes} publishes in {seconds} s");
}
