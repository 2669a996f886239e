//! Which endpoint? Reads a set's word once, and its run; see the protocol in `lockgate_ebpf_common`.

use core::arch::asm;

use aya_ebpf::helpers::generated::{bpf_get_prandom_u32, bpf_ktime_get_boot_ns};
use lockgate_ebpf_common::{
    Address, Affinity, AffinityKey, Endpoint, Event, Service, SetWord, Slot, algorithm, endpoint, service,
};

use crate::frontend::{Use, Words};
use crate::maps::{AFFINITY, ENDPOINTS, SERVICES, SLOTS, count};

/// How often a run that was overwritten while it was read is read again. Once is rare: the writer leaves a
/// run alone for a grace period, which ends after this program does.
const REREADS: u32 = 4;

/// What becomes of a client.
#[must_use]
pub enum Choice {
    /// It goes to this endpoint.
    Endpoint(Chosen),
    /// It is refused.
    Refuse,
    /// It gets no answer.
    Silence,
}

/// An endpoint as it was when it was chosen.
#[derive(Clone, Copy)]
pub struct Chosen {
    /// Its address.
    pub address: Words,
    /// Its port; network byte order.
    pub port: [u8; 2],
    /// Its index in `ENDPOINTS`.
    pub index: u32,
    /// Its generation.
    pub generation: u32,
}

/// Chooses an endpoint of `used` for `client`, from the local set if `local`.
#[inline(always)]
pub fn choose(used: &Use, local: bool, client: &Address, client_hash: u32) -> Choice {
    if used.flags & service::AFFINITY == 0 {
        return pick(used, local, client_hash);
    }
    let set = set_flag(local);
    let key = AffinityKey { client: *client, service: used.index, generation: used.generation, set, zero: 0 };
    // SAFETY: reads the clock.
    let now = unsafe { bpf_ktime_get_boot_ns() };
    if let Some(chosen) = remembered(&key, used, now) {
        count(Event::Affinity);
        return Choice::Endpoint(chosen);
    }
    let choice = pick(used, local, client_hash);
    if let Choice::Endpoint(chosen) = &choice {
        let value = Affinity { last_used: now, endpoint: chosen.index, generation: chosen.generation };
        if AFFINITY.insert(&key, &value, 0).is_err() {
            count(Event::MapFull);
        }
    }
    choice
}

/// The endpoint with this index, if it still is the one of `generation` and in `set`.
#[inline(always)]
pub fn still(index: u32, generation: u32, set: u8) -> Option<Chosen> {
    let at = ENDPOINTS.get_ptr(index)?;
    // SAFETY: the verifier knows the pointer as a value of the map; a byte is read whole.
    let sets = unsafe { (&raw const (*at).sets).read_volatile() };
    if sets & set == 0 {
        return None;
    }
    let chosen = read(at, index);
    (chosen.generation == generation).then_some(chosen)
}

/// The flag of [`Endpoint::sets`] for a set.
#[inline(always)]
pub fn set_flag(local: bool) -> u8 {
    if local { endpoint::LOCAL } else { endpoint::CLUSTER }
}

#[inline(always)]
fn remembered(key: &AffinityKey, used: &Use, now: u64) -> Option<Chosen> {
    let value = AFFINITY.get_ptr_mut(key)?;
    // SAFETY: the verifier knows the pointers as values of their maps. An element of an LRU map may become
    // another client's while it is held: then a foreign endpoint is kept for this one connection, which
    // `still` has found to be alive, of a set with that flag; or a foreign client is remembered longer.
    let (last_used, index, generation, seconds) = unsafe {
        (
            (&raw const (*value).last_used).read_volatile(),
            (&raw const (*value).endpoint).read_volatile(),
            (&raw const (*value).generation).read_volatile(),
            (&raw const (*used.service).affinity_timeout).read_volatile(),
        )
    };
    if now.wrapping_sub(last_used) >= u64::from(seconds) * 1_000_000_000 {
        return None;
    }
    let chosen = still(index, generation, key.set)?;
    // SAFETY: as above.
    unsafe { (&raw mut (*value).last_used).write_volatile(now) };
    Some(chosen)
}

