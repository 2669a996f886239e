use std::net::IpAddr;

use super::*;
use crate::view::tests::Lines;

fn table(weights: &[u32], overrides: Vec<Override>, sticky: Option<Sticky>) -> Split {
    let backends = weights.iter().enumerate().map(|(index, weight)| Backend {
        pool: PoolKey(format!("ns/s{index}:80").into()),
        weight: *weight,
        canary: if index == 0 { "".into() } else { format!("canary-{index}").into() },
        steering: None,
    });
    Split { backends: backends.collect(), overrides, sticky }
}

fn compile(split: &Split) -> CompiledSplit {
    let backends = split.backends.iter().zip(0..).map(|(backend, pool)| CompiledBackend {
        pool_key: backend.pool.clone(),
        pool,
        canary: backend.canary.clone(),
        stats: Arc::default(),
        steering: backend.steering.clone(),
    });
    CompiledSplit::new(split, backends.collect(), CompiledSplit::needs_turn(split).then_some(0))
}

fn by_weight(weights: &[u32]) -> CompiledSplit {
    compile(&table(weights, Vec::new(), None))
}

/// Checks every window of a thousand among `requests`.
fn check_windows(weights: &[u32], worker: u32, requests: usize) {
    const WINDOW: usize = 1_000;
    let split = by_weight(weights);
    let turns = Turns::for_worker(worker);
    let none = Lines::new(&[]);
    let taken: Vec<usize> = (0..requests).map(|_| split.decide(&none, &turns).backend).collect();
    let total: u64 = weights.iter().map(|weight| u64::from(*weight)).sum();
    for (backend, weight) in weights.iter().enumerate() {
        let mut count = taken[..WINDOW].iter().filter(|b| **b == backend).count();
        for start in 0..=requests - WINDOW {
            // |count - weight / total * 1000| <= 1, in whole numbers.
            let off = (count as u64 * total).abs_diff(u64::from(*weight) * WINDOW as u64);
            assert!(off <= total, "{count} of {weights:?}[{backend}] from {start}, worker {worker}");
            assert!(*weight > 0 || count == 0, "weight 0 got a request");
            if start + WINDOW < requests {
                count += usize::from(taken[start + WINDOW] == backend);
                count -= usize::from(taken[start] == backend);
            }
        }
    }
}

#[test]
fn two_weights_are_exact_over_every_window() {
    for canary in 0..=100 {
        for worker in 0..3 {
            check_windows(&[100 - canary, canary], worker, 2_500);
        }
    }
    for total in [7, 200, 300, 1_000, 997, 1_000_000_007] {
        for eighth in 1..8 {
            let canary = (u64::from(total) * eighth / 8) as u32;
            check_windows(&[total - canary, canary], eighth as u32, 2_500);
        }
    }
    check_windows(&[u32::MAX, u32::MAX], 0, 2_000);
    check_windows(&[u32::MAX, 1], 0, 2_000);
}

/// Stronger than asked: of any `n` consecutive turns a canary has `n * share` rounded down or up.
#[test]
fn two_weights_are_exact_over_windows_of_any_length() {
    for (primary, canary) in [(95, 5), (2, 5), (60, 40), (1, 1), (996, 1)] {
        let (split, turns) = (by_weight(&[primary, canary]), Turns::for_worker(5));
        let none = Lines::new(&[]);
        let taken: Vec<u64> = (0..1_500).map(|_| split.decide(&none, &turns).backend as u64).collect();
        let total = u64::from(primary + canary);
        for length in 1..1_000 {
            for start in (0..500).step_by(7) {
                let count: u64 = taken[start..start + length].iter().sum();
                let exact = length as u64 * u64::from(canary);
                let allowed = exact / total..=exact.div_ceil(total);
                assert!(allowed.contains(&count), "{canary} of {total}: {count} in {length} from {start}");
            }
        }
    }
}

#[test]
fn more_weights_are_exact_over_every_window() {
    let mut random = fastrand::Rng::with_seed(11);
    for total in [100, 200, 300, 1_000, 7] {
        for backends in 3..=5 {
            for round in 0..20 {
                let mut left = total;
                let mut weights = vec![0_u32; backends];
                for weight in &mut weights[1..] {
                    *weight = random.u32(0..=left);
                    left -= *weight;
                }
                weights[0] = left;
                check_windows(&weights, round, 2_200);
            }
        }
    }
}

#[test]
fn degenerate_weights() {
    let none = Lines::new(&[]);
    for (weights, expected) in
        [(&[0, 0][..], 0), (&[5], 0), (&[0], 0), (&[5, 0, 0], 0), (&[0, 5], 1), (&[0, 0, 5], 2)]
    {
        let (split, turns) = (by_weight(weights), Turns::default());
        assert!((0..50).all(|_| split.decide(&none, &turns).backend == expected), "{weights:?}");
    }
}

