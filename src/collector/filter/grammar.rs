//! The language of the rules: reads a text into [`Rule`]s. No I/O.

use std::net::IpAddr;

use ipnet::IpNet;
use jiff::civil::DateTime;

use super::lexer::{Kind, Macros, ParseError, Place, Result, Statements, Token, is_name};
use super::rule::{
    Addresses, Clauses, Comparison, DAYS, End, Family, Masked, Name, Operator, PROTOCOLS, Ranges,
    Rule, Test,
};
use crate::config::nearest::nearest;
use crate::registry::Registry;
use crate::scitag::{ACTIVITY_MAX, EXPERIMENT_MAX};

/// The keywords that begin a clause.
pub const CLAUSES: [&str; 18] = [
    "agent",
    "in_ifndx",
    "out_ifndx",
    "inet",
    "inet6",
    "src",
    "dst",
    "proto",
    "tos",
    "tcp_flags",
    "label",
    "experiment",
    "activity",
    "bytes",
    "packets",
    "days",
    "after",
    "before",
];
/// The largest flow label: 20 bits.
const LABEL_MAX: u32 = 0xf_ffff;

/// Rules, and where each of them begins.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Rules {
    /// The rules in their order.
    pub rules: Vec<Rule>,
    /// Line and column of each.
    pub places: Vec<Place>,
}

impl Rules {
    /// Adds a rule.
    pub fn push(&mut self, rule: Rule, place: Place) -> Result<()> {
        if self.rules.len() == usize::from(u16::MAX) {
            let message = format!("too many rules, expected at most {}", u16::MAX);
            return Err(ParseError { place, message });
        }
        self.rules.push(rule);
        self.places.push(place);
        Ok(())
    }
}

/// Reads a text of rules and macros. Names of experiments and activities must be in the registry.
pub fn parse_rules(text: &str, macros: &mut Macros, registry: &Registry) -> Result<Rules> {
    let mut statements = Statements::new(text);
    let mut rules = Rules::default();
    while let Some(tokens) = statements.next_statement(macros)? {
        if define_macro(&tokens, macros)? {
            continue;
        }
        let place = tokens[0].place;
        rules.push(Parser::new(tokens).rule(registry)?, place)?;
    }
    Ok(rules)
}

/// Reads the clauses of a rule alone.
pub fn parse_clauses(text: &str, registry: &Registry) -> Result<Clauses> {
    let mut statements = Statements::new(text);
    let macros = Macros::default();
    let first = statements.next_statement(&macros)?;
    let mut parser = Parser::new(first.unwrap_or_default());
    let clauses = parser.clauses(registry, None)?;
    match statements.next_statement(&macros)? {
        Some(tokens) => fail(
            tokens[0].place,
            "unexpected second line, expected clauses in one line",
        ),
        None => Ok(clauses),
    }
}

/// Defines the macro if the statement is `name = value`.
pub fn define_macro(tokens: &[Token], macros: &mut Macros) -> Result<bool> {
    let [
        Token {
            kind: Kind::Word(name),
            place,
        },
        Token {
            kind: Kind::Symbol('='),
            ..
        },
        value @ ..,
    ] = tokens
    else {
        return Ok(false);
    };
    if !is_name(name) {
        let message = format!(
            "\"{}\" is not a valid name of a macro, expected a letter, then letters, digits and _",
            name.escape_debug()
        );
        return fail(*place, message);
    }
    if value.is_empty() {
        return fail(
            *place,
            format!("macro {name} has no value, expected text, in quotes"),
        );
    }
    let texts = value.iter().map(|token| match &token.kind {
        Kind::Word(text) | Kind::Quoted(text) => text.clone(),
        Kind::Symbol(symbol) => symbol.to_string(),
    });
    macros.define(name, &texts.collect::<Vec<_>>().join(" "));
    Ok(true)
}

fn fail<T>(place: Place, message: impl Into<String>) -> Result<T> {
    let message = message.into();
    Err(ParseError { place, message })
}

/// Reads the words of one statement.
pub struct Parser {
    tokens: Vec<Token>,
    at: usize,
}

impl Parser {
    /// Begins at the first word.
    pub fn new(tokens: Vec<Token>) -> Parser {
        Parser { tokens, at: 0 }
    }

    /// The place of the next word, or of the last one at the end.
    pub fn place(&self) -> Place {
        let token = self.tokens.get(self.at).or(self.tokens.last());
        token.map_or((1, 1), |token| token.place)
    }

