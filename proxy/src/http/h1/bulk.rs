//! The rest of a large body of known length between two plaintext connections:
//! it is spliced, so its bytes never enter this process.

use std::future::poll_fn;
use std::task::Poll;

use tokio::net::TcpStream;

use crate::clock;

use crate::conn::Conn;
use crate::http::exchange::{Order, Source};
use crate::splice::{Splice, SpliceError};
use crate::timer::{Late, Timer};

use super::body::Incoming;
use super::relay::FromClient;

/// The rule's time for the whole request is over.
const OVERDUE: &str = "request timed out within a response body";

/// From here on two splices cost less than what they save in copying.
const WORTH: u64 = 16 << 10;

/// Whether the bytes that are left of a body can go this way, and the two sockets.
pub(super) fn sockets<'c>(
    body: &Incoming,
    source: &'c FromClient<'_>,
    endpoint: &'c Conn,
) -> Option<(u64, &'c TcpStream, &'c TcpStream)> {
    match (body, endpoint, &*source.conn) {
        (&Incoming::Length(left), Conn::Plain(from), Conn::Plain(to))
            if left >= WORTH && !source.is_active() =>
        {
            Some((left, from, to))
        }
        _ => None,
    }
}

/// Moves up to `left` bytes and adds them to `moved`, from 0; fewer if this worker has
/// no pipe: the rest is to be copied. The error says why the body is cut short.
#[expect(clippy::manual_async_fn, reason = "an async fn would hold its arguments twice")]
pub(super) fn splice(
    order: &Order<'_>,
    timer: &mut Timer,
    (left, from, to): (u64, &TcpStream, &TcpStream),
    moved: &mut u64,
) -> impl Future<Output = Result<(), &'static str>> {
    async move {
        let mut splice = Splice::new();
        while *moved < left {
            order.in_time().map_err(|_| OVERDUE)?;
            let waiting_for_client = splice.held() > 0;
            let deadline = match waiting_for_client {
                true => order.bounded(clock::now() + order.worker.config.timeouts.client),
                false => order.read_deadline(),
            };
            let step = poll_fn(|cx| match splice.poll(cx, from, to, left - *moved) {
                // Another deadline holds from here on.
                Poll::Pending if (splice.held() > 0) != waiting_for_client => Poll::Ready(None),
                polled => polled.map(Some),
            });
            match timer.within(deadline, step).await {
                Ok(None) => {}
                Ok(Some(Ok(0))) => return Err("endpoint closed the connection within a response body"),
                Ok(Some(Ok(n))) => *moved += n as u64,
                Ok(Some(Err(SpliceError::NoPipe))) => break,
                Ok(Some(Err(SpliceError::Source(_)))) => return Err("connection to the endpoint broke"),
                Ok(Some(Err(SpliceError::Destination(_)))) => return Err("client closed the connection"),
                Err(Late) if order.is_overdue() => return Err(OVERDUE),
                Err(Late) if waiting_for_client => return Err("client took too long"),
                Err(Late) => return Err("endpoint timed out within a response body"),
            }
        }
        Ok(())
    }
}
