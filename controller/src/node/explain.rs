//! What a client of a Service gets, and why, in words. The verdict is the table's own; what stands here
//! only gives the reasons.

use std::net::{IpAddr, SocketAddr};

use lockgate_ebpf::table::{
    Algorithm, Endpoint, Frontend, Protocol, Role, Scope, Service, ServiceName, ServiceTable,
};
use lockgate_ebpf::verdict::{Client, Origin, Reason, Set, Verdict};

use crate::store::Store;
use crate::text::{Text, Tone, count, printable};
use crate::translate::{NodeOptions, left_out};

/// Endpoints are listed up to this many.
const ENDPOINTS_MAX: usize = 16;

/// A connection that is asked about.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Question {
    pub(crate) client: IpAddr,
    pub(crate) destination: SocketAddr,
    pub(crate) protocol: Protocol,
}

impl Question {
    /// `10.96.0.1:80`, or with `/udp` behind it.
    pub(crate) fn new(destination: &str, client: IpAddr) -> Result<Question, String> {
        let (address, protocol) = destination.rsplit_once('/').unwrap_or((destination, "tcp"));
        let protocol = match protocol.to_ascii_lowercase().as_str() {
            "tcp" => Protocol::Tcp,
            "udp" => Protocol::Udp,
            "sctp" => Protocol::Sctp,
            other => return Err(format!("{other:?} is no protocol; use tcp, udp or sctp")),
        };
        let destination = address.parse().map_err(|_| {
            format!("{address:?} is no address; with --client, write ADDR:PORT, as 10.96.0.10:53/udp")
        })?;
        Ok(Question { client, destination, protocol })
    }
}

/// Writes down what becomes of the connection; says whether an endpoint takes it.
pub(crate) fn explain(
    text: &mut Text,
    table: &ServiceTable,
    question: &Question,
    options: &NodeOptions,
    store: &Store,
) -> bool {
    let Question { client, destination, protocol } = question;
    let heading = format!("{destination}/{protocol} for {client}, on node {}", printable(&options.name));
    text.put(Tone::Heading, &heading).line().line();
    let client = table.node.client(*client);
    let mut answer = Answer { text, table, options, store };
    let Some((frontend, target)) = table.find(*destination, *protocol) else {
        return answer.without_frontend(table.verdict(client, *destination, *protocol));
    };
    answer.frontend(&frontend, &target.service, target.role);
    answer.client(&client);
    match table.verdict(client, *destination, *protocol) {
        Verdict::Forward { name, service, set, endpoints, masquerade } => {
            answer.policy(target.role, &client, service, set);
            answer.endpoints(name, endpoints, set);
            answer.choice(service, masquerade);
            true
        }
        Verdict::Reject(reason) => answer.refused("rejected", &client, target, reason),
        Verdict::Drop(reason) => answer.refused("dropped", &client, target, reason),
        Verdict::Pass => answer.refused("left alone", &client, target, Reason::NoSuchService),
    }
}

struct Answer<'a> {
    text: &'a mut Text,
    table: &'a ServiceTable,
    options: &'a NodeOptions,
    store: &'a Store,
}