    fn peek(&self) -> Option<&Kind> {
        self.tokens.get(self.at).map(|token| &token.kind)
    }

    /// The next word, if it is one without quotes.
    pub fn peek_word(&self) -> Option<&str> {
        match self.peek() {
            Some(Kind::Word(word)) => Some(word),
            _ => None,
        }
    }

    /// Takes a keyword if it comes next.
    pub fn keyword(&mut self, keyword: &str) -> bool {
        let is_next = self.peek_word() == Some(keyword);
        self.at += usize::from(is_next);
        is_next
    }

    fn symbol(&mut self, symbol: char) -> bool {
        let is_next = self.peek() == Some(&Kind::Symbol(symbol));
        self.at += usize::from(is_next);
        is_next
    }

    /// An error at the next word: what was found, and what was `expected`.
    pub fn expected<T>(&self, expected: &str) -> Result<T> {
        let found = match self.peek() {
            Some(kind) => format!("found {kind}"),
            None => "the line ends too early".to_owned(),
        };
        fail(self.place(), format!("{found}, expected {expected}"))
    }

    /// Fails unless all words are read.
    pub fn end(&self) -> Result<()> {
        match self.peek() {
            Some(_) => self.expected("the end of the line"),
            None => Ok(()),
        }
    }

    /// A word, or text in quotes.
    pub fn text(&mut self, expected: &str) -> Result<String> {
        match self.peek().cloned() {
            Some(Kind::Word(text) | Kind::Quoted(text)) => {
                self.at += 1;
                Ok(text)
            }
            _ => self.expected(expected),
        }
    }

    /// A number up to `max`, decimal or with 0x.
    pub fn number(&mut self, max: u64) -> Result<u64> {
        let place = self.place();
        let text = self.text("a number")?;
        number(&text, max).or_else(|message| fail(place, message))
    }

    /// A prefix or an address, without host bits.
    pub fn prefix(&mut self) -> Result<IpNet> {
        let place = self.place();
        let mut text = self.text("an address or a prefix")?;
        // Blanks may stand around the slash.
        if self.peek_word().is_some_and(|word| word.starts_with('/')) {
            text += &self.text("")?;
        }
        if text.ends_with('/') {
            text += &self.text("the length of the prefix")?;
        }
        prefix(&text).or_else(|message| fail(place, message))
    }

    /// An element, or several in braces.
    fn list<T>(&mut self, mut element: impl FnMut(&mut Parser) -> Result<T>) -> Result<Vec<T>> {
        if !self.symbol('{') {
            return Ok(vec![element(self)?]);
        }
        let mut elements = Vec::new();
        loop {
            if self.symbol('}') {
                return match elements.is_empty() {
                    true => fail(
                        self.place(),
                        "the list is empty, expected at least one element",
                    ),
                    false => Ok(elements),
                };
            }
            if self.at == self.tokens.len() {
                return self.expected("\"}\" at the end of the list");
            }
            elements.push(element(self)?);
            self.symbol(',');
        }
    }

    fn test<T>(&mut self, value: impl FnOnce(&mut Parser) -> Result<T>) -> Result<Test<T>> {
        let negated = self.symbol('!');
        let value = value(self)?;
        Ok(Test { negated, value })
    }

    fn addresses(&mut self) -> Result<Test<Addresses>> {
        self.test(|parser| match parser.keyword("any") {
            true => Ok(Addresses::Any),
            false => Ok(Addresses::In(parser.list(Parser::prefix)?)),
        })
    }

    fn ranges(&mut self, max: u32) -> Result<Test<Ranges>> {
        self.test(|parser| parser.list(|parser| parser.range(max, &|_| None)))
    }

    /// `5`, `5-9`, or a name.
    fn range(&mut self, max: u32, named: &dyn Fn(&str) -> Option<u32>) -> Result<(u32, u32)> {
        let place = self.place();
        let text = self.text("a number or a range")?;
        if let Some(number) = named(&text) {
            return Ok((number, number));
        }
        let (first, last) = text.split_once('-').unwrap_or((&text, &text));
        let read = |text| number(text, u64::from(max)).map(|number| number as u32);
        match (read(first), read(last)) {
            (Ok(first), Ok(last)) if first <= last => Ok((first, last)),
            (Ok(_), Ok(_)) => fail(place, format!("the range {text} ends before it begins")),
            (Err(message), _) | (_, Err(message)) => fail(place, message),
        }
    }

