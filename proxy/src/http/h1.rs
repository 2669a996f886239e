//! A downstream HTTP/1 connection: request after request, on one task.
//!
//! Per request: read the head, decide, carry it out, count it. The connection
//! owns buffers only in between.

use std::future::poll_fn;
use std::net::IpAddr;
use std::pin::Pin;
use std::rc::Rc;
use std::task::Poll;
use std::time::Duration;

use smallvec::SmallVec;
use tokio::io::AsyncWriteExt as _;
use tokio::time::Instant;

use crate::buffer::{Buffer, Output};
use crate::clock;
use crate::conn::Conn;
use crate::limit::{self, Held};
use crate::metrics;
use crate::router::Router;
use crate::table::{FieldEdits, UpstreamProtocol};
use crate::timer::{Late, Timer};
use crate::upstream::Peer;
use crate::worker::{Presence, Worker};

use super::client::Client;
use super::exchange::Order;
use super::field::Field;
use super::forward::{self, RequestId, connection_line, decimal, put};
use super::head::{Framing, HeaderRoom, Http1View, Reject, RequestHead, end_of_head};
use super::record::{Notes, Record, Texts, finish};
use super::{Asked, Verdict, decide, is_idempotent, phrase, write_https_location};

mod body;
mod bulk;
mod over_h2;
mod relay;
mod upload;

pub(crate) use body::Incoming;

/// How long and how much is read from a client that still sends when we are done with it,
/// so that the answer is not lost to a reset (RFC 9112 section 9.6).
const LINGER: Duration = Duration::from_secs(2);
const LINGER_BYTES: usize = 1 << 20;

/// What becomes of the connection after a request.
pub(super) enum Next {
    Again,
    /// Close; `true`: the client may still be sending.
    Close(bool),
    /// It now carries another protocol, to this endpoint's connection.
    Tunnel(Box<Peer>, Buffer),
}

pub(super) struct Http1 {
    pub(super) worker: Rc<Worker>,
    pub(super) client: Client,
    pub(super) conn: Conn,
    pub(super) timer: Timer,
    /// Bytes read and not yet used: a head, its body, pipelined requests.
    pub(super) input: Buffer,
    presence: Presence,
    /// The request, or the tunnel it became, in its client's account.
    held: Option<Held>,
    /// The latest moment known; saves asking the clock.
    now: Instant,
}

/// A parsed and decided request.
pub(super) struct Plan<'r> {
    pub(super) verdict: Verdict<'r>,
    pub(super) shape: Shape,
    /// The protocol the client would switch to; empty: none.
    pub(super) upgrade: SmallVec<[u8; 16]>,
    pub(super) expects_continue: bool,
    pub(super) idempotent: bool,
    /// For an endpoint that speaks HTTP/2.
    pub(super) request: Option<Box<http::Request<()>>>,
    notes: Option<Notes>,
}

/// What an answer must know of its request.
#[derive(Clone, Copy)]
pub(super) struct Shape {
    pub(super) framing: Framing,
    pub(super) minor: u8,
    pub(super) keep_alive: bool,
    pub(super) is_head: bool,
}

/// Serves a connection until it ends.
pub(crate) fn serve(
    worker: Rc<Worker>,
    conn: Conn,
    client: Client,
    presence: Presence,
    input: Buffer,
) -> impl Future<Output = ()> {
    let now = clock::now();
    let timer = Timer::new(now + worker.config.timeouts.keep_alive);
    let mut this = Http1 { worker, client, conn, timer, input, presence, held: None, now };
    async move {
        loop {
            match this.request().await {
                Next::Again => {}
                Next::Close(sending) => return this.close(sending).await,
                Next::Tunnel(upstream, early) => {
                    let Http1 { worker, conn, input, timer, held: _held, .. } = this;
                    let tunnel = super::tunnel::run(&worker, conn, *upstream, input, early, timer);
                    return Box::pin(tunnel).await;
                }
            }
        }
    }
}

