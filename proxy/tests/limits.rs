//! Every limit and every way an endpoint can fail, with the answer a client gets for it.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

#[path = "support/toy.rs"]
mod toy;

use std::io::{Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering::SeqCst};
use std::time::Duration;

use lockgate_proxy::config::{Limits, Timeouts};
use lockgate_proxy::endpoint::Ejection;
use lockgate_proxy::table::{Host, HostPattern, PathMatch, RoutingTable, RuleLimits, UpstreamProtocol};
use lockgate_proxy::{Config, Proxy, Publisher};
use toy::{
    config, connect, endpoint, exchange, key, pool, proxy_to, read_head, read_response, rule, says, start,
    table,
};

/// Short enough to be waited for, long enough for a busy machine where something must fit into it.
const SHORT: Duration = Duration::from_millis(200);

fn with_timeouts(endpoints: &[SocketAddr], set: impl FnOnce(&mut Timeouts)) -> (Proxy, Publisher) {
    let mut config = config();
    set(&mut config.timeouts);
    start(config, table(endpoints, UpstreamProtocol::Http1))
}

fn with_limits(endpoints: &[SocketAddr], limits: Limits) -> (Proxy, Publisher) {
    start(Config { limits, ..config() }, table(endpoints, UpstreamProtocol::Http1))
}

/// A table with one rule that has limits of its own.
fn limited(endpoints: &[SocketAddr], limits: RuleLimits) -> RoutingTable {
    let mut table = table(endpoints, UpstreamProtocol::Http1);
    let mut rule = rule(PathMatch::Prefix("/".into()), "default/app:80");
    rule.limits = limits;
    table.hosts.insert(HostPattern::any(), Arc::new(Host { rules: vec![rule] }));
    table
}

/// Sends a request on a connection of its own and returns the status, the head and what follows it.
fn ask(address: SocketAddr, request: &str) -> (u16, String, String) {
    let answer = exchange(address, request);
    let (head, rest) = answer.split_once("\r\n\r\n").unwrap_or((&answer, ""));
    let status = head.get(9..12).and_then(|s| s.parse().ok()).unwrap_or(0);
    (status, head.to_owned(), rest.to_owned())
}

const GET: &str = "GET / HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n";

/// A POST with a body, in pieces of one write each.
const POST: &str = "POST / HTTP/1.1\r\nHost: a\r\nConnection: close\r\nContent-Length: 3\r\n\r\nabc";

fn metric(proxy: &Proxy, name: &str) -> u64 {
    let metrics = proxy.metrics().encode();
    let line = metrics.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' '));
    line.unwrap_or_else(|| panic!("{name} in {metrics}")).parse().unwrap()
}

/// An address where nobody listens.
fn nobody() -> SocketAddr {
    TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap()
}

/// An endpoint that reads a head, says `answer` and hangs up; and how many heads it got.
fn hangs_up_after(answer: &'static str) -> (SocketAddr, Arc<AtomicUsize>) {
    let count = Arc::new(AtomicUsize::new(0));
    let counted = count.clone();
    let address = endpoint(move |mut stream| {
        if !read_head(&mut stream).is_empty() {
            counted.fetch_add(1, SeqCst);
            stream.write_all(answer.as_bytes()).unwrap();
        }
    });
    (address, count)
}

/// An endpoint that reads whatever comes and never answers.
fn silent() -> SocketAddr {
    endpoint(|mut stream| while matches!(stream.read(&mut [0; 4096]), Ok(1..)) {})
}

/// Hangs up with a reset instead of an end.
fn reset(stream: TcpStream) {
    socket2::SockRef::from(&stream).set_linger(Some(Duration::ZERO)).unwrap();
}

