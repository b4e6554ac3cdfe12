//! A strict reader for flowd's configuration, a list of assignments of Python literals: strings, numbers, booleans,
//! None, tuples and lists, with comments. It executes nothing. No I/O.

/// How deep tuples and lists may be nested.
const MAX_DEPTH: usize = 32;

/// Line and column, from 1; a column is a character.
pub type Place = (usize, usize);

/// `KEY = value`
#[derive(Clone, Debug, PartialEq)]
pub struct Assignment {
    /// The name before the `=`.
    pub key: String,
    /// Where the name begins.
    pub place: Place,
    /// The value after the `=`.
    pub value: Value,
    /// Where the value begins.
    pub value_place: Place,
}

/// A Python literal.
#[derive(Clone, Debug, PartialEq)]
pub enum Value {
    /// `None`
    None,
    /// `True` or `False`
    Bool(bool),
    /// A whole number of 64 bits.
    Int(i64),
    /// A number with a fraction or an exponent.
    Float(f64),
    /// A string.
    Text(String),
    /// `(a, b)`, or `a, b` without parentheses.
    Tuple(Vec<Value>),
    /// `[a, b]`
    List(Vec<Value>),
}

/// Text that is not an assignment of a literal.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ParseError {
    /// Where.
    pub place: Place,
    /// What was found and what was expected.
    pub message: String,
}

type Result<T> = std::result::Result<T, ParseError>;

/// Reads all assignments, in their order, in linear time.
pub fn read(text: &str) -> Result<Vec<Assignment>> {
    let text = text.strip_prefix('\u{feff}').unwrap_or(text);
    let mut reader = Reader {
        rest: text,
        place: (1, 1),
        depth: 0,
    };
    let mut assignments = Vec::new();
    loop {
        let indented = reader.skip_blank_lines();
        match reader.peek() {
            None => return Ok(assignments),
            Some(_) if indented => return reader.fail("unexpected space before the key"),
            Some(_) => assignments.push(reader.assignment()?),
        }
    }
}

struct Reader<'a> {
    rest: &'a str,
    place: Place,
    depth: usize,
}

