//! A product that is upgraded, and clients that do not forgive.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::{Arc, Mutex};

use bytes::Bytes;
use futures_util::{SinkExt, StreamExt};
use http_body_util::{BodyExt, Full};
use hyper::Request;
use hyper::client::conn::{http1, http2};
use hyper_util::rt::{TokioExecutor, TokioIo};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, ServerName};
use rustls::{ClientConfig, HandshakeKind, RootCertStore};
use tempfile::TempDir;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::sync::watch;
use tokio::task::JoinSet;
use tokio::time::timeout;
use tokio_rustls::TlsConnector;
use tokio_tungstenite::tungstenite::Message;
use tokio_tungstenite::{WebSocketStream, client_async};

use super::binary::Binary;
use super::clients::PATIENCE;
use super::manifests::{Identity, secret, service, slices};
use super::toys::{self, Held, Speaks};

/// Further failures are only counted.
const FAILURES_TOLD: usize = 20;

/// A folder with two applications, and where upgrades are arranged.
pub struct Place {
    pub folder: TempDir,
    pub socket: PathBuf,
    pub identity: Identity,
    pub held: Arc<Held>,
    manifests: TempDir,
}

impl Place {
    pub async fn new() -> Place {
        let (folder, manifests) = (TempDir::new().unwrap(), TempDir::new().unwrap());
        let identity = Identity::new(&["web.example"]);
        let (web, held) = toys::start_holding("web", Speaks::Http1).await;
        let rule =
            "paths: [{path: /, pathType: Prefix, backend: {service: {name: web, port: {number: 80}}}}]";
        let ingress = format!(
            "---\n{{apiVersion: networking.k8s.io/v1, kind: Ingress, metadata: {{namespace: shop, name: web, \
             annotations: {{nginx.ingress.kubernetes.io/ssl-redirect: \"false\"}}}},\n \
             spec: {{tls: [{{hosts: [web.example], secretName: web}}], \
             rules: [{{host: web.example, http: {{{rule}}}}}]}}}}\n"
        );
        let objects = [
            ingress,
            service("shop", "web", &[("", 80)]),
            slices("shop", "web", "", &[web]),
            secret("shop", "web", &identity),
        ];
        std::fs::write(manifests.path().join("web.yaml"), objects.concat()).unwrap();
        let socket = folder.path().join("upgrade.sock");
        Place { folder, socket, identity, held, manifests }
    }

    pub fn flags(&self, workers: usize) -> Vec<String> {
        let mut flags = vec!["ingress".to_owned()];
        let mut flag = |name: &str, value: &str| flags.extend([format!("--{name}"), value.to_owned()]);
        flag("manifests", self.manifests.path().to_str().unwrap());
        flag("workers", &workers.to_string());
        for name in ["http-addr", "https-addr", "admin-addr"] {
            flag(name, "127.0.0.1:0");
        }
        flag("shutdown-grace-period", "0s");
        flag("drain-timeout", "20s");
        flag("upgrade-socket", self.socket.to_str().unwrap());
        flags
    }

    /// Returns when it serves; the one before it then drains.
    pub fn start(&self, workers: usize) -> Binary {
        self.start_logging(workers, "info")
    }

    pub fn start_logging(&self, workers: usize, log: &str) -> Binary {
        tokio::task::block_in_place(|| Binary::run(&self.flags(workers), log))
    }

    fn client(&self, protocol: &[u8]) -> ClientConfig {
        let mut roots = RootCertStore::empty();
        roots.add(CertificateDer::from_pem_slice(self.identity.certificate.as_bytes()).unwrap()).unwrap();
        let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
        let config = ClientConfig::builder_with_provider(provider).with_safe_default_protocol_versions();
        let mut config = config.unwrap().with_root_certificates(roots).with_no_client_auth();
        config.alpn_protocols = vec![protocol.to_vec()];
        config
    }
}

/// A client that keeps its tickets.
pub struct Resuming(TlsConnector);

impl Resuming {
    pub fn new(place: &Place) -> Resuming {
        Resuming(TlsConnector::from(Arc::new(place.client(b"http/1.1"))))
    }

