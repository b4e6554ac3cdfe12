//! The configuration of the collector: YAML, or `flowd.conf` of djm's flowd, told apart by content.
//!
//! Both become [`raw`] settings and the rules of the filter, which [`check`] turns into [`CollectorConfig`].

mod check;
mod flowd_conf;
mod raw;
mod settings;
mod show;
#[cfg(test)]
mod tests;

use std::path::Path;

use super::filter::lexer::{Macros, ParseError, Place};
use super::filter::{Rules, parse_rules, rule};
use crate::config::check::{CheckError, Result as CheckResult, error};
use crate::config::yaml::{self, YamlError};
use crate::config::{config_error, read};
use crate::error::ConfigError;
use crate::registry;
use raw::TextOrList;

pub use flowd_conf::DIRECTIVES;
pub use settings::*;
pub use show::{keys, schema};

/// What begins lines of the configuration of `flowd-rs run`, and of flowd's.
const NOT_OWN_KEYS: [&str; 7] = [
    "plugins:",
    "backends:",
    "enrichers:",
    "flows:",
    "workDir:",
    "PLUGIN",
    "BACKEND",
];
/// The key of the rules.
const KEY: &str = "filter";
/// The keys of the top level that the configuration of `flowd-rs run` has not.
const OWN_KEYS: [&str; 11] = [
    "listen",
    "workers",
    "sources",
    "multicastGroups",
    "macros",
    "filter",
    "store",
    "forward",
    "logSocket",
    "limits",
    "metrics",
];

impl CollectorConfig {
    /// Reads and checks a file. `macros` are those of the command line, which override those of the file.
    pub fn load(path: &Path, macros: &[(String, String)]) -> Result<CollectorConfig, ConfigError> {
        CollectorConfig::parse(&read(path)?, path, macros)
    }

    /// Reads and checks a text; errors name `path`.
    pub fn parse(
        text: &str,
        path: &Path,
        macros: &[(String, String)],
    ) -> Result<CollectorConfig, ConfigError> {
        let mut macros = Macros::new(macros);
        let config = match flowd_conf::is_flowd_conf(text) {
            true => flowd_conf::parse(text, &mut macros),
            false => from_yaml(text, &mut macros),
        };
        config.map_err(|e| config_error(path, text, e.place, e.key, e.message))
    }

    /// Checks a `flowd.conf` of djm's flowd, and converts it to YAML.
    pub fn convert_file(path: &Path, macros: &[(String, String)]) -> Result<String, ConfigError> {
        let text = read(path)?;
        let error = |e: YamlError| config_error(path, &text, e.place, e.key, e.message);
        if !flowd_conf::is_flowd_conf(&text) {
            let message = "this is not a flowd.conf of djm's flowd, there is nothing to convert";
            return Err(error(YamlError {
                place: None,
                key: String::new(),
                message: message.to_owned(),
            }));
        }
        let config = flowd_conf::parse(&text, &mut Macros::new(macros)).map_err(error)?;
        let raw = flowd_conf::convert(&text, macros).map_err(error)?;
        let notes = config.notes.iter().map(|note| format!("# {note}\n"));
        Ok(show::print(&raw) + &notes.collect::<String>())
    }

    /// Whether a file is a configuration of the collector, by its content; by its name if it has no key that tells.
    pub fn is_file(path: &Path) -> Result<bool, ConfigError> {
        let text = read(path)?;
        let is_other = |line: &str| NOT_OWN_KEYS.iter().any(|key| line.starts_with(key));
        let name = path.file_name().and_then(|name| name.to_str());
        let is_named = name.is_some_and(|name| name.starts_with("collector"));
        Ok(CollectorConfig::is_collector(&text) || (is_named && !text.lines().any(is_other)))
    }

