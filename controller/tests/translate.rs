//! Golden folders: `golden/CASE/in/*.yaml` in, `golden/CASE/out.yaml` out.
//! `LOCKGATE_UPDATE_GOLDEN=1` writes the output instead of comparing it.
//!
//! `golden/manifests-FOLDER` reads manifests that others wrote, which are not
//! part of this repository: FOLDER below `LOCKGATE_SHARED_MANIFESTS`, by
//! default `../shared/manifests` beside the workspace.
#![allow(clippy::unwrap_used)] // a test fails by panicking

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use lockgate_controller::objects::{Parsed, parse};
use lockgate_controller::store::{Key, Store};
use lockgate_controller::translate::{
    Desired, HeaderOptions, NodeOptions, Options, StreamOptions, translate,
};
use lockgate_ebpf::ServiceTable;
use lockgate_proxy::Certificate;
use serde::{Deserialize, Serialize};

/// What a case shows. Statuses as lines, certificates by what they name: a
/// golden file is there to be read.
#[derive(Serialize)]
struct Output {
    #[serde(skip_serializing_if = "Vec::is_empty")]
    documents: Vec<String>,
    hosts: serde_yaml::Value,
    #[serde(skip_serializing_if = "serde_yaml::Value::is_null")]
    edits: serde_yaml::Value,
    #[serde(skip_serializing_if = "is_empty")]
    passthrough: serde_yaml::Value,
    pools: serde_yaml::Value,
    #[serde(skip_serializing_if = "serde_yaml::Value::is_null")]
    listeners: serde_yaml::Value,
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    certificates: BTreeMap<String, Vec<String>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    default_certificate: Option<String>,
    #[serde(skip_serializing_if = "serde_yaml::Value::is_null")]
    services: serde_yaml::Value,
    statuses: BTreeMap<String, Vec<String>>,
}

fn is_empty(value: &serde_yaml::Value) -> bool {
    value.as_mapping().is_some_and(serde_yaml::Mapping::is_empty)
}

#[test]
fn golden() {
    let golden = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden");
    let shared = std::env::var_os("LOCKGATE_SHARED_MANIFESTS")
        .map_or_else(|| Path::new(env!("CARGO_MANIFEST_DIR")).join("../../shared/manifests"), PathBuf::from);
    let update = std::env::var_os("LOCKGATE_UPDATE_GOLDEN").is_some();
    let mut failed = Vec::new();
    let cases = entries(&golden);
    assert!(cases.len() > 20, "no cases below {}", golden.display());
    for case in cases {
        let name = case.file_name().unwrap().to_str().unwrap().to_owned();
        let input = match name.strip_prefix("manifests-") {
            None => case.join("in"),
            Some(folder) => shared.join(folder),
        };
        if !input.is_dir() {
            assert!(name.starts_with("manifests-"), "{name} has no input");
            eprintln!("SKIPPED {name}: there is no {}; set LOCKGATE_SHARED_MANIFESTS", input.display());
            continue;
        }
        let output = run(&input, &options(&case.join("options.yaml")));
        let file = case.join("out.yaml");
        if update {
            fs::write(&file, output).unwrap();
        } else if fs::read_to_string(&file).unwrap_or_default() != output {
            eprintln!("{name}: expected {}, got:\n{output}", file.display());
            failed.push(name);
        }
    }
    assert!(failed.is_empty(), "{failed:?} differ; if that is right, run with LOCKGATE_UPDATE_GOLDEN=1");
}

/// Sorted, so that every machine reads in the same order.
fn entries(folder: &Path) -> Vec<PathBuf> {
    let mut entries: Vec<PathBuf> =
        fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path()).collect();
    entries.sort();
    entries
}

