//! serde's errors of types and keys in the words of the manual page. No I/O.

use super::YamlError;
use crate::config::nearest::nearest;

/// The message in place of serde's; `None` for an error that is not serde's. `keys` lists those of the configuration.
pub fn explain(error: &YamlError, keys: fn() -> Vec<String>) -> Option<String> {
    type_error(&error.message).or_else(|| unknown_key(error, keys))
}

/// The name in serde's "duplicate field `name`".
pub fn duplicate_key(message: &str) -> Option<&str> {
    message.strip_prefix("duplicate field `")?.strip_suffix('`')
}

/// serde's "invalid type: string \"x\", expected i64".
fn type_error(message: &str) -> Option<String> {
    let rest = message.strip_prefix("invalid type: ");
    let rest = rest.or_else(|| message.strip_prefix("invalid value: "))?;
    // The value may contain the separator, the expectation does not.
    let (found, expected) = rest.rsplit_once(", expected ")?;
    let text = found.strip_prefix("string ");
    let in_backticks = |kind: &str| {
        found
            .strip_prefix(kind)?
            .strip_prefix(" `")?
            .split('`')
            .next()
    };
    let integer = in_backticks("integer");
    if let (Some(number), "i64") = (integer, expected) {
        return Some(format!(
            "{number} is out of range, expected a number of 64 bits"
        ));
    }
    let number = integer.or_else(|| in_backticks("floating point"));
    let boolean = in_backticks("boolean");
    let expected = expectation(expected, text, number.or(boolean));
    let found = match (text, number, boolean, found) {
        (Some(text), ..) => format!("the text {text}"),
        (_, Some(number), ..) => format!("the number {number}"),
        (_, _, Some(boolean), _) => boolean.to_owned(),
        (.., "sequence") => "a list".to_owned(),
        (.., "map") => "a mapping".to_owned(),
        (.., "unit value") => "no value".to_owned(),
        (.., other) => other.to_owned(),
    };
    Some(format!("found {found}, expected {expected}"))
}

/// What serde `expected`, with a hint if the text in quotes or the other scalar shows what is amiss.
fn expectation(expected: &str, text: Option<&str>, scalar: Option<&str>) -> String {
    let unquoted = text.unwrap_or_default().trim_matches('"');
    match expected {
        "i64" | "an integer" => whole_number(unquoted).to_owned(),
        "a boolean" if matches!(unquoted, "true" | "false") => {
            "true or false without quotes".to_owned()
        }
        "a boolean" => "true or false".to_owned(),
        "a string" => "text, in quotes if it begins with [ or {".to_owned(),
        "a sequence" => match text.or(scalar) {
            Some(element) => format!("a list, for example [{element}]"),
            None => "a list; each element begins with \"- \"".to_owned(),
        },
        "a map" => "a mapping (key: value)".to_owned(),
        mapping if unquoted.contains(':') && !unquoted.contains(": ") => {
            format!("{mapping}; a colon must be followed by a space")
        }
        other => other.to_owned(),
    }
}

fn whole_number(found: &str) -> &'static str {
    let digits: String = found.chars().filter(|c| !"_,.' ".contains(*c)).collect();
    let is_number = !digits.is_empty() && digits.chars().all(|c| c.is_ascii_digit());
    match is_number {
        true if digits != found => "a whole number, digits only",
        true if digits.len() > 1 && digits.starts_with('0') => {
            "a whole number without leading zeros"
        }
        true => "a whole number without quotes",
        false => "a whole number",
    }
}

