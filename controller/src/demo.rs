//! `lockgate demo`: the whole of it on one machine. Two versions of a toy shop,
//! a folder of manifests, the proxy before them, and a canary that moves.

use std::io::Write;
use std::net::{SocketAddr, TcpListener};
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, anyhow, bail};
use tokio::sync::watch;
use tokio::time::{Instant, timeout};

use crate::admin::{self, AdminState};
use crate::args::DemoArgs;
use crate::publish::{Publishing, Translation};
use crate::source::{Folder, FolderOptions};
use crate::translate::Options;
use lockgate_proxy::Proxy;
use lockgate_proxy::config::{Config, Drain};

mod application;
mod folder;
mod visitor;

use folder::{DemoFolder, Identity};
use visitor::{Tally, Visitor, reachable};

const SHOP: &str = "shop.localhost";
const SECURE: &str = "secure.localhost";

/// The canary's shares, in percent.
const STEPS: [u32; 4] = [5, 25, 50, 100];

/// Where the canary stays afterwards, so that both versions can be seen.
const REST: u32 = 25;

/// Requests that try the header, and that try TLS.
const TRIES: u32 = 20;

/// An edit that is not live by then never will be.
const LIVE_MAX: Duration = Duration::from_secs(20);

/// Runs the demo.
///
/// # Errors
/// It cannot be set up, a request failed, or a split is off.
pub async fn run(args: &DemoArgs) -> anyhow::Result<()> {
    say("lockgate demo: two versions of a toy shop behind one gate, without a cluster\n\n");
    let started = Instant::now();
    let mut stage = Stage::set(args).await?;
    say(&stage.describe(started.elapsed()));
    let (live, mut generations) = watch::channel(1);
    let mut gate = stage.gate.take().context("the stage is set once")?;
    let following = gate.follow(live);
    let playing = async {
        let result = stage.play(args, &mut generations).await;
        if result.is_err() || args.once {
            return result;
        }
        stage.move_canary(REST, &mut generations).await?;
        say(&stage.invitation());
        tokio::signal::ctrl_c().await.context("cannot wait for Ctrl-C")?;
        say("\nThe folder is removed. Bye.\n");
        Ok(())
    };
    let result = tokio::select! {
        () = following => Ok(()),
        result = playing => result,
        _ = tokio::signal::ctrl_c() => Ok(()),
    };
    stage.proxy.drain().await;
    result
}

/// Everything that takes part.
struct Stage {
    folder: DemoFolder,
    identity: Identity,
    endpoints: Vec<(&'static str, Vec<SocketAddr>)>,
    proxy: Proxy,
    gate: Option<Gate>,
    http: SocketAddr,
    https: SocketAddr,
    admin: SocketAddr,
    workers: u32,
}

/// From the folder to the proxy, as in `lockgate ingress`.
struct Gate {
    folder: Folder,
    translation: Translation,
    publishing: Publishing,
}

impl Stage {
    async fn set(args: &DemoArgs) -> anyhow::Result<Stage> {
        let mut endpoints = Vec::new();
        for (version, n) in [("v1", 3), ("v2", 2)] {
            let mut addresses = Vec::new();
            for number in 0..n {
                addresses
                    .push(application::start(version, number).await.context("cannot start the toy shop")?);
            }
            endpoints.push((version, addresses));
        }
        let identity = Identity::new(SECURE).context("cannot make a certificate")?;
        let folder = DemoFolder::new(&endpoints, &identity).context("cannot write the demo's manifests")?;
        folder.set_weight(STEPS[0])?;
        let config = Config {
            http: vec![free(args.http_addr)],
            https: vec![free(args.https_addr)],
            drain: Drain { grace: Duration::ZERO, deadline: Duration::from_secs(1) },
            ..Config::default()
        };
        let workers = config.workers as u32;
        let (source, snapshot) = Folder::open(folder.path(), FolderOptions::default())?;
        let mut translation = Translation::new(Options::default());
        translation.update(&snapshot);
        let (proxy, publisher) = Proxy::start(config)?;
        let mut publishing = Publishing::new(publisher, proxy.live().clone());
        publishing.publish(&translation);
        let state = Arc::new(AdminState::default());
        state.started(proxy.routes().clone(), proxy.live().clone());
        state.ready();
        let admin =
            admin::start(SocketAddr::from(([127, 0, 0, 1], 0)), state).context("cannot serve /metrics")?;
        let address =
            |addresses: &[SocketAddr]| addresses.first().copied().map(reachable).context("no listener");
        let (http, https) = (address(proxy.http_addrs())?, address(proxy.https_addrs())?);
        let gate = Some(Gate { folder: source, translation, publishing });
        Ok(Stage { folder, identity, endpoints, proxy, gate, http, https, admin, workers })
    }

    fn describe(&self, took: Duration) -> String {
        let mut lines = String::new();
        for (version, addresses) in &self.endpoints {
            let ports: Vec<String> = addresses.iter().map(|address| address.port().to_string()).collect();
            lines.push_str(&format!(
                "  shop {version}    {} endpoints on ports {}\n",
                addresses.len(),
                ports.join(", ")
            ));
        }
        lines.push_str(&format!("  manifests  {}\n", self.folder.path().display()));
        lines.push_str(&format!("  http       http://{SHOP}:{}/\n", self.http.port()));
        lines.push_str(&format!(
            "  https      https://{SECURE}:{}/ (certificate made just now)\n",
            self.https.port()
        ));
        lines.push_str(&format!("  admin      http://{}/\n", self.admin));
        lines.push_str(&format!("  serving    {} ms after the start\n\n", took.as_millis()));
        lines
    }

