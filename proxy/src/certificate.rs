//! Certificates: PEM in, something rustls can serve out.
//!
//! Parsing is total: any bytes give a [`Certificate`] or a [`CertificateError`]
//! that says what to do. A private key goes in and never comes out again: not
//! in `Debug`, not in `Serialize`, not in an error.

use std::cmp::Ordering;
use std::fmt;
use std::net::IpAddr;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use rustls::crypto::aws_lc_rs::{cipher_suite, sign};
use rustls::sign::CertifiedKey;
use rustls::{SignatureAlgorithm, SupportedCipherSuite};
use rustls_pki_types::pem::{self, PemObject};
use rustls_pki_types::{CertificateDer, PrivateKeyDer};
use serde::Serialize;
use x509_parser::asn1_rs::{FromDer, Sequence};
use x509_parser::certificate::X509Certificate;
use x509_parser::extensions::GeneralName;
use x509_parser::nom;

/// The largest chain a TLS client is sure to read: a handshake message of
/// 64 KiB, less its own framing.
const MAX_CHAIN: usize = 0xffff - 64;

/// How long a self-signed certificate lasts. It is made anew at every start
/// and nobody verifies it, so it only has to outlive the process.
const SELF_SIGNED_LIFETIME: Duration = Duration::from_secs(10 * 365 * 86_400);

/// A certificate chain with its private key, ready to sign handshakes.
///
/// Two are equal when their chains are: the key belongs to the leaf, which
/// [`Certificate::from_pem`] has verified. Held in an [`Arc`] everywhere.
pub struct Certificate {
    signing: Arc<CertifiedKey>,
    /// SHA-256 of every DER of the chain, each behind its length.
    identity: [u8; 32],
    fingerprint: Box<str>,
    names: Vec<Box<str>>,
    addresses: Vec<IpAddr>,
    algorithm: KeyAlgorithm,
    not_before: i64,
    not_after: i64,
}

/// What kind of key a certificate has; in the order of preference, which is
/// what signing costs the server.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum KeyAlgorithm {
    /// ECDSA on P-256, P-384 or P-521.
    Ecdsa,
    /// Ed25519.
    Ed25519,
    /// RSA, 2048 to 8192 bits.
    Rsa,
}

/// Why a certificate cannot be served, and what to do.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum CertificateError {
    /// The chain has no certificate in it.
    #[error("no certificate found; expected PEM with a `-----BEGIN CERTIFICATE-----` line, the leaf first")]
    NoCertificate,
    /// The key has no private key in it.
    #[error("no private key found; expected PEM with a `-----BEGIN PRIVATE KEY-----` line (or RSA, EC)")]
    NoKey,
    /// The key needs a passphrase.
    #[error(
        "the private key is encrypted; store it without a passphrase (`openssl pkey -in KEY -out PLAIN`)"
    )]
    EncryptedKey,
    /// Text that is not PEM.
    #[error("the {what} is not valid PEM: {reason}")]
    BrokenPem {
        /// `certificate chain` or `private key`.
        what: &'static str,
        /// What is wrong with it; never a piece of the input, which may be a key.
        reason: &'static str,
    },
    /// A PEM block holds something else than a certificate.
    #[error(
        "certificate {position} of the chain is malformed: {reason}; export it again from where it was issued"
    )]
    MalformedCertificate {
        /// Place in the chain, from 1, the leaf.
        position: usize,
        /// What the parser said.
        reason: String,
    },
    /// The chain does not fit a handshake.
    #[error(
        "the chain has more than {MAX_CHAIN} bytes, which clients refuse; keep the leaf and its intermediates"
    )]
    ChainTooLong,
    /// A PEM block holds something else than a private key.
    #[error("the private key is malformed or cut short; export it again")]
    MalformedKey,
    /// A private key of another kind.
    #[error(
        "the private key is damaged or of an unsupported kind; use ECDSA on P-256, P-384 or P-521, \
         RSA of 2048 to 8192 bits, or Ed25519"
    )]
    UnsupportedKey,
    /// A sound key, but another certificate's.
    #[error(
        "the private key does not belong to the certificate; \
         store the pair that was issued together, and the leaf first in the chain"
    )]
    KeyMismatch,
    /// A certificate of one's own could not be made.
    #[error("cannot make a self-signed certificate: {0}")]
    SelfSigned(String),
}

impl Certificate {
    /// Reads a PEM chain (leaf first) and its PEM private key (PKCS#8, PKCS#1
    /// or SEC1), as a `kubernetes.io/tls` Secret holds them. Other PEM blocks
    /// are skipped.
    ///
    /// Neither validity dates nor the issuer are judged: serving an expired
    /// certificate is the operator's to see, by [`Certificate::not_after`].
    pub fn from_pem(chain: &[u8], key: &[u8]) -> Result<Certificate, CertificateError> {
        let chain = read_chain(chain)?;
        let key = read_key(key)?;
        Certificate::from_der(chain, &key)
    }