/// serde's "unknown field `x`, expected one of `y`, `z`", with the key that may have been meant.
fn unknown_key(error: &YamlError, keys: fn() -> Vec<String>) -> Option<String> {
    let mut names = error.message.strip_prefix("unknown field ")?.split('`');
    names.next();
    let mut names = names.step_by(2);
    let unknown = names.next()?;
    let siblings: Vec<&str> = names.collect();
    // A no-break space looks like indentation, but is part of the key.
    if let Some(space) = unknown.chars().next().filter(|c| c.is_whitespace()) {
        let code = u32::from(space);
        return Some(format!(
            "the line is indented by the character U+{code:04X}; YAML allows only spaces"
        ));
    }
    if let Some(nearest) = nearest(unknown, &siblings) {
        return Some(format!("unknown key, did you mean `{nearest}`?"));
    }
    // A section below the wrong parent, or indented by mistake.
    let known = match error.key.matches('.').count() {
        0 | 1 => keys(),
        _ => Vec::new(),
    };
    let elsewhere = known.iter().filter(|key| {
        let (parent, name) = key.rsplit_once('.').unwrap_or(("", key));
        name == unknown && !parent.contains('.')
    });
    let elsewhere: Vec<&str> = elsewhere.map(String::as_str).collect();
    Some(match elsewhere.as_slice() {
        [] => format!("unknown key, expected one of {}", siblings.join(", ")),
        [top] if *top == unknown => {
            format!("unknown key, did you mean `{top}` without indentation?")
        }
        keys => format!("unknown key, did you mean `{}`?", keys.join("` or `")),
    })
}

#[cfg(test)]
mod tests {
    use crate::config::raw::Raw;
    use crate::config::yaml::{YamlError, read as read_document};

    fn read(text: &str) -> Result<Raw, YamlError> {
        read_document(text)
    }

    /// The error of a text: line and column, and key and message.
    fn error(text: &str) -> (Option<(usize, usize)>, String) {
        let error = read(text).unwrap_err();
        (error.place, format!("{}: {}", error.key, error.message))
    }

    #[test]
    fn a_wrong_type_says_what_was_found_and_what_is_expected() {
        for (value, expected) in [
            (
                "plugins: {firefly: {bindPort: many}}",
                "plugins.firefly.bindPort: found the text \"many\", expected a whole number",
            ),
            (
                "plugins: {api: {bindPort: '7777'}}",
                "plugins.api.bindPort: found the text \"7777\", expected a whole number without quotes",
            ),
            (
                "plugins: {api: {bindPort: 07777}}",
                "plugins.api.bindPort: found the text \"07777\", expected a whole number without leading zeros",
            ),
            (
                "plugins: {api: {bindPort: ''}}",
                "plugins.api.bindPort: found the text \"\", expected a whole number",
            ),
            (
                "plugins: {api: {bindPort: 1.5}}",
                "plugins.api.bindPort: found the number 1.5, expected a whole number",
            ),
            (
                "plugins: {api: {bindPort: true}}",
                "plugins.api.bindPort: found true, expected a whole number",
            ),
            (
                "plugins: {api: {bindPort: [1]}}",
                "plugins.api.bindPort: found a list, expected a whole number",
            ),
            (
                "plugins: {api: {bindPort: !!int x}}",
                "plugins.api.bindPort: found the text \"x\", expected a whole number",
            ),
            (
                "flows: {maxFlows: 1_000_000}",
                "flows.maxFlows: found the text \"1_000_000\", expected a whole number, digits only",
            ),
            (
                "flows: {maxFlows: 9999999999999999999}",
                "flows.maxFlows: 9999999999999999999 is out of range, expected a number of 64 bits",
            ),
            (
                "flows: {maxFlows: 99999999999999999999999}",
                "flows.maxFlows: 99999999999999999999999 is out of range, expected a number of 64 bits",
            ),
            (
                "backends: {firefly: {enrich: yes}}",
                "backends.firefly.enrich: found the text \"yes\", expected true or false",
            ),
            (
                "backends: {firefly: {enrich: 'true'}}",
                "backends.firefly.enrich: found the text \"true\", expected true or false without quotes",
            ),
            (
                "backends: {firefly: {enrich: 1}}",
                "backends.firefly.enrich: found the number 1, expected true or false",
            ),
            (
                "plugins: {firefly: {bindAddress: [::]}}",
                "plugins.firefly.bindAddress: found a list, expected text, in quotes if it begins with [ or {",
            ),
            (
                "plugins: {namedPipe: {pipePath: {a: b}}}",
                "plugins.namedPipe.pipePath: found a mapping, expected text, in quotes if it begins with [ or {",
            ),
            (
                "backends: {marker: {targetInterfaces: eth0}}",
                "backends.marker.targetInterfaces: found the text \"eth0\", expected a list, for example [\"eth0\"]",
            ),
            (
                "plugins: {netlink: {rules: [{localPorts: 1094}]}}",
                "plugins.netlink.rules[0].localPorts: found the number 1094, expected a list, for example [1094]",
            ),
            (
                "plugins: {netlink: {rules: {experiment: 2}}}",
                "plugins.netlink.rules: found a mapping, expected a list; each element begins with \"- \"",
            ),
            (
                "plugins: {netlink: {rules: [5]}}",
                "plugins.netlink.rules[0]: found the number 5, expected a mapping (key: value)",
            ),
            (
                "plugins: {iperf3: {experimentIDs: [1, x]}}",
                "plugins.iperf3.experimentIDs[1]: found the text \"x\", expected a whole number",
            ),
            (
                "backends: {firefly: {stun: {manualMapping: [a]}}}",
                "backends.firefly.stun.manualMapping: found a list, expected a mapping (key: value)",
            ),
            (
                "plugins: {namedPipe: true}",
                "plugins.namedPipe: found true, expected a mapping (key: value) or nothing",
            ),
            (
                "plugins: {namedPipe: 'pipePath:/x'}",
                "plugins.namedPipe: found the text \"pipePath:/x\", expected a mapping (key: value) or nothing; a colon must be followed by a space",
            ),
            (
                "backends: {dummy: 5}",
                "backends.dummy: found the number 5, expected nothing",
            ),
            (
                "plugins: [namedPipe]",
                "plugins: found a list, expected a mapping of plugins (namedPipe: …)",
            ),
            (
                "plugins: namedPipe",
                "plugins: found the text \"namedPipe\", expected a mapping of plugins (namedPipe: …)",
            ),
            (
                "- plugins",
                ": found a list, expected a mapping of settings (plugins: …, backends: …)",
            ),
        ] {
            assert_eq!(error(value).1, expected, "{value}");
        }
        let text = "backends:\n  firefly:\n    destinationPort: high\n";
        assert_eq!(error(text).0, Some((3, 22)));
    }

