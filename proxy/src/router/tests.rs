use std::collections::{BTreeMap, BTreeSet};

use super::path_trie::tests::{naive, random_path, random_rule};
use super::*;
use crate::balance::Turns;
use crate::split::Choice;
use crate::table::{
    Action, Backend, Endpoint, Host, HostPattern, Override, Pool, PoolKey, Rule, Split, Sticky, When,
};
use crate::view::tests::Lines;

const HOSTS: [&str; 8] =
    ["", "a.example", "*.a.example", "b.a.example", "*.b.a.example", "*.example", "c", "d.example"];
const ASKED: [&str; 9] = [
    "",
    "a.example",
    "b.a.example",
    "c.a.example",
    "x.b.a.example",
    "y.x.b.a.example",
    "c",
    "e",
    "d.example",
];

fn key(n: usize) -> PoolKey {
    PoolKey(format!("ns/s{n}:80").into())
}

fn pool(ports: impl IntoIterator<Item = u16>) -> Arc<Pool> {
    let endpoint = |port| Endpoint { address: ([10, 0, 0, 1], port).into(), weight: 1, zone: None };
    Arc::new(Pool { endpoints: ports.into_iter().map(endpoint).collect(), ..Pool::default() })
}

fn split(weights: &[(usize, u32)]) -> Split {
    let backends = weights.iter().map(|(pool, weight)| Backend {
        pool: key(*pool),
        weight: *weight,
        canary: format!("c{pool}").into(),
        steering: None,
    });
    Split { backends: backends.collect(), overrides: Vec::new(), sticky: None }
}

fn rule(path: PathMatch, action: Action) -> Rule {
    Rule {
        path,
        origin: Arc::default(),
        https_redirect: false,
        action,
        limits: RuleLimits::default(),
        edits: None,
    }
}

fn prefix(path: &str, weights: &[(usize, u32)]) -> Rule {
    rule(PathMatch::Prefix(path.into()), Action::Forward(split(weights)))
}

fn table(hosts: &[(&str, &[Rule])], pools: &[(usize, &[u16])]) -> RoutingTable {
    let mut table = RoutingTable::default();
    for (host, rules) in hosts {
        table.hosts.insert(HostPattern::new(host), Arc::new(Host { rules: rules.to_vec() }));
    }
    for (n, ports) in pools {
        table.pools.insert(key(*n), pool(ports.iter().copied()));
    }
    table
}

fn random_action(random: &mut fastrand::Rng) -> Action {
    if random.u8(0..8) == 0 {
        return Action::Respond { status: 503, reason: "closed".into() };
    }
    let backends: Vec<_> = (0..random.usize(1..4)).map(|_| (random.usize(0..12), random.u32(0..4))).collect();
    let mut split = split(&backends);
    if random.bool() {
        split.sticky = Some(Sticky::Address);
        split.overrides = vec![Override { backend: 0, when: When::Header("x".into()) }];
    }
    Action::Forward(split)
}

fn random_host(random: &mut fastrand::Rng) -> Arc<Host> {
    let paths: BTreeSet<PathMatch> = (0..random.usize(0..12)).map(|_| random_rule(random)).collect();
    let mut rules: Vec<Rule> =
        paths.into_iter().map(|path| rule(path, random_action(&mut *random))).collect();
    random.shuffle(&mut rules);
    Arc::new(Host { rules })
}

fn edit(table: &mut RoutingTable, random: &mut fastrand::Rng) {
    let pattern = HostPattern::new(HOSTS[random.usize(0..HOSTS.len())]);
    match random.u8(0..8) {
        0 => drop(table.hosts.remove(&pattern)),
        1 | 2 => drop(table.hosts.insert(pattern, random_host(random))),
        // One rule of a host, the others untouched.
        3 | 4 => {
            let Some(host) = table.hosts.get_mut(&pattern) else { return };
            let rules = &mut Arc::make_mut(host).rules;
            if rules.is_empty() {
                return;
            }
            let index = random.usize(0..rules.len());
            if random.bool() {
                rules.remove(index);
            } else {
                rules[index].action = random_action(random);
            }
        }
        5 => drop(table.pools.remove(&key(random.usize(0..12)))),
        _ => {
            let ports = (0..random.u16(0..4)).map(|_| random.u16(1..9)).collect::<BTreeSet<_>>();
            table.pools.insert(key(random.usize(0..12)), pool(ports));
        }
    }
}

