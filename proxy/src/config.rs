//! What stays fixed for the life of the process.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use ipnet::{IpNet, Ipv4Net, Ipv6Net};

use crate::access_log::AccessLogConfig;
use crate::endpoint::Ejection;
use crate::resilience::{Breaker, Outliers, Retry};
use crate::tls::TlsOptions;

/// How the proxy runs. Routes are not here: they are published while it runs.
#[derive(Clone, Debug)]
pub struct Config {
    /// Plaintext listeners. Port 0 takes a free one, the same for every worker.
    pub http: Vec<SocketAddr>,
    /// TLS listeners.
    pub https: Vec<SocketAddr>,
    /// Worker threads, each with its own sockets, pools and buffers.
    pub workers: usize,
    /// Sizes and counts.
    pub limits: Limits,
    /// Versions and protocols offered over TLS.
    pub tls: TlsOptions,
    /// Deadlines.
    pub timeouts: Timeouts,
    /// Peers whose `X-Forwarded-*` are believed. Empty: nobody's.
    pub trusted: Vec<IpNet>,
    /// Every connection begins with a PROXY header; `None`: none does.
    pub proxy_protocol: Option<ProxyProtocol>,
    /// Where access logs go; `None`: nowhere.
    pub access_log: Option<AccessLogConfig>,
    /// How a stop proceeds.
    pub drain: Drain,
    /// When an endpoint that keeps failing is left alone for a while.
    pub ejection: Ejection,
    /// What is tried again, and how much of it.
    pub retry: Retry,
    /// What one endpoint has to do at most. Rules may have their own.
    pub breaker: Breaker,
    /// When an endpoint that answers badly is left alone for a while.
    pub outliers: Outliers,
    /// How TCP and UDP ports are relayed.
    pub l4: L4Options,
    /// Where this process runs (`topology.kubernetes.io/zone` of its node).
    /// `None`: no zone is preferred.
    pub zone: Option<Arc<str>>,
}

impl Default for Config {
    fn default() -> Config {
        Config {
            http: Vec::new(),
            https: Vec::new(),
            workers: std::thread::available_parallelism().map_or(1, |n| n.get()),
            limits: Limits::default(),
            tls: TlsOptions::default(),
            timeouts: Timeouts::default(),
            trusted: Vec::new(),
            proxy_protocol: None,
            access_log: None,
            drain: Drain::default(),
            ejection: Ejection::default(),
            retry: Retry::default(),
            breaker: Breaker::default(),
            outliers: Outliers::default(),
            l4: L4Options::default(),
            zone: None,
        }
    }
}

/// How connections tell whom they were opened for, as with nginx's
/// `listen ... proxy_protocol`: the header is due from everybody, and a
/// connection without one is closed. It is believed only from `trusted`; for
/// all others it is read and passed over, and their own address holds.
#[derive(Clone, Debug)]
pub struct ProxyProtocol {
    /// Peers whose header is believed.
    pub trusted: Vec<IpNet>,
    /// Until the header is complete: closed without a word.
    pub header_timeout: Duration,
}

impl ProxyProtocol {
    /// Believes every header, and waits 5 s for it, as ingress-nginx does.
    pub fn from_anyone() -> ProxyProtocol {
        let anywhere = [IpNet::from(Ipv4Net::default()), IpNet::from(Ipv6Net::default())];
        ProxyProtocol { trusted: anywhere.into(), header_timeout: Duration::from_secs(5) }
    }
}

/// Sizes and counts, each with the answer a client gets beyond it.
#[derive(Clone, Debug)]
pub struct Limits {
    /// Request line and headers together, in bytes: 431.
    pub header_bytes: usize,
    /// Header fields: 431. At most [`MAX_HEADERS`].
    pub headers: usize,
    /// Request target in bytes: 414.
    pub target_bytes: usize,
    /// Request body in bytes: 413. `None`: no limit.
    pub body_bytes: Option<u64>,
    /// Client connections per worker; beyond it new ones wait in the kernel's queue.
    pub connections: usize,
    /// Connections of one client address over all workers; an IPv6 client is
    /// a /64. Further ones are closed at once. `None`: no limit.
    pub connections_per_address: Option<u32>,
    /// The answer to a client beyond [`crate::table::ClientLimits::rates`].
    pub rate_status: u16,
    /// The answer to a client beyond [`crate::table::ClientLimits::requests`].
    pub requests_status: u16,
    /// Idle connections kept per endpoint and worker.
    pub idle_upstream: usize,
    /// Endpoints tried for one request.
    pub tries: u32,
    /// Interim (1xx) responses of endpoints that are passed on for one request; with the next one: 502.
    /// Each of them renews the deadline for the answer.
    pub interim_responses: u32,
    /// Concurrent streams a client may open on one HTTP/2 connection.
    pub h2_streams: u32,
    /// Streams an HTTP/2 client may reset; beyond it, and if they are more than
    /// half of its streams, its connection is closed.
    pub h2_resets: u32,
    /// Frames an HTTP/2 client may send that carry nothing (PING, SETTINGS,
    /// PRIORITY, WINDOW_UPDATE and the like) and that neither requests, nor
    /// responses, nor time make up for; beyond it its connection is closed.
    pub h2_control_frames: u32,
}

