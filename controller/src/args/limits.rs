//! Flags about sizes and counts.

use clap::Args;
use lockgate_proxy::config::Limits;

use super::Size;

/// Sizes and counts.
#[derive(Debug, Args)]
#[command(next_help_heading = "Limits")]
pub struct LimitArgs {
    /// Largest request body, answered 413 beyond; 0 is no limit. Ingresses may set their own
    #[arg(long, value_name = "SIZE", default_value = "0", env = "LOCKGATE_MAX_BODY_SIZE")]
    pub max_body_size: Size,
    /// Largest request line and headers together, answered 431 beyond
    #[arg(long, value_name = "SIZE", default_value = "32KiB", env = "LOCKGATE_MAX_HEADER_SIZE")]
    pub max_header_size: Size,
    /// Most header fields of a request, answered 431 beyond; at most 128
    #[arg(long, value_name = "N", default_value_t = 100, env = "LOCKGATE_MAX_HEADERS", value_parser = clap::value_parser!(u16).range(1..=128))]
    pub max_headers: u16,
    /// Longest request target (path and query), answered 414 beyond
    #[arg(long, value_name = "SIZE", default_value = "8KiB", env = "LOCKGATE_MAX_URI_SIZE")]
    pub max_uri_size: Size,
    /// Most client connections per worker; further ones wait
    #[arg(long, value_name = "N", default_value_t = 16_384, env = "LOCKGATE_MAX_CONNECTIONS", value_parser = clap::value_parser!(u32).range(1..))]
    pub max_connections: u32,
    /// Most connections of one client address (IPv6: /64) over all workers, further ones are closed;
    /// 0 is no limit
    #[arg(long, value_name = "N", default_value_t = 0, env = "LOCKGATE_MAX_CONNECTIONS_PER_ADDRESS", value_parser = clap::value_parser!(u32).range(..=65_535))]
    pub max_connections_per_address: u32,
    /// Answer to a client beyond an Ingress's limit-rps or limit-rpm
    #[arg(long, value_name = "STATUS", default_value_t = 503, env = "LOCKGATE_LIMIT_REQ_STATUS_CODE", value_parser = clap::value_parser!(u16).range(400..=599))]
    pub limit_req_status_code: u16,
    /// Answer to a client beyond an Ingress's limit-connections
    #[arg(long, value_name = "STATUS", default_value_t = 503, env = "LOCKGATE_LIMIT_CONN_STATUS_CODE", value_parser = clap::value_parser!(u16).range(400..=599))]
    pub limit_conn_status_code: u16,
    /// Most concurrent streams of one HTTP/2 connection
    #[arg(long, value_name = "N", default_value_t = 128, env = "LOCKGATE_MAX_STREAMS", value_parser = clap::value_parser!(u32).range(1..))]
    pub max_streams: u32,
    /// Streams an HTTP/2 client may reset; hung up on beyond, if they are most of its streams
    #[arg(long, value_name = "N", default_value_t = 500, env = "LOCKGATE_MAX_STREAM_RESETS")]
    pub max_stream_resets: u32,
    /// Frames without content (PING, SETTINGS, ...) an HTTP/2 client may send for nothing; hung up on beyond
    #[arg(long, value_name = "N", default_value_t = 1_000, env = "LOCKGATE_MAX_CONTROL_FRAMES", value_parser = clap::value_parser!(u32).range(16..))]
    pub max_control_frames: u32,
    /// Most endpoints tried for one request
    #[arg(long, alias = "proxy-next-upstream-tries", value_name = "N", default_value_t = 3, env = "LOCKGATE_MAX_TRIES", value_parser = clap::value_parser!(u32).range(1..=16))]
    pub max_tries: u32,
    /// Most clients of one UDP port and worker at a time; the one silent longest makes room
    #[arg(long, value_name = "N", default_value_t = 4096, env = "LOCKGATE_MAX_UDP_FLOWS", value_parser = clap::value_parser!(u32).range(1..))]
    pub max_udp_flows: u32,
    /// Datagrams a UDP client expects in answer to each of its own: with them its session is over.
    /// 0: nobody knows, and a session ends when it is idle
    #[arg(long, value_name = "N", default_value_t = 1, env = "LOCKGATE_PROXY_STREAM_RESPONSES")]
    pub proxy_stream_responses: u32,
    /// Most idle connections kept per endpoint and worker
    #[arg(long, value_name = "N", default_value_t = 256, env = "LOCKGATE_MAX_IDLE_UPSTREAM")]
    pub max_idle_upstream: usize,
}

impl LimitArgs {
    /// What the proxy needs to know.
    pub(super) fn limits(&self) -> Limits {
        Limits {
            header_bytes: self.max_header_size.0 as usize,
            headers: self.max_headers.into(),
            target_bytes: self.max_uri_size.0 as usize,
            body_bytes: Some(self.max_body_size.0).filter(|size| *size > 0),
            connections: self.max_connections as usize,
            connections_per_address: Some(self.max_connections_per_address).filter(|most| *most > 0),
            rate_status: self.limit_req_status_code,
            requests_status: self.limit_conn_status_code,
            idle_upstream: self.max_idle_upstream,
            tries: self.max_tries,
            h2_streams: self.max_streams,
            h2_resets: self.max_stream_resets,
            h2_control_frames: self.max_control_frames,
            ..Limits::default()
        }
    }
}
