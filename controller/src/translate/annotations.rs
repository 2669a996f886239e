//! What Lockgate makes of every annotation ingress-nginx knows.
//!
//! An annotation that restricts access and is not implemented closes its
//! routes; no annotation is silently ignored.

use std::sync::Arc;

use super::resilience;
use crate::objects::{Labels, Notice};

pub(super) const PREFIX: &str = "nginx.ingress.kubernetes.io/";
pub(super) const STICKY: &str = "lockgate.io/canary-sticky";
pub(super) const PASSTHROUGH_HEADER: &str = "lockgate.io/ssl-passthrough-proxy-protocol";

/// The annotations of our own; a name that is none of them is reported.
fn own() -> impl Iterator<Item = &'static str> {
    [STICKY, PASSTHROUGH_HEADER].into_iter().chain(OF_SERVICE).chain(resilience::KEYS)
}

/// Those of them that a Service may have, too.
const OF_SERVICE: [&str; 8] = [
    "lockgate.io/health-check",
    "lockgate.io/health-check-healthy",
    "lockgate.io/health-check-host",
    "lockgate.io/health-check-interval",
    "lockgate.io/health-check-timeout",
    "lockgate.io/health-check-unhealthy",
    "lockgate.io/load-balance",
    "lockgate.io/slow-start",
];

