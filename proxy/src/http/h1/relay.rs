//! HTTP/1 on both sides: the response of an endpoint on its way to the client.

use std::future::poll_fn;
use std::task::{Context, Poll, ready};

use crate::buffer::{Buffer, Output};
use crate::clock;
use crate::conn::Conn;
use crate::http::exchange::{Awaits, Failure, Order, Piece, Source, UploadError, step};
use crate::http::forward::{Delivery, write_response};
use crate::http::head::{Framing, HeaderRoom};
use crate::http::record::Record;
use crate::http::response::{BadResponse, ResponseHead};
use crate::metrics::Reject;
use crate::table::FieldEdits;
use crate::timer::{Late, Timer};
use crate::upstream::Peer;

use super::body::Incoming;
use super::bulk;
use super::upload::Upload;
use super::{Http1, Next, Plan, Shape, send};

/// A small body is sent in the same write as its head.
const INLINE_BODY: usize = 8 << 10;

/// Up to here a copy behind the head costs less than a write of several parts.
const COPIED: usize = 2 << 10;

/// The client's half of an HTTP/1 connection during one exchange.
pub(super) struct FromClient<'c> {
    pub(super) conn: &'c mut Conn,
    pub(super) input: &'c mut Buffer,
    pub(super) upload: Upload,
    /// HTTP/1.0 knows no interim responses.
    pub(super) minor: u8,
    /// Nothing holds the client back from sending its body: it expects no 100, or got one.
    pub(super) invited: bool,
    pub(super) write_timeout: std::time::Duration,
    /// The client has sent an end, or more than was asked for: whether it also leaves shows when we write.
    pub(super) deaf: bool,
}

impl FromClient<'_> {
    /// The client is not holding its body back.
    fn is_sending(&self) -> bool {
        self.invited || self.upload.has_started()
    }
}

impl Source for FromClient<'_> {
    fn poll_upload(&mut self, cx: &mut Context<'_>, endpoint: &mut Conn) -> Poll<Result<(), UploadError>> {
        self.upload.poll(cx, self.conn, self.input, endpoint)
    }

    fn poll_piece(&mut self, cx: &mut Context<'_>) -> Poll<Result<Piece, UploadError>> {
        self.upload.poll_piece(cx, self.conn, self.input)
    }

    fn is_done(&self) -> bool {
        self.upload.is_done()
    }

    fn is_active(&self) -> bool {
        self.upload.is_active()
    }

    fn is_repeatable(&self) -> bool {
        self.upload.is_repeatable()
    }

    fn rewind(&mut self) {
        self.upload.rewind();
    }

    fn awaits(&self) -> Awaits {
        match (self.is_active(), self.upload.awaits_client()) {
            (true, true) if self.is_sending() => Awaits::Client,
            (true, false) => Awaits::Room,
            _ => Awaits::Answer,
        }
    }

    fn abandon(&mut self) {
        self.upload.abandon();
    }

    /// A reset. An end alone is not: half-closed clients exist (`nc`, health checks) and still
    /// want their answers, and one that is really gone then shows when we write.
    fn poll_gone(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        if self.deaf {
            return Poll::Pending;
        }
        let hung_up = ready!(self.conn.poll_hangup(cx));
        self.deaf = !hung_up;
        if hung_up { Poll::Ready(()) } else { Poll::Pending }
    }

    #[expect(clippy::manual_async_fn, reason = "an async fn would hold its arguments twice")]
    fn interim(&mut self, timer: &mut Timer, head: &[u8]) -> impl Future<Output = bool> {
        async move {
            self.invited = true;
            self.minor == 0 || send(timer, self.conn, self.write_timeout, [head, &[], &[]]).await
        }
    }
}

/// What a response head says about the rest of the exchange.
struct Reply {
    status: u16,
    framing: Framing,
    delivery: Delivery,
    reusable: bool,
    switches: bool,
}

