//! Exponentials of many numbers, the same on every machine.

use std::f64::consts::LN_2;

/// The exponential function from a table.
#[derive(Debug)]
pub(super) struct Exp {
    /// 2 to the power of `i / 64`.
    powers: [f64; STEPS],
}

const STEPS: usize = 64;
const STEP: f64 = LN_2 / STEPS as f64;
/// The first digits of log(2) / 64, so few that its multiples are exact, and the others.
const HIGH: f64 = f64::from_bits(STEP.to_bits() & !((1 << 27) - 1));
const LOW: f64 = (STEP - HIGH) + 2.319_046_813_846_299_6e-17 / STEPS as f64;
/// So many numbers are worked on together.
const BLOCK: usize = 8;
/// Added to a number below 2^51 it leaves the nearest whole one in the last bits.
const ROUND: f64 = 6_755_399_441_055_744.0;

impl Default for Exp {
    fn default() -> Self {
        Self {
            powers: std::array::from_fn(|i| (i as f64 / STEPS as f64).exp2()),
        }
    }
}

impl Exp {
    /// e to the power of each of some log-probabilities, to within two units in the last place.
    #[inline(always)]
    pub fn of_all(&self, values: &mut [f64]) {
        let (blocks, rest) = values.as_chunks_mut::<BLOCK>();
        // A loop: what an iterator's adapter calls is not compiled for the processor's features.
        for block in blocks {
            self.of_block(block);
        }
        let mut block = [0.0; BLOCK];
        block[..rest.len()].copy_from_slice(rest);
        self.of_block(&mut block);
        rest.copy_from_slice(&block[..rest.len()]);
    }

    /// In steps of one kind, as processors work on several numbers at once.
    #[inline(always)]
    #[allow(
        clippy::needless_range_loop,
        reason = "what an iterator's adapter calls is not compiled for the processor's features"
    )]
    fn of_block(&self, values: &mut [f64; BLOCK]) {
        if values.iter().any(|&x| x < -700.0) {
            values.iter_mut().for_each(|x| *x = x.exp());
            return;
        }
        // x = (64 k + i) log(2) / 64 + r
        let (mut rounded, mut powers) = ([0.0; BLOCK], [0.0; BLOCK]);
        for at in 0..BLOCK {
            rounded[at] = values[at] * (1.0 / STEP) + ROUND;
            let whole = rounded[at].to_bits().wrapping_sub(ROUND.to_bits());
            let i = whole % STEPS as u64;
            let exponent = (whole - i).wrapping_add(1023 * STEPS as u64) << (52 - STEPS.ilog2());
            powers[at] = f64::from_bits(exponent) * self.powers[i as usize];
        }
        for (at, x) in values.iter_mut().enumerate() {
            let steps = rounded[at] - ROUND;
            let r = (*x - steps * HIGH) - steps * LOW;
            let series = 1.0
                + r * (1.0 + r * (0.5 + r * (1.0 / 6.0 + r * (1.0 / 24.0 + r * (1.0 / 120.0)))));
            *x = powers[at] * series;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exp_is_that_of_the_standard_library_to_the_last_digits() {
        let exp = Exp::default();
        let of = |x: f64| {
            let mut values = [-1.0, -2.0, x, -3.0, -4.0, -5.0, -6.0, -7.0, -8.0, -9.0, x];
            exp.of_all(&mut values);
            assert_eq!(values[2], values[10]);
            values[10]
        };
        for step in 0..200_000 {
            let x = f64::from(-(step as f32) * 0.0037 + 0.3);
            let (found, expected) = (of(x), x.exp());
            assert!(
                (found - expected).abs() <= 6e-16 * expected,
                "exp({x}) = {found:e}, expected {expected:e}"
            );
        }
        assert_eq!(of(0.0), 1.0);
        assert_eq!(of(f64::NEG_INFINITY), 0.0);
    }
}
