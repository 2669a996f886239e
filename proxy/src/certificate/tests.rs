#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use super::*;

macro_rules! fixture {
    ($name:literal) => {
        include_bytes!(concat!("../../tests/fixtures/", $name))
    };
}

// Pairs as openssl writes them; see the first line of each file.
const RSA: &[u8] = fixture!("rsa.crt");
const RSA_KEY: &[u8] = fixture!("rsa.key");
const RSA_PKCS1_KEY: &[u8] = fixture!("rsa-pkcs1.key");
const EC: &[u8] = fixture!("ec-common-name.crt");
const EC_SEC1_KEY: &[u8] = fixture!("ec-sec1.key");
const P384: &[u8] = fixture!("p384.crt");
const P384_KEY: &[u8] = fixture!("p384.key");
const ED25519: &[u8] = fixture!("ed25519.crt");
const ED25519_KEY: &[u8] = fixture!("ed25519.key");
const VERSION1: &[u8] = fixture!("version1-rsa.crt");

/// `openssl x509 -in rsa.crt -noout -fingerprint -sha256`
const RSA_FINGERPRINT: &str = "f86143159a8c2b8417b29e5f47c6a38e573b6149ebc47518e436b709f951df18";

fn read(chain: &[u8], key: &[u8]) -> Certificate {
    Certificate::from_pem(chain, key).unwrap()
}

#[test]
fn every_usual_encoding_of_a_pair_is_read() {
    let cases: [(&str, &[u8], &[u8], KeyAlgorithm, &[&str]); 7] = [
        ("RSA, PKCS#8", RSA, RSA_KEY, KeyAlgorithm::Rsa, &["rsa.example", "*.wild.example"]),
        ("RSA, PKCS#1", RSA, RSA_PKCS1_KEY, KeyAlgorithm::Rsa, &["rsa.example", "*.wild.example"]),
        ("P-256, SEC1 behind EC PARAMETERS", EC, EC_SEC1_KEY, KeyAlgorithm::Ecdsa, &["ec.example"]),
        ("P-384, SEC1", P384, P384_KEY, KeyAlgorithm::Ecdsa, &["p384.example"]),
        ("Ed25519", ED25519, ED25519_KEY, KeyAlgorithm::Ed25519, &["ed.example"]),
        ("X.509 version 1", VERSION1, RSA_KEY, KeyAlgorithm::Rsa, &["v1.example"]),
        (
            "a key behind its certificate",
            EC,
            &[EC, EC_SEC1_KEY].concat(),
            KeyAlgorithm::Ecdsa,
            &["ec.example"],
        ),
    ];
    for (what, chain, key, algorithm, names) in cases {
        let certificate = read(chain, key);
        assert_eq!(certificate.algorithm(), algorithm, "{what}");
        assert_eq!(certificate.names().iter().map(|name| &**name).collect::<Vec<_>>(), names, "{what}");
        assert_eq!(certificate.signing().cert.len(), 1, "{what}");
    }
}

#[test]
fn line_ends_and_text_around_the_blocks_do_not_matter() {
    let crlf = |pem: &[u8]| String::from_utf8(pem.to_vec()).unwrap().replace('\n', "\r\n").into_bytes();
    assert_eq!(read(&crlf(RSA), &crlf(RSA_KEY)), read(RSA, RSA_KEY));
    let bundle = [b"subject=CN = x\n\n".as_slice(), RSA_KEY, RSA].concat();
    assert_eq!(read(&bundle, &bundle), read(RSA, RSA_KEY));
}

#[test]
fn fingerprint_and_validity_are_what_openssl_says() {
    let certificate = read(RSA, RSA_KEY);
    assert_eq!(certificate.fingerprint(), RSA_FINGERPRINT);
    // 2026-11-21 14:04:29 and 2126-10-28 14:04:29, UTC.
    assert_eq!((certificate.not_before(), certificate.not_after()), (1_795_269_869, 4_948_869_869));
}

#[test]
fn equality_is_the_whole_chain() {
    let alone = read(RSA, RSA_KEY);
    let with_intermediate = read(&[RSA, EC].concat(), RSA_KEY);
    assert_eq!(alone, read(RSA, RSA_PKCS1_KEY), "one key in two encodings");
    assert_eq!(alone.fingerprint(), with_intermediate.fingerprint());
    assert_ne!(alone, with_intermediate, "clients are sent something else");
    assert_ne!(read(&[RSA, EC, P384].concat(), RSA_KEY), read(&[RSA, P384, EC].concat(), RSA_KEY));
    assert_ne!(alone.cmp(&with_intermediate), Ordering::Equal);
}

