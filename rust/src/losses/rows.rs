//! Rows of a matrix, what is found of each, and the gradient that several threads write.

use std::ops::Range;

use crate::error::{Error, Result};
use crate::parallel::{self, Threads};

/// Tasks of a thread: few, as each makes room of its own; more than one, as some threads are late.
const TASKS_A_THREAD: usize = 4;

pub(super) fn ids(what: &str, ids: &[i64], size: usize) -> Result<Vec<u32>> {
    ids.iter()
        .map(|&id| match u32::try_from(id) {
            Ok(found) if (found as usize) < size => Ok(found),
            _ => Err(Error::Shape {
                what: format!("{what} holds {id}, of a vocabulary"),
                found: id.unsigned_abs() as usize,
                expected: size,
                remedy: "pass ids of these vocabularies",
            }),
        })
        .collect()
}

pub(super) fn length(what: &str, found: usize, expected: usize) -> Result<()> {
    if found == expected {
        return Ok(());
    }
    Err(Error::Shape {
        what: what.to_owned(),
        found,
        expected,
        remedy: "pass the arrays of one batch",
    })
}

/// Rows of a matrix, by their number.
#[derive(Clone, Copy)]
pub struct Rows<'a, T> {
    /// All numbers of the matrix.
    pub flat: &'a [T],
    /// Its columns.
    pub width: usize,
    /// The rows that are read.
    pub index: &'a [i64],
}

impl<'a, T> Rows<'a, T> {
    pub(super) fn check(&self, what: &str, least: usize, count: usize) -> Result<()> {
        length(what, self.index.len(), count)?;
        let rows = self.flat.len().checked_div(self.width).unwrap_or(0);
        let inside = |&row: &i64| usize::try_from(row).is_ok_and(|row| row < rows);
        if self.width < least || !self.index.iter().all(inside) {
            return Err(Error::Shape {
                what: format!("the rows or columns of {what}"),
                found: self.width,
                expected: least,
                remedy: "pass the logits of this batch",
            });
        }
        Ok(())
    }

    /// The first `width` columns of the row of a place.
    pub(super) fn row(&self, at: usize, width: usize) -> &'a [T] {
        let start = self.index[at] as usize * self.width;
        &self.flat[start..start + width]
    }
}

/// What is found of each row.
pub struct Found {
    /// In nats.
    pub loss: f64,
    /// The teacher's mass on the compared columns.
    pub mass: f64,
    /// The student's mass on tokens without a row in W.
    pub empty: f64,
    /// The sum of what was written to the gradient: finite where all of it is.
    pub sum: f64,
    /// The log of the teacher's softmax denominator, by temperature; NaN where it is not known.
    pub log_total: f64,
    /// Whether it can be computed: a column of next to no mass needs log space, which is not here.
    /// Nothing was written then.
    pub good: bool,
}

impl Found {
    pub(super) const BAD: Self = Self {
        loss: 0.0,
        mass: 0.0,
        empty: 0.0,
        sum: 0.0,
        log_total: f64::NAN,
        good: false,
    };
}

/// A gradient whose rows are written by several threads.
pub(super) struct Gradient<T> {
    start: *mut T,
    width: usize,
    adds: bool,
}

// SAFETY: whoever makes one writes each row from one thread.
unsafe impl<T: Send> Sync for Gradient<T> {}

impl<T> Gradient<T> {
    /// Over `flat`, which is like the student's logits; whether its rows are added to.
    pub(super) fn of(flat: &mut [T], adds: bool, student: &Rows<'_, T>) -> Result<Self> {
        Self::by_owner(flat, adds, student, |at| at)
    }

    /// The same where a row may be named again by the same `owner` of places.
    pub(super) fn by_owner(
        flat: &mut [T],
        adds: bool,
        student: &Rows<'_, T>,
        owner: impl Fn(usize) -> usize,
    ) -> Result<Self> {
        length("the gradient", flat.len(), student.flat.len())?;
        let mut sorted: Vec<(i64, usize)> = student
            .index
            .iter()
            .enumerate()
            .map(|(at, &row)| (row, owner(at)))
            .collect();
        sorted.sort_unstable();
        sorted.dedup();
        if let Some(pair) = sorted.windows(2).find(|pair| pair[0].0 == pair[1].0) {
            return Err(Error::Option {
                name: "student rows",
                value: format!("row {} twice", pair[0].0),
                expected: "rows of one chunk each",
            });
        }
        Ok(Self {
            start: flat.as_mut_ptr(),
            width: student.width,
            adds,
        })
    }

    /// A row of the student, and whether it is added to.
    ///
    /// # Safety
    /// Each row is borrowed by one thread, and once at a time.
    #[expect(clippy::mut_from_ref, reason = "the rows are apart")]
    #[inline(always)]
    pub(super) unsafe fn row(&self, student: &Rows<'_, T>, at: usize) -> (&mut [T], bool) {
        let start = student.index[at] as usize * self.width;
        // SAFETY: `Rows::check` has seen that the row is inside.
        let row = unsafe { std::slice::from_raw_parts_mut(self.start.add(start), self.width) };
        (row, self.adds)
    }
}

/// What `task` finds of ranges of `count` rows, in order.
pub(super) fn by_tasks<R: Send>(
    count: usize,
    threads: &Threads<'_>,
    task: impl Fn(Range<usize>) -> Vec<R> + Sync,
) -> Result<Vec<R>> {
    let tasks = match threads.count() {
        1 => 1,
        many => many * TASKS_A_THREAD,
    };
    let size = count.div_ceil(tasks).max(1);
    let parts = parallel::map(threads, count.div_ceil(size), |part| {
        Ok(task(part * size..count.min((part + 1) * size)))
    })?;
    Ok(parts.into_iter().flatten().collect())
}

/// Methods `task`, of a range of rows and a gradient, which are `task_in` compiled for what the
/// processor has.
macro_rules! task_by_processor {
    ($found:ty) => {
        fn task(
            &self,
            rows: std::ops::Range<usize>,
            gradient: Option<&Gradient<T>>,
        ) -> Vec<$found> {
            #[cfg(target_arch = "x86_64")]
            {
                if std::arch::is_x86_feature_detected!("avx512f")
                    && std::arch::is_x86_feature_detected!("avx512bw")
                    && std::arch::is_x86_feature_detected!("avx512dq")
                    && std::arch::is_x86_feature_detected!("avx512vl")
                {
                    // SAFETY: the processor has them.
                    return unsafe { self.task_avx512(rows, gradient) };
                }
                if std::arch::is_x86_feature_detected!("avx2")
                    && std::arch::is_x86_feature_detected!("fma")
                {
                    // SAFETY: the processor has them.
                    return unsafe { self.task_avx2(rows, gradient) };
                }
            }
            self.task_in(rows, gradient)
        }

        #[cfg(target_arch = "x86_64")]
        #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma")]
        fn task_avx512(
            &self,
            rows: std::ops::Range<usize>,
            gradient: Option<&Gradient<T>>,
        ) -> Vec<$found> {
            self.task_in(rows, gradient)
        }

        #[cfg(target_arch = "x86_64")]
        #[target_feature(enable = "avx2,fma")]
        fn task_avx2(
            &self,
            rows: std::ops::Range<usize>,
            gradient: Option<&Gradient<T>>,
        ) -> Vec<$found> {
            self.task_in(rows, gradient)
        }
    };
}
pub(super) use task_by_processor;