/// What a router answers, in terms that do not depend on how it came about.
fn answer(router: &Router, host: &str, path: &str) -> String {
    let rule = match router.find(host, path.as_bytes()) {
        Found::Rule(rule) => rule,
        other => return format!("{other:?}"),
    };
    let CompiledAction::Forward(split) = &rule.action else { return format!("{rule:?}") };
    // Which turn it has depends on the past, and where a cycle starts depends on the turn.
    let split = &split.clone().with_turn(0);
    let mut text = format!("{:?}", rule.path);
    let turns = Turns::default();
    for backend in &split.backends {
        let pool = router.pool(backend.pool);
        assert_eq!(pool.slot, backend.pool);
        let endpoints: Vec<u64> = pool.endpoints.iter().map(|endpoint| endpoint.live.id).collect();
        text += &format!(" {:?} {} {endpoints:?}", backend.pool_key, backend.canary);
    }
    let choices = (0..20).map(|_| split.choose(router, &Lines::new(&[]), &turns).backend.to_string());
    text + " " + &choices.collect::<Vec<_>>().join("")
}

/// Names and numbers in use are exactly those of the table.
fn check_invariants(router: &Router) {
    let mut keys: BTreeSet<&PoolKey> = router.table.pools.keys().collect();
    let mut turns = 0;
    for rule in router.table.hosts.values().flat_map(|host| host.rules.iter()) {
        let Action::Forward(split) = &rule.action else { continue };
        keys.extend(split.backends.iter().map(|backend| &backend.pool));
        turns += usize::from(CompiledSplit::needs_turn(split));
    }
    assert_eq!(router.slots.len(), keys.len());
    assert_eq!(router.turns.taken(), turns);
    let slots: BTreeMap<u32, &PoolKey> =
        keys.iter().map(|key| (router.slots.get(key).expect("a named key has a slot"), *key)).collect();
    assert_eq!(slots.len(), keys.len(), "two keys share a slot");
    for (slot, key) in slots {
        let wanted: Vec<_> =
            router.table.pools.get(key).iter().flat_map(|pool| &pool.endpoints).map(|e| e.address).collect();
        let has: Vec<_> = router.pool(slot).endpoints.iter().map(|e| e.live.address).collect();
        assert_eq!(has, wanted, "{key:?}");
    }
    let mut seen = BTreeSet::new();
    for pattern in router.table.hosts.keys() {
        let host = router.hosts.get(pattern).expect("every host is compiled");
        for rule in host.value.rules.iter() {
            if let CompiledAction::Forward(split) = &rule.action {
                assert!(split.turn().is_none_or(|turn| seen.insert(turn)), "two splits share a turn");
            }
        }
    }
}

#[test]
fn agrees_with_the_obvious_matcher() {
    for seed in 0..100 {
        let mut random = fastrand::Rng::with_seed(seed);
        let mut table = RoutingTable::default();
        for host in HOSTS {
            if random.bool() {
                table.hosts.insert(HostPattern::new(host), random_host(&mut random));
            }
        }
        let router = Router::empty().compile(table.clone(), &Live::default());
        for host in ASKED {
            let wildcard = host.split_once('.').map(|(_, rest)| format!("*.{rest}"));
            let patterns = [Some(host.to_owned()), wildcard, Some(String::new())];
            let rules =
                patterns.into_iter().flatten().find_map(|p| table.hosts.get(&HostPattern::new(&p)).cloned());
            for _ in 0..20 {
                let path = random_path(&mut random);
                let expected = rules.as_ref().map(|host| {
                    let mut paths: Vec<_> = host.rules.iter().map(|rule| rule.path.clone()).collect();
                    paths.sort();
                    naive(&paths, &path).map(|index| paths[index as usize].clone())
                });
                let found = match router.find(host, path.as_bytes()) {
                    Found::Rule(rule) => Some(Some(rule.path.clone())),
                    Found::NoPath => Some(None),
                    Found::NoHost => None,
                };
                assert_eq!(found, expected, "seed {seed}: {host}{path}");
            }
        }
    }
}

