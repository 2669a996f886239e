//! One request to one HTTP/2 endpoint, and to the next one if that fails before
//! anything irrevocable has happened. The client's side is a [`Source`].

use std::future::{Future as _, poll_fn};
use std::pin::Pin;
use std::rc::Rc;
use std::task::{Context, Poll, ready};

use bytes::Bytes;
use h2::client::ResponseFuture;
use h2::{Reason, RecvStream, SendStream};
use http::{HeaderMap, Method, Request, Response};
use smallvec::SmallVec;
use tokio::time::Instant;

use crate::buffer::Output;
use crate::timer::{Late, Timer};
use crate::upstream::h2::{Lease, NotConnected};
use crate::upstream::{InFlight, Upstream};

use super::attempts::{Chosen, Course, Lost};
use super::exchange::{Failure, Order, Piece, SLOW_BODY, Source, UploadError};
use super::forward::put;
use super::record::Record;

/// A response under way; the lease keeps its place on the connection.
pub(crate) struct Answering {
    pub(crate) response: Response<RecvStream>,
    pub(crate) upload: Upload,
    pub(crate) lease: Lease,
}

/// The sending half of a stream.
pub(crate) struct Upload {
    stream: SendStream<Bytes>,
    body: Body,
    pending: Bytes,
    state: State,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum State {
    Open,
    Ended,
    Broken,
}

/// A request body as far as it was taken from the client: kept until an
/// endpoint has answered, so that a stream that was refused can be sent again.
struct Body {
    kept: SmallVec<[Bytes; 4]>,
    bytes: usize,
    /// Most bytes that are kept.
    room: usize,
    end: Option<Option<HeaderMap>>,
    /// Of `kept`, the piece to send next.
    next: usize,
    /// Pieces went by that were not kept.
    forgotten: bool,
}

/// What a piece of body costs in memory besides its bytes, about: a place in the list, what counts its
/// owners, and the head of the frame it came in. A body in crumbs must not be kept many times over.
const PIECE_COST: usize = 64;

/// A failed stream.
struct Broken {
    failure: Failure,
    /// The endpoint may have acted on it.
    processed: bool,
    /// The connection ended, and with it every stream: that says nothing about this request.
    stale: bool,
    body: Body,
}

impl Order<'_> {
    /// Tries endpoints until one has answered.
    pub(crate) async fn obtain_h2<S: Source>(
        &self,
        timer: &mut Timer,
        source: &mut S,
        request: &Request<()>,
        record: &mut Record,
    ) -> Result<Answering, Failure> {
        let mut course = Course::default();
        let mut chosen = self.first(&mut course, record)?;
        let mut body = Body::new(self.worker.config.retry.replay_bytes);
        loop {
            let Chosen { upstream, busy } = chosen;
            self.begin_try();
            let lost = match self.leased(timer, &upstream, busy).await {
                Err(lost) => lost,
                Ok(lease) => {
                    let since_start = lease.reused && course.is_first();
                    record.connected = Some(if since_start { record.started } else { Instant::now() });
                    match self.exchange_h2(timer, source, request, lease, body).await {
                        Ok(mut answering) => {
                            record.first_byte = Some(Instant::now());
                            let status = answering.response.status().as_u16();
                            self.answered(&upstream, status, record, course.since);
                            let repeatable = !answering.upload.body.forgotten;
                            match self.instead(&mut course, &upstream, status, repeatable, record) {
                                None => {
                                    answering.upload.body.settle();
                                    return Ok(answering);
                                }
                                Some(next) => {
                                    answering.upload.cancel();
                                    body = answering.upload.body;
                                    (chosen, body.next) = (next, 0);
                                    continue;
                                }
                            }
                        }
                        Err(broken) => {
                            body = broken.body;
                            Lost::Failed {
                                failure: broken.failure,
                                sent: broken.processed,
                                stale: broken.stale || !broken.processed,
                                counts: broken.processed && !broken.stale,
                                repeatable: !body.forgotten,
                            }
                        }
                    }
                }
            };
            self.lost(&mut course, &upstream, record, lost)?;
            if body.forgotten {
                // Nothing was sent this time, but before.
                return Err(Failure::Endpoint("endpoint broke the stream"));
            }
            chosen = self.next(&mut course, record)?;
            body.next = 0;
        }
    }

