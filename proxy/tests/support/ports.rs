//! Relayed ports on loopback: tables that name them, and where they really are.
#![allow(dead_code, unreachable_pub, reason = "every test file uses its own part of this")]

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use lockgate_proxy::config::{Config, Drain, L4Options};
use lockgate_proxy::handover::Inheritance;
use lockgate_proxy::l4::ListenerState;
use lockgate_proxy::metrics::ListenerSlot;
use lockgate_proxy::table::{
    Endpoint, L4Listener, ListenerKey, Origin, Pool, PoolKey, ProxyProtocol, RoutingTable, Transport,
    UpstreamProtocol,
};
use lockgate_proxy::{Proxy, Publisher};
use tokio::net::TcpListener;

/// What no test should ever wait for in vain.
pub const PATIENCE: Duration = Duration::from_secs(20);

/// Nobody listens there; a connection is refused at once.
pub async fn refusing() -> SocketAddr {
    TcpListener::bind("127.0.0.1:0").await.unwrap().local_addr().unwrap()
}

pub async fn soon<F: Future>(future: F) -> F::Output {
    tokio::time::timeout(PATIENCE, future).await.expect("took too long")
}

/// A configuration without HTTP, with one worker, and no grace.
pub fn config() -> Config {
    let drain = Drain { grace: Duration::ZERO, deadline: Duration::from_secs(10) };
    Config { workers: 1, drain, ..Config::default() }
}

/// As [`config`], with limits and deadlines of its own.
pub fn with(l4: L4Options) -> Config {
    Config { l4, ..config() }
}

/// A listener on a free port of loopback; `n` tells keys apart.
pub fn key(transport: Transport, n: u8) -> ListenerKey {
    ListenerKey { transport, address: ([127, 0, 0, n], 0).into() }
}

pub fn listener(pool: &str) -> L4Listener {
    L4Listener {
        pool: PoolKey(pool.into()),
        origin: Arc::new(Origin { kind: "ConfigMap", namespace: "a".into(), name: "b".into() }),
        proxy_protocol: ProxyProtocol::default(),
        idle_timeout: None,
        responses: None,
    }
}

pub fn pool(transport: Transport, endpoints: &[SocketAddr]) -> Pool {
    let protocol = match transport {
        Transport::Tcp => UpstreamProtocol::Tcp,
        Transport::Udp => UpstreamProtocol::Udp,
    };
    let endpoint = |&address| Endpoint { address, weight: 1, zone: None };
    let mut endpoints: Vec<_> = endpoints.iter().map(endpoint).collect();
    endpoints.sort();
    Pool { protocol, endpoints, ..Pool::default() }
}

/// One port on 127.0.0.1 that goes to `endpoints`.
pub fn table(transport: Transport, endpoints: &[SocketAddr]) -> RoutingTable {
    let mut table = RoutingTable::default();
    add(&mut table, key(transport, 1), endpoints);
    table
}

/// Another port, with a pool of its own.
pub fn add(table: &mut RoutingTable, key: ListenerKey, endpoints: &[SocketAddr]) {
    let name = key.to_string();
    table.pools.insert(PoolKey(name.as_str().into()), Arc::new(pool(key.transport, endpoints)));
    table.listeners.insert(key, Arc::new(listener(&name)));
}

pub struct Gate {
    pub proxy: Proxy,
    pub publisher: Publisher,
    pub table: RoutingTable,
}

impl Gate {
    pub fn start(config: Config, table: RoutingTable) -> Gate {
        let (proxy, mut publisher) = Proxy::start(config).unwrap();
        publisher.publish(table.clone());
        Gate { proxy, publisher, table }
    }

    /// As [`Gate::start`], after another process.
    pub fn inheriting(config: Config, table: RoutingTable, inherited: &Inheritance) -> Gate {
        let (proxy, mut publisher) = Proxy::bind(config, inherited).unwrap();
        publisher.publish(table.clone());
        proxy.open();
        Gate { proxy, publisher, table }
    }

    /// A gate with one port that goes to `endpoints`, and where that port is.
    pub async fn to(transport: Transport, endpoints: &[SocketAddr]) -> (Gate, SocketAddr) {
        Gate::with(config(), table(transport, endpoints)).await
    }

    pub async fn with(config: Config, table: RoutingTable) -> (Gate, SocketAddr) {
        let first = *table.listeners.keys().next().unwrap();
        let gate = Gate::start(config, table);
        let address = gate.open(first).await;
        (gate, address)
    }

    pub fn publish(&mut self) {
        self.publisher.publish(self.table.clone());
    }

    /// What the state of `key` is once it `is` as expected.
    pub async fn state(
        &self,
        key: ListenerKey,
        is: impl Fn(Option<&ListenerState>) -> bool,
    ) -> Option<ListenerState> {
        let mut states = self.proxy.live().listeners.subscribe();
        let states = soon(states.wait_for(|states| is(states.get(&key)))).await.unwrap();
        states.get(&key).cloned()
    }

    /// Where `key` listens, once it does.
    pub async fn open(&self, key: ListenerKey) -> SocketAddr {
        match self.state(key, |state| matches!(state, Some(ListenerState::Open(_)))).await {
            Some(ListenerState::Open(address)) => address,
            other => panic!("{key} is {other:?}"),
        }
    }

    /// The sum of a counter of the port that [`table`] makes.
    pub fn count(&self, transport: Transport, counter: impl Fn(&ListenerSlot) -> u64) -> u64 {
        self.proxy.metrics().listener(&key(transport, 1)).sum(counter)
    }

    /// Waits until a counter has a value.
    pub async fn counts(&self, transport: Transport, value: u64, counter: impl Fn(&ListenerSlot) -> u64) {
        soon(async {
            while self.count(transport, &counter) != value {
                tokio::time::sleep(Duration::from_millis(1)).await;
            }
        })
        .await;
    }
}
