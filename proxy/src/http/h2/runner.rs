//! Tasks that serve one stream after another. A task of its own for each stream
//! would be two allocations, a copy of all its state, and a timer to register.

use std::cell::{Cell, RefCell};
use std::future::poll_fn;
use std::rc::Rc;
use std::task::{Poll, Waker};

use bytes::Bytes;
use h2::RecvStream;
use h2::server::SendResponse;
use http::Request;
use tokio::time::Instant;

use crate::timer::Timer;

use super::{Http2, stream};

/// Tasks without a stream kept per worker (about 1.5 MiB); more of them end.
const KEPT: usize = 256;

/// A stream to serve.
pub(super) struct Work {
    pub(super) shared: Rc<Http2>,
    pub(super) request: Request<RecvStream>,
    pub(super) respond: SendResponse<Bytes>,
}

/// Where a task without a stream waits for one.
#[derive(Default)]
struct Seat {
    work: Cell<Option<Work>>,
    waker: RefCell<Option<Waker>>,
}

thread_local! {
    static FREE: RefCell<Vec<Rc<Seat>>> = const { RefCell::new(Vec::new()) };
}

/// Hands a stream to a task.
pub(super) fn serve(work: Work) {
    let Some(seat) = FREE.with_borrow_mut(Vec::pop) else {
        tokio::task::spawn_local(run(work));
        return;
    };
    seat.work.set(Some(work));
    if let Some(waker) = &*seat.waker.borrow() {
        waker.wake_by_ref();
    }
}

async fn run(mut work: Work) {
    let seat = Rc::new(Seat::default());
    let mut timer = Timer::new(Instant::now() + work.shared.worker.config.timeouts.read);
    loop {
        stream::serve(work, &mut timer).await;
        if !sit_down(&seat) {
            return;
        }
        work = poll_fn(|cx| match seat.work.take() {
            Some(work) => Poll::Ready(work),
            None => {
                let mut waker = seat.waker.borrow_mut();
                if !waker.as_ref().is_some_and(|w| w.will_wake(cx.waker())) {
                    *waker = Some(cx.waker().clone());
                }
                Poll::Pending
            }
        })
        .await;
    }
}

/// False: enough are waiting.
fn sit_down(seat: &Rc<Seat>) -> bool {
    FREE.with_borrow_mut(|free| {
        let room = free.len() < KEPT;
        if room {
            free.push(seat.clone());
        }
        room
    })
}
