//! Any number of canaries beside one mainline.

use std::sync::Arc;

use lockgate_proxy::table::{Backend, Override, PoolKey, Split, Steering};

use super::settings::Canary;

/// Canaries of one rule, at most.
pub(super) const MOST: usize = 64;

/// The common scale of weights, at most. Shares that do not fit are rounded
/// down: less than a millionth is lost to the mainline.
const FINEST: u64 = 1_000_000;

/// One canary of a rule.
pub(super) struct Member<'a> {
    pub(super) name: Arc<str>,
    pub(super) pool: PoolKey,
    pub(super) canary: &'a Canary,
    pub(super) steering: Option<Arc<Steering>>,
}

/// Divides a rule between its mainline and `members`, oldest first. Also
/// returns what is wrong, by index of the member.
///
/// Each weight is a part of its own total, so all are brought to one scale.
/// Where they add up to more than the whole, the youngest get what is left.
pub(super) fn split(
    primary: PoolKey,
    steering: Option<Arc<Steering>>,
    members: &[Member<'_>],
) -> (Split, Vec<(usize, String)>) {
    let mut problems = Vec::new();
    let scale = members.iter().fold(1, |scale, member| {
        let total = u64::from(member.canary.total);
        if scale > FINEST { scale } else { scale / gcd(scale, total) * total }
    });
    let scale = scale.min(FINEST.max(members.iter().map(|m| u64::from(m.canary.total)).max().unwrap_or(1)));
    let mut left = scale;
    let mut backends = vec![Backend { pool: primary, weight: 0, canary: "".into(), steering }];
    let mut overrides = Vec::new();
    let mut sticky = None;
    for (index, member) in members.iter().enumerate() {
        let canary = member.canary;
        let wanted = u64::from(canary.weight) * scale / u64::from(canary.total);
        let weight = wanted.min(left);
        if weight < wanted {
            let message = format!(
                "older canaries of this path leave {weight} of the {wanted} in {scale} that this one asks for"
            );
            problems.push((index, message));
        }
        left -= weight;
        let weight = narrow(weight);
        backends.push(Backend {
            pool: member.pool.clone(),
            weight,
            canary: member.name.clone(),
            steering: member.steering.clone(),
        });
        overrides.extend(canary.when.iter().map(|when| Override { backend: index + 1, when: when.clone() }));
        match (&sticky, &canary.sticky) {
            (None, wish) => sticky = wish.clone(),
            (Some(chosen), Some(wish)) if chosen != wish => {
                problems
                    .push((index, "canary-sticky: an older canary of this path chose otherwise".to_owned()));
            }
            _ => {}
        }
    }
    backends[0].weight = narrow(left);
    (Split { backends, overrides, sticky }, problems)
}

/// Every weight is at most the scale, and the scale at most [`FINEST`] or one `total`.
fn narrow(weight: u64) -> u32 {
    u32::try_from(weight).unwrap_or(u32::MAX)
}

fn gcd(a: u64, b: u64) -> u64 {
    if b == 0 { a } else { gcd(b, a % b) }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn weights(shares: &[(u32, u32)]) -> (Vec<u32>, usize) {
        let canaries: Vec<Canary> =
            shares.iter().map(|&(weight, total)| Canary { weight, total, ..Canary::default() }).collect();
        let members: Vec<Member<'_>> = canaries
            .iter()
            .map(|canary| Member { name: "c".into(), pool: PoolKey("ns/c:1".into()), canary, steering: None })
            .collect();
        let (split, problems) = split(PoolKey("ns/p:1".into()), None, &members);
        (split.backends.iter().map(|backend| backend.weight).collect(), problems.len())
    }

    #[test]
    fn weights_come_to_one_scale_and_the_mainline_gets_the_rest() {
        let cases: [(&[(u32, u32)], &[u32], usize); 9] = [
            (&[(0, 100)], &[100, 0], 0),
            (&[(5, 100)], &[95, 5], 0),
            (&[(100, 100)], &[0, 100], 0),
            (&[(5, 100), (1, 1000)], &[949, 50, 1], 0),
            (&[(1, 101), (1, 103)], &[10403 - 204, 103, 101], 0),
            (&[(60, 100), (60, 100), (10, 100)], &[0, 60, 40, 0], 2),
            (&[(1, u32::MAX)], &[u32::MAX - 1, 1], 0),
            (&[(50, 100), (u32::MAX / 2, u32::MAX)], &[1, 2147483647, 2147483647], 0),
            (&[(999_983, 999_983), (1, 999_979)], &[0, 1_000_000, 0], 1),
        ];
        for (shares, expected, problems) in cases {
            assert_eq!(weights(shares), (expected.to_vec(), problems), "{shares:?}");
        }
    }
}
