//! The one thread engine: numbered tasks on a bounded number of threads, until they are done or the
//! caller gives up. The only file that names rayon.
//!
//! The calling thread works too. A call that uses one thread never touches rayon, so that it can be
//! made in a forked process; the others share one pool of helpers per process.

use std::num::NonZero;
use std::sync::atomic::{AtomicBool, AtomicPtr, AtomicUsize, Ordering};
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use rayon::ThreadPool;

use crate::error::{Error, Result};

/// More threads than this are refused: a slip of the pen rather than a machine.
pub const MAX_THREADS: usize = 1024;

/// Time between two questions whether the caller has given up.
const POLL: Duration = Duration::from_millis(50);

/// How many threads a call may use at most, and what may stop it. Any number of threads gives the
/// same answer.
///
/// ```
/// use xtoken::Threads;
///
/// assert_eq!(Threads::new(1)?.count(), 1);
/// assert!(Threads::new(0)?.count() >= 1, "one per core");
/// assert!(Threads::new(5_000).is_err());
/// # Ok::<(), xtoken::Error>(())
/// ```
#[derive(Clone, Copy)]
pub struct Threads<'c> {
    count: usize,
    interrupted: Option<&'c dyn Fn() -> bool>,
}

impl<'c> Threads<'c> {
    /// At most `count` threads, the caller's among them, and no more than there are cores; 0 is one
    /// per core.
    ///
    /// # Errors
    /// [`Error::Option`] above [`MAX_THREADS`].
    pub fn new(count: usize) -> Result<Self> {
        if count > MAX_THREADS {
            return Err(Error::Option {
                name: "threads",
                value: count.to_string(),
                expected: "at most 1024, or one per core where none are given",
            });
        }
        let count = match count {
            0 => cores(),
            1 => 1,
            count => count.min(cores()),
        };
        Ok(Self {
            count,
            interrupted: None,
        })
    }

    /// The calling thread alone.
    #[must_use]
    pub const fn one() -> Self {
        Self {
            count: 1,
            interrupted: None,
        }
    }

    /// Asks `interrupted` every 50 ms or so, on the calling thread, whether to give up; a call that
    /// does ends in [`Error::Interrupted`].
    #[must_use]
    pub fn interrupted_by<'d>(self, interrupted: &'d dyn Fn() -> bool) -> Threads<'d> {
        Threads {
            count: self.count,
            interrupted: Some(interrupted),
        }
    }

    /// The number of threads.
    #[must_use]
    pub fn count(&self) -> usize {
        self.count
    }

    /// As [`Threads::new`], whatever the number of cores.
    #[cfg(test)]
    pub(crate) fn uncapped(count: usize) -> Self {
        Self {
            count,
            interrupted: None,
        }
    }

    /// For loops that stay on the calling thread.
    pub(crate) fn watch(&self) -> Watch<'c> {
        Watch {
            interrupted: self.interrupted,
            asked: Instant::now(),
        }
    }
}

/// Asks whether the caller has given up, now and then.
pub(crate) struct Watch<'c> {
    interrupted: Option<&'c dyn Fn() -> bool>,
    asked: Instant,
}

impl Watch<'_> {
    fn is_interrupted(&mut self) -> bool {
        let Some(interrupted) = self.interrupted else {
            return false;
        };
        if self.asked.elapsed() < POLL {
            return false;
        }
        let answer = interrupted();
        self.asked = Instant::now();
        answer
    }

    /// Between two tasks: ends the call where the caller has given up.
    pub(crate) fn check(&mut self) -> Result<()> {
        if self.is_interrupted() {
            return Err(Error::Interrupted);
        }
        Ok(())
    }
}

/// Does the tasks of `order`, each by its number, begun in that order.
///
/// # Errors
/// Of the tasks that fail, the error of the one with the lowest number, as if they had been done
/// one after the other; [`Error::Interrupted`] before any of them.
pub(crate) fn for_each(
    threads: &Threads<'_>,
    order: &[usize],
    work: impl Fn(usize) -> Result<()> + Sync,
) -> Result<()> {
    let call = Call {
        order,
        work,
        next: AtomicUsize::new(0),
        stopped: AtomicBool::new(false),
        lowest_failed: AtomicUsize::new(usize::MAX),
        failed: Mutex::new(None),
        helping: Mutex::new(0),
        helper_left: Condvar::new(),
    };
    let mut watch = threads.watch();
    let helpers = threads.count.min(order.len()).saturating_sub(1);
    match (helpers > 0).then(helper_pool).flatten() {
        None => call.take_tasks(|| watch.is_interrupted()),
        Some(pool) => pool.in_place_scope(|scope| {
            for _ in 0..helpers {
                scope.spawn(|_| call.help());
            }
            call.take_tasks(|| watch.is_interrupted());
            call.wait_for_helpers(&mut watch);
        }),
    }
    call.finish()
}

