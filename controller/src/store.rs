//! What the cluster, or the folder, said last.

use std::sync::Arc;

use imbl::OrdMap;

use crate::objects::{
    ConfigMap, EndpointSlice, Ingress, IngressClass, Kind, Meta, Node, Object, ObjectRef, Pod, Secret,
    Service,
};

/// Namespace and name; the namespace is empty for cluster-scoped kinds.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Key {
    /// The namespace.
    pub namespace: Arc<str>,
    /// The name.
    pub name: Arc<str>,
}

impl Key {
    /// The key of `name` in `namespace`.
    pub fn new(namespace: impl Into<Arc<str>>, name: impl Into<Arc<str>>) -> Key {
        Key { namespace: namespace.into(), name: name.into() }
    }

    /// Names the object of `kind` that has this key.
    pub fn reference(&self, kind: Kind) -> ObjectRef {
        ObjectRef { kind, namespace: self.namespace.clone(), name: self.name.clone() }
    }
}

impl std::fmt::Display for Key {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        if self.namespace.is_empty() {
            f.write_str(&self.name)
        } else {
            write!(f, "{}/{}", self.namespace, self.name)
        }
    }
}

impl From<&Meta> for Key {
    fn from(meta: &Meta) -> Key {
        Key { namespace: meta.namespace.clone(), name: meta.name.clone() }
    }
}

impl From<&ObjectRef> for Key {
    fn from(reference: &ObjectRef) -> Key {
        Key { namespace: reference.namespace.clone(), name: reference.name.clone() }
    }
}

/// Every object, by kind. Persistent: a clone is O(1), and the difference
/// between a store and its successor costs what changed.
#[derive(Clone, Debug, Default, PartialEq)]
#[allow(missing_docs)] // the fields are their kinds
pub struct Store {
    pub ingresses: OrdMap<Key, Arc<Ingress>>,
    pub classes: OrdMap<Key, Arc<IngressClass>>,
    pub services: OrdMap<Key, Arc<Service>>,
    pub slices: OrdMap<Key, Arc<EndpointSlice>>,
    pub pods: OrdMap<Key, Arc<Pod>>,
    pub secrets: OrdMap<Key, Arc<Secret>>,
    pub nodes: OrdMap<Key, Arc<Node>>,
    pub config_maps: OrdMap<Key, Arc<ConfigMap>>,
}

impl Store {
    /// Adds `object`, or replaces the one of the same name. An equal object
    /// leaves the store as it is, so that nothing looks changed.
    pub fn apply(&mut self, object: Object) {
        let key = Key::from(&object.reference());
        match object {
            Object::Ingress(object) => insert(&mut self.ingresses, key, object),
            Object::IngressClass(object) => insert(&mut self.classes, key, object),
            Object::Service(object) => insert(&mut self.services, key, object),
            Object::EndpointSlice(object) => insert(&mut self.slices, key, object),
            Object::Pod(object) => insert(&mut self.pods, key, object),
            Object::Secret(object) => insert(&mut self.secrets, key, object),
            Object::Node(object) => insert(&mut self.nodes, key, object),
            Object::ConfigMap(object) => insert(&mut self.config_maps, key, object),
        }
    }

    /// Removes the object; nothing happens if there is none.
    pub fn remove(&mut self, reference: &ObjectRef) {
        let key = Key::from(reference);
        match reference.kind {
            Kind::Ingress => drop(self.ingresses.remove(&key)),
            Kind::IngressClass => drop(self.classes.remove(&key)),
            Kind::Service => drop(self.services.remove(&key)),
            Kind::EndpointSlice => drop(self.slices.remove(&key)),
            Kind::Pod => drop(self.pods.remove(&key)),
            Kind::Secret => drop(self.secrets.remove(&key)),
            Kind::Node => drop(self.nodes.remove(&key)),
            Kind::ConfigMap => drop(self.config_maps.remove(&key)),
            Kind::Unsupported(_) => {}
        }
    }

    /// Whether there is such an object.
    pub fn contains(&self, reference: &ObjectRef) -> bool {
        let key = Key::from(reference);
        match reference.kind {
            Kind::Ingress => self.ingresses.contains_key(&key),
            Kind::IngressClass => self.classes.contains_key(&key),
            Kind::Service => self.services.contains_key(&key),
            Kind::EndpointSlice => self.slices.contains_key(&key),
            Kind::Pod => self.pods.contains_key(&key),
            Kind::Secret => self.secrets.contains_key(&key),
            Kind::Node => self.nodes.contains_key(&key),
            Kind::ConfigMap => self.config_maps.contains_key(&key),
            Kind::Unsupported(_) => false,
        }
    }

    /// A copy of the object.
    pub fn get(&self, reference: &ObjectRef) -> Option<Object> {
        let key = Key::from(reference);
        match reference.kind {
            Kind::Ingress => self.ingresses.get(&key).map(|o| Object::Ingress((**o).clone())),
            Kind::IngressClass => self.classes.get(&key).map(|o| Object::IngressClass((**o).clone())),
            Kind::Service => self.services.get(&key).map(|o| Object::Service((**o).clone())),
            Kind::EndpointSlice => self.slices.get(&key).map(|o| Object::EndpointSlice((**o).clone())),
            Kind::Pod => self.pods.get(&key).map(|o| Object::Pod((**o).clone())),
            Kind::Secret => self.secrets.get(&key).map(|o| Object::Secret((**o).clone())),
            Kind::Node => self.nodes.get(&key).map(|o| Object::Node((**o).clone())),
            Kind::ConfigMap => self.config_maps.get(&key).map(|o| Object::ConfigMap((**o).clone())),
            Kind::Unsupported(_) => None,
        }
    }

    /// How many objects there are.
    pub fn len(&self) -> usize {
        self.ingresses.len()
            + self.classes.len()
            + self.services.len()
            + self.slices.len()
            + self.pods.len()
            + self.secrets.len()
            + self.nodes.len()
            + self.config_maps.len()
    }

    /// Whether there is no object at all.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

fn insert<T: PartialEq>(map: &mut OrdMap<Key, Arc<T>>, key: Key, object: T) {
    if map.get(&key).is_none_or(|old| **old != object) {
        map.insert(key, Arc::new(object));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_equal_object_is_no_change() {
        let node = |zone: &str| {
            let meta = Meta { name: "n".into(), ..Meta::default() };
            Object::Node(Node { meta, zone: Some(zone.into()), ..Node::default() })
        };
        let mut store = Store::default();
        store.apply(node("west"));
        let before = store.clone();
        store.apply(node("west"));
        assert!(store.nodes.ptr_eq(&before.nodes));
        store.apply(node("east"));
        assert_ne!(store, before);
        let reference = node("east").reference();
        assert_eq!(store.get(&reference), Some(node("east")));
        store.remove(&reference);
        assert!(!store.contains(&reference) && store.is_empty());
        assert!(before.contains(&reference), "a clone keeps what it had");
    }
}
