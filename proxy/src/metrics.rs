//! Counters. A stub: the shape that compiling a table needs.

use std::sync::Arc;

use crate::table::{Origin, PoolKey};

/// Every counter of the process.
#[derive(Debug, Default)]
pub struct Metrics {}

/// The counters of one rule and backend.
#[derive(Debug, Default)]
pub struct RouteStats {}

impl Metrics {
    /// The counters of requests that `origin` sends to `pool`; `canary` is empty for the primary.
    pub fn route(&self, _origin: &Origin, _pool: &PoolKey, _canary: &str) -> Arc<RouteStats> {
        Arc::default()
    }
}
