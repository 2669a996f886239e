//! `lockgate node`: the Services of a folder of manifests, live on this node.
//!
//! ```text
//!  folder ──► translate ──► ServiceTable ──► Reconciler ──► maps          one thread
//!                                │                ▲
//!                                ▼                │ asks
//!              healthCheckNodePort servers, /healthz, /livez, /metrics, /debug     another
//! ```

use std::fmt::Write;
use std::io;
use std::net::{SocketAddr, TcpListener};
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context;
use hyper::body::Incoming;
use hyper::{Method, Request, StatusCode};
use lockgate_ebpf::kernel::KernelMaps;
use lockgate_ebpf::load;
use lockgate_ebpf::maps::{Capacity, FakeMaps, Maps};
use lockgate_ebpf::sys::namespace;
use lockgate_ebpf_common::{Settings, capacity};
use tokio::sync::{mpsc, oneshot, watch};
use tokio::time::{Instant, sleep_until, timeout};
use tracing::info;

use crate::args::{NodeArgs, NodeSettings};
use crate::http::{self, Answer, Reply, parameters};
use crate::ingress::Stop;
use crate::source::{Folder, Snapshot};
use crate::text::count;

mod agent;
mod checks;
pub(crate) mod config;
mod debug;
pub(crate) mod explain;
mod health;
mod metrics;
mod own;

use agent::{Agent, Shared};
use debug::Ask;
use explain::Question;
use own::Addresses;

/// Questions that wait for the agent; further ones are refused.
const ASKS_MAX: usize = 16;

/// The agent answers between two changes; one that takes longer is busy.
const ASK_TIMEOUT: Duration = Duration::from_secs(10);

const INDEX: &str = "\
lockgate node

  /metrics          Prometheus, under kube-proxy's names where it has them
  /debug/services   what should be, what is, and the difference; ?service=namespace/name for one
  /debug/explain    ?address=10.96.0.10:53/udp&client=10.1.1.5
  /proxyMode        how Services are made to work
";

/// Runs until a signal ends it. What the maps hold goes on serving.
///
/// # Errors
/// Something that was asked for cannot be had at start: the folder, an address, the kernel.
pub async fn run(args: &NodeArgs) -> anyhow::Result<()> {
    let settings = args.settings()?;
    for warning in &settings.warnings {
        tracing::warn!("{warning}");
    }
    if args.cleanup {
        return load::remove(&kernel_options(args)).context("cannot take everything out of the kernel");
    }
    match args.dry_run {
        true => serve(args, settings, imagined_maps()).await,
        false => serve(args, settings, kernel_maps(args)?).await,
    }
}

/// Maps of the size the kernel's have, in this process.
fn imagined_maps() -> FakeMaps {
    let room =
        Capacity { services: capacity::SERVICES, slots: capacity::SLOTS, endpoints: capacity::ENDPOINTS };
    FakeMaps::new(room, capacity::FRONTENDS as usize)
}

/// The kernel's maps: loaded, pinned and attached if they are not yet.
fn kernel_maps(args: &NodeArgs) -> anyhow::Result<KernelMaps> {
    // The programs are pinned: they stay when this process goes.
    let mut maps =
        load::load(&kernel_options(args)).context("cannot serve; --dry-run shows what would be")?.maps;
    let (node_port_first, node_port_last) = args.service_node_port_range;
    let node_namespace = namespace::cookie().context("cannot tell this network namespace from others")?;
    maps.put_settings(&Settings { node_namespace, node_port_first, node_port_last, ..Settings::default() })
        .context("cannot write the settings of the programs")?;
    Ok(maps)
}

fn kernel_options(args: &NodeArgs) -> load::Options {
    load::Options { bpffs: args.bpffs.clone(), cgroup: args.cgroup_root.clone(), ..load::Options::default() }
}

