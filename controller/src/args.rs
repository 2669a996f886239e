//! Every flag and environment variable.

use std::ffi::OsString;
use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;

use clap::{Args, CommandFactory, FromArgMatches, Parser, Subcommand, ValueEnum};
use ipnet::IpNet;

use crate::source::FolderOptions;
use crate::store::Key;
use crate::translate::{HeaderOptions, Options, StreamOptions};
use lockgate_proxy::access_log::{AccessLogConfig, Destination, Format};
use lockgate_proxy::config::{Config, Drain, L4Options, ProxyProtocol};
use lockgate_proxy::table::Balance;

mod explain;
mod limits;
mod node;
mod resilience;
mod timeouts;
mod values;

pub use explain::ExplainArgs;
pub use limits::LimitArgs;
pub use node::{NodeArgs, NodeSettings, ViewArgs};
pub use resilience::ResilienceArgs;
pub use timeouts::TimeoutArgs;
pub use values::{Size, Span};

use values::{parse_balance, parse_header_name, parse_key, parse_network};

const EXAMPLES: &str = "\
Examples:
  lockgate demo                              see it all work on this machine
  lockgate check ./manifests                 what would Lockgate do with these files?
  lockgate ingress --manifests ./manifests   serve them, and follow every edit
  lockgate explain shop.example/cart --manifests ./manifests
                                             which rule serves this URL, and why?

'lockgate COMMAND --help' explains a command's flags. Every flag can also be set by the
environment variable beside it.";

const INGRESS_EXAMPLES: &str = "\
Examples:
  lockgate ingress --manifests ./manifests
      HTTP on port 8080, HTTPS on 8443, metrics and health on 127.0.0.1:10254.
  lockgate ingress --manifests ./manifests --http-addr '[::]:80' --https-addr '[::]:443'
      The usual ports, IPv6 and IPv4. Ports below 1024 need root or CAP_NET_BIND_SERVICE.
  lockgate ingress --manifests ./manifests --trusted-proxies 10.0.0.0/8
      Behind a load balancer in 10.0.0.0/8 that sets X-Forwarded-For.
  lockgate ingress --manifests ./manifests --use-proxy-protocol --proxy-real-ip-cidr 10.0.0.0/8
      Behind one that speaks the PROXY protocol.

Durations are a number and a unit: 250ms, 30s, 5m, 1h. Sizes: 8192, 64KiB, 32MiB, 1GiB.
SIGTERM and SIGINT drain: readiness fails at once, listeners close after the grace period,
requests finish until the drain timeout. A second signal ends at once. SIGUSR1 and SIGHUP
reopen the access log's file, after it was rotated.

To upgrade without failing a request, start the new binary with the same --upgrade-socket:
it takes over the listening sockets, and the old process drains and ends.";

const CHECK_EXAMPLES: &str = "\
Examples:
  lockgate check ingress.yaml service.yaml
  lockgate check ./manifests --strict           in CI: a warning fails, too
  kubectl get ingress,service -A -o yaml | lockgate check -
  lockgate check ./manifests --output json | jq '.routes[].host'

Exit status: 0 nothing is refused, 1 something is refused (or, with --strict, differs from
what was written), 2 something cannot be read.";

const DEMO_EXAMPLES: &str = "\
Examples:
  lockgate demo           move the canary 5 -> 25 -> 50 -> 100 %, then keep serving until Ctrl-C
  lockgate demo --once    the same, then end; a failed request or a wrong split is an error";

/// The gate between clients and the Pods of a Kubernetes cluster.
#[derive(Debug, Parser)]
#[command(name = "lockgate", version, max_term_width = 100, after_help = EXAMPLES)]
#[command(arg_required_else_help = true, disable_help_subcommand = true)]
pub struct Cli {
    /// What to do.
    #[command(subcommand)]
    pub command: Command,
}

impl Cli {
    /// Reads the command line; ends the process with a message if it makes no sense.
    pub fn read() -> Cli {
        Cli::parse_line(std::env::args_os()).unwrap_or_else(|error| error.exit())
    }

