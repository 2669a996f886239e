//! TCP ports that are relayed as they are: both directions on their own, endpoints that fail, ports that
//! come and go under live connections.
#![allow(clippy::unwrap_used, reason = "a test says what it expects by panicking")]

#[path = "support/ports.rs"]
mod ports;

use std::future::Future;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use lockgate_proxy::config::{Config, L4Options, Limits, Timeouts};
use lockgate_proxy::l4::ListenerState;
use lockgate_proxy::proxy_protocol::Version;
use lockgate_proxy::table::{ListenerKey, PoolKey, ProxyProtocol, Transport};
use ports::{Gate, add, config, key, listener, pool, refusing, soon, table, with};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::time::timeout;

/// An endpoint whose connections `serve` gets, one task for each.
async fn endpoint<F>(serve: impl Fn(TcpStream) -> F + Send + 'static) -> SocketAddr
where
    F: Future<Output = ()> + Send + 'static,
{
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    tokio::spawn(async move {
        while let Ok((stream, _)) = listener.accept().await {
            tokio::spawn(serve(stream));
        }
    });
    address
}

/// Sends back what it gets, at once.
async fn echo() -> SocketAddr {
    endpoint(|mut stream| async move {
        let (mut from, mut to) = stream.split();
        let _ = tokio::io::copy(&mut from, &mut to).await;
    })
    .await
}

/// Says its name and ends.
async fn named(name: &'static str) -> SocketAddr {
    endpoint(move |mut stream| async move { stream.write_all(name.as_bytes()).await.unwrap() }).await
}

async fn connect(address: SocketAddr) -> TcpStream {
    soon(TcpStream::connect(address)).await.unwrap()
}

/// Everything until the end.
async fn rest(client: &mut TcpStream) -> String {
    let mut text = String::new();
    soon(client.read_to_string(&mut text)).await.unwrap();
    text
}

async fn ping(client: &mut TcpStream, text: &[u8]) {
    let mut answer = vec![0; text.len()];
    client.write_all(text).await.unwrap();
    soon(client.read_exact(&mut answer)).await.unwrap();
    assert_eq!(answer, text);
}

/// Bytes that are at no two places alike, and their checksum as they go by.
struct Stream {
    random: fastrand::Rng,
    sum: u64,
    length: usize,
}

impl Stream {
    fn new(seed: u64) -> Stream {
        Stream { random: fastrand::Rng::with_seed(seed), sum: 0, length: 0 }
    }

    fn fill(&mut self, bytes: &mut [u8]) {
        self.random.fill(bytes);
        self.add(bytes);
    }

    fn add(&mut self, bytes: &[u8]) {
        for byte in bytes {
            self.sum = self.sum.rotate_left(5).wrapping_mul(0x9E37_79B9_7F4A_7C15) ^ u64::from(*byte);
        }
        self.length += bytes.len();
    }

    fn done(self) -> (usize, u64) {
        (self.length, self.sum)
    }
}

/// Sends pieces of every size, so that both ways of relaying and the change between them have their part.
async fn send(to: &mut (impl AsyncWriteExt + Unpin), seed: u64, total: usize) -> (usize, u64) {
    let mut stream = Stream::new(seed);
    let mut sizes = fastrand::Rng::with_seed(!seed);
    let mut piece = vec![0; 300 << 10];
    while stream.length < total {
        let size = (1 << sizes.u32(0..18)) + sizes.usize(0..100);
        let size = size.min(total - stream.length);
        stream.fill(&mut piece[..size]);
        to.write_all(&piece[..size]).await.unwrap();
    }
    to.shutdown().await.unwrap();
    stream.done()
}

async fn receive(from: &mut (impl AsyncReadExt + Unpin)) -> (usize, u64) {
    let mut stream = Stream::new(0);
    let mut piece = vec![0; 100_000];
    loop {
        match from.read(&mut piece).await.unwrap() {
            0 => return stream.done(),
            n => stream.add(&piece[..n]),
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn large_transfers_arrive_whole_both_ways_at_once() {
    const TOTAL: usize = 24 << 20;
    let (told, mut heard) = tokio::sync::mpsc::channel(1);
    let address = endpoint(move |mut stream| {
        let told = told.clone();
        async move {
            let (mut from, mut to) = stream.split();
            let both = tokio::join!(send(&mut to, 1, TOTAL), receive(&mut from));
            told.send(both).await.unwrap();
        }
    })
    .await;
    let (gate, port) = Gate::to(Transport::Tcp, &[address]).await;
    let mut client = connect(port).await;
    let (mut from, mut to) = client.split();
    let (sent, received) = soon(async { tokio::join!(send(&mut to, 2, TOTAL), receive(&mut from)) }).await;
    let (sent_back, arrived) = soon(heard.recv()).await.unwrap();
    assert_eq!((sent.0, sent_back.0), (TOTAL, TOTAL));
    assert_eq!((sent, sent_back), (arrived, received));
    gate.counts(Transport::Tcp, TOTAL as u64, |slot| slot.bytes_in.value()).await;
    gate.counts(Transport::Tcp, TOTAL as u64, |slot| slot.bytes_out.value()).await;
    gate.counts(Transport::Tcp, 0, |slot| slot.open.value() as u64).await;
    assert_eq!(gate.count(Transport::Tcp, |slot| slot.opened.value()), 1);
}

#[tokio::test]
async fn a_client_that_has_ended_still_gets_its_answer() {
    let address = endpoint(|mut stream| async move {
        let mut text = String::new();
        stream.read_to_string(&mut text).await.unwrap();
        stream.write_all(text.to_uppercase().as_bytes()).await.unwrap();
    })
    .await;
    let (_gate, port) = Gate::to(Transport::Tcp, &[address]).await;
    let mut client = connect(port).await;
    client.write_all(b"what is this?").await.unwrap();
    client.shutdown().await.unwrap();
    assert_eq!(rest(&mut client).await, "WHAT IS THIS?");
}

#[tokio::test]
async fn an_endpoint_that_has_ended_still_gets_what_the_client_says() {
    let (told, mut heard) = tokio::sync::mpsc::channel(1);
    let address = endpoint(move |mut stream| {
        let told = told.clone();
        async move {
            stream.write_all(b"I have nothing to add").await.unwrap();
            stream.shutdown().await.unwrap();
            let said = rest(&mut stream).await;
            told.send(said).await.unwrap();
        }
    })
    .await;
    let (_gate, port) = Gate::to(Transport::Tcp, &[address]).await;
    let mut client = connect(port).await;
    assert_eq!(rest(&mut client).await, "I have nothing to add");
    client.write_all(b"but I have").await.unwrap();
    drop(client);
    assert_eq!(soon(heard.recv()).await.unwrap(), "but I have");
}

/// A part must not look like the whole: who breaks off is seen to break off.
#[tokio::test]
async fn a_reset_is_passed_on_as_a_reset() {
    let address = endpoint(|mut stream| async move {
        stream.write_all(b"a part").await.unwrap();
        let _ = stream.read(&mut [0]).await;
        stream.set_zero_linger().unwrap();
    })
    .await;
    let (_gate, port) = Gate::to(Transport::Tcp, &[address]).await;
    let mut client = connect(port).await;
    let mut part = [0; 6];
    soon(client.read_exact(&mut part)).await.unwrap();
    client.write_all(b"x").await.unwrap();
    let error = soon(client.read(&mut part)).await.unwrap_err();
    assert_eq!(error.kind(), std::io::ErrorKind::ConnectionReset);
}

/// An endpoint that answers early and reads no further has been heard all the same.
#[tokio::test]
async fn what_an_endpoint_said_before_it_stopped_reading_arrives() {
    let address = endpoint(|mut stream| async move {
        stream.write_all(b"enough").await.unwrap();
    })
    .await;
    let (_gate, port) = Gate::to(Transport::Tcp, &[address]).await;
    let mut client = connect(port).await;
    let mut said = [0; 6];
    soon(client.read_exact(&mut said)).await.unwrap();
    assert_eq!(&said, b"enough");
    assert_eq!(soon(client.read(&mut said)).await.unwrap(), 0);
    // The rest goes nowhere, and sooner or later the client is told so.
    soon(async { while client.write_all(&[0; 4096]).await.is_ok() {} }).await;
}

#[tokio::test]
async fn an_endpoint_that_refuses_costs_the_client_nothing() {
    let refusing = refusing().await;
    let (gate, port) = Gate::to(Transport::Tcp, &[refusing, named("here").await]).await;
    for _ in 0..10 {
        assert_eq!(rest(&mut connect(port).await).await, "here");
    }
    assert!(
        gate.proxy.metrics().encode().contains("lockgate_upstream_connections_total{result=\"opened\"} 10")
    );
    assert_eq!(gate.count(Transport::Tcp, |slot| slot.failed.value()), 0);
}

#[tokio::test]
async fn without_an_endpoint_the_client_sees_an_error_rather_than_an_end() {
    for endpoints in [vec![], vec![refusing().await]] {
        let (gate, port) = Gate::to(Transport::Tcp, &endpoints).await;
        let error = match soon(TcpStream::connect(port)).await {
            Ok(mut client) => soon(client.read(&mut [0])).await.unwrap_err(),
            Err(error) => error,
        };
        assert_eq!(error.kind(), std::io::ErrorKind::ConnectionReset, "{endpoints:?}");
        gate.counts(Transport::Tcp, 1, |slot| slot.failed.value()).await;
    }
}

#[tokio::test]
async fn an_endpoint_that_does_not_answer_gives_way_to_the_next() {
    // Nobody accepts there, and nobody more fits into the queue.
    let full = TcpListener::from_std({
        let socket = socket2::Socket::new(socket2::Domain::IPV4, socket2::Type::STREAM, None).unwrap();
        socket.set_nonblocking(true).unwrap();
        socket.bind(&SocketAddr::from(([127, 0, 0, 1], 0)).into()).unwrap();
        socket.listen(0).unwrap();
        socket.into()
    })
    .unwrap();
    let address = full.local_addr().unwrap();
    let mut waiting = Vec::new();
    while let Ok(stream) = timeout(Duration::from_millis(200), TcpStream::connect(address)).await {
        waiting.push(stream.unwrap());
    }
    let timeouts = Timeouts { connect: Duration::from_millis(50), ..Timeouts::default() };
    let table = table(Transport::Tcp, &[address, named("here").await]);
    let (_gate, port) = Gate::with(Config { timeouts, ..config() }, table).await;
    for _ in 0..4 {
        assert_eq!(rest(&mut connect(port).await).await, "here");
    }
}

#[tokio::test]
async fn a_connection_on_which_nobody_speaks_ends() {
    let idle = Duration::from_millis(150);
    let l4 = L4Options { idle, ..L4Options::default() };
    let (gate, port) = Gate::with(with(l4), table(Transport::Tcp, &[echo().await])).await;
    let mut client = connect(port).await;
    // Longer than the deadline, but never silent for as long.
    for _ in 0..6 {
        ping(&mut client, b"still here").await;
        tokio::time::sleep(idle / 3).await;
    }
    assert_eq!(gate.count(Transport::Tcp, |slot| slot.idle.value()), 0);
    assert_eq!(soon(client.read(&mut [0])).await.unwrap(), 0);
    gate.counts(Transport::Tcp, 1, |slot| slot.idle.value()).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn connections_live_on_when_their_port_or_endpoint_leaves_the_table() {
    let (first, second) = (echo().await, named("second").await);
    let tcp = |n| key(Transport::Tcp, n);
    let (mut gate, port) =
        Gate::with(Config { workers: 2, ..config() }, table(Transport::Tcp, &[first])).await;
    let mut early = connect(port).await;
    ping(&mut early, b"before").await;

    // Another port comes; nothing happens to the first.
    add(&mut gate.table, tcp(2), &[second]);
    gate.publish();
    let other = gate.open(tcp(2)).await;
    assert_eq!(rest(&mut connect(other).await).await, "second");
    ping(&mut early, b"a port more").await;

    // The endpoints change under the port, which stays where it is.
    let name = PoolKey(tcp(1).to_string().as_str().into());
    gate.table.pools.insert(name, Arc::new(pool(Transport::Tcp, &[second])));
    gate.publish();
    assert_eq!(rest(&mut connect(port).await).await, "second");
    ping(&mut early, b"another endpoint").await;
    assert_eq!(gate.open(tcp(1)).await, port);

    // The port goes.
    gate.table.listeners.remove(&tcp(1));
    gate.publish();
    gate.state(tcp(1), |state| state.is_none()).await;
    soon(async { while TcpStream::connect(port).await.is_ok() {} }).await;
    ping(&mut early, b"no port at all").await;
    assert_eq!(rest(&mut connect(other).await).await, "second");

    // And comes again.
    gate.table.listeners.insert(tcp(1), Arc::new(listener(&tcp(2).to_string())));
    gate.publish();
    let again = gate.open(tcp(1)).await;
    assert_eq!(rest(&mut connect(again).await).await, "second");
    ping(&mut early, b"a new port").await;
    assert!(soon(gate.proxy.drain_after(early)).await);
}

trait DrainAfter {
    async fn drain_after(self, client: TcpStream) -> bool;
}

impl DrainAfter for lockgate_proxy::Proxy {
    /// Drains while `client` speaks on, and then ends.
    async fn drain_after(self, mut client: TcpStream) -> bool {
        let draining = tokio::spawn(self.drain());
        tokio::time::sleep(Duration::from_millis(50)).await;
        assert!(!draining.is_finished(), "a connection is open");
        ping(&mut client, b"drained from").await;
        drop(client);
        draining.await.unwrap()
    }
}

/// Clients that connected before a port left the table are served, even if nobody had accepted them yet.
#[tokio::test]
async fn what_is_in_the_queue_when_a_port_goes_is_served() {
    let limits = Limits { connections: 1, ..Limits::default() };
    let table = table(Transport::Tcp, &[echo().await]);
    let (mut gate, port) = Gate::with(Config { limits, ..config() }, table).await;
    let mut first = connect(port).await;
    ping(&mut first, b"the only one").await;
    let mut queued = Vec::new();
    for _ in 0..20 {
        queued.push(connect(port).await);
    }
    gate.table.listeners.clear();
    gate.table.pools.clear();
    gate.publish();
    for client in &mut queued {
        ping(client, b"at last").await;
    }
    ping(&mut first, b"one of many").await;
}

#[tokio::test]
async fn a_port_that_is_taken_fails_alone_and_is_opened_when_it_is_free() {
    let taken = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let address = taken.local_addr().unwrap();
    let blocked = ListenerKey { transport: Transport::Tcp, address };
    let mut table = table(Transport::Tcp, &[named("one").await]);
    add(&mut table, blocked, &[named("two").await]);
    let (gate, port) = Gate::with(config(), table).await;
    assert_eq!(rest(&mut connect(port).await).await, "one");
    let why = gate.state(blocked, |state| matches!(state, Some(ListenerState::Failed(_)))).await;
    assert!(matches!(&why, Some(ListenerState::Failed(why)) if why.contains("in use")), "{why:?}");
    let row = format!("lockgate_l4_listener_open{{transport=\"tcp\",address=\"{address}\"}}");
    assert!(gate.proxy.metrics().encode().contains(&format!("{row} 0")), "{}", gate.proxy.metrics().encode());
    drop(taken);
    assert_eq!(gate.open(blocked).await, address);
    assert_eq!(rest(&mut connect(address).await).await, "two");
    assert!(gate.proxy.metrics().encode().contains(&format!("{row} 1")));
}

#[tokio::test]
async fn a_port_of_http_is_not_shared() {
    let (gate, _) = Gate::with(
        Config { http: vec!["127.0.0.1:0".parse().unwrap()], ..config() },
        table(Transport::Tcp, &[]),
    )
    .await;
    let http = ListenerKey {
        transport: Transport::Tcp,
        address: ([0, 0, 0, 0], gate.proxy.http_addrs()[0].port()).into(),
    };
    let mut gate = gate;
    add(&mut gate.table, http, &[]);
    gate.publish();
    let why = gate.state(http, |state| state.is_some()).await;
    assert!(matches!(&why, Some(ListenerState::Failed(why)) if why.contains("HTTP")), "{why:?}");
}

#[tokio::test]
async fn the_proxy_protocol_is_read_and_written_as_the_port_says() {
    let first = endpoint(|mut stream| async move {
        let text = rest(&mut stream).await;
        stream.write_all(text.as_bytes()).await.unwrap();
    })
    .await;
    let header = "PROXY TCP4 203.0.113.9 203.0.113.1 40000 9000\r\n";
    for (accept, send, sent, expected) in [
        (false, false, "hello", Some("hello".to_owned())),
        (true, false, &*format!("{header}hello"), Some("hello".to_owned())),
        (true, true, &*format!("{header}hello"), Some(format!("{header}hello"))),
        (true, true, "PROXY UNKNOWN\r\nhello", Some("PROXY TCP4 OWN\r\nhello".to_owned())),
        (false, true, "hello", Some("PROXY TCP4 OWN\r\nhello".to_owned())),
        (true, false, "hello, who needs a header?", None),
    ] {
        let mut table = table(Transport::Tcp, &[first]);
        let mut listener = listener(&key(Transport::Tcp, 1).to_string());
        listener.proxy_protocol = ProxyProtocol { accept, send: send.then_some(Version::V1) };
        table.listeners.insert(key(Transport::Tcp, 1), Arc::new(listener));
        let (_gate, port) = Gate::with(config(), table).await;
        let mut client = connect(port).await;
        let own = client.local_addr().unwrap();
        let own = format!("127.0.0.1 127.0.0.1 {} {}", own.port(), port.port());
        // In two pieces: a header may be torn.
        client.write_all(&sent.as_bytes()[..3]).await.unwrap();
        tokio::time::sleep(Duration::from_millis(20)).await;
        // A client that was refused already finds out here, or when it reads.
        let written = client.write_all(&sent.as_bytes()[3..]).await;
        let _ = client.shutdown().await;
        let mut text = String::new();
        let read = soon(client.read_to_string(&mut text)).await;
        match expected {
            Some(expected) => assert_eq!(text, expected.replace("OWN", &own), "{accept} {send} {sent:?}"),
            None => assert!(text.is_empty() && (written.is_err() || read.is_err()), "{text:?}"),
        }
    }
}
