//! Choosing an endpoint of a pool, and the worker-local turns that this and
//! the division among backends advance.

use std::cell::{Cell, RefCell};
use std::sync::Arc;

use crate::endpoint::LiveEndpoint;
use crate::table::{Balance, UpstreamProtocol};

pub(crate) mod schedule;

/// 2^64 divided by the golden ratio: multiples of it, modulo 2^64, fill the
/// range evenly however many there are.
const GOLDEN: u64 = 0x9E37_79B9_7F4A_7C15;

/// 2^64 times the fraction of the square root of two: as even, and unrelated.
const ROOT_OF_TWO: u64 = 0x6A09_E667_F3BC_C908;

/// Buckets of a sticky split.
pub(crate) const BUCKETS: u16 = 10_000;

/// Whose turn it is, by slot. Each worker has its own, so nothing is shared
/// and nothing is atomic. Grows on first use of a slot.
#[derive(Debug)]
pub struct Turns {
    pools: RefCell<Vec<u32>>,
    /// By turn of a split: how far through its cycle it is, in 2^-64ths. As a
    /// fraction it wraps by itself and keeps its meaning when weights change.
    splits: RefCell<Vec<u64>>,
    bucket: Cell<u64>,
    random: RefCell<fastrand::Rng>,
    worker: u32,
}

impl Default for Turns {
    fn default() -> Turns {
        Turns::for_worker(0)
    }
}

impl Turns {
    /// The turns of worker number `worker`. Workers and splits start at
    /// different places of their cycles, so that few requests each, over many
    /// workers or many rules, divide well together.
    pub fn for_worker(worker: u32) -> Turns {
        Turns {
            pools: RefCell::default(),
            splits: RefCell::default(),
            bucket: Cell::new(u64::from(worker).wrapping_mul(GOLDEN) >> 16),
            random: RefCell::new(fastrand::Rng::with_seed(u64::from(worker))),
            worker,
        }
    }

    /// The next turn of pool slot `slot`. Wraps.
    pub fn next(&self, slot: u32) -> u32 {
        let mut pools = self.pools.borrow_mut();
        let turn = at(&mut pools, slot, |_| self.worker);
        let taken = *turn;
        *turn = taken.wrapping_add(1);
        taken
    }

    /// Moves split turn `turn` by `step` 2^-64ths of its cycle. Returns where
    /// it stood, and whether the step completed a cycle.
    pub(crate) fn advance(&self, turn: u32, step: u64) -> (u64, bool) {
        let mut splits = self.splits.borrow_mut();
        let worker = u64::from(self.worker).wrapping_mul(ROOT_OF_TWO);
        let phase = at(&mut splits, turn, |turn| (turn as u64).wrapping_mul(GOLDEN).wrapping_add(worker));
        let before = *phase;
        let (after, completed) = before.overflowing_add(step);
        *phase = after;
        (before, completed)
    }

    /// A bucket for a user seen for the first time. Any run of them is spread
    /// evenly over all buckets.
    pub(crate) fn bucket(&self) -> u16 {
        let next = self.bucket.get().wrapping_add(GOLDEN);
        self.bucket.set(next);
        scale(next, u32::from(BUCKETS)) as u16
    }

    fn random(&self, below: u32) -> u32 {
        self.random.borrow_mut().u32(0..below)
    }
}

/// `fraction` in 2^-64ths of `whole`, rounded down.
pub(crate) fn scale(fraction: u64, whole: u32) -> u32 {
    ((u128::from(fraction) * u128::from(whole)) >> 64) as u32
}

fn at<T>(turns: &mut Vec<T>, index: u32, start: impl Fn(usize) -> T) -> &mut T {
    let index = index as usize;
    if index >= turns.len() {
        let known = turns.len();
        turns.extend((known..(index + 1).next_power_of_two()).map(start));
    }
    &mut turns[index]
}

/// The endpoints behind one pool key, ready to be chosen from.
#[derive(Debug)]
pub struct CompiledPool {
    /// What the endpoints speak.
    pub protocol: UpstreamProtocol,
    /// How one of them is chosen.
    pub balance: Balance,
    /// All of them; empty when the key names nothing.
    pub endpoints: Vec<CompiledEndpoint>,
    /// Where this pool is: the argument of [`crate::Router::pool`] and [`Turns::next`].
    pub slot: u32,
    /// Indices of endpoints, each as often as its weight; `None` when all weigh the same.
    schedule: Option<Box<[u16]>>,
}