    /// A new ECDSA P-256 key and a certificate for `names` (DNS names,
    /// wildcards, IP addresses), signed by itself, valid from yesterday on.
    pub fn self_signed(names: &[&str]) -> Result<Certificate, CertificateError> {
        let (chain, key) =
            generate(names).map_err(|error| CertificateError::SelfSigned(error.to_string()))?;
        Certificate::from_der(vec![chain], &key)
    }

    fn from_der(
        chain: Vec<CertificateDer<'static>>,
        key: &PrivateKeyDer<'_>,
    ) -> Result<Certificate, CertificateError> {
        let key = sign::any_supported_type(key).map_err(|_| CertificateError::UnsupportedKey)?;
        let algorithm = match key.algorithm() {
            SignatureAlgorithm::ECDSA => KeyAlgorithm::Ecdsa,
            SignatureAlgorithm::RSA => KeyAlgorithm::Rsa,
            SignatureAlgorithm::ED25519 => KeyAlgorithm::Ed25519,
            _ => return Err(CertificateError::UnsupportedKey),
        };
        let leaf = chain.first().ok_or(CertificateError::NoCertificate)?;
        let parsed = parse_leaf(leaf)?;
        // Compared here rather than by `CertifiedKey::keys_match`, whose parser
        // refuses X.509 version 1, which other ingresses serve.
        if key.public_key().is_none_or(|spki| spki.as_ref() != parsed.public_key().raw) {
            return Err(CertificateError::KeyMismatch);
        }
        let (names, addresses) = subject_names(&parsed);
        let validity = parsed.validity();
        Ok(Certificate {
            identity: identity(&chain),
            fingerprint: hex(&sha256(leaf)).into(),
            names,
            addresses,
            algorithm,
            not_before: validity.not_before.timestamp(),
            not_after: validity.not_after.timestamp(),
            signing: Arc::new(CertifiedKey::new(chain, key)),
        })
    }

    /// The leaf's DNS names in lower case, wildcards as `*.example`; its
    /// common name if it has no subject alternative names.
    pub fn names(&self) -> &[Box<str>] {
        &self.names
    }

    /// Whether a client accepts the leaf for `host`, a name or an IP address
    /// without port (an IPv6 address with or without brackets). Case and one
    /// trailing dot are ignored; a wildcard stands for one whole label
    /// (RFC 9525 section 6.3). Allocates nothing.
    pub fn covers(&self, host: &str) -> bool {
        let address = host.strip_prefix('[').and_then(|host| host.strip_suffix(']')).unwrap_or(host);
        if let Ok(address) = address.parse::<IpAddr>() {
            return self.addresses.contains(&address);
        }
        let host = without_dot(host);
        self.names.iter().any(|name| name_covers(name, host))
    }

    /// SHA-256 of the leaf's DER in lower-case hex, as
    /// `openssl x509 -fingerprint -sha256` without its colons.
    pub fn fingerprint(&self) -> &str {
        &self.fingerprint
    }

    /// First second of the leaf's validity, Unix time.
    pub fn not_before(&self) -> i64 {
        self.not_before
    }

    /// Last second of the leaf's validity, Unix time.
    pub fn not_after(&self) -> i64 {
        self.not_after
    }

    /// The kind of its key.
    pub fn algorithm(&self) -> KeyAlgorithm {
        self.algorithm
    }

    pub(crate) fn signing(&self) -> &Arc<CertifiedKey> {
        &self.signing
    }
}

impl PartialEq for Certificate {
    fn eq(&self, other: &Certificate) -> bool {
        self.identity == other.identity
    }
}

impl Eq for Certificate {}

impl PartialOrd for Certificate {
    fn partial_cmp(&self, other: &Certificate) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

impl Ord for Certificate {
    fn cmp(&self, other: &Certificate) -> Ordering {
        self.identity.cmp(&other.identity)
    }
}

/// All that may be shown of a certificate, in logs and `/debug/routes`.
#[derive(Debug, Serialize)]
#[serde(rename = "Certificate")]
struct Shown<'a> {
    fingerprint: &'a str,
    names: &'a [Box<str>],
    algorithm: KeyAlgorithm,
    not_after: i64,
}

impl<'a> From<&'a Certificate> for Shown<'a> {
    fn from(certificate: &'a Certificate) -> Shown<'a> {
        Shown {
            fingerprint: &certificate.fingerprint,
            names: &certificate.names,
            algorithm: certificate.algorithm,
            not_after: certificate.not_after,
        }
    }
}

