use std::sync::Arc;

use lockgate_proxy::RoutingTable;
use lockgate_proxy::table::{Backend, Endpoint, Origin, Override, Pool, PoolKey, Sticky};

use lockgate_proxy::balance::Turns;
use lockgate_proxy::router::CompiledAction;
use lockgate_proxy::view::RequestView;

use super::*;

fn split(backends: &[(&str, u32)]) -> Split {
    let backend = |(index, (pool, weight)): (usize, &(&str, u32))| Backend {
        pool: PoolKey((*pool).into()),
        weight: *weight,
        canary: if index == 0 { "".into() } else { format!("canary-{index}").into() },
        steering: None,
    };
    let backends = backends.iter().enumerate().map(backend).collect();
    Split { backends, overrides: Vec::new(), sticky: None }
}

fn rule(path: PathMatch, action: Action) -> Rule {
    let origin = Arc::new(Origin { kind: "Ingress", namespace: "shop".into(), name: "web".into() });
    Rule { path, origin, https_redirect: false, action, limits: RuleLimits::default(), edits: None }
}

fn forward(path: PathMatch, backends: &[(&str, u32)]) -> Rule {
    rule(path, Action::Forward(split(backends)))
}

fn table(hosts: Vec<(&str, Vec<Rule>)>) -> RoutingTable {
    let mut table = RoutingTable::default();
    for (host, rules) in hosts {
        table.hosts.insert(HostPattern::new(host), Arc::new(Host { rules }));
    }
    for (name, n) in [("shop/web:80", 2), ("shop/next:80", 1)] {
        let endpoint = |i| Endpoint { address: ([10, 0, 0, i], 8080).into(), weight: 1, zone: None };
        let pool = Pool { endpoints: (1..=n).map(endpoint).collect(), ..Pool::default() };
        table.pools.insert(PoolKey(name.into()), Arc::new(pool));
    }
    table
}

fn answer(table: &RoutingTable, url: &str, headers: &[&str]) -> (bool, String) {
    let headers: Vec<String> = headers.iter().map(ToString::to_string).collect();
    let question = Question::new(url, "GET", &headers).expect("valid question");
    let router = Router::empty().compile(table.clone(), &Live::default());
    let mut text = Text::new(false);
    let served = explain(&mut text, &router, &question);
    (served, text.finish())
}

/// Asserts that each of `expected` appears, in this order.
fn assert_says(table: &RoutingTable, url: &str, headers: &[&str], expected: &[&str]) -> bool {
    let (served, text) = answer(table, url, headers);
    let mut rest = text.as_str();
    for part in expected {
        let at =
            rest.find(part).unwrap_or_else(|| panic!("{url} {headers:?}: {part:?} is not next in\n{text}"));
        rest = &rest[at + part.len()..];
    }
    served
}

fn prefix(path: &str) -> PathMatch {
    PathMatch::Prefix(path.into())
}

#[test]
fn the_whole_answer_reads_well() {
    let table = table(vec![(
        "shop.example",
        vec![
            forward(prefix("/"), &[("shop/web:80", 1)]),
            forward(prefix("/cart"), &[("shop/web:80", 90), ("shop/next:80", 10)]),
            forward(PathMatch::Exact("/cart".into()), &[("shop/web:80", 1)]),
        ],
    )]);
    let (served, text) = answer(&table, "shop.example/cart/7?x=1", &[]);
    assert!(served);
    let expected = "\
GET http://shop.example/cart/7?x=1

  host        3 rules for shop.example (exact)
  path        Prefix /cart of Ingress shop/web: the longest of 2 matches
                Prefix  /      matches, but is shorter
                Exact   /cart  no: Exact is not a prefix
  backend        90%  shop/web:80
                      2 endpoints by RoundRobin, Http1: 10.0.0.1:8080, 10.0.0.2:8080
                 10%  shop/next:80  canary canary-1
                      1 endpoint by RoundRobin, Http1: 10.0.0.1:8080
";
    assert_eq!(text, expected);
}

