//! What came from outside, made fit for a terminal: every command escapes it here.

/// The text with its control characters, and those that change the direction of writing, as `\\u{1b}`.
pub fn escaped(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for c in text.chars() {
        match is_unfit(c) {
            true => out.extend(c.escape_default()),
            false => out.push(c),
        }
    }
    out
}

/// A JSON document on one line, with the same characters as `\\u001b`: within JSON they stand only in strings, and line
/// ends only between values.
pub fn escaped_json(json: &str) -> String {
    let mut out = String::with_capacity(json.len());
    for c in json.chars() {
        match c {
            '\t' | '\n' | '\r' => out.push(' '),
            // All of them have four digits.
            c if is_unfit(c) => out += &format!("\\u{:04x}", u32::from(c)),
            c => out.push(c),
        }
    }
    out
}

fn is_unfit(c: char) -> bool {
    let is_direction = matches!(c, '\u{61c}' | '\u{200e}' | '\u{200f}' | '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{2069}');
    c.is_control() || is_direction || matches!(c, '\u{2028}' | '\u{2029}')
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_that_a_terminal_obeys_is_left() {
        let hostile = "a\u{1b}[2J\u{9b}31m\u{7f}\n\u{202e}\u{2028}é\"";
        assert_eq!(
            escaped(hostile),
            "a\\u{1b}[2J\\u{9b}31m\\u{7f}\\n\\u{202e}\\u{2028}é\""
        );
        let json = "{\"a\":\n\"\u{9b}\u{7f}\u{202e}é\"}";
        let line = escaped_json(json);
        assert_eq!(line, "{\"a\": \"\\u009b\\u007f\\u202eé\"}");
        let parse = |text: &str| serde_json::from_str::<serde_json::Value>(text).unwrap();
        assert_eq!(parse(&line), parse(json));
    }
}