#[test]
fn the_phase_survives_a_change_of_weights() {
    let turns = Turns::default();
    let none = Lines::new(&[]);
    // A publish every ten requests must not starve a canary that gets one in twenty.
    let canary: usize = (0..2_000)
        .map(|n| if n / 10 % 2 == 0 { by_weight(&[95, 5]) } else { by_weight(&[190, 10]) })
        .map(|split| split.decide(&none, &turns).backend)
        .sum();
    assert_eq!(canary, 100);
}

#[test]
fn override_precedence() {
    let header = |backend, name: &str| Override { backend, when: When::Header(name.into()) };
    let value =
        |backend, name: &str, v: &str| Override { backend, when: When::HeaderValue(name.into(), v.into()) };
    let pattern =
        |backend, name: &str, p: &str| Override { backend, when: When::HeaderPattern(name.into(), p.into()) };
    let cookie = |backend, name: &str| Override { backend, when: When::Cookie(name.into()) };
    // All weight on canary 1, so 1 means "the weights decided" unless an override took it.
    let one = &[0, 100][..];
    let off = &[100, 0][..];
    let two = &[0, 100, 0][..];
    let cases: Vec<(&[u32], Vec<Override>, &[(&str, &str)], usize)> = vec![
        // Header alone: always, never, anything else, case of the name, case of the value.
        (off, vec![header(1, "X-Canary")], &[("x-canary", "always")], 1),
        (one, vec![header(1, "x-canary")], &[("X-Canary", "never")], 0),
        (off, vec![header(1, "x-canary")], &[("x-canary", "yes")], 0),
        (one, vec![header(1, "x-canary")], &[("x-canary", "NEVER")], 1),
        (one, vec![header(1, "x-canary")], &[], 1),
        // Value: equal takes, different falls through, and always means nothing.
        (off, vec![value(1, "v", "eu")], &[("v", "eu")], 1),
        (off, vec![value(1, "v", "eu")], &[("v", "EU")], 0),
        (off, vec![value(1, "v", "eu")], &[("v", "always")], 0),
        (one, vec![value(1, "v", "eu")], &[("v", "never")], 1),
        (off, vec![value(1, "v", "eu"), cookie(1, "c")], &[("v", "us"), ("cookie", "c=always")], 1),
        // Pattern: found anywhere, not found falls through, invalid never matches.
        (off, vec![pattern(1, "ua", "fire|chrome")], &[("ua", "a chrome b")], 1),
        (off, vec![pattern(1, "ua", "^chrome")], &[("ua", "a chrome b")], 0),
        (one, vec![pattern(1, "ua", "^chrome")], &[("ua", "x")], 1),
        (off, vec![pattern(1, "ua", "(")], &[("ua", "(")], 0),
        (off, vec![pattern(1, "ua", "x"), cookie(1, "c")], &[("ua", "y"), ("cookie", "c=always")], 1),
        // Cookie.
        (off, vec![cookie(1, "c")], &[("cookie", "a=b; c=always")], 1),
        (one, vec![cookie(1, "c")], &[("cookie", "c=never")], 0),
        (one, vec![cookie(1, "c")], &[("cookie", "c=maybe")], 1),
        // Header before cookie.
        (off, vec![header(1, "h"), cookie(1, "c")], &[("h", "always"), ("cookie", "c=never")], 1),
        (one, vec![header(1, "h"), cookie(1, "c")], &[("h", "never"), ("cookie", "c=always")], 0),
        // Several canaries: the first that takes wins, never concerns its own canary only.
        (off, vec![header(1, "h")], &[("h", "always"), ("h", "never")], 1),
        (two, vec![header(1, "a"), header(2, "b")], &[("a", "never"), ("b", "always")], 2),
        (two, vec![header(1, "a"), header(2, "b")], &[("a", "always"), ("b", "always")], 1),
        (two, vec![header(1, "a"), header(2, "b")], &[("b", "never")], 1),
        (two, vec![header(1, "a"), header(2, "b")], &[("a", "never")], 0),
        // An override that belongs to no backend is none.
        (off, vec![header(9, "h")], &[("h", "always")], 0),
    ];
    for (case, (weights, overrides, headers, expected)) in cases.into_iter().enumerate() {
        let split = compile(&table(weights, overrides, None));
        let choice = split.decide(&Lines::new(headers), &Turns::default());
        assert_eq!(choice, Choice { backend: expected, set_bucket: None }, "case {case}: {headers:?}");
    }
}

#[test]
fn overrides_come_before_the_sticky_bucket() {
    let overrides = vec![Override { backend: 1, when: When::Header("h".into()) }];
    let split = compile(&table(&[50, 50], overrides, Some(Sticky::Cookie("b".into()))));
    let cases: &[(&[(&str, &str)], usize, bool)] = &[
        (&[("cookie", "b=0")], 1, false),
        (&[("cookie", "b=9999")], 0, false),
        (&[("cookie", "b=9999"), ("h", "always")], 1, false),
        (&[("cookie", "b=0"), ("h", "never")], 0, false),
        (&[("h", "always")], 1, false),
        (&[("h", "never")], 0, true),
    ];
    for (headers, backend, sets) in cases {
        let choice = split.decide(&Lines::new(headers), &Turns::default());
        assert_eq!((choice.backend, choice.set_bucket.is_some()), (*backend, *sets), "{headers:?}");
    }
}

