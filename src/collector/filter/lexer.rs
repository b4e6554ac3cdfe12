//! Cuts a text into statements, one line each, and these into words; expands macros. No I/O.
//!
//! `#` begins a comment, a backslash at the end of a line continues it, `name = "value"` defines a macro, and `$name` is
//! replaced by its text, except in quotes.

use std::collections::HashMap;
use std::fmt;

/// Line and column, from 1; a column is a character.
pub type Place = (usize, usize);

/// How many characters the macros of one statement may expand to: more than any list of prefixes, and a bound for a macro
/// that contains itself.
const MAX_EXPANSION: usize = 1 << 20;

/// What is wrong in a text, where, and what was expected.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ParseError {
    /// Line and column.
    pub place: Place,
    /// What is wrong, and what was expected.
    pub message: String,
}

impl fmt::Display for ParseError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (line, column) = self.place;
        write!(f, "line {line}, column {column}: {}", self.message)
    }
}

impl std::error::Error for ParseError {}

/// The result of a parser.
pub type Result<T> = std::result::Result<T, ParseError>;

/// A word or a symbol.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Kind {
    /// A word without quotes.
    Word(String),
    /// Text in quotes.
    Quoted(String),
    /// One of `{ } , ! < > =`.
    Symbol(char),
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Kind::Word(text) | Kind::Quoted(text) => write!(f, "\"{}\"", text.escape_debug()),
            Kind::Symbol(symbol) => write!(f, "\"{symbol}\""),
        }
    }
}

/// A word or a symbol, and where it begins; in a macro, where the macro is used.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Token {
    /// The word or symbol.
    pub kind: Kind,
    /// Where it begins.
    pub place: Place,
}

/// The macros that are defined, by name.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Macros {
    fixed: HashMap<String, String>,
    defined: HashMap<String, String>,
}

impl Macros {
    /// Macros of the command line, which override definitions of the same name.
    pub fn new(fixed: &[(String, String)]) -> Macros {
        Macros {
            fixed: fixed.iter().cloned().collect(),
            defined: HashMap::new(),
        }
    }

    /// Splits `name=value`, as an option of the command line gives it.
    pub fn split(definition: &str) -> std::result::Result<(String, String), String> {
        let Some((name, value)) = definition.split_once('=') else {
            return Err(format!(
                "\"{}\" is not a macro, expected NAME=VALUE",
                definition.escape_debug()
            ));
        };
        Macros::check(name, value)?;
        Ok((name.to_owned(), value.to_owned()))
    }

    /// Whether a macro may have this name and value.
    pub fn check(name: &str, value: &str) -> std::result::Result<(), String> {
        if !is_name(name) {
            return Err(format!(
                "\"{}\" is not a valid name of a macro, expected a letter, then letters, digits and _",
                name.escape_debug()
            ));
        }
        match value.contains(|c: char| c.is_control() && c != '\t') {
            true => Err(format!("the value of macro {name} has a control character")),
            false => Ok(()),
        }
    }

    /// Defines a macro, or redefines it; has no effect on one of the command line.
    pub fn define(&mut self, name: &str, value: &str) {
        self.defined.insert(name.to_owned(), value.to_owned());
    }

    fn get(&self, name: &str) -> Option<&str> {
        let value = self.fixed.get(name).or_else(|| self.defined.get(name));
        value.map(String::as_str)
    }
}

/// Whether a macro may have this name.
pub fn is_name(name: &str) -> bool {
    let rest = |c: char| c.is_ascii_alphanumeric() || c == '_';
    name.starts_with(|c: char| c.is_ascii_alphabetic() || c == '_') && name.chars().all(rest)
}

/// Whether a text without quotes is one word.
pub fn is_word(text: &str) -> bool {
    !text.is_empty() && text.chars().all(is_word_char)
}

fn is_word_char(c: char) -> bool {
    !c.is_whitespace() && !c.is_control() && !is_symbol(c) && !"\"'#$\\".contains(c)
}

fn is_symbol(c: char) -> bool {
    "{},!<>=".contains(c)
}

