//! What both proxies look up and add.

use std::collections::HashMap;
use std::net::SocketAddr;

/// A host and three path prefixes, longest first.
pub struct Routes(HashMap<String, Vec<(&'static str, SocketAddr)>>);

impl Routes {
    /// All paths lead to `backend`.
    pub fn new(backend: SocketAddr) -> Routes {
        let paths = ["/static", "/api", "/"].map(|path| (path, backend));
        Routes(HashMap::from([("bench.example".to_owned(), paths.to_vec())]))
    }

    /// The endpoint for a request; `host` may carry a port.
    pub fn find(&self, host: &str, path: &str) -> Option<SocketAddr> {
        let host = host.split(':').next()?;
        let paths = self.0.get(host)?;
        paths.iter().find(|(prefix, _)| path.starts_with(prefix)).map(|(_, backend)| *backend)
    }
}

/// 32 hexadecimal digits, unlikely to come twice.
pub fn request_id() -> String {
    format!("{:032x}", fastrand::u128(..))
}
