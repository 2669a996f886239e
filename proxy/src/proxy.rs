//! Starting and stopping: sockets bound, one thread per worker, drained at the end.

use std::io;
use std::net::{SocketAddr, TcpListener};
use std::rc::Rc;
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use tokio::runtime::LocalOptions;
use tokio::sync::{mpsc, oneshot, watch};
use tokio::time::Instant;

use crate::access_log::{AccessLog, Reopener, WorkerLog};
use crate::certificate::{Certificate, CertificateError};
use crate::config::Config;
use crate::endpoint::Endpoints;
use crate::handover::{Estate, Inheritance, Sockets as NamedSockets};
use crate::health::Checks;
use crate::l4::{self, ListenerStates, Opener};
use crate::limit::Limiter;
use crate::listener;
use crate::metrics::Metrics;
use crate::router::{Live, Publisher, Routes, routes};
use crate::tls::Tls;
use crate::tls::tickets::TicketKeys;
use crate::worker::{Parts, Worker};

/// How often a worker looks after its pools and logs.
const TICK: Duration = Duration::from_secs(1);

/// How long the access log may take for what is still to be written when everything else has ended.
const LAST_LINES: Duration = Duration::from_secs(2);

/// How often a draining worker looks whether its last connection has gone.
const DRAIN_TICK: Duration = Duration::from_millis(20);

/// A running proxy. Dropping it does not stop it; [`Proxy::drain`] does.
pub struct Proxy {
    http: Vec<SocketAddr>,
    https: Vec<SocketAddr>,
    config: Arc<Config>,
    live: Arc<Live>,
    routes: Routes,
    /// True once connections are to be accepted.
    open: watch::Sender<bool>,
    stop: watch::Sender<bool>,
    /// Set before `stop` if another process has taken over: how long connections may take then.
    relieved: Arc<OnceLock<Duration>>,
    estate: Estate,
    /// A message from each worker that had to cut connections; closed when the last has ended.
    ended: mpsc::Receiver<()>,
    log: Option<AccessLog>,
}

/// Why a proxy cannot start.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// An address cannot be bound.
    #[error("cannot listen on {address}: {source}{}", hint(source))]
    Bind {
        /// The address.
        address: SocketAddr,
        /// The system's answer.
        source: io::Error,
    },
    /// The default certificate cannot be made.
    #[error("cannot make the default certificate: {0}")]
    Certificate(#[from] CertificateError),
    /// The TLS library refuses its configuration.
    #[error("cannot set up TLS: {0}")]
    Tls(#[from] rustls::Error),
    /// The access log cannot be opened.
    #[error("cannot open the access log: {0}")]
    AccessLog(io::Error),
    /// A thread cannot be started.
    #[error("cannot start a worker thread: {0}")]
    Thread(io::Error),
}

fn hint(error: &io::Error) -> &'static str {
    match error.kind() {
        io::ErrorKind::AddrInUse => "; another process has it: choose another port or stop that process",
        io::ErrorKind::PermissionDenied => {
            "; ports below 1024 need CAP_NET_BIND_SERVICE: grant it or choose a higher port"
        }
        io::ErrorKind::AddrNotAvailable => "; this host has no such address",
        _ => "",
    }
}

/// The listening sockets of one worker.
type Sockets = Vec<(TcpListener, bool)>;

impl Proxy {
    /// Binds every address and starts the workers. Nothing is served before the
    /// first table is published: until then every request answers 404.
    ///
    /// # Errors
    /// See [`StartError`]; nothing keeps running after one.
    pub fn start(config: Config) -> Result<(Proxy, Publisher), StartError> {
        let (proxy, publisher) = Proxy::bind(config, &Inheritance::default())?;
        proxy.open();
        Ok((proxy, publisher))
    }

