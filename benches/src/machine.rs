//! What the kernel says about processes and CPUs, and whether it can be trusted now.

use std::fs::{self, File, TryLockError};

use anyhow::{Context, Result, bail};

use rustix::thread::{CpuSet, sched_setaffinity};

use crate::SUBJECT_CPU;

/// Readings at one moment.
pub(crate) struct Sample {
    /// On-CPU time of the subject's threads, in ns.
    subject_ns: u64,
    /// Of the whole machine.
    all: Cpu,
    /// Of the subject's CPU.
    own: Cpu,
}

/// What passed between two samples.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Spent {
    /// CPU time of the subject, in ns.
    pub(crate) subject_ns: u64,
    /// Share of its CPU that the subject used.
    pub(crate) busy: f64,
    /// Share of its CPU that others used.
    pub(crate) foreign: f64,
    /// Share of the machine that the hypervisor withheld.
    pub(crate) steal: f64,
}

/// Clock ticks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Cpu {
    idle: u64,
    steal: u64,
    total: u64,
}

/// Length of a clock tick in ns (`USER_HZ` is 100 on every architecture Linux has today).
const TICK_NS: f64 = 1e7;

impl Sample {
    /// Reads the accounts of process `pid` and of the CPUs.
    pub(crate) fn take(pid: u32) -> Result<Sample> {
        let stat = fs::read_to_string("/proc/stat")?;
        let cpu = |name: &str| Cpu::parse(&stat, name).with_context(|| format!("no {name} in /proc/stat"));
        let own = cpu(&format!("cpu{SUBJECT_CPU}"))?;
        Ok(Sample { subject_ns: on_cpu_ns(pid)?, all: cpu("cpu")?, own })
    }

    /// On-CPU time since the process began, in ns, of the threads it still has.
    pub(crate) fn subject_ns(&self) -> u64 {
        self.subject_ns
    }

    /// The difference to an earlier sample.
    pub(crate) fn since(&self, before: &Sample) -> Spent {
        let subject_ns = self.subject_ns.saturating_sub(before.subject_ns);
        let own = self.own.since(before.own);
        let all = self.all.since(before.all);
        let ticks = own.total.max(1) as f64;
        let busy = subject_ns as f64 / TICK_NS / ticks;
        let used = own.total.saturating_sub(own.idle + own.steal) as f64 / ticks;
        Spent {
            subject_ns,
            busy,
            foreign: (used - busy).max(0.0),
            steal: all.steal as f64 / all.total.max(1) as f64,
        }
    }
}

impl Cpu {
    /// `cpu user nice system idle iowait irq softirq steal guest guest_nice`; guest time is within user's.
    fn parse(stat: &str, name: &str) -> Option<Cpu> {
        let line = stat.lines().find_map(|l| l.strip_prefix(name)?.strip_prefix(' '))?;
        let ticks: Vec<u64> = line.split_ascii_whitespace().take(8).map_while(|n| n.parse().ok()).collect();
        (ticks.len() == 8).then(|| Cpu {
            idle: ticks[3] + ticks[4],
            steal: ticks[7],
            total: ticks.iter().sum(),
        })
    }

    fn since(self, before: Cpu) -> Cpu {
        Cpu {
            idle: self.idle.saturating_sub(before.idle),
            steal: self.steal.saturating_sub(before.steal),
            total: self.total.saturating_sub(before.total),
        }
    }
}

/// From the scheduler, in ns: clock ticks (`utime`, `stime`) are too coarse for a round of seconds.
fn on_cpu_ns(pid: u32) -> Result<u64> {
    let mut sum = 0;
    let threads =
        fs::read_dir(format!("/proc/{pid}/task")).with_context(|| format!("process {pid} is gone"))?;
    for thread in threads {
        // A thread may end between the listing and the reading.
        let Ok(text) = fs::read_to_string(thread?.path().join("schedstat")) else { continue };
        sum += text.split(' ').next().and_then(|ns| ns.parse::<u64>().ok()).context("schedstat")?;
    }
    Ok(sum)
}

/// Resident memory of process `pid`, in bytes.
pub(crate) fn rss(pid: u32) -> Result<u64> {
    let path = format!("/proc/{pid}/status");
    let status = fs::read_to_string(&path).with_context(|| format!("process {pid} is gone"))?;
    let line = status.lines().find_map(|l| l.strip_prefix("VmRSS:"));
    let kib = line.and_then(|l| l.trim().strip_suffix(" kB")?.parse::<u64>().ok()).context(path)?;
    Ok(kib * 1024)
}

/// Binds the calling thread to `cpu`.
pub(crate) fn pin(cpu: usize) -> Result<()> {
    let mut set = CpuSet::new();
    set.set(cpu);
    sched_setaffinity(None, &set).context("cannot choose a CPU")
}

/// Held while measuring: two benchmarks at once measure each other.
pub(crate) fn lock() -> Result<File> {
    let path = std::env::temp_dir().join("lockgate-bench.lock");
    let file = File::create(&path).with_context(|| path.display().to_string())?;
    match file.try_lock() {
        Ok(()) => Ok(file),
        Err(TryLockError::WouldBlock) => bail!("another benchmark is running ({} is locked)", path.display()),
        Err(TryLockError::Error(error)) => Err(error).with_context(|| path.display().to_string()),
    }
}

/// Kernel, processor and number of CPUs, in a line.
pub(crate) fn describe() -> String {
    let read = |path| fs::read_to_string(path).unwrap_or_default();
    let processor = read("/proc/cpuinfo")
        .lines()
        .find_map(|l| l.strip_prefix("model name")?.split_once(": ").map(|(_, name)| name.to_owned()))
        .unwrap_or_else(|| std::env::consts::ARCH.to_owned());
    let cpus = std::thread::available_parallelism().map_or(1, usize::from);
    format!("Linux {}, {processor}, {cpus} CPUs", read("/proc/sys/kernel/osrelease").trim())
}

#[cfg(test)]
mod tests {
    use super::*;

    const STAT: &str = "cpu  10 0 20 60 5 0 1 4 3 0\ncpu0 5 0 10 30 2 0 1 2 0 0\ncpu10 1 1 1 1 1 1 1 1 0 0\n";

    #[test]
    fn proc_stat() {
        assert_eq!(Cpu::parse(STAT, "cpu"), Some(Cpu { idle: 65, steal: 4, total: 100 }));
        assert_eq!(Cpu::parse(STAT, "cpu0"), Some(Cpu { idle: 32, steal: 2, total: 50 }));
        assert_eq!(Cpu::parse(STAT, "cpu1"), None);
    }

    #[test]
    fn shares_of_a_round() {
        let cpu = |idle, steal, total| Cpu { idle, steal, total };
        let before = Sample { subject_ns: 1_000, all: cpu(0, 0, 0), own: cpu(0, 0, 0) };
        let after = Sample { subject_ns: 1_000 + 800_000_000, all: cpu(50, 2, 200), own: cpu(15, 0, 100) };
        let spent = after.since(&before);
        assert_eq!(spent.subject_ns, 800_000_000);
        assert!((spent.busy - 0.80).abs() < 1e-9);
        assert!((spent.foreign - 0.05).abs() < 1e-9);
        assert!((spent.steal - 0.01).abs() < 1e-9);
    }

    #[test]
    fn own_process_has_an_account() {
        assert!(on_cpu_ns(std::process::id()).unwrap() > 0);
    }
}