/// What an annotation means here.
#[derive(Clone, Copy, Debug)]
enum Meaning {
    /// Implemented; [`super::settings`] reads it.
    Served,
    /// Implemented, and read also on a canary Ingress.
    OfCanary,
    /// Restricts access and is not implemented: its routes are closed if the value enables it.
    Restricts(Enabled),
    /// The same for every route of its hosts, also those of other Ingresses.
    RestrictsHost(Enabled),
    /// Only tunes a restriction, which closes the routes by itself.
    Tunes,
    /// Changes answers, and is not implemented: served without it. The text is
    /// the value that means the same as none.
    NotYet(&'static str),
    /// Nothing to do, and why.
    NoEffect(&'static str),
}

/// When a restriction is in force. `off`, `false` and the empty text never are.
#[derive(Clone, Copy, Debug)]
enum Enabled {
    /// By any value.
    Set,
    /// By any value but zero.
    NotZero,
    /// By what is no number; by a number it is implemented.
    NotANumber,
    /// By configuration text with any directive that is not known to be harmless.
    Snippet,
}

use Enabled::{NotANumber, NotZero, Set, Snippet};
use Meaning::{NoEffect, NotYet, OfCanary, Restricts, RestrictsHost, Served, Tunes};

const BUFFERS: &str = "bodies are streamed with bounded buffers";
const NGINX_FILES: &str = "nothing is ever written to a file";
const MODERN_TLS: &str = "ciphers are rustls's, all of them strong";

#[rustfmt::skip]
const KNOWN: [(&str, Meaning); 146] = [
    ("affinity",                                 OfCanary),
    ("affinity-canary-behavior",                 OfCanary),
    ("affinity-mode",                            OfCanary),
    ("allowlist-source-range",                   Restricts(Set)),
    ("app-root",                                 NotYet("")),
    ("auth-always-set-cookie",                   Tunes),
    ("auth-cache-duration",                      Tunes),
    ("auth-cache-key",                           Tunes),
    ("auth-keepalive",                           Tunes),
    ("auth-keepalive-requests",                  Tunes),
    ("auth-keepalive-share-vars",                Tunes),
    ("auth-keepalive-timeout",                   Tunes),
    ("auth-method",                              Tunes),
    ("auth-proxy-set-headers",                   Tunes),
    ("auth-realm",                               Tunes),
    ("auth-request-redirect",                    Tunes),
    ("auth-response-headers",                    Tunes),
    ("auth-secret",                              Restricts(Set)),
    ("auth-secret-type",                         Tunes),
    ("auth-signin",                              Tunes),
    ("auth-signin-redirect-param",               Tunes),
    ("auth-snippet",                             Restricts(Set)),
    ("auth-tls-error-page",                      Tunes),
    ("auth-tls-match-cn",                        RestrictsHost(Set)),
    ("auth-tls-pass-certificate-to-upstream",    Tunes),
    ("auth-tls-secret",                          RestrictsHost(Set)),
    ("auth-tls-verify-client",                   Tunes),
    ("auth-tls-verify-depth",                    Tunes),
    ("auth-type",                                Restricts(Set)),
    ("auth-url",                                 Restricts(Set)),
    ("backend-protocol",                         Served),
    ("canary",                                   OfCanary),
    ("canary-by-cookie",                         OfCanary),
    ("canary-by-header",                         OfCanary),
    ("canary-by-header-pattern",                 OfCanary),
    ("canary-by-header-value",                   OfCanary),
    ("canary-weight",                            OfCanary),
    ("canary-weight-total",                      OfCanary),
    ("client-body-buffer-size",                  NoEffect(BUFFERS)),
    ("configuration-snippet",                    Restricts(Snippet)),
    ("connection-proxy-header",                  Served),
    ("cors-allow-credentials",                   NotYet("true")),
    ("cors-allow-headers",                       NotYet("")),
    ("cors-allow-methods",                       NotYet("")),
    ("cors-allow-origin",                        NotYet("")),
    ("cors-expose-headers",                      NotYet("")),
    ("cors-max-age",                             NotYet("1728000")),
    ("custom-headers",                           Served),
    ("custom-http-errors",                       NotYet("")),
    ("default-backend",                          NotYet("")),
    ("denylist-source-range",                    Restricts(Set)),
    ("disable-proxy-intercept-errors",           NotYet("false")),
    ("enable-access-log",                        NotYet("true")),
    ("enable-cors",                              NotYet("false")),
    ("enable-global-auth",                       NoEffect("there is no global authentication to leave out")),
    ("enable-modsecurity",                       Restricts(Set)),
    ("enable-opentelemetry",                     NotYet("false")),
    ("enable-opentracing",                       NoEffect("ingress-nginx 1.10 removed it")),
    ("enable-owasp-core-rules",                  Restricts(Set)),
    ("enable-rewrite-log",                       NoEffect("there is no rewrite module to log")),
    ("fastcgi-index",                            NotYet("")),
    ("fastcgi-params-configmap",                 NotYet("")),
    ("force-ssl-redirect",                       Served),
    ("from-to-www-redirect",                     NotYet("false")),
    ("global-rate-limit",                        Restricts(NotZero)),
    ("global-rate-limit-ignored-cidrs",          Tunes),
    ("global-rate-limit-key",                    Tunes),
    ("global-rate-limit-window",                 Tunes),
    ("http2-push-preload",                       NoEffect("browsers and nginx removed HTTP/2 push")),
    ("limit-allowlist",                          Served),
    ("limit-burst-multiplier",                   Served),
    ("limit-connections",                        Restricts(NotANumber)),
    ("limit-rate",                               Restricts(NotZero)),
    ("limit-rate-after",                         Tunes),
    ("limit-rpm",                                Restricts(NotANumber)),
    ("limit-rps",                                Restricts(NotANumber)),
    ("limit-whitelist",                          Served),
    ("load-balance",                             OfCanary),
    ("mirror-host",                              NotYet("")),
    ("mirror-request-body",                      NotYet("on")),
    ("mirror-target",                            NotYet("")),
    ("modsecurity-snippet",                      Restricts(Set)),
    ("modsecurity-transaction-id",               Tunes),
    ("opentelemetry-operation-name",             NotYet("")),
    ("opentelemetry-trust-incoming-span",        NotYet("true")),
    ("permanent-redirect",                       NotYet("")),
    ("permanent-redirect-code",                  NotYet("301")),
    ("preserve-trailing-slash",                  NoEffect("a redirect to https keeps the URL as it is")),
    ("proxy-body-size",                          Served),
    ("proxy-buffer-size",                        NoEffect(BUFFERS)),
    ("proxy-buffering",                          NoEffect(BUFFERS)),
    ("proxy-buffers-number",                     NoEffect(BUFFERS)),
    ("proxy-busy-buffers-size",                  NoEffect(BUFFERS)),
    ("proxy-connect-timeout",                    Served),
    ("proxy-cookie-domain",                      NotYet("off")),
    ("proxy-cookie-path",                        NotYet("off")),
    ("proxy-http-version",                       NotYet("1.1")),
    ("proxy-max-temp-file-size",                 NoEffect(NGINX_FILES)),
    ("proxy-next-upstream",                      Served),
    ("proxy-next-upstream-timeout",              Served),
    ("proxy-next-upstream-tries",                Served),
    ("proxy-read-timeout",                       Served),
    ("proxy-redirect-from",                      NotYet("off")),
    ("proxy-redirect-to",                        NotYet("off")),
    ("proxy-request-buffering",                  NoEffect(BUFFERS)),
    ("proxy-send-timeout",                       Served),
    ("proxy-ssl-ciphers",                        NoEffect(MODERN_TLS)),
    ("proxy-ssl-name",                           NotYet("")),
    ("proxy-ssl-protocols",                      NoEffect("TLS 1.2 and 1.3 are both offered")),
    ("proxy-ssl-secret",                         NotYet("")),
    ("proxy-ssl-server-name",                    NotYet("off")),
    ("proxy-ssl-verify",                         NotYet("off")),
    ("proxy-ssl-verify-depth",                   NotYet("1")),
    ("relative-redirects",                       NotYet("false")),
    ("rewrite-target",                           NotYet("")),
    ("satisfy",                                  Tunes),
    ("secure-backends",                          NoEffect("ingress-nginx 0.21 removed it; use backend-protocol")),
    ("server-alias",                             NotYet("")),
    ("server-snippet",                           RestrictsHost(Snippet)),
    ("service-upstream",                         NotYet("false")),
    ("session-cookie-change-on-failure",         OfCanary),
    ("session-cookie-conditional-samesite-none", OfCanary),
    ("session-cookie-domain",                    OfCanary),
    ("session-cookie-expires",                   OfCanary),
    ("session-cookie-hash",                      NoEffect("ingress-nginx 0.24 removed it: the cookie shows no address either way")),
    ("session-cookie-max-age",                   OfCanary),
    ("session-cookie-name",                      OfCanary),
    ("session-cookie-partitioned",               OfCanary),
    ("session-cookie-path",                      OfCanary),
    ("session-cookie-samesite",                  OfCanary),
    ("session-cookie-secure",                    OfCanary),
    ("ssl-ciphers",                              NoEffect(MODERN_TLS)),
    ("ssl-passthrough",                          Served),
    ("ssl-prefer-server-ciphers",                NoEffect(MODERN_TLS)),
    ("ssl-redirect",                             Served),
    ("stream-snippet",                           NotYet("")),
    ("temporal-redirect",                        NotYet("")),
    ("temporal-redirect-code",                   NotYet("302")),
    ("upstream-hash-by",                         OfCanary),
    ("upstream-hash-by-subset",                  OfCanary),
    ("upstream-hash-by-subset-size",             OfCanary),
    ("upstream-vhost",                           Served),
    ("use-port-in-redirects",                    NotYet("false")),
    ("use-regex",                                NotYet("false")),
    ("whitelist-source-range",                   Restricts(Set)),
    ("x-forwarded-prefix",                       Served),
];

/// The field path of annotation `key`.
pub(super) fn field(key: &str) -> String {
    format!(".metadata.annotations[{key:?}]")
}

/// Why routes answer 503.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Closed {
    pub(super) reason: Arc<str>,
    /// Not only its own routes, but all of its hosts.
    pub(super) whole_host: bool,
}

/// Reports every annotation that [`super::settings`] does not read. Returns
/// why the routes are closed, if one of them restricts access.
pub(super) fn classify(annotations: &Labels, canary: bool, notices: &mut Vec<Notice>) -> Option<Closed> {
    let mut closed: Option<Closed> = None;
    for (key, value) in annotations {
        let Some(name) = key.strip_prefix(PREFIX) else {
            if key.starts_with("lockgate.io/") && !own().any(|own| own == &**key) {
                notices.push(unknown_own(key));
            } else if canary && resilience::KEYS.contains(&&**key) {
                notices.push(Notice::info(field(key), ON_CANARY));
            }
            continue;
        };
        let Some((_, meaning)) = KNOWN.iter().find(|(known, _)| *known == name) else {
            let nearest = nearest(name).map(|known| format!("{PREFIX}{known}")).unwrap_or_default();
            notices.push(unknown(key, nearest));
            continue;
        };
        if canary && !matches!(meaning, OfCanary) {
            notices.push(ignored_on_canary(key, value, meaning));
            continue;
        }
        notices.extend(notice(key, name, value, meaning));
        let whole_host = matches!(meaning, RestrictsHost(_));
        if restricts(meaning, value) && closed.as_ref().is_none_or(|closed| whole_host && !closed.whole_host)
        {
            let problem = match meaning {
                Restricts(NotANumber) => "is no number",
                _ => "is not implemented yet",
            };
            let reason = format!("annotation {name} restricts access and {problem}").into();
            closed = Some(Closed { reason, whole_host });
        }
    }
    closed
}

fn restricts(meaning: &Meaning, value: &str) -> bool {
    let (Restricts(enabled) | RestrictsHost(enabled)) = meaning else { return false };
    let value = value.trim();
    if value.is_empty() || value.eq_ignore_ascii_case("off") || value.eq_ignore_ascii_case("false") {
        return false;
    }
    match enabled {
        Set => true,
        NotZero => value.parse() != Ok(0u64),
        NotANumber => value.parse::<u64>().is_err(),
        Snippet => !is_harmless(value),
    }
}

fn notice(key: &str, name: &str, value: &str, meaning: &Meaning) -> Option<Notice> {
    let field = field(key);
    match meaning {
        Restricts(NotANumber) if restricts(meaning, value) => Some(Notice::error(
            field,
            format!(
                "{name} restricts access, and {value:?} is no number: the routes of this Ingress answer 503"
            ),
            "write a whole number; 0 is no limit",
        )),
        Restricts(_) | RestrictsHost(_) if restricts(meaning, value) => {
            let routes = match meaning {
                RestrictsHost(_) => "all routes of its hosts",
                _ => "the routes of this Ingress",
            };
            Some(Notice::error(
                field,
                format!("{name} restricts access and is not implemented yet: {routes} answer 503"),
                "remove the annotation to serve the routes without this protection",
            ))
        }
        Restricts(Snippet) | RestrictsHost(Snippet) if !value.trim().is_empty() => Some(not_yet(field, name)),
        NotYet(default) if !value.is_empty() && value != *default => Some(not_yet(field, name)),
        NoEffect(why) => Some(Notice::info(field, format!("{name} has no effect: {why}"))),
        Served | OfCanary | Tunes | Restricts(_) | RestrictsHost(_) | NotYet(_) => None,
    }
}

fn not_yet(field: String, name: &str) -> Notice {
    Notice::warning(field, format!("{name} is not implemented yet: served without it"), "")
}

const ON_CANARY: &str = "ignored on a canary: the mainline's annotations apply, as in ingress-nginx";

fn ignored_on_canary(key: &str, value: &str, meaning: &Meaning) -> Notice {
    if restricts(meaning, value) {
        let message = "not enforced on a canary: the mainline's annotations apply, as in ingress-nginx";
        return Notice::warning(field(key), message, "put it on the mainline Ingress");
    }
    Notice::info(field(key), ON_CANARY)
}

fn unknown(key: &str, nearest: String) -> Notice {
    let remedy = match nearest.as_str() {
        "" => "remove it or correct its spelling".to_owned(),
        nearest => format!("did you mean {nearest}?"),
    };
    Notice::warning(field(key), "unknown annotation: ignored", remedy)
}

/// An annotation under our own prefix that does not exist.
pub(super) fn unknown_own(key: &str) -> Notice {
    let nearest = own().min_by_key(|own| edits(key.get(..64).unwrap_or(key), own));
    unknown(key, nearest.unwrap_or_default().to_owned())
}

/// Whether a Service may have it, too.
pub(super) fn is_of_service(key: &str) -> bool {
    OF_SERVICE.contains(&key) || key == super::service::ALGORITHM
}

/// Directives that add, hide or log, and can refuse no request.
const HARMLESS: [&str; 22] = [
    "access_log",
    "add_header",
    "add_trailer",
    "brotli",
    "chunked_transfer_encoding",
    "client_body_timeout",
    "error_log",
    "etag",
    "expires",
    "gzip",
    "gzip_types",
    "keepalive_timeout",
    "more_clear_headers",
    "more_clear_input_headers",
    "more_set_headers",
    "more_set_input_headers",
    "proxy_hide_header",
    "proxy_pass_header",
    "proxy_set_header",
    "send_timeout",
    "sub_filter",
    "sub_filter_once",
];

/// Judged by the first word of every statement and block; whatever this
/// cannot read counts as harmful.
fn is_harmless(snippet: &str) -> bool {
    // A `#` behind other text may be part of a quoted value: only whole lines are comments.
    let lines = snippet.lines().filter(|line| !line.trim_start().starts_with('#'));
    let text = lines.collect::<Vec<_>>().join("\n");
    !text.contains(['{', '}'])
        && text
            .split(';')
            .filter_map(|statement| statement.split_whitespace().next())
            .all(|word| HARMLESS.contains(&word))
}

/// The known key that `name` most likely is a misspelling of.
fn nearest(name: &str) -> Option<&'static str> {
    // Long enough for every known key; also bounds the work a hostile key can cause.
    if name.len() > 64 {
        return None;
    }
    let (distance, known) = KNOWN.iter().map(|(known, _)| (edits(name, known), *known)).min()?;
    (distance <= 3 && distance * 3 < name.len()).then_some(known)
}

