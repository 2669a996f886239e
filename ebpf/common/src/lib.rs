//! Layouts shared between the kernel and the user half of the service plane.
//!
//! ```text
//!  FRONTENDS               SERVICES                      SLOTS                ENDPOINTS
//!  address, port,  ──────▶ one 64-byte line:  ─ base ──▶ run of one set: ──▶  address, port,
//!  protocol, scope  index  a SetWord for each   + n      endpoint, owner      which sets it is in
//!  (hash)                  set (mmapped array)           (mmapped array)      (mmapped array)
//! ```
//!
//! A set of endpoints changes by one aligned 8-byte store of its [`SetWord`]: the run it names was
//! complete before, and what the old word named stays untouched for a grace period. A reader that was
//! held up for longer sees a [`Slot::owner`] that is not of its word, and reads the word again.
//!
//! # Decisions
//! - **One 16-byte address for both families**, IPv4 mapped into `::ffff:0:0/96`. Keys of 8 bytes for
//!   IPv4 would save 16 bytes of about 90 for each frontend and a few nanoseconds of hashing. They would
//!   cost a second copy of every map, of every lookup in the programs and of every write in the
//!   reconciler. A mapped address that an IPv6 socket uses finds its IPv4 Service by itself.
//! - **An endpoint entry belongs to one Service.** The same Pod behind two Services is two entries of 24
//!   bytes. So "does this client's endpoint still belong to the set" is one load of
//!   [`Endpoint::generation`] and [`Endpoint::sets`], never a search through a run.
//! - **What an empty set means travels in its word** ([`SetWord::EMPTY_REJECT`], [`SetWord::EMPTY_DROP`]),
//!   so that the verdict changes with the set, in the same store.
//! - **No padding anywhere**: every byte of a key is compared, and every byte of a value is read by
//!   somebody. Reserved bytes are fields and are written as zero.
#![no_std]
#![forbid(unsafe_code)]

mod event;
mod nat;

pub use event::Event;
pub use nat::{Flow, FlowKey, FragmentKey, Ports, Words, flow};

/// Changes when any layout here does: pins live below a folder of this name, and a new layout is filled
/// beside the old one while that serves.
pub const LAYOUT: &str = "v1";

/// Protocol numbers (IANA) as the IP header carries them.
pub mod protocol {
    /// TCP.
    pub const TCP: u8 = 6;
    /// UDP.
    pub const UDP: u8 = 17;
    /// SCTP.
    pub const SCTP: u8 = 132;
}

/// An address of either family: IPv6, or IPv4 mapped into `::ffff:0:0/96`; network byte order.
pub type Address = [u8; 16];

/// `address` (network byte order) mapped into IPv6.
pub const fn mapped(address: [u8; 4]) -> Address {
    let [a, b, c, d] = address;
    [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0xff, 0xff, a, b, c, d]
}

/// Names of the maps in the kernel object; also their pins' file names.
pub mod maps {
    /// [`FrontendKey`](super::FrontendKey) to [`Frontend`](super::Frontend), hash.
    pub const FRONTENDS: &str = "FRONTENDS";
    /// [`Service`](super::Service) by index, mmapped array. Index 0 is never used.
    pub const SERVICES: &str = "SERVICES";
    /// [`Slot`](super::Slot) by index, mmapped array.
    pub const SLOTS: &str = "SLOTS";
    /// [`Endpoint`](super::Endpoint) by index, mmapped array. Index 0 is never used.
    pub const ENDPOINTS: &str = "ENDPOINTS";
    /// [`AffinityKey`](super::AffinityKey) to [`Affinity`](super::Affinity), LRU hash.
    pub const AFFINITY: &str = "AFFINITY";
    /// [`Reverse`](super::Reverse) of a socket, socket storage.
    pub const REVERSE: &str = "REVERSE";
    /// [`SourceRange`](super::SourceRange) below its prefix length, to [`Allowed`](super::Allowed), LPM trie.
    pub const SOURCE_RANGES: &str = "SOURCE_RANGES";
    /// [`Address`](super::Address) of this node to its [`node_address`](super::node_address) flags (u32), hash.
    pub const NODE_ADDRESSES: &str = "NODE_ADDRESSES";
    /// Cookie (u64, host byte order) of each network namespace whose sockets are left alone, to 0 (u32), hash.
    pub const OPTED_OUT: &str = "OPTED_OUT";
    /// [`Settings`](super::Settings), array of one.
    pub const SETTINGS: &str = "SETTINGS";
    /// [`FlowKey`](super::FlowKey) to [`Flow`](super::Flow), LRU hash, two entries for each flow.
    pub const FLOWS: &str = "FLOWS";
    /// [`FragmentKey`](super::FragmentKey) to the [`Ports`](super::Ports) of the first fragment, LRU hash.
    pub const FRAGMENTS: &str = "FRAGMENTS";
    /// Counters (u64) by [`Event`](super::Event), per-CPU array.
    pub const EVENTS: &str = "EVENTS";
}

