//! One HTTP/2 request: decided like any other, carried out over whichever
//! protocol the endpoint speaks.

use std::future::poll_fn;
use std::task::{Context, Poll};

use bytes::Bytes;
use h2::server::SendResponse;
use h2::{Reason, RecvStream, SendStream};
use http::{HeaderMap, HeaderValue, Request, Response, StatusCode, header};
use tokio::time::Instant;

use crate::buffer::{Buffer, Output, share};
use crate::clock;
use crate::http::exchange::{Failure, Order, UploadError, step};
use crate::http::h1::Incoming;
use crate::http::head::{Framing, HeaderRoom, end_of_head};
use crate::http::over_h2::{Answering, Frame, next_frame, poll_room};
use crate::http::record::{Notes, Record, Texts, finish};
use crate::http::response::{BadResponse, ResponseHead};
use crate::http::{Verdict, chunked, is_idempotent, map, phrase};
use crate::metrics::{self, Breach};
use crate::router::Router;
use crate::table::FieldEdits;
use crate::timer::{Late, Timer};
use crate::upstream::Peer;

use super::Http2;
use super::plan::{Plan, framing, plan};
use super::runner::Work;
use super::source::{Answer, FromStream, Watched};
use super::tunnel::{self, Far, Near};
use super::websocket::{self, Key};

/// The answering half of a stream, and what is being remembered of it.
struct Stream<'s> {
    shared: &'s Http2,
    respond: SendResponse<Bytes>,
    timer: &'s mut Timer,
    record: Record,
    /// Set when the response head has left.
    sending: Option<SendStream<Bytes>>,
    is_head: bool,
    is_grpc: bool,
    /// When the request as a whole has taken too long.
    ends: Option<Instant>,
}

/// Serves one stream.
pub(super) async fn serve(work: Work, timer: &mut Timer) {
    let Work { shared, request, respond } = work;
    let started = Instant::now();
    let worker = &shared.worker;
    worker.metrics.requests_in_flight.inc();
    let (parts, body) = request.into_parts();
    let request = Request::from_parts(parts, ());
    let mut stream = Stream {
        shared: &shared,
        respond,
        timer,
        record: Record::new(started),
        sending: None,
        is_head: *request.method() == http::Method::HEAD,
        is_grpc: is_grpc(&request),
        ends: None,
    };
    let router = worker.router();
    let (mut far, mut _held) = (None, None);
    match plan(&shared, &router, &request, &body) {
        Err(reject) => {
            stream.record.reason = reject.reason;
            worker.metrics.rejected(match reject.status {
                414 => metrics::Reject::UriTooLong,
                431 => metrics::Reject::HeaderTooLarge,
                _ => metrics::Reject::BadRequest,
            });
            stream.answer(reject.status, None, None).await;
            stream.finish(&request, None, b"");
        }
        Ok((verdict, mut plan)) => {
            far = stream.carry_out(&router, &verdict, &plan, &request, body).await;
            stream.finish(&request, Some(&verdict), plan.id.as_bytes());
            // A tunnel stays in its client's account.
            _held = plan.held.take();
        }
    }
    worker.metrics.requests_in_flight.dec();
    // A tunnel is not tied to the generation that opened it.
    drop(router);
    if let (Some((receive, far)), Some(send)) = (far, stream.sending) {
        worker.metrics.upgrades.inc();
        tunnel::run(&shared, Near { receive, send }, far, stream.timer).await;
    }
    shared.stream_ended();
}

