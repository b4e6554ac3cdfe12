//! The configuration: reads a file and turns it into settings.
//!
//! Two steps: the file into [`raw`], which checks only keys and types, then [`check`] into [`Config`],
//! where every value has its default and is in range.

pub(crate) mod check;
mod flowd;
pub mod nearest;
mod python;
pub(crate) mod raw;
mod settings;
pub(crate) mod show;
pub(crate) mod yaml;

use std::io::Read;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;

use nix::unistd::Uid;

use crate::error::ConfigError;
use crate::registry;
use crate::sys::directory::is_changed_by_root_only;

pub use check::log_level;
pub use flowd::KEYS as FLOWD_KEYS;
pub use settings::*;
pub use show::{keys, schema};

impl Config {
    /// Reads and checks a file.
    pub fn load(path: &Path) -> Result<Config, ConfigError> {
        Config::parse(&read(path)?, path)
    }

    /// Reads the registry settings of a file, and checks nothing else: experiments and activities in it may have
    /// names that only a registry still to be fetched knows.
    pub fn load_registry_settings(path: &Path) -> Result<registry::Settings, ConfigError> {
        let text = read(path)?;
        let error = |place, key, message| config_error(path, &text, place, key, message);
        let yaml = match is_python(&text) {
            true => {
                let converted = Config::convert(&text);
                converted
                    .map_err(|e| error(e.place, e.key, e.message))?
                    .yaml
            }
            false => text.clone(),
        };
        let raw = yaml::read(&yaml).map_err(|e| error(e.place, e.key, e.message))?;
        let settings = check::registry_settings(raw);
        settings.map_err(|e| error(None, e.key, e.message))
    }

    /// Reads and checks a text; errors name `path`.
    pub fn parse(text: &str, path: &Path) -> Result<Config, ConfigError> {
        let error = |place, key, message| config_error(path, text, place, key, message);
        if !is_python(text) {
            return Config::from_yaml(text, &instance_suffix(path))
                .map_err(|e| error(e.place, e.key, e.message));
        }
        let converted = Config::convert(text).map_err(|e| error(e.place, e.key, e.message))?;
        let config = Config::from_yaml(&converted.yaml, &instance_suffix(path));
        let mut config = config.map_err(|e| {
            // The key itself, or its nearest parent with an origin in the file.
            let mut yaml_key = e.key.as_str();
            while !converted.origins.contains_key(yaml_key) {
                yaml_key = yaml_key
                    .rsplit_once('.')
                    .map_or("plugins", |(parent, _)| parent);
            }
            let (key, place) = converted.origins[yaml_key];
            error(Some(place), key.to_owned(), e.message)
        })?;
        config.notes.splice(0..0, converted.notes);
        Ok(config)
    }

    /// Checks a `KEY=value` file of flowd, and converts it to YAML.
    pub fn convert_file(path: &Path) -> Result<String, ConfigError> {
        let text = read(path)?;
        if !is_python(&text) {
            let message = "this is not a KEY=value file of flowd, there is nothing to convert";
            return Err(config_error(
                path,
                &text,
                None,
                String::new(),
                message.to_owned(),
            ));
        }
        Config::parse(&text, path)?;
        let converted = Config::convert(&text);
        let converted =
            converted.map_err(|e| config_error(path, &text, e.place, e.key, e.message))?;
        let notes = converted.notes.iter().map(|note| format!("# {note}\n"));
        Ok(converted.yaml + &notes.collect::<String>())
    }

    fn from_yaml(text: &str, instance: &str) -> Result<Config, yaml::YamlError> {
        let raw = yaml::read(text)?;
        check::check(raw, instance).map_err(|error| error.locate(text))
    }

    fn convert(text: &str) -> Result<flowd::Converted, flowd::FlowdError> {
        let assignments = python::read(text).map_err(|error| flowd::FlowdError {
            place: Some(error.place),
            key: String::new(),
            message: error.message,
        })?;
        flowd::convert(assignments)
    }
}

