//! The commands of bpf(2) that aya has no function for: batches, opening a pin as a plain descriptor, exchanging a
//! link's program. One function for each, over descriptors and slices of [`Plain`] values.

use std::ffi::CString;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use lockgate_ebpf_common::{
    Affinity, AffinityKey, Allowed, Endpoint, Flow, FlowKey, Frontend, FrontendKey, Service, Settings, Slot,
    SourceRange,
};

pub mod namespace;

/// A value that the kernel may read and write as bytes.
///
/// # Safety
/// The type has no padding, and every pattern of bits is a valid value of it.
pub unsafe trait Plain: Copy + 'static {}

macro_rules! plain {
    ($($name:ty),+ $(,)?) => { $(
        // SAFETY: integers and arrays of them; lockgate-ebpf-common asserts the size, which leaves no padding.
        unsafe impl Plain for $name {}
    )+ };
}
plain!(u8, u32, u64, [u8; 16]);
plain!(Affinity, AffinityKey, Allowed, Endpoint, Frontend, FrontendKey, Service, Settings, Slot, SourceRange);
plain!(Flow, FlowKey, Prefixed<SourceRange>);

/// A key of an LPM trie.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Prefixed<T> {
    /// Bits of `data` that count, from the first.
    pub prefix_length: u32,
    /// What is compared.
    pub data: T,
}

const _: () = assert!(size_of::<Prefixed<SourceRange>>() == 24);

/// What the kernel says of a map.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct MapInfo {
    /// `BPF_MAP_TYPE_*`.
    pub kind: u32,
    /// Number of this map in the kernel.
    pub id: u32,
    /// Bytes of a key.
    pub key_size: u32,
    /// Bytes of a value.
    pub value_size: u32,
    /// Room.
    pub max_entries: u32,
}

/// Commands, as `enum bpf_cmd` numbers them.
mod command {
    pub(super) const MAP_LOOKUP_ELEM: u32 = 1;
    pub(super) const MAP_UPDATE_ELEM: u32 = 2;
    pub(super) const OBJ_PIN: u32 = 6;
    pub(super) const OBJ_GET: u32 = 7;
    pub(super) const OBJ_GET_INFO_BY_FD: u32 = 15;
    pub(super) const MAP_LOOKUP_BATCH: u32 = 24;
    pub(super) const MAP_UPDATE_BATCH: u32 = 26;
    pub(super) const MAP_DELETE_BATCH: u32 = 27;
    pub(super) const LINK_CREATE: u32 = 28;
    pub(super) const LINK_UPDATE: u32 = 29;
    pub(super) const LINK_DETACH: u32 = 34;
}

/// Opens what is pinned at `path`: a map, a program or a link.
pub fn open_pin(path: &Path) -> io::Result<OwnedFd> {
    let path = CString::new(path.as_os_str().as_bytes())?;
    let mut attributes = Object { path: path.as_ptr() as u64, descriptor: 0, flags: 0 };
    // SAFETY: the path is a C string that lives until after the call, which only reads it.
    let descriptor = unsafe { bpf(command::OBJ_GET, &mut attributes) }?;
    // SAFETY: the kernel made this descriptor for us just now; nobody else has it.
    Ok(unsafe { OwnedFd::from_raw_fd(descriptor) })
}

/// Pins a map, a program or a link at `path`, which must not exist, in a bpf file system.
pub fn pin(object: BorrowedFd<'_>, path: &Path) -> io::Result<()> {
    let path = CString::new(path.as_os_str().as_bytes())?;
    let mut attributes =
        Object { path: path.as_ptr() as u64, descriptor: object.as_raw_fd() as u32, flags: 0 };
    // SAFETY: the path is a C string that lives until after the call, which only reads it.
    unsafe { bpf(command::OBJ_PIN, &mut attributes) }.map(drop)
}

/// What the kernel says of the map.
pub fn map_info(map: BorrowedFd<'_>) -> io::Result<MapInfo> {
    #[repr(C)]
    struct Attributes {
        descriptor: u32,
        length: u32,
        info: u64,
    }
    let mut info = MapInfo::default();
    let mut attributes = Attributes {
        descriptor: map.as_raw_fd() as u32,
        length: size_of::<MapInfo>() as u32,
        info: (&raw mut info) as u64,
    };
    // SAFETY: the kernel writes at most `length` bytes, which is what `info` has; integers only.
    unsafe { bpf(command::OBJ_GET_INFO_BY_FD, &mut attributes) }?;
    Ok(info)
}

