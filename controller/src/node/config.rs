//! kube-proxy's configuration file, `KubeProxyConfiguration`.

use std::fmt;
use std::net::IpAddr;
use std::str::FromStr;
use std::time::Duration;

use anyhow::{Context, bail};
use ipnet::IpNet;
use serde::Deserialize;
use serde_yaml::Value;

/// Fields that are known and mean nothing here, each with all below it.
const WITHOUT_EFFECT: [&str; 24] = [
    "bindAddressHardFail",
    "clientConnection",
    "configSyncPeriod",
    "conntrack",
    "detectLocal.bridgeInterface",
    "detectLocal.interfaceNamePrefix",
    "enableProfiling",
    "featureGates",
    "iptables",
    "ipvs",
    "linux",
    "logging",
    "minSyncPeriod",
    "mode",
    "nftables",
    "oomScoreAdj",
    "portRange",
    "resourceContainer",
    "showHiddenMetricsForVersion",
    "udpIdleTimeout",
    "udpTimeoutMilliseconds",
    "windows",
    "windowsRunAsService",
    "winkernel",
];

/// What of `kubeproxy.config.k8s.io/v1alpha1` or `v1alpha2` counts here.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub(crate) struct Configuration {
    api_version: String,
    kind: String,
    hostname_override: String,
    service_proxy_name: String,
    bind_address: String,
    pub(crate) healthz_bind_address: String,
    pub(crate) metrics_bind_address: String,
    mode: String,
    #[serde(rename = "clusterCIDR")]
    cluster_cidr: String,
    detect_local_mode: String,
    detect_local: DetectLocal,
    pub(crate) node_port_addresses: Vec<String>,
    sync_period: String,
    iptables: Backend,
    nftables: Backend,
    ipvs: Backend,
    linux: Backend,
}

#[derive(Clone, Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
struct DetectLocal {
    #[serde(rename = "clusterCIDRs")]
    cluster_cidrs: Vec<String>,
}

/// What the three modes have in common.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
struct Backend {
    masquerade_all: bool,
    sync_period: String,
}

/// How Pods are told from outside.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum LocalMode {
    /// By `--cluster-cidr`.
    #[default]
    ClusterCidr,
    /// By `spec.podCIDRs` of the own Node.
    NodeCidr,
    /// By the bridge they are behind.
    BridgeInterface,
    /// By the names of their interfaces.
    InterfaceNamePrefix,
}

impl fmt::Display for LocalMode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            LocalMode::ClusterCidr => "ClusterCIDR",
            LocalMode::NodeCidr => "NodeCIDR",
            LocalMode::BridgeInterface => "BridgeInterface",
            LocalMode::InterfaceNamePrefix => "InterfaceNamePrefix",
        })
    }
}

impl FromStr for LocalMode {
    type Err = String;

    fn from_str(text: &str) -> Result<LocalMode, String> {
        let all = [
            LocalMode::ClusterCidr,
            LocalMode::NodeCidr,
            LocalMode::BridgeInterface,
            LocalMode::InterfaceNamePrefix,
        ];
        let found = all.into_iter().find(|mode| mode.to_string().eq_ignore_ascii_case(text));
        found.ok_or_else(|| format!("{text:?} is unknown; use ClusterCIDR or NodeCIDR"))
    }
}

impl Configuration {
    /// Reads YAML or JSON. What is unknown is a warning: a newer kube-proxy may know it.
    pub(crate) fn parse(text: &str, warnings: &mut Vec<String>) -> anyhow::Result<Configuration> {
        let mut unknown = Vec::new();
        let mut ignored = |path: serde_ignored::Path<'_>| {
            let path = path.to_string();
            let known = |field: &&str| path == **field || path.starts_with(&format!("{field}."));
            if !WITHOUT_EFFECT.iter().any(known) {
                unknown.push(path);
            }
        };
        let mut written: Value = serde_yaml::from_str(text)?;
        forget_nulls(&mut written);
        let file: Configuration =
            serde_path_to_error::deserialize(serde_ignored::Deserializer::new(written, &mut ignored))?;
        if file.kind != "KubeProxyConfiguration" || !file.api_version.starts_with("kubeproxy.config.k8s.io/")
        {
            bail!(
                "is {:?} of {:?}, not a KubeProxyConfiguration of kubeproxy.config.k8s.io",
                file.kind,
                file.api_version
            );
        }
        if !unknown.is_empty() {
            warnings.push(format!("unknown in the configuration, ignored: {}", unknown.join(", ")));
        }
        Ok(file)
    }

    pub(crate) fn hostname_override(&self) -> Option<String> {
        Some(self.hostname_override.clone()).filter(|name| !name.is_empty())
    }

    pub(crate) fn service_proxy_name(&self) -> Option<String> {
        Some(self.service_proxy_name.clone()).filter(|name| !name.is_empty())
    }

    pub(crate) fn bind_address(&self) -> anyhow::Result<Option<IpAddr>> {
        let text = &self.bind_address;
        let parsed = (!text.is_empty()).then(|| text.parse()).transpose();
        parsed.with_context(|| format!("bindAddress {text:?} is no address"))
    }

    /// v1alpha1 has one text, v1alpha2 a list.
    pub(crate) fn cluster_networks(&self) -> anyhow::Result<Vec<IpNet>> {
        let all =
            self.cluster_cidr.split(',').chain(self.detect_local.cluster_cidrs.iter().map(String::as_str));
        let written = all.map(str::trim).filter(|text| !text.is_empty());
        written
            .map(|text| text.parse().with_context(|| format!("clusterCIDR {text:?} is no network")))
            .collect()
    }

    pub(crate) fn local_mode(&self) -> anyhow::Result<Option<LocalMode>> {
        let text = &self.detect_local_mode;
        let parsed = (!text.is_empty()).then(|| text.parse()).transpose();
        parsed.map_err(|error: String| anyhow::anyhow!("detectLocalMode {error}"))
    }

    /// The section of the mode that kube-proxy would run in.
    fn backend(&self) -> &Backend {
        match self.mode.as_str() {
            "nftables" => &self.nftables,
            "ipvs" => &self.ipvs,
            _ => &self.iptables,
        }
    }

    pub(crate) fn masquerade_all(&self) -> bool {
        // In ipvs mode, too, kube-proxy looks into the section of iptables.
        self.backend().masquerade_all
            || self.linux.masquerade_all
            || self.mode == "ipvs" && self.iptables.masquerade_all
    }

    pub(crate) fn sync_period(&self) -> anyhow::Result<Option<Duration>> {
        let written = [&self.sync_period, &self.backend().sync_period];
        let Some(text) = written.into_iter().find(|text| !text.is_empty()) else { return Ok(None) };
        let period =
            go_duration(text).with_context(|| format!("syncPeriod {text:?} is no duration such as 30s"))?;
        Ok(Some(period).filter(|period| !period.is_zero()))
    }
}

