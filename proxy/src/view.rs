//! What a routing decision may look at, so that HTTP/1 heads parsed in place
//! and `http::HeaderMap` requests are decided by the same code.

use std::net::IpAddr;

/// A request as a routing decision sees it. Nothing here allocates.
pub trait RequestView {
    /// The first value of header `name`. `name` is given in lower case; field
    /// names are compared without regard to case (RFC 9110 section 5.1).
    fn header(&self, name: &str) -> Option<&[u8]>;

    /// Calls `visit` with every value of header `name`, in order.
    fn for_each_header<'a>(&'a self, name: &str, visit: &mut dyn FnMut(&'a [u8]));

    /// The first cookie called `name` (case counts) over all `Cookie` fields;
    /// HTTP/2 clients may send one field per pair (RFC 9113 section 8.2.3).
    fn cookie(&self, name: &str) -> Option<&[u8]> {
        let mut found = None;
        self.for_each_header("cookie", &mut |line| {
            if found.is_none() {
                found = cookie_in(line, name.as_bytes());
            }
        });
        found
    }

    /// Who asks: the peer, or whom a trusted peer names.
    fn client(&self) -> IpAddr;
}

/// The value of `name` in one `Cookie` field: pairs apart by `;`, a value in
/// double quotes loses them (RFC 6265 section 4.1.1).
fn cookie_in<'a>(line: &'a [u8], name: &[u8]) -> Option<&'a [u8]> {
    line.split(|byte| *byte == b';').find_map(|pair| {
        let pair = pair.trim_ascii();
        let value = pair.strip_prefix(name)?.strip_prefix(b"=")?;
        let quoted = value.strip_prefix(b"\"").and_then(|value| value.strip_suffix(b"\""));
        Some(quoted.unwrap_or(value))
    })
}

#[cfg(test)]
pub(crate) mod tests {
    use std::net::Ipv4Addr;

    use super::*;

    /// A request made of header lines.
    pub(crate) struct Lines<'a> {
        pub(crate) headers: &'a [(&'a str, &'a str)],
        pub(crate) client: IpAddr,
    }

    impl<'a> Lines<'a> {
        pub(crate) fn new(headers: &'a [(&'a str, &'a str)]) -> Lines<'a> {
            Lines { headers, client: Ipv4Addr::new(192, 0, 2, 1).into() }
        }
    }

    impl RequestView for Lines<'_> {
        fn header(&self, name: &str) -> Option<&[u8]> {
            let found = self.headers.iter().find(|(n, _)| n.eq_ignore_ascii_case(name));
            found.map(|(_, value)| value.as_bytes())
        }

        fn for_each_header<'a>(&'a self, name: &str, visit: &mut dyn FnMut(&'a [u8])) {
            for (_, value) in self.headers.iter().filter(|(n, _)| n.eq_ignore_ascii_case(name)) {
                visit(value.as_bytes());
            }
        }

        fn client(&self) -> IpAddr {
            self.client
        }
    }

    #[test]
    fn cookies_are_read_over_all_fields() {
        let cases: &[(&[(&str, &str)], &str, Option<&str>)] = &[
            (&[], "a", None),
            (&[("Cookie", "a=1")], "a", Some("1")),
            (&[("Cookie", "a=1; b=2;c=3")], "b", Some("2")),
            (&[("Cookie", "a=1; b=2;c=3")], "c", Some("3")),
            (&[("Cookie", "aa=1; a=2")], "a", Some("2")),
            (&[("Cookie", "a=1; a=2")], "a", Some("1")),
            (&[("Cookie", "x=1"), ("cookie", "a=2")], "a", Some("2")),
            (&[("Cookie", "A=1")], "a", None),
            (&[("Cookie", "a=\"q\"")], "a", Some("q")),
            (&[("Cookie", "a=\"")], "a", Some("\"")),
            (&[("Cookie", "a=b=c")], "a", Some("b=c")),
            (&[("Cookie", "a; =; ;a=")], "a", Some("")),
        ];
        for (headers, name, expected) in cases {
            let found = Lines::new(headers).cookie(name).map(|v| String::from_utf8_lossy(v).into_owned());
            assert_eq!(found.as_deref(), *expected, "{name} in {headers:?}");
        }
    }
}
