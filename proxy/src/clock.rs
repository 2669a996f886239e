//! Time as the hot path needs it: a coarse monotonic millisecond, and the
//! wall clock as text that is formatted once a second.
//!
//! Everything that waits or measures goes through tokio's clock, so that tests
//! can pause it.

use std::cell::{Cell, RefCell};
use std::future::Future;
use std::pin::Pin;
use std::sync::OnceLock;
use std::task::{Context, Poll};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use pin_project_lite::pin_project;
use tokio::time::Instant;

/// What the task that is being polled knows of the time.
#[derive(Clone, Copy)]
enum Known {
    /// No task reads the clock in turns.
    Never,
    NotYet,
    At(Instant),
}

thread_local! {
    static KNOWN: Cell<Known> = const { Cell::new(Known::Never) };
}

pin_project! {
    /// See [`in_turns`].
    pub(crate) struct InTurns<F> {
        #[pin]
        task: F,
    }
}

/// Has [`now`] read the clock once each time `task` is polled. A warm request is polled twice, and would
/// read it seven times. Between two readings lies what a worker does in one go: microseconds.
pub(crate) fn in_turns<F: Future>(task: F) -> InTurns<F> {
    InTurns { task }
}

impl<F: Future> Future for InTurns<F> {
    type Output = F::Output;

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<F::Output> {
        /// Also when the task panics: the next one must not live in its time.
        struct Over;
        impl Drop for Over {
            fn drop(&mut self) {
                KNOWN.set(Known::Never);
            }
        }
        KNOWN.set(Known::NotYet);
        let _over = Over;
        self.project().task.poll(cx)
    }
}

/// The time, or what it was when a task of [`in_turns`] that is being polled first asked.
pub(crate) fn now() -> Instant {
    match KNOWN.get() {
        Known::At(time) => time,
        known => {
            let time = Instant::now();
            if matches!(known, Known::NotYet) {
                KNOWN.set(Known::At(time));
            }
            time
        }
    }
}

/// Milliseconds on a clock that never goes back. Its origin is a minute before
/// the process first asked, so 0 is free to mean "never".
pub fn now_ms() -> u64 {
    since_origin().as_millis() as u64
}

/// As [`now_ms`], in microseconds.
pub fn now_us() -> u64 {
    since_origin().as_micros() as u64
}

fn since_origin() -> Duration {
    static ORIGIN: OnceLock<Instant> = OnceLock::new();
    let origin = ORIGIN.get_or_init(|| {
        // The operating system's clock, not tokio's, and some time ago: the first caller may be
        // a test that has moved its own clock ahead, or has stopped it a while before.
        #[expect(clippy::disallowed_methods, reason = "the origin must not depend on a paused clock")]
        let now = Instant::from_std(std::time::Instant::now());
        now.checked_sub(Duration::from_secs(60)).unwrap_or(now)
    });
    now().saturating_duration_since(*origin)
}

/// The time as `Sun, 06 Nov 1994 08:49:37 GMT` (IMF-fixdate, RFC 9110 section 5.6.7), for `Date`.
pub fn http_date() -> [u8; 29] {
    thread_local! {
        static CLOCK: RefCell<WallClock> = RefCell::default();
    }
    // Never fails: nothing called inside borrows it again.
    CLOCK.with_borrow_mut(|clock| *clock.http_date(SystemTime::now()))
}

/// The wall clock as text. One per worker: it remembers the last second it was asked about.
#[derive(Debug, Default)]
pub struct WallClock {
    /// Seconds since the Unix epoch that the texts are of; `None` before the first use.
    second: Option<u64>,
    http_date: [u8; 29],
    rfc3339: [u8; 24],
    log_date: [u8; 26],
}

impl WallClock {
    /// `time` as IMF-fixdate, `Sun, 06 Nov 1994 08:49:37 GMT`.
    pub fn http_date(&mut self, time: SystemTime) -> &[u8; 29] {
        self.turn(time);
        &self.http_date
    }

    /// `time` as RFC 3339 in UTC with milliseconds, `1994-11-06T08:49:37.123Z`.
    pub fn rfc3339(&mut self, time: SystemTime) -> &[u8; 24] {
        let since_epoch = self.turn(time);
        digits(&mut self.rfc3339[20..23], since_epoch.subsec_millis().into());
        &self.rfc3339
    }