/// The error for a file that [`is_writable_by_all`].
pub const WRITABLE_BY_ALL: &str =
    "every user can write to this file, expected mode 0664 or stricter (chmod o-w)";

/// The error for a file that root obeys, but others may change.
const NOT_OF_ROOT: &str = "users other than root may change this file, or a directory of its path, and root would obey them; expected owner root and no write permission for group and others (chown root, chmod go-w), also for the directories; or run flowd-rs as another user";

/// Whether every user of this host can write to the file.
pub fn is_writable_by_all(path: &Path) -> bool {
    let metadata = std::fs::metadata(path);
    metadata.is_ok_and(|file| file.is_file() && file.permissions().mode() & 0o002 != 0)
}

/// The largest configuration file that is read, in bytes.
const MAX_FILE_SIZE: u64 = 1 << 20;

/// Reads a configuration file that nobody may have written to who must not.
pub(crate) fn read(path: &Path) -> Result<String, ConfigError> {
    let error = |message: String| config_error(path, "", None, String::new(), message);
    if is_writable_by_all(path) {
        return Err(error(WRITABLE_BY_ALL.to_owned()));
    }
    let mut bytes = Vec::new();
    let unreadable = |e| error(format!("cannot be read: {e}"));
    let file = std::fs::File::open(path).map_err(unreadable)?;
    if Uid::effective().is_root() && !is_changed_by_root_only(path, &file).map_err(unreadable)? {
        return Err(error(NOT_OF_ROOT.to_owned()));
    }
    file.take(MAX_FILE_SIZE + 1)
        .read_to_end(&mut bytes)
        .map_err(unreadable)?;
    if bytes.len() as u64 > MAX_FILE_SIZE {
        let limit = MAX_FILE_SIZE >> 10;
        return Err(error(format!(
            "the file is too large for a configuration, expected at most {limit} KiB"
        )));
    }
    String::from_utf8(bytes).map_err(|e| {
        let valid = &e.as_bytes()[..e.utf8_error().valid_up_to()];
        let line = 1 + valid.iter().filter(|&&b| b == b'\n').count();
        error(format!("line {line} is not valid UTF-8"))
    })
}

/// The error at a place of a text.
pub(crate) fn config_error(
    path: &Path,
    text: &str,
    place: Option<(usize, usize)>,
    key: String,
    message: String,
) -> ConfigError {
    let line = |(line, _): (usize, usize)| text.lines().nth(line - 1).map(str::to_owned);
    ConfigError {
        path: path.to_owned(),
        line: place.and_then(line),
        place,
        key,
        message,
    }
}

/// `-NAME` for a file `flowd-NAME.cfg`, which `flowd-rs@NAME.service` uses; empty for any other.
fn instance_suffix(path: &Path) -> String {
    let name = path.file_name().and_then(|name| name.to_str());
    let name = name.and_then(|name| name.strip_prefix("flowd-")?.strip_suffix(".cfg"));
    let is_allowed = |c: char| c.is_ascii_alphanumeric() || matches!(c, '_' | '-' | '.' | '@');
    let name = name.filter(|name| !name.is_empty() && name.chars().all(is_allowed));
    name.map_or_else(String::new, |name| format!("-{name}"))
}

/// Whether the first line that is not empty or a comment is a `KEY=` of flowd.
fn is_python(text: &str) -> bool {
    let has_content = |line: &&str| !line.trim().is_empty() && !line.trim_start().starts_with('#');
    let first = text
        .trim_start_matches('\u{feff}')
        .lines()
        .find(has_content);
    // Python code, which flowd would execute: the reader of KEY=value files has the right error for it.
    let is_statement = |line: &str| {
        ["import ", "from ", "\"\"\"", "\'\'\'"]
            .iter()
            .any(|word| line.starts_with(word))
    };
    if first.is_some_and(is_statement) {
        return true;
    }
    let key = first
        .and_then(|line| line.split_once('='))
        .map(|(key, _)| key.trim());
    let is_key_char = |c: char| c.is_ascii_alphanumeric() || c == '_';
    key.is_some_and(|key| !key.is_empty() && key.chars().all(is_key_char))
}
