//! Lockgate, serving a folder of manifests with one worker.

use std::fmt::Write;
use std::fs;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, ensure};
use base64::Engine;
use serde_json::json;

use super::{Front, HOST, REQUEST_EDIT, RESPONSE_EDIT, Site, free_address, host};

/// Where `/metrics` is, as told by [`command`].
const ADMIN: &str = "admin";
/// Ingresses in one file, where there are many.
const PER_FILE: usize = 500;
const TCP_SERVICES: &str = "--tcp-services-configmap";

pub(super) fn command(site: &Site) -> Result<Command> {
    let task = site.task;
    // Not the folder of its logs: every file there would be looked at.
    let manifests = site.folder.join("manifests");
    fs::create_dir(&manifests)?;
    write_hosts(&manifests, site)?;
    let admin = free_address()?;
    fs::write(site.folder.join(ADMIN), admin.to_string())?;
    let mut command = site.command();
    command.arg("ingress").arg("--manifests").arg(&manifests).args(["--workers", "1"]);
    let mut listen = |option: &str, address: SocketAddr| {
        command.args([option, &address.to_string()]);
    };
    let spare = free_address()?;
    let (http, https) = match task.front {
        Front::Http => (site.address, spare),
        Front::Https => (spare, site.address),
        Front::Tcp => (spare, free_address()?),
    };
    listen("--http-addr", http);
    listen("--https-addr", https);
    listen("--admin-addr", admin);
    if task.front == Front::Https {
        // wrk names no host when it is given an address.
        command.args(["--default-ssl-certificate", "bench/bench"]);
    }
    if task.front == Front::Tcp {
        ensure!(knows(site.program, TCP_SERVICES), "{} has no {TCP_SERVICES}", site.program.display());
        command.args([TCP_SERVICES, "bench/tcp-services"]);
    }
    if task.edits {
        command.args(["--proxy-set-headers", "bench/request", "--add-headers", "bench/response"]);
    }
    if task.log {
        command.args(["--access-log", "json", "--access-log-file"]).arg(site.log());
    } else {
        command.args(["--access-log", "off"]);
    }
    command.args(&task.arguments);
    Ok(command)
}

/// Whether the program's help names `option`.
fn knows(program: &Path, option: &str) -> bool {
    let help = Command::new(program).args(["ingress", "--help"]).stdin(Stdio::null()).output();
    help.is_ok_and(|help| String::from_utf8_lossy(&help.stdout).contains(option))
}

/// The Ingress of `HOST` has a file of its own, the others share.
fn write_hosts(folder: &Path, site: &Site) -> Result<()> {
    let task = site.task;
    let service = |index: usize| if task.apart { format!("canned-{index}") } else { "canned".to_owned() };
    let last = task.hosts - 1;
    let mut text = String::new();
    if !task.apart {
        text.push_str(&service_documents(&service(last), site.backend));
    }
    for index in 0..last {
        let name = host(index, task.hosts);
        if task.apart {
            json(&mut text, &name, &service(index), site.backend)?;
        } else {
            text.push_str(&ingress(&name, &service(index), "", ""));
        }
        if (index + 1) % PER_FILE == 0 || (task.apart && index + 1 == last) {
            let format = if task.apart { "json" } else { "yaml" };
            fs::write(folder.join(format!("hosts-{index}.{format}")), &text)?;
            text.clear();
        }
    }
    if task.apart {
        text.push_str(&service_documents(&service(last), site.backend));
    }
    let base64 = base64::engine::general_purpose::STANDARD;
    let mut tls = "";
    match task.front {
        Front::Http => {}
        Front::Https => {
            tls = "  tls:\n  - { hosts: [bench.example], secretName: bench }\n";
            let (chain, key) = (&site.certificate.chain, &site.certificate.key);
            let _ = write!(
                text,
                "apiVersion: v1
kind: Secret
type: kubernetes.io/tls
metadata: {{ name: bench, namespace: bench }}
data:
  tls.crt: {}
  tls.key: {}
---
",
                base64.encode(chain),
                base64.encode(key)
            );
        }
        Front::Tcp => {
            let port = site.address.port();
            let _ = write!(
                text,
                "apiVersion: v1
kind: ConfigMap
metadata: {{ name: tcp-services, namespace: bench }}
data:
  \"{port}\": \"bench/{}:80\"
---
",
                service(last)
            );
        }
    }
    if task.edits {
        text.push_str(&config_map("request", REQUEST_EDIT));
        text.push_str(&config_map("response", RESPONSE_EDIT));
    }
    fs::write(folder.join("rest.yaml"), text)?;
    fs::write(folder.join("bench.yaml"), ingress(HOST, &service(last), tls, ""))?;
    Ok(())
}