impl Http1 {
    async fn request(&mut self) -> Next {
        if !self.wait_for_bytes().await {
            return Next::Close(false);
        }
        let started = clock::now();
        let deadline = started + self.worker.config.timeouts.header;
        let mut read_first = false;
        let reject = loop {
            match self.fill_head(deadline, read_first).await {
                Ok(true) => {}
                Ok(false) => return Next::Close(false),
                Err(reject) => break reject,
            }
            let router = self.worker.router();
            let mut out = Output::take();
            let mut plan = match self.plan(&router, &mut out) {
                Ok(Some(plan)) => plan,
                // Empty lines before the request line look like the end of a head.
                Ok(None) => {
                    read_first = true;
                    continue;
                }
                Err(reject) => break reject,
            };
            return self.carry_out(started, &router, &mut plan, &mut out).await;
        };
        self.refuse(started, reject).await
    }

    /// Waits between requests, without a buffer. False: close.
    async fn wait_for_bytes(&mut self) -> bool {
        if !self.input.is_empty() {
            return true;
        }
        self.input.release();
        let mut deadline = self.now + self.worker.config.timeouts.keep_alive;
        loop {
            let draining = self.worker.is_draining();
            if draining {
                deadline = self.worker.idle_until(deadline);
            }
            let Http1 { conn, presence, worker, timer, .. } = self;
            let waited = timer.within(
                deadline,
                poll_fn(|cx| {
                    if let Poll::Ready(ready) = conn.poll_readable(cx) {
                        return Poll::Ready(Some(ready.is_ok()));
                    }
                    if !draining && worker.is_draining() {
                        return Poll::Ready(None);
                    }
                    presence.wake_on_drain(cx.waker());
                    Poll::Pending
                }),
            );
            match waited.await {
                Ok(Some(ready)) => return ready,
                Ok(None) => continue,
                Err(Late) => return false,
            }
        }
    }

    /// Reads until the input may hold a whole head; at least once if `read_first`.
    /// `Ok(false)`: the client is gone.
    async fn fill_head(&mut self, deadline: Instant, mut read_first: bool) -> Result<bool, Reject> {
        let limits = &self.worker.config.limits;
        let mut searched = 0;
        loop {
            let filled = self.input.filled();
            let from = searched.min(filled.len());
            if !read_first && end_of_head(&filled[from..]).is_some() {
                return Ok(true);
            }
            read_first = false;
            if !filled.is_empty() {
                // Not complete; but what is there may already be wrong.
                let mut room = HeaderRoom::new();
                RequestHead::parse(filled, &mut room, limits)?;
                searched = filled.len().saturating_sub(3);
            }
            if self.input.has_storage() && !self.input.make_room(limits.header_bytes) {
                return Err(Reject { status: 431, reason: "headers too large" });
            }
            let Http1 { conn, input, timer, .. } = self;
            match timer.within(deadline, poll_fn(|cx| conn.poll_fill(cx, input))).await {
                Ok(Ok(0)) | Ok(Err(_)) => return Ok(false),
                Ok(Ok(_)) => {}
                // Nothing of a request yet: an idle connection, not a slow one.
                Err(Late) if self.input.is_empty() => return Ok(false),
                Err(Late) => return Err(Reject { status: 408, reason: "headers took too long" }),
            }
        }
    }