/// Everything but which maps.
async fn serve<M: Maps>(args: &NodeArgs, settings: NodeSettings, maps: M) -> anyhow::Result<()> {
    let mut stop = Stop::new().context("cannot listen for signals")?;
    let healthz = bind(settings.healthz, "--healthz-bind-address")?;
    let metrics = bind(settings.metrics, "--metrics-bind-address")?;
    let addresses = [&healthz, &metrics].map(|one| one.as_ref().and_then(|one| one.local_addr().ok()));
    let (checks, wanted) = watch::channel(checks::Wanted::default());
    let shared = Shared {
        health: Arc::new(health::Health::new(settings.health_timeout)),
        metrics: metrics::Metrics::new(),
        checks,
    };
    let (asks, mut asked) = mpsc::channel(ASKS_MAX);
    let answering = Answering { shared: shared.clone(), asks };
    let name = settings.node.name.clone();
    let mut agent = Agent::new(maps, settings.node, shared).context("cannot read what the maps hold")?;
    let (mut folder, snapshot) = Folder::open(&args.manifests, args.folder())?;
    let mut own = Addresses::follow();
    agent.set_addresses(own.now());
    agent.update(&snapshot);
    answering.start(healthz, metrics, wanted).context("cannot start a thread")?;
    eprint!("{}", banner(args, &name, addresses, &snapshot, &agent));

    let signal = tokio::select! {
        signal = stop.signal() => signal,
        () = follow(&mut agent, &mut folder, &mut own, &mut asked) => "the folder is no longer followed",
    };
    info!("{signal}: ending; what is live stays");
    Ok(())
}

async fn follow<M: Maps>(
    agent: &mut Agent<M>,
    folder: &mut Folder,
    own: &mut Addresses,
    asked: &mut mpsc::Receiver<Ask>,
) {
    let mut next = agent.retry().map(|wait| Instant::now() + wait);
    loop {
        tokio::select! {
            snapshot = folder.changed() => agent.update(&snapshot),
            addresses = own.changed() => agent.set_addresses(addresses),
            () = sleep_until(next.unwrap_or_else(Instant::now)), if next.is_some() => agent.again(),
            Some(ask) = asked.recv() => {
                ask.answer(agent);
                continue;
            }
        }
        next = agent.retry().map(|wait| Instant::now() + wait);
    }
}

fn bind(address: Option<SocketAddr>, flag: &str) -> anyhow::Result<Option<TcpListener>> {
    let Some(address) = address else { return Ok(None) };
    let listener = TcpListener::bind(address)
        .with_context(|| format!("cannot serve on {address}; choose another {flag}"))?;
    listener.set_nonblocking(true)?;
    Ok(Some(listener))
}

/// What answers requests, on a thread of its own: a busy agent must not look dead.
#[derive(Clone)]
struct Answering {
    shared: Shared,
    asks: mpsc::Sender<Ask>,
}

impl Answering {
    fn start(
        self,
        healthz: Option<TcpListener>,
        metrics: Option<TcpListener>,
        wanted: watch::Receiver<checks::Wanted>,
    ) -> io::Result<()> {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        let serving = async move {
            if let Some(listener) = healthz.map(tokio::net::TcpListener::from_std).transpose()? {
                let shared = self.shared.clone();
                tokio::spawn(http::serve(listener, move |request| {
                    let reply = shared.health.answer(request.uri().path(), &shared.metrics);
                    async move { reply }
                }));
            }
            if let Some(listener) = metrics.map(tokio::net::TcpListener::from_std).transpose()? {
                let health = self.shared.health.clone();
                tokio::spawn(http::serve(listener, move |request| self.clone().answer(request)));
                checks::serve(wanted, health).await;
            } else {
                checks::serve(wanted, self.shared.health.clone()).await;
            }
            Ok::<(), io::Error>(())
        };
        let thread = std::thread::Builder::new().name("lockgate-health".into());
        thread.spawn(move || {
            if let Err(error) = runtime.block_on(serving) {
                tracing::error!("health and metrics cannot be served: {error}");
            }
        })?;
        Ok(())
    }

