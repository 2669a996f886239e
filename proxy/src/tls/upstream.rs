//! TLS towards endpoints.

use std::sync::Arc;

use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::client::{ClientConfig, Resumption};
use rustls::crypto::{WebPkiSupportedAlgorithms, verify_tls13_signature_with_raw_key};
use rustls::{CertificateError, DigitallySignedStruct, Error, SignatureScheme};
use rustls_pki_types::{CertificateDer, ServerName, SubjectPublicKeyInfoDer, UnixTime};
use x509_parser::asn1_rs::{Any, FromDer};
use x509_parser::certificate::X509Certificate;
use x509_parser::x509::SubjectPublicKeyInfo;

/// Sessions remembered for resumption, each of one endpoint address: a few
/// hundred bytes apiece.
const SESSIONS: usize = 1024;

/// How to speak TLS to endpoints: `h2` or `http/1.1` by ALPN, any certificate
/// accepted, as ingress-nginx does unless told otherwise.
///
/// Endpoints are dialled by address, and their certificates rarely name it; who
/// they are is the cluster network's to say. The peer must still own the key
/// of the certificate it shows. Sessions resume, so keep the result: one for
/// each `alpn_h2` and worker.
pub fn client_config(alpn_h2: bool) -> Arc<ClientConfig> {
    let provider = super::provider();
    let verifier = AnyCertificate { algorithms: provider.signature_verification_algorithms };
    let mut config = ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .expect("the default provider has cipher suites and key exchange for the default versions")
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(verifier))
        .with_no_client_auth();
    config.alpn_protocols = vec![if alpn_h2 { b"h2".to_vec() } else { b"http/1.1".to_vec() }];
    config.resumption = Resumption::in_memory_sessions(SESSIONS);
    Arc::new(config)
}

/// Accepts every certificate, and verifies only that the peer has its key.
#[derive(Debug)]
struct AnyCertificate {
    algorithms: WebPkiSupportedAlgorithms,
}

impl ServerCertVerifier for AnyCertificate {
    fn verify_server_cert(
        &self,
        _end_entity: &CertificateDer<'_>,
        _intermediates: &[CertificateDer<'_>],
        _server_name: &ServerName<'_>,
        _ocsp_response: &[u8],
        _now: UnixTime,
    ) -> Result<ServerCertVerified, Error> {
        Ok(ServerCertVerified::assertion())
    }

    /// Not by rustls's function, which first wants the certificate to be one
    /// that web PKI allows: version 3, no unknown critical extension. What
    /// `openssl x509 -req` makes by default is version 1.
    fn verify_tls12_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        let leaf = parse(cert)?;
        let key = leaf.public_key();
        let identifier = algorithm_identifier(key)?;
        let possible = self.algorithms.mapping.iter().find(|(scheme, _)| *scheme == dss.scheme);
        // TLS 1.2 leaves the curve open, hence several for one scheme.
        possible
            .into_iter()
            .flat_map(|(_, algorithms)| *algorithms)
            .filter(|algorithm| algorithm.public_key_alg_id().as_ref() == identifier)
            .find_map(|algorithm| {
                algorithm.verify_signature(&key.subject_public_key.data, message, dss.signature()).ok()
            })
            .map(|()| HandshakeSignatureValid::assertion())
            .ok_or(Error::InvalidCertificate(CertificateError::BadSignature))
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        let leaf = parse(cert)?;
        let key = SubjectPublicKeyInfoDer::from(leaf.public_key().raw);
        verify_tls13_signature_with_raw_key(message, &key, dss, &self.algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.algorithms.supported_schemes()
    }
}

fn parse<'a>(cert: &'a CertificateDer<'_>) -> Result<X509Certificate<'a>, Error> {
    X509Certificate::from_der(cert).map(|(_, parsed)| parsed).map_err(|_| bad_encoding())
}

/// What is inside the AlgorithmIdentifier sequence of `key`: how rustls names
/// the kind of a key.
fn algorithm_identifier<'a>(key: &SubjectPublicKeyInfo<'a>) -> Result<&'a [u8], Error> {
    let (_, key) = Any::from_der(key.raw).map_err(|_| bad_encoding())?;
    let (_, algorithm) = Any::from_der(key.data).map_err(|_| bad_encoding())?;
    Ok(algorithm.data)
}

fn bad_encoding() -> Error {
    Error::InvalidCertificate(CertificateError::BadEncoding)
}
