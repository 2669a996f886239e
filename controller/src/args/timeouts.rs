//! Flags about deadlines.

use clap::Args;
use lockgate_proxy::config::Timeouts;

use super::Span;

/// Deadlines.
#[derive(Debug, Args)]
#[command(next_help_heading = "Timeouts")]
pub struct TimeoutArgs {
    /// From the first byte of a request to the end of its headers: 408
    #[arg(long, value_name = "DURATION", default_value = "15s", env = "LOCKGATE_HEADER_TIMEOUT")]
    pub header_timeout: Span,
    /// An idle client connection between two requests is closed
    #[arg(long, value_name = "DURATION", default_value = "75s", env = "LOCKGATE_KEEP_ALIVE_TIMEOUT")]
    pub keep_alive_timeout: Span,
    /// Between two reads of a request body, and two writes to a client
    #[arg(long, value_name = "DURATION", default_value = "60s", env = "LOCKGATE_CLIENT_TIMEOUT")]
    pub client_timeout: Span,
    /// A TLS handshake with a client
    #[arg(long, value_name = "DURATION", default_value = "10s", env = "LOCKGATE_HANDSHAKE_TIMEOUT")]
    pub handshake_timeout: Span,
    /// Connecting to an endpoint: the next one is tried, then 504
    #[arg(long, value_name = "DURATION", default_value = "5s", env = "LOCKGATE_PROXY_CONNECT_TIMEOUT")]
    pub proxy_connect_timeout: Span,
    /// Between two writes to an endpoint: 504
    #[arg(long, value_name = "DURATION", default_value = "60s", env = "LOCKGATE_PROXY_SEND_TIMEOUT")]
    pub proxy_send_timeout: Span,
    /// Between two reads from an endpoint: 504
    #[arg(long, value_name = "DURATION", default_value = "60s", env = "LOCKGATE_PROXY_READ_TIMEOUT")]
    pub proxy_read_timeout: Span,
    /// An idle connection to an endpoint is closed
    #[arg(long, value_name = "DURATION", default_value = "60s", env = "LOCKGATE_IDLE_UPSTREAM_TIMEOUT")]
    pub idle_upstream_timeout: Span,
    /// A relayed TCP connection or UDP session on which nobody speaks is closed
    #[arg(long, value_name = "DURATION", default_value = "10m", env = "LOCKGATE_PROXY_STREAM_TIMEOUT")]
    pub proxy_stream_timeout: Span,
    /// A WebSocket or other tunnel on which nobody speaks is closed
    #[arg(long, value_name = "DURATION", default_value = "1h", env = "LOCKGATE_TUNNEL_TIMEOUT")]
    pub tunnel_timeout: Span,
}

impl TimeoutArgs {
    /// What the proxy needs to know.
    pub(super) fn timeouts(&self) -> Timeouts {
        Timeouts {
            header: self.header_timeout.0,
            keep_alive: self.keep_alive_timeout.0,
            client: self.client_timeout.0,
            handshake: self.handshake_timeout.0,
            connect: self.proxy_connect_timeout.0,
            send: self.proxy_send_timeout.0,
            read: self.proxy_read_timeout.0,
            idle_upstream: self.idle_upstream_timeout.0,
            tunnel: self.tunnel_timeout.0,
        }
    }
}