impl fmt::Debug for Certificate {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Shown { fingerprint, names, algorithm, not_after } = Shown::from(self);
        f.debug_struct("Certificate")
            .field("fingerprint", &fingerprint)
            .field("names", &names)
            .field("algorithm", &algorithm)
            .field("not_after", &not_after)
            .finish_non_exhaustive()
    }
}

impl Serialize for Certificate {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        Shown::from(self).serialize(serializer)
    }
}

fn read_chain(pem: &[u8]) -> Result<Vec<CertificateDer<'static>>, CertificateError> {
    let mut chain = Vec::new();
    let mut bytes = 0;
    for block in CertificateDer::pem_slice_iter(pem) {
        let der = block.map_err(|error| broken_pem("certificate chain", &error))?;
        // A leaf is parsed whole later; of the others a client judges the rest.
        if !is_one_sequence(&der) {
            let reason = "its DER is not one complete sequence".to_owned();
            return Err(CertificateError::MalformedCertificate { position: chain.len() + 1, reason });
        }
        // 5: the length and the extensions' length of a TLS 1.3 CertificateEntry.
        bytes += der.len() + 5;
        if bytes > MAX_CHAIN {
            return Err(CertificateError::ChainTooLong);
        }
        chain.push(der);
    }
    if chain.is_empty() { Err(CertificateError::NoCertificate) } else { Ok(chain) }
}

fn read_key(pem: &[u8]) -> Result<PrivateKeyDer<'static>, CertificateError> {
    match PrivateKeyDer::from_pem_slice(pem) {
        Ok(key) if is_one_sequence(key.secret_der()) => Ok(key),
        Ok(_) => Err(CertificateError::MalformedKey),
        // The headers of a traditionally encrypted key read as broken base64.
        Err(_) if is_encrypted(pem) => Err(CertificateError::EncryptedKey),
        Err(pem::Error::NoItemsFound) => Err(CertificateError::NoKey),
        Err(error) => Err(broken_pem("private key", &error)),
    }
}

/// PKCS#8 (RFC 5958) by its label, PKCS#1 and SEC1 by their header (RFC 1421).
fn is_encrypted(pem: &[u8]) -> bool {
    pem.split(|byte| matches!(byte, b'\n' | b'\r')).any(|line| {
        line.starts_with(b"-----BEGIN ENCRYPTED PRIVATE KEY") || line.starts_with(b"Proc-Type: 4,ENCRYPTED")
    })
}

/// Says what is wrong without quoting: the library's own text repeats input
/// lines, and of a key on a single line that is the key.
fn broken_pem(what: &'static str, error: &pem::Error) -> CertificateError {
    let reason = match error {
        pem::Error::MissingSectionEnd { .. } => {
            "a block has no END line; it is cut short, or its line breaks are lost"
        }
        pem::Error::IllegalSectionStart { .. } => "a BEGIN line does not end with five dashes",
        pem::Error::Base64Decode(_) => "a block is not base64",
        pem::Error::SectionTooLarge => "a block is larger than any certificate",
        _ => "it cannot be read",
    };
    CertificateError::BrokenPem { what, reason }
}

fn is_one_sequence(der: &[u8]) -> bool {
    matches!(Sequence::from_der(der), Ok((rest, _)) if rest.is_empty())
}

fn parse_leaf(der: &[u8]) -> Result<X509Certificate<'_>, CertificateError> {
    let malformed = |reason: String| CertificateError::MalformedCertificate { position: 1, reason };
    match X509Certificate::from_der(der) {
        Ok(([], parsed)) => Ok(parsed),
        Ok(_) => Err(malformed("bytes follow its end".to_owned())),
        Err(nom::Err::Error(error) | nom::Err::Failure(error)) => Err(malformed(error.to_string())),
        Err(nom::Err::Incomplete(_)) => Err(malformed("it is cut short".to_owned())),
    }
}

/// DNS names and addresses of the subject alternative names; without any, the
/// common name stands in, as clients once did and ingress-nginx still does.
/// Names that no client can ask for are left out.
fn subject_names(leaf: &X509Certificate<'_>) -> (Vec<Box<str>>, Vec<IpAddr>) {
    let (mut names, mut addresses) = (Vec::new(), Vec::new());
    // An extension that cannot be read leaves the certificate without names,
    // not unserved: names only decide which other hosts its connections may ask for.
    let alternative = leaf.subject_alternative_name().ok().flatten();
    for name in alternative.iter().flat_map(|extension| &extension.value.general_names) {
        match name {
            GeneralName::DNSName(name) => names.extend(dns_name(name)),
            GeneralName::IPAddress(octets) => addresses.extend(ip_address(octets)),
            _ => {}
        }
    }
    if names.is_empty() && addresses.is_empty() {
        let common_name = leaf.subject().iter_common_name().filter_map(|name| name.as_str().ok()).last();
        match common_name.map(|name| (name, name.parse())) {
            Some((_, Ok(address))) => addresses.push(address),
            Some((name, Err(_))) => names.extend(dns_name(name)),
            None => {}
        }
    }
    (names, addresses)
}

