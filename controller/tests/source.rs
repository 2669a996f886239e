//! A real folder, real edits, and what becomes of the objects.
#![allow(clippy::unwrap_used, reason = "a test says what it expects by panicking")]

use std::fs;
use std::io::Write;
use std::os::unix::fs::symlink;
use std::path::Path;
use std::time::Duration;

use lockgate_controller::objects;
use lockgate_controller::source::{Folder, FolderError, FolderOptions, Snapshot};
use lockgate_controller::store::Store;
use tempfile::TempDir;

struct Watched {
    dir: TempDir,
    folder: Folder,
    now: Snapshot,
}

/// Everything in one document, so that a torn read can be told from a whole one.
fn services(names: &[&str]) -> String {
    names
        .iter()
        .map(|name| {
            format!("---\napiVersion: v1\nkind: Service\nmetadata: {{name: {name}}}\nspec: {{ports: [{{port: 80}}]}}\n")
        })
        .collect()
}

fn store_of(names: &[&str]) -> Store {
    let mut store = Store::default();
    for name in names {
        let value = serde_yaml::from_str(services(&[name]).trim_start_matches("---\n")).expect("valid");
        for parsed in objects::parse(value) {
            match parsed {
                objects::Parsed::Object(object, _) => store.apply(object),
                other => panic!("{name} is not an object: {other:?}"),
            }
        }
    }
    store
}

fn options() -> FolderOptions {
    FolderOptions { debounce: Duration::from_millis(20), ..FolderOptions::default() }
}

impl Watched {
    fn new(prepare: impl FnOnce(&Path)) -> Watched {
        Watched::with(options(), prepare)
    }

    fn with(options: FolderOptions, prepare: impl FnOnce(&Path)) -> Watched {
        let dir = TempDir::new().expect("a temporary folder");
        prepare(dir.path());
        let (folder, now) = Folder::open(dir.path(), options).expect("opens");
        Watched { dir, folder, now }
    }

    fn write(&self, name: &str, text: &str) {
        fs::write(self.dir.path().join(name), text).expect("writes");
    }

    async fn change(&mut self) -> &Snapshot {
        let change = self.folder.changed();
        self.now = tokio::time::timeout(Duration::from_secs(30), change).await.expect("noticed");
        &self.now
    }

    /// Waits for changes until the store is this one.
    async fn until(&mut self, names: &[&str]) {
        let expected = store_of(names);
        while self.now.store != expected {
            self.change().await;
        }
    }

    fn assert_is(&self, names: &[&str]) {
        assert!(self.now.store == store_of(names), "expected {names:?}; problems: {:?}", self.now.problems);
    }

    fn problems(&self) -> Vec<String> {
        let root = format!("{}/", self.dir.path().display());
        self.now.problems.iter().map(|problem| problem.to_string().replace(&root, "")).collect()
    }
}

