//! A request that takes long is sent once more, elsewhere; the first answer wins.
//!
//! Only what can be sent twice without harm and has no body, and only for
//! rules that ask for it: no other request passes through here.

use std::future::{Future, poll_fn};
use std::pin::{Pin, pin};
use std::rc::Rc;
use std::task::Poll;
use std::time::Duration;

use tokio::time::Instant;

use crate::buffer::Buffer;
use crate::resilience::Hedge;
use crate::timer::{Late, Timer};
use crate::upstream::{InFlight, Peer, Upstream};

use super::attempts::{Chosen, Course, Lost};
use super::exchange::{Failure, Order, Sent, Source};
use super::record::Record;

/// An endpoint that has begun to answer.
struct Begun {
    peer: Peer,
    /// What came first; not empty.
    answer: Buffer,
    reused: bool,
    connected: Instant,
}

/// What came of the race; the bool is set if that was the second copy.
enum Race {
    Won(Begun, bool),
    /// Both lost, or the first before there was a second.
    Lost(Lost, bool),
    Gone,
}

impl Order<'_> {
    /// After what time a second copy is sent. `None`: there will be none.
    pub(crate) fn hedge_delay(&self, course: &Course) -> Option<Duration> {
        let hedge = self.resilience()?.hedge?;
        if !self.idempotent || !self.bodiless || !course.is_first() {
            return None;
        }
        match hedge {
            Hedge::After(delay) => Some(delay),
            Hedge::P95 => self.worker.delays.p95(self.slot()),
        }
    }

    /// As an attempt, with another beside it when `upstream` has not begun to
    /// answer after `delay`. `upstream` becomes the one whose outcome this is.
    pub(crate) async fn hedged<S: Source>(
        &self,
        sent: &mut Sent<'_, S>,
        course: &mut Course,
        upstream: &mut Rc<Upstream>,
        busy: InFlight,
        delay: Duration,
    ) -> Result<(Peer, u16), Lost> {
        let first = upstream.clone();
        let mut second = first.clone();
        let began = Instant::now();
        course.since = Some(began);
        let raced = {
            let copy = pin!(self.copy(&first, busy, sent.head));
            self.race(sent, course, copy, &first, &mut second, delay).await
        };
        let Sent { timer, source, answer, record, .. } = sent;
        // The other copy is gone by now, and its connection with it.
        let Begun { mut peer, answer: begun, reused, connected } = match raced {
            Race::Gone => {
                let failure = Failure::Client;
                return Err(Lost::Failed {
                    failure,
                    sent: true,
                    stale: false,
                    counts: false,
                    repeatable: false,
                });
            }
            Race::Lost(lost, of_second) => {
                *upstream = if of_second { second } else { first };
                course.fresh_only |= matches!(lost, Lost::Failed { stale: true, .. });
                return Err(lost);
            }
            Race::Won(begun, false) => begun,
            Race::Won(begun, true) => {
                self.worker.metrics.hedges_won.inc();
                // It may have taken longer still, but no less.
                self.took(&first, began.elapsed());
                *upstream = second;
                begun
            }
        };
        **answer = begun;
        record.upstream = Some(upstream.live.address);
        (record.connected, record.first_byte) = (Some(connected), Some(Instant::now()));
        match self.await_head(timer, *source, &mut peer.conn, answer, record).await {
            Ok(status) => Ok((peer, status)),
            Err(failure) => Err(self.lost_on(upstream, course, failure, reused, source.is_repeatable())),
        }
    }

    async fn race<S: Source>(
        &self,
        sent: &mut Sent<'_, S>,
        course: &mut Course,
        mut one: Pin<&mut impl Future<Output = Result<Begun, Lost>>>,
        first: &Rc<Upstream>,
        second: &mut Rc<Upstream>,
        delay: Duration,
    ) -> Race {
        let head = sent.head;
        let Sent { timer, source, record, .. } = sent;
        let alone = poll_fn(|cx| match one.as_mut().poll(cx) {
            Poll::Ready(done) => Poll::Ready(Some(done)),
            Poll::Pending => source.poll_gone(cx).map(|()| None),
        });
        match timer.within(Instant::now() + delay, alone).await {
            Ok(Some(Ok(begun))) => return Race::Won(begun, false),
            Ok(Some(Err(lost))) => return Race::Lost(lost, false),
            Ok(None) => return Race::Gone,
            Err(Late) => {}
        }
        let busy = self.beside(course, first, record).map(|chosen| {
            *second = chosen.upstream;
            chosen.busy
        });
        let (first, second) = (&**first, &*second);
        let mut two = pin!(busy.map(|busy| self.copy(second, busy, head)));
        let mut running = [true, two.is_some()];
        poll_fn(|cx| {
            for of_second in [false, true] {
                let polled = match of_second {
                    _ if !running[usize::from(of_second)] => continue,
                    false => one.as_mut().poll(cx),
                    true => two.as_mut().as_pin_mut().map_or(Poll::Pending, |two| two.poll(cx)),
                };
                match polled {
                    Poll::Pending => {}
                    Poll::Ready(Ok(begun)) => return Poll::Ready(Race::Won(begun, of_second)),
                    Poll::Ready(Err(lost)) if !running[usize::from(!of_second)] => {
                        return Poll::Ready(Race::Lost(lost, of_second));
                    }
                    Poll::Ready(Err(lost)) => {
                        running[usize::from(of_second)] = false;
                        self.lost_beside(if of_second { second } else { first }, &lost);
                    }
                }
            }
            source.poll_gone(cx).map(|()| Race::Gone)
        })
        .await
    }

    /// Sends one copy, and waits for the first of an answer to it.
    async fn copy(&self, upstream: &Upstream, busy: InFlight, head: &[u8]) -> Result<Begun, Lost> {
        let mut timer = Timer::new(self.read_deadline());
        let (mut peer, reused) = self.connected(&mut timer, upstream, false).await?;
        let connected = Instant::now();
        peer.occupy(busy);
        let mut answer = Buffer::new();
        // A failed write is not the end: the endpoint may have answered before it hung up.
        let sent = timer.within(self.send_deadline(), peer.conn.send([head, &[], &[]])).await;
        let failure = match sent {
            Err(Late) => self.late(),
            Ok(_) => {
                let read = poll_fn(|cx| peer.conn.poll_fill(cx, &mut answer));
                match timer.within(self.read_deadline(), read).await {
                    Ok(Ok(1..)) => return Ok(Begun { peer, answer, reused, connected }),
                    Ok(_) => Failure::Endpoint("endpoint closed the connection"),
                    Err(Late) => self.late(),
                }
            }
        };
        let stale = reused && matches!(failure, Failure::Endpoint(_));
        if stale {
            self.worker.upstreams.discard_idle(upstream);
        }
        Err(Lost::Failed { failure, sent: true, stale, counts: !stale, repeatable: true })
    }

    /// The endpoint of a second copy, if there may be one.
    fn beside(&self, course: &mut Course, first: &Upstream, record: &mut Record) -> Option<Chosen> {
        let chosen = self.another(course, first, record)?;
        self.worker.metrics.hedges.inc();
        Some(chosen)
    }

    /// A copy failed while the other is under way.
    fn lost_beside(&self, upstream: &Upstream, lost: &Lost) {
        match lost {
            Lost::Full(limit) => self.worker.metrics.passed_over(*limit),
            Lost::Failed { failure: Failure::Endpoint(_) | Failure::Late, counts: true, .. } => {
                self.failed(upstream);
            }
            Lost::Failed { .. } => {}
        }
    }
}
