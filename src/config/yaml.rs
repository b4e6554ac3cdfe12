//! Reads YAML into raw settings, and finds the place of a key whose value turns out to be wrong later. No I/O.

mod content_error;
mod syntax_error;

use std::fmt;

use serde::de::{
    DeserializeOwned, DeserializeSeed, Error as _, IgnoredAny, MapAccess, SeqAccess, Visitor,
};
use serde_yaml::{Deserializer, Error, Location};

/// A kind of configuration: its keys and types.
pub trait Document: DeserializeOwned + Default {
    /// All keys, by dots.
    fn keys() -> Vec<String>;
}

/// Line and column, from 1; a column is a character.
type Place = (usize, usize);

/// How deep brackets and braces may be nested: the parser takes quadratic time for more.
const MAX_NESTING: usize = 64;

/// An error at a place of the file.
#[derive(Debug, PartialEq, Eq)]
pub struct YamlError {
    /// Where.
    pub place: Option<Place>,
    /// The key, by dots.
    pub key: String,
    /// What was wrong and what was expected.
    pub message: String,
}

/// Reads a configuration. An empty text has all defaults.
pub fn read<T: Document>(text: &str) -> Result<T, YamlError> {
    if text
        .lines()
        .all(|line| line.trim_start().starts_with('#') || line.trim().is_empty())
    {
        return Ok(T::default());
    }
    if let Some(place) = too_deep(text) {
        return Err(YamlError {
            place: Some(place),
            key: String::new(),
            message: "lists and mappings are nested too deeply".to_owned(),
        });
    }
    serde_path_to_error::deserialize(Deserializer::from_str(text)).map_err(|error| {
        let path = error.path().to_string();
        // "?" is a key that was not read yet, "." the whole file.
        let key = path.trim_end_matches('?').trim_end_matches('.').trim();
        let error = YamlError {
            place: error.inner().location().map(place),
            key: key.to_owned(),
            message: bare_message(error.inner(), key),
        };
        match content_error::duplicate_key(&error.message) {
            Some(name) => duplicate_key(text, &error, name),
            None => match content_error::explain(&error, T::keys) {
                Some(message) => YamlError { message, ..error },
                None => syntax_error::explain(text, error),
            },
        }
    })
}

/// Where brackets and braces are nested too deeply. Those in comments are not counted, those in quotes are: a text with
/// so many more that open than close is no configuration either.
fn too_deep(text: &str) -> Option<Place> {
    let mut depth = 0_usize;
    for (line, content) in text.lines().enumerate() {
        if content.trim_start().starts_with('#') {
            continue;
        }
        for (column, c) in content.chars().enumerate() {
            match c {
                '[' | '{' => depth += 1,
                ']' | '}' => depth = depth.saturating_sub(1),
                _ => {}
            }
            if depth > MAX_NESTING {
                return Some((line + 1, column + 1));
            }
        }
    }
    None
}

/// Line and column of the value of a key, given by its parts, or of an element of it.
pub fn locate(text: &str, key: &[&str], element: Option<usize>) -> Option<Place> {
    let end = element.map_or(End::Value, End::Element);
    find(text, Search { key, end })
}

fn find(text: &str, search: Search) -> Option<Place> {
    let found = search.deserialize(Deserializer::from_str(text));
    found
        .err()
        .and_then(|error: Error| error.location())
        .map(place)
}

fn place(location: Location) -> Place {
    (location.line(), location.column())
}

/// The text of the error without its place and its key.
fn bare_message(error: &Error, key: &str) -> String {
    let mut text = error.to_string();
    if let Some(place) = error.location() {
        text = text.replace(
            &format!(" at line {} column {}", place.line(), place.column()),
            "",
        );
    }
    let parent = key.rsplit_once('.').map_or("", |(parent, _)| parent);
    for prefix in [key, parent] {
        if let Some(rest) = text.strip_prefix(prefix).and_then(|t| t.strip_prefix(": ")) {
            return rest.to_owned();
        }
    }
    text
}

/// The error for the key `name` that is given again below the key of `error`.
fn duplicate_key(text: &str, error: &YamlError, name: &str) -> YamlError {
    let parents = error.key.split('.').filter(|part| !part.is_empty());
    let parts: Vec<&str> = parents.chain([name]).collect();
    let occurrence = |n| {
        let end = End::Key(n);
        find(text, Search { key: &parts, end })
    };
    let first = occurrence(0).map_or(String::new(), |(line, _)| format!(", first in line {line}"));
    YamlError {
        place: occurrence(1).or(error.place),
        key: parts.join("."),
        message: format!("this key is given twice{first}"),
    }
}

/// Goes down a path of keys and fails at its end: the error carries the place.
#[derive(Clone, Copy)]
struct Search<'a> {
    key: &'a [&'a str],
    end: End,
}

#[derive(Clone, Copy)]
enum End {
    /// The value of the last key.
    Value,
    /// An element of that value, a list, from 0.
    Element(usize),
    /// The last key itself, the nth of that name, from 0.
    Key(usize),
}

