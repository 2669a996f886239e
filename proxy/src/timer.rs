//! One timer per connection, armed lazily.
//!
//! A busy connection moves its deadline many times before one ever passes, so
//! the timer stays registered at the earliest moment it was asked for and
//! looks at the real deadline only when it fires. A warm request touches no
//! timer wheel at all.

use std::future::Future;
use std::pin::Pin;
use std::task::{Context, Poll};

use pin_project_lite::pin_project;
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
    pub(crate) fn within<F: Future>(&mut self, deadline: Instant, future: F) -> Within<'_, F> {
        Within { timer: self, deadline, future }
    }

    /// Ready when the deadline has passed.
    fn poll(&mut self, cx: &mut Context<'_>, deadline: Instant) -> Poll<()> {
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
                Poll::Ready(()) if self.sleep.deadline() >= deadline => return Poll::Ready(()),
                Poll::Ready(()) => self.set(deadline),
            }
        }
    }

    fn set(&mut self, deadline: Instant) {
        self.sleep.as_mut().reset(deadline);
        self.registered = false;
    }
}

pin_project! {
    /// See [`Timer::within`]. Not an `async fn`, which would hold the future twice.
    pub(crate) struct Within<'t, F> {
        timer: &'t mut Timer,
        deadline: Instant,
        #[pin]
        future: F,
    }
}

impl<F: Future> Future for Within<'_, F> {
    type Output = Result<F::Output, Late>;

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        let this = self.project();
        match this.future.poll(cx) {
            Poll::Ready(output) => Poll::Ready(Ok(output)),
            Poll::Pending => this.timer.poll(cx, *this.deadline).map(|()| Err(Late)),
        }
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
