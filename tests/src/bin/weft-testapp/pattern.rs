//! Bytes that show when any are lost, repeated or exchanged: a block of a prime number of bytes,
//! over and over.

/// The block.
pub(crate) struct Pattern {
    /// Twice the block, so that any run of a block's length can be taken from it.
    bytes: Vec<u8>,
}

impl Pattern {
    pub(crate) fn new() -> Pattern {
        let mut state = 0x9e37_79b9_7f4a_7c15_u64;
        let block: Vec<u8> = std::iter::repeat_with(|| {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            state.to_le_bytes()[3]
        })
        .take(LENGTH)
        .collect();
        Pattern {
            bytes: block.repeat(2),
        }
    }

    /// Up to a block of the bytes from this place on.
    pub(crate) fn at(&self, place: u64, length: usize) -> &[u8] {
        let start = (place % LENGTH as u64) as usize;
        &self.bytes[start..start + length.min(LENGTH)]
    }

    /// Whether these are the bytes at this place.
    pub(crate) fn matches(&self, place: u64, bytes: &[u8]) -> bool {
        let mut at = place;
        bytes.chunks(LENGTH).all(|chunk| {
            let same = self.at(at, chunk.len()) == chunk;
            at += chunk.len() as u64;
            same
        })
    }
}

/// A prime near 128 KiB.
const LENGTH: usize = 131_071;