impl Reader<'_> {
    fn peek(&self) -> Option<char> {
        self.rest.chars().next()
    }

    fn next(&mut self) -> Option<char> {
        let mut chars = self.rest.chars();
        let c = chars.next()?;
        self.rest = chars.as_str();
        self.place = match c {
            '\n' => (self.place.0 + 1, 1),
            _ => (self.place.0, self.place.1 + 1),
        };
        Some(c)
    }

    fn skip_if(&mut self, c: char) -> bool {
        let is_next = self.peek() == Some(c);
        if is_next {
            self.next();
        }
        is_next
    }

    fn fail<T>(&self, message: impl Into<String>) -> Result<T> {
        fail_at(self.place, message)
    }

    /// The next character, for a message.
    fn describe_next(&self) -> String {
        match self.peek() {
            None => "the end of the file".to_owned(),
            Some('\n' | '\r') => "the end of the line".to_owned(),
            Some(c) => format!("'{}'", c.escape_debug()),
        }
    }

    fn skip_comment(&mut self) {
        if self.peek() == Some('#') {
            while self.peek().is_some_and(|c| c != '\n') {
                self.next();
            }
        }
    }

    /// Returns whether white space comes before the next text.
    fn skip_blank_lines(&mut self) -> bool {
        loop {
            let mut indented = false;
            while matches!(self.peek(), Some(' ' | '\t' | '\x0c' | '\r')) {
                indented |= self.next() != Some('\r');
            }
            self.skip_comment();
            if !self.skip_if('\n') {
                return indented;
            }
        }
    }

    /// White space within a line; within brackets also line breaks and comments.
    fn skip_space(&mut self) {
        loop {
            match self.peek() {
                Some(' ' | '\t' | '\x0c' | '\r') => {
                    self.next();
                }
                Some('\\') if self.rest.starts_with("\\\n") || self.rest.starts_with("\\\r\n") => {
                    while self.next() != Some('\n') {}
                }
                Some('\n') if self.depth > 0 => {
                    self.next();
                }
                Some('#') if self.depth > 0 => self.skip_comment(),
                _ => return,
            }
        }
    }

    fn word(&mut self) -> String {
        let end = |c: char| !(c.is_alphanumeric() || c == '_');
        let length = self.rest.find(end).unwrap_or(self.rest.len());
        let word = self.rest[..length].to_owned();
        while self.peek().is_some_and(|c| !end(c)) {
            self.next();
        }
        word
    }

    fn assignment(&mut self) -> Result<Assignment> {
        let place = self.place;
        let key = self.word();
        if key.is_empty() || key.starts_with(|c: char| c.is_numeric()) {
            return fail_at(
                place,
                format!("expected KEY = value, found {}", self.describe(&key)),
            );
        }
        self.skip_space();
        if !self.skip_if('=') || self.peek() == Some('=') {
            let message = format!(
                "expected KEY = value, found \"{key}\" without \"=\"; the file is not executed"
            );
            return fail_at(place, message);
        }
        self.skip_space();
        let value_place = self.place;
        let first = self.value()?;
        let value = self.rest_of_tuple(first, |reader| {
            matches!(reader.peek(), None | Some('\n' | '#'))
        })?;
        self.skip_comment();
        if self.peek().is_some() && !self.skip_if('\n') {
            let found = self.describe_next();
            return self.fail(format!(
                "expected the end of the line, found {found}; the file is not executed"
            ));
        }
        Ok(Assignment {
            key,
            place,
            value,
            value_place,
        })
    }

    /// The word, or the next character if it is empty.
    fn describe(&self, word: &str) -> String {
        if word.is_empty() {
            self.describe_next()
        } else {
            format!("\"{word}\"")
        }
    }

    /// `first`, or a tuple of it and the values after its comma.
    fn rest_of_tuple(&mut self, first: Value, at_end: impl Fn(&Self) -> bool) -> Result<Value> {
        self.skip_space();
        if self.peek() != Some(',') {
            return Ok(first);
        }
        let mut values = vec![first];
        while self.skip_if(',') {
            self.skip_space();
            if at_end(self) {
                break;
            }
            values.push(self.value()?);
            self.skip_space();
        }
        Ok(Value::Tuple(values))
    }

    fn value(&mut self) -> Result<Value> {
        match self.peek() {
            Some('\'' | '"') => self.strings(),
            Some('(' | '[') => self.brackets(),
            Some('+' | '-' | '.' | '0'..='9') => self.number(),
            Some('{') => self.fail(
                "found a dict or set, expected a string, a number, True, False, None, a tuple or a list",
            ),
            Some(c) if c.is_alphabetic() || c == '_' => self.name(),
            _ => {
                let found = self.describe_next();
                self.fail(format!("expected a value, found {found}"))
            }
        }
    }

    /// None, True, False, or a string with a prefix.
    fn name(&mut self) -> Result<Value> {
        let place = self.place;
        let mut ahead = self.rest.chars().take(3);
        let after_prefix = ahead.by_ref().find(|c| !c.is_ascii_alphabetic());
        if matches!(after_prefix, Some('\'' | '"')) {
            return self.strings();
        }
        match self.word().as_str() {
            "None" => Ok(Value::None),
            "True" => Ok(Value::Bool(true)),
            "False" => Ok(Value::Bool(false)),
            word => fail_at(
                place,
                format!(
                    "found the name \"{word}\", expected a string in quotes, a number, True, False, None, a tuple or a list; the file is not executed"
                ),
            ),
        }
    }

    /// A tuple, a list, or a value in parentheses.
    fn brackets(&mut self) -> Result<Value> {
        let place = self.place;
        let list = self.next() == Some('[');
        let close = if list { ']' } else { ')' };
        if self.depth == MAX_DEPTH {
            let message = format!("brackets are nested more than {MAX_DEPTH} deep");
            return fail_at(place, message);
        }
        self.depth += 1;
        let (mut values, mut comma) = (Vec::new(), false);
        loop {
            self.skip_space();
            if self.peek() == Some(close) {
                break;
            }
            if self.peek().is_none() {
                return fail_at(
                    place,
                    format!("this bracket is never closed, expected '{close}'"),
                );
            }
            if !values.is_empty() && !comma {
                let found = self.describe_next();
                return self.fail(format!("expected ',' or '{close}', found {found}"));
            }
            values.push(self.value()?);
            self.skip_space();
            comma = self.skip_if(',');
        }
        self.next();
        self.depth -= 1;
        Ok(match (list, values.len()) {
            (true, _) => Value::List(values),
            (false, 1) if !comma => values.remove(0),
            (false, _) => Value::Tuple(values),
        })
    }

    fn number(&mut self) -> Result<Value> {
        let place = self.place;
        let mut negative = false;
        while let Some(sign @ ('+' | '-')) = self.peek() {
            negative ^= sign == '-';
            self.next();
            self.skip_space();
        }
        let mut digits = String::new();
        let mut previous = ' ';
        while let Some(c) = self.peek() {
            let exponent = matches!(previous, 'e' | 'E')
                && !digits.starts_with("0x")
                && !digits.starts_with("0X");
            if !(c.is_ascii_alphanumeric()
                || c == '.'
                || c == '_'
                || exponent && matches!(c, '+' | '-'))
            {
                break;
            }
            digits.push(c);
            previous = c;
            self.next();
        }
        let wrong = || ParseError {
            place,
            message: format!("\"{digits}\" is not a valid number"),
        };
        let misplaced_underscore =
            digits.ends_with('_') || digits.starts_with('_') || digits.contains("__");
        if misplaced_underscore {
            return Err(wrong());
        }
        let plain = digits.replace('_', "").to_ascii_lowercase();
        let radix = match plain.get(..2) {
            Some("0x") => 16,
            Some("0o") => 8,
            Some("0b") => 2,
            _ => 10,
        };
        let body = if radix == 10 {
            plain.as_str()
        } else {
            &plain[2..]
        };
        if !body.is_empty() && body.chars().all(|c| c.is_digit(radix)) {
            if radix == 10 && body.starts_with('0') && body.chars().any(|c| c != '0') {
                return fail_at(
                    place,
                    format!(
                        "\"{digits}\" begins with 0, expected no leading zeros, or 0o… for octal"
                    ),
                );
            }
            let signed = if negative {
                format!("-{body}")
            } else {
                body.to_owned()
            };
            return match i64::from_str_radix(&signed, radix) {
                Ok(number) => Ok(Value::Int(number)),
                Err(_) => fail_at(
                    place,
                    format!("{digits} is out of range, expected a number of 64 bits"),
                ),
            };
        }
        let float = |c: char| c.is_ascii_digit() || matches!(c, '.' | 'e' | '+' | '-');
        match plain.parse::<f64>() {
            Ok(number) if radix == 10 && plain.chars().all(float) && number.is_finite() => {
                Ok(Value::Float(if negative { -number } else { number }))
            }
            _ => Err(wrong()),
        }
    }

    /// A string, or several without commas between them, which Python joins.
    fn strings(&mut self) -> Result<Value> {
        let mut text = String::new();
        loop {
            self.string(&mut text)?;
            self.skip_space();
            let rest = self
                .rest
                .trim_start_matches(|c: char| c.is_ascii_alphabetic());
            let prefix = self.rest.len() - rest.len();
            if prefix > 2 || !rest.starts_with(['\'', '"']) {
                return Ok(Value::Text(text));
            }
        }
    }

    fn string(&mut self, text: &mut String) -> Result<()> {
        let place = self.place;
        let mut raw = false;
        while let Some(c) = self.peek().filter(char::is_ascii_alphabetic) {
            match c {
                'r' | 'R' if !raw => raw = true,
                'u' | 'U' if !raw => {}
                _ => {
                    return fail_at(
                        place,
                        format!("found a string with the prefix {c}, expected a plain string"),
                    );
                }
            }
            self.next();
        }
        let Some(quote) = self.next() else {
            return fail_at(place, "expected a string");
        };
        let triple = self
            .rest
            .starts_with(&[quote, quote].iter().collect::<String>());
        if triple {
            self.next();
            self.next();
        }
        loop {
            let at = self.place;
            match self.next() {
                None => return fail_at(place, "this string is never closed"),
                Some('\n') if !triple => {
                    return fail_at(
                        place,
                        format!("this string is not closed on its line, expected {quote}"),
                    );
                }
                // Python reads \r\n as \n.
                Some('\r') if self.peek() == Some('\n') => {}
                Some(c) if c == quote => {
                    if !triple {
                        return Ok(());
                    }
                    let two: String = [quote, quote].iter().collect();
                    if self.rest.starts_with(&two) {
                        self.next();
                        self.next();
                        return Ok(());
                    }
                    text.push(c);
                }
                Some('\\') if raw => {
                    text.push('\\');
                    if let Some(c) = self.next() {
                        text.push(c);
                    }
                }
                Some('\\') => self.escape(at, text)?,
                Some(c) => text.push(c),
            }
        }
    }

    fn escape(&mut self, at: Place, text: &mut String) -> Result<()> {
        let Some(c) = self.next() else { return Ok(()) };
        let (digits, radix) = match c {
            'x' => (2, 16),
            'u' => (4, 16),
            'U' => (8, 16),
            '0'..='7' => (3, 8),
            'N' => return fail_at(at, "found \\N{…}, expected the character itself"),
            _ => {
                match c {
                    '\n' => {}
                    'n' => text.push('\n'),
                    't' => text.push('\t'),
                    'r' => text.push('\r'),
                    'a' => text.push('\x07'),
                    'b' => text.push('\x08'),
                    'f' => text.push('\x0c'),
                    'v' => text.push('\x0b'),
                    '\\' | '\'' | '"' => text.push(c),
                    // Python keeps an unknown escape as it is.
                    _ => text.extend(['\\', c]),
                }
                return Ok(());
            }
        };
        let mut number = if radix == 8 {
            c.to_digit(8).unwrap_or(0)
        } else {
            0
        };
        for n in usize::from(radix == 8)..digits {
            match self.peek().and_then(|c| c.to_digit(radix)) {
                Some(digit) => number = number.saturating_mul(radix).saturating_add(digit),
                None if radix == 8 => break,
                None => {
                    return fail_at(
                        at,
                        format!("expected {digits} hexadecimal digits, found {n}"),
                    );
                }
            }
            self.next();
        }
        match char::from_u32(number) {
            Some(c) => text.push(c),
            None => return fail_at(at, format!("{number:#x} is not a valid character")),
        }
        Ok(())
    }
}

