//! Dividing the requests of one rule among its backends: properties of the
//! request first, then the user's bucket, then exact weights.

use std::io::Write as _;
use std::sync::Arc;

use smallvec::SmallVec;

use crate::balance::affinity::{self, backend_tag};
use crate::balance::hash::Subject;
use crate::balance::{BUCKETS, Seat, Steer, Turns, scale, schedule};
use crate::clock;
use crate::metrics::RouteStats;
use crate::router::Router;
use crate::table::{Backend, Override, PathMatch, PoolKey, Session, Split, Steering, Sticky, When};
use crate::view::RequestView;

/// Bytes that one compiled pattern, and separately its lazily built automaton, may take.
const PATTERN_LIMIT: usize = 1 << 20;

/// [`Split`], compiled.
#[derive(Clone, Debug)]
pub struct CompiledSplit {
    /// The first is the primary. Never empty, at most 256.
    pub backends: Vec<CompiledBackend>,
    overrides: Box<[CompiledOverride]>,
    sticky: Option<CompiledSticky>,
    weights: Weights,
    /// Where [`Turns`] keeps the phase of this split; `None` when weights leave no choice.
    turn: Option<u32>,
}

/// One backend of a split.
#[derive(Clone, Debug)]
pub struct CompiledBackend {
    /// As in the table.
    pub pool_key: PoolKey,
    /// The argument of [`Router::pool`].
    pub pool: u32,
    /// The canary this backend is, by object name; empty for the primary.
    pub canary: Arc<str>,
    /// Its counters.
    pub stats: Arc<RouteStats>,
    /// As in the table.
    pub steering: Option<Arc<Steering>>,
}

impl CompiledBackend {
    fn session(&self) -> Option<&Session> {
        match self.steering.as_deref() {
            Some(Steering::Session(session)) => Some(session),
            _ => None,
        }
    }

    /// Whether the request has a session with this very backend.
    fn holds(&self, view: &impl RequestView) -> bool {
        let session = self.session().filter(|session| session.holds_backend);
        let cookie = session.and_then(|session| affinity::parse(view.cookie(&session.cookie)?));
        cookie.is_some_and(|(_, tag)| tag == backend_tag(&self.pool_key.0))
    }
}

/// Who takes a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Choice {
    /// Index into [`CompiledSplit::backends`].
    pub backend: usize,
    /// The response sets the sticky cookie to this number.
    pub set_bucket: Option<u16>,
}

impl CompiledSplit {
    /// Which endpoint of the chosen backend the request names.
    pub(crate) fn steer(
        &self,
        choice: Choice,
        router: &Router,
        subject: &Subject<'_, impl RequestView>,
        turns: &Turns,
    ) -> Steer {
        let backend = &self.backends[choice.backend];
        let Some(steering) = &backend.steering else { return Steer::Free };
        let pool = router.pool(backend.pool);
        match (&**steering, &pool.seats) {
            (_, None) => Steer::Free,
            (Steering::Hash(by), Some(seats)) => {
                let mut key = turns.scratch.borrow_mut();
                key.clear();
                subject.write_key(by, &mut key);
                Steer::Ring { position: seats.ring.position(&key), subset: by.subset }
            }
            (Steering::Session(session), Some(_)) => {
                let tag = backend_tag(&backend.pool_key.0);
                let (https, now_ms) = (subject.https, clock::now_ms());
                Steer::Seat(Seat::of(session, tag, pool, subject.view, https, turns, now_ms))
            }
        }
    }

    /// The header lines that the answer of endpoint `served` (by id) needs.
    pub(crate) fn cookie_lines(
        &self,
        choice: Choice,
        steer: &Steer,
        path: &PathMatch,
        served: u64,
        router: &Router,
        turns: &Turns,
    ) -> SmallVec<[u8; 256]> {
        let mut lines = self.bucket_line(choice);
        let backend = &self.backends[choice.backend];
        if let (Steer::Seat(seat), Some(session)) = (steer, backend.session()) {
            let pool = router.pool(backend.pool);
            let tag = backend_tag(&backend.pool_key.0);
            seat.write_cookie(session, tag, pool, path, served, turns, &mut lines);
        }
        lines
    }

