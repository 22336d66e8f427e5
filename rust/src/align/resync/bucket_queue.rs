//! A queue of entries by cost, with a bucket for each cost.

/// Skipped bytes at which a search gives up.
pub(super) const MAX_COST: usize = 256;

/// Entries by their key: pops the smallest, of equals the latest.
pub(super) struct BucketQueue {
    first: [u16; MAX_COST],
    occupied: [u64; MAX_COST / 64],
}

/// No entry.
pub(super) const NONE: u16 = u16::MAX;

impl Default for BucketQueue {
    fn default() -> Self {
        Self {
            first: [NONE; MAX_COST],
            occupied: [0; MAX_COST / 64],
        }
    }
}

impl BucketQueue {
    pub(super) fn clear(&mut self) {
        self.occupied = [0; MAX_COST / 64];
    }

    /// Adds an entry and gives the one that follows it among those of the same key.
    #[inline]
    pub(super) fn push(&mut self, key: usize, entry: u16) -> u16 {
        let (word, bit) = (key / 64, 1 << (key % 64));
        let next = if self.occupied[word] & bit == 0 {
            NONE
        } else {
            self.first[key]
        };
        self.occupied[word] |= bit;
        self.first[key] = entry;
        next
    }

    /// The entry with the smallest key; `next_of` knows what [`BucketQueue::push`] gave for each.
    #[inline]
    pub(super) fn pop(&mut self, next_of: impl Fn(u16) -> u16) -> Option<u16> {
        let word = self.occupied.iter().position(|&word| word != 0)?;
        let bit = self.occupied[word].trailing_zeros() as usize;
        let key = word * 64 + bit;
        let entry = self.first[key];
        let next = next_of(entry);
        if next == NONE {
            self.occupied[word] &= !(1 << bit);
        } else {
            self.first[key] = next;
        }
        Some(entry)
    }
}

const _: () = assert!(MAX_COST.is_multiple_of(64));