#[test]
fn a_sticky_cookie_is_set_once_and_then_obeyed() {
    let split = compile(&table(&[70, 20, 10], Vec::new(), Some(Sticky::Cookie("b".into()))));
    let turns = Turns::default();
    let mut counts = [0_usize; 3];
    for _ in 0..1_000 {
        let first = split.decide(&Lines::new(&[]), &turns);
        let cookie = format!("b={}", first.set_bucket.unwrap());
        let again = split.decide(&Lines::new(&[("cookie", &cookie)]), &turns);
        assert_eq!(again, Choice { backend: first.backend, set_bucket: None });
        counts[first.backend] += 1;
    }
    assert!(counts[0].abs_diff(700) <= 5 && counts[1].abs_diff(200) <= 5, "{counts:?}");
    for invalid in ["b=", "b=10000", "b=-1", "b=1x", "b= 1"] {
        assert!(split.decide(&Lines::new(&[("cookie", invalid)]), &turns).set_bucket.is_some(), "{invalid}");
    }
}

#[test]
fn a_sticky_header_or_address_is_hashed() {
    let by_header = compile(&table(&[50, 50], Vec::new(), Some(Sticky::Header("X-User".into()))));
    let by_address = compile(&table(&[50, 50], Vec::new(), Some(Sticky::Address)));
    let turns = Turns::default();
    let mut canary = [0_usize; 2];
    for user in 0..2_000_u32 {
        let name = user.to_string();
        let headers = [("x-user", name.as_str())];
        let mut request = Lines::new(&headers);
        let first = by_header.decide(&request, &turns);
        assert_eq!(first, by_header.decide(&request, &turns));
        assert_eq!(first.set_bucket, None);
        canary[0] += first.backend;

        let v4 = std::net::Ipv4Addr::from(0x0a00_0000 + user);
        request.client = v4.into();
        let first = by_address.decide(&request, &turns);
        request.client = IpAddr::V6(v4.to_ipv6_mapped());
        assert_eq!(first, by_address.decide(&request, &turns));
        canary[1] += first.backend;
    }
    assert!(canary.iter().all(|count| count.abs_diff(1_000) < 100), "{canary:?}");
    // Without the header: by weight, exactly.
    let without: usize = (0..100).map(|_| by_header.decide(&Lines::new(&[]), &turns).backend).sum();
    assert_eq!(without, 50);
}

fn layout(weights: &[u32]) -> Vec<u8> {
    let split = table(weights, Vec::new(), Some(Sticky::Address));
    let sticky = CompiledSticky::new(&Sticky::Address, &split.backends);
    (0..BUCKETS).map(|bucket| sticky.backend(bucket)).collect()
}

#[test]
fn bucket_shares_follow_the_weights() {
    for weights in [&[95, 5][..], &[70, 20, 10], &[40, 30, 20, 10], &[0, 1, 1], &[0, 1, 1, 1], &[3, 3, 1]] {
        let layout = layout(weights);
        let total: u32 = weights.iter().sum();
        for (index, weight) in weights.iter().enumerate() {
            let count = layout.iter().filter(|backend| usize::from(**backend) == index).count();
            let exact = f64::from(*weight) * 10_000.0 / f64::from(total);
            assert!((count as f64 - exact).abs() <= 1.0, "{weights:?}[{index}]: {count}");
            assert!(*weight > 0 || count == 0, "{weights:?}[{index}]");
        }
    }
    assert!(layout(&[0, 0, 0]).iter().all(|backend| *backend == 0));
}

#[test]
fn raising_a_canary_only_moves_users_from_the_primary_to_it() {
    let raised = |before: &[u8], after: &[u8], canary: u8| {
        before.iter().zip(after).all(|(from, to)| from == to || (*from == 0 && *to == canary))
    };
    for weight in 0..100 {
        let (before, after) = (layout(&[100 - weight, weight]), layout(&[99 - weight, weight + 1]));
        assert!(raised(&before, &after, 1), "{weight}");
    }
    for first in (0..100).step_by(3) {
        for second in (0..100 - first).step_by(7) {
            let primary = 100 - first - second;
            let before = layout(&[primary, first, second]);
            assert!(raised(&before, &layout(&[primary - 1, first + 1, second]), 1), "{first} {second}");
            assert!(raised(&before, &layout(&[primary - 1, first, second + 1]), 2), "{first} {second}");
        }
    }
    // Of three, the two that border on the primary.
    let before = layout(&[70, 10, 10, 10]);
    assert!(raised(&before, &layout(&[60, 10, 20, 10]), 2));
    assert!(raised(&before, &layout(&[60, 10, 10, 20]), 3));
}
