//! `lockgate ingress`: a folder of manifests in, live traffic out.

use std::fmt::Write;
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context;
use lockgate_proxy::RoutingTable;
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::time::timeout;
use tracing::{info, warn};

use crate::admin::{self, AdminState};
use crate::args::IngressArgs;
use crate::publish::{Publishing, Translation};
use crate::source::{Folder, Snapshot};
use crate::text::count;
use lockgate_proxy::Proxy;

/// After this long without a change there is time to tidy up.
const QUIET: Duration = Duration::from_secs(10);

/// Runs until a signal ends it; returns once everything is drained.
///
/// # Errors
/// Something that was asked for cannot be had at start: the folder, an address.
pub async fn run(args: &IngressArgs) -> anyhow::Result<()> {
    let mut stop = Stop::new().context("cannot listen for signals")?;
    let state = Arc::new(AdminState::default());
    let admin = admin::start(args.admin_addr, state.clone()).with_context(|| {
        format!("cannot serve the admin endpoint on {}; choose another --admin-addr", args.admin_addr)
    })?;
    // Everything is read and translated before a port is opened: a client that
    // can connect finds the routes there.
    let (mut folder, snapshot) = Folder::open(&args.manifests, args.folder())?;
    let mut translation = Translation::new(args.objects.options());
    translation.update(&snapshot);
    let (proxy, publisher) = Proxy::start(args.config())?;
    let mut publishing = Publishing::new(publisher, proxy.live().clone());
    state.started(proxy.routes().clone(), proxy.live().clone());
    publishing.publish(&translation);
    state.ready();
    eprint!("{}", banner(args, admin, &proxy, &snapshot, &translation));

    let following = follow(&mut folder, &mut translation, &mut publishing);
    tokio::pin!(following);
    let signal = tokio::select! {
        () = &mut following => "the folder is no longer followed",
        signal = stop.signal() => signal,
    };
    state.draining();
    info!("{signal}: draining; a second signal ends at once");
    let drained = proxy.drain();
    tokio::pin!(drained);
    // Endpoints come and go during the grace period as at any other time.
    let in_time = tokio::select! {
        in_time = &mut drained => in_time,
        () = &mut following => drained.await,
        signal = stop.signal() => {
            warn!("{signal} again: ending at once");
            return Ok(());
        }
    };
    match in_time {
        true => info!("drained"),
        false => warn!("--drain-timeout is over: the remaining connections are cut"),
    }
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
struct Stop {
    terminate: Signal,
    interrupt: Signal,
}

impl Stop {
    fn new() -> std::io::Result<Stop> {
        Ok(Stop { terminate: signal(SignalKind::terminate())?, interrupt: signal(SignalKind::interrupt())? })
    }

    async fn signal(&mut self) -> &'static str {
        tokio::select! {
            _ = self.terminate.recv() => "SIGTERM",
            _ = self.interrupt.recv() => "SIGINT",
        }
    }
}