/// Entries each map is made for unless the loader is told otherwise; every table has its bound here.
pub mod capacity {
    /// Frontends. Without preallocation: a free place costs 8 bytes.
    pub const FRONTENDS: u32 = 1 << 18;
    /// Services; 64 bytes each.
    pub const SERVICES: u32 = 1 << 16;
    /// Slots; 8 bytes each. Old and new runs exist at the same time.
    pub const SLOTS: u32 = 1 << 20;
    /// Endpoints; 24 bytes each.
    pub const ENDPOINTS: u32 = 1 << 19;
    /// Clients remembered; the least recently used goes first.
    pub const AFFINITY: u32 = 1 << 16;
    /// Source ranges.
    pub const SOURCE_RANGES: u32 = 1 << 16;
    /// Addresses of this node.
    pub const NODE_ADDRESSES: u32 = 1 << 10;
    /// Network namespaces left alone.
    pub const OPTED_OUT: u32 = 1 << 12;
    /// Entries of flows through packets, two for each, about 130 bytes each; the least recently used goes first.
    pub const FLOWS: u32 = 3 << 16;
    /// Packets in fragments; the least recently used goes first.
    pub const FRAGMENTS: u32 = 1 << 12;
}

/// What [`FrontendKey::address`] is compared with.
pub mod scope {
    /// The packet's destination.
    pub const ADDRESS: u8 = 0;
    /// Nothing: the address is unspecified (`0.0.0.0` mapped, or `::`), one entry for each family, and
    /// serves on every address of `NODE_ADDRESSES` that has `NODE_PORTS`.
    pub const NODE_PORT: u8 = 1;
    /// The packet's destination; port and protocol are 0. The entry says that the address is a Service's:
    /// a port of it that has no entry of its own is refused. Its [`Frontend::service`](super::Frontend) is 0.
    pub const CLUSTER_ADDRESS: u8 = 2;
}

/// Key of `FRONTENDS`.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct FrontendKey {
    /// Destination address, or unspecified: see [`scope`].
    pub address: Address,
    /// Destination port; network byte order.
    pub port: [u8; 2],
    /// One of [`protocol`].
    pub protocol: u8,
    /// One of [`scope`].
    pub scope: u8,
}

const _: () = assert!(size_of::<FrontendKey>() == 20 && align_of::<FrontendKey>() == 1);

/// What an address is to its Service: decides about policies and source ranges.
pub mod kind {
    /// A cluster IP: `internalTrafficPolicy` holds.
    pub const CLUSTER_IP: u8 = 0;
    /// A node port: `externalTrafficPolicy` holds.
    pub const NODE_PORT: u8 = 1;
    /// A load balancer's address: `externalTrafficPolicy` and source ranges hold.
    pub const LOAD_BALANCER: u8 = 2;
    /// One of `externalIPs`: `externalTrafficPolicy` holds.
    pub const EXTERNAL_IP: u8 = 3;
}

/// Value of `FRONTENDS`; written whole.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Frontend {
    /// Index into `SERVICES`; host byte order. 0: none, see [`scope::CLUSTER_ADDRESS`].
    pub service: u32,
    /// The [`Service::generation`] it means; host byte order. Another one there: the Service has gone, and
    /// the frontend counts as absent.
    pub generation: u16,
    /// One of [`kind`].
    pub kind: u8,
    /// Always 0.
    pub zero: u8,
}

const _: () = assert!(size_of::<Frontend>() == 8 && align_of::<Frontend>() == 4);

/// One set of endpoints in 8 bytes, loaded and stored at once; host byte order.
/// From the lowest bit: base 24, count 16, generation 24.
#[repr(transparent)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub struct SetWord(pub u64);

impl SetWord {
    /// [`SetWord::base`] of an empty set whose clients are refused: there is no endpoint anywhere.
    pub const EMPTY_REJECT: u32 = 0;
    /// [`SetWord::base`] of an empty set whose clients get no answer: there are endpoints, but not for them.
    pub const EMPTY_DROP: u32 = 1;
    /// Bases and generations are below this.
    pub const LIMIT: u32 = 1 << 24;