    fn protocols(&mut self) -> Result<Test<Ranges>> {
        let named = |text: &str| {
            let known = PROTOCOLS
                .iter()
                .find(|(name, _)| name.eq_ignore_ascii_case(text));
            known.map(|(_, number)| u32::from(*number))
        };
        self.test(|parser| {
            parser.list(|parser| {
                let place = parser.place();
                let range = parser.range(u32::from(u8::MAX), &named);
                let text = &parser.tokens[parser.at.saturating_sub(1)].kind;
                range.or_else(|error| match text {
                    Kind::Word(text) | Kind::Quoted(text)
                        if !text.starts_with(|c: char| c.is_ascii_digit()) =>
                    {
                        let names: Vec<&str> = PROTOCOLS.iter().map(|(name, _)| *name).collect();
                        let hint = match nearest(text, &names) {
                            Some(name) => format!("did you mean {name}?"),
                            None => "expected its number, or for example tcp, udp or ipv6-icmp"
                                .to_owned(),
                        };
                        fail(
                            place,
                            format!(
                                "\"{}\" is not a known protocol, {hint}",
                                text.escape_debug()
                            ),
                        )
                    }
                    _ => Err(error),
                })
            })
        })
    }

    /// `[mask M] [!] [equals] N`
    fn masked(&mut self, read: impl Fn(&mut Parser) -> Result<u32>) -> Result<Test<Masked>> {
        let mask = match self.keyword("mask") {
            true => Some(read(self)?),
            false => None,
        };
        self.test(|parser| {
            parser.keyword("equals");
            let value = read(parser)?;
            Ok(Masked { mask, value })
        })
    }

    /// A number, or letters: `SA`.
    fn tcp_flags(&mut self) -> Result<u32> {
        const LETTERS: &str = "FSRPAUEC";
        let place = self.place();
        let text = self.text("TCP flags")?;
        let bit = |c: char| LETTERS.find(c.to_ascii_uppercase());
        let mut flags = 0;
        for c in text.chars() {
            let Some(bit) = bit(c).filter(|_| !text.starts_with(|c: char| c.is_ascii_digit()))
            else {
                let read = number(&text, 0xff).map(|number| number as u32);
                return read
                    .or_else(|message| fail(place, format!("{message}, or letters of {LETTERS}")));
            };
            flags |= 1 << bit;
        }
        Ok(flags)
    }

    fn names(&mut self, max: u16) -> Result<(Test<Vec<Name>>, Vec<Place>)> {
        let mut places = Vec::new();
        let test = self.test(|parser| {
            parser.list(|parser| {
                let place = parser.place();
                places.push(place);
                let is_number = parser
                    .peek_word()
                    .is_some_and(|word| word.starts_with(|c: char| c.is_ascii_digit()));
                let text = parser.text("a name of the registry, or an id")?;
                match is_number {
                    false => Ok(Name::Name(text)),
                    true => match number(&text, u64::from(max)) {
                        Ok(id) => Ok(Name::Id(id as u16)),
                        Err(message) => fail(place, message),
                    },
                }
            })
        })?;
        Ok((test, places))
    }

    fn comparison(&mut self) -> Result<Comparison> {
        let Some(Kind::Symbol(symbol @ ('<' | '>' | '='))) = self.peek().cloned() else {
            return self.expected("a comparison (<, <=, =, >=, >)");
        };
        self.at += 1;
        let or_equal = self.symbol('=');
        let operator = match (symbol, or_equal) {
            ('<', false) => Operator::Less,
            ('<', true) => Operator::AtMost,
            ('>', false) => Operator::Greater,
            ('>', true) => Operator::AtLeast,
            _ => Operator::Equal,
        };
        let value = self.number(u64::MAX)?;
        Ok(Comparison { operator, value })
    }

    fn days(&mut self) -> Result<u8> {
        if self.peek() == Some(&Kind::Symbol('{')) {
            let days = self.list(Parser::day)?;
            return Ok(days.into_iter().fold(0, |all, days| all | days));
        }
        let mut days = self.day()?;
        while self.symbol(',') {
            days |= self.day()?;
        }
        Ok(days)
    }

