//! The manual pages, the example configuration and the completion match the program.
#![cfg(feature = "bpf")]
#![allow(missing_docs)]

use std::collections::{BTreeMap, BTreeSet};

use flowd_rs::collector::config as collector;
use flowd_rs::collector::filter::{self, grammar};
use flowd_rs::collector::store::fields::Fields;
use flowd_rs::registry::Registry;
use flowd_rs::{cli, config};

const MAN8: &str = include_str!("../man/flowd-rs.8");
const READER: &str = include_str!("../man/flowd-reader.8");
const COLLECTOR: &str = include_str!("../man/flowd-collector.8");
const MAN5: &str = include_str!("../man/flowd.cfg.5");
const CONF: &str = include_str!("../conf/flowd.cfg");
const COLLECTOR_MAN5: &str = include_str!("../man/flowd-collector.cfg.5");
const COLLECTOR_CONF: &str = include_str!("../conf/collector.cfg");
const BASH: &str = include_str!("../conf/completion/flowd-rs.bash");

/// The sections of a manual page of keys, and the keys in their lists, including nested lists.
fn documented(page: &str) -> BTreeMap<String, BTreeSet<String>> {
    let (mut sections, mut section) = (BTreeMap::<_, BTreeSet<String>>::new(), None);
    for line in page.lines() {
        if let Some(name) = line.strip_prefix(".Ss ") {
            let name = if name == "Top level" { "" } else { name };
            section = Some(name.to_owned());
            sections.entry(name.to_owned()).or_default();
        } else if line.starts_with(".Sh ") {
            section = None;
        } else if let (Some(section), Some(item)) = (&section, line.strip_prefix(".It Ic ")) {
            let names = item.split(" : ").next().unwrap();
            let names = names.split(" , ").map(|name| name.trim().to_owned());
            sections.get_mut(section).unwrap().extend(names);
        }
    }
    sections
}

/// The sections of the configuration that the program accepts, and their keys.
fn known() -> BTreeMap<String, BTreeSet<String>> {
    let keys = config::keys();
    let is_section = |path: &str| keys.iter().any(|key| key.starts_with(&format!("{path}.")));
    let mut sections = BTreeMap::<String, BTreeSet<String>>::new();
    for key in &keys {
        let (section, name) = key.rsplit_once('.').unwrap_or(("", key));
        if is_section(key) && !key.ends_with(".rules") {
            sections.entry(key.clone()).or_default();
        } else {
            // flowd.cfg(5) lists the keys of a rule in the section of the rules.
            let section = section.strip_suffix(".rules").unwrap_or(section);
            sections
                .entry(section.to_owned())
                .or_default()
                .insert(name.to_owned());
        }
    }
    // Only the backends below it have keys.
    sections.remove("backends");
    sections.insert("backends.dummy".to_owned(), BTreeSet::new());
    sections.retain(|section, keys| !keys.is_empty() || section == "backends.dummy");
    sections
}

#[test]
fn the_manual_page_documents_every_key_of_the_configuration_and_no_other() {
    let (mut known, documented) = (known(), documented(MAN5));
    // The page refers to netlink for the keys of netstat.
    let netstat = known.insert("plugins.netstat".to_owned(), BTreeSet::new());
    assert_eq!(netstat.as_ref(), known.get("plugins.netlink"));
    assert_eq!(documented, known);
}

/// Whether a configuration shows a key.
fn shows(configuration: &str, name: &str) -> bool {
    let key = format!("{name}:");
    let mut found = configuration.match_indices(&key);
    found.any(|(at, _)| {
        let before = configuration[..at].chars().next_back();
        before.is_none_or(|c| !c.is_alphanumeric())
    })
}

#[test]
fn the_manual_page_of_the_collector_documents_every_key_and_no_other() {
    let mut known = BTreeMap::<String, BTreeSet<String>>::new();
    let keys = collector::keys();
    for key in &keys {
        let is_section = keys
            .iter()
            .any(|other| other.starts_with(&format!("{key}.")));
        if !is_section {
            let (section, name) = key.rsplit_once('.').unwrap_or(("", key));
            known
                .entry(section.to_owned())
                .or_default()
                .insert(name.to_owned());
        }
    }
    let mut documented = documented(COLLECTOR_MAN5);
    documented.retain(|_, keys| !keys.is_empty());
    assert_eq!(documented, known);
    for key in keys {
        let name = key.rsplit('.').next().unwrap();
        assert!(shows(COLLECTOR_CONF, name), "{key}");
    }
}

#[test]
fn the_manual_page_of_the_collector_has_every_field_directive_and_clause() {
    let words: BTreeSet<&str> = COLLECTOR_MAN5.split([' ', '\n', ',']).collect();
    // The page describes the suffix of a family.
    let fields = Fields::names().filter(|name| !name.ends_with(['4', '6']));
    let names = fields.chain(collector::DIRECTIVES).chain(grammar::CLAUSES);
    for name in names.chain(["all", "tag", "quick", "mask", "equals", "port"]) {
        assert!(words.contains(name), "{name}");
    }
}

