//! Messages over a UNIX stream, some with file descriptors beside them.
//!
//! A message is its kind (1 byte), the length of what follows (4 bytes, big
//! endian) and that. Descriptors travel beside the first byte (`SCM_RIGHTS`).

use std::collections::VecDeque;
use std::io::{self, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;

use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, recvmsg, sendmsg,
};
use tokio::io::Interest;
use tokio::net::UnixStream;

use crate::tls::tickets::{EXPORTED, Exported, KEYS};

use super::sockets::Named;
use super::{HandoverError, StepError};

/// Changes whenever a message changes.
const VERSION: u16 = 1;

/// What a greeting begins with, whatever the version.
const MAGIC: &[u8] = b"lockgate handover ";

/// Descriptors beside one message; the kernel takes 253.
pub(super) const BATCH: usize = 64;

/// Sockets of one process: 1,024 workers with 32 addresses each.
pub(super) const SOCKETS: usize = 32 << 10;

/// Bytes of a message after its length; a batch of sockets with the longest names fits.
const LENGTH: usize = 32 << 10;

const HEAD: usize = 5;

/// What the two processes say to each other.
pub(super) enum Message {
    Hello,
    Offer {
        tickets: Vec<Exported>,
        sockets: usize,
    },
    Sockets(Vec<(Arc<str>, OwnedFd)>),
    Ready,
    Agreed,
    Taken,
    /// In words.
    Refused(String),
}

/// One end of the connection.
pub(super) struct Wire {
    stream: UnixStream,
    /// Received beside bytes that were received, in order.
    descriptors: VecDeque<OwnedFd>,
}

impl Wire {
    pub(super) fn new(stream: UnixStream) -> Wire {
        Wire { stream, descriptors: VecDeque::new() }
    }

    /// Sends anything but sockets.
    pub(super) async fn send(&mut self, message: &Message) -> io::Result<()> {
        let mut body = Vec::new();
        let kind = match message {
            Message::Hello => {
                body.extend_from_slice(MAGIC);
                body.extend_from_slice(&VERSION.to_be_bytes());
                b'H'
            }
            Message::Offer { tickets, sockets } => {
                body.extend_from_slice(&(*sockets as u32).to_be_bytes());
                tickets.iter().for_each(|key| body.extend_from_slice(key));
                b'O'
            }
            Message::Ready => b'R',
            Message::Agreed => b'A',
            Message::Taken => b'T',
            Message::Refused(why) => {
                body.extend_from_slice(why.as_bytes());
                b'N'
            }
            Message::Sockets(_) => return Err(io::ErrorKind::InvalidInput.into()),
        };
        self.write(kind, &body, &[]).await
    }

    /// Sends at most [`BATCH`] sockets.
    pub(super) async fn send_sockets(&mut self, sockets: &[Named]) -> io::Result<()> {
        let mut body = Vec::new();
        for (name, _) in sockets {
            // `Sockets::keep` has seen to the length.
            body.push(name.len() as u8);
            body.extend_from_slice(name.as_bytes());
        }
        let descriptors: Vec<_> = sockets.iter().map(|(_, socket)| socket.as_fd()).collect();
        self.write(b'S', &body, &descriptors).await
    }

