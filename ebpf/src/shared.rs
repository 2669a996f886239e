//! An array map in this process's memory: what is written is in the kernel's map at once, without a system call.

use std::io;
use std::marker::PhantomData;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::ptr::{NonNull, null_mut};
use std::sync::atomic::{AtomicU64, Ordering, fence};

use rustix::mm::{MapFlags, ProtFlags, mmap, munmap};

use crate::sys::{Plain, map_info};

/// A mapped array. Only this process writes it, save fields that are the programs' own; programs read at any
/// time, so nothing here makes a reference into it.
pub struct SharedArray<T: Plain> {
    at: NonNull<T>,
    len: u32,
    map: OwnedFd,
    elements: PhantomData<T>,
}

// SAFETY: the memory is the kernel's, shared by design; all access is through `&mut self` or by copies.
unsafe impl<T: Plain> Send for SharedArray<T> {}

impl<T: Plain> SharedArray<T> {
    /// The kernel's elements lie 8 bytes apart, or a multiple.
    const STRIDE: () = assert!(size_of::<T>().is_multiple_of(8));

    /// Maps the whole of `map`, an array made with `BPF_F_MMAPABLE`. `InvalidData` when its elements are of
    /// another size: another layout's.
    pub fn new(map: OwnedFd) -> io::Result<Self> {
        let () = Self::STRIDE;
        let info = map_info(map.as_fd())?;
        if info.value_size as usize != size_of::<T>() {
            return Err(io::Error::new(io::ErrorKind::InvalidData, "the pinned map has another layout"));
        }
        let length = info.max_entries as usize * size_of::<T>();
        // SAFETY: a new mapping where the kernel wants it touches no memory of ours.
        let at = unsafe {
            mmap(null_mut(), length, ProtFlags::READ | ProtFlags::WRITE, MapFlags::SHARED, &map, 0)
        }?;
        let at = NonNull::new(at.cast()).ok_or(io::ErrorKind::OutOfMemory)?;
        Ok(Self { at, len: info.max_entries, map, elements: PhantomData })
    }

    /// Elements there is room for.
    pub fn len(&self) -> u32 {
        self.len
    }

    /// Whether there is room for none.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// The map's descriptor.
    pub fn map(&self) -> BorrowedFd<'_> {
        self.map.as_fd()
    }

    /// A copy of the element at `index`; `None` beyond the end.
    pub fn read(&self, index: u32) -> Option<T> {
        let at = self.place(index, 1)?;
        // SAFETY: `place` says that it is inside; every pattern of bits is valid. Programs write single fields
        // at most, which a volatile read may see before or after.
        Some(unsafe { at.read_volatile() })
    }

    /// Writes `values` from `base` on; false, and nothing, if they reach beyond the end. Nobody may be reading
    /// these elements.
    #[must_use]
    pub fn write(&mut self, base: u32, values: &[T]) -> bool {
        let Some(at) = self.place(base, values.len()) else { return false };
        // SAFETY: `place` says that all are inside, and `values` cannot overlap the mapping, to which there are no
        // references.
        unsafe { at.copy_from_nonoverlapping(values.as_ptr(), values.len()) };
        true
    }

    /// Stores 8 bytes of the element at `index`, `offset` bytes into it, after everything written before: a
    /// program that loads them sees that too. False beyond the end.
    ///
    /// # Panics
    /// When `offset` is not one of an aligned word inside an element.
    #[must_use]
    pub fn commit(&mut self, index: u32, offset: usize, word: u64) -> bool {
        assert!(offset.is_multiple_of(8) && offset + 8 <= size_of::<T>(), "a word of the element");
        let Some(at) = self.place(index, 1) else { return false };
        fence(Ordering::Release);
        // SAFETY: inside the element, and aligned: the mapping begins a page, elements are multiples of 8 bytes.
        // Programs only load it.
        unsafe { AtomicU64::from_ptr(at.byte_add(offset).cast()) }.store(word, Ordering::Release);
        true
    }

    /// Stores one field, of 1, 2 or 4 bytes at `offset` in the element at `index`, which programs may be reading.
    /// False beyond the end.
    ///
    /// # Panics
    /// When no aligned field of this size is there.
    #[must_use]
    pub fn store<F: Plain>(&mut self, index: u32, offset: usize, value: F) -> bool {
        assert!(
            size_of::<F>() <= 8 && offset.is_multiple_of(align_of::<F>()),
            "a field one instruction stores"
        );
        assert!(offset + size_of::<F>() <= size_of::<T>(), "a field of the element");
        let Some(at) = self.place(index, 1) else { return false };
        fence(Ordering::Release);
        // SAFETY: inside the element and aligned, for elements are multiples of 8 bytes from a page on. Volatile:
        // one store, for its size.
        unsafe { at.byte_add(offset).cast::<F>().write_volatile(value) };
        true
    }

    fn place(&self, index: u32, count: usize) -> Option<*mut T> {
        let end = (index as usize).checked_add(count)?;
        // SAFETY: `index` is at most the mapping's length.
        (end <= self.len as usize).then(|| unsafe { self.at.as_ptr().add(index as usize) })
    }
}

impl<T: Plain> Drop for SharedArray<T> {
    fn drop(&mut self) {
        let length = self.len as usize * size_of::<T>();
        // SAFETY: the mapping `new` made, of the same length; nothing refers to it any more.
        if let Err(error) = unsafe { munmap(self.at.as_ptr().cast(), length) } {
            debug_assert!(false, "munmap of our own mapping: {error}");
        }
    }
}