impl Http1 {
    /// Forwards the request whose head is in `out`.
    #[expect(clippy::manual_async_fn, reason = "an async fn would hold its arguments twice")]
    pub(super) fn forward(
        &mut self,
        order: &Order<'_>,
        plan: &Plan<'_>,
        out: &mut Output,
        record: &mut Record,
    ) -> impl Future<Output = Next> {
        async move {
            let limit = order.body_limit();
            if let Framing::Length(n) = plan.shape.framing
                && n > limit
            {
                out.clear();
                self.worker.metrics.rejected(Reject::BodyTooLarge);
                return self
                    .answer(plan.shape, 413, "request body too large", order.response_edits(), out, record)
                    .await;
            }
            let mut framing = plan.shape.framing;
            if let Framing::Length(n) = framing
                && n <= self.input.len().min(INLINE_BODY) as u64
            {
                out.extend_from_slice(&self.input.filled()[..n as usize]);
                self.input.consume(n as usize);
                record.bytes_in = n;
                framing = Framing::None;
            }
            let Http1 { conn, input, timer, worker, .. } = self;
            let write_timeout = worker.config.timeouts.client;
            let upload = Upload::new(framing, limit, order.replay_bytes());
            let (minor, invited) = (plan.shape.minor, !plan.expects_continue);
            let mut source = FromClient { conn, input, upload, minor, invited, write_timeout, deaf: false };
            let mut answer = Buffer::new();
            let failure = match order.obtain(timer, &mut source, out, &mut answer, record).await {
                Err(failure) => failure,
                Ok((upstream, mut peer)) => {
                    let relayed =
                        relay(order, timer, &mut source, plan, &mut peer, &mut answer, out, record).await;
                    record.bytes_in += source.upload.bytes;
                    match relayed {
                        Ok(Relayed::Switched) => return Next::Tunnel(Box::new(peer), answer),
                        Ok(Relayed::Done { next, reusable }) => {
                            if reusable && answer.is_empty() {
                                order.worker.upstreams.keep(&upstream, peer, clock::now_ms());
                            }
                            return next;
                        }
                        Err(failure) => failure,
                    }
                }
            };
            let shape = source.upload.shape_left(plan.shape);
            self.answer_failure(shape, &failure, order.response_edits(), out, record).await
        }
    }

    /// Answers for an endpoint that could not.
    pub(super) async fn answer_failure(
        &mut self,
        shape: Shape,
        failure: &Failure,
        edits: Option<&FieldEdits>,
        out: &mut Output,
        record: &mut Record,
    ) -> Next {
        let Some((status, reason)) = failure.answer() else {
            (record.status, record.reason) = (499, "client closed the connection");
            return Next::Close(false);
        };
        if status == 413 {
            self.worker.metrics.rejected(Reject::BodyTooLarge);
        }
        out.clear();
        self.answer(shape, status, reason, edits, out, record).await
    }
}

/// What a response leaves behind.
enum Relayed {
    /// Two connections that now speak another protocol.
    Switched,
    /// The client's connection, and whether the endpoint's is as good as before.
    Done { next: Next, reusable: bool },
}

/// Relays the response in `answer`. An error means that nothing of it has been sent.
#[expect(clippy::manual_async_fn, reason = "an async fn would hold its arguments twice")]
fn relay(
    order: &Order<'_>,
    timer: &mut Timer,
    source: &mut FromClient<'_>,
    plan: &Plan<'_>,
    peer: &mut Peer,
    answer: &mut Buffer,
    out: &mut Output,
    record: &mut Record,
) -> impl Future<Output = Result<Relayed, Failure>> {
    async move {
        let close = |sending| Relayed::Done { next: Next::Close(sending), reusable: false };
        let reply = match reply(order, source, plan, answer, out) {
            Ok(reply) => reply,
            Err(BadResponse(reason)) => return Err(Failure::Nonsense(reason)),
        };
        (record.status, record.upstream_status) = (reply.status, reply.status);
        if reply.switches {
            order.worker.metrics.upgrades.inc();
            return Ok(match send(timer, source.conn, source.write_timeout, [out, &[], &[]]).await {
                true => Relayed::Switched,
                false => close(false),
            });
        }
        let delivered = deliver(order, timer, source, &reply, &mut peer.conn, answer, out, record).await;
        if let Err(broken) = delivered {
            let reason = match broken {
                Broken::Unsent(reason) => return Err(Failure::Nonsense(reason)),
                Broken::Midway(reason) => reason,
            };
            // The client sees a body cut short; there is no other way to tell it.
            record.reason = reason;
            return Ok(close(false));
        }
        if reply.reusable && source.is_active() && source.is_sending() {
            finish_upload(order, timer, source, &mut peer.conn).await;
        }
        let next = match (reply.delivery.keep_alive, source.is_done()) {
            (true, true) => Next::Again,
            (_, done) => Next::Close(!done),
        };
        Ok(Relayed::Done { next, reusable: reply.reusable && source.is_done() })
    }
}