/// The answers of the tasks `0..count`, in order.
///
/// # Errors
/// As [`for_each`].
pub(crate) fn map<T: Send>(
    threads: &Threads<'_>,
    count: usize,
    work: impl Fn(usize) -> Result<T> + Sync,
) -> Result<Vec<T>> {
    let answers: Mutex<Vec<Option<T>>> = Mutex::new((0..count).map(|_| None).collect());
    let order: Vec<usize> = (0..count).collect();
    for_each(threads, &order, |task| {
        let answer = work(task)?;
        lock(&answers)[task] = Some(answer);
        Ok(())
    })?;
    let answers = answers.into_inner().unwrap_or_else(PoisonError::into_inner);
    Ok(answers.into_iter().flatten().collect())
}

/// One call of [`for_each`], as all its threads see it.
struct Call<'o, W> {
    order: &'o [usize],
    work: W,
    /// Index into `order` of the next task that nobody has taken.
    next: AtomicUsize,
    stopped: AtomicBool,
    /// Tasks with a higher number than one that failed need not be done.
    lowest_failed: AtomicUsize,
    failed: Mutex<Option<(usize, Error)>>,
    /// Helpers at work.
    helping: Mutex<usize>,
    helper_left: Condvar,
}

impl<W: Fn(usize) -> Result<()> + Sync> Call<'_, W> {
    /// Does the next task until none is left.
    fn take_tasks(&self, mut is_interrupted: impl FnMut() -> bool) {
        while !self.stopped.load(Ordering::Relaxed) {
            let Some(&task) = self.order.get(self.next.fetch_add(1, Ordering::Relaxed)) else {
                break;
            };
            if task > self.lowest_failed.load(Ordering::Relaxed) {
                continue;
            }
            if let Err(error) = (self.work)(task) {
                self.keep_first(task, error);
            }
            if is_interrupted() {
                self.stopped.store(true, Ordering::Relaxed);
            }
        }
    }

    fn help(&self) {
        /// Leaves also where a task panics.
        struct Leave<'c>(&'c Mutex<usize>, &'c Condvar);
        impl Drop for Leave<'_> {
            fn drop(&mut self) {
                *lock(self.0) -= 1;
                self.1.notify_one();
            }
        }
        *lock(&self.helping) += 1;
        let _leave = Leave(&self.helping, &self.helper_left);
        self.take_tasks(|| false);
    }

    /// Helpers finish the tasks that they have begun; meanwhile the caller can still give up.
    fn wait_for_helpers(&self, watch: &mut Watch<'_>) {
        let mut helping = lock(&self.helping);
        while *helping > 0 {
            let waited = self.helper_left.wait_timeout(helping, POLL);
            drop(waited.unwrap_or_else(PoisonError::into_inner).0);
            if watch.is_interrupted() {
                self.stopped.store(true, Ordering::Relaxed);
            }
            helping = lock(&self.helping);
        }
    }

    fn keep_first(&self, task: usize, error: Error) {
        self.lowest_failed.fetch_min(task, Ordering::Relaxed);
        let mut failed = lock(&self.failed);
        if failed.as_ref().is_none_or(|(first, _)| task < *first) {
            *failed = Some((task, error));
        }
    }

    fn finish(self) -> Result<()> {
        if self.stopped.into_inner() {
            return Err(Error::Interrupted);
        }
        let failed = self.failed.into_inner();
        match failed.unwrap_or_else(PoisonError::into_inner) {
            Some((_, error)) => Err(error),
            None => Ok(()),
        }
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Number of cores that this process may use; asked once, as the answer takes reading files.
fn cores() -> usize {
    static CORES: AtomicUsize = AtomicUsize::new(0);
    match CORES.load(Ordering::Relaxed) {
        0 => {
            let cores = std::thread::available_parallelism().map_or(1, NonZero::get);
            CORES.store(cores, Ordering::Relaxed);
            cores
        }
        cores => cores,
    }
}

/// The helpers of one process.
struct Helpers {
    process: u32,
    pool: ThreadPool,
}

/// The pool of this process, with a thread for each core but the caller's. `None` where the system
/// grants no threads: the caller then does all.
///
/// Threads do not outlive a fork, so a child starts its own pool. No lock is held here that a fork
/// could leave locked.
fn helper_pool() -> Option<&'static ThreadPool> {
    static SHARED: AtomicPtr<Helpers> = AtomicPtr::new(std::ptr::null_mut());
    let process = std::process::id();
    let current = SHARED.load(Ordering::Acquire);
    // SAFETY: what is stored in SHARED was leaked by this function, and is never freed or changed.
    if let Some(helpers) = unsafe { current.as_ref() }
        && helpers.process == process
    {
        return Some(&helpers.pool);
    }
    // Tests have helpers whatever the machine.
    let size = if cfg!(test) { 4 } else { cores() - 1 };
    let pool = rayon::ThreadPoolBuilder::new()
        .num_threads(size.max(1))
        .thread_name(|at| format!("xtoken-{at}"))
        .build()
        .ok()?;
    let ours = Box::into_raw(Box::new(Helpers { process, pool }));
    match SHARED.compare_exchange(current, ours, Ordering::AcqRel, Ordering::Acquire) {
        // SAFETY: leaked above; never freed from here on.
        Ok(_) => unsafe { ours.as_ref() }.map(|helpers| &helpers.pool),
        Err(theirs) => {
            // SAFETY: `ours` came from `Box::into_raw` and nobody else has seen it.
            drop(unsafe { Box::from_raw(ours) });
            // SAFETY: as for `current`; another thread of this process stored it just now.
            unsafe { theirs.as_ref() }.map(|helpers| &helpers.pool)
        }
    }
}

