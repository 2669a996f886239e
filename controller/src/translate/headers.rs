//! Header edits: what two ConfigMaps of the operator's ask of every request and
//! every response, and what Ingresses ask of their own. Text of either becomes
//! a field of a head or a notice, never anything else.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::sync::Arc;

use lockgate_proxy::table::{
    Authority, FieldEdit, FieldEdits, FieldName, FieldValue, HeaderEdits, PathMatch,
};

use super::annotations::{PREFIX, field};
use super::plan::{Plan, Target};
use super::settings::headers::{HeaderWish, Part};
use crate::objects::{ConfigMap, Notice};
use crate::store::{Key, Store};

/// Most fields of one ConfigMap, and most bytes of them: heads must stay small.
const MOST_FIELDS: usize = 64;
const MOST_BYTES: usize = 16 << 10;

/// What the operator says about headers; the names are those of ingress-nginx's ConfigMap.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct HeaderOptions {
    /// A ConfigMap of fields that endpoints get with every request.
    pub proxy_set_headers: Option<Key>,
    /// A ConfigMap of fields that clients get with every response.
    pub add_headers: Option<Key>,
    /// Lower case: the fields that the ConfigMap of an Ingress's `custom-headers` may hold.
    pub allowed_response_headers: Vec<String>,
}

impl HeaderOptions {
    /// Whether `config_map` is one of the two.
    pub fn names(&self, config_map: &Key) -> bool {
        [&self.proxy_set_headers, &self.add_headers].into_iter().flatten().any(|named| named == config_map)
    }
}

/// What became of the ConfigMap that an Ingress names.
#[derive(Debug)]
enum Custom {
    Edits(Vec<FieldEdit>),
    /// Its routes answer 503, as in ingress-nginx: what its author meant to protect is not served bare.
    Refused {
        message: String,
        remedy: String,
    },
}

/// The edits that are in force.
#[derive(Default)]
pub(super) struct Headers {
    options: HeaderOptions,
    request: Vec<FieldEdit>,
    response: Vec<FieldEdit>,
    /// For rules with no edits of their own.
    everywhere: Option<Arc<HeaderEdits>>,
    /// Of the ConfigMaps that matter now; `true`: as Ingresses of their own namespace are told of them.
    custom: HashMap<(Key, bool), Custom>,
    /// Those in use, and some that were: rules that ask for the same share it.
    shared: HashSet<Arc<HeaderEdits>>,
    /// When as many are there, those that nobody uses go.
    sweep_at: usize,
}

impl Headers {
    pub(super) fn new(options: &HeaderOptions) -> Headers {
        Headers { options: options.clone(), ..Headers::default() }
    }

    /// Reads the operator's ConfigMaps: what to tell them, by ConfigMap, each that is named having an entry.
    pub(super) fn read(&mut self, store: &Store) -> BTreeMap<Key, Vec<Notice>> {
        let mut notices: BTreeMap<Key, Vec<Notice>> = BTreeMap::new();
        let mut read = |key: &Option<Key>, flag: &str| {
            let Some(key) = key else { return Vec::new() };
            let notices = notices.entry(key.clone()).or_default();
            let Some(config_map) = store.config_maps.get(key) else {
                notices.push(Notice::error(
                    "",
                    format!("ConfigMap {key} does not exist: its headers are not set"),
                    format!("create it, or correct {flag}"),
                ));
                return Vec::new();
            };
            of_operator(config_map, notices)
        };
        self.request = read(&self.options.proxy_set_headers, "--proxy-set-headers");
        self.response = read(&self.options.add_headers, "--add-headers");
        let edits = HeaderEdits {
            request: FieldEdits::new(self.request.iter().cloned()),
            response: FieldEdits::new(self.response.iter().cloned()),
            ..HeaderEdits::default()
        };
        self.everywhere = (!edits.is_empty()).then(|| Arc::new(edits));
        notices
    }

    /// For rules without edits of their own.
    pub(super) fn everywhere(&self) -> Option<Arc<HeaderEdits>> {
        self.everywhere.clone()
    }