/// Levenshtein distance in bytes.
fn edits(left: &str, right: &str) -> usize {
    let mut row: Vec<usize> = (0..=right.len()).collect();
    for (i, a) in left.bytes().enumerate() {
        let mut diagonal = i;
        row[0] = i + 1;
        for (j, b) in right.bytes().enumerate() {
            let substituted = diagonal + usize::from(a != b);
            diagonal = row[j + 1];
            row[j + 1] = substituted.min(row[j] + 1).min(diagonal + 1);
        }
    }
    row[right.len()]
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::objects::Level;

    fn one(name: &str, value: &str, canary: bool) -> (Option<Level>, bool) {
        let annotations = Labels::from([(format!("{PREFIX}{name}").into(), value.into())]);
        let mut notices = Vec::new();
        let closed = classify(&annotations, canary, &mut notices).is_some();
        assert!(notices.len() <= 1);
        (notices.first().map(|notice| notice.level), closed)
    }

    #[test]
    fn the_table_is_sorted_and_each_key_is_there_once() {
        assert!(KNOWN.windows(2).all(|pair| pair[0].0 < pair[1].0));
    }

    #[test]
    fn what_each_meaning_does() {
        use Level::{Error, Info, Warning};
        let cases = [
            ("ssl-redirect", "true", None, false),
            ("auth-url", "http://auth", Some(Error), true),
            ("auth-url", "", None, false),
            ("auth-type", "off", None, false),
            ("auth-realm", "secret", None, false),
            ("enable-modsecurity", "false", None, false),
            ("enable-modsecurity", "sure", Some(Error), true),
            ("limit-rps", "0", None, false),
            ("limit-rps", "5", None, false),
            ("limit-rps", "-5", Some(Error), true),
            ("limit-rate", "5", Some(Error), true),
            ("ssl-passthrough", "true", None, false),
            ("limit-rps", "five", Some(Error), true),
            ("limit-rate-after", "5", None, false),
            ("whitelist-source-range", "10.0.0.0/8", Some(Error), true),
            ("rewrite-target", "/$1", Some(Warning), false),
            ("use-regex", "false", None, false),
            ("proxy-buffering", "on", Some(Info), false),
            ("rewrite-targett", "/", Some(Warning), false),
            ("configuration-snippet", "# deny all\nmore_set_headers \"A: b\";", Some(Warning), false),
            ("configuration-snippet", "more_set_headers \"A: #\"; deny all;", Some(Error), true),
            ("server-snippet", "location /admin { return 403; }", Some(Error), true),
        ];
        for (name, value, level, closed) in cases {
            assert_eq!(one(name, value, false), (level, closed), "{name}: {value}");
        }
    }

    #[test]
    fn a_canary_is_neither_closed_nor_protected_by_its_own_annotations() {
        assert_eq!(one("auth-url", "http://auth", true), (Some(Level::Warning), false));
        assert_eq!(one("rewrite-target", "/", true), (Some(Level::Info), false));
        assert_eq!(one("upstream-hash-by", "$uri", true), (None, false));
    }

    #[test]
    fn misspellings_are_recognised() {
        let cases = [
            ("rewrite-targt", Some("rewrite-target")),
            ("canary-wieght", Some("canary-weight")),
            ("zzz", None),
        ];
        for (name, known) in cases {
            assert_eq!(nearest(name), known, "{name}");
        }
    }
}
