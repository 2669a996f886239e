//! A stop: what is under way finishes, what is idle closes, what waits is served,
//! and what outlasts the deadline is cut.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

#[path = "support/frames.rs"]
mod frames;
#[path = "support/toy.rs"]
mod toy;

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::sync::Mutex;
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::thread::JoinHandle;
use std::time::Duration;

use lockgate_proxy::config::{Drain, Limits};
use lockgate_proxy::table::UpstreamProtocol;
use lockgate_proxy::{Config, Proxy, Publisher};
use toy::{PATIENCE, config, connect, endpoint, proxy_to, read_head, read_response, says, start, table};

/// Starts a drain and gives back what it will return.
fn drain(proxy: Proxy) -> JoinHandle<bool> {
    std::thread::spawn(move || {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(proxy.drain())
    })
}

/// An endpoint that tells of each request to `/slow` and answers it when let; others at once.
fn gated() -> (SocketAddr, Receiver<()>, SyncSender<()>) {
    let (arrived, arrivals) = sync_channel(1);
    let (let_go, gate) = sync_channel::<()>(1);
    let gate = Mutex::new(gate);
    let address = endpoint(move |mut stream| {
        loop {
            let head = read_head(&mut stream);
            if head.is_empty() {
                return;
            }
            if head.starts_with("GET /slow") {
                arrived.send(()).unwrap();
                gate.lock().unwrap().recv_timeout(PATIENCE).unwrap();
            }
            if stream.write_all(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok").is_err() {
                return;
            }
        }
    });
    (address, arrivals, let_go)
}

fn get(client: &mut TcpStream, path: &str) {
    client.write_all(format!("GET {path} HTTP/1.1\r\nHost: a\r\n\r\n").as_bytes()).unwrap();
}

fn rest(client: &mut TcpStream) -> Vec<u8> {
    let mut rest = Vec::new();
    client.read_to_end(&mut rest).unwrap();
    rest
}

fn await_accepted(proxy: &Proxy, n: usize) {
    let line = format!("lockgate_connections_accepted_total{{listener=\"http\"}} {n}\n");
    while !proxy.metrics().encode().contains(&line) {
        std::thread::yield_now();
    }
}

#[test]
fn finishes_what_is_under_way_and_closes_what_is_idle() {
    let (upstream, arrivals, let_go) = gated();
    let (proxy, _publisher) = proxy_to(&[upstream]);
    let address = proxy.http_addrs()[0];
    let mut idle = connect(address);
    get(&mut idle, "/");
    assert_eq!(read_response(&mut idle).1, "ok");
    let mut silent = connect(address);
    let mut busy = connect(address);
    get(&mut busy, "/slow");
    arrivals.recv_timeout(PATIENCE).unwrap();
    await_accepted(&proxy, 3);

    let drained = drain(proxy);
    assert_eq!(rest(&mut idle), b"");
    assert_eq!(rest(&mut silent), b"", "a connection that never said anything does not hold a drain up");
    assert!(TcpStream::connect(address).is_err(), "the listeners are closed");
    let_go.send(()).unwrap();
    let (head, body) = read_response(&mut busy);
    assert!(head.contains("\r\nConnection: close\r\n"), "{head}");
    assert_eq!(body, "ok");
    assert_eq!(rest(&mut busy), b"");
    assert!(drained.join().unwrap(), "all finished by themselves");
}

#[test]
fn an_idle_connection_may_still_ask_once() {
    let (upstream, arrivals, let_go) = gated();
    let (proxy, _publisher) = proxy_to(&[upstream]);
    let address = proxy.http_addrs()[0];
    let (mut busy, mut idle) = (connect(address), connect(address));
    get(&mut idle, "/");
    read_response(&mut idle);
    get(&mut busy, "/slow");
    arrivals.recv_timeout(PATIENCE).unwrap();
    let drained = drain(proxy);
    // Once the listeners are closed the drain has begun.
    while TcpStream::connect(address).is_ok() {}
    get(&mut idle, "/");
    let (head, body) = read_response(&mut idle);
    assert!(head.contains("\r\nConnection: close\r\n"), "{head}");
    assert_eq!(body, "ok");
    assert_eq!(rest(&mut idle), b"");
    let_go.send(()).unwrap();
    read_response(&mut busy);
    drop(busy);
    assert!(drained.join().unwrap());
}

