//! Changes to the header fields of requests and responses. Names and values are
//! checked when they are made: nothing that is not one field, and no field that
//! frames a message or ends at one hop, can become an edit.

use std::fmt;
use std::sync::Arc;

use http::{HeaderName, HeaderValue};
use serde::{Serialize, Serializer};

use crate::http::field::{Field, classify, is_token};
use crate::http::head::is_authority;

/// Most bytes of a field name.
const NAME_BYTES: usize = 256;
/// Most bytes of a field value (nginx's limit for one argument).
const VALUE_BYTES: usize = 4096;

/// What is changed in the head of a request on its way to an endpoint, and in
/// that of its response.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash, Serialize)]
pub struct HeaderEdits {
    /// Host (`:authority`) in place of the client's, which stays in `X-Forwarded-Host`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub host: Option<Authority>,
    /// What an HTTP/1 endpoint is told of its connection. `None`: nothing, so it stays.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub connection: Option<Persistence>,
    /// Of the request.
    #[serde(skip_serializing_if = "FieldEdits::is_empty")]
    pub request: FieldEdits,
    /// Of the response: an endpoint's, or our own in its place.
    #[serde(skip_serializing_if = "FieldEdits::is_empty")]
    pub response: FieldEdits,
}

impl HeaderEdits {
    /// Whether nothing is changed.
    pub fn is_empty(&self) -> bool {
        *self == HeaderEdits::default()
    }
}

/// What a request says of the connection it comes on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Persistence {
    /// `Connection: keep-alive`.
    KeepAlive,
    /// `Connection: close`: the connection carries no further request.
    Close,
}

/// A host, perhaps with a port (RFC 3986 section 3.2), as Host and `:authority` have it.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize)]
#[serde(transparent)]
pub struct Authority(Arc<str>);

impl Authority {
    /// # Errors
    /// What is wrong with `text`, to be put behind it.
    pub fn new(text: &str) -> Result<Authority, &'static str> {
        match !text.is_empty() && is_authority(text.as_bytes()) {
            true => Ok(Authority(text.into())),
            false => Err("is neither a host nor a host and a port"),
        }
    }

    /// As written.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

/// The name of a field that may be edited, as written. Compared without regard to case.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct FieldName {
    written: Arc<str>,
    name: HeaderName,
}

impl FieldName {
    /// # Errors
    /// What is wrong with `text`, to be put behind it.
    pub fn new(text: &str) -> Result<FieldName, &'static str> {
        let name = HeaderName::from_bytes(text.as_bytes()).ok();
        let name = name.filter(|_| is_token(text.as_bytes()) && text.len() <= NAME_BYTES);
        let name = name.ok_or("cannot be the name of a header")?;
        let lower = name.as_str();
        if matches!(
            classify(lower.as_bytes()),
            Field::Connection
                | Field::ContentLength
                | Field::TransferEncoding
                | Field::Upgrade
                | Field::Expect
                | Field::Te
                | Field::HopByHop
        ) || lower == "trailer"
            || lower.starts_with("sec-websocket-")
        {
            return Err("says how the message is delimited or belongs to one connection: it cannot be set");
        }
        match lower {
            "host" => Err("says where the request goes: it cannot be set like others"),
            _ => Ok(FieldName { written: text.into(), name }),
        }
    }

    /// As written.
    pub fn as_str(&self) -> &str {
        &self.written
    }
}

/// What a field says: visible ASCII, spaces and tabs, at most 4,096 bytes, not empty.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct FieldValue(Arc<str>);

impl FieldValue {
    /// White space around `text` is left out.
    ///
    /// # Errors
    /// What is wrong with it.
    pub fn new(text: &str) -> Result<FieldValue, &'static str> {
        let text = text.trim_matches([' ', '\t']);
        if text.is_empty() {
            return Err("is empty");
        }
        if text.len() > VALUE_BYTES {
            return Err("is longer than 4096 bytes");
        }
        match text.bytes().all(|byte| byte.is_ascii_graphic() || matches!(byte, b' ' | b'\t')) {
            true => Ok(FieldValue(text.into())),
            false => Err("has a character that is not visible ASCII"),
        }
    }

    /// Without white space around it.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

