//! The keys that session tickets are sealed with.
//!
//! Ours rather than the library's, whose keys cannot be passed on: a session
//! begun before an upgrade of the binary resumes after it. They go to the next
//! process over its UNIX socket ([`crate::handover`]) and nowhere else.

use std::fmt;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use aws_lc_rs::aead::{AES_256_GCM, Aad, Nonce, RandomizedNonceKey};
use aws_lc_rs::rand;
use rustls::server::ProducesTickets;
use tokio::time::Instant;

/// How long a key seals; it opens for as long again.
const ROTATION: Duration = Duration::from_secs(6 * 3600);

const NAME: usize = 16;
const SECRET: usize = 32;
const NONCE: usize = 12;

/// Bytes of a key on its way to another process: name, secret, age in seconds.
pub(crate) const EXPORTED: usize = NAME + SECRET + 8;

/// Most keys worth passing on: the current one and the one before.
pub(crate) const KEYS: usize = 2;

/// A key to pass on. Secret: it has no `Debug` of its content.
pub(crate) type Exported = [u8; EXPORTED];

/// One for all workers. Locked for a moment per ticket made or shown, never per request.
pub(crate) struct TicketKeys(Mutex<Keys>);

#[derive(Clone)]
struct Keys {
    current: Arc<Key>,
    previous: Option<Arc<Key>>,
}

struct Key {
    /// Says in a ticket which key it is; not secret.
    name: [u8; NAME],
    secret: [u8; SECRET],
    aead: RandomizedNonceKey,
    born: Instant,
}

impl TicketKeys {
    /// Fresh ones; or, if it has any that are still good, those of the process before this one.
    ///
    /// # Errors
    /// The system gives no random bytes.
    pub(crate) fn new(inherited: &[Exported]) -> Result<TicketKeys, rustls::Error> {
        let mut good = inherited.iter().filter_map(Key::import);
        let (current, previous) = match good.next() {
            Some(current) => (current, good.next()),
            None => (Key::random().ok_or(rustls::Error::FailedToGetRandomBytes)?, None),
        };
        let (current, previous) = (Arc::new(current), previous.map(Arc::new));
        Ok(TicketKeys(Mutex::new(Keys { current, previous })))
    }

    /// The keys that still open tickets, the current one first.
    pub(crate) fn export(&self) -> Vec<Exported> {
        self.good().map(|key| key.export()).collect()
    }

    fn good(&self) -> impl Iterator<Item = Arc<Key>> {
        let Keys { current, previous } = self.0.lock().unwrap_or_else(PoisonError::into_inner).clone();
        std::iter::once(current).chain(previous).filter(|key| key.is_good())
    }

    /// The key to seal with: a new one when the current one has done so for long enough.
    fn sealing(&self) -> Option<Arc<Key>> {
        let mut keys = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if keys.current.born.elapsed() >= ROTATION
            && let Some(fresh) = Key::random()
        {
            keys.previous = Some(std::mem::replace(&mut keys.current, Arc::new(fresh)));
        }
        // Without random bytes the current one serves on, as long as it is good.
        Some(keys.current.clone()).filter(|key| key.is_good())
    }
}

impl ProducesTickets for TicketKeys {
    fn enabled(&self) -> bool {
        true
    }

    fn lifetime(&self) -> u32 {
        2 * ROTATION.as_secs() as u32
    }

    fn encrypt(&self, plain: &[u8]) -> Option<Vec<u8>> {
        let key = self.sealing()?;
        let mut sealed = plain.to_vec();
        let nonce = key.aead.seal_in_place_append_tag(Aad::from(key.name), &mut sealed).ok()?;
        Some([&key.name[..], nonce.as_ref(), &sealed].concat())
    }

    fn decrypt(&self, ticket: &[u8]) -> Option<Vec<u8>> {
        let (name, rest) = ticket.split_first_chunk::<NAME>()?;
        let (nonce, sealed) = rest.split_first_chunk::<NONCE>()?;
        let key = self.good().find(|key| key.name == *name)?;
        let mut opened = sealed.to_vec();
        let length = key.aead.open_in_place(Nonce::from(nonce), Aad::from(name), &mut opened).ok()?.len();
        opened.truncate(length);
        Some(opened)
    }
}

