//! Handshakes over loopback sockets, with rustls as the client.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use arc_swap::ArcSwap;
use lockgate_proxy::certificate::KeyAlgorithm;
use lockgate_proxy::table::HostPattern;
use lockgate_proxy::tls::{
    Candidates, CertificateLookup, Tls, TlsOptions, TlsVersion, certificates_for, client_config,
};
use lockgate_proxy::{Certificate, RoutingTable};
use rcgen::{CertificateParams, KeyPair};
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::client::{
    ClientSessionMemoryCache, ClientSessionStore, Resumption, Tls12ClientSessionValue,
    Tls13ClientSessionValue,
};
use rustls::crypto::{CryptoProvider, aws_lc_rs, verify_tls12_signature, verify_tls13_signature};
use rustls::server::{ClientHello, ResolvesServerCert};
use rustls::sign::CertifiedKey;
use rustls::version::{TLS12, TLS13};
use rustls::{
    ClientConfig, DigitallySignedStruct, Error, HandshakeKind, NamedGroup, RootCertStore, ServerConfig,
    SignatureScheme, SupportedProtocolVersion,
};
use rustls_pki_types::pem::PemObject;
use rustls_pki_types::{CertificateDer, PrivateKeyDer, ServerName, UnixTime};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio_rustls::client::TlsStream;
use tokio_rustls::{TlsAcceptor, TlsConnector};

const BOTH_VERSIONS: [&SupportedProtocolVersion; 2] = [&TLS12, &TLS13];

/// A certificate as the proxy has it and as a client sees it.
#[derive(Clone)]
struct Pair {
    certificate: Arc<Certificate>,
    der: CertificateDer<'static>,
}

fn ecdsa(names: &[&str]) -> Pair {
    pair(names, &KeyPair::generate().unwrap())
}

fn rsa(names: &[&str]) -> Pair {
    let key = include_str!("fixtures/rsa.key");
    pair(names, &KeyPair::from_pem_and_sign_algo(key, &rcgen::PKCS_RSA_SHA256).unwrap())
}

fn pair(names: &[&str], key: &KeyPair) -> Pair {
    let names: Vec<String> = names.iter().map(|&name| name.to_owned()).collect();
    let made = CertificateParams::new(names).unwrap().self_signed(key).unwrap();
    let certificate = Certificate::from_pem(made.pem().as_bytes(), key.serialize_pem().as_bytes()).unwrap();
    Pair { certificate: Arc::new(certificate), der: made.der().clone() }
}

/// The live table, as the router will hold it.
#[derive(Debug, Default)]
struct Live(ArcSwap<RoutingTable>);

impl Live {
    fn new(certificates: &[(&str, &[&Pair])], default: Option<&Pair>) -> Arc<Live> {
        let live = Live::default();
        live.publish(certificates, default);
        Arc::new(live)
    }

    fn publish(&self, certificates: &[(&str, &[&Pair])], default: Option<&Pair>) {
        let mut table = RoutingTable::default();
        for (pattern, pairs) in certificates {
            let pairs = pairs.iter().map(|pair| pair.certificate.clone()).collect();
            table.certificates.insert(HostPattern::new(pattern), Arc::new(pairs));
        }
        table.default_certificate = default.map(|pair| pair.certificate.clone());
        self.0.store(Arc::new(table));
    }
}

impl CertificateLookup for Live {
    fn certificates(&self, server_name: Option<&str>) -> Candidates {
        let table = self.0.load();
        certificates_for(&table.certificates, table.default_certificate.as_ref(), server_name)
    }
}

fn tls(live: &Arc<Live>, fallback: &Pair) -> Tls {
    Tls::new(live.clone(), fallback.certificate.clone(), &TlsOptions::default()).unwrap()
}