fn fail_at<T>(place: Place, message: impl Into<String>) -> Result<T> {
    Err(ParseError {
        place,
        message: message.into(),
    })
}

#[cfg(test)]
mod tests {
    use super::Value::{Bool, Float, Int, List, None as Nothing, Tuple};
    use super::*;
    use proptest::prelude::*;

    fn text(text: &str) -> Value {
        Value::Text(text.to_owned())
    }

    fn value(literal: &str) -> Value {
        let mut read =
            read(&format!("KEY = {literal}\n")).unwrap_or_else(|e| panic!("{literal}: {e:?}"));
        assert_eq!(read.len(), 1, "{literal}");
        read.remove(0).value
    }

    #[test]
    fn literals_have_the_values_that_they_have_in_python() {
        for (literal, expected) in [
            ("'a'", text("a")),
            ("\"a'b\"", text("a'b")),
            ("'a\\'b\\n\\x41\\u00e9\\101\\0'", text("a'b\nAé\x41\0")),
            ("'\\d'", text("\\d")),
            ("r'\\n'", text("\\n")),
            ("u'a' \"b\" 'c'", text("abc")),
            ("'''a\n'b'\n'''", text("a\n'b'\n")),
            ("'a\\\nb'", text("ab")),
            ("('a'\n   'b')", text("ab")),
            ("''", text("")),
            ("10514", Int(10514)),
            ("-1", Int(-1)),
            ("0x1F", Int(31)),
            ("0o17", Int(15)),
            ("0b11", Int(3)),
            ("1_000", Int(1000)),
            ("0", Int(0)),
            ("-9223372036854775808", Int(i64::MIN)),
            ("2.5", Float(2.5)),
            (".5", Float(0.5)),
            ("1e3", Float(1000.0)),
            ("-1.5E-3", Float(-0.0015)),
            ("True", Bool(true)),
            ("False", Bool(false)),
            ("None", Nothing),
            ("()", Tuple(vec![])),
            ("[]", List(vec![])),
            ("('192.168.0.0/16')", text("192.168.0.0/16")),
            ("('192.168.0.0/16',)", Tuple(vec![text("192.168.0.0/16")])),
            ("'a', 'b'", Tuple(vec![text("a"), text("b")])),
            ("'a',", Tuple(vec![text("a")])),
            (
                "[(2, 9), # one\n (2, 19), ]  # two",
                List(vec![
                    Tuple(vec![Int(2), Int(9)]),
                    Tuple(vec![Int(2), Int(19)]),
                ]),
            ),
            ("\\\n  5", Int(5)),
        ] {
            assert_eq!(value(literal), expected, "{literal}");
        }
    }

