use super::*;

/// A hello with these extensions, without headers.
fn body(extensions: &[(u16, Vec<u8>)]) -> Vec<u8> {
    let mut hello = vec![3, 3];
    hello.extend([7; 32]);
    hello.extend([32]);
    hello.extend([9; 32]);
    // GREASE, and one that is known.
    hello.extend([0, 4, 0x0A, 0x0A, 0x13, 0x01]);
    hello.extend([1, 0]);
    let mut list = Vec::new();
    for (kind, value) in extensions {
        list.extend(kind.to_be_bytes());
        list.extend((value.len() as u16).to_be_bytes());
        list.extend(value);
    }
    hello.extend((list.len() as u16).to_be_bytes());
    hello.extend(list);
    hello
}

fn name_list(entries: &[(u8, &[u8])]) -> Vec<u8> {
    let mut list = Vec::new();
    for (kind, name) in entries {
        list.push(*kind);
        list.extend((name.len() as u16).to_be_bytes());
        list.extend(*name);
    }
    let mut value = (list.len() as u16).to_be_bytes().to_vec();
    value.extend(list);
    value
}

fn names(name: &str) -> (u16, Vec<u8>) {
    (SERVER_NAME, name_list(&[(HOST_NAME, name.as_bytes())]))
}

fn message_of(body: &[u8]) -> Vec<u8> {
    let length = (body.len() as u32).to_be_bytes();
    [&[CLIENT_HELLO], &length[1..], body].concat()
}

/// In records of at most `most` bytes.
fn records(message: &[u8], most: usize) -> Vec<u8> {
    let mut bytes = Vec::new();
    for fragment in message.chunks(most) {
        bytes.extend([HANDSHAKE, 3, 1]);
        bytes.extend((fragment.len() as u16).to_be_bytes());
        bytes.extend(fragment);
    }
    bytes
}

fn hello(extensions: &[(u16, Vec<u8>)]) -> Vec<u8> {
    records(&message_of(&body(extensions)), RECORD_BYTES)
}

fn named(name: &str) -> Result<Parsed, Error> {
    Ok(Parsed::Named(Some(name.to_owned())))
}

#[test]
fn names_are_found() {
    let grease = || (0x1A1A, vec![0]);
    // What an outer hello carries beside the public name.
    let ech = || (0xFE0D, vec![0; 200]);
    let long = ["a".repeat(63), "b".repeat(63), "c".repeat(63), "d".repeat(61)].join(".");
    let longer = format!("{long}e");
    let one = |name: &str| vec![names(name)];
    let list = |entries: &[(u8, &[u8])]| vec![(SERVER_NAME, name_list(entries))];
    let cases = [
        (one("shop.example"), named("shop.example")),
        (one("Shop.EXAMPLE."), named("shop.example")),
        (one("xn--shp-sna.example"), named("xn--shp-sna.example")),
        (one("a_b.example"), named("a_b.example")),
        (one("localhost"), named("localhost")),
        (one("192.0.2.1"), named("192.0.2.1")),
        (one(&long), named(&long)),
        (one(&longer), Err(Error::Name)),
        (vec![], Ok(Parsed::Named(None))),
        (vec![grease()], Ok(Parsed::Named(None))),
        (vec![grease(), names("public.example"), ech(), grease()], named("public.example")),
        (vec![ech()], Ok(Parsed::Named(None))),
        (vec![names("a.example"), names("b.example")], Err(Error::Name)),
        (vec![names("a.example"), names("a.example")], Err(Error::Name)),
        (list(&[(0, b"a.example"), (0, b"b.example")]), Err(Error::Name)),
        (list(&[(0, b"a.example"), (1, b"x")]), Err(Error::Name)),
        (list(&[(1, b"a.example")]), Err(Error::Name)),
        (list(&[]), Err(Error::Name)),
        (vec![(SERVER_NAME, vec![])], Err(Error::Name)),
        (vec![(SERVER_NAME, vec![0, 5, 0, 0, 2, b'a', b'b', 0])], Err(Error::Name)),
        (vec![(SERVER_NAME, vec![0, 9, 0, 0, 2, b'a', b'b'])], Err(Error::Name)),
        (one(""), Err(Error::Name)),
        (one("."), Err(Error::Name)),
        (one("a..example"), Err(Error::Name)),
        (one(".example"), Err(Error::Name)),
        (one("a.example.."), Err(Error::Name)),
        (one("*.example"), Err(Error::Name)),
        (one("a.example:443"), Err(Error::Name)),
        (one("a.example\0.evil"), Err(Error::Name)),
        (one("a b"), Err(Error::Name)),
        (one("shöp.example"), Err(Error::Name)),
        (one("::1"), Err(Error::Name)),
        (one(&"a".repeat(64)), Err(Error::Name)),
    ];
    for (extensions, expected) in cases {
        assert_eq!(parse(&hello(&extensions)), expected, "{extensions:?}");
    }
}

