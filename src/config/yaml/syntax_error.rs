//! What is wrong with a text that is not YAML, for those who do not know libyaml's terms. No I/O.

use super::{Place, YamlError};

/// Rewrites an error of the parser. The key is that of the error as long as what is wrong is in its value.
pub fn explain(text: &str, error: YamlError) -> YamlError {
    let source = Source(text);
    let (problem, context) = error.message.split_once(", ").unwrap_or((&error.message, ""));
    if problem.contains("more than one document") {
        return source.second_document();
    }
    if problem.starts_with("control characters are not allowed") {
        return source.control_character(error);
    }
    let Some(place) = error.place else {
        return error;
    };
    let tab = source.from(place).starts_with('\t') || problem.contains("tab character");
    if tab && source.before(place).trim().is_empty() {
        let message = format!("line {} is indented by a tab; YAML allows only spaces", place.0);
        return without_key(place, message);
    }
    let start = context_place(context).unwrap_or(place);
    match problem {
        "mapping values are not allowed in this context" => source.unexpected_colon(place, error),
        "did not find expected key" => source.unexpected_text(place, error),
        "did not find expected '-' indicator" => without_key(
            place,
            format!(
                "line {} is indented like the list above it, but does not begin with \"- \"",
                place.0
            ),
        ),
        "could not find expected ':'" => source.missing_colon(start, error),
        "did not find expected ',' or ']'" => unclosed(['[', ']'], start, error),
        "did not find expected ',' or '}'" => unclosed(['{', '}'], start, error),
        "found unexpected end of stream" if context.contains("quoted scalar") => {
            let quote = source.from(start).chars().next().unwrap_or('"');
            with(error, start, format!("this {quote} is never closed"))
        }
        "block sequence entries are not allowed in this context" => {
            let message = "unexpected list element, expected \"- \" at the beginning of a line";
            with(error, place, message.to_owned())
        }
        "found unknown escape character" => {
            let message = "unknown escape sequence, expected \\\\ for a backslash, or single quotes";
            with(error, place, message.to_owned())
        }
        "found character that cannot start any token"
        | "unknown anchor"
        | "did not find expected alphabetic or numeric character" => {
            let first = source.from(start).chars().next().unwrap_or_default();
            let message = format!("a value that begins with {first} must be in quotes");
            with(error, start, message)
        }
        "recursion limit exceeded" => {
            with(error, place, "lists and mappings are nested too deeply".to_owned())
        }
        _ => {
            let message = format!("this is not valid YAML: {}", error.message);
            with(error, place, message)
        }
    }
}

fn with(error: YamlError, place: Place, message: String) -> YamlError {
    YamlError {
        place: Some(place),
        message,
        ..error
    }
}

/// The key of the error is one above the line that is indented wrongly.
fn without_key(place: Place, message: String) -> YamlError {
    YamlError {
        place: Some(place),
        key: String::new(),
        message,
    }
}

fn unclosed([open, close]: [char; 2], (line, column): Place, error: YamlError) -> YamlError {
    let message = format!(
        "expected ',' or '{close}': the '{open}' in line {line}, column {column} is not closed yet"
    );
    YamlError { message, ..error }
}

/// The place in libyaml's "while scanning a quoted scalar at line 1 column 10".
fn context_place(context: &str) -> Option<Place> {
    let (_, place) = context.split_once(" at line ")?;
    let (line, column) = place.split_once(" column ")?;
    Some((line.parse().ok()?, column.parse().ok()?))
}

/// The beginning of a text, in quotes.
fn excerpt(text: &str) -> String {
    const MAX_CHARS: usize = 30;
    let text = text.trim_end();
    let start: String = text.chars().take(MAX_CHARS).collect();
    let more = if start.len() < text.len() { "…" } else { "" };
    format!("\"{start}{more}\"")
}

/// `0, 2 or 4 spaces`
fn spaces(numbers: &[usize]) -> String {
    let texts: Vec<String> = numbers.iter().map(usize::to_string).collect();
    let list = match texts.split_last() {
        Some((last, others)) if !others.is_empty() => format!("{} or {last}", others.join(", ")),
        _ => texts.concat(),
    };
    let noun = if numbers == [1] { "space" } else { "spaces" };
    format!("{list} {noun}")
}

/// The text with the error.
struct Source<'a>(&'a str);

