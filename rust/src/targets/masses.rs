//! The masses of one position while it is built.

use super::NONE;
use super::rows::sum;

/// Masses by key, in order of first use; array by array, as they are read so.
#[derive(Debug)]
pub(super) struct Masses {
    /// By key: its place above `base`; anything below is of an earlier use. A table of all keys is
    /// larger than the nearest cache, but no look into it waits for another.
    slots: Vec<u32>,
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

impl Masses {
    pub fn new() -> Self {
        Self {
            slots: Vec::new(),
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

    /// Forgets all masses; from here on keys are below `limit`.
    pub fn clear(&mut self, limit: usize) {
        self.base += self.count as u32;
        if self.base > u32::MAX / 2 {
            self.slots.fill(0);
            self.base = 1;
        }
        if self.slots.len() < limit {
            self.slots.resize(limit, 0);
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
        let (slots, base) = (&mut self.slots[..], self.base);
        // Of one length, so that one look at it does for all.
        let keys = &mut self.keys[..most];
        let masses = &mut self.masses[..most];
        let (starts, ends) = (&mut self.starts[..most], &mut self.ends[..most]);
        let mut count = self.count;
        for (key, mass, range) in new {
            let slot = &mut slots[key as usize];
            let place = slot.wrapping_sub(base) as usize;
            if place < count {
                masses[place] += mass;
                continue;
            }
            *slot = base + count as u32;
            keys[count] = key;
            masses[count] = mass;
            (starts[count], ends[count]) = (range.0 as i32, range.1 as i32);
            if range.0 >= range.1 {
                self.bare.push(count as u32);
            }
            count += 1;
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
    }

    /// Takes a key's mass away.
    pub fn remove(&mut self, key: u32) {
        if let Some(place) = self.find(key) {
            self.masses[place] = 0.0;
        }
    }

    /// The place of a key that has mass.
    pub fn find(&self, key: u32) -> Option<usize> {
        let slot = self.slots.get(key as usize)?;
        let place = slot.wrapping_sub(self.base) as usize;
        (place < self.count).then_some(place)
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
            masses.clear(700 << round);
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
