//! The servers of `healthCheckNodePort`s: a load balancer asks each node whether it has endpoints
//! of a Service. To the byte as kube-proxy answers.

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use hyper::StatusCode;
use imbl::OrdMap;
use lockgate_ebpf::table::HealthCheck;
use tokio::net::TcpListener;
use tokio::sync::watch;
use tokio::task::JoinHandle;
use tokio::time::sleep;
use tracing::{info, warn};

use super::health::Health;
use crate::http::{self, Answer, Reply};

/// Ports that could not be opened are tried again after this long, and when the table changes.
const RETRY: Duration = Duration::from_secs(10);

/// What should be served.
#[derive(Clone, Default, PartialEq, Eq)]
pub(crate) struct Wanted {
    /// By port.
    pub(crate) checks: OrdMap<u16, Arc<HealthCheck>>,
    /// Those of the node that serve node ports; empty is all.
    pub(crate) addresses: Vec<IpAddr>,
}

type Servers = BTreeMap<SocketAddr, JoinHandle<()>>;

/// Opens and closes ports as `wanted` changes, for as long as its sender lives.
pub(crate) async fn serve(mut wanted: watch::Receiver<Wanted>, health: Arc<Health>) {
    let mut servers = Servers::new();
    let mut failed: BTreeSet<SocketAddr> = BTreeSet::new();
    loop {
        let now = wanted.borrow_and_update().clone();
        let addresses = listeners(&now);
        servers.retain(|address, server| {
            let stays = addresses.contains(address);
            if !stays {
                server.abort();
            }
            stays
        });
        failed.retain(|address| addresses.contains(address));
        for address in addresses {
            if servers.contains_key(&address) {
                continue;
            }
            match open(address).await {
                Ok(listener) => {
                    failed.remove(&address);
                    let task = serve_one(listener, address.port(), wanted.clone(), health.clone());
                    servers.insert(address, tokio::spawn(task));
                    info!("health checks of {} are answered on {address}", name(&now, address.port()));
                }
                Err(error) if failed.insert(address) => {
                    // kube-proxy's event FailedToStartServiceHealthcheck.
                    warn!(
                        "Service {}: health checks cannot be answered on {address}: {error}",
                        name(&now, address.port())
                    );
                }
                Err(_) => {}
            }
        }
        let alive = tokio::select! {
            changed = wanted.changed() => changed.is_ok(),
            () = sleep(RETRY), if !failed.is_empty() => true,
        };
        if !alive {
            servers.into_values().for_each(|server| server.abort());
            return;
        }
    }
}

fn name(wanted: &Wanted, port: u16) -> String {
    wanted.checks.get(&port).map(|check| format!("{}/{}", check.namespace, check.name)).unwrap_or_default()
}

fn listeners(wanted: &Wanted) -> BTreeSet<SocketAddr> {
    let any = [IpAddr::V6(Ipv6Addr::UNSPECIFIED)];
    let addresses = if wanted.addresses.is_empty() { &any[..] } else { &wanted.addresses };
    let of_port = |port: &u16| {
        let port = *port;
        addresses.iter().map(move |address| SocketAddr::new(*address, port))
    };
    wanted.checks.keys().flat_map(of_port).collect()
}

/// Both families on the unspecified address, or IPv4 alone where there is no IPv6.
async fn open(address: SocketAddr) -> io::Result<TcpListener> {
    let any_v4 = SocketAddr::new(Ipv4Addr::UNSPECIFIED.into(), address.port());
    match TcpListener::bind(address).await {
        Err(error) if address.ip().is_unspecified() && error.kind() != io::ErrorKind::AddrInUse => {
            TcpListener::bind(any_v4).await
        }
        result => result,
    }
}

async fn serve_one(listener: TcpListener, port: u16, wanted: watch::Receiver<Wanted>, health: Arc<Health>) {
    http::serve(listener, move |_| {
        let check = wanted.borrow().checks.get(&port).cloned();
        let reply = answer(check.as_deref(), health.is_healthy());
        async move { reply }
    })
    .await;
}

/// Any path, any method.
fn answer(check: Option<&HealthCheck>, healthy: bool) -> Reply {
    // The port was closed while this client kept its connection.
    let Some(check) = check else { return Answer::text(StatusCode::SERVICE_UNAVAILABLE, "").into() };
    let HealthCheck { namespace, name, local_endpoints } = check;
    let status = match *local_endpoints > 0 && healthy {
        true => StatusCode::OK,
        false => StatusCode::SERVICE_UNAVAILABLE,
    };
    // Names of objects need no escaping.
    let body = format!(
        "{{\n\t\"service\": {{\n\t\t\"namespace\": \"{namespace}\",\n\t\t\"name\": \"{name}\"\n\t}},\n\
         \t\"localEndpoints\": {local_endpoints},\n\t\"serviceProxyHealthy\": {healthy}\n}}"
    );
    Answer::json(status, body)
        .header("X-Content-Type-Options", "nosniff")
        .header("X-Load-Balancing-Endpoint-Weight", &local_endpoints.to_string())
        .into()
}

#[cfg(test)]
mod tests;
