//! What somebody may have meant who wrote a word that is not known.

/// The known word that is the closest, if one is close: a letter or two changed, left out or swapped.
pub fn nearest<'a>(unknown: &str, known: &[&'a str]) -> Option<&'a str> {
    let distance =
        |word: &&&str| strsim::damerau_levenshtein(&word.to_lowercase(), &unknown.to_lowercase());
    let nearest = known.iter().min_by_key(distance);
    let close = nearest.filter(|word| distance(word) <= 1 + unknown.len() / 3);
    close.copied()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_slip_is_seen_through_and_another_word_is_not() {
        let known = ["src-ip", "src-port", "protocol"];
        assert_eq!(nearest("protcol", &known), Some("protocol"));
        assert_eq!(nearest("Src-Ip", &known), Some("src-ip"));
        assert_eq!(nearest("colour", &known), None);
        assert_eq!(nearest("x", &[]), None);
    }
}
