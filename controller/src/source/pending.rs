//! Which files changed and when they may be read: the debounce as a pure state
//! machine. Time comes in as an argument.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::time::Duration;

use tokio::time::Instant;

/// More changed files than this are found by one scan of the folder instead.
const PATHS_MAX: usize = 4096;

/// No change waits longer than this for others to calm down.
const DELAY_MAX: Duration = Duration::from_secs(1);

/// A file that was written to but not closed is read anyway once it has been
/// left alone for this long: some writers never close.
const OPEN_MAX: Duration = Duration::from_secs(2);

/// One thing that happened to a path.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Change {
    /// Written to; more may follow until it is closed.
    Written,
    /// Complete: closed after writing, renamed here, gone.
    Settled,
    /// Appeared or changed in a way that says nothing about a writer.
    Touched,
}

/// What should be looked at now.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct Due {
    /// These files, in order. `true`: its writer has not closed it.
    pub(crate) paths: Vec<(PathBuf, bool)>,
    /// Everything.
    pub(crate) rescan: bool,
}

#[derive(Debug)]
pub(crate) struct Pending {
    quiet: Duration,
    paths: BTreeMap<PathBuf, Entry>,
    rescan: bool,
    /// When the oldest and the newest of the changes that wait happened.
    /// Files that are still being written do not count.
    since: Option<(Instant, Instant)>,
}

#[derive(Debug)]
struct Entry {
    last: Instant,
    writing: bool,
}

impl Pending {
    pub(crate) fn new(quiet: Duration) -> Pending {
        Pending { quiet, paths: BTreeMap::new(), rescan: false, since: None }
    }

    pub(crate) fn note(&mut self, path: PathBuf, change: Change, now: Instant) {
        if self.paths.len() >= PATHS_MAX && !self.paths.contains_key(&path) {
            return self.note_rescan(now);
        }
        let entry = self.paths.entry(path).or_insert(Entry { last: now, writing: false });
        entry.last = now;
        match change {
            Change::Written => entry.writing = true,
            Change::Settled => entry.writing = false,
            Change::Touched => {}
        }
        if !entry.writing {
            self.wait_from(now);
        }
    }

    pub(crate) fn note_rescan(&mut self, now: Instant) {
        self.rescan = true;
        self.wait_from(now);
    }

    /// Whether a writer is known to be at work on this path.
    pub(crate) fn is_open(&self, path: &std::path::Path) -> bool {
        self.paths.get(path).is_some_and(|entry| entry.writing)
    }

    /// When [`Pending::take`] will have something, if nothing else happens.
    pub(crate) fn next(&self) -> Option<Instant> {
        let calm = self.since.map(|(first, last)| (last + self.quiet).min(first + DELAY_MAX.max(self.quiet)));
        let open = self.paths.values().filter(|e| e.writing).map(|e| e.last + OPEN_MAX).min();
        calm.into_iter().chain(open).min()
    }

    /// Takes out what is due at `now`.
    pub(crate) fn take(&mut self, now: Instant) -> Due {
        let mut due = Due::default();
        let calm = self.since.is_some_and(|(first, last)| {
            now >= last + self.quiet || now >= first + DELAY_MAX.max(self.quiet)
        });
        if calm {
            due.rescan = std::mem::take(&mut self.rescan);
            self.since = None;
        }
        self.paths.retain(|path, entry| {
            let given_up = entry.writing && now >= entry.last + OPEN_MAX;
            let settled = calm && !entry.writing;
            if given_up || settled {
                due.paths.push((path.clone(), entry.writing));
            }
            !(given_up || settled)
        });
        due
    }

    fn wait_from(&mut self, now: Instant) {
        self.since = Some((self.since.map_or(now, |(first, _)| first), now));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const QUIET: Duration = Duration::from_millis(100);

    fn path(name: &str) -> PathBuf {
        PathBuf::from(name)
    }

    /// Feeds (milliseconds, path, change) and says when each path came out.
    fn replay(events: &[(u64, &str, Change)]) -> Vec<(u64, String, bool)> {
        let start = Instant::now();
        let mut pending = Pending::new(QUIET);
        let mut out = Vec::new();
        let mut events = events.iter().peekable();
        for ms in 0..5_000 {
            let now = start + Duration::from_millis(ms);
            while let Some((_, name, change)) = events.next_if(|(at, ..)| *at == ms) {
                pending.note(path(name), *change, now);
            }
            let expected = pending.next().is_some_and(|at| at <= now);
            let due = pending.take(now);
            assert!(due.paths.is_empty() || expected, "nothing may come out before next(), at {ms} ms");
            out.extend(due.paths.into_iter().map(|(p, open)| (ms, p.display().to_string(), open)));
        }
        assert_eq!(pending.next(), None);
        out
    }

    #[test]
    fn changes_are_gathered_until_it_is_quiet() {
        use Change::*;
        for (events, expected) in [
            (vec![(0, "a", Settled)], vec![(100, "a", false)]),
            (
                vec![(0, "a", Settled), (90, "b", Settled), (95, "a", Touched)],
                vec![(195, "a", false), (195, "b", false)],
            ),
            // Written and closed: one read, after the close.
            (vec![(0, "a", Touched), (1, "a", Written), (50, "a", Settled)], vec![(150, "a", false)]),
            // Never closed: read two seconds after the last write.
            (vec![(0, "a", Written), (900, "a", Written)], vec![(2_900, "a", true)]),
            // A slow writer holds up no one else.
            (
                vec![(0, "slow", Written), (10, "a", Settled), (1_500, "slow", Settled)],
                vec![(110, "a", false), (1_600, "slow", false)],
            ),
        ] {
            let expected: Vec<_> = expected.into_iter().map(|(ms, p, o)| (ms, p.to_owned(), o)).collect();
            assert_eq!(replay(&events), expected, "{events:?}");
        }
    }

    #[test]
    fn a_storm_is_let_through_once_a_second() {
        let events: Vec<_> = (0..40).map(|n| (n * 50, "a", Change::Settled)).collect();
        let times: Vec<u64> = replay(&events).into_iter().map(|(ms, ..)| ms).collect();
        assert_eq!(times, [1_000, 2_050]);
    }

    #[test]
    fn too_many_paths_become_a_scan() {
        let now = Instant::now();
        let mut pending = Pending::new(QUIET);
        for n in 0..=PATHS_MAX {
            pending.note(path(&n.to_string()), Change::Settled, now);
        }
        let due = pending.take(now + QUIET);
        assert!(due.rescan);
        assert_eq!(due.paths.len(), PATHS_MAX);
    }
}
