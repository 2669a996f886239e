//! The deadlines of a rule: of the whole request, and of each attempt.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

#[path = "support/script.rs"]
mod script;
#[path = "support/toy.rs"]
mod toy;
#[path = "support/wire.rs"]
mod wire;

use std::io::{Read as _, Write as _};
use std::sync::Arc;
use std::time::Duration;

use lockgate_proxy::resilience::{Resilience, RetryOn};
use lockgate_proxy::table::{Host, HostPattern, PathMatch, RoutingTable, RuleLimits, UpstreamProtocol};

use script::{Act, Script, metric, ruled, status};
use toy::{config, connect, endpoint, read_head, read_response, start};

const SHORT: Duration = Duration::from_millis(200);
const GET: &str = "GET / HTTP/1.1\r\nHost: a\r\n\r\n";

fn request_timeout() -> Resilience {
    Resilience { request_timeout: Some(SHORT), ..Resilience::default() }
}

fn silent() -> Script {
    Script::new(|_| Act::Wait(Duration::from_secs(3600)))
}

fn table(address: std::net::SocketAddr, own: Resilience) -> RoutingTable {
    let mut table = toy::table(&[address], UpstreamProtocol::Http1);
    let mut rule = toy::rule(PathMatch::Prefix("/".into()), "default/app:80");
    rule.limits = RuleLimits { resilience: Some(Arc::new(own)), ..RuleLimits::default() };
    table.hosts.insert(HostPattern::any(), Arc::new(Host { rules: vec![rule] }));
    table
}

/// Every attempt there would be time for one by one does not help: the whole is over.
#[test]
fn a_request_that_takes_too_long_gets_504_and_no_second_attempt() {
    let endpoints = [silent(), silent()];
    let (proxy, _publisher) = start(config(), ruled(&[&endpoints[0], &endpoints[1]], request_timeout()));
    assert_eq!(status(&proxy, GET), 504);
    assert_eq!(endpoints.iter().map(Script::asked).sum::<usize>(), 1);
    // The connection to the client is as good as before.
    let mut client = wire::plain(proxy.http_addrs()[0]);
    for _ in 0..2 {
        assert_eq!(client.ask(GET.as_bytes()).status(), 504);
    }
}

/// An endpoint that keeps sending interim answers is never late for any of its reads.
#[test]
fn interim_answers_do_not_prolong_it() {
    let chatty = endpoint(|mut stream| {
        read_head(&mut stream);
        while stream.write_all(b"HTTP/1.1 103 Early Hints\r\n\r\n").is_ok() {
            std::thread::sleep(SHORT / 20);
        }
    });
    let (proxy, _publisher) = start(config(), table(chatty, request_timeout()));
    let mut client = wire::plain(proxy.http_addrs()[0]);
    client.send(GET.as_bytes());
    let last = loop {
        let answer = client.receive().unwrap().unwrap();
        if answer.status() >= 200 {
            break answer.status();
        }
    };
    assert_eq!(last, 504);
}

/// Nor does a client that keeps sending its body.
#[test]
fn a_body_that_never_ends_does_not_prolong_it() {
    let endpoint = endpoint(|mut stream| while matches!(stream.read(&mut [0; 4096]), Ok(1..)) {});
    let (proxy, _publisher) = start(config(), table(endpoint, request_timeout()));
    let mut client = connect(proxy.http_addrs()[0]);
    client.write_all(b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 1000000\r\n\r\n").unwrap();
    let mut writing = client.try_clone().unwrap();
    std::thread::spawn(move || {
        while writing.write_all(b"x").is_ok() {
            std::thread::sleep(SHORT / 20);
        }
    });
    let head = read_head(&mut client);
    assert!(head.starts_with("HTTP/1.1 504"), "{head}");
}

/// Once the answer has begun there is no status left to give: the body is cut.
#[test]
fn an_answer_that_takes_too_long_is_cut() {
    for framing in ["Content-Length: 1000000", "Transfer-Encoding: chunked"] {
        let trickles = endpoint(move |mut stream| {
            read_head(&mut stream);
            let _ = stream.write_all(format!("HTTP/1.1 200 OK\r\n{framing}\r\n\r\n").as_bytes());
            while stream.write_all(b"1\r\nx\r\n").is_ok() {
                std::thread::sleep(SHORT / 20);
            }
        });
        let (proxy, _publisher) = start(config(), table(trickles, request_timeout()));
        let mut client = connect(proxy.http_addrs()[0]);
        client.write_all(GET.as_bytes()).unwrap();
        assert!(read_head(&mut client).starts_with("HTTP/1.1 200"));
        let mut body = Vec::new();
        let _ = client.read_to_end(&mut body);
        assert!(!body.is_empty() && !body.ends_with(b"0\r\n\r\n"), "{framing}: {} bytes", body.len());
    }
}

/// Nor does a client that reads slowly get more time than the rule allows.
#[test]
fn a_client_that_does_not_read_is_cut() {
    let flood = endpoint(|mut stream| {
        read_head(&mut stream);
        let _ = stream.write_all(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n");
        let chunk = format!("2710\r\n{}\r\n", "x".repeat(10_000));
        while stream.write_all(chunk.as_bytes()).is_ok() {}
    });
    let (proxy, _publisher) = start(config(), table(flood, request_timeout()));
    let mut client = connect(proxy.http_addrs()[0]);
    client.write_all(GET.as_bytes()).unwrap();
    script::until("the request to end", || {
        metric(&proxy, "lockgate_requests_in_flight") == 0 && {
            metric(&proxy, "lockgate_requests_total{code=\"2xx\"}") == 1
        }
    });
}

/// Each attempt has its own time; the next endpoint gets as much.
#[test]
fn an_attempt_that_takes_too_long_goes_to_the_next_endpoint() {
    let good = Script::says("HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok");
    let endpoints = [silent(), silent(), good];
    let own = Resilience { try_timeout: Some(SHORT), ..Resilience::default() };
    let (proxy, _publisher) = start(config(), ruled(&endpoints.iter().collect::<Vec<_>>(), own.clone()));
    for _ in 0..3 {
        assert_eq!(status(&proxy, GET), 200);
    }
    assert!(metric(&proxy, "lockgate_retries_total") >= 2);
    let off = Resilience { retry_on: Some(RetryOn::ERROR), ..own };
    let (proxy, _publisher) = start(config(), ruled(&[&endpoints[0]], off));
    assert_eq!(status(&proxy, GET), 504);
    assert_eq!(metric(&proxy, "lockgate_retries_total"), 0);
}

/// The deadline of an attempt ends with the head of its answer.
#[test]
fn a_body_has_more_time_than_the_attempt() {
    let slow = endpoint(|mut stream| {
        read_head(&mut stream);
        stream.write_all(b"HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\n").unwrap();
        for _ in 0..4 {
            std::thread::sleep(SHORT / 2);
            stream.write_all(b"x").unwrap();
        }
    });
    let own = Resilience { try_timeout: Some(SHORT), ..Resilience::default() };
    let (proxy, _publisher) = start(config(), table(slow, own));
    let mut client = connect(proxy.http_addrs()[0]);
    client.write_all(GET.as_bytes()).unwrap();
    assert_eq!(read_response(&mut client).1, "xxxx");
}
