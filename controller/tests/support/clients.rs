//! Requests through the front door with clients that are not ours.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use http_body_util::{BodyExt, Full};
use hyper::body::Incoming;
use hyper::client::conn::{http1, http2};
use hyper::header::{HOST, HeaderMap};
use hyper::{Request, Response};
use hyper_util::rt::{TokioExecutor, TokioIo};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, ServerName};
use rustls::{ClientConfig, RootCertStore};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;

/// What no test should ever wait for in vain.
pub const PATIENCE: Duration = Duration::from_secs(30);

/// The protocol of a client.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Version {
    Http1,
    /// By prior knowledge in the clear, by ALPN over TLS.
    Http2,
}

/// A response that was read to its end.
#[derive(Debug)]
pub struct Answer {
    pub status: u16,
    pub headers: HeaderMap,
    pub body: String,
    pub trailers: Option<HeaderMap>,
}

impl Answer {
    pub fn header(&self, name: &str) -> Option<&str> {
        self.headers.get(name)?.to_str().ok()
    }
}

/// What a client asks for.
#[derive(Clone, Debug, Default)]
pub struct Question {
    pub host: String,
    pub path: String,
    pub headers: Vec<(&'static str, &'static str)>,
    /// POST when there is one.
    pub body: Option<Bytes>,
}

impl Question {
    pub fn new(host: &str, path: &str) -> Question {
        Question { host: host.to_owned(), path: path.to_owned(), ..Question::default() }
    }

    pub fn with(mut self, name: &'static str, value: &'static str) -> Question {
        self.headers.push((name, value));
        self
    }

    pub fn posting(mut self, body: Bytes) -> Question {
        self.body = Some(body);
        self
    }

    fn request(&self, version: Version, scheme: &str) -> Request<Full<Bytes>> {
        let method = if self.body.is_some() { "POST" } else { "GET" };
        let mut request = Request::builder().method(method);
        request = match version {
            Version::Http1 => request.uri(&self.path).header(HOST, &self.host),
            Version::Http2 => request.uri(format!("{scheme}://{}{}", self.host, self.path)),
        };
        for (name, value) in &self.headers {
            request = request.header(*name, *value);
        }
        request.body(Full::new(self.body.clone().unwrap_or_default())).expect("a valid request")
    }
}

/// An open connection.
pub struct Connection {
    sender: Sender,
    scheme: &'static str,
}

enum Sender {
    Http1(http1::SendRequest<Full<Bytes>>),
    Http2(http2::SendRequest<Full<Bytes>>),
}

impl Connection {
    /// In the clear.
    pub async fn plain(address: SocketAddr, version: Version) -> Result<Connection, String> {
        soon(async { Connection::over(tcp(address).await?, version, "http").await }).await
    }

    /// Over TLS, if one of the certificates that `tls` trusts is shown for `name`.
    pub async fn tls(
        address: SocketAddr,
        name: &str,
        tls: &Trust,
        version: Version,
    ) -> Result<Connection, String> {
        soon(async {
            let connector = TlsConnector::from(match version {
                Version::Http1 => tls.http1.clone(),
                Version::Http2 => tls.http2.clone(),
            });
            let name = ServerName::try_from(name.to_owned()).map_err(|error| error.to_string())?;
            let stream = connector.connect(name, tcp(address).await?).await;
            let stream = stream.map_err(|error| format!("TLS handshake: {error}"))?;
            let h2 = stream.get_ref().1.alpn_protocol() == Some(b"h2");
            if h2 != (version == Version::Http2) {
                return Err(format!("{version:?} was not agreed upon"));
            }
            Connection::over(stream, version, "https").await
        })
        .await
    }

