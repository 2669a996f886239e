//! Who is on the other end of a downstream connection, and what endpoints are told of it.

use std::io::Write as _;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

use ipnet::IpNet;
use smallvec::SmallVec;

use crate::certificate::Certificate;

/// A downstream connection's identity, fixed once it is accepted.
pub(crate) struct Client {
    pub(crate) peer: SocketAddr,
    /// Whether `X-Forwarded-*` from this peer is believed.
    pub(crate) trusted: bool,
    pub(crate) scheme: Scheme,
    /// Port the client connected to.
    pub(crate) port: u16,
    /// For TLS: what was asked for and what was shown, for 421.
    pub(crate) tls: Option<ClientTls>,
    /// Header lines that are the same for every request of an untrusted peer.
    block: Vec<u8>,
}

/// The TLS side of a client.
pub(crate) struct ClientTls {
    pub(crate) server_name: Option<String>,
    pub(crate) certificate: Option<Arc<Certificate>>,
    /// As `TLSv1.3`, for the access log.
    pub(crate) version: &'static str,
}

/// The scheme of a request's URL.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Scheme {
    Http,
    Https,
}

impl Scheme {
    pub(crate) fn as_str(self) -> &'static str {
        match self {
            Scheme::Http => "http",
            Scheme::Https => "https",
        }
    }
}

impl Client {
    pub(crate) fn new(
        peer: SocketAddr,
        local: SocketAddr,
        trusted: &[IpNet],
        tls: Option<ClientTls>,
    ) -> Client {
        let peer = SocketAddr::new(peer.ip().to_canonical(), peer.port());
        let scheme = if tls.is_some() { Scheme::Https } else { Scheme::Http };
        let trusted = trusted.iter().any(|net| net.contains(&peer.ip()));
        let mut client = Client { peer, trusted, scheme, port: local.port(), tls, block: Vec::new() };
        let mut block = Vec::with_capacity(192);
        client.write_lines(&mut block, peer.ip(), &[], scheme.as_str(), client.port);
        // It lives as long as the connection; the room to write it in need not.
        block.shrink_to_fit();
        client.block = block;
        client
    }

    /// What to tell the endpoint about a request whose forwarded headers are `claims`.
    pub(crate) fn forwarded<'a>(&self, claims: impl FnOnce() -> Claims<'a>) -> Forwarded<'a> {
        let peer = self.peer.ip();
        if !self.trusted {
            return Forwarded { address: peer, claims: Claims::default() };
        }
        let claims = claims();
        let address = claims.for_.last().and_then(|line| last_address(line)).unwrap_or(peer);
        Forwarded { address, claims }
    }

    /// Appends the `X-Forwarded-*` and `X-Real-IP` lines.
    pub(crate) fn write_forwarded(&self, out: &mut Vec<u8>, forwarded: &Forwarded<'_>) {
        let claims = &forwarded.claims;
        if claims.is_empty() {
            return out.extend_from_slice(&self.block);
        }
        let scheme = match claims.proto {
            Some(p) if p.eq_ignore_ascii_case(b"https") => "https",
            Some(p) if p.eq_ignore_ascii_case(b"http") => "http",
            _ => self.scheme.as_str(),
        };
        let digits = |p: &&[u8]| p.len() <= 5 && p.iter().all(u8::is_ascii_digit);
        let port = claims.port.filter(digits).and_then(|p| std::str::from_utf8(p).ok()?.parse().ok());
        self.write_lines(out, forwarded.address, &claims.for_, scheme, port.unwrap_or(self.port));
    }

    fn write_lines(&self, out: &mut Vec<u8>, real: IpAddr, chain: &[&[u8]], scheme: &str, port: u16) {
        out.extend_from_slice(b"X-Forwarded-For: ");
        for line in chain {
            out.extend_from_slice(line);
            out.extend_from_slice(b", ");
        }
        // Writing to a Vec cannot fail.
        let _ = write!(
            out,
            "{}\r\nX-Real-IP: {real}\r\nX-Forwarded-Proto: {scheme}\r\nX-Forwarded-Scheme: {scheme}\r\n\
             X-Scheme: {scheme}\r\nX-Forwarded-Port: {port}\r\n",
            self.peer.ip()
        );
    }
}

