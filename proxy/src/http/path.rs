//! The path that rules are matched on: percent-decoded, dot segments resolved,
//! slashes merged, as nginx does before choosing a location. The endpoint
//! receives the target as the client wrote it.

use super::head::Reject;

/// The path that rules are matched on, or why a request with `path` is answered 400.
///
/// # Errors
/// Malformed percent-encoding, a NUL, or a path that leads above the root.
pub fn normalise_path(path: &[u8]) -> Result<Vec<u8>, &'static str> {
    normalise(path, &mut Vec::new()).map(<[u8]>::to_vec).map_err(|reject| reject.reason)
}

/// Normalises `path`, borrowing it when nothing needs to change.
pub(crate) fn normalise<'a>(path: &'a [u8], scratch: &'a mut Vec<u8>) -> Result<&'a [u8], Reject> {
    if path == b"*" {
        return Ok(b"/");
    }
    if is_normal(path) {
        return Ok(path);
    }
    scratch.clear();
    decode(path, scratch)?;
    resolve(scratch)?;
    Ok(scratch)
}

fn is_normal(path: &[u8]) -> bool {
    let mut previous = 0;
    for &byte in path {
        match byte {
            b'%' => return false,
            b'/' | b'.' if previous == b'/' => return false,
            _ => previous = byte,
        }
    }
    true
}

fn decode(path: &[u8], out: &mut Vec<u8>) -> Result<(), Reject> {
    let mut rest = path;
    while let Some((&byte, tail)) = rest.split_first() {
        rest = tail;
        if byte != b'%' {
            out.push(byte);
            continue;
        }
        let decoded = match tail {
            [high, low, ..] => hex(*high).zip(hex(*low)).map(|(h, l)| h << 4 | l),
            _ => None,
        };
        match decoded {
            None => return Err(Reject { status: 400, reason: "malformed percent-encoding" }),
            Some(0) => return Err(Reject { status: 400, reason: "NUL in the path" }),
            Some(byte) => out.push(byte),
        }
        rest = &tail[2..];
    }
    Ok(())
}

fn hex(digit: u8) -> Option<u8> {
    (digit as char).to_digit(16).map(|d| d as u8)
}

/// In place: `//` and `/./` become `/`, `/x/../` becomes `/`; above the root is an error.
fn resolve(path: &mut Vec<u8>) -> Result<(), Reject> {
    let mut write = 0;
    let mut read = 0;
    while read < path.len() {
        // At the start of a segment: path[read] is a slash.
        let start = read + 1;
        let end = path[start..].iter().position(|&b| b == b'/').map_or(path.len(), |at| start + at);
        let last = end == path.len();
        match &path[start..end] {
            b"" | b"." if last => {
                path[write] = b'/';
                write += 1;
            }
            b"" | b"." => {}
            b".." => {
                let Some(parent) = path[..write].iter().rposition(|&b| b == b'/') else {
                    return Err(Reject { status: 400, reason: "path leads above the root" });
                };
                write = parent;
                if last {
                    path[write] = b'/';
                    write += 1;
                }
            }
            _ => {
                path.copy_within(read..end, write);
                write += end - read;
            }
        }
        read = end;
    }
    path.truncate(write);
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn normal(path: &str) -> Result<String, u16> {
        let mut scratch = Vec::new();
        normalise(path.as_bytes(), &mut scratch)
            .map(|p| String::from_utf8_lossy(p).into_owned())
            .map_err(|r| r.status)
    }

    #[test]
    fn table() {
        for (path, expected) in [
            ("/", Ok("/")),
            ("/a/b", Ok("/a/b")),
            ("/a//b", Ok("/a/b")),
            ("//", Ok("/")),
            ("/a/./b", Ok("/a/b")),
            ("/a/.", Ok("/a/")),
            ("/a/../b", Ok("/b")),
            ("/a/..", Ok("/")),
            ("/a/b/..", Ok("/a/")),
            ("/a/b/../", Ok("/a/")),
            ("/..", Err(400)),
            ("/a/../../b", Err(400)),
            ("/%61dmin", Ok("/admin")),
            ("/public/%2e%2e/admin", Ok("/admin")),
            ("/a%2Fb", Ok("/a/b")),
            ("/.well-known/x", Ok("/.well-known/x")),
            ("/...", Ok("/...")),
            ("/a%", Err(400)),
            ("/a%2", Err(400)),
            ("/a%zz", Err(400)),
            ("/a%00", Err(400)),
            ("*", Ok("/")),
        ] {
            assert_eq!(normal(path), expected.map(str::to_owned), "{path}");
        }
    }

    #[test]
    fn normal_form_is_a_fixed_point() {
        let mut random = fastrand::Rng::with_seed(7);
        for _ in 0..20_000 {
            let text: String = (0..random.usize(0..12))
                .map(|_| *random.choice(&['/', '.', 'a', 'b']).unwrap_or(&'a'))
                .collect();
            if let Ok(once) = normal(&format!("/{text}")) {
                assert_eq!(normal(&once), Ok(once.clone()), "from /{text}");
            }
        }
    }
}
