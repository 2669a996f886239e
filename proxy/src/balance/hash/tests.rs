use std::collections::BTreeMap;
use std::net::SocketAddr;

use super::*;
use crate::endpoint::Endpoints;
use crate::table::UpstreamProtocol;
use crate::view::tests::Lines;

fn endpoints(addresses: &[(SocketAddr, u16)]) -> Vec<CompiledEndpoint> {
    let registry = Endpoints::default();
    let compiled = addresses.iter().map(|(address, weight)| CompiledEndpoint {
        live: registry.get(*address, UpstreamProtocol::Http1),
        weight: *weight,
        zone: None,
    });
    compiled.collect()
}

fn numbered(count: u16) -> Vec<(SocketAddr, u16)> {
    (0..count).map(|n| (([10, 0, (n >> 8) as u8, n as u8], 8080).into(), 1)).collect()
}

fn ring(addresses: &[(SocketAddr, u16)]) -> Ring {
    Ring::new(&endpoints(addresses)).unwrap()
}

fn key(number: usize) -> Vec<u8> {
    format!("/page/{number}").into_bytes()
}

/// As nginx's documentation of `hash ... consistent` has it: the points of a
/// server are CRC-32 of address, a zero byte, port, and the point before.
fn naive(addresses: &[(SocketAddr, u16)], key: &[u8]) -> SocketAddr {
    let crc = |bytes: &[u8]| {
        !bytes.iter().fold(u32::MAX, |crc, byte| {
            (0..8).fold(crc ^ u32::from(*byte), |crc, _| crc >> 1 ^ (0xEDB8_8320 & (crc & 1).wrapping_neg()))
        })
    };
    let mut points = BTreeMap::new();
    for (address, weight) in addresses {
        let mut before = 0_u32;
        for _ in 0..u32::from(*weight) * 160 {
            let mut text = format!("{}\0{}", address.ip(), address.port()).into_bytes();
            text.extend_from_slice(&before.to_le_bytes());
            before = crc(&text);
            points.entry(before).or_insert(*address);
        }
    }
    *points.range(crc(key)..).next().or_else(|| points.iter().next()).unwrap().1
}

#[test]
fn the_ring_is_that_of_nginx() {
    let mixed = [
        ("10.0.0.1:80".parse().unwrap(), 1),
        ("10.0.0.2:8080".parse().unwrap(), 2),
        ("[fd00::1]:80".parse().unwrap(), 3),
    ];
    for addresses in [&mixed[..], &numbered(7)] {
        let ring = ring(addresses);
        for number in 0..500 {
            let found = addresses[usize::from(ring.endpoint(ring.position(&key(number))))].0;
            assert_eq!(found, naive(addresses, &key(number)));
        }
    }
}

#[test]
fn one_endpoint_more_takes_its_share_and_moves_nothing_else() {
    const KEYS: usize = 10_000;
    for count in [2_u16, 9, 50] {
        let (before, after) = (numbered(count), numbered(count + 1));
        let (old, new) = (ring(&before), ring(&after));
        let mut moved = 0;
        for number in 0..KEYS {
            let was = before[usize::from(old.endpoint(old.position(&key(number))))].0;
            let is = after[usize::from(new.endpoint(new.position(&key(number))))].0;
            if was != is {
                assert_eq!(is, after[usize::from(count)].0, "moved between endpoints that stayed");
                moved += 1;
            }
        }
        let fair = KEYS / usize::from(count + 1);
        assert!((fair / 2..=fair * 2).contains(&moved), "{moved} of {KEYS} moved, fair would be {fair}");
    }
}

/// The order of endpoints, and thus their numbers, says nothing.
#[test]
fn rings_of_the_same_endpoints_agree() {
    let mut addresses = numbered(20);
    let one = ring(&addresses);
    let expected: Vec<_> =
        (0..500).map(|n| addresses[usize::from(one.endpoint(one.position(&key(n))))].0).collect();
    fastrand::Rng::with_seed(1).shuffle(&mut addresses);
    let other = ring(&addresses);
    let found: Vec<_> =
        (0..500).map(|n| addresses[usize::from(other.endpoint(other.position(&key(n))))].0).collect();
    assert_eq!(found, expected);
}