/// One endpoint of a pool.
#[derive(Clone, Debug)]
pub struct CompiledEndpoint {
    /// Its live state, shared with every pool and generation that has this address.
    pub live: Arc<LiveEndpoint>,
    /// Its share among the pool's endpoints, at least 1.
    pub weight: u16,
    /// `topology.kubernetes.io/zone` of its node.
    pub zone: Option<Arc<str>>,
}

impl CompiledPool {
    pub(crate) fn empty(slot: u32) -> CompiledPool {
        CompiledPool::new(slot, UpstreamProtocol::default(), Balance::default(), Vec::new())
    }

    pub(crate) fn new(
        slot: u32,
        protocol: UpstreamProtocol,
        balance: Balance,
        endpoints: Vec<CompiledEndpoint>,
    ) -> CompiledPool {
        let weights: Vec<u64> = endpoints.iter().map(|e| u64::from(e.weight.max(1))).collect();
        CompiledPool { protocol, balance, endpoints, slot, schedule: schedule::of_endpoints(&weights) }
    }

    /// An endpoint for the next attempt: never one whose id is in `tried`, and
    /// not an ejected one unless all others are ejected too. `now_ms` is the
    /// clock of [`LiveEndpoint::is_available`]. `None`: nothing is left to try.
    pub fn pick(&self, turns: &Turns, now_ms: u64, tried: &[u64]) -> Option<&CompiledEndpoint> {
        if let [only] = self.endpoints.as_slice() {
            return (!tried.contains(&only.live.id)).then_some(only);
        }
        let may = |e: &&CompiledEndpoint| !tried.contains(&e.live.id) && e.live.is_available(now_ms);
        let picked = match self.balance {
            Balance::RoundRobin => self.in_turn(turns, may),
            Balance::LeastRequest => self.less_loaded(turns, may),
        };
        picked.or_else(|| {
            let start = if self.endpoints.is_empty() { 0 } else { turns.next(self.slot) as usize };
            self.scan(start, may).or_else(|| self.scan(start, |e| !tried.contains(&e.live.id)))
        })
    }

    /// An endpoint that may not be taken loses its turn, rather than giving it
    /// to its neighbour, which would then carry the load of two.
    fn in_turn(&self, turns: &Turns, may: impl Fn(&&CompiledEndpoint) -> bool) -> Option<&CompiledEndpoint> {
        (0..self.endpoints.len()).find_map(|_| Some(self.at(turns.next(self.slot))).filter(&may))
    }

    /// The power of two choices: requests in flight over weight.
    fn less_loaded(
        &self,
        turns: &Turns,
        may: impl Fn(&&CompiledEndpoint) -> bool,
    ) -> Option<&CompiledEndpoint> {
        const DRAWS: usize = 8;
        let positions = self.schedule.as_ref().map_or(self.endpoints.len(), |s| s.len()) as u32;
        if positions == 0 {
            return None;
        }
        let mut place = 0;
        let mut draw = |among: u32| {
            place = (place + positions - among + turns.random(among)) % positions;
            self.at(place)
        };
        let first = (0..DRAWS).find_map(|_| Some(draw(positions)).filter(&may))?;
        // Elsewhere in the cycle, which unless weights differ is another endpoint.
        let differs = |e: &&CompiledEndpoint| e.live.id != first.live.id && may(e);
        let second = (0..DRAWS).find_map(|_| Some(draw(positions - 1)).filter(differs));
        let Some(second) = second else { return Some(first) };
        let load = |a: &CompiledEndpoint, b: &CompiledEndpoint| {
            u64::from(a.live.in_flight()) * u64::from(b.weight.max(1))
        };
        Some(if load(second, first) < load(first, second) { second } else { first })
    }

    fn at(&self, turn: u32) -> &CompiledEndpoint {
        let index = match &self.schedule {
            Some(schedule) => usize::from(schedule[turn as usize % schedule.len()]),
            None => turn as usize % self.endpoints.len(),
        };
        &self.endpoints[index]
    }

    fn scan(&self, start: usize, may: impl Fn(&&CompiledEndpoint) -> bool) -> Option<&CompiledEndpoint> {
        let (before, from) = self.endpoints.split_at(start % self.endpoints.len().max(1));
        from.iter().chain(before).find(may)
    }
}

#[cfg(test)]
mod tests;
