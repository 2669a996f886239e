//! Hosts whose TLS ends at an endpoint, beside others that end here.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

#[path = "support/toy.rs"]
mod toy;

use std::io::{Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::time::Duration;

use lockgate_proxy::config::{Config, Timeouts};
use lockgate_proxy::proxy_protocol::{self, Origin, Parsed, Version};
use lockgate_proxy::table::{
    HostPattern, Origin as Object, Passthrough, PathMatch, RoutingTable, UpstreamProtocol,
};
use lockgate_proxy::{Certificate, Proxy, Publisher};
use rcgen::{CertificateParams, KeyPair};
use rustls::{ClientConnection, ServerConfig, ServerConnection, StreamOwned};
use rustls_pki_types::PrivateKeyDer;
use toy::{config, connect, endpoint, key, pool, start};

type Secure = StreamOwned<ClientConnection, TcpStream>;

/// An endpoint that ends TLS by itself, and the certificate that shows it was it.
struct Station {
    address: SocketAddr,
    der: Vec<u8>,
}

/// Says `name` to every request, and the PROXY header in front of it, if it expects one.
fn station(name: &'static str, expects: Option<Version>) -> Station {
    let (made, key) = certificate(&["station.example"]);
    let der = made.der().to_vec();
    let private = PrivateKeyDer::Pkcs8(key.serialize_der().into());
    let config = ServerConfig::builder().with_no_client_auth();
    let config = Arc::new(config.with_single_cert(vec![made.der().clone()], private).unwrap());
    let address = endpoint(move |mut tcp| {
        let told = expects.map(|_| read_header(&mut tcp)).unwrap_or_default();
        let mut stream = StreamOwned::new(ServerConnection::new(config.clone()).unwrap(), tcp);
        let mut room = [0; 1024];
        while let Ok(n @ 1..) = stream.read(&mut room) {
            if stream.write_all(format!("{name}{told}:").as_bytes()).is_err() {
                return;
            }
            stream.write_all(&room[..n]).unwrap();
        }
        stream.conn.send_close_notify();
        let _ = stream.flush();
    });
    Station { address, der }
}

fn certificate(names: &[&str]) -> (rcgen::Certificate, KeyPair) {
    let key = KeyPair::generate().unwrap();
    let names: Vec<String> = names.iter().map(|&name| name.to_owned()).collect();
    (CertificateParams::new(names).unwrap().self_signed(&key).unwrap(), key)
}

/// Reads a PROXY header and not a byte more.
fn read_header(tcp: &mut TcpStream) -> String {
    let mut header = Vec::new();
    loop {
        match proxy_protocol::parse(&header).unwrap() {
            Parsed::Incomplete => {
                let mut byte = [0];
                tcp.read_exact(&mut byte).unwrap();
                header.push(byte[0]);
            }
            Parsed::Header { origin: Origin::Proxied { source, .. }, .. } => return format!(" for {source}"),
            Parsed::Header { origin: Origin::Local, .. } => return " for nobody".to_owned(),
        }
    }
}

fn passed(pool: &str, proxy_protocol: Option<Version>) -> Arc<Passthrough> {
    let origin = Arc::new(Object::default());
    Arc::new(Passthrough { pool: key(pool), origin, connect_timeout: None, proxy_protocol })
}

/// `terminated.example` and `own.wild.example` end here; `passed.example` and
/// all others below `wild.example` do not.
struct Scene {
    proxy: Proxy,
    publisher: Publisher,
    table: RoutingTable,
    exact: Station,
    wild: Station,
    /// What the proxy shows of itself.
    own: Vec<u8>,
}

fn scene(change: impl FnOnce(&mut Config)) -> Scene {
    let (exact, wild) = (station("exact", None), station("wild", None));
    let (made, private) = certificate(&["terminated.example", "own.wild.example"]);
    let own = Certificate::from_pem(made.pem().as_bytes(), private.serialize_pem().as_bytes()).unwrap();
    let mut table = RoutingTable { default_certificate: Some(Arc::new(own)), ..RoutingTable::default() };
    let here = toy::says("here");
    table.pools.insert(key("here"), Arc::new(pool(&[here], UpstreamProtocol::Http1)));
    table.pools.insert(key("exact"), Arc::new(pool(&[exact.address], UpstreamProtocol::Http1)));
    // What an endpoint is said to speak has no bearing on what is passed through.
    table.pools.insert(key("wild"), Arc::new(pool(&[wild.address], UpstreamProtocol::Https)));
    let host = || {
        let mut host = lockgate_proxy::table::Host::default();
        host.rules.push(toy::rule(PathMatch::Prefix("/".into()), "here"));
        Arc::new(host)
    };
    table.hosts.insert(HostPattern::new("terminated.example"), host());
    table.hosts.insert(HostPattern::new("own.wild.example"), host());
    table.passthrough.insert(HostPattern::new("passed.example"), passed("exact", None));
    table.passthrough.insert(HostPattern::new("*.wild.example"), passed("wild", None));
    let mut config = config();
    change(&mut config);
    let (proxy, publisher) = start(config, table.clone());
    Scene { proxy, publisher, table, exact, wild, own: made.der().to_vec() }
}

impl Scene {
    fn address(&self) -> SocketAddr {
        self.proxy.https_addrs()[0]
    }

    fn count(&self, name: &str) -> u64 {
        let metrics = self.proxy.metrics().encode();
        metrics.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' ')).unwrap().parse().unwrap()
    }
}

