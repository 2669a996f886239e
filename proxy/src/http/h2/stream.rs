//! One HTTP/2 request: decided like any other, carried out over whichever
//! protocol the endpoint speaks.

use std::future::poll_fn;
use std::rc::Rc;
use std::task::{Context, Poll, ready};

use bytes::Bytes;
use h2::server::SendResponse;
use h2::{Reason, RecvStream, SendStream};
use http::{HeaderMap, HeaderValue, Request, Response, StatusCode, header};
use smallvec::SmallVec;
use tokio::io::AsyncWrite as _;
use tokio::time::Instant;

use crate::buffer::{Buffer, Output};
use crate::clock;
use crate::conn::Conn;
use crate::http::exchange::{Failure, Order, Piece, Source, UploadError, step};
use crate::http::forward::{RequestId, put, write_framing};
use crate::http::h1::Incoming;
use crate::http::head::{Framing, HeaderRoom, Reject, is_authority};
use crate::http::over_h2::{Answering, Frame, next_frame};
use crate::http::record::{Notes, Record, Texts, finish};
use crate::http::response::{BadResponse, ResponseHead};
use crate::http::{Asked, Verdict, chunked, decide, is_idempotent, map, phrase, write_https_location};
use crate::metrics;
use crate::router::Router;
use crate::table::UpstreamProtocol;
use crate::timer::{Late, Timer};
use crate::upstream::{Peer, Upstream};

use super::Http2;

/// The answering half of a stream, and what is being remembered of it.
struct Stream<'s> {
    shared: &'s Http2,
    respond: SendResponse<Bytes>,
    timer: Timer,
    record: Record,
    /// Set when the response head has left.
    sending: Option<SendStream<Bytes>>,
}

/// What is sent upstream, settled before a byte moves.
struct Plan {
    authority: Bytes,
    id: RequestId,
    /// Extra fields of an answer of our own.
    location: Option<HeaderValue>,
    /// Head for an HTTP/1 endpoint.
    head: Output,
    /// Request for an HTTP/2 endpoint.
    request: Option<Request<()>>,
}

/// Serves one stream.
pub(super) async fn serve(shared: Rc<Http2>, request: Request<RecvStream>, respond: SendResponse<Bytes>) {
    let started = Instant::now();
    let worker = &shared.worker;
    worker.metrics.requests_in_flight.inc();
    let (parts, body) = request.into_parts();
    let request = Request::from_parts(parts, ());
    let mut stream = Stream {
        shared: &shared,
        respond,
        timer: Timer::new(started + worker.config.timeouts.read),
        record: Record::new(started),
        sending: None,
    };
    let router = worker.router();
    match plan(&shared, &router, &request, &body) {
        Err(reject) => {
            stream.record.reason = reject.reason;
            worker.metrics.rejected(metrics::Reject::BadRequest);
            stream.answer(reject.status, None).await;
            stream.finish(&request, None, b"");
        }
        Ok((verdict, plan)) => {
            stream.carry_out(&router, &verdict, &plan, &request, body).await;
            stream.finish(&request, Some(&verdict), plan.id.as_bytes());
        }
    }
    worker.metrics.requests_in_flight.dec();
    shared.stream_ended();
}