    #[test]
    fn an_unknown_key_names_the_one_that_may_have_been_meant() {
        for (text, place, expected) in [
            (
                "plugins:\n  namedPipe:\n    pipPath: /x\n",
                (3, 5),
                "plugins.namedPipe.pipPath: unknown key, did you mean `pipePath`?",
            ),
            (
                "plugins: {api: }\nzzz: 1\n",
                (2, 1),
                "zzz: unknown key, expected one of pidPath, workDir, stateDir, controlSocket, logLevel, registry, flows, plugins, backends, enrichers",
            ),
            (
                "plugins:\n  marker: {}\n",
                (2, 3),
                "plugins.marker: unknown key, did you mean `backends.marker`?",
            ),
            (
                "plugins:\n  api:\n  backends:\n",
                (3, 3),
                "plugins.backends: unknown key, did you mean `backends` without indentation?",
            ),
            (
                "firefly: {}\n",
                (1, 1),
                "firefly: unknown key, did you mean `backends.firefly` or `plugins.firefly`?",
            ),
            (
                "plugins:\n\u{a0} api:\n",
                (2, 1),
                "api: the line is indented by the character U+00A0; YAML allows only spaces",
            ),
        ] {
            assert_eq!(error(text), (Some(place), expected.to_owned()), "{text}");
        }
    }

    #[test]
    fn a_key_given_twice_is_found_where_it_is_given_again() {
        for (text, place, expected) in [
            (
                "plugins:\n  api:\nplugins:\n  firefly:\n",
                (3, 1),
                "plugins: this key is given twice, first in line 1",
            ),
            (
                "plugins:\n  namedPipe:\n    mode: 0\n    mode: 1\n",
                (4, 5),
                "plugins.namedPipe.mode: this key is given twice, first in line 3",
            ),
            (
                "plugins: {netlink: {rules: [{uid: 0, uid: 0}]}}\n",
                (1, 29),
                "plugins.netlink.rules[0].uid: this key is given twice",
            ),
        ] {
            assert_eq!(error(text), (Some(place), expected.to_owned()), "{text}");
        }
    }
}
