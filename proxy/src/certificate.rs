//! Certificates: PEM in, something rustls can serve out.

use serde::Serialize;

/// A certificate chain with its private key.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Certificate {
    fingerprint: String,
}
