//! What one client may do: connections it holds, requests it has under way,
//! requests in a time.
//!
//! Accounts live in tables of fixed size, shared by all workers, each account
//! in one of the eight places its hash leads to: a look costs one or two lines
//! of memory, no lock and no allocation. They are exact where estimates (a
//! count-min sketch, as `pingora-limits` has it) charge one client for its
//! neighbours', and they know nginx's leaky bucket, which a count per interval
//! does not. Where more clients meet in a place than fit, the account nearest
//! to being forgotten anyway goes: under a flood from more addresses than
//! there is room for, limits per address let pass rather than refuse.
//!
//! An IPv6 client is a /64: below that its addresses are its own to choose.

use std::hash::{BuildHasher, Hasher};
use std::net::IpAddr;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, OnceLock};

use foldhash::quality::RandomState;

use crate::clock;
use crate::config;
use crate::http::{Answer, Verdict};
use crate::metrics::Reject;
use crate::table::{ClientLimits, Rate};
use crate::worker::Worker;

/// Clients whose rate is known at a time, over all rules (2 MiB, once a rule limits rates).
const RATED: usize = 128 << 10;

/// Clients whose requests under way are counted at a time, over all rules
/// (512 KiB, once a rule limits them).
const OCCUPIED: usize = 64 << 10;

/// Most places of the table of connections (8 MiB).
const CONNECTED: usize = 1 << 20;

/// Places an account may be in.
const WAYS: usize = 8;

/// The accounts of all clients: one per process.
pub(crate) struct Limiter {
    hasher: RandomState,
    rates: OnceLock<Rates>,
    requests: OnceLock<Arc<Counts>>,
    connections: Option<(Arc<Counts>, u32)>,
}

/// Over a limit.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Over;

impl Limiter {
    pub(crate) fn new(limits: &config::Limits, workers: usize) -> Limiter {
        let connections = limits.connections_per_address.map(|most| {
            // At a quarter of its places taken, one set in ten thousand is full.
            let places = limits.connections.saturating_mul(workers).saturating_mul(4);
            (Arc::new(Counts::new(places.min(CONNECTED))), most)
        });
        Limiter {
            hasher: RandomState::default(),
            rates: OnceLock::new(),
            requests: OnceLock::new(),
            connections,
        }
    }

    /// One more connection of `client`, until what is returned is dropped. `None`: not counted.
    pub(crate) fn connect(&self, client: IpAddr) -> Result<Option<Held>, Over> {
        match &self.connections {
            None => Ok(None),
            Some((counts, most)) => counts.enter(self.account(b"", client), *most),
        }
    }

    /// One more request of `client` under `limits`.
    fn request(&self, limits: &ClientLimits, client: IpAddr) -> Result<Option<Held>, Reject> {
        if limits.exempt.iter().any(|network| network.contains(&client)) {
            return Ok(None);
        }
        let account = self.account(limits.zone.as_bytes(), client);
        let held = match limits.requests {
            None => None,
            Some(most) => {
                let counts = self.requests.get_or_init(|| Arc::new(Counts::new(OCCUPIED)));
                counts.enter(account, most).map_err(|Over| Reject::TooManyRequests)?
            }
        };
        if !limits.rates.is_empty() {
            let rates = self.rates.get_or_init(|| Rates::new(RATED));
            let now = clock::now_us() * 1000;
            for (rate, number) in limits.rates.iter().zip(1u64..) {
                // Spread over the table like the account itself (2^64 over the golden ratio).
                let account = account ^ number.wrapping_mul(0x9E37_79B9_7F4A_7C15);
                rates.take(account, rate, now).map_err(|Over| Reject::RateLimited)?;
            }
        }
        Ok(held)
    }

    /// Seeded, so that nobody can aim at another's account.
    fn account(&self, zone: &[u8], client: IpAddr) -> u64 {
        let mut hasher = self.hasher.build_hasher();
        hasher.write(zone);
        match client.to_canonical() {
            IpAddr::V4(v4) => hasher.write_u64(u64::from(v4.to_bits())),
            // The bit keeps ::/64 apart from IPv4.
            IpAddr::V6(v6) => hasher.write_u64((v6.to_bits() >> 64) as u64 | (1 << 63)),
        }
        hasher.finish()
    }
}

/// Turns `verdict` into an answer if its rule limits what `client` may do and
/// that is reached. The request occupies its account until what is returned is dropped.
pub(crate) fn admit(worker: &Worker, verdict: &mut Verdict<'_>, client: IpAddr) -> Option<Held> {
    let Verdict::Forward(forward) = verdict else { return None };
    let (rule, edits) = (forward.rule, forward.edits);
    let limits = rule.limits.per_client.as_deref()?;
    let reject = match worker.limiter.request(limits, client) {
        Ok(held) => return held,
        Err(reject) => reject,
    };
    worker.metrics.rejected(reject);
    let config = &worker.config.limits;
    let (status, reason) = match reject {
        Reject::RateLimited => (config.rate_status, "the client sends requests too fast"),
        _ => (config.requests_status, "the client has too many requests under way"),
    };
    *verdict = Verdict::Answer(Answer { status, reason, to_https: false, origin: Some(&rule.origin), edits });
    None
}

