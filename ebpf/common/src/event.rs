//! What is counted, by the number and the name it has in both halves.

/// What is counted: index into `EVENTS`.
#[repr(u32)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Event {
    /// A connection or flow got an endpoint.
    Balanced = 0,
    /// Affinity gave the endpoint of before.
    Affinity = 1,
    /// Refused: no endpoint anywhere.
    NoEndpoint = 2,
    /// No answer: endpoints, but not for this client (traffic policies).
    NoLocalEndpoint = 3,
    /// Refused: a Service's address without this port.
    UnknownPort = 4,
    /// No answer: not in the Service's source ranges.
    SourceRange = 5,
    /// A run was overwritten while it was read; read again.
    Reread = 6,
    /// The same more often than the bound, or an index beyond its map. Refused.
    Torn = 7,
    /// No memory for the socket's storage. A single datagram is refused, for its reply would come from a
    /// foreign address; a connection goes on and shows its endpoint.
    NoStorage = 8,
    /// An entry of a map could not be written because it is full; the connection went on.
    MapFull = 9,
    /// A packet that ends before its headers do; passed on untouched.
    Truncated = 10,
    /// A frontend whose Service has gone; treated as absent.
    StaleFrontend = 11,
    /// Two frontends led the same port of a client to the same endpoint: this flow got another port.
    PortChanged = 12,
    /// No other port was free after some tries; no answer.
    NoPort = 13,
    /// A later fragment whose first was not seen; passed on untouched.
    UnknownFragment = 14,
    /// In the middle of a TCP connection to a node port that is not in `FLOWS`; passed on untouched.
    UnknownFlow = 15,
    /// An ICMP error about a translated packet was translated.
    IcmpError = 16,
    /// A packet could not be rewritten; no answer.
    Rewrite = 17,
}

impl Event {
    /// All, in the order of their indices.
    pub const ALL: [Self; 18] = [
        Self::Balanced,
        Self::Affinity,
        Self::NoEndpoint,
        Self::NoLocalEndpoint,
        Self::UnknownPort,
        Self::SourceRange,
        Self::Reread,
        Self::Torn,
        Self::NoStorage,
        Self::MapFull,
        Self::Truncated,
        Self::StaleFrontend,
        Self::PortChanged,
        Self::NoPort,
        Self::UnknownFragment,
        Self::UnknownFlow,
        Self::IcmpError,
        Self::Rewrite,
    ];

    /// Value of the metric's `reason` label.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Balanced => "balanced",
            Self::Affinity => "affinity",
            Self::NoEndpoint => "no_endpoint",
            Self::NoLocalEndpoint => "no_local_endpoint",
            Self::UnknownPort => "unknown_port",
            Self::SourceRange => "source_range",
            Self::Reread => "reread",
            Self::Torn => "torn",
            Self::NoStorage => "no_storage",
            Self::MapFull => "map_full",
            Self::Truncated => "truncated",
            Self::StaleFrontend => "stale_frontend",
            Self::PortChanged => "port_changed",
            Self::NoPort => "no_port",
            Self::UnknownFragment => "unknown_fragment",
            Self::UnknownFlow => "unknown_flow",
            Self::IcmpError => "icmp_error",
            Self::Rewrite => "rewrite",
        }
    }
}
