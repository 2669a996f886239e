//! What is remembered of a request until it has been counted and logged.

use tokio::time::Instant;

use crate::access_log::Entry;
use crate::buffer::Output;
use crate::metrics::Outcome;
use crate::upstream::Upstream;
use crate::worker::Worker;

use super::Verdict;
use super::client::Client;

/// Facts gathered while a request is carried out.
pub(crate) struct Record {
    pub(crate) started: Instant,
    pub(crate) status: u16,
    pub(crate) bytes_in: u64,
    pub(crate) bytes_out: u64,
    pub(crate) upstream: Option<std::net::SocketAddr>,
    pub(crate) upstream_status: u16,
    pub(crate) connected: Option<Instant>,
    pub(crate) first_byte: Option<Instant>,
    pub(crate) retries: u32,
    pub(crate) reason: &'static str,
}

impl Record {
    pub(crate) fn new(started: Instant) -> Record {
        Record {
            started,
            status: 0,
            bytes_in: 0,
            bytes_out: 0,
            upstream: None,
            upstream_status: 0,
            connected: None,
            first_byte: None,
            retries: 0,
            reason: "",
        }
    }

    /// Another attempt begins.
    pub(crate) fn retry(&mut self, attempt: u32, upstream: &Upstream, worker: &Worker) {
        if attempt > 0 {
            worker.metrics.retries.inc();
        }
        self.retries = attempt;
        self.upstream = Some(upstream.live.address);
        self.first_byte = None;
    }

    fn since_start(&self, at: Option<Instant>) -> u64 {
        at.map_or(0, |at| at.saturating_duration_since(self.started).as_micros() as u64)
    }
}

/// The texts a log line needs, copied out of the request's buffer; only when there is a log.
pub(crate) struct Notes {
    text: Output,
    ends: [usize; 6],
}

/// Order of the texts in [`Notes`].
#[derive(Default)]
pub(crate) struct Texts<'a> {
    pub(crate) method: &'a [u8],
    pub(crate) host: &'a [u8],
    pub(crate) target: &'a [u8],
    pub(crate) user_agent: &'a [u8],
    pub(crate) referer: &'a [u8],
    pub(crate) request_id: &'a [u8],
}

impl Notes {
    pub(crate) fn new(texts: &Texts<'_>) -> Notes {
        let mut notes = Notes { text: Output::take(), ends: [0; 6] };
        let all = [texts.method, texts.host, texts.target, texts.user_agent, texts.referer, texts.request_id];
        for (text, end) in all.iter().zip(&mut notes.ends) {
            notes.text.extend_from_slice(text);
            *end = notes.text.len();
        }
        notes
    }

    fn text(&self, index: usize) -> &[u8] {
        let start = if index == 0 { 0 } else { self.ends[index - 1] };
        &self.text[start..self.ends[index]]
    }
}

/// Counts a finished request and writes its log line.
pub(crate) fn finish(
    worker: &Worker,
    client: &Client,
    protocol: &'static str,
    verdict: Option<&Verdict<'_>>,
    record: &Record,
    notes: Option<&Notes>,
    ended: Instant,
) {
    let duration_us = ended.saturating_duration_since(record.started).as_micros() as u64;
    worker.metrics.answered(record.status);
    worker.metrics.bytes_in.add(record.bytes_in);
    worker.metrics.bytes_out.add(record.bytes_out);
    let forward = match verdict {
        Some(Verdict::Forward(forward)) => Some(forward),
        _ => None,
    };
    let backend = forward.map(|f| &f.split.backends[f.choice.backend]);
    let upstream_us = match (record.connected, record.first_byte) {
        (Some(from), Some(to)) => to.saturating_duration_since(from).as_micros() as u64,
        _ => 0,
    };
    if let Some(backend) = backend {
        let outcome = Outcome {
            status: record.status,
            duration_us,
            upstream_us,
            bytes_in: record.bytes_in,
            bytes_out: record.bytes_out,
            retries: record.retries,
        };
        backend.stats.record(worker.index, &outcome);
    }
    let (Some(notes), Some(log)) = (notes, &mut *worker.log.borrow_mut()) else { return };
    let (origin, reason) = match verdict {
        Some(Verdict::Forward(f)) => (Some(&*f.rule.origin), record.reason),
        Some(Verdict::Answer(a)) => (a.origin.map(|o| &**o), a.reason),
        None => (None, record.reason),
    };
    log.write(&Entry {
        time: std::time::SystemTime::now(),
        client: client.peer.ip(),
        method: notes.text(0),
        host: notes.text(1),
        path: notes.text(2),
        user_agent: notes.text(3),
        referer: notes.text(4),
        request_id: notes.text(5),
        protocol,
        status: record.status,
        bytes_in: record.bytes_in,
        bytes_out: record.bytes_out,
        duration_us,
        upstream: record.upstream,
        upstream_status: record.upstream_status,
        connect_us: record.since_start(record.connected),
        first_byte_us: record.since_start(record.first_byte),
        upstream_us,
        retries: record.retries,
        origin,
        service: backend.map(|b| &*b.pool_key.0),
        canary: backend.map_or("", |b| &b.canary),
        tls: client.tls.as_ref().map(|t| t.version),
        reason,
    });
}
