//! Suggests a known word for an unknown one.

/// The most similar known word, if one differs by only a few letters: changed, left out or swapped. Case is ignored.
pub fn nearest<'a>(unknown: &str, known: &[&'a str]) -> Option<&'a str> {
    let distance =
        |word: &&&str| strsim::damerau_levenshtein(&word.to_lowercase(), &unknown.to_lowercase());
    let nearest = known.iter().min_by_key(distance);
    let similar = nearest.filter(|word| distance(word) <= 1 + unknown.len() / 3);
    similar.copied()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_typo_has_a_suggestion_and_a_different_word_has_none() {
        let known = ["src-ip", "src-port", "protocol"];
        assert_eq!(nearest("protcol", &known), Some("protocol"));
        assert_eq!(nearest("Src-Ip", &known), Some("src-ip"));
        assert_eq!(nearest("colour", &known), None);
        assert_eq!(nearest("x", &[]), None);
    }
}
