//! Body bytes that were written to an endpoint, kept so that they can be written to the next.

use crate::buffer::Output;

/// Bounded: a body that does not fit is forgotten whole, and can then be sent only once.
pub(crate) struct Kept {
    bytes: Option<Output>,
    room: usize,
    /// Of `bytes`, how many the present endpoint has.
    written: usize,
    /// Bytes went by that are not here.
    forgotten: bool,
}

impl Kept {
    /// Keeps up to `room` bytes; 0 keeps none.
    pub(crate) fn new(room: usize) -> Kept {
        Kept { bytes: None, room, written: 0, forgotten: false }
    }

    /// These are on their way to the endpoint.
    pub(crate) fn add(&mut self, bytes: &[u8]) {
        if self.forgotten || bytes.is_empty() {
            return;
        }
        let kept = self.bytes.as_ref().map_or(0, |kept| kept.len());
        if kept + bytes.len() > self.room {
            debug_assert_eq!(self.written, kept, "what is to be written again is not forgotten");
            (self.bytes, self.written, self.forgotten) = (None, 0, true);
            return;
        }
        self.bytes.get_or_insert_with(Output::take).extend_from_slice(bytes);
        self.written += bytes.len();
    }

    /// Everything that was written is here.
    pub(crate) fn is_whole(&self) -> bool {
        !self.forgotten
    }

    /// The next endpoint has none of it.
    pub(crate) fn rewind(&mut self) {
        self.written = 0;
    }

    /// What the present endpoint has not got of what others had.
    pub(crate) fn unwritten(&self) -> &[u8] {
        self.bytes.as_ref().map_or(&[], |bytes| &bytes[self.written..])
    }

    /// The present endpoint got `n` bytes of [`Kept::unwritten`].
    pub(crate) fn wrote(&mut self, n: usize) {
        self.written += n;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn gives_back_what_it_was_given() {
        let mut kept = Kept::new(6);
        kept.add(b"abc");
        assert_eq!(kept.unwritten(), b"");
        kept.rewind();
        assert_eq!(kept.unwritten(), b"abc");
        kept.wrote(3);
        kept.add(b"def");
        assert!(kept.is_whole());
        kept.rewind();
        assert_eq!(kept.unwritten(), b"abcdef");
        kept.wrote(6);
        kept.add(b"g");
        assert!(!kept.is_whole());
        assert_eq!(kept.unwritten(), b"");
    }

    #[test]
    fn keeps_nothing_without_room() {
        let mut kept = Kept::new(0);
        kept.add(b"");
        assert!(kept.is_whole());
        kept.add(b"a");
        assert!(!kept.is_whole());
    }
}
