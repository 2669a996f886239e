//! The certificate of the run, and clients that believe it.

use std::net::TcpStream;
use std::sync::{Arc, OnceLock};

use anyhow::{Context, Result};
use rustls::client::Resumption;
use rustls::crypto::aws_lc_rs;
use rustls::{ClientConfig, ClientConnection, HandshakeKind, RootCertStore, StreamOwned};
use rustls_pki_types::pem::PemObject;
use rustls_pki_types::{CertificateDer, ServerName};

use crate::subject::HOST;

/// PEM texts: ECDSA P-256, its own issuer.
pub(crate) struct Certificate {
    pub(crate) chain: String,
    pub(crate) key: String,
}

/// The same one for all subjects of a run.
pub(crate) fn certificate() -> Result<&'static Certificate> {
    static CERTIFICATE: OnceLock<Certificate> = OnceLock::new();
    if let Some(made) = CERTIFICATE.get() {
        return Ok(made);
    }
    let key = rcgen::KeyPair::generate_for(&rcgen::PKCS_ECDSA_P256_SHA256)?;
    let made = rcgen::CertificateParams::new(vec![HOST.to_owned()])?.self_signed(&key)?;
    let made = Certificate { chain: made.pem(), key: key.serialize_pem() };
    Ok(CERTIFICATE.get_or_init(|| made))
}

/// TLS 1.3 with X25519, which all subjects know: none is asked for a hybrid key exchange.
#[derive(Clone)]
pub(crate) struct Client {
    config: Arc<ClientConfig>,
    name: ServerName<'static>,
}

impl Client {
    /// Whether it `resumes` sessions; otherwise it keeps nothing that it could resume.
    pub(crate) fn new(resumes: bool) -> Result<Client> {
        let mut roots = RootCertStore::empty();
        roots.add(CertificateDer::from_pem_slice(certificate()?.chain.as_bytes())?)?;
        let mut provider = aws_lc_rs::default_provider();
        provider.kx_groups = vec![aws_lc_rs::kx_group::X25519];
        let mut config = ClientConfig::builder_with_provider(provider.into())
            .with_protocol_versions(&[&rustls::version::TLS13])?
            .with_root_certificates(roots)
            .with_no_client_auth();
        config.resumption =
            if resumes { Resumption::in_memory_sessions(256) } else { Resumption::disabled() };
        config.alpn_protocols = vec![b"http/1.1".to_vec()];
        Ok(Client { config: config.into(), name: ServerName::try_from(HOST)?.to_owned() })
    }

    /// Handshakes happen with the first bytes written or read.
    pub(crate) fn connect(&self, stream: TcpStream) -> Result<StreamOwned<ClientConnection, TcpStream>> {
        let session = ClientConnection::new(Arc::clone(&self.config), self.name.clone())?;
        Ok(StreamOwned::new(session, stream))
    }
}

/// What the handshake of a connection that was used has been.
pub(crate) fn kind(stream: &StreamOwned<ClientConnection, TcpStream>) -> Result<HandshakeKind> {
    stream.conn.handshake_kind().context("no handshake yet")
}