    /// Parses the head in the input, decides, and writes what leaves for the
    /// endpoint (or the answer) into `out`. Consumes the head.
    fn plan<'r>(&mut self, router: &'r Router, out: &mut Output) -> Result<Option<Plan<'r>>, Reject> {
        let worker = &self.worker;
        let mut room = HeaderRoom::new();
        let Some(head) = RequestHead::parse(self.input.filled(), &mut room, &worker.config.limits)? else {
            return Ok(None);
        };
        let forwarded = self.client.forwarded(|| forward::claims(&head));
        let view = Http1View { head: &head, client: forwarded.address };
        let https = forwarded.is_https(&self.client);
        let asked = Asked {
            authority: head.host,
            method: head.method,
            target: head.target,
            path: head.path(),
            https,
        };
        let mut verdict = decide(worker, router, &self.client, &asked, &view)?;
        self.held = limit::admit(worker, &mut verdict, forwarded.address);
        let id = RequestId::new(head.first(Field::XRequestId), &mut worker.random.borrow_mut());
        let mut request = None;
        match &verdict {
            Verdict::Answer(answer) if answer.to_https => {
                out.extend_from_slice(b"Location: ");
                write_https_location(out, worker, head.host, head.target);
                out.extend_from_slice(b"\r\n");
            }
            Verdict::Answer(_) => {}
            Verdict::Forward(forward) => {
                let backend = &forward.split.backends[forward.choice.backend];
                let protocol = router.pool(backend.pool).protocol;
                match protocol {
                    UpstreamProtocol::Http1
                    | UpstreamProtocol::Https
                    | UpstreamProtocol::Tcp
                    | UpstreamProtocol::Udp => {
                        forward::write_request(out, &head, &self.client, &forwarded, &id, forward.edits);
                    }
                    UpstreamProtocol::H2c | UpstreamProtocol::H2 => {
                        let edits = forward.edits;
                        let over_h2 =
                            over_h2::request(&head, &self.client, &forwarded, &id, protocol, edits)?;
                        request = Some(Box::new(over_h2));
                    }
                }
            }
        }
        let notes = worker.log.borrow().is_some().then(|| notes(&head, &id));
        let plan = Plan {
            verdict,
            shape: Shape {
                framing: head.framing,
                minor: head.minor,
                keep_alive: head.keep_alive,
                is_head: head.method == b"HEAD",
            },
            upgrade: SmallVec::from_slice(head.upgrade.unwrap_or_default()),
            expects_continue: head.expects_continue,
            idempotent: is_idempotent(head.method),
            request,
            notes,
        };
        let length = head.length;
        drop((head, forwarded));
        self.input.consume(length);
        Ok(Some(plan))
    }

    #[expect(clippy::manual_async_fn, reason = "an async fn would hold its arguments twice")]
    fn carry_out(
        &mut self,
        started: Instant,
        router: &Router,
        plan: &mut Plan<'_>,
        out: &mut Output,
    ) -> impl Future<Output = Next> {
        async move {
            let mut record = Record::new(started);
            self.worker.metrics.requests_in_flight.inc();
            let next = match &plan.verdict {
                Verdict::Answer(answer) => {
                    let (status, reason) = (answer.status, "");
                    let edits = plan.verdict.response_edits();
                    self.answer(plan.shape, status, reason, edits, out, &mut record).await
                }
                Verdict::Forward(forward) => {
                    let worker = self.worker.clone();
                    let (idempotent, is_head) = (plan.idempotent, plan.shape.is_head);
                    let mut order = Order::new(&worker, router, *forward, idempotent, is_head, started);
                    order.bodiless = plan.shape.framing == Framing::None && plan.upgrade.is_empty();
                    match plan.request.take() {
                        None => self.forward(&order, plan, out, &mut record).await,
                        Some(request) => {
                            // HTTP/2 allocates per request anyway.
                            Box::pin(self.forward_over_h2(&order, plan, *request, out, &mut record)).await
                        }
                    }
                }
            };
            if !matches!(next, Next::Tunnel(..)) {
                self.held = None;
            }
            self.now = clock::now();
            self.worker.metrics.requests_in_flight.dec();
            let protocol = if plan.shape.minor == 0 { "HTTP/1.0" } else { "HTTP/1.1" };
            let verdict = Some(&plan.verdict);
            finish(&self.worker, &self.client, protocol, verdict, &record, plan.notes.as_ref(), self.now);
            next
        }
    }

    /// Answers in place of an endpoint. `out` may hold extra header lines.
    pub(super) async fn answer(
        &mut self,
        shape: Shape,
        status: u16,
        reason: &'static str,
        edits: Option<&FieldEdits>,
        out: &mut Output,
        record: &mut Record,
    ) -> Next {
        record.status = status;
        record.reason = reason;
        let body_left = !self.skip_body(shape.framing);
        let keep_alive = shape.keep_alive && !body_left && !self.worker.is_draining();
        let mut head = Output::take();
        let text = phrase(status);
        write_answer(&mut head, status, text, edits, out, connection_line(keep_alive, shape.minor));
        let body: &[&[u8]; 2] = &[text.as_bytes(), b"\n"];
        let body = if shape.is_head { &[b"" as &[u8], b""] } else { body };
        record.bytes_out = body.iter().map(|b| b.len() as u64).sum();
        let timeout = self.worker.config.timeouts.client;
        match send(&mut self.timer, &mut self.conn, timeout, [&head, body[0], body[1]]).await {
            true if keep_alive => Next::Again,
            true => Next::Close(body_left),
            false => Next::Close(false),
        }
    }

    /// Drops a request body that has arrived whole. False: there is more to come.
    fn skip_body(&mut self, framing: Framing) -> bool {
        match framing {
            Framing::None => true,
            Framing::Length(n) if n <= self.input.len() as u64 => {
                self.input.consume(n as usize);
                true
            }
            _ => false,
        }
    }

    /// A request that cannot be understood: say so and hang up.
    async fn refuse(&mut self, started: Instant, reject: Reject) -> Next {
        let reason = match reject.status {
            408 => metrics::Reject::HeaderTimeout,
            414 => metrics::Reject::UriTooLong,
            431 => metrics::Reject::HeaderTooLarge,
            _ => metrics::Reject::BadRequest,
        };
        self.worker.metrics.rejected(reason);
        let mut record = Record::new(started);
        record.status = reject.status;
        record.reason = reject.reason;
        let mut head = Output::take();
        let text = phrase(reject.status);
        write_answer(&mut head, reject.status, text, None, &[], connection_line(false, 1));
        let timeout = self.worker.config.timeouts.client;
        let parts: [&[u8]; 3] = [&head, text.as_bytes(), b"\n"];
        let sent = send(&mut self.timer, &mut self.conn, timeout, parts).await;
        let client: IpAddr = self.client.peer.ip();
        tracing::debug!(%client, status = reject.status, reason = reject.reason, "request refused");
        let notes = self.worker.log.borrow().is_some().then(|| Notes::new(&Texts::default()));
        finish(&self.worker, &self.client, "HTTP/1.1", None, &record, notes.as_ref(), clock::now());
        Next::Close(sent)
    }

    /// Ends the connection; if the client may still be sending, reads on for a moment.
    async fn close(&mut self, sending: bool) {
        let deadline = clock::now() + LINGER;
        let shut = self.timer.within(deadline, self.conn.shutdown()).await;
        if !sending || !matches!(shut, Ok(Ok(()))) {
            return;
        }
        let mut left = LINGER_BYTES;
        self.input.clear();
        loop {
            let Http1 { conn, input, timer, .. } = self;
            match timer.within(deadline, poll_fn(|cx| conn.poll_fill(cx, input))).await {
                Ok(Ok(n)) if n > 0 && n <= left => {
                    left -= n;
                    self.input.clear();
                }
                _ => return,
            }
        }
    }
}