fn session(name: &str) -> ClientConnection {
    let config = lockgate_proxy::tls::client_config(false);
    ClientConnection::new(config, name.to_owned().try_into().unwrap()).unwrap()
}

/// The answer to `hello`, and the certificate that was shown.
fn ask(mut stream: Secure, hello: &[u8]) -> (String, Vec<u8>) {
    stream.write_all(hello).unwrap();
    stream.conn.send_close_notify();
    stream.flush().unwrap();
    let mut answer = String::new();
    let _ = stream.read_to_string(&mut answer);
    let shown = stream.conn.peer_certificates().map(|chain| chain[0].to_vec());
    (answer, shown.unwrap_or_default())
}

fn secure(address: SocketAddr, name: &str) -> Secure {
    StreamOwned::new(session(name), connect(address))
}

fn get(host: &str) -> String {
    format!("GET / HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n")
}

#[test]
fn by_the_name_in_the_handshake() {
    let scene = scene(|_| {});
    let (exact, wild, own) = (&scene.exact.der, &scene.wild.der, &scene.own);
    for (name, says, shown) in [
        ("passed.example", "exact:", exact),
        ("PASSED.Example", "exact:", exact),
        ("a.wild.example", "wild:", wild),
        ("own.wild.example", "HTTP/1.1 200", own),
        ("terminated.example", "HTTP/1.1 200", own),
        // One label more than the wildcard stands for.
        ("a.b.wild.example", "HTTP/1.1 404", own),
        ("wild.example", "HTTP/1.1 404", own),
        ("nobody.example", "HTTP/1.1 404", own),
        // No name: IP addresses are not sent as one.
        ("192.0.2.1", "HTTP/1.1 404", own),
    ] {
        let (answer, certificate) = ask(secure(scene.address(), name), get(name).as_bytes());
        assert!(answer.starts_with(says), "{name}: {answer}");
        assert!(certificate == *shown, "the certificate for {name}");
    }
    assert_eq!(scene.count("lockgate_connections_total{listener=\"https\",protocol=\"passthrough\"}"), 3);
    assert_eq!(scene.count("lockgate_connections_total{listener=\"https\",protocol=\"http1\"}"), 6);
    assert_eq!(scene.count("lockgate_tls_handshakes_total{result=\"failed\"}"), 0);
}