#[test]
fn hosts_from_precise_to_any() {
    let root = || vec![forward(prefix("/"), &[("shop/web:80", 1)])];
    let mut table = table(vec![("a.example", root()), ("*.example", root())]);
    assert!(assert_says(&table, "a.example", &[], &["1 rule for a.example (exact)"]));
    assert!(assert_says(&table, "b.example", &[], &["for *.example (wildcard); none for b.example"]));
    let nobody =
        ["404: no rules for b.c.example, *.c.example, any host", "there are rules for *.example, a.example"];
    assert!(!assert_says(&table, "b.c.example", &[], &nobody));
    table.hosts.insert(HostPattern::any(), Arc::new(Host { rules: root() }));
    let any = ["for any host (any host); none for b.c.example, *.c.example"];
    assert!(assert_says(&table, "b.c.example", &[], &any));
}

#[test]
fn paths_that_do_not_match_say_why() {
    let rules = vec![
        forward(PathMatch::Exact("/exact".into()), &[("shop/web:80", 1)]),
        forward(prefix("/cart"), &[("shop/web:80", 1)]),
    ];
    let table = table(vec![("a.example", rules)]);
    for (url, reason) in [
        ("a.example/exact/", "/exact  no: Exact minds the trailing slash"),
        ("a.example/carts", "/cart   no: Prefix matches whole elements"),
        ("a.example/CART", "/cart   no: case counts"),
    ] {
        let said = ["404: no rule of this host matches", reason];
        assert!(!assert_says(&table, url, &[], &said));
    }
    assert!(assert_says(&table, "a.example/x/..//%63art/", &[], &["matched as /cart/", "Prefix /cart"]));
}

#[test]
fn conditions_decide_before_shares() {
    let mut division = split(&[("shop/web:80", 95), ("shop/next:80", 5)]);
    let header = |when| Override { backend: 1, when };
    division.overrides = vec![
        header(When::Header("x-canary".into())),
        header(When::HeaderPattern("x-user".into(), "^qa-".into())),
        header(When::Cookie("beta".into())),
    ];
    division.sticky = Some(Sticky::Address);
    let table = table(vec![("a.example", vec![rule(prefix("/"), Action::Forward(division))])]);
    for (headers, expected) in [
        (
            &["X-Canary: always"][..],
            &["x-canary: always: yes, so shop/next:80 takes it", "100%  shop/next:80"][..],
        ),
        (
            &["X-Canary: never", "Cookie: beta=always"],
            &["so shop/next:80 is excluded", "but shop/next:80 is excluded", "100%  shop/web:80"],
        ),
        (&["X-User: qa-7"], &["x-canary: always: no", "x-user ~ ^qa-: yes", "100%  shop/next:80"]),
        (&["Cookie: beta=always"], &["beta=always: yes", "100%  shop/next:80"]),
        (&[], &["beta=always: no", "each user stays, by address", "95%  shop/web:80", "5%  shop/next:80"]),
    ] {
        assert!(assert_says(&table, "a.example", headers, expected));
    }
}

/// A question is also a request as the router sees one.
impl RequestView for Question {
    fn header(&self, name: &str) -> Option<&[u8]> {
        Question::header(self, name).map(str::as_bytes)
    }

    fn for_each_header<'a>(&'a self, name: &str, visit: &mut dyn FnMut(&'a [u8])) {
        self.headers.iter().filter(|(n, _)| n == name).for_each(|(_, value)| visit(value.as_bytes()));
    }

    fn client(&self) -> std::net::IpAddr {
        std::net::Ipv4Addr::LOCALHOST.into()
    }
}

