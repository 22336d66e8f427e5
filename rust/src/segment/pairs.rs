//! Which two neighbours merge: the merge list, and a table for the inner loop.

use serde::{Deserialize, Serialize};

use super::NONE;

/// One row of the merge list.
#[derive(Debug, Clone, Copy, Serialize, Deserialize)]
pub(super) struct Merge {
    pub left: u32,
    pub right: u32,
    pub rank: u32,
    pub merged: u32,
}

/// (left, right) to (rank, merged id): open addressing with linear probing, at most half full.
#[derive(Debug, Clone)]
pub(super) struct PairTable {
    slots: Vec<Slot>,
    shift: u32,
}

#[derive(Debug, Clone, Copy)]
struct Slot {
    pair: u64,
    rank: u32,
    merged: u32,
}

/// Both halves `NONE`: no merge has it.
const FREE: Slot = Slot {
    pair: u64::MAX,
    rank: NONE,
    merged: NONE,
};

impl PairTable {
    pub fn new(merges: &[Merge]) -> Self {
        let size = (2 * merges.len()).next_power_of_two().max(2);
        let mut table = Self {
            slots: vec![FREE; size],
            shift: 64 - size.trailing_zeros(),
        };
        for merge in merges {
            let pair = pair(merge.left, merge.right);
            let at = table.find(pair);
            // Of a pair that is listed twice, the later rank counts (as in Hugging Face's map).
            table.slots[at] = Slot {
                pair,
                rank: merge.rank,
                merged: merge.merged,
            };
        }
        table
    }

    /// The slot that holds `pair`, or the free one where it would go.
    fn find(&self, pair: u64) -> usize {
        let mask = self.slots.len() - 1;
        let mut at = (pair.wrapping_mul(0x9E37_79B9_7F4A_7C15) >> self.shift) as usize;
        while self.slots[at].pair != pair && self.slots[at].pair != u64::MAX {
            at = (at + 1) & mask;
        }
        at
    }

    /// The rank and the merged id; `NONE` twice where the two do not merge.
    pub fn get(&self, left: u32, right: u32) -> (u32, u32) {
        let slot = self.slots[self.find(pair(left, right))];
        (slot.rank, slot.merged)
    }
}

fn pair(left: u32, right: u32) -> u64 {
    u64::from(left) << 32 | u64::from(right)
}
