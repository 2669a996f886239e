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

pub mod balance;
pub mod certificate;
pub mod endpoint;
pub mod metrics;
pub mod router;
pub mod split;
pub mod table;
pub mod view;

pub use certificate::Certificate;
pub use router::{Live, Publisher, Router, Routes, routes};
pub use table::RoutingTable;
