//! TLS on both sides: certificates by SNI out of the live table downstream,
//! and [`client_config`] for endpoints that speak it.
//!
//! One [`Tls`] serves all workers, so a session begun on one resumes on any.
//! Tickets are stateless: the server keeps nothing, the keys are random,
//! rotate every six hours and go nowhere but to the process that takes over in
//! an upgrade. A ticket is bound to
//! the SNI it was issued for (RFC 6066 section 3; rustls compares it before it
//! resumes), so it cannot carry a session from one host's certificate to
//! another's. Rotating a certificate does not end its sessions: a ticket
//! proves the client's earlier handshake for at most twelve hours.

use std::fmt::Debug;
use std::sync::Arc;

use imbl::OrdMap;
use rustls::crypto::{CryptoProvider, aws_lc_rs};
use rustls::server::{ClientHello, NoServerSessionStorage, ResolvesServerCert, ServerConfig};
use rustls::sign::CertifiedKey;
use rustls::{SignatureScheme, SupportedProtocolVersion, version};
use smallvec::SmallVec;
use tokio_rustls::TlsAcceptor;

use crate::certificate::{Certificate, without_dot};
use crate::table::HostPattern;
use tickets::TicketKeys;

pub(crate) mod tickets;
mod upstream;

pub use upstream::client_config;

/// Certificates to choose among for one name: one per key algorithm.
pub type Candidates = SmallVec<[Arc<Certificate>; 3]>;

/// Finds certificates in whatever is live now. Asked once per handshake.
pub trait CertificateLookup: Debug + Send + Sync {
    /// The certificates for `server_name`, the SNI as the client sent it; as
    /// [`certificates_for`] finds them, within one generation. Empty: the
    /// table has none, the process's own default is served.
    fn certificates(&self, server_name: Option<&str>) -> Candidates;
}

/// What a listener's TLS may be asked to do.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TlsOptions {
    /// The oldest version spoken.
    pub min_version: TlsVersion,
    /// Offer HTTP/2 by ALPN, before HTTP/1.1.
    pub http2: bool,
}

impl Default for TlsOptions {
    fn default() -> TlsOptions {
        TlsOptions { min_version: TlsVersion::Tls12, http2: true }
    }
}

/// A version of TLS.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum TlsVersion {
    /// RFC 5246.
    Tls12,
    /// RFC 8446.
    Tls13,
}

/// Downstream TLS: one per process, shared by all workers.
#[derive(Clone)]
pub struct Tls {
    acceptor: TlsAcceptor,
    resolver: Arc<Resolver>,
}

impl Tls {
    /// `default` is served when the table has nothing for a name and no
    /// default of its own. Fails when the system gives no random bytes.
    pub fn new(
        lookup: Arc<dyn CertificateLookup>,
        default: Arc<Certificate>,
        options: &TlsOptions,
    ) -> Result<Tls, rustls::Error> {
        Tls::with_tickets(lookup, default, options, Arc::new(TicketKeys::new(&[])?))
    }

    /// As [`Tls::new`], with ticket keys that others may hold, too.
    pub(crate) fn with_tickets(
        lookup: Arc<dyn CertificateLookup>,
        default: Arc<Certificate>,
        options: &TlsOptions,
        tickets: Arc<TicketKeys>,
    ) -> Result<Tls, rustls::Error> {
        let versions: &[&'static SupportedProtocolVersion] = match options.min_version {
            TlsVersion::Tls12 => &[&version::TLS13, &version::TLS12],
            TlsVersion::Tls13 => &[&version::TLS13],
        };
        let resolver = Arc::new(Resolver { lookup, default });
        let mut config = ServerConfig::builder_with_provider(provider())
            .with_protocol_versions(versions)?
            .with_no_client_auth()
            .with_cert_resolver(resolver.clone());
        // As ingress-nginx's `ssl-prefer-server-ciphers`: a client that lists a weak one first does not get it.
        config.ignore_client_order = true;
        config.alpn_protocols = alpn(options.http2);
        config.session_storage = Arc::new(NoServerSessionStorage {});
        config.ticketer = tickets;
        config.send_tls13_tickets = 2;
        // 0-RTT data can be replayed (RFC 8446 section 8), and a proxy cannot
        // know which requests bear that.
        config.max_early_data_size = 0;
        Ok(Tls { acceptor: TlsAcceptor::from(Arc::new(config)), resolver })
    }

