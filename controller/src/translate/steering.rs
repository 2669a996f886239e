//! `upstream-hash-by`, `affinity` and `session-cookie-*`: what of a request
//! names its endpoint.

use std::sync::Arc;

use lockgate_proxy::table::{Affinity, HashBy, KeyPart, SameSite, Session, Steering, Variable};

use super::annotations::{PREFIX, field};
use super::settings::Reader;
use crate::objects::Notice;

/// ingress-nginx's.
const COOKIE: &str = "INGRESSCOOKIE";
const SUBSET: u16 = 3;

/// Endpoints of a subset, at most.
const SUBSET_MOST: u16 = 64;

impl Reader<'_> {
    /// A session comes before a key, as in ingress-nginx.
    pub(super) fn steering(&mut self) -> Option<Arc<Steering>> {
        let session = self.session().map(Steering::Session);
        let hash = self.hash_by().map(Steering::Hash);
        if session.is_some() && hash.is_some() {
            let message = "has no effect beside affinity: cookie".to_owned();
            self.warn("upstream-hash-by", message, "remove one of the two");
        }
        session.or(hash).map(Arc::new)
    }

    /// `affinity-canary-behavior: legacy`
    pub(super) fn ignores_sessions(&mut self) -> bool {
        match self.value("affinity-canary-behavior") {
            None | Some("sticky") => false,
            Some("legacy") => true,
            Some(other) => {
                let message = format!("{other:?} is neither sticky nor legacy: sticky");
                self.warn("affinity-canary-behavior", message, "use sticky or legacy");
                false
            }
        }
    }

    fn session(&mut self) -> Option<Session> {
        match self.value("affinity") {
            Some("cookie") => {}
            Some(other) => {
                let message = format!("{other:?} is not a kind of affinity: there is none");
                self.warn("affinity", message, "use cookie");
                return None;
            }
            None => {
                self.stray_cookie();
                return None;
            }
        }
        let affinity = match self.value("affinity-mode") {
            None | Some("balanced") => Affinity::Balanced,
            Some("persistent") => Affinity::Persistent,
            Some(other) => {
                let message = format!("{other:?} is neither balanced nor persistent: balanced");
                self.warn("affinity-mode", message, "use balanced or persistent");
                Affinity::Balanced
            }
        };
        let cookie = self.value("session-cookie-name");
        let path = self.cookie_text("session-cookie-path", |path| path.starts_with('/'));
        if path.is_none() && self.value("use-regex") == Some("true") {
            let message = "the cookie's path is that of the rule, which is a pattern".to_owned();
            self.warn("affinity", message, "set session-cookie-path");
        }
        let cookie = cookie.and_then(|name| self.token("session-cookie-name", name)).unwrap_or(COOKIE);
        Some(Session {
            path,
            domain: self.cookie_text("session-cookie-domain", is_domain),
            expires: self.whole("session-cookie-expires"),
            max_age: self.whole("session-cookie-max-age"),
            same_site: self.same_site(),
            conditional_none: self.flag("session-cookie-conditional-samesite-none", false),
            secure: self
                .value("session-cookie-secure")
                .is_some()
                .then(|| self.flag("session-cookie-secure", false)),
            partitioned: self.flag("session-cookie-partitioned", false),
            change_on_failure: self.flag("session-cookie-change-on-failure", false),
            ..Session::new(cookie, affinity)
        })
    }

    /// Cookie settings without a cookie.
    fn stray_cookie(&mut self) {
        let prefix = format!("{PREFIX}session-cookie-");
        let mode = format!("{PREFIX}affinity-mode");
        let stray = |key: &&Arc<str>| key.starts_with(&prefix) && !key.ends_with("-hash") || ***key == *mode;
        for key in self.annotations.keys().filter(stray) {
            let remedy = format!("set {PREFIX}affinity: cookie, or remove it");
            self.notices.push(Notice::warning(field(key), "has no effect without affinity: cookie", remedy));
        }
    }

    fn same_site(&mut self) -> Option<SameSite> {
        let value = self.value("session-cookie-samesite")?;
        match value.to_ascii_lowercase().as_str() {
            "none" => Some(SameSite::None),
            "lax" => Some(SameSite::Lax),
            "strict" => Some(SameSite::Strict),
            _ => {
                let message = format!("{value:?} is none of None, Lax and Strict: not set");
                self.warn("session-cookie-samesite", message, "use None, Lax or Strict");
                None
            }
        }
    }

    fn whole(&mut self, name: &str) -> Option<i64> {
        let value = self.value(name)?;
        // A century: what is longer would be no date that browsers take.
        let number = value.parse::<i64>().ok().filter(|number| number.unsigned_abs() <= 3_155_760_000);
        if number.is_none() {
            self.warn(name, format!("{value:?} is not a number of seconds: not set"), "write whole seconds");
        }
        number
    }

    fn cookie_text(&mut self, name: &str, is_right: impl Fn(&str) -> bool) -> Option<Arc<str>> {
        let value = self.value(name)?;
        let fits = value.len() <= 1024 && value.bytes().all(|byte| byte.is_ascii_graphic() && byte != b';');
        if fits && is_right(value) {
            return Some(value.into());
        }
        self.warn(name, format!("{value:?} cannot be in a cookie: not set"), "correct it");
        None
    }

    fn hash_by(&mut self) -> Option<HashBy> {
        let Some(value) = self.value("upstream-hash-by") else {
            for name in ["upstream-hash-by-subset", "upstream-hash-by-subset-size"] {
                if self.value(name).is_some() {
                    self.warn(name, "has no effect without upstream-hash-by".to_owned(), "name the key");
                }
            }
            return None;
        };
        let key = match parse_key(value) {
            Ok(key) => key,
            Err(problem) => {
                let message = format!("{problem}: endpoints are chosen as without it");
                let remedy = "use $request_uri, $uri, $args, $arg_NAME, $host, $scheme, $request_method, \
                    $remote_addr, $http_NAME, $cookie_NAME and text";
                self.warn("upstream-hash-by", message, remedy);
                return None;
            }
        };
        let subset = self.flag("upstream-hash-by-subset", false).then(|| self.subset_size());
        Some(HashBy { key, subset: subset.unwrap_or(1) })
    }

    fn subset_size(&mut self) -> u16 {
        match self.number("upstream-hash-by-subset-size") {
            None | Some(0) => SUBSET,
            Some(size) if size <= u32::from(SUBSET_MOST) => size as u16,
            Some(size) => {
                let message = format!("{size} is more than {SUBSET_MOST}: {SUBSET_MOST}");
                self.warn("upstream-hash-by-subset-size", message, "");
                SUBSET_MOST
            }
        }
    }
}

