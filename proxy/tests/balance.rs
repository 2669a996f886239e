//! Which endpoint takes a request, seen by real endpoints: shares, load, ejection, and what
//! of it survives a publish.
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "tests say what they expect by panicking")]

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::sync::{Arc, Condvar, Mutex};
use std::time::Duration;

use lockgate_proxy::Config;
use lockgate_proxy::config::Timeouts;
use lockgate_proxy::endpoint::Ejection;
use lockgate_proxy::table::{Balance, Host, HostPattern, PathMatch, RoutingTable, UpstreamProtocol};
use tokio::time::Instant;

#[path = "support/toy.rs"]
mod toy;
#[path = "support/wire.rs"]
mod wire;

use toy::PATIENCE;
use wire::{Plain, Wire, ok};

/// An endpoint that counts, holds requests back until told, and breaks on demand.
#[derive(Clone)]
struct Station {
    address: SocketAddr,
    shared: Arc<(Mutex<State>, Condvar)>,
}

#[derive(Default)]
struct State {
    /// Requests that arrived, broken ones included.
    arrived: usize,
    /// Of those, held requests not yet let go.
    held: usize,
    /// Connections open.
    open: usize,
    /// While true, `/hold` waits.
    closed: bool,
    /// While true, every request is answered by hanging up.
    broken: bool,
}

impl Station {
    fn new() -> Station {
        let shared = Arc::new((Mutex::new(State { closed: true, ..State::default() }), Condvar::new()));
        let theirs = shared.clone();
        let address = toy::endpoint(move |stream| {
            let station = Station { address: stream.local_addr().unwrap(), shared: theirs.clone() };
            station.change(|state| state.open += 1);
            let _ = station.serve(stream);
            station.change(|state| state.open -= 1);
        });
        Station { address, shared }
    }

    fn serve(&self, stream: TcpStream) -> std::io::Result<()> {
        stream.set_read_timeout(None)?;
        let mut wire = Wire::new(stream);
        let name = self.address.to_string();
        while let Some(request) = wire.receive()? {
            self.change(|state| state.arrived += 1);
            if self.look(|state| state.broken) {
                return Ok(());
            }
            let answer = ok(name.as_bytes());
            let (now, later) = match request.head.split(' ').nth(1) {
                Some("/hold/head") => (0, answer.len()),
                Some("/hold/body") => (answer.len() - 4, answer.len()),
                Some("/hold/tunnel") => return self.tunnel(wire.stream, &name),
                _ => (answer.len(), answer.len()),
            };
            wire.stream.write_all(&answer[..now])?;
            if now < later {
                self.hold();
            }
            wire.stream.write_all(&answer[now..later])?;
        }
        Ok(())
    }

    /// Switches protocols, says its name at the end of the hold, then echoes.
    fn tunnel(&self, mut stream: TcpStream, name: &str) -> std::io::Result<()> {
        stream
            .write_all(b"HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: echo\r\n\r\n")?;
        self.hold();
        stream.write_all(name.as_bytes())?;
        let mut room = [0; 1024];
        loop {
            match stream.read(&mut room)? {
                0 => return Ok(()),
                n => stream.write_all(&room[..n])?,
            }
        }
    }

    fn hold(&self) {
        self.change(|state| state.held += 1);
        self.wait("being let go", |state| !state.closed);
        self.change(|state| state.held -= 1);
    }

    /// Lets held requests go, and those that come.
    fn release(&self) {
        self.change(|state| state.closed = false);
    }

    fn look<T>(&self, look: impl Fn(&State) -> T) -> T {
        look(&self.shared.0.lock().unwrap())
    }

    fn change(&self, change: impl Fn(&mut State)) {
        change(&mut self.shared.0.lock().unwrap());
        self.shared.1.notify_all();
    }

    fn wait(&self, what: &str, until: impl Fn(&State) -> bool) {
        let state = self.shared.0.lock().unwrap();
        let (_state, timeout) =
            self.shared.1.wait_timeout_while(state, PATIENCE, |state| !until(state)).unwrap();
        assert!(!timeout.timed_out(), "waited in vain for {what}");
    }

    fn arrived(&self) -> usize {
        self.look(|state| state.arrived)
    }

    fn held(&self) -> usize {
        self.look(|state| state.held)
    }
}

