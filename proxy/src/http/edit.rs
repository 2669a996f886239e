//! Header edits, carried out: what is not taken over, and what is put in its place.

use http::HeaderMap;

use crate::table::{FieldEdits, HeaderEdits, Persistence};

impl HeaderEdits {
    /// The host that endpoints are asked for, where the client asked for `host`.
    pub(crate) fn host_or<'a>(&'a self, host: &'a [u8]) -> &'a [u8] {
        self.host.as_ref().map_or(host, |own| own.as_str().as_bytes())
    }

    /// The endpoint's connection carries no further request.
    pub(crate) fn closes(&self) -> bool {
        self.connection == Some(Persistence::Close)
    }

    /// What is said of an HTTP/1 endpoint's connection.
    pub(crate) fn connection_line(&self) -> &'static [u8] {
        match self.connection {
            None => b"",
            Some(Persistence::KeepAlive) => b"Connection: keep-alive\r\n",
            Some(Persistence::Close) => b"Connection: close\r\n",
        }
    }
}

impl FieldEdits {
    /// Whether a field of this name is not taken over.
    pub(crate) fn drops(&self, name: &[u8]) -> bool {
        self.lengths & (1 << (name.len() & 63)) != 0
            && self.gone.iter().any(|gone| gone.as_str().as_bytes().eq_ignore_ascii_case(name))
    }

    /// Appends those of some complete lines that are not replaced, none of which is folded.
    pub(crate) fn write_kept(&self, out: &mut Vec<u8>, lines: &[u8]) {
        for line in lines.split_inclusive(|&byte| byte == b'\n') {
            let name = memchr::memchr(b':', line).map_or(line, |end| &line[..end]);
            if !self.drops(name) {
                out.extend_from_slice(line);
            }
        }
    }

    /// The same for a map of fields.
    pub(crate) fn apply(&self, headers: &mut HeaderMap) {
        for name in &self.gone {
            headers.remove(name);
        }
        for (name, value) in &self.fields {
            headers.append(name.clone(), value.clone());
        }
    }
}

/// [`FieldEdits::drops`]; without edits nothing is dropped.
pub(crate) fn drops(edits: Option<&FieldEdits>, name: &[u8]) -> bool {
    edits.is_some_and(|edits| edits.drops(name))
}
