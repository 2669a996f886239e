//! `lockgate node`: kube-proxy's flags, by its names.

use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;
use std::time::Duration;

use anyhow::Context;
use clap::{Arg, Args, Command};
use ipnet::IpNet;

use super::{Size, Span, parse_network};
use crate::node::config::{Configuration, LocalMode, go_duration};
use crate::source::FolderOptions;
use crate::translate::{NodeOptions, NodePorts, Options};

pub(super) const EXAMPLES: &str = "\
Examples:
  lockgate node --manifests ./manifests --dry-run
      What would this node do? Nothing is changed; see 127.0.0.1:10249/debug/services.
  lockgate node --manifests ./manifests --cluster-cidr 10.244.0.0/16
      Serve cluster IPs, node ports and load balancers' addresses. Needs root.
  lockgate node --manifests ./manifests --config /var/lib/kube-proxy/config.conf
      With kube-proxy's own configuration. Its flags are taken, too.

/healthz and /livez are on port 10256, /metrics and /debug/services on 127.0.0.1:10249.
Sockets of this node and its Pods are balanced; packets from outside are not yet. SIGTERM ends
the process; what it wrote to the kernel goes on serving. --cleanup removes it.";

/// kube-proxy's switches that have nothing to switch here.
const SWITCHES: [&str; 9] = [
    "bind-address-hard-fail",
    "conntrack-tcp-be-liberal",
    "init-only",
    "iptables-localhost-nodeports",
    "ipvs-strict-arp",
    "logtostderr",
    "nftables-localhost-nodeports",
    "profiling",
    "show-hidden-metrics",
];

/// kube-proxy's flags with a value that say nothing here.
const VALUES: [&str; 31] = [
    "config-sync-period",
    "conntrack-max-per-core",
    "conntrack-min",
    "conntrack-tcp-timeout-close-wait",
    "conntrack-tcp-timeout-established",
    "conntrack-udp-timeout",
    "conntrack-udp-timeout-stream",
    "feature-gates",
    "iptables-masquerade-bit",
    "iptables-min-sync-period",
    "ipvs-exclude-cidrs",
    "ipvs-min-sync-period",
    "ipvs-scheduler",
    "ipvs-sync-period",
    "ipvs-tcp-timeout",
    "ipvs-tcpfin-timeout",
    "ipvs-udp-timeout",
    "kube-api-burst",
    "kube-api-content-type",
    "kube-api-qps",
    "kubeconfig",
    "log-flush-frequency",
    "logging-format",
    "master",
    "oom-score-adj",
    "pod-bridge-interface",
    "pod-interface-name-prefix",
    "proxy-mode",
    "show-hidden-metrics-for-version",
    "v",
    "vmodule",
];

/// Adds those flags of kube-proxy to `command`, unseen: a DaemonSet's arguments are taken as they are.
pub(super) fn with_ignored(command: Command) -> Command {
    let switches = SWITCHES.map(|name| {
        Arg::new(name)
            .long(name)
            .hide(true)
            .num_args(0..=1)
            .require_equals(true)
            .default_missing_value("true")
    });
    let values = VALUES.map(|name| Arg::new(name).long(name).hide(true).num_args(1));
    command.args(switches).args(values)
}

/// Those of the ignored flags that `matches` has.
pub(super) fn ignored(matches: &clap::ArgMatches) -> Vec<String> {
    let given = |name: &&str| matches.value_source(name) == Some(clap::parser::ValueSource::CommandLine);
    let names = SWITCHES.iter().chain(&VALUES).copied();
    names.filter(given).map(|name| format!("--{name}")).collect()
}