    /// `time` as in the common log format, `06/Nov/1994:08:49:37 +0000`.
    pub fn log_date(&mut self, time: SystemTime) -> &[u8; 26] {
        self.turn(time);
        &self.log_date
    }

    /// Formats the texts anew unless they are of the same second. A time before 1970 is 1970.
    fn turn(&mut self, time: SystemTime) -> Duration {
        let since_epoch = time.duration_since(UNIX_EPOCH).unwrap_or_default();
        if self.second != Some(since_epoch.as_secs()) {
            let civil = Civil::from_unix(since_epoch.as_secs());
            self.second = Some(since_epoch.as_secs());
            self.http_date = civil.http_date();
            self.rfc3339 = civil.rfc3339();
            self.log_date = civil.log_date();
        }
        since_epoch
    }
}

const WEEKDAYS: [&[u8; 3]; 7] = [b"Sun", b"Mon", b"Tue", b"Wed", b"Thu", b"Fri", b"Sat"];
const MONTHS: [&[u8; 3]; 12] =
    [b"Jan", b"Feb", b"Mar", b"Apr", b"May", b"Jun", b"Jul", b"Aug", b"Sep", b"Oct", b"Nov", b"Dec"];

/// A moment of the proleptic Gregorian calendar in UTC, without leap seconds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Civil {
    /// Four digits.
    year: u64,
    /// From 0.
    month: usize,
    /// From 1.
    day: u64,
    /// From Sunday, 0.
    weekday: usize,
    hour: u64,
    minute: u64,
    second: u64,
}