/// Sends `bytes` in pieces, and goes on with the session.
fn in_pieces(address: SocketAddr, session: ClientConnection, bytes: &[u8], most: usize) -> Secure {
    let mut tcp = connect(address);
    tcp.set_nodelay(true).unwrap();
    for piece in bytes.chunks(most) {
        tcp.write_all(piece).unwrap();
        std::thread::sleep(Duration::from_millis(1));
    }
    StreamOwned::new(session, tcp)
}

/// The hello again in records of at most `most` bytes.
fn in_records(hello: &[u8], most: usize) -> Vec<u8> {
    let mut records = Vec::new();
    for fragment in hello[5..].chunks(most) {
        records.extend_from_slice(&hello[..3]);
        records.extend_from_slice(&(fragment.len() as u16).to_be_bytes());
        records.extend_from_slice(fragment);
    }
    records
}

#[test]
fn a_hello_in_pieces_or_in_several_records() {
    let scene = scene(|_| {});
    for (name, says) in [("passed.example", "exact:"), ("terminated.example", "HTTP/1.1 200")] {
        for (record, piece) in [(16384, 100), (100, 16384), (7, 50), (300, 1000)] {
            let mut session = session(name);
            let mut hello = Vec::new();
            session.write_tls(&mut hello).unwrap();
            let hello = in_records(&hello, record);
            let stream = in_pieces(scene.address(), session, &hello, piece);
            let (answer, _) = ask(stream, get(name).as_bytes());
            assert!(answer.starts_with(says), "{name} in records of {record}, pieces of {piece}: {answer}");
        }
    }
}

#[test]
fn what_is_no_hello_gets_an_alert() {
    let scene = scene(|_| {});
    for bytes in [&b"GET / HTTP/1.1\r\nHost: passed.example\r\n\r\n"[..], &[22, 3, 1, 0, 5, 1, 0, 0, 1, 0]] {
        let mut stream = connect(scene.address());
        stream.write_all(bytes).unwrap();
        stream.shutdown(Shutdown::Write).unwrap();
        let mut answer = Vec::new();
        let _ = stream.read_to_end(&mut answer);
        assert_eq!(answer.first(), Some(&21), "an alert: {answer:?}");
    }
}

#[test]
fn who_says_nothing_or_too_little_is_closed_and_counted() {
    let short = Timeouts { handshake: Duration::from_millis(200), ..Timeouts::default() };
    let mut scene = scene(|config| config.timeouts = short);
    for round in 1..3 {
        let mut silent = connect(scene.address());
        let mut slow = connect(scene.address());
        slow.write_all(&[22, 3, 1, 2, 0, 1, 0]).unwrap();
        for stream in [&mut silent, &mut slow] {
            let mut rest = Vec::new();
            let _ = stream.read_to_end(&mut rest);
        }
        while scene.count("lockgate_tls_handshakes_total{result=\"failed\"}") < round * 2 {
            std::thread::yield_now();
        }
        // The same when nothing is passed through and rustls reads the socket itself.
        scene.table.passthrough.clear();
        scene.publisher.publish(scene.table.clone());
    }
}

#[test]
fn the_endpoint_is_told_of_the_client() {
    for version in [Version::V1, Version::V2] {
        let mut scene = scene(|_| {});
        let told = station("told", Some(version));
        scene.table.pools.insert(key("told"), Arc::new(pool(&[told.address], UpstreamProtocol::Http1)));
        scene.table.passthrough.insert(HostPattern::new("told.example"), passed("told", Some(version)));
        scene.publisher.publish(scene.table.clone());
        let stream = secure(scene.address(), "told.example");
        let client = stream.sock.local_addr().unwrap();
        let (answer, _) = ask(stream, b"hello");
        assert_eq!(answer, format!("told for {client}:hello"));
    }
}