    /// A set of `count` slots from index `base`; what exceeds 24 bits of `base` and `generation` is cut off.
    pub const fn new(base: u32, count: u16, generation: u32) -> Self {
        let base = (base & (Self::LIMIT - 1)) as u64;
        let generation = (generation & (Self::LIMIT - 1)) as u64;
        Self(base | (count as u64) << 24 | generation << 40)
    }

    /// Index of the first slot; of an empty set, what becomes of its clients.
    pub const fn base(self) -> u32 {
        (self.0 & (Self::LIMIT as u64 - 1)) as u32
    }

    /// Slots in the run.
    pub const fn count(self) -> u16 {
        (self.0 >> 24) as u16
    }

    /// Counts the runs this set has had, modulo 2^24.
    pub const fn generation(self) -> u32 {
        (self.0 >> 40) as u32
    }
}

/// Flags of a [`Service`].
pub mod service {
    /// `internalTrafficPolicy: Local`: a cluster IP uses the local set.
    pub const INTERNAL_LOCAL: u32 = 1;
    /// `externalTrafficPolicy: Local`: other addresses use the local set for clients outside the node and its
    /// Pods, and the client's address stays.
    pub const EXTERNAL_LOCAL: u32 = 1 << 1;
    /// `sessionAffinity: ClientIP`: [`Service::affinity_timeout`](super::Service) holds.
    pub const AFFINITY: u32 = 1 << 2;
    /// `loadBalancerSourceRanges`: [`SourceRange`](super::SourceRange)s with this Service's index say who may come.
    pub const SOURCE_RANGES: u32 = 1 << 3;
    /// The address goes to the gateway on this node (`sk_lookup`), not to an endpoint.
    pub const GATEWAY: u32 = 1 << 4;
}

/// How a slot is chosen.
pub mod algorithm {
    /// Each slot alike; weights are repeated slots.
    pub const RANDOM: u8 = 0;
    /// A hash of the client picks the slot: source hash, and Maglev where the run is its table.
    pub const SOURCE_HASH: u8 = 1;
    /// One slot after another.
    pub const ROUND_ROBIN: u8 = 2;
}

/// Element of `SERVICES`, one cache line. The words are stored alone, everything else before the first
/// frontend names the Service; a change of the rest while it serves is a store for each field.
#[repr(C, align(8))]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub struct Service {
    /// The set of the whole cluster.
    pub cluster: SetWord,
    /// The set of this node.
    pub local: SetWord,
    /// Of [`service`]; host byte order.
    pub flags: u32,
    /// Seconds a client stays with its endpoint after its last new connection; host byte order.
    pub affinity_timeout: u32,
    /// Changes when the index is given to another Service; host byte order.
    pub generation: u16,
    /// One of [`algorithm`].
    pub algorithm: u8,
    /// Always 0.
    pub zero: [u8; 5],
    /// Counts new connections, written by the programs and only with [`algorithm::ROUND_ROBIN`].
    pub turn: u32,
    /// Always 0.
    pub reserved: [u32; 7],
}

const _: () = assert!(size_of::<Service>() == 64 && align_of::<Service>() == 8);

/// Element of `SLOTS`: one place in a run.
#[repr(C, align(8))]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub struct Slot {
    /// Index into `ENDPOINTS`; host byte order.
    pub endpoint: u32,
    /// [`Slot::owner_of`] the set the run was written for; host byte order.
    pub owner: u32,
}

const _: () = assert!(size_of::<Slot>() == 8 && align_of::<Slot>() == 8);

impl Slot {
    /// The tag of the runs of one set of the Service with this index: no two runs that could follow each
    /// other at the same place have the same. `local` tells the Service's two sets apart.
    pub const fn owner_of(service: u32, local: bool, word: SetWord) -> u32 {
        // Odd factor (2^32 / golden ratio): neighbouring services spread over all bits.
        (service << 1 | local as u32).wrapping_mul(0x9e37_79b1) ^ word.generation()
    }
}

/// Flags of [`Endpoint::sets`] and [`Endpoint::flags`].
pub mod endpoint {
    /// In `sets`: in the Service's cluster set.
    pub const CLUSTER: u8 = 1;
    /// In `sets`: in the Service's local set.
    pub const LOCAL: u8 = 1 << 1;
    /// In `flags`: has an address of this node (host network): replies pass the node, nothing to masquerade.
    pub const HOST_NETWORK: u8 = 1;
}

