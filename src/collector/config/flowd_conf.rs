//! `flowd.conf` of djm's flowd: a directive, a macro or a rule in each line. No I/O beside the cached registry.

use std::net::IpAddr;

use super::check;
use super::raw::{self, Short, TextOrList};
use super::settings::CollectorConfig;
use crate::collector::filter::grammar::{Parser, define_macro};
use crate::collector::filter::lexer::{Macros, ParseError, Place, Result, Statements, is_name};
use crate::collector::filter::rule::{Addresses, End};
use crate::collector::filter::{Rule, Rules};
use crate::config::check::CheckError;
use crate::config::nearest::nearest;
use crate::config::yaml::YamlError;
use crate::registry;

/// The first words of its lines.
pub const DIRECTIVES: [&str; 10] = [
    "listen", "flow", "join", "logfile", "logsock", "forward", "pidfile", "store", "accept",
    "discard",
];

/// Whether a text is a `flowd.conf`: some line begins with a directive, and the first line that is not a macro is not YAML.
pub fn is_flowd_conf(text: &str) -> bool {
    let text = text.trim_start_matches('\u{feff}');
    let lines = text.lines().map(str::trim);
    let mut lines = lines.filter(|line| !line.is_empty() && !line.starts_with('#'));
    let is_macro = |line: &str| {
        let name = line.split_once('=').map(|(name, _)| name.trim_end());
        name.is_some_and(is_name)
    };
    let is_directive = |line: &str| {
        let mut words = line.split([' ', '\t', '"', '!', '$']);
        words
            .next()
            .is_some_and(|word| word.len() < line.len() && DIRECTIVES.contains(&word))
    };
    let is_yaml = |line: &str| {
        let key = line
            .split_once(':')
            .map(|(key, _)| key.trim_matches(['"', '\'', ' ']));
        let is_key = |key: &str| key.chars().all(|c| c.is_ascii_alphanumeric());
        line.starts_with(['{', '-', '%']) || key.is_some_and(is_key)
    };
    match lines.clone().find(|line| !is_macro(line)) {
        Some(first) if is_yaml(first) => false,
        _ => lines.any(is_directive),
    }
}

/// Reads and checks a text.
pub fn parse(text: &str, macros: &mut Macros) -> std::result::Result<CollectorConfig, YamlError> {
    let file = File::read(text, macros).map_err(without_key)?;
    let origins = file.origins;
    let mut config = check::check(file.raw, file.rules).map_err(|error: CheckError| {
        let is_origin = |origin: &&Origin| {
            origin.key == error.key
                && error
                    .element
                    .is_none_or(|element| origin.element == element)
        };
        let place = origins.iter().find(is_origin).map(|origin| origin.place);
        YamlError {
            place,
            key: error.key,
            message: error.message,
        }
    })?;
    config.notes.splice(0..0, file.notes);
    Ok(config)
}

/// Reads a text into YAML with the same meaning. The rules stay as they are, with their macros and comments, unless
/// macros of the command line replace some.
pub fn convert(text: &str, fixed: &[(String, String)]) -> std::result::Result<raw::Raw, YamlError> {
    let file = File::read(text, &mut Macros::new(fixed)).map_err(without_key)?;
    let rules = file.rules.rules.iter();
    let rules: String = match fixed.is_empty() {
        true => filter_lines(text, &file.filter_lines),
        false => rules.map(|rule| format!("{rule}\n")).collect(),
    };
    Ok(raw::Raw {
        filter: (!file.rules.rules.is_empty()).then_some(TextOrList::Text(rules)),
        ..file.raw
    })
}

/// The given lines, from 1, each with the comments above it.
fn filter_lines(text: &str, ranges: &[(usize, usize)]) -> String {
    let lines = text.trim_start_matches('\u{feff}').lines();
    let lines: Vec<&str> = lines.map(str::trim_end).collect();
    let mut result = String::new();
    for &(first, last) in ranges {
        let is_comment = |line: &&&str| line.trim_start().starts_with('#');
        let above = lines[..first - 1].iter().rev().take_while(is_comment);
        let start = first - 1 - above.count();
        for line in &lines[start..last] {
            result.push_str(line);
            result.push('\n');
        }
    }
    result
}

