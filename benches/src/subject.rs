//! Starts what is measured, each with one worker and a configuration that does
//! the same: a host, a few paths, an upstream pool, forwarding headers,
//! timeouts.

mod caddy;
mod envoy;
mod haproxy;
mod lockgate;
mod nginx;
pub(crate) mod programs;

use std::fs::{self, File};
use std::net::{Ipv4Addr, SocketAddr, TcpListener};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

use crate::bench::Bench;
use crate::load::{self, probe};
use crate::{OTHERS_CPU, SUBJECT_CPU};

pub(crate) use lockgate::{EDITED, Edits};

/// The host of every request.
pub(crate) const HOST: &str = "bench.example";

/// What is set in requests, and in responses, where a task wants that.
pub(crate) const REQUEST_EDIT: (&str, &str) = ("X-Bench-Request", "set-by-the-gateway");
pub(crate) const RESPONSE_EDIT: (&str, &str) = ("X-Bench-Response", "set-by-the-gateway");

/// What can be measured.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum Kind {
    /// The release build of this repository.
    Lockgate,
    /// Debian's nginx.
    Nginx,
    /// Debian's HAProxy.
    Haproxy,
    /// Envoy, from PyPI.
    Envoy,
    /// A gateway on pingora-proxy (`peers/`).
    #[value(name = "pingora-proxy")]
    Pingora,
    /// A gateway on hyper (`peers/`).
    #[value(name = "hyper-proxy")]
    Hyper,
    /// Caddy, built with Go.
    Caddy,
    /// Moves bytes and looks at none of them: the floor.
    Relay,
    /// The backend without any proxy.
    Direct,
}

impl Kind {
    /// As on the command line and in tables.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Kind::Lockgate => "lockgate",
            Kind::Nginx => "nginx",
            Kind::Haproxy => "haproxy",
            Kind::Envoy => "envoy",
            Kind::Pingora => "pingora-proxy",
            Kind::Hyper => "hyper-proxy",
            Kind::Caddy => "caddy",
            Kind::Relay => "relay",
            Kind::Direct => "direct",
        }
    }
}

/// What clients speak.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Front {
    Http,
    Https,
    /// Bytes, to a port.
    Tcp,
}

/// What a subject has to do.
#[derive(Clone, Debug)]
pub(crate) struct Task {
    pub(crate) front: Front,
    /// Hosts with rules, `HOST` last.
    pub(crate) hosts: usize,
    /// Each host has a backend of its own.
    pub(crate) apart: bool,
    /// A line per request.
    pub(crate) log: bool,
    /// One field is set in every request, and one in every response.
    pub(crate) edits: bool,
    /// Much goes one way, for which some have to be told.
    pub(crate) bulk: bool,
    /// Not bound to a CPU.
    pub(crate) loose: bool,
    /// Further arguments, for Lockgate.
    pub(crate) arguments: Vec<String>,
}

impl Task {
    /// One host, one CPU, no log.
    pub(crate) fn new(front: Front) -> Task {
        Task {
            front,
            hosts: 1,
            apart: false,
            log: false,
            edits: false,
            bulk: false,
            loose: false,
            arguments: Vec::new(),
        }
    }
}

/// The name of host `index` of `hosts`; `HOST` is the last.
pub(crate) fn host(index: usize, hosts: usize) -> String {
    if index + 1 == hosts { HOST.to_owned() } else { format!("h{index}.bench.example") }
}

/// Where a subject's files are, and what it is to be told.
pub(crate) struct Site<'a> {
    folder: &'a Path,
    program: &'a Path,
    task: &'a Task,
    /// Where it takes requests.
    address: SocketAddr,
    backend: SocketAddr,
    certificate: &'a load::tls::Certificate,
}

impl Site<'_> {
    /// Where its log is written, by the subject itself.
    fn log(&self) -> PathBuf {
        self.folder.join("access.log")
    }

    fn write(&self, name: &str, text: &str) -> Result<PathBuf> {
        let file = self.folder.join(name);
        fs::write(&file, text).with_context(|| file.display().to_string())?;
        Ok(file)
    }

    /// The program, bound to its CPU.
    fn command(&self) -> Command {
        if self.task.loose { guarded(self.program) } else { pinned(SUBJECT_CPU, self.program) }
    }
}