impl Stream<'_> {
    async fn carry_out(
        &mut self,
        router: &Router,
        verdict: &Verdict<'_>,
        plan: &Plan<'_>,
        request: &Request<()>,
        body: RecvStream,
    ) -> Option<(RecvStream, Far)> {
        let edits = verdict.response_edits();
        let forward = match verdict {
            Verdict::Answer(answer) => {
                self.answer(answer.status, plan.location.clone(), edits).await;
                return None;
            }
            Verdict::Forward(forward) => *forward,
        };
        let worker = &*self.shared.worker;
        // Of a tunnel nothing has been sent before it stands.
        let idempotent = plan.websocket.is_some() || is_idempotent(request.method().as_str().as_bytes());
        let started = self.record.started;
        let mut order = Order::new(worker, router, forward, idempotent, self.is_head, started);
        let framing = framing(request, &body);
        order.bodiless = framing == Framing::None && plan.websocket.is_none();
        self.ends = order.ends.next.get();
        let limit = order.body_limit();
        if matches!(framing, Framing::Length(n) if n > limit) {
            worker.metrics.rejected(metrics::Reject::BodyTooLarge);
            self.record.reason = "request body too large";
            self.answer(413, None, edits).await;
            return None;
        }
        let kept = if plan.request.is_none() { order.replay_bytes() } else { 0 };
        let mut source = FromStream::new(body, framing, limit, kept);
        if plan.websocket.is_some() {
            source.withhold();
        }
        let done = match (&plan.request, &plan.websocket) {
            (None, None) => self.over_http1(&order, &mut source, &plan.head).await.map(|()| None),
            (Some(request), None) => self.over_http2(&order, &mut source, request).await.map(|()| None),
            (None, Some(key)) => self.tunnel_over_http1(&order, &mut source, &plan.head, key).await,
            (Some(request), Some(_)) => self.tunnel_over_http2(&order, &mut source, request).await,
        };
        self.record.bytes_in = source.bytes;
        match done {
            Ok(far) => far.map(|far| (source.into_body(), far)),
            Err(failure) => {
                self.fail(&failure, edits).await;
                None
            }
        }
    }

    /// Asks an HTTP/1 endpoint to switch. `None`: it would not, and its answer is through.
    async fn tunnel_over_http1(
        &mut self,
        order: &Order<'_>,
        source: &mut FromStream,
        head: &Output,
        key: &Key,
    ) -> Result<Option<Far>, Failure> {
        let mut answer = Buffer::new();
        let Stream { timer, record, respond, .. } = self;
        let mut watched = Watched { source, answer: Answer::Due(respond) };
        let (_, peer) = order.obtain(timer, &mut watched, head, &mut answer, record).await?;
        let Some(response) = websocket::switched(order, &mut answer, key)? else {
            return self.relay_http1(order, source, peer, answer).await.map(|_| None);
        };
        (self.record.status, self.record.upstream_status) = (200, 101);
        self.send_head(response, false)?;
        Ok(Some(Far::Http1(Box::new(peer), answer)))
    }

    /// Asks an HTTP/2 endpoint for a tunnel. `None`: it would not, and its answer is through.
    async fn tunnel_over_http2(
        &mut self,
        order: &Order<'_>,
        source: &mut FromStream,
        request: &Request<()>,
    ) -> Result<Option<Far>, Failure> {
        let Stream { timer, record, respond, .. } = self;
        let mut watched = Watched { source, answer: Answer::Due(respond) };
        let answering = order.obtain_h2(timer, &mut watched, request, record).await?;
        if !answering.response.status().is_success() {
            return self.relay_http2(order, source, answering).await.map(|()| None);
        }
        let Answering { response, upload, lease } = answering;
        let (mut parts, receive) = response.into_parts();
        websocket::remove_handshake(&mut parts.headers);
        self.send_http2_head(order, parts, false)?;
        Ok(Some(Far::Http2 { receive, send: upload.into_stream(), _lease: lease }))
    }

    /// Tells the client of a failure: by a status while it can still be told, else by a reset.
    async fn fail(&mut self, failure: &Failure, edits: Option<&FieldEdits>) {
        let answer = failure.answer();
        let (status, reason) = answer.unwrap_or((499, "client reset the stream"));
        self.record.reason = reason;
        if answer.is_none() {
            self.shared.stream_was_reset();
        }
        if status == 413 {
            self.shared.worker.metrics.rejected(metrics::Reject::BodyTooLarge);
        }
        match &mut self.sending {
            Some(stream) => stream.send_reset(Reason::INTERNAL_ERROR),
            None if answer.is_some() => self.answer(status, None, edits).await,
            None => self.record.status = status,
        }
    }

    /// An answer of our own. For gRPC nothing is edited: its fields are its status.
    async fn answer(&mut self, status: u16, location: Option<HeaderValue>, edits: Option<&FieldEdits>) {
        self.record.status = status;
        if self.is_grpc {
            // Nobody is told if this fails: the stream is gone.
            let _ = self.send_head(grpc_answer(status), true);
            return;
        }
        let text = Bytes::from(format!("{}\n", phrase(status)));
        let mut response = Response::new(());
        *response.status_mut() = StatusCode::from_u16(status).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
        let headers = response.headers_mut();
        headers.extend(HeaderValue::from_bytes(&clock::http_date()).map(|date| (header::DATE, date)));
        headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("text/plain"));
        headers.insert(header::CONTENT_LENGTH, HeaderValue::from(text.len()));
        if let Some(location) = location {
            headers.insert(header::LOCATION, location);
        }
        if let Some(edits) = edits {
            edits.apply(headers);
        }
        if self.send_head(response, self.is_head).is_ok() && !self.is_head {
            let _ = self.send_data(text, true, |_| Poll::Pending).await;
        }
    }

    fn send_head(&mut self, response: Response<()>, end: bool) -> Result<(), Failure> {
        let sent = self.respond.send_response(response, end);
        self.sending = Some(sent.map_err(|_| Failure::Client)?);
        Ok(())
    }

    /// Sends body bytes as the client grants room for them. Meanwhile `upload`
    /// moves the request body on: a client may want to be through with that first.
    async fn send_data(
        &mut self,
        mut data: Bytes,
        end: bool,
        mut upload: impl FnMut(&mut Context<'_>) -> Poll<Result<(), UploadError>>,
    ) -> Result<(), Failure> {
        let patience = self.shared.worker.config.timeouts.client;
        let Some(stream) = &mut self.sending else { return Err(Failure::Client) };
        while !data.is_empty() {
            let next = poll_fn(|cx| {
                if let Poll::Ready(room) = poll_room(cx, stream, data.len()) {
                    return Poll::Ready(room.ok_or(Failure::Client));
                }
                match upload(cx) {
                    Poll::Ready(Ok(())) => Poll::Ready(Ok(0)),
                    Poll::Ready(Err(UploadError::Endpoint)) | Poll::Pending => Poll::Pending,
                    Poll::Ready(Err(error)) => Poll::Ready(Err(error.into())),
                }
            });
            let deadline = Instant::now() + patience;
            let deadline = self.ends.map_or(deadline, |end| end.min(deadline));
            match self.timer.within(deadline, next).await {
                Ok(Ok(0)) => {}
                Ok(Ok(room)) => {
                    let piece = data.split_to(room);
                    self.record.bytes_out += piece.len() as u64;
                    self.shared.frames.sent(piece.len());
                    stream.send_data(piece, end && data.is_empty()).map_err(|_| Failure::Client)?;
                }
                Ok(Err(failure)) => return Err(failure),
                Err(Late) => {
                    self.shared.worker.metrics.breached(Breach::Stalled);
                    stream.send_reset(Reason::CANCEL);
                    return Err(Failure::Client);
                }
            }
        }
        Ok(())
    }

    /// The client's side of the exchange, and the timer of this stream.
    fn watch<'w>(&'w mut self, source: &'w mut FromStream) -> (&'w mut Timer, Watched<'w>) {
        let answer = match &mut self.sending {
            Some(stream) => Answer::Sending(stream),
            None => Answer::Due(&mut self.respond),
        };
        (self.timer, Watched { source, answer })
    }

    /// Ends the response, with trailers if there are any.
    fn end(&mut self, trailers: Option<HeaderMap>) -> Result<(), Failure> {
        let Some(stream) = &mut self.sending else { return Err(Failure::Client) };
        let ended = match trailers {
            Some(trailers) => stream.send_trailers(trailers),
            None => stream.send_data(Bytes::new(), true),
        };
        ended.map_err(|_| Failure::Client)
    }

    async fn over_http1(
        &mut self,
        order: &Order<'_>,
        source: &mut FromStream,
        head: &Output,
    ) -> Result<(), Failure> {
        let mut answer = Buffer::new();
        let Stream { timer, record, respond, .. } = self;
        let mut watched = Watched { source, answer: Answer::Due(respond) };
        let (upstream, peer) = order.obtain(timer, &mut watched, head, &mut answer, record).await?;
        if let Some(peer) = self.relay_http1(order, source, peer, answer).await? {
            order.worker.upstreams.keep(&upstream, peer, clock::now_ms());
        }
        Ok(())
    }

    /// The response whose head is in `answer`. Returns the connection if it can be used again.
    async fn relay_http1(
        &mut self,
        order: &Order<'_>,
        source: &mut FromStream,
        mut peer: Peer,
        mut answer: Buffer,
    ) -> Result<Option<Peer>, Failure> {
        let (response, framing, reusable, at_hand) = response_of(order, &mut answer)?;
        let status = response.status().as_u16();
        (self.record.status, self.record.upstream_status) = (status, status);
        let bodiless = framing == Framing::None;
        self.send_head(response, bodiless)?;
        if !bodiless {
            self.relay_http1_body(order, source, framing, &mut peer, &mut answer, at_hand).await?;
        }
        Ok((reusable && answer.is_empty() && source.is_done()).then_some(peer))
    }

    async fn relay_http1_body(
        &mut self,
        order: &Order<'_>,
        source: &mut FromStream,
        framing: Framing,
        peer: &mut Peer,
        answer: &mut Buffer,
        mut at_hand: Bytes,
    ) -> Result<(), Failure> {
        let mut body = Incoming::new(framing);
        let mut ended = false;
        loop {
            let mut piece = body.next(answer).map_err(|e| Failure::Nonsense(e.0))?;
            piece.done |= ended && body.ends_at_close();
            if ended && !piece.done {
                return Err(Failure::Nonsense("endpoint closed the connection within a response body"));
            }
            let trailers = if piece.done { chunked::header_map(body.trailers()) } else { None };
            let last = piece.done && trailers.is_none();
            if piece.data > 0 {
                let data = match std::mem::take(&mut at_hand) {
                    data if data.len() == piece.data && framing != Framing::Chunked => data,
                    _ => share(&answer.filled()[..piece.data]),
                };
                let upload = |cx: &mut Context<'_>| upload_meanwhile(cx, source, peer);
                self.send_data(data, last, upload).await?;
            }
            answer.consume(piece.consumed);
            if piece.done {
                return if last && piece.data > 0 { Ok(()) } else { self.end(trailers) };
            }
            answer.release();
            let (timer, mut watched) = self.watch(source);
            ended = step(order, timer, &mut watched, &mut peer.conn, answer).await? == 0;
        }
    }

    async fn over_http2(
        &mut self,
        order: &Order<'_>,
        source: &mut FromStream,
        request: &Request<()>,
    ) -> Result<(), Failure> {
        let Stream { timer, record, respond, .. } = self;
        let mut watched = Watched { source, answer: Answer::Due(respond) };
        let answering = order.obtain_h2(timer, &mut watched, request, record).await?;
        self.relay_http2(order, source, answering).await
    }

    /// The head of an HTTP/2 endpoint's response.
    fn send_http2_head(
        &mut self,
        order: &Order<'_>,
        mut parts: http::response::Parts,
        end: bool,
    ) -> Result<(), Failure> {
        let status = parts.status.as_u16();
        (self.record.status, self.record.upstream_status) = (status, status);
        if let Some(edits) = order.response_edits() {
            edits.apply(&mut parts.headers);
        }
        let bucket = order.cookie_lines();
        parts.headers.extend(chunked::header_map(&bucket).unwrap_or_default());
        parts.version = http::Version::HTTP_2;
        self.send_head(Response::from_parts(parts, ()), end)
    }

    async fn relay_http2(
        &mut self,
        order: &Order<'_>,
        source: &mut FromStream,
        answering: Answering,
    ) -> Result<(), Failure> {
        let Answering { response, mut upload, lease: _lease } = answering;
        let (parts, mut body) = response.into_parts();
        // Some endpoints send a body where there is none to be.
        let bodiless = self.is_head || matches!(parts.status.as_u16(), 204 | 304);
        let at_once = bodiless || body.is_end_stream() && !upload.is_active();
        self.send_http2_head(order, parts, at_once)?;
        if at_once {
            return Ok(());
        }
        loop {
            let (timer, mut watched) = self.watch(source);
            match next_frame(order, timer, &mut watched, &mut upload, &mut body).await? {
                Frame::Data(data) => {
                    let meanwhile = |cx: &mut Context<'_>| {
                        upload.poll(cx, &mut Watched { source, answer: Answer::Elsewhere })
                    };
                    if let Err(failure) = self.send_data(data, false, meanwhile).await {
                        upload.cancel();
                        return Err(failure);
                    }
                }
                Frame::Trailers(trailers) => return self.end(Some(trailers)),
                Frame::End => return self.end(None),
            }
        }
    }

    fn finish(&self, request: &Request<()>, verdict: Option<&Verdict<'_>>, id: &[u8]) {
        let Http2 { worker, client, .. } = self.shared;
        let get = |name| request.headers().get(name).map_or(b"" as &[u8], HeaderValue::as_bytes);
        let host = request.uri().authority().map_or(get(header::HOST), |a| a.as_str().as_bytes());
        let notes = worker.log.borrow().is_some().then(|| {
            Notes::new(&Texts {
                method: request.method().as_str().as_bytes(),
                host,
                target: request.uri().path_and_query().map_or(b"", |t| t.as_str().as_bytes()),
                user_agent: get(header::USER_AGENT),
                referer: get(header::REFERER),
                request_id: id,
            })
        });
        finish(worker, client, "HTTP/2.0", verdict, &self.record, notes.as_ref(), Instant::now());
    }
}