impl<'de> DeserializeSeed<'de> for Search<'_> {
    type Value = ();

    fn deserialize<D: serde::Deserializer<'de>>(self, deserializer: D) -> Result<(), D::Error> {
        match (self.key, self.end) {
            ([], End::Element(_)) => deserializer.deserialize_seq(self),
            ([], _) => Fail.deserialize(deserializer),
            _ => deserializer.deserialize_map(self),
        }
    }
}

impl<'de> Visitor<'de> for Search<'_> {
    type Value = ();

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a mapping")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<(), A::Error> {
        let (name, rest) = (self.key[0], &self.key[1..]);
        let mut to_skip = match self.end {
            End::Key(n) if rest.is_empty() => Some(n),
            _ => None,
        };
        while let Some(is_name) = map.next_key_seed(IsKey {
            name,
            fail: to_skip == Some(0),
        })? {
            match (is_name, &mut to_skip) {
                (true, None) => map.next_value_seed(Search { key: rest, ..self })?,
                (true, Some(n)) => {
                    *n = n.saturating_sub(1);
                    map.next_value::<IgnoredAny>()?;
                }
                (false, _) => {
                    map.next_value::<IgnoredAny>()?;
                }
            }
        }
        Ok(())
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<(), A::Error> {
        let End::Element(index) = self.end else {
            return Ok(());
        };
        for _ in 0..index {
            list.next_element::<IgnoredAny>()?;
        }
        list.next_element_seed(Fail)?;
        Ok(())
    }
}

/// Reads a key, and fails at one with this name if it is to.
struct IsKey<'a> {
    name: &'a str,
    fail: bool,
}

impl<'de> DeserializeSeed<'de> for IsKey<'_> {
    type Value = bool;

    fn deserialize<D: serde::Deserializer<'de>>(self, deserializer: D) -> Result<bool, D::Error> {
        deserializer.deserialize_str(self)
    }
}

impl Visitor<'_> for IsKey<'_> {
    type Value = bool;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a key")
    }

    fn visit_str<E: serde::de::Error>(self, key: &str) -> Result<bool, E> {
        match key == self.name {
            true if self.fail => Err(E::custom("here")),
            is_name => Ok(is_name),
        }
    }
}

/// Fails at any value.
struct Fail;

impl<'de> DeserializeSeed<'de> for Fail {
    type Value = ();

    fn deserialize<D: serde::Deserializer<'de>>(self, deserializer: D) -> Result<(), D::Error> {
        // The parser adds the place to the visitor's error.
        deserializer.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for Fail {
    type Value = ();

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("nothing")
    }

    fn visit_map<A: MapAccess<'de>>(self, _: A) -> Result<(), A::Error> {
        Err(A::Error::custom("here"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::raw::Raw;
    use proptest::prelude::*;

    fn read(text: &str) -> Result<Raw, YamlError> {
        super::read(text)
    }

    #[test]
    fn the_place_of_a_value_is_found_in_every_style() {
        let text = "plugins: {}\nbackends:\n  firefly: { collectorPort: 5, enrich: true,\n   stun: {a: 1}}\n";
        assert_eq!(
            locate(text, &["backends", "firefly", "collectorPort"], None),
            Some((3, 29))
        );
        assert_eq!(
            locate(text, &["backends", "firefly", "stun"], None),
            Some((4, 10))
        );
        assert_eq!(locate(text, &["backends", "marker"], None), None);
    }

    #[test]
    fn deep_nesting_is_refused_before_it_is_parsed() {
        // The parser would take minutes for each of them: a megabyte is the limit of a file.
        for text in ["[", "{", "a: [{", "[[]"] {
            let error = read(&text.repeat((1 << 20) / text.len())).unwrap_err();
            assert_eq!(error.message, "lists and mappings are nested too deeply");
            assert!(
                error
                    .place
                    .is_some_and(|(line, column)| line == 1 && column <= 4 * 65)
            );
        }
        let deepest = |depth: usize| format!("a: {}{}", "[".repeat(depth), "]".repeat(depth));
        assert_eq!(too_deep(&deepest(MAX_NESTING)), None);
        assert_eq!(
            too_deep(&deepest(MAX_NESTING + 1)),
            Some((1, 4 + MAX_NESTING))
        );
        assert_eq!(too_deep(&"# [\n - []\n".repeat(1000)), None);
    }

    proptest! {
        #[test]
        fn no_text_causes_a_panic(text in ".{0,200}") {
            let _ = read(&text);
        }

        #[test]
        fn no_sequence_of_tokens_causes_a_panic(
            parts in proptest::collection::vec(
                proptest::sample::select(vec![
                    "plugins", "backends", "namedPipe", "firefly", "mode", "stun", ":", ": ", "\n", "\n  ",
                    "\n    ", "{", "}", "[", "]", "- ", "0666", "-1", "'", "\"", "&a", "*a", "<<", "~", "!x", "|", "#", ",",
                ]),
                0..40,
            )
        ) {
            let text = parts.concat();
            if read(&text).is_err() {
                let _ = locate(&text, &["plugins", "namedPipe", "mode"], None);
            }
        }
    }
}