/// Decides, and prepares what is sent upstream.
fn plan<'r>(
    shared: &Http2,
    router: &'r Router,
    request: &Request<()>,
    body: &RecvStream,
) -> Result<(Verdict<'r>, Plan), Reject> {
    let Http2 { worker, client, .. } = shared;
    let authority = authority(request)?;
    let target = request.uri().path_and_query().map_or("/", |t| t.as_str());
    if target.len() > worker.config.limits.target_bytes {
        return Err(Reject { status: 414, reason: "target too long" });
    }
    if *request.method() == http::Method::CONNECT {
        return Err(Reject { status: 405, reason: "method not allowed" });
    }
    let forwarded = client.forwarded(&map::claims(request.headers()));
    let view = map::MapView { headers: request.headers(), client: forwarded.address };
    let https = forwarded.is_https(client);
    let asked = Asked { authority: &authority, path: request.uri().path().as_bytes(), https };
    let verdict = decide(worker, router, client, &asked, &view)?;
    let sent = request.headers().get("x-request-id").map(HeaderValue::as_bytes);
    let id = RequestId::new(sent, &mut worker.random.borrow_mut());
    let mut plan = Plan { authority, id, location: None, head: Output::take(), request: None };
    match &verdict {
        Verdict::Answer(answer) if answer.to_https => {
            let mut location = Vec::new();
            write_https_location(&mut location, worker, &plan.authority, target.as_bytes());
            plan.location = HeaderValue::from_maybe_shared(Bytes::from(location)).ok();
        }
        Verdict::Answer(_) => {}
        Verdict::Forward(forward) => {
            let pool = router.pool(forward.split.backends[forward.choice.backend].pool);
            match pool.protocol {
                UpstreamProtocol::Http1 | UpstreamProtocol::Https => {
                    let Plan { head, authority, id, .. } = &mut plan;
                    put(head, &[request.method().as_str().as_bytes(), b" ", target.as_bytes()]);
                    put(head, &[b" HTTP/1.1\r\nHost: ", authority, b"\r\n"]);
                    client.write_forwarded(head, &forwarded);
                    let host = forwarded.claims.host.unwrap_or(authority);
                    put(head, &[b"X-Forwarded-Host: ", host, b"\r\nX-Request-ID: ", id.as_bytes(), b"\r\n"]);
                    write_kept(head, request.headers());
                    write_framing(head, framing(request, body));
                    head.extend_from_slice(b"\r\n");
                }
                UpstreamProtocol::H2c | UpstreamProtocol::H2 => {
                    let mut upstream = request.clone();
                    let headers = upstream.headers_mut();
                    let replaced: SmallVec<[_; 8]> =
                        headers.keys().filter(|n| map::is_replaced(n)).cloned().collect();
                    for name in replaced {
                        headers.remove(name);
                    }
                    map::add_forwarded(headers, client, &forwarded, &plan.authority, &plan.id);
                    plan.request = Some(with_authority(upstream, client.scheme.as_str(), &plan.authority)?);
                }
            }
        }
    }
    Ok((verdict, plan))
}

/// `:authority`, or Host in its place; both must say the same (RFC 9113 section 8.3.1).
fn authority(request: &Request<()>) -> Result<Bytes, Reject> {
    let host = request.headers().get(header::HOST).map(HeaderValue::as_bytes);
    let named = request.uri().authority().map(|a| a.as_str().as_bytes());
    let authority = match (named, host) {
        (Some(named), Some(host)) if !named.eq_ignore_ascii_case(host) => {
            return Err(Reject { status: 400, reason: "Host differs from :authority" });
        }
        (Some(named), _) => named,
        (None, Some(host)) => host,
        (None, None) => return Err(Reject { status: 400, reason: "missing :authority" }),
    };
    if request.headers().get_all(header::HOST).iter().count() > 1 {
        return Err(Reject { status: 400, reason: "duplicate Host" });
    }
    match is_authority(authority) {
        true => Ok(Bytes::copy_from_slice(authority)),
        false => Err(Reject { status: 400, reason: "malformed :authority" }),
    }
}

fn with_authority(mut request: Request<()>, scheme: &str, authority: &[u8]) -> Result<Request<()>, Reject> {
    let target = request.uri().path_and_query().map_or("/", |t| t.as_str());
    let uri = http::Uri::builder().scheme(scheme).authority(authority).path_and_query(target).build();
    *request.uri_mut() = uri.map_err(|_| Reject { status: 400, reason: "malformed target" })?;
    *request.version_mut() = http::Version::HTTP_2;
    Ok(request)
}

/// The fields that go on to an HTTP/1 endpoint.
fn write_kept(head: &mut Output, headers: &HeaderMap) {
    for (name, value) in headers {
        let elsewhere = name == header::CONTENT_LENGTH || name == header::COOKIE;
        if !elsewhere && !map::is_replaced(name) {
            put(head, &[name.as_str().as_bytes(), b": ", value.as_bytes(), b"\r\n"]);
        }
    }
    map::write_cookies(head, headers);
}

fn framing(request: &Request<()>, body: &RecvStream) -> Framing {
    let length = request.headers().get(header::CONTENT_LENGTH).and_then(|l| l.to_str().ok()?.parse().ok());
    match (length, body.is_end_stream()) {
        (Some(0), true) | (None, true) => Framing::None,
        (Some(n), _) => Framing::Length(n),
        (None, false) => Framing::Chunked,
    }
}

