//! The toy shop: small servers on loopback that say who they are.

use std::convert::Infallible;
use std::fmt::Write;
use std::io;
use std::net::SocketAddr;

use bytes::Bytes;
use http_body_util::Full;
use hyper::header::{CONTENT_TYPE, HOST, HeaderValue};
use hyper::service::service_fn;
use hyper::{Request, Response};
use hyper_util::rt::TokioIo;
use tokio::net::TcpListener;

/// The response header that tells which version answered.
pub(crate) const VERSION: &str = "x-version";

/// Starts one endpoint of `version` on a free port of 127.0.0.1. It serves as
/// long as the runtime does.
pub(crate) async fn start(version: &'static str, number: usize) -> io::Result<SocketAddr> {
    let listener = TcpListener::bind(("127.0.0.1", 0)).await?;
    let address = listener.local_addr()?;
    tokio::spawn(async move {
        while let Ok((stream, _)) = listener.accept().await {
            let _ = stream.set_nodelay(true);
            let service = service_fn(move |request| {
                let answer = answer(version, number, address, &request);
                async move { Ok::<_, Infallible>(answer) }
            });
            let connection = hyper::server::conn::http1::Builder::new();
            tokio::spawn(connection.serve_connection(TokioIo::new(stream), service));
        }
    });
    Ok(address)
}

fn answer<B>(
    version: &'static str,
    number: usize,
    address: SocketAddr,
    request: &Request<B>,
) -> Response<Full<Bytes>> {
    let mut text = format!("Hello from the shop, version {version}\n\n");
    let mut line = |name: &str, value: &str| {
        // Writing to a String cannot fail.
        let _ = writeln!(text, "  {name:18} {value}");
    };
    line("endpoint", &format!("shop-{version}-{number} on {address}"));
    line("request", &format!("{} {}", request.method(), request.uri()));
    for name in [HOST.as_str(), "x-forwarded-for", "x-forwarded-proto", "x-request-id"] {
        if let Some(value) = request.headers().get(name) {
            line(name, &value.as_bytes().escape_ascii().to_string());
        }
    }
    let mut response = Response::new(Full::new(Bytes::from(text)));
    response.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static("text/plain; charset=utf-8"));
    response.headers_mut().insert(VERSION, HeaderValue::from_static(version));
    response
}
