//! What is tried again, on which endpoint, how often, and on whose account.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

#[path = "support/peers.rs"]
mod peers;
#[path = "support/script.rs"]
mod script;
#[path = "support/toy.rs"]
mod toy;
#[path = "support/wire.rs"]
mod wire;

use std::io::Write as _;
use std::time::Duration;

use lockgate_proxy::Config;
use lockgate_proxy::endpoint::Ejection;
use lockgate_proxy::resilience::{Resilience, Retry, RetryOn};

use script::{Script, metric, ruled, status};
use toy::{config, start};

fn on(words: &str) -> RetryOn {
    words.split(' ').fold(RetryOn::OFF, |on, word| on.and(RetryOn::word(word).unwrap()))
}

fn retrying(words: &str) -> Resilience {
    Resilience { retry_on: Some(on(words)), ..Resilience::default() }
}

/// Nothing is ejected: every test counts who was asked.
fn steady() -> Config {
    Config { ejection: Ejection { consecutive: 0, ..Ejection::default() }, ..config() }
}

const GET: &str = "GET / HTTP/1.1\r\nHost: a\r\n\r\n";
const POST: &str = "POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 3\r\n\r\nabc";

/// One word at a time: which failures go to the next endpoint, and which are the answer.
#[test]
fn each_word_stands_for_its_failure() {
    let silent = Duration::from_secs(3600);
    let failures: [(&str, &str, Script); 6] = [
        ("error", "502", Script::hangs_up()),
        ("timeout", "504", Script::new(move |_| script::Act::Wait(silent))),
        ("invalid_header", "502", Script::says("SSH-2.0-OpenSSH_9.9\r\n")),
        ("http_500", "500", Script::says("HTTP/1.1 500 No\r\nContent-Length: 3\r\n\r\nbad")),
        ("http_503", "503", Script::says("HTTP/1.1 503 No\r\nContent-Length: 3\r\n\r\nbad")),
        ("http_404", "404", Script::says("HTTP/1.1 404 No\r\nContent-Length: 3\r\n\r\nbad")),
    ];
    for (word, own, bad) in &failures {
        for retried in ["error", "timeout", "invalid_header", "http_500", "http_503", "http_404", "off"] {
            let good = Script::says("HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok");
            let mut config = steady();
            if *word == "timeout" {
                config.timeouts.read = Duration::from_millis(500);
            }
            let (proxy, _publisher) = start(config, ruled(&[bad, &good], retrying(retried)));
            let mut client = wire::plain(proxy.http_addrs()[0]);
            // In turn: one of two requests meets the bad one first.
            let mut statuses: Vec<String> =
                (0..2).map(|_| client.ask(GET.as_bytes()).status().to_string()).collect();
            statuses.sort();
            let expected = if retried == *word { ["200", "200"] } else { ["200", *own] };
            assert_eq!(statuses, expected, "{word} with {retried}");
            assert_eq!(
                metric(&proxy, "lockgate_retries_total"),
                u64::from(retried == *word),
                "{word} {retried}"
            );
        }
    }
}

/// The last answer is passed on when nobody is left who could give a better one.
#[test]
fn the_last_answer_stands() {
    let busy = |_| Script::says("HTTP/1.1 503 Busy\r\nContent-Length: 4\r\nX-Mine: 1\r\n\r\nbusy");
    for (endpoints, tries, asked) in [(1, 3, 1), (2, 3, 2), (5, 3, 3), (5, 1, 1), (5, 0, 5)] {
        let all: Vec<Script> = (0..endpoints).map(busy).collect();
        let own = Resilience { tries: Some(tries), ..retrying("error http_503") };
        let (proxy, _publisher) = start(steady(), ruled(&all.iter().collect::<Vec<_>>(), own));
        let answer = wire::plain(proxy.http_addrs()[0]).ask(GET.as_bytes());
        assert_eq!((answer.status(), answer.text()), (503, "busy"));
        assert_eq!(answer.header("x-mine"), Some("1"));
        let sum: usize = all.iter().map(Script::asked).sum();
        assert_eq!(sum, asked, "{endpoints} endpoints, {tries} tries");
    }
}

