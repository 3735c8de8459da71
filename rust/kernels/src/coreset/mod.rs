//! Greedy k-centre coreset: the exact sequence of the textbook loop, without its work.
//!
//! The loop keeps for every row its squared distance to the rows chosen so far, picks the row where
//! that is largest (ties to the lowest index), and lowers every row's value by the distance to the
//! pick: all rows are read once per pick. Here most of that reading never happens.
//!
//! A row's value only ever falls, so a value that has not seen the latest picks is an **upper
//! bound**, and a row whose bound lies below the largest value cannot be the next pick.
//!
//! ```text
//! state: a queue of all rows by (value descending, index ascending); a value is a squared distance in f64,
//!        and an upper bound of what the loop would have for the row
//!        seen[i], how many picks the value of row i has seen; a row that has seen all of them is fresh
//! loop
//!   until enough rows at or above the boundary are fresh
//!     take the first rows of the queue; boundary = the last of them
//!     bring them up to date, in parallel; put those that fall below the boundary back
//!   candidates = the others                                    all fresh
//!   while the best candidate is at or above the boundary
//!     pick it; lower the values of the candidates by the distance to it
//!   put the candidates back
//! ```
//!
//! *Why the picks are the textbook's.* A row in the queue has a bound below the boundary in the
//! same total order that decides the picks; its true value is no larger, so it stays below. A pick
//! is at or above the boundary and the best candidate, hence the best of all rows. Values come
//! from the canonical distance, whose bits depend on nothing but the two rows.
//!
//! *Bringing up to date* is a search for the nearest among the picks not seen yet, of interest only
//! below the value already known, by the bound of `filter` with that value as its first τ (`refresh.rs`).
//! The codes of a pick are the codes it had as a row. A pick lowers the candidates by the same bound
//! (`candidates.rs`). A pair that the codes rule out has a distance above the value, and would not have lowered it.
//!
//! *Nearly up to date is enough* for a row that falls below the boundary, and nearly all do: as soon as one
//! pick is found so near, its distance is the row's new bound, and the rest of the search is spared. `seen`
//! stays as it was, so that nothing is missed when the row's turn comes again.
//!
//! Without codes (few rows, few columns, or data that codes cannot tell apart) every distance is taken.
//!
//! *Radius.* The covering radius after a pick is the root of the value of the row that would be
//! picked next, so the loop runs one step beyond the last pick.

mod candidates;
mod forecast;
mod projection;
mod queue;
mod refresh;
mod start;
#[cfg(test)]
mod tests;

pub use projection::{Projection, project};
pub use start::Start;

use crate::context::Context;
use crate::error::Error;
use crate::filter::{Codes, SelectionPlan, TILE, shifted_dot};
use crate::matrix::{Matrix, reserved, zeroed};
use crate::simd::Simd;
use candidates::{Candidates, LowerCandidates};
use forecast::Forecast;
use queue::Queue;
use refresh::{REFRESHED, Refresh, RefreshScratch};
use std::cmp::Ordering;
use std::sync::atomic::{AtomicU64, Ordering as Memory};

/// Rows taken from the queue at a time. More rows give more picks per round, and cost their mutual products:
/// 2048 was faster than half as many (`benches/NOTES.md`). Tests see several rounds in small sets.
const CANDIDATES: usize = if cfg!(test) { 64 } else { 2048 };

/// Fresh rows above the boundary that are enough to pick from. Rounds of fewer rows are many, and leave the
/// blocks of queries half empty (`benches/NOTES.md`).
const ENOUGH_FRESH: usize = CANDIDATES / 4;

/// The chosen rows.
#[derive(Clone, Debug, PartialEq)]
pub struct Coreset {
    /// Row indices in pick order.
    pub indices: Vec<i64>,
    /// Covering radius (Euclidean) after each pick.
    pub radii: Vec<f64>,
    /// Distances taken, where the textbook loop takes one per row and pick.
    pub distances: u64,
}

/// A picked row's value: below every distance, so that it is not picked again.
const PICKED: f64 = -1.0;

/// Chooses `count` rows of `features` by greedy k-centre selection, beginning at `start`.
///
/// Fewer rows are returned when the chosen ones already cover every row at `radius`. A `radius` of 0 leaves the end
/// to the count, but for equal rows.
///
/// # Errors
/// [`Error::Invalid`] when `count` is not in `1..=rows`, `radius` is not a number from 0 on, or the
/// start is not a row, [`Error::Cancelled`].
pub fn greedy(
    context: &Context<'_>,
    features: Matrix<'_>,
    count: usize,
    radius: f64,
    start: &Start,
) -> Result<Coreset, Error> {
    let plan = || if features.rows() > CANDIDATES { SelectionPlan::choose(context, features, count) } else { Ok(None) };
    planned(context, features, count, radius, start, plan)
}

