//! An endpoint that says who it is, and goes on until nobody uses it any more.

use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};
use std::time::Duration;

use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream};
use tokio::task::JoinHandle;
use tokio::time::Instant;

/// How long a slow answer takes: several publishes.
const SLOW: Duration = Duration::from_millis(250);

/// A new request that chose a pod just before it was removed may still be on its way.
const LISTENS_ON: Duration = Duration::from_secs(3);

/// Dropping it does not stop it.
pub(crate) struct Pod {
    pub(crate) address: SocketAddr,
    pub(crate) name: Arc<str>,
    open: Arc<AtomicUsize>,
    accepting: JoinHandle<()>,
    removed: Option<Instant>,
}

impl Pod {
    /// One that speaks HTTP/1, or HTTP/2 by prior knowledge.
    pub(crate) async fn start(name: String, http2: bool) -> Pod {
        let name: Arc<str> = name.into();
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let open = Arc::new(AtomicUsize::new(0));
        let (their_name, their_open) = (name.clone(), open.clone());
        let accepting = tokio::spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                let (name, open) = (their_name.clone(), their_open.clone());
                open.fetch_add(1, Relaxed);
                tokio::spawn(async move {
                    let _ = serve(stream, &name, http2).await;
                    open.fetch_sub(1, Relaxed);
                });
            }
        });
        Pod { address, name, open, accepting, removed: None }
    }

    pub(crate) fn open(&self) -> usize {
        self.open.load(Relaxed)
    }

    /// No table names it any more.
    pub(crate) fn remove(&mut self) {
        self.removed = Some(Instant::now());
    }

    /// Stops listening once it is long removed and idle. True when it has.
    pub(crate) fn reap(&self) -> bool {
        let reaped = self.open() == 0 && self.removed.is_some_and(|at| at.elapsed() > LISTENS_ON);
        if reaped {
            self.accepting.abort();
        }
        reaped
    }
}

async fn serve(mut stream: TcpStream, name: &str, http2: bool) -> io::Result<()> {
    stream.set_nodelay(true)?;
    if http2 {
        return serve_http2(stream, name).await.map_err(io::Error::other);
    }
    let mut bytes = Vec::with_capacity(4 << 10);
    loop {
        let end = loop {
            if let Some(at) = bytes.windows(4).position(|w| w == b"\r\n\r\n") {
                break at + 4;
            }
            if stream.read_buf(&mut bytes).await? == 0 {
                return Ok(());
            }
        };
        let head = String::from_utf8_lossy(&bytes[..end]).into_owned();
        bytes.drain(..end);
        skip_body(&mut stream, &mut bytes, &head).await?;
        if head.contains("\r\nUpgrade: echo\r\n") {
            return echo(stream, name).await;
        }
        answer(&mut stream, name, head.split(' ').nth(1).unwrap_or_default()).await?;
    }
}

async fn serve_http2(stream: TcpStream, name: &str) -> Result<(), h2::Error> {
    let mut connection = h2::server::handshake(stream).await?;
    while let Some(accepted) = connection.accept().await {
        let (request, mut respond) = accepted?;
        let name = name.to_owned();
        tokio::spawn(async move {
            let target = request.uri().path_and_query().map_or(String::new(), |target| target.to_string());
            let mut upload = request.into_body();
            while let Some(Ok(data)) = upload.data().await {
                let _ = upload.flow_control().release_capacity(data.len());
            }
            if target.contains("/slow") {
                tokio::time::sleep(SLOW).await;
            }
            let Ok(mut body) = respond.send_response(http::Response::new(()), false) else { return };
            let text = format!("{name} {target}");
            let pieces = if target.contains("/drip") { 5 } else { 1 };
            for piece in text.as_bytes().chunks(text.len().div_ceil(pieces)) {
                let _ = body.send_data(bytes::Bytes::copy_from_slice(piece), false);
                if pieces > 1 {
                    tokio::time::sleep(SLOW / 5).await;
                }
            }
            let _ = body.send_data(bytes::Bytes::new(), true);
        });
    }
    Ok(())
}

/// Drops the request body behind `head`. Chunks hold no text that looks like the last one.
async fn skip_body(stream: &mut TcpStream, bytes: &mut Vec<u8>, head: &str) -> io::Result<()> {
    const LAST_CHUNK: &[u8] = b"0\r\n\r\n";
    let length = head.lines().find_map(|l| l.strip_prefix("Content-Length: ")?.parse().ok());
    let chunked = head.contains("\r\nTransfer-Encoding: chunked\r\n");
    loop {
        let end = match chunked {
            true => {
                bytes.windows(LAST_CHUNK.len()).position(|w| w == LAST_CHUNK).map(|at| at + LAST_CHUNK.len())
            }
            false => Some(length.unwrap_or(0)).filter(|length| *length <= bytes.len()),
        };
        if let Some(end) = end {
            bytes.drain(..end);
            return Ok(());
        }
        if stream.read_buf(bytes).await? == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
    }
}

/// `name target` in the body, so that a mixed up answer shows.
async fn answer(stream: &mut TcpStream, name: &str, target: &str) -> io::Result<()> {
    let body = format!("{name} {target}");
    if target.contains("/slow") {
        tokio::time::sleep(SLOW).await;
    }
    if !target.contains("/drip") {
        let answer = format!("HTTP/1.1 200 OK\r\nContent-Length: {}\r\n\r\n{body}", body.len());
        return stream.write_all(answer.as_bytes()).await;
    }
    stream.write_all(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n").await?;
    for piece in body.as_bytes().chunks(body.len().div_ceil(5)) {
        stream.write_all(format!("{:x}\r\n", piece.len()).as_bytes()).await?;
        stream.write_all(piece).await?;
        stream.write_all(b"\r\n").await?;
        tokio::time::sleep(SLOW / 5).await;
    }
    stream.write_all(b"0\r\n\r\n").await
}

async fn echo(mut stream: TcpStream, name: &str) -> io::Result<()> {
    stream
        .write_all(b"HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: echo\r\n\r\n")
        .await?;
    stream.write_all(format!("{name} ").as_bytes()).await?;
    let mut room = [0; 1024];
    loop {
        match stream.read(&mut room).await? {
            0 => return Ok(()),
            n => stream.write_all(&room[..n]).await?,
        }
    }
}