/// Writes to a client. False: it is gone, or too slow in taking it.
pub(super) fn send(
    timer: &mut Timer,
    conn: &mut Conn,
    timeout: Duration,
    parts: [&[u8]; 3],
) -> impl Future<Output = bool> {
    // By hand, because an async block would hold the parts twice.
    let mut sending = timer.within(clock::now() + timeout, conn.send(parts));
    poll_fn(move |cx| Pin::new(&mut sending).poll(cx).map(|sent| matches!(sent, Ok(Ok(())))))
}

fn notes(head: &RequestHead<'_, '_>, id: &RequestId) -> Notes {
    Notes::new(&Texts {
        method: head.method,
        host: head.host,
        target: head.target,
        user_agent: head.first(Field::UserAgent).unwrap_or_default(),
        referer: head.first(Field::Referer).unwrap_or_default(),
        request_id: id.as_bytes(),
    })
}

/// The head of an answer of our own; its body is `text` and a line end.
fn write_answer(
    head: &mut Vec<u8>,
    status: u16,
    text: &str,
    edits: Option<&FieldEdits>,
    extra: &[u8],
    connection: &[u8],
) {
    let mut room = [0; 20];
    put(head, &[b"HTTP/1.1 ", decimal(u64::from(status), &mut room), b" ", text.as_bytes(), b"\r\n"]);
    let date = clock::http_date();
    let fields: [&[u8]; 4] = [b"Date: ", &date, b"\r\nContent-Type: text/plain\r\n", extra];
    match edits {
        None => put(head, &fields),
        Some(edits) => {
            let mut lines = Output::take();
            put(&mut lines, &fields);
            edits.write_kept(head, &lines);
            head.extend_from_slice(&edits.lines);
        }
    }
    head.extend_from_slice(connection);
    let length = text.len() as u64 + 1;
    put(head, &[b"Content-Length: ", decimal(length, &mut room), b"\r\n\r\n"]);
}
