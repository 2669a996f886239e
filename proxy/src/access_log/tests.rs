//! Whole lines, and what happens when the destination is slow or fails.

use std::time::{Duration, UNIX_EPOCH};

use super::*;
use crate::metrics::Metrics;

fn origin() -> Origin {
    Origin { kind: "Ingress", namespace: "shop".into(), name: "web".into() }
}

fn entry(origin: Option<&Origin>) -> Entry<'_> {
    Entry {
        time: UNIX_EPOCH + Duration::from_millis(784_111_777_123),
        client: "192.0.2.7".parse().unwrap(),
        method: b"GET",
        host: b"shop.example",
        path: b"/cart?id=1",
        protocol: "HTTP/1.1",
        status: 200,
        bytes_in: 0,
        bytes_out: 1024,
        duration_us: 2_345,
        upstream: Some("[2001:db8::1]:8080".parse().unwrap()),
        upstream_status: 200,
        connect_us: 120,
        first_byte_us: 1_900,
        upstream_us: 2_100,
        retries: 1,
        origin,
        service: Some("shop/cart:80"),
        canary: "cart-v2",
        request_id: b"7f3a",
        user_agent: b"curl/8.5",
        referer: b"",
        tls: Some("TLSv1.3"),
        reason: "",
    }
}

/// A request that never got as far as a route.
fn bare() -> Entry<'static> {
    Entry {
        status: 400,
        bytes_out: 0,
        upstream: None,
        service: None,
        canary: "",
        request_id: b"",
        user_agent: b"",
        tls: None,
        reason: "bad_request",
        ..entry(None)
    }
}

fn line(format: Format, entry: &Entry<'_>) -> String {
    let (mut out, mut clock) = (Vec::new(), WallClock::default());
    match format {
        Format::Json => format::json(&mut out, &mut clock, entry),
        Format::Combined => format::combined(&mut out, &mut clock, entry),
    }
    String::from_utf8(out).unwrap()
}

/// Every write goes to the test, one message each; none happens before the test permits it.
struct Gated {
    permits: Receiver<io::Result<()>>,
    written: SyncSender<Vec<u8>>,
}

