//! The hooks of packets: what came from outside, or from a Pod whose sockets are left alone, goes to an endpoint, and
//! what goes back shows the Service's address.
//!
//! Masquerading and refusing are the kernel's own: this only sets the marks by which our nftables rules do it. So
//! there is one allocator of ports, and one maker of resets and ICMP errors.

use aya_ebpf::bindings::__sk_buff;
use aya_ebpf::btf_maps::lpm_trie::Key;
use aya_ebpf::programs::TcContext;
use lockgate_ebpf_common::{
    Event, Settings, SourceRange, Words, endpoint, flow, kind, protocol, service, setting,
};

use crate::choice::{Choice, Chosen, choose};
use crate::flows::{self, Tracked};
use crate::frontend::{Found, Use, bytes, find, is_mapped, same};
use crate::maps::{SCRATCH, SETTINGS, SOURCE_RANGES, count};
use crate::packet::{Packet, Read};
use crate::rewrite::{self, End};
use crate::socket::{self, Family};

/// Who sends, by the device.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Side {
    /// Outside the node: `externalTrafficPolicy` holds.
    Outside,
    /// A Pod of this node.
    Pod,
}

/// What becomes of a packet.
#[must_use]
#[derive(Clone, Copy, PartialEq, Eq)]
enum Verdict {
    /// Goes on, to the next program and the stack.
    Pass,
    /// The same, and is refused there.
    Refuse,
    /// Ends here.
    Drop,
    /// Is rewritten as its flow says, and goes on.
    Translate,
}

const NEXT: i32 = -1;
const DROP: i32 = 2;

/// What one run works with: more than a program's stack of 512 bytes holds.
pub struct Scratch {
    packet: Packet,
    tracked: Tracked,
}

/// A packet on its way in: to an endpoint, if it is for a Service.
#[inline(always)]
pub fn request(context: &TcContext, side: Side) -> i32 {
    let context = context.skb.skb;
    match read_packet(context) {
        PACKET => act(context, decide_request((side == Side::Pod).into()), flow::REQUEST),
        REPORT => translate_report(context, flow::REQUEST.into()),
        _ => NEXT,
    }
}

/// A packet on its way out: from the Service's address, if it is an endpoint's reply.
#[inline(always)]
pub fn reply(context: &TcContext) -> i32 {
    let context = context.skb.skb;
    match read_packet(context) {
        PACKET => act(context, decide_reply(), flow::REPLY),
        REPORT => translate_report(context, flow::REPLY.into()),
        _ => NEXT,
    }
}

#[inline(always)]
fn act(context: *mut __sk_buff, verdict: u32, direction: u8) -> i32 {
    const PASS: u32 = Verdict::Pass as u32;
    const REFUSE: u32 = Verdict::Refuse as u32;
    const TRANSLATE: u32 = Verdict::Translate as u32;
    match verdict {
        PASS => NEXT,
        REFUSE => {
            mark(context, |settings| settings.reject_mark);
            NEXT
        }
        TRANSLATE => translate(context, direction.into()),
        _ => DROP,
    }
}

const PACKET: u32 = Read::Packet as u32;
const REPORT: u32 = Read::Report as u32;

// The steps are functions for the kernel too, with numbers for arguments and results: its verifier follows each
// function's ways once, instead of every way through one step for each through those before.

#[unsafe(no_mangle)]
#[inline(never)]
pub extern "C" fn read_packet(context: *mut __sk_buff) -> u32 {
    let Some(Scratch { packet, .. }) = scratch() else { return Read::Other as u32 };
    packet.read(&TcContext::new(context)) as u32
}

