//! What a hostile HTTP/2 client can make us do and hold: every attack has its bound, an end, and a
//! counter. The worker's heap is measured, so that a bound is one on bytes.
#![allow(clippy::unwrap_used, reason = "tests say what they expect by panicking")]

use std::io::{Read as _, Write as _};
use std::net::SocketAddr;
use std::sync::atomic::{AtomicI64, AtomicUsize, Ordering::SeqCst};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use lockgate_proxy::metrics::{Breach, WorkerMetrics};
use lockgate_proxy::table::{Host, HostPattern, PathMatch, UpstreamProtocol};
use lockgate_proxy::{Config, Proxy, Publisher};

#[path = "support/frames.rs"]
mod frames;
#[path = "support/heap.rs"]
mod heap;
#[path = "support/toy.rs"]
mod toy;

use frames::*;
use heap::{Change, IDENTIFYING};
use socket2::SockRef;

/// Bytes that worker threads have allocated and not freed, and the most there were.
static HELD: AtomicI64 = AtomicI64::new(0);
static PEAK: AtomicI64 = AtomicI64::new(0);

fn on_worker(change: Change) {
    let bytes = change.taken.unwrap_or(0) as i64 - change.given.unwrap_or(0) as i64;
    let held = HELD.fetch_add(bytes, SeqCst) + bytes;
    PEAK.fetch_max(held, SeqCst);
}

/// Tests would count each other's bytes.
static ONE_AT_A_TIME: Mutex<()> = Mutex::new(());

const KIB: i64 = 1 << 10;

/// A proxy whose worker's heap is watched. It serves `/app` alone.
struct Subject {
    proxy: Proxy,
    _publisher: Publisher,
    before: i64,
    _alone: MutexGuard<'static, ()>,
}

impl Subject {
    fn start(config: Config, endpoint: SocketAddr) -> Subject {
        let alone = ONE_AT_A_TIME.lock().unwrap_or_else(PoisonError::into_inner);
        let mut table = toy::table(&[endpoint], UpstreamProtocol::Http1);
        let rules = vec![toy::rule(PathMatch::Prefix("/app".into()), "default/app:80")];
        table.hosts.insert(HostPattern::any(), Arc::new(Host { rules }));
        let (proxy, publisher) = toy::start(config, table);
        let mut peer = Peer::connect(proxy.http_addrs()[0], &[]);
        peer.read();
        peer.wait(|f| f.kind == SETTINGS).unwrap();
        IDENTIFYING.store(true, SeqCst);
        peer.send(&get(1, "/elsewhere")).unwrap();
        peer.wait(|f| f.kind == HEADERS).unwrap();
        IDENTIFYING.store(false, SeqCst);
        peer.hang_up();
        peer.ended();
        let subject = Subject { proxy, _publisher: publisher, before: 0, _alone: alone };
        until(|| subject.metrics().http.http2.open.value() == 0);
        let before = HELD.load(SeqCst);
        PEAK.store(before, SeqCst);
        Subject { before, ..subject }
    }

    fn connect(&self, settings: &[(u16, u32)]) -> Peer {
        Peer::connect(self.proxy.http_addrs()[0], settings)
    }

    fn metrics(&self) -> Arc<WorkerMetrics> {
        self.proxy.metrics().worker(0)
    }

    /// The most bytes that were held since the start.
    fn peak(&self) -> i64 {
        PEAK.load(SeqCst) - self.before
    }

    fn breaches(&self) -> Vec<(Breach, u64)> {
        let all = Breach::ALL.into_iter().map(|breach| (breach, self.metrics().breaches(breach)));
        all.filter(|(_, count)| *count > 0).collect()
    }

    /// So many breaches are counted, and no other. They are only once the connection has ended.
    fn counts(&self, breach: Breach, times: u64) {
        until(|| self.metrics().breaches(breach) >= times);
        assert_eq!(self.breaches(), [(breach, times)]);
    }