/// Methods that may not be sent twice are, if the rule or the process says so; their bodies go along.
#[test]
fn bodies_are_sent_again() {
    let large = |n: usize| format!("Content-Length: {n}\r\n\r\n{}", "x".repeat(n));
    let chunked = |n: usize| {
        let piece = format!("3e8\r\n{}\r\n", "x".repeat(1000));
        format!("Transfer-Encoding: chunked\r\n\r\n{}0\r\n\r\n", piece.repeat(n / 1000))
    };
    let cases = [
        ("POST", "error http_503", large(3), false),
        ("POST", "error http_503 non_idempotent", large(3), true),
        ("POST", "error http_503 non_idempotent", large(60_000), true),
        ("POST", "error http_503 non_idempotent", chunked(60_000), true),
        ("POST", "error http_503 non_idempotent", large(70_000), false),
        ("POST", "error http_503 non_idempotent", chunked(70_000), false),
        ("PUT", "error http_503", large(60_000), true),
        ("PUT", "error http_503", chunked(60_000), true),
    ];
    for (method, words, body, again) in &cases {
        let busy = Script::says("HTTP/1.1 503 Busy\r\nContent-Length: 0\r\n\r\n");
        let counts = Script::counts();
        let (proxy, _publisher) = start(steady(), ruled(&[&busy, &counts], retrying(words)));
        let mut client = wire::plain(proxy.http_addrs()[0]);
        let mut answers = Vec::new();
        for _ in 0..2 {
            client.send(format!("{method} / HTTP/1.1\r\nHost: a\r\n{body}").as_bytes());
            answers.push(client.receive().unwrap().unwrap());
        }
        let sent = match body.strip_prefix("Transfer-Encoding: chunked\r\n\r\n") {
            None => body.split_once("\r\n\r\n").unwrap().1.len(),
            Some(chunks) => chunks.matches('x').count(),
        };
        let told = answers.iter().filter(|a| a.status() == 200).map(|a| a.text().to_owned());
        let told: Vec<String> = told.collect();
        let expected = if *again { 2 } else { 1 };
        assert_eq!(told, vec![sent.to_string(); expected], "{method} {words} {sent}");
    }
}

#[test]
fn a_process_may_say_that_everything_can_be_sent_twice() {
    for (non_idempotent, attempts) in [(false, 1), (true, 2)] {
        let bad = [Script::hangs_up(), Script::hangs_up()];
        let mut config = steady();
        config.retry.non_idempotent = non_idempotent;
        let (proxy, _publisher) = start(config, ruled(&[&bad[0], &bad[1]], retrying("error")));
        assert_eq!(status(&proxy, POST), 502);
        assert_eq!(bad.iter().map(Script::asked).sum::<usize>(), attempts);
    }
}

/// A fifth of the requests, no more: the rest get the answer they would have got without retries.
#[test]
fn retries_stay_within_their_budget() {
    let endpoints = [(); 4].map(|()| Script::says("HTTP/1.1 503 Busy\r\nContent-Length: 0\r\n\r\n"));
    let mut config = steady();
    config.retry = Retry { budget_percent: 20, budget_floor: 0, ..Retry::default() };
    let table = ruled(&endpoints.iter().collect::<Vec<_>>(), retrying("http_503"));
    let (proxy, mut publisher) = start(config, table.clone());
    let mut client = wire::plain(proxy.http_addrs()[0]);
    for n in 1..=200_u64 {
        if n == 100 {
            // A swap does not hand out a new budget.
            let own = Resilience { tries: Some(2), ..retrying("http_503") };
            publisher.publish(ruled(&endpoints.iter().collect::<Vec<_>>(), own));
        }
        assert_eq!(client.ask(GET.as_bytes()).status(), 503);
        let retries = metric(&proxy, "lockgate_retries_total");
        assert!(retries <= n / 5, "{retries} retries in {n} requests");
        assert_eq!(endpoints.iter().map(Script::asked).sum::<usize>() as u64, n + retries);
    }
    // Answers that nobody wanted cost no connection.
    assert_eq!(metric(&proxy, "lockgate_upstream_connections_total{result=\"opened\"}"), 4);
    assert_eq!(metric(&proxy, "lockgate_retries_total"), 40);
    assert!(metric(&proxy, "lockgate_retry_budget_exhausted_total") >= 160);
}

/// A request that reached nobody has cost nobody anything.
#[test]
fn refused_connections_are_free() {
    let mut config = steady();
    config.retry = Retry { budget_percent: 0, budget_floor: 0, ..Retry::default() };
    let good = Script::says("HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n");
    let (proxy, _publisher) = start(config, ruled(&[&Script::nobody(), &good], retrying("error")));
    for _ in 0..20 {
        assert_eq!(status(&proxy, POST), 200);
    }
    assert_eq!(metric(&proxy, "lockgate_retry_budget_exhausted_total"), 0);
}

