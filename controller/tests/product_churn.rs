//! The whole product under edits: while a folder changes all the time, clients
//! of every kind ask hosts whose right answers stay the same. Nothing fails,
//! nothing goes astray, no tunnel ends.
//!
//! `LOCKGATE_TORTURE_SECONDS` says for how long (8), `LOCKGATE_TORTURE_SEED` which edits.
#![allow(clippy::unwrap_used)] // a test fails by panicking

mod support {
    #![allow(dead_code, unreachable_pub, reason = "every test file uses its own part of this")]
    pub mod clients;
    pub mod edits;
    pub mod gate;
    pub mod manifests;
    pub mod toys;
}

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use bytes::Bytes;
use futures_util::{SinkExt, StreamExt};
use support::clients::{Answer, Connection, PATIENCE, Question, Trust, Version};
use support::edits::{ENDPOINTS, Edits, SERVICES};
use support::gate::Gate;
use support::manifests::Identity;
use support::toys::{self, Speaks};
use tempfile::TempDir;
use tokio::net::TcpStream;
use tokio::sync::watch;
use tokio::time::{Instant, timeout};
use tokio_tungstenite::tungstenite::Message;
use tokio_tungstenite::{WebSocketStream, client_async};

/// 1,200 edits a minute, of which more than 1,000 change what is served.
const EVERY: Duration = Duration::from_millis(50);

/// A client's rest between two requests, so that the machine is busy but not
/// full: on a full one the edits would merge.
const REST: Duration = Duration::from_millis(5);

/// Further failures are only counted.
const FAILURES_TOLD: usize = 20;

/// What happened, by kind of client.
#[derive(Default)]
struct Counts {
    done: BTreeMap<&'static str, usize>,
    connections: BTreeMap<&'static str, usize>,
    failed: usize,
    wrong: usize,
    dropped: usize,
    told: Vec<String>,
}

/// Where the clients go, and until when.
#[derive(Clone)]
struct Load {
    http: SocketAddr,
    https: SocketAddr,
    trust: Trust,
    counts: Arc<Mutex<Counts>>,
    stop: watch::Receiver<bool>,
}

/// A question and the names that may answer it.
type Known = (Question, &'static [&'static str]);

fn known() -> Vec<Known> {
    let ask = Question::new;
    vec![
        (ask("keep.example", "/"), &["keep"]),
        (ask("order.example", "/"), &["c"]),
        (ask("order.example", "/a"), &["a"]),
        (ask("order.example", "/a/b/c?d"), &["b"]),
        (ask("order.example", "/a/exact"), &["c"]),
        (ask("canary.example", "/"), &["main", "canary"]),
        (ask("canary.example", "/").with("x-canary", "always"), &["canary"]),
        (ask("canary.example", "/").with("x-canary", "never"), &["main"]),
        (ask("torn-1.example", "/"), &["torn"]),
        (ask("torn-2.example", "/x"), &["torn"]),
        (ask("broken.example", "/"), &["keep"]),
        (ask("keep.example", "/upload").posting(Bytes::from(vec![b'x'; 3000])), &["keep"]),
        // It may be there or not.
        (ask("flap-0.example", "/"), &["keep", "404"]),
        (ask("flap-1.example", "/"), &["keep", "404"]),
    ]
}

fn known_over_tls() -> Vec<Known> {
    vec![(Question::new("tls.example", "/"), &["tls"]), (Question::new("tls.example", "/a/x"), &["a"])]
}

impl Load {
    fn stopped(&self) -> bool {
        *self.stop.borrow()
    }

    fn failed(&self, who: &str, why: impl std::fmt::Display) {
        let mut counts = self.counts.lock().unwrap();
        counts.failed += 1;
        if counts.told.len() < FAILURES_TOLD {
            counts.told.push(format!("{who}: {why}"));
        }
    }

    fn judge(&self, who: &'static str, (question, right): &Known, answer: Result<Answer, String>) -> bool {
        let at = format!("{}{}", question.host, question.path);
        let answer = match answer {
            Ok(answer) => answer,
            Err(error) => {
                self.failed(who, format_args!("{at}: {error}"));
                return false;
            }
        };
        let by = match answer.status {
            200 => answer.header("x-served-by").unwrap_or(&answer.body).to_owned(),
            status => status.to_string(),
        };
        if right.contains(&by.as_str()) {
            *self.counts.lock().unwrap().done.entry(who).or_default() += 1;
        } else if answer.status == 200 {
            self.counts.lock().unwrap().wrong += 1;
            self.failed(who, format_args!("{at}: by {by} instead of {right:?}"));
        } else {
            self.failed(who, format_args!("{at}: {} {}", answer.status, answer.body));
        }
        true
    }

