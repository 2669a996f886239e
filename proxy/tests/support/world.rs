//! Hosts that change all the time, and what every request to them may see.

use std::collections::HashMap;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicUsize, Ordering::SeqCst};
use std::sync::{Arc, Mutex};

use lockgate_proxy::router::Live;
use lockgate_proxy::table::{
    Action, Backend, Balance, Host, HostPattern, PathMatch, RoutingTable, Rule, UpstreamProtocol,
};
use lockgate_proxy::{Certificate, Publisher};

use super::pod::Pod;
use super::toy;

/// Hosts that clients ask.
pub(crate) const HOSTS: usize = 6;

/// What clients ask for; [`App::pools`] says who may answer.
pub(crate) const PATHS: [&str; 6] = ["/", "/api", "/canary", "/extra", "/swap", "/exact"];

/// The endpoints of this one speak HTTP/2.
pub(crate) const HTTP2_HOST: usize = HOSTS - 1;

fn protocol(host: usize) -> UpstreamProtocol {
    if host == HTTP2_HOST { UpstreamProtocol::H2c } else { UpstreamProtocol::Http1 }
}

pub(crate) fn host_name(host: usize) -> String {
    format!("h{host}.example")
}

/// One host: two pools, and rules that divide its paths between them.
struct App {
    /// By pool, then in no order.
    pods: [Vec<Pod>; 2],
    has_extra: bool,
    is_swapped: bool,
    weights: [u32; 2],
    order: u64,
    balance: Balance,
    certificate: Arc<Certificate>,
    /// Counts certificates; it is one of the certificate's names.
    rotation: usize,
}

impl App {
    /// Which of the two pools serve `PATHS[path]`.
    fn pools(&self, path: usize) -> [bool; 2] {
        match PATHS[path] {
            "/" => [true, false],
            "/canary" if self.weights == [0, 0] => [true, false],
            "/canary" => self.weights.map(|weight| weight > 0),
            "/extra" => [!self.has_extra, self.has_extra],
            "/swap" => [self.is_swapped, !self.is_swapped],
            _ => [false, true],
        }
    }

    fn host(&self, host: usize) -> Host {
        let rule = |path: PathMatch, pool| toy::rule(path, &pool_name(host, pool));
        let prefix = |path: &str| PathMatch::Prefix(path.into());
        let mut canary = rule(prefix("/canary"), 0);
        let Action::Forward(split) = &mut canary.action else { unreachable!() };
        let backend = |pool: usize| Backend {
            pool: toy::key(&pool_name(host, pool)),
            weight: self.weights[pool],
            canary: if pool == 0 { "".into() } else { "canary".into() },
            steering: None,
        };
        split.backends = vec![backend(0), backend(1)];
        let mut rules: Vec<Rule> = vec![
            rule(prefix("/"), 0),
            rule(prefix("/api"), 1),
            canary,
            rule(prefix("/swap"), usize::from(!self.is_swapped)),
            rule(PathMatch::Exact("/exact".into()), 1),
        ];
        if self.has_extra {
            rules.push(rule(prefix("/extra"), 1));
        }
        fastrand::Rng::with_seed(self.order).shuffle(&mut rules);
        Host { rules }
    }
}

fn pool_name(host: usize, pool: usize) -> String {
    format!("default/h{host}-{pool}:80")
}

/// What was right in one generation.
struct Truth {
    /// Names of pods, by host and path.
    served_by: HashMap<(usize, usize), Vec<Arc<str>>>,
    rotations: [usize; HOSTS],
}

/// What was right when. A request may see any generation from the last one published before it
/// began to the last one begun when it ended.
#[derive(Default)]
pub(crate) struct History {
    truths: Mutex<Vec<Arc<Truth>>>,
    begun: AtomicUsize,
    done: AtomicUsize,
}

impl History {
    /// To be asked before a request begins.
    pub(crate) fn now(&self) -> usize {
        self.done.load(SeqCst)
    }

    /// Whether `pod` was right for `PATHS[path]` of `host` at some time since `since`.
    pub(crate) fn may_serve(&self, since: usize, host: usize, path: usize, pod: &str) -> bool {
        self.some(since, |truth| truth.served_by[&(host, path)].iter().any(|name| **name == *pod))
    }

