//! What the programs at network devices remember of flows, and of packets in fragments.

/// An address as the programs hold it: four words in network byte order, IPv4 mapped.
pub type Words = [u32; 4];

/// Flags of a [`Flow`], and the directions of its two entries.
pub mod flow {
    /// [`FlowKey::direction`](super::FlowKey): from the client, as it arrives.
    pub const REQUEST: u8 = 0;
    /// [`FlowKey::direction`](super::FlowKey): from the endpoint, as it leaves for the client.
    pub const REPLY: u8 = 1;
    /// In `flags`: packets to the endpoint are marked to be masqueraded.
    pub const MASQUERADE: u8 = 1;
    /// In `flags`: this side has ended its TCP connection.
    pub const CLOSING: u8 = 1 << 1;
}

/// Key of `FLOWS`: what a packet carries before it is translated.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FlowKey {
    /// Source of the packet.
    pub source: Words,
    /// Destination of the packet.
    pub destination: Words,
    /// Network byte order.
    pub source_port: [u8; 2],
    /// Network byte order.
    pub destination_port: [u8; 2],
    /// One of [`protocol`].
    pub protocol: u8,
    /// One of [`flow`]'s.
    pub direction: u8,
    /// Always 0.
    pub zero: [u8; 2],
}

const _: () = assert!(size_of::<FlowKey>() == 40 && align_of::<FlowKey>() == 4);

/// Value of `FLOWS`: what a packet carries after it is translated. A request's destination becomes the
/// endpoint, a reply's source the frontend; the client's port changes where two frontends lead the same
/// client's port to the same endpoint.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Flow {
    /// Of a request: the endpoint's. Of a reply: the frontend's.
    pub address: Words,
    /// Beside `address`; network byte order.
    pub port: [u8; 2],
    /// Of a request: the client's port as the endpoint sees it. Of a reply: as the client has it. Network byte
    /// order.
    pub client_port: [u8; 2],
    /// Index into `ENDPOINTS`; host byte order.
    pub endpoint: u32,
    /// [`Endpoint::generation`]; host byte order.
    pub generation: u32,
    /// Seconds of the monotonic clock at the last packet of this direction; host byte order.
    pub seen: u32,
    /// Of [`flow`].
    pub flags: u8,
    /// Always 0.
    pub zero: [u8; 3],
}

const _: () = assert!(size_of::<Flow>() == 36 && align_of::<Flow>() == 4);

impl Flow {
    /// Writes the entry of the other direction: each can be made from the other. Not yet [`flow::CLOSING`].
    #[inline(always)]
    pub const fn partner(&self, key: &FlowKey, other_key: &mut FlowKey, other: &mut Flow) {
        if key.direction == flow::REQUEST {
            // The endpoint answers the client as it sees it; the client knows the frontend.
            other_key.source = self.address;
            other_key.source_port = self.port;
            other_key.destination = key.source;
            other_key.destination_port = self.client_port;
            other_key.direction = flow::REPLY;
            other.address = key.destination;
            other.port = key.destination_port;
            other.client_port = key.source_port;
        } else {
            other_key.source = key.destination;
            other_key.source_port = self.client_port;
            other_key.destination = self.address;
            other_key.destination_port = self.port;
            other_key.direction = flow::REQUEST;
            other.address = key.source;
            other.port = key.source_port;
            other.client_port = key.destination_port;
        }
        other_key.protocol = key.protocol;
        other_key.zero = [0; 2];
        other.endpoint = self.endpoint;
        other.generation = self.generation;
        other.seen = self.seen;
        other.flags = self.flags & !flow::CLOSING;
        other.zero = [0; 3];
    }
}

/// Key of `FRAGMENTS`: one packet's fragments, before they are translated.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FragmentKey {
    /// Source of the packet.
    pub source: Words,
    /// Destination of the packet.
    pub destination: Words,
    /// Identification, of IPv4 in the lower half; as the header has it.
    pub identification: u32,
    /// One of [`protocol`].
    pub protocol: u8,
    /// Always 0.
    pub zero: [u8; 3],
}

const _: () = assert!(size_of::<FragmentKey>() == 40 && align_of::<FragmentKey>() == 4);

/// Value of `FRAGMENTS`, and the first bytes of every transport header we balance; network byte order.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Ports {
    /// Of the sender.
    pub source: [u8; 2],
    /// Of the receiver.
    pub destination: [u8; 2],
}

const _: () = assert!(size_of::<Ports>() == 4 && align_of::<Ports>() == 1);
