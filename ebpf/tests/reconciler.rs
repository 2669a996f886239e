//! A table made live in the kernel: what sockets get is what the table says, through changes and restarts.
#![allow(clippy::unwrap_used, reason = "a test says what it expects by panicking")]

#[path = "support/inside.rs"]
#[allow(dead_code, reason = "others write maps by themselves")]
mod inside;

use std::collections::BTreeSet;
use std::io::{self, ErrorKind, Read};
use std::net::{IpAddr, SocketAddr, TcpStream};
use std::sync::Arc;
use std::time::Duration;

use fastrand::Rng;
use lockgate_ebpf::kernel::KernelMaps;
use lockgate_ebpf::table::{
    Algorithm, Endpoint, EndpointSet, Family, Frontend, Node, Protocol, Role, Service, ServiceName, Target,
};
use lockgate_ebpf::verdict::Verdict;
use lockgate_ebpf::{Live, Outcome, Reconciler, ServiceTable};
use lockgate_ebpf_common::Settings;

use inside::{World, run, tcp_server};

const PORT: u16 = 80;
const NODE_PORT: u16 = 30080;

/// Connects and reads which endpoint it is.
fn ask(to: SocketAddr) -> io::Result<u16> {
    let mut port = [0; 2];
    TcpStream::connect(to)?.read_exact(&mut port)?;
    Ok(u16::from_be_bytes(port))
}

fn name(number: u8) -> ServiceName {
    ServiceName { name: format!("n/s{number}:80").into(), protocol: Protocol::Tcp, family: Family::Ipv4 }
}

fn vip(number: u8) -> SocketAddr {
    SocketAddr::from(([10, 96, 0, number], PORT))
}

fn endpoints(servers: &[SocketAddr]) -> EndpointSet {
    let mut set: Vec<Endpoint> =
        servers.iter().map(|server| Endpoint { address: *server, weight: 1 }).collect();
    set.sort_unstable();
    set.into()
}

fn put(table: &mut ServiceTable, number: u8, service: Service) {
    let frontend = Frontend::new(vip(number), Protocol::Tcp);
    table.frontends.insert(frontend, Target { service: name(number), role: Role::ClusterIp });
    table.services.insert(name(number), Arc::new(service));
    table.cluster_ips.insert(vip(number).ip());
}

struct Agent {
    reconciler: Option<Reconciler<KernelMaps>>,
    /// Nobody reads while nobody connects: time may pass as it likes.
    now: Duration,
}

impl Agent {
    fn new(world: &World) -> Agent {
        let mut agent = Agent { reconciler: None, now: Duration::ZERO };
        agent.restart(world);
        agent
    }

    /// As a process does that was killed, and another one started.
    fn restart(&mut self, world: &World) {
        self.reconciler = None;
        let maps = KernelMaps::open(&world.options.pins()).unwrap();
        self.reconciler = Some(Reconciler::new(maps, self.now).unwrap());
    }

    fn apply(&mut self, table: &ServiceTable) {
        self.now += Duration::from_millis(400);
        let reconciler = self.reconciler.as_mut().unwrap();
        assert_eq!(reconciler.apply(table, self.now), Outcome::default());
        let live = Live::read(reconciler.maps(), None).unwrap();
        assert_eq!(live.difference(&Live::desired(table, None)), [""; 0]);
    }
}