#[tokio::test]
async fn everything_is_loaded_before_open_returns() {
    let watched = Watched::new(|dir| {
        fs::create_dir_all(dir.join("deep/er")).expect("creates");
        fs::write(dir.join("a.yaml"), services(&["a", "b"])).expect("writes");
        fs::write(dir.join("deep/er/b.YML"), services(&["c"])).expect("writes");
        fs::write(dir.join("c.json"), r#"{"apiVersion": "v1", "kind": "Service", "metadata": {"name": "d"}, "spec": {"ports": [{"port": 80}]}}"#)
            .expect("writes");
        fs::write(dir.join("README.md"), "# not a manifest: [").expect("writes");
        fs::write(dir.join(".hidden.yaml"), services(&["hidden"])).expect("writes");
    });
    watched.assert_is(&["a", "b", "c", "d"]);
    assert_eq!(watched.now.files, 3);
    assert_eq!(watched.problems(), [""; 0]);
}

#[test]
fn a_folder_that_is_none_says_what_to_do() {
    let dir = TempDir::new().expect("a temporary folder");
    let file = dir.path().join("a.yaml");
    fs::write(&file, "").expect("writes");
    assert!(matches!(Folder::open(&file, options()), Err(FolderError::NotAFolder(_))));
    assert!(matches!(Folder::open(&dir.path().join("none"), options()), Err(FolderError::Open { .. })));
}

#[tokio::test]
async fn edits_are_followed() {
    let mut watched = Watched::new(|_| {});
    watched.assert_is(&[]);
    watched.write("a.yaml", &services(&["a"]));
    watched.until(&["a"]).await;
    watched.write("a.yaml", &services(&["a", "b"]));
    watched.until(&["a", "b"]).await;
    // As most editors save: a new file moved over the old one.
    watched.write("a.yaml.tmp", &services(&["c"]));
    fs::rename(watched.dir.path().join("a.yaml.tmp"), watched.dir.path().join("a.yaml")).expect("renames");
    watched.until(&["c"]).await;
    fs::rename(watched.dir.path().join("a.yaml"), watched.dir.path().join("b.yaml")).expect("renames");
    watched.write("c.yaml", &services(&["d"]));
    watched.until(&["c", "d"]).await;
    fs::remove_file(watched.dir.path().join("b.yaml")).expect("removes");
    watched.until(&["d"]).await;
}

#[tokio::test]
async fn directories_come_move_and_go() {
    let mut watched = Watched::new(|_| {});
    let root = watched.dir.path().to_owned();
    fs::create_dir_all(root.join("x/y")).expect("creates");
    fs::write(root.join("x/y/a.yaml"), services(&["a"])).expect("writes");
    watched.until(&["a"]).await;
    watched.write("x/y/b.yaml", &services(&["b"]));
    watched.until(&["a", "b"]).await;
    fs::rename(root.join("x"), root.join("z")).expect("renames");
    watched.write("z/y/c.yaml", &services(&["c"]));
    watched.until(&["a", "b", "c"]).await;
    // The watches have moved along.
    watched.write("z/y/c.yaml", &services(&["d"]));
    watched.until(&["a", "b", "d"]).await;
    fs::remove_dir_all(root.join("z")).expect("removes");
    watched.until(&[]).await;
    fs::create_dir_all(root.join("z/y")).expect("creates");
    fs::write(root.join("z/y/a.yaml"), services(&["e"])).expect("writes");
    watched.until(&["e"]).await;
    watched.write("z/y/a.yaml", &services(&["f"]));
    watched.until(&["f"]).await;
}

#[tokio::test]
async fn a_file_that_does_not_parse_keeps_its_objects() {
    let mut watched =
        Watched::new(|dir| fs::write(dir.join("a.yaml"), services(&["a", "b"])).expect("writes"));
    watched.write("a.yaml", &format!("{}  bad: [\n", services(&["a"])));
    watched.change().await;
    watched.assert_is(&["a", "b"]);
    let problems = watched.problems();
    assert_eq!(problems.len(), 1);
    assert!(problems[0].starts_with("a.yaml:6:"), "{problems:?}");
    assert!(problems[0].ends_with("; its last good objects stay in use"), "{problems:?}");
    // The neighbours are followed all the same.
    watched.write("b.yaml", &services(&["c"]));
    watched.until(&["a", "b", "c"]).await;
    assert_eq!(watched.problems().len(), 1);
    watched.write("a.yaml", &services(&["a"]));
    watched.until(&["a", "c"]).await;
    assert_eq!(watched.problems(), [""; 0]);
}

#[tokio::test]
async fn a_half_written_file_waits_for_its_end() {
    let mut watched =
        Watched::new(|dir| fs::write(dir.join("a.yaml"), services(&["a", "b"])).expect("writes"));
    let text = services(&["a", "b", "c"]);
    let (first, second) = text.split_at(text.len() / 3);
    // Truncated and begun, as `cp` or a slow editor does.
    let mut file = fs::File::create(watched.dir.path().join("a.yaml")).expect("truncates");
    file.write_all(first.as_bytes()).expect("writes");
    watched.write("b.yaml", &services(&["other"]));
    watched.change().await;
    watched.assert_is(&["a", "b", "other"]);
    file.write_all(second.as_bytes()).expect("writes");
    drop(file);
    watched.change().await;
    watched.assert_is(&["a", "b", "c", "other"]);
}

#[tokio::test]
async fn a_file_truncated_by_a_writer_that_stays_keeps_its_objects() {
    let mut watched = Watched::new(|dir| fs::write(dir.join("a.yaml"), services(&["a"])).expect("writes"));
    let file = fs::File::create(watched.dir.path().join("a.yaml")).expect("truncates");
    watched.change().await;
    watched.assert_is(&["a"]);
    assert!(
        watched.problems()[0].starts_with("a.yaml: is empty, but still open"),
        "{:?}",
        watched.problems()
    );
    drop(file);
    watched.until(&[]).await;
    assert_eq!(watched.problems(), [""; 0]);
}

#[tokio::test]
async fn a_config_map_mount_changes_as_a_whole() {
    let version = |dir: &Path, name: &str, services_in_it: &[&str]| {
        fs::create_dir(dir.join(name)).expect("creates");
        fs::write(dir.join(name).join("a.yaml"), services(&services_in_it[..1])).expect("writes");
        fs::write(dir.join(name).join("b.yaml"), services(&services_in_it[1..])).expect("writes");
    };
    let mut watched = Watched::new(|dir| {
        version(dir, "..2026_1", &["a", "b"]);
        symlink("..2026_1", dir.join("..data")).expect("links");
        symlink("..data/a.yaml", dir.join("a.yaml")).expect("links");
        symlink("..data/b.yaml", dir.join("b.yaml")).expect("links");
    });
    watched.assert_is(&["a", "b"]);
    assert_eq!(watched.now.files, 2, "each file once, though three paths lead to it");
    for (old, new, names) in [("..2026_1", "..2026_2", ["a", "c"]), ("..2026_2", "..2026_3", ["d", "e"])] {
        let root = watched.dir.path().to_owned();
        version(&root, new, &names);
        symlink(new, root.join("..data_tmp")).expect("links");
        fs::rename(root.join("..data_tmp"), root.join("..data")).expect("renames");
        fs::remove_dir_all(root.join(old)).expect("removes");
        watched.until(&names).await;
        assert_eq!(watched.problems(), [""; 0]);
    }
}

#[tokio::test]
async fn links_are_followed_and_loops_end() {
    let outside = TempDir::new().expect("a temporary folder");
    fs::create_dir(outside.path().join("more")).expect("creates");
    fs::write(outside.path().join("one.yaml"), services(&["a"])).expect("writes");
    fs::write(outside.path().join("more/b.yaml"), services(&["b"])).expect("writes");
    let mut watched = Watched::new(|dir| {
        symlink(outside.path().join("one.yaml"), dir.join("link.yaml")).expect("links");
        symlink("link.yaml", dir.join("same.yaml")).expect("links");
        symlink(outside.path().join("more"), dir.join("more")).expect("links");
        symlink(dir, dir.join("loop")).expect("links");
    });
    watched.assert_is(&["a", "b"]);
    assert_eq!(watched.now.files, 2);
    fs::write(outside.path().join("one.yaml"), services(&["c"])).expect("writes");
    watched.until(&["b", "c"]).await;
    fs::write(outside.path().join("more/b.yaml"), services(&["d"])).expect("writes");
    watched.until(&["c", "d"]).await;
    // The name it was read under goes; the other still leads to it.
    fs::remove_file(watched.dir.path().join("link.yaml")).expect("removes");
    symlink(outside.path().join("one.yaml"), watched.dir.path().join("third.yaml")).expect("links");
    fs::remove_file(watched.dir.path().join("same.yaml")).expect("removes");
    fs::write(outside.path().join("one.yaml"), services(&["e"])).expect("writes");
    watched.until(&["d", "e"]).await;
}

#[tokio::test]
async fn the_folder_itself_may_be_a_link_that_is_pointed_elsewhere() {
    let base = TempDir::new().expect("a temporary folder");
    for (version, name) in [("v1", "a"), ("v2", "b")] {
        fs::create_dir(base.path().join(version)).expect("creates");
        fs::write(base.path().join(version).join("x.yaml"), services(&[name])).expect("writes");
    }
    symlink("v1", base.path().join("current")).expect("links");
    let (folder, now) = Folder::open(&base.path().join("current"), options()).expect("opens");
    let mut watched = Watched { dir: base, folder, now };
    watched.assert_is(&["a"]);
    symlink("v2", watched.dir.path().join("next")).expect("links");
    fs::rename(watched.dir.path().join("next"), watched.dir.path().join("current")).expect("renames");
    watched.until(&["b"]).await;
    watched.write("v2/x.yaml", &services(&["c"]));
    watched.until(&["c"]).await;
}

#[tokio::test]
async fn a_folder_that_disappears_keeps_everything() {
    let base = TempDir::new().expect("a temporary folder");
    let root = base.path().join("root");
    fs::create_dir(&root).expect("creates");
    fs::write(root.join("x.yaml"), services(&["a"])).expect("writes");
    let (folder, now) = Folder::open(&root, options()).expect("opens");
    let mut watched = Watched { dir: base, folder, now };
    fs::rename(&root, watched.dir.path().join("away")).expect("renames");
    watched.change().await;
    watched.assert_is(&["a"]);
    assert!(watched.problems()[0].starts_with("root: cannot be listed"), "{:?}", watched.problems());
    fs::create_dir(&root).expect("creates");
    fs::write(root.join("x.yaml"), services(&["b"])).expect("writes");
    watched.until(&["b"]).await;
    assert_eq!(watched.problems(), [""; 0]);
}

#[tokio::test]
async fn absurd_sizes_are_refused_and_the_rest_is_served() {
    let limits = FolderOptions { files_max: 3, ..options() };
    let mut watched = Watched::with(limits, |dir| {
        fs::write(dir.join("a.yaml"), services(&["a"])).expect("writes");
        let large = fs::File::create(dir.join("b.yaml")).expect("creates");
        large.set_len(50 << 20).expect("grows");
    });
    watched.assert_is(&["a"]);
    assert_eq!(
        watched.problems(),
        ["b.yaml: is larger than 33554432 bytes (52428800 bytes); split it, or raise --max-file-size"]
    );
    for name in ["c", "d", "e"] {
        watched.write(&format!("{name}.yaml"), &services(&[name]));
    }
    while watched.now.problems.len() < 2 {
        watched.change().await;
    }
    assert!(watched.problems()[0].contains("more than 3 manifests"), "{:?}", watched.problems());
    assert_eq!(watched.now.files, 3);
}

#[tokio::test]
async fn a_storm_of_edits_ends_in_the_last_state() {
    let seed = 11;
    let mut random = fastrand::Rng::with_seed(seed);
    let mut watched = Watched::new(|_| {});
    let mut expected = std::collections::BTreeMap::new();
    for step in 0..2_000 {
        let file = random.u8(0..20);
        let (path, name) = (format!("{file}.yaml"), format!("s{file}-{step}"));
        match random.u8(0..10) {
            0 => {
                let _ = fs::remove_file(watched.dir.path().join(&path));
                expected.remove(&file);
            }
            1..4 => {
                watched.write(&format!("{path}.part"), &services(&[&name]));
                let root = watched.dir.path();
                fs::rename(root.join(format!("{path}.part")), root.join(&path)).expect("renames");
                expected.insert(file, name);
            }
            _ => {
                watched.write(&path, &services(&[&name]));
                expected.insert(file, name);
            }
        }
    }
    let names: Vec<&str> = expected.values().map(String::as_str).collect();
    watched.until(&names).await;
    assert_eq!(watched.problems(), [""; 0]);
}