#[test]
fn heads_beyond_a_limit() {
    let limits = Limits { header_bytes: 2048, headers: 10, target_bytes: 256, ..Limits::default() };
    let (proxy, _publisher) = with_limits(&[says("ok")], limits);
    let address = proxy.http_addrs()[0];
    let head = |target: usize, lines: String| {
        format!("GET /{} HTTP/1.1\r\nHost: a\r\nConnection: close\r\n{lines}\r\n", "x".repeat(target - 1))
    };
    for (request, status) in [
        (head(256, String::new()), 200),
        (head(257, String::new()), 414),
        (head(20_000, String::new()), 414),
        (head(1, "A: b\r\n".repeat(8)), 200),
        (head(1, "A: b\r\n".repeat(9)), 431),
        (head(1, format!("A: {}\r\n", "x".repeat(1900))), 200),
        (head(1, format!("A: {}\r\n", "x".repeat(2048))), 431),
        (head(1, format!("A: {}\r\n", "x".repeat(100_000))), 431),
    ] {
        let (got, head, _) = ask(address, &request);
        assert_eq!(got, status, "{head}: {}", &request[..60]);
        assert!(head.contains("\r\nConnection: close"), "{head}");
    }
    assert_eq!(metric(&proxy, "lockgate_requests_rejected_total{reason=\"uri_too_long\"}"), 2);
    assert_eq!(metric(&proxy, "lockgate_requests_rejected_total{reason=\"header_too_large\"}"), 3);
}

#[test]
fn the_default_limits_hold() {
    let (proxy, _publisher) = proxy_to(&[says("ok")]);
    let address = proxy.http_addrs()[0];
    let with = |lines: String| format!("GET / HTTP/1.1\r\nHost: a\r\nConnection: close\r\n{lines}\r\n");
    assert_eq!(ask(address, &with("A: b\r\n".repeat(98))).0, 200);
    assert_eq!(ask(address, &with("A: b\r\n".repeat(99))).0, 431);
    // More than one buffer, less than the limit.
    assert_eq!(ask(address, &with(format!("A: {}\r\n", "x".repeat(30_000)))).0, 200);
    assert_eq!(ask(address, &with(format!("A: {}\r\n", "x".repeat(33_000)))).0, 431);
    let target = "x".repeat(64 << 10);
    assert_eq!(ask(address, &format!("GET /{target} HTTP/1.1\r\nHost: a\r\n\r\n")).0, 414);
}

