//! Endpoints that act by script, and count what reaches them.
#![allow(dead_code, unreachable_pub, reason = "every test file uses its own part of this")]

use std::io::{Read as _, Write as _};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering::SeqCst};
use std::time::Duration;

use lockgate_proxy::Proxy;
use lockgate_proxy::resilience::Resilience;
use lockgate_proxy::table::{Host, HostPattern, PathMatch, RoutingTable, RuleLimits, UpstreamProtocol};

use super::toy;
use super::wire::{self, Wire, ok};

/// What an endpoint does with one request.
#[derive(Clone, Copy, Debug)]
pub enum Act {
    /// Sends these bytes, and keeps the connection.
    Say(&'static str),
    /// Ends the connection.
    HangUp,
    /// Ends it with a reset.
    Reset,
    /// Sends nothing for so long, or until the other side hangs up; then an empty 200.
    Wait(Duration),
    /// Sends a 200 whose body is the number of body bytes received.
    Count,
}

/// An endpoint that does with its nth request (from 0) as a script says.
pub struct Script {
    pub address: SocketAddr,
    asked: Arc<AtomicUsize>,
    open: Arc<AtomicUsize>,
}

impl Script {
    pub fn new(act: impl Fn(usize) -> Act + Send + Sync + 'static) -> Script {
        let asked = Arc::new(AtomicUsize::new(0));
        let open = Arc::new(AtomicUsize::new(0));
        let (count, opened) = (asked.clone(), open.clone());
        let address = toy::endpoint(move |stream| {
            opened.fetch_add(1, SeqCst);
            let _ = serve(stream, &act, &count);
            opened.fetch_sub(1, SeqCst);
        });
        Script { address, asked, open }
    }

    pub fn says(answer: &'static str) -> Script {
        Script::new(move |_| Act::Say(answer))
    }

    pub fn hangs_up() -> Script {
        Script::new(|_| Act::HangUp)
    }

    pub fn counts() -> Script {
        Script::new(|_| Act::Count)
    }

    /// An address where nobody listens.
    pub fn nobody() -> Script {
        Script::at(TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap())
    }

    /// Somebody else's address.
    pub fn at(address: SocketAddr) -> Script {
        Script { address, asked: Arc::default(), open: Arc::default() }
    }

    /// Requests that have arrived.
    pub fn asked(&self) -> usize {
        self.asked.load(SeqCst)
    }

    /// Connections that are open.
    pub fn open(&self) -> usize {
        self.open.load(SeqCst)
    }
}

fn serve(
    stream: TcpStream,
    act: &(impl Fn(usize) -> Act + ?Sized),
    asked: &AtomicUsize,
) -> std::io::Result<()> {
    stream.set_nodelay(true)?;
    stream.set_read_timeout(None)?;
    let mut wire = Wire::new(stream);
    while let Some(request) = wire.receive()? {
        let n = asked.fetch_add(1, SeqCst);
        match act(n) {
            Act::Say(answer) => wire.stream.write_all(answer.as_bytes())?,
            Act::HangUp => return Ok(()),
            Act::Reset => {
                socket2::SockRef::from(&wire.stream).set_linger(Some(Duration::ZERO))?;
                return Ok(());
            }
            Act::Wait(time) => {
                wire.stream.set_read_timeout(Some(time))?;
                // Nothing more is to come: bytes or an end are the other side hanging up.
                if wire.stream.read(&mut [0; 1]).is_ok() {
                    return Ok(());
                }
                wire.stream.set_read_timeout(None)?;
                wire.stream.write_all(&ok(b""))?;
            }
            Act::Count => wire.stream.write_all(&ok(request.body.len().to_string().as_bytes()))?,
        }
    }
    Ok(())
}

/// A table with one rule of any host and path to `endpoints`.
pub fn ruled(endpoints: &[&Script], own: Resilience) -> RoutingTable {
    ruled_over(endpoints, own, UpstreamProtocol::Http1)
}

pub fn ruled_over(endpoints: &[&Script], own: Resilience, protocol: UpstreamProtocol) -> RoutingTable {
    let addresses: Vec<SocketAddr> = endpoints.iter().map(|script| script.address).collect();
    let mut table = toy::table(&addresses, protocol);
    let mut rule = toy::rule(PathMatch::Prefix("/".into()), "default/app:80");
    rule.limits = RuleLimits { resilience: Some(Arc::new(own)), ..RuleLimits::default() };
    table.hosts.insert(HostPattern::any(), Arc::new(Host { rules: vec![rule] }));
    table
}

/// The status of one request on a connection of its own.
pub fn status(proxy: &Proxy, request: &str) -> u16 {
    wire::plain(proxy.http_addrs()[0]).ask(request.as_bytes()).status()
}

/// The value of one series, as a scrape shows it.
pub fn metric(proxy: &Proxy, name: &str) -> u64 {
    let metrics = proxy.metrics().encode();
    let line = metrics.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' '));
    line.unwrap_or_else(|| panic!("{name} in {metrics}")).parse().unwrap()
}

/// Waits for what another thread is about to do.
pub fn until(what: &str, mut happened: impl FnMut() -> bool) {
    let patience = tokio::time::Instant::now() + toy::PATIENCE;
    while !happened() {
        assert!(tokio::time::Instant::now() < patience, "waited in vain for {what}");
        std::thread::sleep(Duration::from_millis(2));
    }
}
