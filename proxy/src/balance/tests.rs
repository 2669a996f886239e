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
    for balance in [Balance::RoundRobin, Balance::LeastRequest] {
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
    for balance in [Balance::RoundRobin, Balance::LeastRequest] {
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
