//! The client: wrk, and a single request to see that answers are what they should be.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::process::Stdio;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};

use crate::OTHERS_CPU;
use crate::subject::{HOST, pinned};

/// What wrk saw.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Load {
    /// Requests answered.
    pub(crate) requests: u64,
    /// The same per second.
    pub(crate) per_second: f64,
}

/// Header fields of every request, as a browser would send.
const FIELDS: [&str; 5] = [
    "User-Agent: Mozilla/5.0 (X11; Linux x86_64; rv:128.0) Gecko/20100101 Firefox/128.0",
    "Accept: application/json,text/html;q=0.9,*/*;q=0.8",
    "Accept-Language: en-US,en;q=0.5",
    "Accept-Encoding: gzip, deflate, br, zstd",
    "Cookie: session=0123456789abcdef0123456789abcdef; theme=dark",
];

/// A path that none of the subjects' more precise rules matches.
const PATH: &str = "/catalogue/items/4711?currency=EUR";

/// Loads `address` from one thread; every answer must be a success.
pub(crate) fn wrk(address: SocketAddr, connections: usize, time: Duration) -> Result<Load> {
    let mut command = pinned(OTHERS_CPU, "wrk");
    command.args(["--threads", "1", "--timeout", "5s"]);
    command.args(["--connections", &connections.to_string(), "--duration", &format!("{}s", time.as_secs())]);
    for field in FIELDS.into_iter().chain([&*format!("Host: {HOST}")]) {
        command.args(["--header", field]);
    }
    // wrk ends by itself: when its time is over, or when it cannot connect.
    let output = command
        .arg(format!("http://{address}{PATH}"))
        .stdin(Stdio::null())
        .output()
        .context("wrk (Debian package wrk)")?;
    let text = String::from_utf8_lossy(&output.stdout);
    ensure!(output.status.success(), "wrk: {}{}", text, String::from_utf8_lossy(&output.stderr));
    parse(&text)
}

fn parse(text: &str) -> Result<Load> {
    let mut load = Load { requests: 0, per_second: 0.0 };
    for line in text.lines().map(str::trim) {
        if line.starts_with("Non-2xx") || line.starts_with("Socket errors") {
            bail!("wrk: {line}");
        }
        if let Some((requests, _)) = line.split_once(" requests in ") {
            load.requests = requests.parse().with_context(|| line.to_owned())?;
        }
        if let Some(rate) = line.strip_prefix("Requests/sec:") {
            load.per_second = rate.trim().parse().with_context(|| line.to_owned())?;
        }
    }
    ensure!(load.requests > 0 && load.per_second > 0.0, "wrk answered without a count: {text}");
    Ok(load)
}

/// One request on a connection of its own: 200, and a body of `body` bytes.
/// wrk alone would take a redirect for a success.
pub(crate) fn probe(address: SocketAddr, body: usize) -> Result<()> {
    let mut stream = TcpStream::connect(address)?;
    stream.set_read_timeout(Some(Duration::from_secs(5)))?;
    let fields = FIELDS.join("\r\n");
    write!(stream, "GET {PATH} HTTP/1.1\r\nHost: {HOST}\r\n{fields}\r\nConnection: close\r\n\r\n")?;
    // Read by length, not to the end: the backend leaves closing to its client.
    let (mut answer, mut buffer) = (Vec::new(), [0; 16 * 1024]);
    let (head, content) = loop {
        let text = str::from_utf8(&answer).context("not a text")?;
        match text.split_once("\r\n\r\n") {
            Some((head, content)) if content.len() >= body => break (head, content),
            _ => {}
        }
        match stream.read(&mut buffer)? {
            0 => bail!("closed after {} bytes: {}", answer.len(), text.lines().next().unwrap_or_default()),
            read => answer.extend_from_slice(&buffer[..read]),
        }
    };
    ensure!(head.starts_with("HTTP/1.1 200"), "answered {}", head.lines().next().unwrap_or_default());
    let expected = format!("content-length: {body}");
    let sized = head.lines().any(|line| line.eq_ignore_ascii_case(&expected));
    ensure!(sized && content.len() == body, "answered {} bytes, not {body}", content.len());
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    const OUTPUT: &str = "Running 4s test @ http://127.0.0.1:8080/\n  1 threads and 64 connections\n  \
        Thread Stats   Avg      Stdev     Max   +/- Stdev\n    Latency   772.01us  120.50us   8.02ms   92.11%\n    \
        Req/Sec    83.35k     1.52k   86.06k    75.00%\n  331841 requests in 4.00s, 395.60MB read\n\
        Requests/sec:  82953.18\nTransfer/sec:     98.89MB\n";

    #[test]
    fn what_wrk_prints() {
        assert_eq!(parse(OUTPUT).unwrap(), Load { requests: 331_841, per_second: 82_953.18 });
        for bad in
            ["  Non-2xx or 3xx responses: 12\n", "  Socket errors: connect 0, read 3, write 0, timeout 0\n"]
        {
            assert!(parse(&format!("{OUTPUT}{bad}")).unwrap_err().to_string().contains(bad.trim()));
        }
        assert!(parse("").is_err());
    }
}
