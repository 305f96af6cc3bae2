//! Large buffers, lent by the worker thread for as long as bytes move: an idle flow has none.

use std::cell::RefCell;
use std::ops::Range;

use super::frame;
use super::record;

/// Bytes from `start` to `end` of a buffer that is large while many come and small, or not there, in
/// between.
#[derive(Debug, Default)]
pub struct Buffer {
    bytes: Box<[u8]>,
    start: usize,
    end: usize,
}

impl Buffer {
    /// With some bytes.
    pub fn holding(bytes: Vec<u8>) -> Self {
        Self {
            start: 0,
            end: bytes.len(),
            bytes: bytes.into_boxed_slice(),
        }
    }

    /// Where the bytes are.
    pub fn range(&self) -> Range<usize> {
        self.start..self.end
    }

    /// How many there are.
    pub fn len(&self) -> usize {
        self.end - self.start
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.start == self.end
    }

    /// The bytes.
    pub fn filled(&self) -> &[u8] {
        &self.bytes[self.start..self.end]
    }

    /// All of the buffer, by the positions of [`Self::range`].
    pub fn all(&mut self) -> &mut [u8] {
        &mut self.bytes
    }

    /// All of the buffer.
    pub fn all_ref(&self) -> &[u8] {
        &self.bytes
    }

    /// The room behind the bytes.
    pub fn room(&mut self) -> &mut [u8] {
        &mut self.bytes[self.end..]
    }

    /// So many bytes were written into the room.
    pub fn filled_up(&mut self, count: usize) {
        self.end = (self.end + count).min(self.bytes.len());
    }

    /// So many bytes are done with.
    pub fn advance(&mut self, count: usize) {
        self.start = (self.start + count).min(self.end);
        if self.start == self.end {
            self.start = 0;
            self.end = 0;
        }
    }

    /// Makes it large, the bytes at its front.
    pub fn enlarge(&mut self) {
        if self.bytes.len() == BUFFER_BYTES {
            self.bytes.copy_within(self.start..self.end, 0);
        } else {
            let mut large = borrow();
            large[..self.len()].copy_from_slice(self.filled());
            self.bytes = large;
        }
        self.end = self.len();
        self.start = 0;
    }

    /// Gives a large buffer back if what it holds fits into a small one.
    pub fn shrink(&mut self) {
        if self.bytes.len() != BUFFER_BYTES {
            if self.is_empty() {
                self.bytes = Box::default();
            }
            return;
        }
        if self.len() > MOST_KEPT_BYTES {
            return;
        }
        let kept: Box<[u8]> = self.filled().into();
        self.end = kept.len();
        self.start = 0;
        give_back(std::mem::replace(&mut self.bytes, kept));
    }

    /// The same where bytes in `used` are still needed, which were counted as done with and lie before
    /// the others. Says whether everything lies so much further to the front now as `used` began.
    pub fn shrink_to(&mut self, used: Range<usize>) -> bool {
        let first = used.start;
        let all = first..self.end.max(used.end);
        let is_behind = self.is_empty() || first <= self.start;
        if self.bytes.len() != BUFFER_BYTES || !is_behind || all.len() > MOST_KEPT_BYTES {
            return false;
        }
        let kept: Box<[u8]> = self.bytes[all].into();
        self.start = self.start.saturating_sub(first);
        self.end = self.end.saturating_sub(first);
        give_back(std::mem::replace(&mut self.bytes, kept));
        true
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        if self.bytes.len() == BUFFER_BYTES {
            give_back(std::mem::take(&mut self.bytes));
        }
    }
}

fn borrow() -> Box<[u8]> {
    let spare = SPARE.try_with(|spare| spare.borrow_mut().pop());
    spare
        .ok()
        .flatten()
        .unwrap_or_else(|| vec![0; BUFFER_BYTES].into_boxed_slice())
}

fn give_back(buffer: Box<[u8]>) {
    // Gone when the thread ends, and the buffer with it.
    let _ = SPARE.try_with(|spare| {
        let mut spare = spare.borrow_mut();
        if spare.len() < MOST_SPARE {
            spare.push(buffer);
        }
    });
}

thread_local! {
    static SPARE: RefCell<Vec<Box<[u8]>>> = const { RefCell::new(Vec::new()) };
}

/// A record with the most text.
pub const RECORD_BYTES: usize =
    record::HEAD_BYTES + frame::HEAD_BYTES + frame::MOST_DATA_BYTES + record::TAIL_BYTES;
/// So many full records are read or written at a time.
pub const RECORDS: usize = 8;
/// Leaves room for control frames beside full records.
pub const BUFFER_BYTES: usize = RECORDS * RECORD_BYTES + 2048;
const MOST_KEPT_BYTES: usize = 20 * 1024;
/// Buffers that a thread keeps for the next who need one.
const MOST_SPARE: usize = 4;
