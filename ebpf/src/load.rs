//! Puts the programs into the kernel: loads, pins, attaches; exchanges those of a former process.
//!
//! ```text
//!  <bpffs>/lockgate/v1/FRONTENDS …     maps: outlive the process; another layout gets another folder
//!                     /links/connect4 …  links: while pinned, the hook runs
//! ```
//! Loading again opens the maps that are there and exchanges the links' programs one by one, so that no
//! connection sees a hook without a program.

use std::fs::{self, File};
use std::io;
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};

use aya::programs::{CgroupAttachMode, CgroupSockAddr, links::FdLink};
use aya::{EbpfLoader, include_bytes_aligned};
use lockgate_ebpf_common::{LAYOUT, maps};
use rustix::fs::statfs;
use rustix::mount::{MountFlags, mount};

use crate::kernel::KernelMaps;
use crate::sys::{detach_link, open_pin, update_link};

/// The programs, compiled by `ebpf/build`.
static OBJECT: &[u8] = include_bytes_aligned!("../programs/lockgate.o");

/// The hooks of sockets: each is the name of its program, and of its link's pin.
pub const SOCKET_HOOKS: [&str; 8] =
    ["connect4", "connect6", "sendmsg4", "sendmsg6", "recvmsg4", "recvmsg6", "getpeername4", "getpeername6"];

/// Where things are.
#[derive(Clone, Debug)]
pub struct Options {
    /// Where the bpf file system is, or is mounted to if it is not.
    pub bpffs: PathBuf,
    /// The cgroup (version 2) whose sockets are balanced; `None`: the root, found by [`cgroup_root`].
    pub cgroup: Option<PathBuf>,
    /// Room of maps, by name, where it shall differ from [`lockgate_ebpf_common::capacity`].
    pub capacities: Vec<(&'static str, u32)>,
}

impl Default for Options {
    fn default() -> Self {
        Self { bpffs: "/sys/fs/bpf".into(), cgroup: None, capacities: Vec::new() }
    }
}

impl Options {
    /// Folder of our pins.
    pub fn pins(&self) -> PathBuf {
        self.bpffs.join("lockgate").join(LAYOUT)
    }

