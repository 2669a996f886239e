//! What there is to tell the author of an Ingress, beyond what its hosts say.

use std::collections::BTreeMap;

use super::certificates::{Certificates, covers};
use super::plan::{Place, Plan};
use super::pools::is_port;
use crate::objects::{Notice, PortRef, Service, ServiceKind};
use crate::store::{Key, Store};

/// What its plan says, then what is wrong with the objects it names.
pub(super) fn of_plan(plan: &Plan, store: &Store, certificates: &mut Certificates) -> Vec<Notice> {
    let mut notices = plan.notices.clone();
    services(plan, store, &mut notices);
    secrets(plan, store, certificates, &mut notices);
    notices
}

/// One notice for each Service port that is missing, however many paths name it.
fn services(plan: &Plan, store: &Store, notices: &mut Vec<Notice>) {
    let mut named: BTreeMap<(&Key, &PortRef), (Place, usize)> = BTreeMap::new();
    for (place, service, port) in plan.services() {
        let (first, count) = named.entry((service, port)).or_insert((place, 0));
        *first = place.min(*first);
        *count += 1;
    }
    let mut missing: Vec<_> = named
        .into_iter()
        .filter_map(|((service, port), (place, count))| {
            let found = store.services.get(service);
            problem(service, port, found.map(|found| &**found)).map(|problem| (place, count, problem))
        })
        .collect();
    missing.sort_by_key(|(place, ..)| *place);
    let consequence = match plan.settings.canary {
        None => "these requests answer 503",
        Some(_) => "the mainline takes this share",
    };
    for (place, count, (field, message, remedy)) in missing {
        let backend = match place {
            Place::DefaultBackend => place.to_string(),
            Place::Path { .. } => format!("{place}.backend"),
        };
        let more = match count {
            1 => String::new(),
            2 => " (the same in one more place)".to_owned(),
            _ => format!(" (the same in {} more places)", count - 1),
        };
        notices.push(Notice::error(
            format!("{backend}.service.{field}"),
            format!("{message}: {consequence}{more}"),
            remedy,
        ));
    }
}

fn problem(key: &Key, port: &PortRef, service: Option<&Service>) -> Option<(&'static str, String, String)> {
    let Some(service) = service else {
        return Some((
            "name",
            format!("Service {key} does not exist"),
            "create it or correct the name".to_owned(),
        ));
    };
    if service.kind == ServiceKind::ExternalName {
        let message =
            format!("Service {key} is of type ExternalName, which can name any host and is refused");
        return Some(("name", message, "use a Service without selector and an EndpointSlice".to_owned()));
    }
    if service.ports.iter().any(|entry| is_port(entry, port)) {
        return None;
    }
    let named = |entry: &&crate::objects::ServicePort| match port {
        PortRef::Number(number) => i32::from(entry.port) == *number,
        PortRef::Name(name) => entry.name == *name,
    };
    if let Some(entry) = service.ports.iter().find(named) {
        let message = format!("port {port} of Service {key} is {}, not TCP", entry.protocol);
        return Some(("port", message, "name a TCP port".to_owned()));
    }
    let ports: Vec<String> = service
        .ports
        .iter()
        .take(8)
        .map(|entry| match &*entry.name {
            "" => entry.port.to_string(),
            name => format!("{} ({name})", entry.port),
        })
        .collect();
    let remedy = match ports.as_slice() {
        [] => "add the port to the Service".to_owned(),
        ports => format!("it has {}", ports.join(", ")),
    };
    Some(("port", format!("Service {key} has no port {port}"), remedy))
}

fn secrets(plan: &Plan, store: &Store, certificates: &mut Certificates, notices: &mut Vec<Notice>) {
    for tls in &plan.tls {
        let field = format!(".spec.tls[{}]", tls.index);
        match certificates.load(&tls.secret, store) {
            Err(problem) => notices.push(Notice::error(
                format!("{field}.secretName"),
                format!("{}: the default certificate is served", problem.message),
                problem.remedy,
            )),
            Ok(certificate) => {
                let uncovered: Vec<&str> = tls
                    .hosts
                    .iter()
                    .filter(|host| !covers(&certificate, host))
                    .map(|host| host.as_str())
                    .collect();
                if !uncovered.is_empty() {
                    let names: Vec<&str> = certificate.names().iter().take(8).map(|name| &**name).collect();
                    let message = format!(
                        "the certificate in Secret {} is served for {}, but it names only {}",
                        tls.secret,
                        uncovered.join(", "),
                        names.join(", ")
                    );
                    let remedy = "get a certificate for the host, or correct the host";
                    notices.push(Notice::warning(format!("{field}.hosts"), message, remedy));
                }
            }
        }
    }
}