    async fn answer(self, request: Request<Incoming>) -> Reply {
        if !matches!(*request.method(), Method::GET | Method::HEAD) {
            let refusal = Answer::text(StatusCode::METHOD_NOT_ALLOWED, "only GET and HEAD\n");
            return refusal.header("Allow", "GET, HEAD").into();
        }
        let query = request.uri().query().unwrap_or_default();
        let value =
            |wanted: &str| parameters(query).find(|(name, _)| *name == wanted).map(|(_, value)| value);
        match request.uri().path() {
            "/" => Answer::text(StatusCode::OK, INDEX).into(),
            "/healthz" | "/livez" | "/readyz" => Answer::text(StatusCode::OK, "ok").into(),
            "/proxyMode" => Answer::text(StatusCode::OK, "ebpf").into(),
            "/metrics" => {
                let text = self.shared.metrics.encode() + &self.events().await;
                let kind = "text/plain; version=0.0.4; charset=utf-8";
                Answer::new(StatusCode::OK, kind, text).no_store().into()
            }
            "/debug/services" => {
                let of = value("service");
                self.ask(|reply| Ask::Services(of, reply)).await
            }
            "/debug/explain" => {
                let client = value("client")
                    .unwrap_or_default()
                    .parse()
                    .map_err(|_| "client is no address".to_owned());
                match client.and_then(|client| Question::new(&value("address").unwrap_or_default(), client)) {
                    Ok(question) => self.ask(|reply| Ask::Explain(question, reply)).await,
                    Err(error) => Answer::text(StatusCode::BAD_REQUEST, &format!("{error}\n")).into(),
                }
            }
            _ => Answer::text(StatusCode::NOT_FOUND, INDEX).into(),
        }
    }

    /// What the programs counted, for Prometheus; nothing while the agent is busy.
    async fn events(&self) -> String {
        let (reply, answer) = oneshot::channel();
        if self.asks.try_send(Ask::Events(reply)).is_err() {
            return String::new();
        }
        timeout(ASK_TIMEOUT, answer).await.ok().and_then(Result::ok).unwrap_or_default()
    }

    async fn ask(&self, ask: impl FnOnce(oneshot::Sender<Reply>) -> Ask) -> Reply {
        let (reply, answer) = oneshot::channel();
        let asked = self.asks.try_send(ask(reply)).is_ok();
        match timeout(ASK_TIMEOUT, answer).await {
            Ok(Ok(answer)) if asked => answer,
            _ => Answer::text(StatusCode::SERVICE_UNAVAILABLE, "the agent is busy; ask again\n").into(),
        }
    }
}

fn banner<M: Maps>(
    args: &NodeArgs,
    name: &str,
    [healthz, metrics]: [Option<SocketAddr>; 2],
    snapshot: &Snapshot,
    agent: &Agent<M>,
) -> String {
    let table = agent.reconciler().table();
    let endpoints: usize = table.services.values().map(|service| service.cluster.len()).sum();
    let shown = |address: Option<SocketAddr>| address.map_or("off".to_owned(), |address| address.to_string());
    let node_ports: Vec<String> = table
        .node
        .addresses
        .iter()
        .filter(|(_, serves)| **serves)
        .map(|(address, _)| address.to_string())
        .collect();
    let mut out = String::new();
    // Writing to a String cannot fail.
    let _ = writeln!(
        out,
        "\nlockgate {} serves {} on node {name}",
        env!("CARGO_PKG_VERSION"),
        args.manifests.display()
    );
    if args.dry_run {
        let _ = writeln!(out, "  dry run     nothing on this machine is changed");
    }
    let _ = writeln!(out, "  health      {}   /healthz /livez", shown(healthz));
    let _ = writeln!(out, "  metrics     {}   /metrics /debug/services", shown(metrics));
    let served = [
        count(table.services.len(), "service port"),
        count(table.frontends.len(), "address"),
        count(endpoints, "endpoint"),
    ];
    let _ = writeln!(out, "  serving     {}", served.join(", "));
    let _ = writeln!(
        out,
        "  node ports  {}",
        if node_ports.is_empty() { "on no address".to_owned() } else { node_ports.join(", ") }
    );
    if !snapshot.problems.is_empty() {
        let _ = writeln!(out, "  problems    {}; see above", count(snapshot.problems.len(), "file"));
    }
    out.push('\n');
    out
}