    /// Reads the ConfigMap that `plan` names: it is known until [`Headers::forget`].
    pub(super) fn load(&mut self, plan: &Plan, store: &Store) {
        let Some(named) = custom_of(plan) else { return };
        if !self.custom.contains_key(&named) {
            let custom = of_ingress(&named.0, &plan.age.key.namespace, store, &self.options);
            self.custom.insert(named, custom);
        }
    }

    pub(super) fn forget(&mut self) {
        self.custom.clear();
    }

    fn refused(&self, plan: &Plan) -> Option<(&str, &str)> {
        match self.custom.get(&custom_of(plan)?)? {
            Custom::Edits(_) => None,
            Custom::Refused { message, remedy } => Some((message, remedy)),
        }
    }

    /// Why the routes of a loaded plan answer 503.
    pub(super) fn refusal(&self, plan: &Plan) -> Option<Arc<str>> {
        self.refused(plan).map(|_| "the headers of annotation custom-headers cannot be set".into())
    }

    /// What there is to tell its author.
    pub(super) fn notice(&self, plan: &Plan) -> Option<Notice> {
        let (message, remedy) = self.refused(plan)?;
        let message = format!("{message}: the routes of this Ingress answer 503, as in ingress-nginx");
        Some(Notice::error(field(&format!("{PREFIX}custom-headers")), message, remedy))
    }

    /// What a rule of a loaded plan changes, the operator's edits included; `None`: those alone.
    pub(super) fn of_rule(
        &mut self,
        plan: &Plan,
        path: &PathMatch,
        target: &Target,
    ) -> Option<Arc<HeaderEdits>> {
        let wish = &plan.settings.headers;
        if *wish == HeaderWish::default() {
            return None;
        }
        let prefix = wish.prefix.as_ref().filter(|prefix| *prefix.rewrite != *path.as_str());
        let prefix = prefix.and_then(|prefix| {
            let name = FieldName::new("X-Forwarded-Prefix").ok()?;
            Some(FieldEdit::Set(name, prefix.value.clone()))
        });
        let custom = match custom_of(plan).and_then(|named| self.custom.get(&named)) {
            Some(Custom::Edits(edits)) => &edits[..],
            _ => &[],
        };
        let edits = HeaderEdits {
            host: wish.vhost.as_deref().and_then(|parts| vhost(parts, plan, target)),
            connection: wish.connection,
            request: FieldEdits::new(self.request.iter().cloned().chain(prefix)),
            response: FieldEdits::new(self.response.iter().chain(custom).cloned()),
        };
        if self.everywhere.as_deref().is_some_and(|everywhere| *everywhere == edits) || edits.is_empty() {
            return None;
        }
        Some(self.share(edits))
    }

    fn share(&mut self, edits: HeaderEdits) -> Arc<HeaderEdits> {
        if let Some(known) = self.shared.get(&edits) {
            return known.clone();
        }
        if self.shared.len() >= self.sweep_at {
            self.shared.retain(|edits| Arc::strong_count(edits) > 1);
            self.sweep_at = 64 + 2 * self.shared.len();
        }
        let edits = Arc::new(edits);
        self.shared.insert(edits.clone());
        edits
    }
}

/// `upstream-vhost` for one rule. What its parts stand for are DNS names; too long a host is left out.
fn vhost(parts: &[Part], plan: &Plan, target: &Target) -> Option<Authority> {
    let key = &plan.age.key;
    let mut text = String::new();
    for part in parts {
        text.push_str(match (part, target) {
            (Part::Text(text), _) => text,
            (Part::Namespace, _) => &key.namespace,
            (Part::IngressName, _) => &key.name,
            (Part::ServiceName, Target::Service { service, .. }) => &service.name,
            (Part::ServiceName, Target::Refused(_)) => return None,
        });
    }
    Authority::new(&text).ok()
}