fn is_domain(text: &str) -> bool {
    text.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"-._".contains(&byte))
}

/// Text and variables, as nginx reads them: `$name` and `${name}`.
fn parse_key(text: &str) -> Result<Vec<KeyPart>, String> {
    let mut parts = Vec::new();
    let mut rest = text;
    while let Some(at) = rest.find('$') {
        if at > 0 {
            parts.push(KeyPart::Text(rest[..at].into()));
        }
        rest = &rest[at + 1..];
        let name = match rest.strip_prefix('{') {
            Some(braced) => {
                let end = braced.find('}').ok_or("a brace is not closed")?;
                rest = &braced[end + 1..];
                &braced[..end]
            }
            None => {
                let is_name = |c: char| c.is_ascii_alphanumeric() || c == '_';
                let (name, behind) = rest.split_at(rest.find(|c| !is_name(c)).unwrap_or(rest.len()));
                rest = behind;
                name
            }
        };
        let variable = variable(name).ok_or_else(|| format!("${name} is not known here"))?;
        parts.push(KeyPart::Variable(variable));
    }
    if !rest.is_empty() {
        parts.push(KeyPart::Text(rest.into()));
    }
    if parts.iter().all(|part| matches!(part, KeyPart::Text(_))) {
        return Err(format!("{text:?} has no variable, so all requests would go to one endpoint"));
    }
    Ok(parts)
}

