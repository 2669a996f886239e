//! The values of the annotations that are implemented.

use std::sync::Arc;
use std::time::Duration;

use lockgate_proxy::proxy_protocol::Version;
use lockgate_proxy::table::{RuleLimits, Steering, Sticky, UpstreamProtocol, When};

use super::annotations::{PASSTHROUGH_HEADER, PREFIX, STICKY, field};
use super::resilience::resilience;
use super::wish::Wish;
use crate::objects::{Labels, Notice};

pub(super) mod headers;
mod per_client;

/// What the annotations of one Ingress ask for.
#[derive(Clone, Debug, Default, PartialEq)]
pub(super) struct Settings {
    /// Redirect to https where TLS is configured.
    pub(super) redirect: bool,
    /// Redirect to https everywhere.
    pub(super) force_redirect: bool,
    pub(super) limits: RuleLimits,
    /// Overrides the Service's `appProtocol`.
    pub(super) protocol: Option<UpstreamProtocol>,
    /// TLS of its hosts goes to the endpoints unopened.
    pub(super) passthrough: bool,
    /// And they are told of the client by this header.
    pub(super) passthrough_header: Option<Version>,
    /// For its pools.
    pub(super) wish: Wish,
    /// What of a request names its endpoint.
    pub(super) steering: Option<Arc<Steering>>,
    /// On a canary: the sessions of its mainline do not count.
    pub(super) ignores_sessions: bool,
    /// For the heads of its requests and responses.
    pub(super) headers: headers::HeaderWish,
    /// Set on a canary Ingress.
    pub(super) canary: Option<Canary>,
}

/// Which requests a canary Ingress asks for.
#[derive(Clone, Debug, Default, PartialEq)]
pub(super) struct Canary {
    /// At most `total`.
    pub(super) weight: u32,
    /// At least 100.
    pub(super) total: u32,
    /// Header, then cookie.
    pub(super) when: Vec<When>,
    pub(super) sticky: Option<Sticky>,
}

/// Reads one Ingress's annotations; a value that cannot be read takes its
/// default and leaves a notice.
pub(super) fn settings(annotations: &Labels, notices: &mut Vec<Notice>) -> Settings {
    let mut reader = Reader { annotations, notices };
    let canary = reader.flag("canary", false).then(|| reader.canary());
    if canary.is_none() {
        reader.stray_canary();
    }
    let wish = reader.wish();
    let steering = reader.steering();
    let ignores_sessions = reader.ignores_sessions();
    if canary.is_some() {
        return Settings { wish, steering, ignores_sessions, canary, ..Settings::default() };
    }
    Settings {
        redirect: reader.flag("ssl-redirect", true),
        force_redirect: reader.flag("force-ssl-redirect", false),
        limits: RuleLimits {
            connect_timeout: reader.seconds("proxy-connect-timeout"),
            send_timeout: reader.seconds("proxy-send-timeout"),
            read_timeout: reader.seconds("proxy-read-timeout"),
            max_body: reader.size("proxy-body-size"),
            per_client: reader.per_client(),
            resilience: resilience(reader.annotations, reader.notices),
        },
        protocol: reader.protocol(),
        passthrough: reader.flag("ssl-passthrough", false),
        passthrough_header: reader.passthrough_header(),
        wish,
        steering,
        ignores_sessions,
        headers: reader.headers(),
        canary,
    }
}

pub(super) struct Reader<'a> {
    pub(super) annotations: &'a Labels,
    pub(super) notices: &'a mut Vec<Notice>,
}

