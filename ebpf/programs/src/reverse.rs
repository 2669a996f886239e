//! What a socket asked for, kept in its storage: replies and `getpeername` show that instead of the endpoint.

use aya_ebpf::programs::SockAddrContext;
use lockgate_ebpf_common::{REVERSE_WAYS, Reverse, protocol};

use crate::choice::{Chosen, still};
use crate::frontend::{Use, Words};
use crate::maps::REVERSE;

/// An address with its port in network byte order.
#[derive(Clone, Copy)]
pub struct Place {
    pub address: Words,
    pub port: [u8; 2],
}

/// Where this socket was sent when it asked for `frontend` before, if that still is in the set: a UDP socket
/// without a connection stays with its endpoint.
#[inline(always)]
pub fn pinned(context: &SockAddrContext, frontend: Place, used: &Use, set: u8) -> Option<Chosen> {
    let reverse = existing(context)?;
    for index in 0..REVERSE_WAYS {
        // SAFETY: the storage is this socket's and lives as long; `index` is below its length. Threads that
        // share the socket may write at the same time: `still` judges what was read.
        let way = unsafe { &(&(*reverse).ways)[index] };
        if way.set == set
            && way.service == used.index
            && way.service_generation == used.generation
            && way.frontend_port == frontend.port
            && same(&way.frontend, &frontend.address)
        {
            let chosen = still(way.index, way.generation, set)?;
            claim(reverse, index, protocol::UDP);
            return Some(chosen);
        }
    }
    None
}

/// Remembers that the socket asked for `frontend` and was sent to `chosen`: connected, as the first; else in the
/// place of what it asked for before at this address, or of the oldest. False: no memory.
#[inline(always)]
#[must_use]
pub fn remember(
    context: &SockAddrContext,
    frontend: Place,
    chosen: &Chosen,
    used: &Use,
    set: u8,
    protocol: u8,
    connected: bool,
) -> bool {
    // SAFETY: the helper takes the context's socket, which the kernel set, and returns its storage or null.
    let reverse = unsafe { REVERSE.get_or_insert_ptr_mut(context, None) };
    if reverse.is_null() {
        return false;
    }
    let at = if connected { 0 } else { place_of(reverse, frontend) };
    // SAFETY: not null; the storage is this socket's, and the index below its length.
    let way = unsafe { &mut (&mut (*reverse).ways)[at % REVERSE_WAYS] };
    way.frontend = frontend.address;
    way.endpoint = chosen.address;
    way.frontend_port = frontend.port;
    way.endpoint_port = chosen.port;
    way.service = used.index;
    way.index = chosen.index;
    way.generation = chosen.generation;
    way.set = set;
    way.service_generation = used.generation;
    claim(reverse, at % REVERSE_WAYS, protocol);
    true
}

/// The socket now talks to `place` itself: what comes from there is shown as it is.
#[inline(always)]
pub fn forget(context: &SockAddrContext, place: Place) {
    let Some(reverse) = existing(context) else { return };
    for index in 0..REVERSE_WAYS {
        // SAFETY: as in `pinned`.
        let way = unsafe { &mut (&mut (*reverse).ways)[index] };
        if way.endpoint_port == place.port && same(&way.endpoint, &place.address) {
            way.protocol = 0;
        }
    }
}

/// What the socket asked for when it was sent to `endpoint`.
#[inline(always)]
pub fn asked(context: &SockAddrContext, endpoint: Place) -> Option<Place> {
    let reverse = existing(context)?;
    for index in 0..REVERSE_WAYS {
        // SAFETY: as in `pinned`.
        let way = unsafe { &(&(*reverse).ways)[index] };
        if way.protocol != 0 && way.endpoint_port == endpoint.port && same(&way.endpoint, &endpoint.address) {
            return Some(Place { address: way.frontend, port: way.frontend_port });
        }
    }
    None
}

#[inline(always)]
fn existing(context: &SockAddrContext) -> Option<*mut Reverse> {
    // SAFETY: the helper takes the context's socket, which the kernel set, and returns its storage or null.
    let reverse = unsafe { REVERSE.get_ptr_mut(context) };
    (!reverse.is_null()).then_some(reverse)
}

/// Where the translation of `frontend` goes: its own place, or the oldest's.
#[inline(always)]
fn place_of(reverse: *mut Reverse, frontend: Place) -> usize {
    for index in 0..REVERSE_WAYS {
        // SAFETY: as in `pinned`.
        let way = unsafe { &(&(*reverse).ways)[index] };
        if way.frontend_port == frontend.port && same(&way.frontend, &frontend.address) {
            return index;
        }
    }
    // SAFETY: as in `pinned`.
    unsafe {
        let oldest = (*reverse).next as usize % REVERSE_WAYS;
        (*reverse).next = (oldest as u32).wrapping_add(1);
        oldest
    }
}

/// What comes from the endpoint of way `at` is from now on shown as that way's frontend. Two Services may have the
/// same endpoint: the one last sent to is shown.
#[inline(always)]
fn claim(reverse: *mut Reverse, at: usize, protocol: u8) {
    // SAFETY: as in `pinned`; callers pass an index below the length.
    let (endpoint, port) = unsafe {
        let way = &(&(*reverse).ways)[at % REVERSE_WAYS];
        (way.endpoint, way.endpoint_port)
    };
    for index in 0..REVERSE_WAYS {
        // SAFETY: as in `pinned`.
        let way = unsafe { &mut (&mut (*reverse).ways)[index] };
        if way.endpoint_port == port && same(&way.endpoint, &endpoint) {
            way.protocol = if index == at { protocol } else { 0 };
        }
    }
}

/// Word by word: a comparison of arrays would call `memcmp`, which does not exist here.
#[inline(always)]
fn same(a: &Words, b: &Words) -> bool {
    a[0] == b[0] && a[1] == b[1] && a[2] == b[2] && a[3] == b[3]
}
