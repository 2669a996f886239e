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
use crate::router::Router;
use crate::table::{FieldEdits, HeaderEdits};
use crate::timer::{Late, Timer};
use crate::upstream::{InFlight, NoConnection, Peer, Upstream};
use crate::worker::Worker;

use super::Forward;
use super::attempts::{Chosen, Course, Ends, Lost};
use super::forward::{Delivery, write_response};
use super::head::{Framing, HeaderRoom, end_of_head};
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

    /// All that was taken from the client can be sent again.
    fn is_repeatable(&self) -> bool;

    /// The next endpoint gets the body from its beginning.
    fn rewind(&mut self);

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
    /// The request as a whole took longer than its rule allows.
    Overdue,
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
            Failure::Overdue => Some((504, "request timed out")),
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
    /// It has no body, not even an empty one, and wants no tunnel.
    pub(crate) bodiless: bool,
    pub(crate) ends: Ends,
    /// Interim responses there may still be.
    interims: Cell<u32>,
    answered: Answered,
}

/// What every attempt to have a request answered works with.
pub(crate) struct Sent<'s, S> {
    pub(crate) timer: &'s mut Timer,
    pub(crate) source: &'s mut S,
    /// The request head, and body bytes that can be sent again.
    pub(crate) head: &'s [u8],
    pub(crate) answer: &'s mut Buffer,
    pub(crate) record: &'s mut Record,
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
    /// An order for a request that began at `started`.
    pub(crate) fn new(
        worker: &'r Worker,
        router: &'r Router,
        forward: Forward<'r>,
        idempotent: bool,
        is_head: bool,
        started: Instant,
    ) -> Order<'r> {
        let (ends, answered) = (Ends::of(&forward, started), Answered::default());
        let interims = Cell::new(worker.config.limits.interim_responses);
        Order { worker, router, forward, idempotent, is_head, bodiless: false, ends, interims, answered }
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
        let turns = if tried.is_empty() { &self.worker.turns } else { &self.worker.again };
        let endpoint = pool.pick_for(&self.forward.steer, turns, clock::now_ms(), tried)?;
        if pool.measures() {
            self.answered.asked.set(Some((endpoint.live.id, clock::now())));
        }
        Some(self.worker.upstreams.of(&endpoint.live))
    }

    /// An endpoint has sent an interim response; counted over all attempts, as the client gets them all.
    pub(crate) fn interim(&self) -> Result<(), Failure> {
        let left = self.interims.get().checked_sub(1);
        let left = left.ok_or(Failure::Nonsense("endpoint sends interim responses without end"))?;
        self.interims.set(left);
        Ok(())
    }

    /// The head of an endpoint's answer is here.
    pub(crate) fn remember(&self, upstream: &Upstream) {
        upstream.live.succeeded();
        self.answered.by.set(upstream.live.id);
        if let Some((id, at)) = self.answered.asked.get()
            && id == upstream.live.id
        {
            upstream.live.latency().record(clock::now_ms(), (clock::now() - at).as_micros() as u64);
        }
    }

    /// What is changed in the head of the response.
    pub(crate) fn response_edits(&self) -> Option<&FieldEdits> {
        self.forward.edits.map(|edits| &edits.response)
    }

    /// The endpoint has been told that its connection carries no further request.
    pub(crate) fn closes(&self) -> bool {
        self.forward.edits.is_some_and(HeaderEdits::closes)
    }

    /// Header lines to add to the answer.
    pub(crate) fn cookie_lines(&self) -> SmallVec<[u8; 256]> {
        let Forward { rule, split, choice, steer, .. } = &self.forward;
        let (served, turns) = (self.answered.by.get(), &self.worker.turns);
        split.cookie_lines(*choice, steer, &rule.path, served, self.router, turns)
    }

    pub(crate) fn connect_deadline(&self) -> Instant {
        let own = self.forward.rule.limits.connect_timeout;
        self.bounded(clock::now() + own.unwrap_or(self.worker.config.timeouts.connect))
    }

    pub(crate) fn send_deadline(&self) -> Instant {
        let own = self.forward.rule.limits.send_timeout;
        self.bounded(clock::now() + own.unwrap_or(self.worker.config.timeouts.send))
    }

    pub(crate) fn deadline(&self, awaits: Awaits) -> Instant {
        match awaits {
            Awaits::Client => self.bounded(clock::now() + self.worker.config.timeouts.client),
            Awaits::Room => self.send_deadline(),
            Awaits::Answer => self.read_deadline(),
        }
    }

    pub(crate) fn read_deadline(&self) -> Instant {
        let own = self.forward.rule.limits.read_timeout;
        self.bounded(clock::now() + own.unwrap_or(self.worker.config.timeouts.read))
    }

    /// Tries endpoints until one has answered with a final response head, which
    /// is then whole in `answer`. `head` is the request head, and body bytes
    /// that can be sent again.
    #[expect(clippy::manual_async_fn, reason = "an async fn would hold its arguments twice")]
    pub(crate) fn obtain<S: Source>(
        &self,
        timer: &mut Timer,
        source: &mut S,
        head: &[u8],
        answer: &mut Buffer,
        record: &mut Record,
    ) -> impl Future<Output = Result<(Rc<Upstream>, Peer), Failure>> {
        async move {
            let mut course = Course::default();
            let mut chosen = self.first(&mut course, record)?;
            let mut sent = Sent { timer, source, head, answer, record };
            loop {
                let Chosen { mut upstream, busy } = chosen;
                let attempt = self.attempt(&mut sent, &mut course, &mut upstream, busy).await;
                let Sent { source, answer, record, .. } = &mut sent;
                chosen = match attempt {
                    Ok((peer, status)) => {
                        self.answered(&upstream, status, record, course.since);
                        match self.instead(&mut course, &upstream, status, source.is_repeatable(), record) {
                            None => return Ok((upstream, peer)),
                            Some(next) => {
                                self.turn_down(*source, &upstream, peer, answer);
                                next
                            }
                        }
                    }
                    Err(lost) => {
                        self.lost(&mut course, &upstream, record, lost)?;
                        self.next(&mut course, record)?
                    }
                };
                answer.clear();
                source.rewind();
            }
        }
    }

    /// The answer that has begun in `answer` is not wanted; if it is all there, its connection is as good as before.
    fn turn_down<S: Source>(&self, source: &S, upstream: &Upstream, peer: Peer, answer: &Buffer) {
        let mut room = HeaderRoom::new();
        let Ok(Some(head)) = ResponseHead::parse(answer.filled(), &mut room, self.is_head) else { return };
        let body = match head.framing {
            Framing::None => 0,
            Framing::Length(n) => n,
            Framing::Chunked | Framing::Close => return,
        };
        if source.is_done()
            && head.keep_alive
            && (head.length as u64).checked_add(body) == Some(answer.len() as u64)
        {
            self.worker.upstreams.keep(upstream, peer, clock::now_ms());
        }
    }

    /// One attempt; in `answer` is then a final response head, whose status is returned.
    #[expect(clippy::manual_async_fn, reason = "an async fn would hold its arguments twice")]
    fn attempt<S: Source>(
        &self,
        sent: &mut Sent<'_, S>,
        course: &mut Course,
        upstream: &mut Rc<Upstream>,
        busy: InFlight,
    ) -> impl Future<Output = Result<(Peer, u16), Lost>> {
        async move {
            self.begin_try();
            if let Some(delay) = self.hedge_delay(course) {
                return Box::pin(self.hedged(sent, course, upstream, busy, delay)).await;
            }
            let Sent { timer, source, head, answer, record } = sent;
            let (mut peer, reused) = self.connected(timer, upstream, course.fresh_only).await?;
            let since_start = reused && course.is_first();
            record.connected = Some(if since_start { record.started } else { clock::now() });
            peer.occupy(busy);
            // A failed write is not the end: the endpoint may have answered before it hung up.
            let written = timer.within(self.send_deadline(), peer.conn.send([*head, &[], &[]])).await;
            let answered = match written {
                Ok(_) => self.await_head(timer, *source, &mut peer.conn, answer, record).await,
                Err(Late) => Err(self.late()),
            };
            match answered {
                Ok(status) => Ok((peer, status)),
                Err(failure) => Err(self.lost_on(upstream, course, failure, reused, source.is_repeatable())),
            }
        }
    }

    /// What `failure` of a request that was sent means for the next attempt.
    pub(crate) fn lost_on(
        &self,
        upstream: &Upstream,
        course: &mut Course,
        failure: Failure,
        reused: bool,
        repeatable: bool,
    ) -> Lost {
        // Most likely closed while idle; that says nothing about the endpoint's health.
        let stale = reused && matches!(failure, Failure::Endpoint(_));
        if stale {
            self.worker.upstreams.discard_idle(upstream);
            course.fresh_only = true;
        }
        Lost::Failed { failure, sent: true, stale, counts: !stale, repeatable }
    }

    /// A connection, and whether it was used before.
    pub(crate) async fn connected(
        &self,
        timer: &mut Timer,
        upstream: &Upstream,
        fresh_only: bool,
    ) -> Result<(Peer, bool), Lost> {
        if !fresh_only && let Some(peer) = self.worker.upstreams.checkout(upstream) {
            return Ok((peer, true));
        }
        // Boxed, as everything rare: a connection's task is as large as its largest state.
        let connecting = Box::pin(self.worker.upstreams.connect(upstream, self.breaker()));
        let failure = match timer.within(self.connect_deadline(), connecting).await {
            Ok(Ok(peer)) => return Ok((peer, false)),
            Ok(Err(NoConnection::Full(limit))) => return Err(Lost::Full(limit)),
            Ok(Err(NoConnection::Failed(_))) => Failure::Endpoint("cannot connect to the endpoint"),
            Err(Late) => {
                self.worker.metrics.upstream_failed.inc();
                self.late()
            }
        };
        Err(Lost::Failed { failure, sent: false, stale: false, counts: true, repeatable: true })
    }

    /// Waits for a final response head and returns its status. Interim
    /// responses pass to the client on the way.
    #[expect(clippy::manual_async_fn, reason = "an async fn would hold its arguments twice")]
    pub(crate) fn await_head<S: Source>(
        &self,
        timer: &mut Timer,
        source: &mut S,
        endpoint: &mut Conn,
        answer: &mut Buffer,
        record: &mut Record,
    ) -> impl Future<Output = Result<u16, Failure>> {
        async move {
            loop {
                while let Some(status) = peek_status(answer.filled(), self.is_head)? {
                    if !(100..200).contains(&status) || status == 101 {
                        return Ok(status);
                    }
                    self.interim()?;
                    let (interim, length) = interim_head(answer.filled())?;
                    answer.consume(length);
                    if !source.interim(timer, &interim).await {
                        return Err(Failure::Client);
                    }
                }
                if answer.has_storage() && !answer.make_room(RESPONSE_HEAD_BYTES) {
                    return Err(Failure::Nonsense("response head too large"));
                }
                match step(self, timer, source, endpoint, answer).await {
                    Ok(0) if answer.is_empty() => {
                        return Err(Failure::Endpoint("endpoint closed the connection"));
                    }
                    // Not to be taken for an old connection that ended: it has begun to answer.
                    Ok(0) | Err(Failure::Endpoint(_)) if !answer.is_empty() => {
                        return Err(Failure::Nonsense(
                            "endpoint closed the connection within a response head",
                        ));
                    }
                    read => read?,
                };
                record.first_byte.get_or_insert_with(clock::now);
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
#[expect(clippy::manual_async_fn, reason = "an async fn would hold its arguments twice")]
pub(crate) fn step<S: Source>(
    order: &Order<'_>,
    timer: &mut Timer,
    source: &mut S,
    endpoint: &mut Conn,
    answer: &mut Buffer,
) -> impl Future<Output = Result<usize, Failure>> {
    async move {
        loop {
            order.in_time()?;
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
                    (Poll::Pending, Poll::Pending) if source.awaits() != awaits => {
                        Poll::Ready(Step::Uploaded)
                    }
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
                Err(Late) if awaits == Awaits::Client && !order.is_overdue() => Err(SLOW_BODY),
                Err(Late) => Err(order.late()),
            };
        }
    }
}

/// The 1xx head at the front of `bytes`, written anew, and its length there.
fn interim_head(bytes: &[u8]) -> Result<(Output, usize), Failure> {
    let mut room = HeaderRoom::new();
    let Ok(Some(head)) = ResponseHead::parse(bytes, &mut room, false) else {
        return Err(Failure::Nonsense("malformed response head"));
    };
    let mut interim = Output::take();
    let to = Delivery { framing: Framing::None, keep_alive: true, minor: 1 };
    write_response(&mut interim, &head, to, &[], None);
    Ok((interim, head.length))
}

/// Status of a complete response head, without parsing it whole.
fn peek_status(bytes: &[u8], to_head: bool) -> Result<Option<u16>, Failure> {
    if bytes.is_empty() {
        return Ok(None);
    }
    let complete = end_of_head(bytes).is_some();
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
