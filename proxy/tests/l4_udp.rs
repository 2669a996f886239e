//! UDP ports: a flow for each client, bounded in number and time, and endpoints that refuse.
#![allow(clippy::unwrap_used, reason = "a test says what it expects by panicking")]

#[path = "support/ports.rs"]
mod ports;

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use lockgate_proxy::config::{Config, L4Options};
use lockgate_proxy::handover::{UpgradeSocket, inherit};
use lockgate_proxy::table::{ListenerKey, PoolKey, RoutingTable, Transport};
use ports::{Gate, config, key, pool, soon, table, with};
use tokio::net::UdpSocket;

/// Answers each datagram `answers` times, with its name, who asked, and what; for as long as this lives.
struct Endpoint {
    address: SocketAddr,
    task: tokio::task::JoinHandle<()>,
}

impl Endpoint {
    async fn start(name: &'static str, answers: usize) -> Endpoint {
        let socket = UdpSocket::bind("127.0.0.1:0").await.unwrap();
        let address = socket.local_addr().unwrap();
        let task = tokio::spawn(async move {
            let mut datagram = vec![0; 65_536];
            loop {
                let (length, from) = socket.recv_from(&mut datagram).await.unwrap();
                let mut answer = format!("{name} {} ", from.port()).into_bytes();
                answer.extend_from_slice(&datagram[..length.min(60_000)]);
                for _ in 0..answers {
                    socket.send_to(&answer, from).await.unwrap();
                }
            }
        });
        Endpoint { address, task }
    }

    /// Gone, and its port refuses.
    async fn stop(self) -> SocketAddr {
        self.task.abort();
        let _ = self.task.await;
        self.address
    }
}

async fn client(to: SocketAddr) -> UdpSocket {
    let socket = UdpSocket::bind("127.0.0.1:0").await.unwrap();
    socket.connect(to).await.unwrap();
    socket
}

async fn receive(client: &UdpSocket) -> String {
    let mut datagram = vec![0; 65_536];
    let length = soon(client.recv(&mut datagram)).await.unwrap();
    String::from_utf8(datagram[..length].to_vec()).unwrap()
}

async fn ask(client: &UdpSocket, text: &str) -> String {
    client.send(text.as_bytes()).await.unwrap();
    receive(client).await
}

/// Which socket of the proxy the endpoint saw: tells flows apart.
fn flow(answer: &str) -> &str {
    answer.split(' ').nth(1).unwrap()
}

fn udp(n: u8) -> ListenerKey {
    key(Transport::Udp, n)
}

#[tokio::test(flavor = "multi_thread")]
async fn each_client_has_a_flow_of_its_own_and_gets_its_own_answers() {
    let endpoint = Endpoint::start("here", 1).await;
    let config = Config { workers: 2, ..with(L4Options { udp_responses: 0, ..L4Options::default() }) };
    let (gate, port) = Gate::with(config, table(Transport::Udp, &[endpoint.address])).await;
    let (mut flows, mut clients) = (std::collections::HashSet::new(), Vec::new());
    for n in 0..50 {
        let client = client(port).await;
        let first = ask(&client, &format!("from {n}")).await;
        assert!(first.ends_with(&format!(" from {n}")), "{first}");
        let again = ask(&client, &format!("again from {n}")).await;
        assert_eq!(flow(&first), flow(&again));
        flows.insert(flow(&first).to_owned());
        // Kept, so that the next one cannot have its port, and with it its flow.
        clients.push(client);
    }
    assert_eq!(flows.len(), 50);
    gate.counts(Transport::Udp, 50, |slot| slot.opened.value()).await;
    gate.counts(Transport::Udp, 100, |slot| slot.datagrams_in.value()).await;
    gate.counts(Transport::Udp, 100, |slot| slot.datagrams_out.value()).await;
}

