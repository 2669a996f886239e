//! An HTTP/1 client and an HTTP/2 endpoint.

use bytes::Bytes;
use http::{HeaderMap, HeaderName, HeaderValue, Request, Response, header};

use crate::buffer::Output;
use crate::http::client::{Client, Forwarded};
use crate::http::edit::drops;
use crate::http::exchange::Order;
use crate::http::field::Field;
use crate::http::forward::{Delivery, RequestId, connection_line, put, write_framing};
use crate::http::head::{Framing, Reject, RequestHead};
use crate::http::over_h2::{Answering, Frame, next_frame};
use crate::http::record::Record;
use crate::http::{chunked, map};
use crate::metrics;
use crate::table::{HeaderEdits, UpstreamProtocol};
use crate::timer::Timer;

use super::relay::{FromClient, delivery};
use super::upload::Upload;
use super::{Http1, Next, Plan, send};

/// The request as HTTP/2 sends it.
pub(super) fn request(
    head: &RequestHead<'_, '_>,
    client: &Client,
    forwarded: &Forwarded<'_>,
    id: &RequestId,
    protocol: UpstreamProtocol,
    edits: Option<&HeaderEdits>,
) -> Result<Request<()>, Reject> {
    let malformed = Reject { status: 400, reason: "malformed request" };
    let mut headers = HeaderMap::with_capacity(head.headers.len() + 8);
    for (header, field) in head.headers.iter().zip(&*head.fields) {
        let nominated = head.nominated.iter().any(|n| n.eq_ignore_ascii_case(header.name.as_bytes()));
        let keep = match field {
            Field::Other => !nominated,
            Field::UserAgent | Field::Referer | Field::ContentLength => true,
            Field::Te => header.value.eq_ignore_ascii_case(b"trailers"),
            _ => false,
        };
        if keep {
            let name = HeaderName::from_bytes(header.name.as_bytes()).map_err(|_| malformed)?;
            headers.append(name, HeaderValue::from_bytes(header.value).map_err(|_| malformed)?);
        }
    }
    map::add_forwarded(&mut headers, client, forwarded, head.host, id, edits);
    let host = edits.map_or(head.host, |edits| edits.host_or(head.host));
    let authority = if host.is_empty() { b"localhost" } else { host };
    let mut request = Request::new(());
    *request.method_mut() = http::Method::from_bytes(head.method).map_err(|_| malformed)?;
    *request.uri_mut() = http::Uri::builder()
        .scheme(map::scheme(protocol))
        .authority(authority)
        .path_and_query(head.target)
        .build()
        .map_err(|_| malformed)?;
    *request.headers_mut() = headers;
    Ok(request)
}

impl Http1 {
    /// Forwards `request` to an endpoint that speaks HTTP/2.
    pub(super) async fn forward_over_h2(
        &mut self,
        order: &Order<'_>,
        plan: &Plan<'_>,
        request: Request<()>,
        out: &mut Output,
        record: &mut Record,
    ) -> Next {
        let limit = order.body_limit();
        if matches!(plan.shape.framing, Framing::Length(n) if n > limit) {
            self.worker.metrics.rejected(metrics::Reject::BodyTooLarge);
            return self
                .answer(plan.shape, 413, "request body too large", order.response_edits(), out, record)
                .await;
        }
        let Http1 { conn, input, timer, worker, .. } = self;
        let write_timeout = worker.config.timeouts.client;
        if plan.expects_continue && plan.shape.minor == 1 && input.is_empty() {
            let told = send(timer, conn, write_timeout, [b"HTTP/1.1 100 Continue\r\n\r\n", &[], &[]]).await;
            if !told {
                return Next::Close(false);
            }
        }
        // What can be sent again is kept as pieces.
        let upload = Upload::new(plan.shape.framing, limit, 0);
        let minor = plan.shape.minor;
        let mut source = FromClient { conn, input, upload, minor, invited: true, write_timeout, deaf: false };
        let failure = match order.obtain_h2(timer, &mut source, &request, record).await {
            Ok(answering) => {
                let next = relay(order, timer, &mut source, plan, answering, out, record).await;
                record.bytes_in = source.upload.bytes;
                return next;
            }
            Err(failure) => failure,
        };
        let shape = source.upload.shape_left(plan.shape);
        self.answer_failure(shape, &failure, order.response_edits(), out, record).await
    }
}