    fn links(&self) -> PathBuf {
        self.pins().join("links")
    }
}

/// Why the programs are not in the kernel. What was attached before stays attached.
#[derive(Debug, thiserror::Error)]
pub enum LoadError {
    /// There is no cgroup file system of version 2.
    #[error("no cgroup2 file system is mounted: mount one, or say where with --cgroup-root")]
    NoCgroup2,
    /// A file or folder.
    #[error("{path}: {source}")]
    File {
        /// Which.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// The kernel did not take the object.
    #[error("the kernel refuses the programs (needs Linux 6.6, CAP_BPF and CAP_NET_ADMIN): {0}")]
    Object(#[from] aya::EbpfError),
    /// The verifier did not take a program, or a hook did not.
    #[error("hook {hook}: {source}")]
    Hook {
        /// Which.
        hook: &'static str,
        /// Why.
        source: Box<dyn std::error::Error + Send + Sync>,
    },
}

/// Loads and attaches everything, or exchanges what a former process left; returns the maps.
pub fn load(options: &Options) -> Result<KernelMaps, LoadError> {
    let cgroup = match &options.cgroup {
        Some(path) => path.clone(),
        None => cgroup_root()?,
    };
    let cgroup = at(&cgroup, File::open(&cgroup))?;
    at(&options.bpffs, mount_bpffs(&options.bpffs))?;
    let links = options.links();
    at(&links, fs::create_dir_all(&links))?;
    let pins = options.pins();

    let mut loader = EbpfLoader::new();
    for name in PINNED {
        loader.map_pin_path(name, pins.join(name));
    }
    for (name, room) in &options.capacities {
        loader.map_max_entries(name, *room);
    }
    let mut object = loader.load(OBJECT)?;
    for hook in SOCKET_HOOKS {
        let program = object.program_mut(hook).ok_or("not in the object");
        program
            .map_err(Into::into)
            .and_then(|program| Ok(<&mut CgroupSockAddr>::try_from(program)?))
            .and_then(|program| attach(program, &cgroup, &links.join(hook)))
            .map_err(|source| LoadError::Hook { hook, source })?;
    }
    at(&pins, KernelMaps::open(&pins))
}

/// Detaches everything and forgets every map. What is already gone is no error.
pub fn remove(options: &Options) -> io::Result<()> {
    match fs::read_dir(options.links()) {
        Ok(links) => links.into_iter().try_for_each(|link| remove_link(&link?.path()))?,
        Err(error) if error.kind() == io::ErrorKind::NotFound => {}
        Err(error) => return Err(error),
    }
    match fs::remove_dir_all(options.pins()) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}

/// The root of the cgroup file system of version 2: `/sys/fs/cgroup`, or below it on machines with both versions.
pub fn cgroup_root() -> Result<PathBuf, LoadError> {
    const MOUNTS: &str = "/proc/self/mounts";
    let mounts = at(Path::new(MOUNTS), fs::read_to_string(MOUNTS))?;
    cgroup2_of(&mounts).ok_or(LoadError::NoCgroup2)
}

/// The maps that outlive the process.
const PINNED: [&str; 11] = [
    maps::FRONTENDS,
    maps::SERVICES,
    maps::SLOTS,
    maps::ENDPOINTS,
    maps::AFFINITY,
    maps::REVERSE,
    maps::SOURCE_RANGES,
    maps::NODE_ADDRESSES,
    maps::OPTED_OUT,
    maps::SETTINGS,
    maps::EVENTS,
];

fn attach(
    program: &mut CgroupSockAddr,
    cgroup: &File,
    pin: &Path,
) -> Result<(), Box<dyn std::error::Error + Send + Sync>> {
    program.load()?;
    match open_pin(pin) {
        Ok(link) => Ok(update_link(link.as_fd(), program.fd()?.as_fd())?),
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            // A link of a cgroup always allows others beside it, whatever the mode.
            let id = program.attach(cgroup, CgroupAttachMode::Single)?;
            let link: FdLink = program.take_link(id)?.try_into()?;
            link.pin(pin)?;
            Ok(())
        }
        Err(error) => Err(error.into()),
    }
}

/// Detaches the link pinned at `path`, and unpins it: unpinned alone, it would go some time later.
fn remove_link(path: &Path) -> io::Result<()> {
    match open_pin(path).and_then(|link| detach_link(link.as_fd())).and_then(|()| fs::remove_file(path)) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}

/// `source cgroup2` lines of a mount table; the shortest path, for others are within it.
fn cgroup2_of(mounts: &str) -> Option<PathBuf> {
    mounts
        .lines()
        .filter_map(|line| {
            let mut fields = line.split(' ').skip(1);
            let (path, kind) = (fields.next()?, fields.next()?);
            (kind == "cgroup2").then_some(path)
        })
        .min_by_key(|path| path.len())
        .map(PathBuf::from)
}

fn mount_bpffs(path: &Path) -> io::Result<()> {
    /// `BPF_FS_MAGIC` of linux/magic.h.
    const MAGIC: u32 = 0xcafe_4a11;
    if statfs(path)?.f_type as u32 != MAGIC {
        mount("bpf", path, "bpf", MountFlags::empty(), None)?;
    }
    Ok(())
}

fn at<T>(path: &Path, result: io::Result<T>) -> Result<T, LoadError> {
    result.map_err(|source| LoadError::File { path: path.to_owned(), source })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_cgroup_root_is_found_where_it_is_mounted() {
        for (mounts, expected) in [
            ("cgroup2 /sys/fs/cgroup cgroup2 rw,nosuid 0 0\n", Some("/sys/fs/cgroup")),
            (
                "tmpfs /sys/fs/cgroup tmpfs rw 0 0\ncgroup /sys/fs/cgroup/cpu cgroup rw,cpu 0 0\n\
                 cgroup2 /sys/fs/cgroup/unified cgroup2 rw 0 0\n",
                Some("/sys/fs/cgroup/unified"),
            ),
            ("cgroup /sys/fs/cgroup/cpu cgroup rw,cpu 0 0\n", None),
        ] {
            assert_eq!(cgroup2_of(mounts), expected.map(PathBuf::from), "{mounts}");
        }
    }
}