#[tokio::test]
async fn datagrams_keep_their_bounds_whatever_their_size() {
    let endpoint = Endpoint::start("e", 1).await;
    let (_gate, port) = Gate::to(Transport::Udp, &[endpoint.address]).await;
    let client = client(port).await;
    for size in [0, 1, 512, 1472, 9_000, 60_000] {
        let answer = ask(&client, &"x".repeat(size)).await;
        assert_eq!(answer.len() - "e 12345 ".len(), size + flow(&answer).len() - 5, "{size}");
    }
}

#[tokio::test]
async fn an_endpoint_that_refuses_costs_the_client_nothing() {
    let dead = Endpoint::start("dead", 1).await.stop().await;
    let endpoint = Endpoint::start("alive", 1).await;
    let (gate, port) = Gate::to(Transport::Udp, &[dead, endpoint.address]).await;
    for n in 0..10 {
        let answer = ask(&client(port).await, &n.to_string()).await;
        assert!(answer.starts_with("alive ") && answer.ends_with(&format!(" {n}")), "{answer}");
    }
    assert_eq!(gate.count(Transport::Udp, |slot| slot.failed.value()), 0);
}

#[tokio::test]
async fn a_flow_moves_on_when_its_endpoint_is_gone() {
    let (first, second) = (Endpoint::start("first", 1).await, Endpoint::start("second", 1).await);
    let config = with(L4Options { udp_responses: 0, ..L4Options::default() });
    let (mut gate, port) = Gate::with(config, table(Transport::Udp, &[first.address])).await;
    let client = client(port).await;
    assert!(ask(&client, "1").await.starts_with("first "));
    let name = PoolKey(udp(1).to_string().as_str().into());
    let both = pool(Transport::Udp, &[first.address, second.address]);
    gate.table.pools.insert(name, Arc::new(both));
    gate.publish();
    assert!(ask(&client, "2").await.starts_with("first "), "a flow keeps its endpoint");
    first.stop().await;
    // The datagram that learns of it is lost with the endpoint; the next one begins a new flow.
    soon(async {
        let mut answer = vec![0; 100];
        loop {
            client.send(b"3").await.unwrap();
            let received = tokio::time::timeout(Duration::from_millis(50), client.recv(&mut answer)).await;
            if let Ok(length) = received {
                assert!(answer[..length.unwrap()].starts_with(b"second "));
                return;
            }
        }
    })
    .await;
}

#[tokio::test]
async fn without_an_endpoint_datagrams_are_dropped_and_counted() {
    let dead = Endpoint::start("dead", 1).await.stop().await;
    for endpoints in [vec![], vec![dead]] {
        let (gate, port) = Gate::to(Transport::Udp, &endpoints).await;
        client(port).await.send(b"anyone?").await.unwrap();
        gate.counts(Transport::Udp, 1, |slot| slot.failed.value()).await;
        gate.counts(Transport::Udp, 1, |slot| slot.dropped.value()).await;
        gate.counts(Transport::Udp, 0, |slot| slot.open.value() as u64).await;
    }
}

#[tokio::test]
async fn the_flow_that_has_been_silent_longest_makes_room() {
    let endpoint = Endpoint::start("e", 1).await;
    let l4 = L4Options { udp_flows: 3, udp_responses: 0, ..L4Options::default() };
    let (gate, port) = Gate::with(with(l4), table(Transport::Udp, &[endpoint.address])).await;
    let mut clients = Vec::new();
    let mut flows = Vec::new();
    for n in 0..3 {
        let client = client(port).await;
        flows.push(flow(&ask(&client, &n.to_string()).await).to_owned());
        clients.push(client);
    }
    // The first has just spoken, so the second is the oldest.
    assert_eq!(flow(&ask(&clients[0], "again").await), flows[0]);
    ask(&client(port).await, "one more").await;
    gate.counts(Transport::Udp, 1, |slot| slot.evicted.value()).await;
    gate.counts(Transport::Udp, 3, |slot| slot.open.value() as u64).await;
    assert_eq!(flow(&ask(&clients[0], "still").await), flows[0]);
    assert_eq!(flow(&ask(&clients[2], "still").await), flows[2]);
    assert_ne!(flow(&ask(&clients[1], "anew").await), flows[1]);
}

