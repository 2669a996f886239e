//! Starts what is measured, each with one worker and a configuration that does
//! the same: a host, a few paths, an upstream pool, forwarding headers,
//! timeouts, no access log.

use std::fs;
use std::net::{Ipv4Addr, SocketAddr, TcpListener};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

use crate::{OTHERS_CPU, SUBJECT_CPU, load};

/// The host of every request.
pub(crate) const HOST: &str = "bench.example";

/// What can be measured.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum Kind {
    /// The release build of this repository.
    Lockgate,
    /// Debian's nginx.
    Nginx,
    /// Debian's HAProxy.
    Haproxy,
}

impl Kind {
    /// As on the command line and in tables.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Kind::Lockgate => "lockgate",
            Kind::Nginx => "nginx",
            Kind::Haproxy => "haproxy",
        }
    }
}

/// A proxy that runs. Killed when dropped.
pub(crate) struct Subject {
    kind: Kind,
    process: Process,
    /// Where it takes requests.
    pub(crate) address: SocketAddr,
    /// What it says it is.
    pub(crate) version: String,
}

impl Subject {
    /// Starts one on its own CPU and waits until it answers.
    pub(crate) fn start(kind: Kind, folder: &Path, backend: &Backend, lockgate: &Path) -> Result<Subject> {
        let address = free_address()?;
        let folder = folder.join(kind.name());
        fs::create_dir(&folder).with_context(|| folder.display().to_string())?;
        let (mut command, version) = match kind {
            Kind::Lockgate => {
                fs::write(folder.join("bench.yaml"), manifests(backend.address))?;
                let mut command = pinned(SUBJECT_CPU, lockgate);
                command.arg("ingress").arg("--manifests").arg(&folder);
                command.args([
                    "--http-addr",
                    &address.to_string(),
                    "--https-addr",
                    &free_address()?.to_string(),
                ]);
                command.args([
                    "--admin-addr",
                    &free_address()?.to_string(),
                    "--workers",
                    "1",
                    "--access-log",
                    "off",
                ]);
                (command, version(lockgate, "--version"))
            }
            Kind::Nginx => {
                let file = folder.join("nginx.conf");
                fs::write(&file, nginx(&folder, address, backend.address))?;
                let mut command = pinned(SUBJECT_CPU, "nginx");
                command.arg("-p").arg(&folder).arg("-c").arg(file).arg("-e").arg(folder.join("error.log"));
                (command, version("nginx", "-v"))
            }
            Kind::Haproxy => {
                let file = folder.join("haproxy.cfg");
                fs::write(&file, haproxy(address, backend.address))?;
                let mut command = pinned(SUBJECT_CPU, "haproxy");
                command.arg("-db").arg("-f").arg(file);
                (command, version("haproxy", "-v"))
            }
        };
        let log = fs::File::create(folder.join("output.log"))?;
        command.stdout(log.try_clone()?).stderr(log);
        let mut process = Process::start(command).with_context(|| format!("cannot start {}", kind.name()))?;
        if let Err(error) = process.wait_until_ready(address, backend.body) {
            let output = fs::read_to_string(folder.join("output.log")).unwrap_or_default();
            bail!("{}: {error:#}\n{output}", kind.name());
        }
        Ok(Subject { kind, process, address, version })
    }

    /// As in tables.
    pub(crate) fn name(&self) -> &'static str {
        self.kind.name()
    }

    /// Its process: the subjects are run with a single one.
    pub(crate) fn pid(&self) -> u32 {
        self.process.0.id()
    }
}

/// The backend that runs. Killed when dropped.
pub(crate) struct Backend {
    _process: Process,
    /// Where it takes requests.
    pub(crate) address: SocketAddr,
    /// Bytes of each answer's body.
    body: usize,
}

/// Starts this program's backend on the load's CPU.
pub(crate) fn start_backend(body: usize) -> Result<Backend> {
    let address = free_address()?;
    let mut command = pinned(OTHERS_CPU, std::env::current_exe()?);
    command.args(["backend", &address.to_string(), "--body", &body.to_string()]);
    let mut process = Process::start(command).context("cannot start the backend")?;
    process.wait_until_ready(address, body).context("backend")?;
    Ok(Backend { _process: process, address, body })
}

/// `program` bound to a CPU, and killed by the kernel if this process dies.
/// Both wrappers replace themselves, so the process started is `program`.
pub(crate) fn pinned(cpu: usize, program: impl AsRef<std::ffi::OsStr>) -> Command {
    let mut command = Command::new("setpriv");
    command.args(["--pdeathsig", "KILL", "taskset", "--cpu-list", &cpu.to_string()]).arg(program);
    command
}

/// A child that does not outlive its owner.
struct Process(Child);

impl Process {
    fn start(mut command: Command) -> Result<Process> {
        Ok(Process(command.stdin(Stdio::null()).spawn()?))
    }

