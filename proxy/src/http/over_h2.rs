//! One request to one HTTP/2 endpoint, and to the next one if that fails before
//! anything irrevocable has happened. The client's side is a [`Source`].

use std::future::poll_fn;
use std::rc::Rc;
use std::task::{Context, Poll, ready};

use bytes::Bytes;
use h2::client::ResponseFuture;
use h2::{Reason, RecvStream, SendStream};
use http::{HeaderMap, Request, Response};
use smallvec::SmallVec;
use tokio::time::Instant;

use crate::metrics::Reject;
use crate::timer::{Late, Timer};
use crate::upstream::Upstream;
use crate::upstream::h2::Lease;

use super::exchange::{Failure, Order, Piece, Source, UploadError};
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
    pending: Bytes,
    state: State,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum State {
    Open,
    Ended,
    Broken,
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
        let mut tried = SmallVec::<[u64; 4]>::new();
        let mut last = Failure::Answer(503, "no endpoint");
        for attempt in 0..self.worker.config.limits.tries {
            let Some(upstream) = self.pick(&tried) else { break };
            record.retry(attempt, &upstream, self.worker);
            let (failure, sent) = match self.leased(timer, &upstream).await {
                Err(failure) => (failure, false),
                Ok(lease) => {
                    record.connected = Some(Instant::now());
                    upstream.live.begin();
                    let result = self.exchange_h2(timer, source, request, lease).await;
                    upstream.live.end();
                    match result {
                        Ok(answering) => {
                            record.first_byte = Some(Instant::now());
                            upstream.live.succeeded();
                            return Ok(answering);
                        }
                        Err(Broken { failure, processed }) => (failure, processed),
                    }
                }
            };
            match failure {
                // Refused before it was looked at: the connection is at its end, not the endpoint.
                Failure::Endpoint(_) if !sent && upstream.h2.lease().is_none() => {
                    self.failed(&upstream);
                    tried.push(upstream.live.id);
                }
                Failure::Endpoint(_) if !sent => {}
                Failure::Endpoint(_) | Failure::Late => {
                    self.failed(&upstream);
                    tried.push(upstream.live.id);
                }
                Failure::Nonsense(_) | Failure::Client | Failure::Answer(..) => return Err(failure),
            }
            if source.has_started() || sent && (!self.idempotent || matches!(failure, Failure::Late)) {
                return Err(failure);
            }
            last = failure;
        }
        if let Failure::Answer(503, _) = last {
            self.worker.metrics.rejected(Reject::NoEndpoint);
        }
        Err(last)
    }

    async fn leased(&self, timer: &mut Timer, upstream: &Rc<Upstream>) -> Result<Lease, Failure> {
        if let Some(lease) = upstream.h2.lease() {
            self.worker.metrics.upstream_reused.inc();
            return Ok(lease);
        }
        match timer.within(self.connect_deadline(), self.worker.upstreams.connect_h2(upstream)).await {
            Ok(Ok(lease)) => Ok(lease),
            Ok(Err(_)) => Err(Failure::Endpoint("cannot connect to the endpoint")),
            Err(Late) => Err(Failure::Late),
        }
    }

    async fn exchange_h2<S: Source>(
        &self,
        timer: &mut Timer,
        source: &mut S,
        request: &Request<()>,
        lease: Lease,
    ) -> Result<Answering, Broken> {
        let unsent = |failure| Broken { failure, processed: false };
        let mut sender = match timer.within(self.send_deadline(), lease.sender().ready()).await {
            Ok(Ok(sender)) => sender,
            Ok(Err(_)) => {
                lease.retire();
                return Err(unsent(Failure::Endpoint("endpoint closed the connection")));
            }
            Err(Late) => return Err(unsent(Failure::Late)),
        };
        let sent = sender.send_request(request.clone(), source.is_done());
        let (mut answer, stream) = match sent {
            Ok(sent) => sent,
            Err(_) => {
                lease.retire();
                return Err(unsent(Failure::Endpoint("endpoint takes no more streams")));
            }
        };
        let state = if source.is_done() { State::Ended } else { State::Open };
        let mut upload = Upload { stream, pending: Bytes::new(), state };
        loop {
            let deadline = self.read_deadline();
            let next = poll_fn(|cx| poll_answer(cx, source, &mut upload, &mut answer));
            let failure = match timer.within(deadline, next).await {
                Ok(Ok(Some(response))) => return Ok(Answering { response, upload, lease }),
                Ok(Ok(None)) => continue,
                Ok(Err(broken)) => {
                    if !broken.processed {
                        lease.retire();
                    }
                    return Err(broken);
                }
                Err(Late) => Failure::Late,
            };
            upload.cancel();
            return Err(Broken { failure, processed: true });
        }
    }
}

