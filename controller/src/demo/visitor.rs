//! Requests through the front door, as a client would send them.

use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::sync::Arc;

use anyhow::{Context, anyhow};
use bytes::Bytes;
use http_body_util::{BodyExt, Empty};
use hyper::client::conn::http1::{SendRequest, handshake};
use hyper::header::HOST;
use hyper::{Request, StatusCode};
use hyper_util::rt::TokioIo;
use rustls::pki_types::ServerName;
use rustls::pki_types::pem::PemObject;
use rustls::{ClientConfig, RootCertStore};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;

use crate::demo::application::VERSION;

/// Connections the requests of a measurement are spread over.
const CONNECTIONS: u32 = 8;

/// Who answered.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Tally {
    pub(crate) v1: u32,
    pub(crate) v2: u32,
    /// Anything but 200 from one of the two.
    pub(crate) failed: u32,
}

/// Where to send requests to, and as what.
pub(crate) struct Visitor {
    address: SocketAddr,
    host: String,
    /// For TLS: the one certificate that is trusted.
    tls: Option<TlsConnector>,
}

impl Visitor {
    pub(crate) fn plain(address: SocketAddr, host: &str) -> Visitor {
        Visitor { address: reachable(address), host: host.to_owned(), tls: None }
    }

    /// Trusts only `certificate` (PEM).
    pub(crate) fn tls(address: SocketAddr, host: &str, certificate: &str) -> anyhow::Result<Visitor> {
        let mut roots = RootCertStore::empty();
        roots.add(rustls::pki_types::CertificateDer::from_pem_slice(certificate.as_bytes())?)?;
        let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
        let config = ClientConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()?
            .with_root_certificates(roots)
            .with_no_client_auth();
        let tls = Some(TlsConnector::from(Arc::new(config)));
        Ok(Visitor { address: reachable(address), host: host.to_owned(), tls })
    }

    /// Sends `n` requests over a few connections and counts who answers.
    pub(crate) async fn send(&self, n: u32, header: Option<(&'static str, &'static str)>) -> Tally {
        let mut tally = Tally::default();
        for connection in 0..CONNECTIONS {
            let share = n / CONNECTIONS + u32::from(connection < n % CONNECTIONS);
            if share == 0 {
                continue;
            }
            let Ok(mut sender) = self.connect().await else {
                tally.failed += share;
                continue;
            };
            for _ in 0..share {
                match self.ask(&mut sender, header).await.as_deref() {
                    Ok("v1") => tally.v1 += 1,
                    Ok("v2") => tally.v2 += 1,
                    _ => tally.failed += 1,
                }
            }
        }
        tally
    }

    async fn connect(&self) -> anyhow::Result<SendRequest<Empty<Bytes>>> {
        let stream = TcpStream::connect(self.address).await?;
        stream.set_nodelay(true)?;
        match &self.tls {
            None => open(stream).await,
            Some(tls) => {
                let name = ServerName::try_from(self.host.clone())?;
                open(tls.connect(name, stream).await.context("the TLS handshake failed")?).await
            }
        }
    }

    /// The version that answered.
    async fn ask(
        &self,
        sender: &mut SendRequest<Empty<Bytes>>,
        header: Option<(&'static str, &'static str)>,
    ) -> anyhow::Result<String> {
        let host = format!("{}:{}", self.host, self.address.port());
        let mut request = Request::get("/").header(HOST, host);
        if let Some((name, value)) = header {
            request = request.header(name, value);
        }
        sender.ready().await?;
        let response = sender.send_request(request.body(Empty::new())?).await?;
        let version =
            response.headers().get(VERSION).and_then(|value| value.to_str().ok()).map(str::to_owned);
        let status = response.status();
        response.into_body().collect().await?;
        match version {
            Some(version) if status == StatusCode::OK => Ok(version),
            _ => Err(anyhow!("answered {status}")),
        }
    }
}

async fn open(
    stream: impl AsyncRead + AsyncWrite + Send + Unpin + 'static,
) -> anyhow::Result<SendRequest<Empty<Bytes>>> {
    let (sender, connection) = handshake(TokioIo::new(stream)).await?;
    tokio::spawn(connection);
    Ok(sender)
}

/// A listener on every address is reached on loopback.
pub(crate) fn reachable(address: SocketAddr) -> SocketAddr {
    match address.ip() {
        IpAddr::V4(ip) if ip.is_unspecified() => (Ipv4Addr::LOCALHOST, address.port()).into(),
        IpAddr::V6(ip) if ip.is_unspecified() => (std::net::Ipv6Addr::LOCALHOST, address.port()).into(),
        _ => address,
    }
}
