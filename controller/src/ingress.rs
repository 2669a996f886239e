//! `lockgate ingress`: a folder of manifests in, live traffic out.

use std::fmt::Write;
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context;
use lockgate_proxy::RoutingTable;
use lockgate_proxy::l4::ListenerState;
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::time::timeout;
use tracing::{info, warn};

use crate::admin::{Admin, AdminState};
use crate::args::IngressArgs;
use crate::publish::{Publishing, Translation};
use crate::source::{Folder, Snapshot};
use crate::text::count;
use crate::upgrade::Upgrade;
use lockgate_proxy::Proxy;
use lockgate_proxy::access_log::Reopener;

/// After this long without a change there is time to tidy up.
const QUIET: Duration = Duration::from_secs(10);

/// Runs until a signal ends it or a new process takes over; returns once everything is drained.
///
/// # Errors
/// Something that was asked for cannot be had at start: the folder, an address.
pub async fn run(args: &IngressArgs) -> anyhow::Result<()> {
    let mut stop = Stop::new().context("cannot listen for signals")?;
    let (inherited, mut upgrade) = Upgrade::begin(args.stop.upgrade_socket.as_deref()).await?;
    let state = Arc::new(AdminState::default());
    let mut admin = Admin::bind(args.admin_addr, inherited.sockets()).with_context(|| {
        format!("cannot serve the admin endpoint on {}; choose another --admin-addr", args.admin_addr)
    })?;
    // A process before this one says that there is a ready one, until this one can.
    if !upgrade.has_predecessor() {
        admin.start(&state)?;
    }
    // Everything is read, translated and compiled before a connection is accepted:
    // a client that is answered finds the routes there.
    let (mut folder, snapshot) = Folder::open(&args.manifests, args.folder())?;
    let mut translation = Translation::new(args.options());
    translation.update(&snapshot);
    let (proxy, publisher) = Proxy::bind(args.config(), &inherited)?;
    let mut publishing = Publishing::new(publisher, proxy.live().clone());
    state.started(proxy.routes().clone(), proxy.live().clone());
    publishing.publish(&translation);
    proxy.open();
    proxy.listening().await;
    state.ready();
    admin.start(&state)?;
    upgrade.ready().await?;
    reopen_on_signal(proxy.access_log_reopener()).context("cannot listen for signals")?;
    eprint!("{}", banner(args, admin.address(), &proxy, &snapshot, &translation));

    let following = follow(&mut folder, &mut translation, &mut publishing);
    tokio::pin!(following);
    let signal = tokio::select! {
        () = &mut following => Some("the folder is no longer followed"),
        signal = stop.signal() => Some(signal),
        () = upgrade.successor(proxy.estate()) => None,
    };
    // From now on a new process would ask in vain: it starts as the first of its own chain.
    drop(upgrade);
    let drained = async {
        match signal {
            Some(signal) => {
                state.draining();
                info!("{signal}: draining; a second signal ends at once");
                proxy.drain().await
            }
            None => {
                state.relieved();
                info!("a new process has taken over: draining");
                proxy.retire(args.stop.upgrade_drain_timeout.0).await
            }
        }
    };
    tokio::pin!(drained);
    // Endpoints come and go during the grace period as at any other time.
    let in_time = tokio::select! {
        in_time = &mut drained => in_time,
        () = &mut following => drained.await,
        signal = stop.again(signal.is_none()) => {
            warn!("{signal} again: ending at once");
            return Ok(());
        }
    };
    match in_time {
        true => info!("drained"),
        false => warn!("the drain timeout is over: the remaining connections are cut"),
    }
    Ok(())
}

/// Has the access log's file opened again after SIGUSR1, as nginx does, or SIGHUP.
fn reopen_on_signal(reopener: Reopener) -> std::io::Result<()> {
    let mut user = signal(SignalKind::user_defined1())?;
    let mut hangup = signal(SignalKind::hangup())?;
    tokio::spawn(async move {
        loop {
            tokio::select! {
                Some(()) = user.recv() => {}
                Some(()) = hangup.recv() => {}
                else => return,
            }
            reopener.reopen();
        }
    });
    Ok(())
}