    /// Whether the certificate that has `name` among its names was right for `host` since `since`.
    pub(crate) fn may_show(&self, since: usize, host: usize, certificate: &[u8]) -> bool {
        self.some(since, |truth| {
            let name = rotation_name(host, truth.rotations[host]);
            certificate.windows(name.len()).any(|window| window == name.as_bytes())
        })
    }

    fn some(&self, since: usize, holds: impl Fn(&Truth) -> bool) -> bool {
        let truths = self.truths.lock().unwrap();
        truths[since..=self.begun.load(SeqCst)].iter().any(|truth| holds(truth))
    }
}

fn rotation_name(host: usize, rotation: usize) -> String {
    format!("rotation-{rotation}-of.h{host}.example")
}

fn certificate(host: usize, rotation: usize) -> Arc<Certificate> {
    Arc::new(Certificate::self_signed(&[&host_name(host), &rotation_name(host, rotation)]).unwrap())
}

/// The desired state, and whoever served under an earlier one.
pub(crate) struct World {
    apps: Vec<App>,
    pub(crate) retired: Vec<Pod>,
    pub(crate) reaped: usize,
    live: Arc<Live>,
    /// What the proxy called endpoints that were removed.
    removed: Vec<(SocketAddr, UpstreamProtocol, u64)>,
    pub(crate) table: RoutingTable,
    publisher: Publisher,
    history: Arc<History>,
    random: fastrand::Rng,
    pods: usize,
    /// Publishes by kind of change.
    pub(crate) changes: HashMap<&'static str, usize>,
}

impl World {
    pub(crate) async fn new(live: Arc<Live>, publisher: Publisher, history: Arc<History>) -> World {
        let mut world = World {
            apps: Vec::new(),
            retired: Vec::new(),
            reaped: 0,
            live,
            removed: Vec::new(),
            table: RoutingTable::default(),
            publisher,
            history,
            random: fastrand::Rng::with_seed(7),
            pods: 0,
            changes: HashMap::new(),
        };
        for host in 0..HOSTS {
            let app = App {
                pods: [world.pods(host, 2).await, world.pods(host, 2).await],
                has_extra: false,
                is_swapped: false,
                weights: [90, 10],
                order: 0,
                balance: Balance::RoundRobin,
                certificate: certificate(host, 0),
                rotation: 0,
            };
            world.apps.push(app);
            world.write(host);
        }
        world.publish();
        world
    }

    async fn pods(&mut self, host: usize, count: usize) -> Vec<Pod> {
        let mut pods = Vec::new();
        for _ in 0..count {
            self.pods += 1;
            pods.push(Pod::start(format!("pod-{}", self.pods), host == HTTP2_HOST).await);
        }
        pods
    }

    /// Changes something at random, and publishes it.
    pub(crate) async fn change(&mut self) {
        let host = self.random.usize(..HOSTS);
        let kind = match self.random.u32(..100) {
            0..10 => {
                self.apps[host].has_extra ^= true;
                "add or remove a rule"
            }
            10..20 => {
                self.apps[host].is_swapped ^= true;
                "send a rule elsewhere"
            }
            20..30 => {
                self.apps[host].order = self.random.u64(..);
                self.apps[host].balance =
                    self.random.choice([Balance::RoundRobin, Balance::LeastRequest]).unwrap();
                "reorder rules, balance otherwise"
            }
            30..45 => {
                let weight = self.random.choice([0, 5, 25, 50, 100]).unwrap();
                self.apps[host].weights = [100 - weight, weight];
                "move weights"
            }
            45..60 => {
                let app = &mut self.apps[host];
                app.rotation += 1;
                app.certificate = certificate(host, app.rotation);
                "rotate a certificate"
            }
            60..75 => {
                self.replace(host, 0).await;
                self.replace(host, 1).await;
                "replace all endpoints of a host"
            }
            75..80 => {
                for host in 0..HOSTS {
                    self.replace(host, 0).await;
                    self.replace(host, 1).await;
                    self.write(host);
                }
                "replace all endpoints"
            }
            80..90 => {
                self.scale(host).await;
                "scale a pool"
            }
            _ => {
                self.rearrange_strangers();
                "hosts and pools nobody asks"
            }
        };
        self.write(host);
        self.publish();
        *self.changes.entry(kind).or_default() += 1;
    }

