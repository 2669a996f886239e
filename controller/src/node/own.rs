//! The node's own addresses, followed through the kernel's notices (rtnetlink).

use std::collections::BTreeSet;
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::time::Duration;

use rustix::net::netlink::SocketAddrNetlink;
use rustix::net::{
    AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType, bind, recv, sendto, socket_with,
};
use tokio::net::UnixDatagram;
use tokio::time::{sleep, timeout};
use tracing::warn;

/// Notices of these groups: addresses of IPv4 and IPv6 (`RTMGRP_IPV4_IFADDR`, `RTMGRP_IPV6_IFADDR`).
const GROUPS: u32 = 0x10 | 0x100;

/// Addresses come in bursts; after the first notice the rest is waited for.
const SETTLE: Duration = Duration::from_millis(50);

/// Without notices the addresses are compared this often.
const POLL: Duration = Duration::from_secs(10);

/// Message types, flags and attributes of rtnetlink(7).
/// The protocol is `NETLINK_ROUTE`, 0, the default.
const RTM_NEWADDR: u16 = 20;
const RTM_GETADDR: u16 = 22;
const NLMSG_ERROR: u16 = 2;
const NLMSG_DONE: u16 = 3;
const NLM_F_REQUEST_DUMP: u16 = 0x1 | 0x300;
const IFA_ADDRESS: u16 = 1;
const IFA_LOCAL: u16 = 2;

/// Of `struct nlmsghdr` and `struct ifaddrmsg`, in bytes.
const HEADER: usize = 16;
const ADDRESS_HEADER: usize = 8;

/// More than one datagram of a dump ever has.
const BUFFER: usize = 64 << 10;

/// What the kernel says of addresses.
pub(crate) struct Addresses {
    /// A netlink socket; to tokio and the system one of datagrams like another.
    notices: Option<UnixDatagram>,
    known: Vec<IpAddr>,
    /// They may have changed since they were looked at.
    noticed: bool,
}

impl Addresses {
    /// Reads them, and follows them from now on. Where the kernel does not tell, they are looked at every
    /// ten seconds.
    pub(crate) fn follow() -> Addresses {
        let notices = follow_notices();
        let notices = notices.inspect_err(|error| warn!("addresses of this node are polled: {error}")).ok();
        let mut addresses = Addresses { notices, known: Vec::new(), noticed: false };
        addresses.look();
        addresses
    }

    /// Sorted; loopback and link-local ones are left out but for `127.0.0.1` and `::1`.
    pub(crate) fn now(&self) -> Vec<IpAddr> {
        self.known.clone()
    }

    /// Waits until they differ. Cancelling it loses nothing.
    pub(crate) async fn changed(&mut self) -> Vec<IpAddr> {
        loop {
            if !self.noticed {
                self.notice().await;
                self.noticed = true;
            }
            sleep(SETTLE).await;
            self.noticed = false;
            if self.look() {
                return self.now();
            }
        }
    }

    async fn notice(&self) {
        let Some(notices) = &self.notices else { return sleep(POLL).await };
        // Even if a notice was lost, nothing is missed for long.
        if let Ok(Ok(())) = timeout(POLL, notices.readable()).await {
            // What they say is read anew anyway; an overflow says no less.
            let mut buffer = [0; 4096];
            while notices.try_recv(&mut buffer).is_ok() {}
        }
    }

    /// Says whether they differ from what was known. If they cannot be read, what was known stays.
    fn look(&mut self) -> bool {
        match dump() {
            Ok(found) if found != self.known => {
                self.known = found;
                true
            }
            Ok(_) => false,
            Err(error) => {
                warn!("the addresses of this node cannot be read: {error}");
                false
            }
        }
    }
}

fn follow_notices() -> io::Result<UnixDatagram> {
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let socket = socket_with(AddressFamily::NETLINK, SocketType::RAW, flags, None)?;
    bind(&socket, &SocketAddrNetlink::new(0, GROUPS))?;
    UnixDatagram::from_std(socket.into())
}

fn dump() -> io::Result<Vec<IpAddr>> {
    let flags = SocketFlags::CLOEXEC;
    let socket = socket_with(AddressFamily::NETLINK, SocketType::RAW, flags, None)?;
    rustix::net::sockopt::set_socket_timeout(
        &socket,
        rustix::net::sockopt::Timeout::Recv,
        Some(Duration::from_secs(5)),
    )?;
    let mut request = [0; HEADER + ADDRESS_HEADER];
    request[..4].copy_from_slice(&((HEADER + ADDRESS_HEADER) as u32).to_ne_bytes());
    request[4..6].copy_from_slice(&RTM_GETADDR.to_ne_bytes());
    request[6..8].copy_from_slice(&NLM_F_REQUEST_DUMP.to_ne_bytes());
    sendto(&socket, &request, SendFlags::empty(), &SocketAddrNetlink::new(0, 0))?;
    let mut found = BTreeSet::new();
    let mut buffer = vec![0; BUFFER];
    loop {
        let (read, _) = recv(&socket, &mut buffer[..], RecvFlags::empty())?;
        if read == 0 || parse(&buffer[..read], &mut found)? {
            return Ok(found.into_iter().collect());
        }
    }
}

