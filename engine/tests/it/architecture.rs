//! ARCHITECTURE.md against the tree: paths exist, edges between crates are the ones that are drawn.

use std::collections::BTreeSet;
use std::path::Path;

/// Every crate of the library.
const FOLDERS: [&str; 7] =
    ["kernels", "memory", "engine", "bindings", "bindings/python/native", "examples", "evals"];

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap()
}

fn page() -> String {
    std::fs::read_to_string(root().join("ARCHITECTURE.md")).unwrap()
}

/// Text between backquotes.
fn quoted(page: &str) -> Vec<&str> {
    page.split('`').skip(1).step_by(2).collect()
}

#[test]
fn every_path_of_the_map_exists() {
    let page = page();
    let paths: Vec<&str> = quoted(&page)
        .into_iter()
        .filter(|text| text.ends_with('/') || text.ends_with(".rs"))
        .collect();
    assert!(paths.len() > 25, "{paths:?}");
    for path in paths {
        assert!(root().join(path).exists(), "ARCHITECTURE.md names {path}");
    }
}

#[test]
fn edges_between_crates_are_the_ones_that_are_drawn() {
    let page = page();
    let drawn: BTreeSet<(String, String)> = page
        .lines()
        .filter_map(|line| line.strip_prefix("- `")?.strip_suffix('`')?.split_once("` -> `"))
        .map(|(from, to)| (from.to_owned(), to.to_owned()))
        .collect();
    let mut found = BTreeSet::new();
    let mut packages = BTreeSet::new();
    for folder in FOLDERS {
        let path = root().join(folder).join("Cargo.toml");
        let manifest = std::fs::read_to_string(path).unwrap();
        let name = manifest.lines().find_map(|line| line.strip_prefix("name = \"")).unwrap();
        let name = name.trim_end_matches('"');
        packages.insert(name.to_owned());
        for line in manifest.lines() {
            let dependency = line.split(['.', ' ', '=']).next().unwrap_or_default();
            if dependency == "mka" || dependency.starts_with("mka-") {
                found.insert((dependency.to_owned(), name.to_owned()));
            }
        }
    }
    assert_eq!(drawn, found);
    for package in packages {
        assert!(page.contains(&format!("`{package}`")), "{package} is not on the map");
    }
}

#[test]
fn every_source_file_says_what_it_owns() {
    fn check(folder: &Path) {
        for entry in std::fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                check(&path);
            } else if path.extension().is_some_and(|extension| extension == "rs") {
                let text = std::fs::read_to_string(&path).unwrap();
                assert!(text.starts_with("//!"), "{} has no header", path.display());
                let lines = text.lines().count();
                assert!(lines <= 800, "{} has {lines} lines", path.display());
            }
        }
    }
    for folder in FOLDERS {
        check(&root().join(folder).join("src"));
    }
}

#[test]
fn the_readme_shows_the_example_that_is_compiled() {
    let readme = std::fs::read_to_string(root().join("README.md")).unwrap();
    let (_, after) = readme.split_once("```rust\n").unwrap();
    let (shown, _) = after.split_once("```").unwrap();
    let source = std::fs::read_to_string(root().join("engine/src/lib.rs")).unwrap();
    let docs: Vec<&str> = source.lines().map_while(|line| line.strip_prefix("//!")).collect();
    let docs = docs.iter().map(|line| line.strip_prefix(' ').unwrap_or(line));
    let example = docs.skip_while(|line| !line.starts_with("```")).skip(1);
    let compiled: Vec<&str> = example
        .take_while(|line| !line.starts_with("```"))
        .filter(|line| !line.starts_with('#'))
        .collect();
    assert_eq!(shown.trim_end(), compiled.join("\n").trim_end());
}
