use super::*;
use crate::endpoint::{Ejection, Endpoints};

fn pool(balance: Balance, weights: &[u16]) -> CompiledPool {
    let registry = Endpoints::default();
    let endpoints = weights.iter().zip(1_u16..).map(|(weight, port)| CompiledEndpoint {
        live: registry.get(([127, 0, 0, 1], port).into(), UpstreamProtocol::Http1),
        weight: *weight,
        zone: None,
    });
    CompiledPool::new(0, UpstreamProtocol::Http1, balance, endpoints.collect())
}

const ALL: [Balance; 4] =
    [Balance::RoundRobin, Balance::LeastRequest, Balance::Ewma, Balance::LeastConnections];

fn index_of(pool: &CompiledPool, endpoint: &CompiledEndpoint) -> usize {
    pool.endpoints.iter().position(|e| e.live.id == endpoint.live.id).unwrap()
}

fn counts(pool: &CompiledPool, turns: &Turns, picks: usize, tried: &[u64]) -> Vec<usize> {
    let mut counts = vec![0; pool.endpoints.len()];
    for _ in 0..picks {
        counts[index_of(pool, pool.pick(turns, 0, tried).unwrap())] += 1;
    }
    counts
}

fn eject(pool: &CompiledPool, index: usize) {
    let now = Ejection { consecutive: 1, base_ms: 100, max_ms: 100 };
    assert!(pool.endpoints[index].live.failed(0, &now));
}

#[test]
fn round_robin_divides_by_weight() {
    let cases: &[(&[u16], usize, &[usize])] = &[
        (&[1], 5, &[5]),
        (&[1, 1, 1], 300, &[100, 100, 100]),
        (&[7, 7], 10, &[5, 5]),
        (&[1, 3], 400, &[100, 300]),
        (&[2, 4, 6], 600, &[100, 200, 300]),
        (&[1, u16::MAX], 1_000, &[1, 999]),
    ];
    for (weights, picks, expected) in cases {
        let pool = pool(Balance::RoundRobin, weights);
        assert_eq!(counts(&pool, &Turns::default(), *picks, &[]), *expected, "{weights:?}");
    }
}

#[test]
fn workers_start_at_different_endpoints() {
    let pool = pool(Balance::RoundRobin, &[1, 1, 1]);
    let firsts: Vec<usize> = (0..3)
        .map(|worker| index_of(&pool, pool.pick(&Turns::for_worker(worker), 0, &[]).unwrap()))
        .collect();
    assert_eq!(firsts, [0, 1, 2]);
}

#[test]
fn the_load_of_an_ejected_or_tried_endpoint_is_shared_by_all_others() {
    let pool = pool(Balance::RoundRobin, &[1, 1, 1, 1]);
    let tried = [pool.endpoints[1].live.id];
    assert_eq!(counts(&pool, &Turns::default(), 300, &tried), [100, 0, 100, 100]);
    eject(&pool, 0);
    assert_eq!(counts(&pool, &Turns::default(), 300, &[]), [0, 100, 100, 100]);
}

#[test]
fn ejection_is_ignored_when_all_are_ejected_but_tried_is_not() {
    for balance in ALL {
        for weights in [&[1][..], &[1, 1, 1], &[1, 2, 3]] {
            let pool = pool(balance, weights);
            (0..weights.len()).for_each(|index| eject(&pool, index));
            let turns = Turns::default();
            let mut tried = Vec::new();
            while let Some(picked) = pool.pick(&turns, 50, &tried) {
                assert!(!tried.contains(&picked.live.id));
                tried.push(picked.live.id);
            }
            assert_eq!(tried.len(), weights.len(), "{balance:?} {weights:?}");
        }
        assert!(pool(balance, &[]).pick(&Turns::default(), 0, &[]).is_none());
    }
}

#[test]
fn one_healthy_endpoint_among_many_is_found() {
    for balance in ALL {
        let pool = pool(balance, &[1; 100]);
        (0..100).filter(|index| *index != 42).for_each(|index| eject(&pool, index));
        assert_eq!(counts(&pool, &Turns::default(), 50, &[])[42], 50, "{balance:?}");
    }
}

#[test]
fn least_request_prefers_the_less_loaded() {
    let pool = pool(Balance::LeastRequest, &[1, 1, 1]);
    (0..5).for_each(|_| pool.endpoints[1].live.begin());
    let counts = counts(&pool, &Turns::default(), 900, &[]);
    // Taken only when drawn nine times in a row.
    assert!(counts[1] <= 2, "{counts:?}");
    assert!(counts[0] > 350 && counts[2] > 350, "{counts:?}");
}