fn is_grpc(request: &Request<()>) -> bool {
    let content_type = request.headers().get(header::CONTENT_TYPE).map(HeaderValue::as_bytes);
    let rest = content_type.and_then(|value| value.strip_prefix(b"application/grpc"));
    rest.is_some_and(|rest| matches!(rest.first(), None | Some(b'+' | b';')))
}

/// An answer of our own as a gRPC client understands it: its status in place
/// of the trailers. It would take a text for a broken message.
fn grpc_answer(status: u16) -> Response<()> {
    // The gRPC document "HTTP to gRPC status code mapping".
    let code = match status {
        400 | 431 => "13",
        401 => "16",
        403 => "7",
        404 => "12",
        429 | 502..=504 => "14",
        _ => "2",
    };
    let mut response = Response::new(());
    let headers = response.headers_mut();
    headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("application/grpc"));
    headers.insert("grpc-status", HeaderValue::from_static(code));
    headers.insert("grpc-message", HeaderValue::from_static(phrase(status)));
    response
}

/// Moves the request body while the response waits for the client.
fn upload_meanwhile(
    cx: &mut Context<'_>,
    source: &mut FromStream,
    peer: &mut Peer,
) -> Poll<Result<(), UploadError>> {
    if !source.is_active() {
        return Poll::Pending;
    }
    let moved = source.poll_upload(cx, &mut peer.conn);
    if matches!(moved, Poll::Ready(Err(UploadError::Endpoint))) {
        source.abandon();
    }
    moved
}