/// A failed stream, and whether the endpoint may have acted on it.
struct Broken {
    failure: Failure,
    processed: bool,
}

/// `Ok(None)`: some of the body moved.
fn poll_answer<S: Source>(
    cx: &mut Context<'_>,
    source: &mut S,
    upload: &mut Upload,
    answer: &mut ResponseFuture,
) -> Poll<Result<Option<Response<RecvStream>>, Broken>> {
    use std::future::Future as _;
    let moved = upload.poll(cx, source);
    match std::pin::Pin::new(answer).poll(cx) {
        Poll::Ready(Ok(response)) => return Poll::Ready(Ok(Some(response))),
        Poll::Ready(Err(error)) => return Poll::Ready(Err(broken(&error))),
        Poll::Pending => {}
    }
    match moved {
        Poll::Ready(Ok(())) => Poll::Ready(Ok(None)),
        Poll::Ready(Err(UploadError::Endpoint)) => Poll::Pending,
        Poll::Ready(Err(error)) => {
            upload.cancel();
            Poll::Ready(Err(Broken { failure: error.into(), processed: true }))
        }
        Poll::Pending => source.poll_gone(cx).map(|()| {
            upload.cancel();
            Err(Broken { failure: Failure::Client, processed: true })
        }),
    }
}

fn broken(error: &h2::Error) -> Broken {
    // RFC 9113 section 8.7: a refused stream was not processed; GOAWAY says so of streams above its last.
    let refused = error.reason() == Some(Reason::REFUSED_STREAM);
    let goaway = error.is_go_away() && error.is_remote() && error.reason() == Some(Reason::NO_ERROR);
    Broken { failure: Failure::Endpoint("endpoint broke the stream"), processed: !refused && !goaway }
}

impl Upload {
    /// More of the body is to come.
    pub(crate) fn is_active(&self) -> bool {
        self.state == State::Open
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
            match ready!(source.poll_piece(cx))? {
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
        self.stream.reserve_capacity(self.pending.len());
        let granted = match ready!(self.stream.poll_capacity(cx)) {
            Some(Ok(granted)) => granted.min(self.pending.len()),
            Some(Err(_)) | None => {
                self.state = State::Broken;
                source.abandon();
                return Poll::Ready(Err(UploadError::Endpoint));
            }
        };
        let piece = self.pending.split_to(granted);
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

/// What an HTTP/2 response body yields next.
pub(crate) enum Frame {
    Data(Bytes),
    Trailers(HeaderMap),
    End,
}

/// The next frame of a response body, while the request body goes on moving.
pub(crate) async fn next_frame<S: Source>(
    timer: &mut Timer,
    deadline: Instant,
    source: &mut S,
    upload: &mut Upload,
    body: &mut RecvStream,
) -> Result<Frame, Failure> {
    let next = poll_fn(|cx| {
        loop {
            let moved = upload.poll(cx, source);
            match poll_frame(cx, body) {
                Poll::Ready(frame) => return Poll::Ready(frame),
                Poll::Pending => {}
            }
            match moved {
                Poll::Ready(Ok(())) => continue,
                Poll::Ready(Err(UploadError::Endpoint)) | Poll::Pending => {}
                Poll::Ready(Err(error)) => return Poll::Ready(Err(error.into())),
            }
            return source.poll_gone(cx).map(|()| Err(Failure::Client));
        }
    });
    match timer.within(deadline, next).await {
        Ok(Ok(frame)) => Ok(frame),
        Ok(Err(failure)) => {
            upload.cancel();
            Err(failure)
        }
        Err(Late) => {
            upload.cancel();
            Err(Failure::Late)
        }
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
