//! Malformed messages, and good ones at the border, each with its answer:
//! `testdata/messages/*.txt`. What must be refused is refused with one answer
//! and the end of the connection, and no endpoint hears of it; what is accepted
//! arrives byte for byte as the list says.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

#[path = "support/frame_list.rs"]
mod frame_list;
#[path = "support/frames.rs"]
mod frames;
#[path = "support/messages.rs"]
mod messages;
#[path = "support/toy.rs"]
mod toy;

use std::cell::Cell;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use lockgate_proxy::{Proxy, Publisher};
use messages::{
    Case, Heard, LAST, LAST_ANSWER, LAST_ARRIVES, List, Outcome, recorder, say, statuses, stays_open,
    unescape,
};
use toy::{PATIENCE, proxy_to};

/// A proxy in front of an endpoint that notes every byte.
struct World {
    proxy: Proxy,
    _publisher: Publisher,
    heard: Arc<Heard>,
    wrong: Cell<bool>,
}

impl World {
    fn new() -> World {
        let (upstream, heard) = recorder();
        let (proxy, _publisher) = proxy_to(&[upstream]);
        World { proxy, _publisher, heard, wrong: Cell::new(false) }
    }

    fn address(&self) -> SocketAddr {
        self.proxy.http_addrs()[0]
    }

    /// What arrived since the last call: as soon as it is what the case expects.
    fn arrived(&self, case: &Case, last: &[u8]) -> Vec<u8> {
        let port = self.address().port();
        let updating = std::env::var_os("LOCKGATE_UPDATE_GOLDEN").is_some();
        // Where one is wrong, others are, too.
        let patience = if updating || self.wrong.get() { Duration::from_millis(100) } else { PATIENCE };
        let mut arrived = Vec::new();
        self.heard.take(patience, |bytes| {
            arrived = without(&messages::without_ours(bytes, port), last);
            arrived == case.arrives && bytes.len() >= last.len()
        });
        self.wrong.set(self.wrong.get() || arrived != case.arrives);
        arrived
    }
}

/// Without the request that shows that a connection is still good. It is sent last, but
/// may arrive first where both are streams of one connection.
fn without(bytes: &[u8], last: &[u8]) -> Vec<u8> {
    let at = bytes.windows(last.len().max(1)).position(|w| w == last);
    at.map_or(bytes.to_vec(), |at| [&bytes[..at], &bytes[at + last.len()..]].concat())
}

fn request(world: &World, case: &Case) -> Outcome {
    // Something must show that the connection is still good, or end it.
    let open = stays_open(&case.answers);
    let last = if open { LAST } else { b"" };
    let sent = [&case.sent, last].concat();
    let answer = say(world.address(), &sent, case.answers == "close", None);
    let mut statuses = statuses(&answer);
    let text = String::from_utf8_lossy(&answer);
    match open {
        true => assert_eq!(statuses.pop().as_deref(), Some("200"), "{}: {text:?}", case.name),
        false if statuses.is_empty() => statuses.push("close".to_owned()),
        false if statuses.last().is_some_and(|s| s.as_str() < "400") => statuses.push("close".to_owned()),
        // An answer that ends the connection says so.
        false => assert!(text.contains("\r\nConnection: close\r\n"), "{}: {text:?}", case.name),
    }
    let arrived = world.arrived(case, if open { LAST_ARRIVES } else { b"" });
    Outcome { answers: statuses.join(","), arrived }
}

#[test]
fn http1_requests() {
    let world = World::new();
    let mut count = 0;
    for name in ["framing", "chunked", "lines", "targets", "connections"] {
        let list = List::read(name);
        let outcomes: Vec<_> = list.cases.iter().map(|case| request(&world, case)).collect();
        list.judge(&outcomes);
        count += list.cases.len();
    }
    assert!(count >= 250, "{count} messages");
    let metrics = world.proxy.metrics().encode();
    assert!(metrics.contains("lockgate_endpoint_ejections_total 0\n"), "the endpoint is not to blame");
}

fn response(world: &World, case: &Case) -> Outcome {
    let (then, request) = case.how.split_once(' ').unwrap();
    world.heard.answer(&case.sent, then == "end");
    let open = !case.answers.ends_with("close");
    let sent = [unescape(request).as_slice(), if open { LAST } else { b"" }].concat();
    let answer = say(world.address(), &sent, !open, None);
    let answer = match open {
        true => answer.strip_suffix(LAST_ANSWER).unwrap_or_else(|| {
            panic!("{}: the connection does not go on: {:?}", case.name, String::from_utf8_lossy(&answer))
        }),
        false => &answer,
    };
    let mut statuses = statuses(answer);
    if !open {
        statuses.push("close".to_owned());
    }
    world.heard.take(PATIENCE, |_| true);
    // Our own answer is another test's business.
    let is_ours = statuses.last().is_some_and(|status| status == "502");
    let arrived = if is_ours { Vec::new() } else { answer.to_vec() };
    Outcome { answers: statuses.join(","), arrived }
}

#[test]
fn http1_responses() {
    let world = World::new();
    let list = List::read("responses");
    let outcomes: Vec<_> = list.cases.iter().map(|case| response(&world, case)).collect();
    list.judge(&outcomes);
    assert!(list.cases.len() >= 80, "{} messages", list.cases.len());
}

fn http2_request(world: &World, case: &Case) -> Outcome {
    let answers = frame_list::exchange(world.address(), case, None);
    let served = matches!(case.answers.as_str(), "reset") || case.answers.parse::<u16>().is_ok();
    let arrived = world.arrived(case, if served { LAST_ARRIVES } else { b"" });
    Outcome { answers, arrived }
}

#[test]
fn http2_requests() {
    let world = World::new();
    let list = List::read("http2");
    let outcomes: Vec<_> = list.cases.iter().map(|case| http2_request(&world, case)).collect();
    list.judge(&outcomes);
    assert!(list.cases.len() >= 100, "{} messages", list.cases.len());
}