#[test]
fn a_table_is_live_in_the_kernel() {
    run("a_table_is_live_in_the_kernel", |world| {
        let servers: Vec<SocketAddr> = (0..3).map(|_| tcp_server("127.0.0.1")).collect();
        let mut agent = Agent::new(world);
        let addresses = [(IpAddr::from([127, 0, 0, 1]), true)].into();
        let node = Arc::new(Node { addresses, ..Node::default() });
        let mut table = ServiceTable { node, ..ServiceTable::default() };
        let service = |servers: &[SocketAddr]| Service {
            cluster: endpoints(servers),
            has_endpoints: !servers.is_empty(),
            source_ranges: Some(["10.0.0.0/8".parse().unwrap(), "fd00::/8".parse().unwrap()].into()),
            ..Service::default()
        };
        put(&mut table, 1, service(&servers[..2]));
        let node_port = Frontend::node_port(Family::Ipv4, NODE_PORT, Protocol::Tcp);
        table.frontends.insert(node_port, Target { service: name(1), role: Role::NodePort });
        let node_namespace = lockgate_ebpf::sys::namespace::cookie().unwrap();
        let settings =
            Settings { node_namespace, node_port_first: 30000, node_port_last: 32767, ..Settings::default() };
        world.maps.put_settings(&settings).unwrap();
        agent.apply(&table);

        let ports = |servers: &[SocketAddr]| servers.iter().map(SocketAddr::port).collect::<BTreeSet<_>>();
        let hit = |to: SocketAddr| (0..64).map(|_| ask(to).unwrap()).collect::<BTreeSet<_>>();
        assert_eq!(hit(vip(1)), ports(&servers[..2]));
        assert_eq!(hit(SocketAddr::from(([127, 0, 0, 1], NODE_PORT))), ports(&servers[..2]), "its node port");
        let other = SocketAddr::new(vip(1).ip(), PORT + 1);
        assert_eq!(ask(other).unwrap_err().kind(), ErrorKind::ConnectionRefused, "a port it has not");

        agent.restart(world);
        assert_eq!(hit(vip(1)), ports(&servers[..2]), "without an agent it serves on");
        put(&mut table, 1, service(&servers[2..]));
        agent.apply(&table);
        assert_eq!(hit(vip(1)), ports(&servers[2..]));
        put(&mut table, 1, service(&[]));
        agent.apply(&table);
        assert_eq!(ask(vip(1)).unwrap_err().kind(), ErrorKind::ConnectionRefused, "no endpoint");
        agent.apply(&ServiceTable::default());
        assert_eq!(Live::read(agent.reconciler.as_ref().unwrap().maps(), None).unwrap(), Live::default());
    });
}

/// A random Service. One that gives no answer is nothing a test can wait for.
fn service(rng: &mut Rng, servers: &[SocketAddr]) -> Service {
    let chosen: Vec<SocketAddr> = servers.iter().filter(|_| rng.u8(..3) == 0).copied().collect();
    let set = endpoints(&chosen);
    Service {
        has_endpoints: !set.is_empty(),
        local: if rng.bool() { set.clone() } else { endpoints(&[]) },
        external_local: rng.bool(),
        affinity: rng.bool().then_some(100),
        algorithm: [Algorithm::Random, Algorithm::RoundRobin, Algorithm::Maglev][rng.usize(..3)],
        cluster: set,
        ..Service::default()
    }
}

/// The verdict of the table against that of the kernel, for sockets of the node.
#[test]
fn the_kernel_agrees_with_the_model() {
    run("the_kernel_agrees_with_the_model", |world| {
        let seed = std::env::var("LOCKGATE_SEED").ok().and_then(|seed| seed.parse().ok()).unwrap_or(7);
        eprintln!("LOCKGATE_SEED={seed}");
        let mut rng = Rng::with_seed(seed);
        let servers: Vec<SocketAddr> = (0..6).map(|_| tcp_server("127.0.0.1")).collect();
        let mut agent = Agent::new(world);
        let mut table = ServiceTable::default();
        for step in 0..60 {
            for _ in 0..rng.usize(1..4) {
                let number = rng.u8(1..9);
                if rng.u8(..4) > 0 {
                    put(&mut table, number, service(&mut rng, &servers));
                    continue;
                }
                table.frontends.remove(&Frontend::new(vip(number), Protocol::Tcp));
                table.services.remove(&name(number));
                if rng.bool() {
                    table.cluster_ips.remove(&vip(number).ip());
                }
            }
            if rng.u8(..8) == 0 {
                agent.restart(world);
            }
            agent.apply(&table);
            for number in 1..9 {
                let client = table.node.client([127, 0, 0, 1].into());
                let found = match table.verdict(client, vip(number), Protocol::Tcp) {
                    // Nobody has the address: nothing answers for long.
                    Verdict::Pass | Verdict::Drop(_) => continue,
                    Verdict::Reject(_) => Err(ErrorKind::ConnectionRefused),
                    Verdict::Forward { endpoints, .. } => {
                        Ok(endpoints.iter().map(|one| one.address.port()).collect::<BTreeSet<_>>())
                    }
                };
                let asked = ask(vip(number)).map_err(|error| error.kind());
                match (&found, &asked) {
                    (Ok(set), Ok(port)) if set.contains(port) => {}
                    (Err(wanted), Err(kind)) if wanted == kind => {}
                    _ => {
                        panic!("step {step}, {}: {asked:?}, not {found:?}; LOCKGATE_SEED={seed}", vip(number))
                    }
                }
            }
        }
    });
}