    /// True when it resumed.
    pub async fn connects(&mut self, address: SocketAddr) -> bool {
        let tcp = TcpStream::connect(address).await.unwrap();
        let name = ServerName::try_from("web.example").unwrap();
        let mut tls = self.0.connect(name, tcp).await.unwrap();
        // Tickets come with the first answer.
        tls.write_all(b"GET / HTTP/1.1\r\nHost: web.example\r\nConnection: close\r\n\r\n").await.unwrap();
        let mut answer = Vec::new();
        tls.read_to_end(&mut answer).await.unwrap();
        assert!(answer.starts_with(b"HTTP/1.1 200"), "{}", String::from_utf8_lossy(&answer));
        tls.get_ref().1.handshake_kind() == Some(HandshakeKind::Resumed)
    }
}

/// An open WebSocket.
pub struct Tunnel {
    stream: WebSocketStream<TcpStream>,
    number: usize,
}

/// Opens many.
pub async fn tunnels(binary: &Binary, count: usize) -> Vec<Tunnel> {
    let mut open = Vec::new();
    for _ in 0..count {
        let tcp = TcpStream::connect(binary.http).await.unwrap();
        let (stream, _) = client_async("ws://web.example/talk", tcp).await.unwrap();
        open.push(Tunnel { stream, number: 0 });
    }
    open
}

impl Tunnel {
    /// A message goes there and comes back.
    pub async fn speaks(&mut self) {
        self.number += 1;
        self.stream.send(Message::text(self.number.to_string())).await.unwrap();
        let heard = timeout(PATIENCE, self.stream.next()).await.unwrap();
        assert_eq!(heard.unwrap().unwrap(), Message::text(format!("web {}", self.number)));
    }

    pub async fn close(mut self) {
        self.stream.close(None).await.unwrap();
    }
}

#[derive(Default)]
struct Counts {
    failed: usize,
    told: Vec<String>,
}

/// Clients that ask without a pause and never ask twice.
#[derive(Clone)]
struct Asker {
    http: SocketAddr,
    https: SocketAddr,
    http1: TlsConnector,
    http2: TlsConnector,
    counts: Arc<Mutex<Counts>>,
    answers: Arc<watch::Sender<usize>>,
    stop: watch::Receiver<bool>,
}

/// Running clients.
pub struct Load {
    asker: Asker,
    stop: watch::Sender<bool>,
    clients: JoinSet<()>,
}

impl Load {
    pub fn start(place: &Place, binary: &Binary) -> Load {
        let (stop, stopped) = watch::channel(false);
        let tls = |protocol| TlsConnector::from(Arc::new(place.client(protocol)));
        let asker = Asker {
            http: binary.http,
            https: binary.https,
            http1: tls(b"http/1.1"),
            http2: tls(b"h2"),
            counts: Arc::default(),
            answers: Arc::new(watch::Sender::new(0)),
            stop: stopped,
        };
        let mut clients = JoinSet::new();
        for secure in [false, true] {
            for requests in [usize::MAX, usize::MAX, 1] {
                clients.spawn(asker.clone().http1(secure, requests));
            }
            for requests in [usize::MAX, 1] {
                clients.spawn(asker.clone().http2(secure, requests));
            }
        }
        Load { asker, stop, clients }
    }

    /// Returns when so many more requests were answered.
    pub async fn has_answers(&self, more: usize) {
        let mut answers = self.asker.answers.subscribe();
        let enough = *answers.borrow() + more;
        timeout(PATIENCE, answers.wait_for(|answers| *answers >= enough)).await.unwrap().unwrap();
    }

    /// Ends it: nothing may have failed.
    pub async fn stop(mut self) {
        self.stop.send_replace(true);
        while let Some(client) = self.clients.join_next().await {
            client.unwrap();
        }
        let counts = self.asker.counts.lock().unwrap();
        println!("{} answers, {} failed", *self.asker.answers.borrow(), counts.failed);
        assert_eq!(counts.failed, 0, "{:#?}", counts.told);
    }
}

trait Stream: AsyncRead + AsyncWrite + Unpin + Send {}
impl<T: AsyncRead + AsyncWrite + Unpin + Send> Stream for T {}

fn request(uri: &str) -> Request<Full<Bytes>> {
    Request::get(uri).header("host", "web.example").body(Full::default()).unwrap()
}

impl Asker {
    fn stopped(&self) -> bool {
        *self.stop.borrow()
    }

