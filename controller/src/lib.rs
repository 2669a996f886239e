//! Kubernetes objects in, routing and service tables out; and the `lockgate` binary.
//!
//! ```text
//!  source ──► Store ──► translate ──► Desired ──► publish ──► proxy
//!    folder    objects    pure          routes      one swap
//!                                       statuses ──► log, check, explain
//! ```
#![forbid(unsafe_code)]

pub mod admin;
pub mod args;
pub mod check;
pub mod demo;
pub mod explain;
#[cfg(any(test, feature = "fuzzing"))]
pub mod fuzz;
pub(crate) mod http;
pub mod ingress;
pub mod node;
pub mod objects;
pub mod publish;
pub mod source;
pub mod store;
pub(crate) mod text;
pub mod translate;
pub(crate) mod upgrade;