    /// A day, a range of days, or a word for several.
    fn day(&mut self) -> Result<u8> {
        const EXPECTED: &str =
            "days (mon, tuesday, mon-fri, weekdays, weekends, all), separated by commas";
        let place = self.place();
        let text = self.text(EXPECTED)?;
        let lower = text.to_ascii_lowercase();
        match lower.as_str() {
            "all" | "any" => return Ok(0x7f),
            "weekday" | "weekdays" => return Ok(0b011_1110),
            "weekend" | "weekends" => return Ok(0b100_0001),
            _ => {}
        }
        let (first, last) = lower.split_once('-').unwrap_or((&lower, &lower));
        let day = |name: &str| {
            const REST: [&str; 7] = ["day", "day", "sday", "nesday", "rsday", "day", "urday"];
            (0..7).find(|&day| {
                let rest = name.strip_prefix(DAYS[day]);
                rest.is_some_and(|rest| rest.is_empty() || rest == REST[day])
            })
        };
        let (Some(first), Some(last)) = (day(first), day(last)) else {
            let message = format!("found \"{}\", expected {EXPECTED}", text.escape_debug());
            return fail(place, message);
        };
        let count = (last + 7 - first) % 7;
        let days = (0..=count).map(|offset| 1 << ((first + offset) % 7));
        Ok(days.fold(0, |all, day| all | day))
    }

    /// `HH:MM[:SS]` into `time`, or `date YYYY[MM[DD[HH[MM[SS]]]]]` into `date`.
    fn moment(
        &mut self,
        keyword: &str,
        place: Place,
        time: &mut Option<u32>,
        date: &mut Option<DateTime>,
    ) -> Result<()> {
        match self.keyword("date") {
            true => {
                let at = self.place();
                let text = self.text("a date, YYYY[MM[DD[HH[MM[SS]]]]]")?;
                let Some(read) = read_date(&text) else {
                    let message = format!(
                        "\"{}\" is not a valid date, expected YYYY[MM[DD[HH[MM[SS]]]]]",
                        text.escape_debug()
                    );
                    return fail(at, message);
                };
                once(date, read, &format!("{keyword} date"), place)
            }
            false => {
                const EXPECTED: &str =
                    "a time of day, HH:MM[:SS], or date YYYY[MM[DD[HH[MM[SS]]]]]";
                let at = self.place();
                let text = self.text(EXPECTED)?;
                let Some(read) = read_time(&text) else {
                    let message = format!("found \"{}\", expected {EXPECTED}", text.escape_debug());
                    return fail(at, message);
                };
                once(time, read, keyword, place)
            }
        }
    }

    /// `src` or `dst`: an address, a port, or both.
    fn end_clause(&mut self, end: &mut End, name: &str, place: Place) -> Result<()> {
        let mut given = End::default();
        if self.peek_word() != Some("port") {
            given.address = Some(self.addresses()?);
        }
        if self.keyword("port") {
            given.port = Some(self.ranges(u32::from(u16::MAX))?);
        }
        // A port without an address is the same with any address, and prints so.
        if given.address.is_none() {
            let (negated, value) = (false, Addresses::Any);
            given.address = Some(Test { negated, value });
        }
        if *end != End::default() {
            return fail(place, twice(name));
        }
        *end = given;
        Ok(())
    }

    /// `accept|discard …`
    pub fn rule(&mut self, registry: &Registry) -> Result<Rule> {
        let accept = match self.peek_word() {
            Some("accept") => true,
            Some("discard") => false,
            _ => return self.expected("accept or discard, or a macro (name = \"value\")"),
        };
        self.at += 1;
        let mut head = Head::default();
        let clauses = self.clauses(registry, Some(&mut head))?;
        Ok(Rule {
            accept,
            tag: head.tag,
            quick: head.quick,
            clauses,
        })
    }

