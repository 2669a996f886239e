//! Connection tracking: which endpoint a flow has, from its first packet on. Two entries for each flow, each found by
//! what its direction's packets carry; each can be made again from the other.

use aya_ebpf::helpers::generated::{bpf_get_prandom_u32, bpf_ktime_get_coarse_ns};
use lockgate_ebpf_common::{Event, Flow, FlowKey, flow, protocol};

use crate::choice::still;
use crate::frontend::same;
use crate::maps::{FLOWS, count};
use crate::packet::Packet;

/// Seconds after which a flow without connections may get another endpoint, as with the kernel's own tracking of
/// UDP streams.
const IDLE: u32 = 120;
/// Seconds after which a closed connection's entry means nothing: twice the longest life of a segment.
const CLOSED: u32 = 120;
/// How many ports are tried for a client whose own is taken.
const PORTS_TRIED: u32 = 8;

/// `BPF_NOEXIST`.
const NO_EXIST: u64 = 1;

/// A flow as one packet meets it.
pub struct Tracked {
    /// What the packet carries.
    pub key: FlowKey,
    /// What becomes of it.
    pub flow: Flow,
    /// The entry of the other direction, when it was needed.
    other_key: FlowKey,
    other: Flow,
}

impl Tracked {
    /// The flow of a request, if it is to go on with its endpoint: a TCP connection always, anything else while the
    /// endpoint is in one of its Service's sets.
    #[inline(always)]
    pub fn find_request(&mut self, packet: &Packet, now: u32) -> bool {
        /// Either set.
        const ANY: u8 = u8::MAX;
        self.ask(packet, flow::REQUEST);
        let Some(at) = self.find() else { return false };
        let udp = self.key.protocol == protocol::UDP;
        if udp && now.wrapping_sub(self.flow.seen) >= IDLE {
            return false;
        }
        if (udp || packet.opens) && still(self.flow.endpoint, self.flow.generation, ANY).is_none() {
            return false;
        }
        self.touch(at, packet.closes, now);
        true
    }

    /// The flow of a reply.
    #[inline(always)]
    pub fn find_reply(&mut self, packet: &Packet, now: u32) -> bool {
        self.ask(packet, flow::REPLY);
        let Some(at) = self.find() else { return false };
        if self.flow.flags & flow::CLOSING != 0 && now.wrapping_sub(self.flow.seen) >= CLOSED {
            return false;
        }
        self.touch(at, packet.closes, now);
        true
    }

    /// The flow an ICMP error is about: it quotes a packet of the other direction, whose ends are exchanged.
    #[inline(always)]
    pub fn find_report(&mut self, packet: &Packet, direction: u8) -> bool {
        self.key.source = packet.quoted.destination;
        self.key.destination = packet.quoted.source;
        self.key.source_port = packet.ports.destination;
        self.key.destination_port = packet.ports.source;
        self.key.protocol = packet.quoted.protocol;
        self.key.direction = direction;
        self.find().is_some()
    }

    /// Makes both entries of a new flow. The client's port is changed if another flow's replies would look the
    /// same. False: no port was free, or no memory.
    #[inline(always)]
    pub fn open(&mut self) -> bool {
        let mut tries = 0;
        while tries < PORTS_TRIED {
            self.flow.partner(&self.key, &mut self.other_key, &mut self.other);
            if FLOWS.insert(&self.other_key, &self.other, NO_EXIST).is_ok() || self.replaced() {
                if tries > 0 {
                    count(Event::PortChanged);
                }
                if FLOWS.insert(&self.key, &self.flow, 0).is_err() {
                    count(Event::MapFull);
                }
                return true;
            }
            // SAFETY: draws a number.
            let drawn = unsafe { bpf_get_prandom_u32() };
            // Those that clients' kernels give, and no node port.
            self.flow.client_port = (0x8000 | (drawn as u16 & 0x7fff)).to_be_bytes();
            tries += 1;
        }
        count(Event::NoPort);
        false
    }

    #[inline(always)]
    fn ask(&mut self, packet: &Packet, direction: u8) {
        self.key.source = packet.header.source;
        self.key.destination = packet.header.destination;
        self.key.source_port = packet.ports.source;
        self.key.destination_port = packet.ports.destination;
        self.key.protocol = packet.header.protocol;
        self.key.direction = direction;
    }

    #[inline(always)]
    fn find(&mut self) -> Option<*mut Flow> {
        let at = FLOWS.get_ptr_mut(&self.key)?;
        // SAFETY: the verifier knows the pointer as a value of the map. An element of an LRU map may become another
        // flow's while it is read, when the map is full and this flow has been idle for longest: then this one
        // packet goes astray, where its receiver knows no such connection.
        self.flow = unsafe { *at };
        Some(at)
    }

    /// Puts the other direction's entry in the place of one that is this flow's already, or a closed one's.
    #[inline(always)]
    fn replaced(&self) -> bool {
        let Some(at) = FLOWS.get_ptr(&self.other_key) else { return false };
        // SAFETY: as in `find`; there, a foreign flow would lose its entry, which its next packet makes again.
        let there = unsafe { &*at };
        let ours = there.client_port == self.other.client_port
            && there.port == self.other.port
            && same(&there.address, &self.other.address);
        let closed = there.flags & flow::CLOSING != 0 && self.other.seen.wrapping_sub(there.seen) >= CLOSED;
        (ours || closed) && FLOWS.insert(&self.other_key, &self.other, 0).is_ok()
    }

    /// Says that the flow lives, once a second: to the map, which keeps what is looked up, and for both entries.
    #[inline(always)]
    fn touch(&mut self, at: *mut Flow, closes: bool, now: u32) {
        if closes && self.flow.flags & flow::CLOSING == 0 {
            // SAFETY: as in `find`. A byte, written whole; a foreign flow would lose its entry early.
            unsafe { (&raw mut (*at).flags).write_volatile(self.flow.flags | flow::CLOSING) };
        }
        if self.flow.seen != now {
            // SAFETY: as in `find`. One aligned word; a foreign flow would be kept a second longer.
            unsafe { (&raw mut (*at).seen).write_volatile(now) };
            self.flow.partner(&self.key, &mut self.other_key, &mut self.other);
            if FLOWS.get_ptr(&self.other_key).is_none()
                && FLOWS.insert(&self.other_key, &self.other, NO_EXIST).is_err()
            {
                count(Event::MapFull);
            }
        }
    }
}

/// Seconds of the monotonic clock.
#[inline(always)]
pub fn now() -> u32 {
    // SAFETY: reads the clock, as of the last tick.
    (unsafe { bpf_ktime_get_coarse_ns() } / 1_000_000_000) as u32
}
