//! Reads packets: every offset into one is computed here or in `rewrite.rs`, and every access goes through a helper
//! of the kernel that judges it against the packet's end.

use aya_ebpf::EbpfContext;
use aya_ebpf::helpers::generated::bpf_skb_load_bytes;
use aya_ebpf::programs::TcContext;
use core::mem::MaybeUninit;

use lockgate_ebpf_common::{Event, FragmentKey, Ports, Words, protocol};

use crate::frontend::MAPPED;
use crate::maps::{FRAGMENTS, count};
use crate::socket::Family;

/// Where the IP header begins: devices are of Ethernet's kind, and the kernel has taken VLAN tags off.
const NETWORK: u32 = 14;

/// An IP header.
pub struct Header {
    pub source: Words,
    pub destination: Words,
    /// Its offset.
    pub at: u32,
    /// Offset of the transport header.
    pub transport: u32,
    /// Of a fragmented packet; as the header has it.
    identification: u32,
    /// Of the transport header.
    pub protocol: u8,
    pub family: Family,
    pub fragment: Fragment,
}

/// What part of a packet this is.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Fragment {
    /// All of it.
    Whole,
    /// The first fragment, which has the transport header.
    First,
    /// Another one.
    Later,
}

/// A packet as far as it was read.
pub struct Packet {
    pub header: Header,
    /// Of an ICMP error: the header of the packet it quotes.
    pub quoted: Header,
    /// Of the packet, or of that which it quotes.
    pub ports: Ports,
    /// Whether it asks for a TCP connection.
    pub opens: bool,
    /// Whether it ends its sender's side of one.
    pub closes: bool,
}

/// What a packet is to us.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Read {
    /// One with ports.
    Packet,
    /// An ICMP error about one.
    Report,
    /// Nothing.
    Other,
}

impl Packet {
    /// Reads a packet's headers.
    #[inline(always)]
    pub fn read(&mut self, context: &TcContext) -> Read {
        if !outer(context, &mut self.header) {
            return Read::Other;
        }
        match (self.header.protocol, self.header.family) {
            (protocol::TCP | protocol::UDP | protocol::SCTP, _) if self.read_transport(context) => {
                Read::Packet
            }
            (ICMP, Family::V4) | (ICMP6, Family::V6) if self.read_report(context) => Read::Report,
            _ => Read::Other,
        }
    }

    /// Whether the transport header is here to be rewritten.
    #[inline(always)]
    pub fn has_transport(&self) -> bool {
        self.header.fragment != Fragment::Later
    }

    /// Keeps the ports for the fragments that follow the first.
    #[inline(always)]
    pub fn remember(&self) {
        if self.header.fragment == Fragment::First
            && FRAGMENTS.insert(fragment_key(&self.header), self.ports, 0).is_err()
        {
            count(Event::MapFull);
        }
    }

    /// The transport header, or what the first fragment had.
    #[inline(always)]
    fn read_transport(&mut self, context: &TcContext) -> bool {
        (self.opens, self.closes) = (false, false);
        if self.header.fragment == Fragment::Later {
            // SAFETY: an element of an LRU map may become another packet's while it is read: then no flow has such
            // ports, or another of the same addresses has, to whose packets the fragment does not belong.
            let ports = unsafe { FRAGMENTS.get(fragment_key(&self.header)) };
            let Some(ports) = ports else {
                count(Event::UnknownFragment);
                return false;
            };
            self.ports = *ports;
            return true;
        }
        if self.header.protocol == protocol::TCP {
            // RFC 9293: ports, sequence, acknowledgement, data offset and flags.
            // SAFETY: bytes.
            let Some(tcp) = (unsafe { load::<[[u8; 2]; 7]>(context, self.header.transport) }) else {
                return false;
            };
            let flags = tcp[6][1];
            self.opens = flags & (SYN | ACK) == SYN;
            self.closes = flags & (FIN | RST) != 0;
            self.ports = Ports { source: tcp[0], destination: tcp[1] };
            return true;
        }
        self.read_ports(context, self.header.transport)
    }

    /// RFC 792, RFC 4443: an error quotes the beginning of a packet behind 8 bytes.
    #[inline(always)]
    fn read_report(&mut self, context: &TcContext) -> bool {
        const UNREACHABLE: u8 = 3;
        const TIME_EXCEEDED: u8 = 11;
        const PARAMETER_PROBLEM: u8 = 12;
        // SAFETY: a byte.
        let Some(kind) = (unsafe { load::<u8>(context, self.header.transport) }) else { return false };
        let quoted = self.header.transport + 8;
        let read = match (self.header.family, kind) {
            _ if self.header.fragment != Fragment::Whole => false,
            (Family::V4, UNREACHABLE | TIME_EXCEEDED | PARAMETER_PROBLEM) => {
                ipv4(context, quoted, &mut self.quoted)
            }
            (Family::V6, 1..=4) => ipv6(context, quoted, &mut self.quoted),
            _ => false,
        };
        read && self.quoted.fragment != Fragment::Later
            && matches!(self.quoted.protocol, protocol::TCP | protocol::UDP | protocol::SCTP)
            && self.read_ports(context, self.quoted.transport)
    }

