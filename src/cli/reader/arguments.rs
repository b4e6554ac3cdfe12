//! Words of the command line as getopt reads them: djm's flowd-reader takes `-vU`, `-H5` and `-`, which argh does not.

/// The path argument that means standard input.
pub const STDIN: &str = "/dev/stdin";

const SWITCHES: [(char, &str); 6] = [
    ('c', "-c"),
    ('d', "-d"),
    ('L', "-L"),
    ('q', "-q"),
    ('U', "-U"),
    ('v', "-v"),
];
const VALUES: [(char, &str); 3] = [('f', "-f"), ('H', "-H"), ('o', "-o")];
const LONG_VALUES: [&str; 8] = [
    "--filter", "--from", "--head", "--output", "--sum-by", "--to", "--top", "--where",
];

/// Splits the words that follow `reader`; those of another command are left as they are.
pub fn split<'a>(words: &[&'a str]) -> Vec<&'a str> {
    let mut out = Vec::with_capacity(words.len());
    let mut words = words.iter().copied();
    let mut is_value = false;
    for word in words.by_ref() {
        out.push(word);
        if std::mem::replace(&mut is_value, word == "--log-level") || word.starts_with('-') {
            continue;
        }
        if word == "reader" {
            break;
        }
        out.extend(words);
        return out;
    }
    let mut is_value = false;
    for word in words {
        if std::mem::take(&mut is_value) {
            out.push(word);
        } else if word == "-" {
            out.push(STDIN);
        } else {
            match cluster(word) {
                Some(parts) => out.extend(parts),
                None => out.push(word),
            }
            let last = out.last().copied().unwrap_or_default();
            is_value = LONG_VALUES.contains(&last) || VALUES.iter().any(|(_, name)| *name == last);
        }
    }
    out
}

/// The options in one word, if it is nothing else.
fn cluster(word: &str) -> Option<Vec<&str>> {
    let letters = word.strip_prefix('-')?;
    let mut parts = Vec::new();
    for (place, letter) in letters.char_indices() {
        let is_letter = |(known, _): &&(char, &str)| *known == letter;
        if let Some((_, name)) = SWITCHES.iter().find(is_letter) {
            parts.push(*name);
            continue;
        }
        let (_, name) = VALUES.iter().find(is_letter)?;
        parts.push(*name);
        let value = &letters[place + letter.len_utf8()..];
        parts.extend((!value.is_empty()).then_some(value));
        // What looks like an option would be taken for one, were it not the value of one.
        return Some(parts);
    }
    (!parts.is_empty()).then_some(parts)
}

#[cfg(test)]
mod tests {
    #[test]
    fn words_are_split_as_by_getopt() {
        let split = |line: &str| {
            let words: Vec<&str> = line.split(' ').collect();
            super::split(&words).join(" ")
        };
        for (line, expected) in [
            ("reader -vU a", "reader -v -U a"),
            ("reader -qH5 -", "reader -q -H 5 /dev/stdin"),
            ("reader -o - -vo- b", "reader -o - -v -o - b"),
            ("reader --from -1d -c", "reader --from -1d -c"),
            ("reader --where -vU", "reader --where -vU"),
            ("reader -vx --json", "reader -vx --json"),
            (
                "--log-level reader reader -vq",
                "--log-level reader reader -v -q",
            ),
            (
                "--log-time send reader -vU -",
                "--log-time send reader -vU -",
            ),
            ("run -dc x", "run -dc x"),
            ("--version", "--version"),
        ] {
            assert_eq!(split(line), expected, "{line}");
        }
    }
}
