//! What h2spec says of us: its generic, hpack and http2 suites, strict, in the
//! clear and over TLS, in front of an endpoint of either protocol.
#![allow(clippy::unwrap_used, reason = "a test says what it expects by panicking")]

#[path = "support/peers.rs"]
mod peers;
#[path = "support/toy.rs"]
mod toy;

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::Command;

use http::{Request, Response};
use http_body_util::BodyExt as _;
use hyper::body::Incoming;
use lockgate_proxy::table::UpstreamProtocol;
use peers::{Body, HOST, endpoint, full, pattern, with_certificate};

/// A case that does not pass in the clear, and why. Over TLS, where ALPN has said which protocol is
/// spoken, all of them do: even those on priorities, which RFC 9113 has retired.
const EXCEPTED_IN_THE_CLEAR: &[(&str, &str)] = &[(
    "http2/3.5/2",
    "the port speaks HTTP/1 too, so whoever does not send the preface of HTTP/2 is answered 400 in \
     HTTP/1 and hung up on; the suite takes that text for a broken frame",
)];

/// Versions to install: the newest commit; and the one before its last touches,
/// which module proxies know by its full name.
const VERSIONS: [&str; 2] = ["af83a65f0b62", "v0.0.0-20200804131034-70ac22940108"];

/// Cases in the suites; fewer would mean that some were not run.
const CASES: usize = 146;

/// `LOCKGATE_H2SPEC`, or one on the path, or one that Go installs for us.
fn h2spec() -> Option<PathBuf> {
    if let Some(given) = std::env::var_os("LOCKGATE_H2SPEC") {
        return Some(given.into());
    }
    let answers = |program: &Path| Command::new(program).arg("--version").output().is_ok();
    let folder = Path::new(env!("CARGO_TARGET_TMPDIR")).join("h2spec");
    let installed = folder.join("h2spec");
    for program in [Path::new("h2spec"), &installed] {
        if answers(program) {
            return Some(program.to_owned());
        }
    }
    for go in ["go", "/usr/local/go/bin/go"] {
        for version in VERSIONS {
            let package = format!("github.com/summerwind/h2spec/cmd/h2spec@{version}");
            let output = Command::new(go).args(["install", &package]).env("GOBIN", &folder).output();
            match output {
                Ok(output) if output.status.success() => return Some(installed),
                Ok(output) => eprintln!("{package}: {}", String::from_utf8_lossy(&output.stderr)),
                Err(_) => break,
            }
        }
    }
    assert!(std::env::var_os("CI").is_none(), "CI needs h2spec, or Go to install it");
    eprintln!("SKIPPED: no h2spec on this machine, and no Go to install it");
    None
}

/// One case of the report.
struct Case {
    name: String,
    failure: Option<String>,
}

/// Runs every suite against `address`.
fn run(h2spec: &Path, address: SocketAddr, tls: bool) -> Vec<Case> {
    let report = Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!("h2spec-{}.xml", address.port()));
    let mut command = Command::new(h2spec);
    command.args(["generic", "hpack", "http2", "--strict", "--timeout", "2", "--path", "/"]);
    command.args(["--host", &address.ip().to_string(), "--port", &address.port().to_string()]);
    command.arg("--junit-report").arg(&report);
    if tls {
        command.args(["--tls", "--insecure"]);
    }
    // The endpoint runs on the other threads of this runtime.
    let output = tokio::task::block_in_place(|| command.output()).unwrap();
    let text = std::fs::read_to_string(&report)
        .unwrap_or_else(|error| panic!("{error}: {}", String::from_utf8_lossy(&output.stdout)));
    std::fs::remove_file(&report).unwrap();
    parse(&text)
}

/// The cases of a JUnit report, named by section and place within it.
fn parse(report: &str) -> Vec<Case> {
    let attribute = |tag: &str, name: &str| {
        let (_, rest) = tag.split_once(&format!("{name}=\"")).unwrap();
        rest.split('"').next().unwrap().to_owned()
    };
    let mut places = std::collections::HashMap::new();
    let case = |text: &str| {
        let (tag, inner) = text.split_once('>').unwrap();
        let (section, title) = (attribute(tag, "package"), attribute(tag, "classname"));
        let place: &mut usize = places.entry(section.clone()).or_default();
        *place += 1;
        let inner = inner.split("</testcase>").next().unwrap();
        let failed = ["<failure", "<error"].iter().any(|tag| inner.contains(tag));
        Case { name: format!("{section}/{place}"), failure: failed.then(|| format!("{title}: {inner}")) }
    };
    report.split("<testcase ").skip(1).map(case).collect()
}

/// Answers when it has the whole request: the suite breaks off requests, and takes for granted that
/// they are still under way then.
async fn patient(request: Request<Incoming>) -> Response<Body> {
    // One that was broken off gets no answer anyway.
    let _ = request.into_body().collect().await;
    Response::new(full(pattern(0, 1000)))
}

#[tokio::test(flavor = "multi_thread")]
async fn every_case_passes() {
    let Some(h2spec) = h2spec() else { return };
    let mut found = Vec::new();
    for speaks in [UpstreamProtocol::Http1, UpstreamProtocol::H2c] {
        let app = endpoint(speaks, patient).await;
        let (proxy, _publisher) =
            toy::start(toy::config(), with_certificate(toy::table(&[app], speaks), &[HOST]));
        for (address, tls) in [(proxy.http_addrs()[0], false), (proxy.https_addrs()[0], true)] {
            let cases = run(&h2spec, address, tls);
            assert!(cases.len() >= CASES, "only {} cases were run", cases.len());
            println!("endpoint {speaks:?}, TLS {tls}: {} cases", cases.len());
            for Case { name, failure } in cases {
                let excepted = !tls && EXCEPTED_IN_THE_CLEAR.iter().any(|(excepted, _)| *excepted == name);
                match failure {
                    Some(failure) if !excepted => {
                        found.push(format!("{speaks:?}, TLS {tls}, {name}: {failure}"))
                    }
                    None if excepted => found.push(format!("{name} passes: it needs no exception any more")),
                    Some(_) | None => {}
                }
            }
        }
    }
    assert!(found.is_empty(), "{}", found.join("\n"));
}