    /// The steps, measured; an error if something is not as it should be.
    async fn play(&self, args: &DemoArgs, generations: &mut watch::Receiver<u64>) -> anyhow::Result<()> {
        let shop = Visitor::plain(self.http, SHOP);
        say(&format!(
            "The canary moves by edits of canary.yaml. {} requests at each step:\n\n",
            args.requests
        ));
        say("  weight   expected v2   measured v2   v1     failed   edit live after\n");
        let mut wrong = Vec::new();
        for (index, percent) in STEPS.into_iter().enumerate() {
            // The first share was there from the start.
            let took = if index == 0 { None } else { Some(self.move_canary(percent, generations).await?) };
            let tally = shop.send(args.requests, None).await;
            let expected = (u64::from(args.requests) * u64::from(percent)) as f64 / 100.0;
            let took = took.map_or_else(|| "at start".to_owned(), |took| format!("{} ms", took.as_millis()));
            say(&format!(
                "  {percent:>5}%   {expected:>11}   {:>11}   {:<6} {:<8} {took}\n",
                tally.v2, tally.v1, tally.failed
            ));
            // Every worker divides exactly, to within one request.
            if tally.failed > 0 || (f64::from(tally.v2) - expected).abs() > f64::from(self.workers) {
                wrong.push(format!("{percent}%"));
            }
        }
        let header = shop.send(TRIES, Some(("x-canary", "never"))).await;
        say(&format!("\n  x-canary: never       {} of {TRIES} to v1, though v2 has 100%\n", header.v1));
        let secure = Visitor::tls(self.https, SECURE, &self.identity.certificate)?.send(TRIES, None).await;
        say(&format!("  https                 {} of {TRIES} answered, certificate verified\n\n", secure.v1));
        let all = |tally: Tally| tally == Tally { v1: TRIES, ..Tally::default() };
        if !all(header) {
            wrong.push("the x-canary header".to_owned());
        }
        if !all(secure) {
            wrong.push("https".to_owned());
        }
        if !wrong.is_empty() {
            bail!("not as it should be: {}", wrong.join(", "));
        }
        say("Every request was answered, and every split is exact to within one request per worker.\n");
        Ok(())
    }

    /// Edits the manifest; how long until the edit is live.
    async fn move_canary(
        &self,
        percent: u32,
        generations: &mut watch::Receiver<u64>,
    ) -> anyhow::Result<Duration> {
        generations.borrow_and_update();
        let edited = Instant::now();
        self.folder.set_weight(percent)?;
        match timeout(LIVE_MAX, generations.changed()).await {
            Ok(Ok(())) => Ok(edited.elapsed()),
            Ok(Err(_)) => Err(anyhow!("the folder is no longer followed")),
            Err(_) => Err(anyhow!("the edit of canary.yaml did not go live within {LIVE_MAX:?}")),
        }
    }

    fn invitation(&self) -> String {
        let resolve = |host: &str, address: SocketAddr| {
            format!("--resolve {host}:{}:{} ", address.port(), address.ip())
        };
        let (plain, tls) = (resolve(SHOP, self.http), resolve(SECURE, self.https));
        let (http, https) = (self.http.port(), self.https.port());
        let canary = self.folder.file("canary.yaml");
        format!(
            "The canary is back at {REST}%. Try in another terminal:\n\n\
             \x20 curl {plain}http://{SHOP}:{http}/\n\
             \x20 curl {plain}-H 'x-canary: always' http://{SHOP}:{http}/\n\
             \x20 curl {tls}--cacert {pem} https://{SECURE}:{https}/\n\
             \x20 sed -i 's/canary-weight: .*/canary-weight: \"75\"/' {canary}\n\
             \x20 lockgate explain http://{SHOP}/ --admin {admin}\n\
             \x20 curl http://{admin}/metrics\n\n\
             or open http://{SHOP}:{http}/ in a browser. Ctrl-C ends the demo.\n",
            pem = self.folder.file("secure.pem").display(),
            canary = canary.display(),
            admin = self.admin,
        )
    }
}

impl Gate {
    async fn follow(&mut self, live: watch::Sender<u64>) {
        loop {
            let snapshot = self.folder.changed().await;
            self.translation.update(&snapshot);
            if self.publishing.publish(&self.translation) {
                live.send_replace(self.publishing.generation());
            }
        }
    }
}

/// The address if nobody has it, else the same with a free port. The proxy
/// itself shares ports between its workers, so it would not notice another one.
fn free(address: SocketAddr) -> SocketAddr {
    match TcpListener::bind(address) {
        Ok(_) => address,
        Err(_) => SocketAddr::new(address.ip(), 0),
    }
}

fn say(text: &str) {
    let mut out = std::io::stdout().lock();
    // A reader that has gone is no reason to stop.
    let _ = out.write_all(text.as_bytes()).and_then(|()| out.flush());
}