#[cfg(test)]
mod tests {
    use std::cell::Cell;
    use std::collections::HashSet;

    use super::*;

    fn failure(task: usize) -> Error {
        Error::NoSuchId {
            id: task as i64,
            size: 0,
        }
    }

    #[test]
    fn answers_come_in_the_order_of_the_tasks_whatever_the_threads() {
        let expected: Vec<usize> = (0..500).map(|task| task * task).collect();
        for threads in [1, 2, 3, 8, 600] {
            let squares = map(&Threads::uncapped(threads), 500, |task| Ok(task * task));
            assert_eq!(squares.unwrap(), expected);
        }
        assert_eq!(map(&Threads::uncapped(3), 0, Ok).unwrap(), [0usize; 0]);
    }

    #[test]
    fn the_failed_task_with_the_lowest_number_is_reported_whatever_the_order_and_the_threads() {
        let order: Vec<usize> = (0..300).rev().collect();
        for threads in [1, 2, 5] {
            let result = for_each(&Threads::uncapped(threads), &order, |task| match task {
                40 | 41 | 290 => Err(failure(task)),
                _ => Ok(()),
            });
            assert!(matches!(result, Err(Error::NoSuchId { id: 40, .. })));
        }
    }

    #[test]
    fn one_thread_is_the_callers() {
        let here = std::thread::current().id();
        for_each(&Threads::one(), &[0, 1, 2], |_| {
            assert_eq!(std::thread::current().id(), here);
            Ok(())
        })
        .unwrap();
    }

    #[test]
    fn a_caller_that_gives_up_ends_the_call_soon() {
        let order: Vec<usize> = (0..100_000).collect();
        for threads in [1, 3] {
            let asked = Cell::new(0);
            let give_up = || {
                asked.set(asked.get() + 1);
                true
            };
            let done = AtomicUsize::new(0);
            let threads = Threads::uncapped(threads).interrupted_by(&give_up);
            let result = for_each(&threads, &order, |_| {
                std::thread::sleep(Duration::from_millis(1));
                done.fetch_add(1, Ordering::Relaxed);
                Ok(())
            });
            assert!(matches!(result, Err(Error::Interrupted)));
            assert_eq!(asked.get(), 1);
            assert!(done.into_inner() < 10_000);
        }
    }

    #[test]
    fn many_thread_counts_share_the_threads_of_one_pool() {
        let seen = Mutex::new(HashSet::new());
        for threads in 2..200 {
            let order: Vec<usize> = (0..threads).collect();
            for_each(&Threads::uncapped(threads), &order, |_| {
                lock(&seen).insert(std::thread::current().id());
                Ok(())
            })
            .unwrap();
        }
        // The helpers and this thread.
        assert!(lock(&seen).len() <= 5);
    }

    #[test]
    fn a_number_of_threads_is_bounded() {
        assert_eq!(
            Threads::new(3000).err().unwrap().to_string(),
            "threads = 3000 is out of range; expected at most 1024, or one per core where none are given"
        );
        assert!(Threads::new(MAX_THREADS).unwrap().count() <= cores());
        assert_eq!(Threads::new(1).unwrap().count(), 1);
    }
}
