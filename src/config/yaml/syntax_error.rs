//! libyaml's errors of syntax and indentation in words for those who do not know its terms. No I/O.

use super::{Place, YamlError};

/// Rewrites an error of the parser. An error of indentation has no key: the parser's is one further up.
pub fn explain(text: &str, error: YamlError) -> YamlError {
    let source = Source(text);
    let (problem, context) = error
        .message
        .split_once(", ")
        .unwrap_or((&error.message, ""));
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
        let message = format!(
            "line {} is indented by a tab; YAML allows only spaces",
            place.0
        );
        return without_key(place, message);
    }
    let start = context_place(context).unwrap_or(place);
    match problem {
        "mapping values are not allowed in this context" => source.unexpected_colon(place, error),
        "did not find expected key" | "did not find expected '-' indicator" => {
            source.unexpected_text(place, error)
        }
        "could not find expected ':'" => source.missing_colon(start, error),
        "did not find expected ',' or ']'" => unclosed(['[', ']'], start, error),
        "did not find expected ',' or '}'" => unclosed(['{', '}'], start, error),
        "found unexpected end of stream" if context.contains("quoted scalar") => {
            with(error, start, "this quote is never closed".to_owned())
        }
        "block sequence entries are not allowed in this context" => {
            let message = "a list element (\"- \") must begin on a new line";
            with(error, place, message.to_owned())
        }
        "found unknown escape character" => {
            let message =
                "unknown escape sequence, expected \\\\ for a backslash, or single quotes";
            with(error, place, message.to_owned())
        }
        _ if context.contains("directive") => {
            let message = "a line cannot begin with %, unless it is in quotes";
            with(error, (place.0, 1), message.to_owned())
        }
        "found character that cannot start any token"
        | "did not find expected node content"
        | "unknown anchor"
        | "did not find expected alphabetic or numeric character" => {
            let first = source.from(start).chars().next().unwrap_or_default();
            let message = format!("a value that begins with {first} must be in quotes");
            with(error, start, message)
        }
        "recursion limit exceeded" => with(
            error,
            place,
            "lists and mappings are nested too deeply".to_owned(),
        ),
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

fn spaces(count: usize) -> String {
    match count {
        1 => "1 space".to_owned(),
        _ => format!("{count} spaces"),
    }
}

/// `0, 2 or 4`
fn either(numbers: &[usize]) -> String {
    let texts: Vec<String> = numbers.iter().map(usize::to_string).collect();
    match texts.split_last() {
        Some((last, others)) if !others.is_empty() => format!("{} or {last}", others.join(", ")),
        _ => texts.concat(),
    }
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
        let lines = lines
            .into_iter()
            .enumerate()
            .map(|(index, line)| (index + 1, line));
        lines.filter(|(_, line)| !line.trim().is_empty() && !line.trim_start().starts_with('#'))
    }

    /// The content lines above a line, the nearest first.
    fn above(&self, number: usize) -> impl Iterator<Item = (usize, &'a str)> {
        self.content_lines()
            .rev()
            .filter(move |(above, _)| *above < number)
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
                    "line {number} is indented less than line {first}: found {}, expected {first_indentation}",
                    spaces(indentations(line)[0])
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

    /// A second colon in a line, or a key below a line that already has a value.
    fn unexpected_colon(&self, place: Place, error: YamlError) -> YamlError {
        let (line, _) = place;
        let indentation = indentations(self.line(line))[0];
        let above = self.above(line).next();
        match above.filter(|(_, above)| indentations(above)[0] < indentation) {
            Some((number, _)) if !self.before(place).contains(": ") => without_key(
                (line, indentation + 1),
                format!(
                    "line {line} is indented more than line {number}, whose key already has a value"
                ),
            ),
            _ => {
                let message = "unexpected colon: a value that contains one must be in quotes";
                with(error, place, message.to_owned())
            }
        }
    }

    /// Text where a key is expected.
    fn unexpected_text(&self, place: Place, error: YamlError) -> YamlError {
        let (line, _) = place;
        let before = self.before(place);
        if !before.trim().is_empty() {
            let message = "unexpected text after the value; is a quote or a line break missing?";
            return with(error, place, message.to_owned());
        }
        let allowed = self.allowed_indentations(line);
        let indentation = before.chars().count();
        if allowed.contains(&indentation) {
            let expected = match error.message.contains("'-' indicator") {
                true => "a list element (\"- \")",
                false => "a key",
            };
            let found = excerpt(&self.from(place));
            return without_key(place, format!("found {found}, expected {expected}"));
        }
        let message = format!(
            "line {line} is indented differently from the lines above it: found {}, expected {}",
            spaces(indentation),
            either(&allowed)
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

#[cfg(test)]
mod tests {
    use crate::config::raw::Raw;
    use crate::config::yaml::{YamlError, read as read_document};

    fn read(text: &str) -> Result<Raw, YamlError> {
        read_document(text)
    }

    #[test]
    fn each_syntax_error_says_where_and_what_was_expected() {
        for (text, place, expected) in [
            // Tabs.
            (
                "plugins:\n\tapi:\n",
                (2, 1),
                "line 2 is indented by a tab; YAML allows only spaces",
            ),
            (
                "plugins:\n  api:\n  \tbindPort: 1\n",
                (3, 3),
                "line 3 is indented by a tab; YAML allows only spaces",
            ),
            (
                "plugins:\n  namedPipe:\n    pipePath: /x\n\tmode: 0660\n",
                (4, 1),
                "line 4 is indented by a tab; YAML allows only spaces",
            ),
            // Indentation.
            (
                "plugins:\n  namedPipe:\n    pipePath: /x\n   mode: 0660\n",
                (4, 4),
                "line 4 is indented differently from the lines above it: found 3 spaces, expected 0, 2 or 4",
            ),
            (
                "plugins:\n  api:\n backends:\n",
                (3, 2),
                "line 3 is indented differently from the lines above it: found 1 space, expected 0 or 2",
            ),
            (
                "plugins:\n  netlink:\n    rules:\n      - uid: 0\n       cgroup: /x\n",
                (5, 8),
                "line 5 is indented differently from the lines above it: found 7 spaces, expected 0, 2, 4, 6 or 8",
            ),
            (
                "plugins:\n  namedPipe:\n    pipePath: /x\n\n      mode: 0660\n",
                (5, 7),
                "line 5 is indented more than line 3, whose key already has a value",
            ),
            (
                " plugins:\n  api:\nbackends:\n",
                (3, 1),
                "line 3 is indented less than line 1: found 0 spaces, expected 1",
            ),
            (
                "plugins:\n  netlink:\n    internalNetworks:\n      - ::/0\n      period: 5\n",
                (5, 7),
                "found \"period: 5\", expected a list element (\"- \")",
            ),
            (
                "plugins:\n  api:\n    bindPort: 1\n    - x\n",
                (4, 5),
                "found \"- x\", expected a key",
            ),
            // Colons.
            (
                "plugins:\n  api:\n    token: a: b\n",
                (3, 13),
                "plugins.api: unexpected colon: a value that contains one must be in quotes",
            ),
            (
                "plugins:\n  namedPipe:\n    pipePath: /x\n    mode:0660\nbackends:\n",
                (4, 5),
                "plugins.namedPipe: found \"mode:0660\": a colon must be followed by a space",
            ),
            (
                "plugins:\n  api:\n    bindPort: 1\n    token\nbackends:\n",
                (4, 5),
                "plugins.api: found \"token\": expected a colon after the key",
            ),
            // Quotes and brackets.
            (
                "pidPath: 'x\n",
                (1, 10),
                "pidPath: this quote is never closed",
            ),
            (
                "pidPath: 'x\nlogLevel: 'info'\n",
                (2, 12),
                "unexpected text after the value; is a quote or a line break missing?",
            ),
            (
                "plugins: {api: {bindPort: 1}\nbackends: {}\n",
                (2, 1),
                "plugins: expected ',' or '}': the '{' in line 1, column 10 is not closed yet",
            ),
            (
                "plugins: {netlink: {internalNetworks: [a}}\n",
                (1, 41),
                "plugins.netlink.internalNetworks: expected ',' or ']': the '[' in line 1, column 39 is not closed yet",
            ),
            (
                "pidPath: \"a\\d\"\n",
                (1, 12),
                "pidPath: unknown escape sequence, expected \\\\ for a backslash, or single quotes",
            ),
            // Characters.
            (
                "pidPath: @x\n",
                (1, 10),
                "pidPath: a value that begins with @ must be in quotes",
            ),
            (
                "plugins: {netlink: {internalNetworks: [::1]}}\n",
                (1, 40),
                "plugins.netlink.internalNetworks: a value that begins with : must be in quotes",
            ),
            (
                "pidPath: *x\n",
                (1, 10),
                "pidPath: a value that begins with * must be in quotes",
            ),
            (
                "pidPath: - x\n",
                (1, 10),
                "pidPath: a list element (\"- \") must begin on a new line",
            ),
            (
                "%x:\n",
                (1, 1),
                "a line cannot begin with %, unless it is in quotes",
            ),
            (
                "pidPath: a\u{1}b\n",
                (1, 11),
                "unexpected control character U+0001",
            ),
            (
                "\u{feff}plugins:\n  api:\nbackends:\n",
                (1, 1),
                "the file begins with a byte order mark, expected UTF-8 without one",
            ),
            (
                "plugins:\n---\nbackends:\n",
                (2, 1),
                "a second YAML document begins here, expected one document",
            ),
        ] {
            let error = read(text).unwrap_err();
            let shown = match error.key.as_str() {
                "" => error.message,
                key => format!("{key}: {}", error.message),
            };
            assert_eq!(
                (error.place, shown.as_str()),
                (Some(place), expected),
                "{text}"
            );
        }
    }
}
