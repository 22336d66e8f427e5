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
    /// Number of keys; the next two are longer.
    count: usize,
    keys: Vec<u32>,
    masses: Vec<f64>,
    /// The places of the keys whose tokens are not those of a cell, and their range.
    pub others: Vec<(u32, (u32, u32))>,
    /// Whether some mass may be zero.
    pub has_zeros: bool,
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
            others: Vec::new(),
            has_zeros: false,
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
        self.others.clear();
        self.has_zeros = false;
        self.tail = 0.0;
    }

    /// Adds to the mass of a key, whose tokens are `range` where it is a new one; [`NONE`] is the
    /// tail.
    pub fn add(&mut self, key: u32, mass: f64, range: (u32, u32)) {
        if key == NONE {
            self.tail += mass;
            return;
        }
        let count = self.count;
        self.has_zeros |= mass <= 0.0;
        self.add_cell(key, mass);
        if self.count > count {
            self.others.push((count as u32, range));
        }
    }

    /// Adds a mass above zero to that of a key that has its cell's tokens.
    pub fn add_cell(&mut self, key: u32, mass: f64) {
        self.add_row((&[key], &[mass]), 1, NONE);
    }

    /// As [`Masses::add_cell`], of the columns of a row, 64 at most, whose bits in `kept` are set, up
    /// to one whose key is [`NONE`] or `other`; its place.
    #[inline]
    pub fn add_row(&mut self, (keys, masses): (&[u32], &[f64]), kept: u64, other: u32) -> usize {
        let most = self.count + keys.len();
        if most > self.keys.len() {
            self.grow(most);
        }
        let (slots, base) = (&mut self.slots[..], self.base);
        // Of one length, so that one look at it does for all.
        let (own_keys, own_masses) = (&mut self.keys[..most], &mut self.masses[..most]);
        let mut count = self.count;
        let mut end = keys.len();
        for (at, (&key, &mass)) in keys.iter().zip(masses).enumerate() {
            if kept >> at & 1 == 0 {
                continue;
            }
            if key == other || key == NONE {
                end = at;
                break;
            }
            let slot = &mut slots[key as usize];
            let place = slot.wrapping_sub(base) as usize;
            if place < count {
                own_masses[place] += mass;
                continue;
            }
            *slot = base + count as u32;
            own_keys[count] = key;
            own_masses[count] = mass;
            count += 1;
        }
        self.count = count;
        end
    }

    #[cold]
    fn grow(&mut self, most: usize) {
        let size = most.next_power_of_two();
        self.keys.resize(size, 0);
        self.masses.resize(size, 0.0);
    }

    /// Takes a key's mass away.
    pub fn remove(&mut self, key: u32) {
        if let Some(place) = self.find(key) {
            self.masses[place] = 0.0;
            self.has_zeros = true;
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
            let places = 0..masses.keys().len() as u32;
            let ranges = places.zip(masses.keys().iter().map(|&key| (key, key + 1)));
            assert!(ranges.eq(masses.others.iter().copied()));
            assert!(masses.has_zeros);
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
