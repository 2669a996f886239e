//! What stands at the front of a connection, before HTTP or TLS: a PROXY
//! header, where listeners expect one.

use std::net::SocketAddr;

use tokio::net::TcpStream;

use crate::buffer::Buffer;
use crate::config::ProxyProtocol;
use crate::proxy_protocol::{self, Origin, Parsed};
use crate::worker::Worker;

/// A connection as it is before a byte of it is understood.
pub(crate) struct Opening {
    pub(crate) tcp: TcpStream,
    /// Who opened it: the peer, or whom a trusted peer names.
    pub(crate) source: SocketAddr,
    /// What they connected to.
    pub(crate) destination: SocketAddr,
    /// Read already and not yet used.
    pub(crate) input: Buffer,
}

/// Room for the longest ClientHello, divided into records as clients like to.
/// A PROXY header is shorter.
const MOST_READ: usize = 32 << 10;

impl Opening {
    /// Reads the header, and takes its word if the peer is trusted. False: the
    /// connection is to be closed.
    pub(crate) async fn take_proxy_header(&mut self, worker: &Worker, expected: &ProxyProtocol) -> bool {
        let peer = self.source;
        match tokio::time::timeout(expected.header_timeout, self.read_header()).await {
            Ok(Ok(origin)) => {
                let trusted =
                    expected.trusted.iter().any(|network| network.contains(&peer.ip().to_canonical()));
                if let (true, Origin::Proxied { source, destination }) = (trusted, origin) {
                    (self.source, self.destination) = (source, destination);
                }
                return true;
            }
            // Load balancers probe a port by opening and closing it.
            Ok(Err(None)) => {}
            Ok(Err(Some(error))) => tracing::debug!(%peer, %error, "connection closed"),
            Err(_) => tracing::debug!(%peer, "connection closed: the PROXY header took too long"),
        }
        worker.metrics.proxy_headers_refused.inc();
        false
    }

    /// An error of `None`: the peer is gone.
    async fn read_header(&mut self) -> Result<Origin, Option<proxy_protocol::Error>> {
        loop {
            if let Parsed::Header { length, origin } = proxy_protocol::parse(self.input.filled())? {
                self.input.consume(length);
                self.input.release();
                return Ok(origin);
            }
            self.read().await.ok_or(None)?;
        }
    }

    /// Reads more. `None`: there is no more, or no room for it.
    pub(crate) async fn read(&mut self) -> Option<()> {
        let Opening { tcp, input, .. } = self;
        loop {
            tcp.readable().await.ok()?;
            input.acquire();
            if !input.make_room(MOST_READ) {
                return None;
            }
            match tcp.try_read(input.room()) {
                Ok(0) => return None,
                Ok(n) => {
                    input.advance(n);
                    return Some(());
                }
                Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => input.release(),
                Err(_) => return None,
            }
        }
    }
}
