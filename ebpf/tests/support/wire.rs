//! Packets as bytes: what a test sends through a hook, and what it expects.

use std::net::{IpAddr, SocketAddr};

use lockgate_ebpf_common::protocol::{SCTP, TCP, UDP};

/// TCP flags.
pub(crate) const FIN: u8 = 1;
pub(crate) const SYN: u8 = 2;
pub(crate) const ACK: u8 = 16;

pub(crate) fn at(text: &str) -> SocketAddr {
    text.parse().unwrap()
}

/// A TCP segment in an Ethernet frame.
pub(crate) fn tcp(from: SocketAddr, to: SocketAddr, flags: u8) -> Vec<u8> {
    frame(&ip(from.ip(), to.ip(), TCP, &tcp_segment(from, to, flags)))
}

/// As `tcp`, of UDP.
pub(crate) fn udp(from: SocketAddr, to: SocketAddr, data: &[u8]) -> Vec<u8> {
    frame(&ip(from.ip(), to.ip(), UDP, &udp_datagram(from, to, data)))
}

/// As `tcp`, of SCTP.
fn sctp(from: SocketAddr, to: SocketAddr, chunks: &[u8]) -> Vec<u8> {
    let mut packet = Vec::new();
    packet.extend(from.port().to_be_bytes());
    packet.extend(to.port().to_be_bytes());
    packet.extend([0x12, 0x34, 0x56, 0x78, 0, 0, 0, 0]);
    packet.extend(chunks);
    let sum = crc32c(&packet).to_le_bytes();
    packet[8..12].copy_from_slice(&sum);
    frame(&ip(from.ip(), to.ip(), SCTP, &packet))
}

/// A packet of the protocol with this number, ready for balancing to begin.
pub(crate) fn first(protocol: u8, from: SocketAddr, to: SocketAddr) -> Vec<u8> {
    match protocol {
        TCP => tcp(from, to, SYN),
        UDP => udp(from, to, b"hello"),
        _ => sctp(from, to, &[1, 0, 0, 20, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0, 1, 2, 3, 4, 5, 6]),
    }
}

/// A later packet, of either direction.
pub(crate) fn later(protocol: u8, from: SocketAddr, to: SocketAddr) -> Vec<u8> {
    match protocol {
        TCP => tcp(from, to, ACK),
        UDP => udp(from, to, b"and so on"),
        _ => sctp(from, to, &[11, 0, 0, 4]),
    }
}

/// An ICMP error about `frame`, of which it quotes the IP header and 8 bytes.
pub(crate) fn report(from: IpAddr, to: IpAddr, about: &[u8]) -> Vec<u8> {
    let quoted = &about[14..];
    let mut message = Vec::new();
    if from.is_ipv4() {
        // Fragmentation needed, MTU 1400.
        message.extend([3, 4, 0, 0, 0, 0, 0x05, 0x78]);
        message.extend(&quoted[..28]);
        let sum = checksum(&message);
        message[2..4].copy_from_slice(&sum);
        frame(&ip(from, to, 1, &message))
    } else {
        // Packet too big.
        message.extend([2, 0, 0, 0, 0, 0, 0x05, 0x78]);
        message.extend(&quoted[..48]);
        let sum = checksum(&[pseudo(from, to, 58, message.len()), message.clone()].concat());
        message[2..4].copy_from_slice(&sum);
        frame(&ip(from, to, 58, &message))
    }
}

/// The fragments of a frame without extension headers: its transport part cut every `size` bytes.
pub(crate) fn fragments(whole: &[u8], size: usize) -> Vec<Vec<u8>> {
    let v4 = whole[12] == 0x08;
    let header = if v4 { 34 } else { 54 };
    let parts: Vec<_> = whole[header..].chunks(size).collect();
    let last = parts.len() - 1;
    parts
        .iter()
        .enumerate()
        .map(|(index, part)| {
            let place = (index * size) as u16 | if v4 { 0 } else { u16::from(index < last) };
            let mut piece = whole[..header].to_vec();
            if v4 {
                let place = (place / 8) | if index < last { 0x2000 } else { 0 };
                piece[16..18].copy_from_slice(&(20 + part.len() as u16).to_be_bytes());
                piece[20..22].copy_from_slice(&place.to_be_bytes());
                piece[24..26].fill(0);
                let sum = checksum(&piece[14..34]);
                piece[24..26].copy_from_slice(&sum);
            } else {
                piece[18..20].copy_from_slice(&(8 + part.len() as u16).to_be_bytes());
                let next = std::mem::replace(&mut piece[20], 44);
                piece.extend([next, 0]);
                piece.extend(place.to_be_bytes());
                piece.extend([0xca, 0xfe, 0xba, 0xbe]);
            }
            piece.extend(*part);
            piece
        })
        .collect()
}