impl Answer<'_> {
    fn step(&mut self, name: &str, tone: Tone, what: &str) {
        self.text.put(Tone::Faint, &format!("  {name:12}")).put(tone, what).line();
    }

    fn without_frontend(&mut self, verdict: Verdict<'_>) -> bool {
        match verdict {
            Verdict::Reject(reason) => self.step("verdict", Tone::Bad, &format!("rejected: {reason}")),
            Verdict::Drop(reason) => self.step("verdict", Tone::Bad, &format!("dropped: {reason}")),
            Verdict::Pass | Verdict::Forward { .. } => {
                self.step(
                    "verdict",
                    Tone::Warning,
                    "left alone: it is no Service's address and port on this node",
                );
            }
        }
        false
    }

    fn frontend(&mut self, frontend: &Frontend, name: &ServiceName, role: Role) {
        let is = match (role, frontend.scope) {
            (Role::ClusterIp, _) => "a cluster IP",
            (Role::LoadBalancer, _) => "a load balancer's address",
            (Role::ExternalIp, _) => "one of the external IPs",
            (Role::NodePort, Scope::NodePort) => {
                "the node port, on an address of this node that serves them,"
            }
            (Role::NodePort, Scope::Address) => "the node port",
        };
        self.step("frontend", Tone::Plain, &format!("{is} of {}", printable(&name.to_string())));
    }

    fn client(&mut self, client: &Client) {
        let what = match client.origin {
            Origin::Node => "this node itself".to_owned(),
            Origin::Pod => {
                let networks = &self.table.node.pod_networks;
                let own = networks.iter().find(|network| network.contains(&client.address));
                own.map_or("a Pod".to_owned(), |network| format!("a Pod: in {network}"))
            }
            Origin::Outside if self.table.node.pod_networks.is_empty() => {
                "from outside, as far as is known: no Pod network was named (--cluster-cidr)".to_owned()
            }
            Origin::Outside => "from outside: in no network of Pods, and no address of this node".to_owned(),
        };
        self.step("client", Tone::Plain, &what);
    }

    fn policy(&mut self, role: Role, client: &Client, service: &Service, set: Set) {
        let what = match (role, set) {
            (Role::ClusterIp, Set::Local) => "internalTrafficPolicy Local: endpoints of this node".to_owned(),
            (Role::ClusterIp, Set::Cluster) => {
                "internalTrafficPolicy Cluster: endpoints of every node".to_owned()
            }
            (_, Set::Local) => "externalTrafficPolicy Local, from outside: endpoints of this node".to_owned(),
            (_, Set::Cluster) if service.external_local => {
                let who = if client.origin == Origin::Pod { "Pods" } else { "the node itself" };
                format!("externalTrafficPolicy Local does not bind {who}: endpoints of every node")
            }
            (_, Set::Cluster) => "externalTrafficPolicy Cluster: endpoints of every node".to_owned(),
        };
        self.step("policy", Tone::Plain, &what);
    }

    fn endpoints(&mut self, name: &ServiceName, endpoints: &[Endpoint], set: Set) {
        let many = count(endpoints.len(), "endpoint");
        self.step("verdict", Tone::Good, &format!("forwarded to one of {many}"));
        for endpoint in endpoints.iter().take(ENDPOINTS_MAX) {
            self.step("", Tone::Good, &endpoint.address.to_string());
        }
        self.more(endpoints.len());
        self.left_out(name, set);
    }

    /// Those that get nothing.
    fn left_out(&mut self, name: &ServiceName, set: Set) {
        let left_out = left_out(name, set == Set::Local, self.options, self.store);
        for (at, (address, reason)) in left_out.iter().take(ENDPOINTS_MAX).enumerate() {
            let label = if at == 0 { "not used" } else { "" };
            self.step(label, Tone::Faint, &format!("{address} {}", printable(reason)));
        }
        self.more(left_out.len());
    }

    fn more(&mut self, all: usize) {
        if all > ENDPOINTS_MAX {
            self.step("", Tone::Faint, &format!("and {} more", all - ENDPOINTS_MAX));
        }
    }

    fn choice(&mut self, service: &Service, masquerade: bool) {
        let how = match service.algorithm {
            Algorithm::Random => "each alike, at random",
            Algorithm::RoundRobin => "in turn",
            Algorithm::Weighted => "at random, by weight",
            Algorithm::LeastConnections => "the one with fewer connections, of two",
            Algorithm::SourceHash => "by the client's address",
            Algorithm::Maglev => "by the client's address and port (Maglev)",
        };
        self.step("chosen", Tone::Plain, how);
        if let Some(seconds) = service.affinity {
            self.step(
                "affinity",
                Tone::Plain,
                &format!("the same as before, within {seconds}s of the last connection"),
            );
        }
        let source = match masquerade {
            true => "the endpoint sees an address of this node",
            false => "the endpoint sees the client's address, unless it is the client",
        };
        self.step("source", Tone::Plain, source);
    }

    fn refused(
        &mut self,
        what: &str,
        client: &Client,
        target: &lockgate_ebpf::table::Target,
        reason: Reason,
    ) -> bool {
        let Some(service) = self.table.services.get(&target.service) else { return false };
        let is_local = match target.role {
            Role::ClusterIp => service.internal_local,
            _ => service.external_local && client.origin == Origin::Outside,
        };
        let set = if is_local { Set::Local } else { Set::Cluster };
        self.step("verdict", Tone::Bad, &format!("{what}: {reason}"));
        if reason == Reason::SourceRanges {
            let ranges = service.source_ranges.iter().flat_map(|ranges| ranges.iter());
            let ranges: Vec<String> = ranges.map(ToString::to_string).collect();
            let ranges = if ranges.is_empty() { "none".to_owned() } else { ranges.join(", ") };
            self.step("ranges", Tone::Plain, &ranges);
        } else {
            self.left_out(&target.service, set);
        }
        false
    }
}

#[cfg(test)]
mod tests;
