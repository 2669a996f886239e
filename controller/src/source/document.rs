//! Text in, documents with their line numbers out. Pure: no file is touched here.

use serde::Deserialize;
use serde_yaml::Value;

/// One document of a file.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Document {
    /// Line of its first content, counted from 1.
    pub(crate) line: usize,
    /// What it says. Never null: empty documents are left out.
    pub(crate) value: Value,
}

/// Why a text is not YAML or JSON, and where.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct SyntaxError {
    /// Counted from 1.
    pub(crate) line: Option<usize>,
    /// Counted from 1.
    pub(crate) column: Option<usize>,
    /// In the parser's words, without the position.
    pub(crate) message: String,
}

/// How a file is written, by its extension.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Format {
    Yaml,
    Json,
}

/// Brackets that may be open at once, in strings and comments too. The parser
/// stops at 128 levels, but only after its scanner has spent time on all of
/// them that grows with their square.
const FLOW_DEPTH_MAX: usize = 10_000;

/// Splits a text into its documents. All or nothing: half a file is not used,
/// since what is missing could be what protects the rest.
pub(crate) fn documents(text: &[u8], format: Format) -> Result<Vec<Document>, SyntaxError> {
    match format {
        Format::Yaml => yaml(text),
        // Flow style with comments or trailing commas passes for JSON in many
        // repositories; the JSON error is the helpful one when both fail.
        Format::Json => json(text).or_else(|error| yaml(text).map_err(|_| error)),
    }
}

fn yaml(text: &[u8]) -> Result<Vec<Document>, SyntaxError> {
    let utf8 = std::str::from_utf8(text).ok();
    if let Some(error) = utf8.and_then(too_deep) {
        return Err(error);
    }
    let starts = utf8.map(document_lines).unwrap_or_default();
    let mut found = Vec::new();
    for (index, document) in serde_yaml::Deserializer::from_slice(text).enumerate() {
        let start = starts.get(index).copied().unwrap_or(1);
        match Value::deserialize(document) {
            Ok(Value::Null) => {}
            Ok(value) => found.push(Document { line: start, value }),
            Err(error) => return Err(yaml_error(&error, start)),
        }
    }
    Ok(found)
}

fn json(text: &[u8]) -> Result<Vec<Document>, SyntaxError> {
    let text = text.strip_prefix(b"\xef\xbb\xbf").unwrap_or(text);
    let mut values = serde_json::Deserializer::from_slice(text).into_iter::<Value>();
    let mut found = Vec::new();
    // Lines are counted on from the document before: from the top each time, a file of many would take its square.
    let (mut line, mut counted) = (1, 0);
    loop {
        let rest = &text[values.byte_offset()..];
        let blank = rest.iter().position(|byte| !byte.is_ascii_whitespace()).unwrap_or(rest.len());
        let start = text.len() - rest.len() + blank;
        line += text[counted..start].iter().filter(|byte| **byte == b'\n').count();
        counted = start;
        match values.next() {
            None => return Ok(found),
            Some(Ok(Value::Null)) => {}
            Some(Ok(value)) => found.push(Document { line, value }),
            Some(Err(error)) => {
                return Err(SyntaxError {
                    line: Some(error.line()),
                    column: Some(error.column()),
                    message: without_position(&error.to_string()),
                });
            }
        }
    }
}

fn yaml_error(error: &serde_yaml::Error, start: usize) -> SyntaxError {
    let location = error.location();
    SyntaxError {
        line: Some(location.as_ref().map_or(start, |l| l.line())),
        column: location.as_ref().map(|l| l.column()),
        message: without_position(&error.to_string()),
    }
}

/// Drops ` at line 3 column 5`, which the caller prints as `file:3:5`.
fn without_position(message: &str) -> String {
    match message.find(" at line ") {
        Some(at) if message[at..].contains(" column ") => {
            let rest = &message[at + " at line ".len()..];
            let end = rest.find(" column ").map(|c| c + " column ".len()).unwrap_or(0);
            let tail = rest[end..].trim_start_matches(|c: char| c.is_ascii_digit());
            format!("{}{}", &message[..at], tail)
        }
        _ => message.to_owned(),
    }
}

/// The line on which each document begins. A `---` in the first column is
/// always a marker: inside a scalar it would be a syntax error.
fn document_lines(text: &str) -> Vec<usize> {
    let mut starts = Vec::new();
    // A document is open from its marker (or first content) to the next marker.
    let mut open = false;
    let mut found_content = false;
    for (index, line) in text.lines().enumerate() {
        let line = line.strip_prefix('\u{feff}').unwrap_or(line);
        let after = line.strip_prefix("---").filter(|rest| rest.is_empty() || rest.starts_with([' ', '\t']));
        if let Some(after) = after {
            starts.push(index + 1);
            open = true;
            found_content = is_content(after);
        } else if line == "..." || line.starts_with("... ") {
            open = false;
            found_content = false;
        } else if !found_content && is_content(line) && (open || !line.starts_with('%')) {
            match starts.last_mut() {
                Some(start) if open => *start = index + 1,
                _ => starts.push(index + 1),
            }
            open = true;
            found_content = true;
        }
    }
    starts
}

fn is_content(line: &str) -> bool {
    let line = line.trim_start();
    !line.is_empty() && !line.starts_with('#')
}

fn too_deep(text: &str) -> Option<SyntaxError> {
    let mut depth = 0usize;
    let mut line = 1;
    for byte in text.bytes() {
        match byte {
            b'\n' => line += 1,
            b'[' | b'{' => depth += 1,
            b']' | b'}' => depth = depth.saturating_sub(1),
            _ => {}
        }
        if depth > FLOW_DEPTH_MAX {
            let message = format!("brackets are nested deeper than {FLOW_DEPTH_MAX}");
            return Some(SyntaxError { line: Some(line), column: None, message });
        }
    }
    None
}

#[cfg(test)]
mod tests;