    /// Returns when `address` answers as it should. A proxy may listen before it has its table.
    fn wait_until_ready(&mut self, address: SocketAddr, body: usize) -> Result<()> {
        let deadline = Instant::now() + Duration::from_secs(10);
        loop {
            let Err(error) = load::probe(address, body) else { return Ok(()) };
            if let Some(status) = self.0.try_wait()? {
                bail!("ended with {status} before it answered on {address}");
            }
            if Instant::now() > deadline {
                return Err(error.context(format!("no right answer from {address} in 10 s")));
            }
            std::thread::sleep(Duration::from_millis(20));
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
fn free_address() -> Result<SocketAddr> {
    Ok(TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?.local_addr()?)
}

/// The first line a program prints about its version, on either stream.
fn version(program: impl AsRef<std::ffi::OsStr>, flag: &str) -> String {
    let Ok(output) = Command::new(program).arg(flag).stdin(Stdio::null()).output() else {
        return "unknown version".to_owned();
    };
    let text = [output.stdout, output.stderr].concat();
    String::from_utf8_lossy(&text).lines().next().unwrap_or_default().to_owned()
}

fn nginx(folder: &Path, address: SocketAddr, backend: SocketAddr) -> String {
    let folder = folder.display();
    format!(
        "daemon off;
master_process off;
worker_processes 1;
pid {folder}/nginx.pid;
events {{ worker_connections 8192; }}
http {{
    access_log off;
    client_body_temp_path {folder}/body;
    proxy_temp_path {folder}/proxy;
    fastcgi_temp_path {folder}/fastcgi;
    uwsgi_temp_path {folder}/uwsgi;
    scgi_temp_path {folder}/scgi;
    tcp_nodelay on;
    keepalive_timeout 75s;
    keepalive_requests 1000000000;
    upstream pool {{
        server {backend};
        keepalive 1024;
        keepalive_requests 1000000000;
    }}
    server {{
        listen {address} backlog=4096;
        server_name {HOST};
        proxy_http_version 1.1;
        proxy_set_header Connection \"\";
        proxy_set_header Host $host;
        proxy_set_header X-Real-IP $remote_addr;
        proxy_set_header X-Forwarded-For $remote_addr;
        proxy_set_header X-Forwarded-Host $host;
        proxy_set_header X-Forwarded-Port $server_port;
        proxy_set_header X-Forwarded-Proto $scheme;
        proxy_set_header X-Request-ID $request_id;
        proxy_buffers 16 16k;
        location /api {{ proxy_pass http://pool; }}
        location /static {{ proxy_pass http://pool; }}
        location / {{ proxy_pass http://pool; }}
    }}
}}
"
    )
}

fn haproxy(address: SocketAddr, backend: SocketAddr) -> String {
    format!(
        "global
    nbthread 1
    maxconn 8192
defaults
    mode http
    timeout connect 5s
    timeout client 75s
    timeout server 60s
    timeout http-request 60s
    http-reuse always
    option forwardfor
frontend front
    bind {address} backlog 4096
    acl host hdr(host) -i {HOST}
    acl api path_beg /api
    acl static path_beg /static
    unique-id-format %[uuid()]
    unique-id-header X-Request-ID
    http-request set-header X-Real-IP %[src]
    http-request set-header X-Forwarded-Host %[req.hdr(host)]
    http-request set-header X-Forwarded-Port %[dst_port]
    http-request set-header X-Forwarded-Proto http
    use_backend api if host api
    use_backend static if host static
    use_backend root if host
backend api
    server pod {backend} pool-max-conn 1024
backend static
    server pod {backend} pool-max-conn 1024
backend root
    server pod {backend} pool-max-conn 1024
"
    )
}

fn manifests(backend: SocketAddr) -> String {
    let (address, port) = (backend.ip(), backend.port());
    let path = |path: &str| {
        format!(
            "      - path: {path}
        pathType: Prefix
        backend: {{ service: {{ name: canned, port: {{ number: 80 }} }} }}
"
        )
    };
    let paths = [path("/api"), path("/static"), path("/")].concat();
    format!(
        "apiVersion: v1
kind: Service
metadata: {{ name: canned, namespace: bench }}
spec:
  ports:
  - {{ name: http, port: 80, targetPort: {port} }}
---
apiVersion: discovery.k8s.io/v1
kind: EndpointSlice
metadata:
  name: canned-1
  namespace: bench
  labels: {{ kubernetes.io/service-name: canned }}
addressType: IPv4
ports:
- {{ name: http, port: {port} }}
endpoints:
- addresses: [\"{address}\"]
  conditions: {{ ready: true }}
---
apiVersion: networking.k8s.io/v1
kind: Ingress
metadata: {{ name: bench, namespace: bench }}
spec:
  rules:
  - host: {HOST}
    http:
      paths:
{paths}"
    )
}
