use super::*;

fn proxied(source: &str, destination: &str) -> Origin {
    Origin::Proxied { source: source.parse().unwrap(), destination: destination.parse().unwrap() }
}

/// A header of version 2 with these extensions behind its addresses.
fn v2(command: u8, family: u8, block: &[u8]) -> Vec<u8> {
    let mut header = SIGNATURE.to_vec();
    header.extend([command, family]);
    header.extend((block.len() as u16).to_be_bytes());
    header.extend(block);
    header
}

const BLOCK4: [u8; 12] = [192, 0, 2, 1, 198, 51, 100, 2, 0x12, 0x67, 0x01, 0xBB];

fn with_extension(kind: u8, value: &[u8]) -> Vec<u8> {
    let mut block = BLOCK4.to_vec();
    block.push(kind);
    block.extend((value.len() as u16).to_be_bytes());
    block.extend(value);
    block
}

/// The same with a checksum behind it all.
fn summed(block: &[u8]) -> Vec<u8> {
    let mut block = block.to_vec();
    block.extend([TYPE_CRC32C, 0, 4, 0, 0, 0, 0]);
    let mut header = v2(0x21, TCP4, &block);
    let sum = crc32c(&[&header]);
    let at = header.len() - 4;
    header[at..].copy_from_slice(&sum.to_be_bytes());
    header
}

#[test]
fn lines() {
    let client = proxied("192.0.2.1:4711", "198.51.100.2:443");
    let longest = "PROXY TCP6 ffff:ffff:ffff:ffff:ffff:ffff:ffff:ffff ffff:ffff:ffff:ffff:ffff:ffff:ffff:ffff 65535 65535\r\n";
    let full = format!("PROXY UNKNOWN {}\r\n", "x".repeat(107 - 16));
    let over = format!("PROXY UNKNOWN {}\r\n", "x".repeat(108 - 16));
    let cases: &[(&str, Result<Origin, Error>)] = &[
        ("PROXY TCP4 192.0.2.1 198.51.100.2 4711 443\r\n", Ok(client)),
        ("PROXY TCP4 192.0.2.1 198.51.100.2 0 65535\r\n", Ok(proxied("192.0.2.1:0", "198.51.100.2:65535"))),
        ("PROXY TCP6 2001:DB8::1 ::1 1 2\r\n", Ok(proxied("[2001:db8::1]:1", "[::1]:2"))),
        (
            longest,
            Ok(proxied(
                "[ffff:ffff:ffff:ffff:ffff:ffff:ffff:ffff]:65535",
                "[ffff:ffff:ffff:ffff:ffff:ffff:ffff:ffff]:65535",
            )),
        ),
        ("PROXY UNKNOWN\r\n", Ok(Origin::Local)),
        ("PROXY UNKNOWN ffff::1 whatever it is\r\n", Ok(Origin::Local)),
        (&full, Ok(Origin::Local)),
        (&over, Err(Error::TooLong)),
        ("PROXY UNKNOWNX\r\n", Err(Error::Line)),
        ("PROXY\r\n", Err(Error::NotAHeader)),
        ("PROXY \r\n", Err(Error::Line)),
        ("proxy TCP4 192.0.2.1 198.51.100.2 4711 443\r\n", Err(Error::NotAHeader)),
        ("PROXY  TCP4 192.0.2.1 198.51.100.2 4711 443\r\n", Err(Error::Line)),
        ("PROXY TCP4  192.0.2.1 198.51.100.2 4711 443\r\n", Err(Error::Line)),
        ("PROXY TCP4 192.0.2.1 198.51.100.2 4711 443 \r\n", Err(Error::Line)),
        ("PROXY TCP4 192.0.2.1 198.51.100.2 4711 443 9\r\n", Err(Error::Line)),
        ("PROXY TCP4 192.0.2.1 198.51.100.2 4711\r\n", Err(Error::Line)),
        ("PROXY TCP4\t192.0.2.1 198.51.100.2 4711 443\r\n", Err(Error::Line)),
        ("PROXY TCP5 192.0.2.1 198.51.100.2 4711 443\r\n", Err(Error::Line)),
        ("PROXY UDP4 192.0.2.1 198.51.100.2 4711 443\r\n", Err(Error::Line)),
        ("PROXY TCP4 2001:db8::1 198.51.100.2 4711 443\r\n", Err(Error::Line)),
        ("PROXY TCP6 192.0.2.1 198.51.100.2 4711 443\r\n", Err(Error::Line)),
        ("PROXY TCP4 192.0.2.256 198.51.100.2 4711 443\r\n", Err(Error::Line)),
        ("PROXY TCP4 192.0.02.1 198.51.100.2 4711 443\r\n", Err(Error::Line)),
        ("PROXY TCP4 192.0.2 198.51.100.2 4711 443\r\n", Err(Error::Line)),
        ("PROXY TCP6 fe80::1%eth0 ::1 4711 443\r\n", Err(Error::Line)),
        ("PROXY TCP4 192.0.2.1 198.51.100.2 65536 443\r\n", Err(Error::Line)),
        ("PROXY TCP4 192.0.2.1 198.51.100.2 04711 443\r\n", Err(Error::Line)),
        ("PROXY TCP4 192.0.2.1 198.51.100.2 00 443\r\n", Err(Error::Line)),
        ("PROXY TCP4 192.0.2.1 198.51.100.2 +1 443\r\n", Err(Error::Line)),
        ("PROXY TCP4 192.0.2.1 198.51.100.2 -1 443\r\n", Err(Error::Line)),
        ("PROXY TCP4 192.0.2.1 198.51.100.2  443\r\n", Err(Error::Line)),
        ("PROXY TCP4 192.0.2.1 198.51.100.2 4711 443\n", Err(Error::Line)),
        ("PROXY TCP4 192.0.2.1 198.51.100.2 4711 443\rX", Err(Error::Line)),
        ("PROXY TCP4 192.0.2.1 198.51.100.2 4711 443\r\r\n", Err(Error::Line)),
        ("PROXY TCP4 192.0.2.1 198.51.100.2 4711 443\0\r\n", Err(Error::Line)),
        ("GET / HTTP/1.1\r\n", Err(Error::NotAHeader)),
        ("\r\n\r\nPROXY UNKNOWN\r\n", Err(Error::NotAHeader)),
        ("\u{16}\u{3}\u{1}", Err(Error::NotAHeader)),
    ];
    for (text, expected) in cases {
        let expected = expected.map(|origin| Parsed::Header { length: text.len(), origin });
        assert_eq!(parse(text.as_bytes()), expected, "{text:?}");
    }
    assert_eq!(longest.len(), 104, "the specification's 107 count UNKNOWN with everything behind it");
}