    /// The clauses up to the end of the line; `tag` and `quick` among them go to `head`.
    fn clauses(&mut self, registry: &Registry, mut head: Option<&mut Head>) -> Result<Clauses> {
        let mut clauses = Clauses::default();
        let mut all = None;
        let mut count = 0;
        let (mut experiments, mut activities) = (Vec::new(), Vec::new());
        while self.at < self.tokens.len() {
            let place = self.place();
            let negated = self.symbol('!');
            let keyword = self.peek_word().unwrap_or_default().to_owned();
            if negated && !matches!(keyword.as_str(), "inet" | "inet6") {
                return self.expected("inet or inet6; in other clauses, ! stands before the value");
            }
            if let Some(head) = &mut head {
                match keyword.as_str() {
                    "tag" => {
                        self.at += 1;
                        let tag = self.number(u64::from(u32::MAX))? as u32;
                        once(&mut head.tag, tag, "tag", place)?;
                        continue;
                    }
                    "quick" if head.quick => return fail(place, twice("quick")),
                    "quick" => {
                        self.at += 1;
                        head.quick = true;
                        continue;
                    }
                    _ => {}
                }
            }
            if keyword != "all" && !CLAUSES.contains(&keyword.as_str()) {
                return self.unknown_clause(&keyword, head.is_some());
            }
            self.at += 1;
            count += 1;
            match keyword.as_str() {
                "all" => once(&mut all, place, "all", place)?,
                "agent" => {
                    let test = self.addresses()?;
                    once(&mut clauses.agent, test, "agent", place)?;
                }
                "in_ifndx" => {
                    let test = self.ranges(u32::MAX)?;
                    once(&mut clauses.input, test, "in_ifndx", place)?;
                }
                "out_ifndx" => {
                    let test = self.ranges(u32::MAX)?;
                    once(&mut clauses.output, test, "out_ifndx", place)?;
                }
                "inet" | "inet6" => {
                    let value = match keyword.as_str() {
                        "inet" => Family::Inet,
                        _ => Family::Inet6,
                    };
                    let test = Test { negated, value };
                    if clauses.family.replace(test).is_some() {
                        return fail(
                            place,
                            "inet and inet6 are given together, or twice; expected one of them",
                        );
                    }
                }
                "src" => self.end_clause(&mut clauses.source, "src", place)?,
                "dst" => self.end_clause(&mut clauses.destination, "dst", place)?,
                "proto" => {
                    let test = self.protocols()?;
                    once(&mut clauses.protocol, test, "proto", place)?;
                }
                "tos" => {
                    let test = self.ranges(u32::from(u8::MAX))?;
                    once(&mut clauses.tos, test, "tos", place)?;
                }
                "tcp_flags" => {
                    let test = self.masked(Parser::tcp_flags)?;
                    once(&mut clauses.tcp_flags, test, "tcp_flags", place)?;
                }
                "label" => {
                    let test = self.label()?;
                    once(&mut clauses.label, test, "label", place)?;
                }
                "experiment" => {
                    let (test, places) = self.names(EXPERIMENT_MAX)?;
                    experiments = places;
                    once(&mut clauses.experiment, test, "experiment", place)?;
                }
                "activity" => {
                    let (test, places) = self.names(ACTIVITY_MAX)?;
                    activities = places;
                    once(&mut clauses.activity, test, "activity", place)?;
                }
                "bytes" => clauses.bytes.push(self.comparison()?),
                "packets" => clauses.packets.push(self.comparison()?),
                "days" => {
                    let days = self.days()?;
                    once(&mut clauses.days, days, "days", place)?;
                }
                "after" => {
                    self.moment("after", place, &mut clauses.after, &mut clauses.after_date)?;
                }
                _ => {
                    self.moment(
                        "before",
                        place,
                        &mut clauses.before,
                        &mut clauses.before_date,
                    )?;
                }
            }
        }
        match all {
            Some(place) if count > 1 => {
                return fail(
                    place,
                    "all stands beside other clauses, expected all or clauses",
                );
            }
            None if count == 0 => {
                return self.expected("all, or a clause such as src, dst or proto");
            }
            _ => {}
        }
        super::compile::check_names(&clauses, registry).map_err(|unknown| {
            let places = if unknown.is_experiment {
                &experiments
            } else {
                &activities
            };
            let place = places.get(unknown.index).copied();
            ParseError {
                place: place.unwrap_or_else(|| self.place()),
                message: unknown.message,
            }
        })?;
        Ok(clauses)
    }

    fn label(&mut self) -> Result<Test<Option<Masked>>> {
        let any = |kind: Option<&Token>| {
            kind.is_some_and(|token| token.kind == Kind::Word("any".to_owned()))
        };
        let negated = self.peek() == Some(&Kind::Symbol('!'));
        if any(self.tokens.get(self.at + usize::from(negated))) {
            self.at += 1 + usize::from(negated);
            let value = None;
            return Ok(Test { negated, value });
        }
        let read = |parser: &mut Parser| Ok(parser.number(u64::from(LABEL_MAX))? as u32);
        let Test { negated, value } = self.masked(read)?;
        let value = Some(value);
        Ok(Test { negated, value })
    }

