//! TLS that is not ours to end: the ClientHello is read for its name, and if
//! that is passed through, the bytes go to an endpoint as they came.
//!
//! Only while the live table passes a host through does a TLS connection come
//! here; otherwise rustls reads the socket itself.

use std::rc::Rc;
use std::time::Duration;

use smallvec::SmallVec;
use tokio::time::{Instant, timeout};

use super::opening::Opening;
use crate::buffer::{Buffer, Output};
use crate::client_hello::{self, Parsed};
use crate::clock;
use crate::conn::Conn;
use crate::http::tunnel;
use crate::proxy_protocol::{self, Version};
use crate::timer::Timer;
use crate::upstream::{InFlight, Peer, Upstream};
use crate::worker::Worker;

/// The name in the ClientHello, if it is one that is passed through. `None`:
/// the handshake is ours. So it is if this is no ClientHello, or none that
/// arrives whole: rustls knows the alert for each.
pub(super) async fn asked(worker: &Worker, opening: &mut Opening) -> Option<String> {
    let mut enough = 0;
    loop {
        if opening.input.len() >= enough {
            match client_hello::parse(opening.input.filled()) {
                Ok(Parsed::Incomplete { missing }) => enough = opening.input.len() + missing,
                Ok(Parsed::Named(name)) => {
                    return name.filter(|name| worker.router().passthrough(name).is_some());
                }
                Err(_) => return None,
            }
        }
        opening.read().await?;
    }
}

/// Relays between the client and an endpoint of the host `name` until both have ended.
pub(super) async fn relay(worker: &Worker, opening: Opening, name: &str) {
    let Some((mut peer, version)) = reach(worker, name).await else {
        worker.metrics.passthrough_failed.inc();
        tracing::debug!(host = name, "no endpoint for a connection to be passed through");
        return;
    };
    let Opening { tcp, source, destination, input } = opening;
    if let Some(version) = version {
        let mut header = Output::take();
        proxy_protocol::write_header(version, source, destination, &mut header);
        let sent = timeout(worker.config.timeouts.send, peer.conn.send([&header, b"", b""]));
        if !matches!(sent.await, Ok(Ok(()))) {
            return worker.metrics.passthrough_failed.inc();
        }
    }
    let timer = Timer::new(Instant::now() + worker.config.timeouts.tunnel);
    tunnel::run(worker, Conn::Plain(tcp), peer, input, Buffer::new(), timer).await;
}

/// A connection to an endpoint, and the PROXY header it wants.
async fn reach(worker: &Worker, name: &str) -> Option<(Peer, Option<Version>)> {
    let mut tried = SmallVec::<[u64; 4]>::new();
    for _ in 0..worker.config.limits.tries {
        let (upstream, version, patience) = pick(worker, name, &tried)?;
        match timeout(patience, worker.upstreams.connect_tcp(&upstream)).await {
            Ok(Ok(mut peer)) => {
                upstream.live.succeeded();
                peer.occupy(InFlight::new(upstream.clone()));
                return Some((peer, version));
            }
            failed => {
                if failed.is_err() {
                    worker.metrics.upstream_failed.inc();
                }
                if upstream.live.failed(clock::now_ms(), &worker.config.ejection) {
                    worker.metrics.ejections.inc();
                }
                tried.push(upstream.live.id);
            }
        }
    }
    None
}

/// By the generation that is live now; it is not held while we connect.
fn pick(worker: &Worker, name: &str, tried: &[u64]) -> Option<(Rc<Upstream>, Option<Version>, Duration)> {
    let router = worker.router();
    let route = router.passthrough(name)?;
    let endpoint = router.pool(route.pool).pick(&worker.turns, clock::now_ms(), tried)?;
    let patience = route.desired.connect_timeout.unwrap_or(worker.config.timeouts.connect);
    Some((worker.upstreams.of(&endpoint.live), route.desired.proxy_protocol, patience))
}
