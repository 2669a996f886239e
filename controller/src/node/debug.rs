//! `/debug/services`: what should be, what is, and the difference; and `/debug/explain`.

use std::collections::BTreeSet;

use hyper::StatusCode;
use lockgate_ebpf::Live;
use lockgate_ebpf::maps::Maps;
use lockgate_ebpf::table::{Frontend, ServiceTable};
use serde::Serialize;
use tokio::sync::oneshot;

use super::agent::Agent;
use super::explain::{Question, explain};
use crate::http::{Answer, Reply};
use crate::text::Text;

/// What only the agent can answer, between two changes.
pub(crate) enum Ask {
    /// `/debug/services`, of all Services or of `namespace/name`.
    Services(Option<String>, oneshot::Sender<Reply>),
    /// What the programs counted, as `/metrics` shows it.
    Events(oneshot::Sender<String>),
    /// `/debug/explain`
    Explain(Question, oneshot::Sender<Reply>),
}

/// The answer to `/debug/services`.
#[derive(Serialize)]
struct Shown {
    desired: ServiceTable,
    live: Live,
    difference: Vec<String>,
}

impl Ask {
    /// Answers from what `agent` has now.
    pub(crate) fn answer<M: Maps>(self, agent: &Agent<M>) {
        // Who asked may have left.
        match self {
            Ask::Services(of, reply) => drop(reply.send(services(agent, of.as_deref()))),
            Ask::Events(reply) => drop(reply.send(events(agent))),
            Ask::Explain(question, reply) => {
                let mut text = Text::new(false);
                let table = agent.reconciler().table();
                let served = explain(&mut text, table, &question, agent.options(), &agent.snapshot().store);
                let status = if served { StatusCode::OK } else { StatusCode::NOT_FOUND };
                drop(reply.send(Answer::text(status, &text.finish()).into()));
            }
        }
    }
}

/// Totals of the kernel, which no counter of a registry can take over.
fn events<M: Maps>(agent: &Agent<M>) -> String {
    const NAME: &str = "lockgate_service_events_total";
    let counted = agent.reconciler().maps().events().unwrap_or_default();
    let mut text = match counted.is_empty() {
        true => String::new(),
        false => format!("# HELP {NAME} What kernel programs did\n# TYPE {NAME} counter\n"),
    };
    for (reason, count) in counted {
        text += &format!("{NAME}{{reason=\"{reason}\"}} {count}\n");
    }
    text
}

fn services<M: Maps>(agent: &Agent<M>, of: Option<&str>) -> Reply {
    let table = agent.reconciler().table();
    let desired = of.map_or_else(|| table.clone(), |of| only(table, of));
    let keys: Option<BTreeSet<Frontend>> = of.map(|_| desired.frontends.keys().copied().collect());
    if keys.as_ref().is_some_and(BTreeSet::is_empty) {
        return Answer::text(StatusCode::NOT_FOUND, "no such Service is served; name it as namespace/name\n")
            .into();
    }
    let live = match Live::read(agent.reconciler().maps(), keys.as_ref()) {
        Ok(live) => live,
        Err(error) => return Answer::text(StatusCode::INTERNAL_SERVER_ERROR, &format!("{error}\n")).into(),
    };
    let difference = live.difference(&Live::desired(table, keys.as_ref()));
    match serde_json::to_string_pretty(&Shown { desired, live, difference }) {
        Ok(json) => Answer::json(StatusCode::OK, json).no_store().into(),
        Err(error) => Answer::text(StatusCode::INTERNAL_SERVER_ERROR, &format!("{error}\n")).into(),
    }
}

/// What of `table` is of the Service `namespace/name`.
fn only(table: &ServiceTable, of: &str) -> ServiceTable {
    let prefix = format!("{of}:");
    let mut only = ServiceTable { node: table.node.clone(), ..ServiceTable::default() };
    for (frontend, target) in
        table.frontends.iter().filter(|(_, target)| target.service.name.starts_with(&prefix))
    {
        only.frontends.insert(*frontend, target.clone());
        if table.cluster_ips.contains(&frontend.address) {
            only.cluster_ips.insert(frontend.address);
        }
    }
    let own = table.services.iter().filter(|(name, _)| name.name.starts_with(&prefix));
    only.services = own.map(|(name, service)| (name.clone(), service.clone())).collect();
    let check =
        |check: &lockgate_ebpf::table::HealthCheck| format!("{}/{}", check.namespace, check.name) == of;
    let checks = table.health_checks.iter().filter(|(_, one)| check(one));
    only.health_checks = checks.map(|(port, one)| (*port, one.clone())).collect();
    only
}