/// Finds the flow of a packet to a Service, or opens one.
#[unsafe(no_mangle)]
#[inline(never)]
pub extern "C" fn decide_request(pod: u32) -> u32 {
    let Some(Scratch { packet, tracked }) = scratch() else { return Verdict::Pass as u32 };
    let side = if pod == 0 { Side::Outside } else { Side::Pod };
    let now = flows::now();
    if tracked.find_request(packet, now) {
        return Verdict::Translate as u32;
    }
    match open(packet, tracked, side, now) {
        Ok(()) => Verdict::Translate as u32,
        Err(verdict) => verdict as u32,
    }
}

/// Finds the flow of an endpoint's packet.
#[unsafe(no_mangle)]
#[inline(never)]
pub extern "C" fn decide_reply() -> u32 {
    let Some(Scratch { packet, tracked }) = scratch() else { return Verdict::Pass as u32 };
    let found = tracked.find_reply(packet, flows::now());
    (if found { Verdict::Translate } else { Verdict::Pass }) as u32
}

/// Rewrites a packet as its flow says; returns what the hook does.
#[unsafe(no_mangle)]
#[inline(never)]
pub extern "C" fn translate(context: *mut __sk_buff, direction: u32) -> i32 {
    let Some(Scratch { packet, tracked }) = scratch() else { return NEXT };
    packet.remember();
    let flow = &tracked.flow;
    let (end, other) = ends(direction);
    if end == End::Destination && flow.flags & flow::MASQUERADE != 0 {
        mark(context, |settings| settings.masquerade_mark);
    }
    let context = &TcContext::new(context);
    written(
        rewrite::address(context, packet, end, &flow.address)
            && rewrite::port(context, packet, end, flow.port)
            && rewrite::port(context, packet, other, flow.client_port),
    )
}

/// Rewrites an ICMP error about a packet of a flow; returns what the hook does.
#[unsafe(no_mangle)]
#[inline(never)]
pub extern "C" fn translate_report(context: *mut __sk_buff, direction: u32) -> i32 {
    let Some(Scratch { packet, tracked }) = scratch() else { return NEXT };
    if !tracked.find_report(packet, direction as u8) {
        return NEXT;
    }
    count(Event::IcmpError);
    let (end, other) = ends(direction);
    // The packet it quotes had this end at the other. Routers on the way speak for themselves.
    let its_own = match end {
        End::Destination => same(&packet.header.destination, &packet.quoted.source),
        End::Source => same(&packet.header.source, &packet.quoted.destination),
    };
    let flow = &tracked.flow;
    let context = &TcContext::new(context);
    written(
        rewrite::quoted(context, packet, other, &flow.address, flow.port)
            && rewrite::quoted_port(context, packet, end, flow.client_port)
            && (!its_own || rewrite::report_address(context, packet, end, &flow.address)),
    )
}

/// The end of a packet that changes from the frontend's to the endpoint's or back, and the client's.
#[inline(always)]
fn ends(direction: u32) -> (End, End) {
    const REQUEST: u32 = flow::REQUEST as u32;
    if direction == REQUEST { (End::Destination, End::Source) } else { (End::Source, End::Destination) }
}

#[inline(always)]
fn scratch() -> Option<&'static mut Scratch> {
    let at = SCRATCH.get_ptr_mut(0)?;
    // SAFETY: the verifier knows the pointer as a value of the map, one for each CPU. These hooks run with softirqs
    // off and never one in another, so that nobody else has this CPU's until this run ends; and each step has done
    // with its reference when it returns. Zero, as the map begins, is a valid value of every field.
    Some(unsafe { &mut *at })
}