async fn relay(
    order: &Order<'_>,
    timer: &mut Timer,
    source: &mut FromClient<'_>,
    plan: &Plan<'_>,
    answering: Answering,
    out: &mut Output,
    record: &mut Record,
) -> Next {
    let Answering { mut response, mut upload, lease: _lease } = answering;
    let status = response.status().as_u16();
    (record.status, record.upstream_status) = (status, status);
    let framing = framing(&response, plan.shape.is_head);
    let to = delivery(order, plan.shape, framing, source.upload.is_done());
    write_head(out, &response, to, order);
    let body = response.body_mut();
    let chunked = to.framing == Framing::Chunked;
    let mut line = [0; 18];
    loop {
        let frame = match framing {
            Framing::None => Ok(Frame::End),
            _ => next_frame(order, timer, source, &mut upload, body).await,
        };
        let (data, trailers) = match frame {
            Ok(Frame::Data(data)) => (data, None),
            Ok(Frame::Trailers(trailers)) => (Bytes::new(), Some(trailers)),
            Ok(Frame::End) => (Bytes::new(), Some(HeaderMap::new())),
            Err(failure) => {
                record.reason = failure.answer().map_or("client closed the connection", |(_, reason)| reason);
                return Next::Close(false);
            }
        };
        let mut after = Output::take();
        if chunked && !data.is_empty() {
            out.extend_from_slice(chunked::size_line(data.len(), &mut line));
            after.extend_from_slice(b"\r\n");
        }
        if let (true, Some(trailers)) = (chunked, &trailers) {
            after.extend_from_slice(b"0\r\n");
            map::write_trailers(&mut after, trailers);
            after.extend_from_slice(b"\r\n");
        }
        if !send(timer, source.conn, source.write_timeout, [out, &data, &after]).await {
            record.reason = "client closed the connection";
            upload.cancel();
            return Next::Close(false);
        }
        record.bytes_out += data.len() as u64;
        out.clear();
        if trailers.is_some() {
            break;
        }
    }
    match (to.keep_alive, source.upload.is_done()) {
        (true, true) => Next::Again,
        (_, done) => Next::Close(!done),
    }
}

/// How the body of an HTTP/2 response is delimited, put in HTTP/1 words.
fn framing(response: &Response<h2::RecvStream>, to_head: bool) -> Framing {
    let length = response.headers().get(header::CONTENT_LENGTH);
    match response.status().as_u16() {
        _ if to_head => Framing::None,
        204 | 304 => Framing::None,
        _ => match length.and_then(|l| l.to_str().ok()?.parse().ok()) {
            Some(0) => Framing::None,
            Some(n) => Framing::Length(n),
            None => Framing::Chunked,
        },
    }
}

fn write_head(out: &mut Output, response: &Response<h2::RecvStream>, to: Delivery, order: &Order<'_>) {
    let (status, edits) = (response.status(), order.response_edits());
    put(out, &[b"HTTP/1.1 ", status.as_str().as_bytes(), b" "]);
    put(out, &[status.canonical_reason().unwrap_or("").as_bytes(), b"\r\n"]);
    for (name, value) in response.headers() {
        let length = name == header::CONTENT_LENGTH;
        let keep = !map::is_connection_specific(name) && (!length || to.framing == Framing::None);
        if keep && !drops(edits, name.as_str().as_bytes()) {
            put(out, &[name.as_str().as_bytes(), b": ", value.as_bytes(), b"\r\n"]);
        }
    }
    if let Some(edits) = edits {
        out.extend_from_slice(&edits.lines);
    }
    out.extend_from_slice(&order.cookie_lines());
    write_framing(out, to.framing);
    out.extend_from_slice(connection_line(to.keep_alive, to.minor));
    out.extend_from_slice(b"\r\n");
}
