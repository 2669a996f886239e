//! A process of its own for each privileged test: its cgroup, network and mounts end with it, however it ends.

use std::io::Write as _;
use std::net::{IpAddr, SocketAddr, TcpListener, UdpSocket};
use std::ops::Range;
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::process::{Command, exit};
use std::sync::Arc;
use std::time::Duration;
use std::{env, fs, io, thread};

use aya::programs::{TestRun as _, TestRunOptions};
use lockgate_ebpf::kernel::KernelMaps;
use lockgate_ebpf::load::{Loaded, Options, Programs, cgroup_root, load};
use lockgate_ebpf::sys::{Prefixed, dump, open_pin, update};
use lockgate_ebpf_common::{
    Allowed, Endpoint, Event, Flow, FlowKey, Frontend, FrontendKey, Service, SetWord, Slot, SourceRange,
    endpoint, kind, mapped, maps, scope,
};
use rustix::mount::{MountPropagationFlags, mount_change};
use rustix::thread::{CapabilitySet, UnshareFlags, capabilities};

/// Names the cgroup to the process inside.
const INSIDE: &str = "LOCKGATE_TEST_CGROUP";
/// Names an object to test instead of the committed one.
const OBJECT: &str = "LOCKGATE_TEST_OBJECT";
/// A test that hangs must not keep its cgroup.
const DEADLINE: Duration = Duration::from_secs(120);

/// Runs `body` as root in a process of its own. `name` is that of the test that calls. Without root: skips
/// loudly, and fails in CI.
pub(crate) fn run(name: &str, body: impl FnOnce(&mut World)) {
    if let Some(cgroup) = env::var_os(INSIDE) {
        let folder = enter(Path::new(&cgroup));
        let options = Options {
            bpffs: folder.path().into(),
            cgroup: Some(cgroup.into()),
            object: env::var_os(OBJECT).map(PathBuf::from),
            capacities: Vec::new(),
        };
        let Loaded { maps, programs } = load(&options).unwrap_or_else(|error| panic!("{error}"));
        body(&mut World {
            maps,
            programs,
            options,
            slots: Ring { next: 1, end: 1 << 16 },
            endpoint: 1,
            services: Vec::new(),
        });
        return;
    }
    let cgroup = match Cgroup::new(name) {
        Ok(cgroup) => cgroup,
        Err(why) => {
            assert!(env::var_os("CI").is_none(), "CI must run {name}, but {why}");
            // Past the capture of a test's output.
            let _ = writeln!(io::stderr(), "SKIPPED {name}: it loads kernel programs, but {why}");
            return;
        }
    };
    let output = Command::new(env::current_exe().unwrap())
        .args([name, "--exact", "--nocapture", "--include-ignored"])
        .env(INSIDE, &cgroup.0)
        .output()
        .unwrap();
    // Its result is this test's, and not one more.
    let told = String::from_utf8_lossy(&output.stderr);
    eprintln!("{told}");
    assert!(output.status.success(), "{name} failed inside: see above");
}

/// Removed when the test is over; its process has ended by then.
struct Cgroup(PathBuf);

impl Cgroup {
    /// Says why nothing can be loaded here.
    fn new(name: &str) -> Result<Self, String> {
        let needed = CapabilitySet::SYS_ADMIN | CapabilitySet::NET_ADMIN;
        let have = capabilities(None).map_err(|error| error.to_string())?.effective;
        if !have.contains(needed) {
            return Err("this takes root with CAP_SYS_ADMIN and CAP_NET_ADMIN".into());
        }
        let root = cgroup_root().map_err(|error| error.to_string())?;
        sweep(&root);
        let path = root.join(format!("lockgate-test-{}-{name}", std::process::id()));
        fs::create_dir(&path).map_err(|error| format!("{}: {error}", path.display()))?;
        Ok(Self(path))
    }
}

/// Removes the cgroups of tests that were killed.
fn sweep(root: &Path) {
    for entry in fs::read_dir(root).unwrap() {
        let entry = entry.unwrap();
        let name = entry.file_name();
        let test = name.to_str().and_then(|name| name.strip_prefix("lockgate-test-"));
        let Some((process, _)) = test.and_then(|test| test.split_once('-')) else { continue };
        if !Path::new("/proc").join(process).exists() {
            // Not while its process inside still ends; and somebody else may sweep too.
            let _ = fs::remove_dir(entry.path());
        }
    }
}

impl Drop for Cgroup {
    fn drop(&mut self) {
        if let Err(error) = fs::remove_dir(&self.0) {
            eprintln!("{}: {error}", self.0.display());
        }
    }
}