    /// Reads `line`, which begins with the program's name.
    ///
    /// # Errors
    /// It makes no sense, or asks for help.
    pub fn parse_line(
        line: impl IntoIterator<Item = impl Into<OsString> + Clone>,
    ) -> Result<Cli, clap::Error> {
        // Help names each variable; its value now is not what one asks help for.
        let hidden = |command: clap::Command| command.mut_args(|arg| arg.hide_env_values(true));
        let command = Cli::command().mut_subcommand("node", node::with_ignored).mut_subcommands(hidden);
        let matches = command.try_get_matches_from(line)?;
        let mut cli = Cli::from_arg_matches(&matches)?;
        if let (Command::Node(args), Some(matches)) = (&mut cli.command, matches.subcommand_matches("node")) {
            args.ignored = node::ignored(matches);
        }
        Ok(cli)
    }
}

/// The subcommands.
#[derive(Debug, Subcommand)]
#[allow(clippy::large_enum_variant)] // one exists, once
pub enum Command {
    /// Show it all on this machine: two toy applications, a TLS host, a canary. No cluster needed
    #[command(after_help = DEMO_EXAMPLES)]
    Demo(DemoArgs),
    /// Serve a folder of manifests: HTTP/1.1, HTTP/2, gRPC and WebSocket, plain and over TLS
    #[command(after_help = INGRESS_EXAMPLES)]
    Ingress(IngressArgs),
    /// Make the Services of a folder of manifests work on this node, as kube-proxy does
    #[command(after_help = node::EXAMPLES)]
    Node(NodeArgs),
    /// Say what manifests will do here: accepted, differs, refused; and the routes that result
    #[command(after_help = CHECK_EXAMPLES)]
    Check(CheckArgs),
    /// Say which rule serves a request, or what a client of a Service gets, and why
    #[command(after_help = explain::EXAMPLES)]
    Explain(ExplainArgs),
}

/// Which objects count.
#[derive(Debug, Args)]
pub struct ObjectArgs {
    /// Serve only the Ingresses of this class. Without it every Ingress of the folder is served
    #[arg(long, value_name = "NAME", env = "LOCKGATE_INGRESS_CLASS")]
    pub ingress_class: Option<String>,
    /// The Secret to show clients that ask for a host without a certificate of its own.
    /// Without it they see a self-signed one
    #[arg(long, value_name = "NAMESPACE/NAME", env = "LOCKGATE_DEFAULT_SSL_CERTIFICATE", value_parser = parse_key)]
    pub default_ssl_certificate: Option<Key>,
    /// The ConfigMap of TCP ports to relay as they are, each as "9000": "namespace/service:port",
    /// and :PROXY behind it (to read the header of clients) or :PROXY:PROXY (to write one, too)
    #[arg(long, value_name = "NAMESPACE/NAME", env = "LOCKGATE_TCP_SERVICES_CONFIGMAP", value_parser = parse_key)]
    pub tcp_services_configmap: Option<Key>,
    /// The same for UDP
    #[arg(long, value_name = "NAMESPACE/NAME", env = "LOCKGATE_UDP_SERVICES_CONFIGMAP", value_parser = parse_key)]
    pub udp_services_configmap: Option<Key>,
    /// The ConfigMap of headers that endpoints get with every request. They replace the client's; an
    /// empty value takes a header away
    #[arg(long, value_name = "NAMESPACE/NAME", env = "LOCKGATE_PROXY_SET_HEADERS", value_parser = parse_key)]
    pub proxy_set_headers: Option<Key>,
    /// The ConfigMap of headers that clients get with every response. They replace the endpoint's
    #[arg(long, value_name = "NAMESPACE/NAME", env = "LOCKGATE_ADD_HEADERS", value_parser = parse_key)]
    pub add_headers: Option<Key>,
    /// The response headers that Ingresses may set by the annotation custom-headers. None unless given
    #[arg(long, value_name = "NAME,...", value_delimiter = ',', value_parser = parse_header_name)]
    #[arg(env = "LOCKGATE_GLOBAL_ALLOWED_RESPONSE_HEADERS")]
    pub global_allowed_response_headers: Vec<String>,
    /// How endpoints are chosen where no Ingress says otherwise: round_robin, ewma or least_request
    #[arg(long, value_name = "NAME", default_value = "round_robin", env = "LOCKGATE_LOAD_BALANCE", value_parser = parse_balance)]
    pub load_balance: Balance,
    /// Larger files are refused
    #[arg(long, value_name = "SIZE", default_value = "32MiB", env = "LOCKGATE_MAX_FILE_SIZE")]
    pub max_file_size: Size,
    /// Further files are refused
    #[arg(long, value_name = "N", default_value_t = 100_000, env = "LOCKGATE_MAX_FILES")]
    pub max_files: usize,
}

