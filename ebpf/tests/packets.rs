//! What the hooks of packets do to each packet: bytes in, bytes out, through `BPF_PROG_TEST_RUN`.
#![allow(clippy::unwrap_used, reason = "a test says what it expects by panicking")]

#[allow(dead_code, reason = "every test file uses its own part of this")]
#[path = "support/inside.rs"]
mod inside;
#[path = "support/wire.rs"]
mod wire;

use std::collections::BTreeSet;
use std::net::SocketAddr;

use lockgate_ebpf_common::protocol::{SCTP, TCP, UDP};
use lockgate_ebpf_common::{
    Allowed, Endpoint, Event, Service, SetWord, Settings, endpoint, kind, node_address, scope, service,
};

use inside::{Ran, Verdict, World, address, run};
use wire::{ACK, FIN, SYN, at, first, fragments, later, report, tcp, udp, with_options};

const MASQUERADE: u32 = 0x4000;
const REJECT: u32 = 0x8000;
const PROTOCOLS: [u8; 2] = [TCP, UDP];

/// One family's cast.
struct Cast {
    client: SocketAddr,
    node: SocketAddr,
    any: SocketAddr,
    vip: SocketAddr,
    second_vip: SocketAddr,
    endpoint: SocketAddr,
    other: SocketAddr,
    router: SocketAddr,
}

fn families() -> [Cast; 2] {
    [
        Cast {
            client: at("203.0.113.9:51234"),
            node: at("192.168.50.1:30080"),
            any: at("0.0.0.0:30080"),
            vip: at("198.51.100.7:80"),
            second_vip: at("198.51.100.8:8080"),
            endpoint: at("10.1.2.3:8443"),
            other: at("10.1.2.4:8443"),
            router: at("100.64.0.1:0"),
        },
        Cast {
            client: at("[2001:db8::9]:51234"),
            node: at("[fd00:50::1]:30080"),
            any: at("[::]:30080"),
            vip: at("[2001:db8:1::7]:80"),
            second_vip: at("[2001:db8:1::8]:8080"),
            endpoint: at("[fd00:1:2::3]:8443"),
            other: at("[fd00:1:2::4]:8443"),
            router: at("[2001:db8:2::1]:0"),
        },
    ]
}

/// Node ports on the nodes' addresses, and marks.
fn prepare(world: &mut World) {
    let settings = Settings {
        node_port_first: 30000,
        node_port_last: 32767,
        masquerade_mark: MASQUERADE,
        reject_mark: REJECT,
        ..Settings::default()
    };
    world.maps.put_settings(&settings).unwrap();
    for cast in families() {
        world.maps.put_node_address(&address(cast.node.ip()), node_address::NODE_PORTS).unwrap();
    }
}

/// A Service with one endpoint in its cluster set.
fn service_of(world: &mut World, flags: u32, places: &[SocketAddr]) -> u32 {
    let index = world.service(Service { flags, ..Service::default() });
    world.set(index, places);
    index
}

fn load_balancer(world: &mut World, index: u32, vip: SocketAddr, protocol: u8) {
    world.frontend_as(index, vip, protocol, scope::ADDRESS, kind::LOAD_BALANCER);
}

fn passes(ran: &Ran, expected: &[u8], mark: u32) {
    assert_eq!(ran.verdict, Verdict::Pass);
    assert_eq!(ran.mark, mark);
    assert!(ran.packet == expected, "\n{:02x?} is not\n{expected:02x?}", ran.packet);
}