/// Null means not written, as everywhere in Kubernetes.
fn forget_nulls(value: &mut Value) {
    if let Value::Mapping(fields) = value {
        fields.retain(|_, value| !value.is_null());
        fields.values_mut().for_each(forget_nulls);
    }
}

/// `1h15m30.5s`, as Go writes durations.
pub(crate) fn go_duration(text: &str) -> Option<Duration> {
    let mut rest = text.trim();
    if rest == "0" {
        return Some(Duration::ZERO);
    }
    let mut seconds = 0.0;
    let mut any = false;
    while !rest.is_empty() {
        let digits = rest.find(|c: char| !c.is_ascii_digit() && c != '.')?;
        let number: f64 = rest[..digits].parse().ok()?;
        rest = &rest[digits..];
        let units =
            [("ns", 1e-9), ("us", 1e-6), ("µs", 1e-6), ("ms", 1e-3), ("s", 1.0), ("m", 60.0), ("h", 3600.0)];
        // `ms` before `m`.
        let (unit, factor) = units.into_iter().find(|(unit, _)| rest.starts_with(unit))?;
        rest = &rest[unit.len()..];
        seconds += number * factor;
        any = true;
    }
    any.then(|| Duration::try_from_secs_f64(seconds).ok()).flatten()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn durations_of_go() {
        for (text, millis) in [
            ("30s", 30_000),
            ("1m0s", 60_000),
            ("1h15m", 4_500_000),
            ("250ms", 250),
            ("1.5s", 1500),
            ("0", 0),
            ("0s", 0),
        ] {
            assert_eq!(go_duration(text), Some(Duration::from_millis(millis)), "{text}");
        }
        for text in ["", "30", "s", "1x", "1h30", "-1s"] {
            assert_eq!(go_duration(text), None, "{text}");
        }
    }

    #[test]
    fn files_that_are_none() {
        let error =
            |text: &str| Configuration::parse(text, &mut Vec::new()).map(drop).unwrap_err().to_string();
        assert!(
            error("kind: KubeletConfiguration\napiVersion: kubelet.config.k8s.io/v1beta1")
                .contains("not a Kube")
        );
        assert!(error("nodePortAddresses: {}").contains("nodePortAddresses"));
    }

    /// As kubeadm writes it.
    #[test]
    fn a_file_of_kubeadm() {
        let text = "
apiVersion: kubeproxy.config.k8s.io/v1alpha1
bindAddress: 0.0.0.0
bindAddressHardFail: false
clientConnection: {acceptContentTypes: '', burst: 0, contentType: '', kubeconfig: /var/lib/kube-proxy/kubeconfig.conf, qps: 0}
clusterCIDR: 10.244.0.0/16,fd00:10:244::/56
configSyncPeriod: 0s
conntrack: {maxPerCore: null, min: null, tcpBeLiberal: false, tcpCloseWaitTimeout: null}
detectLocal: {bridgeInterface: '', interfaceNamePrefix: ''}
detectLocalMode: ''
enableProfiling: false
healthzBindAddress: ''
hostnameOverride: ''
iptables: {localhostNodePorts: null, masqueradeAll: false, masqueradeBit: null, minSyncPeriod: 1s, syncPeriod: 0s}
ipvs: {excludeCIDRs: null, scheduler: '', strictARP: false}
kind: KubeProxyConfiguration
logging: {flushFrequency: 0, options: {json: {infoBufferSize: '0'}}, verbosity: 0}
metricsBindAddress: ''
mode: ''
nftables: {masqueradeAll: true, minSyncPeriod: 0s}
nodePortAddresses: null
oomScoreAdj: null
portRange: ''
showHiddenMetricsForVersion: ''
winkernel: {enableDSR: false}
tpyo: 1
";
        let mut warnings = Vec::new();
        let file = Configuration::parse(text, &mut warnings).unwrap();
        assert_eq!(warnings, ["unknown in the configuration, ignored: tpyo"]);
        assert_eq!(file.cluster_networks().unwrap().len(), 2);
        assert_eq!((file.masquerade_all(), file.sync_period().unwrap()), (false, None));
        assert_eq!((file.local_mode().unwrap(), file.bind_address().unwrap()), (None, Some([0; 4].into())));
    }
}