/// Joins the cgroup and leaves the network and the mounts of the machine; returns where pins go.
fn enter(cgroup: &Path) -> tempfile::TempDir {
    thread::spawn(|| {
        thread::sleep(DEADLINE);
        eprintln!("no end after {DEADLINE:?}");
        exit(99);
    });
    fs::write(cgroup.join("cgroup.procs"), "0").unwrap();
    // SAFETY: changes this thread alone, and those it starts; descriptors stay as they are.
    unsafe { rustix::thread::unshare_unsafe(UnshareFlags::NEWNET | UnshareFlags::NEWNS) }.unwrap();
    mount_change("/", MountPropagationFlags::PRIVATE | MountPropagationFlags::REC).unwrap();
    let up = Command::new("ip").args(["link", "set", "lo", "up"]).status().unwrap();
    assert!(up.success());
    let folder = tempfile::tempdir().unwrap();
    rustix::mount::mount("bpf", folder.path(), "bpf", rustix::mount::MountFlags::empty(), None).unwrap();
    folder
}

/// The programs loaded, and a plain writer of their maps.
pub(crate) struct World {
    pub(crate) maps: KernelMaps,
    pub(crate) programs: Programs,
    pub(crate) options: Options,
    /// Where the next run goes.
    pub(crate) slots: Ring,
    endpoint: u32,
    /// By index - 1: the cluster's set and the local one.
    services: Vec<[Set; 2]>,
}

/// A set as it was written last.
#[derive(Default)]
struct Set {
    generation: u32,
    /// Where its endpoints are.
    endpoints: Range<u32>,
}

/// What a hook of packets did.
pub(crate) struct Ran {
    pub(crate) verdict: Verdict,
    pub(crate) packet: Vec<u8>,
    pub(crate) mark: u32,
    /// Of one run.
    pub(crate) took: Duration,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Verdict {
    Pass,
    Drop,
}

/// Places for runs, given again and again.
pub(crate) struct Ring {
    pub(crate) next: u32,
    pub(crate) end: u32,
}

impl Ring {
    fn take(&mut self, count: u32) -> u32 {
        if self.next + count > self.end {
            self.next = 1;
        }
        self.next += count;
        self.next - count
    }
}

impl World {
    /// A Service without a set or address; returns its index.
    pub(crate) fn service(&mut self, service: Service) -> u32 {
        self.services.push(Default::default());
        let index = self.services.len() as u32;
        assert!(self.maps.arrays().0.write(index, &[Service { generation: 1, ..service }]));
        index
    }

    /// An address of the Service.
    pub(crate) fn frontend(&mut self, service: u32, at: SocketAddr, protocol: u8) {
        self.frontend_as(service, at, protocol, scope::ADDRESS, kind::CLUSTER_IP);
    }

    /// As [`World::frontend`].
    pub(crate) fn frontend_as(&mut self, service: u32, at: SocketAddr, protocol: u8, scope: u8, kind: u8) {
        let key = FrontendKey { address: address(at.ip()), port: at.port().to_be_bytes(), protocol, scope };
        let value = Frontend { service, generation: u16::from(service != 0), kind, zero: 0 };
        self.maps.put_frontends(&[key], &[value]).unwrap();
    }

    /// Makes `places` the Service's cluster set, as the update protocol says.
    pub(crate) fn set(&mut self, service: u32, places: &[SocketAddr]) {
        self.write_set(service, false, places, SetWord::EMPTY_REJECT);
    }

    /// As `set`, of its local one.
    pub(crate) fn local_set(&mut self, service: u32, places: &[SocketAddr]) {
        self.write_set(service, true, places, SetWord::EMPTY_REJECT);
    }

    /// Makes the Service's cluster set empty; `base` says what that means.
    pub(crate) fn empty(&mut self, service: u32, base: u32) {
        self.write_set(service, false, &[], base);
    }

    /// As `empty`, its local one.
    pub(crate) fn local_empty(&mut self, service: u32, base: u32) {
        self.write_set(service, true, &[], base);
    }

    fn write_set(&mut self, service: u32, local: bool, places: &[SocketAddr], empty: u32) {
        let set = &mut self.services[service as usize - 1][usize::from(local)];
        set.generation += 1;
        let count = places.len() as u32;
        let base = if count == 0 { empty } else { self.slots.take(count) };
        let word = SetWord::new(base, count as u16, set.generation);
        let owner = Slot::owner_of(service, local, word);
        let now = self.endpoint..self.endpoint + count;
        self.endpoint = now.end;
        let sets = if local { endpoint::LOCAL } else { endpoint::CLUSTER };
        let endpoints: Vec<_> = places
            .iter()
            .map(|place| Endpoint {
                address: address(place.ip()),
                port: place.port().to_be_bytes(),
                sets,
                flags: 0,
                generation: 1,
            })
            .collect();
        let slots: Vec<_> = now.clone().map(|endpoint| Slot { endpoint, owner }).collect();
        let arrays = self.maps.arrays();
        assert!(arrays.2.write(now.start, &endpoints) && arrays.1.write(base, &slots));
        assert!(self.maps.commit(service, local, word));
        for index in std::mem::replace(&mut set.endpoints, now) {
            assert!(self.maps.store_sets(index, 0));
        }
    }