    async fn write(&mut self, kind: u8, body: &[u8], descriptors: &[BorrowedFd<'_>]) -> io::Result<()> {
        let mut bytes = vec![kind];
        bytes.extend_from_slice(&(body.len() as u32).to_be_bytes());
        bytes.extend_from_slice(body);
        let mut sent = 0;
        while sent < bytes.len() {
            let beside = if sent == 0 { descriptors } else { &[] };
            let sending = || {
                let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(BATCH))];
                let mut control = SendAncillaryBuffer::new(&mut space);
                if !beside.is_empty() && !control.push(SendAncillaryMessage::ScmRights(beside)) {
                    return Err(io::ErrorKind::InvalidInput.into());
                }
                let parts = [IoSlice::new(&bytes[sent..])];
                Ok(sendmsg(&self.stream, &parts, &mut control, SendFlags::NOSIGNAL)?)
            };
            sent += self.stream.async_io(Interest::WRITABLE, sending).await?;
        }
        Ok(())
    }

    /// The next message.
    pub(super) async fn receive(&mut self) -> Result<Message, StepError> {
        let mut head = [0; HEAD];
        self.fill(&mut head).await?;
        let [kind, length @ ..] = head;
        let length = u32::from_be_bytes(length) as usize;
        if length > LENGTH {
            return Err(HandoverError::Protocol("a message is too long").into());
        }
        let mut body = vec![0; length];
        self.fill(&mut body).await?;
        let message = match (kind, body.is_empty()) {
            (b'H', _) => hello(&body)?,
            (b'O', _) => offer(&body).ok_or(HandoverError::Protocol("the offer is malformed"))?,
            (b'S', _) => {
                self.sockets(&body).ok_or(HandoverError::Protocol("names and sockets do not match"))?
            }
            (b'R', true) => Message::Ready,
            (b'A', true) => Message::Agreed,
            (b'T', true) => Message::Taken,
            (b'N', _) => Message::Refused(String::from_utf8_lossy(&body).escape_debug().collect()),
            _ => return Err(HandoverError::Protocol("a message is unknown").into()),
        };
        match self.descriptors.is_empty() {
            true => Ok(message),
            false => Err(HandoverError::Protocol("there are more sockets than names").into()),
        }
    }

    /// As many sockets as names, one after the other.
    fn sockets(&mut self, mut names: &[u8]) -> Option<Message> {
        let mut sockets = Vec::new();
        while let Some((&length, rest)) = names.split_first() {
            let (name, rest) = rest.split_at_checked(usize::from(length))?;
            sockets.push((std::str::from_utf8(name).ok()?.into(), self.descriptors.pop_front()?));
            names = rest;
        }
        Some(Message::Sockets(sockets))
    }

    async fn fill(&mut self, mut room: &mut [u8]) -> Result<(), StepError> {
        let Wire { stream, descriptors } = self;
        while !room.is_empty() {
            let receiving = || {
                let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(BATCH))];
                let mut control = RecvAncillaryBuffer::new(&mut space);
                let parts = &mut [IoSliceMut::new(room)];
                let received = recvmsg(&*stream, parts, &mut control, RecvFlags::CMSG_CLOEXEC)?;
                for beside in control.drain() {
                    if let RecvAncillaryMessage::ScmRights(more) = beside {
                        descriptors.extend(more);
                    }
                }
                if received.flags.contains(ReturnFlags::CTRUNC) {
                    return Err(io::Error::other("not all sockets arrived; raise the limit on open files"));
                }
                Ok(received.bytes)
            };
            let n = stream.async_io(Interest::READABLE, receiving).await?;
            if n == 0 {
                return Err(io::Error::from(io::ErrorKind::UnexpectedEof).into());
            }
            if descriptors.len() > BATCH {
                return Err(HandoverError::Protocol("there are too many sockets in a message").into());
            }
            room = &mut room[n..];
        }
        Ok(())
    }
}

fn hello(body: &[u8]) -> Result<Message, HandoverError> {
    let version = body.strip_prefix(MAGIC).and_then(|version| version.try_into().ok());
    match version.map(u16::from_be_bytes) {
        Some(VERSION) => Ok(Message::Hello),
        Some(other) => Err(HandoverError::Refused(format!(
            "it speaks version {other} of the handover, the running process version {VERSION}: \
             stop the running process, then start the new one"
        ))),
        None => Err(HandoverError::Protocol("the greeting is not ours")),
    }
}

fn offer(body: &[u8]) -> Option<Message> {
    let (sockets, keys) = body.split_first_chunk()?;
    let sockets = u32::from_be_bytes(*sockets) as usize;
    let (tickets, rest) = keys.as_chunks::<EXPORTED>();
    let is_sound = rest.is_empty() && tickets.len() <= KEYS && sockets <= SOCKETS;
    is_sound.then(|| Message::Offer { tickets: tickets.to_vec(), sockets })
}
