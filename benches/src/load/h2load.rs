//! h2load: HTTP/2 as fast as it goes.

use std::net::SocketAddr;
use std::process::Stdio;
use std::time::Duration;

use anyhow::{Context, Result, ensure};

use super::{FIELDS, Load, PATH};
use crate::OTHERS_CPU;
use crate::subject::{HOST, pinned};

/// `streams` at once on each of `connections`, over TLS; every answer must be a success.
pub(crate) fn run(address: SocketAddr, connections: usize, streams: usize, time: Duration) -> Result<Load> {
    let mut command = pinned(OTHERS_CPU, "h2load");
    command.args(["--threads", "1", "--clients", &connections.to_string()]);
    command.args(["--max-concurrent-streams", &streams.to_string()]);
    command.args(["--duration", &time.as_secs().max(1).to_string()]);
    for field in FIELDS {
        // HTTP/2 names are in lower case.
        let (name, value) = field.split_once(": ").context("a field")?;
        command.args(["--header", &format!("{}: {value}", name.to_ascii_lowercase())]);
    }
    command.args(["--header", &format!(":authority: {HOST}")]);
    let output = command
        .arg(format!("--connect-to={address}"))
        .arg(format!("https://{HOST}:{}{PATH}", address.port()))
        .stdin(Stdio::null())
        .output()
        .context("h2load (Debian package nghttp2-client)")?;
    let text = String::from_utf8_lossy(&output.stdout);
    ensure!(output.status.success(), "h2load: {}{}", text, String::from_utf8_lossy(&output.stderr));
    parse(&text)
}

fn parse(text: &str) -> Result<Load> {
    let line = |start: &str| text.lines().find_map(|line| line.trim().strip_prefix(start));
    let count = |list: &str, what: &str| {
        let word = list.split(", ").find_map(|item| item.trim().strip_suffix(what)).map(str::trim);
        word.and_then(|word| word.parse::<u64>().ok())
    };
    ensure!(line("Application protocol: h2").is_some(), "h2load: not HTTP/2: {text}");
    let requests = line("requests: ").context("h2load: no requests")?;
    let status = line("status codes: ").context("h2load: no status codes")?;
    let good = count(status, "2xx").unwrap_or(0);
    ensure!(
        count(requests, "failed") == Some(0) && count(requests, "errored") == Some(0),
        "h2load: {requests}"
    );
    let others: u64 = ["3xx", "4xx", "5xx"].iter().filter_map(|what| count(status, what)).sum();
    ensure!(good > 0 && others == 0, "h2load: {status}");
    let finished =
        line("finished in ").and_then(|line| line.split(", ").nth(1)).context("h2load: no rate")?;
    let per_second = finished.trim_end_matches(" req/s").parse()?;
    Ok(Load { units: good, per_second, latency: None })
}

#[cfg(test)]
mod tests {
    use super::*;

    const OUTPUT: &str = "Application protocol: h2\n\nfinished in 3.00s, 29531.67 req/s, 31.02MB/s\n\
        requests: 88595 total, 88851 started, 88595 done, 88595 succeeded, 0 failed, 0 errored, 0 timeout\n\
        status codes: 88600 2xx, 0 3xx, 0 4xx, 0 5xx\n";

    #[test]
    fn what_h2load_prints() {
        let load = parse(OUTPUT).unwrap();
        assert_eq!((load.units, load.per_second), (88_600, 29_531.67));
        assert!(parse(&OUTPUT.replace("0 failed", "2 failed")).is_err());
        assert!(parse(&OUTPUT.replace("0 4xx", "3 4xx")).is_err());
        assert!(parse(&OUTPUT.replace("protocol: h2", "protocol: http/1.1")).is_err());
    }
}
