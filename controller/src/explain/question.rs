//! The request that is asked about.

use std::net::IpAddr;

/// A request as far as routing looks at it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Question {
    pub(crate) method: String,
    pub(crate) https: bool,
    /// Lower case, without port and trailing dot.
    pub(crate) host: String,
    /// As a client would send it, without the query.
    pub(crate) path: String,
    pub(crate) query: Option<String>,
    /// Names in lower case.
    pub(crate) headers: Vec<(String, String)>,
}

impl Question {
    /// Reads `https://host/path?query` (`http` when no scheme is given) and
    /// headers as curl takes them. A `Host` header stands in for the URL's host.
    pub(crate) fn new(url: &str, method: &str, headers: &[String]) -> Result<Question, String> {
        let (https, rest) = match url.split_once("://") {
            Some((scheme, rest)) if scheme.eq_ignore_ascii_case("https") => (true, rest),
            Some((scheme, rest)) if scheme.eq_ignore_ascii_case("http") => (false, rest),
            Some((scheme, _)) => {
                return Err(format!("{scheme}:// is not served; ask about http:// or https://"));
            }
            None => (false, url),
        };
        let rest = rest.split('#').next().unwrap_or_default();
        let end = rest.find(['/', '?']).unwrap_or(rest.len());
        let (authority, target) = rest.split_at(end);
        let (path, query) = match target.split_once('?') {
            Some((path, query)) => (path, Some(query.to_owned())),
            None => (target, None),
        };
        if method.is_empty() || !method.bytes().all(is_token) {
            return Err(format!("{method:?} is no method; write GET, POST, ..."));
        }
        let headers = headers.iter().map(|header| split_header(header)).collect::<Result<Vec<_>, _>>()?;
        let authority = authority.rsplit_once('@').map_or(authority, |(_, host)| host);
        let named = headers.iter().find(|(name, _)| name == "host").map(|(_, host)| host.as_str());
        let host = host_of(named.unwrap_or(authority))?;
        let path = if path.is_empty() { "/".to_owned() } else { path.to_owned() };
        if path.bytes().any(|byte| byte <= b' ' || byte == 0x7f) {
            return Err("the path has a space or a control character; write it as %20".to_owned());
        }
        Ok(Question { method: method.to_owned(), https, host, path, query, headers })
    }

    pub(crate) fn url(&self) -> String {
        let scheme = if self.https { "https" } else { "http" };
        let query = self.query.as_ref().map(|query| format!("?{query}")).unwrap_or_default();
        format!("{scheme}://{}{}{query}", self.host, self.path)
    }

    pub(crate) fn header(&self, name: &str) -> Option<&str> {
        let name = name.to_ascii_lowercase();
        self.headers.iter().find(|(n, _)| *n == name).map(|(_, value)| value.as_str())
    }

    /// The first cookie of this name, over all `Cookie` headers.
    pub(crate) fn cookie(&self, name: &str) -> Option<&str> {
        let lines = self.headers.iter().filter(|(n, _)| n == "cookie");
        lines.flat_map(|(_, line)| line.split(';')).find_map(|pair| {
            let value = pair.trim().strip_prefix(name)?.strip_prefix('=')?;
            Some(value.strip_prefix('"').and_then(|v| v.strip_suffix('"')).unwrap_or(value))
        })
    }
}

fn host_of(authority: &str) -> Result<String, String> {
    let (host, port) = match authority.strip_prefix('[') {
        Some(rest) => {
            let (address, port) = rest.split_once(']').ok_or("the host has a [ without ]")?;
            address.parse::<IpAddr>().map_err(|_| format!("[{address}] is no IPv6 address"))?;
            (format!("[{address}]"), port.strip_prefix(':'))
        }
        None => match authority.split_once(':') {
            Some((host, port)) => (host.to_owned(), Some(port)),
            None => (authority.to_owned(), None),
        },
    };
    if port.is_some_and(|port| !port.is_empty() && port.parse::<u16>().is_err()) {
        return Err(format!("{authority:?} has no valid port"));
    }
    let host = host.strip_suffix('.').unwrap_or(&host).to_ascii_lowercase();
    if host.is_empty() {
        return Err("no host; write https://host/path".to_owned());
    }
    let known = |byte: u8| byte.is_ascii_alphanumeric() || b"-._~[]:%*".contains(&byte);
    if !host.bytes().all(known) {
        return Err(format!("{host:?} is no host name; write international names in their xn-- form"));
    }
    Ok(host)
}

fn split_header(header: &str) -> Result<(String, String), String> {
    match header.split_once(':') {
        Some((name, value)) if !name.is_empty() && name.bytes().all(is_token) => {
            Ok((name.to_ascii_lowercase(), value.trim().to_owned()))
        }
        _ => Err(format!("{header:?} is no header; write 'Name: value'")),
    }
}

/// RFC 9110 section 5.6.2.
fn is_token(byte: u8) -> bool {
    byte.is_ascii_alphanumeric() || b"!#$%&'*+-.^_`|~".contains(&byte)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn urls_are_read_as_clients_send_them() {
        for (url, https, host, path, query) in [
            ("https://Shop.Example/cart", true, "shop.example", "/cart", None),
            ("http://shop.example:8080", false, "shop.example", "/", None),
            ("shop.example/a?b=c#d", false, "shop.example", "/a", Some("b=c")),
            ("shop.example.?x", false, "shop.example", "/", Some("x")),
            ("https://user:pass@shop.example/", true, "shop.example", "/", None),
            ("http://[::1]:80/x", false, "[::1]", "/x", None),
        ] {
            let question = Question::new(url, "GET", &[]).expect(url);
            assert_eq!((question.https, &*question.host, &*question.path), (https, host, path), "{url}");
            assert_eq!(question.query.as_deref(), query, "{url}");
        }
    }

    #[test]
    fn nonsense_is_refused() {
        for (url, method, header) in [
            ("ftp://a/", "GET", "a: b"),
            ("https:///x", "GET", "a: b"),
            ("http://a:b/", "GET", "a: b"),
            ("http://[x]/", "GET", "a: b"),
            ("http://a/x y", "GET", "a: b"),
            ("http://a/", "G T", "a: b"),
            ("http://a/", "GET", "no colon"),
            ("http://a/", "GET", "bad name: x"),
            ("http://bücher.example/", "GET", "a: b"),
        ] {
            assert!(Question::new(url, method, &[header.to_owned()]).is_err(), "{url} {method} {header}");
        }
    }

    #[test]
    fn headers_and_cookies_are_found() {
        let headers = ["X-Canary: always", "Cookie: a=1; b=\"2\"", "cookie: c=3", "Host: other.example"];
        let question = Question::new("http://a/", "GET", &headers.map(str::to_owned)).expect("valid");
        assert_eq!(question.header("x-CANARY"), Some("always"));
        assert_eq!(question.cookie("b"), Some("2"));
        assert_eq!(question.cookie("c"), Some("3"));
        assert_eq!(question.cookie("d"), None);
        assert_eq!(question.host, "other.example");
    }
}
