//! How many requests may be sent once more: a share of those that were sent.

use std::cell::{Cell, RefCell};

use super::Retry;

/// Two of these slide: the current one, and the part of the one before that is
/// not yet this long ago.
const WINDOW_MS: u64 = 10_000;

/// By pool slot, and so across tables, like [`crate::balance::Turns`]. One set
/// per worker: nothing is shared. Grows on first use of a slot.
#[derive(Debug)]
pub(crate) struct Budgets {
    by_slot: RefCell<Vec<Budget>>,
    /// Milliseconds of [`crate::clock::now_ms`], a second old at most: a request needs no clock for this.
    now_ms: Cell<u64>,
}

#[derive(Clone, Copy, Debug, Default)]
struct Budget {
    /// Number of the current window.
    window: u32,
    /// In the current window, and in the one before.
    requests: [u32; 2],
    retries: [u32; 2],
}

impl Budgets {
    pub(crate) fn new(now_ms: u64) -> Budgets {
        Budgets { by_slot: RefCell::default(), now_ms: Cell::new(now_ms) }
    }

    /// Time passes; called once a second.
    pub(crate) fn turn(&self, now_ms: u64) {
        self.now_ms.set(now_ms);
    }

    /// A request for pool `slot`.
    pub(crate) fn asked(&self, slot: u32) {
        self.with(slot, |budget, _| budget.requests[0] = budget.requests[0].saturating_add(1));
    }

    /// Takes one retry out of the budget of pool `slot`. False: it is used up.
    pub(crate) fn take(&self, slot: u32, policy: &Retry) -> bool {
        self.with(slot, |budget, now_ms| {
            let allowed = budget.allowed(now_ms, policy);
            budget.retries[0] += u32::from(allowed);
            allowed
        })
    }

    fn with<T>(&self, slot: u32, act: impl FnOnce(&mut Budget, u64) -> T) -> T {
        let mut budgets = self.by_slot.borrow_mut();
        let (slot, now_ms) = (slot as usize, self.now_ms.get());
        if slot >= budgets.len() {
            budgets.resize((slot + 1).next_power_of_two(), Budget::default());
        }
        budgets[slot].turn(now_ms);
        act(&mut budgets[slot], now_ms)
    }
}

impl Budget {
    fn turn(&mut self, now_ms: u64) {
        let window = (now_ms / WINDOW_MS) as u32;
        match window.wrapping_sub(self.window) {
            0 => return,
            1 => {
                self.requests = [0, self.requests[0]];
                self.retries = [0, self.retries[0]];
            }
            _ => *self = Budget::default(),
        }
        self.window = window;
    }

    fn allowed(&self, now_ms: u64, policy: &Retry) -> bool {
        let left = WINDOW_MS - now_ms % WINDOW_MS;
        // In thousandths of requests; both windows fit many times.
        let last =
            |counts: [u32; 2]| u64::from(counts[0]) * 1000 + u64::from(counts[1]) * 1000 * left / WINDOW_MS;
        let share = last(self.requests) / 100 * u64::from(policy.budget_percent);
        let floor = u64::from(policy.budget_floor) * WINDOW_MS;
        last(self.retries) + 1000 <= share.saturating_add(floor)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn policy(budget_percent: u32, budget_floor: u32) -> Retry {
        Retry { budget_percent, budget_floor, ..Retry::default() }
    }

    fn takes(budgets: &Budgets, policy: &Retry) -> usize {
        (0..1_000).take_while(|_| budgets.take(3, policy)).count()
    }

    #[test]
    fn a_share_of_the_requests_and_a_floor() {
        for (percent, floor, requests, expected) in
            [(20, 0, 100, 20), (20, 3, 0, 30), (20, 3, 100, 50), (0, 0, 100, 0), (100, 0, 7, 7)]
        {
            let budgets = Budgets::new(60_000);
            (0..requests).for_each(|_| budgets.asked(3));
            assert_eq!(takes(&budgets, &policy(percent, floor)), expected, "{percent} {floor}");
        }
    }

    #[test]
    fn what_is_long_ago_no_longer_counts() {
        let (budgets, policy) = (Budgets::new(60_000), policy(20, 0));
        (0..100).for_each(|_| budgets.asked(3));
        assert_eq!(takes(&budgets, &policy), 20);
        // Half of both is still within the last ten seconds.
        budgets.turn(75_000);
        assert_eq!(takes(&budgets, &policy), 0);
        (0..100).for_each(|_| budgets.asked(3));
        assert_eq!(takes(&budgets, &policy), 20);
        budgets.turn(100_000);
        assert_eq!(takes(&budgets, &policy), 0);
    }

    #[test]
    fn pools_do_not_share() {
        let (budgets, policy) = (Budgets::new(0), policy(20, 0));
        (0..100).for_each(|_| budgets.asked(4));
        assert_eq!(takes(&budgets, &policy), 0);
    }
}
