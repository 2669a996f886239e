use std::collections::BTreeSet;

use super::*;
use crate::balance::Steer;
use crate::endpoint::{Ejection, Endpoints};
use crate::table::{Pool, UpstreamProtocol};
use crate::view::tests::Lines;

const TAG: u32 = 0xA1B2_C3D4;

fn pool(ports: impl IntoIterator<Item = u16>, key: &str) -> CompiledPool {
    let registry = Endpoints::default();
    let endpoints = ports.into_iter().map(|port| CompiledEndpoint {
        live: registry.get(([127, 0, 0, 1], port).into(), UpstreamProtocol::Http1),
        weight: 1,
        zone: None,
    });
    let table = Pool { seating: Some(NamingKey(key.into())), ..Pool::default() };
    CompiledPool::compile(0, &table, endpoints.collect(), None)
}

fn session(affinity: Affinity) -> Session {
    Session::new("s", affinity)
}

/// One request of a client with this cookie: the port that took it, and the
/// header line of the answer.
fn visit(
    session: &Session,
    pool: &CompiledPool,
    cookie: Option<&str>,
    tried: &[u64],
    turns: &Turns,
) -> (u16, String) {
    let line = cookie.map(|cookie| format!("other=1; s={cookie}"));
    let headers: Vec<(&str, &str)> = line.iter().map(|line| ("cookie", &**line)).collect();
    let seat = Seat::of(session, TAG, pool, &Lines::new(&headers), false, turns, 0);
    let served = pool.pick_for(&Steer::Seat(seat), turns, 0, tried).unwrap();
    let path = PathMatch::Prefix("/shop".into());
    let mut set = SmallVec::new();
    seat.write_cookie(session, TAG, pool, &path, served.live.id, turns, &mut set);
    (served.live.address.port(), String::from_utf8(set.to_vec()).unwrap())
}

/// The value that a header line sets.
fn value(line: &str) -> &str {
    line.strip_prefix("Set-Cookie: s=").and_then(|rest| rest.split(';').next()).unwrap_or_default()
}

const BOTH: [Affinity; 2] = [Affinity::Balanced, Affinity::Persistent];

fn eject(pool: &CompiledPool, port: u16) {
    let policy = Ejection { consecutive: 1, base_ms: 1_000, max_ms: 1_000 };
    let endpoint = pool.endpoints.iter().find(|e| e.live.address.port() == port).unwrap();
    endpoint.live.failed(0, &policy);
}

#[test]
fn a_cookie_is_set_once_and_leads_back_on_every_worker_and_in_every_process() {
    for affinity in BOTH {
        let session = session(affinity);
        let pool_here = pool(1..=5, "key");
        let mut used = BTreeSet::new();
        for worker in 0..40 {
            let turns = Turns::for_worker(worker);
            let (port, line) = visit(&session, &pool_here, None, &[], &turns);
            assert!(line.ends_with("; Path=/shop; HttpOnly\r\n"), "{line}");
            assert!(!line.contains("127.0.0.1"));
            used.insert(port);
            for other in [&pool_here, &pool(1..=5, "key")] {
                let again = visit(&session, other, Some(value(&line)), &[], &Turns::for_worker(99));
                assert_eq!(again, (port, String::new()), "{affinity:?}");
            }
        }
        assert_eq!(used.len(), 5, "{affinity:?}");
    }
}

#[test]
fn names_depend_on_the_key() {
    let (one, other) = (pool(1..=3, "one"), pool(1..=3, "other"));
    let names = |pool: &CompiledPool| pool.seats.as_ref().unwrap().names.clone();
    assert_eq!(names(&one), names(&pool(1..=3, "one")));
    assert!(names(&one).iter().all(|name| !names(&other).contains(name)));
}

/// RFC 4231 has no case of this shape: the value comes from Python's
/// `hmac.new(hashlib.sha256(b"key").digest(), b"127.0.0.1:1", "sha256")`.
#[test]
fn names_are_hmac_sha_256() {
    assert_eq!(pool(1..=2, "key").seats.as_ref().unwrap().names[0], 0xE5AA_D733_9223_6BBA);
}

#[test]
fn when_endpoints_come_persistent_sessions_stay_and_balanced_ones_are_shared() {
    let (before, after) = (pool(1..=4, "key"), pool(1..=5, "key"));
    let turns = Turns::default();
    for affinity in BOTH {
        let session = session(affinity);
        let mut moved = 0;
        for _ in 0..1_000 {
            let (port, line) = visit(&session, &before, None, &[], &turns);
            let (now, _) = visit(&session, &after, Some(value(&line)), &[], &turns);
            assert!(now == port || now == 5);
            moved += usize::from(now != port);
        }
        match affinity {
            Affinity::Persistent => assert_eq!(moved, 0),
            Affinity::Balanced => assert!((100..400).contains(&moved), "{moved}"),
        }
    }
}

