//! A process of its own for each privileged test: its cgroup, network and mounts end with it, however it ends.

use std::io::Write as _;
use std::net::{IpAddr, SocketAddr, TcpListener, UdpSocket};
use std::path::{Path, PathBuf};
use std::process::{Command, exit};
use std::sync::Arc;
use std::time::Duration;
use std::{env, fs, io, thread};

use lockgate_ebpf::kernel::KernelMaps;
use lockgate_ebpf::load::{Options, cgroup_root, load};
use lockgate_ebpf_common::{
    Endpoint, Event, Frontend, FrontendKey, Service, SetWord, Slot, endpoint, kind, mapped, scope,
};
use rustix::mount::{MountPropagationFlags, mount_change};
use rustix::thread::{CapabilitySet, UnshareFlags, capabilities};

/// Names the cgroup to the process inside.
const INSIDE: &str = "LOCKGATE_TEST_CGROUP";
/// A test that hangs must not keep its cgroup.
const DEADLINE: Duration = Duration::from_secs(120);

/// Runs `body` as root in a process of its own. `name` is that of the test that calls. Without root: skips
/// loudly, and fails in CI.
pub(crate) fn run(name: &str, body: impl FnOnce(&mut World)) {
    if let Some(cgroup) = env::var_os(INSIDE) {
        let folder = enter(Path::new(&cgroup));
        let options =
            Options { bpffs: folder.path().into(), cgroup: Some(cgroup.into()), capacities: Vec::new() };
        let maps = load(&options).unwrap_or_else(|error| panic!("{error}"));
        body(&mut World {
            maps,
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
        .args([name, "--exact", "--nocapture"])
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
        let path = root.join(format!("lockgate-test-{}-{name}", std::process::id()));
        fs::create_dir(&path).map_err(|error| format!("{}: {error}", path.display()))?;
        Ok(Self(path))
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
    pub(crate) options: Options,
    /// Where the next run goes.
    pub(crate) slots: Ring,
    endpoint: u32,
    /// By index - 1: generation of the set, and the endpoints in it.
    services: Vec<(u32, Vec<u32>)>,
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
        self.services.push((0, Vec::new()));
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
        let (generation, former) = &mut self.services[service as usize - 1];
        *generation += 1;
        let base = self.slots.take(places.len() as u32);
        let word = SetWord::new(base, places.len() as u16, *generation);
        let owner = Slot::owner_of(service, false, word);
        let first = self.endpoint;
        self.endpoint += places.len() as u32;
        let endpoints: Vec<_> = places
            .iter()
            .map(|place| Endpoint {
                address: address(place.ip()),
                port: place.port().to_be_bytes(),
                sets: endpoint::CLUSTER,
                flags: 0,
                generation: 1,
            })
            .collect();
        let slots: Vec<_> = (first..self.endpoint).map(|endpoint| Slot { endpoint, owner }).collect();
        let arrays = self.maps.arrays();
        assert!(arrays.2.write(first, &endpoints) && arrays.1.write(base, &slots));
        assert!(self.maps.commit(service, false, word));
        for index in std::mem::replace(former, (first..self.endpoint).collect()) {
            assert!(self.maps.store_sets(index, 0));
        }
    }

    /// Makes the Service's cluster set empty; `base` says what that means.
    pub(crate) fn empty(&mut self, service: u32, base: u32) {
        let (generation, _) = &mut self.services[service as usize - 1];
        *generation += 1;
        assert!(self.maps.commit(service, false, SetWord::new(base, 0, *generation)));
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
