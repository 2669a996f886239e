//! Suites that others wrote, against the proxy: gRPC interop, testssl.sh and smugglex.
//!
//! Each is looked for in `LOCKGATE_TOOLS` and on the PATH; where it is missing
//! the test says so and passes, except in CI, where `.ci/run tools` installs
//! them. Those of gRPC are installed here, where there is Go.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

#[path = "support/messages.rs"]
mod messages;
#[path = "support/peers.rs"]
mod peers;
#[path = "support/toy.rs"]
mod toy;

use std::fs;
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::path::PathBuf;
use std::process::{Child, Command, Output, Stdio};
use std::sync::Arc;
use std::time::Duration;

use lockgate_proxy::Certificate;
use lockgate_proxy::table::{HostPattern, UpstreamProtocol};

/// A tool by its name.
fn find(name: &str) -> Option<PathBuf> {
    let own = std::env::var_os("LOCKGATE_TOOLS").map(PathBuf::from);
    let path = std::env::var_os("PATH").unwrap_or_default();
    let mut folders = own.into_iter().chain(std::env::split_paths(&path));
    folders.find_map(|folder| Some(folder.join(name)).filter(|file| file.is_file()))
}

/// The same. `None`: skip.
fn tool(name: &str) -> Option<PathBuf> {
    required(name, find(name))
}

fn required(name: &str, found: Option<PathBuf>) -> Option<PathBuf> {
    assert!(found.is_some() || std::env::var_os("CI").is_none(), "CI needs {name}");
    if found.is_none() {
        eprintln!("SKIPPED: no {name} in LOCKGATE_TOOLS or on the PATH");
    }
    found
}

/// gRPC's interop `client` or `server`, installed by Go if need be.
fn interop(which: &str) -> Option<PathBuf> {
    let name = format!("grpc-interop-{which}");
    let folder = PathBuf::from(env!("CARGO_TARGET_TMPDIR")).join("grpc-interop-1.83.1");
    let installed = Some(folder.join(which)).filter(|file| file.is_file());
    let found = find(&name).or(installed).or_else(|| {
        let go =
            find("go").or_else(|| Some("/usr/local/go/bin/go".into()).filter(|go: &PathBuf| go.is_file()))?;
        let package = format!("google.golang.org/grpc/interop/{which}@v1.83.1");
        let output = Command::new(go).args(["install", &package]).env("GOBIN", &folder).output().unwrap();
        if !output.status.success() {
            eprintln!("{package}: {}", text(&output));
        }
        output.status.success().then(|| folder.join(which))
    });
    required(&name, found)
}

/// Runs to the end, for as long as `limit`.
fn run(command: &mut Command, limit: Duration) -> Output {
    let mut timed = Command::new("timeout");
    timed.arg("--kill-after=5").arg(limit.as_secs().to_string()).arg(command.get_program());
    timed.args(command.get_args()).stdin(Stdio::null());
    for (name, value) in command.get_envs() {
        timed.env(name, value.unwrap_or_default());
    }
    timed.output().unwrap()
}

fn text(output: &Output) -> String {
    String::from_utf8_lossy(&[output.stdout.as_slice(), &output.stderr].concat()).into_owned()
}

struct Killed(Child);