/// What a ConfigMap of the operator's holds; what cannot be read is left out. An
/// empty value takes the field away, as in nginx.
fn of_operator(config_map: &ConfigMap, notices: &mut Vec<Notice>) -> Vec<FieldEdit> {
    let mut edits: Vec<FieldEdit> = Vec::new();
    let mut bytes = 0;
    for (name, value) in &config_map.data {
        let mut refuse = |message: String, remedy: &str| {
            let message = format!("{message}: the header is left out");
            notices.push(Notice::error(format!(".data[{name:?}]"), message, remedy));
        };
        let field = match FieldName::new(name) {
            Ok(field) => field,
            Err(problem) => {
                refuse(format!("{name:?} {problem}"), "remove it");
                continue;
            }
        };
        bytes += name.len() + value.len();
        if edits.len() == MOST_FIELDS || bytes > MOST_BYTES {
            let message = format!("more than {MOST_FIELDS} headers or {MOST_BYTES} bytes of them");
            refuse(message, "remove some");
            break;
        }
        if has_variable(value) {
            refuse("nginx's variables are not expanded here".to_owned(), "write the value itself");
            continue;
        }
        let same = |edit: &FieldEdit| edit.name().as_str().eq_ignore_ascii_case(name);
        if edits.iter().any(same) {
            refuse("it is there already in another case".to_owned(), "remove one of the two");
            continue;
        }
        if value.trim().is_empty() {
            edits.push(FieldEdit::Remove(field));
            continue;
        }
        match FieldValue::new(value) {
            Ok(value) => edits.push(FieldEdit::Set(field, value)),
            Err(problem) => refuse(format!("its value {problem}"), "write visible ASCII on one line"),
        }
    }
    edits
}

/// The ConfigMap that a plan names, and whether it is of the same namespace.
fn custom_of(plan: &Plan) -> Option<(Key, bool)> {
    let key = plan.settings.headers.custom.as_ref()?;
    Some((key.clone(), key.namespace == plan.age.key.namespace))
}

/// Whether nginx would expand something: `$name` or `${name}`.
fn has_variable(text: &str) -> bool {
    let is_name = |byte: &u8| byte.is_ascii_alphanumeric() || matches!(byte, b'_' | b'{');
    text.as_bytes().windows(2).any(|pair| pair[0] == b'$' && is_name(&pair[1]))
}

/// What an Ingress in `namespace` gets from the ConfigMap it names: all of it, or
/// a refusal, as in ingress-nginx, `$` being itself. ConfigMaps of other namespaces
/// may be named there too, so the operator's list of allowed fields is what keeps
/// their contents from clients; what such a one holds is not told either.
fn of_ingress(key: &Key, namespace: &str, store: &Store, options: &HeaderOptions) -> Custom {
    let refused = |message: String, remedy: &str| Custom::Refused { message, remedy: remedy.to_owned() };
    if key.namespace.is_empty() {
        return refused(format!("{:?} does not name a ConfigMap", key.name), "write namespace/name");
    }
    let Some(config_map) = store.config_maps.get(key) else {
        return refused(format!("ConfigMap {key} does not exist"), "create it or correct the name");
    };
    let (mut edits, mut bytes) = (Vec::new(), 0);
    for (name, value) in &config_map.data {
        let shown = if *key.namespace == *namespace { format!("{name:?}") } else { "a header".to_owned() };
        bytes += name.len() + value.len();
        if edits.len() == MOST_FIELDS || bytes > MOST_BYTES {
            let message =
                format!("ConfigMap {key} has more than {MOST_FIELDS} headers or {MOST_BYTES} bytes");
            return refused(message, "remove some");
        }
        if !options.allowed_response_headers.iter().any(|allowed| allowed.eq_ignore_ascii_case(name)) {
            let message = format!("ConfigMap {key} has {shown}, which Ingresses may not set here");
            return refused(message, "have it allowed by --global-allowed-response-headers");
        }
        let edit = FieldName::new(name)
            .and_then(|name| Ok(FieldEdit::Set(name, FieldValue::new(value)?)))
            .map_err(|problem| format!("ConfigMap {key} has {shown}, which cannot be set: it {problem}"));
        match edit {
            Ok(edit) => edits.push(edit),
            Err(message) => return refused(message, "write visible ASCII on one line, or remove it"),
        }
    }
    Custom::Edits(edits)
}

#[cfg(test)]
#[path = "headers/tests.rs"]
mod tests;
