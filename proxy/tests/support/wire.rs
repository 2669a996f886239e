//! HTTP/1 as bytes, buffered: a client that may pipeline, and endpoints that say who they are.
#![allow(dead_code, unreachable_pub, reason = "every test file uses its own part of this")]

use std::io::{self, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::sync::Arc;

use rustls::{ClientConfig, ClientConnection, StreamOwned};

use super::toy;

/// One message: its head up to and including the empty line, and its decoded body.
#[derive(Debug)]
pub struct Message {
    pub head: String,
    pub body: Vec<u8>,
}

impl Message {
    pub fn status(&self) -> u16 {
        self.head.get(9..12).and_then(|s| s.parse().ok()).unwrap_or(0)
    }

    /// The first header called `name` (lower case).
    pub fn header(&self, name: &str) -> Option<&str> {
        self.head.lines().find_map(|line| {
            let (n, value) = line.split_once(':')?;
            n.eq_ignore_ascii_case(name).then(|| value.trim())
        })
    }

    pub fn text(&self) -> &str {
        std::str::from_utf8(&self.body).unwrap()
    }
}

/// Either end of an HTTP/1 connection.
pub struct Wire<S> {
    pub stream: S,
    buffer: Vec<u8>,
    start: usize,
}

pub type Plain = Wire<TcpStream>;
pub type Secure = Wire<StreamOwned<ClientConnection, TcpStream>>;

/// A plaintext client.
pub fn plain(address: SocketAddr) -> Plain {
    let stream = toy::connect(address);
    stream.set_nodelay(true).unwrap();
    Wire::new(stream)
}

/// A TLS client that takes any certificate and offers HTTP/1.1 alone.
pub fn secure(address: SocketAddr, name: &str, config: &Arc<ClientConfig>) -> Secure {
    let tcp = toy::connect(address);
    tcp.set_nodelay(true).unwrap();
    let session = ClientConnection::new(config.clone(), name.to_owned().try_into().unwrap()).unwrap();
    Wire::new(StreamOwned::new(session, tcp))
}

impl<S: Read + Write> Wire<S> {
    pub fn new(stream: S) -> Wire<S> {
        Wire { stream, buffer: Vec::new(), start: 0 }
    }

    pub fn send(&mut self, bytes: &[u8]) {
        self.stream.write_all(bytes).unwrap();
        self.stream.flush().unwrap();
    }

    /// Sends `request` and waits for its answer.
    pub fn ask(&mut self, request: &[u8]) -> Message {
        self.send(request);
        self.receive().unwrap().expect("an answer before the end of the connection")
    }

    /// The next message: a body of its `Content-Length` or in chunks. `None`: the connection ended before it.
    pub fn receive(&mut self) -> io::Result<Option<Message>> {
        let Some(head) = self.take_until(b"\r\n\r\n")? else { return Ok(None) };
        let mut message = Message { head: String::from_utf8(head).unwrap(), body: Vec::new() };
        if let Some(length) = message.header("content-length") {
            let length = length.parse().unwrap();
            message.body = self.take(length)?;
        } else if message.header("transfer-encoding").is_some() {
            loop {
                let line = self.take_until(b"\r\n")?.ok_or(io::ErrorKind::UnexpectedEof)?;
                let size = std::str::from_utf8(&line).unwrap().trim();
                let size = usize::from_str_radix(size, 16).unwrap();
                let chunk = self.take(size + 2)?;
                if size == 0 {
                    break;
                }
                message.body.extend_from_slice(&chunk[..size]);
            }
        }
        Ok(Some(message))
    }

    /// `n` bytes, of whatever protocol.
    pub fn exactly(&mut self, n: usize) -> io::Result<Vec<u8>> {
        self.take(n)
    }

    fn take_until(&mut self, end: &[u8]) -> io::Result<Option<Vec<u8>>> {
        let mut searched = 0;
        loop {
            let filled = &self.buffer[self.start..];
            if let Some(at) = filled[searched..].windows(end.len()).position(|w| w == end) {
                return self.take(searched + at + end.len()).map(Some);
            }
            searched = filled.len().saturating_sub(end.len() - 1);
            if !self.fill()? {
                return if self.start == self.buffer.len() {
                    Ok(None)
                } else {
                    Err(io::ErrorKind::UnexpectedEof.into())
                };
            }
        }
    }

    fn take(&mut self, n: usize) -> io::Result<Vec<u8>> {
        while self.buffer.len() - self.start < n {
            if !self.fill()? {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
        }
        let taken = self.buffer[self.start..self.start + n].to_vec();
        self.start += n;
        Ok(taken)
    }

    fn fill(&mut self) -> io::Result<bool> {
        if self.start > 0 {
            self.buffer.drain(..self.start);
            self.start = 0;
        }
        let mut room = [0; 16 << 10];
        let n = self.stream.read(&mut room)?;
        self.buffer.extend_from_slice(&room[..n]);
        Ok(n > 0)
    }
}

/// An endpoint that answers every request with what `answer` makes of its head and body:
/// a complete response. It ends a connection when the other side does.
pub fn answers(answer: impl Fn(&Message) -> Vec<u8> + Send + Sync + 'static) -> SocketAddr {
    toy::endpoint(move |stream| {
        let _ = stream.set_nodelay(true);
        // Idle for as long as the proxy likes.
        let _ = stream.set_read_timeout(None);
        let mut wire = Wire::new(stream);
        while let Ok(Some(request)) = wire.receive() {
            let answer = answer(&request);
            if wire.stream.write_all(&answer).is_err() {
                return;
            }
        }
    })
}

/// An endpoint whose every answer is `name`.
pub fn named(name: &'static str) -> SocketAddr {
    let answer = ok(name.as_bytes());
    answers(move |_| answer.clone())
}

/// A 200 with a length.
pub fn ok(body: &[u8]) -> Vec<u8> {
    let mut answer = format!("HTTP/1.1 200 OK\r\nContent-Length: {}\r\n\r\n", body.len()).into_bytes();
    answer.extend_from_slice(body);
    answer
}