/// A flow's first packet: is it for a Service, and which endpoint shall have it? Writes the flow, or says what
/// becomes of the packet.
#[inline(always)]
fn open(packet: &Packet, tracked: &mut Tracked, side: Side, now: u32) -> Result<(), Verdict> {
    let header = &packet.header;
    let used = match find(header.destination, packet.ports.destination, header.protocol, |_| false) {
        Found::Nothing => return Err(Verdict::Pass),
        Found::UnknownPort => {
            count(Event::UnknownPort);
            return Err(Verdict::Refuse);
        }
        Found::Service(used) => used,
    };
    admitted(packet, &used)?;
    let local = match side {
        Side::Outside => used.local_outside(),
        Side::Pod => used.local_inside(),
    };
    let chosen = match choose(&used, local, &bytes(header.source), hash(header.source)) {
        Choice::Endpoint(chosen) => chosen,
        Choice::Refuse => return Err(Verdict::Refuse),
        Choice::Silence => return Err(Verdict::Drop),
    };
    if is_mapped(chosen.address) != (header.family == Family::V4) {
        count(Event::Torn);
        return Err(Verdict::Refuse);
    }
    let masquerade = masquerades(packet, side, &used, &chosen);
    let flow = &mut tracked.flow;
    flow.address = chosen.address;
    flow.port = chosen.port;
    flow.client_port = packet.ports.source;
    flow.endpoint = chosen.index;
    flow.generation = chosen.generation;
    flow.seen = now;
    flow.flags = if masquerade { flow::MASQUERADE } else { 0 };
    flow.zero = [0; 3];
    if tracked.open() { Ok(()) } else { Err(Verdict::Drop) }
}

/// Whether a first packet may come to this Service at all; else what becomes of it.
#[inline(always)]
fn admitted(packet: &Packet, used: &Use) -> Result<(), Verdict> {
    if used.flags & service::GATEWAY != 0 {
        return Err(Verdict::Pass);
    }
    if packet.header.protocol == protocol::TCP && !packet.opens && used.kind == kind::NODE_PORT {
        // The node's own connection, which the kernel may have masqueraded to this port, or one from before us.
        // At other addresses the endpoint answers it with a reset, which its client is better off with.
        count(Event::UnknownFlow);
        return Err(Verdict::Pass);
    }
    if used.kind == kind::LOAD_BALANCER && used.flags & service::SOURCE_RANGES != 0 {
        let source = SourceRange { service: used.index.to_be_bytes(), address: bytes(packet.header.source) };
        let allowed = SOURCE_RANGES.get(&Key::new(8 * size_of::<SourceRange>() as u32, source));
        if !allowed.is_some_and(|allowed| allowed.generation == u32::from(used.generation)) {
            count(Event::SourceRange);
            return Err(Verdict::Drop);
        }
    }
    Ok(())
}

/// Whether the endpoint shall see the node's address instead of the client's: where its reply would not pass here
/// otherwise, as kube-proxy decides it.
#[inline(always)]
fn masquerades(packet: &Packet, side: Side, used: &Use, chosen: &Chosen) -> bool {
    if same(&packet.header.source, &chosen.address) {
        // A Pod that reached itself would answer itself.
        return true;
    }
    if chosen.flags & endpoint::HOST_NETWORK != 0 {
        return false;
    }
    match (used.kind, side) {
        (kind::CLUSTER_IP, Side::Outside) => true,
        (kind::CLUSTER_IP, Side::Pod) => {
            SETTINGS.get(0).is_some_and(|settings| settings.flags & setting::MASQUERADE_ALL != 0)
        }
        _ => used.flags & service::EXTERNAL_LOCAL == 0,
    }
}

#[inline(always)]
fn written(done: bool) -> i32 {
    if done {
        return NEXT;
    }
    // Half rewritten, perhaps.
    count(Event::Rewrite);
    DROP
}

#[inline(always)]
fn mark(context: *mut __sk_buff, which: impl FnOnce(&Settings) -> u32) {
    if let Some(settings) = SETTINGS.get(0) {
        // SAFETY: a field of the context that these hooks may read and write.
        unsafe { (*context).mark |= which(settings) };
    }
}

/// The same for every packet of a client, whatever its port.
#[inline(always)]
fn hash(client: Words) -> u32 {
    let high = u64::from(client[0] ^ client[2]) << 32 | u64::from(client[1]);
    socket::hash(high.rotate_left(17) ^ u64::from(client[3]))
}