#[test]
fn accepts_during_the_grace() {
    let grace = Duration::from_secs(1);
    let drain_config = Drain { grace, deadline: Duration::from_secs(10) };
    let config = Config { drain: drain_config, ..config() };
    let (proxy, _publisher) = start(config, table(&[says("ok")], UpstreamProtocol::Http1));
    let address = proxy.http_addrs()[0];
    let mut early = connect(address);
    let drained = drain(proxy);
    for _ in 0..3 {
        let mut client = connect(address);
        get(&mut client, "/");
        let (head, body) = read_response(&mut client);
        assert_eq!(body, "ok");
        assert!(!head.contains("Connection: close"), "{head}");
    }
    get(&mut early, "/");
    assert_eq!(read_response(&mut early).1, "ok");
    drop(early);
    assert!(drained.join().unwrap());
    assert!(TcpStream::connect(address).is_err());
}

/// Closing a listener resets what waits in its queue: it is taken first.
#[test]
fn what_waits_to_be_accepted_is_served() {
    let (upstream, arrivals, let_go) = gated();
    let config = Config { limits: Limits { connections: 1, ..Limits::default() }, ..config() };
    let (proxy, _publisher) = start(config, table(&[upstream], UpstreamProtocol::Http1));
    let address = proxy.http_addrs()[0];
    let mut busy = connect(address);
    get(&mut busy, "/slow");
    arrivals.recv_timeout(PATIENCE).unwrap();
    let mut waiting: Vec<_> = (0..20).map(|_| connect(address)).collect();
    for client in &mut waiting {
        get(client, "/");
    }
    let metrics = proxy.metrics().encode();
    assert!(metrics.contains("lockgate_connections_accepted_total{listener=\"http\"} 1\n"), "{metrics}");
    let drained = drain(proxy);
    for client in &mut waiting {
        let (head, body) = read_response(client);
        assert!(head.contains("\r\nConnection: close\r\n"), "{head}");
        assert_eq!(body, "ok");
        assert_eq!(rest(client), b"");
    }
    let_go.send(()).unwrap();
    assert_eq!(read_response(&mut busy).1, "ok");
    drop(busy);
    assert!(drained.join().unwrap());
}

/// With nothing else to wait for, a worker must not end before it has served its queue.
#[test]
fn a_queue_alone_keeps_a_worker() {
    for _ in 0..20 {
        let (proxy, _publisher) = proxy_to(&[says("ok")]);
        let mut clients: Vec<_> = (0..5).map(|_| connect(proxy.http_addrs()[0])).collect();
        for client in &mut clients {
            get(client, "/");
        }
        let drained = drain(proxy);
        for client in &mut clients {
            assert_eq!(read_response(client).1, "ok");
        }
        drop(clients);
        assert!(drained.join().unwrap());
    }
}

fn with_deadline(endpoint: SocketAddr) -> (Proxy, Publisher) {
    let drain = Drain { grace: Duration::ZERO, deadline: Duration::from_millis(300) };
    start(Config { drain, ..config() }, table(&[endpoint], UpstreamProtocol::Http1))
}

#[test]
fn a_tunnel_is_cut_at_the_deadline() {
    let echo = endpoint(|mut stream| {
        read_head(&mut stream);
        let switch = b"HTTP/1.1 101 Switching Protocols\r\nConnection: upgrade\r\nUpgrade: echo\r\n\r\n";
        stream.write_all(switch).unwrap();
        let mut byte = [0];
        while stream.read_exact(&mut byte).is_ok() {
            let _ = stream.write_all(&byte);
        }
    });
    let (proxy, _publisher) = with_deadline(echo);
    let mut client = connect(proxy.http_addrs()[0]);
    client.write_all(b"GET / HTTP/1.1\r\nHost: a\r\nConnection: upgrade\r\nUpgrade: echo\r\n\r\n").unwrap();
    read_head(&mut client);
    let drained = drain(proxy);
    client.write_all(b"x").unwrap();
    let mut byte = [0];
    client.read_exact(&mut byte).unwrap();
    let mut rest = Vec::new();
    let _ = client.read_to_end(&mut rest);
    assert_eq!(rest, b"");
    assert!(!drained.join().unwrap(), "it was cut");
}

#[test]
fn a_request_is_cut_at_the_deadline() {
    let (upstream, arrivals, _let_go) = gated();
    let (proxy, _publisher) = with_deadline(upstream);
    let mut client = connect(proxy.http_addrs()[0]);
    get(&mut client, "/slow");
    arrivals.recv_timeout(PATIENCE).unwrap();
    assert!(!drain(proxy).join().unwrap());
    let mut rest = Vec::new();
    let _ = client.read_to_end(&mut rest);
    assert_eq!(rest, b"");
}