#[inline(always)]
fn pick(used: &Use, local: bool, client_hash: u32) -> Choice {
    let mut tries = 0;
    while tries < REREADS {
        let word = word(used.service, local);
        let size = u32::from(word.count());
        if size == 0 {
            if word.base() == SetWord::EMPTY_DROP {
                count(Event::NoLocalEndpoint);
                return Choice::Silence;
            }
            count(Event::NoEndpoint);
            return Choice::Refuse;
        }
        let Some(at) = SLOTS.get_ptr(word.base() + place(used, size, client_hash)) else { break };
        // SAFETY: the verifier knows the pointer as a value of the map. One aligned load: both halves are of
        // one store.
        let slot = unsafe { at.cast::<u64>().read_volatile() };
        let (index, owner) = halves(slot);
        if owner == Slot::owner_of(used.index, local, word) {
            let Some(at) = ENDPOINTS.get_ptr(index) else { break };
            count(Event::Balanced);
            return Choice::Endpoint(read(at, index));
        }
        count(Event::Reread);
        tries += 1;
    }
    count(Event::Torn);
    Choice::Refuse
}

/// Where in a run of `size` slots: below `size`.
#[inline(always)]
fn place(used: &Use, size: u32, client_hash: u32) -> u32 {
    // SAFETY: the verifier knows the pointer as a value of the map; a byte is read whole.
    let way = unsafe { (&raw const (*used.service).algorithm).read_volatile() };
    match way {
        algorithm::SOURCE_HASH => client_hash % size,
        algorithm::ROUND_ROBIN => turn(used.index) % size,
        // SAFETY: draws a number. The product's upper half is below `size`, without a division.
        _ => ((u64::from(unsafe { bpf_get_prandom_u32() }) * u64::from(size)) >> 32) as u32,
    }
}

#[inline(always)]
fn turn(index: u32) -> u32 {
    let Some(service) = SERVICES.get_ptr_mut(index) else { return 0 };
    let mut turn = 1_u32;
    // SAFETY: the verifier knows the pointer as a value of the map; user space writes the field only before
    // a frontend names the Service, so all that use it now use it atomically. The instruction is the v3 one
    // that also returns what was there; core's atomics have it for no size on this target.
    unsafe {
        asm!(
            "{turn} = atomic_fetch_add((u32 *)({at} + 0), {turn})",
            turn = inout(wreg) turn,
            at = in(reg) &raw mut (*service).turn,
            options(nostack),
        );
    }
    turn
}

#[inline(always)]
fn word(service: *const Service, local: bool) -> SetWord {
    // SAFETY: the verifier knows the pointer as a value of the map; one aligned load, as the writer stores it.
    unsafe {
        let at = if local { &raw const (*service).local } else { &raw const (*service).cluster };
        SetWord(at.cast::<u64>().read_volatile())
    }
}

#[inline(always)]
fn read(at: *const Endpoint, index: u32) -> Chosen {
    // SAFETY: the verifier knows the pointer as a value of the map. Address and port do not change while a
    // slot or an affinity with this generation can be read.
    unsafe {
        let address = (&raw const (*at).address).cast::<Words>();
        Chosen {
            address: [(*address)[0], (*address)[1], (*address)[2], (*address)[3]],
            port: (*at).port,
            index,
            generation: (&raw const (*at).generation).read_volatile(),
        }
    }
}

/// [`Slot::endpoint`] and [`Slot::owner`] of a slot loaded at once.
#[inline(always)]
fn halves(slot: u64) -> (u32, u32) {
    if cfg!(target_endian = "little") {
        (slot as u32, (slot >> 32) as u32)
    } else {
        ((slot >> 32) as u32, slot as u32)
    }
}