    async fn over(
        stream: impl AsyncRead + AsyncWrite + Send + Unpin + 'static,
        version: Version,
        scheme: &'static str,
    ) -> Result<Connection, String> {
        let stream = TokioIo::new(stream);
        let sender = match version {
            Version::Http1 => {
                let (sender, connection) = http1::handshake(stream).await.map_err(|e| format!("{e:?}"))?;
                tokio::spawn(connection);
                Sender::Http1(sender)
            }
            Version::Http2 => {
                let shaken = http2::handshake(TokioExecutor::new(), stream).await;
                let (sender, connection) = shaken.map_err(|e| format!("{e:?}"))?;
                tokio::spawn(connection);
                Sender::Http2(sender)
            }
        };
        Ok(Connection { sender, scheme })
    }

    /// Sends one request and reads its answer.
    pub async fn ask(&mut self, question: &Question) -> Result<Answer, String> {
        soon(async {
            let response = match &mut self.sender {
                Sender::Http1(sender) => {
                    sender.ready().await.map_err(|e| format!("{e:?}"))?;
                    sender.send_request(question.request(Version::Http1, self.scheme)).await
                }
                Sender::Http2(sender) => {
                    sender.ready().await.map_err(|e| format!("{e:?}"))?;
                    sender.send_request(question.request(Version::Http2, self.scheme)).await
                }
            };
            whole(response.map_err(|e| format!("{e:?}"))?).await
        })
        .await
    }

    /// The same HTTP/2 connection for another stream.
    pub fn share(&self) -> Option<Connection> {
        match &self.sender {
            Sender::Http1(_) => None,
            Sender::Http2(sender) => {
                Some(Connection { sender: Sender::Http2(sender.clone()), scheme: self.scheme })
            }
        }
    }

    /// Whether another request may be sent.
    pub async fn is_open(&mut self) -> bool {
        match &mut self.sender {
            Sender::Http1(sender) => sender.ready().await.is_ok(),
            Sender::Http2(sender) => sender.ready().await.is_ok(),
        }
    }
}

async fn whole(response: Response<Incoming>) -> Result<Answer, String> {
    let (head, body) = response.into_parts();
    let body = body.collect().await.map_err(|e| format!("{e:?}"))?;
    let trailers = body.trailers().cloned();
    let body = String::from_utf8_lossy(&body.to_bytes()).into_owned();
    Ok(Answer { status: head.status.as_u16(), headers: head.headers, body, trailers })
}

async fn tcp(address: SocketAddr) -> Result<TcpStream, String> {
    let stream = TcpStream::connect(address).await.map_err(|error| format!("connect: {error}"))?;
    stream.set_nodelay(true).map_err(|error| error.to_string())?;
    Ok(stream)
}

async fn soon<T>(work: impl Future<Output = Result<T, String>>) -> Result<T, String> {
    tokio::time::timeout(PATIENCE, work).await.unwrap_or_else(|_| Err("no answer in time".to_owned()))
}

/// The certificates a client trusts, and no others.
#[derive(Clone)]
pub struct Trust {
    http1: Arc<ClientConfig>,
    http2: Arc<ClientConfig>,
}

impl Trust {
    /// Trusts these certificates (PEM).
    pub fn only<'a>(certificates: impl IntoIterator<Item = &'a str>) -> Trust {
        let mut roots = RootCertStore::empty();
        for certificate in certificates {
            let certificate = CertificateDer::from_pem_slice(certificate.as_bytes()).expect("PEM");
            roots.add(certificate).expect("a certificate");
        }
        let config = |protocol: &[u8]| {
            let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
            let config = ClientConfig::builder_with_provider(provider)
                .with_safe_default_protocol_versions()
                .expect("TLS 1.2 and 1.3")
                .with_root_certificates(roots.clone());
            let mut config = config.with_no_client_auth();
            config.alpn_protocols = vec![protocol.to_vec()];
            // Every connection is to show its certificate.
            config.resumption = rustls::client::Resumption::disabled();
            Arc::new(config)
        };
        Trust { http1: config(b"http/1.1"), http2: config(b"h2") }
    }
}
