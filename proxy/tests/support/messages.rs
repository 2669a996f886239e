//! Lists of messages, each with the answer it must get; an endpoint that notes
//! every byte; and what is needed to play one to the other.
#![allow(dead_code, unreachable_pub, reason = "every test file uses its own part of this")]

use std::fmt::Write as _;
use std::fs;
use std::io::{ErrorKind, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpStream};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Condvar, Mutex};
use std::time::Duration;

use super::toy::{PATIENCE, connect, endpoint};

/// One message of a list.
pub struct Case {
    pub name: String,
    /// What comes back, as `400` or `200,200` or `reset`.
    pub answers: String,
    /// What is sent, and as the list writes it.
    pub sent: Vec<u8>,
    pub written: String,
    /// Words of `!` lines before it, which say how it is played.
    pub how: String,
    /// What arrives at the other side of the proxy.
    pub arrives: Vec<u8>,
    /// Its line and those that tell what arrives.
    lines: std::ops::Range<usize>,
}

/// A file of messages.
pub struct List {
    path: PathBuf,
    lines: Vec<String>,
    pub cases: Vec<Case>,
}

impl List {
    /// Reads `testdata/messages/NAME.txt`; its format is told in the README beside it.
    pub fn read(name: &str) -> List {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join(format!("tests/testdata/messages/{name}.txt"));
        let text = fs::read_to_string(&path).unwrap();
        let lines: Vec<String> = text.lines().map(str::to_owned).collect();
        let mut cases: Vec<Case> = Vec::new();
        let (mut around, mut how) = ("{}".to_owned(), String::new());
        for (at, line) in lines.iter().enumerate() {
            if line.is_empty() || line.starts_with('#') {
            } else if let Some(template) = line.strip_prefix("@ ") {
                around = template.to_owned();
            } else if let Some(words) = line.strip_prefix('!') {
                how = words.trim().to_owned();
            } else if let Some(bytes) = line.strip_prefix("    > ") {
                let case = cases.last_mut().expect("what arrives, after its message");
                case.arrives.extend(unescape(bytes));
                case.lines.end = at + 1;
            } else {
                let (name, rest) = line.split_once(' ').unwrap_or((line, ""));
                let rest = rest.trim_start();
                let (answers, bytes) = rest.split_once(' ').unwrap_or((rest, ""));
                let written = around.replace("{}", bytes.trim_start());
                cases.push(Case {
                    name: name.to_owned(),
                    answers: answers.to_owned(),
                    sent: unescape(&written),
                    written,
                    how: how.clone(),
                    arrives: Vec::new(),
                    lines: at..at + 1,
                });
            }
        }
        let mut names: Vec<_> = cases.iter().map(|c| &c.name).collect();
        names.sort();
        assert!(names.windows(2).all(|two| two[0] != two[1]), "{name}: two messages of one name");
        List { path, lines, cases }
    }

    /// Compares what came of each message with what is expected, or, with
    /// `LOCKGATE_UPDATE_GOLDEN=1`, writes it down.
    pub fn judge(&self, outcomes: &[Outcome]) {
        if std::env::var_os("LOCKGATE_UPDATE_GOLDEN").is_some() {
            return self.write(outcomes);
        }
        let mut wrong = String::new();
        for (case, outcome) in self.cases.iter().zip(outcomes) {
            if (&case.answers, &case.arrives) != (&outcome.answers, &outcome.arrived) {
                let _ = write!(
                    wrong,
                    "{}\n  expected {} {}\n  got      {} {}\n",
                    case.name,
                    case.answers,
                    case.arrives.escape_ascii(),
                    outcome.answers,
                    outcome.arrived.escape_ascii(),
                );
            }
        }
        assert!(wrong.is_empty(), "{}:\n{wrong}", self.path.display());
    }

