use lockgate_proxy::Proxy;
use lockgate_proxy::config::Config;

use super::*;
use crate::source::Contents;

const SERVICE: &str = "
apiVersion: v1
kind: Service
metadata: {name: web}
spec: {ports: [{port: 80}]}
---
";

const INGRESS: &str = "
apiVersion: networking.k8s.io/v1
kind: Ingress
metadata: {name: shop}
spec:
  rules:
    - host: shop.example
      http:
        paths:
          - {path: /, pathType: Prefix, backend: {service: {name: web, port: {number: 80}}}}
---
";

fn snapshot(contents: &mut Contents, text: &str) -> Snapshot {
    contents.load_text(&std::path::Path::new("a.yaml").into(), text.as_bytes());
    contents.snapshot()
}

#[test]
fn what_is_wrong_is_said_once() {
    let mut contents = Contents::default();
    let mut translation = Translation::new(Options::default());
    let said = |translation: &mut Translation, snapshot: &Snapshot| {
        translation.desired = translation.translator.translate(&snapshot.store);
        let lines: Vec<String> = translation.news(snapshot).lines.into_iter().map(|(_, line)| line).collect();
        translation.update(snapshot);
        lines
    };
    let missing = snapshot(&mut contents, INGRESS);
    let lines = said(&mut translation, &missing);
    assert_eq!(lines.len(), 1, "{lines:?}");
    assert!(lines[0].starts_with("Ingress default/shop: .spec.rules[0]"), "{lines:?}");
    assert!(lines[0].contains("Service default/web does not exist"), "{lines:?}");
    assert_eq!(translation.tallies(), Tallies { refused: 1, ..Tallies::default() });
    assert_eq!(said(&mut translation, &missing), [""; 0]);

    let broken = snapshot(&mut contents, "a: [");
    let lines = said(&mut translation, &broken);
    assert_eq!(lines.len(), 1, "{lines:?}");
    assert!(lines[0].starts_with("a.yaml:"), "{lines:?}");

    let repaired = snapshot(&mut contents, &[SERVICE, INGRESS].concat());
    let lines = said(&mut translation, &repaired);
    assert!(lines.contains(&"a.yaml: no longer a problem".to_owned()), "{lines:?}");
    assert!(lines.contains(&"Ingress default/shop: served as written now".to_owned()), "{lines:?}");
    assert_eq!(translation.tallies(), Tallies { accepted: 1, ..Tallies::default() });

    said(&mut translation, &snapshot(&mut contents, ""));
    assert_eq!(translation.tallies(), Tallies::default());
}

#[test]
fn a_flood_of_problems_is_cut_short() {
    let mut contents = Contents::default();
    let many: String = (0..500).map(|n| INGRESS.replace("shop}", &format!("shop-{n}}}"))).collect();
    let snapshot = snapshot(&mut contents, &many);
    let mut translation = Translation::new(Options::default());
    translation.desired = translation.translator.translate(&snapshot.store);
    let lines = translation.news(&snapshot);
    assert_eq!(lines.lines.len(), LINES_MAX);
    assert!(lines.left_out >= 400);
}

#[tokio::test]
async fn only_what_differs_is_published() {
    let (proxy, publisher) = Proxy::start(Config { workers: 1, ..Config::default() }).expect("starts");
    let mut publishing = Publishing::new(publisher, proxy.live().clone());
    let mut contents = Contents::default();
    let mut translation = Translation::new(Options::default());
    for (text, differs) in [
        (SERVICE.to_owned(), false),
        ([SERVICE, INGRESS].concat(), true),
        (["# a comment\n", INGRESS, SERVICE].concat(), false),
        ([SERVICE, &INGRESS.replace("path: /,", "path: /a,")].concat(), true),
        (["a: [", INGRESS].concat(), false),
        (String::new(), true),
    ] {
        translation.update(&snapshot(&mut contents, &text));
        assert_eq!(publishing.publish(&translation), differs, "{text}");
    }
    assert_eq!(publishing.generation(), 3);
    assert_eq!(proxy.routes().load_full().generation(), 3);
}