#[test]
fn the_examples_in_the_manual_page_of_the_collector_are_valid() {
    let examples = COLLECTOR_MAN5
        .split(".Bd -literal -offset indent\n")
        .skip(1);
    let mut count = 0;
    for example in examples {
        let rules = example.split_once(".Ed").unwrap().0;
        let parsed = filter::parse_rules(rules, &mut Default::default(), &Registry::builtin());
        count += parsed
            .unwrap_or_else(|error| panic!("{error}: {rules}"))
            .rules
            .len();
    }
    assert!(count >= 8, "{count}");
}

#[test]
fn the_commented_configuration_shows_every_key() {
    for key in config::keys() {
        let name = key.rsplit('.').next().unwrap();
        let shown = shows(CONF, name);
        // Keys without effect and keys of flowd are not shown.
        let without_effect = [
            "maxReaders",
            "buffSize",
            "deadline",
            "hasSyslogHeader",
            "log",
            "dummy",
        ];
        assert_eq!(shown, !without_effect.contains(&name), "{key}");
    }
}

/// The options in the manual pages: the arguments of `Fl`.
fn documented_options() -> BTreeSet<String> {
    let mut options = BTreeSet::new();
    let lines = MAN8.lines().chain(READER.lines()).chain(COLLECTOR.lines());
    for line in lines.filter(|line| line.starts_with('.')) {
        let mut flag = false;
        for word in line.split_whitespace() {
            match word {
                "Fl" | ".Fl" => flag = true,
                "," | "|" => {}
                _ if flag && word.starts_with('-') => {
                    options.insert(word.trim_start_matches('-').to_owned());
                }
                _ if flag && word.len() == 1 && word.chars().all(char::is_alphabetic) => {
                    options.insert(word.to_owned());
                }
                _ => flag = false,
            }
        }
    }
    options
}

#[test]
fn the_manual_page_documents_every_command_and_option_and_no_other() {
    let commands = cli::commands();
    let mut options: BTreeSet<String> = ["h", "help"].map(str::to_owned).into();
    for command in &commands {
        let last = command.command.rsplit(' ').next().unwrap();
        let is_documented = last.is_empty()
            || MAN8
                .lines()
                .any(|line| line.contains("Cm ") && line.split(' ').any(|w| w == last));
        assert!(is_documented, "{}", command.command);
        for (long, short) in &command.options {
            options.insert(long.clone());
            options.extend(short.map(String::from));
        }
    }
    assert_eq!(documented_options(), options);
    let named: BTreeSet<&str> = MAN8
        .lines()
        .filter_map(|line| line.strip_prefix(".It Cm "))
        .filter_map(|rest| rest.split(' ').next())
        .filter(|name| !matches!(*name, "help" | "start" | "end"))
        .collect();
    let top: BTreeSet<&str> = commands
        .iter()
        .filter_map(|c| c.command.split(' ').next())
        .filter(|c| !c.is_empty())
        .collect();
    assert_eq!(named, top);
}

#[test]
fn the_completion_has_every_command_and_option() {
    let words: BTreeSet<&str> = BASH.split([' ', '"', '\n', '\t', ';', ')']).collect();
    for command in cli::commands() {
        for word in command.command.split(' ').filter(|word| !word.is_empty()) {
            assert!(words.contains(word), "{word}");
        }
        for (long, _) in &command.options {
            assert!(words.contains(format!("--{long}").as_str()), "--{long}");
        }
    }
}

#[test]
fn bash_completes_commands_and_options() {
    let complete = |words: &str, at: usize| {
        let path = concat!(env!("CARGO_MANIFEST_DIR"), "/conf/completion/flowd-rs.bash");
        let script = format!(
            "source {path}; COMP_WORDS=({words}); COMP_CWORD={at}; _flowd_rs; echo ${{COMPREPLY[*]}}"
        );
        let output = std::process::Command::new("bash")
            .args(["-c", &script])
            .output()
            .unwrap();
        String::from_utf8(output.stdout)
            .unwrap()
            .trim_end()
            .to_owned()
    };
    assert_eq!(complete("flowd-rs re", 1), "reader registry");
    assert_eq!(
        complete("flowd-rs reader --sum-by src_", 3),
        "src_port src_as"
    );
    assert_eq!(
        complete("flowd-rs config ''", 2),
        "check convert schema show"
    );
    assert_eq!(complete("flowd-rs config check --conf", 3), "--config");
    assert_eq!(
        complete("flowd-rs flows --sort ''", 3),
        "age experiment source destination"
    );
    assert_eq!(complete("flowd-rs flows end --y", 3), "--yes");
    assert_eq!(complete("flowd-rs flows --y", 2), "");
    assert_eq!(complete("flowd-rs marker clean --r", 3), "--remove-qdisc");
    let after_values = "flowd-rs marker --bpf-fs-path /x clean --r";
    assert_eq!(complete(after_values, 5), "--remove-qdisc");
}

#[test]
fn the_manual_page_has_every_key_of_flowd() {
    for key in config::FLOWD_KEYS {
        assert!(MAN5.split([' ', '\n']).any(|word| word == key), "{key}");
    }
}