    fn write(&self, outcomes: &[Outcome]) {
        let (mut text, mut next) = (String::new(), 0);
        for (case, outcome) in self.cases.iter().zip(outcomes) {
            self.lines[next..case.lines.start].iter().for_each(|line| text += &format!("{line}\n"));
            let line = &self.lines[case.lines.start];
            text += &format!("{}\n", line.replacen(&case.answers, &outcome.answers, 1));
            if !outcome.arrived.is_empty() {
                text += &format!("    > {}\n", escape(&outcome.arrived));
            }
            next = case.lines.end;
        }
        self.lines[next..].iter().for_each(|line| text += &format!("{line}\n"));
        fs::write(&self.path, text).unwrap();
    }
}

/// What came of a message.
#[derive(Debug)]
pub struct Outcome {
    pub answers: String,
    pub arrived: Vec<u8>,
}

/// `\r \n \t \0 \s \\ \xNN`, and `\<300*ab>` for a text many times over.
pub fn unescape(text: &str) -> Vec<u8> {
    let mut bytes = Vec::new();
    let mut rest = text;
    while let Some(at) = rest.find('\\') {
        bytes.extend_from_slice(&rest.as_bytes()[..at]);
        let used = match rest.as_bytes()[at + 1] {
            b'r' => (bytes.push(b'\r'), 2).1,
            b'n' => (bytes.push(b'\n'), 2).1,
            b't' => (bytes.push(b'\t'), 2).1,
            b's' => (bytes.push(b' '), 2).1,
            b'0' => (bytes.push(0), 2).1,
            b'\\' => (bytes.push(b'\\'), 2).1,
            b'x' => (bytes.push(u8::from_str_radix(&rest[at + 2..at + 4], 16).unwrap()), 4).1,
            b'<' => {
                let end = rest[at..].find('>').unwrap();
                let (times, what) = rest[at + 2..at + end].split_once('*').unwrap();
                bytes.extend(unescape(what).repeat(times.parse().unwrap()));
                end + 1
            }
            other => panic!("\\{} means nothing", other as char),
        };
        rest = &rest[at + used..];
    }
    bytes.extend_from_slice(rest.as_bytes());
    bytes
}

/// The same, the other way round.
fn escape(bytes: &[u8]) -> String {
    let mut text = String::new();
    let mut rest = bytes;
    while let Some((&byte, tail)) = rest.split_first() {
        let same = rest.iter().take_while(|b| **b == byte).count();
        if same > 40 && byte.is_ascii_alphanumeric() {
            let _ = write!(text, "\\<{same}*{}>", byte as char);
            rest = &rest[same..];
            continue;
        }
        match byte {
            b' ' if tail.is_empty() => text += "\\s",
            b'\0' => text += "\\0",
            b'\'' | b'"' => text.push(byte as char),
            _ => text += &byte.escape_ascii().to_string(),
        }
        rest = tail;
    }
    text
}

/// What a [`recorder`] has heard and how it answers.
#[derive(Default)]
pub struct Heard {
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Default)]
struct State {
    /// In the order in which it arrived, over all connections.
    bytes: Vec<u8>,
    requests: usize,
    /// Connections in the middle of a request.
    busy: usize,
    /// For requests whose target begins with `/r`: these bytes, and whether the end follows.
    answer: Option<(Vec<u8>, bool)>,
}

impl Heard {
    /// Everything since the last call and how many requests that were, once it is
    /// what is `expected` and no request is left half read, or after `patience`.
    pub fn take(&self, patience: Duration, mut expected: impl FnMut(&[u8]) -> bool) -> (Vec<u8>, usize) {
        let waits = |state: &mut State| state.busy > 0 || !expected(&state.bytes);
        let state = self.state.lock().unwrap();
        let (mut state, _) = self.changed.wait_timeout_while(state, patience, waits).unwrap();
        (std::mem::take(&mut state.bytes), std::mem::take(&mut state.requests))
    }

    /// How requests for `/r` are answered from now on.
    pub fn answer(&self, bytes: &[u8], then_end: bool) {
        self.state.lock().unwrap().answer = Some((bytes.to_vec(), then_end));
    }