/// `lockgate node`
#[derive(Debug, Args)]
pub struct NodeArgs {
    /// The folder: every .yaml, .yml and .json below it is read, and every edit followed
    #[arg(long, value_name = "DIR", env = "LOCKGATE_MANIFESTS")]
    pub manifests: PathBuf,
    /// A KubeProxyConfiguration. What it says counts, and what it does not say has its default:
    /// kube-proxy's other flags are then not looked at, except --hostname-override
    #[arg(long, value_name = "FILE", env = "LOCKGATE_CONFIG")]
    pub config: Option<PathBuf>,
    #[allow(missing_docs)]
    #[command(flatten)]
    pub view: ViewArgs,
    /// Where to serve /healthz and /livez for load balancers; empty is nowhere
    #[arg(
        long,
        value_name = "ADDR[:PORT]",
        default_value = "0.0.0.0:10256",
        env = "LOCKGATE_HEALTHZ_BIND_ADDRESS"
    )]
    pub healthz_bind_address: String,
    /// Where to serve /metrics and /debug/services; empty is nowhere. Not for the public
    #[arg(
        long,
        value_name = "ADDR[:PORT]",
        default_value = "127.0.0.1:10249",
        env = "LOCKGATE_METRICS_BIND_ADDRESS"
    )]
    pub metrics_bind_address: String,
    /// A change that is not live after twice this long makes /healthz fail
    #[arg(long, value_name = "DURATION", default_value = "30s", env = "LOCKGATE_SYNC_PERIOD")]
    #[arg(alias = "iptables-sync-period", value_parser = parse_go_duration)]
    pub sync_period: Duration,
    /// Keep the maps in this process's memory rather than in the kernel: nothing on this machine
    /// changes, and /debug/services and explain show what would be
    #[arg(long)]
    pub dry_run: bool,
    /// Where the cgroup file system (version 2) is whose sockets are balanced; found unless given
    #[arg(long, value_name = "DIR", env = "LOCKGATE_CGROUP_ROOT")]
    pub cgroup_root: Option<PathBuf>,
    /// Where the bpf file system is, or is mounted: what is pinned there outlives the process
    #[arg(long, value_name = "DIR", default_value = "/sys/fs/bpf", env = "LOCKGATE_BPFFS")]
    pub bpffs: PathBuf,
    /// The ports that node ports are taken from, as the API server has them
    #[arg(
        long,
        value_name = "FIRST-LAST",
        default_value = "30000-32767",
        env = "LOCKGATE_SERVICE_NODE_PORT_RANGE"
    )]
    #[arg(value_parser = parse_ports)]
    pub service_node_port_range: (u16, u16),
    /// Take everything of ours out of the kernel, and end
    #[arg(long, value_name = "BOOL", num_args = 0..=1, require_equals = true, conflicts_with = "dry_run")]
    #[arg(default_value_t = false, default_missing_value = "true", action = clap::ArgAction::Set)]
    pub cleanup: bool,
    /// A change is taken up when nothing has changed for this long (after 1s in any case)
    #[arg(long, value_name = "DURATION", default_value = "20ms", env = "LOCKGATE_DEBOUNCE")]
    pub debounce: Span,
    /// Larger files are refused
    #[arg(long, value_name = "SIZE", default_value = "32MiB", env = "LOCKGATE_MAX_FILE_SIZE")]
    pub max_file_size: Size,
    /// Further files are refused
    #[arg(long, value_name = "N", default_value_t = 100_000, env = "LOCKGATE_MAX_FILES")]
    pub max_files: usize,
    /// kube-proxy's flags that were given and have no effect here.
    #[arg(skip)]
    pub ignored: Vec<String>,
}

