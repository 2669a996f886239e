//! Active health checks against real endpoints: what they are asked, who is taken out, who
//! comes back, and that nobody is asked twice.
#![allow(clippy::unwrap_used, reason = "a test says what it expects by panicking")]

use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering::SeqCst};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use lockgate_proxy::Proxy;
use lockgate_proxy::table::{HealthCheck, Pool, Probe, RoutingTable, UpstreamProtocol};

#[path = "support/peers.rs"]
mod peers;
#[path = "support/toy.rs"]
mod toy;
#[path = "support/wire.rs"]
mod wire;

const APP: &str = "default/app:80";

/// An endpoint that says who it is, and answers `/healthz` as it feels.
#[derive(Clone)]
struct Patient {
    address: SocketAddr,
    ill: Arc<AtomicBool>,
    probes: Arc<AtomicUsize>,
    last: Arc<Mutex<String>>,
}

impl Patient {
    fn new() -> Patient {
        let (ill, probes, last): (Arc<AtomicBool>, Arc<AtomicUsize>, Arc<Mutex<String>>) = Default::default();
        let (theirs, counted, heard) = (ill.clone(), probes.clone(), last.clone());
        let address = wire::answers(move |request| {
            if !request.head.starts_with("GET /healthz ") {
                return wire::ok(b"served");
            }
            counted.fetch_add(1, SeqCst);
            *heard.lock().unwrap() = request.head.clone();
            match theirs.load(SeqCst) {
                true => b"HTTP/1.1 503 Ill\r\nContent-Length: 0\r\n\r\n".to_vec(),
                false => wire::ok(b"well"),
            }
        });
        Patient { address, ill, probes, last }
    }
}

fn check(probe: Probe) -> HealthCheck {
    let timeout = Duration::from_secs(5);
    HealthCheck { probe, interval: Duration::from_millis(20), timeout, healthy: 2, unhealthy: 2 }
}

fn http() -> HealthCheck {
    check(Probe::Http { path: "/healthz".into(), host: Some("check.example".into()) })
}

fn table(endpoints: &[SocketAddr], check: Option<HealthCheck>) -> RoutingTable {
    let mut table = toy::table(endpoints, UpstreamProtocol::Http1);
    table.pools.insert(toy::key(APP), pool(endpoints, UpstreamProtocol::Http1, check));
    table
}

fn pool(endpoints: &[SocketAddr], protocol: UpstreamProtocol, check: Option<HealthCheck>) -> Arc<Pool> {
    Arc::new(Pool { check: check.map(Arc::new), ..toy::pool(endpoints, protocol) })
}

/// Waits until the endpoint is up or down.
fn await_state(proxy: &Proxy, address: SocketAddr, protocol: UpstreamProtocol, up: bool) {
    let live = proxy.live().endpoints.get(address, protocol);
    await_that("a change of state", || live.is_up() == up);
}

/// Looks again and again, for what has no event to wait for.
fn await_that(what: &str, mut holds: impl FnMut() -> bool) {
    let deadline = tokio::time::Instant::now() + toy::PATIENCE;
    while !holds() {
        assert!(tokio::time::Instant::now() < deadline, "waited in vain for {what}");
        std::thread::sleep(Duration::from_millis(5));
    }
}

const GET: &[u8] = b"GET / HTTP/1.1\r\nHost: a\r\n\r\n";

