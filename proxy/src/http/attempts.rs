//! The attempts of one request: which endpoint is next, and whether there is a next one at all.

use std::cell::Cell;
use std::rc::Rc;
use std::time::Duration;

use smallvec::SmallVec;
use tokio::time::Instant;

use crate::clock;

use crate::metrics::{Limit, Outlier, Reject};
use crate::resilience::{Breaker, MAX_TRIES, Resilience, RetryOn, outliers};
use crate::upstream::{InFlight, Upstream};

use super::Forward;
use super::exchange::{Failure, Order};
use super::record::Record;

/// Endpoints that were full before a request gives up looking for one that is
/// not: in a pool that large, and in turn, hardly any other is.
const PASSED: u32 = 32;

/// What was tried so far.
#[derive(Default)]
pub(crate) struct Course {
    tried: SmallVec<[u64; 4]>,
    /// Attempts begun.
    begun: u32,
    /// Of those, the ones that count.
    used: u32,
    /// Endpoints that were full.
    passed: u32,
    /// The next attempt has to be in the budget.
    owes: bool,
    /// A pooled connection turned out dead: the next attempt opens one.
    pub(crate) fresh_only: bool,
    /// When a hedged request was sent first.
    pub(crate) since: Option<Instant>,
    last: Option<Failure>,
}

impl Course {
    /// No second attempt has begun.
    pub(crate) fn is_first(&self) -> bool {
        self.begun <= 1
    }
}

/// An endpoint, and the place the attempt has there.
pub(crate) struct Chosen {
    pub(crate) upstream: Rc<Upstream>,
    pub(crate) busy: InFlight,
}

/// Why an attempt came to nothing.
pub(crate) enum Lost {
    /// The endpoint has enough to do; nothing was tried.
    Full(Limit),
    Failed {
        failure: Failure,
        /// The endpoint may have acted on it.
        sent: bool,
        /// An old connection ended: says nothing about endpoint or request.
        stale: bool,
        /// It is one more failure of the endpoint.
        counts: bool,
        /// All that was sent can be sent again.
        repeatable: bool,
    },
}

/// Deadlines of the whole request and of the present attempt.
#[derive(Default)]
pub(crate) struct Ends {
    request: Option<Instant>,
    /// The earlier of the two.
    pub(crate) next: Cell<Option<Instant>>,
}

impl Ends {
    /// Those of a request that began at `started`.
    pub(crate) fn of(forward: &Forward<'_>, started: Instant) -> Ends {
        let timeout = forward.rule.limits.resilience.as_ref().and_then(|own| own.request_timeout);
        let request = timeout.map(|timeout| started + timeout);
        Ends { request, next: Cell::new(request) }
    }
}