#[test]
fn what_is_wrong_is_said() {
    use CertificateError as E;
    let broken = |what, reason| E::BrokenPem { what, reason };
    let cut = |pem: &'static [u8]| &pem[..pem.len() - 40];
    let no_base64 = b"-----BEGIN CERTIFICATE-----\n???\n-----END CERTIFICATE-----\n";
    let no_key = b"-----BEGIN PRIVATE KEY-----\nAAAA\n-----END PRIVATE KEY-----\n";
    let not_a_certificate =
        String::from_utf8(RSA_KEY.to_vec()).unwrap().replace("PRIVATE KEY", "CERTIFICATE");
    let no_end = "a block has no END line; it is cut short, or its line breaks are lost";
    let dashes = "a BEGIN line does not end with five dashes";
    let no_dashes = String::from_utf8(RSA_KEY.to_vec()).unwrap().replace("KEY-----", "KEY");
    let one_line = String::from_utf8(EC_SEC1_KEY.to_vec()).unwrap().replace('\n', "");
    let one_line = &one_line[one_line.find("-----BEGIN").unwrap()..];
    let cases: [(&str, &[u8], &[u8], CertificateError); 17] = [
        ("nothing", b"", b"", E::NoCertificate),
        ("no key", RSA, b"", E::NoKey),
        ("DER instead of PEM", &[0x30, 0x03, 0x02, 0x01, 0x01], RSA_KEY, E::NoCertificate),
        ("swapped", RSA_KEY, RSA, E::NoCertificate),
        ("key without text", RSA, b"secret", E::NoKey),
        ("cut chain", cut(RSA), RSA_KEY, broken("certificate chain", no_end)),
        ("cut key", RSA, cut(RSA_KEY), broken("private key", no_end)),
        ("chain is not base64", no_base64, RSA_KEY, broken("certificate chain", "a block is not base64")),
        ("key on one line", RSA, one_line.as_bytes(), broken("private key", no_end)),
        ("key without its dashes", RSA, no_dashes.as_bytes(), broken("private key", dashes)),
        ("encrypted PKCS#8", EC, fixture!("ec-encrypted.key"), E::EncryptedKey),
        ("encrypted SEC1", EC, fixture!("ec-encrypted-sec1.key"), E::EncryptedKey),
        ("key is not DER", RSA, no_key, E::MalformedKey),
        ("small RSA", fixture!("rsa-1024.crt"), fixture!("rsa-1024.key"), E::UnsupportedKey),
        ("another's key", RSA, EC_SEC1_KEY, E::KeyMismatch),
        ("intermediate first", &[EC, RSA].concat(), RSA_KEY, E::KeyMismatch),
        ("endless chain", &RSA.repeat(100), RSA_KEY, E::ChainTooLong),
    ];
    for (what, chain, key, expected) in cases {
        assert_eq!(Certificate::from_pem(chain, key).unwrap_err(), expected, "{what}");
    }
    for (chain, at) in [(not_a_certificate.into_bytes(), 1), ([RSA, not_a_sequence()].concat(), 2)] {
        match Certificate::from_pem(&chain, RSA_KEY).unwrap_err() {
            E::MalformedCertificate { position, .. } => assert_eq!(position, at),
            other => panic!("certificate {at}: {other}"),
        }
    }
}

/// A sound PEM block that is no sequence.
fn not_a_sequence() -> &'static [u8] {
    b"-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n"
}

#[test]
fn a_private_key_never_appears() {
    let certificate = read(RSA, RSA_KEY);
    let json = serde_json::to_value(&certificate).unwrap();
    let expected = serde_json::json!({
        "fingerprint": RSA_FINGERPRINT,
        "names": ["rsa.example", "*.wild.example"],
        "algorithm": "rsa",
        "not_after": certificate.not_after(),
    });
    assert_eq!(json, expected);
    let shown = format!("{certificate:?}");
    assert_eq!(
        shown,
        format!(
            "Certificate {{ fingerprint: {RSA_FINGERPRINT:?}, names: [\"rsa.example\", \"*.wild.example\"], \
             algorithm: Rsa, not_after: {}, .. }}",
            certificate.not_after()
        )
    );
}

#[test]
fn an_error_never_quotes_a_key() {
    let text = String::from_utf8(RSA_KEY.to_vec()).unwrap();
    let base64: Vec<&str> = text.lines().filter(|line| line.len() == 64).collect();
    assert!(base64.len() > 10);
    let ways_to_break_it = [
        text.replace('\n', ""),
        text.replace("END", "FIN"),
        text.replace('M', "!"),
        text.replace("KEY-----", "KEY"),
    ];
    for broken in &ways_to_break_it {
        // As the key, and as the chain by mistake.
        for (chain, key) in [(RSA, broken.as_bytes()), (broken.as_bytes(), RSA_KEY)] {
            let Err(error) = Certificate::from_pem(chain, key) else { continue };
            let shown = format!("{error} {error:?}");
            assert!(base64.iter().all(|line| !shown.contains(line)), "{shown}");
        }
    }
}