    /// Changes the endpoints of the Service's cluster set.
    pub(crate) fn each_endpoint(&mut self, service: u32, change: impl Fn(Endpoint) -> Endpoint) {
        for index in self.services[service as usize - 1][0].endpoints.clone() {
            let endpoints = self.maps.arrays().2;
            let endpoint = change(endpoints.read(index).unwrap());
            assert!(endpoints.write(index, &[endpoint]));
        }
    }

    /// Lets the first `bits` of `range`, as the maps have it, come to the Service.
    pub(crate) fn source_range(&mut self, service: u32, range: IpAddr, bits: u32, value: Allowed) {
        let data = SourceRange { service: service.to_be_bytes(), address: address(range) };
        let range = Prefixed { prefix_length: 32 + bits, data };
        self.maps.put_source_range(&range, value).unwrap();
    }

    /// Lets every flow look as if its last packet had been so many seconds earlier.
    pub(crate) fn age_flows(&self, seconds: u32) {
        let map = open_pin(&self.options.pins().join(maps::FLOWS)).unwrap();
        for (key, flow) in dump::<FlowKey, Flow>(map.as_fd()).unwrap() {
            let seen = flow.seen.wrapping_sub(seconds);
            update(map.as_fd(), &key, &Flow { seen, ..flow }).unwrap();
        }
    }

    /// Sends a packet through a hook.
    pub(crate) fn through(&mut self, hook: &'static str, packet: &[u8]) -> Ran {
        self.attempt(hook, packet).unwrap()
    }

    /// As `through`; none if the kernel does not take it for a packet.
    pub(crate) fn attempt(&mut self, hook: &'static str, packet: &[u8]) -> Option<Ran> {
        self.repeat(hook, packet, 1)
    }

    /// As `attempt`, often: each time with what the time before made of it.
    pub(crate) fn repeat(&mut self, hook: &'static str, packet: &[u8], times: u32) -> Option<Ran> {
        let mut out = vec![0; packet.len()];
        // A `__sk_buff`, or its beginning; the mark is its third word.
        let mut context = [0; 256];
        let options = TestRunOptions {
            data_in: Some(packet),
            data_out: Some(&mut out),
            ctx_out: Some(&mut context),
            repeat: times,
            ..TestRunOptions::default()
        };
        let result = self.programs.program(hook).unwrap().test_run(options).ok()?;
        assert_eq!(result.data_size_out as usize, packet.len());
        Some(Ran {
            verdict: match result.return_value as i32 {
                -1 => Verdict::Pass,
                2 => Verdict::Drop,
                other => panic!("verdict {other}"),
            },
            packet: out,
            mark: u32::from_ne_bytes(context[8..12].try_into().unwrap()),
            took: result.duration,
        })
    }

    /// How often `event` was.
    pub(crate) fn count(&self, event: Event) -> u64 {
        self.maps.events().unwrap()[event as usize]
    }
}

/// Accepts for ever; each connection reads the listener's port, 2 bytes, and its end.
pub(crate) fn tcp_server(ip: &str) -> SocketAddr {
    let listener = TcpListener::bind((ip, 0)).unwrap();
    let at = listener.local_addr().unwrap();
    thread::spawn(move || {
        for stream in listener.incoming() {
            let _ = io::Write::write_all(&mut stream.unwrap(), &at.port().to_be_bytes());
        }
    });
    at
}

/// Answers each datagram with its port, 2 bytes.
pub(crate) fn udp_server(ip: &str) -> SocketAddr {
    let socket = Arc::new(UdpSocket::bind((ip, 0)).unwrap());
    let at = socket.local_addr().unwrap();
    thread::spawn(move || {
        let mut buffer = [0; 16];
        while let Ok((_, from)) = socket.recv_from(&mut buffer) {
            socket.send_to(&at.port().to_be_bytes(), from).unwrap();
        }
    });
    at
}

/// `ip` as the maps have it.
pub(crate) fn address(ip: IpAddr) -> [u8; 16] {
    match ip {
        IpAddr::V4(ip) => mapped(ip.octets()),
        IpAddr::V6(ip) => ip.octets(),
    }
}
