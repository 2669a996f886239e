//! The product in this process: a folder, the translation, the proxy and the
//! admin endpoint, put together as `lockgate ingress` does.

use std::net::SocketAddr;
use std::path::Path;
use std::sync::Arc;
use std::sync::mpsc;
use std::thread::JoinHandle;

use clap::Parser;
use lockgate_controller::admin::{self, AdminState};
use lockgate_controller::args::{Cli, Command, IngressArgs};
use lockgate_controller::publish::{Publishing, Translation};
use lockgate_controller::source::{Folder, Snapshot};
use lockgate_proxy::Proxy;
use tokio::sync::{oneshot, watch};

/// What has become of the folder.
#[derive(Clone, Debug, Default)]
pub struct Seen {
    /// Counts what was published.
    pub generation: u64,
    /// A line for everything that was said about an object.
    pub notices: Vec<String>,
    /// A line for every file that could not be used.
    pub problems: Vec<String>,
    /// The hosts that are served.
    pub hosts: Vec<String>,
}

/// A running product.
pub struct Gate {
    pub http: SocketAddr,
    pub https: SocketAddr,
    pub admin: SocketAddr,
    pub seen: watch::Receiver<Seen>,
    stop: oneshot::Sender<()>,
    thread: JoinHandle<bool>,
}

/// The flags of a product on free ports of loopback.
pub fn flags(folder: &Path, more: &[&str]) -> Vec<String> {
    let folder = folder.to_str().expect("a temporary folder has a plain name");
    let mut flags = vec!["ingress", "--manifests", folder, "--workers", "2", "--debounce", "10ms"];
    flags.extend(["--http-addr", "127.0.0.1:0", "--https-addr", "127.0.0.1:0"]);
    flags.extend(["--admin-addr", "127.0.0.1:0"]);
    flags.extend(["--shutdown-grace-period", "0s", "--drain-timeout", "20s"]);
    flags.extend(more);
    flags.into_iter().map(str::to_owned).collect()
}

impl Gate {
    /// Starts over a folder; returns when the first table is live.
    pub fn open(folder: &Path, more: &[&str]) -> Gate {
        let flags = flags(folder, more);
        let cli = Cli::try_parse_from(std::iter::once("lockgate".to_owned()).chain(flags)).expect("flags");
        let Command::Ingress(args) = cli.command else { panic!("not ingress") };
        let (stop, stopped) = oneshot::channel();
        let (started, starting) = mpsc::sync_channel(1);
        let thread = std::thread::spawn(move || {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
            runtime.expect("a runtime").block_on(run(&args, &started, stopped))
        });
        let (http, https, admin, seen) = starting.recv().expect("starts");
        Gate { http, https, admin, seen, stop, thread }
    }

    /// Drains; true when every connection ended by itself.
    pub fn close(self) -> bool {
        // It stops when the channel closes as well.
        let _ = self.stop.send(());
        self.thread.join().expect("no panic")
    }

    /// Returns when what was seen of the folder is so.
    pub async fn until(&mut self, so: impl FnMut(&Seen) -> bool) {
        let seen = tokio::time::timeout(super::clients::PATIENCE, self.seen.wait_for(so)).await;
        seen.expect("seen in time").expect("still running");
    }
}

type Started = mpsc::SyncSender<(SocketAddr, SocketAddr, SocketAddr, watch::Receiver<Seen>)>;

async fn run(args: &IngressArgs, started: &Started, stopped: oneshot::Receiver<()>) -> bool {
    let state = Arc::new(AdminState::default());
    let admin = admin::start(args.admin_addr, state.clone()).expect("admin");
    let (mut folder, snapshot) = Folder::open(&args.manifests, args.folder()).expect("a folder");
    let mut translation = Translation::new(args.options());
    translation.update(&snapshot);
    let (proxy, publisher) = Proxy::start(args.config()).expect("ports");
    let mut publishing = Publishing::new(publisher, proxy.live().clone());
    state.started(proxy.routes().clone(), proxy.live().clone());
    publishing.publish(&translation);
    state.ready();
    let (say, seen) = watch::channel(look(&snapshot, &translation, publishing.generation()));
    started.send((proxy.http_addrs()[0], proxy.https_addrs()[0], admin, seen)).expect("awaited");
    let following = async {
        loop {
            let snapshot = folder.changed().await;
            translation.update(&snapshot);
            publishing.publish(&translation);
            say.send_replace(look(&snapshot, &translation, publishing.generation()));
        }
    };
    tokio::pin!(following);
    tokio::select! {
        () = &mut following => {}
        _ = stopped => {}
    }
    state.draining();
    tokio::select! {
        in_time = proxy.drain() => in_time,
        () = &mut following => false,
    }
}

fn look(snapshot: &Snapshot, translation: &Translation, generation: u64) -> Seen {
    let desired = translation.desired();
    let said = snapshot.object_notices.iter().chain(&desired.statuses);
    let lines = said
        .flat_map(|(object, notices)| notices.iter().map(move |n| format!("{object}: {:?} {n}", n.level)));
    Seen {
        generation,
        notices: lines.collect(),
        problems: snapshot.problems.iter().map(ToString::to_string).collect(),
        hosts: desired.routes.hosts.keys().map(|host| host.as_str().to_owned()).collect(),
    }
}
