//! What becomes of an HTTP/2 request, settled before a byte of it moves on.

use bytes::Bytes;
use h2::RecvStream;
use http::{HeaderMap, HeaderValue, Method, Request, header};
use smallvec::SmallVec;

use crate::buffer::Output;
use crate::http::client::{Client, Forwarded};
use crate::http::edit::drops;
use crate::http::forward::{RequestId, put, write_framing, write_told};
use crate::http::head::{Framing, Reject, is_authority};
use crate::http::{Asked, Verdict, decide, map, write_https_location};
use crate::limit::{self, Held};
use crate::router::Router;
use crate::table::{FieldEdits, HeaderEdits, UpstreamProtocol};

use super::Http2;
use super::websocket::{self, Key};

/// What is sent upstream, settled before a byte moves.
pub(super) struct Plan<'q> {
    pub(super) authority: &'q [u8],
    pub(super) id: RequestId,
    /// Extra fields of an answer of our own.
    pub(super) location: Option<HeaderValue>,
    /// Head for an HTTP/1 endpoint.
    pub(super) head: Output,
    /// Request for an HTTP/2 endpoint.
    pub(super) request: Option<Request<()>>,
    /// The request in its client's account.
    pub(super) held: Option<Held>,
    /// The stream is to become a tunnel; what an HTTP/1 endpoint has to prove it has read.
    pub(super) websocket: Option<Key>,
}

/// Decides, and prepares what is sent upstream.
pub(super) fn plan<'r, 'q>(
    shared: &Http2,
    router: &'r Router,
    request: &'q Request<()>,
    body: &RecvStream,
) -> Result<(Verdict<'r>, Plan<'q>), Reject> {
    let Http2 { worker, client, .. } = shared;
    let authority = authority(request)?;
    let target = target(request);
    if target.len() > worker.config.limits.target_bytes {
        return Err(Reject { status: 414, reason: "target too long" });
    }
    // Cookies come in crumbs, any number of which are one field to everybody else.
    let crumbs = request.headers().get_all(header::COOKIE).iter().count();
    if request.headers().len() - crumbs > worker.config.limits.headers {
        return Err(Reject { status: 431, reason: "too many header fields" });
    }
    let websocket = websocket::is_wanted(request)?;
    if *request.method() == Method::TRACE {
        return Err(Reject { status: 405, reason: "method not allowed" });
    }
    require_form(request, target)?;
    let forwarded = client.forwarded(|| map::claims(request.headers()));
    let view = map::MapView { headers: request.headers(), client: forwarded.address };
    let https = forwarded.is_https(client);
    let asked = Asked {
        authority,
        method: request.method().as_str().as_bytes(),
        target: target.as_bytes(),
        path: request.uri().path().as_bytes(),
        https,
    };
    let mut verdict = decide(worker, router, client, &asked, &view)?;
    let held = limit::admit(worker, &mut verdict, forwarded.address);
    let sent = request.headers().get("x-request-id").map(HeaderValue::as_bytes);
    let id = RequestId::new(sent, &mut worker.random.borrow_mut());
    let websocket = websocket.then(|| Key::new(&mut worker.random.borrow_mut()));
    let mut plan =
        Plan { authority, id, location: None, head: Output::take(), request: None, held, websocket };
    match &verdict {
        Verdict::Answer(answer) if answer.to_https => {
            let mut location = Vec::new();
            write_https_location(&mut location, worker, plan.authority, target.as_bytes());
            plan.location = HeaderValue::from_maybe_shared(Bytes::from(location)).ok();
        }
        Verdict::Answer(_) => {}
        Verdict::Forward(forward) => {
            let pool = router.pool(forward.split.backends[forward.choice.backend].pool);
            match pool.protocol {
                UpstreamProtocol::Http1
                | UpstreamProtocol::Https
                | UpstreamProtocol::Tcp
                | UpstreamProtocol::Udp => {
                    let framing = framing(request, body);
                    write_request(&mut plan, client, &forwarded, request, framing, forward.edits);
                }
                UpstreamProtocol::H2c | UpstreamProtocol::H2 => {
                    let scheme = map::scheme(pool.protocol);
                    plan.request =
                        Some(upstream_request(&plan, client, &forwarded, request, scheme, forward.edits)?);
                }
            }
        }
    }
    Ok((verdict, plan))
}

/// `:authority`, or Host in its place; both must say the same (RFC 9113 section 8.3.1).
fn authority(request: &Request<()>) -> Result<&[u8], Reject> {
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
        true => Ok(authority),
        false => Err(Reject { status: 400, reason: "malformed :authority" }),
    }
}

