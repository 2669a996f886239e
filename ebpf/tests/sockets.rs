//! Socket load balancing in the kernel: real sockets, in a network namespace and a cgroup of the test's own.
#![allow(clippy::unwrap_used, reason = "a test says what it expects by panicking")]

#[path = "support/inside.rs"]
mod inside;

use std::collections::BTreeSet;
use std::io::{ErrorKind, Read};
use std::net::{SocketAddr, TcpStream, UdpSocket};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;
use std::{io, thread};

use lockgate_ebpf::load::{load, remove};
use lockgate_ebpf_common::protocol::{TCP, UDP};
use lockgate_ebpf_common::{Event, Service, SetWord, Settings, kind, node_address, scope, service};

use inside::{World, address, run, tcp_server, udp_server};

/// A cluster IP of each family, and the IPv4 one as an IPv6 socket names it.
const VIPS: [(&str, &str, &str); 3] = [
    ("10.96.0.1:80", "10.96.0.1:80", "127.0.0.1"),
    ("[fd00:96::1]:80", "[fd00:96::1]:80", "::1"),
    ("10.96.0.2:80", "[::ffff:10.96.0.2]:80", "127.0.0.1"),
];

fn at(text: &str) -> SocketAddr {
    text.parse().unwrap()
}

/// Connects and reads which endpoint it is.
fn ask(to: SocketAddr) -> io::Result<u16> {
    let mut port = [0; 2];
    TcpStream::connect(to)?.read_exact(&mut port)?;
    Ok(u16::from_be_bytes(port))
}

fn udp(local: &str) -> UdpSocket {
    let socket = UdpSocket::bind((local, 0)).unwrap();
    socket.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
    socket
}

/// Any address of the family of `to`.
fn any(to: SocketAddr) -> &'static str {
    if to.is_ipv4() { "0.0.0.0" } else { "::" }
}

/// Sends to `to` and reads which endpoint answers, and as whom.
fn ask_udp(socket: &UdpSocket, to: SocketAddr) -> io::Result<(u16, SocketAddr)> {
    socket.send_to(b"?", to)?;
    answer(socket)
}

fn answer(socket: &UdpSocket) -> io::Result<(u16, SocketAddr)> {
    let mut port = [0; 2];
    let (_, from) = socket.recv_from(&mut port)?;
    Ok((u16::from_be_bytes(port), from))
}

fn service_with(world: &mut World, vip: &str, protocol: u8, endpoints: &[SocketAddr]) -> u32 {
    let index = world.service(Service::default());
    world.set(index, endpoints);
    world.frontend(index, at(vip), protocol);
    index
}

fn ports(endpoints: &[SocketAddr]) -> BTreeSet<u16> {
    endpoints.iter().map(SocketAddr::port).collect()
}

#[test]
fn tcp_connects_through_a_cluster_ip() {
    run("tcp_connects_through_a_cluster_ip", |world| {
        for (vip, named, ip) in VIPS {
            let endpoints = [tcp_server(ip), tcp_server(ip)];
            service_with(world, vip, TCP, &endpoints);
            let hit: BTreeSet<_> = (0..64).map(|_| ask(at(named)).unwrap()).collect();
            assert_eq!(hit, ports(&endpoints), "{named}: both endpoints, and only those");
            let stream = TcpStream::connect(at(named)).unwrap();
            assert_eq!(stream.peer_addr().unwrap(), at(named), "getpeername shows what was asked for");
        }
        let direct = tcp_server("127.0.0.1");
        assert_eq!(ask(direct).unwrap(), direct.port(), "what is no Service's is left alone");
        assert_eq!(TcpStream::connect(direct).unwrap().peer_addr().unwrap(), direct);
        assert_eq!(world.count(Event::Balanced), 3 * 65);
    });
}

#[test]
fn connected_udp_is_balanced() {
    run("connected_udp_is_balanced", |world| {
        for (vip, named, ip) in VIPS {
            let endpoints = [udp_server(ip), udp_server(ip)];
            service_with(world, vip, UDP, &endpoints);
            let mut hit = BTreeSet::new();
            for _ in 0..64 {
                let socket = udp(any(at(named)));
                socket.connect(at(named)).unwrap();
                assert_eq!(socket.peer_addr().unwrap(), at(named));
                socket.send(b"?").unwrap();
                let (port, from) = answer(&socket).unwrap();
                assert_eq!(from, at(named));
                hit.insert(port);
            }
            assert_eq!(hit, ports(&endpoints), "{named}");
        }
    });
}