/// A table that sends everything to `stations` of these weights.
fn table(stations: &[(&Station, u16)], balance: Balance) -> RoutingTable {
    let addresses: Vec<SocketAddr> = stations.iter().map(|(station, _)| station.address).collect();
    let mut table = toy::table(&addresses, UpstreamProtocol::Http1);
    let mut pool = toy::pool(&addresses, UpstreamProtocol::Http1);
    for endpoint in &mut pool.endpoints {
        let weight = stations.iter().find(|(station, _)| station.address == endpoint.address);
        endpoint.weight = weight.unwrap().1;
    }
    pool.balance = balance;
    table.pools.insert(toy::key("default/app:80"), Arc::new(pool));
    table
}

/// The same endpoints behind another pool of another host, of other weights and another balance.
fn rearranged(table: &RoutingTable) -> RoutingTable {
    let mut pool = (*table.pools[&toy::key("default/app:80")]).clone();
    pool.endpoints.iter_mut().for_each(|endpoint| endpoint.weight += 1);
    let mut next = RoutingTable::default();
    next.pools.insert(toy::key("other/name:8080"), Arc::new(pool));
    let rule = toy::rule(PathMatch::StringPrefix("/".into()), "other/name:8080");
    next.hosts.insert(HostPattern::new("a"), Arc::new(Host { rules: vec![rule] }));
    next
}

const GET: &[u8] = b"GET / HTTP/1.1\r\nHost: a\r\n\r\n";

/// Asks `count` times; every answer must be a 200.
fn ask(client: &mut Plain, count: usize) {
    for _ in 0..count {
        let answer = client.ask(GET);
        assert_eq!(answer.status(), 200, "{}", answer.head);
    }
}

/// A request that an endpoint holds back.
struct Held {
    client: Plain,
    /// Which of the stations has it.
    by: usize,
    tunnel: bool,
}

/// Starts a request that will be held, and waits until one of `stations` holds it.
fn hold(address: SocketAddr, path: &str, stations: &[&Station]) -> Held {
    let before: Vec<usize> = stations.iter().map(|s| s.held()).collect();
    let mut client = wire::plain(address);
    let tunnel = path.ends_with("tunnel");
    let upgrade = if tunnel { "Connection: upgrade\r\nUpgrade: echo\r\n" } else { "" };
    client.send(format!("GET {path} HTTP/1.1\r\nHost: a\r\n{upgrade}\r\n").as_bytes());
    let mut by = None;
    await_that("a request to be held", || {
        by = stations.iter().zip(&before).position(|(station, before)| station.held() > *before);
        by.is_some()
    });
    if !path.ends_with("head") {
        // What the endpoint has sent so far has passed the proxy.
        assert_eq!(client.stream.peek(&mut [0]).unwrap(), 1);
    }
    Held { client, by: by.unwrap(), tunnel }
}

impl Held {
    /// Waits for the rest of the answer, which is the name of `station`.
    fn finish(&mut self, station: &Station) {
        let name = station.address.to_string();
        let answer = self.client.receive().unwrap().unwrap();
        if !self.tunnel {
            assert_eq!((answer.status(), answer.text()), (200, name.as_str()));
            return;
        }
        assert_eq!(answer.status(), 101);
        self.exchange(&name, false);
        self.exchange("and it echoes", true);
    }

    /// Through a tunnel: waits for `text`, after saying it if `send`.
    fn exchange(&mut self, text: &str, send: bool) {
        if send {
            self.client.send(text.as_bytes());
        }
        let heard = self.client.exactly(text.len()).unwrap();
        assert_eq!(String::from_utf8_lossy(&heard), text);
    }
}

/// Looks again and again, for what has no event to wait for.
fn await_that(what: &str, mut holds: impl FnMut() -> bool) {
    let deadline = Instant::now() + PATIENCE;
    while !holds() {
        assert!(Instant::now() < deadline, "waited in vain for {what}");
        std::thread::sleep(Duration::from_millis(5));
    }
}

#[test]
fn round_robin_is_exact_and_follows_weights() {
    for weights in [&[1, 1, 1, 1][..], &[1, 2, 5], &[3, 3], &[100, 1]] {
        let stations: Vec<Station> = weights.iter().map(|_| Station::new()).collect();
        let pairs: Vec<_> = stations.iter().zip(weights.iter().copied()).collect();
        let (proxy, _publisher) = toy::start(toy::config(), table(&pairs, Balance::RoundRobin));
        let mut client = wire::plain(proxy.http_addrs()[0]);
        let total: u16 = weights.iter().sum();
        ask(&mut client, 3 * usize::from(total));
        let arrived: Vec<usize> = stations.iter().map(Station::arrived).collect();
        let expected: Vec<usize> = weights.iter().map(|weight| 3 * usize::from(*weight)).collect();
        assert_eq!(arrived, expected, "{weights:?}");
    }
}