/// Each side ends on its own: what the other still sends arrives.
#[test]
fn half_closed_connections() {
    let mut scene = scene(|_| {});
    let raw = endpoint(|mut tcp| {
        let mut all = Vec::new();
        tcp.read_to_end(&mut all).unwrap();
        tcp.write_all(format!("{} bytes", all.len()).as_bytes()).unwrap();
    });
    scene.table.pools.insert(key("exact"), Arc::new(pool(&[raw], UpstreamProtocol::Http1)));
    scene.publisher.publish(scene.table.clone());
    let mut hello = Vec::new();
    session("passed.example").write_tls(&mut hello).unwrap();
    let mut stream = connect(scene.address());
    stream.write_all(&hello).unwrap();
    let body = vec![b'x'; 1 << 20];
    stream.write_all(&body).unwrap();
    stream.shutdown(Shutdown::Write).unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).unwrap();
    assert_eq!(answer, format!("{} bytes", hello.len() + body.len()));
}

#[test]
fn an_endpoint_that_cannot_be_reached_costs_a_try() {
    let mut scene = scene(|_| {});
    let nobody = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let both = pool(&[nobody, scene.exact.address], UpstreamProtocol::Http1);
    scene.table.pools.insert(key("exact"), Arc::new(both));
    scene.publisher.publish(scene.table.clone());
    for _ in 0..6 {
        let (answer, _) = ask(secure(scene.address(), "passed.example"), b"hello");
        assert_eq!(answer, "exact:hello");
    }
    for endpoints in [&[nobody][..], &[]] {
        scene.table.pools.insert(key("exact"), Arc::new(pool(endpoints, UpstreamProtocol::Http1)));
        scene.publisher.publish(scene.table.clone());
        let mut stream = secure(scene.address(), "passed.example");
        assert!(stream.write_all(b"hello").and_then(|()| stream.read_exact(&mut [0])).is_err());
    }
    assert_eq!(scene.count("lockgate_connections_refused_total{reason=\"passthrough\"}"), 2);
}

/// A publish decides about the connections that come after it, and ends none.
#[test]
fn hosts_come_and_go() {
    let mut scene = scene(|_| {});
    let mut before = secure(scene.address(), "passed.example");
    before.write_all(b"1").unwrap();
    let mut room = [0; 7];
    before.read_exact(&mut room).unwrap();
    let passed = std::mem::take(&mut scene.table.passthrough);
    scene.publisher.publish(scene.table.clone());
    let (answer, certificate) = ask(secure(scene.address(), "passed.example"), get("x").as_bytes());
    assert!(answer.starts_with("HTTP/1.1 421") || answer.starts_with("HTTP/1.1 404"), "{answer}");
    assert!(certificate == scene.own);
    before.write_all(b"2").unwrap();
    before.read_exact(&mut room).unwrap();
    assert_eq!(&room, b"exact:2");
    scene.table.passthrough = passed;
    scene.publisher.publish(scene.table.clone());
    let (answer, _) = ask(secure(scene.address(), "passed.example"), b"hello");
    assert_eq!(answer, "exact:hello");
}

/// OpenSSL writes its hello otherwise than rustls.
#[test]
fn openssl() {
    if Command::new("openssl").arg("version").output().is_err() {
        assert!(std::env::var_os("CI").is_none(), "CI needs openssl");
        return eprintln!("SKIPPED: no openssl on this machine");
    }
    let scene = scene(|_| {});
    let address = scene.address().to_string();
    for (arguments, says) in [
        (&["-servername", "passed.example", "-tls1_3"][..], "exact:hello"),
        (&["-servername", "a.wild.example", "-tls1_2"], "wild:hello"),
        (&["-servername", "terminated.example"], "HTTP/1.1 400"),
        (&["-noservername"], "HTTP/1.1 400"),
    ] {
        let mut client = Command::new("openssl")
            .args(["s_client", "-quiet", "-no_ign_eof", "-connect", &address])
            .args(arguments)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        client.stdin.as_mut().unwrap().write_all(b"hello\r\n\r\n").unwrap();
        let mut answer = vec![0; says.len()];
        client.stdout.as_mut().unwrap().read_exact(&mut answer).unwrap();
        assert_eq!(String::from_utf8_lossy(&answer), says, "{arguments:?}");
        drop(client.stdin.take());
        client.wait().unwrap();
    }
}