    async fn connect(&self, who: &'static str, tls: bool, version: Version) -> Option<Connection> {
        let connection = match tls {
            true => Connection::tls(self.https, "tls.example", &self.trust, version).await,
            false => Connection::plain(self.http, version).await,
        };
        *self.counts.lock().unwrap().connections.entry(who).or_default() += 1;
        connection.map_err(|error| self.failed(who, error)).ok()
    }

    /// One connection after the other, each for `per_connection` requests.
    async fn ask(self, who: &'static str, tls: bool, version: Version, per_connection: usize) {
        let known = if tls { known_over_tls() } else { known() };
        let mut turn = 0;
        while !self.stopped() {
            let Some(mut connection) = self.connect(who, tls, version).await else { continue };
            for _ in 0..per_connection {
                turn += 1;
                let known = &known[turn % known.len()];
                if !self.judge(who, known, connection.ask(&known.0).await) || self.stopped() {
                    break;
                }
                tokio::time::sleep(REST).await;
            }
        }
    }

    /// Four streams at a time on one connection that lasts.
    async fn streams(self, who: &'static str, tls: bool) {
        let mut known = if tls { known_over_tls() } else { known() };
        if !tls {
            let call = Question::new("grpc.example", "/shop.Cart/Get")
                .with("content-type", "application/grpc")
                .with("te", "trailers");
            known.push((call.posting(Bytes::from_static(b"\0\0\0\0\x02hi")), &["grpc"]));
        }
        let mut turn = 0;
        while !self.stopped() {
            let Some(connection) = self.connect(who, tls, Version::Http2).await else { continue };
            let mut whole = true;
            while whole && !self.stopped() {
                let four = (0..4).map(|_| {
                    turn += 1;
                    let known = known[turn % known.len()].clone();
                    let mut stream = connection.share().unwrap();
                    async move {
                        let answer = stream.ask(&known.0).await;
                        (known, answer)
                    }
                });
                for (known, answer) in futures_util::future::join_all(four).await {
                    whole &= self.judge(who, &known, answer);
                }
                tokio::time::sleep(REST).await;
            }
        }
    }

    async fn tunnel(&self) -> Result<WebSocketStream<TcpStream>, String> {
        let opening = async {
            let stream = TcpStream::connect(self.http).await.map_err(|error| error.to_string())?;
            stream.set_nodelay(true).map_err(|error| error.to_string())?;
            client_async("ws://ws.example/talk", stream).await.map_err(|error| error.to_string())
        };
        let (tunnel, _) = timeout(PATIENCE, opening).await.map_err(|_| "no tunnel in time")??;
        Ok(tunnel)
    }

    /// Tunnels one after the other, each for so many messages.
    async fn converse(self, who: &'static str, messages: usize) {
        while !self.stopped() {
            *self.counts.lock().unwrap().connections.entry(who).or_default() += 1;
            let mut tunnel = match self.tunnel().await {
                Ok(tunnel) => tunnel,
                Err(error) => {
                    self.failed(who, error);
                    continue;
                }
            };
            for number in 0..messages {
                let sent = tunnel.send(Message::text(number.to_string())).await;
                let heard = timeout(PATIENCE, tunnel.next()).await;
                match (sent, heard) {
                    (Ok(()), Ok(Some(Ok(Message::Text(text))))) if *text == *format!("ws {number}") => {
                        *self.counts.lock().unwrap().done.entry(who).or_default() += 1;
                    }
                    (Ok(()), Ok(Some(Ok(Message::Text(text))))) => {
                        self.counts.lock().unwrap().wrong += 1;
                        self.failed(who, format_args!("message {number} came back as {text}"));
                    }
                    other => {
                        self.counts.lock().unwrap().dropped += 1;
                        self.failed(who, format_args!("the tunnel ended at message {number}: {other:?}"));
                        break;
                    }
                }
                if self.stopped() {
                    break;
                }
                tokio::time::sleep(REST).await;
            }
            let _ = timeout(PATIENCE, tunnel.close(None)).await;
        }
    }

    fn start(&self) -> Vec<tokio::task::JoinHandle<()>> {
        use Version::{Http1, Http2};
        let client = || self.clone();
        let mut tasks = vec![
            tokio::spawn(client().ask("keep-alive", false, Http1, usize::MAX)),
            tokio::spawn(client().ask("keep-alive", false, Http1, usize::MAX)),
            tokio::spawn(client().ask("connection per request", false, Http1, 1)),
            tokio::spawn(client().ask("connection per request", false, Http1, 1)),
            tokio::spawn(client().ask("TLS keep-alive", true, Http1, usize::MAX)),
            tokio::spawn(client().ask("TLS connection per request", true, Http1, 1)),
            tokio::spawn(client().ask("TLS h2 connection per request", true, Http2, 1)),
            tokio::spawn(client().streams("h2", false)),
            tokio::spawn(client().streams("TLS h2", true)),
            tokio::spawn(client().converse("WebSocket, 20 messages", 20)),
        ];
        for _ in 0..4 {
            tasks.push(tokio::spawn(client().converse("WebSocket throughout", usize::MAX)));
        }
        tasks
    }
}

