//! The allocator of tests that look at the heap of worker threads: the system's, and each of their calls
//! is told to `on_worker` of the test.
#![allow(unreachable_pub, reason = "as in the other files here")]

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;
use std::sync::atomic::{AtomicBool, Ordering::SeqCst};

/// Names of threads are asked for only while this is set, when no thread is being started: asking a
/// half-started one would take its name away. Threads not asked by then are not looked at.
pub static IDENTIFYING: AtomicBool = AtomicBool::new(false);

#[derive(Clone, Copy, PartialEq, Eq)]
enum Thread {
    Unknown,
    /// In here already.
    Busy,
    Worker,
    Other,
}

thread_local! {
    static THREAD: Cell<Thread> = const { Cell::new(Thread::Unknown) };
}

/// Bytes that a call takes from the heap, and gives back to it. A call that moves a block does both.
#[derive(Clone, Copy, Debug)]
pub struct Change {
    pub taken: Option<usize>,
    pub given: Option<usize>,
}

struct Watched;

#[global_allocator]
static ALLOCATOR: Watched = Watched;

// SAFETY: every call is passed to `System` unchanged; what looks at it touches a `Cell` and atomics only, and
// what it may allocate itself, to ask for a thread's name or to print, is passed on without being looked at.
unsafe impl GlobalAlloc for Watched {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        saw(Some(layout.size()), None);
        // SAFETY: the caller's contract is `System`'s.
        unsafe { System.alloc(layout) }
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        saw(Some(layout.size()), None);
        // SAFETY: the caller's contract is `System`'s.
        unsafe { System.alloc_zeroed(layout) }
    }

    unsafe fn realloc(&self, pointer: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        saw(Some(size), Some(layout.size()));
        // SAFETY: the caller's contract is `System`'s.
        unsafe { System.realloc(pointer, layout, size) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        saw(None, Some(layout.size()));
        // SAFETY: the caller's contract is `System`'s.
        unsafe { System.dealloc(pointer, layout) }
    }
}

fn saw(taken: Option<usize>, given: Option<usize>) {
    // A thread that ends has no locals any more, and is no worker: those live on.
    let Ok(mut thread) = THREAD.try_with(|thread| thread.replace(Thread::Busy)) else { return };
    if thread == Thread::Unknown && IDENTIFYING.load(SeqCst) {
        let worker = std::thread::current().name().is_some_and(|name| name.starts_with("lockgate-"));
        thread = if worker { Thread::Worker } else { Thread::Other };
    }
    if thread == Thread::Worker {
        super::on_worker(Change { taken, given });
    }
    THREAD.set(thread);
}