/// A proxy that runs. Killed when dropped.
pub(crate) struct Subject {
    pub(crate) kind: Kind,
    /// In tables.
    pub(crate) name: String,
    process: Option<Process>,
    /// Where it takes requests.
    pub(crate) address: SocketAddr,
    /// What it says it is.
    pub(crate) version: String,
    pid: u32,
    pub(crate) folder: PathBuf,
    /// From starting it to its first right answer.
    pub(crate) ready: Duration,
}

impl Subject {
    /// Starts one and waits until it answers.
    pub(crate) fn start(
        bench: &Bench,
        (kind, program): (Kind, &Path),
        backend: &Backend,
        task: &Task,
    ) -> Result<Subject> {
        let folder = bench.folder(kind.name())?;
        let direct = kind == Kind::Direct;
        let address = if direct { backend.address } else { free_address()? };
        let certificate = load::tls::certificate()?;
        let mut subject = Subject {
            kind,
            name: kind.name().to_owned(),
            process: None,
            address,
            version: String::new(),
            pid: backend.process.0.id(),
            folder: folder.clone(),
            ready: Duration::ZERO,
        };
        if direct {
            return Ok(subject);
        }
        let site = Site { folder: &folder, program, task, address, backend: backend.address, certificate };
        let (mut command, flag) = match kind {
            Kind::Lockgate => (lockgate::command(&site)?, "--version"),
            Kind::Nginx => (nginx::command(&site)?, "-v"),
            Kind::Haproxy => (haproxy::command(&site)?, "-v"),
            Kind::Envoy => (envoy::command(&site)?, "--version"),
            Kind::Caddy => (caddy::command(&site)?, ""),
            Kind::Pingora | Kind::Hyper | Kind::Relay | Kind::Direct => {
                let mut command = site.command();
                if kind == Kind::Relay {
                    command.arg("relay");
                }
                command.args([address.to_string(), backend.address.to_string()]);
                (command, "")
            }
        };
        subject.version = match kind {
            // Built by `go install`, it does not know.
            Kind::Caddy => programs::CADDY.to_owned(),
            Kind::Pingora | Kind::Hyper => "peers/".to_owned(),
            Kind::Relay | Kind::Direct => String::new(),
            _ => version(program, flag),
        };
        let log = File::create(folder.join("output.log"))?;
        // HAProxy logs on standard output.
        let out = match kind {
            Kind::Haproxy if task.log => File::options().create(true).append(true).open(site.log())?,
            _ => log.try_clone()?,
        };
        command.current_dir(&folder).stdout(out).stderr(log);
        let started = Instant::now();
        let mut process = Process::start(command).with_context(|| format!("cannot start {}", kind.name()))?;
        if let Err(error) = process.wait_until_ready(address, backend, task.front) {
            let output = fs::read_to_string(folder.join("output.log")).unwrap_or_default();
            bail!("{}: {error:#}\n{output}", kind.name());
        }
        subject.ready = started.elapsed();
        subject.pid = process.0.id();
        subject.process = Some(process);
        Ok(subject)
    }

    /// Its process: the subjects are run with a single one. The backend's if there is no proxy.
    pub(crate) fn pid(&self) -> u32 {
        self.pid
    }

    /// Lines it logged; they are removed, and must not fill the memory.
    pub(crate) fn take_log(&self) -> Result<u64> {
        let path = self.folder.join("access.log");
        let text = fs::read(&path).with_context(|| path.display().to_string())?;
        File::options().write(true).open(&path)?.set_len(0)?;
        Ok(text.iter().filter(|byte| **byte == b'\n').count() as u64)
    }
}

/// What the subjects lead to, running. Killed when dropped.
pub(crate) struct Backend {
    process: Process,
    /// Where it takes requests.
    pub(crate) address: SocketAddr,
    /// Bytes of each answer's body.
    pub(crate) body: usize,
}

impl Backend {
    /// This program's own one, on the load's CPU.
    pub(crate) fn http(body: usize) -> Result<Backend> {
        Backend::answering(body, &[])
    }