    /// Whether a text is a configuration of the collector: it has a key that only that has, or is a `flowd.conf`.
    pub fn is_collector(text: &str) -> bool {
        let key = |line: &str| {
            let (key, rest) = line.trim_start_matches('{').split_once(':')?;
            let key = key.trim_end().trim_matches(['"', '\'']);
            let is_value = rest.is_empty() || rest.starts_with([' ', '\t', '\r']);
            (is_value && OWN_KEYS.contains(&key)).then_some(())
        };
        flowd_conf::is_flowd_conf(text) || text.lines().any(|line| key(line).is_some())
    }
}

fn from_yaml(text: &str, macros: &mut Macros) -> Result<CollectorConfig, YamlError> {
    let raw: raw::Raw = yaml::read(text)?;
    let locate = |error: CheckError| error.locate(text);
    define_macros(&raw, macros).map_err(locate)?;
    let settings = check::registry_settings(&raw).map_err(locate)?;
    let (registry, _) = registry::load_cached_or_builtin(&settings);
    let rules = match &raw.filter {
        None => Rules::default(),
        Some(TextOrList::Text(block)) => parse_rules(block, macros, &registry)
            .map_err(|error| locate_in_block(text, block, error))?,
        Some(TextOrList::List(list)) => {
            let mut rules = Rules::default();
            for (index, rule) in list.iter().enumerate() {
                let read = parse_rules(rule, macros, &registry);
                let read = read.map_err(|error| locate_in_list(text, rule, index, error))?;
                rules.rules.extend(read.rules);
                rules.places.extend(read.places);
            }
            rules
        }
    };
    let notes: Vec<String> = rules
        .rules
        .iter()
        .enumerate()
        .filter_map(never_matches)
        .collect();
    let mut config = check::check(raw, rules).map_err(locate)?;
    config.notes.extend(notes);
    Ok(config)
}

fn define_macros(raw: &raw::Raw, macros: &mut Macros) -> CheckResult<()> {
    for (name, value) in raw.macros.iter().flatten() {
        Macros::check(name, value).or_else(|message| error("macros", message))?;
        macros.define(name, value);
    }
    Ok(())
}

fn never_matches((index, rule): (usize, &rule::Rule)) -> Option<String> {
    let never = rule.clauses.never_match();
    never.then(|| format!("filter: rule {} never matches: {rule}", index + 1))
}

/// The error at its place in a literal block: a line of the block is a line of the file.
fn locate_in_block(text: &str, block: &str, error: ParseError) -> YamlError {
    let (line, column) = error.place;
    let content = block.lines().nth(line - 1).unwrap_or_default();
    let indicator = yaml::locate(text, &[KEY], None).map_or(1, |(line, _)| line);
    let in_file = text.lines().nth(indicator + line - 1);
    let indent = in_file.and_then(|found| found.strip_suffix(content));
    match indent.filter(|indent| indent.trim().is_empty()) {
        Some(indent) => at(
            (indicator + line, indent.chars().count() + column),
            error.message,
        ),
        // A block with folded lines, or a text in quotes.
        None => value_error(None, error.to_string()).locate(text),
    }
}

/// The error at its place in an element of a list of rules.
fn locate_in_list(text: &str, rule: &str, index: usize, error: ParseError) -> YamlError {
    let place = yaml::locate(text, &[KEY], Some(index));
    let Some((line, column)) = place.filter(|_| error.place.0 == 1) else {
        return value_error(Some(index), error.to_string()).locate(text);
    };
    let content = text.lines().nth(line - 1).unwrap_or_default();
    let element: String = content.chars().skip(column - 1).collect();
    let first = rule.lines().next().unwrap_or_default();
    let offset = match element.strip_prefix(['"', '\'']) {
        Some(quoted) => quoted.starts_with(first).then_some(1),
        None => element.starts_with(first).then_some(0),
    };
    // An escape in quotes moves what follows.
    let offset = offset.map_or(0, |offset| offset + error.place.1 - 1);
    at((line, column + offset), error.message)
}

fn at(place: Place, message: String) -> YamlError {
    YamlError {
        place: Some(place),
        key: KEY.to_owned(),
        message,
    }
}

fn value_error(element: Option<usize>, message: String) -> CheckError {
    CheckError {
        key: KEY.to_owned(),
        element,
        message,
    }
}