/// What a request itself says about its client; believed only from trusted peers.
#[derive(Clone, Debug, Default)]
pub(crate) struct Claims<'a> {
    /// The lines of `X-Forwarded-For` in order: together they are one list (RFC 9110 section 5.3).
    pub(crate) for_: SmallVec<[&'a [u8]; 2]>,
    pub(crate) proto: Option<&'a [u8]>,
    pub(crate) host: Option<&'a [u8]>,
    pub(crate) port: Option<&'a [u8]>,
}

impl Claims<'_> {
    fn is_empty(&self) -> bool {
        self.for_.is_empty() && self.proto.is_none() && self.host.is_none() && self.port.is_none()
    }
}

/// The believed part of [`Claims`], and the client's address that follows from it.
pub(crate) struct Forwarded<'a> {
    pub(crate) address: IpAddr,
    pub(crate) claims: Claims<'a>,
}

impl Forwarded<'_> {
    /// Whether the client used https, as far as is known.
    pub(crate) fn is_https(&self, client: &Client) -> bool {
        match self.claims.proto {
            Some(proto) => proto.eq_ignore_ascii_case(b"https"),
            None => client.scheme == Scheme::Https,
        }
    }
}

/// The last element of `X-Forwarded-For`: what the trusted peer saw itself.
fn last_address(value: &[u8]) -> Option<IpAddr> {
    let last = value.rsplit(|&b| b == b',').next()?.trim_ascii();
    let text = std::str::from_utf8(last).ok()?;
    text.parse().ok().or_else(|| text.parse::<SocketAddr>().ok().map(|a| a.ip()))
}

#[cfg(test)]
mod tests {
    use smallvec::smallvec;

    use super::*;

    fn lines(trusted: &[IpNet], claims: Claims<'_>) -> (String, IpAddr) {
        let peer = "192.0.2.7:4711".parse().unwrap();
        let client = Client::new(peer, "127.0.0.1:80".parse().unwrap(), trusted, None);
        let forwarded = client.forwarded(|| claims);
        let mut out = Vec::new();
        client.write_forwarded(&mut out, &forwarded);
        (String::from_utf8(out).unwrap(), forwarded.address)
    }

    #[test]
    fn an_untrusted_peer_speaks_for_nobody() {
        let claims =
            Claims { for_: smallvec![&b"203.0.113.9"[..]], proto: Some(b"https"), ..Claims::default() };
        let (text, address) = lines(&[], claims);
        assert!(text.starts_with("X-Forwarded-For: 192.0.2.7\r\nX-Real-IP: 192.0.2.7\r\n"), "{text}");
        assert!(text.contains("X-Forwarded-Proto: http\r\n"));
        assert_eq!(address.to_string(), "192.0.2.7");
    }

    #[test]
    fn a_trusted_peer_is_believed_and_added_to_the_chain() {
        let trusted = ["192.0.2.0/24".parse().unwrap()];
        let chain =
            ["10.9.9.9", "10.8.8.8", "10.7.7.7, 203.0.113.9"].map(str::as_bytes).into_iter().collect();
        let claims = Claims { for_: chain, proto: Some(b"https"), ..Claims::default() };
        let (text, address) = lines(&trusted, claims);
        assert!(
            text.starts_with("X-Forwarded-For: 10.9.9.9, 10.8.8.8, 10.7.7.7, 203.0.113.9, 192.0.2.7\r\n"),
            "{text}"
        );
        assert!(text.contains("X-Real-IP: 203.0.113.9\r\n"));
        assert!(text.contains("X-Forwarded-Proto: https\r\n"));
        assert_eq!(address.to_string(), "203.0.113.9");
    }
}