    async fn leased(
        &self,
        timer: &mut Timer,
        upstream: &Rc<Upstream>,
        busy: InFlight,
    ) -> Result<Lease, Lost> {
        let leasing = Box::pin(self.worker.upstreams.lease(upstream, self.breaker(), busy));
        let (failure, counts) = match timer.within(self.connect_deadline(), leasing).await {
            Ok(Ok(lease)) => return Ok(lease),
            Ok(Err(NotConnected::Full(limit))) => return Err(Lost::Full(limit)),
            Ok(Err(NotConnected::Failed { counts })) => {
                (Failure::Endpoint("cannot connect to the endpoint"), counts)
            }
            Err(Late) => (self.late(), true),
        };
        Err(Lost::Failed { failure, sent: false, stale: false, counts, repeatable: true })
    }

    async fn exchange_h2<S: Source>(
        &self,
        timer: &mut Timer,
        source: &mut S,
        request: &Request<()>,
        lease: Lease,
        body: Body,
    ) -> Result<Answering, Broken> {
        // Only a tunnel is a CONNECT here, and not every endpoint knows how to be the end of one.
        if *request.method() == Method::CONNECT
            && timer.within(self.connect_deadline(), lease.offers_tunnels()).await != Ok(true)
        {
            let failure = Failure::Nonsense("endpoint offers no extended CONNECT");
            return Err(Broken { failure, processed: false, stale: false, body });
        }
        let bodiless = source.is_done() && body.is_untouched();
        let (mut answer, stream) = match lease.sender().send_request(request.clone(), bodiless) {
            Ok(sent) => sent,
            Err(_) => {
                lease.retire();
                let failure = Failure::Endpoint("endpoint takes no more streams");
                return Err(Broken { failure, processed: false, stale: true, body });
            }
        };
        let state = if bodiless { State::Ended } else { State::Open };
        let mut upload = Upload { stream, body, pending: Bytes::new(), state };
        loop {
            let next = poll_fn(|cx| poll_answer(cx, source, &mut upload, &mut answer));
            let waited = match self.in_time() {
                Ok(()) => timer.within(self.read_deadline(), next).await,
                Err(_) => Err(Late),
            };
            let failure = match waited {
                Ok(Ok(Progress::Answer(response))) => return Ok(Answering { response, upload, lease }),
                Ok(Ok(Progress::Moved)) => continue,
                Ok(Ok(Progress::Interim(response))) => match self.interim() {
                    Ok(()) if source.interim(timer, &interim_head(&response)).await => continue,
                    Ok(()) => Failure::Client,
                    Err(failure) => failure,
                },
                Ok(Err(AnswerError::Stream(error))) => {
                    if !error.is_reset() {
                        lease.retire();
                    }
                    return Err(broken(&error, &lease, upload.body));
                }
                Ok(Err(AnswerError::Upload(failure))) => failure,
                Err(Late) if upload.awaits_client() && source.is_active() && !self.is_overdue() => SLOW_BODY,
                Err(Late) => {
                    // Slow or dead: later requests find out on a connection of their own. One
                    // that was allowed less time than others says less.
                    if self.ends.next.get().is_none() {
                        lease.retire();
                    }
                    self.late()
                }
            };
            upload.cancel();
            return Err(Broken { failure, processed: true, stale: false, body: upload.body });
        }
    }
}

enum Progress {
    Answer(Response<RecvStream>),
    Interim(Response<()>),
    /// Some of the body.
    Moved,
}

enum AnswerError {
    Stream(h2::Error),
    Upload(Failure),
}

fn poll_answer<S: Source>(
    cx: &mut Context<'_>,
    source: &mut S,
    upload: &mut Upload,
    answer: &mut ResponseFuture,
) -> Poll<Result<Progress, AnswerError>> {
    let moved = upload.poll(cx, source);
    if let Poll::Ready(Some(Ok(interim))) = answer.poll_informational(cx) {
        return Poll::Ready(Ok(Progress::Interim(interim)));
    }
    if let Poll::Ready(answered) = Pin::new(answer).poll(cx) {
        return Poll::Ready(answered.map(Progress::Answer).map_err(AnswerError::Stream));
    }
    match moved {
        Poll::Ready(Ok(())) => return Poll::Ready(Ok(Progress::Moved)),
        // It may still answer, or say why not.
        Poll::Ready(Err(UploadError::Endpoint)) | Poll::Pending => {}
        Poll::Ready(Err(error)) => return Poll::Ready(Err(AnswerError::Upload(error.into()))),
    }
    source.poll_gone(cx).map(|()| Err(AnswerError::Upload(Failure::Client)))
}

