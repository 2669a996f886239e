//! HTTP: from a request's head to what is done with it. Both protocol versions
//! decide here; moving bytes is theirs.

use std::sync::Arc;

use crate::balance::Steer;
use crate::balance::hash::Subject;
use crate::certificate::Certificate;
use crate::metrics;
use crate::router::{CompiledAction, CompiledRule, Found, Router};
use crate::split::{Choice, CompiledSplit};
use crate::table::{FieldEdits, HeaderEdits, Origin};
use crate::tls;
use crate::view::RequestView;
use crate::worker::Worker;

pub(crate) mod attempts;
pub(crate) mod chunked;
pub(crate) mod client;
pub(crate) mod edit;
pub(crate) mod exchange;
pub(crate) mod field;
pub(crate) mod forward;
pub(crate) mod h1;
pub(crate) mod h2;
pub(crate) mod head;
pub(crate) mod hedge;
pub(crate) mod kept;
pub(crate) mod map;
pub(crate) mod over_h2;
pub(crate) mod path;
pub(crate) mod record;
pub(crate) mod response;
pub(crate) mod tunnel;

use client::Client;
use head::Reject;

/// What is to be done with a request, decided before a byte of it moves on.
pub(crate) enum Verdict<'r> {
    Forward(Forward<'r>),
    /// Answered here.
    Answer(Answer<'r>),
}

impl<'r> Verdict<'r> {
    /// What is changed in the head of the answer, whoever gives it.
    pub(crate) fn response_edits(&self) -> Option<&'r FieldEdits> {
        let edits = match self {
            Verdict::Forward(forward) => forward.edits,
            Verdict::Answer(answer) => answer.edits,
        };
        edits.map(|edits| &edits.response)
    }
}

/// A request for an endpoint.
#[derive(Clone, Copy)]
pub(crate) struct Forward<'r> {
    pub(crate) rule: &'r CompiledRule,
    pub(crate) split: &'r CompiledSplit,
    pub(crate) choice: Choice,
    pub(crate) steer: Steer,
    pub(crate) edits: Option<&'r HeaderEdits>,
}

/// A request we answer ourselves.
pub(crate) struct Answer<'r> {
    pub(crate) status: u16,
    pub(crate) reason: &'r str,
    /// 308 to the same URL on https.
    pub(crate) to_https: bool,
    pub(crate) origin: Option<&'r Arc<Origin>>,
    pub(crate) edits: Option<&'r HeaderEdits>,
}

impl<'r> Answer<'r> {
    /// Where no rule is asked.
    fn new(router: &'r Router, status: u16, reason: &'r str) -> Answer<'r> {
        Answer { status, reason, to_https: false, origin: None, edits: router.edits() }
    }
}

/// The parts of a request that routing needs.
pub(crate) struct Asked<'a> {
    /// Host and port as the client named them.
    pub(crate) authority: &'a [u8],
    pub(crate) method: &'a [u8],
    /// As sent.
    pub(crate) target: &'a [u8],
    /// Path without query, as sent.
    pub(crate) path: &'a [u8],
    /// Whether the client came by https, as far as is known.
    pub(crate) https: bool,
}

/// Decides. Pure but for the turn counters of splits.
pub(crate) fn decide<'r>(
    worker: &Worker,
    router: &'r Router,
    client: &Client,
    asked: &Asked<'_>,
    view: &impl RequestView,
) -> Result<Verdict<'r>, Reject> {
    let mut room = [0; 256];
    let host = routing_host(asked.authority, &mut room);
    if let Some(tls) = &client.tls {
        let certificate: Option<&Certificate> = tls.certificate.as_deref();
        if tls::is_misdirected(tls.server_name.as_deref(), certificate, host) {
            worker.metrics.rejected(metrics::Reject::Misdirected);
            return Ok(Verdict::Answer(Answer::new(
                router,
                421,
                "the connection's certificate does not cover this host",
            )));
        }
    }
    let mut scratch = worker.scratch.borrow_mut();
    let path = path::normalise(asked.path, &mut scratch)?;
    let rule = match router.find(host, path) {
        Found::Rule(rule) => rule,
        Found::NoPath => return Ok(no_route(worker, router, "no rule for this path")),
        Found::NoHost => return Ok(no_route(worker, router, "no rule for this host")),
    };
    let origin = Some(&rule.origin);
    let edits = rule.edits.as_deref().or(router.edits());
    if rule.https_redirect && !asked.https && !path.starts_with(b"/.well-known/acme-challenge/") {
        return Ok(Verdict::Answer(Answer { to_https: true, origin, edits, ..Answer::new(router, 308, "") }));
    }
    Ok(match &rule.action {
        CompiledAction::Respond { status, reason } => {
            Verdict::Answer(Answer { origin, edits, ..Answer::new(router, *status, reason) })
        }
        CompiledAction::Forward(split) => {
            let choice = split.choose(router, view, &worker.turns);
            let Asked { method, target, https, .. } = *asked;
            let subject = Subject { view, method, target, path, host, https };
            let steer = split.steer(choice, router, &subject, &worker.turns);
            Verdict::Forward(Forward { rule, split, choice, steer, edits })
        }
    })
}

fn no_route<'r>(worker: &Worker, router: &'r Router, reason: &'static str) -> Verdict<'r> {
    worker.metrics.rejected(metrics::Reject::NoRoute);
    Verdict::Answer(Answer::new(router, 404, reason))
}

/// The host of an authority as rules name it: lower case, no port, no trailing dot.
fn routing_host<'a>(authority: &[u8], room: &'a mut [u8; 256]) -> &'a str {
    let (host, _) = head::split_port(authority);
    let host = host.strip_suffix(b".").unwrap_or(host);
    let Some(slot) = room.get_mut(..host.len()) else { return "" };
    for (to, from) in slot.iter_mut().zip(host) {
        *to = from.to_ascii_lowercase();
    }
    // An authority is ASCII by the time it gets here.
    std::str::from_utf8(slot).unwrap_or_default()
}

/// Whether a request may be sent twice (RFC 9110 section 9.2.2).
pub(crate) fn is_idempotent(method: &[u8]) -> bool {
    matches!(method, b"GET" | b"HEAD" | b"OPTIONS" | b"PUT" | b"DELETE" | b"TRACE")
}

/// The reason phrase of the statuses we send ourselves.
pub(crate) fn phrase(status: u16) -> &'static str {
    http::StatusCode::from_u16(status).ok().and_then(|s| s.canonical_reason()).unwrap_or("")
}

/// Appends `https://host[:port]target`. The port is named when the client named
/// one: then the well-known ports are evidently not in use.
pub(crate) fn write_https_location(out: &mut Vec<u8>, worker: &Worker, authority: &[u8], target: &[u8]) {
    let (host, port) = head::split_port(authority);
    out.extend_from_slice(b"https://");
    out.extend_from_slice(host);
    if let (Some(_), Some(https)) = (port, worker.https_port.filter(|p| *p != 443)) {
        out.push(b':');
        out.extend_from_slice(forward::decimal(u64::from(https), &mut [0; 20]));
    }
    out.extend_from_slice(target);
}