    /// Nothing is left of the attack.
    fn is_quiet(&self) {
        let metrics = self.metrics();
        until(|| metrics.http.http2.open.value() == 0 && metrics.requests_in_flight.value() == 0);
        until(|| metrics.upstream_open.value() == 0);
    }
}

fn until(mut happened: impl FnMut() -> bool) {
    let start = tokio::time::Instant::now();
    while !happened() {
        assert!(start.elapsed() < toy::PATIENCE, "this should not take so long");
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// Takes requests and never answers; it is told of each, and of the end of its connection.
fn silent(asked: Arc<AtomicUsize>) -> SocketAddr {
    toy::endpoint(move |mut stream| {
        toy::read_head(&mut stream);
        asked.fetch_add(1, SeqCst);
        // Until the proxy hangs up.
        let _ = stream.read(&mut [0]);
    })
}

struct Flood {
    name: &'static str,
    breach: Breach,
    /// Bytes the worker may hold meanwhile.
    held: i64,
    frames: fn(u32) -> Vec<u8>,
}

/// Each goes on until the proxy hangs up, or has swallowed far too much.
const FLOODS: &[Flood] = &[
    Flood {
        name: "PING",
        breach: Breach::ControlFrames,
        held: 64 * KIB,
        frames: |n| frame(PING, 0, 0, &u64::from(n).to_be_bytes()),
    },
    Flood {
        name: "PING nobody asked to be acknowledged",
        breach: Breach::ControlFrames,
        held: 64 * KIB,
        frames: |n| frame(PING, ACK, 0, &u64::from(n).to_be_bytes()),
    },
    Flood {
        name: "empty SETTINGS",
        breach: Breach::ControlFrames,
        held: 64 * KIB,
        frames: |_| frame(SETTINGS, 0, 0, &[]),
    },
    Flood {
        name: "SETTINGS that change the window of every stream",
        breach: Breach::ControlFrames,
        held: 64 * KIB,
        frames: |n| frame(SETTINGS, 0, 0, &[&[0, 4], &(n % 60_000).to_be_bytes() as &[u8]].concat()),
    },
    Flood {
        name: "PRIORITY",
        breach: Breach::ControlFrames,
        held: 64 * KIB,
        frames: |n| frame(PRIORITY, 0, 2 * n + 1, &[0, 0, 0, 0, 7]),
    },
    Flood {
        name: "WINDOW_UPDATE",
        breach: Breach::ControlFrames,
        held: 64 * KIB,
        frames: |_| window_update(0, 1),
    },
    Flood {
        name: "frames of a kind nobody knows",
        breach: Breach::ControlFrames,
        held: 64 * KIB,
        frames: |_| frame(77, 0, 0, b"?"),
    },
    Flood {
        name: "streams opened and reset at once",
        breach: Breach::Excess,
        held: 512 * KIB,
        frames: |n| [get(2 * n + 1, "/app"), reset(2 * n + 1)].concat(),
    },
    Flood {
        name: "streams we are made to reset",
        breach: Breach::Excess,
        held: 3072 * KIB,
        frames: |n| [get(2 * n + 1, "/app"), window_update(2 * n + 1, u32::MAX >> 1)].concat(),
    },
    Flood {
        name: "malformed requests",
        breach: Breach::Excess,
        // What the `h2` crate keeps of streams it has reset until it writes: 328 bytes each and 312 of their
        // RST_STREAM, in tables that grow by doubling. One read brings more or fewer than 128 of them, so
        // 119 or 160 KiB are held, and never more than 256 places of both.
        held: 192 * KIB,
        frames: |n| frame(HEADERS, END_HEADERS | END_STREAM, 2 * n + 1, &field(b"no-pseudo-fields", b"x")),
    },
    Flood {
        name: "streams beyond the limit",
        breach: Breach::Excess,
        held: 4096 * KIB,
        frames: |n| get(2 * n + 1, "/app"),
    },
    Flood {
        name: "a header block without end",
        breach: Breach::Excess,
        held: 256 * KIB,
        frames: |n| match n {
            0 => frame(HEADERS, 0, 1, &request("GET", "/app")),
            _ => frame(CONTINUATION, 0, 1, &field(b"x-more", &[b'x'; 1000])),
        },
    },
    Flood {
        name: "empty CONTINUATION",
        breach: Breach::Excess,
        held: 64 * KIB,
        frames: |n| match n {
            0 => frame(HEADERS, 0, 1, &request("GET", "/app")),
            _ => frame(CONTINUATION, 0, 1, &[]),
        },
    },
    Flood {
        name: "empty DATA",
        breach: Breach::Excess,
        held: 128 * KIB,
        frames: |n| match n {
            0 => frame(HEADERS, END_HEADERS, 1, &request("POST", "/app")),
            _ => frame(DATA, 0, 1, &[]),
        },
    },
    Flood {
        name: "a body in crumbs",
        breach: Breach::Excess,
        held: 1536 * KIB,
        frames: |n| match n {
            0 => frame(HEADERS, END_HEADERS, 1, &request("POST", "/app")),
            _ => frame(DATA, 0, 1, b"x"),
        },
    },
];

#[test]
fn floods_end() {
    for flood in FLOODS {
        for reads in [true, false] {
            let subject = Subject::start(toy::config(), silent(Arc::default()));
            let mut peer = subject.connect(&[]);
            if reads {
                peer.read();
            }
            let taken = !peer.flood(400_000, flood.frames);
            // One reader only: two would tear each other's frames.
            if !reads {
                peer.read();
            }
            let codes = peer.ended();
            let Flood { name, breach, held, .. } = flood;
            println!(
                "{name}, reading {reads}: {codes:?}, {:?}, {} KiB held",
                subject.breaches(),
                subject.peak() / KIB
            );
            assert!(!taken, "{name}: all of it was taken");
            // A reset of the connection, for what we had not read, may overtake the goodbye.
            assert!(matches!(codes[..], [] | [ENHANCE_YOUR_CALM]), "{name}: {codes:?}");
            assert!(subject.peak() < *held, "{name}: {} bytes held", subject.peak());
            subject.counts(*breach, 1);
            subject.is_quiet();
        }
    }
}

/// The window of a stream or connection that nobody opens again.
const WIDE_OPEN: u32 = u32::MAX >> 1;
const INITIAL_WINDOW: u16 = 4;
const STREAMS: u32 = 100;

/// Answers every request with `length` bytes, as fast as they are taken.
fn generous(length: usize) -> SocketAddr {
    toy::endpoint(move |mut stream| {
        SockRef::from(&stream).set_send_buffer_size(64 << 10).unwrap();
        while !toy::read_head(&mut stream).is_empty() {
            let head = format!("HTTP/1.1 200 OK\r\nContent-Length: {length}\r\n\r\n");
            if stream.write_all(head.as_bytes()).is_err() || stream.write_all(&vec![b'x'; length]).is_err() {
                return;
            }
        }
    })
}

fn impatient() -> Config {
    let mut config = toy::config();
    config.timeouts.client = Duration::from_millis(300);
    config.timeouts.send = Duration::from_millis(300);
    config.timeouts.keep_alive = Duration::from_millis(300);
    config
}

fn ids() -> impl Iterator<Item = u32> {
    (0..STREAMS).map(|n| 2 * n + 1)
}

#[test]
fn resetting_at_leisure_ends_too() {
    let asked = Arc::new(AtomicUsize::new(0));
    let mut config = toy::config();
    config.limits.h2_resets = 40;
    let subject = Subject::start(config, silent(asked.clone()));
    let mut peer = subject.connect(&[]);
    peer.read();
    for n in 0..=40 {
        peer.send(&get(2 * n + 1, "/app")).unwrap();
        until(|| asked.load(SeqCst) == n as usize + 1);
        peer.send(&reset(2 * n + 1)).unwrap();
    }
    assert!(matches!(peer.ended()[..], [] | [ENHANCE_YOUR_CALM]));
    subject.counts(Breach::Resets, 1);
    subject.is_quiet();
    drop((peer, subject));
    // Whoever wants most of what it asks for may go on.
    let subject = Subject::start(Config { limits: subject_limits(40), ..toy::config() }, generous(10));
    let mut peer = subject.connect(&[]);
    peer.read();
    for n in 0..200 {
        let stream = 2 * n + 1;
        peer.send(&get(stream, "/app")).unwrap();
        peer.wait(|f| f.stream == stream && f.flags & END_STREAM != 0).unwrap();
        peer.send(&reset(stream)).unwrap();
    }
    assert_eq!(subject.breaches(), []);
}

fn subject_limits(resets: u32) -> lockgate_proxy::config::Limits {
    lockgate_proxy::config::Limits { h2_resets: resets, ..Default::default() }
}

#[test]
fn streams_without_a_window_are_held_and_then_reset() {
    let subject = Subject::start(impatient(), generous(4 << 20));
    let mut peer = subject.connect(&[(INITIAL_WINDOW, 0)]);
    peer.read();
    for id in ids() {
        peer.send(&get(id, "/app")).unwrap();
    }
    for id in ids() {
        let frame = peer.wait(|f| f.stream == id && f.kind == RST_STREAM).unwrap();
        assert_eq!(frame.code(), CANCEL);
    }
    assert!(peer.frames().iter().all(|f| f.kind != DATA), "there is no room for a byte");
    println!("no window: {} KiB per stream", subject.peak() / KIB / i64::from(STREAMS));
    assert!(subject.peak() < 64 * KIB * i64::from(STREAMS), "{}", subject.peak());
    subject.counts(Breach::Stalled, u64::from(STREAMS));
    subject.is_quiet();
}

#[test]
fn a_client_that_grants_all_and_reads_nothing() {
    let subject = Subject::start(impatient(), generous(4 << 20));
    let mut peer = subject.connect(&[(INITIAL_WINDOW, WIDE_OPEN)]);
    peer.send(&window_update(0, WIDE_OPEN - 65_535)).unwrap();
    for id in ids() {
        peer.send(&get(id, "/app")).unwrap();
    }
    until(|| subject.metrics().requests_in_flight.value() == i64::from(STREAMS));
    // Though nothing can be written to it, not even a goodbye.
    until(|| subject.metrics().http.http2.open.value() == 0);
    println!("nothing read: {} KiB per stream", subject.peak() / KIB / i64::from(STREAMS));
    assert!(subject.peak() < 160 * KIB * i64::from(STREAMS), "{}", subject.peak());
    subject.counts(Breach::Stalled, u64::from(STREAMS));
    subject.is_quiet();
}

#[test]
fn uploads_to_an_endpoint_that_does_not_read() {
    let asked = Arc::new(AtomicUsize::new(0));
    let mut config = toy::config();
    config.timeouts.client = Duration::from_secs(3);
    config.timeouts.send = Duration::from_secs(3);
    let count = asked.clone();
    let deaf = toy::endpoint(move |mut stream| {
        SockRef::from(&stream).set_recv_buffer_size(4 << 10).unwrap();
        toy::read_head(&mut stream);
        count.fetch_add(1, SeqCst);
        std::thread::sleep(toy::PATIENCE);
    });
    let subject = Subject::start(config, deaf);
    let mut peer = subject.connect(&[]);
    peer.read();
    for id in ids() {
        peer.send(&frame(HEADERS, END_HEADERS, id, &request("POST", "/app"))).unwrap();
    }
    until(|| asked.load(SeqCst) == STREAMS as usize);
    // All that the windows allow; what has been passed on opens them again, and may be used too.
    let piece = frame(DATA, 0, 0, &[b'x'; 10_000]);
    let mut sent = 0;
    'streams: for id in ids() {
        for _ in 0..13 {
            if sent + 10_000 > 1 << 20 {
                break 'streams;
            }
            let mut piece = piece.clone();
            piece[5..9].copy_from_slice(&id.to_be_bytes());
            peer.send(&piece).unwrap();
            sent += 10_000;
        }
    }
    for id in ids() {
        let frame = peer.wait(|f| f.stream == id && f.kind == HEADERS);
        assert!(frame.is_some(), "{id}: {:?}", peer.frames());
    }
    println!("uploads: {} KiB held of {} KiB sent", subject.peak() / KIB, sent / 1024);
    // The window of the connection, and what it takes to wait for each endpoint.
    assert!(subject.peak() < (1 << 20) + 32 * KIB * i64::from(STREAMS), "{}", subject.peak());
    // More than the window of a stream, and each piece of it for nothing.
    let id = 2 * STREAMS + 1;
    peer.send(&frame(HEADERS, END_HEADERS, id, &request("POST", "/app"))).unwrap();
    peer.flood(50, |_| frame(DATA, 0, id, &[b'x'; 10_000]));
    let frame = peer.wait(|f| f.stream == id && f.kind == RST_STREAM);
    assert_eq!(frame.map(|f| f.code()), Some(FLOW_CONTROL_ERROR));
    assert!(subject.peak() < 4 << 20, "{}", subject.peak());
    peer.hang_up();
    subject.is_quiet();
}

#[test]
fn what_is_begun_and_not_ended_has_a_deadline() {
    let begun: [(&str, Vec<u8>); 5] = [
        ("nothing but SETTINGS", Vec::new()),
        ("half a frame header", vec![0, 0, 1]),
        ("half a frame", frame(PING, 0, 0, &[0; 8])[..12].to_vec()),
        ("half a header block", frame(HEADERS, 0, 1, &request("GET", "/app"))),
        ("half a body", frame(HEADERS, END_HEADERS, 1, &request("POST", "/app"))),
    ];
    for (name, bytes) in begun {
        println!("{name}");
        let subject = Subject::start(impatient(), generous(1));
        let mut peer = subject.connect(&[]);
        peer.read();
        peer.send(&bytes).unwrap();
        assert!(matches!(peer.ended()[..], [] | [0] | [0, 0]), "{name}: {:?}", peer.frames());
        assert!(subject.peak() < 128 * KIB, "{name}: {}", subject.peak());
        subject.is_quiet();
    }
}

#[test]
fn header_lists_have_a_limit() {
    let subject = Subject::start(toy::config(), generous(1));
    let mut peer = subject.connect(&[]);
    peer.read();
    // One that is too large is refused, and others are answered.
    let block = [request("GET", "/app"), field(b"x-large", &[b'x'; 12_000])].concat();
    let more = field(b"x-larger", &[b'x'; 12_000]);
    peer.send(&frame(HEADERS, END_STREAM, 1, &block)).unwrap();
    peer.send(&frame(CONTINUATION, 0, 1, &more)).unwrap();
    peer.send(&frame(CONTINUATION, END_HEADERS, 1, &more)).unwrap();
    let refused = peer.wait(|f| f.stream == 1 && f.kind == HEADERS).unwrap();
    // Literal, name indexed as 8 (":status"), Huffman or not: 431 is in no table.
    assert!(refused.flags & END_STREAM != 0 && !refused.payload.contains(&0x88), "{refused:?}");
    peer.send(&get(3, "/app")).unwrap();
    assert_eq!(peer.wait(|f| f.stream == 3 && f.kind == HEADERS).unwrap().payload[0], 0x88);
    // A field of 4,000 bytes, put into the table once and named a thousand times by one byte.
    let mut bomb = request("GET", "/app");
    bomb.push(0x40);
    bomb.extend(&field(b"x-bomb", &[b'x'; 4_000])[1..]);
    bomb.extend([0x80 | 62; 1_000]);
    peer.send(&frame(HEADERS, END_HEADERS | END_STREAM, 5, &bomb)).unwrap();
    assert!(matches!(peer.ended()[..], [] | [ENHANCE_YOUR_CALM]));
    println!("header lists: {} KiB held", subject.peak() / KIB);
    assert!(subject.peak() < 512 * KIB, "{}", subject.peak());
    subject.counts(Breach::Excess, 1);
}
