//! Persistent threads for short parallel steps.
//!
//! A decode step is some two hundred runs of tens of microseconds, so workers
//! spin briefly between runs before they park, and tasks are claimed one by one
//! from an atomic counter: a thread that loses its core to another process
//! delays the task it holds, not a fixed share. The calling thread works too.
//! What may not happen here: allocation or a contended lock in a run.
//!
//! Rejected: a work-stealing pool. Its queues cost more than these tasks last.

use std::{
    any::Any,
    cell::Cell,
    hint::spin_loop,
    panic::{AssertUnwindSafe, catch_unwind, resume_unwind},
    ptr,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, AtomicPtr, AtomicU64, AtomicUsize, Ordering},
    },
    thread::{self, JoinHandle, Thread},
    time::{Duration, Instant},
};

/// How long a worker looks for the next run before it parks.
const SPIN: Duration = Duration::from_micros(60);

thread_local! {
    /// Whether this thread is inside a task: a run there stays on it.
    static INSIDE: Cell<bool> = const { Cell::new(false) };
}

/// One run, on the caller's stack until its last task is done.
struct Job<'a> {
    body: &'a (dyn Fn(usize, usize) + Sync),
    tasks: usize,
    done: AtomicUsize,
    panic: Mutex<Option<Box<dyn Any + Send>>>,
}

/// A value on its own cache line.
#[repr(align(128))]
struct Line<T>(T);

struct Shared {
    /// Run number (high half) and tasks still unclaimed (low half).
    ticket: Line<AtomicU64>,
    /// The job of that run.
    job: Line<AtomicPtr<Job<'static>>>,
    parked: Vec<Line<AtomicBool>>,
    closing: AtomicBool,
}

impl Shared {
    /// Claims and does tasks until none is unclaimed.
    fn work(&self, worker: usize) {
        loop {
            let ticket = self.ticket.0.load(Ordering::Acquire);
            if ticket as u32 == 0 {
                return;
            }
            let job = self.job.0.load(Ordering::Relaxed);
            let claim = self.ticket.0.compare_exchange_weak(
                ticket,
                ticket - 1,
                Ordering::AcqRel,
                Ordering::Relaxed,
            );
            if claim.is_err() {
                continue;
            }
            // SAFETY: the claim succeeded, so the ticket did not change since it
            // was read with a task unclaimed; the run's caller waits for that
            // task, hence `job` was not replaced and still lives.
            let job = unsafe { &*job };
            let task = job.tasks - ticket as u32 as usize;
            if let Err(cause) = catch_unwind(AssertUnwindSafe(|| (job.body)(task, worker))) {
                *job.panic.lock().unwrap_or_else(PoisonError::into_inner) = Some(cause);
            }
            job.done.fetch_add(1, Ordering::Release);
        }
    }

    fn serve(&self, worker: usize) {
        INSIDE.set(true);
        while !self.closing.load(Ordering::Relaxed) {
            self.work(worker);
            let since = Instant::now();
            while self.idle() && since.elapsed() < SPIN {
                (0..16).for_each(|_| spin_loop());
            }
            let parked = &self.parked[worker].0;
            if self.idle() {
                // Sequentially consistent with the caller's "publish, then look
                // who is parked": one of the two sees the other.
                parked.store(true, Ordering::SeqCst);
                while self.ticket.0.load(Ordering::SeqCst) as u32 == 0
                    && !self.closing.load(Ordering::SeqCst)
                    && parked.load(Ordering::SeqCst)
                {
                    thread::park();
                }
                parked.store(false, Ordering::SeqCst);
            }
        }
    }

    fn idle(&self) -> bool {
        self.ticket.0.load(Ordering::Relaxed) as u32 == 0
            && !self.closing.load(Ordering::Relaxed)
    }
}

/// Persistent threads; see the module's header.
pub struct Pool {
    shared: Arc<Shared>,
    handles: Vec<JoinHandle<()>>,
    wake: Vec<Thread>,
    /// Held during a run; its value is the run number.
    run: Mutex<u32>,
}

impl std::fmt::Debug for Pool {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Pool").field("threads", &self.threads()).finish()
    }
}

impl Pool {
    /// A pool of `threads` threads, the caller of [`Pool::run`] being one of
    /// them. 0 stands for the processors this process may use (cgroups
    /// counted). Threads the system refuses to start are done without.
    pub fn new(threads: usize) -> Arc<Self> {
        let threads = match threads {
            0 => thread::available_parallelism().map_or(1, usize::from),
            n => n.min(1024),
        };
        let shared = Arc::new(Shared {
            ticket: Line(AtomicU64::new(0)),
            job: Line(AtomicPtr::new(ptr::null_mut())),
            parked: (0..threads).map(|_| Line(AtomicBool::new(false))).collect(),
            closing: AtomicBool::new(false),
        });
        let handles: Vec<_> = (1..threads)
            .map_while(|worker| {
                let shared = shared.clone();
                let name = format!("ashlar-{worker}");
                thread::Builder::new().name(name).spawn(move || shared.serve(worker)).ok()
            })
            .collect();
        let wake = handles.iter().map(|h| h.thread().clone()).collect();
        Arc::new(Self { shared, handles, wake, run: Mutex::new(0) })
    }

    /// Threads at work, the caller's included.
    pub fn threads(&self) -> usize {
        self.handles.len() + 1
    }