/// One change. Shown as `set Name: value`, `add Name: value`, `remove Name`.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum FieldEdit {
    /// This field, in place of all that have its name.
    Set(FieldName, FieldValue),
    /// This field, beside those that have its name.
    Add(FieldName, FieldValue),
    /// No field of this name.
    Remove(FieldName),
}

impl FieldEdit {
    /// Of the field that is changed.
    pub fn name(&self) -> &FieldName {
        match self {
            FieldEdit::Set(name, _) | FieldEdit::Add(name, _) | FieldEdit::Remove(name) => name,
        }
    }
}

impl fmt::Display for FieldEdit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let name = self.name().as_str();
        match self {
            FieldEdit::Set(_, value) => write!(f, "set {name}: {}", value.as_str()),
            FieldEdit::Add(_, value) => write!(f, "add {name}: {}", value.as_str()),
            FieldEdit::Remove(_) => write!(f, "remove {name}"),
        }
    }
}

impl Serialize for FieldEdit {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

/// Changes to the fields of one head, and what they come to, ready to be copied.
#[derive(Clone, Debug, Default)]
pub struct FieldEdits {
    edits: Vec<FieldEdit>,
    /// Fields of these names are not taken over.
    pub(crate) gone: Box<[HeaderName]>,
    /// Bit n: a name of `gone` has n bytes, modulo 64.
    pub(crate) lengths: u64,
    /// Among `gone` is a field that we write ourselves.
    pub(crate) replaces_ours: bool,
    /// The new fields, as lines of HTTP/1.
    pub(crate) lines: Box<[u8]>,
    /// The same for HTTP/2.
    pub(crate) fields: Box<[(HeaderName, HeaderValue)]>,
}

impl FieldEdits {
    /// In this order; a later `Set` or `Remove` of a name takes the place of what came before it.
    pub fn new(edits: impl IntoIterator<Item = FieldEdit>) -> FieldEdits {
        let mut kept: Vec<FieldEdit> = Vec::new();
        for edit in edits {
            if !matches!(edit, FieldEdit::Add(..)) {
                kept.retain(|earlier| earlier.name().name != edit.name().name);
            }
            kept.push(edit);
        }
        let gone: Box<[HeaderName]> = kept
            .iter()
            .filter(|edit| !matches!(edit, FieldEdit::Add(..)))
            .map(|edit| edit.name().name.clone())
            .collect();
        let mut lines = Vec::new();
        let mut fields = Vec::new();
        for edit in &kept {
            let (FieldEdit::Set(name, value) | FieldEdit::Add(name, value)) = edit else { continue };
            for part in [name.as_str(), ": ", value.as_str(), "\r\n"] {
                lines.extend_from_slice(part.as_bytes());
            }
            // What a FieldValue has, a HeaderValue may have.
            fields.extend(HeaderValue::from_str(value.as_str()).map(|value| (name.name.clone(), value)));
        }
        FieldEdits {
            lengths: gone.iter().fold(0, |lengths, name| lengths | 1 << (name.as_str().len() & 63)),
            replaces_ours: gone.iter().any(|name| classify(name.as_str().as_bytes()) != Field::Other),
            gone,
            lines: lines.into(),
            fields: fields.into(),
            edits: kept,
        }
    }

    /// Whether nothing is changed.
    pub fn is_empty(&self) -> bool {
        self.edits.is_empty()
    }

