//! The places of a row's largest values.

use super::real::Real;

/// Buckets by depth below 0, and the last for all below them.
const BUCKETS: usize = 1 << 12;

/// The places of the `count` largest values, in no order; of equal ones the first. Fast where the
/// largest of all is about 0, and right in any case, but for what is no number.
#[inline(always)]
pub(super) fn largest_places<T: Real>(
    values: &[T],
    count: usize,
    buckets: &mut Vec<u32>,
    close: &mut Vec<(T, u32)>,
    places: &mut Vec<u32>,
) {
    places.clear();
    if count >= values.len() {
        places.extend(0..values.len() as u32);
        return;
    }
    let last = BUCKETS as u32 - 1;
    buckets.clear();
    buckets.resize(BUCKETS, 0);
    let mut depths = [0; 64];
    for part in values.chunks(64) {
        for (depth, value) in depths.iter_mut().zip(part) {
            *depth = value.depth(last);
        }
        for &depth in &depths[..part.len()] {
            buckets[depth as usize] += 1;
        }
    }
    let (mut bucket, mut above) = (0, 0);
    while bucket < last && above + buckets[bucket as usize] as usize <= count {
        above += buckets[bucket as usize] as usize;
        bucket += 1;
    }
    // All above the bucket are among them, and of it the first in its own order.
    close.clear();
    // The first bucket has all above 0 too.
    let low = match bucket {
        0 => T::NOTHING,
        _ => T::of(f64::from(bucket)),
    };
    let high = T::of(f64::from(bucket + 1));
    for (place, &value) in values.iter().enumerate() {
        let depth = value * T::of(-64.0);
        if depth < low {
            places.push(place as u32);
        } else if depth < high || bucket == last {
            close.push((value, place as u32));
        }
    }
    let more = (count - above).min(close.len());
    let falling = |a: &(T, u32), b: &(T, u32)| {
        b.0.partial_cmp(&a.0)
            .unwrap_or(std::cmp::Ordering::Equal)
            .then(a.1.cmp(&b.1))
    };
    if more > 0 && more < close.len() {
        close.select_nth_unstable_by(more - 1, falling);
    }
    places.extend(close[..more].iter().map(|&(_, place)| place));
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn they_are_those_of_a_stable_sort(
            values in prop::collection::vec(-6i32..2, 0..60),
            scale in 0.01f32..100.0,
            count in 0usize..70,
        ) {
            let values: Vec<f32> = values.iter().map(|&v| v as f32 * scale).collect();
            let (mut buckets, mut close, mut places) = (vec![], vec![], vec![]);
            largest_places(&values, count, &mut buckets, &mut close, &mut places);
            places.sort_unstable();
            let mut order: Vec<u32> = (0..values.len() as u32).collect();
            order.sort_by(|&a, &b| values[b as usize].total_cmp(&values[a as usize]));
            order.truncate(count);
            order.sort_unstable();
            prop_assert_eq!(places, order);
        }
    }
}