/// The response is through, but an endpoint that keeps its connection may still
/// want the rest of the request, and a client that sends all of it first would
/// take an end for a failure.
async fn finish_upload(
    order: &Order<'_>,
    timer: &mut Timer,
    source: &mut FromClient<'_>,
    endpoint: &mut Conn,
) {
    while source.is_active() {
        let awaits = source.awaits();
        let next = poll_fn(|cx| {
            if let Poll::Ready(moved) = source.poll_upload(cx, endpoint) {
                return Poll::Ready(moved.is_ok());
            }
            // It hangs up, or says what nobody asked for.
            while endpoint.poll_readable(cx).is_ready() {
                if !endpoint.is_reusable() {
                    return Poll::Ready(false);
                }
            }
            if source.awaits() == awaits { Poll::Pending } else { Poll::Ready(true) }
        });
        if !matches!(timer.within(order.deadline(awaits), next).await, Ok(true)) {
            return;
        }
    }
}

/// Reads the response head in `answer` and writes the client's into `out`.
fn reply(
    order: &Order<'_>,
    source: &FromClient<'_>,
    plan: &Plan<'_>,
    answer: &mut Buffer,
    out: &mut Output,
) -> Result<Reply, BadResponse> {
    let mut room = HeaderRoom::new();
    let Some(head) = ResponseHead::parse(answer.filled(), &mut room, plan.shape.is_head)? else {
        return Err(BadResponse("malformed response head"));
    };
    let switches = head.status == 101;
    let asked = head.upgrade.is_some_and(|p| p.eq_ignore_ascii_case(&plan.upgrade));
    if switches && (plan.upgrade.is_empty() || !asked) {
        return Err(BadResponse("endpoint switched protocols unasked"));
    }
    let delivery = delivery(order, plan.shape, head.framing, source.is_done());
    let extra = order.cookie_lines();
    out.clear();
    write_response(out, &head, delivery, &extra, order.response_edits());
    let reusable = head.keep_alive && !order.closes();
    let reply = Reply { status: head.status, framing: head.framing, delivery, reusable, switches };
    let length = head.length;
    drop(head);
    answer.consume(length);
    Ok(reply)
}

/// How a response with this body reaches a client of this request.
pub(super) fn delivery(order: &Order<'_>, shape: Shape, framing: Framing, uploaded: bool) -> Delivery {
    let framing = match (framing, shape.minor) {
        (Framing::Close | Framing::Chunked, 1) => Framing::Chunked,
        (Framing::Close | Framing::Chunked, _) => Framing::Close,
        (framing, _) => framing,
    };
    let stays = uploaded && framing != Framing::Close && !order.worker.is_draining();
    Delivery { framing, keep_alive: shape.keep_alive && stays, minor: shape.minor }
}

