//! Bytes without a protocol: what a relay leads to, and a relay that does
//! nothing else, the floor that no proxy on epoll can be below.

use std::io::{ErrorKind, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};

use anyhow::Result;
use rustix::event::epoll::{self, EventData, EventFlags};
use rustix::net::sockopt;
use tokio::io::{AsyncReadExt, AsyncWriteExt};

use crate::backend::accept;

/// Sends back what it gets, until it is killed.
pub(crate) fn echo(address: SocketAddr) -> Result<()> {
    accept(address, async |mut stream| {
        let mut buffer = vec![0; 16 * 1024];
        while let Ok(read @ 1..) = stream.read(&mut buffer).await {
            if stream.write_all(&buffer[..read]).await.is_err() {
                return;
            }
        }
    })
}

/// Sends without end once it has got something.
pub(crate) fn source(address: SocketAddr) -> Result<()> {
    accept(address, async |mut stream| {
        let bytes = vec![b'x'; 256 * 1024];
        if stream.read(&mut [0; 64]).await.is_ok_and(|read| read > 0) {
            while stream.write_all(&bytes).await.is_ok() {}
        }
    })
}

/// The listener's number among events; connections have their place times two, plus their side.
const LISTENER: u64 = u64::MAX;

/// Each connection to `address` has one of its own to `to`, and all bytes pass.
pub(crate) fn relay(address: SocketAddr, to: SocketAddr) -> Result<()> {
    let listener = TcpListener::bind(address)?;
    // The standard library's backlog is too short for what is connected at once.
    rustix::net::listen(&listener, 4096)?;
    listener.set_nonblocking(true)?;
    let poll = epoll::create(epoll::CreateFlags::CLOEXEC)?;
    epoll::add(&poll, &listener, EventData::new_u64(LISTENER), EventFlags::IN)?;
    let mut pairs: Vec<Option<Pair>> = Vec::new();
    let mut buffer = vec![0; 64 * 1024];
    let mut events = Vec::with_capacity(512);
    loop {
        events.clear();
        epoll::wait(&poll, rustix::buffer::spare_capacity(&mut events), None)?;
        for event in &events {
            if event.data.u64() == LISTENER {
                while let Ok((client, _)) = listener.accept() {
                    let index = pairs.iter().position(Option::is_none).unwrap_or(pairs.len());
                    let pair = Pair::new(client, to)?;
                    for (side, stream) in pair.streams.iter().enumerate() {
                        let number = EventData::new_u64((index * 2 + side) as u64);
                        let flags = EventFlags::IN | EventFlags::OUT | EventFlags::RDHUP | EventFlags::ET;
                        epoll::add(&poll, stream, number, flags)?;
                    }
                    if index == pairs.len() { pairs.push(Some(pair)) } else { pairs[index] = Some(pair) }
                }
                continue;
            }
            let (index, side) = ((event.data.u64() / 2) as usize, (event.data.u64() % 2) as usize);
            // The other side's event of the same wait may have ended it.
            let Some(pair) = &mut pairs[index] else { continue };
            let lives = pair.pump(side, &mut buffer).and_then(|()| match pair.rest[side].is_empty() {
                true => Ok(()),
                false => pair.pump(1 - side, &mut buffer),
            });
            if lives.is_err() || pair.ended == [true; 2] {
                pairs[index] = None;
            }
        }
    }
}

struct Pair {
    streams: [TcpStream; 2],
    /// What could not be written yet, by the side it is for.
    rest: [Vec<u8>; 2],
    /// Which side sends no more.
    ended: [bool; 2],
}

impl Pair {
    fn new(client: TcpStream, to: SocketAddr) -> Result<Pair> {
        let streams = [client, TcpStream::connect(to)?];
        for stream in &streams {
            stream.set_nonblocking(true)?;
            sockopt::set_tcp_nodelay(stream, true)?;
        }
        Ok(Pair { streams, rest: [Vec::new(), Vec::new()], ended: [false; 2] })
    }

    /// Moves what side `from` has sent, and what is left of it, to the other.
    fn pump(&mut self, from: usize, buffer: &mut [u8]) -> Result<()> {
        let to = 1 - from;
        loop {
            if !self.rest[to].is_empty() {
                let written = write(&self.streams[to], &self.rest[to])?;
                self.rest[to].drain(..written);
                if !self.rest[to].is_empty() {
                    return Ok(());
                }
            }
            if self.ended[from] {
                return Ok(());
            }
            let read = match (&self.streams[from]).read(buffer) {
                Ok(0) => {
                    self.ended[from] = true;
                    self.streams[to].shutdown(Shutdown::Write)?;
                    return Ok(());
                }
                Ok(read) => read,
                Err(error) if error.kind() == ErrorKind::WouldBlock => return Ok(()),
                Err(error) => return Err(error.into()),
            };
            let written = write(&self.streams[to], &buffer[..read])?;
            self.rest[to].extend_from_slice(&buffer[written..read]);
            // There was no more; when there is, it is told again.
            if read < buffer.len() {
                return Ok(());
            }
        }
    }
}

/// Zero when nothing can be written now.
fn write(mut stream: &TcpStream, bytes: &[u8]) -> Result<usize> {
    match stream.write(bytes) {
        Ok(written) => Ok(written),
        Err(error) if error.kind() == ErrorKind::WouldBlock => Ok(0),
        Err(error) => Err(error.into()),
    }
}