/// What the `h2` crate lets pass and HTTP/1 does not: it must not become a request line.
fn require_form(request: &Request<()>, target: &str) -> Result<(), Reject> {
    let bad = |reason| Err(Reject { status: 400, reason });
    if !target.starts_with('/') && (target != "*" || *request.method() != Method::OPTIONS) {
        return bad("malformed :path");
    }
    if target.bytes().any(|b| !(0x21..=0x7e).contains(&b)) {
        return bad("illegal character in :path");
    }
    // Without :authority the crate keeps no scheme.
    if request.uri().scheme_str().is_some_and(str::is_empty) {
        return bad("empty :scheme");
    }
    if request.headers().get_all(header::CONTENT_LENGTH).iter().count() > 1 {
        return bad("duplicate Content-Length");
    }
    Ok(())
}

fn with_authority(mut request: Request<()>, scheme: &str, authority: &[u8]) -> Result<Request<()>, Reject> {
    let target = target(&request);
    let uri = http::Uri::builder().scheme(scheme).authority(authority).path_and_query(target).build();
    *request.uri_mut() = uri.map_err(|_| Reject { status: 400, reason: "malformed target" })?;
    *request.version_mut() = http::Version::HTTP_2;
    Ok(request)
}

/// The request for an HTTP/2 endpoint.
fn upstream_request(
    plan: &Plan<'_>,
    client: &Client,
    forwarded: &Forwarded<'_>,
    request: &Request<()>,
    scheme: &str,
    edits: Option<&HeaderEdits>,
) -> Result<Request<()>, Reject> {
    let mut upstream = request.clone();
    let headers = upstream.headers_mut();
    let replaced: SmallVec<[_; 8]> = headers.keys().filter(|n| map::is_replaced(n)).cloned().collect();
    for name in replaced {
        headers.remove(name);
    }
    if plan.websocket.is_some() {
        websocket::remove_handshake(headers);
    }
    map::add_forwarded(headers, client, forwarded, plan.authority, &plan.id, edits);
    let host = edits.map_or(plan.authority, |edits| edits.host_or(plan.authority));
    with_authority(upstream, scheme, host)
}

/// The request head for an HTTP/1 endpoint.
fn write_request(
    plan: &mut Plan<'_>,
    client: &Client,
    forwarded: &Forwarded<'_>,
    request: &Request<()>,
    framing: Framing,
    edits: Option<&HeaderEdits>,
) {
    let fields = edits.map(|edits| &edits.request);
    let Plan { head, authority, id, websocket, .. } = plan;
    let target = target(request).as_bytes();
    // RFC 8441 section 5: what is a CONNECT there is a GET in HTTP/1.
    let method = if websocket.is_some() { Method::GET.as_str() } else { request.method().as_str() };
    put(head, &[method.as_bytes(), b" ", target]);
    let host = edits.map_or(*authority, |edits| edits.host_or(authority));
    put(head, &[b" HTTP/1.1\r\nHost: ", host, b"\r\n"]);
    write_told(head, client, forwarded, authority, id, fields);
    write_kept(head, request.headers(), fields);
    if let Some(edits) = edits {
        head.extend_from_slice(&edits.request.lines);
    }
    match websocket {
        Some(key) => key.write_lines(head),
        None => {
            write_framing(head, framing);
            head.extend_from_slice(edits.map_or(b"", HeaderEdits::connection_line));
        }
    }
    head.extend_from_slice(b"\r\n");
}

fn target(request: &Request<()>) -> &str {
    request.uri().path_and_query().map_or("/", |t| t.as_str())
}

/// The fields that go on to an HTTP/1 endpoint.
fn write_kept(head: &mut Output, headers: &HeaderMap, edits: Option<&FieldEdits>) {
    for (name, value) in headers {
        let elsewhere = [header::CONTENT_LENGTH, header::COOKIE, header::SEC_WEBSOCKET_KEY].contains(name);
        if !elsewhere && !map::is_replaced(name) && !drops(edits, name.as_str().as_bytes()) {
            put(head, &[name.as_str().as_bytes(), b": ", value.as_bytes(), b"\r\n"]);
        }
    }
    if !drops(edits, b"cookie") {
        map::write_cookies(head, headers);
    }
}

/// How the body is delimited for an HTTP/1 endpoint.
pub(super) fn framing(request: &Request<()>, body: &RecvStream) -> Framing {
    let length = request.headers().get(header::CONTENT_LENGTH).and_then(|l| l.to_str().ok()?.parse().ok());
    match (length, body.is_end_stream()) {
        // The `h2` crate has refused a request that ends before its Content-Length.
        (Some(n), _) => Framing::Length(n),
        (None, false) => Framing::Chunked,
        // Without it some servers answer 411 (RFC 9110 section 8.6).
        (None, true) if matches!(*request.method(), Method::POST | Method::PUT | Method::PATCH) => {
            Framing::Length(0)
        }
        (None, true) => Framing::None,
    }
}