    /// The header line that gives a new user its bucket; empty when there is none to give.
    fn bucket_line(&self, choice: Choice) -> SmallVec<[u8; 256]> {
        let mut line = SmallVec::new();
        let cookie = self.sticky.as_ref().map(|sticky| &sticky.by);
        if let (Some(Sticky::Cookie(name)), Some(bucket)) = (cookie, choice.set_bucket) {
            // Writing to memory cannot fail.
            let _ = write!(line, "Set-Cookie: {name}={bucket}; Path=/; HttpOnly; SameSite=Lax\r\n");
        }
        line
    }

    /// `backends` belong to `split.backends`, one for one; neither is empty.
    pub(crate) fn new(split: &Split, backends: Vec<CompiledBackend>, turn: Option<u32>) -> CompiledSplit {
        debug_assert!(!backends.is_empty() && backends.len() == split.backends.len());
        debug_assert!(backends.len() <= 256, "{} backends", backends.len());
        let known = |o: &&Override| o.backend < backends.len();
        CompiledSplit {
            overrides: split.overrides.iter().filter(known).map(CompiledOverride::new).collect(),
            sticky: split.sticky.as_ref().map(|by| CompiledSticky::new(by, &split.backends)),
            weights: Weights::new(&split.backends),
            turn,
            backends,
        }
    }

    /// Whether choosing needs a turn of its own.
    pub(crate) fn needs_turn(split: &Split) -> bool {
        split.backends.iter().filter(|backend| backend.weight > 0).nth(1).is_some()
    }

    pub(crate) fn turn(&self) -> Option<u32> {
        self.turn
    }

    #[cfg(test)]
    pub(crate) fn with_turn(self, turn: u32) -> CompiledSplit {
        CompiledSplit { turn: self.turn.and(Some(turn)), ..self }
    }

    /// Whether there is one backend and nothing to decide.
    pub fn is_single(&self) -> bool {
        self.backends.len() == 1
    }

    /// A session's backend, then overrides in their order, then the sticky
    /// bucket, then the weights. A
    /// canary whose pool in `router` has no endpoints leaves the request to
    /// the primary. (ingress-nginx, `route_to_alternative_balancer`; `never`
    /// there ends the search, which with one canary is the same.)
    pub fn choose(&self, router: &Router, view: &impl RequestView, turns: &Turns) -> Choice {
        if self.is_single() {
            return Choice { backend: 0, set_bucket: None };
        }
        let held = self.backends.iter().position(|backend| backend.holds(view));
        let mut choice = match held {
            Some(backend) => Choice { backend, set_bucket: None },
            None => self.decide(view, turns),
        };
        if router.pool(self.backends[choice.backend].pool).endpoints.is_empty() {
            choice.backend = 0;
        }
        choice
    }

    fn decide(&self, view: &impl RequestView, turns: &Turns) -> Choice {
        let mut excluded = Indices::default();
        for rule in &self.overrides {
            match rule.ask(view) {
                Says::Take if !excluded.contains(rule.backend) => {
                    return Choice { backend: rule.backend.into(), set_bucket: None };
                }
                Says::Exclude => excluded.insert(rule.backend),
                Says::Take | Says::Nothing => {}
            }
        }
        let mut set_bucket = None;
        let bucket = self.sticky.as_ref().and_then(|sticky| match sticky.bucket(view) {
            None if sticky.is_cookie() => {
                set_bucket = Some(turns.bucket());
                set_bucket.map(|bucket| sticky.backend(bucket))
            }
            bucket => bucket.map(|bucket| sticky.backend(bucket)),
        });
        let backend = bucket.unwrap_or_else(|| self.by_weight(turns));
        let backend = if excluded.contains(backend) { 0 } else { backend };
        Choice { backend: backend.into(), set_bucket }
    }

    fn by_weight(&self, turns: &Turns) -> u8 {
        match (&self.weights, self.turn) {
            (Weights::Always(backend), _) => *backend,
            (Weights::Two { usual, other, step }, Some(turn)) => {
                if turns.advance(turn, *step).1 {
                    *other
                } else {
                    *usual
                }
            }
            (Weights::Cycle { backends, step }, Some(turn)) => {
                let (phase, _) = turns.advance(turn, *step);
                backends[scale(phase, backends.len() as u32) as usize]
            }
            (_, None) => 0,
        }
    }
}

