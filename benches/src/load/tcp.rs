//! Bytes through a relay: small messages back and forth, and as many as go one way.

use std::io::{ErrorKind, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use rustix::event::epoll;
use rustix::fs::Timespec;

use super::{Load, Percentiles, histogram};
use crate::{OTHERS_CPU, machine};

const MESSAGE: [u8; 64] = [b'x'; 64];
/// Long enough for a whole relay to have been asleep.
const SILENCE: Timespec = Timespec { tv_sec: 5, tv_nsec: 0 };
const MIB: u64 = 1024 * 1024;

/// One message under way on each of `connections`; a unit is a message there and back.
pub(crate) fn ping_pong(address: SocketAddr, connections: usize, time: Duration) -> Result<Load> {
    on_load_cpu(|| {
        let mut latency = histogram();
        let (mut sent, mut had) = (vec![Instant::now(); connections], vec![0; connections]);
        let mut clients = connect(address, connections)?;
        let started = Instant::now();
        for (client, sent) in clients.streams.iter_mut().zip(&mut sent) {
            *sent = Instant::now();
            client.write_all(&MESSAGE)?;
        }
        let mut buffer = [0; MESSAGE.len()];
        while started.elapsed() < time {
            for index in clients.ready()? {
                let stream = &mut clients.streams[index];
                had[index] += read(stream, &mut buffer[had[index]..])?;
                if had[index] == MESSAGE.len() {
                    let now = Instant::now();
                    latency.saturating_record(now.duration_since(sent[index]).as_nanos() as u64);
                    (had[index], sent[index]) = (0, now);
                    stream.write_all(&MESSAGE)?;
                }
            }
        }
        let took = started.elapsed().as_secs_f64();
        let units = latency.len();
        Ok(Load { units, per_second: units as f64 / took, latency: Some(Percentiles::of(&latency)) })
    })
}

/// Reads what the source sends; a unit is a MiB.
pub(crate) fn bulk(address: SocketAddr, connections: usize, time: Duration) -> Result<Load> {
    on_load_cpu(|| {
        let mut clients = connect(address, connections)?;
        let mut buffer = vec![0; 256 * 1024];
        let mut bytes = 0;
        clients.streams.iter_mut().try_for_each(|client| client.write_all(&MESSAGE))?;
        let started = Instant::now();
        while started.elapsed() < time {
            for index in clients.ready()? {
                bytes += read(&mut clients.streams[index], &mut buffer)? as u64;
            }
        }
        let took = started.elapsed().as_secs_f64();
        Ok(Load { units: bytes / MIB, per_second: bytes as f64 / MIB as f64 / took, latency: None })
    })
}

/// In a thread of its own, for the CPU it is bound to.
pub(crate) fn on_load_cpu<T: Send>(work: impl FnOnce() -> Result<T> + Send) -> Result<T> {
    std::thread::scope(|scope| {
        let thread = scope.spawn(|| {
            machine::pin(OTHERS_CPU)?;
            work()
        });
        thread.join().expect("no client panics")
    })
}

/// Connections, and which of them have something to read.
pub(crate) struct Clients {
    pub(crate) streams: Vec<TcpStream>,
    pub(crate) poll: std::os::fd::OwnedFd,
    events: Vec<epoll::Event>,
}

/// Non-blocking from here on.
pub(crate) fn connect(address: SocketAddr, connections: usize) -> Result<Clients> {
    let poll = epoll::create(epoll::CreateFlags::CLOEXEC)?;
    let mut streams = Vec::new();
    for index in 0..connections {
        let stream = TcpStream::connect(address).context("connect")?;
        stream.set_nodelay(true)?;
        stream.set_nonblocking(true)?;
        epoll::add(&poll, &stream, epoll::EventData::new_u64(index as u64), epoll::EventFlags::IN)?;
        streams.push(stream);
    }
    Ok(Clients { streams, poll, events: Vec::with_capacity(connections.max(1)) })
}

impl Clients {
    /// Waits for some; silence of seconds is an error.
    fn ready(&mut self) -> Result<Vec<usize>> {
        self.events.clear();
        epoll::wait(&self.poll, rustix::buffer::spare_capacity(&mut self.events), Some(&SILENCE))?;
        ensure!(!self.events.is_empty(), "nothing came for seconds");
        Ok(self.events.iter().map(|event| event.data.u64() as usize).collect())
    }
}

/// Zero if there is nothing yet; a connection that ended is an error.
pub(crate) fn read(stream: &mut TcpStream, buffer: &mut [u8]) -> Result<usize> {
    match stream.read(buffer) {
        Ok(0) => anyhow::bail!("a connection was closed"),
        Ok(read) => Ok(read),
        Err(error) if error.kind() == ErrorKind::WouldBlock => Ok(0),
        Err(error) => Err(error.into()),
    }
}
