//! Choosing an endpoint of a pool, and the worker-local turns that this and
//! the division among backends advance.

use std::cell::{Cell, RefCell};
use std::sync::Arc;

use crate::clock;
use crate::endpoint::LiveEndpoint;
use crate::table::{Balance, Pool, UpstreamProtocol};

pub(crate) mod affinity;
pub(crate) mod ewma;
pub(crate) mod hash;
pub(crate) mod schedule;
pub(crate) mod slow_start;
mod zone;

pub use affinity::Seat;
pub use ewma::Latency;

use affinity::Seats;
use zone::Zones;

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
    far: RefCell<Vec<u32>>,
    /// By turn of a split: how far through its cycle it is, in 2^-64ths. As a
    /// fraction it wraps by itself and keeps its meaning when weights change.
    splits: RefCell<Vec<u64>>,
    bucket: Cell<u64>,
    random: RefCell<fastrand::Rng>,
    /// Where keys of requests are put together.
    pub(crate) scratch: RefCell<Vec<u8>>,
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
            far: RefCell::default(),
            splits: RefCell::default(),
            bucket: Cell::new(u64::from(worker).wrapping_mul(GOLDEN) >> 16),
            random: RefCell::new(fastrand::Rng::with_seed(u64::from(worker))),
            scratch: RefCell::default(),
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

    /// The same for the endpoints of other zones.
    fn next_far(&self, slot: u32) -> u32 {
        let mut far = self.far.borrow_mut();
        let turn = at(&mut far, slot, |_| self.worker);
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

    /// A key for a new session, which no other worker or process draws, too.
    pub(crate) fn key(&self) -> u64 {
        // Not the seeded source: replicas must not draw the same keys.
        fastrand::u64(..)
    }
}