/// From which node Services are looked at, and which of them count.
#[derive(Clone, Debug, Default, Args)]
pub struct ViewArgs {
    /// The name of the Node this is; the host's name unless given
    #[arg(long, value_name = "NAME", env = "LOCKGATE_HOSTNAME_OVERRIDE")]
    pub hostname_override: Option<String>,
    /// The node's primary address, if the Node object has none or another. Nothing is bound to it
    #[arg(long, value_name = "ADDR", env = "LOCKGATE_BIND_ADDRESS")]
    pub bind_address: Option<IpAddr>,
    /// The networks of Pods; traffic from elsewhere to a cluster IP is masqueraded
    #[arg(long, value_name = "CIDR,...", value_delimiter = ',', env = "LOCKGATE_CLUSTER_CIDR", value_parser = parse_network)]
    pub cluster_cidr: Vec<IpNet>,
    /// How Pods are told from outside: ClusterCIDR or NodeCIDR (spec.podCIDRs of the Node)
    #[arg(long, value_name = "MODE", env = "LOCKGATE_DETECT_LOCAL_MODE")]
    pub detect_local_mode: Option<LocalMode>,
    /// Which of the node's addresses serve node ports: networks, primary, all, and localhost beside one of
    /// these. Unlike kube-proxy's iptables mode, and like its nftables mode, primary unless given
    #[arg(long, value_name = "CIDR,...", value_delimiter = ',', env = "LOCKGATE_NODEPORT_ADDRESSES")]
    pub nodeport_addresses: Vec<String>,
    /// The networks of cluster IPs: an address there that no Service has is dropped
    #[arg(long, value_name = "CIDR,...", value_delimiter = ',', env = "LOCKGATE_SERVICE_CLUSTER_IP_RANGE", value_parser = parse_network)]
    pub service_cluster_ip_range: Vec<IpNet>,
    /// Serve the Services labelled service.kubernetes.io/service-proxy-name with this name rather than
    /// those without the label
    #[arg(long, value_name = "NAME", env = "LOCKGATE_SERVICE_PROXY_NAME")]
    pub service_proxy_name: Option<String>,
    /// Masquerade all traffic to cluster IPs
    #[arg(long, value_name = "BOOL", num_args = 0..=1, require_equals = true, env = "LOCKGATE_MASQUERADE_ALL")]
    #[arg(default_value_t = false, default_missing_value = "true", action = clap::ArgAction::Set)]
    pub masquerade_all: bool,
    /// Serve spec.externalIPs, with which whoever may write a Service takes over any address
    #[arg(long, env = "LOCKGATE_ENABLE_EXTERNAL_IPS")]
    pub enable_external_ips: bool,
}

/// Flags and file, as one.
#[derive(Clone, Debug)]
pub struct NodeSettings {
    /// For the translation.
    pub node: NodeOptions,
    /// For /healthz and /livez.
    pub healthz: Option<SocketAddr>,
    /// For /metrics and /debug/services.
    pub metrics: Option<SocketAddr>,
    /// A change that is not live after this long makes /healthz fail.
    pub health_timeout: Duration,
    /// What was asked for and is not done.
    pub warnings: Vec<String>,
}

impl NodeArgs {
    /// Reads --config, if there is one.
    ///
    /// # Errors
    /// In words: which file or value cannot be used.
    pub fn settings(&self) -> anyhow::Result<NodeSettings> {
        let mut warnings = Vec::new();
        if !self.ignored.is_empty() {
            warnings.push(format!("no effect here: {}", self.ignored.join(", ")));
        }
        let Some(path) = &self.config else {
            let node = self.view.node(&mut warnings)?;
            return Ok(NodeSettings {
                node,
                healthz: bind(&self.healthz_bind_address, 10256).context("--healthz-bind-address")?,
                metrics: bind(&self.metrics_bind_address, 10249).context("--metrics-bind-address")?,
                health_timeout: self.sync_period * 2,
                warnings,
            });
        };
        let text =
            std::fs::read_to_string(path).with_context(|| format!("cannot read {}", path.display()))?;
        let file = Configuration::parse(&text, &mut warnings).with_context(|| path.display().to_string())?;
        let view = ViewArgs {
            hostname_override: self.view.hostname_override.clone().or(file.hostname_override()),
            bind_address: file.bind_address()?,
            cluster_cidr: file.cluster_networks()?,
            detect_local_mode: file.local_mode()?,
            nodeport_addresses: file.node_port_addresses.clone(),
            service_proxy_name: self.view.service_proxy_name.clone().or(file.service_proxy_name()),
            masquerade_all: file.masquerade_all(),
            service_cluster_ip_range: self.view.service_cluster_ip_range.clone(),
            enable_external_ips: self.view.enable_external_ips,
        };
        // Empty is the default in the file, though not on the command line.
        let address = |written: &str, default: &str| match written {
            "" => default.to_owned(),
            written => written.to_owned(),
        };
        Ok(NodeSettings {
            node: view.node(&mut warnings)?,
            healthz: bind(&address(&file.healthz_bind_address, "0.0.0.0:10256"), 10256)
                .context("healthzBindAddress")?,
            metrics: bind(&address(&file.metrics_bind_address, "127.0.0.1:10249"), 10249)
                .context("metricsBindAddress")?,
            health_timeout: file.sync_period()?.unwrap_or(Duration::from_secs(30)) * 2,
            warnings,
        })
    }