impl<'r> Order<'r> {
    pub(crate) fn resilience(&self) -> Option<&'r Resilience> {
        self.forward.rule.limits.resilience.as_deref()
    }

    /// The earlier of `at` and what the rule allows the request and its present attempt.
    pub(crate) fn bounded(&self, at: Instant) -> Instant {
        self.ends.next.get().map_or(at, |end| end.min(at))
    }

    /// The less of `timeout` and what the rule leaves the request.
    pub(crate) fn patience(&self, timeout: Duration) -> Duration {
        self.ends.next.get().map_or(timeout, |end| end.saturating_duration_since(clock::now()).min(timeout))
    }

    /// The request as a whole has taken too long.
    pub(crate) fn is_overdue(&self) -> bool {
        self.ends.request.is_some_and(|end| clock::now() >= end)
    }

    /// A deadline has passed: whose?
    pub(crate) fn late(&self) -> Failure {
        if self.is_overdue() { Failure::Overdue } else { Failure::Late }
    }

    /// Passes over to failure when something moves all the time, and still takes too long.
    pub(crate) fn in_time(&self) -> Result<(), Failure> {
        match self.ends.next.get() {
            Some(end) if clock::now() >= end => Err(self.late()),
            _ => Ok(()),
        }
    }

    /// An attempt begins.
    pub(crate) fn begin_try(&self) {
        if let Some(timeout) = self.resilience().and_then(|own| own.try_timeout) {
            let end = clock::now() + timeout;
            self.ends.next.set(Some(self.ends.request.map_or(end, |request| request.min(end))));
        }
    }

    /// An answer has begun, or the attempt has failed.
    pub(crate) fn end_try(&self) {
        self.ends.next.set(self.ends.request);
    }

    pub(crate) fn breaker(&self) -> &Breaker {
        let own = self.resilience().and_then(|own| own.breaker.as_ref());
        own.unwrap_or(&self.worker.config.breaker)
    }

    fn retry_on(&self) -> RetryOn {
        self.resilience().and_then(|own| own.retry_on).unwrap_or(self.worker.config.retry.on)
    }

    /// Whether it may be sent twice.
    fn is_safe(&self) -> bool {
        self.idempotent
            || self.worker.config.retry.non_idempotent
            || self.retry_on().has(RetryOn::NON_IDEMPOTENT)
    }

    /// How much of a request body is worth keeping.
    pub(crate) fn replay_bytes(&self) -> usize {
        if self.is_safe() { self.worker.config.retry.replay_bytes } else { 0 }
    }

    pub(crate) fn slot(&self) -> u32 {
        self.forward.split.backends[self.forward.choice.backend].pool
    }

    /// The endpoint of the first attempt.
    pub(crate) fn first(&self, course: &mut Course, record: &mut Record) -> Result<Chosen, Failure> {
        self.worker.budgets.asked(self.slot());
        self.next(course, record)
    }

    /// The endpoint of the next attempt, or what to answer when there is none.
    pub(crate) fn next(&self, course: &mut Course, record: &mut Record) -> Result<Chosen, Failure> {
        if let Some(chosen) = self.choose(course, record) {
            return Ok(chosen);
        }
        Err(course.last.take().unwrap_or_else(|| match course.passed {
            0 => {
                self.worker.metrics.rejected(Reject::NoEndpoint);
                Failure::Answer(503, "no endpoint")
            }
            _ => {
                self.worker.metrics.rejected(Reject::EndpointsFull);
                Failure::Answer(503, "every endpoint is at its limits")
            }
        }))
    }

    /// An endpoint that was not tried and has room.
    pub(crate) fn choose(&self, course: &mut Course, record: &mut Record) -> Option<Chosen> {
        let limit = self.breaker().requests;
        while course.passed < PASSED {
            let upstream = self.pick(&course.tried)?;
            let Some(busy) = InFlight::try_new(&upstream, limit) else {
                self.full(course, &upstream, Limit::Requests);
                continue;
            };
            if std::mem::take(&mut course.owes)
                && !self.worker.budgets.take(self.slot(), &self.worker.config.retry)
            {
                self.worker.metrics.budget_exhausted.inc();
                return None;
            }
            record.retry(course.begun, &upstream, self.worker);
            course.begun += 1;
            return Some(Chosen { upstream, busy });
        }
        None
    }

    fn full(&self, course: &mut Course, upstream: &Upstream, limit: Limit) {
        self.worker.metrics.passed_over(limit);
        course.passed += 1;
        course.tried.push(upstream.live.id);
    }

    /// An attempt came to nothing. Ok: there may be another.
    pub(crate) fn lost(
        &self,
        course: &mut Course,
        upstream: &Upstream,
        record: &Record,
        lost: Lost,
    ) -> Result<(), Failure> {
        self.end_try();
        let (failure, sent, stale, counts, repeatable) = match lost {
            Lost::Full(limit) => {
                course.begun -= 1;
                self.full(course, upstream, limit);
                return Ok(());
            }
            Lost::Failed { failure, sent, stale, counts, repeatable } => {
                (failure, sent, stale, counts, repeatable)
            }
        };
        let class = match failure {
            Failure::Endpoint(_) => RetryOn::ERROR,
            Failure::Late => RetryOn::TIMEOUT,
            Failure::Nonsense(_) => RetryOn::INVALID_HEADER,
            Failure::Client | Failure::Answer(..) => return Err(failure),
            Failure::Overdue => {
                if counts && sent {
                    self.failed(upstream);
                }
                return Err(failure);
            }
        };
        if counts && class != RetryOn::INVALID_HEADER {
            self.failed(upstream);
        }
        if !stale {
            course.tried.push(upstream.live.id);
        }
        let safe = !sent || repeatable && self.is_safe();
        if !safe || !(stale || self.retry_on().has(class)) || !self.may_go_on(course, record) {
            return Err(failure);
        }
        course.owes = sent && !stale;
        course.last = Some(failure);
        Ok(())
    }

    /// The attempts and the time allowed are not used up. Counts an attempt.
    fn may_go_on(&self, course: &mut Course, record: &Record) -> bool {
        let own = self.resilience();
        course.used += 1;
        let tries = match own.and_then(|own| own.tries).unwrap_or(self.worker.config.limits.tries) {
            0 => MAX_TRIES,
            tries => tries.min(MAX_TRIES),
        };
        let within = own.and_then(|own| own.retry_within).unwrap_or(self.worker.config.retry.within);
        let in_time = within.is_zero() || record.started.elapsed() < within;
        course.used < tries && in_time && !self.is_overdue()
    }

    /// Who answers instead of the endpoint that answered `status`: `None` when that answer stands.
    pub(crate) fn instead(
        &self,
        course: &mut Course,
        upstream: &Upstream,
        status: u16,
        repeatable: bool,
        record: &mut Record,
    ) -> Option<Chosen> {
        self.end_try();
        if status < 400 || !self.retry_on().has_status(status) {
            return None;
        }
        if !repeatable || !self.is_safe() || !self.may_go_on(course, record) {
            return None;
        }
        course.owes = true;
        course.tried.push(upstream.live.id);
        self.choose(course, record)
    }

    /// Who is asked beside `upstream`, which takes long.
    pub(crate) fn another(
        &self,
        course: &mut Course,
        upstream: &Upstream,
        record: &mut Record,
    ) -> Option<Chosen> {
        if !self.may_go_on(course, record) {
            return None;
        }
        course.owes = true;
        course.tried.push(upstream.live.id);
        let chosen = self.choose(course, record);
        course.owes = false;
        course.tried.extend(chosen.as_ref().map(|chosen| chosen.upstream.live.id));
        chosen
    }

    /// Counts a failure against an endpoint.
    pub(crate) fn failed(&self, upstream: &Upstream) {
        if self.worker.config.outliers.compares() {
            upstream.seen.add(self.slot(), true, None);
        }
        if upstream.live.failed(clock::now_ms(), &self.worker.config.ejection) {
            self.worker.metrics.ejections.inc();
            tracing::warn!(endpoint = %upstream.live.address, "endpoint keeps failing: left alone for a while");
        }
    }

    /// An endpoint answered: what does that say about it?
    pub(crate) fn answered(&self, upstream: &Upstream, status: u16, record: &Record, since: Option<Instant>) {
        self.remember(upstream);
        let outliers = &self.worker.config.outliers;
        if outliers.gateway_errors > 0
            && upstream.live.gateway_error(matches!(status, 502..=504), outliers.gateway_errors)
        {
            outliers::eject(
                self.worker,
                self.router.pool(self.slot()),
                &upstream.live,
                Outlier::GatewayErrors,
            );
        }
        let hedges = self.resilience().is_some_and(|own| own.hedge.is_some());
        if !hedges && !outliers.compares() {
            return;
        }
        let (Some(end), Some(connected)) = (record.first_byte, record.connected) else { return };
        if hedges && self.bodiless {
            let since = since.unwrap_or(connected);
            self.worker.delays.saw(self.slot(), end.saturating_duration_since(since));
        }
        if outliers.compares() {
            let took = end.saturating_duration_since(connected).as_micros() as u64;
            upstream.seen.add(self.slot(), status >= 500, self.bodiless.then_some(took));
        }
    }

    /// An endpoint has not answered in this time.
    pub(crate) fn took(&self, upstream: &Upstream, time: Duration) {
        if self.worker.config.outliers.compares() {
            upstream.seen.add(self.slot(), false, Some(time.as_micros() as u64));
        }
    }
}