/// What of a request says which endpoint it wants.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Steer {
    /// Nothing: the pool's balance decides.
    #[default]
    Free,
    /// A place on the pool's ring.
    Ring {
        /// Of the key.
        position: u32,
        /// How many endpoints from there on share its requests.
        subset: u16,
    },
    /// A session.
    Seat(Seat),
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
    /// Where requests have keys or sessions.
    pub(crate) seats: Option<Seats>,
    /// Where endpoints of one zone come first.
    zones: Option<Zones>,
    /// Milliseconds; 0 for none.
    slow_start: u64,
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
        let schedule = schedule::of_endpoints(&weights);
        CompiledPool { protocol, balance, endpoints, slot, schedule, seats: None, zones: None, slow_start: 0 }
    }

    /// `pool`, whose endpoints are `endpoints`, for a proxy in zone `own`.
    pub(crate) fn compile(
        slot: u32,
        pool: &Pool,
        endpoints: Vec<CompiledEndpoint>,
        own: Option<&str>,
    ) -> CompiledPool {
        let mut compiled = CompiledPool::new(slot, pool.protocol, pool.balance, endpoints);
        let endpoints = &compiled.endpoints;
        compiled.seats = pool.seating.as_ref().and_then(|key| Seats::new(key, endpoints));
        compiled.zones = own.filter(|_| pool.prefer_zone).and_then(|own| Zones::new(own, endpoints));
        compiled.slow_start = pool.slow_start.map_or(0, |window| window.as_millis() as u64);
        if pool.balance == Balance::Ewma {
            assume_the_usual(endpoints);
        }
        compiled
    }

    /// Whether [`Balance`] wants to know how long answers take.
    pub(crate) fn measures(&self) -> bool {
        self.balance == Balance::Ewma
    }

    /// An endpoint for the next attempt: never one whose id is in `tried`, and
    /// not an ejected one unless all others are ejected too. `now_ms` is the
    /// clock of [`LiveEndpoint::is_available`]. `None`: nothing is left to try.
    pub fn pick(&self, turns: &Turns, now_ms: u64, tried: &[u64]) -> Option<&CompiledEndpoint> {
        self.pick_for(&Steer::Free, turns, now_ms, tried)
    }

    /// As [`CompiledPool::pick`], for a request that may name its endpoint.
    pub fn pick_for(
        &self,
        steer: &Steer,
        turns: &Turns,
        now_ms: u64,
        tried: &[u64],
    ) -> Option<&CompiledEndpoint> {
        if let [only] = self.endpoints.as_slice() {
            return (!tried.contains(&only.live.id)).then_some(only);
        }
        let may = |e: &&CompiledEndpoint| !tried.contains(&e.live.id) && e.live.is_available(now_ms);
        let picked = match steer {
            Steer::Free => self.choose(turns, now_ms, may),
            steer => self.steered(steer, turns, tried, may).or_else(|| self.choose(turns, now_ms, may)),
        };
        picked.or_else(|| {
            let start = if self.endpoints.is_empty() { 0 } else { turns.next(self.slot) as usize };
            self.scan(start, may).or_else(|| self.scan(start, |e| !tried.contains(&e.live.id)))
        })
    }

    /// The endpoint that a request wants, or the next on the ring.
    fn steered(
        &self,
        steer: &Steer,
        turns: &Turns,
        tried: &[u64],
        may: impl Fn(&&CompiledEndpoint) -> bool,
    ) -> Option<&CompiledEndpoint> {
        match *steer {
            Steer::Free => None,
            Steer::Ring { position, subset } => {
                let random = if subset > 1 { turns.random(u32::MAX) } else { 0 };
                let may = |index: u16| may(&&self.endpoints[usize::from(index)]);
                let found = self.seats.as_ref()?.ring.find(position, subset, random, may)?;
                self.endpoints.get(usize::from(found))
            }
            Steer::Seat(seat) => {
                let wanted = self.endpoints.get(usize::from(seat.endpoint?))?;
                let insisted = seat.insists && wanted.live.is_up() && !tried.contains(&wanted.live.id);
                (insisted || may(&wanted)).then_some(wanted)
            }
        }
    }

    fn choose(
        &self,
        turns: &Turns,
        now_ms: u64,
        may: impl Fn(&&CompiledEndpoint) -> bool,
    ) -> Option<&CompiledEndpoint> {
        // Where endpoints start slowly, one that has just come mostly does not want its turn.
        let wants =
            |e: &&CompiledEndpoint| may(e) && (self.slow_start == 0 || self.accepts(e, turns, now_ms));
        let Some(zones) = &self.zones else {
            return self.choose_from(
                Cycle { order: self.schedule.as_deref(), far: false },
                turns,
                now_ms,
                wants,
            );
        };
        let available = |e: &CompiledEndpoint| e.live.is_available(now_ms);
        let random = turns.random(u32::MAX);
        let near = Cycle { order: Some(&zones.near), far: false };
        let far = Cycle { order: Some(&zones.far), far: true };
        let stays = zones.stays(random, now_ms, &self.endpoints, available);
        let (first, second) = if stays { (near, far) } else { (far, near) };
        let first = self.choose_from(first, turns, now_ms, wants);
        first.or_else(|| self.choose_from(second, turns, now_ms, wants))
    }

    fn accepts(&self, endpoint: &CompiledEndpoint, turns: &Turns, now_ms: u64) -> bool {
        let part = endpoint.live.ramp(now_ms, self.slow_start);
        part >= 1.0 || f64::from(turns.random(u32::MAX)) < part * f64::from(u32::MAX)
    }

    /// From all endpoints, or those of `cycle`.
    fn choose_from(
        &self,
        cycle: Cycle<'_>,
        turns: &Turns,
        now_ms: u64,
        may: impl Fn(&&CompiledEndpoint) -> bool,
    ) -> Option<&CompiledEndpoint> {
        let load = |e: &CompiledEndpoint| u64::from(e.live.in_flight());
        match self.balance {
            Balance::RoundRobin => self.in_turn(cycle, turns, may),
            Balance::LeastRequest => self.better_of_two(cycle, turns, may, |a, b| {
                load(a) * u64::from(b.weight.max(1)) < load(b) * u64::from(a.weight.max(1))
            }),
            Balance::Ewma => {
                let cost = |e: &CompiledEndpoint| {
                    e.live.latency().micros(now_ms) * (load(e) + 1) as f32 / f32::from(e.weight.max(1))
                };
                self.better_of_two(cycle, turns, may, |a, b| cost(a) < cost(b))
            }
            Balance::LeastConnections => self.least_of_all(cycle, turns, may),
        }
    }

    /// An endpoint that may not be taken loses its turn, rather than giving it
    /// to its neighbour, which would then carry the load of two.
    fn in_turn(
        &self,
        cycle: Cycle<'_>,
        turns: &Turns,
        may: impl Fn(&&CompiledEndpoint) -> bool,
    ) -> Option<&CompiledEndpoint> {
        (0..self.endpoints.len())
            .find_map(|_| Some(self.at(cycle, cycle.turn(turns, self.slot))).filter(&may))
    }

    /// The power of two choices.
    fn better_of_two(
        &self,
        cycle: Cycle<'_>,
        turns: &Turns,
        may: impl Fn(&&CompiledEndpoint) -> bool,
        is_better: impl Fn(&CompiledEndpoint, &CompiledEndpoint) -> bool,
    ) -> Option<&CompiledEndpoint> {
        const DRAWS: usize = 8;
        let positions = cycle.order.map_or(self.endpoints.len(), <[u16]>::len) as u32;
        if positions == 0 {
            return None;
        }
        let mut place = 0;
        let mut draw = |among: u32| {
            place = (place + positions - among + turns.random(among)) % positions;
            self.at(cycle, place)
        };
        let first = (0..DRAWS).find_map(|_| Some(draw(positions)).filter(&may))?;
        if positions == 1 {
            return Some(first);
        }
        // Elsewhere in the cycle, which unless weights differ is another endpoint.
        let differs = |e: &&CompiledEndpoint| e.live.id != first.live.id && may(e);
        let second = (0..DRAWS).find_map(|_| Some(draw(positions - 1)).filter(differs));
        let Some(second) = second else { return Some(first) };
        Some(if is_better(second, first) { second } else { first })
    }

    /// In flight over weight, the first from the next turn on among equals.
    fn least_of_all(
        &self,
        cycle: Cycle<'_>,
        turns: &Turns,
        may: impl Fn(&&CompiledEndpoint) -> bool,
    ) -> Option<&CompiledEndpoint> {
        let positions = cycle.order.map_or(self.endpoints.len(), <[u16]>::len) as u32;
        if positions == 0 {
            return None;
        }
        let start = cycle.turn(turns, self.slot) % positions;
        let all = (0..positions).map(|turn| self.at(cycle, (start + turn) % positions)).filter(may);
        // One more, as it would have: an idle endpoint of weight 3 comes before one of weight 1.
        let load = |e: &CompiledEndpoint| u64::from(e.live.in_flight()) + 1;
        all.reduce(|least, e| {
            let (ours, theirs) =
                (load(e) * u64::from(least.weight.max(1)), load(least) * u64::from(e.weight.max(1)));
            if ours < theirs { e } else { least }
        })
    }

    fn at(&self, cycle: Cycle<'_>, turn: u32) -> &CompiledEndpoint {
        let index = match cycle.order {
            Some(cycle) => usize::from(cycle[turn as usize % cycle.len()]),
            None => turn as usize % self.endpoints.len(),
        };
        &self.endpoints[index]
    }

    fn scan(&self, start: usize, may: impl Fn(&&CompiledEndpoint) -> bool) -> Option<&CompiledEndpoint> {
        let (before, from) = self.endpoints.split_at(start % self.endpoints.len().max(1));
        from.iter().chain(before).find(may)
    }
}

/// Endpoints to choose from.
#[derive(Clone, Copy)]
struct Cycle<'a> {
    /// Their indices, each as often as its weight; `None`: all of the pool, each once.
    order: Option<&'a [u16]>,
    /// Those of other zones, which have turns of their own: sharing them with
    /// the near ones, some would always get the even ones.
    far: bool,
}

impl Cycle<'_> {
    fn turn(&self, turns: &Turns, slot: u32) -> u32 {
        if self.far { turns.next_far(slot) } else { turns.next(slot) }
    }
}

/// Endpoints of which nothing is known are taken to be as fast as the others
/// are on average, rather than infinitely fast (as in ingress-nginx).
fn assume_the_usual(endpoints: &[CompiledEndpoint]) {
    let now_ms = clock::now_ms();
    let known = endpoints.iter().map(|e| e.live.latency()).filter(|latency| latency.is_known());
    let (count, sum) = known.fold((0, 0.0), |(count, sum), l| (count + 1, sum + l.micros(now_ms)));
    if count > 0 {
        endpoints.iter().for_each(|e| e.live.latency().assume(now_ms, sum / count as f32));
    }
}

#[cfg(test)]
mod tests;