async fn follow(folder: &mut Folder, translation: &mut Translation, publishing: &mut Publishing) {
    loop {
        let Ok(snapshot) = timeout(QUIET, folder.changed()).await else {
            publishing.collect();
            continue;
        };
        translation.update(&snapshot);
        if publishing.publish(translation) {
            info!("generation {} is live", publishing.generation());
        }
    }
}

fn rules(table: &RoutingTable) -> usize {
    table.hosts.values().map(|host| host.rules.len()).sum()
}

fn banner(
    args: &IngressArgs,
    admin: std::net::SocketAddr,
    proxy: &Proxy,
    snapshot: &Snapshot,
    translation: &Translation,
) -> String {
    let table = &translation.desired().routes;
    let tallies = translation.tallies();
    let folder = args.manifests.display();
    let list = |addresses: &[std::net::SocketAddr]| {
        let addresses: Vec<String> = addresses.iter().map(ToString::to_string).collect();
        if addresses.is_empty() { "off".to_owned() } else { addresses.join(", ") }
    };
    let endpoints: usize = table.pools.values().map(|pool| pool.endpoints.len()).sum();
    let served = [
        count(snapshot.store.ingresses.len(), "Ingress"),
        format!("{} on {}", count(rules(table), "route"), count(table.hosts.len(), "host")),
        count(endpoints, "endpoint"),
        count(table.certificates.len(), "certificate"),
    ];
    let mut out = String::new();
    // Writing to a String cannot fail.
    let _ = writeln!(out, "\nlockgate {} serves {folder}", env!("CARGO_PKG_VERSION"));
    let _ = writeln!(out, "  http      {}", list(proxy.http_addrs()));
    let _ = writeln!(out, "  https     {}", list(proxy.https_addrs()));
    if !table.listeners.is_empty() {
        let failed = |state: &ListenerState| matches!(state, ListenerState::Failed(_));
        let failed = proxy.live().listeners.get().values().filter(|state| failed(state)).count();
        let ports = match failed {
            0 => format!("{} open", table.listeners.len()),
            failed => format!("{} open, {failed} not, see above", table.listeners.len() - failed),
        };
        let _ = writeln!(out, "  tcp, udp  {ports}   /debug/listeners");
    }
    let _ = writeln!(out, "  admin     {admin}   /readyz /metrics /debug/routes");
    let _ = writeln!(out, "  serving   {}", served.join(", "));
    let problems = tallies.refused + tallies.differing + snapshot.problems.len();
    if problems > 0 {
        let _ = writeln!(
            out,
            "  problems  {} refused, {} not as written, {} with problems; see above, or: lockgate check {folder}",
            tallies.refused,
            tallies.differing,
            count(snapshot.problems.len(), "file"),
        );
    }
    if rules(table) == 0 {
        let _ =
            writeln!(out, "  next      there is no route yet: add an Ingress and its Service to {folder}");
    } else {
        let _ = writeln!(out, "  next      edit the folder, changes go live at once; SIGTERM drains");
    }
    out.push('\n');
    out
}

/// The signals that mean: stop.
pub(crate) struct Stop {
    terminate: Signal,
    interrupt: Signal,
}

impl Stop {
    pub(crate) fn new() -> std::io::Result<Stop> {
        Ok(Stop { terminate: signal(SignalKind::terminate())?, interrupt: signal(SignalKind::interrupt())? })
    }

    /// The signal that ends a drain. One that was begun by a new process has seen none yet:
    /// then the first says what is the case already.
    async fn again(&mut self, first: bool) -> &'static str {
        if first {
            let signal = self.signal().await;
            info!("{signal}: draining already; a second signal ends at once");
        }
        self.signal().await
    }

    pub(crate) async fn signal(&mut self) -> &'static str {
        tokio::select! {
            _ = self.terminate.recv() => "SIGTERM",
            _ = self.interrupt.recv() => "SIGINT",
        }
    }
}