    fn done(&self, answer: Result<(), String>, who: &str) -> bool {
        match answer {
            Ok(()) => self.answers.send_modify(|answers| *answers += 1),
            Err(why) => {
                let mut counts = self.counts.lock().unwrap();
                counts.failed += 1;
                if counts.told.len() < FAILURES_TOLD {
                    counts.told.push(format!("{who}: {why}"));
                }
                return false;
            }
        }
        true
    }

    async fn connect(&self, secure: bool, tls: &TlsConnector) -> Result<Box<dyn Stream>, String> {
        let address = if secure { self.https } else { self.http };
        let tcp = TcpStream::connect(address).await.map_err(|error| format!("connect: {error}"))?;
        tcp.set_nodelay(true).unwrap();
        if !secure {
            return Ok(Box::new(tcp));
        }
        let name = ServerName::try_from("web.example").unwrap();
        let stream = tls.connect(name, tcp).await.map_err(|error| format!("handshake: {error}"))?;
        Ok(Box::new(stream))
    }

    /// Uses a connection until it is told not to, as wrk does.
    async fn http1(self, secure: bool, requests: usize) {
        let who = format!("HTTP/1.1 secure {secure} x {requests}");
        while !self.stopped() {
            let stream = match timeout(PATIENCE, self.connect(secure, &self.http1)).await.unwrap() {
                Ok(stream) => stream,
                Err(why) => {
                    self.done(Err(why), &who);
                    continue;
                }
            };
            let (mut sender, connection) = http1::handshake(TokioIo::new(stream)).await.unwrap();
            tokio::spawn(connection);
            for _ in 0..requests {
                let asking = async {
                    sender.ready().await.map_err(|error| format!("not ready: {error:?}"))?;
                    let response = sender.send_request(request("/")).await.map_err(|e| format!("{e:?}"))?;
                    let close = response.headers().get("connection").is_some_and(|value| value == "close");
                    let status = response.status();
                    let body = response.into_body().collect().await.map_err(|e| format!("{e:?}"))?;
                    match (status.as_u16(), &*body.to_bytes()) {
                        (200, b"web") => Ok(close),
                        (status, body) => Err(format!("{status} {}", String::from_utf8_lossy(body))),
                    }
                };
                let answer = timeout(PATIENCE, asking).await.unwrap_or_else(|_| Err("late".to_owned()));
                let last = !matches!(answer, Ok(false));
                self.done(answer.map(drop), &who);
                if last || self.stopped() {
                    break;
                }
            }
        }
    }

    /// Streams one after the other; a connection that is going away is replaced,
    /// a request that was never sent is sent on the next.
    async fn http2(self, secure: bool, requests: usize) {
        let who = format!("HTTP/2 secure {secure} x {requests}");
        while !self.stopped() {
            let stream = match timeout(PATIENCE, self.connect(secure, &self.http2)).await.unwrap() {
                Ok(stream) => stream,
                Err(why) => {
                    self.done(Err(why), &who);
                    continue;
                }
            };
            let shaken = http2::handshake(TokioExecutor::new(), TokioIo::new(stream)).await;
            let (mut sender, connection) = shaken.unwrap();
            tokio::spawn(connection);
            for _ in 0..requests {
                if sender.ready().await.is_err() {
                    break;
                }
                let asking = async {
                    let uri = if secure { "https://web.example/" } else { "http://web.example/" };
                    let response = match sender.try_send_request(request(uri)).await {
                        Ok(response) => response,
                        Err(mut error) => match error.take_message() {
                            Some(_) => return Ok(false),
                            None => return Err(format!("{:?}", error.into_error())),
                        },
                    };
                    let status = response.status();
                    let body = response.into_body().collect().await.map_err(|e| format!("{e:?}"))?;
                    match (status.as_u16(), &*body.to_bytes()) {
                        (200, b"web") => Ok(true),
                        (status, body) => Err(format!("{status} {}", String::from_utf8_lossy(body))),
                    }
                };
                let answer = timeout(PATIENCE, asking).await.unwrap_or_else(|_| Err("late".to_owned()));
                match answer {
                    Ok(false) => break,
                    answer => {
                        if !self.done(answer.map(drop), &who) {
                            break;
                        }
                    }
                }
                if self.stopped() {
                    break;
                }
            }
        }
    }
}