/// With `off` not even a refused connection is tried elsewhere, but a pooled one that ended while idle is.
#[test]
fn off_is_off() {
    let good = Script::new(|n| match n {
        // Answers, and ends the connection once the next request has arrived on it.
        n if n % 2 == 0 => script::Act::Say("HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n"),
        _ => script::Act::HangUp,
    });
    let (proxy, _publisher) = start(steady(), ruled(&[&good], retrying("off")));
    let mut client = wire::plain(proxy.http_addrs()[0]);
    for _ in 0..4 {
        assert_eq!(client.ask(GET.as_bytes()).status(), 200);
    }
    let (proxy, _publisher) =
        start(steady(), ruled(&[&Script::nobody(), &Script::nobody()], retrying("off")));
    assert_eq!(status(&proxy, GET), 502);
    assert_eq!(metric(&proxy, "lockgate_retries_total"), 0);
}

/// No attempt begins when the time for it is over.
#[test]
fn retries_take_only_so_long() {
    let slow = || Script::new(|_| script::Act::Wait(Duration::from_secs(3600)));
    let endpoints = [slow(), slow(), slow()];
    let mut config = steady();
    config.timeouts.read = Duration::from_millis(150);
    let own = Resilience { retry_within: Some(Duration::from_millis(1)), ..retrying("timeout") };
    let (proxy, _publisher) = start(config, ruled(&endpoints.iter().collect::<Vec<_>>(), own));
    assert_eq!(status(&proxy, GET), 504);
    assert_eq!(endpoints.iter().map(Script::asked).sum::<usize>(), 1);
}

/// The interim answer of an endpoint that then fails is not held against the next one.
#[test]
fn an_interim_answer_and_then_another_endpoint() {
    let bad = Script::says(
        "HTTP/1.1 103 Early Hints\r\nLink: </a>\r\n\r\nHTTP/1.1 503 No\r\nContent-Length: 0\r\n\r\n",
    );
    let good = Script::says("HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok");
    let (proxy, _publisher) = start(steady(), ruled(&[&bad, &good], retrying("http_503")));
    let mut client = wire::plain(proxy.http_addrs()[0]);
    let mut heads = Vec::new();
    for _ in 0..2 {
        client.stream.write_all(GET.as_bytes()).unwrap();
        loop {
            let answer = client.receive().unwrap().unwrap();
            heads.push(answer.status());
            if answer.status() >= 200 {
                break;
            }
        }
    }
    heads.sort_unstable();
    assert_eq!(heads, [103, 200, 200]);
}

/// The same rules hold for endpoints that speak HTTP/2, and for clients that do.
#[tokio::test(flavor = "multi_thread")]
async fn over_http2() {
    use http::{Method, Response, StatusCode};
    use http_body_util::BodyExt as _;
    use lockgate_proxy::table::UpstreamProtocol::{H2c, Http1};
    use peers::{Client, Comes, empty, endpoint, full, pattern};
    use std::sync::Arc;
    use std::sync::atomic::{AtomicUsize, Ordering::SeqCst};

    for speaks in [H2c, Http1] {
        let busy = Arc::new(AtomicUsize::new(0));
        let count = busy.clone();
        let bad = endpoint(speaks, move |request| {
            count.fetch_add(1, SeqCst);
            async move {
                // Takes the body first, so that all of it has to come again.
                let _ = request.into_body().collect().await;
                Response::builder().status(503).body(full("busy")).unwrap()
            }
        })
        .await;
        let good = endpoint(speaks, |request| async move {
            let length = request.into_body().collect().await.unwrap().to_bytes().len();
            Response::new(full(length.to_string()))
        })
        .await;
        let all = [&Script::at(bad), &Script::at(good)];
        let (proxy, _publisher) =
            start(steady(), script::ruled_over(&all, retrying("error http_503 non_idempotent"), speaks));
        for comes in [Comes::Http1, Comes::H2c] {
            let mut client = Client::connect(&proxy, comes).await;
            for length in [0, 3, 20_000, 60_000] {
                for _ in 0..2 {
                    let answer = client.ask(Method::POST, "/", full(pattern(0, length))).await;
                    assert_eq!(
                        (answer.status, answer.text()),
                        (StatusCode::OK, &*length.to_string()),
                        "{comes:?}"
                    );
                }
                assert_eq!(client.ask(Method::GET, "/", empty()).await.text(), "0");
            }
        }
        assert!(busy.load(SeqCst) >= 8, "{speaks:?}");
        let retries = metric(&proxy, "lockgate_retries_total");
        assert_eq!(retries, busy.load(SeqCst) as u64, "{speaks:?}");
    }
}