/// Adds the addresses of one datagram; says whether it was the last.
fn parse(mut datagram: &[u8], found: &mut BTreeSet<IpAddr>) -> io::Result<bool> {
    while let Some((length, kind)) = number(datagram, 0).zip(short(datagram, 4)) {
        let length = length as usize;
        let Some(message) = datagram.get(HEADER..length) else {
            return Err(io::ErrorKind::InvalidData.into());
        };
        match kind {
            NLMSG_DONE => return Ok(true),
            NLMSG_ERROR => {
                let code = number(message, 0).unwrap_or(0) as i32;
                return Err(io::Error::from_raw_os_error(-code));
            }
            RTM_NEWADDR => found.extend(address(message).filter(is_own)),
            _ => {}
        }
        datagram = datagram.get(length.next_multiple_of(4)..).unwrap_or_default();
    }
    Ok(false)
}

/// The interface's own address; on a point-to-point link `IFA_ADDRESS` is the other end.
fn address(message: &[u8]) -> Option<IpAddr> {
    let mut attributes = message.get(ADDRESS_HEADER..)?;
    let (mut local, mut any) = (None, None);
    while let Some((length, kind)) = short(attributes, 0).zip(short(attributes, 2)) {
        let value = ip(attributes.get(4..length as usize)?);
        match kind {
            IFA_LOCAL => local = value,
            IFA_ADDRESS => any = value,
            _ => {}
        }
        attributes = attributes.get((length as usize).next_multiple_of(4)..).unwrap_or_default();
    }
    local.or(any)
}

/// Link-local addresses need an interface to mean something, and other loopback ones nobody listens on.
fn is_own(address: &IpAddr) -> bool {
    match address {
        IpAddr::V4(v4) if v4.is_loopback() => *v4 == Ipv4Addr::LOCALHOST,
        IpAddr::V4(v4) => !v4.is_link_local(),
        IpAddr::V6(v6) => !v6.is_unicast_link_local(),
    }
}

fn ip(bytes: &[u8]) -> Option<IpAddr> {
    match bytes.len() {
        4 => <[u8; 4]>::try_from(bytes).ok().map(|bytes| Ipv4Addr::from(bytes).into()),
        16 => <[u8; 16]>::try_from(bytes).ok().map(|bytes| Ipv6Addr::from(bytes).into()),
        _ => None,
    }
}

fn number(bytes: &[u8], at: usize) -> Option<u32> {
    bytes.get(at..at + 4)?.try_into().ok().map(u32::from_ne_bytes)
}

fn short(bytes: &[u8], at: usize) -> Option<u16> {
    bytes.get(at..at + 2)?.try_into().ok().map(u16::from_ne_bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A message with one address; `attributes` as type and value.
    fn message(kind: u16, attributes: &[(u16, &[u8])]) -> Vec<u8> {
        let mut body = vec![0; ADDRESS_HEADER];
        for (kind, value) in attributes {
            body.extend(((4 + value.len()) as u16).to_ne_bytes());
            body.extend(kind.to_ne_bytes());
            body.extend(*value);
            body.resize(body.len().next_multiple_of(4), 0);
        }
        let mut message = ((HEADER + body.len()) as u32).to_ne_bytes().to_vec();
        message.extend(kind.to_ne_bytes());
        message.resize(HEADER, 0);
        message.extend(body);
        message
    }

    fn parsed(datagram: &[u8]) -> (Vec<String>, io::Result<bool>) {
        let mut found = BTreeSet::new();
        let last = parse(datagram, &mut found);
        (found.iter().map(ToString::to_string).collect(), last)
    }

    #[test]
    fn messages() {
        let v6 = "fd00::1".parse::<Ipv6Addr>().unwrap().octets();
        let local = "fe80::1".parse::<Ipv6Addr>().unwrap().octets();
        let datagram = [
            message(
                RTM_NEWADDR,
                &[(IFA_ADDRESS, &[10, 0, 0, 9]), (IFA_LOCAL, &[10, 0, 0, 1]), (3, b"eth0\0")],
            ),
            message(RTM_NEWADDR, &[(IFA_ADDRESS, &v6)]),
            message(RTM_NEWADDR, &[(IFA_ADDRESS, &local)]),
            message(RTM_NEWADDR, &[(IFA_ADDRESS, &[127, 0, 0, 1])]),
            message(NLMSG_DONE, &[]),
        ]
        .concat();
        let (found, last) = parsed(&datagram);
        assert_eq!((found.join(" "), last.unwrap()), ("10.0.0.1 127.0.0.1 fd00::1".to_owned(), true));
        // Cut anywhere, it is an error or the rest is missing; never a panic.
        for end in 0..datagram.len() {
            let _ = parsed(&datagram[..end]);
        }
        let mut refused = message(NLMSG_ERROR, &[]);
        refused[HEADER..HEADER + 4].copy_from_slice(&(-13_i32).to_ne_bytes());
        assert_eq!(parsed(&refused).1.unwrap_err().kind(), io::ErrorKind::PermissionDenied);
    }

    #[tokio::test]
    async fn this_machine_has_a_loopback_address() {
        assert!(dump().unwrap().contains(&Ipv4Addr::LOCALHOST.into()));
        assert_eq!(Addresses::follow().now(), dump().unwrap());
    }
}