/// Requests that never end: what is in flight settles at the weights.
#[test]
fn least_request_fills_endpoints_by_weight() {
    for (weights, slack) in [(&[1, 1, 1, 1][..], 8), (&[1, 2, 5], 12)] {
        let pool = pool(Balance::LeastRequest, weights);
        let turns = Turns::default();
        for _ in 0..800 {
            pool.pick(&turns, 0, &[]).unwrap().live.begin();
        }
        let total: u32 = weights.iter().map(|weight| u32::from(*weight)).sum();
        for endpoint in &pool.endpoints {
            let fair = 800 * u32::from(endpoint.weight) / total;
            let has = endpoint.live.in_flight();
            assert!(has.abs_diff(fair) <= slack, "{has} in flight of fair {fair}, weights {weights:?}");
        }
    }
}

#[test]
fn new_buckets_are_spread_evenly() {
    for worker in [0, 1, 7] {
        let turns = Turns::for_worker(worker);
        let mut tenths = [0_u32; 10];
        (0..1_000).for_each(|_| tenths[usize::from(turns.bucket() / 1_000)] += 1);
        assert!(tenths.iter().all(|count| count.abs_diff(100) <= 3), "worker {worker}: {tenths:?}");
    }
}

/// A canary on many rules with few requests each: none starts out of step with its share.
#[test]
fn turns_of_many_splits_divide_well_together() {
    for worker in [0, 1, 3] {
        let turns = Turns::for_worker(worker);
        let twentieth = u64::MAX / 20;
        let completed = (0..200).flat_map(|turn| (0..5).map(move |_| turn));
        let completed = completed.filter(|turn| turns.advance(*turn, twentieth).1).count();
        assert!(completed.abs_diff(50) <= 2, "worker {worker}: {completed} of 1,000 at 1 in 20");
    }
}

/// Endpoints whose answers take so long, asked one request after another.
#[test]
fn ewma_prefers_the_fast_one_and_asks_the_slow_one_again() {
    for seed in 0..5 {
        let pool = pool(Balance::Ewma, &[1, 1, 1]);
        let turns = Turns::for_worker(seed);
        let micros = [1_000, 50_000, 1_000];
        let mut now_ms = 1_000;
        let mut counts = [0; 3];
        for _ in 0..20_000 {
            let picked = pool.pick(&turns, now_ms, &[]).unwrap();
            let index = index_of(&pool, picked);
            counts[index] += 1;
            picked.live.latency().record(now_ms, micros[index]);
            now_ms += 10;
        }
        // 200 s, and an average that falls to the others' within about 40.
        assert!((2..200).contains(&counts[1]), "{counts:?}");
        assert!(counts[0] > 9_000 && counts[2] > 9_000, "{counts:?}");
    }
}

#[test]
fn ewma_counts_what_is_under_way() {
    let pool = pool(Balance::Ewma, &[1, 1]);
    for endpoint in &pool.endpoints {
        endpoint.live.latency().record(0, 1_000);
    }
    (0..5).for_each(|_| pool.endpoints[0].live.begin());
    assert_eq!(counts(&pool, &Turns::default(), 100, &[]), [0, 100]);
}

#[test]
fn a_new_endpoint_is_taken_to_be_as_fast_as_the_others() {
    let registry = Endpoints::default();
    let endpoints: Vec<CompiledEndpoint> = (1..=3_u16)
        .map(|port| CompiledEndpoint {
            live: registry.get(([127, 0, 0, 1], port).into(), UpstreamProtocol::Http1),
            weight: 1,
            zone: None,
        })
        .collect();
    let now = clock::now_ms();
    endpoints[0].live.latency().record(now, 1_000);
    endpoints[1].live.latency().record(now, 3_000);
    let table = Pool { balance: Balance::Ewma, ..Pool::default() };
    let pool = CompiledPool::compile(0, &table, endpoints, None);
    let assumed = pool.endpoints[2].live.latency().micros(now);
    assert!((1_900.0..=2_000.0).contains(&assumed), "{assumed}");
}

