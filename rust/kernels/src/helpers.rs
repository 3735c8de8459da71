//! Threads that help a calling thread, kept from call to call.
//!
//! Starting a thread takes 20 µs at best and, where the machine is shared, often a millisecond, as long as a
//! whole call; one that waits is woken in a fraction of that, and its memory is warm (`benches/NOTES.md`).
//!
//! Every calling thread has helpers of its own: calls of different threads never wait for each other, and
//! nothing is shared that a fork could find locked. In a forked child the helpers do not exist; the child
//! sees that by its process id, leaves what it inherited untouched and starts its own. Helpers end with the
//! thread that they help, and when nothing was asked of them for some seconds.

use std::any::Any;
use std::cell::Cell;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::Builder;
use std::time::Duration;

use crate::simd::FloatMode;

/// How long a helper waits for work before it ends.
const IDLE: Duration = if cfg!(test) { Duration::from_millis(50) } else { Duration::from_secs(5) };

/// What a thread and its helpers tell each other.
#[derive(Default)]
struct State {
    /// Called only while [`Helpers::run`] waits, which is shorter than it claims to live.
    job: Option<&'static (dyn Fn() + Sync)>,
    /// How many helpers may still begin the job.
    wanted: usize,
    running: usize,
    /// Helpers that there are.
    alive: usize,
    panic: Option<Box<dyn Any + Send>>,
    ended: bool,
}

#[derive(Default)]
struct Shared {
    state: Mutex<State>,
    begun: Condvar,
    done: Condvar,
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The life of a helper.
    fn help(&self) {
        let mut state = self.lock();
        let mut waited = false;
        loop {
            let Some(job) = state.job.filter(|_| state.wanted > 0) else {
                if state.ended || waited {
                    state.alive -= 1;
                    return;
                }
                let (woken, timeout) = self.begun.wait_timeout(state, IDLE).unwrap_or_else(PoisonError::into_inner);
                (state, waited) = (woken, timeout.timed_out());
                continue;
            };
            waited = false;
            state.wanted -= 1;
            state.running += 1;
            drop(state);
            // A thread is started in the mode of its caller.
            let result = catch_unwind(AssertUnwindSafe(|| FloatMode::DEFAULT.run(job)));
            state = self.lock();
            state.running -= 1;
            if state.running == 0 {
                self.done.notify_one();
            }
            if let Err(panic) = result {
                state.panic = Some(panic);
            }
        }
    }
}

/// The helpers of a thread.
struct Helpers {
    process: u32,
    shared: Arc<Shared>,
}

thread_local! {
    static HELPERS: Cell<Option<Helpers>> = const { Cell::new(None) };
}

impl Helpers {
    fn new(process: u32) -> Self {
        Self { process, shared: Arc::default() }
    }

    /// Starts helpers until there are `count`, or the system gives no more threads: those that there are do
    /// the work.
    fn grow(&self, count: usize) {
        let mut state = self.shared.lock();
        while state.alive < count {
            let shared = Arc::clone(&self.shared);
            if Builder::new().name("patchcore-rs".into()).spawn(move || shared.help()).is_err() {
                break;
            }
            state.alive += 1;
        }
    }

    /// Runs `own` here and `job` on at most `count` helpers; returns when all have ended. A helper that is
    /// still asleep when `own` ends does not begin.
    fn run<R>(&self, count: usize, job: &(dyn Fn() + Sync), own: impl FnOnce() -> R, watch: &Watch<'_>) -> R {
        // SAFETY: only the lifetime changes. A helper takes the job while it is offered and raises `running`
        // before it calls it, under one lock; below, the offer is taken back and `running` awaited to be 0.
        // Nothing between can unwind. So no helper holds the job after this function.
        let job = unsafe { std::mem::transmute::<&(dyn Fn() + Sync), &'static (dyn Fn() + Sync)>(job) };
        let mut state = self.shared.lock();
        state.job = Some(job);
        state.wanted = count;
        drop(state);
        for _ in 0..count {
            self.shared.begun.notify_one();
        }
        let result = catch_unwind(AssertUnwindSafe(own));
        let mut watched = None;
        let mut state = self.shared.lock();
        state.job = None;
        while state.running > 0 {
            let waited = self.shared.done.wait_timeout(state, watch.every);
            let timeout;
            (state, timeout) = waited.unwrap_or_else(PoisonError::into_inner);
            if timeout.timed_out() && state.running > 0 {
                drop(state);
                watched = catch_unwind(AssertUnwindSafe(watch.look)).err().or(watched);
                state = self.shared.lock();
            }
        }
        let panic = state.panic.take().or(watched);
        drop(state);
        match (result, panic) {
            (Ok(result), None) => result,
            (Err(panic), _) | (_, Some(panic)) => resume_unwind(panic),
        }
    }
}

impl Drop for Helpers {
    fn drop(&mut self) {
        if self.process == std::process::id() {
            self.shared.lock().ended = true;
            self.shared.begun.notify_all();
        }
    }
}

/// What a thread does every so often while it waits for its helpers: it may tell them to end.
pub struct Watch<'a> {
    /// How often.
    pub every: Duration,
    /// What.
    pub look: &'a dyn Fn(),
}

