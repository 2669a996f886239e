//! A client that makes a connection, a handshake and one request, again and
//! again, and knows of each handshake whether it was full or resumed: wrk
//! resumes whenever it can.

use std::net::{SocketAddr, TcpStream};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use rustls::HandshakeKind;

use super::{Load, PATH, Percentiles, histogram, probe, request, tls};
use crate::machine;
use crate::subject::HOST;

/// From `clients` threads on the load's CPU. The first handshake of each is not counted among
/// the `resumed`, it has nothing to resume; the latency is of connection, handshake and answer.
pub(crate) fn run(
    address: SocketAddr,
    body: usize,
    resumed: bool,
    clients: usize,
    time: Duration,
) -> Result<Load> {
    let started = Instant::now();
    let until = started + time;
    let results: Vec<Result<Counted>> = std::thread::scope(|scope| {
        let threads: Vec<_> =
            (0..clients).map(|_| scope.spawn(move || client(address, body, resumed, until))).collect();
        threads.into_iter().map(|thread| thread.join().expect("no client panics")).collect()
    });
    let took = started.elapsed().as_secs_f64();
    let mut all = histogram();
    let mut wrong = 0;
    for result in results {
        let counted = result?;
        wrong += counted.wrong;
        all.add(counted.latency)?;
    }
    let units = all.len();
    let expected = if resumed { clients as u64 } else { 0 };
    let what = if resumed { "were not resumed" } else { "were resumed" };
    ensure!(wrong <= expected, "{wrong} of {units} handshakes {what}");
    Ok(Load { units, per_second: units as f64 / took, latency: Some(Percentiles::of(&all)) })
}

struct Counted {
    latency: hdrhistogram::Histogram<u64>,
    /// Handshakes of the other kind.
    wrong: u64,
}

fn client(address: SocketAddr, body: usize, resumed: bool, until: Instant) -> Result<Counted> {
    machine::pin(crate::OTHERS_CPU)?;
    // Of its own: TLS 1.3 tickets are used once, and each connection brings new ones.
    let client = tls::Client::new(resumed)?;
    let request = request(HOST, PATH, true);
    let expected = if resumed { HandshakeKind::Resumed } else { HandshakeKind::Full };
    let mut counted = Counted { latency: histogram(), wrong: 0 };
    while Instant::now() < until {
        let begun = Instant::now();
        let stream = TcpStream::connect(address)?;
        stream.set_nodelay(true)?;
        stream.set_read_timeout(Some(Duration::from_secs(5)))?;
        let mut stream = client.connect(stream)?;
        probe::exchange(&mut stream, &request, body).context("a request after a handshake")?;
        counted.latency.saturating_record(begun.elapsed().as_nanos() as u64);
        counted.wrong += u64::from(tls::kind(&stream)? != expected);
        // Said before the proxy waits for it.
        stream.conn.send_close_notify();
        let _ = stream.conn.write_tls(&mut stream.sock);
    }
    Ok(counted)
}