impl<'a> Reader<'a> {
    /// The value; empty counts as not written.
    pub(super) fn value(&self, name: &str) -> Option<&'a str> {
        let value = self.annotations.get(&*format!("{PREFIX}{name}"))?.trim();
        (!value.is_empty()).then_some(value)
    }

    pub(super) fn warn(&mut self, name: &str, message: String, remedy: &str) {
        self.notices.push(Notice::warning(field(&format!("{PREFIX}{name}")), message, remedy));
    }

    pub(super) fn flag(&mut self, name: &str, default: bool) -> bool {
        match self.value(name) {
            None => default,
            // What Go's strconv.ParseBool takes.
            Some("1" | "t" | "T" | "true" | "TRUE" | "True") => true,
            Some("0" | "f" | "F" | "false" | "FALSE" | "False") => false,
            Some(other) => {
                self.warn(
                    name,
                    format!("{other:?} is neither true nor false: {default}"),
                    "write true or false",
                );
                default
            }
        }
    }

    fn seconds(&mut self, name: &str) -> Option<Duration> {
        let value = self.value(name)?;
        match value.parse::<u32>() {
            Ok(seconds) if seconds > 0 => Some(Duration::from_secs(seconds.into())),
            _ => {
                let message = format!("{value:?} is not a number of seconds: the default holds");
                self.warn(name, message, "write whole seconds, at least 1, without a unit");
                None
            }
        }
    }

    fn size(&mut self, name: &str) -> Option<u64> {
        let value = self.value(name)?;
        let size = parse_size(value);
        if size.is_none() {
            let message = format!("{value:?} is not a size: the default holds");
            self.warn(name, message, "write a number, with k, m or g behind it if you like");
        }
        size
    }

    fn protocol(&mut self) -> Option<UpstreamProtocol> {
        let value = self.value("backend-protocol")?;
        match value.to_ascii_uppercase().as_str() {
            "HTTP" => Some(UpstreamProtocol::Http1),
            "HTTPS" => Some(UpstreamProtocol::Https),
            "GRPC" => Some(UpstreamProtocol::H2c),
            "GRPCS" => Some(UpstreamProtocol::H2),
            "AUTO_HTTP" | "FCGI" => {
                self.warn("backend-protocol", format!("{value} is not implemented yet: HTTP is spoken"), "");
                Some(UpstreamProtocol::Http1)
            }
            _ => {
                let message = format!("{value:?} is not a protocol: HTTP is spoken, as in ingress-nginx");
                self.warn("backend-protocol", message, "use HTTP, HTTPS, GRPC or GRPCS");
                Some(UpstreamProtocol::Http1)
            }
        }
    }

    fn passthrough_header(&mut self) -> Option<Version> {
        match self.annotations.get(PASSTHROUGH_HEADER)?.trim() {
            "v1" => Some(Version::V1),
            "v2" => Some(Version::V2),
            "" => None,
            other => {
                let message = format!("{other:?} is no version of the PROXY protocol: no header is sent");
                self.notices.push(Notice::warning(field(PASSTHROUGH_HEADER), message, "write v1 or v2"));
                None
            }
        }
    }

    fn canary(&mut self) -> Canary {
        let total = match self.number("canary-weight-total") {
            Some(total @ 101..) => total,
            Some(100) | None => 100,
            Some(less) => {
                self.warn(
                    "canary-weight-total",
                    format!("{less} is below 100: 100, as in ingress-nginx"),
                    "",
                );
                100
            }
        };
        let weight = self.number("canary-weight").unwrap_or(0);
        if weight > total {
            let message = format!("{weight} is more than the whole of {total}: the canary takes everything");
            self.warn("canary-weight", message, "");
        }
        let when: Vec<When> = [self.header(), self.cookie()].into_iter().flatten().collect();
        if when.is_empty() && self.value("canary-weight").is_none() {
            let message =
                "the canary takes no request: it has neither weight nor header nor cookie".to_owned();
            self.warn("canary", message, "add canary-weight, canary-by-header or canary-by-cookie");
        }
        Canary { weight: weight.min(total), total, when, sticky: self.sticky() }
    }

    pub(super) fn number(&mut self, name: &str) -> Option<u32> {
        let value = self.value(name)?;
        let number = value.parse().ok();
        if number.is_none() {
            let message = format!("{value:?} is not a number: the default holds");
            self.warn(name, message, "write a whole number, 0 or more");
        }
        number
    }

    /// Value beats pattern beats the literals `always` and `never`.
    fn header(&mut self) -> Option<When> {
        let Some(header) = self.value("canary-by-header") else {
            for name in ["canary-by-header-value", "canary-by-header-pattern"] {
                if self.value(name).is_some() {
                    self.warn(name, "has no effect without canary-by-header".to_owned(), "name the header");
                }
            }
            return None;
        };
        let header: Arc<str> = self.token("canary-by-header", header)?.to_ascii_lowercase().into();
        if let Some(value) = self.value("canary-by-header-value") {
            if self.value("canary-by-header-pattern").is_some() {
                let message = "has no effect beside canary-by-header-value".to_owned();
                self.warn("canary-by-header-pattern", message, "remove one of the two");
            }
            return Some(When::HeaderValue(header, value.into()));
        }
        let Some(pattern) = self.value("canary-by-header-pattern") else { return Some(When::Header(header)) };
        match regex::RegexBuilder::new(pattern).size_limit(1 << 20).build() {
            Ok(_) => Some(When::HeaderPattern(header, pattern.into())),
            Err(error) => {
                let error = error.to_string();
                let reason = error.lines().last().unwrap_or_default().trim_start_matches("error: ");
                let message = format!("not a regular expression here ({reason}): the header decides nothing");
                let remedy = "look-around and back-references are not supported: time must be linear";
                self.warn("canary-by-header-pattern", message, remedy);
                None
            }
        }
    }

    fn cookie(&mut self) -> Option<When> {
        let cookie = self.value("canary-by-cookie")?;
        Some(When::Cookie(self.token("canary-by-cookie", cookie)?.into()))
    }

    /// `value`, if it can be the name of a header or cookie (RFC 9110 token).
    pub(super) fn token(&mut self, name: &str, value: &'a str) -> Option<&'a str> {
        if is_token(value) {
            return Some(value);
        }
        let message = format!("{value:?} cannot be a name: ignored");
        self.warn(name, message, "use letters, digits, '-' and '_'");
        None
    }

    fn sticky(&mut self) -> Option<Sticky> {
        let value = self.annotations.get(STICKY)?.trim();
        match value.split_once('=') {
            None if value == "cookie" => Some(Sticky::Cookie("lockgate_canary".into())),
            None if value == "address" => Some(Sticky::Address),
            Some(("cookie", name)) if is_token(name) => Some(Sticky::Cookie(name.into())),
            Some(("header", name)) if is_token(name) => {
                Some(Sticky::Header(name.to_ascii_lowercase().into()))
            }
            _ => {
                self.notices.push(Notice::warning(
                    field(STICKY),
                    format!("{value:?} names nothing to stick to: every request is divided anew"),
                    "use cookie, cookie=NAME, header=NAME or address",
                ));
                None
            }
        }
    }

    /// ingress-nginx refuses canary settings on an Ingress that is no canary.
    fn stray_canary(&mut self) {
        let prefix = format!("{PREFIX}canary-");
        let stray = |key: &&Arc<str>| key.starts_with(&prefix) || &***key == STICKY;
        for key in self.annotations.keys().filter(stray) {
            self.notices.push(Notice::warning(
                field(key),
                "has no effect: this Ingress is not a canary",
                format!("set {PREFIX}canary: \"true\", or remove it"),
            ));
        }
    }
}

