//! A small HTTP server for what operators and probes ask: bounded in connections, time and size.

use std::convert::Infallible;
use std::future::Future;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use http_body_util::Full;
use hyper::body::Incoming;
use hyper::header::{CACHE_CONTROL, CONTENT_TYPE, HeaderName, HeaderValue};
use hyper::service::service_fn;
use hyper::{Request, Response, StatusCode};
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::net::TcpListener;
use tokio::sync::Semaphore;
use tokio::time::{sleep, timeout};

/// Further connections wait until one of these ends.
const CONNECTIONS_MAX: usize = 64;

/// From accepting a connection to the end of a request's headers.
pub(crate) const HEADER_TIMEOUT: Duration = Duration::from_secs(5);

/// A connection ends after this long, whatever it does: scrapes are short.
pub(crate) const CONNECTION_TIMEOUT: Duration = Duration::from_secs(60);

/// An answer as it is sent.
pub(crate) type Reply = Response<Full<Bytes>>;

/// An answer that is being put together.
pub(crate) struct Answer(Reply);

impl Answer {
    /// Plain text.
    pub(crate) fn text(status: StatusCode, text: &str) -> Answer {
        let answer = Answer::new(status, "text/plain; charset=utf-8", text.to_owned());
        answer.header("Cache-Control", "no-store")
    }

    /// JSON.
    pub(crate) fn json(status: StatusCode, text: String) -> Answer {
        Answer::new(status, "application/json", text)
    }

    /// Of any type.
    pub(crate) fn new(status: StatusCode, kind: &'static str, text: String) -> Answer {
        let mut response = Response::new(Full::new(Bytes::from(text)));
        *response.status_mut() = status;
        response.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static(kind));
        Answer(response)
    }

    /// With one header more; one whose value cannot be sent is left out.
    pub(crate) fn header(mut self, name: &str, value: &str) -> Answer {
        if let (Ok(name), Ok(value)) = (name.parse::<HeaderName>(), HeaderValue::from_str(value)) {
            self.0.headers_mut().insert(name, value);
        }
        self
    }

    /// What must not be remembered by anyone.
    pub(crate) fn no_store(mut self) -> Answer {
        self.0.headers_mut().insert(CACHE_CONTROL, HeaderValue::from_static("no-store"));
        self
    }
}

impl From<Answer> for Reply {
    fn from(answer: Answer) -> Reply {
        answer.0
    }
}

/// Serves `listener` for as long as it is polled. `answer` is asked for each request.
pub(crate) async fn serve<A, F>(listener: TcpListener, answer: A)
where
    A: Fn(Request<Incoming>) -> F + Clone + Send + 'static,
    F: Future<Output = Reply> + Send + 'static,
{
    let slots = Arc::new(Semaphore::new(CONNECTIONS_MAX));
    loop {
        let Ok(slot) = slots.clone().acquire_owned().await else { return };
        let stream = match listener.accept().await {
            Ok((stream, _)) => stream,
            Err(_) => {
                // Out of file descriptors, or a client that left already.
                sleep(Duration::from_millis(50)).await;
                continue;
            }
        };
        let answer = answer.clone();
        tokio::spawn(async move {
            let service = service_fn(move |request| {
                let answer = answer(request);
                async move { Ok::<_, Infallible>(answer.await) }
            });
            let connection = hyper::server::conn::http1::Builder::new()
                .timer(TokioTimer::new())
                .header_read_timeout(HEADER_TIMEOUT)
                .max_buf_size(16 << 10)
                .title_case_headers(true)
                .serve_connection(TokioIo::new(stream), service);
            // What goes wrong on a connection is the client's business.
            let _ = timeout(CONNECTION_TIMEOUT, connection).await;
            drop(slot);
        });
    }
}

/// Status and body.
#[cfg(test)]
#[allow(clippy::unwrap_used)] // a test fails by panicking
pub(crate) fn parts(reply: Reply) -> (u16, String) {
    use http_body_util::BodyExt;
    let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
    let status = reply.status().as_u16();
    let body = runtime.block_on(reply.into_body().collect()).unwrap().to_bytes();
    (status, String::from_utf8(body.to_vec()).unwrap())
}

/// Query parameters, decoded.
pub(crate) fn parameters(query: &str) -> impl Iterator<Item = (&str, String)> {
    query.split('&').filter_map(|pair| {
        let (name, value) = pair.split_once('=')?;
        Some((name, crate::explain::decode(&value.replace('+', " "))))
    })
}