    /// How the folder is read and watched.
    pub fn folder(&self) -> FolderOptions {
        FolderOptions {
            debounce: self.debounce.0,
            file_size_max: self.max_file_size.0,
            files_max: self.max_files,
            ..FolderOptions::default()
        }
    }
}

impl ViewArgs {
    /// What the translation needs to know of the node.
    ///
    /// # Errors
    /// In words: which value cannot be used.
    pub fn node(&self, warnings: &mut Vec<String>) -> anyhow::Result<NodeOptions> {
        let mut options = NodeOptions {
            name: self.node_name().into(),
            primary: self.bind_address.filter(|address| !address.is_unspecified()),
            proxy_name: self.service_proxy_name.as_deref().filter(|name| !name.is_empty()).map(Into::into),
            cluster_networks: self.cluster_cidr.clone(),
            service_networks: self.service_cluster_ip_range.clone(),
            masquerade_all: self.masquerade_all,
            external_ips: self.enable_external_ips,
            ..NodeOptions::default()
        };
        options.detect_by_node = match self.detect_local_mode.unwrap_or_default() {
            LocalMode::ClusterCidr => false,
            LocalMode::NodeCidr => true,
            mode @ (LocalMode::BridgeInterface | LocalMode::InterfaceNamePrefix) => {
                warnings.push(format!("detectLocalMode {mode} is not implemented: NodeCIDR is used"));
                true
            }
        };
        self.node_ports(&mut options)?;
        Ok(options)
    }

    /// For Options that translate nothing but what the node needs.
    ///
    /// # Errors
    /// As [`ViewArgs::node`].
    pub fn options(&self) -> anyhow::Result<Options> {
        Ok(Options { node: Some(self.node(&mut Vec::new())?), ..Options::default() })
    }

    /// As the kubelet names its Node.
    fn node_name(&self) -> String {
        let given = self.hostname_override.clone().filter(|name| !name.trim().is_empty());
        let host = || std::fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_default();
        given.unwrap_or_else(host).trim().to_lowercase()
    }

    fn node_ports(&self, options: &mut NodeOptions) -> anyhow::Result<()> {
        let mut networks = Vec::new();
        let (mut all, mut primary) = (false, false);
        for word in self.nodeport_addresses.iter().map(|word| word.trim()).filter(|word| !word.is_empty()) {
            match word {
                "primary" => primary = true,
                "all" => all = true,
                "localhost" => options.node_ports_on_loopback = true,
                network => networks.push(
                    parse_network(network)
                        .map_err(|error| anyhow::anyhow!("--nodeport-addresses {network:?}: {error}"))?,
                ),
            }
        }
        anyhow::ensure!(
            !(primary && (all || !networks.is_empty())),
            "--nodeport-addresses: primary stands alone, or beside localhost"
        );
        // As kube-proxy's iptables mode: a network of loopback addresses opens them.
        options.node_ports_on_loopback |= networks.iter().any(|network| network.addr().is_loopback());
        options.node_ports = match (all, networks.is_empty()) {
            (true, _) => NodePorts::Networks(Vec::new()),
            (false, false) => NodePorts::Networks(networks),
            (false, true) => NodePorts::Primary,
        };
        Ok(())
    }
}

fn parse_ports(text: &str) -> Result<(u16, u16), String> {
    let ends = text.split_once('-').and_then(|(first, last)| Some((first.parse().ok()?, last.parse().ok()?)));
    ends.filter(|(first, last)| 0 < *first && first <= last)
        .ok_or_else(|| "write FIRST-LAST, as 30000-32767".to_owned())
}

fn parse_go_duration(text: &str) -> Result<Duration, String> {
    go_duration(text).ok_or_else(|| "write a number and a unit, as 30s or 1m0s".to_owned())
}

/// An address with or without a port; nothing for an empty one.
fn bind(text: &str, port: u16) -> anyhow::Result<Option<SocketAddr>> {
    if text.is_empty() {
        return Ok(None);
    }
    let address = text.parse().or_else(|_| text.parse().map(|ip: IpAddr| SocketAddr::new(ip, port)));
    address
        .map(Some)
        .map_err(|_| anyhow::anyhow!("{text:?} is no address; write 0.0.0.0:{port} or [::]:{port}"))
}

#[cfg(test)]
mod tests;