fn number(variable: &str, default: u64) -> u64 {
    match std::env::var(variable) {
        Ok(value) => value.parse().unwrap_or_else(|_| panic!("{variable}={value} is not a number")),
        Err(_) => default,
    }
}

#[test]
fn no_edit_fails_a_request() {
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
    runtime.block_on(torture());
}

async fn torture() {
    let (seconds, seed) = (number("LOCKGATE_TORTURE_SECONDS", 8), number("LOCKGATE_TORTURE_SEED", 7));
    let folder = TempDir::new().unwrap();
    let mut endpoints = BTreeMap::new();
    for (name, h2) in SERVICES {
        let speaks = if h2 { Speaks::H2c } else { Speaks::Http1 };
        let mut addresses = Vec::new();
        for _ in 0..ENDPOINTS {
            addresses.push(toys::start(name, speaks).await);
        }
        endpoints.insert(name, addresses);
    }
    let identities: Vec<_> = (0..4).map(|_| Identity::new(&["tls.example"])).collect();
    let trust = Trust::only(identities.iter().map(|identity| identity.certificate.as_str()));
    let mut edits = Edits::new(folder.path(), seed, endpoints, identities.clone());
    let mut gate = Gate::open(folder.path(), &[]);
    let (stop, stopped) = watch::channel(false);
    let counts = Arc::new(Mutex::new(Counts::default()));
    let load = Load { http: gate.http, https: gate.https, trust, counts: counts.clone(), stop: stopped };
    let tasks = load.start();

    let end = Instant::now() + Duration::from_secs(seconds);
    let mut edits = tokio::task::spawn_blocking(move || {
        edits.run(EVERY, end);
        edits
    })
    .await
    .unwrap();
    edits.mark("marker.example");
    gate.until(|seen| seen.hosts.iter().any(|host| host == "marker.example")).await;
    stop.send_replace(true);
    for task in tasks {
        task.await.unwrap();
    }

    let generations = gate.seen.borrow().generation;
    let counts = std::mem::take(&mut *counts.lock().unwrap());
    println!(
        "edits        {} in {seconds} s, seed {seed}: {:?}",
        edits.made.values().sum::<usize>(),
        edits.made
    );
    println!("generations  {generations}");
    println!("requests     {}: {:?}", counts.done.values().sum::<usize>(), counts.done);
    println!("connections  {:?}", counts.connections);
    println!(
        "failed       {}, by a wrong backend {}, tunnels dropped {}",
        counts.failed, counts.wrong, counts.dropped
    );
    assert_eq!((counts.failed, counts.wrong, counts.dropped), (0, 0, 0), "{:#?}", counts.told);
    // A connection that is meant to last did.
    for (who, n) in
        [("keep-alive", 2), ("TLS keep-alive", 1), ("h2", 1), ("TLS h2", 1), ("WebSocket throughout", 4)]
    {
        assert_eq!(counts.connections[who], n, "{who}");
    }
    let kinds = ["connection per request", "TLS connection per request", "WebSocket, 20 messages"];
    for who in kinds {
        assert!(counts.done[who] > 0, "{who}");
    }
    the_last_edits_are_live(&gate, &edits).await;
    for path in ["/debug/routes", "/metrics"] {
        let (status, text) = lockgate_controller::admin::get(gate.admin, path).await.unwrap();
        assert_eq!(status, 200, "{path}");
        for identity in &identities {
            identity.assert_is_secret_in(&text, path);
        }
    }
    assert!(gate.close(), "connections had to be cut");
}

async fn the_last_edits_are_live(gate: &Gate, edits: &Edits) {
    let mut connection = Connection::plain(gate.http, Version::Http1).await.unwrap();
    for (which, there) in edits.flaps().into_iter().enumerate() {
        let answer = connection.ask(&Question::new(&format!("flap-{which}.example"), "/")).await.unwrap();
        assert_eq!(answer.status, if there { 200 } else { 404 }, "flap-{which}.example");
    }
    let answer = connection.ask(&Question::new("marker.example", "/")).await.unwrap();
    assert_eq!((answer.status, answer.body.as_str()), (200, "keep"));
}