/// Why a response did not get through.
enum Broken {
    /// Before any of it was sent.
    Unsent(&'static str),
    Midway(&'static str),
}

impl Broken {
    /// The rest of the body does not come.
    fn midway(failure: Failure) -> Broken {
        Broken::Midway(match failure {
            Failure::Late => "endpoint timed out within a response body",
            Failure::Overdue => "request timed out within a response body",
            Failure::Client => "client closed the connection",
            Failure::Answer(_, reason) | Failure::Endpoint(reason) | Failure::Nonsense(reason) => reason,
        })
    }
}

/// Writes to a client that is still sending its body, and takes that body on
/// meanwhile: a client may well read nothing before it has written everything.
#[expect(clippy::manual_async_fn, reason = "an async fn would hold its arguments twice")]
fn send_uploading(
    order: &Order<'_>,
    timer: &mut Timer,
    source: &mut FromClient<'_>,
    endpoint: &mut Conn,
    mut parts: [&[u8]; 3],
) -> impl Future<Output = bool> {
    async move {
        loop {
            let deadline = order.bounded(clock::now() + source.write_timeout);
            let moved = poll_fn(|cx| {
                if let Poll::Ready(sent) = source.conn.poll_send(cx, &mut parts) {
                    return Poll::Ready(Some(sent.is_ok()));
                }
                if !source.is_active() {
                    return Poll::Pending;
                }
                match source.poll_upload(cx, endpoint) {
                    Poll::Ready(Ok(())) => Poll::Ready(None),
                    Poll::Ready(Err(UploadError::Endpoint)) => {
                        source.abandon();
                        Poll::Ready(None)
                    }
                    Poll::Ready(Err(_)) => Poll::Ready(Some(false)),
                    Poll::Pending => Poll::Pending,
                }
            });
            match timer.within(deadline, moved).await {
                Ok(Some(sent)) => return sent,
                Ok(None) => {}
                Err(Late) => return false,
            }
        }
    }
}

/// Moves the body. The head in `out` leaves with its first piece.
#[expect(clippy::manual_async_fn, reason = "an async fn would hold its arguments twice")]
fn deliver(
    order: &Order<'_>,
    timer: &mut Timer,
    source: &mut FromClient<'_>,
    reply: &Reply,
    endpoint: &mut Conn,
    answer: &mut Buffer,
    out: &mut Output,
    record: &mut Record,
) -> impl Future<Output = Result<(), Broken>> {
    async move {
        let chunked = reply.delivery.framing == Framing::Chunked;
        let mut body = Incoming::new(reply.framing);
        let mut after = Output::take();
        let mut ended = false;
        loop {
            // Until its first piece leaves, the head can still be taken back.
            let broken = if out.is_empty() { Broken::Midway } else { Broken::Unsent };
            let mut piece = body.next(answer).map_err(|e| broken(e.0))?;
            piece.done |= ended && body.ends_at_close();
            if ended && !piece.done {
                return Err(Broken::Midway("endpoint closed the connection within a response body"));
            }
            body.frame(chunked, piece, out, &mut after);
            let data = &answer.filled()[..piece.data];
            let parts = if data.len() <= COPIED {
                out.extend_from_slice(data);
                out.extend_from_slice(&after);
                [out.as_slice(), &[], &[]]
            } else {
                [out.as_slice(), data, after.as_slice()]
            };
            let sent = match source.is_active() {
                false => send(timer, source.conn, order.patience(source.write_timeout), parts).await,
                true => send_uploading(order, timer, source, endpoint, parts).await,
            };
            if !sent && order.is_overdue() {
                return Err(Broken::Midway("request timed out within a response body"));
            }
            if !sent {
                return Err(Broken::Midway("client closed the connection"));
            }
            record.bytes_out += piece.data as u64;
            out.clear();
            answer.consume(piece.consumed);
            if piece.done {
                return Ok(());
            }
            answer.release();
            if let Some(sockets) = bulk::sockets(&body, source, endpoint) {
                let mut moved = 0;
                let spliced = bulk::splice(order, timer, sockets, &mut moved).await;
                record.bytes_out += moved;
                spliced.map_err(Broken::Midway)?;
                body.passed(moved);
                if body.is_through() {
                    return Ok(());
                }
            }
            ended = step(order, timer, source, endpoint, answer).await.map_err(Broken::midway)? == 0;
        }
    }
}