    #[inline(always)]
    fn read_ports(&mut self, context: &TcContext, at: u32) -> bool {
        // SAFETY: bytes.
        let Some(ports) = (unsafe { load(context, at) }) else { return false };
        self.ports = ports;
        true
    }
}

const ICMP: u8 = 1;
const ICMP6: u8 = 58;

#[inline(always)]
fn outer(context: &TcContext, header: &mut Header) -> bool {
    const IPV4: u32 = 0x0800_u16.to_be() as u32;
    const IPV6: u32 = 0x86dd_u16.to_be() as u32;
    match context.skb.protocol() {
        IPV4 => ipv4(context, NETWORK, header),
        IPV6 => ipv6(context, NETWORK, header),
        _ => false,
    }
}

/// RFC 791.
#[inline(always)]
fn ipv4(context: &TcContext, at: u32, header: &mut Header) -> bool {
    #[repr(C)]
    #[derive(Clone, Copy)]
    struct Ipv4 {
        version_and_length: u8,
        service: u8,
        total: u16,
        identification: u16,
        fragment: u16,
        hops: u8,
        protocol: u8,
        checksum: u16,
        source: u32,
        destination: u32,
    }
    // SAFETY: integers only, without padding.
    let Some(ip) = (unsafe { load::<Ipv4>(context, at) }) else { return false };
    let place = u16::from_be(ip.fragment);
    header.family = Family::V4;
    header.at = at;
    header.transport = at + u32::from(ip.version_and_length & 0xf) * 4;
    header.protocol = ip.protocol;
    header.source = [0, 0, MAPPED, ip.source];
    header.destination = [0, 0, MAPPED, ip.destination];
    header.identification = u32::from(ip.identification);
    header.fragment = part(place & 0x1fff, place & 0x2000 != 0);
    true
}

/// RFC 8200, with as many extension headers as anybody sends.
#[inline(always)]
fn ipv6(context: &TcContext, at: u32, header: &mut Header) -> bool {
    #[repr(C)]
    #[derive(Clone, Copy)]
    struct Ipv6 {
        version: u32,
        length: u16,
        next: u8,
        hops: u8,
        source: Words,
        destination: Words,
    }
    const EXTENSIONS: u32 = 6;
    const HOP_BY_HOP: u8 = 0;
    const ROUTING: u8 = 43;
    const FRAGMENT: u8 = 44;
    const AUTHENTICATION: u8 = 51;
    const DESTINATION: u8 = 60;

    // SAFETY: integers only, without padding.
    let Some(ip) = (unsafe { load::<Ipv6>(context, at) }) else { return false };
    header.family = Family::V6;
    header.at = at;
    header.source = ip.source;
    header.destination = ip.destination;
    header.fragment = Fragment::Whole;
    let mut transport = at + 40;
    let mut protocol = ip.next;
    let mut extensions = 0;
    while extensions < EXTENSIONS {
        extensions += 1;
        let unit = match protocol {
            HOP_BY_HOP | ROUTING | DESTINATION => 8,
            AUTHENTICATION => 4,
            FRAGMENT => 0,
            _ => {
                header.protocol = protocol;
                header.transport = transport;
                return true;
            }
        };
        // Next header, length in units beyond the first 8 bytes; of a fragment header: offset and flags, then the
        // identification.
        // SAFETY: integers only.
        let Some([first, identification]) = (unsafe { load::<[u32; 2]>(context, transport) }) else {
            return false;
        };
        let [next, length, place @ ..] = first.to_ne_bytes();
        protocol = next;
        transport += 8 + u32::from(length) * unit;
        if unit == 0 {
            let place = u16::from_be_bytes(place);
            header.identification = identification;
            header.fragment = part(place & 0xfff8, place & 1 != 0);
            if header.fragment == Fragment::Later {
                // What follows is not a header.
                header.protocol = protocol;
                header.transport = transport;
                return true;
            }
        }
    }
    false
}

#[inline(always)]
fn part(offset: u16, more: bool) -> Fragment {
    match (offset, more) {
        (0, false) => Fragment::Whole,
        (0, true) => Fragment::First,
        _ => Fragment::Later,
    }
}

const FIN: u8 = 1;
const SYN: u8 = 1 << 1;
const RST: u8 = 1 << 2;
const ACK: u8 = 1 << 4;

#[inline(always)]
fn fragment_key(header: &Header) -> FragmentKey {
    FragmentKey {
        source: header.source,
        destination: header.destination,
        identification: header.identification,
        protocol: header.protocol,
        zero: [0; 3],
    }
}

/// A value from the packet at `offset`; none, and counted, if the packet ends before it does.
///
/// # Safety
/// Every pattern of bits is a valid value of `T`.
#[inline(always)]
unsafe fn load<T: Copy>(context: &TcContext, offset: u32) -> Option<T> {
    let mut value = MaybeUninit::<T>::uninit();
    // SAFETY: the helper writes as many bytes as the value has, or, when the packet ends before, zeroes them and
    // says so.
    let result = unsafe {
        bpf_skb_load_bytes(
            context.as_ptr().cast_const(),
            offset,
            value.as_mut_ptr().cast(),
            size_of::<T>() as u32,
        )
    };
    if result != 0 {
        count(Event::Truncated);
        return None;
    }
    // SAFETY: written whole, and every pattern is valid.
    Some(unsafe { value.assume_init() })
}
