//! A small thread pool for each calling thread, kept from call to call.
//!
//! Starting a thread takes 20 µs at best and, where the machine is shared, often a millisecond, as long as a
//! whole call; one that waits is woken in a fraction of that, and its memory is warm (`benches/NOTES.md`).
//!
//! Every calling thread has workers of its own: calls of different threads never wait for each other, and
//! nothing is shared that a fork could find locked. In a forked child the workers do not exist; the child
//! sees that by its process id, leaves what it inherited untouched and starts its own. Workers end with the
//! thread that they work for, and when they had nothing to do for some seconds.

use std::any::Any;
use std::cell::Cell;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::Builder;
use std::time::Duration;

use crate::simd::FloatMode;

/// How long a worker waits for work before it ends: longer than the pauses between the calls of one program,
/// short enough that a program that is done with us soon has its threads back.
const IDLE: Duration = if cfg!(test) { Duration::from_millis(50) } else { Duration::from_secs(5) };

/// What a panic carries. Its `Drop` is foreign code, which may panic itself.
type Payload = Box<dyn Any + Send>;

/// Keeps the first payload. A later one is leaked: were it dropped, it might unwind where nothing may.
fn keep_first(kept: &mut Option<Payload>, payload: Payload) {
    if kept.is_none() {
        *kept = Some(payload);
    } else {
        std::mem::forget(payload);
    }
}

/// What a thread and its workers tell each other.
#[derive(Default)]
struct State {
    /// The `'static` is not true: see the SAFETY note in [`Workers::run`]. The job is called only while that
    /// function is blocked.
    job: Option<&'static (dyn Fn() + Sync)>,
    /// How many workers may still begin the job.
    wanted: usize,
    /// How many have begun it and not ended.
    running: usize,
    /// How many workers there are.
    alive: usize,
    /// The first panic of the job.
    panic: Option<Payload>,
    /// Whether the calling thread is gone.
    ended: bool,
}

#[derive(Default)]
struct Shared {
    state: Mutex<State>,
    /// Told of every new job, and of the end: idle workers wait for it.
    begun: Condvar,
    /// Told when the last running worker has ended the job: the calling thread waits for it.
    done: Condvar,
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The life of a worker.
    fn work(&self) {
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
            if let Err(payload) = result {
                keep_first(&mut state.panic, payload);
            }
        }
    }
}

/// The workers of a thread.
struct Workers {
    process: u32,
    shared: Arc<Shared>,
}

thread_local! {
    static WORKERS: Cell<Option<Workers>> = const { Cell::new(None) };
}

impl Workers {
    fn new(process: u32) -> Self {
        Self { process, shared: Arc::default() }
    }

    /// Starts workers until there are `count`, or the system gives no more threads: those that there are do
    /// the work.
    fn grow(&self, count: usize) {
        let mut state = self.shared.lock();
        while state.alive < count {
            let shared = Arc::clone(&self.shared);
            if Builder::new().name("patchcore-rs".into()).spawn(move || shared.work()).is_err() {
                break;
            }
            state.alive += 1;
        }
    }