    /// As [`Proxy::start`], with what another process has left; but nothing is
    /// accepted before [`Proxy::open`]. Until then clients wait in the kernel's queues.
    ///
    /// # Errors
    /// See [`StartError`]; nothing keeps running after one.
    pub fn bind(config: Config, inherited: &Inheritance) -> Result<(Proxy, Publisher), StartError> {
        let config = Arc::new(Config { workers: config.workers.max(1), ..config });
        let metrics = Metrics::new(config.workers);
        let live = Arc::new(Live {
            endpoints: Endpoints::default(),
            metrics,
            listeners: ListenerStates::default(),
            zone: config.zone.clone(),
            checks: Checks::default(),
        });
        live.checks.enable();
        let (publisher, routes) = routes(live.clone());
        let default = Arc::new(Certificate::self_signed(&["lockgate.invalid"])?);
        let tickets = Arc::new(TicketKeys::new(&inherited.tickets)?);
        let tls = Tls::with_tickets(Arc::new(routes.clone()), default, &config.tls, tickets.clone())?;
        let limiter = Arc::new(Limiter::new(&config.limits, config.workers));
        let (access_log, logs) = match &config.access_log {
            None => (None, Vec::new()),
            Some(log) => {
                let workers: Vec<_> = (0..config.workers).map(|i| live.metrics.worker(i)).collect();
                let (log, logs) = AccessLog::start(log, &workers).map_err(StartError::AccessLog)?;
                (Some(log), logs)
            }
        };
        let (http, https, sockets) = bind_all(&config, &inherited.sockets)?;
        let taken = http.iter().chain(&https).copied().collect();
        let commands = Opener::start(
            publisher.listeners(),
            config.workers,
            taken,
            inherited.sockets.clone(),
            live.clone(),
        );
        let commands = commands.map_err(StartError::Thread)?;
        let estate = Estate { sockets: inherited.sockets.clone(), tickets };
        let ((open, _), (stop, _)) = (watch::channel(false), watch::channel(false));
        let relieved = Arc::new(OnceLock::new());
        let (end, ended) = mpsc::channel(1);
        let mut logs = logs.into_iter();
        for (index, (sockets, commands)) in sockets.into_iter().zip(commands).enumerate() {
            let seed = Seed {
                index,
                config: config.clone(),
                live: live.clone(),
                tls: tls.clone(),
                limiter: limiter.clone(),
                routes: routes.clone(),
                log: logs.next(),
                commands,
                https_port: https.first().map(SocketAddr::port),
                open: open.subscribe(),
                stop: stop.subscribe(),
                relieved: relieved.clone(),
                end: end.clone(),
            };
            let thread = std::thread::Builder::new().name(format!("lockgate-{index}"));
            thread.spawn(move || seed.run(sockets)).map_err(StartError::Thread)?;
        }
        let log = access_log;
        let proxy = Proxy { http, https, config, live, routes, open, stop, relieved, estate, ended, log };
        Ok((proxy, publisher))
    }

    /// Begins to accept: the first table is published. Once is enough.
    pub fn open(&self) {
        self.open.send_replace(true);
    }

    /// Waits until every L4 listener of the live table is open, or has been tried.
    pub async fn listening(&self) {
        let router = self.routes.load_full();
        let mut states = self.live.listeners.subscribe();
        // Ends early only if the states do, which are of the proxy itself.
        let _ = states.wait_for(|states| states.keys().eq(router.table().listeners.keys())).await;
    }

    /// What a process that takes over is given.
    pub fn estate(&self) -> &Estate {
        &self.estate
    }

    /// Where plaintext is served, with real ports.
    pub fn http_addrs(&self) -> &[SocketAddr] {
        &self.http
    }

    /// Where TLS is served, with real ports.
    pub fn https_addrs(&self) -> &[SocketAddr] {
        &self.https
    }

    /// Counters of all workers.
    pub fn metrics(&self) -> &Metrics {
        &self.live.metrics
    }

    /// What outlives generations; shared with whoever encodes the metrics.
    pub fn live(&self) -> &Arc<Live> {
        &self.live
    }

    /// The read half of the routes.
    pub fn routes(&self) -> &Routes {
        &self.routes
    }

    /// For whoever hears that the access log's file was rotated.
    pub fn access_log_reopener(&self) -> Reopener {
        self.log.as_ref().map(AccessLog::reopener).unwrap_or_default()
    }

    /// Stops: accepts on during the grace, then closes the listeners, lets
    /// connections finish, and returns when they have or the deadline passed.
    /// True when every connection finished by itself.
    pub async fn drain(self) -> bool {
        tokio::time::sleep(self.config.drain.grace).await;
        let deadline = self.config.drain.deadline;
        self.finish(deadline).await
    }

    /// As [`Proxy::drain`], after another process has taken over: without grace,
    /// and an idle connection may stay for as long as it could otherwise. The
    /// next request on it is the last, and its answer says so.
    pub async fn retire(self, deadline: Duration) -> bool {
        // `self` is gone after this: it is set once.
        let _ = self.relieved.set(deadline);
        self.finish(deadline).await
    }

    async fn finish(mut self, deadline: Duration) -> bool {
        // Or clients would go on connecting to sockets that nobody accepts from.
        self.estate.sockets.forget_all();
        self.stop.send_replace(true);
        // Workers keep the deadline themselves; the extra second is for their threads to end.
        let limit = deadline + Duration::from_secs(1);
        let finished = async {
            let mut all = true;
            while self.ended.recv().await.is_some() {
                all = false;
            }
            all
        };
        let all = tokio::time::timeout(limit, finished).await.unwrap_or(false);
        if let Some(log) = self.log.take() {
            // The workers have handed over their last lines; a destination that takes none must not hold us.
            let (done, written) = oneshot::channel();
            std::thread::spawn(move || {
                log.join();
                // Nobody waits any more once the time is up.
                let _ = done.send(());
            });
            if tokio::time::timeout(LAST_LINES, written).await.is_err() {
                tracing::warn!("the last lines of the access log could not be written");
            }
        }
        all
    }
}

