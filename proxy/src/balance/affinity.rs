//! Session cookies: which endpoint one names, and what a new one says.
//!
//! A cookie is `NAME.BACKEND`, both in hexadecimal. BACKEND (32 bits) tells
//! the backends of a split apart. NAME (64 bits) is, for
//! [`Affinity::Balanced`], a random key, which the ring of the pool takes to an
//! endpoint; for [`Affinity::Persistent`], the start of HMAC-SHA-256 of the
//! endpoint's address under the pool's [`NamingKey`]. Replicas and restarts
//! find the same endpoint by either, with nothing to share but the table.

use std::io::Write as _;
use std::time::{Duration, SystemTime};

use rustls::crypto::aws_lc_rs::cipher_suite::TLS13_AES_128_GCM_SHA256;
use rustls::crypto::tls13::OkmBlock;
use smallvec::SmallVec;

use super::hash::Ring;
use super::{CompiledEndpoint, CompiledPool, Turns};
use crate::clock::WallClock;
use crate::table::{Affinity, NamingKey, PathMatch, SameSite, Session};
use crate::view::RequestView;

/// Keys drawn until one leads to an available endpoint.
const DRAWS: usize = 8;

/// Keys drawn, for each endpoint, until one leads to the endpoint that answered.
const SEARCH: usize = 16;

/// What a request's cookie says, and what its answer's must.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Seat {
    /// By index; `None`: anyone will do.
    pub(crate) endpoint: Option<u16>,
    /// The cookie's NAME, or the next one's.
    name: u64,
    /// The request has no cookie that names an endpoint of the pool.
    is_new: bool,
    /// Only a failure of this very request leads elsewhere.
    pub(crate) insists: bool,
    is_https: bool,
    /// `SameSite=None` would be misunderstood.
    without_none: bool,
}

/// What session cookies may name: the endpoints of a pool.
#[derive(Debug)]
pub(crate) struct Seats {
    pub(crate) ring: Ring,
    /// By index.
    names: Box<[u64]>,
    /// Sorted by name, with the index.
    by_name: Box<[(u64, u16)]>,
}

impl Seats {
    /// `None` if there is no ring of these endpoints.
    pub(crate) fn new(key: &NamingKey, endpoints: &[CompiledEndpoint]) -> Option<Seats> {
        let ring = Ring::new(endpoints)?;
        let names: Box<[u64]> = endpoints.iter().map(|endpoint| name_of(key, endpoint)).collect();
        let mut by_name: Box<[(u64, u16)]> = names.iter().copied().zip(0..).collect();
        by_name.sort_unstable();
        Some(Seats { ring, names, by_name })
    }

    fn named(&self, name: u64) -> Option<u16> {
        let at = self.by_name.binary_search_by_key(&name, |entry| entry.0).ok()?;
        Some(self.by_name[at].1)
    }

    fn keyed(&self, key: u64) -> u16 {
        self.ring.endpoint(self.ring.position(&key.to_be_bytes()))
    }

    /// The NAME that leads to `endpoint`. `None`: the bounded search found none.
    fn name_for(&self, affinity: Affinity, endpoint: u16, turns: &Turns) -> Option<u64> {
        match affinity {
            Affinity::Persistent => self.names.get(usize::from(endpoint)).copied(),
            Affinity::Balanced => {
                let draws = (0..SEARCH * self.names.len()).map(|_| turns.key());
                draws.into_iter().find(|key| self.keyed(*key) == endpoint)
            }
        }
    }
}

/// 64 bits that tell nothing of the address to whoever lacks the key.
fn name_of(key: &NamingKey, endpoint: &CompiledEndpoint) -> u64 {
    // One TLS provider: its HMAC, reached by a suite that has SHA-256. It is always there.
    let Some(suite) = TLS13_AES_128_GCM_SHA256.tls13() else { return 0 };
    // The block that HMAC-SHA-256 takes as its key; a longer key is hashed, as HMAC itself does.
    let key = suite.common.hash_provider.hash(key.0.as_bytes());
    let address = endpoint.live.address.to_string();
    let tag = suite.hkdf_provider.hmac_sign(&OkmBlock::new(key.as_ref()), address.as_bytes());
    tag.as_ref().iter().take(8).fold(0, |name, byte| name << 8 | u64::from(*byte))
}

/// Tells the backends of a split apart, by what their pools are called.
pub(crate) fn backend_tag(pool: &str) -> u32 {
    let hash = pool.bytes().fold(0xcbf2_9ce4_8422_2325_u64, |hash, byte| {
        (hash ^ u64::from(byte)).wrapping_mul(0x0000_0100_0000_01b3)
    });
    (hash ^ (hash >> 32)) as u32
}

/// NAME and BACKEND of a cookie's value, if it is one of ours.
pub(crate) fn parse(value: &[u8]) -> Option<(u64, u32)> {
    let (name, backend) = value.split_at_checked(16)?;
    let backend = backend.strip_prefix(b".").filter(|backend| backend.len() == 8)?;
    let number = |digits: &[u8]| {
        digits.iter().try_fold(0, |sum, digit| Some(sum << 4 | u64::from((*digit as char).to_digit(16)?)))
    };
    Some((number(name)?, number(backend)? as u32))
}