/// Runs `own` on this thread and `job` on up to `count` others meanwhile.
///
/// # Panics
/// Where either does.
pub fn with_helpers<R>(count: usize, job: &(dyn Fn() + Sync), own: impl FnOnce() -> R, watch: &Watch<'_>) -> R {
    if count == 0 {
        return own();
    }
    let process = std::process::id();
    // Taken while in use: a call within this call, from its observer, gets helpers of its own. So does a
    // call while the thread ends and has no variables any more.
    let mine = HELPERS.try_with(Cell::take).ok().flatten().filter(|mine| mine.process == process);
    let mine = mine.unwrap_or_else(|| Helpers::new(process));
    mine.grow(count);
    let result = mine.run(count, job, own, watch);
    let _ = HELPERS.try_with(|helpers| helpers.set(Some(mine)));
    result
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::{AtomicUsize, Ordering};
    use std::time::{Duration, Instant};

    /// As the function itself, without a watch.
    fn with_helpers<R>(count: usize, job: &(dyn Fn() + Sync), own: impl FnOnce() -> R) -> R {
        super::with_helpers(count, job, own, &Watch { every: Duration::from_secs(60), look: &|| () })
    }

    #[test]
    fn all_have_ended_when_the_call_returns() {
        for round in 0..200 {
            let (begun, ended) = (AtomicUsize::new(0), AtomicUsize::new(0));
            let job = || {
                begun.fetch_add(1, Ordering::SeqCst);
                std::thread::sleep(Duration::from_micros(100));
                ended.fetch_add(1, Ordering::SeqCst);
            };
            let own = with_helpers(round % 5, &job, || {
                std::thread::sleep(Duration::from_micros(50));
                round
            });
            assert_eq!(own, round);
            assert!(begun.load(Ordering::SeqCst) <= round % 5);
            assert_eq!(begun.load(Ordering::SeqCst), ended.load(Ordering::SeqCst));
        }
    }

    #[test]
    fn helpers_do_help() {
        let begun = AtomicUsize::new(0);
        let start = Instant::now();
        with_helpers(
            3,
            &|| {
                begun.fetch_add(1, Ordering::SeqCst);
            },
            || {
                while begun.load(Ordering::SeqCst) < 3 {
                    assert!(start.elapsed() < Duration::from_secs(60), "no helper came");
                    std::thread::yield_now();
                }
            },
        );
        assert_eq!(begun.into_inner(), 3);
    }

    #[test]
    fn a_panic_reaches_the_caller_and_the_next_call_works() {
        let waiting = AtomicUsize::new(0);
        let job = || {
            waiting.fetch_add(1, Ordering::SeqCst);
            panic!("helper");
        };
        let result = catch_unwind(AssertUnwindSafe(|| {
            with_helpers(1, &job, || {
                while waiting.load(Ordering::SeqCst) == 0 {
                    std::thread::yield_now();
                }
            });
        }));
        assert_eq!(result.unwrap_err().downcast_ref::<&str>(), Some(&"helper"));
        let result = catch_unwind(|| with_helpers(1, &|| (), || panic!("caller")));
        assert_eq!(result.unwrap_err().downcast_ref::<&str>(), Some(&"caller"));
        assert_eq!(with_helpers(2, &|| (), || 7), 7);
    }

    /// Runs `count` helpers, and returns once all of them have begun.
    fn meet(count: usize, meanwhile: impl FnOnce()) {
        let begun = AtomicUsize::new(0);
        let over = AtomicUsize::new(0);
        let start = Instant::now();
        let wait = |until: &dyn Fn() -> bool| {
            while !until() {
                assert!(start.elapsed() < Duration::from_secs(60), "no helper came");
                std::thread::yield_now();
            }
        };
        let job = || {
            begun.fetch_add(1, Ordering::SeqCst);
            wait(&|| over.load(Ordering::SeqCst) > 0);
        };
        with_helpers(count, &job, || {
            wait(&|| begun.load(Ordering::SeqCst) == count);
            meanwhile();
            over.store(1, Ordering::SeqCst);
        });
    }

    #[test]
    fn a_call_within_a_call_has_its_own_helpers() {
        // All of the outer call's are busy meanwhile.
        meet(2, || meet(2, || ()));
    }

    #[test]
    fn helpers_end_when_idle_and_others_come() {
        meet(2, || ());
        std::thread::sleep(4 * IDLE);
        let alive = || {
            HELPERS.with(|helpers| {
                let mine = helpers.take();
                let alive = mine.as_ref().map(|mine| mine.shared.lock().alive);
                helpers.set(mine);
                alive
            })
        };
        assert_eq!(alive(), Some(0));
        meet(3, || ());
        assert_eq!(alive(), Some(3));
    }

    #[test]
    fn a_thread_that_waits_looks_around() {
        let stop = AtomicUsize::new(0);
        let job = || {
            while stop.load(Ordering::SeqCst) == 0 {
                std::thread::yield_now();
            }
        };
        let begun = Instant::now();
        let look = || stop.store(1, Ordering::SeqCst);
        let watch = Watch { every: Duration::from_millis(5), look: &look };
        // The helper begins while this thread sleeps, and ends only because it is told to.
        super::with_helpers(1, &job, || std::thread::sleep(Duration::from_millis(200)), &watch);
        assert!(begun.elapsed() < Duration::from_secs(60));
        assert_eq!(stop.into_inner(), 1);
        let panics = Watch { every: Duration::from_millis(5), look: &|| panic!("watch") };
        let slow = || std::thread::sleep(Duration::from_millis(400));
        let own = || std::thread::sleep(Duration::from_millis(200));
        let result = catch_unwind(AssertUnwindSafe(|| super::with_helpers(1, &slow, own, &panics)));
        assert_eq!(result.unwrap_err().downcast_ref::<&str>(), Some(&"watch"));
    }
}
