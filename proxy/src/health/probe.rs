//! One probe of one endpoint.

use std::net::SocketAddr;

use rustls_pki_types::ServerName;
use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _};
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;

use crate::endpoint::LiveEndpoint;
use crate::http::head::end_of_head;
use crate::table::{Probe, UpstreamProtocol};
use crate::tls;

const AGENT: &str = concat!("lockgate-health/", env!("CARGO_PKG_VERSION"));

/// Status line and perhaps interim responses; more is not read.
const ANSWER_BYTES: usize = 4 << 10;

/// What probes share.
pub(super) struct Prober {
    http1_tls: TlsConnector,
    h2_tls: TlsConnector,
}

impl Prober {
    pub(super) fn new() -> Prober {
        Prober {
            http1_tls: TlsConnector::from(tls::client_config(false)),
            h2_tls: TlsConnector::from(tls::client_config(true)),
        }
    }

    /// Asks. The caller bounds the time. An error says what is wrong.
    pub(super) async fn probe(&self, live: &LiveEndpoint, probe: &Probe) -> Result<(), String> {
        let tcp = TcpStream::connect(live.address).await.map_err(|error| error.to_string())?;
        let Probe::Http { path, host } = probe else { return Ok(()) };
        let address = live.address.to_string();
        let host = host.as_deref().unwrap_or(&address);
        let status = match live.protocol {
            UpstreamProtocol::Http1 | UpstreamProtocol::Tcp | UpstreamProtocol::Udp => {
                http1(tcp, path, host).await
            }
            UpstreamProtocol::Https => {
                http1(secure(&self.http1_tls, tcp, live.address).await?, path, host).await
            }
            UpstreamProtocol::H2c => http2(tcp, "http", path, host).await,
            UpstreamProtocol::H2 => {
                http2(secure(&self.h2_tls, tcp, live.address).await?, "https", path, host).await
            }
        }?;
        match status {
            200..400 => Ok(()),
            _ => Err(format!("status {status}")),
        }
    }
}

async fn secure(
    connector: &TlsConnector,
    tcp: TcpStream,
    address: SocketAddr,
) -> Result<tokio_rustls::client::TlsStream<TcpStream>, String> {
    let name = ServerName::IpAddress(address.ip().into());
    connector.connect(name, tcp).await.map_err(|error| error.to_string())
}

async fn http1(
    mut stream: impl AsyncRead + AsyncWrite + Unpin,
    path: &str,
    host: &str,
) -> Result<u16, String> {
    let request =
        format!("GET {path} HTTP/1.1\r\nHost: {host}\r\nUser-Agent: {AGENT}\r\nConnection: close\r\n\r\n");
    stream.write_all(request.as_bytes()).await.map_err(|error| error.to_string())?;
    stream.flush().await.map_err(|error| error.to_string())?;
    let mut answer = Vec::with_capacity(512);
    loop {
        if let Some(status) = final_status(&answer)? {
            return Ok(status);
        }
        if answer.len() >= ANSWER_BYTES {
            return Err("no status line".to_owned());
        }
        match stream.read_buf(&mut answer).await {
            Ok(0) => return Err("hung up without an answer".to_owned()),
            Ok(_) => {}
            Err(error) => return Err(error.to_string()),
        }
    }
}

/// The status of the first response that is not interim, if that much is here.
fn final_status(mut answer: &[u8]) -> Result<Option<u16>, String> {
    loop {
        let Some(line) = answer.get(..12) else { return Ok(None) };
        let digits = line.strip_prefix(b"HTTP/1.").and_then(|rest| rest.get(2..5));
        let status = digits.and_then(|digits| std::str::from_utf8(digits).ok()?.parse().ok());
        match status {
            Some(100..200) => {}
            Some(status) => return Ok(Some(status)),
            None => return Err("not HTTP/1".to_owned()),
        }
        let Some(end) = end_of_head(answer) else { return Ok(None) };
        answer = &answer[end + 4..];
    }
}

async fn http2(
    stream: impl AsyncRead + AsyncWrite + Unpin + 'static,
    scheme: &str,
    path: &str,
    host: &str,
) -> Result<u16, String> {
    let words = |error: h2::Error| error.to_string();
    let (send, connection) = h2::client::handshake(stream).await.map_err(words)?;
    let uri = http::Uri::builder().scheme(scheme).authority(host).path_and_query(path).build();
    let uri = uri.map_err(|error| error.to_string())?;
    let request = http::Request::get(uri).header("user-agent", AGENT).body(());
    let request = request.map_err(|error| error.to_string())?;
    let asked = async {
        let (answer, _) = send.ready().await.map_err(words)?.send_request(request, true).map_err(words)?;
        Ok(answer.await.map_err(words)?.status().as_u16())
    };
    // The connection moves while the answer is awaited, and goes with it.
    tokio::select! {
        status = asked => status,
        ended = connection => Err(ended.err().map_or_else(|| "hung up without an answer".to_owned(), words)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn statuses() {
        let cases = [
            ("", Ok(None)),
            ("HTTP/1.1 20", Ok(None)),
            ("HTTP/1.1 200", Ok(Some(200))),
            ("HTTP/1.0 503 Away\r\n", Ok(Some(503))),
            ("HTTP/1.1 100 Continue\r\n", Ok(None)),
            ("HTTP/1.1 103 Early\r\nA: b\r\n\r\nHTTP/1.1 204 No", Ok(Some(204))),
            ("SSH-2.0-OpenSSH\r\n", Err(())),
            ("HTTP/1.1 abc def", Err(())),
            ("HTTP/2.0 200 OK", Err(())),
        ];
        for (answer, expected) in cases {
            assert_eq!(final_status(answer.as_bytes()).map_err(|_| ()), expected, "{answer:?}");
        }
    }
}
