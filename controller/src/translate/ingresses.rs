//! The plans of all served Ingresses, and who among them touches what.

use std::collections::{BTreeSet, HashMap};
use std::sync::Arc;

use lockgate_proxy::table::HostPattern;

use super::endpoints::toggle;
use super::plan::{Age, Plan};
use super::settings::headers::HeaderWish;
use super::{Dirty, Options};
use crate::objects::{Ingress, Notice};
use crate::store::{Key, Store};

const LEGACY_CLASS: &str = "kubernetes.io/ingress.class";

/// Which Ingresses are served.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Classes {
    /// `None` serves all.
    own: Option<String>,
    /// Whether an Ingress without class is served.
    is_default: bool,
}

impl Classes {
    pub(super) fn new(options: &Options, store: &Store) -> Classes {
        let own = options.ingress_class.clone();
        let class = own.as_deref().and_then(|own| store.classes.get(&Key::new("", own)));
        let is_default = !options.require_class && class.is_some_and(|class| class.is_default);
        Classes { own, is_default }
    }

    /// `Err`: why not, and where that is written.
    pub(super) fn serves(&self, ingress: &Ingress) -> Result<(), (String, String)> {
        let Some(own) = &self.own else { return Ok(()) };
        let legacy = ingress.annotations.get(LEGACY_CLASS).filter(|class| !class.is_empty());
        let (class, field) = match (&ingress.class, legacy) {
            (Some(class), _) => (class, ".spec.ingressClassName".to_owned()),
            (None, Some(class)) => (class, super::annotations::field(LEGACY_CLASS)),
            (None, None) if self.is_default => return Ok(()),
            (None, None) => {
                let message = format!("not served: it names no class, and {own} is not the default class");
                return Err((".spec.ingressClassName".to_owned(), message));
            }
        };
        if **class == **own {
            return Ok(());
        }
        Err((field, format!("not served: it belongs to class {class}, and this is {own}")))
    }
}

#[derive(Default)]
pub(super) struct Ingresses {
    plans: HashMap<Key, Arc<Plan>>,
    rules: HashMap<HostPattern, BTreeSet<Age>>,
    certificates: HashMap<HostPattern, BTreeSet<Age>>,
    services: HashMap<Key, BTreeSet<Key>>,
    secrets: HashMap<Key, BTreeSet<Key>>,
    config_maps: HashMap<Key, BTreeSet<Key>>,
    any_host: BTreeSet<Age>,
}

impl Ingresses {
    /// Makes the plan of a new or changed Ingress, or drops that of a removed one.
    pub(super) fn replace(&mut self, key: &Key, new: Option<(&Arc<Ingress>, &Classes)>, dirty: &mut Dirty) {
        dirty.statuses.insert(key.clone());
        if let Some(plan) = self.plans.remove(key) {
            self.register(&plan, false, dirty);
        }
        if let Some((ingress, classes)) = new
            && classes.serves(ingress).is_ok()
        {
            let plan = Arc::new(Plan::new(ingress));
            self.register(&plan, true, dirty);
            self.plans.insert(key.clone(), plan);
        }
    }

    fn register(&mut self, plan: &Plan, present: bool, dirty: &mut Dirty) {
        let (age, key) = (&plan.age, &plan.age.key);
        for host in plan.contributes_to() {
            dirty.hosts.insert(host.clone());
            toggle(&mut self.rules, host, age.clone(), present);
        }
        for host in plan.certified_hosts() {
            dirty.certificates.insert(host.clone());
            toggle(&mut self.certificates, host, age.clone(), present);
        }
        for (_, service, _) in plan.services() {
            toggle(&mut self.services, service.clone(), key.clone(), present);
        }
        if let Some(config_map) = &plan.settings.headers.custom {
            toggle(&mut self.config_maps, config_map.clone(), key.clone(), present);
        }
        for tls in &plan.tls {
            toggle(&mut self.secrets, tls.secret.clone(), key.clone(), present);
            if tls.any_host {
                dirty.default_certificate = true;
                if present {
                    self.any_host.insert(age.clone());
                } else {
                    self.any_host.remove(age);
                }
            }
        }
    }

    #[cfg(test)]
    pub(super) fn is_empty(&self) -> bool {
        let by_host = self.rules.is_empty() && self.certificates.is_empty() && self.any_host.is_empty();
        let by_object = self.services.is_empty() && self.secrets.is_empty() && self.config_maps.is_empty();
        by_host && self.plans.is_empty() && by_object
    }

    pub(super) fn plan(&self, key: &Key) -> Option<&Arc<Plan>> {
        self.plans.get(key)
    }

    /// Oldest first.
    pub(super) fn with_rules_for(&self, host: &HostPattern) -> Vec<Arc<Plan>> {
        self.plans_of(self.rules.get(host))
    }

    /// Oldest first.
    pub(super) fn with_certificates_for(&self, host: &HostPattern) -> Vec<Arc<Plan>> {
        self.plans_of(self.certificates.get(host))
    }

    fn plans_of(&self, ages: Option<&BTreeSet<Age>>) -> Vec<Arc<Plan>> {
        ages.into_iter().flatten().filter_map(|age| self.plans.get(&age.key)).cloned().collect()
    }

    /// Those with a certificate for any host, oldest first.
    pub(super) fn with_any_host(&self) -> impl Iterator<Item = &Arc<Plan>> {
        self.any_host.iter().filter_map(|age| self.plans.get(&age.key))
    }

    pub(super) fn using_service(&self, service: &Key) -> impl Iterator<Item = &Key> {
        self.services.get(service).into_iter().flatten()
    }

    pub(super) fn using_secret(&self, secret: &Key) -> impl Iterator<Item = &Key> {
        self.secrets.get(secret).into_iter().flatten()
    }

    pub(super) fn using_config_map(&self, config_map: &Key) -> impl Iterator<Item = &Key> {
        self.config_maps.get(config_map).into_iter().flatten()
    }

    /// Those whose rules change headers on their own.
    pub(super) fn with_headers(&self) -> impl Iterator<Item = &Arc<Plan>> {
        self.plans.values().filter(|plan| plan.settings.headers != HeaderWish::default())
    }

    /// Why an Ingress without a plan is not served.
    pub(super) fn refusal(&self, ingress: &Ingress, classes: &Classes) -> Vec<Notice> {
        classes
            .serves(ingress)
            .err()
            .map(|(field, message)| Notice::info(field, message))
            .into_iter()
            .collect()
    }
}
