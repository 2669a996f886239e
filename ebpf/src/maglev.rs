//! Maglev hashing (Eisenbud et al., NSDI 2016): a lookup table in which every
//! endpoint has its share, and most places stay when the set changes.

use std::net::SocketAddr;

use crate::table::Endpoint;

/// Places of a table for `endpoints` endpoints: the prime next above a hundred
/// for each, which bounds how much shares differ to about a percent; none above
/// what a set's count can hold.
pub fn size(endpoints: usize) -> usize {
    const PRIMES: [usize; 9] = [251, 509, 1021, 2039, 4093, 8191, 16_381, 32_749, 65_521];
    PRIMES.into_iter().find(|prime| *prime >= endpoints.saturating_mul(100)).unwrap_or(PRIMES[8])
}

/// For each of `size` places, a prime, an index into `endpoints`. Empty without
/// endpoints. The order of `endpoints` does not matter but for the indices.
pub fn table(endpoints: &[Endpoint], size: usize) -> Vec<u32> {
    let heaviest = endpoints.iter().map(|endpoint| endpoint.weight).max().unwrap_or(0);
    if heaviest == 0 {
        return Vec::new();
    }
    let mut order: Vec<usize> = (0..endpoints.len()).collect();
    order.sort_unstable_by_key(|index| endpoints[*index].address);
    let mut turns: Vec<Turn> =
        order.iter().map(|index| Turn::new(&endpoints[*index], *index, size)).collect();
    let mut places = vec![u32::MAX; size];
    let mut left = size;
    while left > 0 {
        for turn in &mut turns {
            // In a round the heaviest fills one place, others their share of one.
            turn.credit += u32::from(turn.weight);
            if turn.credit < u32::from(heaviest) {
                continue;
            }
            turn.credit -= u32::from(heaviest);
            while places[turn.at] != u32::MAX {
                turn.at = (turn.at + turn.skip) % size;
            }
            places[turn.at] = turn.index as u32;
            left -= 1;
            if left == 0 {
                break;
            }
        }
    }
    places
}

/// One endpoint's walk over the places.
struct Turn {
    index: usize,
    weight: u16,
    credit: u32,
    at: usize,
    /// With a prime size, every place is visited.
    skip: usize,
}

impl Turn {
    fn new(endpoint: &Endpoint, index: usize, size: usize) -> Turn {
        let at = hash(&endpoint.address, 0x9ae1_6a3b_2f90_404f) % size as u64;
        let skip = hash(&endpoint.address, 0xc949_d7c7_509e_6557) % (size as u64 - 1) + 1;
        Turn { index, weight: endpoint.weight, credit: 0, at: at as usize, skip: skip as usize }
    }
}

/// FNV-1a with a finish that spreads; every node has to compute the same.
fn hash(address: &SocketAddr, seed: u64) -> u64 {
    let mut state = 0xcbf2_9ce4_8422_2325 ^ seed;
    let mut add = |bytes: &[u8]| {
        for byte in bytes {
            state = (state ^ u64::from(*byte)).wrapping_mul(0x0100_0000_01b3);
        }
    };
    match address.ip() {
        std::net::IpAddr::V4(ip) => add(&ip.octets()),
        std::net::IpAddr::V6(ip) => add(&ip.octets()),
    }
    add(&address.port().to_be_bytes());
    state = (state ^ (state >> 33)).wrapping_mul(0xff51_afd7_ed55_8ccd);
    state = (state ^ (state >> 33)).wrapping_mul(0xc4ce_b9fe_1a85_ec53);
    state ^ (state >> 33)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn endpoints(count: u8) -> Vec<Endpoint> {
        (0..count)
            .map(|one| Endpoint { address: SocketAddr::from(([10, 0, 0, one], 80)), weight: 1 })
            .collect()
    }

    fn shares(table: &[u32], count: usize) -> Vec<usize> {
        let mut shares = vec![0; count];
        table.iter().for_each(|index| shares[*index as usize] += 1);
        shares
    }

    #[test]
    fn shares_are_even_and_follow_weights() {
        for count in [1, 2, 3, 10, 40] {
            let endpoints = endpoints(count);
            let size = size(endpoints.len());
            let shares = shares(&table(&endpoints, size), endpoints.len());
            let (least, most) = (shares.iter().min().unwrap(), shares.iter().max().unwrap());
            assert!(most - least <= 1, "{count} endpoints, {size} places: {shares:?}");
        }
        let mut weighted = endpoints(3);
        weighted[2].weight = 2;
        let shares = shares(&table(&weighted, 1021), 3);
        assert!(shares[2].abs_diff(2 * shares[0]) <= 4, "{shares:?}");
    }

    #[test]
    fn few_places_move_when_one_leaves() {
        let all = endpoints(20);
        let size = size(all.len());
        let before = table(&all, size);
        for gone in 0..all.len() {
            let mut rest = all.clone();
            rest.remove(gone);
            let after = table(&rest, size);
            let moved = before.iter().zip(&after).filter(|(was, is)| {
                let was = all[**was as usize];
                was != all[gone] && was != rest[**is as usize]
            });
            // Those of the endpoint that left have to move: a twentieth. Of the others few do.
            let moved = moved.count();
            assert!(moved * 20 < size * 2, "{moved} of {size} places moved without need");
        }
    }

    #[test]
    fn the_order_of_endpoints_does_not_matter() {
        let all = endpoints(7);
        let reversed: Vec<Endpoint> = all.iter().rev().copied().collect();
        let names = |endpoints: &[Endpoint]| -> Vec<Endpoint> {
            table(endpoints, 251).into_iter().map(|index| endpoints[index as usize]).collect()
        };
        assert_eq!(names(&all), names(&reversed));
        assert!(table(&[], 251).is_empty());
    }
}
