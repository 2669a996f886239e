use crate::objects::{ConfigMap, Level, Meta, Object};

use super::*;

fn config_map(namespace: &str, data: &[(&str, &str)]) -> ConfigMap {
    let meta = Meta { namespace: namespace.into(), name: "h".into(), ..Meta::default() };
    let data = data.iter().map(|(name, value)| ((*name).into(), (*value).into())).collect();
    ConfigMap { meta, data }
}

#[test]
fn what_the_operator_sets() {
    let long = "x".repeat(4097);
    let cases: [(&[(&str, &str)], &[&str], usize); 10] = [
        (&[("X-A", "1"), ("X-B", " two ")], &["set X-A: 1", "set X-B: two"], 0),
        // An empty value takes the field away, as in nginx.
        (&[("Server", "")], &["remove Server"], 0),
        (&[("X-A", "1"), ("x-a", "2")], &["set X-A: 1"], 1),
        (&[("X A", "1"), ("X-B", "2")], &["set X-B: 2"], 1),
        (&[("X-A", "1\r\nX-B: 2"), ("X-C", "é")], &[], 2),
        (&[("X-A", &long)], &[], 1),
        (&[("Content-Length", "0"), ("Transfer-Encoding", "chunked"), ("connection", "x")], &[], 3),
        (&[("Host", "evil"), ("TE", "x"), ("Upgrade", "x"), ("Proxy", "x")], &[], 4),
        (&[("X-A", "t=${msec}"), ("X-B", "$remote_addr"), ("X-C", "5 $")], &["set X-C: 5 $"], 2),
        (&[("X-Forwarded-Proto", "https")], &["set X-Forwarded-Proto: https"], 0),
    ];
    for (data, expected, errors) in cases {
        let mut notices = Vec::new();
        let edits = of_operator(&config_map("o", data), &mut notices);
        assert_eq!(edits.iter().map(ToString::to_string).collect::<Vec<_>>(), expected, "{data:?}");
        assert_eq!(notices.len(), errors, "{data:?}: {notices:?}");
        for notice in notices {
            assert!(notice.level == Level::Error && notice.field.starts_with(".data["), "{notice:?}");
            assert!(!notice.remedy.is_empty());
        }
    }
    let names: Vec<String> = (0..MOST_FIELDS + 5).map(|n| format!("X-{n}")).collect();
    let many: Vec<(&str, &str)> = names.iter().map(|name| (&**name, "1")).collect();
    let mut notices = Vec::new();
    assert_eq!(of_operator(&config_map("o", &many), &mut notices).len(), MOST_FIELDS);
    assert_eq!(notices.len(), 1);
}

/// All of it or nothing: a part might be the part that does not protect.
#[test]
fn what_an_ingress_may_set() {
    let options = HeaderOptions {
        allowed_response_headers: vec!["x-frame-options".into(), "x-b".into(), "content-length".into()],
        ..HeaderOptions::default()
    };
    let cases: [(&[(&str, &str)], Result<&[&str], &str>); 7] = [
        (&[("X-Frame-Options", "DENY")], Ok(&["set X-Frame-Options: DENY"])),
        (&[("x-b", "$remote_addr")], Ok(&["set x-b: $remote_addr"])),
        (&[], Ok(&[])),
        (&[("X-B", "1"), ("X-Secret", "2")], Err("\"X-Secret\", which Ingresses may not set here")),
        (&[("X-B", "1\r\nX-C: 2")], Err("has a character that is not visible ASCII")),
        (&[("X-B", "")], Err("is empty")),
        (&[("Content-Length", "5")], Err("cannot be set")),
    ];
    for (data, expected) in cases {
        let mut store = Store::default();
        store.apply(Object::ConfigMap(config_map("shop", data)));
        match (of_ingress(&Key::new("shop", "h"), "shop", &store, &options), expected) {
            (Custom::Edits(edits), Ok(expected)) => {
                assert_eq!(edits.iter().map(ToString::to_string).collect::<Vec<_>>(), expected);
            }
            (Custom::Refused { message, remedy }, Err(expected)) => {
                assert!(message.contains(expected), "{data:?}: {message}");
                assert!(!remedy.is_empty());
            }
            (made, _) => panic!("{data:?}: {made:?}"),
        }
    }
    for key in [Key::new("", "h"), Key::new("shop", "h")] {
        assert!(matches!(of_ingress(&key, "shop", &Store::default(), &options), Custom::Refused { .. }));
    }
}

#[test]
fn contents_of_another_namespace_are_not_told() {
    let mut store = Store::default();
    store.apply(Object::ConfigMap(config_map("secretive", &[("db-password", "hunter2")])));
    let key = Key::new("secretive", "h");
    let Custom::Refused { message, .. } = of_ingress(&key, "shop", &store, &HeaderOptions::default()) else {
        panic!("allowed");
    };
    assert!(!message.contains("db-password") && !message.contains("hunter2"), "{message}");
}