#[test]
fn bodies_beyond_the_limit() {
    let chunked = |n: usize| {
        let piece = format!("a\r\n{}\r\n", "x".repeat(10));
        format!(
            "POST / HTTP/1.1\r\nHost: a\r\nConnection: close\r\nTransfer-Encoding: chunked\r\n\r\n{}0\r\n\r\n",
            piece.repeat(n / 10)
        )
    };
    let length = |n: usize| {
        format!(
            "POST / HTTP/1.1\r\nHost: a\r\nConnection: close\r\nContent-Length: {n}\r\n\r\n{}",
            "x".repeat(n)
        )
    };
    let global = Limits { body_bytes: Some(100), ..Limits::default() };
    for (own, allowed) in [(None, 100), (Some(1000), 1000), (Some(50), 50), (Some(0), 100_000)] {
        let accepting = endpoint(|mut stream| {
            loop {
                let head = read_head(&mut stream);
                let Some((_, length)) = head.split_once("Content-Length: ") else {
                    let mut body = Vec::new();
                    let mut byte = [0];
                    while !body.ends_with(b"0\r\n\r\n") {
                        if stream.read_exact(&mut byte).is_err() {
                            return;
                        }
                        body.push(byte[0]);
                    }
                    stream.write_all(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n").unwrap();
                    continue;
                };
                let length = length.lines().next().unwrap().parse().unwrap();
                stream.read_exact(&mut vec![0; length]).unwrap();
                stream.write_all(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n").unwrap();
            }
        });
        let table = limited(&[accepting], RuleLimits { max_body: own, ..RuleLimits::default() });
        let (proxy, _publisher) = start(Config { limits: global.clone(), ..config() }, table);
        let address = proxy.http_addrs()[0];
        assert_eq!(ask(address, &length(allowed)).0, 200, "{own:?}");
        assert_eq!(ask(address, &chunked(allowed)).0, 200, "{own:?}");
        if own == Some(0) {
            continue;
        }
        let opened = metric(&proxy, "lockgate_upstream_connections_total{result=\"opened\"}");
        let (status, head, _) = ask(address, &length(allowed + 1));
        assert!(status == 413 && head.contains("\r\nConnection: close"), "{own:?}: {head}");
        // A length is known before anything is sent on.
        assert_eq!(metric(&proxy, "lockgate_upstream_connections_total{result=\"opened\"}"), opened);
        let (status, head, _) = ask(address, &chunked(allowed + 10));
        assert!(status == 413 && head.contains("\r\nConnection: close"), "{own:?}: {head}");
        assert_eq!(metric(&proxy, "lockgate_requests_rejected_total{reason=\"body_too_large\"}"), 2);
        assert_eq!(metric(&proxy, "lockgate_endpoint_ejections_total"), 0);
    }
}

#[test]
fn a_head_that_drips_gets_408() {
    let (proxy, _publisher) = with_timeouts(&[says("ok")], |t| t.header = SHORT);
    for start in ["GET / HT", "GET / HTTP/1.1\r\nHost: a\r\n", "G"] {
        let (status, head, _) = ask(proxy.http_addrs()[0], start);
        assert_eq!(status, 408, "{start:?}: {head}");
        assert!(head.contains("\r\nConnection: close"), "{head}");
    }
    assert_eq!(metric(&proxy, "lockgate_requests_rejected_total{reason=\"header_timeout\"}"), 3);
}

#[test]
fn idle_connections_close_without_a_word() {
    let (proxy, _publisher) = with_timeouts(&[says("ok")], |t| (t.header, t.keep_alive) = (SHORT, SHORT));
    let mut client = connect(proxy.http_addrs()[0]);
    client.write_all(b"GET / HTTP/1.1\r\nHost: a\r\n\r\n").unwrap();
    assert_eq!(read_response(&mut client).1, "ok");
    let mut rest = Vec::new();
    client.read_to_end(&mut rest).unwrap();
    assert_eq!(rest, b"");
    assert_eq!(exchange(proxy.http_addrs()[0], ""), "");
}

#[test]
fn a_body_that_stalls_gets_408_and_is_not_the_endpoints_fault() {
    let mut config = Config { ejection: Ejection { consecutive: 1, ..Ejection::default() }, ..config() };
    config.timeouts.client = SHORT;
    let (proxy, _publisher) = start(config, table(&[silent()], UpstreamProtocol::Http1));
    for start in [
        "POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 10\r\n\r\nabc",
        "POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n",
        "POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n3\r\na",
        "PUT / HTTP/1.1\r\nHost: a\r\nContent-Length: 10\r\n\r\n",
    ] {
        let (status, head, _) = ask(proxy.http_addrs()[0], start);
        assert_eq!(status, 408, "{start:?}: {head}");
        assert!(head.contains("\r\nConnection: close"), "{head}");
    }
    assert_eq!(metric(&proxy, "lockgate_endpoint_ejections_total"), 0);
}

#[test]
fn a_body_that_is_awaited_by_nobody_is_the_endpoints_fault() {
    let (proxy, _publisher) = with_timeouts(&[silent()], |t| t.read = SHORT);
    let expecting = "POST / HTTP/1.1\r\nHost: a\r\nExpect: 100-continue\r\nContent-Length: 10\r\n\r\n";
    assert_eq!(ask(proxy.http_addrs()[0], expecting).0, 504);
}

/// Deadlines are between two pieces, not for the whole.
#[test]
fn a_slow_body_that_keeps_moving_gets_through() {
    let gap = Duration::from_secs(3);
    let (proxy, _publisher) = with_timeouts(&[says("ok")], |t| (t.client, t.send, t.read) = (gap, gap, gap));
    let mut client = connect(proxy.http_addrs()[0]);
    client.write_all(b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 4\r\n\r\n").unwrap();
    for _ in 0..4 {
        std::thread::sleep(gap / 3);
        client.write_all(b"x").unwrap();
    }
    assert_eq!(read_response(&mut client).1, "ok");
}

#[test]
fn an_endpoint_that_never_answers_gets_504() {
    let (proxy, _publisher) = with_timeouts(&[silent()], |t| t.read = SHORT);
    assert_eq!(ask(proxy.http_addrs()[0], GET).0, 504);
    assert_eq!(ask(proxy.http_addrs()[0], POST).0, 504);
    let own = RuleLimits { read_timeout: Some(SHORT), ..RuleLimits::default() };
    let (proxy, _publisher) = start(config(), limited(&[silent()], own));
    assert_eq!(ask(proxy.http_addrs()[0], GET).0, 504);
    // What was sent and not answered is not sent again, however harmless.
    assert_eq!(metric(&proxy, "lockgate_retries_total"), 0);
}

#[test]
fn endpoints_that_refuse_get_502_and_no_endpoints_503() {
    let (proxy, _publisher) = proxy_to(&[nobody(), nobody()]);
    let (status, head, body) = ask(proxy.http_addrs()[0], POST);
    assert_eq!((status, body.as_str()), (502, "Bad Gateway\n"), "{head}");
    let (proxy, _publisher) = proxy_to(&[]);
    assert_eq!(ask(proxy.http_addrs()[0], POST).0, 503);
    assert_eq!(metric(&proxy, "lockgate_requests_rejected_total{reason=\"no_endpoint\"}"), 1);
    let mut unknown = table(&[], UpstreamProtocol::Http1);
    unknown.pools.remove(&key("default/app:80"));
    let (proxy, _publisher) = start(config(), unknown);
    assert_eq!(ask(proxy.http_addrs()[0], GET).0, 503);
}

#[test]
fn answers_that_are_none_get_502() {
    let large = format!("HTTP/1.1 200 OK\r\nA: {}\r\nContent-Length: 0\r\n\r\n", "x".repeat(70 << 10));
    let many = format!("HTTP/1.1 200 OK\r\n{}Content-Length: 0\r\n\r\n", "A: b\r\n".repeat(200));
    for answer in [
        "HTTP/1.1 200 OK\r\nContent-Length: 5\r\n",
        "H",
        "SSH-2.0-OpenSSH_9.9\r\n",
        "HTTP/1.1 2OO OK\r\n\r\n",
        "HTTP/1.1 099 No\r\nContent-Length: 0\r\n\r\n",
        "HTTP/2 200\r\n\r\n",
        "HTTP/1.1 200 OK\r\nContent-Length: 5\r\nContent-Length: 6\r\n\r\nhello",
        "HTTP/1.1 200 OK\r\nContent-Length: -5\r\n\r\nhello",
        "HTTP/1.1 200 OK\r\nTransfer-Encoding: gzip, chunked\r\n\r\n0\r\n\r\n",
        // Nonsense in the body that comes with the head.
        "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\nzz\r\n",
        "HTTP/1.1 200 OK\r\nA : b\r\nContent-Length: 0\r\n\r\n",
        "HTTP/1.1 200 OK\r\nA: b\r\n c\r\nContent-Length: 0\r\n\r\n",
        "HTTP/1.1 200 OK\r\nA: b\0c\r\nContent-Length: 0\r\n\r\n",
        "HTTP/1.1 101 Switching Protocols\r\nConnection: upgrade\r\nUpgrade: echo\r\n\r\n",
        &*large.leak(),
        &*many.leak(),
    ] {
        let (upstream, heads) = hangs_up_after(answer);
        let (proxy, _publisher) = proxy_to(&[upstream]);
        let (status, head, body) = ask(proxy.http_addrs()[0], GET);
        let shown = &answer[..answer.len().min(80)];
        assert_eq!((status, body.as_str()), (502, "Bad Gateway\n"), "{shown:?}: {head}");
        assert_eq!(heads.load(SeqCst), 1, "{shown:?} is an answer: not asked again");
    }
}

/// Half a head from one endpoint never becomes the beginning of another's.
#[test]
fn a_head_cut_by_a_reset_is_not_glued_to_the_next() {
    let broken = endpoint(|mut stream| {
        read_head(&mut stream);
        stream.write_all(b"HTTP/1.1 200 OK\r\nX-Broken: ").unwrap();
        // The reset must not overtake what was written.
        std::thread::sleep(Duration::from_millis(50));
        reset(stream);
    });
    let (proxy, _publisher) = proxy_to(&[broken, says("alive")]);
    let mut statuses: Vec<_> = (0..4)
        .map(|_| {
            let (status, head, _) = ask(proxy.http_addrs()[0], GET);
            assert!(!head.contains("X-Broken"), "{head}");
            status
        })
        .collect();
    statuses.sort_unstable();
    assert_eq!(statuses, [200, 200, 502, 502]);
}

#[test]
fn a_body_cut_short_is_seen_as_such() {
    for (answer, framing) in [
        ("HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\nhello", "Content-Length: 10"),
        ("HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n", "Transfer-Encoding: chunked"),
        ("HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nA\r\nhello", "Transfer-Encoding: chunked"),
        (
            "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n0\r\nA: b",
            "Transfer-Encoding: chunked",
        ),
    ] {
        let (upstream, heads) = hangs_up_after(answer);
        let (proxy, _publisher) = proxy_to(&[upstream]);
        // No wish to close: it is the cut that ends the connection.
        let (status, head, rest) = ask(proxy.http_addrs()[0], "GET / HTTP/1.1\r\nHost: a\r\n\r\n");
        assert_eq!(status, 200);
        assert!(head.contains(framing), "{head}");
        assert!(!rest.contains("0\r\n\r\n") && rest.len() <= 10, "{answer:?}: {rest:?}");
        assert_eq!(heads.load(SeqCst), 1);
    }
}

/// An address that neither accepts nor refuses: its queue is full. Holds the sockets that fill it.
fn unreachable() -> (SocketAddr, Vec<socket2::Socket>) {
    use socket2::{Domain, Socket, Type};
    let listener = Socket::new(Domain::IPV4, Type::STREAM, None).unwrap();
    listener.bind(&SocketAddr::from(([127, 0, 0, 1], 0)).into()).unwrap();
    listener.listen(0).unwrap();
    let address = listener.local_addr().unwrap().as_socket().unwrap();
    let mut sockets = vec![listener];
    for _ in 0..4 {
        let socket = Socket::new(Domain::IPV4, Type::STREAM, None).unwrap();
        socket.set_nonblocking(true).unwrap();
        let _ = socket.connect(&address.into());
        sockets.push(socket);
    }
    (address, sockets)
}

#[test]
fn connecting_takes_only_so_long() {
    let (address, _sockets) = unreachable();
    let (proxy, _publisher) = with_timeouts(&[address], |t| t.connect = SHORT);
    assert_eq!(ask(proxy.http_addrs()[0], POST).0, 504);
    assert_eq!(metric(&proxy, "lockgate_upstream_connections_total{result=\"failed\"}"), 1);
    let own = RuleLimits { connect_timeout: Some(SHORT), ..RuleLimits::default() };
    let (proxy, _publisher) = start(config(), limited(&[address, says("alive")], own));
    for _ in 0..2 {
        assert_eq!(ask(proxy.http_addrs()[0], POST).2, "alive");
    }
}

#[test]
fn only_what_is_safe_is_sent_again() {
    let body = |n: usize| format!("Content-Length: {n}\r\n\r\n{}", "x".repeat(n));
    let (large, larger) = (body(12_000), body(70_000));
    for (method, rest, attempts) in [
        ("GET", "\r\n", 3),
        ("HEAD", "\r\n", 3),
        ("OPTIONS", "\r\n", 3),
        ("DELETE", "\r\n", 3),
        ("PUT", "Content-Length: 3\r\n\r\nabc", 3),
        ("PUT", &*large, 3),
        ("PUT", "Transfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\n\r\n", 3),
        // More than is kept: part of the body is gone with the first attempt.
        ("PUT", &*larger, 1),
        ("POST", "Content-Length: 3\r\n\r\nabc", 1),
        ("PATCH", "Content-Length: 3\r\n\r\nabc", 1),
        ("POST", "Content-Length: 0\r\n\r\n", 1),
        ("BREW", "\r\n", 1),
    ] {
        let count = Arc::new(AtomicUsize::new(0));
        let endpoints = [(); 4].map(|()| {
            let count = count.clone();
            endpoint(move |mut stream| {
                let (head, _) = read_response(&mut stream);
                count.fetch_add(usize::from(!head.is_empty()), SeqCst);
            })
        });
        let (proxy, _publisher) = proxy_to(&endpoints);
        let request = format!("{method} / HTTP/1.1\r\nHost: a\r\nConnection: close\r\n{rest}");
        assert_eq!(ask(proxy.http_addrs()[0], &request).0, 502, "{method}");
        assert_eq!(count.load(SeqCst), attempts, "{method} {}", &rest[..rest.len().min(30)]);
        assert_eq!(metric(&proxy, "lockgate_retries_total"), attempts as u64 - 1, "{method}");
    }
}

#[test]
fn an_endpoint_that_keeps_failing_is_left_alone() {
    let (proxy, _publisher) = proxy_to(&[nobody(), says("alive")]);
    for _ in 0..20 {
        assert_eq!(ask(proxy.http_addrs()[0], POST).2, "alive");
    }
    assert_eq!(metric(&proxy, "lockgate_endpoint_ejections_total"), 1);
    assert_eq!(metric(&proxy, "lockgate_upstream_connections_total{result=\"failed\"}"), 3);
}

#[test]
fn when_all_are_ejected_they_are_tried_all_the_same() {
    let well = Arc::new(AtomicBool::new(false));
    let is_well = well.clone();
    let upstream = endpoint(move |mut stream| {
        if !read_head(&mut stream).is_empty() && is_well.load(SeqCst) {
            stream.write_all(b"HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\nback").unwrap();
        }
    });
    let (proxy, _publisher) = proxy_to(&[upstream]);
    for _ in 0..4 {
        assert_eq!(ask(proxy.http_addrs()[0], GET).0, 502);
    }
    assert_eq!(metric(&proxy, "lockgate_endpoint_ejections_total"), 1);
    well.store(true, SeqCst);
    assert_eq!(ask(proxy.http_addrs()[0], GET).2, "back");
}

#[test]
fn a_client_that_breaks_off_its_body_is_not_the_endpoints_fault() {
    let (gone, told) = std::sync::mpsc::sync_channel(1);
    let upstream = endpoint(move |mut stream| {
        read_head(&mut stream);
        let mut body = Vec::new();
        let _ = stream.read_to_end(&mut body);
        gone.send(body.len()).unwrap();
    });
    let mut config = config();
    config.ejection.consecutive = 1;
    let (proxy, _publisher) = start(config, table(&[upstream], UpstreamProtocol::Http1));
    let mut client = connect(proxy.http_addrs()[0]);
    client.write_all(b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 10\r\n\r\nabc").unwrap();
    client.shutdown(Shutdown::Write).unwrap();
    // The endpoint sees a body cut short too.
    assert_eq!(told.recv_timeout(toy::PATIENCE).unwrap(), 3);
    let mut rest = Vec::new();
    client.read_to_end(&mut rest).unwrap();
    assert_eq!(metric(&proxy, "lockgate_endpoint_ejections_total"), 0);
}

#[test]
fn pools_of_no_endpoint_do_not_hold_others_up() {
    let mut both = table(&[says("ok")], UpstreamProtocol::Http1);
    both.pools.insert(key("default/empty:80"), Arc::new(pool(&[], UpstreamProtocol::Http1)));
    let rules = vec![
        rule(PathMatch::Prefix("/".into()), "default/app:80"),
        rule(PathMatch::Prefix("/empty".into()), "default/empty:80"),
    ];
    both.hosts.insert(HostPattern::any(), Arc::new(Host { rules }));
    let (proxy, _publisher) = start(config(), both);
    let mut client = connect(proxy.http_addrs()[0]);
    for (path, status) in [("/empty", "503"), ("/", "200"), ("/empty/x", "503")] {
        client.write_all(format!("GET {path} HTTP/1.1\r\nHost: a\r\n\r\n").as_bytes()).unwrap();
        assert_eq!(&read_response(&mut client).0[9..12], status);
    }
}