pub(super) fn is_token(text: &str) -> bool {
    let token = |byte: u8| byte.is_ascii_alphanumeric() || b"!#$%&'*+-.^_`|~".contains(&byte);
    !text.is_empty() && text.len() <= 256 && text.bytes().all(token)
}

/// Digits, and perhaps one of `b`, `k`, `m`, `g`.
fn parse_size(text: &str) -> Option<u64> {
    let (digits, shift) = match text.as_bytes().last()?.to_ascii_lowercase() {
        b'b' => (&text[..text.len() - 1], 0),
        b'k' => (&text[..text.len() - 1], 10),
        b'm' => (&text[..text.len() - 1], 20),
        b'g' => (&text[..text.len() - 1], 30),
        _ => (text, 0),
    };
    if !digits.bytes().all(|byte| byte.is_ascii_digit()) {
        return None;
    }
    digits.parse::<u64>().ok()?.checked_mul(1 << shift)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(pairs: &[(&str, &str)]) -> (Settings, Vec<Notice>) {
        let annotations = pairs
            .iter()
            .map(|(key, value)| match key.contains('/') {
                true => ((*key).into(), (*value).into()),
                false => (format!("{PREFIX}{key}").into(), (*value).into()),
            })
            .collect();
        let mut notices = Vec::new();
        (settings(&annotations, &mut notices), notices)
    }

    #[test]
    fn sizes() {
        let cases = [
            ("0", Some(0)),
            ("10", Some(10)),
            ("10B", Some(10)),
            ("8k", Some(8192)),
            ("1M", Some(1 << 20)),
            ("2g", Some(2 << 30)),
            ("", None),
            ("m", None),
            ("1.5m", None),
            ("-1", None),
            ("+1", None),
            ("10 m", None),
            ("1t", None),
            ("99999999999999999999", None),
            ("99999999999999g", None),
            ("1é", None),
        ];
        for (text, size) in cases {
            assert_eq!(parse_size(text), size, "{text}");
        }
    }

    #[test]
    fn canary_conditions() {
        let header = "canary-by-header";
        let (value, pattern) = ("canary-by-header-value", "canary-by-header-pattern");
        let cases: [(&[(&str, &str)], &str, usize); 9] = [
            (&[(header, "X-A")], r#"[Header("x-a")]"#, 0),
            (&[(header, "X-A"), (value, "b")], r#"[HeaderValue("x-a", "b")]"#, 0),
            (&[(header, "X-A"), (pattern, "^b")], r#"[HeaderPattern("x-a", "^b")]"#, 0),
            (&[(header, "X-A"), (value, "b"), (pattern, "(")], r#"[HeaderValue("x-a", "b")]"#, 1),
            (&[(header, "X-A"), (pattern, "(?=b)")], "[]", 1),
            (&[(header, "X-A"), (pattern, "a{1000}{1000}")], "[]", 1),
            (&[(header, "X A")], "[]", 1),
            (&[(value, "b")], "[]", 1),
            (&[(header, "X-A"), ("canary-by-cookie", "c")], r#"[Header("x-a"), Cookie("c")]"#, 0),
        ];
        for (pairs, when, warnings) in cases {
            let mut all = vec![("canary", "true"), ("canary-weight", "1")];
            all.extend(pairs);
            let (settings, notices) = read(&all);
            assert_eq!(format!("{:?}", settings.canary.unwrap().when), when, "{pairs:?}");
            assert_eq!(notices.len(), warnings, "{pairs:?}: {notices:?}");
        }
    }

    #[test]
    fn canary_weights() {
        let cases = [
            ("5", "", (5, 100), 0),
            ("5", "1000", (5, 1000), 0),
            ("5", "50", (5, 100), 1),
            ("500", "", (100, 100), 1),
            ("-5", "", (0, 100), 1),
            ("five", "many", (0, 100), 2),
        ];
        for (weight, total, expected, warnings) in cases {
            let (settings, notices) =
                read(&[("canary", "true"), ("canary-weight", weight), ("canary-weight-total", total)]);
            let canary = settings.canary.unwrap();
            assert_eq!((canary.weight, canary.total), expected, "{weight}/{total}");
            assert_eq!(notices.len(), warnings, "{weight}/{total}: {notices:?}");
        }
    }

    #[test]
    fn sticky() {
        let cases = [
            ("cookie", "Some(Cookie(\"lockgate_canary\"))"),
            ("cookie=v", "Some(Cookie(\"v\"))"),
            ("header=X-User", "Some(Header(\"x-user\"))"),
            ("address", "Some(Address)"),
            ("cookie=", "None"),
            ("cookie=a b", "None"),
            ("moon", "None"),
        ];
        for (text, expected) in cases {
            let (settings, notices) = read(&[("canary", "true"), ("canary-weight", "1"), (STICKY, text)]);
            assert_eq!(format!("{:?}", settings.canary.unwrap().sticky), expected);
            assert_eq!(notices.len(), usize::from(expected == "None"));
        }
    }

    #[test]
    fn values_that_cannot_be_read_take_the_default() {
        let (settings, notices) = read(&[
            ("ssl-redirect", "no"),
            ("proxy-read-timeout", "60s"),
            ("proxy-send-timeout", "0"),
            ("proxy-connect-timeout", " 7 "),
            ("proxy-body-size", "big"),
            ("backend-protocol", "gopher"),
            ("load-balance", "chash"),
            ("canary-weight", "5"),
        ]);
        assert!(settings.redirect);
        let limits = RuleLimits { connect_timeout: Some(Duration::from_secs(7)), ..RuleLimits::default() };
        assert_eq!(settings.limits, limits);
        assert_eq!(settings.protocol, Some(UpstreamProtocol::Http1));
        assert_eq!(notices.len(), 7, "{notices:#?}");
    }
}