    /// Runs `own` here and `job` on at most `count` workers; returns when all have ended. A worker that is
    /// still asleep when `own` ends does not begin.
    fn run<R>(&self, count: usize, job: &(dyn Fn() + Sync), own: impl FnOnce() -> R, watch: &Watch<'_>) -> R {
        // SAFETY: only the lifetime changes. A worker takes the job while it is offered and raises `running`
        // before it calls it, under one lock; below, the offer is taken back and `running` awaited to be 0.
        // Nothing between can unwind: the calls into foreign code are caught, and of the payloads that they
        // leave, whose `Drop` is foreign code too, none is dropped. So no worker holds the job after this
        // function.
        let job = unsafe { std::mem::transmute::<&(dyn Fn() + Sync), &'static (dyn Fn() + Sync)>(job) };
        let mut state = self.shared.lock();
        state.job = Some(job);
        state.wanted = count;
        drop(state);
        for _ in 0..count {
            self.shared.begun.notify_one();
        }
        let result = catch_unwind(AssertUnwindSafe(own));
        let mut other = None;
        let mut state = self.shared.lock();
        state.job = None;
        while state.running > 0 {
            let waited = self.shared.done.wait_timeout(state, watch.every);
            let timeout;
            (state, timeout) = waited.unwrap_or_else(PoisonError::into_inner);
            if timeout.timed_out() && state.running > 0 {
                drop(state);
                if let Err(payload) = catch_unwind(AssertUnwindSafe(watch.look)) {
                    keep_first(&mut other, payload);
                }
                state = self.shared.lock();
            }
        }
        if let Some(payload) = state.panic.take() {
            keep_first(&mut other, payload);
        }
        drop(state);
        match (result, other) {
            (Ok(result), None) => result,
            (Ok(_), Some(payload)) => resume_unwind(payload),
            (Err(payload), other) => {
                std::mem::forget(other);
                resume_unwind(payload)
            }
        }
    }
}

impl Drop for Workers {
    fn drop(&mut self) {
        if self.process == std::process::id() {
            self.shared.lock().ended = true;
            self.shared.begun.notify_all();
        }
    }
}

/// What a thread does every so often while it waits for its workers: it may tell them to end.
pub(crate) struct Watch<'a> {
    /// How often.
    pub every: Duration,
    /// What.
    pub look: &'a dyn Fn(),
}