/// Writes `values` below `keys`, which are as many; returns how many were written before an error, and the error.
/// One system call.
pub fn update_batch<K: Plain, V: Plain>(
    map: BorrowedFd<'_>,
    keys: &[K],
    values: &[V],
) -> Result<(), (usize, io::Error)> {
    assert_eq!(keys.len(), values.len(), "one value for each key");
    batch(map, command::MAP_UPDATE_BATCH, keys, values.as_ptr() as u64)
}

/// Removes `keys`. A missing one ends it with `ENOENT`: the count says which.
pub fn delete_batch<K: Plain>(map: BorrowedFd<'_>, keys: &[K]) -> Result<(), (usize, io::Error)> {
    batch(map, command::MAP_DELETE_BATCH, keys, 0)
}

/// Every element of a hash or a trie. Nobody else may write meanwhile, else some are missed or seen twice.
pub fn dump<K: Plain, V: Plain>(map: BorrowedFd<'_>) -> io::Result<Vec<(K, V)>> {
    let room = map_info(map)?.max_entries as usize;
    let mut all = Vec::new();
    // A hash keeps its place in 4 bytes, a trie in a key.
    const { assert!(size_of::<K>() <= size_of::<[u64; 8]>()) };
    let mut position = [0_u64; 8];
    let mut started = false;
    // Larger than any bucket is likely to be; ENOSPC says that one was larger still.
    let mut step = 4096.min(room.max(1));
    loop {
        let mut keys: Vec<K> = Vec::with_capacity(step);
        let mut values: Vec<V> = Vec::with_capacity(step);
        let mut next = [0_u64; 8];
        let mut attributes = Batch {
            in_batch: if started { (&raw mut position) as u64 } else { 0 },
            out_batch: (&raw mut next) as u64,
            keys: keys.as_mut_ptr() as u64,
            values: values.as_mut_ptr() as u64,
            count: step as u32,
            map: map.as_raw_fd() as u32,
            element_flags: 0,
            flags: 0,
        };
        // SAFETY: both vectors have room for `count` elements of the map's sizes, which the caller compared;
        // position and next have room for what the kernel keeps its place in.
        let result = unsafe { bpf(command::MAP_LOOKUP_BATCH, &mut attributes) };
        let ended = match result {
            Ok(_) => false,
            Err(error) if error.raw_os_error() == Some(libc::ENOENT) => true,
            Err(error) if error.raw_os_error() == Some(libc::ENOSPC) && step < room => {
                step = (step * 2).min(room);
                continue;
            }
            Err(error) => return Err(error),
        };
        let count = (attributes.count as usize).min(step);
        // SAFETY: the kernel has written so many of each, and every pattern of bits is valid.
        unsafe {
            keys.set_len(count);
            values.set_len(count);
        }
        all.extend(keys.into_iter().zip(values));
        if ended {
            return Ok(all);
        }
        position = next;
        started = true;
    }
}

/// Writes one value.
pub fn update<K: Plain, V: Plain>(map: BorrowedFd<'_>, key: &K, value: &V) -> io::Result<()> {
    let mut attributes = Element::new(map, key, (&raw const *value) as u64);
    // SAFETY: key and value have the map's sizes, which the caller compared, and live until after the call.
    unsafe { bpf(command::MAP_UPDATE_ELEM, &mut attributes) }.map(drop)
}

/// The value below `key` on each CPU the machine could have; `cpus` of them.
pub fn lookup_each_cpu(map: BorrowedFd<'_>, key: u32, cpus: usize) -> io::Result<Vec<u64>> {
    let mut values = vec![0_u64; cpus];
    let mut attributes = Element::new(map, &key, values.as_mut_ptr() as u64);
    // SAFETY: a per-CPU map writes its value once for each possible CPU, rounded up to 8 bytes: the vector's room.
    unsafe { bpf(command::MAP_LOOKUP_ELEM, &mut attributes) }?;
    Ok(values)
}

/// A place at a network device where programs run (tcx).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DeviceHook {
    /// What the device received. Before other programs there.
    Ingress,
    /// What it will send. After other programs there.
    Egress,
}