fn broken(error: &h2::Error, lease: &Lease, body: Body) -> Broken {
    // RFC 9113 section 8.7: a refused stream was not processed; a GOAWAY ends only streams above its last.
    let refused = error.is_reset() && error.is_remote() && error.reason() == Some(Reason::REFUSED_STREAM);
    let processed = !(refused || error.is_go_away() && error.is_remote());
    let stale = lease.reused && (error.is_io() || error.is_go_away());
    Broken { failure: Failure::Endpoint("endpoint broke the stream"), processed, stale, body }
}

/// A 1xx head in HTTP/1 words.
fn interim_head(response: &Response<()>) -> Output {
    let mut head = Output::take();
    let status = response.status();
    put(&mut head, &[b"HTTP/1.1 ", status.as_str().as_bytes(), b" "]);
    put(&mut head, &[status.canonical_reason().unwrap_or("").as_bytes(), b"\r\n"]);
    for (name, value) in response.headers() {
        put(&mut head, &[name.as_str().as_bytes(), b": ", value.as_bytes(), b"\r\n"]);
    }
    head.extend_from_slice(b"\r\n");
    head
}

impl Body {
    fn new(room: usize) -> Body {
        Body { kept: SmallVec::new(), bytes: 0, room, end: None, next: 0, forgotten: false }
    }

    fn is_untouched(&self) -> bool {
        self.kept.is_empty() && self.end.is_none() && !self.forgotten
    }

    /// What was kept, then what the client sends.
    fn poll_next<S: Source>(
        &mut self,
        cx: &mut Context<'_>,
        source: &mut S,
    ) -> Poll<Result<Piece, UploadError>> {
        if let Some(piece) = self.kept.get(self.next) {
            self.next += 1;
            return Poll::Ready(Ok(Piece::Data(piece.clone())));
        }
        if let Some(end) = &self.end {
            return Poll::Ready(Ok(Piece::End(end.clone())));
        }
        let piece = ready!(source.poll_piece(cx))?;
        match &piece {
            Piece::Data(data) => self.keep(data),
            Piece::End(trailers) => self.end = Some(trailers.clone()),
        }
        Poll::Ready(Ok(piece))
    }

    /// A piece that is sent now, for it may have to be sent again.
    fn keep(&mut self, piece: &Bytes) {
        self.bytes += piece.len();
        let pieces = self.kept.inline_size() + self.room / PIECE_COST;
        if self.forgotten || self.bytes > self.room || self.kept.len() >= pieces {
            return self.settle();
        }
        self.kept.push(piece.clone());
        self.next += 1;
    }

    /// From now on nothing is kept.
    fn settle(&mut self) {
        self.forgotten = true;
        self.kept.drain(..self.next);
        self.next = 0;
    }
}

impl Upload {
    /// More of the body is to come.
    pub(crate) fn is_active(&self) -> bool {
        self.state == State::Open
    }

    /// For a tunnel: whatever is sent from here on is not of this request.
    pub(crate) fn into_stream(self) -> SendStream<Bytes> {
        self.stream
    }

    /// All that came has left, and more is to come.
    fn awaits_client(&self) -> bool {
        self.is_active() && self.pending.is_empty()
    }

    /// Moves pieces of the body as the endpoint grants room for them.
    /// `Ready(Ok)`: some moved, or it is done.
    pub(crate) fn poll<S: Source>(
        &mut self,
        cx: &mut Context<'_>,
        source: &mut S,
    ) -> Poll<Result<(), UploadError>> {
        if self.state != State::Open {
            return Poll::Pending;
        }
        if self.pending.is_empty() {
            match ready!(self.body.poll_next(cx, source))? {
                Piece::Data(data) => self.pending = data,
                Piece::End(trailers) => {
                    self.state = State::Ended;
                    let ended = match trailers {
                        Some(trailers) => self.stream.send_trailers(trailers),
                        None => self.stream.send_data(Bytes::new(), true),
                    };
                    return Poll::Ready(ended.map_err(|_| UploadError::Endpoint));
                }
            }
        }
        let Some(room) = ready!(poll_room(cx, &mut self.stream, self.pending.len())) else {
            self.state = State::Broken;
            source.abandon();
            return Poll::Ready(Err(UploadError::Endpoint));
        };
        let piece = self.pending.split_to(room);
        Poll::Ready(self.stream.send_data(piece, false).map_err(|_| {
            self.state = State::Broken;
            UploadError::Endpoint
        }))
    }

