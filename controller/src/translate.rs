//! Objects in, tables and statuses out: pure, total, deterministic.

use std::sync::Arc;

use imbl::OrdMap;
use lockgate_ebpf::ServiceTable;
use lockgate_proxy::RoutingTable;

use crate::objects::{Notice, ObjectRef};
use crate::store::{Key, Store};

/// What the operator chose, fixed for the life of the process.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Options {
    /// Serve only the Ingresses of this class. `None` serves every Ingress, as
    /// a folder of manifests wants.
    pub ingress_class: Option<String>,
    /// An Ingress that names no class is not served, even if the class is the
    /// default one. Only with [`Options::ingress_class`].
    pub require_class: bool,
    /// A Secret of type `kubernetes.io/tls` for clients whose SNI matches nothing.
    pub default_certificate: Option<Key>,
}

/// What should be live.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Desired {
    /// For the proxy.
    pub routes: RoutingTable,
    /// For the service plane.
    pub services: ServiceTable,
    /// What to tell the authors of objects. Every Ingress has an entry, an
    /// empty one if it is served as written; other objects only if there is
    /// something to say.
    pub statuses: OrdMap<ObjectRef, Arc<Vec<Notice>>>,
}

/// Translates one store after another, at the cost of what changed between them.
#[derive(Default)]
pub struct Translator {
    options: Options,
}

impl Translator {
    /// A translator that has seen nothing yet.
    pub fn new(options: Options) -> Translator {
        Translator { options }
    }

    /// The desired state for `store`. Never fails: what is wrong with an object
    /// becomes its status.
    pub fn translate(&mut self, store: &Store) -> Desired {
        let _ = (&self.options, store);
        Desired::default()
    }
}

/// [`Translator::translate`] from scratch.
pub fn translate(store: &Store, options: &Options) -> Desired {
    Translator::new(options.clone()).translate(store)
}