#[test]
fn a_node_port_is_translated_there_and_back() {
    run("a_node_port_is_translated_there_and_back", |world| {
        prepare(world);
        for cast in families() {
            for protocol in PROTOCOLS {
                let index = service_of(world, 0, &[cast.endpoint]);
                world.frontend_as(index, cast.any, protocol, scope::NODE_PORT, kind::NODE_PORT);
                let Cast { client, node, endpoint, .. } = cast;
                let ran = world.through("from_outside", &first(protocol, client, node));
                passes(&ran, &first(protocol, client, endpoint), MASQUERADE);
                let ran = world.through("from_outside", &later(protocol, client, node));
                passes(&ran, &later(protocol, client, endpoint), MASQUERADE);
                let ran = world.through("replies", &later(protocol, endpoint, client));
                passes(&ran, &later(protocol, node, client), 0);
                // With options, the transport header is further on.
                let ran = world.through("from_outside", &with_options(&later(protocol, client, node)));
                passes(&ran, &with_options(&later(protocol, client, endpoint)), MASQUERADE);
                let ran = world.through("replies", &with_options(&later(protocol, endpoint, client)));
                passes(&ran, &with_options(&later(protocol, node, client)), 0);
            }
        }
        assert_eq!(world.count(Event::Balanced), 4);
    });
}

#[test]
fn what_is_no_services_is_left_alone() {
    run("what_is_no_services_is_left_alone", |world| {
        prepare(world);
        for cast in families() {
            let index = service_of(world, 0, &[cast.endpoint]);
            world.frontend_as(index, cast.any, TCP, scope::NODE_PORT, kind::NODE_PORT);
            let Cast { client, node, endpoint, vip, .. } = cast;
            for packet in [
                tcp(client, SocketAddr::new(node.ip(), 22), SYN),
                tcp(client, SocketAddr::new(node.ip(), 30081), SYN),
                udp(client, node, b"another protocol"),
                tcp(client, vip, SYN),
                // In the middle of a connection the node itself has from this port.
                tcp(client, node, ACK),
                tcp(endpoint, client, ACK),
            ] {
                for hook in ["from_outside", "from_pod", "replies"] {
                    passes(&world.through(hook, &packet), &packet, 0);
                }
            }
        }
        let mut arp = vec![0xff; 42];
        arp[12..14].copy_from_slice(&[0x08, 0x06]);
        passes(&world.through("from_outside", &arp), &arp, 0);
        assert_eq!(world.count(Event::Balanced), 0);
        assert_eq!(world.count(Event::UnknownFlow), 4);
    });
}

#[test]
fn a_packet_that_ends_early_is_left_alone() {
    run("a_packet_that_ends_early_is_left_alone", |world| {
        prepare(world);
        for cast in families() {
            for protocol in PROTOCOLS {
                let index = service_of(world, 0, &[cast.endpoint]);
                world.frontend_as(index, cast.any, protocol, scope::NODE_PORT, kind::NODE_PORT);
                let whole = with_options(&first(protocol, cast.client, cast.node));
                let ports = whole.len() - first(protocol, cast.client, cast.node).len()
                    + if cast.node.is_ipv4() { 34 } else { 54 };
                for length in 14..ports + 4 {
                    // The kernel's test refuses some that no device would deliver.
                    if let Some(ran) = world.attempt("from_outside", &whole[..length]) {
                        passes(&ran, &whole[..length], 0);
                    }
                }
            }
        }
        assert!(world.count(Event::Truncated) > 50);
        assert_eq!(world.count(Event::Balanced), 0);
    });
}

