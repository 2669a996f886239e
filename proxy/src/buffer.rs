//! Buffers that a connection owns only while bytes are in motion.
//!
//! Each worker thread keeps a free list; an idle connection holds none.

use std::cell::RefCell;

use bytes::{Bytes, BytesMut};

/// Bytes a fresh buffer holds: one TLS record, and most requests whole.
pub(crate) const BUFFER_BYTES: usize = 16 << 10;

/// Most heads fit, and a small body behind them; what is larger grows its output.
const OUTPUT_BYTES: usize = 4 << 10;

/// Free buffers kept per worker (16 MiB); more are given back to the allocator.
const KEPT: usize = 1024;

/// A block that small pieces of shared bytes are cut from. What waits for a slow
/// client keeps the whole of its block: no more than a buffer would be.
const BLOCK: usize = BUFFER_BYTES;

/// Larger pieces get storage of their own.
const SMALL: usize = 4 << 10;

thread_local! {
    static BLOCKS: RefCell<BytesMut> = RefCell::default();
    static FREE: RefCell<Vec<Vec<u8>>> = const { RefCell::new(Vec::new()) };
    static SPARE: RefCell<Vec<Vec<u8>>> = const { RefCell::new(Vec::new()) };
}

/// Bytes `start..end` are filled, the rest is room. Returns to the free list when dropped.
pub(crate) struct Buffer {
    bytes: Vec<u8>,
    start: usize,
    end: usize,
}

impl Buffer {
    /// Owns no storage until it is about to be filled.
    pub(crate) fn new() -> Buffer {
        Buffer { bytes: Vec::new(), start: 0, end: 0 }
    }

    pub(crate) fn has_storage(&self) -> bool {
        !self.bytes.is_empty()
    }

    pub(crate) fn acquire(&mut self) {
        if self.bytes.is_empty() {
            self.bytes = FREE.with_borrow_mut(Vec::pop).unwrap_or_else(|| vec![0; BUFFER_BYTES]);
        }
    }

    /// Gives the storage back if nothing is in it.
    pub(crate) fn release(&mut self) {
        if !self.is_empty() || self.bytes.is_empty() {
            return;
        }
        self.clear();
        let bytes = std::mem::take(&mut self.bytes);
        // A grown buffer served one unusual message; the free list stays uniform.
        if bytes.len() != BUFFER_BYTES {
            return;
        }
        FREE.with_borrow_mut(|free| {
            if free.len() < KEPT {
                free.push(bytes);
            }
        });
    }

    pub(crate) fn filled(&self) -> &[u8] {
        &self.bytes[self.start..self.end]
    }

    pub(crate) fn filled_mut(&mut self) -> &mut [u8] {
        &mut self.bytes[self.start..self.end]
    }

    pub(crate) fn len(&self) -> usize {
        self.end - self.start
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.start == self.end
    }

    /// Room behind the filled part.
    pub(crate) fn room(&mut self) -> &mut [u8] {
        &mut self.bytes[self.end..]
    }

    pub(crate) fn advance(&mut self, filled: usize) {
        self.end += filled;
        debug_assert!(self.end <= self.bytes.len());
    }

    /// Forgets the first `n` filled bytes.
    pub(crate) fn consume(&mut self, n: usize) {
        self.start += n;
        debug_assert!(self.start <= self.end);
        if self.start == self.end {
            self.clear();
        }
    }

    pub(crate) fn clear(&mut self) {
        self.start = 0;
        self.end = 0;
    }

    /// Makes room for at least one more byte: by moving the filled part to the
    /// front, then by doubling up to `limit` bytes. False when `limit` is reached.
    pub(crate) fn make_room(&mut self, limit: usize) -> bool {
        if self.end < self.bytes.len() {
            return true;
        }
        if self.start > 0 {
            self.bytes.copy_within(self.start..self.end, 0);
            self.end -= self.start;
            self.start = 0;
            return true;
        }
        if self.bytes.len() >= limit {
            return false;
        }
        let grown = (self.bytes.len() * 2).min(limit);
        self.bytes.resize(grown, 0);
        true
    }
}

/// A copy that can be shared and handed on; small ones are cut from a common block.
pub(crate) fn share(bytes: &[u8]) -> Bytes {
    if bytes.len() > SMALL {
        return Bytes::copy_from_slice(bytes);
    }
    BLOCKS.with_borrow_mut(|block| {
        if block.capacity() < bytes.len() {
            // Takes the old block's storage if nobody holds a piece of it any more.
            block.reserve(BLOCK);
        }
        block.extend_from_slice(bytes);
        block.split().freeze()
    })
}

/// A head being written. Its storage comes from the worker's free list too.
pub(crate) struct Output(Vec<u8>);

impl Output {
    pub(crate) fn take() -> Output {
        Output(SPARE.with_borrow_mut(Vec::pop).unwrap_or_else(|| Vec::with_capacity(OUTPUT_BYTES)))
    }
}

impl std::ops::Deref for Output {
    type Target = Vec<u8>;
    fn deref(&self) -> &Vec<u8> {
        &self.0
    }
}

impl std::ops::DerefMut for Output {
    fn deref_mut(&mut self) -> &mut Vec<u8> {
        &mut self.0
    }
}

impl Drop for Output {
    fn drop(&mut self) {
        let mut bytes = std::mem::take(&mut self.0);
        if bytes.capacity() > BUFFER_BYTES {
            return;
        }
        bytes.clear();
        SPARE.with_borrow_mut(|spare| {
            if spare.len() < KEPT {
                spare.push(bytes);
            }
        });
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        self.clear();
        self.release();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn grows_to_its_limit_and_not_beyond() {
        let mut buffer = Buffer::new();
        buffer.acquire();
        let limit = BUFFER_BYTES * 2;
        loop {
            let room = buffer.room().len();
            buffer.advance(room);
            if !buffer.make_room(limit) {
                break;
            }
        }
        assert_eq!(buffer.len(), limit);
    }

    #[test]
    fn making_room_keeps_what_is_filled() {
        let mut buffer = Buffer::new();
        buffer.acquire();
        let room = buffer.room().len();
        buffer.room().fill(b'x');
        buffer.advance(room);
        buffer.consume(10);
        assert!(buffer.make_room(BUFFER_BYTES));
        assert_eq!(buffer.len(), BUFFER_BYTES - 10);
        assert!(buffer.filled().iter().all(|&b| b == b'x'));
    }

    #[test]
    fn returns_to_the_free_list() {
        FREE.with_borrow_mut(Vec::clear);
        let mut buffer = Buffer::new();
        assert!(!buffer.has_storage());
        buffer.acquire();
        buffer.release();
        assert_eq!(FREE.with_borrow(Vec::len), 1);
        buffer.acquire();
        assert_eq!(FREE.with_borrow(Vec::len), 0);
        drop(buffer);
        assert_eq!(FREE.with_borrow(Vec::len), 1);
    }
}
