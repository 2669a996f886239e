//! A client that is gone while its endpoint thinks: the endpoint's work is called off.
//!
//! What says that nobody is there is a reset, or the end of both directions (`EPOLLHUP`). An end
//! of the client's sending alone (`EPOLLRDHUP`) does not tell one that has closed from one that
//! has said all it has to say and still reads: that one gets its answer.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

#[path = "support/script.rs"]
mod script;
#[path = "support/toy.rs"]
mod toy;
#[path = "support/wire.rs"]
mod wire;

use std::net::Shutdown;
use std::time::Duration;

use lockgate_proxy::resilience::Resilience;

use script::{Act, Script, metric, ruled, until};
use toy::{config, start};

const GET: &[u8] = b"GET / HTTP/1.1\r\nHost: a\r\n\r\n";

#[test]
fn a_reset_calls_the_request_off() {
    let thinks = Script::new(|_| Act::Wait(Duration::from_secs(3600)));
    let (proxy, _publisher) = start(config(), ruled(&[&thinks], Resilience::default()));
    for n in 1..=3 {
        let mut client = wire::plain(proxy.http_addrs()[0]);
        client.send(GET);
        until("the request to arrive", || thinks.asked() == n);
        socket2::SockRef::from(&client.stream).set_linger(Some(Duration::ZERO)).unwrap();
        drop(client);
        until("the endpoint's connection to end", || thinks.open() == 0);
    }
    until("the requests to be counted", || metric(&proxy, "lockgate_requests_in_flight") == 0);
    assert_eq!(metric(&proxy, "lockgate_retries_total"), 0);
    assert_eq!(metric(&proxy, "lockgate_endpoint_ejections_total"), 0);
}

#[test]
fn the_end_of_a_request_is_not_the_end_of_its_client() {
    let slow = Script::new(|_| Act::Wait(Duration::from_millis(200)));
    let (proxy, _publisher) = start(config(), ruled(&[&slow], Resilience::default()));
    for _ in 0..3 {
        let mut client = wire::plain(proxy.http_addrs()[0]);
        client.send(GET);
        client.stream.shutdown(Shutdown::Write).unwrap();
        assert_eq!(client.receive().unwrap().unwrap().status(), 200);
    }
}

/// Requests sent ahead of their turn are no sign of anything.
#[test]
fn a_client_that_sends_ahead_is_there() {
    let slow = Script::new(|_| Act::Wait(Duration::from_millis(50)));
    let (proxy, _publisher) = start(config(), ruled(&[&slow], Resilience::default()));
    let mut client = wire::plain(proxy.http_addrs()[0]);
    client.send(GET);
    until("the request to arrive", || slow.asked() == 1);
    client.send(GET);
    client.send(GET);
    for _ in 0..3 {
        assert_eq!(client.receive().unwrap().unwrap().status(), 200);
    }
}