/// What a request is doing while it occupies its endpoint.
const OCCUPIED: [&str; 3] = ["/hold/head", "/hold/body", "/hold/tunnel"];

fn in_flight(proxy: &lockgate_proxy::Proxy, station: &Station) -> u32 {
    proxy.live().endpoints.get(station.address, UpstreamProtocol::Http1).in_flight()
}

#[test]
fn least_request_counts_a_request_until_it_has_ended() {
    for path in OCCUPIED {
        let [a, b] = [Station::new(), Station::new()];
        let (proxy, _publisher) =
            toy::start(toy::config(), table(&[(&a, 1), (&b, 1)], Balance::LeastRequest));
        let address = proxy.http_addrs()[0];
        let mut held: Vec<Held> = (0..6).map(|_| hold(address, path, &[&a, &b])).collect();
        assert_eq!((a.held(), b.held()), (3, 3), "{path}");

        // With one side free again it takes the next ones.
        a.release();
        held.iter_mut().filter(|held| held.by == 0).for_each(|held| held.finish(&a));
        held.retain(|held| held.by == 1);
        await_that(path, || (in_flight(&proxy, &a), in_flight(&proxy, &b)) == (0, 3));
        let before = b.arrived();
        ask(&mut wire::plain(address), 10);
        assert_eq!(b.arrived(), before, "{path}: the busy one was asked");

        b.release();
        held.iter_mut().for_each(|held| held.finish(&b));
        drop(held);
        await_that(path, || in_flight(&proxy, &b) == 0);
    }
}

#[test]
fn least_request_is_by_weight() {
    let [a, b] = [Station::new(), Station::new()];
    let (proxy, _publisher) = toy::start(toy::config(), table(&[(&a, 1), (&b, 3)], Balance::LeastRequest));
    let _held: Vec<Held> = (0..12).map(|_| hold(proxy.http_addrs()[0], "/hold/head", &[&a, &b])).collect();
    assert_eq!((a.held(), b.held()), (3, 9));
}

#[test]
fn load_survives_a_publish() {
    for path in OCCUPIED {
        let [a, b] = [Station::new(), Station::new()];
        let (proxy, mut publisher) = toy::start(toy::config(), table(&[(&a, 1)], Balance::LeastRequest));
        let address = proxy.http_addrs()[0];
        let mut held: Vec<Held> = (0..3).map(|_| hold(address, path, &[&a])).collect();

        let both = table(&[(&a, 1), (&b, 1)], Balance::LeastRequest);
        for table in [both.clone(), rearranged(&both), both] {
            publisher.publish(table);
            await_that(path, || (in_flight(&proxy, &a), in_flight(&proxy, &b)) == (3, 0));
            let before = a.arrived();
            ask(&mut wire::plain(address), 10);
            assert_eq!(a.arrived(), before, "{path}: the busy one was asked");
        }
        a.release();
        held.iter_mut().for_each(|held| held.finish(&a));
        drop(held);
        await_that(path, || in_flight(&proxy, &a) == 0);
    }
}

fn ejecting(base_ms: u64) -> Config {
    let ejection = Ejection { consecutive: 3, base_ms, max_ms: 300_000 };
    Config { ejection, ..toy::config() }
}

#[test]
fn an_endpoint_that_keeps_failing_is_left_alone_and_comes_back() {
    for balance in [Balance::RoundRobin, Balance::LeastRequest] {
        let [a, b] = [Station::new(), Station::new()];
        let (proxy, _publisher) = toy::start(ejecting(100), table(&[(&a, 1), (&b, 1)], balance));
        let mut client = wire::plain(proxy.http_addrs()[0]);
        a.change(|state| state.broken = true);
        // The client sees none of it.
        await_that("the ejection", || {
            ask(&mut client, 10);
            proxy.metrics().encode().contains("lockgate_endpoint_ejections_total 1\n")
        });
        a.change(|state| state.broken = false);
        let before = a.arrived();
        await_that("its return", || {
            ask(&mut client, 10);
            a.arrived() > before
        });
    }
}

