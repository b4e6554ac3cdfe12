//! Reads YAML into [`Raw`]; finds the place of a key for errors that are found later.

use std::fmt;

use serde::de::{DeserializeSeed, Error as _, IgnoredAny, MapAccess, SeqAccess, Visitor};
use serde_yaml::{Deserializer, Error, Location};

use super::raw::Raw;
use crate::nearest::nearest;

/// An error at a place of the file.
#[derive(Debug, PartialEq, Eq)]
pub struct YamlError {
    /// Line and column, from 1.
    pub place: Option<(usize, usize)>,
    /// The key, by dots.
    pub key: String,
    /// What was wrong and what was expected.
    pub message: String,
}

/// Reads a configuration. An empty one is all defaults.
pub fn read(text: &str) -> Result<Raw, YamlError> {
    if text
        .lines()
        .all(|line| line.trim_start().starts_with('#') || line.trim().is_empty())
    {
        return Ok(Raw::default());
    }
    serde_path_to_error::deserialize(Deserializer::from_str(text)).map_err(|error| {
        let key = match error.path().to_string() {
            top if top == "." => String::new(),
            path => path,
        };
        YamlError {
            place: error.inner().location().map(place),
            message: message(error.inner(), &key),
            key,
        }
    })
}

/// Line and column of the value of a key, given by its parts, or of an element of it.
pub fn locate(text: &str, key: &[&str], element: Option<usize>) -> Option<(usize, usize)> {
    let found = Place { key, element }.deserialize(Deserializer::from_str(text));
    found
        .err()
        .and_then(|error: Error| error.location())
        .map(place)
}

fn place(location: Location) -> (usize, usize) {
    (location.line(), location.column())
}

/// The text of the error alone: its place and key are said apart.
fn message(error: &Error, key: &str) -> String {
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
            text = rest.to_owned();
            break;
        }
    }
    match unknown_key(&text) {
        Some(better) => better,
        None => text,
    }
}

/// Puts the nearest known key behind serde's "unknown field `x`, expected one of `y`, `z`".
fn unknown_key(text: &str) -> Option<String> {
    let mut quoted = text
        .strip_prefix("unknown field ")?
        .split('`')
        .skip(1)
        .step_by(2);
    let unknown = quoted.next()?;
    let known: Vec<&str> = quoted.collect();
    Some(match nearest(unknown, &known) {
        Some(nearest) => format!("unknown key, did you mean `{nearest}`?"),
        None => format!("unknown key, expected one of {}", known.join(", ")),
    })
}

/// Goes down a path of keys and fails at its end: the error carries the place.
struct Place<'a> {
    key: &'a [&'a str],
    element: Option<usize>,
}

impl<'de> DeserializeSeed<'de> for Place<'_> {
    type Value = ();

    fn deserialize<D: serde::Deserializer<'de>>(self, deserializer: D) -> Result<(), D::Error> {
        match self.key {
            [] if self.element.is_some() => deserializer.deserialize_seq(self),
            [] => Here.deserialize(deserializer),
            _ => deserializer.deserialize_map(self),
        }
    }
}

impl<'de> Visitor<'de> for Place<'_> {
    type Value = ();

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a mapping")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<(), A::Error> {
        while let Some(key) = map.next_key::<String>()? {
            if key == self.key[0] {
                let key = &self.key[1..];
                map.next_value_seed(Place { key, ..self })?;
            } else {
                map.next_value::<IgnoredAny>()?;
            }
        }
        Ok(())
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<(), A::Error> {
        for _ in 0..self.element.unwrap_or(0) {
            list.next_element::<IgnoredAny>()?;
        }
        list.next_element_seed(Here)?;
        Ok(())
    }
}

struct Here;

impl<'de> DeserializeSeed<'de> for Here {
    type Value = ();

    fn deserialize<D: serde::Deserializer<'de>>(self, deserializer: D) -> Result<(), D::Error> {
        // Reading the value as what it is not is what makes the parser say where it stands.
        deserializer.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for Here {
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
    use proptest::prelude::*;

    #[test]
    fn an_unknown_key_names_the_nearest_one() {
        let error = read("plugins:\n  namedPipe:\n    pipPath: /x\n").unwrap_err();
        assert_eq!(error.place, Some((3, 5)));
        assert_eq!(error.key, "plugins.namedPipe.pipPath");
        assert_eq!(error.message, "unknown key, did you mean `pipePath`?");
        let error = read("plugins: {}\nzzz: 1\n").unwrap_err();
        assert!(
            error
                .message
                .starts_with("unknown key, expected one of pidPath, "),
            "{error:?}"
        );
    }

    #[test]
    fn a_wrong_type_says_where_and_what_was_expected() {
        let error = read("backends:\n  firefly: {destinationPort: high}\n").unwrap_err();
        assert_eq!(error.place, Some((2, 30)));
        assert_eq!(error.key, "backends.firefly.destinationPort");
        assert_eq!(error.message, "invalid type: string \"high\", expected i64");
    }

    #[test]
    fn the_place_of_a_key_is_found_in_every_spelling() {
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

    proptest! {
        #[test]
        fn any_text_makes_no_panic(text in ".{0,200}") {
            let _ = read(&text);
        }

        #[test]
        fn any_yaml_like_text_makes_no_panic(
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
