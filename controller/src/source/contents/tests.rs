use super::*;
use crate::source::document::{Format, documents};

fn service(name: &str, port: u16) -> String {
    format!(
        "apiVersion: v1\nkind: Service\nmetadata: {{name: {name}}}\nspec: {{ports: [{{port: {port}}}]}}\n---\n"
    )
}

fn ingress(name: &str) -> String {
    format!(
        "apiVersion: networking.k8s.io/v1\nkind: Ingress\nmetadata: {{name: {name}}}\n\
         spec: {{defaultBackend: {{service: {{name: a, port: {{number: 80}}}}}}}}\n---\n"
    )
}

#[derive(Default)]
struct Fixture {
    contents: Contents,
}

impl Fixture {
    fn load(&mut self, path: &str, text: &str) {
        let documents = documents(text.as_bytes(), Format::Yaml).expect("valid YAML");
        self.contents.load(&Path::new(path).into(), documents);
    }

    fn remove(&mut self, path: &str) {
        self.contents.remove(&Path::new(path).into());
    }

    /// The store that loading exactly these texts in one file would give.
    fn assert_store_is(&self, texts: &[String]) {
        let mut expected = Fixture::default();
        expected.load("expected.yaml", &texts.concat());
        assert!(self.contents.store == expected.contents.store, "the store differs from {texts:?}");
    }

    fn notices(&self, name: &str) -> Vec<String> {
        let of_name = self.contents.notices.iter().filter(|(reference, _)| &*reference.name == name);
        of_name.flat_map(|(_, notices)| notices.iter().map(|n| n.message.to_string())).collect()
    }
}

#[test]
fn the_store_follows_the_files() {
    let mut fixture = Fixture::default();
    fixture.load("a.yaml", &[service("a", 80), service("b", 80)].concat());
    fixture.load("b.yaml", &ingress("web"));
    fixture.assert_store_is(&[service("a", 80), service("b", 80), ingress("web")]);
    fixture.load("a.yaml", &[service("b", 81), service("c", 80)].concat());
    fixture.assert_store_is(&[service("b", 81), service("c", 80), ingress("web")]);
    fixture.remove("b.yaml");
    fixture.assert_store_is(&[service("b", 81), service("c", 80)]);
    fixture.load("a.yaml", "");
    fixture.assert_store_is(&[]);
    assert!(fixture.contents.holders.is_empty());
}

#[test]
fn of_two_files_with_the_same_object_the_last_path_wins() {
    let mut fixture = Fixture::default();
    fixture.load("b.yaml", &service("a", 2));
    fixture.load("a.yaml", &service("a", 1));
    fixture.assert_store_is(&[service("a", 2)]);
    assert_eq!(fixture.notices("a"), ["is in b.yaml and in a.yaml; the first is used"]);
    fixture.remove("b.yaml");
    fixture.assert_store_is(&[service("a", 1)]);
    assert!(fixture.notices("a").is_empty());
}

#[test]
fn an_object_twice_in_one_file_is_reported() {
    let mut fixture = Fixture::default();
    fixture.load("a.yaml", &[service("a", 1), service("a", 2)].concat());
    fixture.assert_store_is(&[service("a", 2)]);
    assert_eq!(fixture.notices("a"), ["is in this file more than once; the last one is used"]);
}

#[test]
fn an_invalid_object_keeps_its_last_valid_version_and_leaves_its_neighbours_alone() {
    let broken = "apiVersion: networking.k8s.io/v1\nkind: Ingress\nmetadata: {name: web}\nspec: oops\n---\n";
    let mut fixture = Fixture::default();
    fixture.load("a.yaml", &[ingress("web"), service("a", 80)].concat());
    fixture.load("a.yaml", &[broken.to_owned(), service("a", 81), service("b", 80)].concat());
    fixture.assert_store_is(&[ingress("web"), service("a", 81), service("b", 80)]);
    let notices = fixture.notices("web");
    assert_eq!(notices.len(), 2, "{notices:?}");
    assert_eq!(notices[1], "its last valid version stays in use");
    // Still broken after another edit: still the last valid version.
    fixture.load("a.yaml", broken);
    fixture.assert_store_is(&[ingress("web")]);
    fixture.load("a.yaml", "");
    fixture.assert_store_is(&[]);
    // Never valid: reported, not stored.
    fixture.load("a.yaml", broken);
    fixture.assert_store_is(&[]);
    assert_eq!(fixture.notices("web").len(), 1);
}

#[test]
fn what_is_no_object_is_a_problem_of_the_file() {
    let mut fixture = Fixture::default();
    fixture.load("a.yaml", &[service("a", 80), "\nhello: world\n".to_owned()].concat());
    fixture.assert_store_is(&[service("a", 80)]);
    let problems = fixture.contents.snapshot().problems;
    assert_eq!(problems.len(), 1);
    assert_eq!(problems[0].line, Some(7));
    fixture.load("a.yaml", &service("a", 80));
    assert!(fixture.contents.snapshot().problems.is_empty());
}

#[test]
fn kinds_without_a_use_are_counted() {
    let role = "apiVersion: rbac.authorization.k8s.io/v1\nkind: Role\nmetadata: {name: a}\n---\n";
    let mut fixture = Fixture::default();
    fixture.load("a.yaml", &role.repeat(3));
    fixture.load("b.yaml", role);
    assert_eq!(fixture.contents.unused.values().sum::<usize>(), 4);
    fixture.load("a.yaml", role);
    fixture.remove("b.yaml");
    assert_eq!(fixture.contents.unused.values().sum::<usize>(), 1);
}

#[test]
fn a_long_random_history_ends_like_a_fresh_start() {
    let seed = 7;
    let mut random = fastrand::Rng::with_seed(seed);
    let mut fixture = Fixture::default();
    let mut files: BTreeMap<String, String> = BTreeMap::new();
    for step in 0..2_000 {
        let path = format!("{}.yaml", random.u8(0..6));
        if random.u8(0..5) == 0 {
            fixture.remove(&path);
            files.remove(&path);
        } else {
            let names =
                (0..random.u8(0..4)).map(|_| random.u8(0..8)).collect::<std::collections::BTreeSet<_>>();
            let text: String =
                names.iter().map(|name| service(&format!("s{name}"), random.u16(1..9))).collect();
            fixture.load(&path, &text);
            files.insert(path, text);
        }
        if step % 50 == 0 {
            let mut fresh = Fixture::default();
            files.iter().for_each(|(path, text)| fresh.load(path, text));
            assert!(fixture.contents.store == fresh.contents.store, "step {step}, seed {seed}");
            assert_eq!(fixture.contents.notices, fresh.contents.notices, "step {step}, seed {seed}");
        }
    }
}
