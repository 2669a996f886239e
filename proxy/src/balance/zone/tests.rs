use super::*;
use crate::endpoint::Endpoints;
use crate::table::UpstreamProtocol;

/// Endpoints by zone; no zone for an empty name.
fn endpoints(zones: &[&str]) -> Vec<CompiledEndpoint> {
    let registry = Endpoints::default();
    let compiled = zones.iter().zip(1_u16..).map(|(zone, port)| CompiledEndpoint {
        live: registry.get(([127, 0, 0, 1], port).into(), UpstreamProtocol::Http1),
        weight: 1,
        zone: (!zone.is_empty()).then(|| (*zone).into()),
    });
    compiled.collect()
}

/// The share that stays near when the endpoints of `lost` are not available.
fn share(zones: &[&str], lost: &[usize]) -> Option<f64> {
    let endpoints = endpoints(zones);
    let lost: Vec<u64> = lost.iter().map(|index| endpoints[*index].live.id).collect();
    let zones = Zones::new("a", &endpoints)?;
    Some(zones.share_of(&endpoints, |endpoint| !lost.contains(&endpoint.live.id)))
}

#[test]
fn what_its_own_zone_cannot_carry_spills_over() {
    let cases: &[(&[&str], &[usize], Option<f64>)] = &[
        (&["a", "b"], &[], Some(1.0)),
        (&["a", "b", "c"], &[], Some(1.0)),
        (&["a", "a", "a", "b"], &[], Some(1.0)),
        // One of nine, where each zone sends a third.
        (&["a", "b", "b", "b", "b", "c", "c", "c", "c"], &[], Some(1.0 / 3.0)),
        // One endpoint after the other is lost: the share falls step by step.
        (&["a", "a", "a", "b", "b", "b"], &[0], Some(0.8)),
        (&["a", "a", "a", "b", "b", "b"], &[0, 1], Some(0.5)),
        (&["a", "a", "a", "b", "b", "b"], &[0, 1, 2], Some(0.0)),
        // Losses elsewhere leave more here.
        (&["a", "a", "a", "b", "b", "b"], &[0, 3], Some(1.0)),
        (&["a", "b"], &[1], Some(1.0)),
        // None available: as if all were.
        (&["a", "b", "b", "b"], &[0, 1, 2, 3], Some(0.5)),
        // An endpoint of no known zone is far away, and not a zone.
        (&["a", "", "", ""], &[], Some(0.25)),
        // Nothing to prefer.
        (&["a", "a"], &[], None),
        (&["b", "c"], &[], None),
        (&[], &[], None),
    ];
    for (zones, lost, expected) in cases {
        let share = share(zones, lost);
        let is_close = match (share, expected) {
            (Some(share), Some(expected)) => (share - expected).abs() < 1e-9,
            (None, None) => true,
            _ => false,
        };
        assert!(is_close, "{zones:?} without {lost:?}: {share:?}, not {expected:?}");
    }
}

#[test]
fn a_share_holds_for_a_moment() {
    let endpoints = endpoints(&["a", "b"]);
    let zones = Zones::new("a", &endpoints).unwrap();
    assert!(zones.stays(u32::MAX, 1_000, &endpoints, |_| true));
    let lost = |endpoint: &CompiledEndpoint| endpoint.live.id != endpoints[0].live.id;
    assert!(zones.stays(1, 1_000 + HOLDS_MS - 1, &endpoints, lost));
    assert!(!zones.stays(1, 1_000 + HOLDS_MS, &endpoints, lost));
}
