//! Plain text for people: aligned columns, and colours on a terminal.

use std::fmt::Write as _;
use std::io::{IsTerminal, Write as _};

/// What a piece of text means; the colour follows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Tone {
    Plain,
    Heading,
    Good,
    Warning,
    Bad,
    Faint,
}

/// Text that is being put together, with or without colours.
pub(crate) struct Text {
    out: String,
    colours: bool,
}

impl Text {
    pub(crate) fn new(colours: bool) -> Text {
        Text { out: String::new(), colours }
    }

    /// For standard output: colours if a person reads it there and has not
    /// asked for none (no-color.org).
    pub(crate) fn for_stdout() -> Text {
        let set = |name| std::env::var_os(name).is_some_and(|value| !value.is_empty());
        let dumb = std::env::var_os("TERM").is_some_and(|term| term == "dumb");
        Text::new(std::io::stdout().is_terminal() && !set("NO_COLOR") && !dumb)
    }

    pub(crate) fn put(&mut self, tone: Tone, text: &str) -> &mut Text {
        let code = match tone {
            Tone::Plain => "",
            Tone::Heading => "1",
            Tone::Good => "32",
            Tone::Warning => "33",
            Tone::Bad => "31",
            Tone::Faint => "2",
        };
        if self.colours && !code.is_empty() && !text.is_empty() {
            // Writing to a String cannot fail.
            let _ = write!(self.out, "\u{1b}[{code}m{text}\u{1b}[0m");
        } else {
            self.out.push_str(text);
        }
        self
    }

    pub(crate) fn plain(&mut self, text: &str) -> &mut Text {
        self.put(Tone::Plain, text)
    }

    pub(crate) fn line(&mut self) -> &mut Text {
        // Padding of the last column is of no use to anyone.
        self.out.truncate(self.out.trim_end_matches(' ').len());
        self.out.push('\n');
        self
    }

    /// Rows of cells below each other, `indent` from the left, two spaces apart.
    pub(crate) fn table(&mut self, indent: usize, rows: &[Vec<(Tone, String)>]) -> &mut Text {
        let columns = rows.iter().map(Vec::len).max().unwrap_or(0);
        let width = |column: usize| {
            let cells =
                rows.iter().filter(|row| column + 1 < row.len()).map(|row| row[column].1.chars().count());
            cells.max().unwrap_or(0)
        };
        let widths: Vec<usize> = (0..columns).map(width).collect();
        for row in rows {
            self.plain(&" ".repeat(indent));
            for (column, (tone, cell)) in row.iter().enumerate() {
                self.put(*tone, cell);
                if column + 1 < row.len() {
                    let pad = widths[column].saturating_sub(cell.chars().count()) + 2;
                    self.plain(&" ".repeat(pad));
                }
            }
            self.line();
        }
        self
    }

    /// Writes everything to standard output. A reader that has seen enough
    /// (`| head`) is no error.
    pub(crate) fn print(self) {
        let mut out = std::io::stdout().lock();
        let _ = out.write_all(self.out.as_bytes()).and_then(|()| out.flush());
    }

    pub(crate) fn finish(self) -> String {
        self.out
    }
}

/// `1 file`, `2 files`, `3 Ingresses`.
pub(crate) fn count(n: usize, noun: &str) -> String {
    let plural = match noun {
        _ if n == 1 => "",
        _ if noun.ends_with('s') || noun.ends_with("ch") => "es",
        _ => "s",
    };
    match noun.strip_suffix('y') {
        Some(stem) if n != 1 && !stem.ends_with(['a', 'e', 'o', 'u']) => format!("{n} {stem}ies"),
        _ => format!("{n} {noun}{plural}"),
    }
}

/// Control characters of foreign text would reach the terminal as commands.
pub(crate) fn printable(text: &str) -> String {
    if text.chars().all(|c| !c.is_control()) {
        return text.to_owned();
    }
    text.chars()
        .flat_map(|c| if c.is_control() { c.escape_default().collect::<Vec<_>>() } else { vec![c] })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_line_up() {
        let cell = |text: &str| (Tone::Plain, text.to_owned());
        let mut text = Text::new(false);
        text.table(
            2,
            &[
                vec![cell("a"), cell("bcd"), cell("e")],
                vec![cell("abc"), cell("d")],
                vec![cell("ä"), cell(""), cell("x")],
            ],
        );
        assert_eq!(text.finish(), "  a    bcd  e\n  abc  d\n  ä         x\n");
    }

    #[test]
    fn colours_are_only_for_terminals() {
        let mut text = Text::new(true);
        text.put(Tone::Bad, "no").plain(" ").put(Tone::Good, "").line();
        assert_eq!(text.finish(), "\u{1b}[31mno\u{1b}[0m\n");
    }

    #[test]
    fn words_are_counted() {
        for (n, noun, expected) in [
            (1, "file", "1 file"),
            (0, "file", "0 files"),
            (2, "Ingress", "2 Ingresses"),
            (1, "Ingress", "1 Ingress"),
            (3, "IngressClass", "3 IngressClasses"),
            (2, "NetworkPolicy", "2 NetworkPolicies"),
            (2, "Gateway", "2 Gateways"),
        ] {
            assert_eq!(count(n, noun), expected);
        }
    }

    #[test]
    fn foreign_text_cannot_command_the_terminal() {
        assert_eq!(printable("a\u{1b}[31mb\n"), "a\\u{1b}[31mb\\n");
    }
}