#[test]
fn a_hello_without_extensions_has_no_name() {
    let body = body(&[]);
    let old = &body[..body.len() - 2];
    assert_eq!(parse(&records(&message_of(old), RECORD_BYTES)), Ok(Parsed::Named(None)));
}

#[test]
fn what_is_no_hello() {
    let good = message_of(&body(&[names("shop.example")]));
    let with = |at: usize, byte: u8| {
        let mut message = good.clone();
        message[at] = byte;
        records(&message, RECORD_BYTES)
    };
    let session_id = 4 + 34;
    let ciphers = session_id + 33;
    let compression = ciphers + 6;
    let extensions = compression + 2;
    let mut large = message_of(&vec![0; MAX_BYTES + 1]);
    large.truncate(10);
    let largest = records(&message_of(&vec![0; MAX_BYTES]), RECORD_BYTES);
    let cases = [
        ("HTTP", b"GET / HTTP/1.1\r\n\r\n".to_vec(), Error::NotAHello),
        ("an SSL 2 hello", vec![0x80, 0x2E, 1, 3, 1], Error::NotAHello),
        ("another major version", vec![22, 4], Error::NotAHello),
        ("an alert", vec![21, 3, 1, 0, 2, 2, 40], Error::NotAHello),
        ("an empty record", vec![22, 3, 1, 0, 0], Error::NotAHello),
        ("a huge record", vec![22, 3, 1, 0x40, 1], Error::NotAHello),
        ("another message", vec![22, 3, 1, 0, 9, 2], Error::NotAHello),
        (
            "an alert within",
            [records(&good[..20], 20), vec![21, 3, 3, 0, 2, 1, 0]].concat(),
            Error::NotAHello,
        ),
        ("too long", records(&large, RECORD_BYTES), Error::TooLong),
        ("the longest, of nonsense", largest, Error::Malformed),
        ("an empty hello", records(&message_of(&[]), RECORD_BYTES), Error::Malformed),
        ("a long session id", with(session_id, 33), Error::Malformed),
        ("half a cipher", with(ciphers + 1, 3), Error::Malformed),
        ("no cipher", with(ciphers + 1, 0), Error::Malformed),
        ("no compression", with(compression, 0), Error::Malformed),
        ("extensions that end early", with(extensions + 1, 20), Error::Malformed),
        ("extensions that end late", with(extensions + 1, 22), Error::Malformed),
        ("a cut extension", with(extensions + 5, 200), Error::Malformed),
    ];
    for (what, bytes, expected) in cases {
        assert_eq!(parse(&bytes), Err(expected), "{what}");
    }
}

/// However the hello is divided into records, and whatever part of it has arrived.
#[test]
fn hellos_arrive_in_pieces() {
    let padding = (21, vec![0; 1500]);
    let message = message_of(&body(&[padding, names("shop.example")]));
    for most in [1, 2, 3, 5, 100, 517, 1400, RECORD_BYTES] {
        let bytes = records(&message, most);
        assert_eq!(parse(&bytes), named("shop.example"), "{most}");
        for end in (0..bytes.len()).step_by(if most < 100 { 97 } else { 1 }) {
            match parse(&bytes[..end]) {
                Ok(Parsed::Incomplete { missing }) => assert!((1..=bytes.len() - end).contains(&missing)),
                other => panic!("{end} of {most}: {other:?}"),
            }
        }
        let more = [&bytes[..], b"\x14\x03\x03\0\x01\x01 and so on"].concat();
        assert_eq!(parse(&more), named("shop.example"), "{most}, and more");
    }
}

/// rustls writes what it understands by a hello.
#[test]
fn the_hello_of_a_real_client() {
    for (name, expected) in [("shop.example", Some("shop.example")), ("192.0.2.1", None)] {
        let config = crate::tls::client_config(true);
        let name = rustls_pki_types::ServerName::try_from(name).unwrap().to_owned();
        let mut client = rustls::ClientConnection::new(config, name).unwrap();
        let mut bytes = Vec::new();
        while client.wants_write() {
            client.write_tls(&mut bytes).unwrap();
        }
        assert_eq!(parse(&bytes), Ok(Parsed::Named(expected.map(str::to_owned))));
    }
}

#[test]
fn anything_may_come() {
    let message = message_of(&body(&[(0x1A1A, vec![]), names("shop.example"), (43, vec![2, 3, 4])]));
    crate::fuzz::tests::anything_may_come(
        10_000,
        fastrand::Rng::with_seed(3),
        |random| records(&message, random.usize(1..300)),
        parse,
        |parsed| matches!(parsed, Ok(Parsed::Incomplete { .. })),
    );
}