/// A selection by the codes of `plan`; `None` for no codes.
fn planned(
    context: &Context<'_>,
    features: Matrix<'_>,
    count: usize,
    radius: f64,
    start: &Start,
    plan: impl FnOnce() -> Result<Option<SelectionPlan>, Error>,
) -> Result<Coreset, Error> {
    let rows = features.rows();
    if count == 0 || count > rows {
        return Err(Error::invalid("amount", format!("between 1 and the {rows} rows of features"), count));
    }
    if radius.is_nan() || radius < 0.0 {
        return Err(Error::invalid("radius", "a number from 0 on", radius));
    }
    features.check_row_numbers("features")?;
    let forecast = Forecast { rows, count };
    context.set_progress(0, count);
    let (first, mut value) = start.resolve(context, features)?;
    if let Some(first) = first {
        value[first] = PICKED;
    }
    let plan = plan()?;
    let mut selection = Selection::new(context, features, value, plan)?;
    let mut coreset = Coreset { indices: reserved(&[count])?, radii: reserved(&[count])?, distances: 0 };
    if let Some(first) = first {
        selection.picks.push(first as u32);
        selection.publish_picks(0);
        coreset.indices.push(first as i64);
    }
    loop {
        let (boundary, fresh) = selection.refresh(context, &forecast)?;
        let mut candidates = Candidates::new(&selection, fresh)?;
        let before = coreset.indices.len();
        while let Some(best) = candidates.best().filter(|&best| best >= boundary) {
            if !coreset.indices.is_empty() {
                let reached = best.value.max(0.0).sqrt();
                coreset.radii.push(reached);
                if reached <= radius || coreset.indices.len() == count {
                    coreset.distances = selection.distances.into_inner();
                    return Ok(coreset);
                }
            }
            coreset.indices.push(best.index as i64);
            context.set_progress(forecast.done(rows, coreset.indices.len()), count);
            context.poll()?;
            selection.picks.push(best.index as u32);
            let candidates = &mut candidates;
            context.level().run(LowerCandidates { candidates, selection: &selection, pick: best.index });
        }
        for &row in candidates.rows() {
            selection.seen[row.index] = selection.picks.len() as u32;
            selection.queue.push(row);
        }
        selection.publish_picks(before);
    }
}

/// A row in the order that decides the picks: a larger value is greater, and among equals a lower index.
#[derive(Clone, Copy, Debug, PartialEq)]
struct Ranked {
    value: f64,
    index: usize,
}

impl Eq for Ranked {}

impl Ord for Ranked {
    fn cmp(&self, other: &Self) -> Ordering {
        self.value.total_cmp(&other.value).then(other.index.cmp(&self.index))
    }
}

impl PartialOrd for Ranked {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

/// The state of all rows.
struct Selection<'a> {
    features: Matrix<'a>,
    /// The rows that are no candidates, by their bounds.
    queue: Queue,
    /// How many picks the value of each row has seen.
    seen: Vec<u32>,
    /// The rows picked so far, in the order in which they were; where there are codes, the picks of each
    /// finished round by rising ε.
    picks: Vec<u32>,
    codes: Option<SelectionCodes>,
    /// How many distances were taken.
    distances: AtomicU64,
}

/// The codes of all rows, and those of the picks in their order.
struct SelectionCodes {
    plan: SelectionPlan,
    picks: Codes,
}

impl SelectionCodes {
    /// Whether the codes of all columns prove two rows farther apart than `tau`.
    #[inline(always)]
    fn rules_out<S: Simd>(&self, simd: S, x: usize, y: usize, tau: f64) -> bool {
        let (Some(stage), Some(encoded)) = (self.plan.encoder.stages().get(1), self.plan.encoded.get(1)) else {
            return false;
        };
        let threshold = stage.bound(&encoded.measures[x], tau).threshold(f64::from(encoded.measures[y].epsilon));
        shifted_dot(simd, encoded.row(x), (encoded.row(y), &encoded.measures[y])) < threshold
    }
}

