//! An upgraded connection: bytes both ways until both sides have ended.

use crate::buffer::Buffer;
use crate::conn::Conn;
use crate::relay;
use crate::timer::Timer;
use crate::upstream::Peer;
use crate::worker::Worker;

/// Relays until both directions have ended, one breaks, or neither speaks for too long.
/// `from_client` and `from_endpoint` are bytes already read.
pub(crate) async fn run(
    worker: &Worker,
    mut client: Conn,
    mut peer: Peer,
    from_client: Buffer,
    from_endpoint: Buffer,
    mut timer: Timer,
) {
    worker.metrics.tunnels_open.inc();
    let (idle, endpoint) = (worker.config.timeouts.tunnel, &mut peer.conn);
    relay::run(&mut client, endpoint, from_client, from_endpoint, &mut timer, idle, |_, _| {}).await;
    worker.metrics.tunnels_open.dec();
}
