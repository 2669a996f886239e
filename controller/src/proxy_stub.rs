//! Stand-in for the proxy's API until it is merged. Serves nothing.
#![allow(missing_docs)]

use std::io;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use ipnet::IpNet;
use lockgate_proxy::RoutingTable;
use lockgate_proxy::table::{Host, HostPattern, Origin, PathMatch, Rule};

#[derive(Clone, Debug, Default)]
pub struct Config {
    pub http: Vec<SocketAddr>,
    pub https: Vec<SocketAddr>,
    pub workers: usize,
    pub limits: Limits,
    pub timeouts: Timeouts,
    pub trusted: Vec<IpNet>,
    pub access_log: Option<AccessLogConfig>,
    pub drain: Drain,
}

#[derive(Clone, Debug)]
pub struct Limits {
    pub header_bytes: usize,
    pub headers: usize,
    pub target_bytes: usize,
    pub body_bytes: Option<u64>,
    pub connections: usize,
    pub idle_upstream: usize,
    pub tries: u32,
    pub h2_streams: u32,
}

impl Default for Limits {
    fn default() -> Limits {
        Limits {
            header_bytes: 32 << 10,
            headers: 100,
            target_bytes: 8 << 10,
            body_bytes: None,
            connections: 16_384,
            idle_upstream: 256,
            tries: 3,
            h2_streams: 128,
        }
    }
}

#[derive(Clone, Debug)]
pub struct Timeouts {
    pub header: Duration,
    pub keep_alive: Duration,
    pub client: Duration,
    pub handshake: Duration,
    pub connect: Duration,
    pub send: Duration,
    pub read: Duration,
    pub idle_upstream: Duration,
    pub tunnel: Duration,
}

impl Default for Timeouts {
    fn default() -> Timeouts {
        let secs = Duration::from_secs;
        Timeouts {
            header: secs(15),
            keep_alive: secs(75),
            client: secs(60),
            handshake: secs(10),
            connect: secs(5),
            send: secs(60),
            read: secs(60),
            idle_upstream: secs(60),
            tunnel: secs(3600),
        }
    }
}

#[derive(Clone, Debug)]
pub struct Drain {
    pub grace: Duration,
    pub deadline: Duration,
}

impl Default for Drain {
    fn default() -> Drain {
        Drain { grace: Duration::from_secs(5), deadline: Duration::from_secs(240) }
    }
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Format {
    #[default]
    Json,
    Combined,
}

#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum Destination {
    #[default]
    Stdout,
    File(PathBuf),
}

#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct AccessLogConfig {
    pub format: Format,
    pub destination: Destination,
}

#[derive(Debug, thiserror::Error)]
pub enum StartError {
    #[error("cannot listen on {address}: {source}")]
    Bind { address: SocketAddr, source: io::Error },
}

pub struct Proxy {
    http: Vec<SocketAddr>,
    https: Vec<SocketAddr>,
    live: Arc<Live>,
    routes: Routes,
    drain: Drain,
}

impl Proxy {
    pub fn start(config: Config) -> Result<(Proxy, Publisher), StartError> {
        let live = Arc::new(Live::default());
        let routes = Routes(Arc::new(Mutex::new(Arc::new(Router::empty()))));
        let publisher = Publisher(routes.clone(), live.clone());
        Ok((Proxy { http: config.http, https: config.https, live, routes, drain: config.drain }, publisher))
    }
    pub fn http_addrs(&self) -> &[SocketAddr] {
        &self.http
    }
    pub fn https_addrs(&self) -> &[SocketAddr] {
        &self.https
    }
    pub fn metrics(&self) -> &Metrics {
        &self.live.metrics
    }
    pub fn live(&self) -> &Arc<Live> {
        &self.live
    }
    pub fn routes(&self) -> &Routes {
        &self.routes
    }
    pub async fn drain(self) -> bool {
        tokio::time::sleep(self.drain.grace).await;
        true
    }
}

#[derive(Default)]
pub struct Live {
    pub metrics: Metrics,
}

#[derive(Default)]
pub struct Metrics {}

impl Metrics {
    pub fn set_generation(&self, _generation: u64) {}
    pub fn set_objects(&self, _kind: &'static str, _state: &'static str, _count: u64) {}
    pub fn encode(&self) -> String {
        "# no metrics yet\n".into()
    }
}

pub struct Publisher(Routes, Arc<Live>);

impl Publisher {
    pub fn publish(&mut self, table: RoutingTable) -> u64 {
        let next = self.0.load_full().compile(table, &self.1);
        let generation = next.generation;
        *self.0.0.lock().unwrap_or_else(|poisoned| poisoned.into_inner()) = Arc::new(next);
        generation
    }
}

#[derive(Clone)]
pub struct Routes(Arc<Mutex<Arc<Router>>>);

impl Routes {
    pub fn load_full(&self) -> Arc<Router> {
        self.0.lock().unwrap_or_else(|poisoned| poisoned.into_inner()).clone()
    }
}

pub struct Router {
    table: RoutingTable,
    generation: u64,
}

pub struct CompiledRule {
    pub path: PathMatch,
    pub origin: Arc<Origin>,
}

pub enum Found {
    Rule(CompiledRule),
    NoPath,
    NoHost,
}

impl Router {
    pub fn empty() -> Router {
        Router { table: RoutingTable::default(), generation: 0 }
    }
    pub fn compile(&self, table: RoutingTable, _live: &Live) -> Router {
        Router { table, generation: self.generation + 1 }
    }
    pub fn table(&self) -> &RoutingTable {
        &self.table
    }
    pub fn generation(&self) -> u64 {
        self.generation
    }
    pub fn find(&self, host: &str, path: &[u8]) -> Found {
        let wildcard = host.split_once('.').map(|(_, rest)| format!("*.{rest}"));
        let patterns = [Some(host.to_owned()), wildcard, Some(String::new())];
        let host: Option<&Arc<Host>> =
            patterns.iter().flatten().find_map(|p| self.table.hosts.get(&HostPattern::new(p)));
        let Some(host) = host else { return Found::NoHost };
        let path = String::from_utf8_lossy(path);
        let rank = |rule: &&Rule| match &rule.path {
            PathMatch::Exact(p) if **p == *path => Some((1, p.len(), 1)),
            PathMatch::Prefix(p) if is_element_prefix(p, &path) => {
                Some((0, p.trim_end_matches('/').len(), 1))
            }
            PathMatch::StringPrefix(p) if path.starts_with(&**p) => Some((0, p.len(), 0)),
            _ => None,
        };
        match host.rules.iter().filter(|r| rank(r).is_some()).max_by_key(rank) {
            Some(rule) => Found::Rule(CompiledRule { path: rule.path.clone(), origin: rule.origin.clone() }),
            None => Found::NoPath,
        }
    }
}

fn is_element_prefix(prefix: &str, path: &str) -> bool {
    let prefix = prefix.strip_suffix('/').unwrap_or(prefix);
    path.strip_prefix(prefix).is_some_and(|rest| rest.is_empty() || rest.starts_with('/'))
}
