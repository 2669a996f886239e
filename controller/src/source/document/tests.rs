use super::*;

fn lines(text: &str) -> Vec<usize> {
    documents(text.as_bytes(), Format::Yaml).expect("valid").iter().map(|d| d.line).collect()
}

#[test]
fn documents_know_the_line_they_begin_on() {
    for (text, expected) in [
        ("", vec![]),
        ("a: 1\n", vec![1]),
        ("# comment\n\na: 1\n", vec![3]),
        ("---\na: 1\n---\nb: 2\n", vec![2, 4]),
        ("---\n---\n# nothing\n---\nb: 2\n---\n", vec![5]),
        ("a: 1\n---\n\n# why\nb: 2\n", vec![1, 5]),
        ("%YAML 1.2\n---\na: 1\n", vec![3]),
        ("a: 1\n...\n---\nb: 2\n", vec![1, 4]),
        ("--- {a: 1}\n--- {b: 2}\n", vec![1, 2]),
        ("a: |\n  text\n  ---\nb: 2\n", vec![1]),
        ("\u{feff}a: 1\n---\nb: 2\n", vec![1, 3]),
        ("---\r\na: 1\r\n---\r\nb: 2\r\n", vec![2, 4]),
    ] {
        assert_eq!(lines(text), expected, "{text:?}");
    }
}

#[test]
fn flow_style_with_trailing_commas_is_yaml_in_any_file() {
    let text = "{\n  kind: \"Ingress\", # comment\n  spec: {rules: [{host: \"a\",},],},\n}\n";
    for format in [Format::Yaml, Format::Json] {
        let found = documents(text.as_bytes(), format).expect("valid");
        assert_eq!(found.len(), 1);
        assert_eq!(found[0].value["spec"]["rules"][0]["host"], Value::from("a"));
    }
}

#[test]
fn json_is_read_as_json() {
    // Tabs, escaped slashes and surrogate pairs are JSON, but not YAML.
    let text = "{\n\t\"a\": \"\\/\\ud83d\\ude00\"}\n\n{\"b\": 1}";
    let found = documents(text.as_bytes(), Format::Json).expect("valid");
    assert_eq!(found.iter().map(|d| d.line).collect::<Vec<_>>(), [1, 4]);
    assert_eq!(found[0].value["a"], Value::from("/😀"));
    let error = documents(b"{\n  \"a\": 1\n", Format::Json).expect_err("unclosed");
    assert_eq!((error.line, error.column), (Some(3), Some(0)));
    assert_eq!(error.message, "EOF while parsing an object");
}

#[test]
fn errors_say_where() {
    for (text, line, column, message) in [
        ("a: 1\nb: [1, 2\nc: 3\n", 3, Some(2), "did not find expected ',' or ']'"),
        ("a: 1\n---\nb: 'open\n", 4, Some(1), "found unexpected end of stream"),
        ("a: 1\n\tb: 2\n", 2, Some(1), "found a tab character that violates indentation"),
        ("a: 1\na: 2\n", 1, Some(1), "duplicate entry with key \"a\""),
        ("a: *nowhere\n", 1, Some(4), "unknown anchor"),
        ("a: 1\n---\nb: 2\n  c: 3\n", 4, Some(4), "mapping values are not allowed in this context"),
    ] {
        let error = documents(text.as_bytes(), Format::Yaml).expect_err(text);
        assert_eq!((error.line, error.column), (Some(line), column), "{text:?}: {error:?}");
        assert!(error.message.contains(message), "{text:?}: {error:?}");
        assert!(!error.message.starts_with("at line"), "{error:?}");
    }
}

#[test]
fn hostile_texts_are_refused_quickly() {
    let bomb = {
        let mut text = "a0: &a0 [x, x, x, x, x, x, x, x, x]\n".to_owned();
        for level in 1..30 {
            let aliases = vec![format!("*a{}", level - 1); 9].join(", ");
            text.push_str(&format!("a{level}: &a{level} [{aliases}]\n"));
        }
        text
    };
    let nested = "[".repeat(1_000_000);
    let indented = (0..400).map(|depth| format!("{}a:\n", " ".repeat(depth))).collect::<String>();
    for (text, message) in [
        (bomb.as_bytes(), "repetition limit exceeded"),
        (nested.as_bytes(), "nested deeper"),
        (indented.as_bytes(), "recursion limit exceeded"),
        (&b"a: \xff\xfe\n"[..], "invalid leading UTF-8 octet"),
        (&b"a: \0\n"[..], "control characters are not allowed"),
    ] {
        let error = documents(text, Format::Yaml).expect_err(message);
        assert!(error.message.contains(message), "{error:?}");
    }
}
