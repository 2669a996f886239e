//! HTTP/2 as bytes: a peer that sends whatever frames a test wants, and keeps to no rule.
#![allow(dead_code, unreachable_pub, reason = "every test file uses its own part of this")]

use std::io::{self, Write as _};
use std::net::{Shutdown, SocketAddr, TcpStream};
use std::sync::{Arc, Condvar, Mutex};
use std::time::Duration;

use socket2::{Domain, SockRef, Socket, Type};

use super::toy::PATIENCE;

pub const DATA: u8 = 0;
pub const HEADERS: u8 = 1;
pub const PRIORITY: u8 = 2;
pub const RST_STREAM: u8 = 3;
pub const SETTINGS: u8 = 4;
pub const PING: u8 = 6;
pub const GOAWAY: u8 = 7;
pub const WINDOW_UPDATE: u8 = 8;
pub const CONTINUATION: u8 = 9;

pub const END_STREAM: u8 = 1;
pub const ACK: u8 = 1;
pub const END_HEADERS: u8 = 4;

pub const FLOW_CONTROL_ERROR: u32 = 3;
pub const CANCEL: u32 = 8;
pub const ENHANCE_YOUR_CALM: u32 = 11;

pub const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";

/// One frame.
pub fn frame(kind: u8, flags: u8, stream: u32, payload: &[u8]) -> Vec<u8> {
    let length = u32::try_from(payload.len()).unwrap().to_be_bytes();
    let mut frame = vec![length[1], length[2], length[3], kind, flags];
    frame.extend(stream.to_be_bytes());
    frame.extend(payload);
    frame
}

/// A header field, literal and not to be indexed (RFC 7541 section 6.2.2).
pub fn field(name: &[u8], value: &[u8]) -> Vec<u8> {
    let mut field = vec![0];
    for text in [name, value] {
        string(&mut field, text);
    }
    field
}

/// A string literal without Huffman coding (RFC 7541 section 5.2).
pub fn string(out: &mut Vec<u8>, text: &[u8]) {
    match text.len() {
        n @ 0..127 => out.push(n as u8),
        n => {
            out.push(127);
            let mut rest = n - 127;
            while rest >= 128 {
                out.push((rest % 128) as u8 | 128);
                rest /= 128;
            }
            out.push(rest as u8);
        }
    }
    out.extend(text);
}

/// The header block of a request for `path`.
pub fn request(method: &str, path: &str) -> Vec<u8> {
    let fields = [(":method", method), (":scheme", "http"), (":authority", "a.example"), (":path", path)];
    fields.iter().flat_map(|(name, value)| field(name.as_bytes(), value.as_bytes())).collect()
}

/// A whole request without a body.
pub fn get(stream: u32, path: &str) -> Vec<u8> {
    frame(HEADERS, END_HEADERS | END_STREAM, stream, &request("GET", path))
}

pub fn reset(stream: u32) -> Vec<u8> {
    frame(RST_STREAM, 0, stream, &CANCEL.to_be_bytes())
}

pub fn window_update(stream: u32, by: u32) -> Vec<u8> {
    frame(WINDOW_UPDATE, 0, stream, &by.to_be_bytes())
}

/// A received frame.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Frame {
    pub kind: u8,
    pub flags: u8,
    pub stream: u32,
    pub payload: Vec<u8>,
}

impl Frame {
    /// The error code of a RST_STREAM, or of a GOAWAY.
    pub fn code(&self) -> u32 {
        let at = if self.kind == GOAWAY { 4 } else { 0 };
        u32::from_be_bytes(self.payload[at..at + 4].try_into().unwrap())
    }

    /// The last stream a GOAWAY speaks of.
    pub fn last_stream(&self) -> u32 {
        u32::from_be_bytes(self.payload[..4].try_into().unwrap())
    }
}

#[derive(Default)]
struct Received {
    frames: Vec<Frame>,
    ended: bool,
}

/// A client connection in the clear.
pub struct Peer {
    stream: TcpStream,
    received: Arc<(Mutex<Received>, Condvar)>,
}