/// One of what is counted. Gives its place back when dropped.
pub(crate) struct Held {
    counts: Arc<Counts>,
    place: u32,
}

impl Drop for Held {
    fn drop(&mut self) {
        self.counts.places[self.place as usize].fetch_sub(1, Relaxed);
    }
}

/// How many each account holds: its tag in the upper 48 bits of a place, the
/// count in the lower 16. A place with count 0 is free.
struct Counts {
    places: Box<[AtomicU64]>,
}

const COUNT: u64 = 0xFFFF;

impl Counts {
    fn new(places: usize) -> Counts {
        let places = places.next_power_of_two().max(WAYS);
        Counts { places: std::iter::repeat_with(AtomicU64::default).take(places).collect() }
    }

    /// `Ok(None)`: its set is full of others, so it is let in uncounted.
    fn enter(self: &Arc<Self>, account: u64, most: u32) -> Result<Option<Held>, Over> {
        let start = first_of_set(account, self.places.len());
        // The upper bits have chosen the set.
        let tag = account << COUNT.count_ones();
        let set = &self.places[start..start + WAYS];
        loop {
            let (mut held, mut own, mut free) = (0, None, None);
            for (at, place) in set.iter().enumerate() {
                let value = place.load(Relaxed);
                if value & COUNT == 0 {
                    free = free.or(Some((at, value)));
                } else if value & !COUNT == tag {
                    // Workers that saw a new client at the same instant may have opened two.
                    held += value & COUNT;
                    own = own.or(Some((at, value)));
                }
            }
            if held >= u64::from(most).min(COUNT) {
                return Err(Over);
            }
            let (at, seen, next) = match (own, free) {
                (Some((at, value)), _) => (at, value, value + 1),
                (None, Some((at, value))) => (at, value, tag | 1),
                (None, None) => return Ok(None),
            };
            if set[at].compare_exchange(seen, next, Relaxed, Relaxed).is_ok() {
                return Ok(Some(Held { counts: self.clone(), place: (start + at) as u32 }));
            }
        }
    }
}

/// When each account will have paid for what it took (GCRA, the leaky bucket
/// without the bucket): nothing is due at times gone by, so an account whose
/// time is past need not be kept.
struct Rates {
    places: Box<[Place]>,
}

#[derive(Default)]
struct Place {
    account: AtomicU64,
    /// In nanoseconds of [`clock::now_us`]'s clock.
    paid_at: AtomicU64,
}

impl Rates {
    fn new(places: usize) -> Rates {
        Rates { places: std::iter::repeat_with(Place::default).take(places).collect() }
    }

    /// As nginx's `limit_req` with `burst` and `nodelay`: at once one and the burst, then at the rate.
    fn take(&self, account: u64, rate: &Rate, now: u64) -> Result<(), Over> {
        let interval = rate.interval_ns();
        let tolerance = interval.saturating_mul(rate.burst.into());
        let place = self.place(account, now);
        let mut paid_at = place.paid_at.load(Relaxed);
        loop {
            let start = paid_at.max(now);
            if start - now > tolerance {
                return Err(Over);
            }
            match place.paid_at.compare_exchange_weak(paid_at, start + interval, Relaxed, Relaxed) {
                Ok(_) => return Ok(()),
                Err(changed) => paid_at = changed,
            }
        }
    }

    /// The account's place. If it has none, it takes that of the one that has
    /// paid first, most likely long ago.
    fn place(&self, account: u64, now: u64) -> &Place {
        let start = first_of_set(account, self.places.len());
        let set = &self.places[start..start + WAYS];
        loop {
            if let Some(place) = set.iter().find(|place| place.account.load(Relaxed) == account) {
                return place;
            }
            let mut oldest = &set[0];
            for place in &set[1..] {
                if place.paid_at.load(Relaxed) < oldest.paid_at.load(Relaxed) {
                    oldest = place;
                }
            }
            let before = oldest.account.load(Relaxed);
            if oldest.account.compare_exchange(before, account, Relaxed, Relaxed).is_ok() {
                // It begins with a clean slate.
                oldest.paid_at.fetch_min(now, Relaxed);
                return oldest;
            }
        }
    }
}

/// By the upper bits: the lower ones tell accounts of a set apart.
fn first_of_set(account: u64, places: usize) -> usize {
    let sets = (places / WAYS) as u64;
    ((u128::from(account) * u128::from(sets)) >> 64) as usize * WAYS
}

#[cfg(test)]
mod tests;
