//! Bodies that do not fit a buffer, between plaintext connections: whole,
//! in order, and the connections as good as before.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

#[path = "support/toy.rs"]
mod toy;

use std::io::{Read, Write};
use std::net::{Shutdown, SocketAddr, TcpStream};

use toy::{connect, endpoint, proxy_to, read_head};

fn pattern(length: usize) -> Vec<u8> {
    (0..length).map(|i| ((i * 31) >> 7) as u8).collect()
}

/// Answers every request with `said` bytes of body announced and `sent` of them sent.
fn sends(said: usize, sent: usize) -> SocketAddr {
    endpoint(move |mut stream: TcpStream| {
        while !read_head(&mut stream).is_empty() {
            let head = format!("HTTP/1.1 200 OK\r\nContent-Length: {said}\r\n\r\n");
            // The proxy may hang up as soon as its client does.
            if stream.write_all(&[head.as_bytes(), &pattern(sent)].concat()).is_err() || sent < said {
                return;
            }
        }
    })
}

fn get(stream: &mut TcpStream, length: usize) -> Vec<u8> {
    stream.write_all(b"GET / HTTP/1.1\r\nHost: a\r\n\r\n").unwrap();
    let head = read_head(stream);
    assert!(head.starts_with("HTTP/1.1 200"), "{head}");
    assert!(head.contains(&format!("Content-Length: {length}\r\n")), "{head}");
    let mut body = vec![0; length];
    stream.read_exact(&mut body).unwrap();
    body
}

#[test]
fn bodies_around_every_threshold_arrive_whole_over_one_connection() {
    for length in [8 << 10, (16 << 10) - 100, 16 << 10, 33_000, 64 << 10, 1 << 20, (8 << 20) + 1] {
        let (proxy, _publisher) = proxy_to(&[sends(length, length)]);
        let mut client = connect(proxy.http_addrs()[0]);
        for _ in 0..3 {
            assert!(get(&mut client, length) == pattern(length), "{length}");
        }
    }
}

#[test]
fn a_client_that_reads_late_gets_everything() {
    const LENGTH: usize = 16 << 20;
    let (proxy, _publisher) = proxy_to(&[sends(LENGTH, LENGTH)]);
    let mut clients: Vec<TcpStream> = (0..4).map(|_| connect(proxy.http_addrs()[0])).collect();
    for client in &mut clients {
        client.write_all(b"GET / HTTP/1.1\r\nHost: a\r\n\r\n").unwrap();
    }
    // One after the other: the last waits until all before it have read.
    for client in &mut clients {
        read_head(client);
        let mut body = vec![0; LENGTH];
        client.read_exact(&mut body).unwrap();
        assert!(body == pattern(LENGTH));
    }
}

#[test]
fn a_body_cut_short_is_not_ended_properly() {
    let (proxy, _publisher) = proxy_to(&[sends(1 << 20, 600_000)]);
    let mut client = connect(proxy.http_addrs()[0]);
    client.write_all(b"GET / HTTP/1.1\r\nHost: a\r\n\r\n").unwrap();
    read_head(&mut client);
    let mut body = Vec::new();
    // The end of the connection, or a reset, before the announced length.
    let _ = client.read_to_end(&mut body);
    assert_eq!(body, pattern(600_000));
}

#[test]
fn a_client_that_leaves_midway_frees_the_endpoint() {
    let (gone, left) = std::sync::mpsc::sync_channel(1);
    let address = endpoint(move |mut stream: TcpStream| {
        read_head(&mut stream);
        stream.write_all(b"HTTP/1.1 200 OK\r\nContent-Length: 1000000000\r\n\r\n").unwrap();
        while stream.write_all(&[0; 1 << 16]).is_ok() {}
        gone.send(()).unwrap();
    });
    let (proxy, _publisher) = proxy_to(&[address]);
    let mut client = connect(proxy.http_addrs()[0]);
    client.write_all(b"GET / HTTP/1.1\r\nHost: a\r\n\r\n").unwrap();
    client.read_exact(&mut vec![0; 1 << 20]).unwrap();
    client.shutdown(Shutdown::Both).unwrap();
    drop(client);
    left.recv_timeout(std::time::Duration::from_secs(20)).expect("the endpoint's connection was closed");
}
