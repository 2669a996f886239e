//! An open-loop client: requests leave when they are due, whether or not
//! earlier ones have been answered, as they do where many users know nothing
//! of each other. Latency counts from when a request was due, so a proxy that
//! stalls is charged for every request it kept waiting.

use std::collections::VecDeque;
use std::io::Write;
use std::net::{SocketAddr, TcpStream};
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use rustix::event::epoll;
use rustix::fs::Timespec;
use rustix::thread::set_current_timer_slack;

use super::tcp::{connect, on_load_cpu, read};
use super::{Load, PATH, Percentiles, histogram, request};
use crate::subject::HOST;

/// How it asks.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Open {
    pub(crate) connections: usize,
    /// Requests per second.
    pub(crate) rate: f64,
    /// The same seed is the same moments.
    pub(crate) seed: u64,
    /// Bytes of each answer's body.
    pub(crate) body: usize,
}

/// Not counted: connections and pools are filled.
const WARM_UP: Duration = Duration::from_millis(500);
/// The timer wakes so long before a request is due; the rest is spent polling. No longer, for the
/// backend runs on the same CPU.
const SPIN: Duration = Duration::from_micros(15);
/// Requests that wait for a connection before the rate is called too high.
const MAX_WAITING: usize = 100_000;
/// For the last answers.
const GRACE: Duration = Duration::from_secs(5);

impl Open {
    /// Loads `address` from one thread; every answer must be a success.
    pub(crate) fn run(self, address: SocketAddr, time: Duration) -> Result<Load> {
        on_load_cpu(|| {
            // Timers to the ns rather than to 50 µs; a kernel that refuses costs precision only.
            let _ = set_current_timer_slack(std::num::NonZeroU64::new(1));
            self.drive(address, time)
        })
    }

    fn drive(self, address: SocketAddr, time: Duration) -> Result<Load> {
        let clients = connect(address, self.connections)?;
        let poll = clients.poll;
        let mut exchanges: Vec<Exchange> = clients.streams.into_iter().map(Exchange::new).collect();
        let mut idle: VecDeque<usize> = (0..exchanges.len()).collect();
        let mut events = Vec::with_capacity(exchanges.len());
        let request = request(HOST, PATH, false);
        let mut latency = histogram();
        let mut random = fastrand::Rng::with_seed(self.seed);
        let started = Instant::now();
        let (counted, end) = (started + WARM_UP, started + WARM_UP + time);
        let mut waiting: VecDeque<Instant> = VecDeque::new();
        let mut next = started;
        loop {
            let now = Instant::now();
            while next <= now && next < end {
                waiting.push_back(next);
                next += self.gap(&mut random);
            }
            ensure!(waiting.len() < MAX_WAITING, "{:.0} requests per second are too many", self.rate);
            while let Some(&due) = waiting.front()
                && let Some(index) = idle.pop_front()
            {
                waiting.pop_front();
                exchanges[index].due = due;
                exchanges[index].stream.write_all(&request)?;
            }
            if next >= end && waiting.is_empty() && idle.len() == exchanges.len() {
                break;
            }
            ensure!(now < end + GRACE, "{} answers did not come", exchanges.len() - idle.len());
            let sleep = next.min(end + GRACE).saturating_duration_since(now).saturating_sub(SPIN);
            let sleep = Timespec { tv_sec: sleep.as_secs() as i64, tv_nsec: sleep.subsec_nanos().into() };
            events.clear();
            epoll::wait(&poll, rustix::buffer::spare_capacity(&mut events), Some(&sleep))?;
            for event in &events {
                let index = event.data.u64() as usize;
                let exchange = &mut exchanges[index];
                if exchange.advance(self.body)? {
                    if exchange.due >= counted {
                        let took = Instant::now().duration_since(exchange.due);
                        latency.saturating_record(took.as_nanos() as u64);
                    }
                    idle.push_back(index);
                }
            }
        }
        let units = latency.len();
        ensure!(units > 0, "no request was counted");
        let per_second = units as f64 / time.as_secs_f64();
        Ok(Load { units, per_second, latency: Some(Percentiles::of(&latency)) })
    }

    /// Until the next request: exponential, as of users who know nothing of each other.
    fn gap(self, random: &mut fastrand::Rng) -> Duration {
        Duration::from_secs_f64(-(1.0 - random.f64()).ln() / self.rate)
    }
}

/// A connection and the answer it waits for.
struct Exchange {
    stream: TcpStream,
    due: Instant,
    /// Read of the answer.
    had: usize,
    /// Length of its head, once known.
    head: Option<usize>,
    buffer: Box<[u8]>,
}

impl Exchange {
    fn new(stream: TcpStream) -> Exchange {
        Exchange { stream, due: Instant::now(), had: 0, head: None, buffer: vec![0; 64 * 1024].into() }
    }

    /// Whether the answer is whole.
    fn advance(&mut self, body: usize) -> Result<bool> {
        let space = if self.head.is_some() { 0 } else { self.had };
        let read = read(&mut self.stream, &mut self.buffer[space..])?;
        self.had += read;
        if self.head.is_none() {
            let bytes = &self.buffer[..self.had];
            let Some(end) = bytes.windows(4).position(|four| four == b"\r\n\r\n") else { return Ok(false) };
            ensure!(
                bytes.starts_with(b"HTTP/1.1 200"),
                "answered {}",
                String::from_utf8_lossy(&bytes[..end])
            );
            self.head = Some(end + 4);
        }
        let Some(head) = self.head.filter(|head| self.had >= head + body) else { return Ok(false) };
        ensure!(self.had == head + body, "{} bytes, not {body}", self.had - head);
        (self.had, self.head) = (0, None);
        Ok(true)
    }
}
