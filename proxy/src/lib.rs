//! Lockgate's L4/L7 data plane: a [`RoutingTable`] in, live traffic out.
//!
//! The crate knows neither Kubernetes nor eBPF.
//!
//! ```text
//!  RoutingTable ── Router::compile ──► Arc<Router> ── one ArcSwap store ──┐
//!   (plain data)    (off the hot path)                                    ▼
//!  client ─► listener ─► tls ─► http (parse, decide, forward) ─► upstream ─► endpoint
//!             one worker thread per core, each with its own sockets, pools and buffers
//! ```
#![forbid(unsafe_code)]

pub mod certificate;
pub mod table;
pub mod tls;

pub use certificate::Certificate;
pub use table::RoutingTable;
