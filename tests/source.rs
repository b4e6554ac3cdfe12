//! What the source promises its readers: rooms that import downwards only, and a manual page that lists every metric,
//! and examples that compile.
#![allow(missing_docs)]

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};

const MAN8: &str = include_str!("../man/flowd-rs.8");
const COLLECTOR_MAN8: &str = include_str!("../man/flowd-collector.8");

fn source() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("src")
}

/// Every Rust file below `directory`, with its text.
fn rust_files(directory: &Path) -> Vec<(PathBuf, String)> {
    let mut files = Vec::new();
    for entry in fs::read_dir(directory).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            files.extend(rust_files(&path));
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            let text = fs::read_to_string(&path).unwrap();
            files.push((path, text));
        }
    }
    files
}

/// The text of each item between `open` and `close`.
fn between<'a>(text: &'a str, open: &str, close: &str) -> Vec<&'a str> {
    let parts = text.split(open).skip(1);
    parts
        .filter_map(|part| Some(part.split_once(close)?.0))
        .collect()
}

/// Each room, which is a module at the top of `src/`, with the rooms that it imports.
fn imports() -> BTreeMap<String, BTreeSet<String>> {
    let mut rooms = BTreeMap::<String, BTreeSet<String>>::new();
    for (path, text) in rust_files(&source()) {
        let relative = path.strip_prefix(source()).unwrap();
        let first = relative.components().next().unwrap().as_os_str();
        let room = first.to_str().unwrap().trim_end_matches(".rs").to_owned();
        if matches!(room.as_str(), "lib" | "main") {
            continue;
        }
        let imported = text.split("crate::").skip(1).map(|rest| {
            let end = rest.find(|c: char| !c.is_ascii_lowercase() && c != '_');
            rest[..end.unwrap_or(rest.len())].to_owned()
        });
        let imports = rooms.entry(room.clone()).or_default();
        imports.extend(imported.filter(|imported| *imported != room));
    }
    rooms
}

#[test]
fn no_rooms_import_each_other_in_a_circle_and_a_reader_can_overlook_them() {
    let mut rooms = imports();
    assert!((15..=22).contains(&rooms.len()), "{:?}", rooms.keys());
    // Rooms whose imports are all gone go first; in a circle none is left to go.
    while !rooms.is_empty() {
        let bottom: Vec<String> = rooms
            .iter()
            .filter(|(_, imports)| !imports.iter().any(|room| rooms.contains_key(room)))
            .map(|(room, _)| room.clone())
            .collect();
        assert!(!bottom.is_empty(), "a circle among {rooms:#?}");
        rooms.retain(|room, _| !bottom.contains(room));
    }
}

#[test]
fn the_vocabulary_imports_no_other_room_and_sys_knows_no_configuration() {
    let rooms = imports();
    assert_eq!(rooms["flow"], BTreeSet::new());
    let of_event: BTreeSet<String> = ["flow", "socket"].map(str::to_owned).into();
    assert!(rooms["event"].is_subset(&of_event), "{:?}", rooms["event"]);
    assert!(!rooms["sys"].contains("config"));
}

/// The items of the lists in a part of the manual page.
fn documented(part: &str) -> BTreeSet<String> {
    let items = part.lines().filter_map(|line| line.strip_prefix(".It Li "));
    let names = items.flat_map(|item| item.split(" , ").map(str::to_owned));
    names
        .map(|name| name.split('{').next().unwrap().to_owned())
        .collect()
}

fn metrics_section(page: &'static str) -> (&'static str, &'static str) {
    let section = between(page, ".Sh METRICS\n", ".Sh ")[0];
    section.split_once(".Ss Outcomes\n").unwrap()
}

