//! An endpoint gets only so much to do; what finds all of them full is answered 503.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

#[path = "support/script.rs"]
mod script;
#[path = "support/toy.rs"]
mod toy;
#[path = "support/wire.rs"]
mod wire;

use std::time::Duration;

use lockgate_proxy::Config;
use lockgate_proxy::resilience::{Breaker, Resilience};

use script::{Act, Script, metric, ruled, status, until};
use toy::{config, start};
use wire::Plain;

const GET: &str = "GET / HTTP/1.1\r\nHost: a\r\n\r\n";
const LONG: Duration = Duration::from_secs(3600);

fn limited(breaker: Breaker) -> Resilience {
    Resilience { breaker: Some(breaker), ..Resilience::default() }
}

/// Requests that are answered when their clients have gone.
fn hold(proxy: &lockgate_proxy::Proxy, endpoints: &[&Script], count: usize) -> Vec<Plain> {
    let sum = || endpoints.iter().map(|e| e.asked()).sum::<usize>();
    let before = sum();
    let held = (0..count)
        .map(|_| {
            let mut client = wire::plain(proxy.http_addrs()[0]);
            client.send(GET.as_bytes());
            client
        })
        .collect();
    until("the requests to arrive", || sum() == before + count);
    held
}

#[test]
fn requests_beyond_the_limit_go_to_the_next_endpoint_and_then_nowhere() {
    let breaker = Breaker { requests: 3, ..Breaker::default() };
    for global in [false, true] {
        let slow = [(); 2].map(|()| Script::new(|_| Act::Wait(LONG)));
        let all = [&slow[0], &slow[1]];
        let (proxy, _publisher) = match global {
            false => start(config(), ruled(&all, limited(breaker))),
            true => start(Config { breaker, ..config() }, ruled(&all, Resilience::default())),
        };
        let held = hold(&proxy, &all, 6);
        assert_eq!(slow.each_ref().map(Script::asked), [3, 3]);
        for _ in 0..5 {
            assert_eq!(status(&proxy, GET), 503);
        }
        assert_eq!(metric(&proxy, "lockgate_requests_rejected_total{reason=\"endpoints_full\"}"), 5);
        assert_eq!(metric(&proxy, "lockgate_endpoint_full_total{limit=\"requests\"}"), 10);
        assert_eq!(metric(&proxy, "lockgate_endpoint_ejections_total"), 0);
        // A place that is given up can be had again.
        for client in &held {
            socket2::SockRef::from(&client.stream).set_linger(Some(Duration::ZERO)).unwrap();
        }
        drop(held);
        until("the endpoints to be left", || slow.iter().all(|s| s.open() == 0));
        drop(hold(&proxy, &all, 6));
    }
}

/// The limit is the process's, not each worker's.
#[test]
fn workers_share_the_limit() {
    let slow = Script::new(|_| Act::Wait(LONG));
    let own = limited(Breaker { requests: 5, ..Breaker::default() });
    let (proxy, _publisher) = start(Config { workers: 3, ..config() }, ruled(&[&slow], own));
    let mut clients: Vec<Plain> = (0..40).map(|_| wire::plain(proxy.http_addrs()[0])).collect();
    clients.iter_mut().for_each(|client| client.send(GET.as_bytes()));
    until("the others to be refused", || {
        metric(&proxy, "lockgate_requests_rejected_total{reason=\"endpoints_full\"}") >= 35
    });
    // Two workers that race for the last place may both lose it.
    until("the requests to arrive", || slow.asked() >= 1);
    assert!(slow.asked() <= 5, "{}", slow.asked());
}

#[test]
fn connections_beyond_the_limit_are_not_opened() {
    let slow = Script::new(|_| Act::Wait(LONG));
    let own = limited(Breaker { connections: 2, ..Breaker::default() });
    let (proxy, _publisher) = start(config(), ruled(&[&slow], own));
    let _held = hold(&proxy, &[&slow], 2);
    assert_eq!(status(&proxy, GET), 503);
    assert_eq!(metric(&proxy, "lockgate_endpoint_full_total{limit=\"connections\"}"), 1);
    assert_eq!(metric(&proxy, "lockgate_retries_total"), 0);
    assert_eq!(slow.open(), 2);
}

/// An idle connection is there to be used, however few there may be.
#[test]
fn a_pooled_connection_is_no_new_one() {
    let good = Script::says("HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n");
    let own = limited(Breaker { connections: 1, pending: 1, requests: 1 });
    let (proxy, _publisher) = start(config(), ruled(&[&good], own));
    for _ in 0..20 {
        assert_eq!(status(&proxy, GET), 200);
    }
    assert_eq!(good.open(), 1);
}

/// Who waits for a connection that does not come is in the way of others only so far.
#[test]
fn requests_that_wait_for_a_connection_are_limited() {
    use socket2::{Domain, Socket, Type};
    // Neither accepts nor refuses: its queue is full.
    let listener = Socket::new(Domain::IPV4, Type::STREAM, None).unwrap();
    listener.bind(&std::net::SocketAddr::from(([127, 0, 0, 1], 0)).into()).unwrap();
    listener.listen(0).unwrap();
    let address = listener.local_addr().unwrap().as_socket().unwrap();
    let _filling: Vec<Socket> = (0..4)
        .map(|_| {
            let socket = Socket::new(Domain::IPV4, Type::STREAM, None).unwrap();
            socket.set_nonblocking(true).unwrap();
            let _ = socket.connect(&address.into());
            socket
        })
        .collect();
    let unreachable = Script::at(address);
    let own = limited(Breaker { pending: 2, ..Breaker::default() });
    let (proxy, _publisher) = start(config(), ruled(&[&unreachable], own));
    let mut waiting: Vec<Plain> = (0..2).map(|_| wire::plain(proxy.http_addrs()[0])).collect();
    waiting.iter_mut().for_each(|client| client.send(GET.as_bytes()));
    until("both to wait", || metric(&proxy, "lockgate_requests_in_flight") == 2);
    assert_eq!(status(&proxy, GET), 503);
    assert_eq!(metric(&proxy, "lockgate_endpoint_full_total{limit=\"pending\"}"), 1);
}