#[test]
fn traffic_policies_and_masquerading_are_kube_proxys() {
    run("traffic_policies_and_masquerading_are_kube_proxys", |world| {
        prepare(world);
        // Flags; who sends; kind of address; served from the local set (else the cluster's); masqueraded.
        let local = service::EXTERNAL_LOCAL;
        let inside = service::INTERNAL_LOCAL;
        for (flags, hook, kind, from_local, masqueraded) in [
            (0, "from_outside", kind::LOAD_BALANCER, false, true),
            (0, "from_outside", kind::EXTERNAL_IP, false, true),
            (0, "from_outside", kind::CLUSTER_IP, false, true),
            (0, "from_pod", kind::CLUSTER_IP, false, false),
            (0, "from_pod", kind::LOAD_BALANCER, false, true),
            (local, "from_outside", kind::LOAD_BALANCER, true, false),
            (local, "from_outside", kind::CLUSTER_IP, false, true),
            (local, "from_pod", kind::LOAD_BALANCER, false, false),
            (inside, "from_outside", kind::CLUSTER_IP, true, true),
            (inside, "from_pod", kind::CLUSTER_IP, true, false),
            (inside, "from_outside", kind::LOAD_BALANCER, false, true),
        ] {
            for cast in families() {
                let index = service_of(world, flags, &[cast.endpoint]);
                world.local_set(index, &[cast.other]);
                world.frontend_as(index, cast.vip, UDP, scope::ADDRESS, kind);
                let chosen = if from_local { cast.other } else { cast.endpoint };
                // Another client each time, for a flow stays.
                let client = SocketAddr::new(cast.client.ip(), 1024 + index as u16);
                let ran = world.through(hook, &first(UDP, client, cast.vip));
                passes(&ran, &first(UDP, client, chosen), if masqueraded { MASQUERADE } else { 0 });

                world.local_empty(index, SetWord::EMPTY_DROP);
                let client = SocketAddr::new(cast.client.ip(), 20000 + index as u16);
                let packet = first(UDP, client, cast.vip);
                let ran = world.through(hook, &packet);
                let expected = if from_local { Verdict::Drop } else { Verdict::Pass };
                assert_eq!(ran.verdict, expected, "{flags} {hook} {kind}");
            }
        }
    });
}

#[test]
fn a_pod_that_reaches_itself_is_masqueraded() {
    run("a_pod_that_reaches_itself_is_masqueraded", |world| {
        prepare(world);
        for cast in families() {
            let index = service_of(world, service::EXTERNAL_LOCAL, &[cast.endpoint]);
            world.frontend_as(index, cast.vip, TCP, scope::ADDRESS, kind::CLUSTER_IP);
            let pod = SocketAddr::new(cast.endpoint.ip(), 40000);
            passes(
                &world.through("from_pod", &tcp(pod, cast.vip, SYN)),
                &tcp(pod, cast.endpoint, SYN),
                MASQUERADE,
            );
            // Its answer to the node, after the kernel has put the client's address back.
            passes(&world.through("replies", &tcp(cast.endpoint, pod, ACK)), &tcp(cast.vip, pod, ACK), 0);
        }
    });
}

#[test]
fn an_endpoint_in_the_nodes_network_sees_the_client() {
    run("an_endpoint_in_the_nodes_network_sees_the_client", |world| {
        prepare(world);
        for cast in families() {
            let index = service_of(world, 0, &[cast.endpoint]);
            world.frontend_as(index, cast.any, TCP, scope::NODE_PORT, kind::NODE_PORT);
            world.each_endpoint(index, |endpoint| Endpoint { flags: endpoint::HOST_NETWORK, ..endpoint });
            let ran = world.through("from_outside", &tcp(cast.client, cast.node, SYN));
            passes(&ran, &tcp(cast.client, cast.endpoint, SYN), 0);
        }
    });
}

#[test]
fn source_ranges_hold_for_load_balancers_alone() {
    run("source_ranges_hold_for_load_balancers_alone", |world| {
        prepare(world);
        for (cast, (range, bits)) in
            families().into_iter().zip([(at("203.0.113.0:0"), 96 + 24), (at("[2001:db8::]:0"), 48)])
        {
            let index = service_of(world, service::SOURCE_RANGES, &[cast.endpoint]);
            load_balancer(world, index, cast.vip, TCP);
            world.frontend_as(index, cast.any, TCP, scope::NODE_PORT, kind::NODE_PORT);
            let packet = tcp(cast.client, cast.vip, SYN);
            assert_eq!(world.through("from_outside", &packet).verdict, Verdict::Drop, "no range yet");
            world.source_range(index, range.ip(), bits, Allowed { generation: 2 });
            assert_eq!(world.through("from_outside", &packet).verdict, Verdict::Drop, "another Service's");
            world.source_range(index, range.ip(), bits, Allowed { generation: 1 });
            passes(
                &world.through("from_outside", &packet),
                &tcp(cast.client, cast.endpoint, SYN),
                MASQUERADE,
            );
            let outside = SocketAddr::new(cast.router.ip(), 1234);
            let ran = world.through("from_outside", &tcp(outside, cast.vip, SYN));
            assert_eq!(ran.verdict, Verdict::Drop);
            let ran = world.through("from_outside", &tcp(outside, cast.node, SYN));
            passes(&ran, &tcp(outside, cast.endpoint, SYN), MASQUERADE);
        }
        assert_eq!(world.count(Event::SourceRange), 6);
    });
}

