//! One line per request, written off the hot path.
//!
//! A worker formats lines into a buffer of its own and hands it over when it
//! is full, every second, and when it drains. One thread writes. Buffers go
//! round: each worker has a fixed number, so a request never allocates, never
//! waits and never makes the log's memory grow. When all of a worker's buffers
//! wait for a slow destination, its lines are dropped and counted.
//!
//! ```text
//!  worker 0: WorkerLog ── full ──┐                      ┌─► stdout or file
//!  worker 1: WorkerLog ── full ──┴─► bounded channel ─► writer thread
//!       ▲                                               │
//!       └──────────────── empty, lines lost ────────────┘
//! ```

mod format;

use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::net::{IpAddr, SocketAddr};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, SyncSender, TrySendError, sync_channel};
use std::thread::JoinHandle;
use std::time::SystemTime;

use tracing::{error, info};

use crate::clock::WallClock;
use crate::metrics::WorkerMetrics;
use crate::table::Origin;

/// A buffer this full is handed to the writer.
const BATCH_BYTES: usize = 32 * 1024;
/// What a buffer starts with, and shrinks back to: a batch and one long line.
const BUFFER_BYTES: usize = BATCH_BYTES + 8 * 1024;
/// Buffers of one worker: one being filled, the others on their way.
const BUFFERS_PER_WORKER: usize = 4;

/// What lines look like.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Format {
    /// One JSON object per line, ASCII only.
    #[default]
    Json,
    /// nginx's `combined`, then what ingress-nginx adds about the upstream.
    Combined,
}

/// Where lines go.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum Destination {
    /// Standard output.
    #[default]
    Stdout,
    /// Appended to this file.
    File(PathBuf),
}

/// How to log.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct AccessLogConfig {
    /// What lines look like.
    pub format: Format,
    /// Where they go.
    pub destination: Destination,
}

/// One finished request. Bytes come from clients and endpoints as they are;
/// the format escapes them. Empty means absent.
#[derive(Clone, Copy, Debug)]
pub struct Entry<'a> {
    /// When its first byte arrived.
    pub time: SystemTime,
    /// Who asked: the peer, or whom a trusted peer names.
    pub client: IpAddr,
    /// The method.
    pub method: &'a [u8],
    /// The host, from `Host` or `:authority`.
    pub host: &'a [u8],
    /// The request target, with its query.
    pub path: &'a [u8],
    /// As `HTTP/1.1`.
    pub protocol: &'a str,
    /// What the client saw; 499 when it left before there was a status.
    pub status: u16,
    /// Bytes of the request body.
    pub bytes_in: u64,
    /// Bytes of the response body.
    pub bytes_out: u64,
    /// From the first byte of the request to the last of the answer, in µs.
    pub duration_us: u64,
    /// The endpoint that was asked last.
    pub upstream: Option<SocketAddr>,
    /// What it answered; 0 when it did not.
    pub upstream_status: u16,
    /// Until its connection stood, in µs; 0 for a pooled one.
    pub connect_us: u64,
    /// From the last byte of the request sent to the first of its answer, in µs.
    pub first_byte_us: u64,
    /// From choosing an endpoint to the last byte it sent, in µs.
    pub upstream_us: u64,
    /// Attempts beyond the first.
    pub retries: u32,
    /// The object whose rule decided.
    pub origin: Option<&'a Origin>,
    /// The pool, `namespace/service:port`.
    pub service: Option<&'a str>,
    /// The canary that served it; empty for the primary.
    pub canary: &'a str,
    /// `X-Request-ID`, the client's or a new one.
    pub request_id: &'a [u8],
    /// `User-Agent`.
    pub user_agent: &'a [u8],
    /// `Referer`.
    pub referer: &'a [u8],
    /// The TLS version, as `TLSv1.3`; `None` in the clear.
    pub tls: Option<&'a str>,
    /// Why the proxy answered itself; empty when it did not.
    pub reason: &'a str,
}

/// The writer thread.
pub struct AccessLog {
    writer: JoinHandle<()>,
    reopener: Reopener,
}

/// Has the log's file opened anew, after it was renamed to rotate it.
#[derive(Clone, Debug, Default)]
pub struct Reopener(Arc<AtomicBool>);

impl Reopener {
    /// The next lines go to the file that then has the log's name, which is made
    /// if there is none. Until the next line nothing happens; the renamed file is
    /// not written to any more.
    pub fn reopen(&self) {
        self.0.store(true, Ordering::Release);
    }
}

impl AccessLog {
    /// Starts the writer, and a log for each worker, in their order.
    ///
    /// # Errors
    /// When the file cannot be opened or the thread not be started.
    pub fn start(
        config: &AccessLogConfig,
        workers: &[Arc<WorkerMetrics>],
    ) -> io::Result<(AccessLog, Vec<WorkerLog>)> {
        let (destination, path): (Box<dyn Write + Send>, _) = match &config.destination {
            Destination::Stdout => (Box::new(io::stdout()), None),
            Destination::File(path) => (Box::new(open(path)?), Some(path.clone())),
        };
        AccessLog::start_on(destination, path, config.format, workers)
    }