impl Peer {
    /// Connects with small socket buffers and sends the preface and `settings` (id, value).
    pub fn connect(address: SocketAddr, settings: &[(u16, u32)]) -> Peer {
        let socket = Socket::new(Domain::IPV4, Type::STREAM, None).unwrap();
        // Left to itself the kernel holds megabytes, and hides what the proxy holds. Before the
        // connection stands: later is too late for the window.
        socket.set_recv_buffer_size(16 << 10).unwrap();
        socket.connect(&address.into()).unwrap();
        let stream = TcpStream::from(socket);
        SockRef::from(&stream).set_send_buffer_size(64 << 10).unwrap();
        stream.set_nodelay(true).unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        stream.set_write_timeout(Some(Duration::from_secs(2))).unwrap();
        let mut peer = Peer { stream, received: Arc::default() };
        let mut payload = Vec::new();
        for (id, value) in settings {
            payload.extend(id.to_be_bytes());
            payload.extend(value.to_be_bytes());
        }
        // Theirs will come, and hold only once they are acknowledged.
        let acknowledged = frame(SETTINGS, ACK, 0, &[]);
        peer.send(&[PREFACE, &frame(SETTINGS, 0, 0, &payload), &acknowledged].concat()).unwrap();
        peer
    }

    /// From now on what the proxy sends is read, by a thread of its own.
    pub fn read(&mut self) {
        let mut stream = self.stream.try_clone().unwrap();
        let received = self.received.clone();
        std::thread::spawn(move || {
            while let Ok(frame) = read_frame(&mut stream) {
                received.0.lock().unwrap().frames.push(frame);
                received.1.notify_all();
            }
            received.0.lock().unwrap().ended = true;
            received.1.notify_all();
        });
    }

    /// Fails when the proxy has hung up, or takes nothing for two seconds.
    pub fn send(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.stream.write_all(bytes)
    }

    /// Sends what `make` makes, over and over, until the proxy takes no more of it. False: it
    /// took `times` of them.
    pub fn flood(&mut self, times: u32, mut make: impl FnMut(u32) -> Vec<u8>) -> bool {
        const AT_ONCE: u32 = 50;
        (0..times / AT_ONCE).any(|n| {
            let batch: Vec<u8> = (0..AT_ONCE).flat_map(|m| make(n * AT_ONCE + m)).collect();
            self.send(&batch).is_err()
        })
    }

    /// Waits for the first frame that satisfies `wanted`; `None`: the connection has ended without one.
    pub fn wait(&self, wanted: impl Fn(&Frame) -> bool) -> Option<Frame> {
        let (lock, changed) = &*self.received;
        let mut received = lock.lock().unwrap();
        loop {
            if let Some(frame) = received.frames.iter().find(|frame| wanted(frame)) {
                return Some(frame.clone());
            }
            if received.ended {
                return None;
            }
            let (next, late) = changed.wait_timeout(received, PATIENCE).unwrap();
            assert!(!late.timed_out(), "the frame never came: {:?}", next.frames);
            received = next;
        }
    }

    /// Waits until the proxy has hung up, and returns the codes of its GOAWAYs.
    pub fn ended(&self) -> Vec<u32> {
        self.wait(|_| false);
        self.frames().iter().filter(|f| f.kind == GOAWAY).map(Frame::code).collect()
    }

    /// Drops what has come so far.
    pub fn forget(&self) {
        self.received.0.lock().unwrap().frames.clear();
    }

    /// What has come so far.
    pub fn frames(&self) -> Vec<Frame> {
        self.received.0.lock().unwrap().frames.clone()
    }

    pub fn hang_up(&self) {
        let _ = self.stream.shutdown(Shutdown::Both);
    }
}

impl Drop for Peer {
    fn drop(&mut self) {
        self.hang_up();
    }
}

/// The next frame.
pub fn read_frame(stream: &mut impl io::Read) -> io::Result<Frame> {
    let mut head = [0; 9];
    stream.read_exact(&mut head)?;
    let mut payload = vec![0; u32::from_be_bytes([0, head[0], head[1], head[2]]) as usize];
    stream.read_exact(&mut payload)?;
    let stream = u32::from_be_bytes([head[5], head[6], head[7], head[8]]) & !(1 << 31);
    Ok(Frame { kind: head[3], flags: head[4], stream, payload })
}