#[tokio::test]
async fn a_flow_with_all_its_answers_is_the_first_to_make_room_and_soon_gone() {
    let endpoint = Endpoint::start("e", 2).await;
    let linger = Duration::from_millis(100);
    let l4 = L4Options { udp_flows: 2, udp_responses: 1, udp_linger: linger, ..L4Options::default() };
    let (gate, port) = Gate::with(with(l4), table(Transport::Udp, &[endpoint.address])).await;
    let asked = client(port).await;
    // One answer is expected; the second arrives all the same.
    for _ in 0..2 {
        assert!(ask(&asked, "a").await.starts_with("e "));
        assert!(receive(&asked).await.starts_with("e "));
    }
    for _ in 0..5 {
        ask(&client(port).await, "b").await;
    }
    assert_eq!(gate.count(Transport::Udp, |slot| slot.evicted.value()), 0, "none of them waited");
    gate.counts(Transport::Udp, 0, |slot| slot.open.value() as u64).await;
    assert_eq!(gate.count(Transport::Udp, |slot| slot.idle.value()), 0);
}

#[tokio::test]
async fn a_flow_on_which_nobody_speaks_ends() {
    let silent = Endpoint::start("silent", 0).await;
    let l4 = L4Options { idle: Duration::from_millis(100), ..L4Options::default() };
    let (gate, port) = Gate::with(with(l4), table(Transport::Udp, &[silent.address])).await;
    client(port).await.send(b"log this").await.unwrap();
    gate.counts(Transport::Udp, 1, |slot| slot.opened.value()).await;
    gate.counts(Transport::Udp, 1, |slot| slot.idle.value()).await;
    gate.counts(Transport::Udp, 0, |slot| slot.open.value() as u64).await;
}

#[tokio::test]
async fn flows_live_on_when_their_port_leaves_the_table_and_share_it_when_it_is_back() {
    let endpoint = Endpoint::start("e", 1).await;
    let config = with(L4Options { udp_responses: 0, ..L4Options::default() });
    let (mut gate, port) = Gate::with(config, table(Transport::Udp, &[endpoint.address])).await;
    let early = client(port).await;
    let first = ask(&early, "before").await;

    let before = gate.table.clone();
    gate.table.listeners.clear();
    gate.publish();
    gate.state(udp(1), |state| state.is_none()).await;
    assert_eq!(flow(&ask(&early, "no port at all").await), flow(&first));
    let late = client(port).await;
    let dropped = gate.count(Transport::Udp, |slot| slot.dropped.value());
    late.send(b"am I late?").await.unwrap();
    gate.counts(Transport::Udp, dropped + 1, |slot| slot.dropped.value()).await;

    gate.table = before;
    gate.publish();
    gate.open(udp(1)).await;
    assert_eq!(flow(&ask(&early, "a port again").await), flow(&first));
    // Whether this worker has taken up the news is seen by trying.
    soon(async {
        loop {
            late.send(b"still late?").await.unwrap();
            let mut answer = [0; 100];
            let received = tokio::time::timeout(Duration::from_millis(50), late.recv(&mut answer)).await;
            if received.is_ok() {
                return;
            }
        }
    })
    .await;
}

/// A port that only this test binds.
async fn free_port() -> ListenerKey {
    let address = UdpSocket::bind("127.0.0.77:0").await.unwrap().local_addr().unwrap();
    ListenerKey { transport: Transport::Udp, address }
}

