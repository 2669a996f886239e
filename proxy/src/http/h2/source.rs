//! The client's side of an exchange, as an HTTP/2 stream has it.

use std::pin::Pin;
use std::task::{Context, Poll, ready};

use bytes::Bytes;
use h2::server::SendResponse;
use h2::{RecvStream, SendStream};
use http::{Response, StatusCode};
use tokio::io::AsyncWrite as _;

use crate::buffer::Output;
use crate::conn::Conn;
use crate::http::exchange::{Awaits, Piece, Source, UploadError};
use crate::http::head::Framing;
use crate::http::kept::Kept;
use crate::http::{chunked, map};
use crate::timer::Timer;

/// A request body that arrives on an HTTP/2 stream.
pub(super) struct FromStream {
    body: RecvStream,
    framing: Framing,
    limit: u64,
    pub(super) bytes: u64,
    /// Received and not yet written, with its chunk framing if it has any.
    before: Output,
    data: Bytes,
    after: Output,
    written: usize,
    ended: bool,
    abandoned: bool,
    /// What an HTTP/1 endpoint is getting, framed as it is.
    kept: Kept,
    /// What comes is not a request body, but belongs to a tunnel.
    withheld: bool,
}

impl FromStream {
    /// `limit`: most body bytes; `kept`: up to how many can be sent again.
    pub(super) fn new(body: RecvStream, framing: Framing, limit: u64, kept: usize) -> FromStream {
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
            ended,
            abandoned: false,
            kept: Kept::new(kept),
            withheld: false,
        }
    }

    /// Nothing is taken from the client before the tunnel stands.
    pub(super) fn withhold(&mut self) {
        self.withheld = true;
    }

    /// What the client goes on to send.
    pub(super) fn into_body(self) -> RecvStream {
        self.body
    }

    /// Bytes received and not yet written, those that another endpoint had got included.
    fn unwritten(&self) -> usize {
        self.kept.unwritten().len() + self.piece_len() - self.written
    }

    fn piece_len(&self) -> usize {
        self.before.len() + self.data.len() + self.after.len()
    }

    /// The next endpoint gets the body from its beginning.
    fn rewind(&mut self) {
        self.kept.rewind();
        // The present piece is kept as a whole.
        self.written = self.piece_len();
        self.abandoned = false;
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

    pub(super) fn is_done(&self) -> bool {
        self.ended && self.unwritten() == 0
    }

    /// There is more to move, and the endpoint takes it.
    pub(super) fn is_active(&self) -> bool {
        !self.is_done() && !self.abandoned && !self.withheld
    }

    /// The endpoint takes no more.
    pub(super) fn abandon(&mut self) {
        self.abandoned = true;
    }

    /// Moves the body to an HTTP/1 endpoint. `Ready(Ok)`: some moved, or it is done.
    pub(super) fn poll_upload(
        &mut self,
        cx: &mut Context<'_>,
        endpoint: &mut Conn,
    ) -> Poll<Result<(), UploadError>> {
        let mut moved = false;
        loop {
            while self.unwritten() > 0 {
                let kept = self.kept.unwritten();
                let written = match kept.is_empty() {
                    true => {
                        poll_write_at(cx, endpoint, [&self.before, &self.data, &self.after], self.written)
                    }
                    false => Pin::new(&mut *endpoint).poll_write(cx, kept),
                };
                match written {
                    Poll::Ready(Ok(n)) if !kept.is_empty() => self.kept.wrote(n),
                    Poll::Ready(Ok(n)) => self.written += n,
                    Poll::Ready(Err(_)) => return Poll::Ready(Err(UploadError::Endpoint)),
                    Poll::Pending if moved => return Poll::Ready(Ok(())),
                    Poll::Pending => return Poll::Pending,
                }
                moved = true;
            }
            let endpoint = Pin::new(&mut *endpoint);
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
            self.kept.add(&self.before);
            self.kept.add(&self.data);
            self.kept.add(&self.after);
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
                    map::write_trailers(&mut self.before, trailers);
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
    Pin::new(endpoint).poll_write_vectored(cx, &slices)
}

/// A source whose client can be seen to reset the stream.
pub(super) struct Watched<'w> {
    pub(super) source: &'w mut FromStream,
    pub(super) answer: Answer<'w>,
}

/// The answering half of the stream, before and after the head has left.
pub(super) enum Answer<'w> {
    Due(&'w mut SendResponse<Bytes>),
    Sending(&'w mut SendStream<Bytes>),
    /// Watched by whoever is sending on it.
    Elsewhere,
}

impl Source for Watched<'_> {
    fn poll_upload(&mut self, cx: &mut Context<'_>, endpoint: &mut Conn) -> Poll<Result<(), UploadError>> {
        self.source.poll_upload(cx, endpoint)
    }

    fn poll_piece(&mut self, cx: &mut Context<'_>) -> Poll<Result<Piece, UploadError>> {
        if self.source.withheld {
            return Poll::Pending;
        }
        self.source.poll_receive(cx)
    }

    fn is_done(&self) -> bool {
        self.source.is_done()
    }

    fn is_active(&self) -> bool {
        self.source.is_active()
    }

    fn is_repeatable(&self) -> bool {
        self.source.kept.is_whole()
    }

    fn rewind(&mut self) {
        self.source.rewind();
    }

    fn awaits(&self) -> Awaits {
        match (self.is_active(), self.source.ended || self.source.unwritten() > 0) {
            (true, false) => Awaits::Client,
            (true, true) => Awaits::Room,
            (false, _) => Awaits::Answer,
        }
    }

    fn abandon(&mut self) {
        self.source.abandon();
    }

    fn poll_gone(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        match &mut self.answer {
            Answer::Due(respond) => respond.poll_reset(cx).map(|_| ()),
            Answer::Sending(stream) => stream.poll_reset(cx).map(|_| ()),
            Answer::Elsewhere => Poll::Pending,
        }
    }

    async fn interim(&mut self, _: &mut Timer, head: &[u8]) -> bool {
        let Answer::Due(respond) = &mut self.answer else { return true };
        let status = head.get(9..12).and_then(|status| StatusCode::from_bytes(status).ok());
        let mut response = Response::new(());
        *response.status_mut() = status.unwrap_or(StatusCode::CONTINUE);
        *response.headers_mut() = chunked::header_map(head).unwrap_or_default();
        // One that cannot be sent is no loss; that the client is gone shows elsewhere.
        let _ = respond.send_informational(response);
        true
    }
}