impl ObjectArgs {
    /// What the translator needs to know.
    pub fn options(&self) -> Options {
        Options {
            ingress_class: self.ingress_class.clone(),
            default_certificate: self.default_ssl_certificate.clone(),
            streams: StreamOptions {
                tcp_services: self.tcp_services_configmap.clone(),
                udp_services: self.udp_services_configmap.clone(),
                ..StreamOptions::default()
            },
            headers: HeaderOptions {
                proxy_set_headers: self.proxy_set_headers.clone(),
                add_headers: self.add_headers.clone(),
                allowed_response_headers: self.global_allowed_response_headers.clone(),
            },
            load_balance: self.load_balance,
            ..Options::default()
        }
    }

    /// How files are read.
    pub fn folder(&self) -> FolderOptions {
        FolderOptions {
            file_size_max: self.max_file_size.0,
            files_max: self.max_files,
            ..FolderOptions::default()
        }
    }
}

/// `lockgate ingress`
#[derive(Debug, Args)]
pub struct IngressArgs {
    /// The folder: every .yaml, .yml and .json below it is read, and every edit followed
    #[arg(long, value_name = "DIR", env = "LOCKGATE_MANIFESTS")]
    pub manifests: PathBuf,
    /// Where to serve HTTP; may be repeated
    #[arg(long, value_name = "ADDR:PORT", default_value = "0.0.0.0:8080", value_delimiter = ',')]
    #[arg(env = "LOCKGATE_HTTP_ADDR")]
    pub http_addr: Vec<SocketAddr>,
    /// Where to serve HTTPS; may be repeated
    #[arg(long, value_name = "ADDR:PORT", default_value = "0.0.0.0:8443", value_delimiter = ',')]
    #[arg(env = "LOCKGATE_HTTPS_ADDR")]
    pub https_addr: Vec<SocketAddr>,
    /// Where the ports of --tcp-services-configmap and --udp-services-configmap are opened; may be
    /// repeated. On a host with several addresses name them, or answers over UDP may come from another one
    #[arg(long, value_name = "ADDR", default_value = "0.0.0.0", value_delimiter = ',')]
    #[arg(env = "LOCKGATE_STREAM_ADDR")]
    pub stream_addr: Vec<IpAddr>,
    /// Where to serve /metrics, /livez, /readyz and /debug. Not for the public: it shows every route
    #[arg(long, value_name = "ADDR:PORT", default_value = "127.0.0.1:10254", env = "LOCKGATE_ADMIN_ADDR")]
    pub admin_addr: SocketAddr,
    /// Worker threads; one per core unless given
    #[arg(long, value_name = "N", env = "LOCKGATE_WORKERS", value_parser = clap::value_parser!(u16).range(1..=1024))]
    pub workers: Option<u16>,
    /// Networks whose X-Forwarded-* headers are believed. Nobody's are unless given
    #[arg(long, value_name = "CIDR,...", value_delimiter = ',', env = "LOCKGATE_TRUSTED_PROXIES", value_parser = parse_network)]
    pub trusted_proxies: Vec<IpNet>,
    #[allow(missing_docs)]
    #[command(flatten)]
    pub accept: AcceptArgs,
    /// One line per request on standard output, or none
    #[arg(long, value_name = "FORMAT", default_value = "off", env = "LOCKGATE_ACCESS_LOG")]
    pub access_log: AccessLog,
    /// Write the access log to this file instead
    #[arg(long, value_name = "FILE", env = "LOCKGATE_ACCESS_LOG_FILE")]
    pub access_log_file: Option<PathBuf>,
    /// The zone this runs in (topology.kubernetes.io/zone of its node). Services with
    /// trafficDistribution are then served from this zone, as far as its endpoints can carry it
    #[arg(long, value_name = "ZONE", env = "LOCKGATE_ZONE")]
    pub zone: Option<String>,
    #[allow(missing_docs)]
    #[command(flatten)]
    pub objects: ObjectArgs,
    /// A change is taken up when nothing has changed for this long (after 1s in any case)
    #[arg(long, value_name = "DURATION", default_value = "100ms", env = "LOCKGATE_DEBOUNCE")]
    pub debounce: Span,
    #[allow(missing_docs)]
    #[command(flatten)]
    pub stop: StopArgs,
    #[allow(missing_docs)]
    #[command(flatten)]
    pub limits: LimitArgs,
    #[allow(missing_docs)]
    #[command(flatten)]
    pub timeouts: TimeoutArgs,
    #[allow(missing_docs)]
    #[command(flatten)]
    pub resilience: ResilienceArgs,
}

