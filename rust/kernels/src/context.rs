//! What every call is given: its SIMD level, its threads, and who watches it.
//!
//! The calling thread takes items as its workers do (`workers.rs`) and between two of them, at most every
//! [`POLL`], tells its observer how far the call is. The observer answers whether to go on. So a
//! call is cancelled within the time of one item, and items are cut to a few milliseconds or ask their
//! `Pulse` that often.

use std::cell::Cell;
use std::fmt;
use std::ops::ControlFlow;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use crate::error::Error;
use crate::matrix::{checked_len, reserved};
use crate::simd::Level;
use crate::workers::{Watch, with_workers};

/// How often the observer is asked: often enough that Ctrl-C seems to act at once, seldom enough that the
/// calls into Python that answer it cost nothing.
pub const POLL: Duration = Duration::from_millis(25);

/// Sees `(done, total)` of a call, on the calling thread, and says whether to go on.
pub type Observer<'a> = &'a dyn Fn(u64, u64) -> ControlFlow<()>;

/// What every kernel call is given: SIMD level, threads, and who watches.
pub struct Context<'a> {
    level: Level,
    threads: usize,
    observer: Option<Observer<'a>>,
    progress: Cell<(u64, u64)>,
    polled: Cell<Instant>,
}

impl<'a> Context<'a> {
    /// A call on `threads` threads (at least one) at `level`.
    pub fn new(level: Level, threads: usize) -> Self {
        Self {
            level,
            threads: threads.max(1),
            observer: None,
            progress: Cell::new((0, 0)),
            polled: Cell::new(Instant::now()),
        }
    }

    /// The same call watched by `observer`.
    #[must_use]
    pub fn observed(self, observer: Observer<'a>) -> Self {
        Self { observer: Some(observer), ..self }
    }

    /// The SIMD level of the call.
    pub fn level(&self) -> Level {
        self.level
    }

    /// The number of threads of the call.
    pub fn threads(&self) -> usize {
        self.threads
    }

    /// Notes how far the call is; the observer sees it at the next poll.
    pub fn set_progress(&self, done: usize, total: usize) {
        self.progress.set((done as u64, total as u64));
    }

    /// Asks the observer, if it is time, whether to go on.
    ///
    /// # Errors
    /// [`Error::Cancelled`] when it says no.
    pub fn poll(&self) -> Result<(), Error> {
        let Some(observer) = self.observer else { return Ok(()) };
        if self.polled.get().elapsed() < POLL {
            return Ok(());
        }
        let (done, total) = self.progress.get();
        let answer = observer(done, total);
        self.polled.set(Instant::now());
        if answer.is_break() { Err(Error::Cancelled) } else { Ok(()) }
    }

    /// A vector of zeros for the product of `sizes`. Touching gigabytes for the first time takes
    /// seconds, so the observer is asked meanwhile.
    ///
    /// # Errors
    /// [`Error::TooLarge`], [`Error::OutOfMemory`], [`Error::Cancelled`].
    pub(crate) fn zeroed<T: Clone + Default>(&self, sizes: &[usize]) -> Result<Vec<T>, Error> {
        // 32 MB of f64: some milliseconds of page faults.
        const STEP: usize = 1 << 22;
        let len = checked_len(sizes)?;
        let mut vec = reserved(sizes)?;
        while vec.len() < len {
            vec.resize(len.min(vec.len() + STEP), T::default());
            self.poll()?;
        }
        Ok(vec)
    }

    /// Runs `body` on every item, the items dealt out in order to whichever thread is free. Each
    /// thread makes its own scratch once.
    ///
    /// Results must not depend on which thread takes an item; kernels get that by letting an item own
    /// its part of the output.
    ///
    /// # Errors
    /// [`Error::Cancelled`] when the observer asked to stop; items not yet begun are then not run.
    pub(crate) fn for_each<I: Send, S>(
        &self,
        items: impl ExactSizeIterator<Item = I> + Send,
        new_scratch: impl Fn() -> S + Sync,
        body: impl Fn(&mut S, I) + Sync,
    ) -> Result<(), Error> {
        self.for_each_long(items, new_scratch, |scratch, item, _| body(scratch, item))
    }