#[test]
fn unconnected_udp_stays_with_an_endpoint_and_sees_the_vip() {
    run("unconnected_udp_stays_with_an_endpoint_and_sees_the_vip", |world| {
        for (vip, named, ip) in VIPS {
            let endpoints = [udp_server(ip), udp_server(ip), udp_server(ip)];
            let index = service_with(world, vip, UDP, &endpoints);
            let other = udp_server(ip);
            let second = SocketAddr::new(at(vip).ip(), 81);
            service_with(world, &second.to_string(), UDP, &[other]);

            let socket = udp(any(at(named)));
            let (first, from) = ask_udp(&socket, at(named)).unwrap();
            assert_eq!(from, at(named), "the reply comes from the VIP");
            for _ in 0..32 {
                let (port, from) = ask_udp(&socket, SocketAddr::new(at(named).ip(), 81)).unwrap();
                assert_eq!(
                    (port, from.port(), from.ip()),
                    (other.port(), 81, at(named).ip()),
                    "two VIPs at once"
                );
                assert_eq!(ask_udp(&socket, at(named)).unwrap(), (first, at(named)));
            }
            let left: Vec<_> = endpoints.into_iter().filter(|endpoint| endpoint.port() != first).collect();
            world.set(index, &left);
            let (port, from) = ask_udp(&socket, at(named)).unwrap();
            assert!(ports(&left).contains(&port), "an endpoint that left is left");
            assert_eq!(from, at(named));
        }
    });
}

#[test]
fn a_socket_that_turns_to_an_endpoint_itself_sees_it() {
    run("a_socket_that_turns_to_an_endpoint_itself_sees_it", |world| {
        let endpoint = udp_server("127.0.0.1");
        service_with(world, "10.96.0.1:53", UDP, &[endpoint]);
        let socket = udp("0.0.0.0");
        assert_eq!(ask_udp(&socket, at("10.96.0.1:53")).unwrap().1, at("10.96.0.1:53"));
        assert_eq!(ask_udp(&socket, endpoint).unwrap().1, endpoint);
        assert_eq!(ask_udp(&socket, at("10.96.0.1:53")).unwrap().1, at("10.96.0.1:53"));

        // Two Services with the same endpoint: each reply comes from the one asked.
        service_with(world, "10.96.0.2:53", UDP, &[endpoint]);
        for vip in ["10.96.0.2:53", "10.96.0.1:53", "10.96.0.2:53", "10.96.0.1:53"] {
            assert_eq!(ask_udp(&socket, at(vip)).unwrap().1, at(vip));
        }
    });
}

#[test]
fn without_endpoints_clients_are_refused() {
    run("without_endpoints_clients_are_refused", |world| {
        let index = world.service(Service::default());
        world.frontend(index, at("10.96.0.1:80"), TCP);
        world.frontend(index, at("10.96.0.1:80"), UDP);
        world.frontend_as(0, at("10.96.0.1:0"), 0, scope::CLUSTER_ADDRESS, kind::CLUSTER_IP);
        let refused =
            |result: io::Result<()>| assert_eq!(result.unwrap_err().kind(), ErrorKind::ConnectionRefused);
        refused(ask(at("10.96.0.1:80")).map(drop));
        refused(udp("0.0.0.0").connect(at("10.96.0.1:80")));
        refused(udp("0.0.0.0").send_to(b"?", at("10.96.0.1:80")).map(drop));
        assert_eq!(world.count(Event::NoEndpoint), 3);
        refused(ask(at("10.96.0.1:81")).map(drop));
        assert_eq!(world.count(Event::UnknownPort), 1);

        world.empty(index, SetWord::EMPTY_DROP);
        // Not translated: here, nothing routes to the VIP.
        assert_eq!(ask(at("10.96.0.1:80")).unwrap_err().kind(), ErrorKind::NetworkUnreachable);
        assert_eq!(world.count(Event::NoLocalEndpoint), 1);

        let endpoint = tcp_server("127.0.0.1");
        world.set(index, &[endpoint]);
        assert_eq!(ask(at("10.96.0.1:80")).unwrap(), endpoint.port());
    });
}

#[test]
fn affinity_keeps_a_client_with_its_endpoint() {
    run("affinity_keeps_a_client_with_its_endpoint", |world| {
        let endpoints: Vec<_> = (0..8).map(|_| tcp_server("127.0.0.1")).collect();
        let index = world.service(Service {
            flags: service::AFFINITY,
            affinity_timeout: 10800,
            ..Service::default()
        });
        world.set(index, &endpoints);
        world.frontend(index, at("10.96.0.1:80"), TCP);
        world.frontend(index, at("10.96.0.2:8080"), TCP);
        let first = ask(at("10.96.0.1:80")).unwrap();
        for _ in 0..32 {
            assert_eq!(ask(at("10.96.0.1:80")).unwrap(), first);
            assert_eq!(ask(at("10.96.0.2:8080")).unwrap(), first, "whichever address of the Service it uses");
        }
        assert_eq!(world.count(Event::Affinity), 64);

        let left: Vec<_> = endpoints.iter().copied().filter(|endpoint| endpoint.port() != first).collect();
        world.set(index, &left);
        let second = ask(at("10.96.0.1:80")).unwrap();
        assert_ne!(second, first, "an endpoint that left is left");
        assert!((0..32).all(|_| ask(at("10.96.0.1:80")).unwrap() == second));
    });
}

