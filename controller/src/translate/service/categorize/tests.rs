use super::*;

/// `1 ready here zone:a for-zone:a for-node:n`: an address and what it has.
struct Written {
    words: Vec<String>,
    node: Option<Arc<str>>,
    for_zones: Vec<Arc<str>>,
    for_nodes: Vec<Arc<str>>,
}

fn written(line: &str) -> Written {
    let words: Vec<String> = line.split_whitespace().map(str::to_owned).collect();
    let hints = |prefix: &str| {
        words.iter().filter_map(|word| word.strip_prefix(prefix)).map(Arc::from).collect::<Vec<Arc<str>>>()
    };
    let node = words.iter().any(|word| word == "here").then(|| "me".into());
    Written { node, for_zones: hints("for-zone:"), for_nodes: hints("for-node:"), words }
}

impl Written {
    fn candidate(&self) -> Candidate<'_> {
        let is = |word: &str| self.words.iter().any(|own| own == word);
        Candidate {
            address: SocketAddr::from(([10, 0, 0, self.words[0].parse().unwrap()], 80)),
            ready: !is("unready") && !is("terminating") && !is("gone"),
            serving: !is("gone") && !is("unready"),
            terminating: is("terminating") || is("gone"),
            zone: None,
            node: self.node.as_ref(),
            for_zones: &self.for_zones,
            for_nodes: &self.for_nodes,
        }
    }
}

/// `cluster | local`, last numbers of the addresses; `none` if no endpoint is usable anywhere.
fn sets(lines: &[&str], uses: (bool, bool)) -> String {
    let written: Vec<Written> = lines.iter().map(|line| written(line)).collect();
    let candidates: Vec<Candidate<'_>> = written.iter().map(Written::candidate).collect();
    let view = View { node: "me", zone: Some("a") };
    let made = categorize(&candidates, view, Uses { cluster: uses.0, local: uses.1 });
    if !made.has_endpoints {
        assert!(made.cluster.is_empty() && made.local.is_empty());
        return "none".to_owned();
    }
    let numbers = |set: &[SocketAddr]| {
        let text = set.iter().map(|address| address.to_string());
        let last = text.map(|text| text.trim_start_matches("10.0.0.").trim_end_matches(":80").to_owned());
        last.collect::<Vec<_>>().join(" ")
    };
    format!("{} | {}", numbers(&made.cluster), numbers(&made.local))
}

#[test]
fn which_endpoints() {
    let cases: &[(&[&str], &str)] = &[
        (&[], "none"),
        (&["1", "2 here"], "1 2 | 2"),
        (&["1 unready", "2 here unready"], "none"),
        // Scenarios 42 to 46 and KEP-1669: terminating endpoints.
        (&["1", "2 terminating"], "1 | "),
        (&["1 terminating", "2 here terminating"], "1 2 | 2"),
        (&["1", "2 here terminating"], "1 | 2"),
        (&["1 here", "2 here terminating", "3 terminating"], "1 | 1"),
        (&["1 gone", "2 here gone"], "none"),
        (&["1 gone", "2 here terminating"], "2 | 2"),
        // Scenarios 36 to 41: hints.
        (&["1 for-zone:a", "2 for-zone:b"], "1 | "),
        (&["1 for-zone:a", "2 for-zone:b for-zone:a"], "1 2 | "),
        (&["1 for-zone:a", "2"], "1 2 | "),
        (&["1 for-zone:b", "2 for-zone:c"], "1 2 | "),
        (&["1 for-zone:a", "2 unready"], "1 | "),
        (&["1 for-zone:b", "2 for-zone:a unready"], "1 | "),
        (&["1 for-zone:b", "2 here for-zone:b", "3 for-zone:a"], "3 | 2"),
        (&["1 for-zone:a for-node:me", "2 for-zone:a for-node:other"], "1 | "),
        (&["1 for-zone:a for-node:other", "2 for-zone:b for-node:other"], "1 | "),
        (&["1 for-zone:a for-node:me", "2 for-zone:a"], "1 2 | "),
        (&["1 for-zone:a terminating", "2 for-zone:b terminating"], "1 2 | "),
        // One address in several slices.
        (&["1", "1 here"], "1 | 1"),
        (&["1 unready", "1", "1 gone"], "1 | "),
    ];
    for (lines, expected) in cases {
        assert_eq!(sets(lines, (true, true)), *expected, "{lines:?}");
    }
}