/// Reads statement after statement.
pub struct Statements<'a> {
    rest: std::str::Chars<'a>,
    /// Line and column of the next character of `rest`.
    at: Place,
    /// What is left of macros, the next character last.
    expanded: Vec<char>,
    /// Where the macro is used that is being expanded.
    used_at: Place,
    expansion: usize,
    /// The last line of the statement that was read last.
    pub last_line: usize,
    /// Lines with a comment that ends with a backslash, which does not continue it.
    pub comments_with_backslash: Vec<usize>,
}

impl<'a> Statements<'a> {
    /// Begins at the first line of a text.
    pub fn new(text: &'a str) -> Statements<'a> {
        Statements {
            rest: text.chars(),
            at: (1, 1),
            expanded: Vec::new(),
            used_at: (1, 1),
            expansion: 0,
            last_line: 0,
            comments_with_backslash: Vec::new(),
        }
    }

    fn peek(&self) -> Option<char> {
        let next = || self.rest.clone().next();
        self.expanded.last().copied().or_else(next)
    }

    fn place(&self) -> Place {
        match self.expanded.is_empty() {
            true => self.at,
            false => self.used_at,
        }
    }

    fn next(&mut self) -> Option<char> {
        if let Some(c) = self.expanded.pop() {
            return Some(c);
        }
        let c = self.rest.next()?;
        self.at = match c {
            '\n' => (self.at.0 + 1, 1),
            _ => (self.at.0, self.at.1 + 1),
        };
        Some(c)
    }

    /// The words of the next line that has any; `None` at the end of the text.
    pub fn next_statement(&mut self, macros: &Macros) -> Result<Option<Vec<Token>>> {
        self.expansion = 0;
        let mut tokens = Vec::new();
        while let Some(c) = self.peek() {
            let place = self.place();
            match c {
                '\n' => {
                    self.last_line = self.at.0;
                    self.next();
                    if !tokens.is_empty() {
                        return Ok(Some(tokens));
                    }
                }
                '#' => self.comment(),
                '\\' => self.continuation()?,
                '"' | '\'' => {
                    let kind = Kind::Quoted(self.quoted()?);
                    tokens.push(Token { kind, place });
                }
                '$' => self.expand(macros)?,
                c if is_symbol(c) => {
                    self.next();
                    let kind = Kind::Symbol(c);
                    tokens.push(Token { kind, place });
                }
                c if c.is_whitespace() => {
                    self.next();
                }
                c if is_word_char(c) => {
                    let kind = Kind::Word(self.word(macros)?);
                    tokens.push(Token { kind, place });
                }
                c => {
                    let message = format!("unexpected control character U+{:04X}", u32::from(c));
                    return Err(ParseError { place, message });
                }
            }
        }
        self.last_line = self.at.0;
        Ok((!tokens.is_empty()).then_some(tokens))
    }

    /// A comment reaches to the end of its line, or of the macro that it is in.
    fn comment(&mut self) {
        if !self.expanded.is_empty() {
            self.expanded.clear();
            return;
        }
        let (line, mut last) = (self.at.0, ' ');
        while let Some(c) = self.peek().filter(|c| *c != '\n') {
            if !c.is_whitespace() {
                last = c;
            }
            self.next();
        }
        if last == '\\' {
            self.comments_with_backslash.push(line);
        }
    }

    fn continuation(&mut self) -> Result<()> {
        let place = self.place();
        self.next();
        if self.peek() == Some('\r') {
            self.next();
        }
        match self.next() {
            Some('\n') | None => Ok(()),
            Some(c) => {
                let message = format!(
                    "found \"{}\" after a backslash, expected the end of the line: a backslash continues a line",
                    c.escape_debug()
                );
                Err(ParseError { place, message })
            }
        }
    }

    fn quoted(&mut self) -> Result<String> {
        let place = self.place();
        let quote = self.next();
        let mut text = String::new();
        loop {
            match self.next() {
                c if c == quote => return Ok(text),
                Some('\\') => match self.peek() {
                    Some(c @ ('"' | '\'' | '\\')) => {
                        self.next();
                        text.push(c);
                    }
                    _ => text.push('\\'),
                },
                None | Some('\n') => {
                    let message = "this quote is not closed in its line".to_owned();
                    return Err(ParseError { place, message });
                }
                Some(c) => text.push(c),
            }
        }
    }

    fn word(&mut self, macros: &Macros) -> Result<String> {
        let mut word = String::new();
        while let Some(c) = self.peek() {
            match c {
                '$' => self.expand(macros)?,
                c if is_word_char(c) => {
                    self.next();
                    word.push(c);
                }
                _ => break,
            }
        }
        Ok(word)
    }

    /// Replaces `$name` by the text of the macro.
    fn expand(&mut self, macros: &Macros) -> Result<()> {
        let place = self.place();
        self.next();
        let mut name = String::new();
        while let Some(c) = self
            .peek()
            .filter(|c| c.is_ascii_alphanumeric() || *c == '_')
        {
            self.next();
            name.push(c);
        }
        let Some(value) = macros.get(&name) else {
            let message = match name.is_empty() {
                true => "expected the name of a macro after $".to_owned(),
                false => format!("macro {name} is not defined"),
            };
            return Err(ParseError { place, message });
        };
        self.used_at = place;
        self.expanded.extend(value.chars().rev());
        self.expansion += value.len().max(1);
        if self.expansion > MAX_EXPANSION {
            let message = format!(
                "macro {name} contains itself, or is longer than {} KiB with the macros in it",
                MAX_EXPANSION >> 10
            );
            return Err(ParseError { place, message });
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn words(text: &str, macros: &Macros) -> Result<Vec<String>> {
        let mut statements = Statements::new(text);
        let mut lines = Vec::new();
        while let Some(tokens) = statements.next_statement(macros)? {
            let texts = tokens.iter().map(|t| t.kind.to_string().replace('"', ""));
            lines.push(texts.collect::<Vec<_>>().join("|"));
        }
        Ok(lines)
    }

    #[test]
    fn lines_comments_continuations_quotes_and_symbols() {
        let text = "# one \\\nlisten on 1.2.3.4:5#x\n\n  a \\\n b\\\r\n c 'd \" # $e'\n!inet {1,2-3}>=5 a=\"b\"\\";
        let found = words(text, &Macros::default()).unwrap();
        let expected = [
            "listen|on|1.2.3.4:5",
            "a|b|c|d \\ # $e",
            "!|inet|{|1|,|2-3|}|>|=|5|a|=|b",
        ];
        assert_eq!(found, expected);
    }

    #[test]
    fn a_macro_is_replaced_by_its_text_also_within_a_word_and_that_of_the_command_line_wins() {
        let mut macros = Macros::new(&[("net".to_owned(), "192.0.2.0".to_owned())]);
        macros.define("net", "10.0.0.0");
        macros.define("both", "src $net/24 port # not this\"");
        macros.define("empty", "");
        let found = words("$both 80 $empty x$net\ny '$net' $net", &macros).unwrap();
        assert_eq!(
            found,
            ["src|192.0.2.0/24|port|80|x192.0.2.0", "y|$net|192.0.2.0"]
        );
    }

    #[test]
    fn each_error_has_its_place() {
        let mut macros = Macros::default();
        macros.define("loop", "a $loop");
        macros.define("many", &"x".repeat(MAX_EXPANSION));
        macros.define("nul", "\0");
        for (text, line, column, message) in [
            ("a\n 'b\nc'", 2, 2, "this quote is not closed in its line"),
            ("a \\ b", 1, 3, "found \" \" after a backslash"),
            ("a $x", 1, 3, "macro x is not defined"),
            ("a $-", 1, 3, "expected the name of a macro after $"),
            ("\n $loop", 2, 2, "macro loop contains itself"),
            ("a $many$many", 1, 8, "macro many contains itself"),
            ("a \0", 1, 3, "unexpected control character U+0000"),
            ("a $nul", 1, 3, "unexpected control character U+0000"),
        ] {
            let error = words(text, &macros).unwrap_err();
            assert_eq!(error.place, (line, column), "{text:?}: {error}");
            assert!(error.message.starts_with(message), "{text:?}: {error}");
        }
        assert!(Macros::split("a").is_err());
        assert!(Macros::split("1a=b").is_err());
        assert!(Macros::split("a=b\nc").is_err());
        assert_eq!(Macros::split("a=b=c"), Ok(("a".into(), "b=c".into())));
    }
}