    /// The same, for proxies that set [`REQUEST_EDIT`] in every request.
    pub(crate) fn expecting_edits(body: usize) -> Result<Backend> {
        Backend::answering(body, &["--require", REQUEST_EDIT.0])
    }

    fn answering(body: usize, options: &[&str]) -> Result<Backend> {
        let length = body.to_string();
        let mut backend = Backend::start("backend", &[&["--body", &length], options].concat(), body)?;
        backend.process.wait(|| probe::http(backend.address, body)).context("backend")?;
        Ok(backend)
    }

    /// Sends back what it gets.
    pub(crate) fn echo() -> Result<Backend> {
        let mut backend = Backend::start("echo", &[], 0)?;
        backend.process.wait(|| probe::bytes(backend.address)).context("echo")?;
        Ok(backend)
    }

    /// Sends without end, once it has got something.
    pub(crate) fn source() -> Result<Backend> {
        let mut backend = Backend::start("source", &[], 0)?;
        backend.process.wait(|| probe::bytes(backend.address)).context("source")?;
        Ok(backend)
    }

    fn start(part: &str, arguments: &[&str], body: usize) -> Result<Backend> {
        let address = free_address()?;
        let mut command = pinned(OTHERS_CPU, std::env::current_exe()?);
        command.args([part, &address.to_string()]).args(arguments);
        let process = Process::start(command).with_context(|| format!("cannot start the {part}"))?;
        Ok(Backend { process, address, body })
    }
}

/// `program` bound to a CPU, and killed by the kernel if this process dies.
/// Both wrappers replace themselves, so the process started is `program`.
pub(crate) fn pinned(cpu: usize, program: impl AsRef<std::ffi::OsStr>) -> Command {
    let mut command = guarded("taskset");
    command.args(["--cpu-list", &cpu.to_string()]).arg(program);
    command
}

/// `program`, killed by the kernel if this process dies.
fn guarded(program: impl AsRef<std::ffi::OsStr>) -> Command {
    let mut command = Command::new("setpriv");
    command.args(["--pdeathsig", "KILL"]).arg(program);
    command
}

/// A child that does not outlive its owner.
struct Process(Child);

/// The largest table takes nginx more than a minute.
const START: Duration = Duration::from_secs(180);

impl Process {
    fn start(mut command: Command) -> Result<Process> {
        Ok(Process(command.stdin(Stdio::null()).spawn()?))
    }

    /// Returns when `address` answers as it should. A proxy may listen before it has its table.
    fn wait_until_ready(&mut self, address: SocketAddr, backend: &Backend, front: Front) -> Result<()> {
        self.wait(|| match front {
            Front::Http => probe::http(address, backend.body),
            Front::Https => probe::https(address, backend.body),
            Front::Tcp => probe::bytes(address),
        })
        .with_context(|| format!("no right answer from {address}"))
    }

    fn wait(&mut self, ready: impl Fn() -> Result<()>) -> Result<()> {
        let deadline = Instant::now() + START;
        loop {
            let Err(error) = ready() else { return Ok(()) };
            if let Some(status) = self.0.try_wait()? {
                bail!("ended with {status} before it answered");
            }
            if Instant::now() > deadline {
                return Err(error);
            }
            std::thread::sleep(Duration::from_millis(1));
        }
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        // Fails only when it has ended already.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Free when asked; nothing keeps another process from taking it before the subject does.
pub(crate) fn free_address() -> Result<SocketAddr> {
    Ok(TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?.local_addr()?)
}

/// The first line a program prints about its version, on either stream.
fn version(program: impl AsRef<std::ffi::OsStr>, flag: &str) -> String {
    let Ok(output) = Command::new(program).arg(flag).stdin(Stdio::null()).output() else {
        return "unknown version".to_owned();
    };
    let text = [output.stdout, output.stderr].concat();
    let text = String::from_utf8_lossy(&text);
    let line = text.lines().find(|line| !line.trim().is_empty()).unwrap_or_default().trim();
    // Some begin with the path of their program.
    line.rsplit_once("  ").map_or(line, |(_, version)| version).to_owned()
}