#[test]
fn clients_are_refused_by_a_mark() {
    run("clients_are_refused_by_a_mark", |world| {
        prepare(world);
        for cast in families() {
            let index = world.service(Service::default());
            load_balancer(world, index, cast.vip, TCP);
            let packet = tcp(cast.client, cast.vip, SYN);
            passes(&world.through("from_outside", &packet), &packet, REJECT);
            world.frontend_as(
                0,
                SocketAddr::new(cast.vip.ip(), 0),
                0,
                scope::CLUSTER_ADDRESS,
                kind::CLUSTER_IP,
            );
            let packet = tcp(cast.client, SocketAddr::new(cast.vip.ip(), 81), SYN);
            passes(&world.through("from_outside", &packet), &packet, REJECT);
        }
        assert_eq!(world.count(Event::NoEndpoint), 2);
        assert_eq!(world.count(Event::UnknownPort), 2);
    });
}

#[test]
fn a_gateways_address_is_left_to_it() {
    run("a_gateways_address_is_left_to_it", |world| {
        prepare(world);
        for cast in families() {
            let index = service_of(world, service::GATEWAY, &[cast.endpoint]);
            load_balancer(world, index, cast.vip, TCP);
            let packet = tcp(cast.client, cast.vip, SYN);
            passes(&world.through("from_outside", &packet), &packet, 0);
        }
    });
}

#[test]
fn a_flow_outlives_changes_as_its_protocol_wants() {
    run("a_flow_outlives_changes_as_its_protocol_wants", |world| {
        prepare(world);
        for cast in families() {
            let Cast { client, vip, endpoint, other, .. } = cast;
            for protocol in [TCP, UDP] {
                let index = service_of(world, 0, &[endpoint]);
                load_balancer(world, index, vip, protocol);
                world.through("from_outside", &first(protocol, client, vip));
                world.set(index, &[other]);
                let next = if protocol == TCP { endpoint } else { other };
                let ran = world.through("from_outside", &later(protocol, client, vip));
                passes(&ran, &later(protocol, client, next), MASQUERADE);
                // What the former endpoint still has to say comes from the Service.
                let ran = world.through("replies", &later(protocol, endpoint, client));
                passes(&ran, &later(protocol, vip, client), 0);
                let ran = world.through("from_outside", &first(protocol, client, vip));
                passes(&ran, &first(protocol, client, other), MASQUERADE);
            }
        }
    });
}

#[test]
fn two_frontends_with_one_endpoint_do_not_share_a_port() {
    run("two_frontends_with_one_endpoint_do_not_share_a_port", |world| {
        prepare(world);
        for cast in families() {
            let Cast { client, vip, second_vip, endpoint, .. } = cast;
            for protocol in PROTOCOLS {
                let index = service_of(world, 0, &[endpoint]);
                for vip in [vip, second_vip] {
                    load_balancer(world, index, vip, protocol);
                }
                let ran = world.through("from_outside", &first(protocol, client, vip));
                passes(&ran, &first(protocol, client, endpoint), MASQUERADE);
                let ran = world.through("from_outside", &first(protocol, client, second_vip));
                let header = if client.is_ipv4() { 34 } else { 54 };
                let port = u16::from_be_bytes(ran.packet[header..header + 2].try_into().unwrap());
                assert_ne!(port, client.port());
                let changed = SocketAddr::new(client.ip(), port);
                passes(&ran, &first(protocol, changed, endpoint), MASQUERADE);
                let ran = world.through("from_outside", &later(protocol, client, second_vip));
                passes(&ran, &later(protocol, changed, endpoint), MASQUERADE);
                let ran = world.through("replies", &later(protocol, endpoint, changed));
                passes(&ran, &later(protocol, second_vip, client), 0);
                let ran = world.through("replies", &later(protocol, endpoint, client));
                passes(&ran, &later(protocol, vip, client), 0);
            }
        }
        assert_eq!(world.count(Event::PortChanged), 4);
    });
}