    /// Tells the endpoint that nobody waits for its answer any more.
    pub(crate) fn cancel(&mut self) {
        self.state = State::Broken;
        self.stream.send_reset(Reason::CANCEL);
    }
}

/// How many of `wanted` bytes the peer's window and our own buffer have room
/// for, at least one. `None`: the stream takes no more.
pub(crate) fn poll_room(
    cx: &mut Context<'_>,
    stream: &mut SendStream<Bytes>,
    wanted: usize,
) -> Poll<Option<usize>> {
    stream.reserve_capacity(wanted);
    loop {
        match stream.capacity().min(wanted) {
            // Tells of a change only, and may tell of one that came to nothing.
            0 => match ready!(stream.poll_capacity(cx)) {
                Some(Ok(_)) => {}
                Some(Err(_)) | None => return Poll::Ready(None),
            },
            room => return Poll::Ready(Some(room)),
        }
    }
}

/// What an HTTP/2 response body yields next.
pub(crate) enum Frame {
    Data(Bytes),
    Trailers(HeaderMap),
    End,
}

/// The next frame of a response body, while the request body goes on moving.
pub(crate) async fn next_frame<S: Source>(
    order: &Order<'_>,
    timer: &mut Timer,
    source: &mut S,
    upload: &mut Upload,
    body: &mut RecvStream,
) -> Result<Frame, Failure> {
    loop {
        let next = poll_fn(|cx| {
            let moved = upload.poll(cx, source);
            if let Poll::Ready(frame) = poll_frame(cx, body) {
                return Poll::Ready(frame.map(Some));
            }
            match moved {
                Poll::Ready(Ok(())) => return Poll::Ready(Ok(None)),
                Poll::Ready(Err(UploadError::Endpoint)) | Poll::Pending => {}
                Poll::Ready(Err(error)) => return Poll::Ready(Err(error.into())),
            }
            source.poll_gone(cx).map(|()| Err(Failure::Client))
        });
        let waited = match order.in_time() {
            Ok(()) => timer.within(order.read_deadline(), next).await,
            Err(_) => Err(Late),
        };
        let failure = match waited {
            Ok(Ok(Some(frame))) => return Ok(frame),
            Ok(Ok(None)) => continue,
            Ok(Err(failure)) => failure,
            Err(Late) => order.late(),
        };
        upload.cancel();
        return Err(failure);
    }
}

/// Data, then trailers, then the end. Data is released to the endpoint at
/// once: the caller passes it on before it asks for more.
pub(crate) fn poll_frame(cx: &mut Context<'_>, body: &mut RecvStream) -> Poll<Result<Frame, Failure>> {
    const BROKEN: Failure = Failure::Endpoint("endpoint broke the stream within a response body");
    match ready!(body.poll_data(cx)) {
        Some(Ok(data)) => {
            let released = body.flow_control().release_capacity(data.len());
            return Poll::Ready(released.map(|()| Frame::Data(data)).map_err(|_| BROKEN));
        }
        Some(Err(_)) => return Poll::Ready(Err(BROKEN)),
        None => {}
    }
    Poll::Ready(match ready!(body.poll_trailers(cx)) {
        Ok(Some(trailers)) => Ok(Frame::Trailers(trailers)),
        Ok(None) => Ok(Frame::End),
        Err(_) => Err(BROKEN),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_body_in_crumbs_is_not_kept_many_times_over() {
        let room = 64 << 10;
        for (length, pieces) in [(1, 1028), (1 << 10, 64), (16 << 10, 4)] {
            let piece = Bytes::from(vec![b'x'; length]);
            let mut body = Body::new(room);
            let kept = (0..).take_while(|_| {
                body.keep(&piece);
                !body.forgotten
            });
            assert_eq!(kept.count(), pieces, "of {length} bytes");
            // Then nothing is, however much more comes.
            body.keep(&piece);
            assert!(body.kept.is_empty() && body.next == 0);
        }
    }
}
