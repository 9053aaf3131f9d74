//! What this replica may admit without asking the database.
//!
//! For each limit and window in use there is a cell: how much of the limit
//! this replica has *claimed* in the database, and how much of that is *used*,
//! reserved or spent. A request is admitted here, in memory, while all its
//! limits have claimed enough; else the writer claims more, in a transaction
//! that sees what all other replicas have claimed. So what is used never
//! exceeds what is claimed, and all claims together never exceed the limit: no
//! two processes overspend it, however many requests they admit at once.
//!
//! The one exception is an estimate that was too low: what a request uses above
//! it is charged in full when it settles, and the claim grows with it.
//!
//! The lock is held for a few map look-ups and never across an await.

use super::limit::{Bound, Exceeded};
use ashlar_core::Decimal;
use std::{
    collections::HashMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

/// A limit's counter and the start of the window.
pub(super) type CellId = (Arc<str>, i64);

/// How long the word that a limit is used up is taken without asking again.
const DENIAL: Duration = Duration::from_millis(100);

/// What a request asks of one limit.
#[derive(Debug, Clone)]
pub(super) struct Need {
    pub(super) cell: CellId,
    pub(super) bound: Bound,
    pub(super) end_ms: Option<i64>,
    pub(super) amount: i128,
}

impl Need {
    fn cap(&self) -> i128 {
        self.bound.limit.amount.picos()
    }

    fn exceeded(&self, taken: i128) -> Exceeded {
        Exceeded {
            scope: self.bound.scope,
            limit_id: self.cell.0.to_string(),
            limit: self.bound.limit.clone(),
            taken: Decimal::from_picos(taken),
            asked: Decimal::from_picos(self.amount),
            retry_at_ms: self.end_ms.filter(|_| self.amount <= self.cap()),
        }
    }
}

#[derive(Debug)]
struct Cell {
    cap: i128,
    claimed: i128,
    used: i128,
    /// Reservations that have not settled.
    open: u64,
    /// Reserved since the last tick.
    demand: i128,
    /// What of the limit nobody had claimed, and when that was read.
    room: Option<(i128, Instant)>,
}

impl Cell {
    fn slack(&self) -> i128 {
        (self.claimed - self.used).max(0)
    }
}

#[derive(Debug, Default)]
pub(super) struct Front {
    /// Changes when a lease is lost and with it all that was claimed.
    generation: u64,
    cells: HashMap<CellId, Cell>,
}

/// All cells of a replica.
#[derive(Debug, Default)]
pub(super) struct Cells(Mutex<Front>);

/// The answer to a request for admission.
pub(super) enum Answer {
    /// Reserved, under this generation.
    Reserved(u64),
    /// A limit is used up.
    Exceeded(Exceeded),
    /// The database has to be asked.
    Ask,
}

impl Cells {
    pub(super) fn lock(&self) -> MutexGuard<'_, Front> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Front {
    /// Reserves all of `needs`, or none.
    pub(super) fn reserve(&mut self, needs: &[Need]) -> Answer {
        let mut ask = false;
        for need in needs {
            if need.amount > need.cap() {
                return Answer::Exceeded(need.exceeded(self.cells.get(&need.cell).map_or(0, |c| c.used)));
            }
            let Some(cell) = self.cells.get_mut(&need.cell) else {
                ask = true;
                continue;
            };
            cell.cap = need.cap();
            let slack = cell.slack();
            let short = need.amount > slack || cell.used + need.amount > cell.cap;
            if let Some((room, read)) = cell.room
                && short
                && need.amount > slack.max(0) + room
                && read.elapsed() < DENIAL
            {
                return Answer::Exceeded(need.exceeded(cell.cap - room - slack));
            }
            ask |= short;
        }
        if ask {
            return Answer::Ask;
        }
        for need in needs {
            if let Some(cell) = self.cells.get_mut(&need.cell) {
                cell.used += need.amount;
                cell.demand += need.amount;
                cell.open += 1;
            }
        }
        Answer::Reserved(self.generation)
    }

    /// Takes a reservation back that was never acknowledged, or settles one with
    /// what was used in the end; the amounts go with `needs`.
    pub(super) fn settle(&mut self, generation: u64, needs: &[Need], actual: &[i128]) {
        if generation != self.generation {
            return;
        }
        for (need, actual) in needs.iter().zip(actual) {
            if let Some(cell) = self.cells.get_mut(&need.cell) {
                cell.used += actual - need.amount;
                cell.open = cell.open.saturating_sub(1);
                cell.claimed = cell.claimed.max(cell.used);
            }
        }
    }

    /// What of a limit is left, as far as this replica knows: what it has claimed
    /// and not used, and what nobody had claimed when the database was last asked.
    pub(super) fn left(&self, need: &Need) -> i128 {
        let Some(cell) = self.cells.get(&need.cell) else { return need.cap() };
        let room = cell.room.map_or(need.cap() - cell.claimed, |(room, _)| room);
        (cell.slack() + room.max(0)).min(need.cap())
    }

    pub(super) fn generation(&self) -> u64 {
        self.generation
    }

    /// Forgets everything: a new lease starts from nothing.
    pub(super) fn reset(&mut self) {
        self.generation += 1;
        self.cells.clear();
    }

    pub(super) fn contains(&self, id: &CellId) -> bool {
        self.cells.contains_key(id)
    }

    pub(super) fn claimed(&self, id: &CellId) -> Option<i128> {
        self.cells.get(id).map(|c| c.claimed)
    }

    /// A cell as the database has it.
    pub(super) fn load(&mut self, id: &CellId, need: &Need, spent: i128, claimed: i128) {
        self.cells.entry(id.clone()).or_insert(Cell {
            cap: need.cap(),
            claimed: claimed.max(spent),
            used: spent,
            open: 0,
            demand: 0,
            room: None,
        });
    }

    /// Gives back what no request will need soon: all of it where none came since
    /// the last tick, and above four ticks' worth where other replicas want some.
    /// Answers the cells whose claims changed.
    pub(super) fn trim(&mut self, alone: bool, all: bool) -> Vec<CellId> {
        let mut changed = Vec::new();
        for (id, cell) in &mut self.cells {
            let idle = cell.demand == 0 || all;
            let keep = if idle { 0 } else if alone { i128::MAX } else { cell.demand.saturating_mul(4) };
            cell.demand = 0;
            if cell.slack() > keep {
                let back = cell.slack() - keep;
                cell.claimed -= back;
                cell.room = cell.room.map(|(room, read)| (room + back, read));
                changed.push(id.clone());
            }
        }
        changed
    }

    /// Drops the cells in which nothing is open, claimed beyond what is spent, or
    /// on its way to the database, which has written `spent`; answers them.
    pub(super) fn evict(&mut self, spent: impl Fn(&CellId) -> Option<i128>) -> Vec<CellId> {
        let gone = |id: &CellId, c: &Cell| c.open == 0 && c.demand == 0 && c.claimed == c.used && spent(id) == Some(c.used);
        let ids: Vec<CellId> = self.cells.iter().filter(|(id, c)| gone(id, c)).map(|(id, _)| id.clone()).collect();
        for id in &ids {
            self.cells.remove(id);
        }
        ids
    }

    /// Whether any reservation is open.
    pub(super) fn busy(&self) -> bool {
        self.cells.values().any(|c| c.open > 0)
    }
}

/// The decisions of one batch on requests that need more than is claimed. They
/// hold once the batch is committed; until then [`Claims::undo`] takes them back.
#[derive(Debug, Default)]
pub(super) struct Claims {
    /// What nobody has claimed.
    room: HashMap<CellId, i128>,
    /// What this batch claims.
    grants: HashMap<CellId, i128>,
    /// Slack set aside for requests of this batch.
    held: Vec<(CellId, i128)>,
}

impl Claims {
    /// Takes note of what all replicas have claimed of a cell.
    pub(super) fn read(&mut self, front: &Front, need: &Need, others: i128) {
        let own = front.cells.get(&need.cell).map_or(0, |c| c.claimed);
        // A limit that was lowered, or overshot, leaves less than nothing.
        self.room.entry(need.cell.clone()).or_insert(need.cap() - others - own);
    }

    /// Decides one request; what it takes is taken from the requests after it.
    pub(super) fn decide(&mut self, front: &mut Front, needs: &[Need]) -> Result<(), Exceeded> {
        for need in needs {
            let room = self.room.get(&need.cell).copied().unwrap_or(0);
            let slack = front.cells.get(&need.cell).map_or(0, Cell::slack);
            if need.amount > need.cap() || need.amount > slack + room {
                if let Some(cell) = front.cells.get_mut(&need.cell) {
                    cell.room = Some((room, Instant::now()));
                }
                return Err(need.exceeded(need.cap() - room - slack));
            }
        }
        for need in needs {
            let Some(cell) = front.cells.get_mut(&need.cell) else { continue };
            let from_slack = need.amount.min(cell.slack());
            cell.used += from_slack;
            cell.demand += need.amount;
            cell.open += 1;
            self.held.push((need.cell.clone(), from_slack));
            let more = need.amount - from_slack;
            *self.grants.entry(need.cell.clone()).or_insert(0) += more;
            if let Some(room) = self.room.get_mut(&need.cell) {
                *room -= more;
            }
        }
        Ok(())
    }

    /// What to claim beyond what was asked for, so that the next requests need
    /// not ask: a share of the room, small when little is left.
    fn spare(&self, id: &CellId, granted: i128, replicas: i128) -> i128 {
        let room = self.room.get(id).copied().unwrap_or(0).max(0);
        let share = room / (2 * replicas.max(1));
        if share < granted { 0 } else { share }
    }

    /// The claims to write, absolute, given what is claimed now.
    pub(super) fn grant(&mut self, front: &Front, replicas: i128) -> Vec<(CellId, i128)> {
        let ids: Vec<CellId> = self.grants.keys().cloned().collect();
        let mut out = Vec::with_capacity(ids.len());
        for id in ids {
            let granted = self.grants[&id];
            // A request whose need the slack just covered asks for nothing more.
            let spare = if granted > 0 { self.spare(&id, granted, replicas) } else { 0 };
            let claimed = front.cells.get(&id).map_or(0, |c| c.claimed) + granted + spare;
            if let Some(room) = self.room.get_mut(&id) {
                *room -= spare;
            }
            out.push((id.clone(), claimed));
            self.grants.insert(id, granted + spare);
        }
        out
    }

    /// Makes the decisions hold.
    pub(super) fn apply(&self, front: &mut Front, used: &[&[Need]]) {
        for (id, granted) in &self.grants {
            if let Some(cell) = front.cells.get_mut(id) {
                cell.claimed += granted;
            }
        }
        for need in used.iter().copied().flatten() {
            if let Some(cell) = front.cells.get_mut(&need.cell) {
                cell.used += need.amount;
            }
        }
        for (id, from_slack) in &self.held {
            if let Some(cell) = front.cells.get_mut(id) {
                cell.used -= from_slack;
            }
        }
        for (id, room) in &self.room {
            if let Some(cell) = front.cells.get_mut(id) {
                cell.room = Some((*room, Instant::now()));
            }
        }
    }

    /// Takes the decisions back.
    pub(super) fn undo(&self, front: &mut Front, used: &[&[Need]]) {
        for (id, from_slack) in &self.held {
            if let Some(cell) = front.cells.get_mut(id) {
                cell.used -= from_slack;
            }
        }
        for need in used.iter().copied().flatten() {
            if let Some(cell) = front.cells.get_mut(&need.cell) {
                cell.open = cell.open.saturating_sub(1);
            }
        }
    }
}
