//! The fields of a Service that only the service plane looks at.

use super::*;

const PROXY_NAME: &str = "service.kubernetes.io/service-proxy-name";
const HEADLESS: &str = "service.kubernetes.io/headless";
/// Seconds, as the API server fills in: three hours.
const AFFINITY_DEFAULT: u32 = 10_800;
/// Seconds: a day, the most the API server lets pass.
const AFFINITY_MOST: u32 = 86_400;

/// Takes what it reads out of `spec`.
pub(super) fn read(
    metadata: &ObjectMeta,
    spec: &mut core::ServiceSpec,
    status: Option<core::ServiceStatus>,
    notices: &mut Vec<Notice>,
) -> Exposure {
    let via = match spec.type_.as_deref() {
        Some("NodePort") => Via::NodePort,
        Some("LoadBalancer") => Via::LoadBalancer,
        _ => Via::ClusterIp,
    };
    let none = |ip: &String| ip == "None";
    let external = spec.external_ips.take().unwrap_or_default();
    let external_ips = external
        .iter()
        .enumerate()
        .filter_map(|(index, ip)| address(ip, || format!(".spec.externalIPs[{index}]"), notices));
    let external_ips = external_ips.collect();
    let port_of_checks = spec.health_check_node_port.filter(|number| *number != 0);
    Exposure {
        via,
        proxy_name: label(&metadata.labels, PROXY_NAME),
        headless: label(&metadata.labels, HEADLESS).is_some()
            || spec.cluster_ip.iter().any(none)
            || spec.cluster_ips.iter().flatten().any(none),
        external_ips,
        load_balancer_ips: load_balancer_ips(status, notices),
        source_ranges: source_ranges(spec.load_balancer_source_ranges.take(), notices),
        internal_local: is_local(
            spec.internal_traffic_policy.as_deref(),
            ".spec.internalTrafficPolicy",
            notices,
        ),
        external_local: is_local(
            spec.external_traffic_policy.as_deref(),
            ".spec.externalTrafficPolicy",
            notices,
        ),
        affinity: affinity(spec, notices),
        health_check_port: port_of_checks
            .and_then(|number| port(number, || ".spec.healthCheckNodePort".to_owned(), notices)),
    }
}

/// `ipMode: Proxy` (KEP-1860) wants its packets to reach the load balancer.
fn load_balancer_ips(status: Option<core::ServiceStatus>, notices: &mut Vec<Notice>) -> Vec<IpAddr> {
    let entries = status.and_then(|status| status.load_balancer?.ingress).unwrap_or_default();
    let mut addresses = Vec::new();
    for (index, entry) in entries.into_iter().enumerate() {
        if entry.ip_mode.as_deref().is_some_and(|mode| mode != "VIP") {
            continue;
        }
        let Some(ip) = text(entry.ip) else { continue };
        addresses.extend(address(&ip, || format!(".status.loadBalancer.ingress[{index}].ip"), notices));
    }
    addresses
}

/// Validation lets spaces around a network pass, and bare addresses not.
fn source_ranges(ranges: Option<Vec<String>>, notices: &mut Vec<Notice>) -> Option<Vec<IpNet>> {
    let ranges = ranges.filter(|ranges| !ranges.is_empty())?;
    let mut networks: Vec<IpNet> = Vec::new();
    for (index, range) in ranges.iter().enumerate() {
        match range.trim().parse::<IpNet>() {
            Ok(network) => networks.push(network.trunc()),
            Err(_) => notices.push(Notice::error(
                format!(".spec.loadBalancerSourceRanges[{index}]"),
                format!("{range:?} is not a network: it lets nobody in"),
                "write a network such as 10.0.0.0/8",
            )),
        }
    }
    networks.sort_unstable();
    networks.dedup();
    Some(networks)
}

fn is_local(policy: Option<&str>, field: &str, notices: &mut Vec<Notice>) -> bool {
    match policy {
        None | Some("" | "Cluster") => false,
        Some("Local") => true,
        Some(other) => {
            let message = format!("{other:?} is unknown: taken as Cluster");
            notices.push(Notice::error(field, message, "use Cluster or Local"));
            false
        }
    }
}

fn affinity(spec: &core::ServiceSpec, notices: &mut Vec<Notice>) -> Option<u32> {
    match spec.session_affinity.as_deref() {
        None | Some("" | "None") => return None,
        Some("ClientIP") => {}
        Some(other) => {
            let message = format!("{other:?} is unknown: there is no affinity");
            notices.push(Notice::error(".spec.sessionAffinity", message, "use ClientIP or None"));
            return None;
        }
    }
    let configured = spec.session_affinity_config.as_ref().and_then(|config| config.client_ip.as_ref());
    let Some(written) = configured.and_then(|config| config.timeout_seconds) else {
        return Some(AFFINITY_DEFAULT);
    };
    let seconds = u32::try_from(written).ok().filter(|seconds| (1..=AFFINITY_MOST).contains(seconds));
    if seconds.is_none() {
        notices.push(Notice::error(
            ".spec.sessionAffinityConfig.clientIP.timeoutSeconds",
            format!("{written} is out of range: {AFFINITY_DEFAULT} is used"),
            format!("use 1 to {AFFINITY_MOST}"),
        ));
    }
    seconds.or(Some(AFFINITY_DEFAULT))
}