#[test]
fn patching_gives_the_same_router_as_starting_over() {
    for seed in 0..15 {
        let mut random = fastrand::Rng::with_seed(seed);
        let live = Live::default();
        let (mut table, mut router) = (RoutingTable::default(), Router::empty());
        for step in 0..60 {
            (0..random.usize(1..6)).for_each(|_| edit(&mut table, &mut random));
            router = router.compile(table.clone(), &live);
            let fresh = Router::empty().compile(table.clone(), &live);
            check_invariants(&router);
            check_invariants(&fresh);
            assert_eq!(router.generation(), step + 1);
            for host in ASKED {
                for _ in 0..6 {
                    let path = random_path(&mut random);
                    let (patched, started_over) = (answer(&router, host, &path), answer(&fresh, host, &path));
                    assert_eq!(patched, started_over, "seed {seed} step {step}: {host}{path}");
                }
            }
        }
        let router = router.compile(RoutingTable::default(), &live);
        assert_eq!((router.slots.len(), router.turns.taken()), (0, 0), "seed {seed}");
    }
}

fn rules_of(router: &Router, host: &str) -> Arc<[CompiledRule]> {
    router.hosts.get(&HostPattern::new(host)).expect("host exists").value.rules.clone()
}

#[test]
fn a_change_compiles_nothing_else() {
    let live = Live::default();
    let mut desired = table(
        &[
            ("a", &[prefix("/", &[(0, 1)])]),
            ("b", &[prefix("/", &[(1, 1)]), prefix("/x", &[(0, 9), (1, 1)])]),
        ],
        &[(0, &[1, 2]), (1, &[3])],
    );
    let first = Router::empty().compile(desired.clone(), &live);

    desired.hosts.insert(HostPattern::new("a"), Arc::new(Host { rules: vec![prefix("/y", &[(0, 1)])] }));
    let second = first.compile(desired.clone(), &live);
    assert!(Arc::ptr_eq(&rules_of(&first, "b"), &rules_of(&second, "b")));
    assert!(!Arc::ptr_eq(&rules_of(&first, "a"), &rules_of(&second, "a")));

    desired.pools.insert(key(0), pool([2, 7]));
    let third = second.compile(desired, &live);
    for host in ["a", "b"] {
        assert!(Arc::ptr_eq(&rules_of(&second, host), &rules_of(&third, host)), "{host}");
    }
    let pool_of = |router: &Router| router.share_pool(router.slots.get(&key(0)).unwrap());
    let live_id = |router: &Router, index: usize| pool_of(router).endpoints[index].live.id;
    assert_eq!(live_id(&second, 1), live_id(&third, 0), "an endpoint that stays keeps its live state");
    assert_eq!(pool_of(&second).endpoints[0].live.address.port(), 1);
}

#[test]
fn a_split_keeps_its_turn_when_its_weights_change() {
    let live = Live::default();
    let of = |router: &Router, path: &str| match router.find("a", path.as_bytes()) {
        Found::Rule(CompiledRule { action: CompiledAction::Forward(split), .. }) => split.turn(),
        other => panic!("{other:?}"),
    };
    let before = table(&[("a", &[prefix("/x", &[(0, 9), (1, 1)]), prefix("/y", &[(0, 1), (1, 1)])])], &[]);
    let after = table(
        &[(
            "a",
            &[
                prefix("/w", &[(0, 1), (1, 3)]),
                prefix("/y", &[(0, 1), (1, 1)]),
                prefix("/x", &[(0, 8), (1, 2)]),
            ],
        )],
        &[],
    );
    let before = Router::empty().compile(before, &live);
    let after = before.compile(after, &live);
    assert_eq!(of(&before, "/x"), of(&after, "/x"));
    assert_eq!(of(&before, "/y"), of(&after, "/y"));
}

