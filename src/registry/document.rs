//! The registry as it is published: JSON, read strictly enough that what comes out can be used.

use std::collections::HashSet;

use serde::Deserialize;

use super::{Activity, Experiment, Registry, same_name};

/// The largest document, in bytes; the published one has 14 KB.
pub const SIZE_MAX: usize = 1 << 20;
/// The longest name, in bytes.
const NAME_MAX: usize = 256;

#[derive(Deserialize)]
struct Document {
    experiments: Vec<DocumentExperiment>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct DocumentExperiment {
    exp_name: String,
    exp_id: u16,
    activities: Vec<DocumentActivity>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct DocumentActivity {
    activity_name: String,
    activity_id: u16,
}

impl Registry {
    /// Reads a published registry: experiments with ids of 1 to 511, activities with ids of 1 to 63, no id
    /// and no name twice. What else stands in it is ignored.
    pub fn from_json(document: &[u8]) -> Result<Registry, String> {
        if document.len() > SIZE_MAX {
            return Err(format!("over {SIZE_MAX} bytes"));
        }
        let document: Document =
            serde_json::from_slice(document).map_err(|e| format!("no registry: {e}"))?;
        if document.experiments.is_empty() {
            return Err("a registry without experiments".to_owned());
        }
        let mut experiments = Vec::with_capacity(document.experiments.len());
        for found in document.experiments {
            let name = found.exp_name;
            check_entry("experiment", &name, found.exp_id, 511)?;
            let mut activities = Vec::with_capacity(found.activities.len());
            for found in found.activities {
                let (id, name) = (found.activity_id, found.activity_name);
                check_entry("activity", &name, id, 63)?;
                activities.push(Activity { id, name });
            }
            activities.sort_by_key(|activity| activity.id);
            let of = format!("experiment \"{}\": activity", name.escape_debug());
            check_distinct(&of, activities.iter().map(|a| (a.id, a.name.as_str())))?;
            let id = found.exp_id;
            experiments.push(Experiment {
                id,
                name,
                activities,
            });
        }
        experiments.sort_by_key(|experiment| experiment.id);
        check_distinct(
            "experiment",
            experiments.iter().map(|e| (e.id, e.name.as_str())),
        )?;
        Ok(Registry { experiments })
    }
}

fn check_entry(what: &str, name: &str, id: u16, most: u16) -> Result<(), String> {
    let shown = name.escape_debug();
    if name.trim().is_empty() || name.len() > NAME_MAX || name.contains(char::is_control) {
        return Err(format!(
            "{what} {id}: \"{shown}\" is no name, expected 1 to {NAME_MAX} bytes without control characters"
        ));
    }
    match (1..=most).contains(&id) {
        true => Ok(()),
        false => Err(format!(
            "{what} \"{shown}\": id {id} is out of range, expected 1 to {most}"
        )),
    }
}

/// Entries come in the order of their ids.
fn check_distinct<'a>(
    what: &str,
    entries: impl Iterator<Item = (u16, &'a str)>,
) -> Result<(), String> {
    let (mut last, mut names) = (0, HashSet::new());
    for (id, name) in entries {
        if id == std::mem::replace(&mut last, id) {
            return Err(format!("{what} id {id} is there twice"));
        }
        let folded: String = name.chars().map(super::fold).collect();
        debug_assert!(same_name(name, &folded));
        if !names.insert(folded) {
            return Err(format!("{what} \"{}\" is there twice", name.escape_debug()));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn read(text: &str) -> Result<Registry, String> {
        Registry::from_json(text.as_bytes())
    }

    #[test]
    fn what_is_written_comes_back() {
        let builtin = Registry::builtin();
        let read = read(&builtin.to_json().to_string()).unwrap();
        assert_eq!(read, builtin);
    }

    #[test]
    fn order_and_further_keys_do_not_matter() {
        let registry = read(
            r#"{"version": 2, "modified": null, "experiments": [
                {"expName": "b", "expId": 2, "activities": []},
                {"expName": "a", "expId": 1, "more": 1, "activities": [
                    {"activityName": "z", "activityId": 9}, {"activityName": "y \"\\", "activityId": 3}]}]}"#,
        );
        let registry = registry.unwrap();
        let ids: Vec<u16> = registry.experiments().iter().map(|e| e.id).collect();
        assert_eq!(ids, [1, 2]);
        assert_eq!(registry.activity_id(1, "Y_\"\\"), Some(3));
    }

    #[test]
    fn what_is_no_registry_says_why() {
        let experiment = |inner: &str| format!("{{\"experiments\": [{inner}]}}");
        for (text, why) in [
            ("", "no registry: EOF"),
            ("<html>", "no registry: expected value"),
            ("{}", "missing field `experiments`"),
            (&experiment(""), "without experiments"),
            (
                &experiment(r#"{"expName": "a", "expId": 0, "activities": []}"#),
                "id 0 is out of range, expected 1 to 511",
            ),
            (
                &experiment(r#"{"expName": "a", "expId": 512, "activities": []}"#),
                "id 512",
            ),
            (
                &experiment(r#"{"expName": "a", "expId": -1, "activities": []}"#),
                "invalid value",
            ),
            (
                &experiment(r#"{"expName": " ", "expId": 1, "activities": []}"#),
                "is no name",
            ),
            (
                &experiment(r#"{"expName": "a\nb", "expId": 1, "activities": []}"#),
                "\"a\\nb\" is no name",
            ),
            (
                &experiment(
                    r#"{"expName": "a", "expId": 1, "activities": [{"activityName": "x", "activityId": 64}]}"#,
                ),
                "id 64",
            ),
            (
                &experiment(
                    r#"{"expName": "a", "expId": 1, "activities": []}, {"expName": "b", "expId": 1, "activities": []}"#,
                ),
                "id 1 is there twice",
            ),
            (
                &experiment(
                    r#"{"expName": "a b", "expId": 1, "activities": []}, {"expName": "A_B", "expId": 2, "activities": []}"#,
                ),
                "\"A_B\" is there twice",
            ),
        ] {
            let said = read(text).unwrap_err();
            assert!(said.contains(why), "{text}: {said}");
        }
        assert!(
            read(&" ".repeat(SIZE_MAX + 1))
                .unwrap_err()
                .contains("over 1048576 bytes")
        );
    }

    proptest! {
        #[test]
        fn any_bytes_make_no_panic(bytes in proptest::collection::vec(any::<u8>(), 0..300)) {
            let _ = Registry::from_json(&bytes);
        }
    }
}
