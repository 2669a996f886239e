//! wrk: HTTP/1.1 as fast as it goes.

use std::fmt::Write;
use std::net::SocketAddr;
use std::path::Path;
use std::process::Stdio;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};

use super::{FIELDS, Load, PATH, Percentiles};
use crate::OTHERS_CPU;
use crate::subject::{HOST, host, pinned};

/// How it asks.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Wrk<'a> {
    pub(crate) connections: usize,
    pub(crate) tls: bool,
    /// A connection per request.
    pub(crate) close: bool,
    /// Each request for one of so many hosts, at random.
    pub(crate) hosts: usize,
    /// Requests it has prepared, if it is to choose at random; one otherwise.
    pub(crate) prepared: usize,
    /// For its script.
    pub(crate) folder: &'a Path,
}

impl Wrk<'_> {
    /// Loads `address` from one thread; every answer must be a success.
    pub(crate) fn run(&self, address: SocketAddr, time: Duration) -> Result<Load> {
        let script = self.folder.join("wrk.lua");
        std::fs::write(&script, self.script())?;
        let mut command = pinned(OTHERS_CPU, "wrk");
        command.args(["--threads", "1", "--timeout", "5s", "--script"]).arg(script);
        command.args(["--connections", &self.connections.to_string()]);
        command.args(["--duration", &format!("{}s", time.as_secs().max(1))]);
        for field in FIELDS.into_iter().chain([&*format!("Host: {HOST}")]) {
            command.args(["--header", field]);
        }
        if self.close {
            command.args(["--header", "Connection: close"]);
        }
        let scheme = if self.tls { "https" } else { "http" };
        // wrk ends by itself: when its time is over, or when it cannot connect.
        let output = command
            .arg(format!("{scheme}://{address}{PATH}"))
            .stdin(Stdio::null())
            .output()
            .context("wrk (Debian package wrk)")?;
        let text = String::from_utf8_lossy(&output.stdout);
        ensure!(output.status.success(), "wrk: {}{}", text, String::from_utf8_lossy(&output.stderr));
        parse(&text)
    }

    /// Percentiles wrk does not print by itself; requests are prepared before the clock starts.
    fn script(&self) -> String {
        let mut script = String::from(
            "done = function(summary, latency)
  io.write(string.format('percentiles %d %d %d\\n',
    latency:percentile(50), latency:percentile(99), latency:percentile(99.9)))
end
",
        );
        if self.prepared > 1 {
            let (count, hosts) = (self.prepared, self.hosts);
            let _ = write!(
                script,
                "local asked = {{}}
init = function()
  for i = 0, {count} - 1 do
    local host = i % {hosts}
    wrk.headers['Host'] = host == {hosts} - 1 and '{last}' or (string.gsub('{some}', '%d+', host, 1))
    asked[i + 1] = wrk.format('GET', '{PATH}')
  end
  math.randomseed(1)
end
request = function() return asked[math.random({count})] end
",
                last = HOST,
                some = host(0, 2),
            );
        }
        script
    }
}

fn parse(text: &str) -> Result<Load> {
    let mut load = Load::default();
    for line in text.lines().map(str::trim) {
        if line.starts_with("Non-2xx") || line.starts_with("Socket errors") {
            bail!("wrk: {line}");
        }
        if let Some((requests, _)) = line.split_once(" requests in ") {
            load.units = requests.parse().with_context(|| line.to_owned())?;
        }
        if let Some(rate) = line.strip_prefix("Requests/sec:") {
            load.per_second = rate.trim().parse().with_context(|| line.to_owned())?;
        }
        if let Some(values) = line.strip_prefix("percentiles ") {
            let us: Vec<f64> = values.split(' ').map_while(|v| v.parse().ok()).collect();
            if let [p50, p99, p999] = us[..] {
                load.latency = Some(Percentiles { p50, p99, p999 });
            }
        }
    }
    ensure!(load.units > 0 && load.per_second > 0.0, "wrk answered without a count: {text}");
    Ok(load)
}

#[cfg(test)]
mod tests {
    use super::*;

    const OUTPUT: &str = "Running 4s test @ http://127.0.0.1:8080/\n  1 threads and 64 connections\n  \
        Thread Stats   Avg      Stdev     Max   +/- Stdev\n    Latency   772.01us  120.50us   8.02ms   92.11%\n    \
        Req/Sec    83.35k     1.52k   86.06k    75.00%\n  331841 requests in 4.00s, 395.60MB read\n\
        Requests/sec:  82953.18\nTransfer/sec:     98.89MB\npercentiles 770 1200 8000\n";

    #[test]
    fn what_wrk_prints() {
        let latency = Some(Percentiles { p50: 770.0, p99: 1200.0, p999: 8000.0 });
        assert_eq!(parse(OUTPUT).unwrap(), Load { units: 331_841, per_second: 82_953.18, latency });
        for bad in
            ["  Non-2xx or 3xx responses: 12\n", "  Socket errors: connect 0, read 3, write 0, timeout 0\n"]
        {
            assert!(parse(&format!("{OUTPUT}{bad}")).unwrap_err().to_string().contains(bad.trim()));
        }
        assert!(parse("").is_err());
    }
}
