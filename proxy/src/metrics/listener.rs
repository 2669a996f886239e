//! Statistics per L4 listener: one slot per worker, shown by what the listener listens on.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering};

use prometheus::proto::{self, LabelPair, MetricFamily, MetricType};

use super::{Counter, Gauge, counter, family, gauge, label};
use crate::table::ListenerKey;

/// What is counted of one L4 listener.
#[derive(Debug)]
pub struct ListenerStats {
    slots: Box<[ListenerSlot]>,
    /// 1: open, 2: cannot be opened, 0: neither has been said yet.
    state: AtomicU8,
}

/// One worker's part, which only it writes to.
#[derive(Debug, Default)]
#[repr(align(64))]
pub struct ListenerSlot {
    /// Connections, or flows of UDP, so far.
    pub opened: Counter,
    /// Those open now.
    pub open: Gauge,
    /// Connections and flows that found no endpoint, or none that could be reached.
    pub failed: Counter,
    /// Connections and flows that ended because nobody spoke for too long.
    pub idle: Counter,
    /// Bytes from clients.
    pub bytes_in: Counter,
    /// Bytes to clients.
    pub bytes_out: Counter,
    /// Datagrams from clients.
    pub datagrams_in: Counter,
    /// Datagrams to clients.
    pub datagrams_out: Counter,
    /// Datagrams that could not be passed on, in either direction.
    pub dropped: Counter,
    /// Flows that waited for an answer and ended because there was no room for a new one.
    pub evicted: Counter,
}

impl ListenerStats {
    fn new(workers: usize) -> ListenerStats {
        let slots = (0..workers).map(|_| ListenerSlot::default()).collect();
        ListenerStats { slots, state: AtomicU8::new(0) }
    }

    /// The counters of worker `index`, which is their only writer.
    pub fn worker(&self, index: usize) -> &ListenerSlot {
        debug_assert!(index < self.slots.len(), "worker {index} of {}", self.slots.len());
        &self.slots[index % self.slots.len()]
    }

    /// Whether the port is open; `Some(false)` if it was tried in vain, `None` if it is no longer wanted.
    pub fn set_open(&self, open: Option<bool>) {
        let state = match open {
            None => 0,
            Some(true) => 1,
            Some(false) => 2,
        };
        self.state.store(state, Ordering::Relaxed);
    }

    /// The sum of a counter over all workers.
    pub fn sum(&self, counter: impl Fn(&ListenerSlot) -> u64) -> u64 {
        self.slots.iter().map(counter).fold(0, u64::wrapping_add)
    }
}

impl Default for ListenerStats {
    /// For one worker, and shown by no scrape.
    fn default() -> ListenerStats {
        ListenerStats::new(1)
    }
}

/// Every listener that a table names, and the one for those that find no room.
pub(super) struct ListenerSet {
    workers: usize,
    max: usize,
    entries: BTreeMap<ListenerKey, Arc<ListenerStats>>,
    other: Arc<ListenerStats>,
}

impl ListenerSet {
    pub(super) fn new(workers: usize, max: usize) -> ListenerSet {
        let other = Arc::new(ListenerStats::new(workers));
        ListenerSet { workers, max, entries: BTreeMap::new(), other }
    }

    pub(super) fn intern(&mut self, key: &ListenerKey) -> Arc<ListenerStats> {
        if let Some(stats) = self.entries.get(key) {
            return stats.clone();
        }
        if self.entries.len() >= self.max {
            // What is left of listeners that went away.
            self.entries.retain(|_, stats| Arc::strong_count(stats) > 1);
        }
        if self.entries.len() >= self.max {
            return self.other.clone();
        }
        let stats = Arc::new(ListenerStats::new(self.workers));
        self.entries.insert(*key, stats.clone());
        stats
    }

    pub(super) fn collect(&self) -> Vec<MetricFamily> {
        let mut rows: Vec<(Vec<LabelPair>, &ListenerStats)> = Vec::new();
        for (key, stats) in &self.entries {
            let address = key.address.to_string();
            rows.push((labels(key.transport.as_str(), &address), stats));
        }
        if self.other.sum(|slot| slot.opened.value() + slot.failed.value()) > 0 {
            rows.push((labels("other", "other"), &self.other));
        }
        let families = FAMILIES.iter().map(|described| {
            let metrics = rows.iter().flat_map(|(labels, stats)| described.read(labels, stats));
            let kind = match described.value {
                Value::Count(_) | Value::Counts(..) => MetricType::COUNTER,
                Value::Level(_) | Value::State => MetricType::GAUGE,
            };
            family(described.name, described.help, kind, metrics.collect())
        });
        families.filter(|family| !family.get_metric().is_empty()).collect()
    }
}

fn labels(transport: &str, address: &str) -> Vec<LabelPair> {
    LABELS.iter().zip([transport, address]).map(|(name, value)| label(name, value)).collect()
}