impl Civil {
    /// Seconds since the Unix epoch; beyond the year 9999 its last second.
    fn from_unix(seconds: u64) -> Civil {
        const END_OF_9999: u64 = 253_402_300_799;
        let seconds = seconds.min(END_OF_9999);
        let days = seconds / 86_400;
        // Years are counted from 1 March, so that the leap day is the last of its year, and in eras of
        // 400 years (146,097 days) that are all alike. 719,468 days lie between 0000-03-01 and 1970-01-01.
        let shifted = days + 719_468;
        let era = shifted / 146_097;
        let day_of_era = shifted % 146_097;
        let year_of_era =
            (day_of_era - day_of_era / 1_460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
        let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
        // Months from March have 31, 30, 31, 30, 31 days, again and again: 153 in five.
        let month_from_march = (5 * day_of_year + 2) / 153;
        let month = (month_from_march as usize + 2) % 12;
        Civil {
            year: era * 400 + year_of_era + u64::from(month < 2),
            month,
            day: day_of_year - (153 * month_from_march + 2) / 5 + 1,
            // 1 January 1970 was a Thursday.
            weekday: ((days + 4) % 7) as usize,
            hour: seconds / 3_600 % 24,
            minute: seconds / 60 % 60,
            second: seconds % 60,
        }
    }

    fn http_date(&self) -> [u8; 29] {
        let mut text = *b"www, dd mmm yyyy hh:mm:ss GMT";
        text[0..3].copy_from_slice(WEEKDAYS[self.weekday]);
        digits(&mut text[5..7], self.day);
        text[8..11].copy_from_slice(MONTHS[self.month]);
        digits(&mut text[12..16], self.year);
        self.time(&mut text[17..25]);
        text
    }

    fn rfc3339(&self) -> [u8; 24] {
        let mut text = *b"yyyy-mm-ddThh:mm:ss.000Z";
        digits(&mut text[0..4], self.year);
        digits(&mut text[5..7], self.month as u64 + 1);
        digits(&mut text[8..10], self.day);
        self.time(&mut text[11..19]);
        text
    }

    fn log_date(&self) -> [u8; 26] {
        let mut text = *b"dd/mmm/yyyy:hh:mm:ss +0000";
        digits(&mut text[0..2], self.day);
        text[3..6].copy_from_slice(MONTHS[self.month]);
        digits(&mut text[7..11], self.year);
        self.time(&mut text[12..20]);
        text
    }

    fn time(&self, text: &mut [u8]) {
        digits(&mut text[0..2], self.hour);
        digits(&mut text[3..5], self.minute);
        digits(&mut text[6..8], self.second);
    }
}

/// Fills `text` with `value` in decimal, with leading zeros.
fn digits(text: &mut [u8], mut value: u64) {
    for digit in text.iter_mut().rev() {
        *digit = b'0' + (value % 10) as u8;
        value /= 10;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn texts(unix_ms: u64) -> [String; 3] {
        let mut clock = WallClock::default();
        let time = UNIX_EPOCH + Duration::from_millis(unix_ms);
        let text = |bytes: &[u8]| String::from_utf8(bytes.to_vec()).unwrap();
        [text(clock.http_date(time)), text(clock.rfc3339(time)), text(clock.log_date(time))]
    }

    #[test]
    fn wall_clock_texts() {
        for (unix_ms, http, rfc3339, log) in [
            (0, "Thu, 01 Jan 1970 00:00:00 GMT", "1970-01-01T00:00:00.000Z", "01/Jan/1970:00:00:00 +0000"),
            // The example of RFC 9110 section 5.6.7.
            (
                784_111_777_123,
                "Sun, 06 Nov 1994 08:49:37 GMT",
                "1994-11-06T08:49:37.123Z",
                "06/Nov/1994:08:49:37 +0000",
            ),
            (
                951_782_399_999,
                "Mon, 28 Feb 2000 23:59:59 GMT",
                "2000-02-28T23:59:59.999Z",
                "28/Feb/2000:23:59:59 +0000",
            ),
            (
                951_782_400_000,
                "Tue, 29 Feb 2000 00:00:00 GMT",
                "2000-02-29T00:00:00.000Z",
                "29/Feb/2000:00:00:00 +0000",
            ),
            (
                4_107_542_400_007,
                "Mon, 01 Mar 2100 00:00:00 GMT",
                "2100-03-01T00:00:00.007Z",
                "01/Mar/2100:00:00:00 +0000",
            ),
            (
                u64::MAX,
                "Fri, 31 Dec 9999 23:59:59 GMT",
                "9999-12-31T23:59:59.615Z",
                "31/Dec/9999:23:59:59 +0000",
            ),
        ] {
            assert_eq!(texts(unix_ms), [http, rfc3339, log], "{unix_ms}");
        }
    }

    #[test]
    fn every_day_follows_its_predecessor() {
        let leap = |y: u64| y.is_multiple_of(4) && (!y.is_multiple_of(100) || y.is_multiple_of(400));
        let mut expected = Civil { year: 1970, month: 0, day: 1, weekday: 4, hour: 0, minute: 0, second: 0 };
        for day in 0..365_000 {
            assert_eq!(Civil::from_unix(day * 86_400), expected, "day {day}");
            let days = [31, 28 + u64::from(leap(expected.year)), 31, 30, 31, 30, 31, 31, 30, 31, 30, 31];
            expected.weekday = (expected.weekday + 1) % 7;
            expected.day += 1;
            if expected.day > days[expected.month] {
                expected.day = 1;
                expected.month = (expected.month + 1) % 12;
                expected.year += u64::from(expected.month == 0);
            }
        }
    }

    #[test]
    fn texts_follow_the_time_both_ways() {
        let mut clock = WallClock::default();
        let at = |s| UNIX_EPOCH + Duration::from_secs(s);
        assert_eq!(&clock.rfc3339(at(10))[11..19], b"00:00:10");
        assert_eq!(&clock.rfc3339(at(11))[11..19], b"00:00:11");
        assert_eq!(&clock.rfc3339(at(9))[11..19], b"00:00:09");
        assert_eq!(&clock.log_date(UNIX_EPOCH - Duration::from_secs(1))[..11], b"01/Jan/1970");
        assert_eq!(http_date().len(), 29);
    }

    #[tokio::test(start_paused = true)]
    async fn a_turn_has_one_time() {
        in_turns(async {
            let began = now();
            // Moves the clock and yields.
            let step = tokio::time::advance(Duration::from_millis(5));
            assert_eq!(now(), began);
            step.await;
            assert_eq!(now() - began, Duration::from_millis(5));
        })
        .await;
        let before = now();
        tokio::time::advance(Duration::from_millis(5)).await;
        assert_eq!(now() - before, Duration::from_millis(5), "outside it is read each time");
    }

    #[tokio::test(start_paused = true)]
    async fn the_monotonic_clock_follows_a_paused_runtime() {
        let (before_ms, before_us) = (now_ms(), now_us());
        assert_eq!(before_us / 1_000, before_ms);
        tokio::time::advance(Duration::from_millis(1_500)).await;
        assert_eq!(now_ms() - before_ms, 1_500);
        assert_eq!(now_us() - before_us, 1_500_000);
    }
}
