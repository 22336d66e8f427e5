//! The masses of one position while it is built.

use super::NONE;
use super::rows::sum;

/// Masses by key, in order of first use; array by array, as they are read so.
#[derive(Debug)]
pub(super) struct Masses {
    /// Open addressing, mostly empty: the place of a key above `base`; anything below is of an
    /// earlier use. Small enough for the nearest cache, as keys are anywhere.
    slots: Vec<u32>,
    shift: u32,
    base: u32,
    /// Number of keys; the next four are longer.
    count: usize,
    keys: Vec<u32>,
    masses: Vec<f64>,
    starts: Vec<i32>,
    ends: Vec<i32>,
    /// The places of the keys that have none.
    pub bare: Vec<u32>,
    pub tail: f64,
}

const FIRST_BITS: u32 = 11;

fn slot_of(key: u32, shift: u32) -> usize {
    (key.wrapping_mul(0x9E37_79B9) >> shift) as usize
}

impl Masses {
    pub fn new() -> Self {
        Self {
            slots: vec![0; 1 << FIRST_BITS],
            shift: u32::BITS - FIRST_BITS,
            base: 1,
            count: 0,
            keys: Vec::new(),
            masses: Vec::new(),
            starts: Vec::new(),
            ends: Vec::new(),
            bare: Vec::new(),
            tail: 0.0,
        }
    }

    pub fn clear(&mut self) {
        self.base += self.count as u32;
        if self.base > u32::MAX / 2 {
            self.slots.fill(0);
            self.base = 1;
        }
        self.count = 0;
        self.bare.clear();
        self.tail = 0.0;
    }

    /// Adds to the mass of a key, whose tokens are `range`; [`NONE`] is the tail.
    pub fn add(&mut self, key: u32, mass: f64, range: (u32, u32)) {
        match key {
            NONE => self.tail += mass,
            key => {
                self.add_all(1, std::iter::once((key, mass, range)));
            }
        }
    }

    /// As [`Masses::add`], of at most so many at once, none of them of the tail.
    #[inline]
    pub fn add_all(&mut self, most: usize, new: impl Iterator<Item = (u32, f64, (u32, u32))>) {
        let most = self.count + most;
        if most > self.keys.len() {
            self.grow(most);
        }
        let (slots, shift, base) = (&mut self.slots[..], self.shift, self.base);
        let mask = slots.len() - 1;
        // Of one length, so that one look at it does for all.
        let keys = &mut self.keys[..most];
        let masses = &mut self.masses[..most];
        let (starts, ends) = (&mut self.starts[..most], &mut self.ends[..most]);
        let mut count = self.count;
        for (key, mass, range) in new {
            let mut at = slot_of(key, shift) & mask;
            loop {
                let place = slots[at].wrapping_sub(base) as usize;
                if place >= count {
                    slots[at] = base + count as u32;
                    keys[count] = key;
                    masses[count] = mass;
                    (starts[count], ends[count]) = (range.0 as i32, range.1 as i32);
                    if range.0 >= range.1 {
                        self.bare.push(count as u32);
                    }
                    count += 1;
                    break;
                }
                if keys[place] == key {
                    masses[place] += mass;
                    break;
                }
                at = (at + 1) & mask;
            }
        }
        self.count = count;
    }

    #[cold]
    fn grow(&mut self, most: usize) {
        let size = most.next_power_of_two();
        self.keys.resize(size, 0);
        self.masses.resize(size, 0.0);
        self.starts.resize(size, 0);
        self.ends.resize(size, 0);
        if 4 * size > self.slots.len() {
            self.shift = u32::BITS - (4 * size).ilog2();
            self.slots.clear();
            self.slots.resize(4 * size, 0);
            for place in 0..self.count {
                let mask = self.slots.len() - 1;
                let mut at = slot_of(self.keys[place], self.shift);
                while self.slots[at] >= self.base {
                    at = (at + 1) & mask;
                }
                self.slots[at] = self.base + place as u32;
            }
        }
    }

    /// Takes a key's mass away.
    pub fn remove(&mut self, key: u32) {
        if let Some(place) = self.find(key) {
            self.masses[place] = 0.0;
        }
    }

    /// The place of a key that has mass.
    pub fn find(&self, key: u32) -> Option<usize> {
        if key == NONE {
            return None;
        }
        let mask = self.slots.len() - 1;
        let mut at = slot_of(key, self.shift);
        loop {
            let place = self.slots[at].wrapping_sub(self.base) as usize;
            if place >= self.count {
                return None;
            }
            if self.keys[place] == key {
                return Some(place);
            }
            at = (at + 1) & mask;
        }
    }

    /// The keys.
    pub fn keys(&self) -> &[u32] {
        &self.keys[..self.count]
    }

    /// The mass of each key.
    pub fn masses(&self) -> &[f64] {
        &self.masses[..self.count]
    }

    /// The range of each key's own tokens, as starts and ends.
    pub fn ranges(&self) -> (&[i32], &[i32]) {
        (&self.starts[..self.count], &self.ends[..self.count])
    }

    pub fn total(&self) -> f64 {
        sum(self.masses()) + self.tail
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn masses_add_up_by_key_in_order_of_first_use_however_many_they_are() {
        let mut masses = Masses::new();
        for round in 0..3u32 {
            masses.clear();
            let mut expected: Vec<(u32, f64)> = Vec::new();
            for step in 0..4_000u32 {
                let key = step.wrapping_mul(2_654_435_761) % (700 << round);
                let mass = f64::from(step % 7);
                masses.add(key, mass, (key, key + 1));
                match expected.iter_mut().find(|found| found.0 == key) {
                    Some(found) => found.1 += mass,
                    None => expected.push((key, mass)),
                }
            }
            masses.add(NONE, 0.5, (0, 0));
            let found = masses
                .keys()
                .iter()
                .copied()
                .zip(masses.masses().iter().copied());
            assert!(found.eq(expected.iter().copied()));
            assert!(
                masses
                    .keys()
                    .iter()
                    .map(|&key| key as i32)
                    .eq(masses.ranges().0.iter().copied())
            );
            assert!(masses.bare.is_empty());
            assert_eq!(masses.find(expected[9].0), Some(9));
            assert_eq!(masses.find(5_000), None);
            assert_eq!(masses.find(NONE), None);
            let sum: f64 = expected.iter().map(|found| found.1).sum();
            assert_eq!(masses.total(), sum + 0.5);
            masses.remove(expected[9].0);
            assert_eq!(masses.masses()[9], 0.0);
        }
    }
}