fn without_key(error: ParseError) -> YamlError {
    YamlError {
        place: Some(error.place),
        key: String::new(),
        message: error.message,
    }
}

/// Where a setting comes from.
struct Origin {
    key: &'static str,
    element: usize,
    place: Place,
}

#[derive(Default)]
struct File {
    raw: raw::Raw,
    rules: Rules,
    origins: Vec<Origin>,
    notes: Vec<String>,
    /// First and last line of each rule and macro.
    filter_lines: Vec<(usize, usize)>,
    accepts_all_sources: bool,
}

impl File {
    fn read(text: &str, macros: &mut Macros) -> Result<File> {
        let mut file = File::default();
        // It reads what djm's reader reads, as before.
        file.raw.store.compatible = Some(true);
        let settings = check::registry_settings(&file.raw).map_err(|error| ParseError {
            place: (1, 1),
            message: error.message,
        })?;
        let (registry, _) = registry::load_cached_or_builtin(&settings);
        let mut statements = Statements::new(text.trim_start_matches('\u{feff}'));
        while let Some(tokens) = statements.next_statement(macros)? {
            let place = tokens[0].place;
            let lines = (place.0, statements.last_line);
            if define_macro(&tokens, macros)? {
                file.filter_lines.push(lines);
                continue;
            }
            let mut parser = Parser::new(tokens);
            match parser.peek_word() {
                Some("accept" | "discard") => {
                    let rule = parser.rule(&registry)?;
                    file.rule_notes(&rule, place.0);
                    file.rules.push(rule, place)?;
                    file.filter_lines.push(lines);
                }
                _ => file.directive(&mut parser, place)?,
            }
            parser.end()?;
        }
        for line in statements.comments_with_backslash {
            file.notes.push(format!(
                "line {line}: a comment ends with its line; the backslash at its end does not continue it"
            ));
        }
        if file.accepts_all_sources {
            file.raw.sources = None;
        }
        if file.raw.store.logfile.is_none() {
            file.notes
                .push("no logfile is set: records are stored in store.directory".to_owned());
        }
        Ok(file)
    }

    /// What a rule means here, where djm's flowd does something else.
    fn rule_notes(&mut self, rule: &Rule, line: usize) {
        let clauses = &rule.clauses;
        for (name, end) in [("src", &clauses.source), ("dst", &clauses.destination)] {
            let End { address, port } = end;
            let is_any = address
                .as_ref()
                .is_some_and(|test| test.value == Addresses::Any);
            if is_any && port.is_none() && !clauses.never_match() {
                self.notes.push(format!(
                    "line {line}: {name} any matches every record; in djm's flowd, such a rule never matched"
                ));
            }
        }
        if let (Some(after), Some(before)) = (clauses.after, clauses.before)
            && after > before
        {
            self.notes.push(format!(
                "line {line}: the time from after to before reaches over midnight"
            ));
        }
        if clauses.never_match() {
            self.notes
                .push(format!("line {line}: the rule never matches: {rule}"));
        }
    }

    fn origin(&mut self, key: &'static str, element: usize, place: Place) {
        self.origins.push(Origin {
            key,
            element,
            place,
        });
    }

    /// Sets what may be given once; the last one counts.
    fn set<T>(
        &mut self,
        slot: fn(&mut raw::Raw) -> &mut Option<T>,
        value: T,
        name: &str,
        line: usize,
    ) {
        if slot(&mut self.raw).replace(value).is_some() {
            self.notes.push(format!(
                "line {line}: {name} is set again, which overrides the earlier one"
            ));
        }
    }