#[test]
fn an_endpoint_that_refuses_connections_is_left_alone() {
    let b = Station::new();
    let refusing = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let table = toy::table(&[refusing, b.address], UpstreamProtocol::Http1);
    let (proxy, _publisher) = toy::start(ejecting(600_000), table);
    ask(&mut wire::plain(proxy.http_addrs()[0]), 100);
    let metrics = proxy.metrics().encode();
    assert!(metrics.contains("lockgate_upstream_connections_total{result=\"failed\"} 3\n"), "{metrics}");
}

/// Better a doubtful endpoint than none.
#[test]
fn when_all_are_left_alone_they_are_asked_all_the_same() {
    let [a, b] = [Station::new(), Station::new()];
    let (proxy, _publisher) = toy::start(ejecting(600_000), table(&[(&a, 1), (&b, 1)], Balance::RoundRobin));
    let mut client = wire::plain(proxy.http_addrs()[0]);
    for station in [&a, &b] {
        station.change(|state| state.broken = true);
    }
    await_that("both ejections", || {
        assert_eq!(client.ask(GET).status(), 502);
        proxy.metrics().encode().contains("lockgate_endpoint_ejections_total 2\n")
    });
    for station in [&a, &b] {
        station.change(|state| state.broken = false);
    }
    ask(&mut client, 10);
}

#[test]
fn an_ejection_survives_a_publish() {
    let [a, b] = [Station::new(), Station::new()];
    let both = table(&[(&a, 1), (&b, 1)], Balance::RoundRobin);
    let (proxy, mut publisher) = toy::start(ejecting(600_000), both.clone());
    let mut client = wire::plain(proxy.http_addrs()[0]);
    a.change(|state| state.broken = true);
    ask(&mut client, 20);
    a.change(|state| state.broken = false);
    let before = a.arrived();
    for table in [rearranged(&both), both.clone(), rearranged(&both)] {
        publisher.publish(table);
        ask(&mut client, 20);
        assert_eq!(a.arrived(), before, "an ejected endpoint was asked");
    }
}

#[test]
fn a_terminating_endpoint_finishes_what_it_has() {
    for path in OCCUPIED {
        let [a, b] = [Station::new(), Station::new()];
        let (proxy, mut publisher) = toy::start(toy::config(), table(&[(&a, 1)], Balance::RoundRobin));
        let address = proxy.http_addrs()[0];
        let mut client = wire::plain(address);
        ask(&mut client, 1);
        let mut held = hold(address, path, &[&a]);
        let before = a.arrived();

        publisher.publish(table(&[(&b, 1)], Balance::RoundRobin));
        ask(&mut client, 10);
        ask(&mut wire::plain(address), 10);
        assert_eq!((a.arrived(), b.arrived()), (before, 20), "{path}: a new request went there");

        a.release();
        held.finish(&a);
        drop(held);
        assert_eq!(a.arrived(), before, "{path}");
        // A generation is let go once the last request that saw it has ended.
        await_that("its connections to be closed", || {
            publisher.collect();
            a.look(|state| state.open == 0)
        });
    }
}

/// Two workers know the endpoint: neither may wait for the other to forget it first.
#[test]
fn what_no_table_names_is_forgotten_by_every_worker() {
    let [a, b] = [Station::new(), Station::new()];
    let timeouts = Timeouts { idle_upstream: Duration::from_secs(3600), ..Timeouts::default() };
    let config = Config { workers: 2, timeouts, ..toy::config() };
    let (proxy, mut publisher) = toy::start(config, table(&[(&a, 1)], Balance::RoundRobin));
    let address = proxy.http_addrs()[0];
    // The kernel spreads them over both workers.
    let mut clients: Vec<Plain> = (0..32).map(|_| wire::plain(address)).collect();
    clients.iter_mut().for_each(|client| ask(client, 1));
    let id = proxy.live().endpoints.get(a.address, UpstreamProtocol::Http1).id;

    publisher.publish(table(&[(&b, 1)], Balance::RoundRobin));
    clients.iter_mut().for_each(|client| ask(client, 1));
    assert_eq!(b.arrived(), 32);
    await_that("the last generation to be let go", || {
        publisher.collect();
        proxy.live().endpoints.get(a.address, UpstreamProtocol::Http1).id != id
    });
    a.wait("its connections to be closed", |state| state.open == 0);
    assert!(b.look(|state| state.open) > 0, "those that are named are kept");
}