#[test]
fn unknown_pools_and_canaries_without_endpoints() {
    let rules = [prefix("/", &[(0, 0), (1, 1)]), prefix("/unknown", &[(9, 1)])];
    let mut desired = table(&[("a", &rules)], &[(0, &[1]), (1, &[])]);
    let live = Live::default();
    let router = Router::empty().compile(desired.clone(), &live);
    let chosen = |router: &Router, path: &str| match router.find("a", path.as_bytes()) {
        Found::Rule(CompiledRule { action: CompiledAction::Forward(split), .. }) => {
            let Choice { backend, .. } = split.choose(router, &Lines::new(&[]), &Turns::default());
            let pool = router.pool(split.backends[backend].pool);
            (backend, pool.pick(&Turns::default(), 0, &[]).map(|endpoint| endpoint.live.address.port()))
        }
        other => panic!("{other:?}"),
    };
    assert_eq!(chosen(&router, "/"), (0, Some(1)), "an empty canary leaves its share to the primary");
    assert_eq!(chosen(&router, "/unknown"), (0, None));

    desired.pools.insert(key(1), pool([2]));
    desired.pools.insert(key(9), pool([3]));
    let router = router.compile(desired, &live);
    assert_eq!(chosen(&router, "/"), (1, Some(2)));
    assert_eq!(
        chosen(&router, "/unknown"),
        (0, Some(3)),
        "a key named before its pool exists is found later"
    );
}

#[test]
fn a_rule_without_backends_answers_503() {
    let router = Router::empty().compile(table(&[("a", &[prefix("/", &[])])], &[]), &Live::default());
    let Found::Rule(rule) = router.find("a", b"/") else { panic!("no rule") };
    assert!(matches!(rule.action, CompiledAction::Respond { status: 503, .. }));
}

#[test]
fn publishing_is_one_visible_step() {
    let (mut publisher, routes) = routes(Arc::default());
    let (mut one, mut other) = (routes.cache(), routes.clone().cache());
    assert_eq!(one.load().generation(), 0);
    assert!(matches!(one.load().find("a", b"/"), Found::NoHost));

    let first = table(&[("a", &[prefix("/", &[(0, 1)])])], &[(0, &[1])]);
    assert_eq!(publisher.publish(first.clone()), 1);
    assert_eq!((one.load().generation(), other.load().generation()), (1, 1));
    assert!(matches!(one.load().find("a", b"/"), Found::Rule(_)));

    let live = routes.load_full();
    // Equal, though made anew.
    assert_eq!(publisher.publish(table(&[("a", &[prefix("/", &[(0, 1)])])], &[(0, &[1])])), 1);
    assert!(Arc::ptr_eq(&live, &routes.load_full()));
    assert_eq!(publisher.publish(RoutingTable::default()), 2);
    assert!(matches!(live.find("a", b"/"), Found::Rule(_)), "who holds a generation keeps it");
}

#[test]
fn old_generations_are_freed_by_the_publisher() {
    let (mut publisher, routes) = routes(Arc::default());
    let mut worker = routes.cache();
    for n in 1..50 {
        publisher.publish(table(&[("a", &[prefix("/", &[(n, 1)])])], &[]));
        if n % 10 == 0 {
            worker.load();
        }
        assert!(publisher.retired.len() <= 3);
    }
    worker.load();
    publisher.collect();
    assert_eq!(publisher.retired.len(), 0);
}

#[test]
fn hosts_with_the_same_paths_share_one_trie_from_the_second_on() {
    let live = Live::default();
    let rules = |target| [prefix("/", &[(target, 1)]), prefix("/x", &[(target, 1)])];
    let hosts = ["a", "b", "c"].map(|host| (host, rules(0)));
    let mut desired = table(&hosts.each_ref().map(|(host, rules)| (*host, rules.as_slice())), &[]);
    desired.hosts.insert(HostPattern::new("d"), Arc::new(Host { rules: vec![prefix("/", &[(0, 1)])] }));
    let mut router = Router::empty().compile(desired.clone(), &live);
    let shared = |router: &Router, host| {
        router.hosts.get(&HostPattern::new(host)).and_then(|host| host.value.trie.clone())
    };
    for _ in 0..3 {
        assert!(shared(&router, "a").is_none() && shared(&router, "d").is_none());
        let (b, c) = (shared(&router, "b").expect("shared"), shared(&router, "c").expect("shared"));
        assert!(Arc::ptr_eq(&b, &c));
        // Other targets, the same paths: nothing moves.
        for host in ["a", "c", "d"] {
            let edited = Arc::make_mut(desired.hosts.get_mut(&HostPattern::new(host)).expect("host exists"));
            edited.rules[0] = prefix("/", &[(1, router.generation() as u32)]);
        }
        router = router.compile(desired.clone(), &live);
    }
}
