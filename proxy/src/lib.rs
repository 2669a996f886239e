//! Lockgate's L4/L7 data plane: a [`RoutingTable`] in, live traffic out.
//!
//! The crate knows neither Kubernetes nor eBPF.
//!
//! ```text
//!  RoutingTable ── Router::compile ──► Arc<Router> ── one ArcSwap store ──┐
//!   (plain data)    (off the hot path)                                    ▼
//!  client ─► listener ─► tls ─► http (parse, decide, forward) ─► upstream ─► endpoint
//!          ─► l4 (TCP and UDP ports of the table, relayed as they are) ──────► endpoint
//!             one worker thread per core, each with its own sockets, pools and buffers
//! ```
#![forbid(unsafe_code)]

pub mod access_log;
pub mod balance;
mod buffer;
pub mod certificate;
pub mod client_hello;
pub mod clock;
pub mod config;
mod conn;
pub mod endpoint;
#[cfg(any(test, feature = "fuzzing"))]
pub mod fuzz;
pub mod handover;
mod http;
pub mod l4;
mod limit;
mod listener;
pub mod metrics;
mod proxy;
pub mod proxy_protocol;
mod relay;
pub mod resilience;
pub mod router;
mod splice;
pub mod split;
pub mod table;
mod timer;
pub mod tls;
mod upstream;
pub mod view;
mod worker;

pub use certificate::Certificate;
pub use config::Config;
pub use http::path::normalise_path;
pub use proxy::{Proxy, StartError};
pub use router::{Publisher, Router, Routes};
pub use table::RoutingTable;
