//! The real binary, started as a user would and stopped as Kubernetes does.

use std::io::{BufRead, BufReader, Read};
use std::net::SocketAddr;
use std::path::Path;
use std::process::{Child, Command, Output, Stdio};
use std::sync::mpsc;
use std::thread::JoinHandle;

use super::gate;

/// A running `lockgate ingress`.
pub struct Binary {
    child: Child,
    output: Option<[JoinHandle<String>; 2]>,
    pub http: SocketAddr,
    pub https: SocketAddr,
    pub admin: SocketAddr,
}

impl Binary {
    /// Returns when it has said where it serves.
    pub fn start(folder: &Path, more: &[&str]) -> Binary {
        Binary::run(&gate::flags(folder, more), "trace")
    }

    /// With all flags given, and what is to be logged.
    pub fn run(flags: &[String], log: &str) -> Binary {
        let mut command = Command::new(env!("CARGO_BIN_EXE_lockgate"));
        command.args(flags).env("RUST_LOG", log);
        let mut child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().expect("starts");
        let lines = BufReader::new(child.stderr.take().expect("piped")).lines();
        let (say, said) = mpsc::sync_channel(3);
        let stderr = std::thread::spawn(move || {
            let mut all = String::new();
            for line in lines.map_while(Result::ok) {
                all += &line;
                all.push('\n');
                let mut words = line.split_whitespace();
                if let (Some(what), Some(Ok(address))) = (words.next(), words.next().map(str::parse)) {
                    // Full, or nobody listens any more, once all three are known.
                    let _ = say.try_send((what.to_owned(), address));
                }
            }
            all
        });
        let address = |wanted: &str| match said.recv() {
            Ok((what, address)) if what == wanted => address,
            other => panic!("expected {wanted}, heard {other:?}"),
        };
        let mut stdout = child.stdout.take().expect("piped");
        let stdout = std::thread::spawn(move || {
            let mut all = String::new();
            // Whatever is not text shows in the assertions on it.
            let _ = stdout.read_to_string(&mut all);
            all
        });
        let (http, https, admin) = (address("http"), address("https"), address("admin"));
        Binary { child, output: Some([stdout, stderr]), http, https, admin }
    }

    /// SIGTERM.
    pub fn terminate(&self) {
        self.signal("-TERM");
    }

    /// Any signal, as kill names it.
    pub fn signal(&self, name: &str) {
        let killed = Command::new("kill").args([name, &self.child.id().to_string()]).status();
        assert!(killed.expect("kill").success());
    }

    pub fn id(&self) -> u32 {
        self.child.id()
    }

    /// How many files and sockets it has open.
    pub fn open_descriptors(&self) -> usize {
        std::fs::read_dir(format!("/proc/{}/fd", self.id())).map_or(0, Iterator::count)
    }

    /// Whether it has not ended yet.
    pub fn is_running(&mut self) -> bool {
        self.child.try_wait().expect("a child").is_none()
    }

    /// Its exit status and all it wrote.
    pub fn wait(mut self) -> (Option<i32>, String) {
        let status = self.child.wait().expect("a child");
        let output = self.output.take().expect("waited for once");
        (status.code(), output.map(|output| output.join().expect("reads")).concat())
    }
}

impl Drop for Binary {
    fn drop(&mut self) {
        // It has ended already, unless the test failed.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Runs curl; `None`, with a line that says so, where there is none.
pub fn curl(arguments: &[&str]) -> Option<Output> {
    match Command::new("curl").args(["--silent", "--show-error", "--max-time", "30"]).args(arguments).output()
    {
        Ok(output) => Some(output),
        Err(error) => {
            assert!(std::env::var_os("CI").is_none(), "curl is missing: {error}");
            eprintln!("SKIPPED: curl cannot be run: {error}");
            None
        }
    }
}