/// Every decision agrees with looking at all endpoints, ties aside.
#[test]
fn least_connections_looks_at_all() {
    for seed in 0..20 {
        let mut random = fastrand::Rng::with_seed(seed);
        let weights: Vec<u16> = (0..random.usize(2..12)).map(|_| random.u16(1..5)).collect();
        let pool = pool(Balance::LeastConnections, &weights);
        let turns = Turns::for_worker(seed as u32);
        for _ in 0..300 {
            let cost = |e: &CompiledEndpoint| f64::from(e.live.in_flight() + 1) / f64::from(e.weight);
            let picked = pool.pick(&turns, 0, &[]).unwrap();
            let least = pool.endpoints.iter().map(cost).fold(f64::MAX, f64::min);
            assert!((cost(picked) - least).abs() < 1e-9);
            picked.live.begin();
            if random.u8(0..3) == 0
                && let Some(busy) = pool.endpoints.iter().find(|e| e.live.in_flight() > 0)
            {
                busy.live.end();
            }
        }
    }
}

#[test]
fn idle_endpoints_take_connections_in_turn() {
    let pool = pool(Balance::LeastConnections, &[1, 1, 1]);
    assert_eq!(counts(&pool, &Turns::default(), 300, &[]), [100, 100, 100]);
}

/// A pool in zones, whose endpoints start slowly over `slow_start`.
fn compiled(balance: Balance, zones: &[&str], slow_start: u64) -> CompiledPool {
    let registry = Endpoints::default();
    let endpoints = zones.iter().zip(1_u16..).map(|(zone, port)| CompiledEndpoint {
        live: registry.get(([127, 0, 0, 1], port).into(), UpstreamProtocol::Http1),
        weight: 1,
        zone: Some((*zone).into()),
    });
    let table = Pool {
        balance,
        prefer_zone: true,
        slow_start: (slow_start > 0).then(|| std::time::Duration::from_millis(slow_start)),
        ..Pool::default()
    };
    let pool = CompiledPool::compile(0, &table, endpoints.collect(), Some("a"));
    pool.endpoints.iter().for_each(|e| e.live.restart(0));
    pool
}

#[test]
fn requests_stay_in_the_zone_as_long_as_it_can_carry_them() {
    for balance in ALL {
        let pool = compiled(balance, &["a", "a", "b", "b"], 0);
        let turns = Turns::default();
        let near = |counts: &[usize]| counts[0] + counts[1];
        assert_eq!(near(&counts(&pool, &turns, 1_000, &[])), 1_000, "{balance:?}");
        // Half of the zone is lost: it keeps what one of three can carry of half the requests.
        eject(&pool, 0);
        let pool = CompiledPool { zones: Zones::new("a", &pool.endpoints), ..pool };
        let counts = counts(&pool, &turns, 9_000, &[]);
        assert_eq!(counts[0], 0, "{balance:?}");
        assert!(counts[1].abs_diff(6_000) < 300, "{balance:?} {counts:?}");
        assert!(counts[2].abs_diff(1_500) < 300, "{balance:?} {counts:?}");
    }
}

#[test]
fn a_zone_that_is_lost_is_left_at_once_even_by_retries() {
    let pool = compiled(Balance::RoundRobin, &["a", "b", "b"], 0);
    let turns = Turns::default();
    let tried = [pool.endpoints[0].live.id];
    let counts = counts(&pool, &turns, 1_000, &tried);
    assert_eq!(counts[0], 0);
    assert!(counts[1] > 300 && counts[2] > 300, "{counts:?}");
}

#[test]
fn a_new_endpoint_comes_to_its_share_slowly() {
    for balance in [Balance::RoundRobin, Balance::LeastRequest, Balance::Ewma] {
        let pool = compiled(balance, &["a"; 4], 1_000);
        let turns = Turns::default();
        for e in &pool.endpoints {
            e.live.latency().record(2_000, 1_000);
        }
        pool.endpoints[1].live.restart(2_000);
        let share = |now: u64| {
            let picks = (0..8_000).filter(|_| {
                let picked = pool.pick(&turns, now, &[]).unwrap();
                picked.live.id == pool.endpoints[1].live.id
            });
            picks.count()
        };
        // Of 2,000 each in the end.
        let (first, half, full) = (share(2_000), share(2_500), share(3_000));
        assert!((100..450).contains(&first), "{balance:?}: {first}");
        assert!((800..1_700).contains(&half), "{balance:?}: {half}");
        assert!((1_800..2_200).contains(&full), "{balance:?}: {full}");
    }
}

#[test]
fn when_all_are_new_each_has_its_share() {
    let pool = compiled(Balance::RoundRobin, &["a"; 4], 1_000);
    let counts = counts(&pool, &Turns::default(), 4_000, &[]);
    assert!(counts.iter().all(|count| count.abs_diff(1_000) < 250), "{counts:?}");
}