/// What connections begin with. The names are those of ingress-nginx's ConfigMap and flags.
#[derive(Debug, Args)]
pub struct AcceptArgs {
    /// Every connection to the HTTP and HTTPS addresses begins with a PROXY header, version 1 or 2;
    /// one without is closed
    #[arg(long, env = "LOCKGATE_USE_PROXY_PROTOCOL", requires = "proxy_real_ip_cidr")]
    pub use_proxy_protocol: bool,
    /// Networks of the load balancers whose PROXY headers are believed; those of others are read and
    /// passed over. 0.0.0.0/0,::/0 believes everybody, as ingress-nginx does unless told otherwise
    #[arg(long, value_name = "CIDR,...", value_delimiter = ',', env = "LOCKGATE_PROXY_REAL_IP_CIDR", value_parser = parse_network)]
    pub proxy_real_ip_cidr: Vec<IpNet>,
    /// Until the PROXY header is complete
    #[arg(
        long,
        value_name = "DURATION",
        default_value = "5s",
        env = "LOCKGATE_PROXY_PROTOCOL_HEADER_TIMEOUT"
    )]
    pub proxy_protocol_header_timeout: Span,
    /// Not needed: the annotation ssl-passthrough is enough. Accepted because ingress-nginx needs it
    #[arg(long, env = "LOCKGATE_ENABLE_SSL_PASSTHROUGH")]
    pub enable_ssl_passthrough: bool,
}

impl AcceptArgs {
    fn proxy_protocol(&self) -> Option<ProxyProtocol> {
        self.use_proxy_protocol.then(|| ProxyProtocol {
            trusted: self.proxy_real_ip_cidr.clone(),
            header_timeout: self.proxy_protocol_header_timeout.0,
        })
    }
}

/// How a stop proceeds.
#[derive(Debug, Args)]
#[command(next_help_heading = "Stopping")]
pub struct StopArgs {
    /// After SIGTERM, accept connections this long while load balancers notice that /readyz fails
    #[arg(long, value_name = "DURATION", default_value = "5s", env = "LOCKGATE_SHUTDOWN_GRACE_PERIOD")]
    pub shutdown_grace_period: Span,
    /// After that, let requests and tunnels finish this long
    #[arg(long, value_name = "DURATION", default_value = "240s", env = "LOCKGATE_DRAIN_TIMEOUT")]
    pub drain_timeout: Span,
    /// Upgrade through this UNIX socket: a new process with the same path takes over the
    /// listening sockets of the one that runs, which then drains and ends
    #[arg(long, value_name = "PATH", env = "LOCKGATE_UPGRADE_SOCKET")]
    pub upgrade_socket: Option<PathBuf>,
    /// After a new process took over, let requests, streams and tunnels finish this long
    #[arg(long, value_name = "DURATION", default_value = "1h", env = "LOCKGATE_UPGRADE_DRAIN_TIMEOUT")]
    pub upgrade_drain_timeout: Span,
}

impl IngressArgs {
    /// What the proxy needs to know.
    pub fn config(&self) -> Config {
        let defaults = Config::default();
        Config {
            http: self.http_addr.clone(),
            https: self.https_addr.clone(),
            workers: self.workers.map_or(defaults.workers, usize::from),
            limits: self.limits.limits(),
            timeouts: self.timeouts.timeouts(),
            trusted: self.trusted_proxies.clone(),
            proxy_protocol: self.accept.proxy_protocol(),
            access_log: self.access_log(),
            l4: L4Options {
                idle: self.timeouts.proxy_stream_timeout.0,
                udp_flows: self.limits.max_udp_flows as usize,
                udp_responses: self.limits.proxy_stream_responses,
                ..defaults.l4
            },
            zone: self.zone.as_deref().filter(|zone| !zone.is_empty()).map(Into::into),
            drain: Drain { grace: self.stop.shutdown_grace_period.0, deadline: self.stop.drain_timeout.0 },
            retry: self.resilience.retry(),
            breaker: self.resilience.breaker(),
            outliers: self.resilience.outliers(),
            ..defaults
        }
    }

