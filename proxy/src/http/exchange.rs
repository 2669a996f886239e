//! One request to one HTTP/1 endpoint, and to the next one if that fails before
//! anything irrevocable has happened. The client's side is a [`Source`].

use std::cell::Cell;
use std::future::poll_fn;
use std::io;
use std::rc::Rc;
use std::task::{Context, Poll};

use bytes::Bytes;
use http::HeaderMap;
use smallvec::SmallVec;
use tokio::time::Instant;

use crate::buffer::{Buffer, Output};
use crate::clock;
use crate::conn::Conn;
use crate::metrics::Reject;
use crate::router::Router;
use crate::timer::{Late, Timer};
use crate::upstream::{Peer, Upstream};
use crate::worker::Worker;

use super::Forward;
use super::forward::{Delivery, write_response};
use super::head::{Framing, HeaderRoom};
use super::record::Record;
use super::response::{BadResponse, ResponseHead};

/// Room for a response head; endpoints are trusted to stay below it.
pub(crate) const RESPONSE_HEAD_BYTES: usize = 64 << 10;

/// The client's side of an exchange: where the request body comes from.
pub(crate) trait Source {
    /// Moves body bytes to an HTTP/1 endpoint. `Ready(Ok)`: some moved, or it is done.
    fn poll_upload(&mut self, cx: &mut Context<'_>, endpoint: &mut Conn) -> Poll<Result<(), UploadError>>;

    /// The next piece of body, for an HTTP/2 endpoint.
    fn poll_piece(&mut self, cx: &mut Context<'_>) -> Poll<Result<Piece, UploadError>>;

    /// The whole body is through.
    fn is_done(&self) -> bool;

    /// There is more to move, and the endpoint takes it.
    fn is_active(&self) -> bool;

    /// Something was taken from the client that cannot be sent again.
    fn has_started(&self) -> bool;

    /// Whom an exchange in which nothing moves is waiting for.
    fn awaits(&self) -> Awaits;

    /// The endpoint takes no more.
    fn abandon(&mut self);

    /// Ready when the client no longer wants an answer.
    fn poll_gone(&mut self, cx: &mut Context<'_>) -> Poll<()>;

    /// Passes on a complete 1xx response head. False: the client is gone.
    async fn interim(&mut self, timer: &mut Timer, head: &[u8]) -> bool;
}

/// What an exchange waits for: each has a deadline of its own, and another culprit.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Awaits {
    /// The client, for more of the request body.
    Client,
    /// The endpoint, for room to write more of it.
    Room,
    /// The endpoint, for its answer.
    Answer,
}

/// A piece of request body.
pub(crate) enum Piece {
    Data(Bytes),
    End(Option<HeaderMap>),
}

/// Why a body did not get through.
#[derive(Debug)]
pub(crate) enum UploadError {
    /// The client ended or broke its connection.
    Client,
    /// Its framing is wrong.
    Malformed(&'static str),
    /// Larger than the limit.
    TooLarge,
    /// The endpoint does not take it; it may still answer.
    Endpoint,
}

/// Why an exchange came to nothing.
#[derive(Debug)]
pub(crate) enum Failure {
    /// The endpoint's fault, before any byte of an answer.
    Endpoint(&'static str),
    /// It took too long.
    Late,
    /// It answered nonsense.
    Nonsense(&'static str),
    /// The client is gone.
    Client,
    /// Worth an answer of this status: the client's fault, or nobody to ask.
    Answer(u16, &'static str),
}

/// The client stopped sending the body of its request.
pub(crate) const SLOW_BODY: Failure = Failure::Answer(408, "request body took too long");

impl Failure {
    /// Status and reason to answer with; `None`: there is nobody to answer.
    pub(crate) fn answer(&self) -> Option<(u16, &'static str)> {
        match *self {
            Failure::Client => None,
            Failure::Answer(status, reason) => Some((status, reason)),
            Failure::Late => Some((504, "endpoint timed out")),
            Failure::Endpoint(reason) | Failure::Nonsense(reason) => Some((502, reason)),
        }
    }
}

impl From<UploadError> for Failure {
    fn from(error: UploadError) -> Failure {
        match error {
            UploadError::Client => Failure::Client,
            UploadError::Malformed(reason) => Failure::Answer(400, reason),
            UploadError::TooLarge => Failure::Answer(413, "request body too large"),
            UploadError::Endpoint => Failure::Endpoint("connection to the endpoint broke"),
        }
    }
}

/// A request ready to be sent.
pub(crate) struct Order<'r> {
    pub(crate) worker: &'r Worker,
    pub(crate) router: &'r Router,
    pub(crate) forward: Forward<'r>,
    pub(crate) idempotent: bool,
    pub(crate) is_head: bool,
    answered: Answered,
}

/// What is remembered of the endpoint that was asked, and of the one that answered.
#[derive(Default)]
struct Answered {
    /// Where it matters how long an answer takes: who was asked last, by id, and when.
    asked: Cell<Option<(u64, Instant)>>,
    /// By id; 0 before the answer.
    by: Cell<u64>,
}

impl<'r> Order<'r> {
    pub(crate) fn new(
        worker: &'r Worker,
        router: &'r Router,
        forward: Forward<'r>,
        idempotent: bool,
        is_head: bool,
    ) -> Order<'r> {
        Order { worker, router, forward, idempotent, is_head, answered: Answered::default() }
    }
}

impl Order<'_> {
    /// Most body bytes this request may have.
    pub(crate) fn body_limit(&self) -> u64 {
        match self.forward.rule.limits.max_body.or(self.worker.config.limits.body_bytes) {
            None | Some(0) => u64::MAX,
            Some(n) => n,
        }
    }

    /// The next endpoint to try.
    pub(crate) fn pick(&self, tried: &[u64]) -> Option<Rc<Upstream>> {
        let pool = self.router.pool(self.forward.split.backends[self.forward.choice.backend].pool);
        let endpoint = pool.pick_for(&self.forward.steer, &self.worker.turns, clock::now_ms(), tried)?;
        if pool.measures() {
            self.answered.asked.set(Some((endpoint.live.id, Instant::now())));
        }
        Some(self.worker.upstreams.of(&endpoint.live))
    }

    /// The head of an endpoint's answer is here.
    pub(crate) fn answered(&self, upstream: &Upstream) {
        upstream.live.succeeded();
        self.answered.by.set(upstream.live.id);
        if let Some((id, at)) = self.answered.asked.get()
            && id == upstream.live.id
        {
            upstream.live.latency().record(clock::now_ms(), at.elapsed().as_micros() as u64);
        }
    }

    /// Header lines to add to the answer.
    pub(crate) fn cookie_lines(&self) -> SmallVec<[u8; 256]> {
        let Forward { rule, split, choice, steer } = &self.forward;
        let (served, turns) = (self.answered.by.get(), &self.worker.turns);
        split.cookie_lines(*choice, steer, &rule.path, served, self.router, turns)
    }

    /// Counts a failure against an endpoint.
    pub(crate) fn failed(&self, upstream: &Upstream) {
        if upstream.live.failed(clock::now_ms(), &self.worker.config.ejection) {
            self.worker.metrics.ejections.inc();
            tracing::warn!(endpoint = %upstream.live.address, "endpoint keeps failing: left alone for a while");
        }
    }

    pub(crate) fn connect_deadline(&self) -> Instant {
        let own = self.forward.rule.limits.connect_timeout;
        Instant::now() + own.unwrap_or(self.worker.config.timeouts.connect)
    }

    pub(crate) fn send_deadline(&self) -> Instant {
        let own = self.forward.rule.limits.send_timeout;
        Instant::now() + own.unwrap_or(self.worker.config.timeouts.send)
    }

    pub(crate) fn deadline(&self, awaits: Awaits) -> Instant {
        match awaits {
            Awaits::Client => Instant::now() + self.worker.config.timeouts.client,
            Awaits::Room => self.send_deadline(),
            Awaits::Answer => self.read_deadline(),
        }
    }

    pub(crate) fn read_deadline(&self) -> Instant {
        let own = self.forward.rule.limits.read_timeout;
        Instant::now() + own.unwrap_or(self.worker.config.timeouts.read)
    }

    /// Tries endpoints until one has answered with a final response head, which
    /// is then whole in `answer`. `head` is the request head, and body bytes
    /// that can be sent again.
    pub(crate) async fn obtain<S: Source>(
        &self,
        timer: &mut Timer,
        source: &mut S,
        head: &[u8],
        answer: &mut Buffer,
        record: &mut Record,
    ) -> Result<(Rc<Upstream>, Peer), Failure> {
        let mut tried = SmallVec::<[u64; 4]>::new();
        let mut last = Failure::Answer(503, "no endpoint");
        let mut fresh_only = false;
        for attempt in 0..self.worker.config.limits.tries {
            let Some(upstream) = self.pick(&tried) else { break };
            record.retry(attempt, &upstream, self.worker);
            let idle = if fresh_only { None } else { self.worker.upstreams.checkout(&upstream) };
            let reused = idle.is_some();
            let (failure, sent) = match self.connected(timer, &upstream, idle).await {
                Err(failure) => (failure, false),
                Ok(mut peer) => {
                    record.connected = Some(if reused { record.started } else { Instant::now() });
                    peer.occupy(&upstream);
                    match self.exchange(timer, source, head, &mut peer.conn, answer, record).await {
                        Ok(()) => {
                            self.answered(&upstream);
                            return Ok((upstream, peer));
                        }
                        Err(failure) => (failure, true),
                    }
                }
            };
            let again = !sent || self.idempotent && !source.has_started();
            match failure {
                // Most likely closed while idle; that says nothing about the endpoint's health.
                Failure::Endpoint(_) if reused => {
                    self.worker.upstreams.discard_idle(&upstream);
                    fresh_only = true;
                }
                Failure::Endpoint(_) | Failure::Late => {
                    self.failed(&upstream);
                    tried.push(upstream.live.id);
                }
                Failure::Nonsense(_) | Failure::Client | Failure::Answer(..) => return Err(failure),
            }
            if !again || sent && matches!(failure, Failure::Late) {
                return Err(failure);
            }
            last = failure;
        }
        if let Failure::Answer(503, _) = last {
            self.worker.metrics.rejected(Reject::NoEndpoint);
        }
        Err(last)
    }

    async fn connected(
        &self,
        timer: &mut Timer,
        upstream: &Upstream,
        idle: Option<Peer>,
    ) -> Result<Peer, Failure> {
        if let Some(peer) = idle {
            return Ok(peer);
        }
        // Boxed, as everything rare: a connection's task is as large as its largest state.
        let connecting = Box::pin(self.worker.upstreams.connect(upstream));
        match timer.within(self.connect_deadline(), connecting).await {
            Ok(Ok(peer)) => Ok(peer),
            Ok(Err(_)) => Err(Failure::Endpoint("cannot connect to the endpoint")),
            Err(Late) => {
                self.worker.metrics.upstream_failed.inc();
                Err(Failure::Late)
            }
        }
    }

    /// Sends the request and waits for a final response head. Interim responses
    /// pass to the client on the way.
    async fn exchange<S: Source>(
        &self,
        timer: &mut Timer,
        source: &mut S,
        head: &[u8],
        endpoint: &mut Conn,
        answer: &mut Buffer,
        record: &mut Record,
    ) -> Result<(), Failure> {
        // A failed write is not the end: the endpoint may have answered before it hung up.
        if let Err(Late) = timer.within(self.send_deadline(), endpoint.send([head, &[], &[]])).await {
            return Err(Failure::Late);
        }
        loop {
            match step(self, timer, source, endpoint, answer).await {
                Ok(0) if answer.is_empty() => {
                    return Err(Failure::Endpoint("endpoint closed the connection"));
                }
                // Not to be tried again: half a head must not run into that of the next endpoint.
                Ok(0) | Err(Failure::Endpoint(_)) if !answer.is_empty() => {
                    return Err(Failure::Nonsense("endpoint closed the connection within a response head"));
                }
                read => read?,
            };
            record.first_byte.get_or_insert_with(Instant::now);
            while let Some(status) = peek_status(answer.filled(), self.is_head)? {
                if !(100..200).contains(&status) || status == 101 {
                    return Ok(());
                }
                let (interim, length) = interim_head(answer.filled())?;
                answer.consume(length);
                if !source.interim(timer, &interim).await {
                    return Err(Failure::Client);
                }
            }
            if answer.has_storage() && !answer.make_room(RESPONSE_HEAD_BYTES) {
                return Err(Failure::Nonsense("response head too large"));
            }
        }
    }
}

enum Step {
    Read(io::Result<usize>),
    Uploaded,
    UploadFailed(UploadError),
    Gone,
}

/// Waits until the endpoint has sent something into `answer`; meanwhile the
/// request body goes up. Returns the bytes read, 0 at the end of the stream.
/// The deadline starts anew with every piece that moves.
pub(crate) async fn step<S: Source>(
    order: &Order<'_>,
    timer: &mut Timer,
    source: &mut S,
    endpoint: &mut Conn,
    answer: &mut Buffer,
) -> Result<usize, Failure> {
    loop {
        let awaits = source.awaits();
        let next = poll_fn(|cx| {
            let uploaded = match source.is_active() {
                true => source.poll_upload(cx, endpoint),
                false => Poll::Pending,
            };
            match (endpoint.poll_fill(cx, answer), uploaded) {
                (Poll::Ready(read), _) => Poll::Ready(Step::Read(read)),
                (Poll::Pending, Poll::Ready(Ok(()))) => Poll::Ready(Step::Uploaded),
                (Poll::Pending, Poll::Ready(Err(error))) => Poll::Ready(Step::UploadFailed(error)),
                // Another deadline holds from here on.
                (Poll::Pending, Poll::Pending) if source.awaits() != awaits => Poll::Ready(Step::Uploaded),
                (Poll::Pending, Poll::Pending) => source.poll_gone(cx).map(|()| Step::Gone),
            }
        });
        return match timer.within(order.deadline(awaits), next).await {
            Ok(Step::Read(Ok(n))) => Ok(n),
            Ok(Step::Read(Err(_))) => Err(Failure::Endpoint("connection to the endpoint broke")),
            Ok(Step::Uploaded) => continue,
            // It may have answered before it stopped taking the body.
            Ok(Step::UploadFailed(UploadError::Endpoint)) => {
                source.abandon();
                continue;
            }
            Ok(Step::UploadFailed(error)) => Err(error.into()),
            Ok(Step::Gone) => Err(Failure::Client),
            // The endpoint waits as we do: not its fault.
            Err(Late) if awaits == Awaits::Client => Err(SLOW_BODY),
            Err(Late) => Err(Failure::Late),
        };
    }
}

/// The 1xx head at the front of `bytes`, written anew, and its length there.
fn interim_head(bytes: &[u8]) -> Result<(Output, usize), Failure> {
    let mut room = HeaderRoom::new();
    let Ok(Some(head)) = ResponseHead::parse(bytes, &mut room, false) else {
        return Err(Failure::Nonsense("malformed response head"));
    };
    let mut interim = Output::take();
    write_response(&mut interim, &head, Delivery { framing: Framing::None, keep_alive: true, minor: 1 }, &[]);
    Ok((interim, head.length))
}

/// Status of a complete response head, without parsing it whole.
fn peek_status(bytes: &[u8], to_head: bool) -> Result<Option<u16>, Failure> {
    let complete = memchr::memmem::find(bytes, b"\r\n\r\n").is_some();
    if complete && let [b'H', b'T', b'T', b'P', b'/', b'1', b'.', _, b' ', a, b, c, ..] = bytes {
        let digit = |d: &u8| u16::from(d.wrapping_sub(b'0'));
        return Ok(Some(digit(a) * 100 + digit(b) * 10 + digit(c)));
    }
    // Incomplete, or not quite HTTP: the parser says which.
    let mut room = HeaderRoom::new();
    match ResponseHead::parse(bytes, &mut room, to_head) {
        Ok(head) => Ok(head.map(|h| h.status)),
        Err(BadResponse(reason)) => Err(Failure::Nonsense(reason)),
    }
}
