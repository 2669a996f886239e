//! Consistent hashing: keys made of a request, on the ring that nginx's
//! `hash ... consistent` makes of the same addresses and weights.

use std::fmt;
use std::io::Write as _;
use std::net::IpAddr;

use pingora_ketama::{Bucket, Continuum};
use smallvec::SmallVec;

use super::CompiledEndpoint;
use crate::table::{HashBy, KeyPart, Variable};
use crate::view::RequestView;

/// A ring has 160 points for each unit of weight: weights are reduced until
/// they add up to so many units for each endpoint, at most.
const UNITS: u64 = 16;

/// Points looked at for one request before any endpoint will do.
const WALK: usize = 4_096;

/// Endpoints of a subset, at most.
const SUBSET: usize = 64;

/// What a key is made of.
pub(crate) struct Subject<'a, V> {
    pub(crate) view: &'a V,
    pub(crate) method: &'a [u8],
    /// As sent, with query.
    pub(crate) target: &'a [u8],
    /// Decoded and normalised.
    pub(crate) path: &'a [u8],
    /// Lower case, without port.
    pub(crate) host: &'a str,
    pub(crate) https: bool,
}

impl<V: RequestView> Subject<'_, V> {
    fn query(&self) -> Option<&[u8]> {
        memchr::memchr(b'?', self.target).map(|at| &self.target[at + 1..])
    }

    /// Appends the key; a part the request does not have adds nothing.
    pub(crate) fn write_key(&self, by: &HashBy, key: &mut Vec<u8>) {
        for part in &by.key {
            match part {
                KeyPart::Text(text) => key.extend_from_slice(text.as_bytes()),
                KeyPart::Variable(variable) => self.write(variable, key),
            }
        }
    }

    fn write(&self, variable: &Variable, key: &mut Vec<u8>) {
        let client = || self.view.client().to_canonical();
        let found = match variable {
            Variable::RequestUri => Some(self.target),
            Variable::Uri => Some(self.path),
            Variable::Args => self.query(),
            Variable::IsArgs => self.query().filter(|query| !query.is_empty()).map(|_| b"?".as_slice()),
            Variable::Arg(name) => self.query().and_then(|query| argument(query, name.as_bytes())),
            Variable::Host => Some(self.host.as_bytes()),
            Variable::Scheme => Some(if self.https { b"https".as_slice() } else { b"http" }),
            Variable::Method => Some(self.method),
            Variable::Header(name) => self.view.header(name),
            Variable::Cookie(name) => self.view.cookie(name),
            Variable::RemoteAddr => {
                // Writing to memory cannot fail.
                let _ = write!(key, "{}", client());
                None
            }
            Variable::BinaryRemoteAddr => {
                match client() {
                    IpAddr::V4(address) => key.extend_from_slice(&address.octets()),
                    IpAddr::V6(address) => key.extend_from_slice(&address.octets()),
                }
                None
            }
        };
        key.extend_from_slice(found.unwrap_or_default());
    }
}

/// The value of the first argument called `name`; case does not count, as in nginx.
fn argument<'a>(query: &'a [u8], name: &[u8]) -> Option<&'a [u8]> {
    query.split(|byte| *byte == b'&').find_map(|pair| {
        let equals = memchr::memchr(b'=', pair)?;
        pair[..equals].eq_ignore_ascii_case(name).then_some(&pair[equals + 1..])
    })
}

/// The ring of one pool. Depends on addresses and weights alone, so that all
/// workers, generations and processes agree.
pub(crate) struct Ring {
    continuum: Continuum,
    /// By point: an index into the pool's endpoints.
    points: Box<[u16]>,
    endpoints: usize,
}

impl fmt::Debug for Ring {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Ring").field("points", &self.points.len()).finish_non_exhaustive()
    }
}

impl Ring {
    /// `None` for no endpoints, and for more than a ring can tell apart (65,536).
    pub(crate) fn new(endpoints: &[CompiledEndpoint]) -> Option<Ring> {
        if endpoints.is_empty() || endpoints.len() > usize::from(u16::MAX) {
            return None;
        }
        let weights: Vec<u64> = endpoints.iter().map(|endpoint| u64::from(endpoint.weight.max(1))).collect();
        let units = super::schedule::reduced(&weights, UNITS * weights.len() as u64);
        let buckets: Vec<Bucket> = endpoints
            .iter()
            .zip(units)
            // At least 1: a nonzero weight keeps a unit.
            .map(|(endpoint, units)| Bucket::new(endpoint.live.address, units.max(1) as u32))
            .collect();
        let continuum = Continuum::new(&buckets);
        let mut by_address: Vec<(std::net::SocketAddr, u16)> =
            endpoints.iter().zip(0..).map(|(endpoint, index)| (endpoint.live.address, index)).collect();
        by_address.sort_unstable();
        let index_of = |address: &std::net::SocketAddr| {
            by_address.binary_search_by_key(address, |entry| entry.0).map_or(0, |at| by_address[at].1)
        };
        let mut points = Vec::new();
        let mut at = 0;
        while let Some(address) = continuum.get_addr(&mut at) {
            points.push(index_of(address));
            // Back at the first point.
            if at == 0 {
                break;
            }
        }
        Some(Ring { continuum, points: points.into(), endpoints: endpoints.len() })
    }

    /// Where `key` is on the ring.
    pub(crate) fn position(&self, key: &[u8]) -> u32 {
        self.continuum.node_idx(key) as u32
    }

    /// The endpoint at `position`, by index.
    pub(crate) fn endpoint(&self, position: u32) -> u16 {
        self.points[position as usize % self.points.len()]
    }

    /// From `position` on, each endpoint as often as it has points there.
    fn from(&self, position: u32) -> impl Iterator<Item = u16> {
        let (before, from) = self.points.split_at(position as usize % self.points.len());
        from.iter().chain(before).take(WALK).copied()
    }

    /// The first endpoint from `position` on that `may` be taken; of the first
    /// `subset` different ones, one from the `random`th on.
    pub(crate) fn find(
        &self,
        position: u32,
        subset: u16,
        random: u32,
        may: impl Fn(u16) -> bool,
    ) -> Option<u16> {
        if subset > 1 {
            let set = self.subset(position, usize::from(subset).min(SUBSET).min(self.endpoints));
            let (before, from) = set.split_at(random as usize % set.len());
            if let Some(found) = from.iter().chain(before).find(|index| may(**index)) {
                return Some(*found);
            }
        }
        let mut last = None;
        self.from(position).find(|index| last.replace(*index) != Some(*index) && may(*index))
    }

    /// The first `size` different endpoints from `position` on; fewer if they
    /// are far apart. Never empty.
    fn subset(&self, position: u32, size: usize) -> SmallVec<[u16; SUBSET]> {
        let mut set = SmallVec::new();
        for index in self.from(position) {
            if !set.contains(&index) {
                set.push(index);
                if set.len() == size {
                    break;
                }
            }
        }
        set
    }
}

#[cfg(test)]
#[path = "hash/tests.rs"]
mod tests;