#[test]
fn an_endpoint_that_is_gone_or_a_cookie_of_someone_else_gives_a_new_one() {
    let turns = Turns::default();
    let session = session(Affinity::Persistent);
    let all = pool(1..=3, "key");
    let (port, line) = visit(&session, &all, None, &[], &turns);
    let rest = pool((1..=3).filter(|other| *other != port), "key");
    let (_, renewed) = visit(&session, &rest, Some(value(&line)), &[], &turns);
    assert_ne!(value(&renewed), "");
    let foreign = [
        "",
        "1700000000.123.45.67|d41d8cd98f00b204e9800998ecf8427e",
        "0123456789abcdef",
        "0123456789abcdef.a1b2c3d4",
        "0123456789abcdef.00000000",
        "0123456789abcdeg.a1b2c3d4",
        "0123456789abcdef.a1b2c3d4a",
        "é123456789abcde.a1b2c3d4",
    ];
    for cookie in foreign {
        let (_, line) = visit(&session, &all, Some(cookie), &[], &turns);
        assert_eq!(value(&line).len(), 25, "{cookie}: {line}");
    }
    // Of another backend of the split.
    let elsewhere = format!("{}.{:08x}", &value(&renewed)[..16], TAG + 1);
    assert_ne!(visit(&session, &all, Some(&elsewhere), &[], &turns).1, "");
}

#[test]
fn a_failure_moves_a_session_only_if_it_may() {
    for affinity in BOTH {
        for change_on_failure in [false, true] {
            let session = Session { change_on_failure, ..session(affinity) };
            let pool = pool(1..=4, "key");
            let turns = Turns::default();
            let (port, line) = visit(&session, &pool, None, &[], &turns);
            let id = pool.endpoints.iter().find(|e| e.live.address.port() == port).unwrap().live.id;
            // Tried in vain by this very request: another one answers.
            let (other, set) = visit(&session, &pool, Some(value(&line)), &[id], &turns);
            assert_ne!(other, port);
            assert_eq!(!set.is_empty(), change_on_failure, "{affinity:?}");
            if change_on_failure {
                assert_eq!(visit(&session, &pool, Some(value(&set)), &[], &turns), (other, String::new()));
            }
            // Ejected: the session still asks for it first, unless it may move.
            eject(&pool, port);
            let (now, set) = visit(&session, &pool, Some(value(&line)), &[], &turns);
            assert_eq!((now != port, !set.is_empty()), (change_on_failure, change_on_failure));
            // Known to be down: it stands in the way of nobody.
            let endpoint = pool.endpoints.iter().find(|e| e.live.address.port() == port).unwrap();
            assert!(endpoint.live.set_up(false, 0));
            let (now, set) = visit(&session, &pool, Some(value(&line)), &[], &turns);
            assert_eq!((now != port, !set.is_empty()), (true, change_on_failure));
            endpoint.live.set_up(true, 0);
        }
    }
}

#[test]
fn the_header_line_says_what_was_configured() {
    type Set = fn(&mut Session);
    let none: Set = |s| s.same_site = Some(SameSite::None);
    let conditional: Set = |s| (s.same_site, s.conditional_none) = (Some(SameSite::None), true);
    let every: Set = |s| {
        (s.path, s.domain) = (Some("/".into()), Some("shop.example".into()));
        (s.max_age, s.same_site, s.partitioned) = (Some(3600), Some(SameSite::Lax), true);
    };
    let (old, new) = (Some("Mozilla/5.0 Chrome/51.0"), Some("Mozilla/5.0 Chrome/120.0"));
    let cases: [(Set, bool, Option<&str>, &str); 8] = [
        (|_| {}, true, None, "; Path=/shop; Secure; HttpOnly"),
        (|s| s.secure = Some(true), false, None, "; Path=/shop; Secure; HttpOnly"),
        (|s| s.secure = Some(false), true, None, "; Path=/shop; HttpOnly"),
        (
            every,
            false,
            None,
            "; Max-Age=3600; Domain=shop.example; Path=/; HttpOnly; SameSite=Lax; Partitioned",
        ),
        (
            |s| (s.path, s.max_age) = (Some("/a;b".into()), Some(-1)),
            false,
            None,
            "; Max-Age=-1; Path=/; HttpOnly",
        ),
        (none, false, old, "; Path=/shop; HttpOnly; SameSite=None"),
        (conditional, false, old, "; Path=/shop; HttpOnly"),
        (conditional, false, new, "; Path=/shop; HttpOnly; SameSite=None"),
    ];
    let pool = pool(1..=2, "key");
    let turns = Turns::default();
    for (set, https, agent, expected) in cases {
        let mut session = session(Affinity::Persistent);
        set(&mut session);
        let headers: Vec<(&str, &str)> = agent.iter().map(|agent| ("user-agent", *agent)).collect();
        let seat = Seat::of(&session, TAG, &pool, &Lines::new(&headers), https, &turns, 0);
        let mut line = SmallVec::new();
        let path = PathMatch::Prefix("/shop".into());
        seat.write_cookie(&session, TAG, &pool, &path, pool.endpoints[0].live.id, &turns, &mut line);
        let line = String::from_utf8(line.to_vec()).unwrap();
        assert_eq!(line.split_once(';').unwrap().1.trim_end(), expected[1..].trim_end(), "{session:?}");
    }
}

#[test]
fn an_expiry_is_a_date() {
    let session = Session { expires: Some(172_800), ..session(Affinity::Balanced) };
    let (_, line) = visit(&session, &pool(1..=2, "key"), None, &[], &Turns::default());
    let date = line.split("; Expires=").nth(1).and_then(|rest| rest.split(';').next()).unwrap();
    assert!(date.len() == 29 && date.ends_with(" GMT"), "{date}");
}
