//! The binary as people and pipelines run it.
#![allow(clippy::unwrap_used, reason = "a test says what it expects by panicking")]

use std::fs;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::path::Path;
use std::process::{Child, Command, Output, Stdio};
use std::sync::mpsc::{Receiver, sync_channel};
use std::time::Duration;

use tempfile::TempDir;

fn lockgate(args: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_lockgate"));
    command.args(args).env_remove("RUST_LOG").env_remove("NO_COLOR");
    command
}

fn run(args: &[&str]) -> (Option<i32>, String, String) {
    let Output { status, stdout, stderr } = lockgate(args).output().expect("runs");
    let text = |bytes: Vec<u8>| String::from_utf8(bytes).expect("UTF-8");
    (status.code(), text(stdout), text(stderr))
}

fn service(name: &str) -> String {
    format!(
        "apiVersion: v1\nkind: Service\nmetadata: {{name: {name}}}\nspec: {{ports: [{{port: 80}}]}}\n---\n"
    )
}

fn slice(service: &str, port: u16) -> String {
    format!(
        "apiVersion: discovery.k8s.io/v1\nkind: EndpointSlice\n\
         metadata: {{name: {service}-1, labels: {{kubernetes.io/service-name: {service}}}}}\n\
         addressType: IPv4\nports: [{{port: {port}}}]\nendpoints: [{{addresses: [\"127.0.0.1\"]}}]\n---\n"
    )
}

fn ingress(name: &str, host: &str, path: &str, service: &str) -> String {
    format!(
        "apiVersion: networking.k8s.io/v1\nkind: Ingress\nmetadata: {{name: {name}}}\nspec:\n  rules:\n  - host: {host}\n    \
         http: {{paths: [{{path: {path}, pathType: Prefix, backend: {{service: {{name: {service}, port: {{number: 80}}}}}}}}]}}\n---\n"
    )
}

fn folder(files: &[(&str, &str)]) -> TempDir {
    let dir = TempDir::new().expect("a temporary folder");
    for (name, text) in files {
        fs::write(dir.path().join(name), text).expect("writes");
    }
    dir
}

fn path(dir: &TempDir) -> &str {
    dir.path().to_str().expect("UTF-8")
}

#[test]
fn help_names_every_command_and_every_flag_its_variable() {
    let (code, out, _) = run(&["--help"]);
    assert_eq!(code, Some(0));
    for command in ["demo", "ingress", "check", "explain", "Examples:"] {
        assert!(out.contains(command), "{out}");
    }
    let (_, out, _) = run(&["ingress", "--help"]);
    for part in ["[env: LOCKGATE_MANIFESTS]", "[default: 0.0.0.0:8080]", "LOCKGATE_DRAIN_TIMEOUT", "SIGTERM"]
    {
        assert!(out.contains(part), "{part} is missing in {out}");
    }
}

#[test]
fn check_tells_accepted_from_differing_from_refused() {
    let good = [service("web"), ingress("good", "a.example", "/", "web")].concat();
    let refused = ingress("bad", "b.example", "/", "missing");
    let differs = ingress("odd", "c.example", "/", "web").replace("name: odd", "name: odd, unknownField: 1");
    for (text, code, strict, word) in [
        (good.clone(), 0, 0, "accepted  Ingress default/good"),
        ([&*good, &differs].concat(), 0, 1, "differs   Ingress default/odd"),
        ([&*good, &refused].concat(), 1, 1, "refused   Ingress default/bad"),
        (
            [&*good, "kind: Role\napiVersion: rbac.authorization.k8s.io/v1\n"].concat(),
            0,
            0,
            "not used here: 1 Role",
        ),
        ([&*good, "oops: [\n"].concat(), 2, 2, "unreadable  "),
        (
            [&*good, "kind: Gateway\napiVersion: gateway.networking.k8s.io/v1\nmetadata: {name: g}\n"]
                .concat(),
            0,
            1,
            "1 Gateway  default/g",
        ),
    ] {
        let dir = folder(&[("a.yaml", &text)]);
        let (status, out, _) = run(&["check", path(&dir)]);
        assert!(out.contains(word), "{word:?} is missing in\n{out}");
        assert_eq!(status, Some(code), "{out}");
        assert!(!out.contains('\u{1b}'), "colours in a pipe: {out}");
        assert_eq!(run(&["check", "--strict", path(&dir)]).0, Some(strict), "{out}");
    }
}