/// Element of `ENDPOINTS`. Address and port are written before a slot names the entry and stay until no slot
/// has for a grace period; `sets` is written before the commit of a set it joins and after that of a set it left.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub struct Endpoint {
    /// Where it listens.
    pub address: Address,
    /// Where it listens; network byte order.
    pub port: [u8; 2],
    /// The sets it is in: of [`endpoint`]. 0: it has left, clients that stuck to it choose anew.
    pub sets: u8,
    /// Of [`endpoint`].
    pub flags: u8,
    /// Changes when the index is given to another endpoint; host byte order.
    pub generation: u32,
}

const _: () = assert!(size_of::<Endpoint>() == 24 && align_of::<Endpoint>() == 4);

/// Key of `AFFINITY`: a client of a Service, whichever of its addresses it used. The source port does not
/// count, as with kube-proxy.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct AffinityKey {
    /// Source address of a packet; for a socket, which has none yet, [`AffinityKey::namespace`].
    pub client: Address,
    /// Index into `SERVICES`; host byte order.
    pub service: u32,
    /// [`Service::generation`]; host byte order.
    pub generation: u16,
    /// [`endpoint::CLUSTER`] or [`endpoint::LOCAL`]: the sets remember separately.
    pub set: u8,
    /// Always 0.
    pub zero: u8,
}

const _: () = assert!(size_of::<AffinityKey>() == 24 && align_of::<AffinityKey>() == 4);

impl AffinityKey {
    /// The network namespace with this cookie as a client: all its sockets leave with the same source, a
    /// Pod's or the node's. In `ff00::/8`, where no source address is.
    pub const fn namespace(cookie: u64) -> Address {
        let [a, b, c, d, e, f, g, h] = cookie.to_be_bytes();
        [0xff, 0, 0, 0, 0, 0, 0, 0, a, b, c, d, e, f, g, h]
    }
}

/// Value of `AFFINITY`.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Affinity {
    /// Nanoseconds of the boot clock at the last new connection; host byte order.
    pub last_used: u64,
    /// Index into `ENDPOINTS`; host byte order.
    pub endpoint: u32,
    /// [`Endpoint::generation`]; host byte order.
    pub generation: u32,
}

const _: () = assert!(size_of::<Affinity>() == 16 && align_of::<Affinity>() == 8);

/// Services an unconnected UDP socket can have replies from under their own address at the same time.
pub const REVERSE_WAYS: usize = 4;

/// Value of `REVERSE`: where a socket was sent instead of the addresses it knows. Dies with the socket.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Reverse {
    /// A connected socket uses the first; others any, the oldest is replaced.
    pub ways: [ReverseWay; REVERSE_WAYS],
    /// Next to replace; host byte order.
    pub next: u32,
    /// Always 0.
    pub zero: u32,
}

const _: () = assert!(size_of::<Reverse>() == 56 * REVERSE_WAYS + 8 && align_of::<Reverse>() == 4);

/// One translation of a socket. All zero: free.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ReverseWay {
    /// Address the application named, as `bpf_sock_addr` has it: words in network byte order, IPv4 mapped.
    pub frontend: [u32; 4],
    /// Address it was sent to; alike.
    pub endpoint: [u32; 4],
    /// Port the application named; network byte order.
    pub frontend_port: [u8; 2],
    /// Port it was sent to; network byte order.
    pub endpoint_port: [u8; 2],
    /// Index into `SERVICES`; host byte order.
    pub service: u32,
    /// Index into `ENDPOINTS`; host byte order.
    pub index: u32,
    /// [`Endpoint::generation`]; host byte order.
    pub generation: u32,
    /// [`endpoint::CLUSTER`] or [`endpoint::LOCAL`]: the set it was chosen from.
    pub set: u8,
    /// One of [`protocol`]; 0: what comes from the endpoint is shown as it is.
    pub protocol: u8,
    /// [`Service::generation`]; host byte order.
    pub service_generation: u16,
    /// Always 0.
    pub zero: u32,
}

const _: () = assert!(size_of::<ReverseWay>() == 56 && align_of::<ReverseWay>() == 4);

/// Key of `SOURCE_RANGES` after its prefix length (u32, host byte order), which counts from the first bit
/// of `service`: 32 + 96 + n for an IPv4 range, 32 + n for IPv6.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct SourceRange {
    /// Index into `SERVICES`; network byte order, for the trie compares from the first bit.
    pub service: [u8; 4],
    /// Who may come.
    pub address: Address,
}