/// A set of backends; there are at most 256.
#[derive(Default)]
struct Indices([u64; 4]);

impl Indices {
    fn insert(&mut self, index: u8) {
        self.0[usize::from(index >> 6)] |= 1 << (index & 63);
    }

    fn contains(&self, index: u8) -> bool {
        self.0[usize::from(index >> 6)] & (1 << (index & 63)) != 0
    }
}

/// Shares as steps through a cycle of 2^64. A step is rounded up, so a cycle
/// of `n` turns completes in `n` steps and not in one more; the error, below
/// 2^-64 of a cycle per turn, shifts one request in about 10^16.
#[derive(Clone, Debug)]
enum Weights {
    /// No or one nonzero weight.
    Always(u8),
    /// `other` takes the turn in which its share completes a cycle: of any `n`
    /// consecutive turns it has `n * share` rounded down or up, for any sum of weights.
    Two { usual: u8, other: u8, step: u64 },
    /// More: in the order of a precomputed cycle.
    Cycle { backends: Box<[u8]>, step: u64 },
}

impl Weights {
    fn new(backends: &[Backend]) -> Weights {
        let weights: Vec<u64> = backends.iter().map(|backend| backend.weight.into()).collect();
        let nonzero: Vec<usize> = (0..weights.len()).filter(|index| weights[*index] > 0).collect();
        match nonzero.as_slice() {
            [] => Weights::Always(0),
            [only] => Weights::Always(*only as u8),
            [usual, other] => Weights::Two {
                usual: *usual as u8,
                other: *other as u8,
                step: step(weights[*other], weights[*usual] + weights[*other]),
            },
            _ => {
                let backends = schedule::of_backends(&weights);
                let step = step(1, backends.len() as u64);
                Weights::Cycle { backends, step }
            }
        }
    }
}

/// `part / whole` of 2^64, rounded up; `part` is less than `whole`, and that below 2^63.
fn step(part: u64, whole: u64) -> u64 {
    (u128::from(part) << 64).div_ceil(u128::from(whole)) as u64
}

#[derive(Clone, Debug)]
struct CompiledOverride {
    backend: u8,
    when: Condition,
}

#[derive(Clone, Debug)]
enum Condition {
    Header(Arc<str>),
    HeaderValue(Arc<str>, Arc<str>),
    HeaderPattern(Arc<str>, regex::bytes::Regex),
    Cookie(Arc<str>),
    /// A pattern that did not compile.
    Never,
}

enum Says {
    Take,
    Exclude,
    Nothing,
}

impl CompiledOverride {
    fn new(rule: &Override) -> CompiledOverride {
        let when = match &rule.when {
            When::Header(name) => Condition::Header(lower_case(name)),
            When::HeaderValue(name, value) => Condition::HeaderValue(lower_case(name), value.clone()),
            When::HeaderPattern(name, pattern) => match compile_pattern(pattern) {
                Ok(pattern) => Condition::HeaderPattern(lower_case(name), pattern),
                Err(error) => {
                    tracing::warn!(header = %name, %pattern, %error, "canary pattern matches nothing");
                    Condition::Never
                }
            },
            When::Cookie(name) => Condition::Cookie(name.clone()),
        };
        CompiledOverride { backend: rule.backend as u8, when }
    }

    fn ask(&self, view: &impl RequestView) -> Says {
        let taken = match &self.when {
            Condition::Header(name) => return literal(view.header(name)),
            Condition::Cookie(name) => return literal(view.cookie(name)),
            Condition::HeaderValue(name, wanted) => view.header(name) == Some(wanted.as_bytes()),
            Condition::HeaderPattern(name, pattern) => {
                view.header(name).is_some_and(|value| pattern.is_match(value))
            }
            Condition::Never => false,
        };
        if taken { Says::Take } else { Says::Nothing }
    }
}

fn literal(value: Option<&[u8]>) -> Says {
    match value {
        Some(b"always") => Says::Take,
        Some(b"never") => Says::Exclude,
        _ => Says::Nothing,
    }
}

fn compile_pattern(pattern: &str) -> Result<regex::bytes::Regex, regex::Error> {
    let mut builder = regex::bytes::RegexBuilder::new(pattern);
    builder.size_limit(PATTERN_LIMIT).dfa_size_limit(PATTERN_LIMIT).build()
}

