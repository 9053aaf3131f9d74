//! The one task that writes responses, a batch to a transaction.
//!
//! What comes while one transaction is written goes into the next. Who waits for
//! an entry is answered once it is written; rows that nobody waits for wait some
//! milliseconds for others.
//!
//! A response whose usage is recorded in the accounts is written after that: so a
//! response that is here has its usage row, and of a process that died in between
//! the accounts tell which are missing (`recorder::record_left`).
//!
//! What may not happen here: a settlement that is lost while the ledger cannot be
//! written. It is kept and tried again; who wants in is refused meanwhile.

use crate::metrics::Metrics;
use ashlar_store::{Admission, Ended, Settled, Store, StoreError};
use std::{sync::Arc, time::Duration};
use tokio::sync::{mpsc, oneshot};

/// Most entries taken at once.
const BATCH: usize = 1024;
/// How long a row that nobody waits for waits for others.
const LINGER: Duration = Duration::from_millis(5);
/// How long a ledger that cannot be written is left alone.
const PAUSE: Duration = Duration::from_millis(100);

/// Something to write.
// Nearly all are of the large kind.
#[allow(clippy::large_enum_variant)]
pub(crate) enum Entry {
    Admit(Admission, oneshot::Sender<Result<(), StoreError>>),
    /// With the usage row that goes before it, or who waits.
    Settle(Ended, Option<Settled>, Option<oneshot::Sender<()>>),
    /// To be written where it is missing.
    Left(Ended),
    Flush(oneshot::Sender<()>),
}

/// The way to the writer task.
pub(crate) struct Ledger(mpsc::UnboundedSender<Entry>);

impl Ledger {
    /// A ledger and the task that writes it; the task ends when the ledger and
    /// every recorder are gone.
    pub(crate) fn new(store: Store, metrics: Arc<Metrics>) -> (Self, impl Future<Output = ()>) {
        let (tx, mut rx) = mpsc::unbounded_channel();
        let writer = async move {
            let (mut entries, mut batch) = (Vec::with_capacity(BATCH), Batch::default());
            loop {
                let more = rx.recv_many(&mut entries, BATCH);
                // What could not be written is tried again, also when nothing comes.
                let pause = match (batch.ends.is_empty(), batch.waiting.is_empty()) {
                    (false, _) => PAUSE,
                    (true, false) => LINGER,
                    (true, true) => Duration::MAX,
                };
                let over = tokio::time::timeout(pause, more).await.is_ok_and(|n| n == 0);
                entries.drain(..).for_each(|e| batch.take(e));
                if !batch.hurries() {
                    tokio::time::sleep(LINGER).await;
                    (0..BATCH).map_while(|_| rx.try_recv().ok()).for_each(|e| batch.take(e));
                }
                batch.write(&store, &metrics, over).await;
                if over {
                    break;
                }
            }
        };
        (Self(tx), writer)
    }

    /// Hands an entry to the writer; false when it has ended.
    pub(crate) fn send(&self, entry: Entry) -> bool {
        self.0.send(entry).is_ok()
    }

    /// Waits until all entries so far are written whose usage is.
    pub(crate) async fn flush(&self) {
        let (ack, done) = oneshot::channel();
        if self.send(Entry::Flush(ack)) {
            let _ = done.await;
        }
    }
}

/// Who waits for a settlement.
enum Waits {
    Someone(oneshot::Sender<()>),
    Nobody,
    /// Nobody, and it may be there already.
    Left,
}

/// What one transaction writes.
#[derive(Default)]
struct Batch {
    begins: Vec<Admission>,
    admitted: Vec<oneshot::Sender<Result<(), StoreError>>>,
    /// Kept until they are written.
    ends: Vec<Ended>,
    settled: Vec<Waits>,
    /// Kept until their usage is written.
    waiting: Vec<(Ended, Settled)>,
    flushes: Vec<oneshot::Sender<()>>,
}

impl Batch {
    fn take(&mut self, entry: Entry) {
        match entry {
            Entry::Admit(admission, ack) => {
                self.begins.push(admission);
                self.admitted.push(ack);
            }
            Entry::Settle(ended, Some(usage), _) => self.waiting.push((ended, usage)),
            Entry::Settle(ended, None, ack) => self.end(ended, ack.map_or(Waits::Nobody, Waits::Someone)),
            Entry::Left(ended) => self.end(ended, Waits::Left),
            Entry::Flush(ack) => self.flushes.push(ack),
        }
    }

    fn end(&mut self, ended: Ended, waits: Waits) {
        self.ends.push(ended);
        self.settled.push(waits);
    }

    /// Whether someone waits.
    fn hurries(&self) -> bool {
        let someone = |w: &Waits| matches!(w, Waits::Someone(_));
        !self.admitted.is_empty() || !self.flushes.is_empty() || self.settled.iter().any(someone)
    }

    /// Writes and answers. A receiver that is gone does not wait for the answer.
    /// When it fails, who asks to be admitted is refused, and what is over stays.
    async fn write(&mut self, store: &Store, metrics: &Metrics, last: bool) {
        for (ended, mut usage) in std::mem::take(&mut self.waiting) {
            match last || usage.is_written() {
                true => self.end(ended, Waits::Nobody),
                false => self.waiting.push((ended, usage)),
            }
        }
        let done = match store.record(&self.begins, &self.ends).await {
            Ok(done) => done,
            Err(e) => {
                metrics.ledger_error();
                self.begins.clear();
                for ack in self.admitted.drain(..) {
                    let _ = ack.send(Err(StoreError::Task(e.to_string())));
                }
                // Nobody waits for a ledger that is out of order.
                self.settled.iter_mut().filter(|w| !matches!(w, Waits::Left)).for_each(|w| *w = Waits::Nobody);
                return self.flushes.clear();
            }
        };
        for (a, ack) in self.begins.drain(..).zip(self.admitted.drain(..)) {
            let known = || StoreError::AlreadyAdmitted(a.id.clone());
            let _ = ack.send(done.admitted.contains(&a.id).then_some(()).ok_or_else(known));
        }
        for (e, waits) in self.ends.drain(..).zip(self.settled.drain(..)) {
            if !done.settled.contains(&e.id) && !matches!(waits, Waits::Left) {
                metrics.ledger_error();
            }
            if let Waits::Someone(ack) = waits {
                let _ = ack.send(());
            }
        }
        for ack in self.flushes.drain(..) {
            let _ = ack.send(());
        }
    }
}