    #[test]
    fn comments_blank_lines_and_a_byte_order_mark_are_skipped() {
        let file = "\u{feff}# flowd\r\n\r\nPLUGIN='np_api'   # the pipe\r\n  # indented comment\nBACKEND = 'udp_firefly,prometheus'\nX=1";
        let keys: Vec<_> = read(file)
            .unwrap()
            .into_iter()
            .map(|a| (a.key, a.place, a.value_place))
            .collect();
        assert_eq!(
            keys,
            [
                ("PLUGIN".to_owned(), (3, 1), (3, 8)),
                ("BACKEND".to_owned(), (5, 1), (5, 11)),
                ("X".to_owned(), (6, 1), (6, 3)),
            ]
        );
        assert_eq!(read(""), Ok(vec![]));
    }

    #[test]
    fn each_error_has_its_place_and_message() {
        for (file, place, message) in [
            ("A=1\n B=2", (2, 2), "unexpected space before the key"),
            ("import os", (1, 1), "found \"import\" without \"=\""),
            ("A==1", (1, 1), "without \"=\""),
            ("= 1", (1, 1), "expected KEY = value, found '='"),
            ("A=", (1, 3), "expected a value, found the end of the file"),
            (
                "A=\nB=1",
                (1, 3),
                "expected a value, found the end of the line",
            ),
            ("A=os.system('x')", (1, 3), "found the name \"os\""),
            ("A=open('/etc/passwd')", (1, 3), "found the name \"open\""),
            (
                "A='a' + 'b'",
                (1, 7),
                "expected the end of the line, found '+'",
            ),
            (
                "A=1; B=2",
                (1, 4),
                "expected the end of the line, found ';'",
            ),
            ("A='a'.upper()", (1, 6), "found '.'"),
            ("A={'a': 1}", (1, 3), "found a dict or set"),
            ("A=('a'", (1, 3), "never closed, expected ')'"),
            ("A=['a' 1]", (1, 8), "expected ',' or ']', found '1'"),
            ("A=(,)", (1, 4), "expected a value, found ','"),
            ("A='a\nB=1", (1, 3), "not closed on its line"),
            ("A='''a\nB=1", (1, 3), "never closed"),
            ("A=f'{x}'", (1, 3), "prefix f"),
            ("A=b'x'", (1, 3), "prefix b"),
            ("A=007", (1, 3), "begins with 0"),
            ("A=12ab", (1, 3), "\"12ab\" is not a valid number"),
            ("A=1j", (1, 3), "is not a valid number"),
            ("A=99999999999999999999", (1, 3), "out of range"),
            ("A='\\x4'", (1, 4), "expected 2 hexadecimal digits, found 1"),
            ("A='\\ud800'", (1, 4), "is not a valid character"),
            ("A='é', x", (1, 8), "found the name \"x\""),
        ] {
            let error = read(file).unwrap_err();
            assert_eq!(error.place, place, "{file}: {error:?}");
            assert!(error.message.contains(message), "{file}: {error:?}");
        }
        assert!(read(&format!("A={}", "(".repeat(100_000))).is_err());
    }

