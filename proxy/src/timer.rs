//! One timer per connection, armed lazily.
//!
//! A busy connection moves its deadline many times before one ever passes, so
//! the timer stays registered at the earliest moment it was asked for and
//! looks at the real deadline only when it fires. A warm request touches no
//! timer wheel at all.

use std::future::Future;
use std::pin::{Pin, pin};
use std::task::Poll;

use tokio::time::{Instant, Sleep, sleep_until};

/// The deadline passed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Late;

pub(crate) struct Timer {
    sleep: Pin<Box<Sleep>>,
    /// Polled since it was last set, so the task will be woken.
    registered: bool,
}

impl Timer {
    pub(crate) fn new(first: Instant) -> Timer {
        Timer { sleep: Box::pin(sleep_until(first)), registered: false }
    }

    /// Runs `future` until it is done or `deadline` has passed.
    pub(crate) async fn within<F: Future>(
        &mut self,
        deadline: Instant,
        future: F,
    ) -> Result<F::Output, Late> {
        let mut future = pin!(future);
        std::future::poll_fn(|cx| {
            if let Poll::Ready(output) = future.as_mut().poll(cx) {
                return Poll::Ready(Ok(output));
            }
            if deadline < self.sleep.deadline() {
                self.set(deadline);
            }
            loop {
                if self.registered && !self.sleep.is_elapsed() {
                    return Poll::Pending;
                }
                self.registered = true;
                match self.sleep.as_mut().poll(cx) {
                    Poll::Pending => return Poll::Pending,
                    Poll::Ready(()) if self.sleep.deadline() >= deadline => return Poll::Ready(Err(Late)),
                    Poll::Ready(()) => self.set(deadline),
                }
            }
        })
        .await
    }

    fn set(&mut self, deadline: Instant) {
        self.sleep.as_mut().reset(deadline);
        self.registered = false;
    }
}

#[cfg(test)]
mod tests {
    use std::future::pending;
    use std::time::Duration;

    use super::*;

    fn in_ms(ms: u64) -> Instant {
        Instant::now() + Duration::from_millis(ms)
    }

    #[tokio::test(start_paused = true)]
    async fn fires_at_the_deadline_even_when_armed_earlier_or_later() {
        for (armed, deadline) in [(10, 100), (100, 10), (10, 10)] {
            let start = Instant::now();
            let mut timer = Timer::new(in_ms(armed));
            assert_eq!(timer.within(in_ms(deadline), pending::<()>()).await, Err(Late));
            let took = start.elapsed().as_millis() as u64;
            assert!((deadline..=deadline + 2).contains(&took), "{armed} {deadline}: {took}");
        }
    }

    #[tokio::test(start_paused = true)]
    async fn can_be_used_again_after_it_fired() {
        let mut timer = Timer::new(in_ms(1));
        for _ in 0..3 {
            assert_eq!(timer.within(in_ms(5), pending::<()>()).await, Err(Late));
            assert_eq!(timer.within(in_ms(5), async { 7 }).await, Ok(7));
        }
    }
}
