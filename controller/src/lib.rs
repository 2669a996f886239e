//! Kubernetes objects in, routing and service tables out.
#![forbid(unsafe_code)]

pub mod objects;
pub mod store;
pub mod translate;