    fn note<T>(&self, change: impl FnOnce(&mut State) -> T) -> T {
        let changed = change(&mut self.state.lock().unwrap());
        self.changed.notify_all();
        changed
    }
}

/// An endpoint that notes every byte, understands what is well-formed, and answers
/// `ok`: to `/early` at once, else after the body; after a 100 if that is expected.
pub fn recorder() -> (SocketAddr, Arc<Heard>) {
    let heard = Arc::new(Heard::default());
    let notes = heard.clone();
    let address = endpoint(move |mut stream| {
        // Idle for as long as the proxy likes.
        let _ = stream.set_read_timeout(None);
        let mut session = Session { heard: &notes, unread: Vec::new(), busy: false };
        while session.request(&mut stream).is_some() {}
        session.idle();
    });
    (address, heard)
}

/// One connection to a recorder.
struct Session<'h> {
    heard: &'h Heard,
    /// Noted and not yet understood.
    unread: Vec<u8>,
    busy: bool,
}

impl Session<'_> {
    fn request(&mut self, stream: &mut TcpStream) -> Option<()> {
        let end = self.until(stream, 0, b"\r\n\r\n")?;
        let head = String::from_utf8_lossy(&self.unread[..end]).to_ascii_lowercase();
        self.heard.note(|state| state.requests += 1);
        let target = head.split(' ').nth(1).unwrap_or_default().to_owned();
        let is_head = head.starts_with("head ");
        let ok: &[u8] = match is_head {
            true => b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n",
            false => b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok",
        };
        if target == "/early" {
            stream.write_all(ok).ok()?;
        }
        if head.contains("\r\nexpect: 100-continue") {
            stream.write_all(b"HTTP/1.1 100 Continue\r\n\r\n").ok()?;
        }
        let end = self.body(stream, &head, end)?;
        self.unread.drain(..end);
        if target.starts_with("/r") {
            let answer = self.heard.note(|state| state.answer.clone());
            if let Some((bytes, then_end)) = answer {
                self.idle();
                stream.write_all(&bytes).ok()?;
                return (!then_end).then_some(());
            }
        }
        if self.unread.is_empty() {
            self.idle();
        }
        if target != "/early" {
            stream.write_all(ok).ok()?;
        }
        Some(())
    }

    /// Where the body ends that begins at `at`.
    fn body(&mut self, stream: &mut TcpStream, head: &str, mut at: usize) -> Option<usize> {
        let value = |name: &str| head.lines().find_map(|line| line.strip_prefix(name)).map(str::trim);
        if value("transfer-encoding:").is_none() {
            let length: usize = value("content-length:").and_then(|n| n.parse().ok()).unwrap_or(0);
            return self.reach(stream, at + length);
        }
        loop {
            let data = self.until(stream, at, b"\r\n")?;
            let line = String::from_utf8_lossy(&self.unread[at..data]).into_owned();
            let digits = line.trim_end().split(';').next().unwrap_or_default();
            let size = usize::from_str_radix(digits, 16).ok()?;
            if size == 0 {
                // The empty line that ends the trailers may follow at once.
                return self.until(stream, data - 2, b"\r\n\r\n");
            }
            at = self.reach(stream, data + size + 2)?;
        }
    }

    fn until(&mut self, stream: &mut TcpStream, from: usize, end: &[u8]) -> Option<usize> {
        loop {
            let found = self.unread[from..].windows(end.len()).position(|w| w == end);
            if let Some(at) = found {
                return Some(from + at + end.len());
            }
            self.read(stream)?;
        }
    }

    fn reach(&mut self, stream: &mut TcpStream, end: usize) -> Option<usize> {
        while self.unread.len() < end {
            self.read(stream)?;
        }
        Some(end)
    }

    fn read(&mut self, stream: &mut TcpStream) -> Option<()> {
        let mut room = [0; 4096];
        let n = stream.read(&mut room).ok().filter(|n| *n > 0)?;
        self.unread.extend_from_slice(&room[..n]);
        let begins = !std::mem::replace(&mut self.busy, true);
        self.heard.note(|state| {
            state.bytes.extend_from_slice(&room[..n]);
            state.busy += usize::from(begins);
        });
        Some(())
    }

    fn idle(&mut self) {
        if std::mem::take(&mut self.busy) {
            self.heard.note(|state| state.busy -= 1);
        }
    }
}

