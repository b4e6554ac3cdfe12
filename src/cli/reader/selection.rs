//! Which records are wanted: by their time, by the clauses of `--where`, and by the rules of `-f`.

use std::fs;
use std::path::Path;

use jiff::tz::TimeZone;

use super::period::Period;
use crate::collector::filter::{Counts, Filter, Macros, Where, parse_rules};
use crate::collector::record::FlowRecord;
use crate::collector::store::fields::Fields;
use crate::error::{ConfigError, Context, Result};
use crate::registry::Registry;

/// What a record must be.
pub struct Selection {
    pub period: Period,
    pub clauses: Option<Where>,
    pub rules: Option<Rules>,
}

impl Selection {
    /// Whether the record is wanted. The tag of the rule that accepts it replaces the one that it was stored with.
    pub fn takes(&mut self, record: &mut FlowRecord, fields: &mut Fields) -> bool {
        if !self.period.contains(record, *fields) {
            return false;
        }
        if let Some(clauses) = &mut self.clauses
            && !clauses.matches(record)
        {
            return false;
        }
        let Some(rules) = &mut self.rules else {
            return true;
        };
        let verdict = rules.filter.evaluate(record, &mut rules.counts);
        if verdict.tag.is_some() {
            record.rule_tag = verdict.tag;
            *fields = *fields | Fields::TAG;
        }
        verdict.accept
    }
}

/// The rules of a file, and what they did.
pub struct Rules {
    filter: Filter,
    counts: Counts,
    lines: Vec<usize>,
}

impl Rules {
    /// Reads a file of rules and macros.
    pub fn load(path: &Path, registry: &Registry, zone: TimeZone) -> Result<Rules> {
        let text = fs::read_to_string(path).context(|| path.display().to_string())?;
        let error = |place: Option<(usize, usize)>, message| ConfigError {
            path: path.to_owned(),
            place,
            key: String::new(),
            message,
            line: place.and_then(|(line, _)| text.lines().nth(line - 1).map(str::to_owned)),
        };
        let parsed = parse_rules(&text, &mut Macros::default(), registry);
        let rules = parsed.map_err(|wrong| error(Some(wrong.place), wrong.message))?;
        let filter = Filter::compile(&rules.rules, registry, zone);
        let filter = filter.map_err(|wrong| {
            let place = rules.places.get(wrong.rule.wrapping_sub(1));
            error(place.copied(), wrong.message)
        })?;
        Ok(Rules {
            counts: Counts::new(&filter),
            filter,
            lines: rules.places.iter().map(|(line, _)| *line).collect(),
        })
    }

    /// A line per rule: what it did.
    pub fn statistics(&self) -> impl Iterator<Item = String> {
        let rules = self.counts.rules(&self.filter).into_iter();
        rules.zip(&self.lines).map(|(rule, line)| {
            format!(
                "rule in line {line}: {} evaluations, {} matches, decided {}",
                rule.evaluations, rule.matches, rule.wins
            )
        })
    }
}
