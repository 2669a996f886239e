//! What an idle connection costs: the memory of the real binary, fresh, before
//! and after many connections of one request each.
//!
//! `cargo test --profile quick -p lockgate-controller --test idle -- --ignored --nocapture`;
//! `LOCKGATE_IDLE_CONNECTIONS` says how many (5,000; two descriptors each: mind `ulimit -n`).
#![allow(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

mod support {
    #![allow(dead_code, unreachable_pub, reason = "every test file uses its own part of this")]
    pub mod binary;
    pub mod clients;
    pub mod gate;
    pub mod manifests;
    pub mod toys;
    pub mod upgrading;
}

use std::time::Duration;

use support::binary::Binary;
use support::clients::{Connection, Question, Trust, Version};
use support::upgrading::Place;

/// Bytes of the process that are in memory now.
fn resident(binary: &Binary) -> u64 {
    let text = std::fs::read_to_string(format!("/proc/{}/smaps_rollup", binary.id())).unwrap();
    let line = text.lines().find(|line| line.starts_with("Rss:")).unwrap();
    1024 * line.split_whitespace().nth(1).unwrap().parse::<u64>().unwrap()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "a measurement"]
async fn memory_of_idle_connections() {
    let count = std::env::var("LOCKGATE_IDLE_CONNECTIONS").map_or(5000, |count| count.parse().unwrap());
    let place = Place::new().await;
    let trust = Trust::only([&*place.identity.certificate]);
    println!("{count} connections, bytes of each:");
    for (name, tls, version) in [
        ("HTTP/1.1", false, Version::Http1),
        ("HTTP/2", false, Version::Http2),
        ("TLS, HTTP/1.1", true, Version::Http1),
        ("TLS, HTTP/2", true, Version::Http2),
    ] {
        let binary = place.start(2);
        let open = || async {
            let mut connection = match tls {
                true => Connection::tls(binary.https, "web.example", &trust, version).await.unwrap(),
                false => Connection::plain(binary.http, version).await.unwrap(),
            };
            assert_eq!(connection.ask(&Question::new("web.example", "/")).await.unwrap().status, 200);
            connection
        };
        // What the first ones need belongs to all.
        let mut connections = Vec::with_capacity(count + 20);
        for _ in 0..20 {
            connections.push(open().await);
        }
        let before = resident(&binary);
        for _ in 0..count {
            connections.push(open().await);
        }
        let with = resident(&binary);
        drop(connections);
        while binary.open_descriptors() > 40 {
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
        let after = resident(&binary);
        let each = (with - before) / count as u64;
        println!(
            "{name:14} {each:6}   resident {} KiB, {} KiB with them, {} KiB after",
            before >> 10,
            with >> 10,
            after >> 10
        );
        binary.terminate();
        tokio::task::spawn_blocking(|| binary.wait()).await.unwrap();
    }
}
