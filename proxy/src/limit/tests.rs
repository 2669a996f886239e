use std::time::Duration;

use super::*;

fn limiter() -> Limiter {
    let limits = config::Limits { connections_per_address: Some(2), ..config::Limits::default() };
    Limiter::new(&limits, 1)
}

fn ip(text: &str) -> IpAddr {
    text.parse().unwrap()
}

const SECOND: u64 = 1_000_000_000;

#[test]
fn a_rate_is_a_burst_and_then_its_interval() {
    let rates = Rates::new(64);
    let rate = Rate { requests: 10, per: Duration::from_secs(1), burst: 3 };
    let start = 60 * SECOND;
    // Milliseconds, and how many of ten requests pass then.
    for (after, passed) in [(0, 4), (99, 0), (100, 1), (350, 2), (399, 0), (10_000, 4), (10_000, 0)] {
        let now = start + after * 1_000_000;
        let taken = (0..10).filter(|_| rates.take(7, &rate, now).is_ok()).count();
        assert_eq!(taken, passed, "after {after} ms");
    }
    assert_eq!(rates.take(8, &rate, start), Ok(()), "another account is not concerned");
}

/// Against the obvious model: nginx's excess, which drains at the rate.
#[test]
fn a_rate_agrees_with_the_leaky_bucket() {
    let mut random = fastrand::Rng::with_seed(4);
    for _ in 0..200 {
        let rates = Rates::new(64);
        let rate = Rate { requests: random.u32(1..50), per: Duration::from_secs(1), burst: random.u32(..20) };
        // In requests times nanoseconds, so that nothing is rounded.
        let interval = rate.interval_ns();
        let (mut excess, mut last, mut now) = (0u64, 60 * SECOND, 60 * SECOND);
        for _ in 0..500 {
            now += random.u64(..interval * 2);
            excess = excess.saturating_sub(now - last);
            last = now;
            let passes = excess <= interval * u64::from(rate.burst);
            if passes {
                excess += interval;
            }
            assert_eq!(rates.take(1, &rate, now).is_ok(), passes, "{rate:?}");
        }
    }
}

#[test]
fn accounts_beyond_the_room_displace_those_that_owe_least() {
    let rates = Rates::new(WAYS);
    let rate = Rate { requests: 1, per: Duration::from_secs(1), burst: 0 };
    let now = 60 * SECOND;
    for account in 1..=WAYS as u64 {
        assert_eq!(rates.take(account, &rate, now + account), Ok(()));
        assert_eq!(rates.take(account, &rate, now + account), Err(Over));
    }
    assert_eq!(rates.take(100, &rate, now + 100), Ok(()));
    assert_eq!(rates.take(100, &rate, now + 100), Err(Over));
    assert_eq!(rates.take(2, &rate, now + 100), Err(Over), "the second is still known");
    assert_eq!(rates.take(1, &rate, now + 100), Ok(()), "the first is not");
}

#[test]
fn connections_are_counted_by_address() {
    let limiter = limiter();
    let enter = |address: &str| limiter.connect(ip(address));
    let first = enter("192.0.2.1").unwrap();
    assert!(first.is_some());
    let _second = enter("::ffff:192.0.2.1").unwrap();
    assert!(enter("192.0.2.1").is_err());
    let _other = enter("192.0.2.2").unwrap();
    drop(first);
    let _third = enter("192.0.2.1").unwrap();
    assert!(enter("192.0.2.1").is_err());
}

#[test]
fn an_ipv6_client_is_its_64() {
    let limiter = limiter();
    let _one = limiter.connect(ip("2001:db8::1")).unwrap();
    let _two = limiter.connect(ip("2001:db8::2:0:0:1")).unwrap();
    assert!(limiter.connect(ip("2001:db8::3")).is_err());
    assert!(limiter.connect(ip("2001:db8:0:1::3")).is_ok());
    // And not an IPv4 address with the same bits.
    let _one = limiter.connect(ip("0:0:c000:201::")).unwrap();
    let _two = limiter.connect(ip("0:0:c000:201::")).unwrap();
    assert!(limiter.connect(ip("192.0.2.1")).is_ok());
}

#[test]
fn a_full_set_lets_pass_and_forgets_nothing() {
    let counts = Arc::new(Counts::new(WAYS));
    let held: Vec<_> = (1..=WAYS as u64).map(|account| counts.enter(account, 1).unwrap().unwrap()).collect();
    assert!(counts.enter(100, 1).unwrap().is_none());
    for account in 1..=WAYS as u64 {
        assert!(counts.enter(account, 1).is_err());
    }
    drop(held);
    assert!(counts.places.iter().all(|place| place.load(Relaxed) & COUNT == 0));
    assert!(counts.enter(100, 1).unwrap().is_some());
}

/// Many threads, few accounts: never more than allowed at once, and nothing left at the end.
#[test]
fn counts_hold_under_contention() {
    let counts = Arc::new(Counts::new(64));
    let inside: Arc<[AtomicU64; 4]> = Arc::default();
    let threads: Vec<_> = (0..4)
        .map(|seed| {
            let (counts, inside) = (counts.clone(), inside.clone());
            std::thread::spawn(move || {
                let mut random = fastrand::Rng::with_seed(seed);
                let mut held = Vec::new();
                for _ in 0..20_000 {
                    let account = random.usize(..4);
                    match counts.enter(account as u64 + 1, 3) {
                        Ok(place) => {
                            let now = inside[account].fetch_add(1, Relaxed) + 1;
                            // A new account opened twice at the same instant may hold twice as many.
                            assert!(now <= 6, "{now}");
                            held.push((account, place.unwrap()));
                        }
                        Err(Over) if held.is_empty() => {}
                        Err(Over) => {
                            let (account, place) = held.swap_remove(random.usize(..held.len()));
                            inside[account].fetch_sub(1, Relaxed);
                            drop(place);
                        }
                    }
                }
                for (account, place) in held {
                    inside[account].fetch_sub(1, Relaxed);
                    drop(place);
                }
            })
        })
        .collect();
    for thread in threads {
        thread.join().unwrap();
    }
    assert!(counts.places.iter().all(|place| place.load(Relaxed) & COUNT == 0));
}

#[test]
fn limits_of_a_rule() {
    let limiter = limiter();
    let rate = |requests, seconds, burst| Rate { requests, per: Duration::from_secs(seconds), burst };
    let limits = ClientLimits {
        zone: "shop/web".into(),
        requests: Some(2),
        rates: vec![rate(1, 3600, 2), rate(1, 1800, 9)],
        exempt: vec!["198.51.100.0/24".parse().unwrap()],
    };
    let client = ip("192.0.2.1");
    let one = limiter.request(&limits, client).unwrap();
    let two = limiter.request(&limits, client).unwrap();
    assert_eq!(limiter.request(&limits, client).err(), Some(Reject::TooManyRequests));
    drop((one, two));
    assert!(limiter.request(&limits, client).is_ok());
    assert_eq!(limiter.request(&limits, client).err(), Some(Reject::RateLimited));
    assert!(limiter.request(&limits, ip("192.0.2.2")).is_ok());
    let elsewhere = ClientLimits { zone: "shop/api".into(), ..limits.clone() };
    assert!(limiter.request(&elsewhere, client).is_ok());
    for _ in 0..100 {
        assert!(limiter.request(&limits, ip("198.51.100.7")).unwrap().is_none());
    }
}