    /// Calls `body(task, worker)` once for every task below `tasks`; `worker`
    /// is below [`Pool::threads`] and never the same on two threads at once,
    /// within one run. Returns when all are done. Inside a task it runs in place.
    ///
    /// # Panics
    /// With the panic of a task, after all tasks are done.
    pub fn run<F: Fn(usize, usize) + Sync>(&self, tasks: usize, body: F) {
        if INSIDE.get() || self.handles.is_empty() || tasks <= 1 {
            (0..tasks).for_each(|task| body(task, 0));
            return;
        }
        assert!(u32::try_from(tasks).is_ok(), "{tasks} tasks in one run");
        let mut number = self.run.lock().unwrap_or_else(PoisonError::into_inner);
        *number = number.wrapping_add(1);
        let job = Job { body: &body, tasks, done: AtomicUsize::new(0), panic: Mutex::new(None) };
        let shared = &self.shared;
        shared.job.0.store((&raw const job).cast_mut().cast(), Ordering::Relaxed);
        let ticket = u64::from(*number) << 32 | tasks as u64;
        shared.ticket.0.store(ticket, Ordering::SeqCst);
        for (parked, thread) in shared.parked[1..].iter().zip(&self.wake).take(tasks - 1) {
            if parked.0.load(Ordering::SeqCst) && parked.0.swap(false, Ordering::SeqCst) {
                thread.unpark();
            }
        }
        INSIDE.set(true);
        shared.work(0);
        INSIDE.set(false);
        let mut spins = 0u32;
        while job.done.load(Ordering::Acquire) < tasks {
            spins += 1;
            if spins < 2000 { spin_loop() } else { thread::yield_now() }
        }
        let panic = job.panic.into_inner().unwrap_or_else(PoisonError::into_inner);
        drop(number);
        if let Some(cause) = panic {
            resume_unwind(cause);
        }
    }

    /// Cuts `data` into chunks of `size` (the last may be shorter) and calls
    /// `body(index, chunk)` for each, in parallel.
    pub fn chunks_mut<T: Send>(
        &self,
        data: &mut [T],
        size: usize,
        body: impl Fn(usize, &mut [T]) + Sync,
    ) {
        let (len, size) = (data.len(), size.max(1));
        let base = SendPtr(data.as_mut_ptr());
        self.run(len.div_ceil(size), |task, _| {
            let from = task * size;
            // SAFETY: chunks are disjoint, inside `data`, one task each.
            let chunk = unsafe {
                std::slice::from_raw_parts_mut(base.get().add(from), size.min(len - from))
            };
            body(task, chunk);
        });
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        self.shared.closing.store(true, Ordering::SeqCst);
        self.wake.iter().for_each(Thread::unpark);
        for handle in self.handles.drain(..) {
            // Tasks' panics are caught, so a worker ends in order.
            let _ = handle.join();
        }
    }
}

/// A pointer that tasks of one run share; each use argues its disjointness.
pub(crate) struct SendPtr<T>(pub(crate) *mut T);
// SAFETY: only the pointer is shared; what is written through it is argued
// where that happens.
unsafe impl<T> Sync for SendPtr<T> {}

impl<T> SendPtr<T> {
    /// A method, so that closures capture the wrapper and not the raw field.
    pub(crate) fn get(&self) -> *mut T {
        self.0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_task_runs_once_under_concurrent_callers() {
        let pool = Pool::new(3);
        thread::scope(|scope| {
            for _ in 0..3 {
                scope.spawn(|| {
                    for tasks in 0..400 {
                        let counts: Vec<_> = (0..tasks).map(|_| AtomicUsize::new(0)).collect();
                        pool.run(tasks, |t, w| {
                            assert!(w < pool.threads());
                            counts[t].fetch_add(1, Ordering::Relaxed);
                        });
                        assert!(counts.iter().all(|c| c.load(Ordering::Relaxed) == 1));
                    }
                });
            }
        });
    }

    #[test]
    fn wakes_parked_workers_and_nests() {
        let pool = Pool::new(2);
        let total = AtomicUsize::new(0);
        for _ in 0..20 {
            thread::sleep(SPIN * 3);
            pool.run(4, |_, _| pool.run(3, |_, _| { total.fetch_add(1, Ordering::Relaxed); }));
        }
        assert_eq!(total.into_inner(), 240);
    }

    #[test]
    fn more_threads_than_processors_lose_nothing() {
        let pool = Pool::new(4 * thread::available_parallelism().map_or(1, usize::from) + 8);
        let since = Instant::now();
        for tasks in 1..300 {
            let counts: Vec<_> = (0..tasks).map(|_| AtomicUsize::new(0)).collect();
            pool.run(tasks, |t, _| { counts[t].fetch_add(1, Ordering::Relaxed); });
            assert!(counts.iter().all(|c| c.load(Ordering::Relaxed) == 1));
        }
        // A run takes microseconds; one in ten waiting for a time slice, not
        // one time slice a thread and run.
        assert!(since.elapsed() < Duration::from_secs(20), "{:?}", since.elapsed());
    }

    #[test]
    fn panics_upon_panics_leave_the_pool_whole() {
        for threads in [1, 2, 9] {
            let pool = Pool::new(threads);
            for round in 0..50 {
                let died = catch_unwind(AssertUnwindSafe(|| {
                    pool.run(8, |t, _| assert_ne!(t % 3, round % 3, "some tasks"));
                }));
                assert!(died.is_err());
                let total = AtomicUsize::new(0);
                pool.run(40, |_, _| { total.fetch_add(1, Ordering::Relaxed); });
                assert_eq!(total.into_inner(), 40);
            }
        }
    }

    #[test]
    fn a_task_panic_reaches_the_caller_and_the_pool_lives_on() {
        let pool = Pool::new(2);
        let died = catch_unwind(AssertUnwindSafe(|| {
            pool.run(8, |t, _| assert_ne!(t, 5, "task five"));
        }));
        assert!(died.is_err());
        let mut data = vec![0; 100];
        pool.chunks_mut(&mut data, 7, |i, c| c.fill(i));
        assert!(data.iter().enumerate().all(|(j, &v)| v == j / 7));
    }
}
