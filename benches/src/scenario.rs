//! What is measured: one scenario for each row of the table of bars, in families.

mod change;
mod http;
mod idle;
mod latency;
mod loaded;
mod publish;
mod scale;
mod tcp;

use anyhow::Result;
use clap::ValueEnum;

use crate::bench::Bench;
use crate::raw::{Bar, Column, Limit, Outcome};
use crate::subject::Kind;

/// In the order of `all`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Scenario {
    /// Every one below.
    All,
    /// HTTP/1.1 keep-alive, 1 KB, 64 connections.
    Http1,
    /// The same with 10,000 hosts, a JSON access log, metrics per route and two header edits.
    Http1Full,
    /// A connection per request.
    Close,
    /// HTTP/1.1 keep-alive over TLS.
    Tls,
    /// TLS 1.3 handshakes, none resumed.
    HandshakeFull,
    /// TLS 1.3 handshakes, all resumed.
    HandshakeResumed,
    /// HTTP/2 over TLS, 32 streams on each connection.
    H2,
    /// Bodies of 64 KiB.
    Body64k,
    /// Bodies of 1 MiB.
    Body1m,
    /// TCP relay, 64 bytes back and forth.
    TcpPingpong,
    /// TCP relay, as much as goes one way.
    TcpBulk,
    /// Added latency at 30 % load, open loop.
    Latency,
    /// Memory of idle connections, plain and TLS.
    Idle,
    /// 50,000 hosts, from start to ready, and memory.
    Scale,
    /// One changed Ingress among 100,000.
    Change,
    /// A hundred publishes a second under load.
    Publish,
    /// CPU per request with 100,000 hosts beside one.
    HostScale,
}

/// `all` stands for every one.
pub(crate) fn chosen(scenarios: &[Scenario]) -> Vec<Scenario> {
    if scenarios.contains(&Scenario::All) {
        return Scenario::value_variants().iter().copied().filter(|s| *s != Scenario::All).collect();
    }
    scenarios.to_vec()
}

impl Scenario {
    /// As on the command line.
    pub(crate) fn name(self) -> String {
        self.to_possible_value().map(|value| value.get_name().to_owned()).unwrap_or_default()
    }

    pub(crate) fn run(self, bench: &Bench) -> Result<Outcome> {
        let mut outcome = match self {
            Scenario::All => anyhow::bail!("not one scenario"),
            Scenario::Http1 => http::keep_alive(bench),
            Scenario::Http1Full => http::full(bench),
            Scenario::Close => http::close(bench),
            Scenario::Tls => http::tls(bench),
            Scenario::HandshakeFull => http::handshake(bench, false),
            Scenario::HandshakeResumed => http::handshake(bench, true),
            Scenario::H2 => http::h2(bench),
            Scenario::Body64k => http::body(bench, 64 * 1024),
            Scenario::Body1m => http::body(bench, 1024 * 1024),
            Scenario::TcpPingpong => tcp::ping_pong(bench),
            Scenario::TcpBulk => tcp::bulk(bench),
            Scenario::Latency => latency::run(bench),
            Scenario::Idle => idle::run(bench),
            Scenario::Scale => scale::run(bench),
            Scenario::Change => change::run(bench),
            Scenario::Publish => publish::run(bench),
            Scenario::HostScale => http::host_scale(bench),
        }?;
        outcome.name = self.name();
        Ok(outcome)
    }
}

/// A bar for Lockgate, as a multiple of the same figure of others.
fn of(what: &str, figure: &str, limit: f64, others: &[Kind]) -> Bar {
    let others = others.iter().map(|kind| kind.name().to_owned()).collect();
    bar(what, Kind::Lockgate.name(), figure, limit, Limit::Of(others))
}

fn bar(what: &str, subject: &str, figure: &str, limit: f64, to: Limit) -> Bar {
    Bar { what: what.to_owned(), subject: subject.to_owned(), figure: figure.to_owned(), limit, to }
}

fn column(figure: &str, title: &str, digits: usize) -> Column {
    Column { figure: figure.to_owned(), title: title.to_owned(), digits, paired: false }
}

fn paired(figure: &str, title: &str, digits: usize) -> Column {
    Column { paired: true, ..column(figure, title, digits) }
}