#[test]
fn the_manual_page_has_every_metric_and_no_other() {
    let mut metrics = BTreeSet::new();
    for (path, text) in rust_files(&source()) {
        let text = text.split("#[cfg(test)]").next().unwrap();
        if path.ends_with("metrics.rs") || path.parent().unwrap().ends_with("prometheus") {
            // Names that are written out, without those that the code puts together.
            let names = between(text, "\"flowd_", "\"");
            let whole = |name: &&str| !name.is_empty() && !name.contains(['{', ' ']);
            metrics.extend(
                names
                    .into_iter()
                    .filter(whole)
                    .map(|n| format!("flowd_{n}")),
            );
        }
        if path.ends_with("families.rs") {
            let families = between(text, "= families! {", "\n};")[0];
            let names = families
                .lines()
                .filter_map(|line| line.strip_prefix("    \""));
            metrics.extend(names.map(|line| line.split('"').next().unwrap().to_owned()));
        }
    }
    assert!(metrics.len() > 80, "{metrics:?}");
    let mut documented = documented(metrics_section(MAN8).0);
    documented.retain(|name| !name.starts_with("process_"));
    // It is written out where the page is put together; the sums of a summary have a suffix.
    for name in ["ca_info", "flow_tcp_ Ns Ar name Ns Li "] {
        assert!(documented.remove(name), "{name}");
    }
    metrics.remove("flowd_rtt_seconds");
    assert_eq!(documented, metrics);
}

#[test]
fn the_manual_page_of_the_collector_has_every_metric_and_no_other() {
    let page = fs::read_to_string(source().join("collector/metrics_page.rs")).unwrap();
    let names = between(&page, "\"flowd_", "\"");
    let names: BTreeSet<String> = names.iter().map(|name| format!("flowd_{name}")).collect();
    assert!(names.len() > 12, "{names:?}");
    let mut documented = documented(metrics_section(COLLECTOR_MAN8).0);
    documented.retain(|name| !name.starts_with("process_"));
    assert_eq!(documented, names);
}

#[test]
fn the_manual_pages_have_every_outcome_and_no_other() {
    let [mut of_the_daemon, mut of_the_collector] = [BTreeSet::new(), BTreeSet::new()];
    for (path, text) in rust_files(&source()) {
        if path.ends_with("example.rs") {
            continue;
        }
        let is_collector = path.starts_with(source().join("collector"));
        let text = text.split("#[cfg(test)]").next().unwrap();
        for block in between(text, "\noutcomes! {", "\n}") {
            let words = between(block, " = \"", "\"").into_iter().map(str::to_owned);
            match is_collector {
                true => of_the_collector.extend(words),
                false => of_the_daemon.extend(words),
            }
        }
    }
    assert!(of_the_daemon.len() > 50, "{of_the_daemon:?}");
    assert_eq!(documented(metrics_section(MAN8).1), of_the_daemon);
    assert!(of_the_collector.len() > 5, "{of_the_collector:?}");
    assert_eq!(
        documented(metrics_section(COLLECTOR_MAN8).1),
        of_the_collector
    );
}

/// The part that CONTRIBUTING.md shows: without imports and tests.
fn shown(example: &str) -> &str {
    let start = example.find("outcomes! {").unwrap();
    let end = example.find("#[cfg(test)]\nmod tests").unwrap();
    example[start..end].trim_end()
}

#[test]
fn contributing_shows_the_examples_as_they_are_compiled() {
    const CONTRIBUTING: &str = include_str!("../CONTRIBUTING.md");
    for example in [
        include_str!("../src/plugins/example.rs"),
        include_str!("../src/backends/example.rs"),
    ] {
        assert!(CONTRIBUTING.contains(shown(example)), "{}", shown(example));
    }
    // The files that it names are there.
    for path in between(CONTRIBUTING, "`", "`") {
        let is_file = path.contains('/') && (path.ends_with(".rs") || path.ends_with(".c"));
        let root = source().parent().unwrap().to_owned();
        let places = [root.join(path), source().join(path)];
        assert!(!is_file || places.iter().any(|p| p.exists()), "{path}");
    }
}