/// The most header fields a message may have, whatever [`Limits::headers`] says.
pub const MAX_HEADERS: usize = 128;

impl Default for Limits {
    fn default() -> Limits {
        Limits {
            header_bytes: 32 << 10,
            headers: 100,
            target_bytes: 8 << 10,
            body_bytes: None,
            connections: 16_384,
            connections_per_address: None,
            rate_status: 503,
            requests_status: 503,
            idle_upstream: 256,
            tries: 3,
            interim_responses: 64,
            h2_streams: 128,
            h2_resets: 500,
            h2_control_frames: 1_000,
        }
    }
}

/// Deadlines. None is infinite.
#[derive(Clone, Debug)]
pub struct Timeouts {
    /// From the first byte of a request to the end of its headers: 408.
    pub header: Duration,
    /// An idle client connection between two requests: closed without a word.
    pub keep_alive: Duration,
    /// Between two reads of a request body, and between two writes to a client.
    pub client: Duration,
    /// Until a TLS handshake with a client is complete.
    pub handshake: Duration,
    /// Until a connection to an endpoint is established, TLS included: next endpoint, then 504.
    pub connect: Duration,
    /// Between two writes to an endpoint: 504.
    pub send: Duration,
    /// Between two reads from an endpoint: 504.
    pub read: Duration,
    /// An idle pooled connection to an endpoint.
    pub idle_upstream: Duration,
    /// A tunnel (WebSocket) on which neither side speaks.
    pub tunnel: Duration,
}

impl Default for Timeouts {
    fn default() -> Timeouts {
        Timeouts {
            header: Duration::from_secs(15),
            keep_alive: Duration::from_secs(75),
            client: Duration::from_secs(60),
            handshake: Duration::from_secs(10),
            connect: Duration::from_secs(5),
            send: Duration::from_secs(60),
            read: Duration::from_secs(60),
            idle_upstream: Duration::from_secs(60),
            tunnel: Duration::from_secs(3600),
        }
    }
}

/// How a stop proceeds: not ready at once, listeners close after `grace`,
/// connections finish until `deadline` has passed after that.
#[derive(Clone, Debug)]
pub struct Drain {
    /// New connections are still accepted this long, while load balancers
    /// notice the failing readiness probe.
    pub grace: Duration,
    /// What has not finished by then is cut.
    pub deadline: Duration,
}

impl Default for Drain {
    fn default() -> Drain {
        Drain { grace: Duration::from_secs(5), deadline: Duration::from_secs(240) }
    }
}

/// Limits and deadlines of L4 listeners, where a listener sets none itself. Connecting to an endpoint is
/// bounded by [`Timeouts::connect`] and [`Limits::tries`].
#[derive(Clone, Debug)]
pub struct L4Options {
    /// A connection or flow on which neither side speaks ends after this long.
    pub idle: Duration,
    /// For listeners that take PROXY headers, while [`Config::proxy_protocol`] is `None`.
    pub proxy_protocol: ProxyProtocol,
    /// Flows of one UDP listener and worker, each with a socket of its own. When there is no room, the one
    /// that has been silent longest ends.
    pub udp_flows: usize,
    /// Datagrams expected in response to each one of a client: a flow that has them is kept only for
    /// [`L4Options::udp_linger`]. 0: nobody knows, so every flow is kept until it is idle.
    pub udp_responses: u32,
    /// How long a flow that has all expected responses waits for more, from either side.
    pub udp_linger: Duration,
}

impl Default for L4Options {
    fn default() -> L4Options {
        L4Options {
            idle: Duration::from_secs(600),
            proxy_protocol: ProxyProtocol::from_anyone(),
            udp_flows: 4_096,
            udp_responses: 1,
            udp_linger: Duration::from_secs(2),
        }
    }
}
