//! Starting and stopping: sockets bound, one thread per worker, drained at the end.

use std::io;
use std::net::SocketAddr;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use tokio::runtime::LocalOptions;
use tokio::sync::{mpsc, oneshot, watch};
use tokio::time::Instant;

use crate::access_log::{AccessLog, WorkerLog};
use crate::certificate::{Certificate, CertificateError};
use crate::config::Config;
use crate::endpoint::Endpoints;
use crate::limit::Limiter;
use crate::listener;
use crate::metrics::Metrics;
use crate::router::{Live, Publisher, Routes, routes};
use crate::tls::Tls;
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
    stop: watch::Sender<bool>,
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
type Sockets = Vec<(std::net::TcpListener, bool)>;

impl Proxy {
    /// Binds every address and starts the workers. Nothing is served before the
    /// first table is published: until then every request answers 404.
    ///
    /// # Errors
    /// See [`StartError`]; nothing keeps running after one.
    pub fn start(config: Config) -> Result<(Proxy, Publisher), StartError> {
        let config = Arc::new(Config { workers: config.workers.max(1), ..config });
        let metrics = Metrics::new(config.workers);
        let live = Arc::new(Live { endpoints: Endpoints::default(), metrics, zone: config.zone.clone() });
        let (publisher, routes) = routes(live.clone());
        let default = Arc::new(Certificate::self_signed(&["lockgate.invalid"])?);
        let tls = Tls::new(Arc::new(routes.clone()), default, &config.tls)?;
        let limiter = Arc::new(Limiter::new(&config.limits, config.workers));
        let (access_log, logs) = match &config.access_log {
            None => (None, Vec::new()),
            Some(log) => {
                let workers: Vec<_> = (0..config.workers).map(|i| live.metrics.worker(i)).collect();
                let (log, logs) = AccessLog::start(log, &workers).map_err(StartError::AccessLog)?;
                (Some(log), logs)
            }
        };
        let (http, https, sockets) = bind_all(&config)?;
        let (stop, _) = watch::channel(false);
        let (end, ended) = mpsc::channel(1);
        let mut logs = logs.into_iter();
        for (index, sockets) in sockets.into_iter().enumerate() {
            let seed = Seed {
                index,
                config: config.clone(),
                live: live.clone(),
                tls: tls.clone(),
                limiter: limiter.clone(),
                routes: routes.clone(),
                log: logs.next(),
                https_port: https.first().map(SocketAddr::port),
                stop: stop.subscribe(),
                end: end.clone(),
            };
            let thread = std::thread::Builder::new().name(format!("lockgate-{index}"));
            thread.spawn(move || seed.run(sockets)).map_err(StartError::Thread)?;
        }
        Ok((Proxy { http, https, config, live, routes, stop, ended, log: access_log }, publisher))
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

    /// Stops: accepts on during the grace, then closes the listeners, lets
    /// connections finish, and returns when they have or the deadline passed.
    /// True when every connection finished by itself.
    pub async fn drain(mut self) -> bool {
        tokio::time::sleep(self.config.drain.grace).await;
        self.stop.send_replace(true);
        // Workers keep the deadline themselves; the extra second is for their threads to end.
        let limit = self.config.drain.deadline + Duration::from_secs(1);
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

fn bind_all(config: &Config) -> Result<(Vec<SocketAddr>, Vec<SocketAddr>, Vec<Sockets>), StartError> {
    let mut workers: Vec<Sockets> = (0..config.workers).map(|_| Vec::new()).collect();
    let mut bound = [Vec::new(), Vec::new()];
    for (tls, addresses) in [(false, &config.http), (true, &config.https)] {
        for &address in addresses {
            let failed = |source| StartError::Bind { address, source };
            let mut real = address;
            for sockets in &mut workers {
                let listener = listener::bind(real).map_err(failed)?;
                // Port 0 is resolved once; the other workers share what it became.
                real = listener.local_addr().map_err(failed)?;
                sockets.push((listener, tls));
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
    https_port: Option<u16>,
    stop: watch::Receiver<bool>,
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
        let Seed { index, config, live, tls, limiter, routes, log, https_port, mut stop, end } = self;
        let metrics = live.metrics.worker(index);
        let deadline = config.drain.deadline;
        let routes = routes.cache();
        let parts = Parts { index, config, metrics, tls, limiter, routes, log, https_port };
        let worker = Worker::new(parts);
        let mut listening = Vec::new();
        for (listener, tls) in sockets {
            let accepting = listener::accept(worker.clone(), listener, tls, stop.clone());
            listening.push(tokio::task::spawn_local(async move {
                if let Err(error) = accepting.await {
                    tracing::error!(%error, "listener failed");
                }
            }));
        }
        let ticking = tokio::task::spawn_local(tick(worker.clone()));
        // An error means the proxy handle is gone: serve on until the process ends.
        if stop.wait_for(|stop| *stop).await.is_err() {
            std::future::pending::<()>().await;
        }
        worker.drain();
        for listening in listening {
            // It has ended by itself or reported why; what it left in the queue is counted now.
            let _ = listening.await;
        }
        let last = Instant::now() + deadline;
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