fn bind_all(
    config: &Config,
    named: &NamedSockets,
) -> Result<(Vec<SocketAddr>, Vec<SocketAddr>, Vec<Sockets>), StartError> {
    let mut workers: Vec<Sockets> = (0..config.workers).map(|_| Vec::new()).collect();
    let mut bound = [Vec::new(), Vec::new()];
    for (tls, addresses) in [(false, &config.http), (true, &config.https)] {
        for &address in addresses {
            let failed = |source| StartError::Bind { address, source };
            let mut real = address;
            let name = format!("{} {address}", if tls { "https" } else { "http" });
            let mut inherited = named.take(&name).into_iter().map(TcpListener::from);
            // Each has a queue of its own: with fewer workers than before, some have several.
            for index in 0.. {
                let listener = match inherited.next() {
                    Some(listener) => listener,
                    None if index < workers.len() => listener::bind(real).map_err(failed)?,
                    None => break,
                };
                // Port 0 is resolved once; the other workers share what it became.
                real = listener.local_addr().map_err(failed)?;
                named.keep(&name, &listener).map_err(failed)?;
                workers[index % config.workers].push((listener, tls));
            }
            bound[usize::from(tls)].push(real);
        }
    }
    let [http, https] = bound;
    Ok((http, https, workers))
}

/// What a worker thread is started with.
struct Seed {
    index: usize,
    config: Arc<Config>,
    live: Arc<Live>,
    tls: Tls,
    limiter: Arc<Limiter>,
    routes: Routes,
    log: Option<WorkerLog>,
    /// Which L4 listeners to open and close.
    commands: mpsc::Receiver<l4::Command>,
    https_port: Option<u16>,
    open: watch::Receiver<bool>,
    stop: watch::Receiver<bool>,
    relieved: Arc<OnceLock<Duration>>,
    /// Told if connections were cut, and dropped when the thread ends.
    end: mpsc::Sender<()>,
}

impl Seed {
    fn run(self, sockets: Sockets) {
        let mut builder = tokio::runtime::Builder::new_current_thread();
        match builder.enable_all().build_local(LocalOptions::default()) {
            Ok(runtime) => runtime.block_on(self.serve(sockets)),
            Err(error) => tracing::error!(%error, "cannot start a worker"),
        }
    }

    async fn serve(self, sockets: Sockets) {
        let Seed {
            index,
            config,
            live,
            tls,
            limiter,
            routes,
            log,
            commands,
            https_port,
            mut open,
            mut stop,
            relieved,
            end,
        } = self;
        let metrics = live.metrics.worker(index);
        let deadline = config.drain.deadline;
        let routes = routes.cache();
        let parts = Parts { index, config, metrics, tls, limiter, routes, log, https_port };
        let worker = Worker::new(parts);
        tokio::select! {
            // Without the handle that opens, one that stops is gone as well.
            _ = open.wait_for(|open| *open) => {}
            _ = stop.wait_for(|stop| *stop) => {}
        }
        let mut listening = Vec::new();
        for (listener, tls) in sockets {
            let accepting = listener::accept(worker.clone(), listener, tls, stop.clone());
            listening.push(tokio::task::spawn_local(async move {
                if let Err(error) = accepting.await {
                    tracing::error!(%error, "listener failed");
                }
            }));
        }
        listening.push(tokio::task::spawn_local(l4::serve(worker.clone(), commands, stop.clone())));
        let ticking = tokio::task::spawn_local(tick(worker.clone()));
        // An error means the proxy handle is gone: serve on until the process ends.
        if stop.wait_for(|stop| *stop).await.is_err() {
            std::future::pending::<()>().await;
        }
        let relieved = relieved.get();
        worker.drain(relieved.is_some());
        for listening in listening {
            // It has ended by itself or reported why; what it left in the queue is counted now.
            let _ = listening.await;
        }
        let last = Instant::now() + *relieved.unwrap_or(&deadline);
        while worker.connections() > 0 && Instant::now() < last {
            tokio::time::sleep(DRAIN_TICK).await;
        }
        if worker.connections() > 0 {
            // Full: another worker has said so already.
            let _ = end.try_send(());
        }
        ticking.abort();
        worker.tick();
    }
}

async fn tick(worker: Rc<Worker>) {
    let mut interval = tokio::time::interval(TICK);
    loop {
        interval.tick().await;
        worker.tick();
    }
}