    /// What the translator needs to know.
    pub fn options(&self) -> Options {
        let addresses = self.http_addr.iter().chain(&self.https_addr).chain([&self.admin_addr]);
        let mut options = self.objects.options();
        options.streams.reserved = addresses.map(SocketAddr::port).collect();
        options.streams.addresses = self.stream_addr.clone();
        options
    }

    fn access_log(&self) -> Option<AccessLogConfig> {
        let format = match self.access_log {
            AccessLog::Off => return None,
            AccessLog::Json => Format::Json,
            AccessLog::Combined => Format::Combined,
        };
        let destination = self.access_log_file.clone().map_or(Destination::Stdout, Destination::File);
        Some(AccessLogConfig { format, destination })
    }

    /// How the folder is read and watched.
    pub fn folder(&self) -> FolderOptions {
        FolderOptions { debounce: self.debounce.0, ..self.objects.folder() }
    }
}

/// `lockgate check`
#[derive(Debug, Args)]
pub struct CheckArgs {
    /// Files and folders of manifests; - reads standard input
    #[arg(required = true, value_name = "FILE|DIR")]
    pub paths: Vec<PathBuf>,
    /// How to say it
    #[arg(long, short, value_name = "FORMAT", default_value = "text")]
    pub output: Output,
    /// Warnings fail, too
    #[arg(long)]
    pub strict: bool,
    #[allow(missing_docs)]
    #[command(flatten)]
    pub objects: ObjectArgs,
}

/// `lockgate demo`
#[derive(Debug, Args)]
pub struct DemoArgs {
    /// End by itself after the last step
    #[arg(long)]
    pub once: bool,
    /// Where to serve HTTP. If the port is taken, a free one is used
    #[arg(long, value_name = "ADDR:PORT", default_value = "127.0.0.1:8080", env = "LOCKGATE_DEMO_HTTP_ADDR")]
    pub http_addr: SocketAddr,
    /// Where to serve HTTPS. If the port is taken, a free one is used
    #[arg(
        long,
        value_name = "ADDR:PORT",
        default_value = "127.0.0.1:8443",
        env = "LOCKGATE_DEMO_HTTPS_ADDR"
    )]
    pub https_addr: SocketAddr,
    /// Requests sent to measure each step
    #[arg(long, value_name = "N", default_value_t = 1000, value_parser = clap::value_parser!(u32).range(100..=1_000_000))]
    pub requests: u32,
}

/// Format of the access log.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum AccessLog {
    /// None
    Off,
    /// One JSON object per line
    Json,
    /// As nginx writes it, and what ingress-nginx adds
    Combined,
}

/// Format of a report.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Output {
    /// For people
    Text,
    /// For programs
    Json,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_flags_are_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn the_defaults_are_the_proxys_own() {
        let Command::Ingress(args) = Cli::parse_from(["lockgate", "ingress", "--manifests", "."]).command
        else {
            panic!("not ingress");
        };
        let (config, defaults) = (args.config(), Config::default());
        assert_eq!(format!("{:?}", config.limits), format!("{:?}", defaults.limits));
        assert_eq!(format!("{:?}", config.timeouts), format!("{:?}", defaults.timeouts));
        assert_eq!(format!("{:?}", config.drain), format!("{:?}", defaults.drain));
        assert_eq!((config.retry, config.breaker), (defaults.retry, defaults.breaker));
        assert_eq!(config.outliers, defaults.outliers);
        assert_eq!(format!("{:?}", args.folder()), format!("{:?}", FolderOptions::default()));
        assert_eq!(config.workers, defaults.workers);
        assert_eq!(format!("{:?}", config.l4), format!("{:?}", defaults.l4));
        assert_eq!(args.options().streams.addresses, StreamOptions::default().addresses);
    }
}
