//! Header maps, as HTTP/2 has them.

use std::net::IpAddr;

use bytes::Bytes;
use http::{HeaderMap, HeaderName, HeaderValue, Response, StatusCode, header};

use crate::buffer::Output;
use crate::table::{HeaderEdits, UpstreamProtocol};
use crate::view::RequestView;

use super::chunked::{header_map, is_forbidden};
use super::client::{Claims, Client, Forwarded};
use super::field::{Field, classify};
use super::forward::{RequestId, put, write_told};
use super::response::{BadResponse, ResponseHead};

/// Fields that HTTP/2 forbids in responses (RFC 9113 section 8.2.2).
pub(crate) fn is_connection_specific(name: &HeaderName) -> bool {
    matches!(
        classify(name.as_str().as_bytes()),
        Field::Connection | Field::TransferEncoding | Field::Upgrade | Field::HopByHop | Field::Te
    )
}

/// Fields we set ourselves, or that end here: not taken over from a request.
pub(crate) fn is_replaced(name: &HeaderName) -> bool {
    !matches!(
        classify(name.as_str().as_bytes()),
        Field::Other | Field::UserAgent | Field::Referer | Field::ContentLength | Field::Te | Field::Expect
    )
}

/// The forwarded headers of a request.
pub(crate) fn claims(headers: &HeaderMap) -> Claims<'_> {
    let get = |name: &str| headers.get(name).map(HeaderValue::as_bytes);
    Claims {
        for_: headers.get_all("x-forwarded-for").iter().map(HeaderValue::as_bytes).collect(),
        proto: get("x-forwarded-proto"),
        host: get("x-forwarded-host"),
        port: get("x-forwarded-port"),
    }
}

/// Adds what endpoints are told of the client, then edits.
pub(crate) fn add_forwarded(
    headers: &mut HeaderMap,
    client: &Client,
    forwarded: &Forwarded<'_>,
    host: &[u8],
    id: &RequestId,
    edits: Option<&HeaderEdits>,
) {
    let mut lines = Output::take();
    write_told(&mut lines, client, forwarded, host, id, None);
    headers.extend(header_map(&lines).unwrap_or_default());
    if let Some(edits) = edits {
        edits.request.apply(headers);
    }
}

/// The `:scheme` an endpoint expects: that of its own connection. Some refuse
/// any other; the client's is told by `X-Forwarded-Proto`.
pub(crate) fn scheme(protocol: UpstreamProtocol) -> &'static str {
    match protocol {
        UpstreamProtocol::Http1 | UpstreamProtocol::H2c | UpstreamProtocol::Tcp | UpstreamProtocol::Udp => {
            "http"
        }
        UpstreamProtocol::Https | UpstreamProtocol::H2 => "https",
    }
}

/// Writes trailers as HTTP/1 lines, without those that a recipient could take
/// for a part of the head (RFC 9110 section 6.5.1).
pub(crate) fn write_trailers(out: &mut Vec<u8>, trailers: &HeaderMap) {
    for (name, value) in trailers {
        if classify(name.as_str().as_bytes()) == Field::Other && !is_forbidden(name.as_str()) {
            put(out, &[name.as_str().as_bytes(), b": ", value.as_bytes(), b"\r\n"]);
        }
    }
}

/// HTTP/1 has one Cookie line (RFC 9113 section 8.2.3).
pub(crate) fn write_cookies(out: &mut Vec<u8>, headers: &HeaderMap) {
    let mut first = true;
    for value in headers.get_all(header::COOKIE) {
        put(out, &[if first { b"cookie: " as &[u8] } else { b"; " }, value.as_bytes()]);
        first = false;
    }
    if !first {
        out.extend_from_slice(b"\r\n");
    }
}

/// The head of an HTTP/1 response without what ends at this hop. It was parsed
/// out of `bytes`, which its values share.
pub(crate) fn response(head: &ResponseHead<'_, '_>, bytes: &Bytes) -> Result<Response<()>, BadResponse> {
    let mut response = Response::new(());
    *response.status_mut() =
        StatusCode::from_u16(head.status).map_err(|_| BadResponse("malformed status line"))?;
    let headers = response.headers_mut();
    headers.reserve(head.headers.len());
    for header in head.headers {
        let name = HeaderName::from_bytes(header.name.as_bytes());
        let value = HeaderValue::from_maybe_shared(bytes.slice_ref(header.value));
        let (Ok(name), Ok(value)) = (name, value) else { continue };
        let nominated = head.nominated.iter().any(|n| n.eq_ignore_ascii_case(header.name.as_bytes()));
        if !nominated && !is_connection_specific(&name) {
            headers.append(name, value);
        }
    }
    Ok(response)
}

/// A request's headers and who sent it: what routing may look at.
pub(crate) struct MapView<'a> {
    pub(crate) headers: &'a HeaderMap,
    pub(crate) client: IpAddr,
}

impl RequestView for MapView<'_> {
    fn header(&self, name: &str) -> Option<&[u8]> {
        self.headers.get(name).map(HeaderValue::as_bytes)
    }

    fn for_each_header<'a>(&'a self, name: &str, visit: &mut dyn FnMut(&'a [u8])) {
        for value in self.headers.get_all(name) {
            visit(value.as_bytes());
        }
    }

    fn client(&self) -> IpAddr {
        self.client
    }
}