fn options(file: &Path) -> Options {
    #[derive(Default, Deserialize)]
    #[serde(deny_unknown_fields, default)]
    struct File {
        ingress_class: Option<String>,
        require_class: bool,
        tcp_services: Option<String>,
        udp_services: Option<String>,
        proxy_set_headers: Option<String>,
        add_headers: Option<String>,
        allowed_response_headers: Vec<String>,
        node: Option<NodeFile>,
    }
    #[derive(Default, Deserialize)]
    #[serde(deny_unknown_fields, default)]
    struct NodeFile {
        name: String,
        cluster_networks: Vec<ipnet::IpNet>,
        service_networks: Vec<ipnet::IpNet>,
        external_ips: bool,
    }
    let file: File = match fs::read_to_string(file) {
        Ok(text) => serde_yaml::from_str(&text).unwrap(),
        Err(_) => File::default(),
    };
    let key = |text: Option<String>| {
        text.map(|text| text.split_once('/').map(|(namespace, name)| Key::new(namespace, name)).unwrap())
    };
    let streams = StreamOptions {
        tcp_services: key(file.tcp_services),
        udp_services: key(file.udp_services),
        reserved: [8080, 8443, 10254].into(),
        ..StreamOptions::default()
    };
    Options {
        ingress_class: file.ingress_class,
        require_class: file.require_class,
        streams,
        node: file.node.map(|node| NodeOptions {
            name: node.name.into(),
            cluster_networks: node.cluster_networks,
            service_networks: node.service_networks,
            external_ips: node.external_ips,
            ..NodeOptions::default()
        }),
        headers: HeaderOptions {
            proxy_set_headers: key(file.proxy_set_headers),
            add_headers: key(file.add_headers),
            allowed_response_headers: file.allowed_response_headers,
        },
        ..Options::default()
    }
}

fn run(input: &Path, options: &Options) -> String {
    let mut store = Store::default();
    let mut documents = Vec::new();
    read(input, &mut store, &mut documents);
    let desired = translate(&store, options);
    serde_yaml::to_string(&output(documents, &desired)).unwrap()
}

fn read(path: &Path, store: &mut Store, documents: &mut Vec<String>) {
    if path.is_dir() {
        return entries(path).iter().for_each(|entry| read(entry, store, documents));
    }
    if path.extension().is_none_or(|extension| extension != "yaml") {
        return;
    }
    let text = fs::read_to_string(path).unwrap();
    for document in serde_yaml::Deserializer::from_str(&text) {
        for parsed in parse(serde_yaml::Value::deserialize(document).unwrap()) {
            match parsed {
                Parsed::Object(object, notices) => {
                    let reference = object.reference();
                    documents.extend(notices.iter().map(|notice| format!("{reference}: {}", line(notice))));
                    store.apply(object);
                }
                Parsed::Unused(_) => {}
                Parsed::Unsupported { reference, notice, .. } => {
                    documents.push(format!("{reference}: {}", line(&notice)));
                }
                Parsed::Invalid { reference: Some(reference), notice } => {
                    documents.push(format!("{reference}: {}", line(&notice)));
                }
                Parsed::Invalid { reference: None, notice } => documents.push(line(&notice)),
            }
        }
    }
}

fn line(notice: &lockgate_controller::objects::Notice) -> String {
    format!("{} {notice}", format!("{:?}", notice.level).to_lowercase())
}

fn output(documents: Vec<String>, desired: &Desired) -> Output {
    let shown = |certificate: &Certificate| {
        format!("{} ({:?})", certificate.names().join(", "), certificate.algorithm())
    };
    let routes = &desired.routes;
    Output {
        documents,
        hosts: serde_yaml::to_value(&routes.hosts).unwrap(),
        edits: serde_yaml::to_value(&routes.edits).unwrap(),
        passthrough: serde_yaml::to_value(&routes.passthrough).unwrap(),
        pools: serde_yaml::to_value(&routes.pools).unwrap(),
        listeners: match routes.listeners.is_empty() {
            true => serde_yaml::Value::Null,
            false => serde_yaml::to_value(&routes.listeners).unwrap(),
        },
        certificates: routes
            .certificates
            .iter()
            .map(|(host, all)| (host.as_str().to_owned(), all.iter().map(|one| shown(one)).collect()))
            .collect(),
        default_certificate: routes.default_certificate.as_deref().map(shown),
        services: match desired.services == ServiceTable::default() {
            true => serde_yaml::Value::Null,
            false => serde_yaml::to_value(&desired.services).unwrap(),
        },
        statuses: desired
            .statuses
            .iter()
            .map(|(object, notices)| (object.to_string(), notices.iter().map(line).collect()))
            .collect(),
    }
}