#[test]
fn covers_what_a_client_accepts() {
    let rsa = read(RSA, RSA_KEY);
    let common_name = read(EC, EC_SEC1_KEY);
    let cases = [
        (&rsa, "rsa.example", true),
        (&rsa, "RSA.Example.", true),
        (&rsa, "a.wild.example", true),
        (&rsa, "A.WILD.EXAMPLE", true),
        (&rsa, "wild.example", false),
        (&rsa, ".wild.example", false),
        (&rsa, "a.b.wild.example", false),
        (&rsa, "awild.example", false),
        (&rsa, "xrsa.example", false),
        (&rsa, "rsa.example..", false),
        (&rsa, "", false),
        (&rsa, ".", false),
        (&rsa, "192.0.2.7", true),
        (&rsa, "192.0.2.8", false),
        (&rsa, "2001:db8::7", true),
        (&rsa, "[2001:DB8:0::7]", true),
        (&rsa, "[2001:db8::8]", false),
        (&common_name, "ec.example", true),
        (&common_name, "rsa.example", false),
    ];
    for (certificate, host, covered) in cases {
        assert_eq!(certificate.covers(host), covered, "{host:?}");
    }
}

#[test]
fn names_that_no_client_can_ask_for_are_left_out() {
    let cases = [
        ("Shop.example.", Some("shop.example")),
        ("*.Shop_1.example", Some("*.shop_1.example")),
        ("localhost", Some("localhost")),
        ("", None),
        ("*", None),
        ("*.", None),
        ("*.*.example", None),
        ("w*.example", None),
        ("a..example", None),
        ("a.example..", None),
        (".example", None),
        ("192.0.2.1", None),
        ("a\0.example", None),
        ("a.example\n", None),
        ("bücher.example", None),
        ("Lockgate default certificate", None),
    ];
    for (name, expected) in cases {
        assert_eq!(dns_name(name).as_deref(), expected, "{name:?}");
    }
}

#[test]
fn a_self_signed_certificate_is_valid_now_and_for_its_names() {
    let certificate = Certificate::self_signed(&["Shop.example", "*.shop.example", "127.0.0.1"]).unwrap();
    assert_eq!(certificate.algorithm(), KeyAlgorithm::Ecdsa);
    for host in ["shop.example", "a.shop.example", "127.0.0.1"] {
        assert!(certificate.covers(host), "{host}");
    }
    let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap().as_secs() as i64;
    assert!(certificate.not_before() < now && now < certificate.not_after());
    assert_ne!(certificate, Certificate::self_signed(&["shop.example"]).unwrap(), "a key of its own each");
    let (_, leaf) = X509Certificate::from_der(&certificate.signing().cert[0]).unwrap();
    assert_eq!(leaf.subject().to_string(), "CN=Lockgate default certificate");
}

#[test]
fn a_self_signed_certificate_without_names_covers_nothing() {
    let certificate = Certificate::self_signed(&[]).unwrap();
    assert!(certificate.names().is_empty(), "its common name is a sentence");
    assert!(!certificate.covers("shop.example") && !certificate.covers(""));
    assert!(matches!(Certificate::self_signed(&["bücher.example"]), Err(CertificateError::SelfSigned(_))));
}

#[test]
fn no_bytes_make_it_panic() {
    let pairs: [(&[u8], &[u8]); 5] = [
        (RSA, RSA_KEY),
        (EC, EC_SEC1_KEY),
        (ED25519, ED25519_KEY),
        (VERSION1, RSA_PKCS1_KEY),
        (P384, P384_KEY),
    ];
    let mut random = fastrand::Rng::with_seed(0x10c6_a7e0);
    fuzz_certificate(b"");
    for (chain, key) in pairs {
        let pem = [chain, b"\0", key].concat();
        fuzz_certificate(&pem);
        let der = CertificateDer::from_pem_slice(chain).unwrap();
        for original in [pem.as_slice(), &der] {
            for _ in 0..400 {
                fuzz_certificate(&mutate(original, &mut random));
            }
        }
        // Damage behind sound PEM, for both parsers at once.
        for _ in 0..400 {
            let leaf = CertificateDer::from(mutate(&der, &mut random));
            let secret = PrivateKeyDer::from_pem_slice(key).unwrap();
            let secret = match secret.clone_key() {
                PrivateKeyDer::Pkcs8(_) => {
                    PrivateKeyDer::Pkcs8(mutate(secret.secret_der(), &mut random).into())
                }
                PrivateKeyDer::Sec1(_) => {
                    PrivateKeyDer::Sec1(mutate(secret.secret_der(), &mut random).into())
                }
                _ => PrivateKeyDer::Pkcs1(mutate(secret.secret_der(), &mut random).into()),
            };
            let _ = Certificate::from_der(vec![leaf], &secret);
        }
    }
}

/// One to four of: a byte flipped, a byte repeated, a byte lost, the end cut off.
fn mutate(original: &[u8], random: &mut fastrand::Rng) -> Vec<u8> {
    let mut bytes = original.to_vec();
    for _ in 0..random.u8(1..=4) {
        let at = random.usize(0..bytes.len().max(1));
        match random.u8(0..8) {
            0 => bytes.truncate(at),
            1 if at < bytes.len() => bytes.insert(at, bytes[at]),
            2 if at < bytes.len() => drop(bytes.remove(at)),
            _ if at < bytes.len() => bytes[at] = random.u8(..),
            _ => {}
        }
    }
    bytes
}