    /// In the order they are made.
    pub fn iter(&self) -> impl Iterator<Item = &FieldEdit> {
        self.edits.iter()
    }
}

// The rest follows from the edits.
impl PartialEq for FieldEdits {
    fn eq(&self, other: &FieldEdits) -> bool {
        self.edits == other.edits
    }
}

impl Eq for FieldEdits {}

impl std::hash::Hash for FieldEdits {
    fn hash<H: std::hash::Hasher>(&self, state: &mut H) {
        self.edits.hash(state);
    }
}

impl Serialize for FieldEdits {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_seq(&self.edits)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn set(name: &str, value: &str) -> FieldEdit {
        FieldEdit::Set(FieldName::new(name).unwrap(), FieldValue::new(value).unwrap())
    }

    #[test]
    fn names_that_frame_or_belong_to_a_connection_cannot_be_edited() {
        for (name, allowed) in [
            ("X-Frame-Options", true),
            ("x_app", true),
            ("Server", true),
            ("Date", true),
            ("Cookie", true),
            ("Set-Cookie", true),
            ("X-Forwarded-Proto", true),
            ("Strict-Transport-Security", true),
            ("Content-Type", true),
            ("Content-Length", false),
            ("CONTENT_LENGTH", false),
            ("Transfer-Encoding", false),
            ("transfer_encoding", false),
            ("Connection", false),
            ("Keep-Alive", false),
            ("Proxy-Connection", false),
            ("Proxy", false),
            ("TE", false),
            ("Trailer", false),
            ("Upgrade", false),
            ("HTTP2-Settings", false),
            ("Expect", false),
            ("Host", false),
            ("Sec-WebSocket-Accept", false),
            (":authority", false),
            ("", false),
            ("A B", false),
            ("A:", false),
            ("A\r\nB", false),
            ("Ä", false),
            (&"x".repeat(NAME_BYTES), true),
            (&"x".repeat(NAME_BYTES + 1), false),
        ] {
            assert_eq!(FieldName::new(name).is_ok(), allowed, "{name:?}");
        }
    }

    #[test]
    fn values_are_one_line_of_visible_ascii() {
        for (text, value) in [
            ("a", Some("a")),
            (" a\tb ", Some("a\tb")),
            ("$remote_addr", Some("$remote_addr")),
            ("default-src 'self'; img-src *", Some("default-src 'self'; img-src *")),
            ("", None),
            (" \t", None),
            ("a\r\nSet-Cookie: b", None),
            ("a\nb", None),
            ("a\0", None),
            ("a\u{7f}", None),
            ("é", None),
            (&"x".repeat(VALUE_BYTES), Some(&*"x".repeat(VALUE_BYTES))),
            (&"x".repeat(VALUE_BYTES + 1), None),
        ] {
            assert_eq!(FieldValue::new(text).ok().as_ref().map(FieldValue::as_str), value, "{text:?}");
        }
    }

    #[test]
    fn authorities() {
        for (text, valid) in [
            ("app.internal", true),
            ("app:8080", true),
            ("[::1]:80", true),
            ("", false),
            ("a b", false),
            ("a/b", false),
            ("$host", false),
            ("a\r\nX: y", false),
            ("a:99999", false),
        ] {
            assert_eq!(Authority::new(text).is_ok(), valid, "{text:?}");
        }
    }

    #[test]
    fn the_last_word_about_a_name_counts() {
        let add = |name: &str, value: &str| {
            FieldEdit::Add(FieldName::new(name).unwrap(), FieldValue::new(value).unwrap())
        };
        let edits = FieldEdits::new([
            set("X-A", "1"),
            add("X-B", "2"),
            set("x-a", "3"),
            add("X-B", "4"),
            set("X-C", "5"),
            FieldEdit::Remove(FieldName::new("x-c").unwrap()),
        ]);
        let shown: Vec<String> = edits.iter().map(FieldEdit::to_string).collect();
        assert_eq!(shown, ["add X-B: 2", "set x-a: 3", "add X-B: 4", "remove x-c"]);
        assert_eq!(&*edits.lines, b"X-B: 2\r\nx-a: 3\r\nX-B: 4\r\n");
        assert!(!edits.replaces_ours && edits.lengths == 1 << 3);
        assert!(FieldEdits::new([set("X-Real-IP", "1.2.3.4")]).replaces_ours);
    }
}