#[test]
fn check_reads_files_folders_and_standard_input() {
    let dir = folder(&[("web.yaml", &service("web"))]);
    let more = folder(&[("shop.yaml", &ingress("shop", "a.example", "/x", "web"))]);
    let file = more.path().join("shop.yaml");
    let (code, out, _) = run(&["check", path(&dir), file.to_str().expect("UTF-8")]);
    assert_eq!(code, Some(0), "{out}");
    assert!(out.contains("2 files: 1 Ingress, 1 Service"), "{out}");
    assert!(out.contains("a.example  /x    Prefix  default/web:80  (no endpoints)"), "{out}");

    let mut child = lockgate(&["check", "-", "--output", "json"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .expect("runs");
    let text = [service("web"), ingress("shop", "a.example", "/x", "web")].concat();
    child.stdin.take().expect("piped").write_all(text.as_bytes()).expect("writes");
    let output = child.wait_with_output().expect("ends");
    let json: serde_json::Value = serde_json::from_slice(&output.stdout).expect("JSON");
    assert_eq!(json["verdict"], "accepted");
    assert_eq!(json["routes"][0]["host"], "a.example");
    assert_eq!(json["routes"][0]["backends"][0]["service"], "default/web:80");

    for nothing in [&["check", "/nowhere/at/all.yaml"][..], &["check", path(&folder(&[]))]] {
        assert_eq!(run(nothing).0, Some(2));
    }
}

#[test]
fn a_hostile_file_is_refused_quickly_and_the_rest_is_explained() {
    let rules: String = (0..10_000)
        .map(|n| format!("\n  - {{host: h{n}.example, http: {{paths: [{{path: /, pathType: Prefix, backend: {{service: {{name: web, port: {{number: 80}}}}}}}}]}}}}"))
        .collect();
    let many = format!(
        "apiVersion: networking.k8s.io/v1\nkind: Ingress\nmetadata: {{name: many}}\nspec:\n  rules:{rules}\n"
    );
    let long = ingress("long", "long.example", &format!("/{}", "a".repeat(64 << 10)), "web");
    let dir = folder(&[("a.yaml", &service("web")), ("many.yaml", &many), ("long.yaml", &long)]);
    fs::File::create(dir.path().join("huge.yaml")).and_then(|file| file.set_len(50 << 20)).expect("grows");
    let (code, out, _) = run(&["check", path(&dir)]);
    assert_eq!(code, Some(2));
    assert!(out.contains("huge.yaml: is larger than 33554432 bytes"), "the file's problem is missing");
    assert!(out.contains("h9999.example"), "the last of 10,000 rules is missing");
}

#[test]
fn explain_answers_from_files() {
    let text = [service("web"), slice("web", 4000), ingress("shop", "a.example", "/cart", "web")].concat();
    let dir = folder(&[("a.yaml", &text)]);
    let (code, out, _) = run(&["explain", "http://a.example/cart/1", "--manifests", path(&dir)]);
    assert_eq!(code, Some(0), "{out}");
    for part in ["1 rule for a.example (exact)", "Prefix /cart of Ingress default/shop", "127.0.0.1:4000"] {
        assert!(out.contains(part), "{part:?} is missing in\n{out}");
    }
    assert_eq!(run(&["explain", "a.example/else", "--manifests", path(&dir)]).0, Some(1));
    let (code, _, error) = run(&["explain", "ftp://a.example/", "--manifests", path(&dir)]);
    assert_eq!((code, &*error), (Some(2), "lockgate: ftp:// is not served; ask about http:// or https://\n"));
    let (code, _, error) = run(&["explain", "a.example/", "--admin", "127.0.0.1:1"]);
    assert_eq!(code, Some(2));
    assert!(error.contains("is this the --admin-addr of a running Lockgate?"), "{error}");
}

/// A running `lockgate ingress`; killed when dropped.
struct Running {
    child: Child,
    log: Receiver<String>,
    http: SocketAddr,
    admin: SocketAddr,
}

impl Running {
    fn start(dir: &Path) -> Running {
        let manifests = dir.to_str().expect("UTF-8");
        let any = "127.0.0.1:0";
        let flags = ["--http-addr", any, "--https-addr", any, "--admin-addr", any, "--workers", "1"];
        let quick = ["--debounce", "10ms", "--shutdown-grace-period", "200ms", "--drain-timeout", "5s"];
        let mut child = lockgate(&["ingress", "--manifests", manifests])
            .args(flags)
            .args(quick)
            .stderr(Stdio::piped())
            .spawn()
            .expect("runs");
        let stderr = BufReader::new(child.stderr.take().expect("piped"));
        let (lines, log) = sync_channel(1024);
        std::thread::spawn(move || {
            stderr.lines().map_while(Result::ok).try_for_each(|line| lines.send(line))
        });
        let mut running =
            Running { log, child, http: ([0, 0, 0, 0], 0).into(), admin: ([0, 0, 0, 0], 0).into() };
        let address =
            |line: String| line.split_whitespace().nth(1).and_then(|a| a.parse().ok()).expect("an address");
        running.http = address(running.wait_for("  http "));
        running.admin = address(running.wait_for("  admin "));
        running.wait_for("  next ");
        running
    }

    /// The first line of the log from here on that contains `part`.
    fn wait_for(&mut self, part: &str) -> String {
        let mut seen = Vec::new();
        loop {
            let Ok(line) = self.log.recv_timeout(Duration::from_secs(30)) else {
                panic!("{part:?} never came after {seen:#?}");
            };
            if line.contains(part) {
                return line;
            }
            seen.push(line);
        }
    }

    fn terminate(&self) {
        let pid = self.child.id().to_string();
        assert!(Command::new("kill").args(["-TERM", &pid]).status().expect("kill runs").success());
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Status and body.
fn get(address: SocketAddr, host: &str, path: &str) -> (u16, String) {
    let mut stream = TcpStream::connect(address).expect("connects");
    stream.set_read_timeout(Some(Duration::from_secs(20))).expect("a timeout");
    write!(stream, "GET {path} HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n").expect("writes");
    let mut answer = String::new();
    stream.read_to_string(&mut answer).expect("reads");
    let status =
        answer.get(9..12).and_then(|status| status.parse().ok()).unwrap_or_else(|| panic!("{answer:?}"));
    (status, answer.split_once("\r\n\r\n").map_or(String::new(), |(_, body)| body.to_owned()))
}

/// An endpoint that answers every request with `name`.
fn endpoint(name: &'static str) -> u16 {
    let listener = TcpListener::bind("127.0.0.1:0").expect("binds");
    let port = listener.local_addr().expect("bound").port();
    std::thread::spawn(move || {
        for stream in listener.incoming().flatten() {
            std::thread::spawn(move || {
                let mut reader = BufReader::new(stream);
                loop {
                    let mut line = String::new();
                    while line != "\r\n" {
                        line.clear();
                        if reader.read_line(&mut line).unwrap_or(0) == 0 {
                            return;
                        }
                    }
                    let answer = format!("HTTP/1.1 200 OK\r\nContent-Length: {}\r\n\r\n{name}", name.len());
                    if reader.get_mut().write_all(answer.as_bytes()).is_err() {
                        return;
                    }
                }
            });
        }
    });
    port
}

#[test]
fn ingress_serves_follows_explains_and_drains() {
    let (one, two) = (endpoint("one"), endpoint("two"));
    let shop = |service: &str| ingress("shop", "a.example", "/", service);
    let base = [service("one"), slice("one", one), service("two"), slice("two", two)].concat();
    let dir = folder(&[("base.yaml", &base), ("shop.yaml", &shop("one"))]);
    let mut lockgate = Running::start(dir.path());
    assert_eq!(get(lockgate.admin, "admin", "/readyz").0, 200);
    assert_eq!(get(lockgate.http, "a.example", "/"), (200, "one".to_owned()));

    fs::write(dir.path().join("shop.yaml"), shop("two")).expect("writes");
    lockgate.wait_for("generation 2 is live");
    assert_eq!(get(lockgate.http, "a.example", "/"), (200, "two".to_owned()));

    // A broken edit is reported with its place and changes nothing.
    fs::write(dir.path().join("shop.yaml"), "a: [1\nb").expect("writes");
    lockgate.wait_for("shop.yaml:3:1: did not find");
    assert_eq!(get(lockgate.http, "a.example", "/"), (200, "two".to_owned()));

    let (status, table) = get(lockgate.admin, "admin", "/debug/routes?host=a.example");
    assert_eq!(status, 200);
    assert!(table.contains("default/two:80"), "{table}");
    let admin = lockgate.admin.to_string();
    let (code, out, _) = run(&["explain", "http://a.example/x", "--admin", &admin]);
    assert_eq!(code, Some(0), "{out}");
    assert!(out.contains(&format!("127.0.0.1:{two}")), "{out}");
    let (status, metrics) = get(lockgate.admin, "admin", "/metrics");
    assert_eq!(status, 200);
    assert!(metrics.contains("lockgate_"), "{metrics}");
    for (path, expected) in [("/livez", 200), ("/", 200), ("/nothing", 404), ("/debug/explain?url=", 400)] {
        assert_eq!(get(lockgate.admin, "admin", path).0, expected, "{path}");
    }

    lockgate.terminate();
    lockgate.wait_for("SIGTERM: draining");
    assert_eq!(get(lockgate.admin, "admin", "/readyz"), (503, "draining\n".to_owned()));
    lockgate.wait_for("drained");
    assert_eq!(lockgate.child.wait().expect("ends").code(), Some(0));
}

#[test]
fn ingress_says_what_is_wrong_before_it_serves() {
    let (code, _, error) = run(&["ingress", "--manifests", "/nowhere", "--admin-addr", "127.0.0.1:0"]);
    assert_eq!(code, Some(1));
    assert!(error.contains("/nowhere cannot be opened"), "{error}");
    let taken = TcpListener::bind("127.0.0.1:0").expect("binds");
    let address = taken.local_addr().expect("bound").to_string();
    let dir = folder(&[]);
    let (code, _, error) = run(&["ingress", "--manifests", path(&dir), "--admin-addr", &address]);
    assert_eq!(code, Some(1));
    assert!(error.contains("choose another --admin-addr"), "{error}");
}

#[test]
fn the_demo_measures_what_it_promises() {
    let any = "127.0.0.1:0";
    let (code, out, error) =
        run(&["demo", "--once", "--requests", "400", "--http-addr", any, "--https-addr", any]);
    assert_eq!(code, Some(0), "{out}{error}");
    assert_eq!(error, "");
    for part in ["  100%           400           400   0      0", "20 of 20 answered, certificate verified"] {
        assert!(out.contains(part), "{part:?} is missing in\n{out}");
    }
}