impl fmt::Debug for TicketKeys {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("TicketKeys")
    }
}

impl Key {
    fn new(name: [u8; NAME], secret: [u8; SECRET], born: Instant) -> Option<Key> {
        let aead = RandomizedNonceKey::new(&AES_256_GCM, &secret).ok()?;
        Some(Key { name, secret, aead, born })
    }

    fn random() -> Option<Key> {
        let (mut name, mut secret) = ([0; NAME], [0; SECRET]);
        rand::fill(&mut name).ok()?;
        rand::fill(&mut secret).ok()?;
        Key::new(name, secret, Instant::now())
    }

    fn is_good(&self) -> bool {
        self.born.elapsed() < 2 * ROTATION
    }

    fn export(&self) -> Exported {
        let mut bytes = [0; EXPORTED];
        let (name, rest) = bytes.split_at_mut(NAME);
        let (secret, age) = rest.split_at_mut(SECRET);
        name.copy_from_slice(&self.name);
        secret.copy_from_slice(&self.secret);
        age.copy_from_slice(&self.born.elapsed().as_secs().to_be_bytes());
        bytes
    }

    /// `None` for one too old to be of use.
    fn import(bytes: &Exported) -> Option<Key> {
        let (name, rest) = bytes.split_first_chunk()?;
        let (secret, age) = rest.split_first_chunk()?;
        let age = Duration::from_secs(u64::from_be_bytes(age.try_into().ok()?));
        if age >= 2 * ROTATION {
            return None;
        }
        // A machine younger than the key cannot say when it was born: then it is as old as can be said.
        let now = Instant::now();
        Key::new(*name, *secret, now.checked_sub(age).unwrap_or(now))
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

    use super::*;

    fn aged(exported: &Exported, seconds: u64) -> Exported {
        let mut exported = *exported;
        exported[NAME + SECRET..].copy_from_slice(&seconds.to_be_bytes());
        exported
    }

    #[test]
    fn a_ticket_opens_with_its_key_and_no_other() {
        let keys = TicketKeys::new(&[]).unwrap();
        let ticket = keys.encrypt(b"session").unwrap();
        assert_eq!(keys.decrypt(&ticket).unwrap(), b"session");
        assert_ne!(keys.encrypt(b"session").unwrap(), ticket, "the nonce differs each time");
        for at in 0..ticket.len() {
            let mut forged = ticket.clone();
            forged[at] ^= 1;
            assert_eq!(keys.decrypt(&forged), None, "byte {at}");
            assert_eq!(keys.decrypt(&ticket[..at]), None, "cut at {at}");
        }
        assert_eq!(TicketKeys::new(&[]).unwrap().decrypt(&ticket), None);
    }

    #[test]
    fn keys_passed_on_open_what_was_sealed_before_and_keep_their_age() {
        let first = TicketKeys::new(&[]).unwrap();
        let ticket = first.encrypt(b"session").unwrap();
        let exported = first.export();
        let hour = 3600;
        // Age in hours; whether it still opens; whether it still seals.
        for (age, opens, seals) in [(0, true, true), (5, true, true), (7, true, false), (12, false, false)] {
            let next = TicketKeys::new(&[aged(&exported[0], age * hour)]).unwrap();
            let made = next.encrypt(b"another").unwrap();
            assert_eq!(next.decrypt(&ticket).is_some(), opens, "{age} h");
            assert_eq!(first.decrypt(&made).is_some(), seals, "{age} h");
            assert_eq!(next.decrypt(&made).unwrap(), b"another");
        }
        // Both that matter are passed on, along any chain.
        let second = TicketKeys::new(&[aged(&exported[0], 7 * hour)]).unwrap();
        second.encrypt(b"").unwrap();
        assert_eq!(second.export().len(), KEYS);
        assert!(TicketKeys::new(&second.export()).unwrap().decrypt(&ticket).is_some());
    }

    #[test]
    fn debug_shows_no_key() {
        assert_eq!(format!("{:?}", TicketKeys::new(&[]).unwrap()), "TicketKeys");
    }
}