    async fn replace(&mut self, host: usize, pool: usize) {
        let count = self.random.usize(1..4);
        let new = self.pods(host, count).await;
        let old = std::mem::replace(&mut self.apps[host].pods[pool], new);
        self.retire(host, old);
    }

    async fn scale(&mut self, host: usize) {
        let pool = self.random.usize(..2);
        if self.apps[host].pods[pool].len() > 2 {
            let gone = self.apps[host].pods[pool].remove(0);
            self.retire(host, vec![gone]);
        } else {
            let new = self.pods(host, 1).await;
            self.apps[host].pods[pool].extend(new);
        }
    }

    fn retire(&mut self, host: usize, mut pods: Vec<Pod>) {
        for pod in &mut pods {
            pod.remove();
            let id = self.live.endpoints.get(pod.address, protocol(host)).id;
            self.removed.push((pod.address, protocol(host), id));
        }
        self.retired.extend(pods);
    }

    fn rearrange_strangers(&mut self) {
        let protocols = [UpstreamProtocol::Http1, UpstreamProtocol::H2c, UpstreamProtocol::Https];
        for _ in 0..20 {
            let n = self.random.u32(..200);
            let (host, pool) =
                (HostPattern::new(&format!("stranger-{n}.example")), format!("strange/s{n}:80"));
            if self.random.bool() {
                let address = ([127, 0, 0, 1], 1 + self.random.u16(..1000)).into();
                let protocol = self.random.choice(protocols).unwrap();
                self.table.pools.insert(toy::key(&pool), Arc::new(toy::pool(&[address], protocol)));
                let rule = toy::rule(PathMatch::Prefix("/".into()), &pool);
                self.table.hosts.insert(host, Arc::new(Host { rules: vec![rule] }));
            } else {
                self.table.hosts.remove(&host);
                self.table.pools.remove(&toy::key(&pool));
            }
        }
    }

    /// Brings what the table says of `host` up to date.
    fn write(&mut self, host: usize) {
        let app = &self.apps[host];
        let pattern = HostPattern::new(&host_name(host));
        self.table.hosts.insert(pattern.clone(), Arc::new(app.host(host)));
        self.table.certificates.insert(pattern, Arc::new(vec![app.certificate.clone()]));
        for (index, pods) in app.pods.iter().enumerate() {
            let addresses: Vec<_> = pods.iter().map(|pod| pod.address).collect();
            let mut pool = toy::pool(&addresses, protocol(host));
            pool.balance = app.balance;
            self.table.pools.insert(toy::key(&pool_name(host, index)), Arc::new(pool));
        }
    }

    fn publish(&mut self) {
        let truth = self.truth();
        let begun = {
            let mut truths = self.history.truths.lock().unwrap();
            truths.push(Arc::new(truth));
            truths.len() - 1
        };
        self.history.begun.store(begun, SeqCst);
        self.publisher.publish(self.table.clone());
        self.history.done.store(begun, SeqCst);
    }

    fn truth(&self) -> Truth {
        let mut served_by = HashMap::new();
        for (host, app) in self.apps.iter().enumerate() {
            for path in 0..PATHS.len() {
                let pools = app.pools(path).into_iter().zip(&app.pods).filter(|(serves, _)| *serves);
                let names = pools.flat_map(|(_, pods)| pods.iter().map(|pod| pod.name.clone()));
                served_by.insert((host, path), names.collect());
            }
        }
        Truth { served_by, rotations: std::array::from_fn(|host| self.apps[host].rotation) }
    }

    /// Stops pods that nobody uses any more.
    pub(crate) fn reap(&mut self) {
        let before = self.retired.len();
        self.retired.retain(|pod| !pod.reap());
        self.reaped += before - self.retired.len();
    }

    pub(crate) fn collect(&mut self) {
        self.publisher.collect();
    }

    /// Removed endpoints that the proxy still knows. An address in use again is known rightly.
    pub(crate) fn remembered(&self) -> usize {
        let serves = |address| self.serving().any(|pod| pod.address == address);
        let known = |(address, protocol, id): &&(SocketAddr, UpstreamProtocol, u64)| {
            !serves(*address) && self.live.endpoints.get(*address, *protocol).id == *id
        };
        self.removed.iter().filter(known).count()
    }

    /// Pods that the table names.
    pub(crate) fn serving(&self) -> impl Iterator<Item = &Pod> {
        self.apps.iter().flat_map(|app| app.pods.iter().flatten())
    }
}