#[test]
fn an_unused_set_stays_empty() {
    let lines = ["1", "2 here"];
    assert_eq!(sets(&lines, (true, false)), "1 2 | ");
    assert_eq!(sets(&lines, (false, true)), " | 2");
    assert_eq!(sets(&["1"], (false, true)), " | ", "endpoints, but not here: dropped, not rejected");
}

/// The definition, said once more and slowly.
fn model(candidates: &[Candidate<'_>], view: View<'_>) -> (Vec<SocketAddr>, Vec<SocketAddr>) {
    let ready: Vec<_> = candidates.iter().filter(|one| one.ready).collect();
    let here = |one: &Candidate<'_>| one.node.is_some_and(|node| &**node == view.node);
    let my_node = |one: &Candidate<'_>| one.for_nodes.iter().any(|node| &**node == view.node);
    let my_zone = |one: &Candidate<'_>| one.for_zones.iter().any(|zone| Some(&**zone) == view.zone);
    let by_node = ready.iter().all(|one| !one.for_nodes.is_empty()) && ready.iter().any(|one| my_node(one));
    let by_zone = ready.iter().all(|one| !one.for_zones.is_empty()) && ready.iter().any(|one| my_zone(one));
    let near = ready.iter().filter(|one| {
        if by_node {
            my_node(one)
        } else if by_zone {
            my_zone(one)
        } else {
            true
        }
    });
    let mut cluster: Vec<_> = near.map(|one| one.address).collect();
    let leaving: Vec<_> =
        candidates.iter().filter(|one| !one.ready && one.serving && one.terminating).collect();
    if cluster.is_empty() {
        cluster = leaving.iter().map(|one| one.address).collect();
    }
    let mut local: Vec<_> = ready.iter().filter(|one| here(one)).map(|one| one.address).collect();
    if local.is_empty() {
        local = leaving.iter().filter(|one| here(one)).map(|one| one.address).collect();
    }
    cluster.sort_unstable();
    local.sort_unstable();
    (cluster, local)
}

#[test]
fn random_endpoints_against_the_model() {
    for seed in 0..3000 {
        let mut rng = fastrand::Rng::with_seed(seed);
        let names: [Arc<str>; 3] = ["me".into(), "a".into(), "b".into()];
        let hinted = rng.bool();
        let lists: Vec<[Vec<Arc<str>>; 2]> = (0..rng.usize(..6))
            .map(|_| {
                [(); 2].map(|()| match hinted && rng.u8(..8) > 0 {
                    true => vec![names[rng.usize(..3)].clone()],
                    false => vec![],
                })
            })
            .collect();
        let candidates: Vec<Candidate<'_>> = lists
            .iter()
            .enumerate()
            .map(|(index, [for_zones, for_nodes])| Candidate {
                address: SocketAddr::from(([10, 0, 0, index as u8], 80)),
                ready: rng.bool(),
                serving: rng.bool(),
                terminating: rng.bool(),
                zone: None,
                node: rng.bool().then_some(&names[0]),
                for_zones,
                for_nodes,
            })
            .collect();
        let view = View { node: "me", zone: rng.bool().then_some("a") };
        let made = categorize(&candidates, view, Uses { cluster: true, local: true });
        for (is_local, set) in [(false, &made.cluster), (true, &made.local)] {
            let out = left_out(&candidates, view, is_local).into_iter().map(|(address, _)| address);
            let mut all: Vec<SocketAddr> = out.chain(set.iter().copied()).collect();
            all.sort_unstable();
            let addresses: Vec<SocketAddr> = candidates.iter().map(|one| one.address).collect();
            assert_eq!(all, addresses, "each is in the set or has a reason; seed {seed}: {candidates:?}");
        }
        assert_eq!((made.cluster, made.local), model(&candidates, view), "seed {seed}: {candidates:?}");
    }
}
