//! Objects around the ones under test, as YAML.

use std::fs;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};

use base64::Engine;
use base64::engine::general_purpose::STANDARD;

/// A certificate and its key, PEM.
#[derive(Clone)]
pub struct Identity {
    pub certificate: String,
    pub key: String,
}

impl Identity {
    /// Made up, signed by itself.
    pub fn new(hosts: &[&str]) -> Identity {
        let hosts: Vec<String> = hosts.iter().map(|&host| host.to_owned()).collect();
        let made = rcgen::generate_simple_self_signed(hosts).expect("names");
        Identity { certificate: made.cert.pem(), key: made.signing_key.serialize_pem() }
    }

    /// Not one line of the key, as PEM or as a Secret has it, is in `text`.
    pub fn assert_is_secret_in(&self, text: &str, place: &str) {
        assert!(!text.contains("PRIVATE"), "{place} holds a private key: {text}");
        for line in self.key.lines().filter(|line| !line.starts_with("-----") && line.len() > 8) {
            assert!(!text.contains(line), "{place} holds a line of a private key: {text}");
        }
        let encoded = STANDARD.encode(&self.key);
        for piece in encoded.as_bytes().chunks(48).filter(|piece| piece.len() == 48) {
            let piece = std::str::from_utf8(piece).expect("base64");
            assert!(!text.contains(piece), "{place} holds a part of a Secret: {text}");
        }
    }
}

/// A TLS Secret, with a `---` before it as everything here.
pub fn secret(namespace: &str, name: &str, identity: &Identity) -> String {
    format!(
        "---\n{{apiVersion: v1, kind: Secret, type: kubernetes.io/tls,\n \
         metadata: {{namespace: {namespace}, name: {name}}},\n \
         data: {{tls.crt: {}, tls.key: {}}}}}\n",
        STANDARD.encode(&identity.certificate),
        STANDARD.encode(&identity.key),
    )
}

/// A Service; each port has a name, which may be empty, and a number.
pub fn service(namespace: &str, name: &str, ports: &[(&str, u16)]) -> String {
    let port = |&(name, port): &(&str, u16)| match name {
        "" => format!("{{port: {port}}}"),
        _ => format!("{{name: {name}, port: {port}}}"),
    };
    let ports: Vec<String> = ports.iter().map(port).collect();
    format!(
        "---\n{{apiVersion: v1, kind: Service, metadata: {{namespace: {namespace}, name: {name}}}, \
         spec: {{ports: [{}]}}}}\n",
        ports.join(", ")
    )
}

/// One EndpointSlice for each endpoint, as toys on one address differ by port.
pub fn slices(namespace: &str, service: &str, port: &str, endpoints: &[SocketAddr]) -> String {
    let slice = |endpoint: &SocketAddr| {
        format!(
            "---\n{{apiVersion: discovery.k8s.io/v1, kind: EndpointSlice, addressType: IPv4,\n \
             metadata: {{namespace: {namespace}, name: {service}-{number}, \
             labels: {{kubernetes.io/service-name: {service}}}}},\n \
             ports: [{{name: \"{port}\", port: {number}}}], endpoints: [{{addresses: [{ip}]}}]}}\n",
            number = endpoint.port(),
            ip = endpoint.ip(),
        )
    };
    endpoints.iter().map(slice).collect()
}

/// The manifests that others wrote. `None`, with a line that says so, where they are not at hand.
pub fn shared() -> Option<PathBuf> {
    let workspace = Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("the workspace");
    let beside = workspace.join("../shared");
    let path = match std::env::var_os("LOCKGATE_SHARED_MANIFESTS") {
        Some(path) => PathBuf::from(path),
        None => beside.join("manifests"),
    };
    if path.is_dir() {
        return Some(path);
    }
    let in_ci = std::env::var_os("CI").is_some();
    assert!(!(in_ci && beside.is_dir()), "{} is missing", path.display());
    eprintln!("SKIPPED: no manifests at {}; set LOCKGATE_SHARED_MANIFESTS", path.display());
    None
}

/// Copies one of the shared files into `folder` as it is.
pub fn copy(shared: &Path, file: &str, folder: &Path) {
    let text = fs::read(shared.join(file)).unwrap_or_else(|error| panic!("{file}: {error}"));
    fs::write(folder.join(file.replace('/', "-")), text).expect("writes");
}