/// Echoes on every connection whose handshake succeeds, after one byte of
/// greeting: by the time a client has read that, it has its tickets too.
async fn serve(acceptor: TlsAcceptor) -> std::net::SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    tokio::spawn(async move {
        loop {
            let (stream, _) = listener.accept().await.unwrap();
            let acceptor = acceptor.clone();
            tokio::spawn(async move {
                let Ok(mut stream) = acceptor.accept(stream).await else { return };
                let _ = stream.write_all(b"!").await;
                let (mut read, mut write) = tokio::io::split(stream);
                let _ = tokio::io::copy(&mut read, &mut write).await;
            });
        }
    });
    address
}

async fn connect(
    config: &Arc<ClientConfig>,
    address: std::net::SocketAddr,
    name: &str,
) -> std::io::Result<TlsStream<TcpStream>> {
    let stream = TcpStream::connect(address).await?;
    let name = ServerName::try_from(name.to_owned()).unwrap();
    let mut stream = TlsConnector::from(config.clone()).connect(name, stream).await?;
    let mut greeting = [0];
    stream.read_exact(&mut greeting).await?;
    Ok(stream)
}

/// The leaf that a client which asks for `name` is shown.
async fn leaf(
    config: &Arc<ClientConfig>,
    address: std::net::SocketAddr,
    name: &str,
) -> CertificateDer<'static> {
    let stream = connect(config, address, name).await.unwrap();
    stream.get_ref().1.peer_certificates().unwrap()[0].clone()
}

/// A client that takes any name and advertises only `schemes`.
#[derive(Debug)]
struct AnyName {
    provider: Arc<CryptoProvider>,
    schemes: Vec<SignatureScheme>,
}