#[test]
fn a_dropped_handle_serves_on() {
    let (proxy, _publisher) = proxy_to(&[says("ok")]);
    let address = proxy.http_addrs()[0];
    drop(proxy);
    for _ in 0..3 {
        let mut client = connect(address);
        get(&mut client, "/");
        assert_eq!(read_response(&mut client).1, "ok");
    }
}

#[test]
fn with_nothing_open_a_drain_is_over_at_once() {
    let config = Config { workers: 3, ..config() };
    let (proxy, _publisher) = start(config, table(&[says("ok")], UpstreamProtocol::Http1));
    assert!(drain(proxy).join().unwrap());
}

/// Another process accepts by now: nobody is in a hurry, and a client that is
/// about to ask must not find its connection closed.
#[test]
fn a_process_that_was_relieved_does_not_close_what_is_idle() {
    let (proxy, _publisher) = proxy_to(&[says("ok")]);
    let address = proxy.http_addrs()[0];
    let (mut idle, mut silent) = (connect(address), connect(address));
    get(&mut idle, "/");
    assert_eq!(read_response(&mut idle).1, "ok");
    await_accepted(&proxy, 2);
    let retired = std::thread::spawn(move || {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(proxy.retire(PATIENCE))
    });
    while TcpStream::connect(address).is_ok() {}
    // Longer than a drain lets it be.
    idle.set_read_timeout(Some(Duration::from_secs(3))).unwrap();
    assert_eq!(idle.read(&mut [0]).unwrap_err().kind(), std::io::ErrorKind::WouldBlock);
    idle.set_read_timeout(Some(PATIENCE)).unwrap();
    for client in [&mut idle, &mut silent] {
        get(client, "/");
        let (head, body) = read_response(client);
        assert!(head.contains("\r\nConnection: close\r\n"), "{head}");
        assert_eq!(body, "ok");
        assert_eq!(rest(client), b"");
    }
    assert!(retired.join().unwrap());
}

/// RFC 9113 section 6.8: a goodbye that still takes what is on its way, and one that names the last.
#[test]
fn an_http2_client_is_told_twice() {
    use frames::{ACK, END_STREAM, GOAWAY, PING, Peer, RST_STREAM};
    let (upstream, arrivals, let_go) = gated();
    let (proxy, _publisher) = proxy_to(&[upstream]);
    let mut peer = Peer::connect(proxy.http_addrs()[0], &[]);
    peer.read();
    peer.send(&frames::get(1, "/slow")).unwrap();
    arrivals.recv_timeout(PATIENCE).unwrap();

    let drained = drain(proxy);
    let first = peer.wait(|f| f.kind == GOAWAY).unwrap();
    assert_eq!((first.last_stream(), first.code()), (u32::MAX >> 1, 0));
    let ping = peer.wait(|f| f.kind == PING && f.flags & ACK == 0).unwrap();
    // This one was on its way.
    peer.send(&frames::get(3, "/")).unwrap();
    peer.wait(|f| f.stream == 3 && f.flags & END_STREAM != 0).unwrap();
    peer.send(&frames::frame(PING, ACK, 0, &ping.payload)).unwrap();
    let second = peer.wait(|f| f.kind == GOAWAY && f.last_stream() < u32::MAX >> 1).unwrap();
    assert_eq!((second.last_stream(), second.code()), (3, 0));
    // This one was not, and is not served; what was under way is.
    peer.send(&frames::get(5, "/")).unwrap();
    assert!(!drained.is_finished());
    let_go.send(()).unwrap();
    peer.wait(|f| f.stream == 1 && f.flags & END_STREAM != 0).unwrap();
    assert!(peer.ended().iter().all(|code| *code == 0));
    assert!(drained.join().unwrap());
    assert!(peer.frames().iter().all(|f| f.stream != 5 && f.kind != RST_STREAM), "{:?}", peer.frames());
}

#[test]
fn an_http2_stream_that_outlasts_the_deadline_is_cut() {
    let (upstream, arrivals, _let_go) = gated();
    let deadline = Drain { grace: Duration::ZERO, deadline: Duration::from_millis(300) };
    let (proxy, _publisher) =
        start(Config { drain: deadline, ..config() }, table(&[upstream], UpstreamProtocol::Http1));
    let mut peer = frames::Peer::connect(proxy.http_addrs()[0], &[]);
    peer.read();
    peer.send(&frames::get(1, "/slow")).unwrap();
    arrivals.recv_timeout(PATIENCE).unwrap();
    assert!(!drain(proxy).join().unwrap());
    peer.ended();
    assert!(peer.frames().iter().all(|f| f.stream != 1));
}