#[test]
fn what_conditions_say_is_what_the_router_does() {
    let seed = 3;
    let mut random = fastrand::Rng::with_seed(seed);
    let values = ["always", "never", "yes", "qa-7", ""];
    for round in 0..500 {
        let mut division = split(&[("shop/web:80", 100), ("shop/next:80", 0)]);
        let whens = [
            When::Header("x-a".into()),
            When::HeaderValue("x-a".into(), "yes".into()),
            When::HeaderPattern("x-b".into(), "^qa-[0-9]$".into()),
            When::Cookie("c".into()),
        ];
        for _ in 0..random.u8(0..4) {
            let when = whens[random.usize(0..whens.len())].clone();
            division.overrides.push(Override { backend: 1, when });
        }
        let mut headers = Vec::new();
        for start in ["X-A: ", "X-B: ", "Cookie: c="] {
            if random.bool() {
                headers.push(format!("{start}{}", values[random.usize(0..values.len())]));
            }
        }
        let question = Question::new("a.example", "GET", &headers).expect("valid");
        let table = table(vec![("a.example", vec![rule(prefix("/"), Action::Forward(division.clone()))])]);
        let router = Router::empty().compile(table, &Live::default());
        let Found::Rule(found) = router.find("a.example", b"/") else { panic!("no rule") };
        let CompiledAction::Forward(compiled) = &found.action else { panic!("no split") };
        let chosen = compiled.choose(&router, &question, &Turns::for_worker(0)).backend;
        let mut text = Text::new(false);
        let said = Answer { text: &mut text, router: &router, question: &question }.overrides(&division);
        // Without a condition that decides, the weights leave everything to the primary.
        assert_eq!(said.unwrap_or(0), chosen, "round {round}, seed {seed}: {headers:?} {division:?}");
    }
}

#[test]
fn paths_are_seen_as_the_proxy_sees_them() {
    for (path, expected) in [
        ("/a//b/./c/../d", Ok("/a/b/d")),
        ("/a/..", Ok("/")),
        ("/a/b/..", Ok("/a/")),
        ("/%61%2f", Ok("/a/")),
        ("/..", Err("path leads above the root")),
        ("/%2", Err("malformed percent-encoding")),
        ("/%zz", Err("malformed percent-encoding")),
        ("/%00", Err("NUL in the path")),
    ] {
        assert_eq!(normalise(path).as_deref().map_err(|e| *e), expected, "{path}");
    }
}

#[test]
fn answers_redirects_and_empty_backends() {
    let mut redirected = forward(prefix("/"), &[("shop/gone:80", 50), ("shop/none:80", 50)]);
    redirected.https_redirect = true;
    let closed =
        rule(prefix("/admin"), Action::Respond { status: 503, reason: "auth is not implemented".into() });
    let table = table(vec![("a.example", vec![redirected, closed])]);
    assert!(assert_says(&table, "http://a.example/x?y", &[], &["308 to https://a.example/x?y"]));
    let self_signed = ["certificate", "self-signed", "shop/gone:80", "503 until one is ready"];
    assert!(assert_says(&table, "https://a.example/x", &[], &self_signed));
    let acme = ["not redirected: certificate authorities", "shop/gone:80"];
    assert!(assert_says(&table, "http://a.example/.well-known/acme-challenge/t", &[], &acme));
    assert!(assert_says(&table, "https://a.example/admin", &[], &["503: auth is not implemented"]));
}

#[test]
fn what_matches_is_what_the_router_finds() {
    let paths = ["/", "/a", "/a/", "/a/b", "/ab", "/A", "/b"];
    let kinds: [fn(Arc<str>) -> PathMatch; 3] =
        [PathMatch::Exact, PathMatch::Prefix, PathMatch::StringPrefix];
    for written in paths {
        for kind in kinds {
            let path = kind(written.into());
            let table = table(vec![("a.example", vec![forward(path.clone(), &[("shop/web:80", 1)])])]);
            let router = Router::empty().compile(table, &Live::default());
            for asked in paths {
                let found = matches!(router.find("a.example", asked.as_bytes()), Found::Rule(_));
                assert_eq!(found, matches(&path, asked), "{path:?} {asked}");
            }
        }
    }
}

#[test]
fn foreign_text_is_harmless() {
    assert_eq!(decode("a%20b%zz%4"), "a b%zz%4");
    assert_eq!(encode("https://a/?b=c&d"), "https%3A//a/%3Fb%3Dc%26d");
    assert_eq!(decode(&encode("ü &=#\n")), "ü &=#\n");
}
