//! Layouts shared between the kernel and the user half of the service plane.
#![no_std]
#![forbid(unsafe_code)]

/// Protocol numbers (IANA) as the IP header carries them.
pub mod protocol {
    /// TCP.
    pub const TCP: u8 = 6;
    /// UDP.
    pub const UDP: u8 = 17;
    /// SCTP.
    pub const SCTP: u8 = 132;
}

/// Key of the services map. Without padding, so that every byte is written.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct ServiceKey {
    /// IPv6 address, or IPv4 mapped into `::ffff:0:0/96`; network byte order.
    pub address: [u8; 16],
    /// Destination port; network byte order.
    pub port: [u8; 2],
    /// One of [`protocol`].
    pub protocol: u8,
    /// Always 0.
    pub zero: u8,
}

const _: () = assert!(size_of::<ServiceKey>() == 20);
const _: () = assert!(align_of::<ServiceKey>() == 1);