impl Drop for Killed {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Starts a server and waits until it listens.
fn start(command: &mut Command, address: SocketAddr) -> Killed {
    let child = command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
    let killed = Killed(child);
    for _ in 0..400 {
        if TcpStream::connect(address).is_ok() {
            return killed;
        }
        std::thread::sleep(Duration::from_millis(50));
    }
    panic!("{command:?} does not listen on {address}");
}

fn scratch(name: &str) -> PathBuf {
    let folder = PathBuf::from(env!("CARGO_TARGET_TMPDIR")).join(name);
    let _ = fs::remove_dir_all(&folder);
    fs::create_dir_all(&folder).unwrap();
    folder
}

/// gRPC's own client and server, which know nothing of the proxy between them:
/// TLS before it, HTTP/2 in the clear behind it.
#[test]
fn grpc_interop() {
    let (Some(client), Some(server)) = (interop("client"), interop("server")) else {
        return;
    };
    let upstream = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let port = upstream.port().to_string();
    let _server = start(Command::new(server).args(["--port", &port]), upstream);
    let made = rcgen::generate_simple_self_signed(vec!["grpc.example".to_owned()]).unwrap();
    let (chain, key) = (made.cert.pem(), made.signing_key.serialize_pem());
    let folder = scratch("grpc_interop");
    fs::write(folder.join("ca.pem"), &chain).unwrap();
    let mut table = toy::table(&[upstream], UpstreamProtocol::H2c);
    let certificate = Arc::new(Certificate::from_pem(chain.as_bytes(), key.as_bytes()).unwrap());
    table.certificates.insert(HostPattern::new("grpc.example"), Arc::new(vec![certificate]));
    let (proxy, _publisher) = toy::start(toy::config(), table);
    let mut failed = Vec::new();
    for case in [
        "empty_unary",
        "large_unary",
        "client_streaming",
        "server_streaming",
        "ping_pong",
        "empty_stream",
        "timeout_on_sleeping_server",
        "cancel_after_begin",
        "cancel_after_first_response",
        "status_code_and_message",
        "special_status_message",
        "custom_metadata",
        "unimplemented_method",
        "unimplemented_service",
        "rpc_soak",
        "channel_soak",
    ] {
        for tls in [true, false] {
            let address = if tls { proxy.https_addrs()[0] } else { proxy.http_addrs()[0] };
            let mut command = Command::new(&client);
            command.arg("--server_host=127.0.0.1").arg(format!("--server_port={}", address.port()));
            command.arg(format!("--test_case={case}"));
            if tls {
                command.args(["--use_tls=true", "--use_test_ca=true", "--server_host_override=grpc.example"]);
                command.arg(format!("--ca_file={}", folder.join("ca.pem").display()));
            }
            let output = run(&mut command, Duration::from_secs(60));
            if !output.status.success() {
                failed.push(format!("{case}, TLS {tls}: {}", text(&output)));
            }
        }
    }
    assert!(failed.is_empty(), "{}", failed.join("\n"));
}

/// Findings that come of how this test is set up, and why each is none of the proxy's.
const OF_THE_TEST: [(&str, &str); 4] = [
    ("cert_chain_of_trust", "self-signed for the test; a user brings a Secret"),
    ("cert_validityPeriod", "the same: ten years, as nobody is asked to trust it"),
    ("cert_revocation", "the same: nobody who could revoke it"),
    ("security_headers", "the application's, which here says `ok` and nothing else"),
];

/// testssl.sh finds nothing worse than LOW.
#[test]
fn testssl() {
    let Some(testssl) = tool("testssl") else { return };
    let upstream = toy::says("ok");
    let table = toy::table(&[upstream], UpstreamProtocol::Http1);
    let table = peers::with_certificate(table, &["localhost"]);
    let (proxy, _publisher) = toy::start(toy::config(), table);
    let report = scratch("testssl").join("report.json");
    let mut command = Command::new(testssl);
    command.args(["--quiet", "--color", "0", "--warnings", "off", "--nodns", "none", "--ip", "127.0.0.1"]);
    command.arg("--jsonfile").arg(&report).arg(format!("localhost:{}", proxy.https_addrs()[0].port()));
    let output = run(&mut command, Duration::from_secs(900));
    let findings: Vec<serde_json::Value> = serde_json::from_str(&fs::read_to_string(&report).unwrap())
        .unwrap_or_else(|error| panic!("{error}: {}", text(&output)));
    assert!(findings.len() > 50, "{}", text(&output));
    let worse: Vec<String> = findings
        .iter()
        .filter(|finding| {
            let has = |name: &str, values: &[&str]| values.contains(&finding[name].as_str().unwrap_or("?"));
            let excepted = OF_THE_TEST.iter().any(|(id, _)| finding["id"] == *id);
            // WARN is a question that got no answer, as on a machine that is too busy.
            !has("severity", &["OK", "INFO", "LOW", "WARN"]) && !excepted
        })
        .map(|finding| format!("{} {}: {}", finding["severity"], finding["id"], finding["finding"]))
        .collect();
    assert!(worse.is_empty(), "{}", worse.join("\n"));
}

/// smugglex finds no way to smuggle a request past the proxy, in the clear and over TLS.
#[test]
fn smugglex() {
    let Some(smugglex) = tool("smugglex") else { return };
    let (upstream, _heard) = messages::recorder();
    let table = peers::with_certificate(toy::table(&[upstream], UpstreamProtocol::Http1), &["localhost"]);
    let (proxy, _publisher) = toy::start(toy::config(), table);
    let folder = scratch("smugglex");
    for (scheme, address) in [("http", proxy.http_addrs()[0]), ("https", proxy.https_addrs()[0])] {
        let report = folder.join(format!("{scheme}.json"));
        let mut command = Command::new(&smugglex);
        command.args(["--quiet", "--no-color", "--format", "json", "--timeout", "4", "--concurrency", "8"]);
        command.args(["--fuzz", "--fingerprint", "--output"]).arg(&report);
        command.arg(format!("{scheme}://localhost:{}/", address.port()));
        let output = run(&mut command, Duration::from_secs(900));
        let found = fs::read_to_string(&report).unwrap_or_else(|error| panic!("{error}: {}", text(&output)));
        let found: serde_json::Value = serde_json::from_str(&found).unwrap();
        let mut checks = Vec::new();
        collect(&found, &mut checks);
        assert!(checks.len() >= 5, "{}", text(&output));
        let open: Vec<_> = checks.iter().filter(|check| check["vulnerable"] == true).collect();
        assert!(open.is_empty(), "{scheme}: {open:#?}");
        assert!(output.status.success(), "{scheme}: {}", text(&output));
    }
}

/// The checks of a report, however deep they lie.
fn collect<'a>(value: &'a serde_json::Value, checks: &mut Vec<&'a serde_json::Value>) {
    match value {
        serde_json::Value::Object(fields) if fields.contains_key("vulnerable") => checks.push(value),
        serde_json::Value::Object(fields) => fields.values().for_each(|value| collect(value, checks)),
        serde_json::Value::Array(values) => values.iter().for_each(|value| collect(value, checks)),
        _ => {}
    }
}