impl Write for Gated {
    fn write(&mut self, buffer: &[u8]) -> io::Result<usize> {
        // A test that dropped its permits wants everything written.
        self.permits.recv().unwrap_or(Ok(()))?;
        let _ = self.written.send(buffer.to_vec());
        Ok(buffer.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

fn gated() -> (Gated, SyncSender<io::Result<()>>, Receiver<Vec<u8>>) {
    let (permit, permits) = sync_channel(64);
    let (written, writes) = sync_channel(64);
    (Gated { permits, written }, permit, writes)
}

fn start(destination: Gated, metrics: &Metrics) -> (AccessLog, Vec<WorkerLog>) {
    let workers: Vec<_> = (0..metrics.workers()).map(|i| metrics.worker(i)).collect();
    AccessLog::start_on(Box::new(destination), None, Format::Json, &workers).unwrap()
}

#[test]
fn lines_of_both_formats() {
    let origin = origin();
    assert_eq!(
        line(Format::Json, &entry(Some(&origin))),
        concat!(
            r#"{"time":"1994-11-06T08:49:37.123Z","client":"192.0.2.7","method":"GET","host":"shop.example","#,
            r#""path":"/cart?id=1","protocol":"HTTP/1.1","status":200,"bytes_in":0,"bytes_out":1024,"#,
            r#""duration_us":2345,"upstream":"[2001:db8::1]:8080","upstream_status":200,"connect_us":120,"#,
            r#""first_byte_us":1900,"upstream_us":2100,"retries":1,"kind":"Ingress","namespace":"shop","#,
            r#""name":"web","service":"shop/cart:80","canary":"cart-v2","request_id":"7f3a","#,
            r#""user_agent":"curl/8.5","tls":"TLSv1.3"}"#,
            "\n"
        )
    );
    assert_eq!(
        line(Format::Combined, &entry(Some(&origin))),
        concat!(
            r#"192.0.2.7 - - [06/Nov/1994:08:49:37 +0000] "GET /cart?id=1 HTTP/1.1" 200 1024 "-" "curl/8.5" "#,
            "0 0.002 [shop/cart:80] [cart-v2] [2001:db8::1]:8080 1024 0.002 200 7f3a\n"
        )
    );
    assert_eq!(
        line(Format::Json, &bare()),
        concat!(
            r#"{"time":"1994-11-06T08:49:37.123Z","client":"192.0.2.7","method":"GET","host":"shop.example","#,
            r#""path":"/cart?id=1","protocol":"HTTP/1.1","status":400,"bytes_in":0,"bytes_out":0,"#,
            r#""duration_us":2345,"reason":"bad_request"}"#,
            "\n"
        )
    );
    assert_eq!(
        line(Format::Combined, &bare()),
        concat!(
            r#"192.0.2.7 - - [06/Nov/1994:08:49:37 +0000] "GET /cart?id=1 HTTP/1.1" 400 0 "-" "-" "#,
            "0 0.002 [] [] - - - - -\n"
        )
    );
}

#[test]
fn no_field_can_forge_a_line_or_a_field() {
    let seed = 7;
    let mut random = fastrand::Rng::with_seed(seed);
    for round in 0..2_000 {
        let mut bytes = || -> Vec<u8> {
            let alphabet: &[u8] = b"\"\\\n\r,:{}[] \x00\x1b\x7f\xc2\x85\xe2\x80\xa8\xf0\x9f\x98\x80\xffax";
            (0..random.usize(1..40)).map(|_| alphabet[random.usize(..alphabet.len())]).collect()
        };
        let (method, host, path, id, agent, referer) = (bytes(), bytes(), bytes(), bytes(), bytes(), bytes());
        let names = [bytes(), bytes()].map(|b| String::from_utf8_lossy(&b).into_owned());
        let hostile = Entry {
            method: &method,
            host: &host,
            path: &path,
            request_id: &id,
            user_agent: &agent,
            referer: &referer,
            canary: &names[0],
            service: Some(&names[1]),
            ..entry(None)
        };
        for format in [Format::Json, Format::Combined] {
            let line = line(format, &hostile);
            let body = line.strip_suffix('\n').expect("ends its line");
            assert!(body.bytes().all(|b| matches!(b, b' '..=b'~')), "seed {seed} round {round}: {body}");
            // Quotes that are not escaped are the format's own, so their number is that of an honest line.
            let quotes = body.replace("\\\\", "").replace("\\\"", "").matches('"').count();
            let honest = Entry { referer: b"r", ..entry(None) };
            let expected = self::line(format, &honest).matches('"').count();
            assert_eq!(quotes, expected, "seed {seed} round {round}: {body}");
        }
        assert_eq!(json_field(&line(Format::Json, &hostile), "path"), String::from_utf8_lossy(&path));
    }
}

/// The value of a string field of a JSON line, unescaped.
fn json_field(line: &str, name: &str) -> String {
    let marker = format!("\"{name}\":\"");
    let mut units: Vec<u16> = Vec::new();
    let mut rest = line[line.find(&marker).expect(name) + marker.len()..].chars();
    loop {
        match rest.next().expect("closing quote") {
            '"' => return String::from_utf16(&units).unwrap(),
            '\\' => match rest.next().expect("escaped character") {
                'u' => {
                    let hex: String = rest.by_ref().take(4).collect();
                    units.push(u16::from_str_radix(&hex, 16).unwrap());
                }
                c => units.push(c as u16),
            },
            c => units.push(c as u16),
        }
    }
}

#[test]
fn lines_leave_in_whole_batches_and_the_rest_when_dropped() {
    let (destination, permit, writes) = gated();
    drop(permit);
    let metrics = Metrics::new(2);
    let (log, mut workers) = start(destination, &metrics);
    let origin = origin();
    let length = line(Format::Json, &entry(Some(&origin))).len();
    let per_batch = BATCH_BYTES.div_ceil(length);
    for worker in &mut workers {
        for _ in 0..per_batch + 1 {
            worker.write(&entry(Some(&origin)));
        }
    }
    drop(workers);
    log.join();

    let mut sizes: Vec<_> = writes.iter().map(|batch| batch.len() / length).collect();
    sizes.sort();
    assert_eq!(sizes, [1, 1, per_batch, per_batch]);
    assert_eq!(metrics.worker(0).log_lines_dropped.value(), 0);
}

#[test]
fn flush_hands_over_a_partial_batch() {
    let (destination, permit, writes) = gated();
    drop(permit);
    let metrics = Metrics::new(1);
    let (_log, mut workers) = start(destination, &metrics);
    assert!(workers[0].flush(), "nothing to do");
    workers[0].write(&bare());
    assert!(workers[0].flush());
    assert_eq!(writes.recv().unwrap(), line(Format::Json, &bare()).into_bytes());
}

#[test]
fn a_blocked_destination_costs_lines_not_time_or_memory() {
    let (destination, permit, writes) = gated();
    let metrics = Metrics::new(1);
    let (log, mut workers) = start(destination, &metrics);
    let length = line(Format::Json, &bare()).len();
    let per_batch = BATCH_BYTES.div_ceil(length);
    let fits = per_batch * BUFFERS_PER_WORKER;

    for _ in 0..fits + 1_000 {
        workers[0].write(&bare());
    }
    assert_eq!(metrics.worker(0).log_lines_dropped.value(), 1_000);
    assert!(!workers[0].flush(), "every other buffer is with the writer");
    assert!(workers[0].buffer.capacity() <= BUFFER_BYTES);

    // It recovers: as soon as a buffer is back, lines are taken again.
    permit.send(Ok(())).unwrap();
    assert_eq!(writes.recv().unwrap().len(), per_batch * length);
    while !workers[0].flush() {
        std::thread::yield_now();
    }
    workers[0].write(&bare());
    assert_eq!(metrics.worker(0).log_lines_dropped.value(), 1_000);

    drop(permit);
    drop(workers);
    log.join();
    let written: usize = writes.iter().map(|batch| batch.len() / length).sum();
    assert_eq!(written, fits + 1 - per_batch);
}

#[test]
fn lines_that_could_not_be_written_are_counted_by_their_worker() {
    let (destination, permit, writes) = gated();
    let metrics = Metrics::new(1);
    let (_log, mut workers) = start(destination, &metrics);
    permit.send(Err(io::Error::other("no space left"))).unwrap();
    drop(permit);
    for _ in 0..3 {
        workers[0].write(&bare());
    }
    workers[0].flush();
    // Buffers come back in turn; the one that failed brings its count with it.
    while metrics.worker(0).log_lines_dropped.value() == 0 {
        workers[0].write(&bare());
        while !workers[0].flush() {
            std::thread::yield_now();
        }
    }
    assert_eq!(metrics.worker(0).log_lines_dropped.value(), 3);
    assert!(writes.recv().is_ok(), "later lines are written");
}

#[test]
fn files_are_appended_to() {
    let path = std::env::temp_dir().join(format!("lockgate-access-log-{}", std::process::id()));
    let config = AccessLogConfig { format: Format::Combined, destination: Destination::File(path.clone()) };
    let metrics = Metrics::new(1);
    for _ in 0..2 {
        let (log, mut workers) = AccessLog::start(&config, &[metrics.worker(0)]).unwrap();
        workers[0].write(&bare());
        drop(workers);
        log.join();
    }
    let text = std::fs::read_to_string(&path).unwrap();
    std::fs::remove_file(&path).unwrap();
    assert_eq!(text, line(Format::Combined, &bare()).repeat(2));

    let missing = Destination::File(path.join("below-a-missing-folder"));
    assert!(AccessLog::start(&AccessLogConfig { destination: missing, ..config }, &[]).is_err());
}

#[test]
fn a_rotated_file_is_left_alone_once_reopened() {
    let folder = std::env::temp_dir().join(format!("lockgate-rotated-{}", std::process::id()));
    std::fs::create_dir_all(&folder).unwrap();
    let (path, rotated) = (folder.join("access.log"), folder.join("access.log.1"));
    let metrics = Metrics::new(1);
    let config = AccessLogConfig { format: Format::Json, destination: Destination::File(path.clone()) };
    let (log, mut workers) = AccessLog::start(&config, &[metrics.worker(0)]).unwrap();
    let reopener = log.reopener();
    let mut worker = workers.remove(0);
    let mut lines_in = |path: &Path, wanted: usize| {
        worker.write(&entry(None));
        while !worker.flush() {}
        while std::fs::read_to_string(path).unwrap_or_default().lines().count() < wanted {
            std::thread::yield_now();
        }
    };
    lines_in(&path, 1);
    std::fs::rename(&path, &rotated).unwrap();
    // Nobody has said anything: the file keeps its lines, whatever its name.
    lines_in(&rotated, 2);
    reopener.reopen();
    lines_in(&path, 1);
    // The folder is gone: lines go where they went.
    let elsewhere = folder.with_extension("elsewhere");
    std::fs::rename(&folder, &elsewhere).unwrap();
    reopener.reopen();
    lines_in(&elsewhere.join("access.log"), 2);
    drop(worker);
    log.join();
    std::fs::remove_dir_all(elsewhere).unwrap();
}