#[test]
fn blocks() {
    let client = Ok(proxied("192.0.2.1:4711", "198.51.100.2:443"));
    let mut block6 = Vec::new();
    block6.extend("2001:db8::1".parse::<Ipv6Addr>().unwrap().octets());
    block6.extend(Ipv6Addr::LOCALHOST.octets());
    block6.extend([0, 1, 0, 2]);
    let client6 = Ok(proxied("[2001:db8::1]:1", "[::1]:2"));
    let mut damaged = summed(&BLOCK4);
    damaged[16] ^= 1;
    let mut twice = with_extension(TYPE_CRC32C, &[0; 4]);
    twice.extend([TYPE_CRC32C, 0, 4, 0, 0, 0, 0]);
    let cut = |block: Vec<u8>, by: usize| block[..block.len() - by].to_vec();
    let cases = [
        ("TCP over IPv4", v2(0x21, TCP4, &BLOCK4), client),
        ("UDP over IPv4", v2(0x21, UDP4, &BLOCK4), client),
        ("TCP over IPv6", v2(0x21, TCP6, &block6), client6),
        ("UDP over IPv6", v2(0x21, UDP6, &block6), client6),
        ("UNIX", v2(0x21, UNIX_STREAM, &[b'x'; 216]), Ok(Origin::Local)),
        ("LOCAL", v2(0x20, UNSPEC, &[]), Ok(Origin::Local)),
        ("LOCAL with addresses", v2(0x20, TCP4, &BLOCK4), Ok(Origin::Local)),
        ("LOCAL with anything", v2(0x20, TCP4, b"x"), Ok(Origin::Local)),
        ("PROXY, unspecified", v2(0x21, UNSPEC, b"whatever"), Ok(Origin::Local)),
        ("an extension", v2(0x21, TCP4, &with_extension(0x02, b"shop.example")), client),
        ("an empty extension", v2(0x21, TCP4, &with_extension(0x04, b"")), client),
        ("a checksum", summed(&BLOCK4), client),
        ("a checksum behind an extension", summed(&with_extension(0xE0, b"x")), client),
        ("a wrong checksum", v2(0x21, TCP4, &with_extension(TYPE_CRC32C, &[0; 4])), Err(Error::Checksum)),
        ("a damaged address", damaged, Err(Error::Checksum)),
        ("a short checksum", v2(0x21, TCP4, &with_extension(TYPE_CRC32C, &[0; 3])), Err(Error::Extension)),
        ("two checksums", v2(0x21, TCP4, &twice), Err(Error::Checksum)),
        ("a cut extension", v2(0x21, TCP4, &cut(with_extension(2, b"abc"), 1)), Err(Error::Extension)),
        ("half an extension", v2(0x21, TCP4, &cut(with_extension(2, b""), 1)), Err(Error::Extension)),
        ("no room for IPv4", v2(0x21, TCP4, &BLOCK4[..11]), Err(Error::Addresses)),
        ("no room for IPv6", v2(0x21, TCP6, &block6[..35]), Err(Error::Addresses)),
        ("no room for UNIX", v2(0x21, UNIX_DATAGRAM, &[0; 215]), Err(Error::Addresses)),
        ("the largest", v2(0x20, UNSPEC, &[0; MAX_BYTES - FIXED]), Ok(Origin::Local)),
        ("larger", v2(0x20, UNSPEC, &[0; MAX_BYTES - FIXED + 1]), Err(Error::TooLong)),
        ("version 1 in binary", v2(0x11, TCP4, &BLOCK4), Err(Error::Unknown)),
        ("version 3", v2(0x31, TCP4, &BLOCK4), Err(Error::Unknown)),
        ("an unknown command", v2(0x22, TCP4, &BLOCK4), Err(Error::Unknown)),
        ("an unknown family", v2(0x21, 0x41, &BLOCK4), Err(Error::Unknown)),
        ("an unknown transport", v2(0x21, 0x13, &BLOCK4), Err(Error::Unknown)),
        ("IPv4 without transport", v2(0x21, 0x10, &BLOCK4), Err(Error::Unknown)),
    ];
    for (name, header, expected) in cases {
        let expected = expected.map(|origin| Parsed::Header { length: header.len(), origin });
        assert_eq!(parse(&header), expected, "{name}");
    }
}