    fn directive(&mut self, parser: &mut Parser, place: Place) -> Result<()> {
        let word = parser.peek_word().unwrap_or_default().to_owned();
        let Some(name) = DIRECTIVES.into_iter().find(|name| *name == word) else {
            return match nearest(&word, &DIRECTIVES) {
                Some(near) if !word.is_empty() => Err(ParseError {
                    place,
                    message: format!(
                        "unknown directive \"{}\", did you mean {near}?",
                        word.escape_debug()
                    ),
                }),
                _ => parser.expected(&format!(
                    "one of {}, or a macro (name = \"value\")",
                    DIRECTIVES.join(", ")
                )),
            };
        };
        parser.keyword(name);
        let line = place.0;
        match name {
            "listen" => {
                second_word(parser, "on", "listen on ADDRESS:PORT")?;
                let place = parser.place();
                let address = Some(parser.text("ADDRESS:PORT")?);
                let receive_buffer = buffer_size(parser)?;
                let list = self.raw.listen.get_or_insert_default();
                let element = list.len();
                list.push(Short(raw::Listen {
                    address,
                    port: None,
                    receive_buffer,
                }));
                self.origin("listen", element, place);
            }
            "flow" => {
                second_word(parser, "source", "flow source PREFIX")?;
                match parser.keyword("any") {
                    true => {
                        self.accepts_all_sources = true;
                        self.notes.push(format!(
                            "line {line}: flow source any accepts every source; djm's flowd rejects everything then"
                        ));
                    }
                    false => {
                        let prefix = parser.prefix()?;
                        self.raw
                            .sources
                            .get_or_insert_default()
                            .push(prefix.to_string());
                    }
                }
            }
            "join" => {
                second_word(parser, "group", "join group ADDRESS")?;
                let place = parser.place();
                let text = parser.text("a multicast address")?;
                let bare = text.trim_start_matches('[').trim_end_matches(']');
                let group = bare
                    .parse::<IpAddr>()
                    .map_or(text.clone(), |ip| ip.to_string());
                let list = self.raw.multicast_groups.get_or_insert_default();
                let element = list.len();
                list.push(Short(raw::MulticastGroup {
                    group: Some(group),
                    interface: None,
                }));
                self.origin("multicastGroups", element, place);
            }
            "logfile" => {
                self.origin("store.logfile", 0, parser.place());
                let path = parser.text("a path, in quotes")?;
                self.set(|raw| &mut raw.store.logfile, path, name, line);
            }
            "logsock" => {
                self.origin("logSocket", 0, parser.place());
                let path = Some(parser.text("a path, in quotes")?);
                self.origin("logSocket.bufferSize", 0, parser.place());
                let buffer_size = buffer_size(parser)?;
                let socket = Short(raw::LogSocket { path, buffer_size });
                self.set(|raw| &mut raw.log_socket, socket, name, line);
            }
            "forward" => {
                second_word(parser, "to", "forward to ADDRESS:PORT")?;
                let place = parser.place();
                let address = Some(parser.text("ADDRESS:PORT")?);
                let list = self.raw.forward.get_or_insert_default();
                let element = list.len();
                list.push(Short(raw::Forward {
                    address,
                    port: None,
                    spoof_source: None,
                }));
                self.origin("forward", element, place);
            }
            "pidfile" => {
                let path = parser.text("a path, in quotes")?;
                self.set(|raw| &mut raw.pid_path, path, name, line);
            }
            // Rules are read elsewhere.
            _ => {
                let place = parser.place();
                let field = parser.text("the name of a field, or ALL")?;
                let list = self
                    .raw
                    .store
                    .fields
                    .get_or_insert(TextOrList::List(Vec::new()));
                if let TextOrList::List(list) = list {
                    let element = list.len();
                    list.push(field);
                    self.origin("store.fields", element, place);
                }
            }
        }
        Ok(())
    }
}

fn second_word(parser: &mut Parser, word: &str, whole: &str) -> Result<()> {
    match parser.keyword(word) {
        true => Ok(()),
        false => parser.expected(&format!("\"{word}\": {whole}")),
    }
}

/// `bufsize N`, in bytes.
fn buffer_size(parser: &mut Parser) -> Result<Option<i64>> {
    match parser.keyword("bufsize") {
        true => Ok(Some(parser.number(1 << 30)? as i64)),
        false => Ok(None),
    }
}