    /// What turns an accepted connection into a TLS one.
    pub fn acceptor(&self) -> &TlsAcceptor {
        &self.acceptor
    }

    /// The certificate a client that named `server_name` is served now, the
    /// preferred one where there are several. Meant to be asked once after the
    /// handshake and kept with the connection for [`is_misdirected`].
    pub fn served_for(&self, server_name: Option<&str>) -> Arc<Certificate> {
        self.resolver.choose(server_name, None)
    }
}

impl Debug for Tls {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Tls").field("default", &self.resolver.default).finish_non_exhaustive()
    }
}

#[derive(Debug)]
struct Resolver {
    lookup: Arc<dyn CertificateLookup>,
    default: Arc<Certificate>,
}

impl Resolver {
    fn choose(&self, server_name: Option<&str>, schemes: Option<&[SignatureScheme]>) -> Arc<Certificate> {
        let candidates = self.lookup.certificates(server_name);
        preferred(&candidates, schemes).unwrap_or(&self.default).clone()
    }
}

impl ResolvesServerCert for Resolver {
    fn resolve(&self, hello: ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
        let certificate = self.choose(hello.server_name(), Some(hello.signature_schemes()));
        Some(certificate.signing().clone())
    }
}

/// The cheapest to sign with among those that can sign for this client. If
/// none can, the cheapest of all: the handshake then fails with the alert that
/// says so, rather than with another host's certificate.
fn preferred<'a>(
    candidates: &'a [Arc<Certificate>],
    schemes: Option<&[SignatureScheme]>,
) -> Option<&'a Arc<Certificate>> {
    let can_sign = |certificate: &Certificate| {
        schemes.is_none_or(|schemes| certificate.signing().key.choose_scheme(schemes).is_some())
    };
    candidates.iter().min_by_key(|certificate| (!can_sign(certificate), certificate.algorithm()))
}

/// Looks `server_name` up as given, then with its first label as `*`, then
/// under the pattern for any host; then `default`. Case and one trailing dot
/// do not matter.
pub fn certificates_for(
    certificates: &OrdMap<HostPattern, Arc<Vec<Arc<Certificate>>>>,
    default: Option<&Arc<Certificate>>,
    server_name: Option<&str>,
) -> Candidates {
    let find = |pattern: HostPattern| certificates.get(&pattern).filter(|found| !found.is_empty());
    let named = server_name.filter(|name| !name.is_empty()).and_then(|name| {
        find(HostPattern::new(name)).or_else(|| {
            let (_, parent) = name.split_once('.')?;
            find(HostPattern::new(&format!("*.{parent}")))
        })
    });
    match named.or_else(|| find(HostPattern::any())) {
        Some(found) => found.iter().cloned().collect(),
        None => default.into_iter().cloned().collect(),
    }
}

/// Whether a request for `host` (without port) came over a connection that was
/// not opened for it and should be answered 421 (RFC 9110 section 15.5.20):
/// the client named another host in its handshake, and the certificate it was
/// served for that does not cover this one, so no client may share the
/// connection. Without SNI there is nothing to compare. Allocates nothing.
pub fn is_misdirected(server_name: Option<&str>, certificate: Option<&Certificate>, host: &str) -> bool {
    let Some(server_name) = server_name else { return false };
    let same = without_dot(server_name).eq_ignore_ascii_case(without_dot(host));
    !same && !certificate.is_some_and(|certificate| certificate.covers(host))
}

/// Cipher suites, key exchange (X25519MLKEM768 first) and signatures of both sides.
fn provider() -> Arc<CryptoProvider> {
    Arc::new(aws_lc_rs::default_provider())
}

fn alpn(http2: bool) -> Vec<Vec<u8>> {
    if http2 { vec![b"h2".to_vec(), b"http/1.1".to_vec()] } else { vec![b"http/1.1".to_vec()] }
}

#[cfg(test)]
mod tests;
