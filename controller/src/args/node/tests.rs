use super::*;
use crate::args::{Cli, Command};

fn parsed(flags: &[&str]) -> Result<NodeArgs, clap::Error> {
    let line = ["lockgate", "node", "--manifests", "."].iter().chain(flags);
    match Cli::parse_line(line)?.command {
        Command::Node(args) => Ok(args),
        other => panic!("{other:?}"),
    }
}

fn settings(flags: &[&str]) -> NodeSettings {
    parsed(flags).unwrap().settings().unwrap()
}

#[test]
fn defaults() {
    let settings = settings(&["--hostname-override", " N1 "]);
    assert_eq!(&*settings.node.name, "n1");
    assert_eq!(settings.healthz, Some(SocketAddr::from(([0; 4], 10256))));
    assert_eq!(settings.metrics, Some(SocketAddr::from(([127, 0, 0, 1], 10249))));
    assert_eq!(settings.health_timeout, Duration::from_secs(60));
    assert_eq!(settings.node, NodeOptions { name: "n1".into(), ..NodeOptions::default() });
    assert_eq!(settings.warnings, [""; 0]);
}

/// As in a DaemonSet for kube-proxy.
#[test]
fn flags_of_kube_proxy() {
    let settings = settings(&[
        "--v=2",
        "--cluster-cidr=10.244.0.0/16,fd00::/56",
        "--masquerade-all=true",
        "--proxy-mode",
        "iptables",
        "--oom-score-adj=-998",
        "--profiling",
        "--nodeport-addresses=192.168.0.0/16,127.0.0.0/8",
        "--healthz-bind-address=",
        "--metrics-bind-address=0.0.0.0",
        "--iptables-sync-period=1m0s",
        "--conntrack-max-per-core=0",
    ]);
    assert_eq!(settings.node.cluster_networks.len(), 2);
    assert!(settings.node.masquerade_all && settings.node.node_ports_on_loopback);
    assert!(matches!(&settings.node.node_ports, NodePorts::Networks(networks) if networks.len() == 2));
    assert_eq!((settings.healthz, settings.metrics), (None, Some(SocketAddr::from(([0; 4], 10249)))));
    assert_eq!(settings.health_timeout, Duration::from_secs(120));
    assert_eq!(
        settings.warnings,
        ["no effect here: --profiling, --conntrack-max-per-core, --oom-score-adj, --proxy-mode, --v"]
    );
}

#[test]
fn node_port_addresses() {
    let ports = |text: &str| settings(&["--nodeport-addresses", text]).node;
    assert_eq!(ports("primary").node_ports, NodePorts::Primary);
    assert_eq!(ports("all").node_ports, NodePorts::Networks(vec![]));
    let both = ports("primary,localhost");
    assert_eq!((both.node_ports, both.node_ports_on_loopback), (NodePorts::Primary, true));
    for wrong in ["primary,10.0.0.0/8", "primary,all", "some"] {
        assert!(parsed(&["--nodeport-addresses", wrong]).unwrap().settings().is_err(), "{wrong}");
    }
}

#[test]
fn a_file_counts_rather_than_flags() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("config.yaml");
    std::fs::write(
        &path,
        "{apiVersion: kubeproxy.config.k8s.io/v1alpha1, kind: KubeProxyConfiguration, hostnameOverride: of-file,
          clusterCIDR: 10.1.0.0/16, detectLocalMode: NodeCIDR, metricsBindAddress: '127.0.0.1:1', healthzBindAddress: '',
          mode: nftables, nftables: {masqueradeAll: true, syncPeriod: 10s}, nodePortAddresses: [primary]}",
    )
    .unwrap();
    let file =
        ["--config", path.to_str().unwrap(), "--cluster-cidr", "10.2.0.0/16", "--healthz-bind-address", ""];
    let settings = settings(&file);
    assert_eq!(&*settings.node.name, "of-file");
    assert_eq!(settings.node.cluster_networks, ["10.1.0.0/16".parse().unwrap()]);
    assert!(settings.node.detect_by_node && settings.node.masquerade_all);
    assert_eq!(settings.metrics, Some(SocketAddr::from(([127, 0, 0, 1], 1))));
    assert_eq!(settings.healthz, Some(SocketAddr::from(([0; 4], 10256))));
    assert_eq!(settings.health_timeout, Duration::from_secs(20));
    let named = [&file[..], &["--hostname-override", "of-flag"]].concat();
    assert_eq!(&*self::settings(&named).node.name, "of-flag");
}
