//! A backend that costs as little as it can: every request, whatever it asks,
//! gets the same bytes.

use std::net::SocketAddr;
use std::rc::Rc;

use anyhow::{Context, Result};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpSocket, TcpStream};

/// Serves on `address` until it is killed. Requests must have no body. A connection whose
/// first request came through a proxy and has no field `required` is closed: that is looked at
/// once, so that it costs nothing.
pub(crate) fn run(address: SocketAddr, body: usize, required: Option<String>) -> Result<()> {
    let answer: &'static [u8] = answer(body).leak();
    let required: Option<&'static str> = required.map(|name| &*name.to_ascii_lowercase().leak());
    accept(address, async move |stream| serve(stream, answer, required).await)
}

/// Whether a request that a proxy has passed on lacks the field `name` (lower case).
fn lacks(request: &[u8], name: &str) -> bool {
    let text = String::from_utf8_lossy(request).to_ascii_lowercase();
    let has = |name: &str| text.lines().any(|line| line.split_once(':').is_some_and(|(n, _)| n == name));
    has("x-forwarded-for") && !has(name)
}

/// Hands every connection to `serve`, all on one thread, until it is killed.
pub(crate) fn accept<S: AsyncFn(TcpStream) + 'static>(address: SocketAddr, serve: S) -> Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_io().build()?;
    let local = tokio::task::LocalSet::new();
    local.block_on(&runtime, async move {
        let socket = TcpSocket::new_v4()?;
        socket.set_reuseaddr(true)?;
        socket.bind(address)?;
        // More than any case connects at once: a SYN that is dropped costs a second.
        let listener = socket.listen(4096).context("listen")?;
        let serve = Rc::new(serve);
        loop {
            let (stream, _) = listener.accept().await?;
            stream.set_nodelay(true)?;
            let serve = Rc::clone(&serve);
            tokio::task::spawn_local(async move { serve(stream).await });
        }
    })
}

/// Six header fields, as an application of today would send.
fn answer(body: usize) -> Vec<u8> {
    let mut answer = format!(
        "HTTP/1.1 200 OK\r\nServer: canned\r\nDate: Sun, 06 Nov 1994 08:49:37 GMT\r\n\
         Content-Type: application/json\r\nContent-Length: {body}\r\nCache-Control: no-store\r\n\
         Vary: Accept-Encoding\r\n\r\n"
    )
    .into_bytes();
    answer.resize(answer.len() + body, b'x');
    answer
}

/// Ends with the connection, whoever closes it and why.
async fn serve(mut stream: TcpStream, answer: &'static [u8], mut required: Option<&'static str>) {
    let mut buffer = [0; 16 * 1024];
    let mut matched = 0;
    loop {
        let read = match stream.read(&mut buffer).await {
            Ok(0) | Err(_) => return,
            Ok(read) => read,
        };
        if required.take().is_some_and(|name| lacks(&buffer[..read], name)) {
            return;
        }
        for _ in 0..ends(&buffer[..read], &mut matched) {
            if stream.write_all(answer).await.is_err() {
                return;
            }
        }
    }
}

/// How many header sections end in `bytes`. `matched` is how much of the
/// blank line the bytes before had brought.
fn ends(bytes: &[u8], matched: &mut usize) -> usize {
    const END: &[u8; 4] = b"\r\n\r\n";
    let mut ends = 0;
    for &byte in bytes {
        *matched = match byte {
            _ if byte == END[*matched] => *matched + 1,
            b'\r' => 1,
            _ => 0,
        };
        if *matched == END.len() {
            *matched = 0;
            ends += 1;
        }
    }
    ends
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn header_sections_are_counted_across_reads() {
        for (reads, expected) in [
            (&["GET / HTTP/1.1\r\nHost: a\r\n\r\n"][..], 1),
            (&["GET / HTTP/1.1\r\n\r\nGET / HTTP/1.1\r\n\r\nGET"], 2),
            (&["GET / HTTP/1.1\r", "\n\r", "\n"], 1),
            (&["\r\r\n\r\n"], 1),
            (&["\r\n\r", "x\r\n\r\n"], 1),
        ] {
            let mut matched = 0;
            let counted: usize = reads.iter().map(|read| ends(read.as_bytes(), &mut matched)).sum();
            assert_eq!(counted, expected, "{reads:?}");
        }
    }

    #[test]
    fn what_a_proxy_left_out_is_noticed() {
        for (request, missing) in [
            ("GET / HTTP/1.1\r\nHost: a\r\n\r\n", false),
            ("GET / HTTP/1.1\r\nX-Forwarded-For: 1\r\n\r\n", true),
            ("GET / HTTP/1.1\r\nX-Forwarded-For: 1\r\nX-Team: a\r\n\r\n", false),
            ("GET / HTTP/1.1\r\nx-forwarded-for: 1\r\nx-teams: a\r\n\r\n", true),
        ] {
            assert_eq!(lacks(request.as_bytes(), "x-team"), missing, "{request:?}");
        }
    }

    #[test]
    fn the_answer_is_as_long_as_it_says() {
        let answer = String::from_utf8(answer(1024)).unwrap();
        let (head, body) = answer.split_once("\r\n\r\n").unwrap();
        assert!(head.contains("Content-Length: 1024\r\n"));
        assert_eq!(body.len(), 1024);
    }
}