impl<'a> Source<'a> {
    fn line(&self, number: usize) -> &'a str {
        self.0.lines().nth(number - 1).unwrap_or_default()
    }

    fn before(&self, (line, column): Place) -> String {
        self.line(line).chars().take(column - 1).collect()
    }

    /// The rest of the line.
    fn from(&self, (line, column): Place) -> String {
        self.line(line).chars().skip(column - 1).collect()
    }

    /// Lines that are not empty and not comments, with their numbers.
    fn content_lines(&self) -> impl DoubleEndedIterator<Item = (usize, &'a str)> {
        let lines: Vec<&str> = self.0.lines().collect();
        let lines = lines.into_iter().enumerate().map(|(index, line)| (index + 1, line));
        lines.filter(|(_, line)| !line.trim().is_empty() && !line.trim_start().starts_with('#'))
    }

    /// The content lines above a line, the nearest first.
    fn above(&self, number: usize) -> impl Iterator<Item = (usize, &'a str)> {
        self.content_lines().rev().filter(move |(above, _)| *above < number)
    }

    /// The indentations that the lines above a line allow, in ascending order.
    fn allowed_indentations(&self, number: usize) -> Vec<usize> {
        let mut allowed: Vec<usize> = Vec::new();
        for (_, line) in self.above(number) {
            for indentation in indentations(line).into_iter().rev() {
                if allowed.last().is_none_or(|last| indentation < *last) {
                    allowed.push(indentation);
                }
            }
        }
        allowed.reverse();
        allowed
    }

    fn second_document(&self) -> YamlError {
        if self.0.starts_with('\u{feff}') {
            let message = "the file begins with a byte order mark, expected UTF-8 without one";
            return without_key((1, 1), message.to_owned());
        }
        let mut lines = self.content_lines();
        let (first, first_line) = lines.next().unwrap_or((1, ""));
        let first_indentation = indentations(first_line)[0];
        for (number, line) in lines {
            if line.starts_with("---") || line.starts_with("...") {
                let message = "a second YAML document begins here, expected one document";
                return without_key((number, 1), message.to_owned());
            }
            if indentations(line)[0] < first_indentation {
                let message = format!(
                    "line {number} is indented less than line {first}: expected {}",
                    spaces(&[first_indentation])
                );
                return without_key((number, 1), message);
            }
        }
        YamlError {
            place: None,
            key: String::new(),
            message: "the file has several YAML documents, expected one".to_owned(),
        }
    }

    fn control_character(&self, error: YamlError) -> YamlError {
        let is_forbidden = |c: char| c.is_control() && !matches!(c, '\n' | '\r' | '\t' | '\u{85}');
        let mut lines = self.0.lines().enumerate();
        let found = lines.find_map(|(line, content)| {
            let mut chars = content.chars().enumerate();
            let (column, c) = chars.find(|(_, c)| is_forbidden(*c))?;
            Some(((line + 1, column + 1), u32::from(c)))
        });
        match found {
            Some((place, code)) => with(
                error,
                place,
                format!("unexpected control character U+{code:04X}"),
            ),
            None => error,
        }
    }

    /// A colon behind a value: in the same line, or in the next one.
    fn unexpected_colon(&self, place: Place, error: YamlError) -> YamlError {
        let (line, _) = place;
        let indentation = indentations(self.line(line))[0];
        let above = self.above(line).next();
        let above = above.filter(|(_, above)| indentations(above)[0] < indentation);
        match above.filter(|_| !self.before(place).contains(": ")) {
            Some((number, above)) if above.contains(':') => without_key(
                (line, indentation + 1),
                format!(
                    "line {line} is indented more than line {number}, whose key already has a value"
                ),
            ),
            Some((number, above)) => without_key(
                (number, indentations(above)[0] + 1),
                format!("line {number} has no colon, expected one after its key"),
            ),
            None => {
                let message = "unexpected colon: a value that contains one must be in quotes";
                with(error, place, message.to_owned())
            }
        }
    }

    /// Text where a key is expected.
    fn unexpected_text(&self, place: Place, error: YamlError) -> YamlError {
        let (line, _) = place;
        let (before, found) = (self.before(place), excerpt(&self.from(place)));
        if !before.trim().is_empty() {
            let message =
                format!("found {found} after the value, expected a new line; is a quote missing?");
            return with(error, place, message);
        }
        let allowed = self.allowed_indentations(line);
        let indentation = before.chars().count();
        if allowed.contains(&indentation) {
            return without_key(place, format!("found {found}, expected a key"));
        }
        let message = format!(
            "line {line} is indented differently from the lines above it: found {}, expected {}",
            spaces(&[indentation]),
            spaces(&allowed)
        );
        without_key(place, message)
    }

    fn missing_colon(&self, place: Place, error: YamlError) -> YamlError {
        let key = self.from(place);
        let expected = match key.contains(':') {
            true => "a colon must be followed by a space",
            false => "expected a colon after the key",
        };
        with(error, place, format!("found {}: {expected}", excerpt(&key)))
    }
}

/// The columns from 0 of the content of a line, and of the list elements that begin in it.
fn indentations(line: &str) -> Vec<usize> {
    let mut rest = line.trim_start_matches(' ');
    let mut columns = vec![line.len() - rest.len()];
    while let Some(element) = rest.strip_prefix("- ") {
        rest = element.trim_start_matches(' ');
        columns.push(line.len() - rest.len());
    }
    columns
}
