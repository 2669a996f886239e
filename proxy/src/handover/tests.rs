#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::os::fd::OwnedFd;
use std::os::unix::fs::PermissionsExt;
use std::sync::atomic::AtomicUsize;

use super::*;

/// A path in a folder of its own, removed in the end.
struct Place(PathBuf);

impl Place {
    fn new() -> Place {
        static NEXT: AtomicUsize = AtomicUsize::new(0);
        let name =
            format!("lockgate-upgrade-{}-{}", std::process::id(), NEXT.fetch_add(1, Ordering::Relaxed));
        let folder = std::env::temp_dir().join(name);
        fs::create_dir_all(&folder).unwrap();
        Place(folder)
    }

    fn path(&self) -> PathBuf {
        self.0.join("upgrade.sock")
    }

    fn files(&self) -> usize {
        fs::read_dir(&self.0).unwrap().count()
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

fn estate(names: &[&str]) -> (Estate, Vec<TcpListener>) {
    let sockets = Arc::new(Sockets::kept(Vec::new()));
    let listen = |name: &&str| {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        sockets.keep(name, &listener).unwrap();
        listener
    };
    let listeners = names.iter().map(listen).collect();
    (Estate { sockets, tickets: Arc::new(TicketKeys::new(&[]).unwrap()) }, listeners)
}

fn shown(path: &Path) -> UpgradeSocket {
    let socket = UpgradeSocket::prepare(path).unwrap();
    socket.show().unwrap();
    socket
}

fn addresses(sockets: Vec<OwnedFd>) -> Vec<SocketAddr> {
    sockets.into_iter().map(|socket| TcpListener::from(socket).local_addr().unwrap()).collect()
}

#[tokio::test]
async fn without_a_process_there_is_nothing_to_inherit() {
    let place = Place::new();
    let (inherited, predecessor) = inherit(&place.path()).await.unwrap();
    assert!(predecessor.is_none() && inherited.sockets().take("http").is_empty());
    // One that was killed leaves its socket behind.
    let mut left = shown(&place.path());
    left.left = AtomicBool::new(true);
    drop(left);
    assert_eq!(place.files(), 1);
    assert!(inherit(&place.path()).await.unwrap().1.is_none());
    fs::remove_file(place.path()).unwrap();
    fs::write(place.path(), "notes").unwrap();
    assert!(matches!(inherit(&place.path()).await, Err(HandoverError::NotASocket(_))));
}

#[tokio::test]
async fn nobody_else_may_connect_and_nothing_is_left_behind() {
    let place = Place::new();
    let socket = UpgradeSocket::prepare(&place.path()).unwrap();
    assert_eq!(fs::metadata(&socket.hidden).unwrap().permissions().mode() & 0o777, 0o600);
    assert!(!place.path().exists(), "not before it is shown");
    drop(socket);
    assert_eq!(place.files(), 0);
    let first = shown(&place.path());
    let second = shown(&place.path());
    drop(first);
    assert!(place.path().exists(), "it is another's by now");
    drop(second);
    assert_eq!(place.files(), 0);
}

#[tokio::test]
async fn sockets_and_keys_go_from_process_to_process_by_name() {
    let place = Place::new();
    // More than one batch, and one name for the sockets of three workers.
    let many: Vec<String> = (0..150).map(|n| format!("tcp 0.0.0.0:{n}")).collect();
    let mut names: Vec<&str> = many.iter().map(String::as_str).collect();
    names.push("admin 127.0.0.1:0");
    let (mut old, listeners) = estate(&names);
    let shared = listeners[0].try_clone().unwrap();
    for _ in 0..3 {
        old.sockets.keep("http 0.0.0.0:0", &shared).unwrap();
    }
    let mut socket = shown(&place.path());
    for generation in 0..3 {
        let next = UpgradeSocket::prepare(&place.path()).unwrap();
        let serving = async {
            let (inherited, predecessor) = inherit(&place.path()).await.unwrap();
            assert_eq!(inherited.tickets, old.tickets.export(), "generation {generation}");
            let sockets = inherited.sockets.clone();
            for (name, listener) in names.iter().zip(&listeners) {
                let taken = sockets.take(name);
                assert_eq!(taken.len(), 1, "{name}");
                sockets.keep(name, &taken[0]).unwrap();
                assert_eq!(addresses(taken), [listener.local_addr().unwrap()], "{name}");
                assert!(sockets.take(name).is_empty(), "{name} is taken");
            }
            let http = sockets.take("http 0.0.0.0:0");
            assert_eq!(http.len(), 3);
            http.iter().for_each(|socket| sockets.keep("http 0.0.0.0:0", socket).unwrap());
            predecessor.unwrap().relieve(&next).await.unwrap();
            let tickets = Arc::new(TicketKeys::new(&inherited.tickets).unwrap());
            Estate { sockets, tickets }
        };
        let ((), new) = tokio::join!(socket.successor(&old), serving);
        old.sockets.forget_all();
        (old, socket) = (new, next);
        assert_eq!(place.files(), 1, "only the newest socket is there");
    }
    // The first process's listeners were never closed: a client gets through to them.
    let mut client = TcpStream::connect(listeners[7].local_addr().unwrap()).unwrap();
    client.write_all(b"x").unwrap();
    let mut byte = [0];
    listeners[7].accept().unwrap().0.read_exact(&mut byte).unwrap();
    drop(socket);
    assert_eq!(place.files(), 0);
}

/// As a process does that ends at some point.
async fn says(path: &Path, bytes: &[u8], answers: usize) -> Vec<u8> {
    let mut stream = std::os::unix::net::UnixStream::connect(path).unwrap();
    let bytes = bytes.to_vec();
    tokio::task::spawn_blocking(move || {
        stream.write_all(&bytes).unwrap();
        let mut heard = vec![0; answers];
        stream.read_exact(&mut heard).unwrap();
        heard
    })
    .await
    .unwrap()
}

fn hello(version: u16) -> Vec<u8> {
    let mut bytes = b"H\0\0\0\x14lockgate handover ".to_vec();
    bytes.extend_from_slice(&version.to_be_bytes());
    bytes
}

#[tokio::test]
async fn a_process_that_fails_before_it_is_ready_changes_nothing() {
    let place = Place::new();
    let (old, _listeners) = estate(&["http"]);
    let socket = shown(&place.path());
    let path = place.path();
    let trying = async {
        says(&path, b"", 0).await;
        says(&path, &hello(1), 5).await;
        says(&path, b"GET / HTTP/1.1\r\n\r\n", 0).await;
        says(&path, b"H\xff\xff\xff\xff", 0).await;
        says(&path, &[hello(1), b"T\0\0\0\0".to_vec()].concat(), 5).await;
        let (_, predecessor) = inherit(&path).await.unwrap();
        drop(predecessor);
        let refusal = says(&path, &hello(99), 40).await;
        assert!(refusal.starts_with(b"N\0\0\0"), "{refusal:?}");
        // After all of them one that succeeds.
        let next = UpgradeSocket::prepare(&path).unwrap();
        let (inherited, predecessor) = inherit(&path).await.unwrap();
        assert_eq!(inherited.sockets().take("http").len(), 1);
        predecessor.unwrap().relieve(&next).await.unwrap();
        next
    };
    let ((), _next) = tokio::join!(socket.successor(&old), trying);
}

#[tokio::test]
async fn what_a_running_process_must_not_say_is_an_error() {
    let place = Place::new();
    for (offer, expected) in [
        (&b"N\0\0\0\x04busy"[..], "the other process refuses: busy"),
        (b"R\0\0\0\0", "an offer was expected"),
        (b"O\0\0\0\x02\0\0", "the offer is malformed"),
        (b"O\0\0\0\x04\xff\xff\xff\xff", "the offer is malformed"),
        (b"O\0\0\0\x04\0\0\0\x01S\0\0\0\x05\x04http", "names and sockets do not match"),
        (b"O\0\0\0\x04\0\0\0\x01S\0\0\0\x02\x04h", "names and sockets do not match"),
        (b"O\0\0\0\x04\0\0\0\x01S\0\0\0\0", "sockets were expected"),
        (b"", "waiting for the running process's offer"),
    ] {
        let path = place.path();
        let _ = fs::remove_file(&path);
        let listener = std::os::unix::net::UnixListener::bind(&path).unwrap();
        let answering = tokio::task::spawn_blocking(move || {
            let (mut stream, _) = listener.accept().unwrap();
            let mut greeting = [0; 25];
            stream.read_exact(&mut greeting).unwrap();
            stream.write_all(offer).unwrap();
        });
        let error = inherit(&path).await.err().unwrap().to_string();
        assert!(error.contains(expected), "{error} instead of {expected}");
        answering.await.unwrap();
    }
}