/// The HTTP/1 response head in `answer` as HTTP/2 sends it; how its body is
/// framed; whether the connection can be used again; and what has come of the
/// body, which is still in `answer` too.
fn response_of(
    order: &Order<'_>,
    answer: &mut Buffer,
) -> Result<(Response<()>, Framing, bool, Bytes), Failure> {
    let nonsense = |BadResponse(reason)| Failure::Nonsense(reason);
    let mut room = HeaderRoom::new();
    let bytes = share(shareable(answer.filled()));
    let parsed = ResponseHead::parse(&bytes, &mut room, order.is_head);
    let Some(head) = parsed.map_err(nonsense)? else {
        return Err(Failure::Nonsense("malformed response head"));
    };
    if head.status == 101 {
        return Err(Failure::Nonsense("endpoint switched protocols unasked"));
    }
    let mut response = map::response(&head, &bytes).map_err(nonsense)?;
    let headers = response.headers_mut();
    if head.framing == Framing::Chunked || head.framing == Framing::Close {
        headers.remove(header::CONTENT_LENGTH);
    }
    if let Some(edits) = order.response_edits() {
        edits.apply(headers);
    }
    let bucket = order.cookie_lines();
    headers.extend(chunked::header_map(&bucket).unwrap_or_default());
    let reusable = head.keep_alive && !order.closes();
    let (framing, length) = (head.framing, head.length);
    drop(head);
    answer.consume(length);
    Ok((response, framing, reusable, bytes.slice(length..)))
}

/// A small answer whole: its body is shared along with its head. Of a larger one the head alone.
fn shareable(answer: &[u8]) -> &[u8] {
    const SMALL: usize = 4 << 10;
    match end_of_head(answer) {
        Some(end) if answer.len() > SMALL => &answer[..end + 4],
        _ => answer,
    }
}