/// `frame` with IPv4 options, or IPv6 extension headers.
pub(crate) fn with_options(frame: &[u8]) -> Vec<u8> {
    let mut longer = frame.to_vec();
    if frame[12] == 0x08 {
        // Router alert, RFC 2113, and padding.
        longer.splice(34..34, [0x94, 4, 0, 0, 1, 1, 1, 0]);
        longer[14] = 0x47;
        let total = (longer.len() - 14) as u16;
        longer[16..18].copy_from_slice(&total.to_be_bytes());
        longer[24..26].fill(0);
        let sum = checksum(&longer[14..42]);
        longer[24..26].copy_from_slice(&sum);
    } else {
        // Hop-by-hop and destination options with padding, 8 and 16 bytes.
        let next = std::mem::replace(&mut longer[20], 0);
        let options = [60, 0, 1, 4, 0, 0, 0, 0, next, 1, 1, 12, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];
        longer.splice(54..54, options);
        let length = (longer.len() - 54) as u16;
        longer[18..20].copy_from_slice(&length.to_be_bytes());
    }
    longer
}

fn frame(ip: &[u8]) -> Vec<u8> {
    let kind: [u8; 2] = if ip[0] >> 4 == 4 { [0x08, 0x00] } else { [0x86, 0xdd] };
    [&[2, 0, 0, 0, 0, 1, 2, 0, 0, 0, 0, 2], &kind[..], ip].concat()
}

fn ip(from: IpAddr, to: IpAddr, protocol: u8, payload: &[u8]) -> Vec<u8> {
    match (from, to) {
        (IpAddr::V4(from), IpAddr::V4(to)) => {
            let mut header = vec![0x45, 0];
            header.extend((20 + payload.len() as u16).to_be_bytes());
            header.extend([0xbe, 0xef, 0, 0, 64, protocol, 0, 0]);
            header.extend(from.octets());
            header.extend(to.octets());
            let sum = checksum(&header);
            header[10..12].copy_from_slice(&sum);
            [header, payload.to_vec()].concat()
        }
        (IpAddr::V6(from), IpAddr::V6(to)) => {
            let mut header = vec![0x60, 0, 0, 0];
            header.extend((payload.len() as u16).to_be_bytes());
            header.extend([protocol, 64]);
            header.extend(from.octets());
            header.extend(to.octets());
            [header, payload.to_vec()].concat()
        }
        _ => panic!("two families: {from} {to}"),
    }
}

fn tcp_segment(from: SocketAddr, to: SocketAddr, flags: u8) -> Vec<u8> {
    let mut segment = Vec::new();
    segment.extend(from.port().to_be_bytes());
    segment.extend(to.port().to_be_bytes());
    segment.extend([0, 0, 0, 1, 0, 0, 0, 2, 0x50, flags, 0x20, 0, 0, 0, 0, 0]);
    segment.extend(b"some data of TCP");
    let sum = checksum(&[pseudo(from.ip(), to.ip(), TCP, segment.len()), segment.clone()].concat());
    segment[16..18].copy_from_slice(&sum);
    segment
}

fn udp_datagram(from: SocketAddr, to: SocketAddr, data: &[u8]) -> Vec<u8> {
    let mut datagram = Vec::new();
    datagram.extend(from.port().to_be_bytes());
    datagram.extend(to.port().to_be_bytes());
    datagram.extend((8 + data.len() as u16).to_be_bytes());
    datagram.extend([0, 0]);
    datagram.extend(data);
    let sum = checksum(&[pseudo(from.ip(), to.ip(), UDP, datagram.len()), datagram.clone()].concat());
    datagram[6..8].copy_from_slice(&sum);
    datagram
}

/// What transport checksums cover besides the packet.
fn pseudo(from: IpAddr, to: IpAddr, protocol: u8, length: usize) -> Vec<u8> {
    let mut bytes = Vec::new();
    for address in [from, to] {
        match address {
            IpAddr::V4(address) => bytes.extend(address.octets()),
            IpAddr::V6(address) => bytes.extend(address.octets()),
        }
    }
    bytes.extend((length as u32).to_be_bytes());
    bytes.extend([0, 0, 0, protocol]);
    bytes
}

/// RFC 1071.
fn checksum(bytes: &[u8]) -> [u8; 2] {
    let mut sum: u32 = bytes
        .chunks(2)
        .map(|pair| u32::from(pair[0]) << 8 | pair.get(1).map_or(0, |low| u32::from(*low)))
        .sum();
    while sum >> 16 != 0 {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    (!(sum as u16)).to_be_bytes()
}

fn crc32c(message: &[u8]) -> u32 {
    !message.iter().fold(!0, |crc, byte| {
        (0..8).fold(crc ^ u32::from(*byte), |crc, _| (crc >> 1) ^ if crc & 1 == 1 { 0x82f6_3b78 } else { 0 })
    })
}
