//! The hooks of a socket's address: reads it, asks, writes it.

use aya_ebpf::EbpfContext;
use aya_ebpf::helpers::generated::{bpf_get_netns_cookie, bpf_set_retval};
use aya_ebpf::programs::SockAddrContext;
use lockgate_ebpf_common::{AffinityKey, Event, kind, service};

use crate::choice::{Choice, choose, set_flag};
use crate::frontend::{self, Found, MAPPED, balanced, find, is_mapped};
use crate::maps::{OPTED_OUT, count};
use crate::reverse::{self, Place};

/// Which fields of the context hold the address.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Family {
    V4,
    V6,
}

/// Who calls.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Sending {
    /// `connect`: everything the socket sends goes there.
    Connected,
    /// One datagram.
    Single,
}

/// What a hook answers.
#[must_use]
enum Verdict {
    /// Go on, with the address as it now is.
    Pass,
    /// Fail with this error number.
    Fail(i32),
}

const ENOMEM: i32 = 12;
const ECONNREFUSED: i32 = 111;

impl Verdict {
    #[inline(always)]
    fn into_return(self) -> i32 {
        match self {
            Self::Pass => 1,
            Self::Fail(error) => {
                // SAFETY: sets what the system call returns; without it the caller would see EPERM.
                unsafe { bpf_set_retval(-error) };
                0
            }
        }
    }
}

/// Sends a socket that named a Service's address to an endpoint.
#[inline(always)]
pub fn forward(context: &SockAddrContext, family: Family, sending: Sending) -> i32 {
    forwarded(context, family, sending).into_return()
}

/// Shows a socket the address it named instead of the endpoint's.
#[inline(always)]
pub fn restore(context: &SockAddrContext, family: Family) -> i32 {
    if let Some(asked) = reverse::asked(context, destination(context, family)) {
        // A family that cannot hold it shows the endpoint: frontends and endpoints are of one family.
        let _ = redirect(context, family, asked);
    }
    // The kernel accepts no other answer at these hooks.
    1
}

#[inline(always)]
fn forwarded(context: &SockAddrContext, family: Family, sending: Sending) -> Verdict {
    // SAFETY: reads a field of the context, which the kernel set.
    let Some(protocol) = balanced(unsafe { (*context.sock_addr).protocol }) else { return Verdict::Pass };
    let asked = destination(context, family);
    let namespace = || {
        // SAFETY: the helper takes the context and returns a number.
        unsafe { bpf_get_netns_cookie(context.as_ptr()) }
    };
    let used =
        match find(asked.address, asked.port, protocol, |settings| namespace() == settings.node_namespace) {
            Found::Nothing => {
                // A connected IPv6 socket with a mapped peer comes here for each datagram, with the endpoint.
                if !is_connected(context) {
                    reverse::forget(context, asked);
                }
                return Verdict::Pass;
            }
            Found::UnknownPort => {
                count(Event::UnknownPort);
                return Verdict::Fail(ECONNREFUSED);
            }
            Found::Service(used) => used,
        };
    let cookie = namespace();
    if left_to_packets(&used, cookie) {
        return Verdict::Pass;
    }
    let local = used.local_inside();
    let set = set_flag(local);
    let connected = sending == Sending::Connected;
    if !connected && let Some(chosen) = reverse::pinned(context, asked, &used, set) {
        return sent(redirect(context, family, Place { address: chosen.address, port: chosen.port }));
    }
    let chosen = match choose(&used, local, &AffinityKey::namespace(cookie), hash(cookie)) {
        Choice::Endpoint(chosen) => chosen,
        Choice::Refuse => return Verdict::Fail(ECONNREFUSED),
        // No answer at all: the address stays, and the packets die on their way.
        Choice::Silence => return Verdict::Pass,
    };
    if !reverse::remember(context, asked, &chosen, &used, set, protocol, connected) {
        count(Event::NoStorage);
        // A connection works without, it only shows the endpoint; a single datagram's reply would not be
        // recognised.
        if !connected {
            return Verdict::Fail(ENOMEM);
        }
    }
    sent(redirect(context, family, Place { address: chosen.address, port: chosen.port }))
}

/// Whether sockets leave this Service alone: the source decides, which a socket does not have yet, the Pod is
/// opted out, or the address is the gateway's.
#[inline(always)]
fn left_to_packets(used: &frontend::Use, cookie: u64) -> bool {
    let by_source = used.kind == kind::LOAD_BALANCER && used.flags & service::SOURCE_RANGES != 0;
    // SAFETY: only whether there is an element, which is not read.
    by_source || used.flags & service::GATEWAY != 0 || OPTED_OUT.get_ptr(&cookie).is_some()
}

#[inline(always)]
fn is_connected(context: &SockAddrContext) -> bool {
    /// `BPF_TCP_ESTABLISHED`; sockets of UDP use the same number.
    const ESTABLISHED: u32 = 1;
    // SAFETY: the kernel set the context's socket, and allows to read this field of it.
    unsafe { (&raw const (*(*context.sock_addr).__bindgen_anon_1.sk).state).read_volatile() == ESTABLISHED }
}

#[inline(always)]
fn sent(done: bool) -> Verdict {
    if done {
        return Verdict::Pass;
    }
    count(Event::Torn);
    Verdict::Fail(ECONNREFUSED)
}

/// Spreads a cookie, a small number, over all bits (the finisher of MurmurHash3).
#[inline(always)]
fn hash(cookie: u64) -> u32 {
    let mut hash = cookie;
    hash ^= hash >> 33;
    hash = hash.wrapping_mul(0xff51_afd7_ed55_8ccd);
    hash ^= hash >> 33;
    hash = hash.wrapping_mul(0xc4ce_b9fe_1a85_ec53);
    (hash >> 32) as u32
}

/// The address in the context. Word by word and volatile: the verifier allows no access to the context through
/// a computed pointer, into which the compiler would merge them.
#[inline(always)]
fn destination(context: &SockAddrContext, family: Family) -> Place {
    let at = context.sock_addr;
    // SAFETY: reads fields of the context, which the kernel set.
    unsafe {
        let address = match family {
            Family::V4 => [0, 0, MAPPED, (&raw const (*at).user_ip4).read_volatile()],
            Family::V6 => [
                (&raw const (*at).user_ip6[0]).read_volatile(),
                (&raw const (*at).user_ip6[1]).read_volatile(),
                (&raw const (*at).user_ip6[2]).read_volatile(),
                (&raw const (*at).user_ip6[3]).read_volatile(),
            ],
        };
        let port = (&raw const (*at).user_port).read_volatile() as u16;
        Place { address, port: port.to_ne_bytes() }
    }
}

/// Writes an address into the context; false if the family cannot hold it.
#[inline(always)]
#[must_use]
fn redirect(context: &SockAddrContext, family: Family, to: Place) -> bool {
    let at = context.sock_addr;
    // SAFETY: writes fields of the context that these hooks may write, each as one word.
    unsafe {
        match family {
            Family::V4 => {
                if !is_mapped(to.address) {
                    return false;
                }
                (&raw mut (*at).user_ip4).write_volatile(to.address[3]);
            }
            Family::V6 => {
                (&raw mut (*at).user_ip6[0]).write_volatile(to.address[0]);
                (&raw mut (*at).user_ip6[1]).write_volatile(to.address[1]);
                (&raw mut (*at).user_ip6[2]).write_volatile(to.address[2]);
                (&raw mut (*at).user_ip6[3]).write_volatile(to.address[3]);
            }
        }
        (&raw mut (*at).user_port).write_volatile(u32::from(u16::from_ne_bytes(to.port)));
    }
    true
}
