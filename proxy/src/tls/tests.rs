#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use super::*;
use crate::certificate::KeyAlgorithm;

fn certificate(names: &[&str]) -> Arc<Certificate> {
    Arc::new(Certificate::self_signed(names).unwrap())
}

fn rsa() -> Arc<Certificate> {
    let (chain, key) =
        (include_bytes!("../../tests/fixtures/rsa.crt"), include_bytes!("../../tests/fixtures/rsa.key"));
    Arc::new(Certificate::from_pem(chain, key).unwrap())
}

#[test]
fn the_most_precise_pattern_wins() {
    let [exact, wildcard, any, default] = [(); 4].map(|()| certificate(&[]));
    let entry = |pattern: &str, certificate: &Arc<Certificate>| {
        (HostPattern::new(pattern), Arc::new(vec![certificate.clone()]))
    };
    let mut table = OrdMap::from_iter([
        entry("shop.example", &exact),
        entry("*.shop.example", &wildcard),
        entry("*.example", &any),
    ]);
    table.insert(HostPattern::new("empty.example"), Arc::new(vec![]));

    let cases = [
        (Some("shop.example"), &exact),
        (Some("SHOP.example."), &exact),
        (Some("a.shop.example"), &wildcard),
        (Some("A.Shop.Example."), &wildcard),
        (Some("b.example"), &any),
        (Some("empty.example"), &any),
        (Some("a.b.example"), &default),
        (Some("a.b.shop.example"), &default),
        (Some("example"), &default),
        (Some("other.test"), &default),
        (Some(""), &default),
        (Some("."), &default),
        (None, &default),
    ];
    for (name, expected) in cases {
        assert_eq!(
            certificates_for(&table, Some(&default), name).as_slice(),
            std::slice::from_ref(expected),
            "{name:?}"
        );
    }
    assert!(certificates_for(&table, None, None).is_empty());

    table.insert(HostPattern::any(), Arc::new(vec![any.clone()]));
    for name in [None, Some(""), Some("other.test")] {
        assert_eq!(
            certificates_for(&table, Some(&default), name).as_slice(),
            std::slice::from_ref(&any),
            "{name:?}"
        );
    }
}

#[test]
fn the_cheapest_key_the_client_can_verify_is_preferred() {
    use SignatureScheme as S;
    let (rsa, ecdsa) = (rsa(), certificate(&[]));
    let both = [rsa.clone(), ecdsa.clone()];
    let choose = |schemes: &[S]| preferred(&both, Some(schemes)).unwrap().algorithm();
    assert_eq!(choose(&[S::RSA_PSS_SHA256, S::ECDSA_NISTP256_SHA256]), KeyAlgorithm::Ecdsa);
    assert_eq!(choose(&[S::ECDSA_NISTP256_SHA256]), KeyAlgorithm::Ecdsa);
    assert_eq!(choose(&[S::RSA_PSS_SHA256]), KeyAlgorithm::Rsa);
    assert_eq!(choose(&[S::ECDSA_NISTP384_SHA384, S::RSA_PKCS1_SHA256]), KeyAlgorithm::Rsa);
    assert_eq!(choose(&[S::ED25519]), KeyAlgorithm::Ecdsa, "none can: the handshake fails and says so");
    assert_eq!(preferred(&both, None).unwrap().algorithm(), KeyAlgorithm::Ecdsa);
    assert_eq!(preferred(&[], None), None);
}

#[test]
fn a_connection_may_be_shared_among_the_hosts_of_its_certificate() {
    let certificate = certificate(&["a.example", "*.shared.example", "192.0.2.1"]);
    let cases = [
        (None, "anything.example", false),
        (Some("a.example"), "a.example", false),
        (Some("a.example"), "A.EXAMPLE.", false),
        (Some("unknown.example"), "unknown.example", false),
        (Some("a.example"), "b.shared.example", false),
        (Some("a.example"), "192.0.2.1", false),
        (Some("a.example"), "b.example", true),
        (Some("a.example"), "c.b.shared.example", true),
        (Some("a.example"), "", true),
        (Some("a.example"), "192.0.2.2", true),
    ];
    for (server_name, host, misdirected) in cases {
        assert_eq!(
            is_misdirected(server_name, Some(&certificate), host),
            misdirected,
            "{server_name:?} {host:?}"
        );
    }
    assert!(!is_misdirected(Some("a.example"), None, "a.example"));
    assert!(is_misdirected(Some("a.example"), None, "b.shared.example"));
}

#[test]
fn post_quantum_key_exchange_comes_first() {
    let names: Vec<_> = provider().kx_groups.iter().map(|group| group.name()).collect();
    assert_eq!(names.first(), Some(&rustls::NamedGroup::X25519MLKEM768), "{names:?}");
    assert!(names.contains(&rustls::NamedGroup::X25519), "for clients without it");
}
