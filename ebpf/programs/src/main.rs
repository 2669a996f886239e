//! Kernel half of the service plane.
//!
//! ```text
//!  connect ──┐                                          ┌─▶ write the endpoint's address   (socket.rs)
//!            ├─▶ is it a Service? ──▶ which endpoint? ──┤
//!  sendmsg ──┘   (frontend.rs)        (choice.rs)       └─▶ remember what was asked for    (reverse.rs)
//!  recvmsg, getpeername ──────────────────────────────────▶ write what was asked for       (reverse.rs)
//! ```
//!
//! One function for each hook; the two families differ only in how an address is read and written.
#![no_std]
#![no_main]
#![feature(asm_experimental_arch)]

mod choice;
mod frontend;
mod maps;
mod reverse;
mod socket;

use aya_ebpf::macros::cgroup_sock_addr;
use aya_ebpf::programs::SockAddrContext;

use crate::socket::{Family, Sending};

/// `connect` of an IPv4 socket.
#[cgroup_sock_addr(connect4)]
pub fn connect4(context: SockAddrContext) -> i32 {
    socket::forward(&context, Family::V4, Sending::Connected)
}

/// `connect` of an IPv6 socket, also to a mapped IPv4 address.
#[cgroup_sock_addr(connect6)]
pub fn connect6(context: SockAddrContext) -> i32 {
    socket::forward(&context, Family::V6, Sending::Connected)
}

/// `sendto` and `sendmsg` with an address on an unconnected UDP socket. An IPv6 socket that names a mapped
/// IPv4 address comes here.
#[cgroup_sock_addr(sendmsg4)]
pub fn sendmsg4(context: SockAddrContext) -> i32 {
    socket::forward(&context, Family::V4, Sending::Single)
}

/// As [`sendmsg4`].
#[cgroup_sock_addr(sendmsg6)]
pub fn sendmsg6(context: SockAddrContext) -> i32 {
    socket::forward(&context, Family::V6, Sending::Single)
}

/// `recvfrom` and `recvmsg` of a UDP socket that ask for the sender's address.
#[cgroup_sock_addr(recvmsg4)]
pub fn recvmsg4(context: SockAddrContext) -> i32 {
    socket::restore(&context, Family::V4)
}

/// As [`recvmsg4`]; an IPv6 socket that receives an IPv4 packet comes here, with a mapped address.
#[cgroup_sock_addr(recvmsg6)]
pub fn recvmsg6(context: SockAddrContext) -> i32 {
    socket::restore(&context, Family::V6)
}

/// `getpeername` of an IPv4 socket.
#[cgroup_sock_addr(getpeername4)]
pub fn getpeername4(context: SockAddrContext) -> i32 {
    socket::restore(&context, Family::V4)
}

/// `getpeername` of an IPv6 socket.
#[cgroup_sock_addr(getpeername6)]
pub fn getpeername6(context: SockAddrContext) -> i32 {
    socket::restore(&context, Family::V6)
}

/// Never reached: nothing here can panic, and the verifier would refuse a program that could.
#[panic_handler]
fn panic(_: &core::panic::PanicInfo<'_>) -> ! {
    loop {}
}

/// Only helpers that ask for no GPL licence are used.
#[unsafe(link_section = "license")]
#[unsafe(no_mangle)]
static LICENSE: [u8; 18] = *b"Apache-2.0 OR MIT\0";