#[test]
fn an_affinity_ends() {
    run("an_affinity_ends", |world| {
        let endpoints: Vec<_> = (0..8).map(|_| tcp_server("127.0.0.1")).collect();
        // Zero seconds end at once.
        let index = world.service(Service { flags: service::AFFINITY, ..Service::default() });
        world.set(index, &endpoints);
        world.frontend(index, at("10.96.0.1:80"), TCP);
        let hit: BTreeSet<_> = (0..128).map(|_| ask(at("10.96.0.1:80")).unwrap()).collect();
        assert!(hit.len() > 1);
        assert_eq!(world.count(Event::Affinity), 0);
    });
}

#[test]
fn node_ports_serve_on_the_nodes_addresses() {
    run("node_ports_serve_on_the_nodes_addresses", |world| {
        let settings = Settings { node_port_first: 30000, node_port_last: 32767, ..Settings::default() };
        world.maps.put_settings(&settings).unwrap();
        for (any, ip) in [("0.0.0.0:30080", "127.0.0.1"), ("[::]:30080", "::1")] {
            let endpoint = tcp_server(ip);
            let index = world.service(Service::default());
            world.set(index, &[endpoint]);
            world.frontend_as(index, at(any), TCP, scope::NODE_PORT, kind::NODE_PORT);
            let node = SocketAddr::new(ip.parse().unwrap(), 30080);
            let refused = ask(node).unwrap_err().kind();
            assert_eq!(refused, ErrorKind::ConnectionRefused, "not an address of the node yet");
            world.maps.put_node_address(&address(node.ip()), node_address::NODE_PORTS).unwrap();
            assert_eq!(ask(node).unwrap(), endpoint.port());
            // These sockets are not of the namespace in the settings: a Pod's, whose loopback is its own.
            let flags = node_address::NODE_PORTS | node_address::NODE_ONLY;
            world.maps.put_node_address(&address(node.ip()), flags).unwrap();
            assert_eq!(ask(node).unwrap_err().kind(), ErrorKind::ConnectionRefused);
        }
    });
}

/// Endpoint sets flip between disjoint ones as fast as they can be written, under connections: each lands in the
/// old or the new set. Runs are overwritten after 30 flips, so that rereading is seen too.
#[test]
fn flipping_sets_never_fails_a_connection() {
    run("flipping_sets_never_fails_a_connection", |world| {
        const CONNECTIONS: usize = 4000;
        let sets = [(); 2].map(|()| [(); 3].map(|()| tcp_server("127.0.0.1")));
        let known: BTreeSet<_> = sets.iter().flat_map(|set| ports(set)).collect();
        world.slots.end = 91;
        let index = service_with(world, "10.96.0.1:80", TCP, &sets[0]);
        let left = AtomicUsize::new(CONNECTIONS);
        let flips = thread::scope(|scope| {
            let clients: Vec<_> = (0..2)
                .map(|_| {
                    scope.spawn(|| {
                        let mut hit = BTreeSet::new();
                        while left
                            .fetch_update(Ordering::Relaxed, Ordering::Relaxed, |n| n.checked_sub(1))
                            .is_ok()
                        {
                            hit.insert(ask(at("10.96.0.1:80")).unwrap());
                        }
                        hit
                    })
                })
                .collect();
            let mut flips = 0_usize;
            while left.load(Ordering::Relaxed) > 0 && flips < 100_000 {
                flips += 1;
                world.set(index, &sets[flips % 2]);
                thread::sleep(Duration::from_micros(100));
            }
            let hit: BTreeSet<_> = clients.into_iter().flat_map(|client| client.join().unwrap()).collect();
            assert_eq!(hit, known, "all endpoints of both sets, and only those");
            flips
        });
        assert!(flips > 10);
        assert_eq!(world.count(Event::NoEndpoint) + world.count(Event::Torn), 0);
        eprintln!("{flips} flips under {CONNECTIONS} connections, {} read again", world.count(Event::Reread));
    });
}

#[test]
fn programs_are_exchanged_and_removed() {
    run("programs_are_exchanged_and_removed", |world| {
        let endpoint = tcp_server("127.0.0.1");
        service_with(world, "10.96.0.1:80", TCP, &[endpoint]);
        assert_eq!(ask(at("10.96.0.1:80")).unwrap(), endpoint.port());
        // As a new process does: finds the maps, exchanges the programs.
        let maps = load(&world.options).unwrap();
        assert_eq!(maps.frontends().unwrap().len(), 1);
        assert_eq!(ask(at("10.96.0.1:80")).unwrap(), endpoint.port());
        assert_eq!(world.count(Event::Balanced), 2, "both count in the same map");
        let stream = TcpStream::connect(at("10.96.0.1:80")).unwrap();

        remove(&world.options).unwrap();
        remove(&world.options).unwrap();
        assert_eq!(ask(at("10.96.0.1:80")).unwrap_err().kind(), ErrorKind::NetworkUnreachable);
        assert_eq!(stream.peer_addr().unwrap(), endpoint, "the connection goes on, without its mask");
    });
}