#[test]
fn icmp_errors_speak_of_what_their_receiver_knows() {
    run("icmp_errors_speak_of_what_their_receiver_knows", |world| {
        prepare(world);
        for cast in families() {
            let Cast { client, vip, endpoint, router, .. } = cast;
            let index = service_of(world, service::EXTERNAL_LOCAL, &[]);
            world.local_set(index, &[endpoint]);
            load_balancer(world, index, vip, TCP);
            world.through("from_outside", &tcp(client, vip, SYN));
            let there = |to| tcp(client, to, ACK);
            let back = |from| tcp(from, client, ACK);
            for (from, shown) in [(endpoint, vip), (router, router)] {
                let ran = world.through("replies", &report(from.ip(), client.ip(), &there(endpoint)));
                passes(&ran, &report(shown.ip(), client.ip(), &there(vip)), 0);
            }
            for from in [client, router] {
                let ran = world.through("from_outside", &report(from.ip(), vip.ip(), &back(vip)));
                passes(&ran, &report(from.ip(), endpoint.ip(), &back(endpoint)), 0);
            }
            let foreign = report(router.ip(), client.ip(), &tcp(client, router, ACK));
            passes(&world.through("replies", &foreign), &foreign, 0);
            for length in 14..foreign.len() {
                let _ = world.attempt("replies", &foreign[..length]);
            }
        }
        assert_eq!(world.count(Event::IcmpError), 8);
    });
}

#[test]
fn fragments_follow_the_first() {
    run("fragments_follow_the_first", |world| {
        prepare(world);
        for cast in families() {
            let Cast { client, vip, endpoint, .. } = cast;
            let index = service_of(world, 0, &[endpoint]);
            load_balancer(world, index, vip, UDP);
            let data: Vec<_> = (0..3000).map(|byte| byte as u8).collect();
            for (hook, [from, to], [new_from, new_to], mark) in [
                ("from_outside", [client, vip], [client, endpoint], MASQUERADE),
                ("replies", [endpoint, client], [vip, client], 0),
            ] {
                let sent = fragments(&udp(from, to, &data), 1400);
                assert_eq!(sent.len(), 3);
                passes(&world.through(hook, &sent[1]), &sent[1], 0);
                let expected = fragments(&udp(new_from, new_to, &data), 1400);
                for (sent, expected) in sent.iter().zip(&expected) {
                    passes(&world.through(hook, sent), expected, mark);
                }
            }
        }
        assert_eq!(world.count(Event::UnknownFragment), 4);
    });
}

#[test]
fn a_udp_packet_without_checksum_gets_none() {
    run("a_udp_packet_without_checksum_gets_none", |world| {
        prepare(world);
        let [cast, _] = families();
        let index = service_of(world, 0, &[cast.endpoint]);
        load_balancer(world, index, cast.vip, UDP);
        let without = |to| {
            let mut packet = udp(cast.client, to, b"plain");
            packet[40..42].fill(0);
            packet
        };
        let ran = world.through("from_outside", &without(cast.vip));
        passes(&ran, &without(cast.endpoint), MASQUERADE);
    });
}

