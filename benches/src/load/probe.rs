//! A single request to see that answers are what they should be: wrk alone would take a redirect for a success.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};

use super::{PATH, request, tls};
use crate::subject::HOST;

fn connect(address: SocketAddr) -> Result<TcpStream> {
    let stream = TcpStream::connect(address)?;
    stream.set_read_timeout(Some(Duration::from_secs(10)))?;
    stream.set_nodelay(true)?;
    Ok(stream)
}

/// One request on a connection of its own: 200, and a body of `body` bytes.
pub(crate) fn http(address: SocketAddr, body: usize) -> Result<()> {
    exchange(&mut connect(address)?, &request(HOST, PATH, true), body)
}

/// The same over TLS.
pub(crate) fn https(address: SocketAddr, body: usize) -> Result<()> {
    let client = tls::Client::new(false)?;
    let mut stream = client.connect(connect(address)?)?;
    exchange(&mut stream, &request(HOST, PATH, true), body)
}

/// Sixty-four bytes there, and as many back.
pub(crate) fn bytes(address: SocketAddr) -> Result<()> {
    let mut stream = connect(address)?;
    stream.write_all(&[b'x'; 64])?;
    let mut back = [0; 64];
    stream.read_exact(&mut back)?;
    ensure!(back == [b'x'; 64], "other bytes came back");
    Ok(())
}

/// An answer, whatever it is, with its head.
pub(crate) fn get(address: SocketAddr, host: &str, path: &str) -> Result<String> {
    let mut stream = connect(address)?;
    stream.write_all(&request(host, path, true))?;
    let mut text = String::new();
    stream.read_to_string(&mut text)?;
    Ok(text)
}

/// The head of the answer to the usual request.
pub(crate) fn head(address: SocketAddr) -> Result<String> {
    let mut stream = connect(address)?;
    stream.write_all(&request(HOST, PATH, true))?;
    let (mut answer, mut buffer) = (Vec::new(), [0; 16 * 1024]);
    loop {
        if let Some(end) = answer.windows(4).position(|four| four == b"\r\n\r\n") {
            return Ok(String::from_utf8_lossy(&answer[..end]).into_owned());
        }
        match stream.read(&mut buffer)? {
            0 => bail!("closed after {} bytes", answer.len()),
            read => answer.extend_from_slice(&buffer[..read]),
        }
    }
}

/// Sends `request` and reads an answer that must be 200 with a body of `body` bytes.
pub(crate) fn exchange<S: Read + Write>(stream: &mut S, request: &[u8], body: usize) -> Result<()> {
    stream.write_all(request)?;
    // Read by length, not to the end: the backend leaves closing to its client.
    let (mut answer, mut buffer) = (Vec::new(), [0; 16 * 1024]);
    loop {
        match answered(&answer, body) {
            Some(result) => return result,
            None => match stream.read(&mut buffer)? {
                0 => bail!("closed after {} bytes", answer.len()),
                read => answer.extend_from_slice(&buffer[..read]),
            },
        }
    }
}

/// None until all has come.
fn answered(answer: &[u8], body: usize) -> Option<Result<()>> {
    let end = answer.windows(4).take(16 * 1024).position(|four| four == b"\r\n\r\n")?;
    let head = String::from_utf8_lossy(&answer[..end]);
    let content = answer.len() - end - 4;
    let status = head.lines().next().unwrap_or_default();
    if !status.starts_with("HTTP/1.1 200") {
        return Some(Err(anyhow::anyhow!("answered {status}")));
    }
    let expected = format!("content-length: {body}");
    if !head.lines().any(|line| line.eq_ignore_ascii_case(&expected)) {
        return Some(Err(anyhow::anyhow!("answered without `{expected}`: {head}")));
    }
    match content {
        less if less < body => None,
        same if same == body => Some(Ok(())),
        _ => Some(Err(anyhow::anyhow!("{content} bytes, not {body}")).context("body")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn answers() {
        let of = |text: &str| answered(text.as_bytes(), 2);
        assert!(of("HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\n").is_none());
        assert!(of("HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nxx").unwrap().is_ok());
        for bad in [
            "HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nxxx",
            "HTTP/1.1 200 OK\r\nContent-Length: 3\r\n\r\nxxx",
            "HTTP/1.1 308 Permanent Redirect\r\nContent-Length: 2\r\n\r\nxx",
        ] {
            assert!(of(bad).unwrap().is_err(), "{bad}");
        }
    }
}
