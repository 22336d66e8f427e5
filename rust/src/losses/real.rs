//! Floats of both widths: exponentials and logarithms in loops that the compiler can vectorize.

use std::cmp::Ordering;
use std::ops::{Add, AddAssign, Div, Mul, Neg, Sub};

/// `f32` or `f64`.
pub trait Real:
    Copy
    + Send
    + Sync
    + PartialOrd
    + Add<Output = Self>
    + AddAssign
    + Sub<Output = Self>
    + Mul<Output = Self>
    + Div<Output = Self>
    + Neg<Output = Self>
    + 'static
{
    /// 0.
    const ZERO: Self;
    /// 1.
    const ONE: Self;
    /// No mass.
    const NOTHING: Self;
    /// A sum below this has lost digits.
    const FAINT: Self;
    /// e^x, 0 for what is far below 0; for x <= 0 or little above.
    fn exp(self) -> Self;
    /// ln x of a normal x above 0.
    fn ln(self) -> Self;
    /// From a double.
    fn of(value: f64) -> Self;
    /// To a double.
    fn wide(self) -> f64;
    /// How far it is below 0, in 64ths and at most `most`; not less for a smaller value.
    fn depth(self, most: u32) -> u32;
}

impl Real for f64 {
    const ZERO: Self = 0.0;
    const ONE: Self = 1.0;
    const NOTHING: Self = Self::NEG_INFINITY;
    const FAINT: Self = Self::MIN_POSITIVE * 1e6;

    #[inline(always)]
    fn exp(self) -> Self {
        Self::exp(self)
    }

    #[inline(always)]
    fn ln(self) -> Self {
        Self::ln(self)
    }

    #[inline(always)]
    fn of(value: f64) -> Self {
        value
    }

    #[inline(always)]
    fn wide(self) -> f64 {
        self
    }

    #[inline(always)]
    fn depth(self, most: u32) -> u32 {
        let found = self * -64.0;
        // A cast takes what is no number, or above 0, to 0.
        if found < most as Self {
            found as u32
        } else {
            most
        }
    }
}

impl Real for f32 {
    const ZERO: Self = 0.0;
    const ONE: Self = 1.0;
    const NOTHING: Self = Self::NEG_INFINITY;
    const FAINT: Self = Self::MIN_POSITIVE * 1e6;

    // Cephes' expf: 2^n times a polynomial of what is left; 2 units in the last place.
    #[inline(always)]
    fn exp(self) -> Self {
        const ROUND: f32 = 12_582_912.0; // 1.5 * 2^23: adding it rounds to a whole number
        let x = if self > 88.0 { 88.0 } else { self };
        let shifted = x * std::f32::consts::LOG2_E + ROUND;
        let n = shifted - ROUND;
        let r = (x - n * 0.693_359_4) - n * -2.121_944_4e-4;
        let mut y = 1.987_569_1e-4;
        y = y * r + 1.398_199_9e-3;
        y = y * r + 8.333_452e-3;
        y = y * r + 4.166_579_6e-2;
        y = y * r + 1.666_666_5e-1;
        y = y * r + 0.5;
        y = y * r * r + r + 1.0;
        // The whole number is in the last bits of `shifted`: a cast would look at each value by
        // itself, as it saturates.
        let power = Self::from_bits((shifted.to_bits() << 23).wrapping_add(127 << 23));
        let found = if self < -87.3 { 0.0 } else { y * power };
        if self.is_nan() { self } else { found }
    }

    // Cephes' logf.
    #[inline(always)]
    fn ln(self) -> Self {
        let bits = self.to_bits();
        let mut n = (bits >> 23) as i32 - 126;
        let mut m = Self::from_bits((bits & 0x007f_ffff) | 0x3f00_0000); // [0.5, 1)
        let low = m < std::f32::consts::FRAC_1_SQRT_2;
        n -= i32::from(low);
        m = if low { m + m } else { m } - 1.0;
        let z = m * m;
        let mut y = 7.037_683_6e-2;
        y = y * m - 1.151_461e-1;
        y = y * m + 1.167_699_9e-1;
        y = y * m - 1.242_014_1e-1;
        y = y * m + 1.424_932_3e-1;
        y = y * m - 1.666_805_8e-1;
        y = y * m + 2.000_071_5e-1;
        y = y * m - 2.499_999_4e-1;
        y = y * m + 3.333_333e-1;
        y = y * m * z;
        let n = n as Self;
        y += n * -2.121_944_4e-4;
        y -= 0.5 * z;
        m + y + n * 0.693_359_4
    }

    #[inline(always)]
    fn of(value: f64) -> Self {
        value as Self
    }

    #[inline(always)]
    fn wide(self) -> f64 {
        f64::from(self)
    }

    #[inline(always)]
    fn depth(self, most: u32) -> u32 {
        let found = self * -64.0;
        // A cast takes what is no number, or above 0, to 0.
        if found < most as Self {
            found as u32
        } else {
            most
        }
    }
}