const _: () = assert!(size_of::<SourceRange>() == 20 && align_of::<SourceRange>() == 1);

/// Value of `SOURCE_RANGES`.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Allowed {
    /// [`Service::generation`] it was written for; host byte order. Another: not allowed.
    pub generation: u32,
}

const _: () = assert!(size_of::<Allowed>() == 4);

/// Flags of `NODE_ADDRESSES`.
pub mod node_address {
    /// Node ports are served here.
    pub const NODE_PORTS: u32 = 1;
    /// Only for sockets of the node's own network namespace: a loopback address, which each Pod has too.
    pub const NODE_ONLY: u32 = 1 << 1;
}

/// Flags of [`Settings`].
pub mod setting {
    /// Also what Pods send to cluster IPs leaves with the node's address.
    pub const MASQUERADE_ALL: u32 = 1;
}

/// The element of `SETTINGS`; host byte order. All zero works for socket load balancing.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub struct Settings {
    /// Cookie of the node's network namespace (`SO_NETNS_COOKIE`), by which its sockets are told from Pods'.
    pub node_namespace: u64,
    /// Set in a packet's mark: masquerade it. One bit.
    pub masquerade_mark: u32,
    /// Set in a packet's mark: refuse it. One bit.
    pub reject_mark: u32,
    /// First node port.
    pub node_port_first: u16,
    /// Last node port.
    pub node_port_last: u16,
    /// Of [`setting`].
    pub flags: u32,
}

const _: () = assert!(size_of::<Settings>() == 24 && align_of::<Settings>() == 8);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_word_holds_its_three_parts() {
        for (base, count, generation) in
            [(0, 0, 0), (1, 0, 0), (0xff_ffff, 0xffff, 0xff_ffff), (0x12_3456, 0x789a, 0xbc_def0)]
        {
            let word = SetWord::new(base, count, generation);
            assert_eq!((word.base(), word.count(), word.generation()), (base, count, generation));
        }
        assert_eq!(SetWord::default().base(), SetWord::EMPTY_REJECT);
        assert_eq!(SetWord::new(SetWord::LIMIT + 3, 1, SetWord::LIMIT + 5), SetWord::new(3, 1, 5));
    }

    #[test]
    fn runs_that_follow_each_other_have_different_owners() {
        let word = |generation| SetWord::new(0, 1, generation);
        assert_ne!(Slot::owner_of(1, false, word(1)), Slot::owner_of(1, false, word(2)));
        assert_ne!(Slot::owner_of(1, false, word(1)), Slot::owner_of(1, true, word(1)));
        assert_ne!(Slot::owner_of(1, false, word(1)), Slot::owner_of(2, false, word(1)));
        assert_ne!(Slot::owner_of(1, false, word(0)), 0, "an untouched slot belongs to nobody");
    }

    #[test]
    fn each_entry_of_a_flow_makes_the_other() {
        let request = FlowKey {
            source: [0, 0, 1, 10],
            destination: [0, 0, 1, 20],
            source_port: [1, 2],
            destination_port: [3, 4],
            protocol: protocol::TCP,
            direction: flow::REQUEST,
            zero: [0; 2],
        };
        let there = Flow {
            address: [0, 0, 1, 30],
            port: [5, 6],
            client_port: [7, 8],
            endpoint: 9,
            generation: 10,
            seen: 11,
            flags: flow::MASQUERADE,
            zero: [0; 3],
        };
        let partner = |key: &FlowKey, flow: &Flow| {
            let (mut other_key, mut other) = (*key, *flow);
            flow.partner(key, &mut other_key, &mut other);
            (other_key, other)
        };
        let (reply, back) = partner(&request, &there);
        assert_eq!((reply.source, reply.source_port), (there.address, there.port), "from the endpoint");
        assert_eq!((reply.destination, reply.destination_port), (request.source, [7, 8]));
        assert_eq!((back.address, back.port), (request.destination, request.destination_port));
        assert_eq!(back.client_port, request.source_port);
        assert_eq!(partner(&reply, &back), (request, there));
        let closing = Flow { flags: flow::CLOSING, ..there };
        assert_eq!(partner(&request, &closing).1.flags, 0, "one side's end");
    }

    #[test]
    fn events_are_numbered_by_their_place() {
        for (index, event) in Event::ALL.iter().enumerate() {
            assert_eq!(*event as usize, index);
        }
    }
}