/// Any number of bytes of a header is the beginning of one, and what follows it belongs to others.
#[test]
fn headers_arrive_in_pieces() {
    let mut v1 = Vec::new();
    let (source, destination) = ("192.0.2.1:4711".parse().unwrap(), "[::1]:443".parse().unwrap());
    write_header(Version::V1, source, destination, &mut v1);
    for header in [v1, summed(&with_extension(2, b"shop")), v2(0x20, UNSPEC, &[7; 300])] {
        for end in 0..header.len() {
            assert_eq!(parse(&header[..end]), Ok(Parsed::Incomplete), "{end} of {header:?}");
        }
        let whole = parse(&header);
        let mut more = header.clone();
        more.extend(b"\r\n\0GET");
        assert_eq!(parse(&more), whole);
        assert!(matches!(whole, Ok(Parsed::Header { length, .. }) if length == header.len()));
    }
}

#[test]
fn what_is_written_is_read() {
    let mut random = fastrand::Rng::with_seed(1);
    for _ in 0..10_000 {
        let mut address = || -> SocketAddr {
            let ip: IpAddr = match random.u8(..4) {
                0 => Ipv6Addr::from_bits(random.u128(..)).into(),
                1 => Ipv6Addr::from_bits(random.u128(..1 << 20)).into(),
                2 => Ipv4Addr::from_bits(random.u32(..)).to_ipv6_mapped().into(),
                _ => Ipv4Addr::from_bits(random.u32(..)).into(),
            };
            SocketAddr::new(ip, random.u16(..))
        };
        let (source, destination) = (address(), address());
        for version in [Version::V1, Version::V2] {
            let mut header = Vec::new();
            write_header(version, source, destination, &mut header);
            let canonical = |a: SocketAddr| SocketAddr::new(a.ip().to_canonical(), a.port());
            match parse(&header) {
                Ok(Parsed::Header { length, origin: Origin::Proxied { source: s, destination: d } }) => {
                    assert_eq!(length, header.len());
                    assert_eq!((canonical(s), canonical(d)), (canonical(source), canonical(destination)));
                }
                other => panic!("{source} {destination} {version:?}: {other:?}"),
            }
        }
    }
    for version in [Version::V1, Version::V2] {
        let mut header = Vec::new();
        write_local(version, &mut header);
        assert_eq!(parse(&header), Ok(Parsed::Header { length: header.len(), origin: Origin::Local }));
    }
}

#[test]
fn anything_may_come() {
    let seeds = [
        b"PROXY TCP4 192.0.2.1 198.51.100.2 4711 443\r\nGET /".to_vec(),
        b"PROXY UNKNOWN\r\n".to_vec(),
        summed(&with_extension(2, b"shop")),
        v2(0x21, UNIX_STREAM, &[0; 230]),
    ];
    crate::fuzz::tests::anything_may_come(
        20_000,
        fastrand::Rng::with_seed(2),
        |random| seeds[random.usize(..seeds.len())].clone(),
        parse,
        |parsed| matches!(parsed, Ok(Parsed::Incomplete)),
    );
}

#[test]
fn crc32c_as_rfc_3720_gives_it() {
    let ascending: Vec<u8> = (0..32).collect();
    for (bytes, sum) in [(vec![0; 32], 0x8A91_36AA), (vec![0xFF; 32], 0x62A8_AB43), (ascending, 0x46DD_794E)]
    {
        assert_eq!(crc32c(&[&bytes]), sum);
        assert_eq!(crc32c(&[&bytes[..7], &bytes[7..]]), sum);
    }
}
