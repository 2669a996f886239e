//! The hooks of packets at a real device: a client outside the node, on the other end of a veth pair.
#![allow(clippy::unwrap_used, reason = "a test says what it expects by panicking")]

#[allow(dead_code, reason = "every test file uses its own part of this")]
#[path = "support/inside.rs"]
mod inside;

use std::io::{ErrorKind, Read};
use std::net::{SocketAddr, TcpStream, UdpSocket};
use std::os::fd::AsRawFd;
use std::process::Command;
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::thread;
use std::time::Duration;

use lockgate_ebpf::load::Device;
use lockgate_ebpf_common::protocol::{TCP, UDP};
use lockgate_ebpf_common::{Event, Service, Settings, kind, node_address, scope, service};
use rustix::thread::{UnshareFlags, gettid, unshare_unsafe};

use inside::{World, address, run, tcp_server, udp_server};

/// Node port, load balancer's address, address of the node, of a family.
const FAMILIES: [[&str; 4]; 2] = [
    ["192.168.50.1:30080", "198.51.100.7:80", "192.168.50.1", "0.0.0.0:30080"],
    ["[fd00:50::1]:30080", "[2001:db8:1::7]:80", "fd00:50::1", "[::]:30080"],
];

fn ip(commands: &str) {
    for command in commands.lines().map(str::trim).filter(|command| !command.is_empty()) {
        let status = Command::new("ip").args(command.split(' ')).status().unwrap();
        assert!(status.success(), "ip {command}");
    }
}

/// linux/socket.h; the same on x86-64 and aarch64.
const SO_NETNS_COOKIE: i32 = 71;

/// A thread in a network namespace of its own, joined to this one by `up0`.
struct Outside {
    ask: SyncSender<(u8, SocketAddr)>,
    answers: Receiver<std::io::Result<u16>>,
    /// Of its namespace.
    cookie: u64,
}

impl Outside {
    fn new() -> Self {
        let (ready, is_ready) = sync_channel(1);
        let (connected, is_connected) = sync_channel(1);
        let (ask, asked) = sync_channel::<(u8, SocketAddr)>(1);
        let (answer, answers) = sync_channel(1);
        thread::spawn(move || {
            // SAFETY: changes this thread alone; descriptors stay as they are.
            unsafe { unshare_unsafe(UnshareFlags::NEWNET) }.unwrap();
            ready.send((gettid(), namespace_cookie())).unwrap();
            is_connected.recv().unwrap();
            ip("addr add 192.168.50.9/24 dev ext0
                addr add fd00:50::9/64 dev ext0 nodad
                link set ext0 up
                route add 198.51.100.0/24 via 192.168.50.1
                route add 2001:db8:1::/64 via fd00:50::1");
            for (protocol, to) in asked {
                let _ = answer.send(if protocol == TCP { tcp(to) } else { udp(to) });
            }
        });
        let (thread, cookie) = is_ready.recv().unwrap();
        let thread = thread.as_raw_nonzero();
        ip(&format!(
            "link add up0 type veth peer name ext0 netns {thread}
             addr add 192.168.50.1/24 dev up0
             addr add fd00:50::1/64 dev up0 nodad
             link set up0 up"
        ));
        connected.send(()).unwrap();
        Self { ask, answers, cookie }
    }

    /// Which endpoint answers.
    fn ask(&self, protocol: u8, to: SocketAddr) -> std::io::Result<u16> {
        self.ask.send((protocol, to)).unwrap();
        self.answers.recv().unwrap()
    }
}

fn tcp(to: SocketAddr) -> std::io::Result<u16> {
    let mut port = [0; 2];
    TcpStream::connect_timeout(&to, Duration::from_secs(10))?.read_exact(&mut port)?;
    Ok(u16::from_be_bytes(port))
}

fn udp(to: SocketAddr) -> std::io::Result<u16> {
    // Connected: takes an answer from nobody else.
    let socket = UdpSocket::bind((if to.is_ipv4() { "0.0.0.0" } else { "::" }, 0))?;
    socket.set_read_timeout(Some(Duration::from_secs(10)))?;
    socket.connect(to)?;
    socket.send(b"?")?;
    let mut port = [0; 2];
    socket.recv(&mut port)?;
    Ok(u16::from_be_bytes(port))
}

fn namespace_cookie() -> u64 {
    let socket = UdpSocket::bind("0.0.0.0:0").unwrap();
    let (mut cookie, mut length) = (0_u64, size_of::<u64>() as u32);
    // SAFETY: the kernel writes at most `length` bytes, which is what `cookie` has.
    let result = unsafe {
        let value = (&raw mut cookie).cast();
        libc::getsockopt(socket.as_raw_fd(), libc::SOL_SOCKET, SO_NETNS_COOKIE, value, &raw mut length)
    };
    assert_eq!(result, 0);
    cookie
}

/// Its index; the first word `ip` says of it.
fn device(name: &str) -> u32 {
    let output = Command::new("ip").args(["-o", "link", "show", name]).output().unwrap();
    let text = String::from_utf8(output.stdout).unwrap();
    text.split(':').next().unwrap().parse().unwrap()
}

fn serve(world: &mut World, endpoint: SocketAddr, protocol: u8, [_, vip, _, any]: [&str; 4]) -> u32 {
    // The client's address stays: nothing here masquerades.
    let index = world.service(Service { flags: service::EXTERNAL_LOCAL, ..Service::default() });
    world.local_set(index, &[endpoint]);
    world.frontend_as(index, any.parse().unwrap(), protocol, scope::NODE_PORT, kind::NODE_PORT);
    world.frontend_as(index, vip.parse().unwrap(), protocol, scope::ADDRESS, kind::LOAD_BALANCER);
    index
}

#[test]
fn a_client_outside_reaches_an_endpoint() {
    run("a_client_outside_reaches_an_endpoint", |world| {
        let outside = Outside::new();
        // In the cgroup of the test, its sockets would be balanced themselves.
        world.maps.opt_out(outside.cookie).unwrap();
        let settings = Settings { node_port_first: 30000, node_port_last: 32767, ..Settings::default() };
        world.maps.put_settings(&settings).unwrap();
        let up0 = device("up0");
        world.programs.attach(up0, Device::Uplink).unwrap();
        // Again, as a new process does.
        world.programs.attach(up0, Device::Uplink).unwrap();
        assert_eq!(world.programs.devices().unwrap(), [up0]);
        for family in FAMILIES {
            let [node_port, vip, node, _] = family;
            world.maps.put_node_address(&address(node.parse().unwrap()), node_address::NODE_PORTS).unwrap();
            for protocol in [TCP, UDP] {
                let endpoint = if protocol == TCP { tcp_server(node) } else { udp_server(node) };
                serve(world, endpoint, protocol, family);
                for to in [node_port, vip] {
                    for _ in 0..8 {
                        let hit = outside.ask(protocol, to.parse().unwrap());
                        let events = world.maps.events().unwrap();
                        assert_eq!(hit.ok(), Some(endpoint.port()), "{protocol} {to} {events:?}");
                    }
                }
            }
        }
        assert_eq!(world.count(Event::Balanced), 64);
        assert_eq!(world.count(Event::Rewrite), 0);
        world.programs.detach(up0).unwrap();
        assert!(world.programs.devices().unwrap().is_empty());
        let refused = outside.ask(TCP, FAMILIES[0][0].parse().unwrap()).unwrap_err().kind();
        assert_eq!(refused, ErrorKind::ConnectionRefused, "nobody is there");
    });
}