#[test]
fn an_endpoint_that_fails_its_check_is_taken_out_and_comes_back() {
    let patients = [Patient::new(), Patient::new()];
    let addresses = patients.each_ref().map(|patient| patient.address);
    let (proxy, mut publisher) = toy::start(toy::config(), table(&addresses, Some(http())));
    let mut client = wire::plain(proxy.http_addrs()[0]);
    await_that("the first probes", || patients.iter().all(|p| p.probes.load(SeqCst) > 0));
    let head = patients[0].last.lock().unwrap().clone();
    assert!(
        head.contains("\r\nHost: check.example\r\n") && head.contains("\r\nConnection: close\r\n"),
        "{head}"
    );

    let served = |address| proxy.live().endpoints.get(address, UpstreamProtocol::Http1);
    patients[0].ill.store(true, SeqCst);
    await_state(&proxy, addresses[0], UpstreamProtocol::Http1, false);
    for _ in 0..20 {
        assert_eq!(client.ask(GET).status(), 200);
    }
    assert!(served(addresses[1]).is_up());
    // What was found holds in the next table, and for every pool that names the address.
    let mut next = table(&addresses, Some(http()));
    next.pools.insert(toy::key("other/app:80"), pool(&addresses, UpstreamProtocol::Http1, None));
    publisher.publish(next);
    assert!(!served(addresses[0]).is_up());

    // When all are down all are used.
    patients[1].ill.store(true, SeqCst);
    await_state(&proxy, addresses[1], UpstreamProtocol::Http1, false);
    assert_eq!(client.ask(GET).status(), 200);

    patients.iter().for_each(|patient| patient.ill.store(false, SeqCst));
    for address in addresses {
        await_state(&proxy, address, UpstreamProtocol::Http1, true);
    }
}

#[test]
fn an_endpoint_that_is_no_longer_checked_counts_as_up() {
    let patient = Patient::new();
    let (proxy, mut publisher) = toy::start(toy::config(), table(&[patient.address], Some(http())));
    patient.ill.store(true, SeqCst);
    await_state(&proxy, patient.address, UpstreamProtocol::Http1, false);
    publisher.publish(table(&[patient.address], None));
    await_state(&proxy, patient.address, UpstreamProtocol::Http1, true);
    let probes = patient.probes.load(SeqCst);
    let mut client = wire::plain(proxy.http_addrs()[0]);
    for _ in 0..20 {
        assert_eq!(client.ask(GET).status(), 200);
    }
    // One may have been under way.
    assert!(patient.probes.load(SeqCst) <= probes + 1);
}

#[test]
fn a_probe_by_tcp_wants_a_connection_only() {
    let listening = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let gone = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let addresses = [listening.local_addr().unwrap(), gone];
    let (proxy, _publisher) = toy::start(toy::config(), table(&addresses, Some(check(Probe::Tcp))));
    await_state(&proxy, gone, UpstreamProtocol::Http1, false);
    listening.accept().unwrap();
    assert!(proxy.live().endpoints.get(addresses[0], UpstreamProtocol::Http1).is_up());
}

#[test]
fn an_endpoint_that_does_not_answer_in_time_fails() {
    let silent = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let address = silent.local_addr().unwrap();
    let check = HealthCheck { timeout: Duration::from_millis(100), ..http() };
    let (proxy, _publisher) =
        toy::start(toy::config(), table(&[address, Patient::new().address], Some(check)));
    await_state(&proxy, address, UpstreamProtocol::Http1, false);
}

/// Two pools name one address: it is asked once in an interval, as the first of them wants.
#[test]
fn an_address_is_probed_once() {
    let patient = Patient::new();
    let mut table = table(&[patient.address], Some(http()));
    let unlike = HealthCheck { unhealthy: 1_000, ..check(Probe::Http { path: "/other".into(), host: None }) };
    table.pools.insert(toy::key("z/z:80"), pool(&[patient.address], UpstreamProtocol::Http1, Some(unlike)));
    let (proxy, _publisher) = toy::start(toy::config(), table);
    patient.ill.store(true, SeqCst);
    await_state(&proxy, patient.address, UpstreamProtocol::Http1, false);
}

#[tokio::test(flavor = "multi_thread")]
async fn endpoints_are_asked_in_what_they_speak() {
    for speaks in peers::EVERY_ENDPOINT {
        let endpoint = peers::endpoint(speaks, peers::app).await;
        for (path, up) in [("/bytes/10", true), ("/status/503", false)] {
            let check = check(Probe::Http { path: path.into(), host: None });
            let mut table = toy::table(&[endpoint], speaks);
            // Starts as the opposite of what it is to become.
            let (proxy, mut publisher) = toy::start(toy::config(), table.clone());
            let live = proxy.live().endpoints.get(endpoint, speaks);
            live.set_up(!up, 0);
            table.pools.insert(toy::key(APP), pool(&[endpoint], speaks, Some(check)));
            publisher.publish(table);
            peers::until(|| live.is_up() == up).await;
        }
    }
}