fn config_map(config_map: &str, (name, value): (&str, &str)) -> String {
    format!(
        "apiVersion: v1
kind: ConfigMap
metadata: {{ name: {config_map}, namespace: bench }}
data: {{ {name}: {value} }}
---
"
    )
}

/// A host with a Service of its own, as an API server writes objects.
fn json(text: &mut String, host: &str, service: &str, backend: SocketAddr) -> Result<()> {
    let metadata = |name: String| json!({ "name": name, "namespace": "bench" });
    let path = |path| {
        let backend = json!({ "service": { "name": service, "port": { "number": 80 } } });
        json!({ "path": path, "pathType": "Prefix", "backend": backend })
    };
    let mut slice = metadata(format!("{service}-1"));
    slice["labels"] = json!({ "kubernetes.io/service-name": service });
    let documents = [
        json!({
            "apiVersion": "v1",
            "kind": "Service",
            "metadata": metadata(service.to_owned()),
            "spec": { "ports": [{ "name": "http", "port": 80, "targetPort": backend.port() }] },
        }),
        json!({
            "apiVersion": "discovery.k8s.io/v1",
            "kind": "EndpointSlice",
            "metadata": slice,
            "addressType": "IPv4",
            "ports": [{ "name": "http", "port": backend.port() }],
            "endpoints": [{ "addresses": [backend.ip()], "conditions": { "ready": true } }],
        }),
        json!({
            "apiVersion": "networking.k8s.io/v1",
            "kind": "Ingress",
            "metadata": metadata(host.replace('.', "-")),
            "spec": { "rules": [
                { "host": host, "http": { "paths": [path("/api"), path("/static"), path("/")] } },
            ] },
        }),
    ];
    for document in documents {
        writeln!(text, "{document}")?;
    }
    Ok(())
}

fn service_documents(name: &str, backend: SocketAddr) -> String {
    let (address, port) = (backend.ip(), backend.port());
    format!(
        "apiVersion: v1
kind: Service
metadata: {{ name: {name}, namespace: bench }}
spec:
  ports:
  - {{ name: http, port: 80, targetPort: {port} }}
---
apiVersion: discovery.k8s.io/v1
kind: EndpointSlice
metadata:
  name: {name}-1
  namespace: bench
  labels: {{ kubernetes.io/service-name: {name} }}
addressType: IPv4
ports:
- {{ name: http, port: {port} }}
endpoints:
- addresses: [\"{address}\"]
  conditions: {{ ready: true }}
---
"
    )
}

/// Three rules, and a fourth where a path is given.
fn ingress(host: &str, service: &str, tls: &str, extra: &str) -> String {
    let mut paths = String::new();
    for path in ["/api", "/static", "/", extra] {
        if !path.is_empty() {
            let _ = write!(
                paths,
                "      - path: {path}
        pathType: Prefix
        backend: {{ service: {{ name: {service}, port: {{ number: 80 }} }} }}
"
            );
        }
    }
    let name = host.replace('.', "-");
    format!(
        "apiVersion: networking.k8s.io/v1
kind: Ingress
metadata: {{ name: {name}, namespace: bench }}
spec:
{tls}  rules:
  - host: {host}
    http:
      paths:
{paths}---
"
    )
}

/// Changes one Ingress of a running Lockgate.
pub(crate) struct Edits {
    folder: PathBuf,
    service: String,
    admin: SocketAddr,
    count: usize,
}

/// The host whose Ingress is changed; it is none of those under load.
pub(crate) const EDITED: &str = "edited.bench.example";

impl Edits {
    /// Of the subject whose files are in `folder`.
    pub(crate) fn of(folder: &Path) -> Result<Edits> {
        let admin = fs::read_to_string(folder.join(ADMIN))?.parse()?;
        Ok(Edits { folder: folder.join("manifests"), service: "canned".to_owned(), admin, count: 0 })
    }

    /// Writes the Ingress anew with a path it did not have, which it returns;
    /// the one before is gone. Renamed into place: never half a file.
    pub(crate) fn write(&mut self) -> Result<String> {
        self.count += 1;
        let path = format!("/v{}", self.count);
        // Not the catch-all "/" of the other hosts: a request tells whether the rule is there.
        let text = ingress(EDITED, &self.service, "", &path).replacen("path: /\n", "path: /never\n", 1);
        let whole = self.folder.parent().context("a folder")?.join("edited.new");
        fs::write(&whole, text)?;
        fs::rename(whole, self.folder.join("edited.yaml"))?;
        Ok(path)
    }

    /// How many tables have been published, from its own metrics.
    pub(crate) fn generation(&self) -> Result<f64> {
        let text = crate::load::probe::get(self.admin, "admin", "/metrics")?;
        let line = text.lines().find_map(|line| line.strip_prefix("lockgate_generation "));
        Ok(line.context("no lockgate_generation in /metrics")?.trim().parse()?)
    }
}