    fn unknown_clause<T>(&self, word: &str, in_rule: bool) -> Result<T> {
        let mut known: Vec<&str> = CLAUSES.into_iter().chain(["all"]).collect();
        if in_rule {
            known.extend(["tag", "quick"]);
        }
        let elsewhere = match word {
            "port" => Some("port belongs behind the address of src or dst: src any port 80"),
            "accept" | "discard" => Some("a rule must begin on a line of its own"),
            _ => None,
        };
        match (elsewhere, nearest(word, &known)) {
            (Some(hint), _) => fail(self.place(), format!("unexpected {word}: {hint}")),
            (None, Some(near)) if !word.is_empty() => fail(
                self.place(),
                format!(
                    "unknown clause \"{}\", did you mean {near}?",
                    word.escape_debug()
                ),
            ),
            _ => self.expected(&format!("one of {}", known.join(", "))),
        }
    }
}

#[derive(Default)]
struct Head {
    tag: Option<u32>,
    quick: bool,
}

fn twice(name: &str) -> String {
    format!("{name} is given twice in one rule, expected once")
}

fn once<T>(slot: &mut Option<T>, value: T, name: &str, place: Place) -> Result<()> {
    match slot.replace(value) {
        Some(_) => fail(place, twice(name)),
        None => Ok(()),
    }
}

/// Decimal digits, or hexadecimal ones after 0x.
pub fn number(text: &str, max: u64) -> std::result::Result<u64, String> {
    let digits = |text: &str| !text.is_empty() && text.chars().all(|c| c.is_ascii_hexdigit());
    let hexadecimal = text.strip_prefix("0x").or_else(|| text.strip_prefix("0X"));
    let read = match hexadecimal {
        Some(rest) if digits(rest) => u64::from_str_radix(rest, 16).ok(),
        Some(_) => None,
        None if text.len() > 1
            && text.starts_with('0')
            && text.chars().all(|c| c.is_ascii_digit()) =>
        {
            return Err(format!(
                "\"{text}\" begins with 0, which some programs read as octal; expected a number without leading zeros, or with 0x"
            ));
        }
        None if digits(text) => text.parse().ok(),
        None => None,
    };
    match read {
        Some(number) if number <= max => Ok(number),
        _ => Err(format!(
            "\"{}\" is not a valid number, expected 0 to {max}",
            text.escape_debug()
        )),
    }
}

/// A prefix, or an address for a prefix of full length. Host bits are an error that says which prefix may be meant.
pub fn prefix(text: &str) -> std::result::Result<IpNet, String> {
    if let Ok(address) = text.parse::<IpAddr>() {
        return Ok(address.into());
    }
    let Ok(network) = text.parse::<IpNet>() else {
        return Err(format!(
            "\"{}\" is not a valid address or prefix, expected for example 192.0.2.0/24 or 2001:db8::/32",
            text.escape_debug()
        ));
    };
    match network == network.trunc() {
        true => Ok(network),
        false => Err(format!(
            "{network} has bits of a host behind its length, expected {} for the network or {} for the host",
            network.trunc(),
            network.addr()
        )),
    }
}

fn read_time(text: &str) -> Option<u32> {
    let mut parts = Vec::new();
    for part in text.split(':') {
        let is_valid = (1..=2).contains(&part.len()) && part.chars().all(|c| c.is_ascii_digit());
        parts.push(part.parse::<u32>().ok().filter(|_| is_valid)?);
    }
    let (hour, minute, second) = match *parts.as_slice() {
        [hour, minute] => (hour, minute, 0),
        [hour, minute, second] => (hour, minute, second),
        _ => return None,
    };
    let seconds = hour * 3600 + minute * 60 + second;
    (minute < 60 && second < 60 && seconds <= 86_400).then_some(seconds)
}

fn read_date(text: &str) -> Option<DateTime> {
    let is_valid =
        matches!(text.len(), 4 | 6 | 8 | 10 | 12 | 14) && text.chars().all(|c| c.is_ascii_digit());
    if !is_valid {
        return None;
    }
    let part = |from: usize, default: i8| match text.get(from..from + 2) {
        Some(digits) => digits.parse().ok(),
        None => Some(default),
    };
    let year = text[..4].parse().ok()?;
    DateTime::new(
        year,
        part(4, 1)?,
        part(6, 1)?,
        part(8, 0)?,
        part(10, 0)?,
        part(12, 0)?,
        0,
    )
    .ok()
}
