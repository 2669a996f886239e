use super::*;

const VIP: &str = "10.96.0.1";

fn endpoints(count: u8) -> Arc<[Endpoint]> {
    (0..count)
        .map(|index| Endpoint { address: SocketAddr::from(([10, 1, 0, index], 80)), weight: 1 })
        .collect()
}

/// One service with a frontend of every role on a node with a Pod network.
fn table(service: Service) -> ServiceTable {
    let name = ServiceName { name: "n/s:80".into(), protocol: Protocol::Tcp, family: Family::Ipv4 };
    let frontend = |address: &str, role| {
        let address = SocketAddr::new(address.parse().unwrap(), 80);
        (Frontend::new(address, Protocol::Tcp), Target { service: name.clone(), role })
    };
    let node_port = Frontend::node_port(Family::Ipv4, 30080, Protocol::Tcp);
    ServiceTable {
        frontends: [
            frontend(VIP, Role::ClusterIp),
            frontend("203.0.113.1", Role::ExternalIp),
            frontend("203.0.113.2", Role::LoadBalancer),
            (node_port, Target { service: name.clone(), role: Role::NodePort }),
        ]
        .into_iter()
        .collect(),
        services: [(name, Arc::new(service))].into_iter().collect(),
        cluster_ips: [VIP.parse::<IpAddr>().unwrap()].into_iter().collect(),
        node: Arc::new(Node {
            addresses: [("192.168.50.1".parse().unwrap(), true), ("192.168.51.1".parse().unwrap(), false)]
                .into(),
            pod_networks: vec!["10.1.0.0/16".parse().unwrap()],
            service_networks: vec!["10.96.0.0/16".parse().unwrap()],
            masquerade_all: false,
        }),
        ..ServiceTable::default()
    }
}

/// In short: `C` and `L` for the sets, `m` if masqueraded, `reject`, `drop`, `pass`.
fn short(table: &ServiceTable, client: &str, destination: &str) -> &'static str {
    let client = table.node.client(client.parse().unwrap());
    match table.verdict(client, destination.parse().unwrap(), Protocol::Tcp) {
        Verdict::Pass => "pass",
        Verdict::Reject(_) => "reject",
        Verdict::Drop(_) => "drop",
        Verdict::Forward { set: Set::Cluster, masquerade: false, .. } => "C",
        Verdict::Forward { set: Set::Cluster, masquerade: true, .. } => "Cm",
        Verdict::Forward { set: Set::Local, masquerade: false, .. } => "L",
        Verdict::Forward { set: Set::Local, masquerade: true, .. } => "Lm",
    }
}

/// For each client: cluster IP, external IP, load balancer, node port.
fn matrix(service: Service) -> [[&'static str; 4]; 3] {
    let table = table(service);
    ["192.168.50.1", "10.1.0.9", "198.51.100.1"].map(|client| {
        ["10.96.0.1:80", "203.0.113.1:80", "203.0.113.2:80", "192.168.50.1:30080"]
            .map(|destination| short(&table, client, destination))
    })
}

#[test]
fn the_matrix() {
    let some =
        || Service { cluster: endpoints(2), local: endpoints(1), has_endpoints: true, ..Service::default() };
    // Node, Pod, outside; cluster IP, external IP, load balancer, node port.
    assert_eq!(
        matrix(some()),
        [["C", "Cm", "Cm", "Cm"], ["C", "Cm", "Cm", "Cm"], ["Cm", "Cm", "Cm", "Cm"]],
        "policies Cluster"
    );
    assert_eq!(
        matrix(Service { external_local: true, ..some() }),
        [["C", "Cm", "Cm", "Cm"], ["C", "C", "C", "C"], ["Cm", "L", "L", "L"]],
        "external policy Local"
    );
    assert_eq!(
        matrix(Service { internal_local: true, ..some() }),
        [["L", "Cm", "Cm", "Cm"], ["L", "Cm", "Cm", "Cm"], ["Lm", "Cm", "Cm", "Cm"]],
        "internal policy Local"
    );
    assert_eq!(
        matrix(Service { external_local: true, local: endpoints(0), ..some() }),
        [["C", "Cm", "Cm", "Cm"], ["C", "C", "C", "C"], ["Cm", "drop", "drop", "drop"]],
        "external policy Local and none here: only those outside are dropped"
    );
    assert_eq!(
        matrix(Service { internal_local: true, local: endpoints(0), ..some() }),
        [["drop", "Cm", "Cm", "Cm"], ["drop", "Cm", "Cm", "Cm"], ["drop", "Cm", "Cm", "Cm"]],
        "internal policy Local and none here"
    );
    for policies in [(false, false), (true, false), (false, true), (true, true)] {
        let (internal_local, external_local) = policies;
        let none = Service { internal_local, external_local, ..Service::default() };
        assert_eq!(matrix(none), [["reject"; 4]; 3], "no endpoint anywhere, {policies:?}");
    }
}

#[test]
fn source_ranges_guard_load_balancers_only() {
    let ranges: Arc<[ipnet::IpNet]> = ["198.51.100.0/24".parse().unwrap()].into();
    let service = |source_ranges| Service {
        cluster: endpoints(1),
        has_endpoints: true,
        source_ranges: Some(source_ranges),
        ..Service::default()
    };
    let in_range = ["Cm", "Cm", "Cm", "Cm"];
    assert_eq!(matrix(service(ranges)), [["C", "Cm", "drop", "Cm"], ["C", "Cm", "drop", "Cm"], in_range]);
    let nobody = matrix(service([].into()));
    assert!(nobody.iter().all(|row| row[2] == "drop"), "ranges that are no networks: {nobody:?}");
}

#[test]
fn what_is_no_frontend() {
    let table = table(Service::default());
    for (destination, expected) in [
        ("10.96.0.1:81", "reject"),
        ("10.96.0.2:80", "drop"),
        ("10.97.0.1:80", "pass"),
        ("203.0.113.1:81", "pass"),
        ("192.168.50.1:30081", "pass"),
        ("192.168.50.1:30080", "reject"),
        // Not among --nodeport-addresses.
        ("192.168.51.1:30080", "pass"),
        ("198.51.100.1:30080", "pass"),
    ] {
        assert_eq!(short(&table, "10.1.0.9", destination), expected, "{destination}");
    }
}

#[test]
fn masquerade_all_is_for_cluster_ips() {
    let mut table = table(Service { cluster: endpoints(1), has_endpoints: true, ..Service::default() });
    Arc::make_mut(&mut table.node).masquerade_all = true;
    assert_eq!(short(&table, "10.1.0.9", "10.96.0.1:80"), "Cm");
    // Without a way to tell who is outside, nobody is, as in kube-proxy.
    *Arc::make_mut(&mut table.node) =
        Node { pod_networks: vec![], masquerade_all: false, ..(*table.node).clone() };
    assert_eq!(short(&table, "198.51.100.1", "10.96.0.1:80"), "C");
}