/// New clients, each of which is answered: one datagram that waits where nobody reads would be missed.
async fn answered(key: ListenerKey) -> Vec<UdpSocket> {
    let mut clients = Vec::new();
    for n in 0..32 {
        let client = client(key.address).await;
        assert!(ask(&client, &n.to_string()).await.ends_with(&format!(" {n}")));
        clients.push(client);
    }
    clients
}

/// A chain of processes with more workers and fewer; in each the port leaves and comes back while
/// flows hold its sockets. Every socket of the port is read at any time, by one or the other.
#[tokio::test(flavor = "multi_thread")]
async fn a_port_that_came_back_is_handed_over_with_the_sockets_it_went_on_with() {
    let folder = std::env::temp_dir().join(format!("lockgate-udp-upgrade-{}", std::process::id()));
    std::fs::create_dir_all(&folder).unwrap();
    let path = folder.join("upgrade.sock");
    let (endpoint, key) = (Endpoint::start("e", 1).await, free_port().await);
    let mut table = RoutingTable::default();
    ports::add(&mut table, key, &[endpoint.address]);
    let linger = Duration::from_millis(100);
    let l4 = L4Options { udp_responses: 0, udp_linger: linger, ..L4Options::default() };
    let mut before: Option<(Gate, UpgradeSocket)> = None;
    for workers in [1, 3, 1, 2] {
        let socket = UpgradeSocket::prepare(&path).unwrap();
        let config = Config { workers, ..with(l4.clone()) };
        let starting = async {
            let (inherited, predecessor) = inherit(&path).await.unwrap();
            let gate = Gate::inheriting(config, table.clone(), &inherited);
            gate.open(key).await;
            match predecessor {
                Some(predecessor) => predecessor.relieve(&socket).await.unwrap(),
                None => socket.show().unwrap(),
            }
            gate
        };
        let mut gate = match before {
            None => starting.await,
            Some((old, shown)) => {
                let ((), gate) = tokio::join!(shown.successor(old.proxy.estate()), starting);
                assert!(soon(old.proxy.retire(Duration::from_secs(10))).await);
                gate
            }
        };
        let early = answered(key).await;
        gate.table.listeners.clear();
        gate.publish();
        gate.state(key, |state| state.is_none()).await;
        gate.table = table.clone();
        gate.publish();
        assert_eq!(gate.open(key).await, key.address);
        let late = answered(key).await;
        for client in early.iter().chain(&late) {
            assert!(ask(client, "again").await.ends_with(" again"), "of {workers} workers");
        }
        before = Some((gate, socket));
    }
    drop(before);
    std::fs::remove_dir_all(&folder).unwrap();
}

/// A drain waits for answers that are on their way, and takes nothing new.
#[tokio::test]
async fn a_drain_waits_for_answers_but_not_for_long() {
    let slow = UdpSocket::bind("127.0.0.1:0").await.unwrap();
    let (gate, port) = Gate::to(Transport::Udp, &[slow.local_addr().unwrap()]).await;
    let client = client(port).await;
    client.send(b"take your time").await.unwrap();
    let mut datagram = [0; 100];
    let (_, from) = soon(slow.recv_from(&mut datagram)).await.unwrap();
    let draining = tokio::spawn(gate.proxy.drain());
    tokio::time::sleep(Duration::from_millis(100)).await;
    assert!(!draining.is_finished());
    slow.send_to(b"done", from).await.unwrap();
    assert_eq!(receive(&client).await, "done");
    assert!(soon(draining).await.unwrap());
}

#[tokio::test]
async fn a_port_may_be_one_of_tcp_and_one_of_udp() {
    let endpoint = Endpoint::start("e", 1).await;
    let (mut gate, port) = Gate::with(config(), table(Transport::Udp, &[endpoint.address])).await;
    let same = ListenerKey { transport: Transport::Tcp, address: port };
    ports::add(&mut gate.table, same, &[]);
    gate.publish();
    assert_eq!(gate.open(same).await, port);
    assert!(ask(&client(port).await, "udp").await.ends_with("udp"));
}
