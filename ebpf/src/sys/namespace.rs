//! The network namespace of this process, as kernel programs tell namespaces apart.

use std::io;
use std::net::UdpSocket;
use std::os::fd::AsRawFd;

/// The cookie of the calling thread's network namespace (`SO_NETNS_COOKIE`, Linux 5.14): never 0, and given to
/// no other namespace until the machine starts again.
pub fn cookie() -> io::Result<u64> {
    // Of any family; where there is no IPv4, there is IPv6.
    let socket = UdpSocket::bind("0.0.0.0:0").or_else(|_| UdpSocket::bind("[::]:0"))?;
    let mut cookie = 0_u64;
    let mut length = size_of::<u64>() as libc::socklen_t;
    // SAFETY: the kernel writes at most `length` bytes, which is what `cookie` has; both live until after the call.
    let result = unsafe {
        libc::getsockopt(
            socket.as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_NETNS_COOKIE,
            (&raw mut cookie).cast(),
            &raw mut length,
        )
    };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(cookie) }
}

#[cfg(test)]
mod tests {
    #[test]
    fn a_namespace_has_one_cookie() {
        let cookie = super::cookie().unwrap();
        assert_ne!(cookie, 0);
        assert_eq!(super::cookie().unwrap(), cookie);
    }
}
