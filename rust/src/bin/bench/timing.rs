//! CPU time of the thread, repeated until it can be trusted.

use std::hint::black_box;
use std::time::Duration;

use cpu_time::ThreadTime;

/// Least and median seconds of CPU time of `work` among `rounds` measurements of each of several
/// candidates, taken in turn so that a busy machine slows all of them alike.
pub fn compare(rounds: usize, candidates: &mut [&mut dyn FnMut()]) -> Vec<Seconds> {
    let mut taken: Vec<Vec<Duration>> = vec![Vec::new(); candidates.len()];
    for _ in 0..rounds {
        for (candidate, taken) in candidates.iter_mut().zip(&mut taken) {
            let start = ThreadTime::now();
            candidate();
            taken.push(start.elapsed());
        }
    }
    taken.into_iter().map(Seconds::of).collect()
}

/// What was measured.
#[derive(Debug, Clone, Copy)]
pub struct Seconds {
    pub least: f64,
    pub median: f64,
}

impl Seconds {
    fn of(mut taken: Vec<Duration>) -> Self {
        taken.sort_unstable();
        let seconds = |at: usize| taken.get(at).map_or(0.0, Duration::as_secs_f64);
        Self {
            least: seconds(0),
            median: seconds(taken.len() / 2),
        }
    }
}

/// Keeps `value` from being optimized away.
pub fn keep<T>(value: T) {
    black_box(value);
}