/// Attaches a program to the device with this index, until the link it returns is closed and not pinned. `ENODEV`:
/// there is no such device in this network namespace.
pub fn attach_to_device(program: BorrowedFd<'_>, device: u32, hook: DeviceHook) -> io::Result<OwnedFd> {
    #[repr(C)]
    struct Attributes {
        program: u32,
        device: u32,
        kind: u32,
        flags: u32,
        relative: u32,
        zero: u32,
        revision: u64,
    }
    const BEFORE: u32 = 1 << 3;
    const AFTER: u32 = 1 << 4;
    let (kind, flags) = match hook {
        DeviceHook::Ingress => (46, BEFORE),
        DeviceHook::Egress => (47, AFTER),
    };
    let program = program.as_raw_fd() as u32;
    let mut attributes = Attributes { program, device, kind, flags, relative: 0, zero: 0, revision: 0 };
    // SAFETY: numbers only; the kernel judges them.
    let link = unsafe { bpf(command::LINK_CREATE, &mut attributes) }?;
    // SAFETY: the kernel made this descriptor for us just now; nobody else has it.
    Ok(unsafe { OwnedFd::from_raw_fd(link) })
}

/// Exchanges the program behind a link: from one event to the next, the new one runs.
pub fn update_link(link: BorrowedFd<'_>, program: BorrowedFd<'_>) -> io::Result<()> {
    #[repr(C)]
    struct Attributes {
        link: u32,
        program: u32,
        flags: u32,
        old_program: u32,
    }
    let mut attributes = Attributes {
        link: link.as_raw_fd() as u32,
        program: program.as_raw_fd() as u32,
        flags: 0,
        old_program: 0,
    };
    // SAFETY: descriptors only; the kernel judges them.
    unsafe { bpf(command::LINK_UPDATE, &mut attributes) }.map(drop)
}

/// Ends a link: its hook does not run any more, who ever still holds it. That of a cgroup or device which has gone
/// is at its end already.
pub fn detach_link(link: BorrowedFd<'_>) -> io::Result<()> {
    let mut link = link.as_raw_fd() as u32;
    // SAFETY: a descriptor only; the kernel judges it.
    unsafe { bpf(command::LINK_DETACH, &mut link) }.map(drop)
}

#[repr(C)]
struct Object {
    path: u64,
    descriptor: u32,
    flags: u32,
}

#[repr(C)]
struct Element {
    map: u32,
    zero: u32,
    key: u64,
    value: u64,
    flags: u64,
}

impl Element {
    fn new<K: Plain>(map: BorrowedFd<'_>, key: &K, value: u64) -> Self {
        Self { map: map.as_raw_fd() as u32, zero: 0, key: (&raw const *key) as u64, value, flags: 0 }
    }
}

#[repr(C)]
struct Batch {
    in_batch: u64,
    out_batch: u64,
    keys: u64,
    values: u64,
    count: u32,
    map: u32,
    element_flags: u64,
    flags: u64,
}

fn batch<K: Plain>(
    map: BorrowedFd<'_>,
    command: u32,
    keys: &[K],
    values: u64,
) -> Result<(), (usize, io::Error)> {
    if keys.is_empty() {
        return Ok(());
    }
    let mut attributes = Batch {
        in_batch: 0,
        out_batch: 0,
        keys: keys.as_ptr() as u64,
        values,
        count: keys.len() as u32,
        map: map.as_raw_fd() as u32,
        element_flags: 0,
        flags: 0,
    };
    // SAFETY: keys and values have the map's sizes, which the caller compared, are as many as said, and live
    // until after the call, which only reads them.
    match unsafe { bpf(command, &mut attributes) } {
        Ok(_) => Ok(()),
        // The kernel says how far it came.
        Err(error) => Err(((attributes.count as usize).min(keys.len()), error)),
    }
}

/// # Safety
/// `attributes` are those of `command`: each address in them holds what the kernel will read or write there.
unsafe fn bpf<A>(command: u32, attributes: &mut A) -> io::Result<i32> {
    // SAFETY: the kernel reads and writes at most the size it is told, which is that of `attributes`; the rest is
    // the caller's promise.
    let result = unsafe { libc::syscall(libc::SYS_bpf, command, &raw mut *attributes, size_of::<A>()) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(result as i32) }
}