    /// As [`Context::for_each`], for items that take more than a few milliseconds: the body asks its
    /// [`Pulse`] now and then, and may return at once, whatever it has done, when that says to stop.
    ///
    /// # Errors
    /// As [`Context::for_each`].
    pub(crate) fn for_each_long<I: Send, S>(
        &self,
        items: impl ExactSizeIterator<Item = I> + Send,
        new_scratch: impl Fn() -> S + Sync,
        body: impl Fn(&mut S, I, &Pulse<'_>) + Sync,
    ) -> Result<(), Error> {
        let workers = self.threads.min(items.len()).saturating_sub(1);
        let queue = Mutex::new(items);
        // The lock is held while the iterator steps, never while a body runs, so a panicking body
        // cannot poison it.
        let next = || queue.lock().ok().and_then(|mut items| items.next());
        let take_items = |pulse: &Pulse<'_>| {
            let mut scratch = None;
            while !pulse.stopped() {
                let Some(item) = next() else { break };
                body(scratch.get_or_insert_with(&new_scratch), item, pulse);
            }
        };
        let stop = AtomicBool::new(false);
        let worker = || take_items(&Pulse { caller: None, stop: &stop });
        let poll = || self.poll().is_err();
        let pulse = Pulse { caller: Some(&poll), stop: &stop };
        let look = || {
            pulse.stopped();
        };
        with_workers(workers, &worker, || take_items(&pulse), &Watch { every: POLL, look: &look });
        if stop.load(Ordering::Relaxed) { Err(Error::Cancelled) } else { Ok(()) }
    }
}

impl fmt::Debug for Context<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut context = f.debug_struct("Context");
        context.field("level", &self.level).field("threads", &self.threads).field("progress", &self.progress.get());
        context.finish_non_exhaustive()
    }
}

/// Tells the body of a long item whether the call goes on.
pub(crate) struct Pulse<'a> {
    /// Asks the observer; on the calling thread only.
    caller: Option<&'a dyn Fn() -> bool>,
    stop: &'a AtomicBool,
}

impl Pulse<'_> {
    /// Whether the call was cancelled.
    pub(crate) fn stopped(&self) -> bool {
        if self.stop.load(Ordering::Relaxed) {
            return true;
        }
        let stop = self.caller.is_some_and(|asks| asks());
        if stop {
            self.stop.store(true, Ordering::Relaxed);
        }
        stop
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::AtomicUsize;

    #[test]
    fn every_item_runs_once_on_any_number_of_threads() {
        for threads in [1, 2, 7] {
            for count in [0, 1, 2, 3, 100] {
                let mut out = vec![0_u32; count];
                let context = Context::new(Level::Scalar, threads);
                context.for_each(out.iter_mut().enumerate(), || (), |(), (i, slot)| *slot += i as u32 + 1).unwrap();
                assert!(out.iter().enumerate().all(|(i, &value)| value == i as u32 + 1));
            }
        }
    }

    #[test]
    fn an_observer_can_stop_the_call() {
        let ran = AtomicUsize::new(0);
        let stop = |_: u64, _: u64| ControlFlow::Break(());
        let context = Context::new(Level::Scalar, 2).observed(&stop);
        let result = context.for_each(
            0..10_000,
            || (),
            |(), _| {
                ran.fetch_add(1, Ordering::Relaxed);
                std::thread::sleep(Duration::from_millis(1));
            },
        );
        assert_eq!(result, Err(Error::Cancelled));
        assert!(ran.load(Ordering::Relaxed) < 1000);
    }

    #[test]
    fn the_observer_sees_progress() {
        let seen = Cell::new((0, 0));
        let watch = |done: u64, total: u64| {
            seen.set((done, total));
            ControlFlow::Continue(())
        };
        let context = Context::new(Level::Scalar, 1).observed(&watch);
        context.set_progress(3, 9);
        std::thread::sleep(POLL);
        context.poll().unwrap();
        assert_eq!(seen.get(), (3, 9));
    }
}
