//! Secrets to certificates, and which of them each host gets.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::Arc;

use lockgate_proxy::Certificate;
use lockgate_proxy::table::HostPattern;

use super::differing;
use super::host::FIRST;
use super::plan::{Plan, Tls};
use crate::objects::{Notice, Secret};
use crate::store::{Key, Store};

const TLS: &str = "kubernetes.io/tls";

/// What is wrong with a Secret, and what to do about it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Problem {
    pub(super) message: String,
    pub(super) remedy: String,
}

type Loaded = Result<Arc<Certificate>, Problem>;

#[derive(Default)]
pub(super) struct Certificates {
    /// Parsed once for each version of a Secret.
    loaded: HashMap<Key, Loaded>,
    notices: HashMap<HostPattern, BTreeMap<Key, Vec<Notice>>>,
}

impl Certificates {
    /// The Secret changed.
    pub(super) fn forget(&mut self, secret: &Key) {
        self.loaded.remove(secret);
    }

    /// The certificate in a Secret.
    pub(super) fn load(&mut self, key: &Key, store: &Store) -> Loaded {
        match store.secrets.get(key) {
            // Not remembered, or whatever Ingresses name would stay for good.
            None => {
                let message = format!("Secret {key} does not exist");
                Err(Problem { message, remedy: format!("create it with type {TLS}") })
            }
            Some(secret) => {
                self.loaded.entry(key.clone()).or_insert_with(|| read(secret, key).map(Arc::new)).clone()
            }
        }
    }

    /// The certificates of one host: at most one per key algorithm, the oldest
    /// Ingress's. Adds to `statuses` the Ingresses whose notices change.
    pub(super) fn make(
        &mut self,
        host: &HostPattern,
        plans: &[Arc<Plan>],
        store: &Store,
        statuses: &mut BTreeSet<Key>,
    ) -> Vec<Arc<Certificate>> {
        let mut chosen: Vec<(&Plan, &Tls, Arc<Certificate>)> = Vec::new();
        let mut notices: BTreeMap<Key, Vec<Notice>> = BTreeMap::new();
        for (plan, tls) in plans.iter().flat_map(|plan| plan.tls.iter().map(move |tls| (plan, tls))) {
            let listed = tls.hosts.contains(host);
            if !listed && !plan.unlisted.contains(host) {
                continue;
            }
            let Ok(certificate) = self.load(&tls.secret, store) else { continue };
            if !listed && !covers(&certificate, host) {
                continue;
            }
            let same_kind =
                |entry: &&(_, _, Arc<Certificate>)| entry.2.algorithm() == certificate.algorithm();
            match chosen.iter().find(same_kind) {
                None => chosen.push((plan, tls, certificate)),
                Some((winner, winning, other)) => {
                    if listed && *other != certificate {
                        let message = format!(
                            "{} is served with Secret {} of Ingress {}, which {FIRST}",
                            host.as_str(),
                            winning.secret,
                            winner.age.key
                        );
                        let notice = Notice::warning(
                            format!(".spec.tls[{}]", tls.index),
                            message,
                            "use one Secret for the host",
                        );
                        notices.entry(plan.age.key.clone()).or_default().push(notice);
                    }
                }
            }
        }
        let before = self.notices.remove(host).unwrap_or_default();
        differing(&before, &notices, statuses);
        if !notices.is_empty() {
            self.notices.insert(host.clone(), notices);
        }
        chosen.into_iter().map(|(_, _, certificate)| certificate).collect()
    }

    /// What [`Certificates::make`] has to tell `ingress` about `host`.
    pub(super) fn notices(&self, host: &HostPattern, ingress: &Key) -> impl Iterator<Item = &Notice> {
        self.notices.get(host).and_then(|notices| notices.get(ingress)).into_iter().flatten()
    }

    /// The default certificate that the operator names.
    pub(super) fn of_operator(
        &mut self,
        secret: &Key,
        store: &Store,
    ) -> (Option<Arc<Certificate>>, Vec<Notice>) {
        match self.load(secret, store) {
            Ok(certificate) => (Some(certificate), Vec::new()),
            Err(Problem { message, remedy }) => {
                let message = format!("{message}: the default certificate is a self-signed one");
                (None, vec![Notice::error("", message, remedy)])
            }
        }
    }

    /// The default certificate that the first of `plans` has for any host.
    pub(super) fn of_oldest<'a>(
        &mut self,
        plans: impl Iterator<Item = &'a Arc<Plan>>,
        store: &Store,
    ) -> Option<Arc<Certificate>> {
        plans
            .flat_map(|plan| plan.tls.iter().filter(|tls| tls.any_host))
            .find_map(|tls| self.load(&tls.secret, store).ok())
    }
}

/// Whether a client accepts `certificate` for the names that `host` stands for.
pub(super) fn covers(certificate: &Certificate, host: &HostPattern) -> bool {
    match host.as_str().strip_prefix("*.") {
        Some(suffix) => certificate.covers(&format!("any.{suffix}")),
        None => certificate.covers(host.as_str()),
    }
}

fn read(secret: &Secret, key: &Key) -> Result<Certificate, Problem> {
    let problem = |message: String, remedy: &str| Err(Problem { message, remedy: remedy.to_owned() });
    if &*secret.kind != TLS {
        let kind = if secret.kind.is_empty() { "Opaque" } else { &secret.kind };
        let remedy = "create it with `kubectl create secret tls`";
        return problem(format!("Secret {key} has type {kind}, not {TLS}"), remedy);
    }
    let Some(chain) = &secret.certificate else {
        return problem(format!("Secret {key} has no tls.crt"), "add the certificate chain as PEM");
    };
    let Some(private) = &secret.key else {
        return problem(format!("Secret {key} has no tls.key"), "add the private key as PEM");
    };
    Certificate::from_pem(chain, private).map_err(|error| Problem {
        message: format!("Secret {key} cannot be used: {error}"),
        remedy: String::new(),
    })
}