impl<'a> Selection<'a> {
    fn new(
        context: &Context<'_>,
        features: Matrix<'a>,
        value: Vec<f64>,
        plan: Option<SelectionPlan>,
    ) -> Result<Self, Error> {
        let codes = plan.map(|plan| {
            let picks = Codes::empty(plan.encoder.stages()[0].width(), context.level().code_offset());
            SelectionCodes { plan, picks }
        });
        let seen = zeroed(&[value.len()])?;
        let queue = Queue::new(value)?;
        Ok(Self { features, queue, seen, picks: Vec::new(), codes, distances: AtomicU64::new(0) })
    }

    /// Publishes the picks of a finished round, which are those from `first` on, to the rows that were no
    /// candidates in it.
    fn publish_picks(&mut self, first: usize) {
        let picks = &mut self.picks[first..];
        if let Some(codes) = &mut self.codes {
            // A tile's bound has the largest ε of its rows: picks of about the same ε should share one.
            picks.sort_by(|&a, &b| {
                let epsilon = |row: u32| codes.plan.encoded[0].measures[row as usize].epsilon;
                epsilon(a).total_cmp(&epsilon(b))
            });
            for &mut pick in picks {
                let encoded = &codes.plan.encoded[0];
                codes.picks.push(encoded.row(pick as usize), &encoded.measures[pick as usize]);
            }
        }
    }

    /// Chooses a boundary, brings all rows at or above it up to date and takes them from the queue.
    fn refresh(&mut self, context: &Context<'_>, forecast: &Forecast) -> Result<(Ranked, Vec<Ranked>), Error> {
        let mut begun = 0;
        let mut fresh = Vec::with_capacity(2 * CANDIDATES);
        let mut stale = Vec::with_capacity(CANDIDATES);
        let mut boundary = Ranked { value: f64::INFINITY, index: 0 };
        loop {
            stale.clear();
            while fresh.len() + stale.len() < CANDIDATES {
                let Some(row) = self.queue.pop() else { break };
                boundary = row;
                if row.value == PICKED || self.is_fresh(row) { fresh.push(row) } else { stale.push(row) }
            }
            if boundary.value == f64::INFINITY {
                begun += stale.len();
                context.set_progress(forecast.done(begun, 0), forecast.count);
            }
            if !stale.is_empty() {
                self.update(context, &mut stale, boundary)?;
                for &row in &stale {
                    if self.is_fresh(row) && row >= boundary {
                        fresh.push(row);
                    } else {
                        self.queue.push(row);
                    }
                }
            }
            if stale.is_empty() || fresh.len() >= ENOUGH_FRESH {
                return Ok((boundary, fresh));
            }
        }
    }

    fn is_fresh(&self, row: Ranked) -> bool {
        self.seen[row.index] as usize == self.picks.len()
    }

    /// Brings rows up to date, or below the boundary.
    fn update(&mut self, context: &Context<'_>, rows: &mut [Ranked], boundary: Ranked) -> Result<(), Error> {
        // Rows that have seen about as many picks share a work item, which begins at the first pick that one
        // of them has not seen. The others see some picks again, which lowers nothing and costs little: at most
        // two thirds of the item's picks, and a tile.
        rows.sort_unstable_by_key(|row| (self.seen[row.index], row.index));
        let mut items = Vec::new();
        let mut rest = &mut *rows;
        while let Some(first) = rest.first() {
            let seen = |row: &Ranked| self.seen[row.index] as usize;
            let latest = 2 * self.picks.len().saturating_sub(seen(first)) / 3 + seen(first) + TILE;
            let count = rest.iter().take(REFRESHED).take_while(|row| seen(row) <= latest).count();
            let (item, others) = rest.split_at_mut(count);
            items.push((item, 0_u64));
            rest = others;
        }
        let (level, selection) = (context.level(), &*self);
        // Rows that have seen no pick have no bound yet. Any distance lies below an infinite boundary, and would
        // make a poor one.
        let stop_below = if boundary.value == f64::INFINITY { 0.0 } else { boundary.value };
        context.for_each_long(items.iter_mut(), RefreshScratch::default, |scratch, (rows, stopped), pulse| {
            *stopped = level.run(Refresh { selection, rows, stop_below, scratch, pulse });
        })?;
        for (rows, stopped) in items {
            for (i, row) in rows.iter().enumerate() {
                if stopped >> i & 1 == 0 {
                    self.seen[row.index] = self.picks.len() as u32;
                }
            }
        }
        Ok(())
    }

    /// Adds to the number of distances taken.
    fn add_distances(&self, count: usize) {
        self.distances.fetch_add(count as u64, Memory::Relaxed);
    }
}