    /// As Python's repr() writes it.
    fn repr(value: &Value) -> String {
        let list = |values: &[Value]| values.iter().map(|v| repr(v) + ", ").collect::<String>();
        match value {
            Nothing => "None".to_owned(),
            Bool(true) => "True".to_owned(),
            Bool(false) => "False".to_owned(),
            Int(number) => number.to_string(),
            Float(number) => format!("{number:?}"),
            Value::Text(text) => format!(
                "'{}'",
                text.replace('\\', "\\\\")
                    .replace('\'', "\\'")
                    .replace('\n', "\\n")
                    .replace('\r', "\\r")
            ),
            Tuple(values) => format!("({})", list(values)),
            List(values) => format!("[{}]", list(values)),
        }
    }

    fn any_value() -> impl Strategy<Value = Value> {
        let leaf = prop_oneof![
            Just(Nothing),
            any::<bool>().prop_map(Bool),
            any::<i64>().prop_map(Int),
            any::<f64>()
                .prop_filter("finite", |f| f.is_finite())
                .prop_map(Float),
            any::<String>().prop_map(Value::Text),
        ];
        leaf.prop_recursive(4, 20, 5, |inner| {
            prop_oneof![
                proptest::collection::vec(inner.clone(), 0..5).prop_map(Tuple),
                proptest::collection::vec(inner, 0..5).prop_map(List),
            ]
        })
    }