impl ServerCertVerifier for AnyName {
    fn verify_server_cert(
        &self,
        _: &CertificateDer<'_>,
        _: &[CertificateDer<'_>],
        _: &ServerName<'_>,
        _: &[u8],
        _: UnixTime,
    ) -> Result<ServerCertVerified, Error> {
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        verify_tls12_signature(message, cert, dss, &self.provider.signature_verification_algorithms)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        verify_tls13_signature(message, cert, dss, &self.provider.signature_verification_algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.schemes.clone()
    }
}

fn client(
    versions: &[&'static SupportedProtocolVersion],
    schemes: Option<&[SignatureScheme]>,
) -> ClientConfig {
    client_with(aws_lc_rs::default_provider(), versions, schemes)
}

fn client_with(
    provider: CryptoProvider,
    versions: &[&'static SupportedProtocolVersion],
    schemes: Option<&[SignatureScheme]>,
) -> ClientConfig {
    let provider = Arc::new(provider);
    let all = provider.signature_verification_algorithms.supported_schemes();
    let schemes = schemes.map_or(all, <[SignatureScheme]>::to_vec);
    ClientConfig::builder_with_provider(provider.clone())
        .with_protocol_versions(versions)
        .unwrap()
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(AnyName { provider, schemes }))
        .with_no_client_auth()
}

#[tokio::test]
async fn the_certificate_follows_the_server_name() {
    let [exact, wildcard, default, fallback] =
        [ecdsa(&["shop.example"]), ecdsa(&["*.shop.example"]), ecdsa(&["default.example"]), ecdsa(&[])];
    let table: [(&str, &[&Pair]); 2] = [("shop.example", &[&exact]), ("*.shop.example", &[&wildcard])];
    let live = Live::new(&table, Some(&default));
    let tls = tls(&live, &fallback);
    let address = serve(tls.acceptor().clone()).await;

    for version in BOTH_VERSIONS {
        let config = Arc::new(client(&[version], None));
        let cases = [
            ("shop.example", &exact),
            ("SHOP.example", &exact),
            ("shop.example.", &exact),
            ("a.shop.example", &wildcard),
            ("a.b.shop.example", &default),
            ("unknown.test", &default),
            // rustls sends no SNI for an address.
            ("127.0.0.1", &default),
        ];
        for (name, expected) in cases {
            assert_eq!(leaf(&config, address, name).await, expected.der, "{name} {version:?}");
            let sni = (name != "127.0.0.1").then_some(name);
            assert_eq!(tls.served_for(sni), expected.certificate, "{name}");
        }
    }

    let config = Arc::new(client(&BOTH_VERSIONS, None));
    live.publish(&table, None);
    for name in ["unknown.test", "127.0.0.1"] {
        assert_eq!(leaf(&config, address, name).await, fallback.der, "{name}: no default in the table");
    }
}

#[tokio::test]
async fn a_client_that_verifies_is_satisfied() {
    let [exact, wildcard] = [ecdsa(&["shop.example"]), rsa(&["*.shop.example"])];
    let live = Live::new(&[("shop.example", &[&exact]), ("*.shop.example", &[&wildcard])], None);
    let address = serve(tls(&live, &ecdsa(&[])).acceptor().clone()).await;
    let mut roots = RootCertStore::empty();
    roots.add(exact.der.clone()).unwrap();
    roots.add(wildcard.der.clone()).unwrap();
    let config = ClientConfig::builder_with_provider(Arc::new(aws_lc_rs::default_provider()))
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_root_certificates(roots)
        .with_no_client_auth();
    let config = Arc::new(config);
    connect(&config, address, "shop.example").await.unwrap();
    connect(&config, address, "a.shop.example").await.unwrap();
    connect(&config, address, "unknown.test").await.unwrap_err();
}

#[tokio::test]
async fn rsa_and_ecdsa_for_one_host_are_chosen_by_what_the_client_verifies() {
    use SignatureScheme as S;
    let (rsa, ecdsa, default) = (rsa(&["shop.example"]), ecdsa(&["shop.example"]), ecdsa(&[]));
    let live = Live::new(&[("shop.example", &[&rsa, &ecdsa]), ("rsa.example", &[&rsa])], Some(&default));
    let address = serve(tls(&live, &default).acceptor().clone()).await;

    let only_rsa = [S::RSA_PSS_SHA256, S::RSA_PKCS1_SHA256];
    let only_ecdsa = [S::ECDSA_NISTP256_SHA256];
    for version in BOTH_VERSIONS {
        let cases: [(Option<&[S]>, &Pair, KeyAlgorithm); 3] = [
            (None, &ecdsa, KeyAlgorithm::Ecdsa),
            (Some(&only_rsa), &rsa, KeyAlgorithm::Rsa),
            (Some(&only_ecdsa), &ecdsa, KeyAlgorithm::Ecdsa),
        ];
        for (schemes, expected, algorithm) in cases {
            let config = Arc::new(client(&[version], schemes));
            assert_eq!(expected.certificate.algorithm(), algorithm);
            assert_eq!(leaf(&config, address, "shop.example").await, expected.der, "{schemes:?} {version:?}");
        }
        // Better no connection than one with another host's certificate.
        let config = Arc::new(client(&[version], Some(&only_ecdsa)));
        connect(&config, address, "rsa.example").await.unwrap_err();
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn rotating_certificates_fails_no_handshake_and_ends_no_connection() {
    let generations: Vec<Pair> = (0..4).map(|_| ecdsa(&["shop.example"])).collect();
    let live = Live::new(&[("shop.example", &[&generations[0]])], None);
    let address = serve(tls(&live, &ecdsa(&[])).acceptor().clone()).await;
    let long_lived = Arc::new(client(&BOTH_VERSIONS, None));
    let mut old = connect(&long_lived, address, "shop.example").await.unwrap();

    let done = Arc::new(AtomicBool::new(false));
    let swaps = Arc::new(AtomicUsize::new(0));
    let rotation = tokio::spawn({
        let (live, generations) = (live.clone(), generations.clone());
        let (done, swaps) = (done.clone(), swaps.clone());
        async move {
            while !done.load(Ordering::Relaxed) {
                let generation = &generations[swaps.fetch_add(1, Ordering::Relaxed) % generations.len()];
                live.publish(&[("shop.example", &[generation])], None);
                tokio::task::yield_now().await;
            }
        }
    });
    let clients: Vec<_> = (0..8)
        .map(|index| {
            let served: Vec<_> = generations.iter().map(|pair| pair.der.clone()).collect();
            tokio::spawn(async move {
                let config = Arc::new(client(&[BOTH_VERSIONS[index % 2]], None));
                for _ in 0..25 {
                    assert!(served.contains(&leaf(&config, address, "shop.example").await));
                }
            })
        })
        .collect();
    for client in clients {
        client.await.unwrap();
    }
    done.store(true, Ordering::Relaxed);
    rotation.await.unwrap();
    assert!(swaps.load(Ordering::Relaxed) > 1);

    old.write_all(b"still here").await.unwrap();
    let mut echo = [0; 10];
    old.read_exact(&mut echo).await.unwrap();
    assert_eq!(&echo, b"still here");

    live.publish(&[("shop.example", &[&generations[3]])], None);
    let fresh = Arc::new(client(&BOTH_VERSIONS, None));
    assert_eq!(
        leaf(&fresh, address, "shop.example").await,
        generations[3].der,
        "live from the next handshake on"
    );
}

#[tokio::test]
async fn sessions_resume_on_every_worker() {
    let shop = ecdsa(&["shop.example"]);
    let tls = tls(&Live::new(&[("shop.example", &[&shop])], None), &ecdsa(&[]));
    let workers = [serve(tls.acceptor().clone()).await, serve(tls.clone().acceptor().clone()).await];
    for version in BOTH_VERSIONS {
        let config = Arc::new(client(&[version], None));
        let mut kinds = Vec::new();
        for address in [workers[0], workers[0], workers[1], workers[0]] {
            let stream = connect(&config, address, "shop.example").await.unwrap();
            kinds.push(stream.get_ref().1.handshake_kind().unwrap());
        }
        use HandshakeKind::{Full, Resumed};
        assert_eq!(kinds, [Full, Resumed, Resumed, Resumed], "{version:?}");
    }
}

/// Offers the ticket of one name to every other, as a client should not.
#[derive(Debug)]
struct OneSession(ClientSessionMemoryCache);

impl OneSession {
    fn name() -> ServerName<'static> {
        ServerName::try_from("same.example").unwrap()
    }
}

impl ClientSessionStore for OneSession {
    fn set_kx_hint(&self, _: ServerName<'static>, group: NamedGroup) {
        self.0.set_kx_hint(OneSession::name(), group);
    }
    fn kx_hint(&self, _: &ServerName<'_>) -> Option<NamedGroup> {
        self.0.kx_hint(&OneSession::name())
    }
    fn set_tls12_session(&self, _: ServerName<'static>, value: Tls12ClientSessionValue) {
        self.0.set_tls12_session(OneSession::name(), value);
    }
    fn tls12_session(&self, _: &ServerName<'_>) -> Option<Tls12ClientSessionValue> {
        self.0.tls12_session(&OneSession::name())
    }
    fn remove_tls12_session(&self, _: &ServerName<'static>) {
        self.0.remove_tls12_session(&OneSession::name());
    }
    fn insert_tls13_ticket(&self, _: ServerName<'static>, value: Tls13ClientSessionValue) {
        self.0.insert_tls13_ticket(OneSession::name(), value);
    }
    fn take_tls13_ticket(&self, _: &ServerName<'static>) -> Option<Tls13ClientSessionValue> {
        self.0.take_tls13_ticket(&OneSession::name())
    }
}

#[tokio::test]
async fn a_ticket_does_not_resume_under_another_name() {
    let (one, other) = (ecdsa(&["one.example"]), ecdsa(&["other.example"]));
    let live = Live::new(&[("one.example", &[&one]), ("other.example", &[&other])], None);
    let address = serve(tls(&live, &ecdsa(&[])).acceptor().clone()).await;
    for version in BOTH_VERSIONS {
        let mut config = client(&[version], None);
        config.resumption = Resumption::store(Arc::new(OneSession(ClientSessionMemoryCache::new(8))));
        let config = Arc::new(config);
        for (name, kind) in [
            ("one.example", HandshakeKind::Full),
            ("one.example", HandshakeKind::Resumed),
            ("other.example", HandshakeKind::Full),
        ] {
            let stream = connect(&config, address, name).await.unwrap();
            assert_eq!(stream.get_ref().1.handshake_kind(), Some(kind), "{name} {version:?}");
        }
    }
}

#[tokio::test]
async fn early_data_is_never_offered() {
    let address = serve(tls(&Live::new(&[], None), &ecdsa(&[])).acceptor().clone()).await;
    let mut config = client(&[&TLS13], None);
    config.enable_early_data = true;
    let config = Arc::new(config);
    connect(&config, address, "shop.example").await.unwrap();
    let name = ServerName::try_from("shop.example").unwrap();
    let mut second = rustls::ClientConnection::new(config, name).unwrap();
    assert!(second.early_data().is_none(), "its ticket allows none");
}

#[tokio::test]
async fn key_exchange_is_post_quantum_where_the_client_can() {
    let address = serve(tls(&Live::new(&[], None), &ecdsa(&[])).acceptor().clone()).await;
    let mut classic = aws_lc_rs::default_provider();
    classic.kx_groups.retain(|group| group.name() == NamedGroup::X25519);
    let cases = [(aws_lc_rs::default_provider(), NamedGroup::X25519MLKEM768), (classic, NamedGroup::X25519)];
    for (provider, expected) in cases {
        let config = Arc::new(client_with(provider, &[&TLS13], None));
        let stream = connect(&config, address, "shop.example").await.unwrap();
        let connection = stream.get_ref().1;
        assert_eq!(connection.negotiated_key_exchange_group().unwrap().name(), expected);
        assert_eq!(connection.handshake_kind(), Some(HandshakeKind::Full), "no second ClientHello");
    }
}

#[tokio::test]
async fn alpn_prefers_http2() {
    let cases: [(bool, &[&str], Result<Option<&str>, ()>); 6] = [
        (true, &["http/1.1", "h2"], Ok(Some("h2"))),
        (true, &["http/1.1"], Ok(Some("http/1.1"))),
        (true, &[], Ok(None)),
        (true, &["spdy/3"], Err(())),
        (false, &["h2", "http/1.1"], Ok(Some("http/1.1"))),
        (false, &["h2"], Err(())),
    ];
    for (http2, offered, expected) in cases {
        let options = TlsOptions { http2, ..TlsOptions::default() };
        let tls = Tls::new(Live::new(&[], None), ecdsa(&[]).certificate, &options).unwrap();
        let address = serve(tls.acceptor().clone()).await;
        let mut config = client(&BOTH_VERSIONS, None);
        config.alpn_protocols = offered.iter().map(|name| name.as_bytes().to_vec()).collect();
        let stream = connect(&Arc::new(config), address, "shop.example").await.map_err(drop);
        let agreed = stream.map(|stream| stream.get_ref().1.alpn_protocol().map(<[u8]>::to_vec));
        let expected = expected.map(|name| name.map(|name| name.as_bytes().to_vec()));
        assert_eq!(agreed, expected, "{http2} {offered:?}");
    }
}

#[tokio::test]
async fn the_oldest_version_is_an_option() {
    let options = TlsOptions { min_version: TlsVersion::Tls13, ..TlsOptions::default() };
    let tls = Tls::new(Live::new(&[], None), ecdsa(&[]).certificate, &options).unwrap();
    let address = serve(tls.acceptor().clone()).await;
    connect(&Arc::new(client(&[&TLS13], None)), address, "shop.example").await.unwrap();
    connect(&Arc::new(client(&[&TLS12], None)), address, "shop.example").await.unwrap_err();
}

/// An endpoint that shows `chain` and signs with `key`, whether or not they
/// belong together.
#[derive(Debug)]
struct Endpoint(Arc<CertifiedKey>);

impl ResolvesServerCert for Endpoint {
    fn resolve(&self, _: ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
        Some(self.0.clone())
    }
}

fn endpoint(
    version: &'static SupportedProtocolVersion,
    chain: &str,
    key: &str,
    alpn: &[&str],
) -> TlsAcceptor {
    let chain = CertificateDer::from_pem_slice(chain.as_bytes()).unwrap();
    let key =
        aws_lc_rs::sign::any_supported_type(&PrivateKeyDer::from_pem_slice(key.as_bytes()).unwrap()).unwrap();
    let mut config = ServerConfig::builder_with_provider(Arc::new(aws_lc_rs::default_provider()))
        .with_protocol_versions(&[version])
        .unwrap()
        .with_no_client_auth()
        .with_cert_resolver(Arc::new(Endpoint(Arc::new(CertifiedKey::new(vec![chain], key)))));
    config.alpn_protocols = alpn.iter().map(|name| name.as_bytes().to_vec()).collect();
    TlsAcceptor::from(Arc::new(config))
}

const RSA_KEY: &str = include_str!("fixtures/rsa.key");
const EC_KEY: &str = include_str!("fixtures/ec-sec1.key");

#[tokio::test]
async fn any_certificate_of_an_endpoint_is_accepted() {
    let cases = [
        (include_str!("fixtures/rsa.crt"), RSA_KEY),
        (include_str!("fixtures/ec-common-name.crt"), EC_KEY),
        (include_str!("fixtures/p384.crt"), include_str!("fixtures/p384.key")),
        (include_str!("fixtures/ed25519.crt"), include_str!("fixtures/ed25519.key")),
        (include_str!("fixtures/version1-rsa.crt"), RSA_KEY),
        (include_str!("fixtures/version1-ec.crt"), EC_KEY),
    ];
    for version in BOTH_VERSIONS {
        for (index, (chain, key)) in cases.into_iter().enumerate() {
            let address = serve(endpoint(version, chain, key, &[])).await;
            let config = client_config(false);
            // By address, as endpoints are dialled.
            let first = connect(&config, address, "127.0.0.1").await;
            assert!(first.is_ok(), "case {index} {version:?}: {first:?}");
            let second = connect(&config, address, "127.0.0.1").await.unwrap();
            assert_eq!(
                second.get_ref().1.handshake_kind(),
                Some(HandshakeKind::Resumed),
                "case {index} {version:?}"
            );
        }
    }
}

#[tokio::test]
async fn an_endpoint_without_the_key_of_its_certificate_is_refused() {
    let same_curve = CertificateParams::default().self_signed(&KeyPair::generate().unwrap()).unwrap().pem();
    let cases = [
        (same_curve.as_str(), EC_KEY),
        (include_str!("fixtures/ec-common-name.crt"), include_str!("fixtures/p384.key")),
        (include_str!("fixtures/p384.crt"), EC_KEY),
        (include_str!("fixtures/rsa.crt"), include_str!("fixtures/ed25519.key")),
        (include_str!("fixtures/rsa-1024.crt"), RSA_KEY),
    ];
    for version in BOTH_VERSIONS {
        for (index, (chain, key)) in cases.into_iter().enumerate() {
            let address = serve(endpoint(version, chain, key, &[])).await;
            let error = connect(&client_config(false), address, "127.0.0.1").await.unwrap_err();
            let refused = matches!(
                error.get_ref().and_then(|error| error.downcast_ref()),
                Some(Error::InvalidCertificate(_) | Error::PeerMisbehaved(_))
            );
            assert!(refused, "case {index} {version:?}: {error}");
        }
    }
}

#[tokio::test]
async fn upstream_alpn_names_one_protocol() {
    let chain = include_str!("fixtures/ec-common-name.crt");
    for (alpn_h2, expected) in [(true, "h2"), (false, "http/1.1")] {
        let address = serve(endpoint(&TLS13, chain, EC_KEY, &["http/1.1", "h2"])).await;
        let stream = connect(&client_config(alpn_h2), address, "127.0.0.1").await.unwrap();
        assert_eq!(stream.get_ref().1.alpn_protocol(), Some(expected.as_bytes()));
    }
}