/// Sums in lanes, so that the compiler vectorizes and digits are kept.
#[inline(always)]
pub(super) fn total<T: Real>(values: &[T]) -> f64 {
    let mut lanes = [T::ZERO; 16];
    let chunks = values.chunks_exact(16);
    let rest = chunks.remainder();
    for chunk in chunks {
        for (lane, &value) in lanes.iter_mut().zip(chunk) {
            *lane += value;
        }
    }
    let rest: f64 = rest.iter().map(|value| value.wide()).sum();
    lanes.iter().map(|lane| lane.wide()).sum::<f64>() + rest
}

/// Writes exp of a row less `top`, by temperature; their sum.
#[inline(always)]
pub(super) fn exponentials<T: Real>(row: &[T], top: T, inverse: T, values: &mut [T]) -> f64 {
    let mut sum = 0.0;
    for (values, some) in values.chunks_mut(1024).zip(row.chunks(1024)) {
        for (value, &logit) in values.iter_mut().zip(some) {
            *value = ((logit - top) * inverse).exp();
        }
        sum += total(values);
    }
    sum
}

/// The sum of exp of values less `top`, by temperature.
#[inline(always)]
pub(super) fn sum_of_exponentials<T: Real>(values: &[T], top: T, inverse: T) -> f64 {
    let mut part = [T::ZERO; 1024];
    let mut sum = 0.0;
    for some in values.chunks(1024) {
        for (value, &logit) in part.iter_mut().zip(some) {
            *value = ((logit - top) * inverse).exp();
        }
        sum += total(&part[..some.len()]);
    }
    sum
}

/// The largest, and the sum of exp of the values less it, by temperature; in one reading.
#[inline(always)]
pub(super) fn top_and_sum<T: Real>(values: &[T], inverse: T) -> (T, f64) {
    let (mut top, mut sum) = (T::NOTHING, 0.0);
    // Its sums across lanes cost as much as the exponentials of some sixty values.
    let mut part = [T::ZERO; 1024];
    for some in values.chunks(1024) {
        let more = largest(some);
        let rises = !matches!(
            more.partial_cmp(&top),
            Some(Ordering::Less | Ordering::Equal)
        );
        // Also where it is no number, which stays one.
        if rises {
            let less = ((top - more) * inverse).wide();
            sum = if top == T::NOTHING {
                0.0
            } else {
                sum * less.exp()
            };
            top = more;
        }
        for (value, &logit) in part.iter_mut().zip(some) {
            *value = ((logit - top) * inverse).exp();
        }
        sum += total(&part[..some.len()]);
    }
    (top, sum)
}

/// The largest, NaN where there is one; [`Real::NOTHING`] of none.
#[inline(always)]
pub(super) fn largest<T: Real>(values: &[T]) -> T {
    let (mut lanes, mut odd) = ([T::NOTHING; 16], [T::ZERO; 16]);
    let chunks = values.chunks_exact(16);
    let rest = chunks.remainder();
    // What is no number is not above, so it is kept aside: a choice in each lane.
    let number = |value: T| value.partial_cmp(&value).is_some();
    let more = |lane: T, value: T| if value > lane { value } else { lane };
    for chunk in chunks {
        for ((lane, odd), &value) in lanes.iter_mut().zip(&mut odd).zip(chunk) {
            *odd = if number(value) { *odd } else { value };
            *lane = more(*lane, value);
        }
    }
    let mut found = lanes.into_iter().fold(T::NOTHING, more);
    let mut clean = odd.into_iter().all(number);
    for &value in rest {
        clean &= number(value);
        found = more(found, value);
    }
    if clean { found } else { T::of(f64::NAN) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exponentials_and_logarithms_are_those_of_doubles() {
        for step in 0..400_000 {
            let x = -87.0 + 0.000_22 * step as f32;
            let wanted = f64::from(x).exp();
            assert!((f64::from(Real::exp(x)) / wanted - 1.0).abs() < 4e-7, "{x}");
            let y = Real::exp(x);
            let near = (f64::from(Real::ln(y)) - f64::from(y).ln()).abs();
            assert!(near < 3e-7 * f64::from(y).ln().abs().max(1.0), "{y}");
        }
        assert_eq!(Real::exp(f32::NEG_INFINITY), 0.0);
        assert_eq!(Real::exp(-200.0f32), 0.0);
        assert!(Real::exp(f32::NAN).is_nan());
        assert_eq!(Real::exp(0.0f32), 1.0);
    }

    #[test]
    fn depths_rise_as_values_fall() {
        let values = [7.0f32, 0.0, -1e-20, -0.02, -3.5, -1e20, f32::NEG_INFINITY];
        assert_eq!(
            values.map(|value| value.depth(500)),
            [0, 0, 0, 1, 224, 500, 500]
        );
        assert_eq!((-0.5f64).depth(500), 32);
    }

    #[test]
    fn sums_and_maxima_see_every_value() {
        for count in 0..70 {
            let values: Vec<f32> = (0..count).map(|i| ((i * 37) % 41) as f32 - 20.0).collect();
            let sum: f32 = values.iter().sum();
            assert_eq!(total(&values), f64::from(sum));
            let top = values.iter().copied().fold(f32::NEG_INFINITY, f32::max);
            assert_eq!(largest(&values), top);
            for at in 0..count {
                let mut broken = values.clone();
                broken[at] = f32::NAN;
                assert!(largest(&broken).is_nan());
            }
        }
    }
}
