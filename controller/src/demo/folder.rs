//! The demo's folder of manifests, and its edits.

use std::fs;
use std::io;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use tempfile::TempDir;

const SERVICE: &str = include_str!("../../../manifests/demo/service.yaml");
const ENDPOINT: &str = include_str!("../../../manifests/demo/endpoint.yaml");
const SHOP: &str = include_str!("../../../manifests/demo/shop.yaml");
const CANARY: &str = include_str!("../../../manifests/demo/canary.yaml");
const SECURE: &str = include_str!("../../../manifests/demo/secure.yaml");

/// A temporary folder; it goes when this is dropped.
pub(crate) struct DemoFolder {
    dir: TempDir,
}

/// A certificate and its key, PEM.
pub(crate) struct Identity {
    pub(crate) certificate: String,
    pub(crate) key: String,
}

impl Identity {
    /// Made on the spot, signed by itself.
    pub(crate) fn new(host: &str) -> Result<Identity, rcgen::Error> {
        let made = rcgen::generate_simple_self_signed(vec![host.to_owned()])?;
        Ok(Identity { certificate: made.cert.pem(), key: made.signing_key.serialize_pem() })
    }
}

impl DemoFolder {
    /// Writes everything but the canary.
    pub(crate) fn new(versions: &[(&str, Vec<SocketAddr>)], identity: &Identity) -> io::Result<DemoFolder> {
        let folder = DemoFolder { dir: tempfile::Builder::new().prefix("lockgate-demo-").tempdir()? };
        for (version, endpoints) in versions {
            let mut documents = vec![fill(SERVICE, &[("VERSION", version)])];
            for (number, address) in endpoints.iter().enumerate() {
                let (number, port) = (number.to_string(), address.port().to_string());
                documents.push(fill(ENDPOINT, &[("VERSION", version), ("NUMBER", &number), ("PORT", &port)]));
            }
            folder.write(&format!("shop-{version}.yaml"), &documents.join("---\n"))?;
        }
        let (certificate, key) = (STANDARD.encode(&identity.certificate), STANDARD.encode(&identity.key));
        folder.write("shop.yaml", SHOP)?;
        folder.write("secure.yaml", &fill(SECURE, &[("CERTIFICATE", &certificate), ("KEY", &key)]))?;
        // Not a manifest by its name; for curl's --cacert.
        folder.write("secure.pem", &identity.certificate)?;
        Ok(folder)
    }

    /// Gives version 2 this share, as an editor would: a new file moved over the old one.
    pub(crate) fn set_weight(&self, percent: u32) -> io::Result<()> {
        self.write("canary.yaml", &fill(CANARY, &[("WEIGHT", &percent.to_string())]))
    }

    pub(crate) fn path(&self) -> &Path {
        self.dir.path()
    }

    pub(crate) fn file(&self, name: &str) -> PathBuf {
        self.path().join(name)
    }

    fn write(&self, name: &str, text: &str) -> io::Result<()> {
        let part = self.file(&format!(".{name}.part"));
        fs::write(&part, text)?;
        fs::rename(part, self.file(name))
    }
}

fn fill(template: &str, values: &[(&str, &str)]) -> String {
    let mut text = template.to_owned();
    for (name, value) in values {
        text = text.replace(&format!("${{{name}}}"), value);
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::args::{Cli, Command};
    use crate::check;
    use clap::Parser;

    #[test]
    fn the_demos_manifests_are_accepted_as_they_are() {
        let addresses = |port: u16| vec![SocketAddr::from(([127, 0, 0, 1], port))];
        let identity = Identity::new("secure.localhost").expect("makes a certificate");
        let folder =
            DemoFolder::new(&[("v1", addresses(4001)), ("v2", addresses(4002))], &identity).expect("writes");
        folder.set_weight(25).expect("writes");
        let path = folder.path().display().to_string();
        let Command::Check(args) = Cli::parse_from(["lockgate", "check", "--strict", &path]).command else {
            panic!("not check");
        };
        let contents = check::read_all(&args.paths, &args.objects);
        let snapshot = contents.snapshot();
        assert_eq!(snapshot.problems, []);
        assert!(snapshot.object_notices.is_empty(), "{:?}", snapshot.object_notices);
        assert_eq!(snapshot.store.ingresses.len(), 3);
        assert_eq!(snapshot.store.slices.len(), 2);
        assert_eq!(check::run(&args), 0);
    }
}