fn lower_case(name: &Arc<str>) -> Arc<str> {
    if name.bytes().any(|byte| byte.is_ascii_uppercase()) {
        name.to_ascii_lowercase().into()
    } else {
        name.clone()
    }
}

/// Buckets to backends. The first canary holds buckets from 0 upwards, the
/// second from the last downwards, the third above the first, the fourth below
/// the second, and so on; the primary has what is left in the middle.
///
/// So, the sum of weights being equal, raising a canary that borders on the
/// primary only moves users from the primary to it, and lowering it only sends
/// them back: with one or two canaries that is each of them. Raising one
/// further out shifts those between it and the primary, each by as many users
/// as were raised. For three canaries no layout that depends on the weights
/// alone can do without: if two may each grow up to where the third begins,
/// both must end in the same place. Depending on the weights alone is what
/// keeps a user on one version over replicas and restarts.
#[derive(Clone, Debug)]
struct CompiledSticky {
    by: Sticky,
    /// Backends from below, each with the bucket after its last.
    low: Box<[(u16, u8)]>,
    /// Backends from above, each with its first bucket.
    high: Box<[(u16, u8)]>,
}

impl CompiledSticky {
    fn new(by: &Sticky, backends: &[Backend]) -> CompiledSticky {
        let total: u64 = backends.iter().map(|backend| u64::from(backend.weight)).sum();
        let buckets = |sum: u64| match total {
            0 => 0,
            _ => ((sum * u64::from(BUCKETS) + total / 2) / total) as u16,
        };
        let (mut low, mut high) = (Vec::new(), Vec::new());
        let (mut low_sum, mut high_sum) = (0, 0);
        for (index, backend) in backends.iter().enumerate().skip(1) {
            if index % 2 == 1 {
                low_sum += u64::from(backend.weight);
                low.push((buckets(low_sum), index as u8));
            } else {
                high_sum += u64::from(backend.weight);
                high.push((BUCKETS - buckets(high_sum), index as u8));
            }
        }
        let by = match by {
            Sticky::Header(name) => Sticky::Header(lower_case(name)),
            by => by.clone(),
        };
        CompiledSticky { by, low: low.into(), high: high.into() }
    }

    fn is_cookie(&self) -> bool {
        matches!(self.by, Sticky::Cookie(_))
    }

    fn bucket(&self, view: &impl RequestView) -> Option<u16> {
        match &self.by {
            Sticky::Cookie(name) => view.cookie(name).and_then(parse_bucket),
            Sticky::Header(name) => view.header(name).map(bucket_of),
            Sticky::Address => Some(match view.client().to_canonical() {
                std::net::IpAddr::V4(address) => bucket_of(&address.octets()),
                std::net::IpAddr::V6(address) => bucket_of(&address.octets()),
            }),
        }
    }

    fn backend(&self, bucket: u16) -> u8 {
        let low = self.low.iter().find(|(end, _)| bucket < *end);
        let held = low.or_else(|| self.high.iter().find(|(start, _)| bucket >= *start));
        held.map_or(0, |(_, backend)| *backend)
    }
}

/// `0` to `9999`.
fn parse_bucket(value: &[u8]) -> Option<u16> {
    if value.is_empty() || value.len() > 4 || !value.iter().all(u8::is_ascii_digit) {
        return None;
    }
    Some(value.iter().fold(0, |sum, digit| sum * 10 + u16::from(digit - b'0')))
}

/// FNV-1a with a final mix (the high bits of FNV alone hardly differ for short
/// keys). Not seeded: replicas and restarts must agree about a user.
fn bucket_of(key: &[u8]) -> u16 {
    let hash = key.iter().fold(0xcbf2_9ce4_8422_2325_u64, |hash, byte| {
        (hash ^ u64::from(*byte)).wrapping_mul(0x0000_0100_0000_01b3)
    });
    let hash = (hash ^ (hash >> 32)).wrapping_mul(0xd6e8_feb8_6659_fd93);
    ((hash ^ (hash >> 32)) % u64::from(BUCKETS)) as u16
}

#[cfg(test)]
mod tests;
