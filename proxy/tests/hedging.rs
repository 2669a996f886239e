//! A request that takes long is sent to a second endpoint; the first answer wins.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

#[path = "support/script.rs"]
mod script;
#[path = "support/toy.rs"]
mod toy;
#[path = "support/wire.rs"]
mod wire;

use std::time::Duration;

use lockgate_proxy::Config;
use lockgate_proxy::endpoint::Ejection;
use lockgate_proxy::resilience::{Hedge, Resilience, Retry};

use script::{Act, Script, metric, ruled, status, until};
use toy::{config, start};

const GET: &str = "GET / HTTP/1.1\r\nHost: a\r\n\r\n";
const OK: &str = "HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok";
const LONG: Duration = Duration::from_secs(3600);

fn hedged(after: u64) -> Resilience {
    Resilience { hedge: Some(Hedge::After(Duration::from_millis(after))), ..Resilience::default() }
}

/// One failure would eject.
fn strict() -> Config {
    Config { ejection: Ejection { consecutive: 1, ..Ejection::default() }, ..config() }
}

#[test]
fn the_first_answer_wins_and_the_other_is_called_off() {
    let slow = Script::new(|_| Act::Wait(LONG));
    let fast = Script::says(OK);
    let (proxy, _publisher) = start(strict(), ruled(&[&slow, &fast], hedged(20)));
    let mut client = wire::plain(proxy.http_addrs()[0]);
    for _ in 0..6 {
        assert_eq!(client.ask(GET.as_bytes()).text(), "ok");
    }
    assert_eq!((slow.asked(), fast.asked()), (3, 6));
    assert_eq!(metric(&proxy, "lockgate_hedges_total{result=\"sent\"}"), 3);
    assert_eq!(metric(&proxy, "lockgate_hedges_total{result=\"won\"}"), 3);
    assert_eq!(metric(&proxy, "lockgate_endpoint_ejections_total"), 0, "the slower one has not failed");
    until("the slower copies to be called off", || slow.open() == 0);
}

#[test]
fn the_first_copy_may_still_win() {
    let slow = Script::new(|_| Act::Wait(Duration::from_millis(150)));
    let slower = Script::new(|_| Act::Wait(LONG));
    let (proxy, _publisher) = start(strict(), ruled(&[&slow, &slower], hedged(10)));
    // Whoever comes first in the turn: the one that answers wins.
    for _ in 0..4 {
        assert_eq!(status(&proxy, GET), 200);
    }
    assert_eq!(metric(&proxy, "lockgate_hedges_total{result=\"sent\"}"), 4);
    assert_eq!(metric(&proxy, "lockgate_hedges_total{result=\"won\"}"), 2);
    assert_eq!(metric(&proxy, "lockgate_endpoint_ejections_total"), 0);
}

#[test]
fn only_what_may_be_sent_twice_and_has_no_body() {
    let slow = [(); 2].map(|()| Script::new(|_| Act::Wait(Duration::from_millis(100))));
    let (proxy, _publisher) = start(config(), ruled(&[&slow[0], &slow[1]], hedged(1)));
    for (request, copies) in [
        ("GET / HTTP/1.1\r\nHost: a\r\n\r\n", 1),
        ("DELETE / HTTP/1.1\r\nHost: a\r\n\r\n", 1),
        ("POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 0\r\n\r\n", 0),
        ("PUT / HTTP/1.1\r\nHost: a\r\nContent-Length: 3\r\n\r\nabc", 0),
        ("BREW / HTTP/1.1\r\nHost: a\r\n\r\n", 0),
    ] {
        let before = metric(&proxy, "lockgate_hedges_total{result=\"sent\"}");
        assert_eq!(status(&proxy, request), 200);
        assert_eq!(metric(&proxy, "lockgate_hedges_total{result=\"sent\"}") - before, copies, "{request}");
    }
}

/// One endpoint: nobody to hedge with. And nothing is sent twice beyond the budget.
#[test]
fn within_the_budget_and_never_to_the_same_endpoint() {
    let slow = [(); 2].map(|()| Script::new(|_| Act::Wait(Duration::from_millis(20))));
    let (proxy, _publisher) = start(config(), ruled(&[&slow[0]], hedged(1)));
    assert_eq!(status(&proxy, GET), 200);
    assert_eq!((slow[0].asked(), metric(&proxy, "lockgate_hedges_total{result=\"sent\"}")), (1, 0));
    let mut config = config();
    config.retry = Retry { budget_percent: 10, budget_floor: 0, ..Retry::default() };
    let (proxy, _publisher) = start(config, ruled(&[&slow[0], &slow[1]], hedged(1)));
    let mut client = wire::plain(proxy.http_addrs()[0]);
    for _ in 0..30 {
        assert_eq!(client.ask(GET.as_bytes()).status(), 200);
    }
    assert_eq!(metric(&proxy, "lockgate_hedges_total{result=\"sent\"}"), 3);
}

/// A copy that fails leaves the race to the other, and counts.
#[test]
fn a_copy_that_fails_leaves_the_race_to_the_other() {
    let slow = Script::new(|_| Act::Wait(Duration::from_millis(150)));
    let bad = Script::hangs_up();
    let mut config = config();
    config.ejection.consecutive = 0;
    let (proxy, _publisher) = start(config, ruled(&[&slow, &bad], hedged(10)));
    for _ in 0..4 {
        assert_eq!(status(&proxy, GET), 200);
    }
    // Both fail: the answer is that of a failure.
    let (proxy, _publisher) = start(strict(), ruled(&[&Script::hangs_up(), &bad], hedged(10)));
    assert_eq!(status(&proxy, GET), 502);
}

/// The delay follows what is usual.
#[test]
fn a_delay_that_is_learnt() {
    let usual = Duration::from_millis(5);
    let act = move |n| if n >= 40 { Act::Wait(LONG) } else { Act::Wait(usual) };
    let learns = Script::new(act);
    let steady = Script::new(move |_| Act::Wait(usual));
    let own = Resilience { hedge: Some(Hedge::P95), ..Resilience::default() };
    let mut config = config();
    config.retry.budget_percent = 100;
    let (proxy, _publisher) = start(config, ruled(&[&learns, &steady], own));
    let mut client = wire::plain(proxy.http_addrs()[0]);
    for n in 0..120 {
        assert_eq!(client.ask(GET.as_bytes()).status(), 200, "{n}");
        if n < 20 {
            assert_eq!(metric(&proxy, "lockgate_hedges_total{result=\"sent\"}"), 0, "nothing is known yet");
        }
    }
    assert!(metric(&proxy, "lockgate_hedges_total{result=\"won\"}") >= 10);
}

/// A client that leaves takes both copies with it.
#[test]
fn a_client_that_leaves_takes_both_copies_with_it() {
    let slow = [(); 2].map(|()| Script::new(|_| Act::Wait(LONG)));
    let (proxy, _publisher) = start(config(), ruled(&[&slow[0], &slow[1]], hedged(10)));
    let mut client = wire::plain(proxy.http_addrs()[0]);
    client.send(GET.as_bytes());
    until("both copies to arrive", || slow.iter().map(Script::asked).sum::<usize>() == 2);
    socket2::SockRef::from(&client.stream).set_linger(Some(Duration::ZERO)).unwrap();
    drop(client);
    until("both to be called off", || slow.iter().all(|s| s.open() == 0));
}