fn variable(name: &str) -> Option<Variable> {
    Some(match name {
        "request_uri" => Variable::RequestUri,
        "uri" | "document_uri" => Variable::Uri,
        "args" | "query_string" => Variable::Args,
        "is_args" => Variable::IsArgs,
        "host" | "best_http_host" => Variable::Host,
        "scheme" | "pass_access_scheme" => Variable::Scheme,
        "request_method" => Variable::Method,
        "remote_addr" | "the_real_ip" => Variable::RemoteAddr,
        "binary_remote_addr" => Variable::BinaryRemoteAddr,
        _ => {
            let (kind, name) = name.split_once('_').filter(|(_, name)| !name.is_empty())?;
            match kind {
                "http" => Variable::Header(name.to_ascii_lowercase().replace('_', "-").into()),
                "cookie" => Variable::Cookie(name.into()),
                "arg" => Variable::Arg(name.into()),
                _ => return None,
            }
        }
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::objects::Labels;

    fn read(pairs: &[(&str, &str)]) -> (Option<Steering>, usize) {
        let annotations: Labels =
            pairs.iter().map(|(key, value)| (format!("{PREFIX}{key}").into(), (*value).into())).collect();
        let mut notices = Vec::new();
        let steering = Reader { annotations: &annotations, notices: &mut notices }.steering();
        (steering.as_deref().cloned(), notices.len())
    }

    #[test]
    fn keys() {
        let text = |text: &str| KeyPart::Text(text.into());
        let variable = KeyPart::Variable;
        let cases = [
            ("$request_uri", Ok(vec![variable(Variable::RequestUri)])),
            ("$request_uri$host", Ok(vec![variable(Variable::RequestUri), variable(Variable::Host)])),
            ("${request_uri}-text-value", Ok(vec![variable(Variable::RequestUri), text("-text-value")])),
            ("$http_X_User_Id", Ok(vec![variable(Variable::Header("x-user-id".into()))])),
            (
                "$cookie_Sid/$arg_q",
                Ok(vec![
                    variable(Variable::Cookie("Sid".into())),
                    text("/"),
                    variable(Variable::Arg("q".into())),
                ]),
            ),
            ("a é ${remote_addr}é", Ok(vec![text("a é "), variable(Variable::RemoteAddr), text("é")])),
            ("$binary_remote_addr", Ok(vec![variable(Variable::BinaryRemoteAddr)])),
            ("constant", Err(())),
            ("", Err(())),
            ("$", Err(())),
            ("$upstream_addr", Err(())),
            ("$http_", Err(())),
            ("${host", Err(())),
            ("$$host", Err(())),
        ];
        for (written, expected) in cases {
            assert_eq!(parse_key(written).map_err(|_| ()), expected, "{written}");
        }
    }

    #[test]
    fn subsets() {
        let by = ("upstream-hash-by", "$uri");
        let (on, size) = (("upstream-hash-by-subset", "true"), "upstream-hash-by-subset-size");
        let cases: [(&[(&str, &str)], u16, usize); 7] = [
            (&[by], 1, 0),
            (&[by, on], 3, 0),
            (&[by, on, (size, "5")], 5, 0),
            (&[by, on, (size, "0")], 3, 0),
            (&[by, on, (size, "100")], 64, 1),
            (&[by, on, (size, "few")], 3, 1),
            (&[by, (size, "5")], 1, 0),
        ];
        for (pairs, subset, warnings) in cases {
            let (steering, notices) = read(pairs);
            let Some(Steering::Hash(hash)) = steering else { panic!("{pairs:?}") };
            assert_eq!((hash.subset, notices), (subset, warnings), "{pairs:?}");
        }
        assert_eq!(read(&[on]), (None, 1));
        assert_eq!(read(&[("upstream-hash-by", "$nothing")]), (None, 1));
    }

    #[test]
    fn sessions() {
        let standard = Session::new(COOKIE, Affinity::Balanced);
        let all = Session {
            path: Some("/shop".into()),
            domain: Some("shop.example".into()),
            expires: Some(172_800),
            max_age: Some(-1),
            same_site: Some(SameSite::None),
            conditional_none: true,
            secure: Some(false),
            partitioned: true,
            change_on_failure: true,
            ..Session::new("route", Affinity::Persistent)
        };
        let cookie = ("affinity", "cookie");
        let cases: [(&[(&str, &str)], Option<&Session>, usize); 9] = [
            (&[cookie], Some(&standard), 0),
            (
                &[
                    cookie,
                    ("affinity-mode", "persistent"),
                    ("session-cookie-name", "route"),
                    ("session-cookie-path", "/shop"),
                    ("session-cookie-domain", "shop.example"),
                    ("session-cookie-expires", "172800"),
                    ("session-cookie-max-age", "-1"),
                    ("session-cookie-samesite", "none"),
                    ("session-cookie-conditional-samesite-none", "true"),
                    ("session-cookie-secure", "false"),
                    ("session-cookie-partitioned", "true"),
                    ("session-cookie-change-on-failure", "true"),
                ],
                Some(&all),
                0,
            ),
            (
                &[
                    cookie,
                    ("affinity-mode", "random"),
                    ("session-cookie-name", "a b"),
                    ("session-cookie-path", "shop"),
                    ("session-cookie-domain", "shop;Secure"),
                    ("session-cookie-expires", "soon"),
                    ("session-cookie-max-age", "9999999999999"),
                    ("session-cookie-samesite", "Some"),
                ],
                Some(&standard),
                7,
            ),
            (&[("affinity", "ip")], None, 1),
            (&[("session-cookie-name", "route"), ("affinity-mode", "balanced")], None, 2),
            (&[cookie, ("use-regex", "true")], Some(&standard), 1),
            (&[cookie, ("upstream-hash-by", "$uri")], Some(&standard), 1),
            (&[cookie, ("affinity", "")], None, 0),
            (&[cookie, ("session-cookie-path", "/a;b")], Some(&standard), 1),
        ];
        for (pairs, expected, warnings) in cases {
            let (steering, notices) = read(pairs);
            assert_eq!(steering, expected.cloned().map(Steering::Session), "{pairs:?}");
            assert_eq!(notices, warnings, "{pairs:?}");
        }
    }
}