const LABELS: [&str; 2] = ["transport", "address"];

struct Family {
    name: &'static str,
    help: &'static str,
    value: Value,
}

enum Value {
    Count(fn(&ListenerSlot) -> u64),
    /// By direction: from clients, to clients.
    Counts(fn(&ListenerSlot) -> u64, fn(&ListenerSlot) -> u64),
    Level(fn(&ListenerSlot) -> i64),
    State,
}

impl Family {
    const fn new(name: &'static str, help: &'static str, value: Value) -> Family {
        Family { name, help, value }
    }

    fn read(&self, labels: &[LabelPair], stats: &ListenerStats) -> Vec<proto::Metric> {
        let direction = |value| labels.iter().cloned().chain([label("direction", value)]).collect();
        match self.value {
            Value::Count(read) => vec![counter(labels.to_vec(), stats.sum(read) as f64)],
            Value::Counts(from, to) => vec![
                counter(direction("in"), stats.sum(from) as f64),
                counter(direction("out"), stats.sum(to) as f64),
            ],
            Value::Level(read) => {
                vec![gauge(labels.to_vec(), stats.slots.iter().map(read).sum::<i64>() as f64)]
            }
            Value::State => match stats.state.load(Ordering::Relaxed) {
                0 => Vec::new(),
                state => vec![gauge(labels.to_vec(), f64::from(u8::from(state == 1)))],
            },
        }
    }
}

const FAMILIES: [Family; 9] = [
    Family::new(
        "lockgate_l4_listener_open",
        "1: the port is open; 0: it cannot be opened, and is tried again.",
        Value::State,
    ),
    Family::new(
        "lockgate_l4_connections_total",
        "Connections, or flows of UDP, of an L4 listener.",
        Value::Count(|slot| slot.opened.value()),
    ),
    Family::new(
        "lockgate_l4_connections_open",
        "Connections and flows open.",
        Value::Level(|slot| slot.open.value()),
    ),
    Family::new(
        "lockgate_l4_connections_failed_total",
        "Connections and flows for which no endpoint could be reached.",
        Value::Count(|slot| slot.failed.value()),
    ),
    Family::new(
        "lockgate_l4_connections_idle_total",
        "Connections and flows ended because nobody spoke for too long.",
        Value::Count(|slot| slot.idle.value()),
    ),
    Family::new(
        "lockgate_l4_bytes_total",
        "Bytes relayed from clients (in) and to clients (out).",
        Value::Counts(|slot| slot.bytes_in.value(), |slot| slot.bytes_out.value()),
    ),
    Family::new(
        "lockgate_l4_datagrams_total",
        "Datagrams relayed from clients (in) and to clients (out).",
        Value::Counts(|slot| slot.datagrams_in.value(), |slot| slot.datagrams_out.value()),
    ),
    Family::new(
        "lockgate_l4_datagrams_dropped_total",
        "Datagrams that could not be passed on.",
        Value::Count(|slot| slot.dropped.value()),
    ),
    Family::new(
        "lockgate_l4_flows_evicted_total",
        "Flows that waited for an answer and had to make room for a new one.",
        Value::Count(|slot| slot.evicted.value()),
    ),
];

pub(super) fn described() -> impl Iterator<Item = (&'static str, &'static str, &'static [&'static str])> {
    const WITH_DIRECTION: &[&str] = &[LABELS[0], LABELS[1], "direction"];
    FAMILIES.iter().map(|family| match family.value {
        Value::Counts(..) => (family.name, family.help, WITH_DIRECTION),
        _ => (family.name, family.help, &LABELS[..]),
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::table::Transport;

    fn key(port: u16) -> ListenerKey {
        ListenerKey { transport: Transport::Tcp, address: ([127, 0, 0, 1], port).into() }
    }

    #[test]
    fn listeners_beyond_the_bound_share_one_row_until_there_is_room() {
        let mut set = ListenerSet::new(2, 2);
        let first = set.intern(&key(1));
        let second = set.intern(&key(2));
        assert!(Arc::ptr_eq(&first, &set.intern(&key(1))));
        let beyond = set.intern(&key(3));
        assert!(Arc::ptr_eq(&beyond, &set.other));
        beyond.worker(1).opened.inc();
        first.worker(0).bytes_out.add(7);
        first.set_open(Some(true));
        second.set_open(Some(false));
        let open = &set.collect()[0];
        let values: Vec<f64> =
            open.get_metric().iter().map(|metric| metric.get_gauge().get_value()).collect();
        assert_eq!((open.name(), values), ("lockgate_l4_listener_open", vec![1.0, 0.0]));
        drop(second);
        assert!(!Arc::ptr_eq(&set.intern(&key(3)), &set.other), "the one that went away made room");
        assert_eq!(first.sum(|slot| slot.bytes_out.value()), 7);
    }
}
