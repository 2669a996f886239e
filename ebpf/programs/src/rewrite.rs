//! Writes packets: addresses and ports, with every checksum over them. The kernel's helpers know what the device
//! will compute itself and what it has computed already.

use aya_ebpf::helpers::generated::{
    bpf_csum_diff, bpf_l3_csum_replace, bpf_l4_csum_replace, bpf_skb_store_bytes,
};
use aya_ebpf::programs::TcContext;
use lockgate_ebpf_common::{Words, protocol};

use crate::packet::{Header, Packet};
use crate::socket::Family;

/// An end of a packet.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum End {
    Source,
    Destination,
}

/// `BPF_F_*` of the helpers.
const RECOMPUTE: u64 = 1;
const PSEUDO_HEADER: u64 = 1 << 4;
const MANGLED_ZERO: u64 = 1 << 5;

/// Writes an address of `packet`; false if the kernel could not.
#[inline(always)]
#[must_use]
pub fn address(context: &TcContext, packet: &Packet, end: End, new: &Words) -> bool {
    let checksum = if packet.has_transport() { transport_checksum(&packet.header) } else { None };
    outer_address(context, &packet.header, end, new, checksum)
}

/// Writes a port of `packet`, if it is another; false if the kernel could not.
#[inline(always)]
#[must_use]
pub fn port(context: &TcContext, packet: &Packet, end: End, new: [u8; 2]) -> bool {
    let header = &packet.header;
    let old = match end {
        End::Source => packet.ports.source,
        End::Destination => packet.ports.destination,
    };
    if old == new || !packet.has_transport() {
        return true;
    }
    // SCTP's is a CRC over the whole packet (RFC 9260), without addresses: a port cannot be changed in it yet.
    let Some((checksum, flags)) = transport_checksum(header) else { return false };
    store(context, header.transport + port_offset(end), &new, 0)
        && replace(context, checksum, number(old), number(new), flags | 2)
}

/// Writes what an ICMP error says of an address and a port of the packet it quotes. The quoted transport header's
/// checksum stays: nobody can verify it, for what is quoted ends early.
#[inline(always)]
#[must_use]
pub fn quoted(context: &TcContext, report: &Packet, end: End, address: &Words, port: [u8; 2]) -> bool {
    let quoted = &report.quoted;
    let checksum = report.header.transport + 2;
    let written = match quoted.family {
        // The header's checksum changes against the address, so that the sum over both, and with it the ICMP
        // checksum, stays.
        Family::V4 => outer_address(context, quoted, end, address, None),
        Family::V6 => {
            let old = if end == End::Source { &quoted.source } else { &quoted.destination };
            store(context, quoted.at + address_offset(Family::V6, end), address, 0)
                && replace(context, checksum, 0, difference(old, address), 0)
        }
    };
    written && quoted_port(context, report, end, port)
}

/// As [`quoted`], the port alone.
#[inline(always)]
#[must_use]
pub fn quoted_port(context: &TcContext, report: &Packet, end: End, new: [u8; 2]) -> bool {
    let old = if end == End::Source { report.ports.source } else { report.ports.destination };
    old == new
        || (store(context, report.quoted.transport + port_offset(end), &new, 0)
            && replace(context, report.header.transport + 2, number(old), number(new), 2))
}

/// Writes an address of an ICMP error.
#[inline(always)]
#[must_use]
pub fn report_address(context: &TcContext, report: &Packet, end: End, new: &Words) -> bool {
    // Only ICMPv6 sums the addresses.
    let checksum = match report.header.family {
        Family::V4 => None,
        Family::V6 => Some((report.header.transport + 2, 0)),
    };
    outer_address(context, &report.header, end, new, checksum)
}

/// Writes an address; `checksum`: where the transport's is, which has the addresses in its sum.
#[inline(always)]
fn outer_address(
    context: &TcContext,
    header: &Header,
    end: End,
    new: &Words,
    checksum: Option<(u32, u64)>,
) -> bool {
    let old = if end == End::Source { &header.source } else { &header.destination };
    let offset = header.at + address_offset(header.family, end);
    match header.family {
        Family::V4 => {
            let (old, new) = (old[3], new[3]);
            store(context, offset, &new, 0)
                && replace_header(context, header.at + 10, old, new)
                && checksum.is_none_or(|(at, flags)| {
                    replace(context, at, u64::from(old), u64::from(new), flags | PSEUDO_HEADER | 4)
                })
        }
        // No checksum of the header stands against the address: the device's sum over the packet has to follow
        // it, and then follow the transport's.
        Family::V6 => {
            store(context, offset, new, RECOMPUTE)
                && checksum.is_none_or(|(at, flags)| {
                    replace(context, at, 0, difference(old, new), flags | PSEUDO_HEADER)
                })
        }
    }
}

/// Where the checksum is that has the addresses in its sum, with flags for writing it.
#[inline(always)]
fn transport_checksum(header: &Header) -> Option<(u32, u64)> {
    match header.protocol {
        protocol::TCP => Some((header.transport + 16, 0)),
        // Zero is no checksum, and stays.
        protocol::UDP => Some((header.transport + 6, MANGLED_ZERO)),
        _ => None,
    }
}

#[inline(always)]
fn address_offset(family: Family, end: End) -> u32 {
    match (family, end) {
        (Family::V4, End::Source) => 12,
        (Family::V4, End::Destination) => 16,
        (Family::V6, End::Source) => 8,
        (Family::V6, End::Destination) => 24,
    }
}

#[inline(always)]
fn port_offset(end: End) -> u32 {
    if end == End::Source { 0 } else { 2 }
}

/// Two bytes as the checksum helpers take them.
#[inline(always)]
fn number(bytes: [u8; 2]) -> u64 {
    u64::from(u16::from_ne_bytes(bytes))
}

#[inline(always)]
fn store<T>(context: &TcContext, offset: u32, value: &T, flags: u64) -> bool {
    let from = (&raw const *value).cast();
    // SAFETY: the helper reads as many bytes as the value has, and judges the offset itself.
    unsafe { bpf_skb_store_bytes(context.skb.skb, offset, from, size_of::<T>() as u32, flags) == 0 }
}

/// The Internet checksum's difference, RFC 1624.
#[inline(always)]
fn difference(old: &Words, new: &Words) -> u64 {
    // SAFETY: the helper reads 16 bytes of each, which they have.
    (unsafe { bpf_csum_diff(old.as_ptr().cast_mut(), 16, new.as_ptr().cast_mut(), 16, 0) }) as u64
}

#[inline(always)]
fn replace(context: &TcContext, offset: u32, from: u64, to: u64, flags: u64) -> bool {
    // SAFETY: takes numbers, and judges the offset itself.
    unsafe { bpf_l4_csum_replace(context.skb.skb, offset, from, to, flags) == 0 }
}

#[inline(always)]
fn replace_header(context: &TcContext, offset: u32, from: u32, to: u32) -> bool {
    // SAFETY: as in `replace`.
    unsafe { bpf_l3_csum_replace(context.skb.skb, offset, from.into(), to.into(), 4) == 0 }
}