/// Runs `own` on this thread and `job` on up to `count` others meanwhile.
///
/// # Panics
/// Where either does.
pub(crate) fn with_workers<R>(count: usize, job: &(dyn Fn() + Sync), own: impl FnOnce() -> R, watch: &Watch<'_>) -> R {
    if count == 0 {
        return own();
    }
    let process = std::process::id();
    // Taken while in use: a call within this call, from its observer, gets workers of its own. So does a
    // call while the thread ends and has no variables any more.
    let workers = WORKERS.try_with(Cell::take).ok().flatten().filter(|workers| workers.process == process);
    let workers = workers.unwrap_or_else(|| Workers::new(process));
    workers.grow(count);
    let result = workers.run(count, job, own, watch);
    let _ = WORKERS.try_with(|kept| kept.set(Some(workers)));
    result
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::{AtomicUsize, Ordering};
    use std::time::{Duration, Instant};

    /// As the function itself, without a watch.
    fn with_workers<R>(count: usize, job: &(dyn Fn() + Sync), own: impl FnOnce() -> R) -> R {
        super::with_workers(count, job, own, &Watch { every: Duration::from_secs(60), look: &|| () })
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
            let own = with_workers(round % 5, &job, || {
                std::thread::sleep(Duration::from_micros(50));
                round
            });
            assert_eq!(own, round);
            assert!(begun.load(Ordering::SeqCst) <= round % 5);
            assert_eq!(begun.load(Ordering::SeqCst), ended.load(Ordering::SeqCst));
        }
    }

    #[test]
    fn workers_do_work() {
        let begun = AtomicUsize::new(0);
        let start = Instant::now();
        with_workers(
            3,
            &|| {
                begun.fetch_add(1, Ordering::SeqCst);
            },
            || {
                while begun.load(Ordering::SeqCst) < 3 {
                    assert!(start.elapsed() < Duration::from_secs(60), "no worker came");
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
            panic!("worker");
        };
        let result = catch_unwind(AssertUnwindSafe(|| {
            with_workers(1, &job, || {
                while waiting.load(Ordering::SeqCst) == 0 {
                    std::thread::yield_now();
                }
            });
        }));
        assert_eq!(result.unwrap_err().downcast_ref::<&str>(), Some(&"worker"));
        let result = catch_unwind(|| with_workers(1, &|| (), || panic!("caller")));
        assert_eq!(result.unwrap_err().downcast_ref::<&str>(), Some(&"caller"));
        assert_eq!(with_workers(2, &|| (), || 7), 7);
    }

    /// Runs `count` workers, and returns once all of them have begun.
    fn meet(count: usize, meanwhile: impl FnOnce()) {
        let begun = AtomicUsize::new(0);
        let over = AtomicUsize::new(0);
        let start = Instant::now();
        let wait = |until: &dyn Fn() -> bool| {
            while !until() {
                assert!(start.elapsed() < Duration::from_secs(60), "no worker came");
                std::thread::yield_now();
            }
        };
        let job = || {
            begun.fetch_add(1, Ordering::SeqCst);
            wait(&|| over.load(Ordering::SeqCst) > 0);
        };
        with_workers(count, &job, || {
            wait(&|| begun.load(Ordering::SeqCst) == count);
            meanwhile();
            over.store(1, Ordering::SeqCst);
        });
    }

    /// A panic's payload that panics when it is dropped, as foreign code may.
    struct PanicsOnDrop(Arc<AtomicUsize>);

    impl Drop for PanicsOnDrop {
        fn drop(&mut self) {
            self.0.fetch_add(1, Ordering::SeqCst);
            panic!("a payload was dropped");
        }
    }

    #[test]
    fn payloads_that_panic_when_dropped_are_not_dropped() {
        let dropped = Arc::new(AtomicUsize::new(0));
        let begun = AtomicUsize::new(0);
        let fail = || std::panic::panic_any(PanicsOnDrop(Arc::clone(&dropped)));
        let job = || {
            begun.fetch_add(1, Ordering::SeqCst);
            fail();
        };
        let slow = || {
            begun.fetch_add(1, Ordering::SeqCst);
            std::thread::sleep(Duration::from_millis(300));
            fail();
        };
        let wait = |count| {
            while begun.load(Ordering::SeqCst) < count {
                std::thread::yield_now();
            }
        };
        let watch = Watch { every: Duration::from_millis(5), look: &fail };
        // Two workers fail; two workers and the caller; a worker and, several times, the caller's watch.
        let failures: [&dyn Fn(); 3] = [
            &|| with_workers(2, &job, || wait(2)),
            &|| {
                with_workers(2, &job, || {
                    wait(2);
                    fail();
                });
            },
            &|| super::with_workers(1, &slow, || wait(1), &watch),
        ];
        for failure in failures {
            begun.store(0, Ordering::SeqCst);
            let payload = catch_unwind(AssertUnwindSafe(failure)).unwrap_err();
            assert!(payload.is::<PanicsOnDrop>());
            std::mem::forget(payload);
            assert_eq!(with_workers(2, &|| (), || 7), 7);
        }
        assert_eq!(dropped.load(Ordering::SeqCst), 0);
    }

    #[test]
    fn a_call_within_a_call_has_its_own_workers() {
        // All of the outer call's are busy meanwhile.
        meet(2, || meet(2, || ()));
    }

    #[test]
    fn workers_end_when_idle_and_others_come() {
        meet(2, || ());
        std::thread::sleep(4 * IDLE);
        let alive = || {
            WORKERS.with(|kept| {
                let workers = kept.take();
                let alive = workers.as_ref().map(|workers| workers.shared.lock().alive);
                kept.set(workers);
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
        // The worker begins while this thread sleeps, and ends only because it is told to.
        super::with_workers(1, &job, || std::thread::sleep(Duration::from_millis(200)), &watch);
        assert!(begun.elapsed() < Duration::from_secs(60));
        assert_eq!(stop.into_inner(), 1);
        let panics = Watch { every: Duration::from_millis(5), look: &|| panic!("watch") };
        let slow = || std::thread::sleep(Duration::from_millis(400));
        let own = || std::thread::sleep(Duration::from_millis(200));
        let result = catch_unwind(AssertUnwindSafe(|| super::with_workers(1, &slow, own, &panics)));
        assert_eq!(result.unwrap_err().downcast_ref::<&str>(), Some(&"watch"));
    }
}
