//! The proxy seen by curl.
#![allow(clippy::unwrap_used, reason = "a test says what it expects by panicking")]

#[path = "support/peers.rs"]
mod peers;
#[path = "support/toy.rs"]
mod toy;

use std::process::Command;

use lockgate_proxy::Proxy;
use lockgate_proxy::table::UpstreamProtocol;
use peers::{EVERY_ENDPOINT, HOST, app, endpoint, pattern, with_certificate};

/// Whether there is a curl that speaks HTTP/2. In CI there has to be one.
fn has_curl() -> bool {
    let output = Command::new("curl").arg("--version").output();
    let has = output.is_ok_and(|output| String::from_utf8_lossy(&output.stdout).contains("HTTP2"));
    assert!(has || std::env::var_os("CI").is_none(), "CI needs a curl with HTTP/2");
    if !has {
        eprintln!("SKIPPED: no curl with HTTP/2 on this machine");
    }
    has
}

fn curl(proxy: &Proxy, arguments: &[&str]) -> Vec<u8> {
    let (http, https) = (proxy.http_addrs()[0], proxy.https_addrs()[0]);
    let mut command = Command::new("curl");
    command
        .args(["--silent", "--show-error", "--insecure", "--max-time", "20"])
        .args(["--connect-to", &format!("{HOST}:80:{http}"), "--connect-to", &format!("{HOST}:443:{https}")])
        .args(arguments);
    // The endpoints run on the other threads of this runtime.
    let output = tokio::task::block_in_place(|| command.output()).unwrap();
    assert!(output.status.success(), "{arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
    output.stdout
}

/// How curl comes to the proxy: scheme, option, the version it then reports.
const WAYS: [(&str, &str, &str); 5] = [
    ("http", "--http1.0", "1.0"),
    ("http", "--http1.1", "1.1"),
    ("http", "--http2-prior-knowledge", "2"),
    ("https", "--http1.1", "1.1"),
    ("https", "--http2", "2"),
];

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn every_way_to_every_endpoint() {
    if !has_curl() {
        return;
    }
    let upload = tempfile();
    for speaks in EVERY_ENDPOINT {
        let app = endpoint(speaks, app).await;
        let table = with_certificate(toy::table(&[app], speaks), &[HOST]);
        let (proxy, _publisher) = toy::start(toy::config(), table);
        for (scheme, option, version) in WAYS {
            println!("{scheme} {option} {speaks:?}");
            let url = |path: &str| format!("{scheme}://{HOST}{path}");
            let facts = curl(
                &proxy,
                &[
                    option,
                    &url("/bytes/10"),
                    "-o",
                    "/dev/null",
                    "-w",
                    "%{http_code} %{size_download} %{http_version}",
                ],
            );
            // What the proxy speaks to an HTTP/1.0 client is HTTP/1.1 by its status line.
            let version = if version == "1.0" { "1.1" } else { version };
            assert_eq!(String::from_utf8_lossy(&facts), format!("200 10 {version}"));
            for path in ["/bytes/300000", "/pieces/300000"] {
                assert_eq!(curl(&proxy, &[option, &url(path)]), pattern(0, 300_000));
            }
            // More than a megabyte: curl asks with Expect first.
            let file = format!("@{}", upload.display());
            let sent = curl(&proxy, &[option, "--data-binary", &file, &url("/count")]);
            assert_eq!(String::from_utf8_lossy(&sent), "3000000 0");
            if option != "--http1.0" {
                let chunked = ["-H", "Transfer-Encoding: chunked", "-T", &file[1..], "-X", "POST"];
                let url = url("/count");
                let arguments = [&[option], &chunked[..], &[&url]].concat();
                assert_eq!(String::from_utf8_lossy(&curl(&proxy, &arguments)), "3000000 0");
            }
            let head = curl(&proxy, &[option, "-I", &url("/bytes/10")]);
            assert!(String::from_utf8_lossy(&head).to_lowercase().contains("content-length: 10\r\n"));
        }
    }
    std::fs::remove_file(upload).unwrap();
}

fn tempfile() -> std::path::PathBuf {
    let path = std::env::temp_dir().join(format!("lockgate-curl-{}", std::process::id()));
    std::fs::write(&path, pattern(0, 3_000_000)).unwrap();
    path
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn hosts_share_a_connection_only_if_the_certificate_covers_both() {
    if !has_curl() {
        return;
    }
    let app = endpoint(UpstreamProtocol::Http1, app).await;
    let table = with_certificate(toy::table(&[app], UpstreamProtocol::Http1), &[HOST]);
    let (proxy, _publisher) = toy::start(toy::config(), table);
    let facts = ["-o", "/dev/null", "-w", "%{http_code}"];
    for (host, status) in [(HOST, "200"), ("b.example", "421")] {
        for option in ["--http1.1", "--http2"] {
            let header = format!("Host: {host}");
            let arguments = [&facts[..], &[option, "-H", &header, "https://a.example/bytes/1"]].concat();
            assert_eq!(String::from_utf8_lossy(&curl(&proxy, &arguments)), status, "{host} {option}");
        }
    }
}
