//! Header fields a proxy treats specially, recognised by length and letters.

/// What a header field is to us.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Field {
    /// Nothing special: forwarded as it is.
    Other,
    Host,
    Connection,
    ContentLength,
    TransferEncoding,
    Upgrade,
    Expect,
    /// `TE`: only `trailers` means anything to us.
    Te,
    /// Ends at this hop: Keep-Alive, Proxy-Connection, HTTP2-Settings, and `Proxy`,
    /// which CGI servers mistake for their own environment (httpoxy).
    HopByHop,
    /// Speaks of the client on behalf of a proxy in front: believed only from trusted peers.
    Forwarded,
    XForwardedFor,
    XForwardedProto,
    XForwardedHost,
    XForwardedPort,
    XRequestId,
    UserAgent,
    Referer,
}

/// Recognises a field by its name, ignoring case. A CGI-style server takes an
/// underscore and a hyphen for the same: a variant of a field we speak for is
/// dropped, and believed from nobody, as a trusted proxy in front may pass a
/// client's on without a look.
pub(crate) fn classify(name: &[u8]) -> Field {
    let is = |candidate: &[u8]| name.eq_ignore_ascii_case(candidate);
    match name.len() {
        2 if is(b"te") => Field::Te,
        4 if is(b"host") => Field::Host,
        5 if is(b"proxy") => Field::HopByHop,
        6 if is(b"expect") => Field::Expect,
        7 if is(b"upgrade") => Field::Upgrade,
        7 if is(b"referer") => Field::Referer,
        8 if alike(name, b"x-scheme") => Field::Forwarded,
        9 if is(b"forwarded") || alike(name, b"x-real-ip") => Field::Forwarded,
        10 if is(b"connection") => Field::Connection,
        10 if is(b"keep-alive") => Field::HopByHop,
        10 if is(b"user-agent") => Field::UserAgent,
        12 if is(b"x-request-id") => Field::XRequestId,
        12 if alike(name, b"x-request-id") => Field::Forwarded,
        14 if is(b"content-length") => Field::ContentLength,
        14 if alike(name, b"content-length") => Field::HopByHop,
        14 if is(b"http2-settings") => Field::HopByHop,
        15 if is(b"x-forwarded-for") => Field::XForwardedFor,
        15 if alike(name, b"x-forwarded-for") => Field::Forwarded,
        16 if is(b"proxy-connection") => Field::HopByHop,
        16 if is(b"x-forwarded-host") => Field::XForwardedHost,
        16 if is(b"x-forwarded-port") => Field::XForwardedPort,
        16 if alike(name, b"x-forwarded-host") || alike(name, b"x-forwarded-port") => Field::Forwarded,
        17 if is(b"transfer-encoding") => Field::TransferEncoding,
        17 if alike(name, b"transfer-encoding") => Field::HopByHop,
        17 if is(b"x-forwarded-proto") => Field::XForwardedProto,
        17 if alike(name, b"x-forwarded-proto") => Field::Forwarded,
        18 if alike(name, b"x-forwarded-scheme") => Field::Forwarded,
        24 if alike(name, b"x-original-forwarded-for") => Field::Forwarded,
        _ => Field::Other,
    }
}

fn alike(name: &[u8], candidate: &[u8]) -> bool {
    let fold = |b: u8| if b == b'_' { b'-' } else { b.to_ascii_lowercase() };
    name.iter().zip(candidate).all(|(&a, &b)| fold(a) == b)
}

/// The elements of a comma-separated list, trimmed, empty ones left out (RFC 9110 section 5.6.1).
pub(crate) fn tokens(list: &[u8]) -> impl Iterator<Item = &[u8]> {
    list.split(|&b| b == b',').map(<[u8]>::trim_ascii).filter(|t| !t.is_empty())
}

/// `token` of RFC 9110 section 5.6.2.
pub(crate) fn is_token(bytes: &[u8]) -> bool {
    !bytes.is_empty() && bytes.iter().all(|b| b.is_ascii_alphanumeric() || b"!#$%&'*+-.^_`|~".contains(b))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn recognises_regardless_of_case() {
        for (name, field) in [
            ("Host", Field::Host),
            ("CONNECTION", Field::Connection),
            ("Transfer-Encoding", Field::TransferEncoding),
            ("content-length", Field::ContentLength),
            ("Proxy", Field::HopByHop),
            ("X-Forwarded-For", Field::XForwardedFor),
            ("X_Forwarded_For", Field::Forwarded),
            ("X-Forwarded_Proto", Field::Forwarded),
            ("X_Real_IP", Field::Forwarded),
            ("X_Request_Id", Field::Forwarded),
            ("Content_Length", Field::HopByHop),
            ("Transfer_Encoding", Field::HopByHop),
            ("x-real-ip", Field::Forwarded),
            ("Accept", Field::Other),
            ("Hos", Field::Other),
        ] {
            assert_eq!(classify(name.as_bytes()), field, "{name}");
        }
    }

    #[test]
    fn list_elements_are_trimmed() {
        let all: Vec<_> = tokens(b" a ,, b\t,").collect();
        assert_eq!(all, [b"a", b"b"]);
    }
}