/// What the client gets for [`LAST`].
pub const LAST_ANSWER: &[u8] = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nConnection: close\r\n\r\nok";

/// A request that shows that a connection is still good, and ends it.
pub const LAST: &[u8] = b"GET /last HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n";

/// What of it arrives.
pub const LAST_ARRIVES: &[u8] = b"GET /last HTTP/1.1\r\nHost: a\r\n\r\n";

/// Whether these answers leave a connection open: then [`LAST`] is sent behind the message.
pub fn stays_open(answers: &str) -> bool {
    let last = answers.rsplit(',').next().unwrap_or_default();
    last.parse().is_ok_and(|status: u16| status < 400)
}

/// Everything the other side says until it ends the connection, or, if `silence`
/// is given, until it has said nothing for as long.
pub fn say(address: SocketAddr, bytes: &[u8], then_end: bool, silence: Option<Duration>) -> Vec<u8> {
    let mut stream = connect(address);
    // It may hang up before it has read everything.
    let _ = stream.write_all(bytes);
    if then_end {
        let _ = stream.shutdown(Shutdown::Write);
    }
    stream.set_read_timeout(silence.or(Some(PATIENCE))).unwrap();
    let (mut answer, mut room) = (Vec::new(), [0; 4096]);
    loop {
        match stream.read(&mut room) {
            Ok(0) => return answer,
            Ok(n) => answer.extend_from_slice(&room[..n]),
            Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut) => {
                assert!(silence.is_some(), "neither an answer nor an end");
                return answer;
            }
            Err(_) => return answer,
        }
    }
}

/// The statuses in a stream of HTTP/1 responses whose bodies do not look like one.
pub fn statuses(answer: &[u8]) -> Vec<String> {
    let text = String::from_utf8_lossy(answer);
    let heads = text.match_indices("HTTP/1.").map(|(at, _)| text[at..].get(9..12).unwrap_or("?").to_owned());
    heads.collect()
}

/// What arrived, without the lines every request gets from the proxy on `port`.
pub fn without_ours(bytes: &[u8], port: u16) -> Vec<u8> {
    let always = [
        "X-Forwarded-For: 127.0.0.1\r\n".to_owned(),
        "X-Real-IP: 127.0.0.1\r\n".to_owned(),
        "X-Forwarded-Proto: http\r\n".to_owned(),
        "X-Forwarded-Scheme: http\r\n".to_owned(),
        "X-Scheme: http\r\n".to_owned(),
        format!("X-Forwarded-Port: {port}\r\n"),
    ];
    let mut kept: Vec<u8> = Vec::new();
    let mut host: &[u8] = b"";
    for line in bytes.split_inclusive(|&b| b == b'\n') {
        let lower = line.to_ascii_lowercase();
        if lower.starts_with(b"host: ") {
            host = &line["host: ".len()..];
        }
        let is = |ours: &str| lower == ours.to_ascii_lowercase().as_bytes();
        let names_host =
            lower.strip_prefix(b"x-forwarded-host: ").is_some_and(|v| v.eq_ignore_ascii_case(host));
        let is_id = lower
            .strip_prefix(b"x-request-id: ")
            .is_some_and(|v| v.len() == 34 && v[..32].iter().all(u8::is_ascii_hexdigit));
        if !(always.iter().any(|ours| is(ours)) || names_host || is_id) {
            kept.extend_from_slice(line);
        }
    }
    kept
}