fn dns_name(name: &str) -> Option<Box<str>> {
    let name = without_dot(name);
    let is_label = |label: &str| {
        !label.is_empty() && label.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'_'))
    };
    let valid = name.strip_prefix("*.").unwrap_or(name).split('.').all(is_label);
    (valid && name.parse::<IpAddr>().is_err()).then(|| name.to_ascii_lowercase().into())
}

fn ip_address(octets: &[u8]) -> Option<IpAddr> {
    <[u8; 4]>::try_from(octets)
        .map(IpAddr::from)
        .or_else(|_| <[u8; 16]>::try_from(octets).map(IpAddr::from))
        .ok()
}

fn name_covers(name: &str, host: &str) -> bool {
    match name.strip_prefix('*') {
        // `suffix` keeps its dot, so the wildcard cannot end inside a label.
        Some(suffix) => host
            .find('.')
            .is_some_and(|dot| dot > 0 && host.as_bytes()[dot..].eq_ignore_ascii_case(suffix.as_bytes())),
        None => name.eq_ignore_ascii_case(host),
    }
}

/// A host name without the one trailing dot that makes it absolute.
pub(crate) fn without_dot(name: &str) -> &str {
    name.strip_suffix('.').unwrap_or(name)
}

fn identity(chain: &[CertificateDer<'_>]) -> [u8; 32] {
    let mut text = Vec::with_capacity(chain.iter().map(|der| der.len() + 8).sum());
    for der in chain {
        text.extend_from_slice(&(der.len() as u64).to_be_bytes());
        text.extend_from_slice(der);
    }
    sha256(&text)
}

/// By the hash of a cipher suite: the provider's only public way to it.
fn sha256(bytes: &[u8]) -> [u8; 32] {
    let common = match &cipher_suite::TLS13_AES_128_GCM_SHA256 {
        SupportedCipherSuite::Tls13(suite) => &suite.common,
        SupportedCipherSuite::Tls12(suite) => &suite.common,
    };
    let mut digest = [0; 32];
    digest.copy_from_slice(common.hash_provider.hash(bytes).as_ref());
    digest
}

fn hex(bytes: &[u8]) -> String {
    use fmt::Write as _;
    bytes.iter().fold(String::with_capacity(bytes.len() * 2), |mut text, byte| {
        // Writing to a String cannot fail.
        let _ = write!(text, "{byte:02x}");
        text
    })
}

fn generate(names: &[&str]) -> Result<(CertificateDer<'static>, PrivateKeyDer<'static>), rcgen::Error> {
    let key = rcgen::KeyPair::generate_for(&rcgen::PKCS_ECDSA_P256_SHA256)?;
    let names: Vec<String> = names.iter().map(|&name| name.to_owned()).collect();
    let mut params = rcgen::CertificateParams::new(names)?;
    params.distinguished_name = rcgen::DistinguishedName::new();
    params.distinguished_name.push(rcgen::DnType::CommonName, "Lockgate default certificate");
    params.insert_extended_key_usage(rcgen::ExtendedKeyUsagePurpose::ServerAuth);
    // From yesterday, for clients whose clock is slow. A clock before 1970
    // counts as 1970, one far beyond as the end of the 32-bit era.
    let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    let start = now.saturating_sub(Duration::from_secs(86_400)).min(Duration::from_secs(u32::MAX.into()));
    let epoch = rcgen::date_time_ymd(1970, 1, 1);
    params.not_before = epoch + start;
    params.not_after = epoch + start + SELF_SIGNED_LIFETIME;
    let certificate = params.self_signed(&key)?;
    let key = PrivateKeyDer::Pkcs8(key.serialize_der().into());
    Ok((certificate.der().clone(), key))
}

/// A fuzz body: reads `data` as a chain and a key, in PEM divided by the first
/// NUL byte and then whole as DER, and asks whatever comes out every question.
#[doc(hidden)]
pub fn fuzz_certificate(data: &[u8]) {
    let split = data.iter().position(|&byte| byte == 0).unwrap_or(data.len());
    let (chain, key) = data.split_at(split);
    match Certificate::from_pem(chain, key.get(1..).unwrap_or_default()) {
        Ok(certificate) => {
            for name in certificate.names() {
                assert!(certificate.covers(name) || name.starts_with("*."));
            }
            let _ = format!("{certificate:?}");
        }
        Err(error) => assert!(!error.to_string().is_empty()),
    }
    if let Ok(leaf) = parse_leaf(data) {
        let (names, _) = subject_names(&leaf);
        assert!(names.iter().all(|name| !name.is_empty() && name.is_ascii()));
    }
    let _ = is_one_sequence(data);
}

#[cfg(test)]
mod tests;