    fn start_on(
        destination: Box<dyn Write + Send>,
        path: Option<PathBuf>,
        format: Format,
        workers: &[Arc<WorkerMetrics>],
    ) -> io::Result<(AccessLog, Vec<WorkerLog>)> {
        // Room for every buffer there is: handing one over can never fail for want of room.
        let (full, batches) = sync_channel(workers.len().max(1) * BUFFERS_PER_WORKER);
        let mut returns = Vec::with_capacity(workers.len());
        let mut logs = Vec::with_capacity(workers.len());
        for (worker, metrics) in workers.iter().enumerate() {
            let (returned, empty) = sync_channel(BUFFERS_PER_WORKER);
            for _ in 1..BUFFERS_PER_WORKER {
                // There is room: the channel holds one more than these.
                let _ =
                    returned.try_send(Returned { buffer: Vec::with_capacity(BUFFER_BYTES), lines_lost: 0 });
            }
            returns.push(returned);
            logs.push(WorkerLog {
                worker,
                format,
                clock: WallClock::default(),
                buffer: Vec::with_capacity(BUFFER_BYTES),
                full: full.clone(),
                empty,
                metrics: metrics.clone(),
            });
        }
        let reopener = Reopener::default();
        let writer = Writer { destination, path, reopener: reopener.clone(), returns, failing: false };
        let writer =
            std::thread::Builder::new().name("access-log".to_owned()).spawn(|| writer.run(batches))?;
        Ok((AccessLog { writer, reopener }, logs))
    }

    /// For whoever hears that the file was rotated.
    pub fn reopener(&self) -> Reopener {
        self.reopener.clone()
    }

    /// Waits until everything handed over is written. Drop every
    /// [`WorkerLog`] first; does not return before, nor while the destination blocks.
    pub fn join(self) {
        // A panic of the writer has been reported by the panic hook.
        let _ = self.writer.join();
    }
}

/// A worker's end of the log. Hands over what it holds when dropped.
pub struct WorkerLog {
    worker: usize,
    format: Format,
    clock: WallClock,
    buffer: Vec<u8>,
    full: SyncSender<Batch>,
    empty: Receiver<Returned>,
    metrics: Arc<WorkerMetrics>,
}

impl WorkerLog {
    /// Adds a line, or counts it as dropped. Never waits.
    pub fn write(&mut self, entry: &Entry<'_>) {
        if self.buffer.len() >= BATCH_BYTES && !self.flush() {
            self.metrics.log_lines_dropped.inc();
            return;
        }
        match self.format {
            Format::Json => format::json(&mut self.buffer, &mut self.clock, entry),
            Format::Combined => format::combined(&mut self.buffer, &mut self.clock, entry),
        }
        if self.buffer.len() >= BATCH_BYTES {
            self.flush();
        }
    }

    /// Hands over the lines so far. `false` when every other buffer is still
    /// with the writer: they stay, for the next call.
    pub fn flush(&mut self) -> bool {
        if self.buffer.is_empty() {
            return true;
        }
        let Ok(Returned { buffer, lines_lost }) = self.empty.try_recv() else { return false };
        self.metrics.log_lines_dropped.add(lines_lost);
        let buffer = std::mem::replace(&mut self.buffer, buffer);
        self.send(buffer);
        true
    }

    fn send(&self, buffer: Vec<u8>) {
        // Only a writer that panicked leaves the channel, and with the buffers it held logging ends.
        let sent = self.full.try_send(Batch { worker: self.worker, buffer });
        if let Err(TrySendError::Full(batch) | TrySendError::Disconnected(batch)) = sent {
            self.metrics.log_lines_dropped.add(lines(&batch.buffer));
        }
    }
}

impl Drop for WorkerLog {
    fn drop(&mut self) {
        let buffer = std::mem::take(&mut self.buffer);
        if !buffer.is_empty() {
            self.send(buffer);
        }
    }
}

/// Whole lines of one worker.
struct Batch {
    worker: usize,
    buffer: Vec<u8>,
}

/// An emptied buffer, and how many of its lines could not be written: the
/// worker adds them up, being the only writer of its counters.
struct Returned {
    buffer: Vec<u8>,
    lines_lost: u64,
}

struct Writer {
    destination: Box<dyn Write + Send>,
    /// Of a file.
    path: Option<PathBuf>,
    reopener: Reopener,
    /// By worker.
    returns: Vec<SyncSender<Returned>>,
    /// Whether the last write failed: the first failure and the recovery are reported, not each batch.
    failing: bool,
}

impl Writer {
    fn run(mut self, batches: Receiver<Batch>) {
        while let Ok(Batch { worker, mut buffer }) = batches.recv() {
            if self.reopener.0.swap(false, Ordering::AcqRel) {
                self.reopen();
            }
            let lines_lost = match self.destination.write_all(&buffer).and_then(|()| self.destination.flush())
            {
                Ok(()) => {
                    if std::mem::take(&mut self.failing) {
                        info!("access log: written again");
                    }
                    0
                }
                Err(error) => {
                    if !std::mem::replace(&mut self.failing, true) {
                        error!(%error, "access log: cannot be written, lines are being lost");
                    }
                    lines(&buffer)
                }
            };
            buffer.clear();
            // A batch of hostile lines may have grown it far beyond its share.
            buffer.shrink_to(BUFFER_BYTES);
            // The worker may have gone; there is room, as it has no more buffers than the channel.
            let _ = self.returns[worker].try_send(Returned { buffer, lines_lost });
        }
    }

    fn reopen(&mut self) {
        let Some(path) = &self.path else { return };
        match open(path) {
            Ok(file) => self.destination = Box::new(file),
            Err(error) => {
                error!(%error, "access log: cannot be opened again, lines go where they went before");
            }
        }
    }
}

fn open(path: &Path) -> io::Result<File> {
    OpenOptions::new().append(true).create(true).open(path)
}

fn lines(batch: &[u8]) -> u64 {
    batch.iter().filter(|b| **b == b'\n').count() as u64
}

#[cfg(test)]
mod tests;