    proptest! {
        #[test]
        fn repr_of_a_value_is_read_as_that_value(value in any_value()) {
            let file = format!("A = {}\n", repr(&value));
            prop_assert_eq!(&read(&file).unwrap()[0].value, &value, "{}", file);
        }

        #[test]
        fn no_text_causes_a_panic(text in any::<String>()) {
            let _ = read(&text);
        }

        #[test]
        fn no_sequence_of_tokens_causes_a_panic(
            parts in proptest::collection::vec(
                proptest::sample::select(vec![
                    "A", "=", " ", "\n", "'", "\"", "'''", "(", ")", "[", "]", ",", "\\", "#", "1", "0x", "e", "-", ".", "None", "r", "\\x", "\r", "é",
                ]),
                0..40,
            )
        ) {
            let _ = read(&parts.concat());
        }
    }

    #[test]
    fn time_is_linear() {
        // Quadratic time would take minutes.
        let strings = "'a' ".repeat(200_000);
        let long = format!(
            "A = ({strings})\nB = '{}'\nC = [{}]\n",
            "x".repeat(2_000_000),
            "1,".repeat(500_000)
        );
        assert_eq!(read(&long).unwrap().len(), 3);
        assert_eq!(read(&"A = None\n".repeat(200_000)).unwrap().len(), 200_000);
        assert!(read(&format!("A = {}", "'a' + ".repeat(300_000))).is_err());
        assert!(read(&"A = (\n".repeat(100_000)).is_err());
    }
}