#[test]
fn weights_are_reduced_and_an_empty_pool_has_no_ring() {
    assert!(Ring::new(&[]).is_none());
    let mut addresses = numbered(3);
    addresses[0].1 = u16::MAX;
    let heavy = ring(&addresses);
    assert!(heavy.points.len() <= 160 * 3 * UNITS as usize, "{}", heavy.points.len());
    let taken = (0..1_000).filter(|n| heavy.endpoint(heavy.position(&key(*n))) == 0).count();
    assert!(taken > 900, "{taken}");
}

#[test]
fn what_may_not_be_taken_gives_its_keys_to_the_next_on_the_ring() {
    let addresses = numbered(10);
    let whole = ring(&addresses);
    // The same as if it were not there at all.
    let without: Vec<_> =
        addresses.iter().copied().filter(|(address, _)| *address != addresses[3].0).collect();
    for number in 0..1_000 {
        let found = whole.find(whole.position(&key(number)), 1, 0, |index| index != 3).unwrap();
        assert_eq!(addresses[usize::from(found)].0, naive(&without, &key(number)));
        assert_eq!(whole.find(whole.position(&key(number)), 1, 0, |_| false), None);
    }
}

#[test]
fn a_subset_is_the_next_endpoints_and_each_of_them_is_used() {
    let addresses = numbered(10);
    let ring = ring(&addresses);
    for number in 0..100 {
        let position = ring.position(&key(number));
        let mut used: Vec<u16> =
            (0..30).map(|random| ring.find(position, 3, random, |_| true).unwrap()).collect();
        used.sort_unstable();
        used.dedup();
        assert_eq!(used.len(), 3);
        assert!(used.contains(&ring.endpoint(position)));
        // One gone: the others share its requests; all gone: the next beyond.
        let left = ring.find(position, 3, 7, |index| index != used[0]).unwrap();
        assert!(used[1..].contains(&left));
        let beyond = ring.find(position, 3, 7, |index| !used.contains(&index)).unwrap();
        assert!(!used.contains(&beyond));
    }
    // As many as there are, however many are asked for.
    let all: std::collections::BTreeSet<u16> =
        (0..50).filter_map(|random| ring.find(5, u16::MAX, random, |_| true)).collect();
    assert_eq!(all.len(), 10);
}

#[test]
fn keys_are_what_the_request_has() {
    use Variable::{
        Arg, Args, BinaryRemoteAddr, Cookie, Header, Host, IsArgs, Method, RemoteAddr, RequestUri, Scheme,
        Uri,
    };
    let headers = [("X-User", "ada"), ("Cookie", "id=7; b=c")];
    let view = Lines::new(&headers);
    let with = |target: &'static [u8], path: &'static [u8]| Subject {
        view: &view,
        method: b"GET",
        target,
        path,
        host: "shop.example",
        https: true,
    };
    let subject = with(b"/a%20b?Q=1&q=2&e=", b"/a b");
    let variable = |variable: Variable| vec![KeyPart::Variable(variable)];
    let cases = [
        (variable(RequestUri), "/a%20b?Q=1&q=2&e="),
        (variable(Uri), "/a b"),
        (variable(Args), "Q=1&q=2&e="),
        (variable(IsArgs), "?"),
        (variable(Arg("q".into())), "1"),
        (variable(Arg("e".into())), ""),
        (variable(Arg("none".into())), ""),
        (variable(Host), "shop.example"),
        (variable(Scheme), "https"),
        (variable(Method), "GET"),
        (variable(RemoteAddr), "192.0.2.1"),
        (variable(BinaryRemoteAddr), "\u{c0}\0\u{2}\u{1}"),
        (variable(Header("x-user".into())), "ada"),
        (variable(Header("x-none".into())), ""),
        (variable(Cookie("id".into())), "7"),
        (
            vec![KeyPart::Text("v1-".into()), KeyPart::Variable(Host), KeyPart::Variable(Cookie("b".into()))],
            "v1-shop.examplec",
        ),
    ];
    let written = |subject: &Subject<'_, Lines<'_>>, parts: Vec<KeyPart>| {
        let mut key = Vec::new();
        subject.write_key(&HashBy { key: parts, subset: 1 }, &mut key);
        // Byte for byte, so that binary addresses can be written above.
        key.iter().map(|byte| char::from(*byte)).collect::<String>()
    };
    for (parts, expected) in cases {
        assert_eq!(written(&subject, parts.clone()), expected, "{parts:?}");
    }
    for variable in [Args, IsArgs, Arg("q".into())] {
        assert_eq!(written(&with(b"/", b"/"), vec![KeyPart::Variable(variable)]), "");
    }
}
