//! Finding the rule for a request, and compiling one changed host, as the
//! table grows. The bars: lookup p50 at most 250 ns at 100,000 hosts of 10
//! paths; one changed host among 100,000 live in at most 10 ms.

use std::hint::black_box;
use std::sync::Arc;
use std::time::{Duration, Instant};

use criterion::{BatchSize, BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use lockgate_proxy::router::Found;
use lockgate_proxy::router::Live;
use lockgate_proxy::table::{
    Action, Backend, Endpoint, Host, HostPattern, Origin, PathMatch, Pool, PoolKey, Rule, RuleLimits, Split,
};
use lockgate_proxy::{Router, RoutingTable};

const PATHS: [&str; 10] =
    ["/", "/api", "/api/v1", "/api/v2", "/assets", "/cart", "/checkout", "/login", "/products", "/users"];
/// Requests prepared ahead and walked through in a circle; enough that the
/// branch predictor cannot learn them.
const REQUESTS: usize = 1 << 16;

fn host_name(n: usize) -> String {
    format!("app-{n}.team-{}.example", n % 97)
}

/// The path as all hosts have it, or with the host's number in it: then no two hosts share a trie.
fn path_of(path: &str, n: usize, own: bool) -> String {
    if own { format!("{path}-{n}") } else { path.to_owned() }
}

fn pool_key(n: usize) -> PoolKey {
    PoolKey(format!("team-{}/app-{n}:80", n % 97).into())
}

/// Host number `n`; `weight` makes one edition differ from another.
fn host(n: usize, weight: u32, own_paths: bool) -> Arc<Host> {
    let origin = Arc::new(Origin {
        kind: "Ingress",
        namespace: format!("team-{}", n % 97).into(),
        name: format!("app-{n}").into(),
    });
    let rule = |path: &&str| Rule {
        path: PathMatch::Prefix(path_of(path, n, own_paths).into()),
        origin: origin.clone(),
        https_redirect: false,
        action: Action::Forward(Split {
            backends: vec![Backend { pool: pool_key(n), weight, canary: "".into(), steering: None }],
            overrides: Vec::new(),
            sticky: None,
        }),
        limits: RuleLimits::default(),
        edits: None,
    };
    Arc::new(Host { rules: PATHS.iter().map(rule).collect() })
}

fn table(hosts: usize, own_paths: bool) -> RoutingTable {
    let mut table = RoutingTable::default();
    for n in 0..hosts {
        table.hosts.insert(HostPattern::new(&host_name(n)), host(n, 1, own_paths));
        let address = ([10, (n >> 16) as u8, (n >> 8) as u8, n as u8], 8080).into();
        let endpoints = vec![Endpoint { address, weight: 1, zone: None }];
        table.pools.insert(pool_key(n), Arc::new(Pool { endpoints, ..Pool::default() }));
    }
    table
}

/// Host numbers with probability proportional to `1 / (rank + 1)`, ranks shuffled.
fn zipf(hosts: usize, random: &mut fastrand::Rng) -> Vec<usize> {
    let mut sum = 0.0;
    let cumulative: Vec<f64> = (1..=hosts)
        .map(|rank| {
            sum += 1.0 / rank as f64;
            sum
        })
        .collect();
    let mut names: Vec<usize> = (0..hosts).collect();
    random.shuffle(&mut names);
    let draw = |_| {
        let at = random.f64() * sum;
        names[cumulative.partition_point(|c| *c < at).min(hosts - 1)]
    };
    (0..REQUESTS).map(draw).collect()
}

/// What is asked for: host, path and what follows the path. Kept as numbers,
/// lest 65,536 requests in full take the table's place in the cache.
type Request = (u32, u8, u16);

fn requests(hosts: &[usize], random: &mut fastrand::Rng) -> Vec<Request> {
    hosts.iter().map(|n| (*n as u32, random.u8(1..PATHS.len() as u8), random.u16(..))).collect()
}

/// Lookups timed by the batch. A proxy has just read the request it looks up,
/// so each batch is spelled out before it is timed; the table stays as cold as
/// its size makes it.
struct Batches {
    requests: Vec<Request>,
    own_paths: bool,
    next: usize,
    hot: Vec<(String, String)>,
    /// Nanoseconds per lookup, one for each batch.
    samples: Vec<u32>,
}

impl Batches {
    const SIZE: usize = 32;

    fn new(requests: Vec<Request>, own_paths: bool) -> Batches {
        let hot = vec![Default::default(); Batches::SIZE];
        Batches { requests, own_paths, next: 0, hot, samples: Vec::new() }
    }

    fn spell_out_next(&mut self) {
        for (host, path) in &mut self.hot {
            let (n, of_ten, item) = self.requests[self.next % self.requests.len()];
            *host = host_name(n as usize);
            *path = path_of(PATHS[usize::from(of_ten)], n as usize, self.own_paths);
            path.push_str(&format!("/item/{item}"));
            self.next += 1;
        }
    }

    #[expect(clippy::disallowed_methods, reason = "what is measured is real time")]
    fn time(&mut self, router: &Router, iterations: u64) -> Duration {
        let batches = iterations.div_ceil(Batches::SIZE as u64);
        let mut sum = Duration::ZERO;
        for _ in 0..batches {
            self.spell_out_next();
            let start = Instant::now();
            for (host, path) in &self.hot {
                let found = router.find(black_box(host), black_box(path.as_bytes()));
                assert!(matches!(black_box(found), Found::Rule(_)));
            }
            let took = start.elapsed();
            self.samples.push((took.as_nanos() / Batches::SIZE as u128) as u32);
            sum += took;
        }
        sum.mul_f64(iterations as f64 / (batches * Batches::SIZE as u64) as f64)
    }

    fn report(&mut self, name: &str, hosts: usize) {
        self.samples.sort_unstable();
        if let (Some(p50), Some(p99)) =
            (self.samples.get(self.samples.len() / 2), self.samples.get(self.samples.len() * 99 / 100))
        {
            println!("route_lookup/{name}/{hosts} p50 {p50} ns, p99 {p99} ns (batches of {})", Batches::SIZE);
        }
    }
}

fn lookup(c: &mut Criterion) {
    let mut group = c.benchmark_group("route_lookup");
    group.throughput(Throughput::Elements(1));
    let mut random = fastrand::Rng::with_seed(1);
    for (hosts, own_paths) in [(1, false), (1_000, false), (10_000, false), (100_000, false), (100_000, true)]
    {
        let router = Router::empty().compile(table(hosts, own_paths), &Live::default());
        let uniform: Vec<usize> = (0..REQUESTS).map(|_| random.usize(0..hosts)).collect();
        for (name, numbers) in [("uniform", uniform), ("zipf", zipf(hosts, &mut random))] {
            let name = if own_paths { format!("{name}_own_paths") } else { name.to_owned() };
            let mut batches = Batches::new(requests(&numbers, &mut random), own_paths);
            group.bench_function(BenchmarkId::new(&name, hosts), |b| {
                b.iter_custom(|iterations| batches.time(&router, iterations));
            });
            batches.report(&name, hosts);
        }
    }
    group.finish();
}

fn compile_one_of_many(c: &mut Criterion) {
    const HOSTS: usize = 100_000;
    let live = Live::default();
    let original = table(HOSTS, false);
    let router = Router::empty().compile(original.clone(), &live);
    let mut group = c.benchmark_group("compile");
    let mut weight = 1;
    group.bench_function(BenchmarkId::new("one_changed_host", HOSTS), |b| {
        let changed = || {
            weight += 1;
            let mut table = original.clone();
            let n = weight as usize * 7_919 % HOSTS;
            table.hosts.insert(HostPattern::new(&host_name(n)), host(n, weight, false));
            table
        };
        b.iter_batched(changed, |table| router.compile(table, &live), BatchSize::SmallInput);
    });
    let mut port = 0_u16;
    group.bench_function(BenchmarkId::new("one_changed_pool", HOSTS), |b| {
        let changed = || {
            port = (port + 1) % 50_000;
            let mut table = original.clone();
            let endpoints =
                vec![Endpoint { address: ([10, 9, 9, 9], port + 1).into(), weight: 1, zone: None }];
            let n = usize::from(port) * 7_919 % HOSTS;
            table.pools.insert(pool_key(n), Arc::new(Pool { endpoints, ..Pool::default() }));
            table
        };
        b.iter_batched(changed, |table| router.compile(table, &live), BatchSize::SmallInput);
    });
    group.finish();
}

criterion_group!(benches, lookup, compile_one_of_many);
criterion_main!(benches);