#[test]
fn affinity_is_by_the_clients_address() {
    run("affinity_is_by_the_clients_address", |world| {
        prepare(world);
        for cast in families() {
            let index = world.service(Service {
                flags: service::AFFINITY,
                affinity_timeout: 10800,
                ..Service::default()
            });
            let places: Vec<_> =
                (1..=16).map(|port| SocketAddr::new(cast.endpoint.ip(), 8000 + port)).collect();
            world.set(index, &places);
            load_balancer(world, index, cast.vip, TCP);
            world.frontend_as(index, cast.any, TCP, scope::NODE_PORT, kind::NODE_PORT);
            let mut hit = BTreeSet::new();
            for port in 0..32 {
                let client = SocketAddr::new(cast.client.ip(), 40000 + port);
                let to = if port % 2 == 0 { cast.vip } else { cast.node };
                let ran = world.through("from_outside", &tcp(client, to, SYN));
                let header = if client.is_ipv4() { 34 } else { 54 };
                hit.insert(ran.packet[header + 2..header + 4].to_vec());
            }
            assert_eq!(hit.len(), 1, "whichever address of the Service it uses");
        }
    });
}

#[test]
fn a_closed_connections_port_is_free_again() {
    run("a_closed_connections_port_is_free_again", |world| {
        prepare(world);
        for cast in families() {
            let Cast { client, vip, endpoint, .. } = cast;
            let index = service_of(world, 0, &[endpoint]);
            load_balancer(world, index, vip, TCP);
            world.through("from_outside", &tcp(client, vip, SYN));
            world.through("replies", &tcp(endpoint, client, FIN | ACK));
            world.through("from_outside", &tcp(client, vip, FIN | ACK));
            // What comes late is still the Service's.
            passes(&world.through("replies", &tcp(endpoint, client, ACK)), &tcp(vip, client, ACK), 0);
            world.age_flows(121);
            let direct = tcp(endpoint, client, ACK);
            passes(&world.through("replies", &direct), &direct, 0);
        }
    });
}

/// Prints what one packet of a flow costs, and one that is no Service's. Not a judgement: run it alone, on a quiet
/// machine, `cargo test -p lockgate-ebpf --test packets -- --ignored --nocapture`.
#[test]
#[ignore = "measures"]
fn what_a_packet_costs() {
    const TIMES: u32 = 1_000_000;
    run("what_a_packet_costs", |world| {
        prepare(world);
        for cast in families() {
            // Each is the other's endpoint, so that each run changes the packet again.
            let Cast { client, vip, second_vip, .. } = cast;
            for (vip, endpoint) in [(vip, second_vip), (second_vip, vip)] {
                let index = service_of(world, 0, &[endpoint]);
                load_balancer(world, index, vip, TCP);
                world.through("from_outside", &tcp(client, vip, SYN));
            }
            for (what, packet) in
                [("of a flow", tcp(client, vip, ACK)), ("of no Service", tcp(client, cast.router, ACK))]
            {
                let mut took: Vec<_> =
                    (0..9).map(|_| world.repeat("from_outside", &packet, TIMES).unwrap().took).collect();
                took.sort_unstable();
                eprintln!("{} {what}: {:?} at best, {:?} in the median", client.ip(), took[0], took[4]);
            }
        }
    });
}

#[test]
fn sctp_is_translated_where_the_port_stays() {
    run("sctp_is_translated_where_the_port_stays", |world| {
        prepare(world);
        for cast in families() {
            let Cast { client, vip, endpoint, other, .. } = cast;
            let endpoint = SocketAddr::new(endpoint.ip(), vip.port());
            let index = service_of(world, 0, &[endpoint]);
            load_balancer(world, index, vip, SCTP);
            let ran = world.through("from_outside", &first(SCTP, client, vip));
            passes(&ran, &first(SCTP, client, endpoint), MASQUERADE);
            let ran = world.through("replies", &later(SCTP, endpoint, client));
            passes(&ran, &later(SCTP, vip, client), 0);
            // A wrong checksum would be silence too, and nobody would know why.
            world.set(index, &[other]);
            let client = SocketAddr::new(client.ip(), 5555);
            assert_eq!(world.through("from_outside", &first(SCTP, client, vip)).verdict, Verdict::Drop);
        }
        assert_eq!(world.count(Event::Rewrite), 2);
    });
}