impl Stream<'_> {
    async fn carry_out(
        &mut self,
        router: &Router,
        verdict: &Verdict<'_>,
        plan: &Plan,
        request: &Request<()>,
        body: RecvStream,
    ) {
        let forward = match verdict {
            Verdict::Answer(answer) => return self.answer(answer.status, plan.location.clone()).await,
            Verdict::Forward(forward) => *forward,
        };
        let worker = &*self.shared.worker;
        let idempotent = is_idempotent(request.method().as_str().as_bytes());
        let is_head = *request.method() == http::Method::HEAD;
        let order = Order { worker, router, forward, idempotent, is_head };
        let framing = framing(request, &body);
        let limit = order.body_limit();
        if matches!(framing, Framing::Length(n) if n > limit) {
            worker.metrics.rejected(metrics::Reject::BodyTooLarge);
            self.record.reason = "request body too large";
            return self.answer(413, None).await;
        }
        let mut source = FromStream::new(body, framing, limit);
        let failure = match &plan.request {
            None => self.over_http1(&order, &mut source, &plan.head).await,
            Some(request) => self.over_http2(&order, &mut source, request).await,
        };
        self.record.bytes_in = source.bytes;
        if let Err(failure) = failure {
            self.fail(&failure).await;
        }
    }

    /// Tells the client of a failure: by a status while it can still be told, else by a reset.
    async fn fail(&mut self, failure: &Failure) {
        let answer = failure.answer();
        let (status, reason) = answer.unwrap_or((499, "client reset the stream"));
        self.record.reason = reason;
        match &mut self.sending {
            Some(stream) => stream.send_reset(Reason::INTERNAL_ERROR),
            None if answer.is_some() => self.answer(status, None).await,
            None => self.record.status = status,
        }
    }

    /// An answer of our own.
    async fn answer(&mut self, status: u16, location: Option<HeaderValue>) {
        self.record.status = status;
        let text = Bytes::from(format!("{}\n", phrase(status)));
        let mut response = Response::new(());
        *response.status_mut() = StatusCode::from_u16(status).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
        let headers = response.headers_mut();
        headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("text/plain"));
        headers.insert(header::CONTENT_LENGTH, HeaderValue::from(text.len()));
        if let Some(location) = location {
            headers.insert(header::LOCATION, location);
        }
        if self.send_head(response, false).is_ok() {
            self.record.bytes_out = text.len() as u64;
            // Nobody is told if this fails: the stream is gone.
            let _ = self.send_data(text, true).await;
        }
    }

    fn send_head(&mut self, response: Response<()>, end: bool) -> Result<(), Failure> {
        let sent = self.respond.send_response(response, end);
        self.sending = Some(sent.map_err(|_| Failure::Client)?);
        Ok(())
    }

    /// Sends body bytes as the client grants room for them.
    async fn send_data(&mut self, mut data: Bytes, end: bool) -> Result<(), Failure> {
        let deadline = Instant::now() + self.shared.worker.config.timeouts.client;
        let Some(stream) = &mut self.sending else { return Err(Failure::Client) };
        while !data.is_empty() {
            stream.reserve_capacity(data.len());
            let granted = match self.timer.within(deadline, poll_fn(|cx| stream.poll_capacity(cx))).await {
                Ok(Some(Ok(granted))) => granted.min(data.len()),
                Ok(_) => return Err(Failure::Client),
                Err(Late) => {
                    stream.send_reset(Reason::CANCEL);
                    return Err(Failure::Client);
                }
            };
            let piece = data.split_to(granted);
            let last = end && data.is_empty();
            stream.send_data(piece, last).map_err(|_| Failure::Client)?;
        }
        Ok(())
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
        let mut watched = Watched { source, respond };
        let (upstream, mut peer) = order.obtain(timer, &mut watched, head, &mut answer, record).await?;
        let (response, framing, reusable) = response_of(order, &mut answer)?;
        let status = response.status().as_u16();
        (self.record.status, self.record.upstream_status) = (status, status);
        let bodiless = framing == Framing::None;
        self.send_head(response, bodiless)?;
        if !bodiless {
            self.relay_http1(order, source, framing, &mut peer, &mut answer).await?;
        }
        self.give_back(order, source, &upstream, peer, reusable && answer.is_empty());
        Ok(())
    }

    fn give_back(
        &self,
        order: &Order<'_>,
        source: &FromStream,
        upstream: &Rc<Upstream>,
        peer: Peer,
        reusable: bool,
    ) {
        if reusable && source.is_done() {
            order.worker.upstreams.keep(upstream, peer, clock::now_ms());
        }
    }

    async fn relay_http1(
        &mut self,
        order: &Order<'_>,
        source: &mut FromStream,
        framing: Framing,
        peer: &mut Peer,
        answer: &mut Buffer,
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
                let data = Bytes::copy_from_slice(&answer.filled()[..piece.data]);
                self.record.bytes_out += data.len() as u64;
                self.send_data(data, last).await?;
            }
            answer.consume(piece.consumed);
            if piece.done {
                return if last && piece.data > 0 { Ok(()) } else { self.end(trailers) };
            }
            answer.release();
            let Stream { timer, respond, .. } = self;
            let mut watched = Watched { source, respond };
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
        let mut watched = Watched { source, respond };
        let answering = order.obtain_h2(timer, &mut watched, request, record).await?;
        let Answering { response, mut upload, lease: _lease } = answering;
        let (mut parts, mut body) = response.into_parts();
        let status = parts.status.as_u16();
        (self.record.status, self.record.upstream_status) = (status, status);
        let bucket = order.forward.split.bucket_line(order.forward.choice);
        parts.headers.extend(chunked::header_map(&bucket).unwrap_or_default());
        parts.version = http::Version::HTTP_2;
        let at_once = body.is_end_stream() && !upload.is_active();
        self.send_head(Response::from_parts(parts, ()), at_once)?;
        if at_once {
            return Ok(());
        }
        loop {
            let Stream { timer, respond, .. } = self;
            let mut watched = Watched { source, respond };
            match next_frame(timer, order.read_deadline(), &mut watched, &mut upload, &mut body).await? {
                Frame::Data(data) => {
                    self.record.bytes_out += data.len() as u64;
                    if let Err(failure) = self.send_data(data, false).await {
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

/// The HTTP/1 response head in `answer` as HTTP/2 sends it; how its body is
/// framed; whether the connection can be used again.
fn response_of(order: &Order<'_>, answer: &mut Buffer) -> Result<(Response<()>, Framing, bool), Failure> {
    let nonsense = |BadResponse(reason)| Failure::Nonsense(reason);
    let mut room = HeaderRoom::new();
    let parsed = ResponseHead::parse(answer.filled(), &mut room, order.is_head);
    let Some(head) = parsed.map_err(nonsense)? else {
        return Err(Failure::Nonsense("malformed response head"));
    };
    if head.status == 101 {
        return Err(Failure::Nonsense("endpoint switched protocols unasked"));
    }
    let mut response = Response::new(());
    *response.status_mut() =
        StatusCode::from_u16(head.status).map_err(|_| Failure::Nonsense("malformed status line"))?;
    let headers = response.headers_mut();
    for header in head.headers {
        let name = http::HeaderName::from_bytes(header.name.as_bytes());
        let value = HeaderValue::from_bytes(header.value);
        let (Ok(name), Ok(value)) = (name, value) else { continue };
        let nominated = head.nominated.iter().any(|n| n.eq_ignore_ascii_case(header.name.as_bytes()));
        if !nominated && !map::is_connection_specific(&name) {
            headers.append(name, value);
        }
    }
    if head.framing == Framing::Chunked || head.framing == Framing::Close {
        headers.remove(header::CONTENT_LENGTH);
    }
    let bucket = order.forward.split.bucket_line(order.forward.choice);
    headers.extend(chunked::header_map(&bucket).unwrap_or_default());
    let (framing, reusable, length) = (head.framing, head.keep_alive, head.length);
    drop(head);
    answer.consume(length);
    Ok((response, framing, reusable))
}

/// A request body that arrives on an HTTP/2 stream.
struct FromStream {
    body: RecvStream,
    framing: Framing,
    limit: u64,
    bytes: u64,
    /// Received and not yet written, with its chunk framing if it has any.
    before: Output,
    data: Bytes,
    after: Output,
    written: usize,
    started: bool,
    ended: bool,
    abandoned: bool,
}

impl FromStream {
    fn new(body: RecvStream, framing: Framing, limit: u64) -> FromStream {
        let ended = body.is_end_stream();
        FromStream {
            body,
            framing,
            limit,
            bytes: 0,
            before: Output::take(),
            data: Bytes::new(),
            after: Output::take(),
            written: 0,
            started: false,
            ended,
            abandoned: false,
        }
    }

    fn unwritten(&self) -> usize {
        self.before.len() + self.data.len() + self.after.len() - self.written
    }

    /// Receives the next piece. The window is opened again only when the
    /// previous one has been passed on.
    fn poll_receive(&mut self, cx: &mut Context<'_>) -> Poll<Result<Piece, UploadError>> {
        if !self.data.is_empty() {
            let taken = std::mem::take(&mut self.data).len();
            self.body.flow_control().release_capacity(taken).map_err(|_| UploadError::Client)?;
        }
        loop {
            match ready!(self.body.poll_data(cx)) {
                Some(Ok(data)) if data.is_empty() => {}
                Some(Ok(data)) => {
                    self.started = true;
                    self.bytes += data.len() as u64;
                    if self.bytes > self.limit {
                        return Poll::Ready(Err(UploadError::TooLarge));
                    }
                    self.data = data.clone();
                    return Poll::Ready(Ok(Piece::Data(data)));
                }
                Some(Err(_)) => return Poll::Ready(Err(UploadError::Client)),
                None => break,
            }
        }
        let trailers = ready!(self.body.poll_trailers(cx)).map_err(|_| UploadError::Client)?;
        self.ended = true;
        Poll::Ready(Ok(Piece::End(trailers)))
    }

    fn is_done(&self) -> bool {
        self.ended && self.unwritten() == 0
    }

    fn poll_upload(&mut self, cx: &mut Context<'_>, endpoint: &mut Conn) -> Poll<Result<(), UploadError>> {
        let mut moved = false;
        loop {
            while self.unwritten() > 0 {
                match poll_write_at(cx, endpoint, [&self.before, &self.data, &self.after], self.written) {
                    Poll::Ready(Ok(n)) => self.written += n,
                    Poll::Ready(Err(_)) => return Poll::Ready(Err(UploadError::Endpoint)),
                    Poll::Pending if moved => return Poll::Ready(Ok(())),
                    Poll::Pending => return Poll::Pending,
                }
                moved = true;
            }
            let endpoint = std::pin::Pin::new(&mut *endpoint);
            if endpoint.poll_flush(cx).map_err(|_| UploadError::Endpoint)?.is_pending() {
                return Poll::Pending;
            }
            if self.ended {
                return Poll::Ready(Ok(()));
            }
            self.written = 0;
            self.before.clear();
            self.after.clear();
            let piece = match self.poll_receive(cx) {
                Poll::Ready(piece) => piece?,
                Poll::Pending if moved => return Poll::Ready(Ok(())),
                Poll::Pending => return Poll::Pending,
            };
            self.frame(&piece);
        }
    }

    fn frame(&mut self, piece: &Piece) {
        if self.framing != Framing::Chunked {
            return;
        }
        match piece {
            Piece::Data(data) => {
                self.before.extend_from_slice(chunked::size_line(data.len(), &mut [0; 18]));
                self.after.extend_from_slice(b"\r\n");
            }
            Piece::End(trailers) => {
                self.before.extend_from_slice(b"0\r\n");
                if let Some(trailers) = trailers {
                    map::write_lines(&mut self.before, trailers);
                }
                self.before.extend_from_slice(b"\r\n");
            }
        }
    }
}

/// Writes from position `at` of the three parts laid end to end.
fn poll_write_at(
    cx: &mut Context<'_>,
    endpoint: &mut Conn,
    parts: [&[u8]; 3],
    at: usize,
) -> Poll<std::io::Result<usize>> {
    let mut skip = at;
    let slices = parts.map(|part| {
        let n = skip.min(part.len());
        skip -= n;
        std::io::IoSlice::new(&part[n..])
    });
    std::pin::Pin::new(endpoint).poll_write_vectored(cx, &slices)
}

/// A source whose client can be seen to reset the stream.
struct Watched<'w> {
    source: &'w mut FromStream,
    respond: &'w mut SendResponse<Bytes>,
}

impl Source for Watched<'_> {
    fn poll_upload(&mut self, cx: &mut Context<'_>, endpoint: &mut Conn) -> Poll<Result<(), UploadError>> {
        self.source.poll_upload(cx, endpoint)
    }

    fn poll_piece(&mut self, cx: &mut Context<'_>) -> Poll<Result<Piece, UploadError>> {
        self.source.poll_receive(cx)
    }

    fn is_done(&self) -> bool {
        self.source.is_done()
    }

    fn is_active(&self) -> bool {
        !self.source.is_done() && !self.source.abandoned
    }

    fn has_started(&self) -> bool {
        self.source.started
    }

    fn abandon(&mut self) {
        self.source.abandoned = true;
    }

    fn poll_gone(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        self.respond.poll_reset(cx).map(|_| ())
    }

    async fn interim(&mut self, _: &mut Timer, _: &[u8]) -> bool {
        true
    }
}