impl Seat {
    /// Where a request belongs. `pool` has seats.
    pub(crate) fn of(
        session: &Session,
        tag: u32,
        pool: &CompiledPool,
        view: &impl RequestView,
        is_https: bool,
        turns: &Turns,
        now_ms: u64,
    ) -> Seat {
        let mut seat = Seat {
            endpoint: None,
            name: 0,
            is_new: true,
            insists: false,
            is_https,
            without_none: session.conditional_none && view.header("user-agent").is_some_and(misreads_none),
        };
        let Some(seats) = &pool.seats else { return seat };
        let cookie = view.cookie(&session.cookie).and_then(parse).filter(|cookie| cookie.1 == tag);
        let known = cookie.and_then(|(name, _)| {
            let endpoint = match session.affinity {
                Affinity::Balanced => Some(seats.keyed(name)),
                Affinity::Persistent => seats.named(name),
            };
            endpoint.map(|endpoint| (name, endpoint))
        });
        if let Some((name, endpoint)) = known {
            seat = Seat {
                endpoint: Some(endpoint),
                name,
                is_new: false,
                insists: !session.change_on_failure,
                ..seat
            };
        } else if session.affinity == Affinity::Balanced {
            for _ in 0..DRAWS {
                seat.name = turns.key();
                let endpoint = seats.keyed(seat.name);
                seat.endpoint = Some(endpoint);
                if pool.endpoints[usize::from(endpoint)].live.is_available(now_ms) {
                    break;
                }
            }
        }
        seat
    }

    /// Appends the header line that the answer needs once the endpoint whose
    /// id is `served` has given it; nothing if the client's cookie is right.
    pub(crate) fn write_cookie(
        &self,
        session: &Session,
        tag: u32,
        pool: &CompiledPool,
        path: &PathMatch,
        served: u64,
        turns: &Turns,
        line: &mut SmallVec<[u8; 256]>,
    ) {
        let is_served = |index: &u16| pool.endpoints[usize::from(*index)].live.id == served;
        let stays = self.endpoint.as_ref().is_some_and(is_served);
        if !self.is_new && (stays || !session.change_on_failure) {
            return;
        }
        let Some(seats) = &pool.seats else { return };
        let name = match stays {
            true if session.affinity == Affinity::Balanced => Some(self.name),
            _ => (0..pool.endpoints.len() as u16)
                .find(is_served)
                .and_then(|endpoint| seats.name_for(session.affinity, endpoint, turns)),
        };
        if let Some(name) = name {
            let same_site = session.same_site.filter(|s| *s != SameSite::None || !self.without_none);
            let is_secure = session.secure.unwrap_or(self.is_https);
            write_line(session, name, tag, path, same_site, is_secure, line);
        }
    }
}

fn write_line(
    session: &Session,
    name: u64,
    tag: u32,
    path: &PathMatch,
    same_site: Option<SameSite>,
    is_secure: bool,
    line: &mut SmallVec<[u8; 256]>,
) {
    let path = session.path.as_deref().unwrap_or(path.as_str());
    // RFC 6265 section 4.1.1: what a path may not hold would end it.
    let path = if is_cookie_text(path) { path } else { "/" };
    // Writing to memory cannot fail, here and below.
    let _ = write!(line, "Set-Cookie: {}={name:016x}.{tag:08x}", session.cookie);
    if let Some(seconds) = session.expires {
        let span = Duration::from_secs(seconds.unsigned_abs());
        let now = SystemTime::now();
        let then = if seconds < 0 { now.checked_sub(span) } else { now.checked_add(span) };
        line.extend_from_slice(b"; Expires=");
        line.extend_from_slice(WallClock::default().http_date(then.unwrap_or(now)));
    }
    if let Some(seconds) = session.max_age {
        let _ = write!(line, "; Max-Age={seconds}");
    }
    if let Some(domain) = &session.domain {
        let _ = write!(line, "; Domain={domain}");
    }
    let _ = write!(line, "; Path={path}");
    if is_secure {
        line.extend_from_slice(b"; Secure");
    }
    line.extend_from_slice(b"; HttpOnly");
    if let Some(same_site) = same_site {
        let _ = write!(line, "; SameSite={same_site:?}");
    }
    if session.partitioned {
        line.extend_from_slice(b"; Partitioned");
    }
    line.extend_from_slice(b"\r\n");
}

/// Visible ASCII and spaces, without `;`.
fn is_cookie_text(text: &str) -> bool {
    !text.is_empty() && text.bytes().all(|byte| (b' '..=b'~').contains(&byte) && byte != b';')
}

/// Browsers that take `SameSite=None` for `Strict` or refuse the cookie:
/// Chrome 4x to 6x, all of iOS 12, Safari on macOS 10.14.
/// (<https://www.chromium.org/updates/same-site/incompatible-clients>)
fn misreads_none(user_agent: &[u8]) -> bool {
    let has = |text: &str| memchr::memmem::find(user_agent, text.as_bytes()).is_some();
    ["Chrome/4", "Chrome/5", "Chrome/6", "CPU iPhone OS 12", "iPad; CPU OS 12"].into_iter().any(has)
        || has("Macintosh") && has("Intel Mac OS X 10_14") && has("Safari") && !has("Chrome")
}

#[cfg(test)]
#[path = "affinity/tests.rs"]
mod tests;
