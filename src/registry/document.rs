//! Reads and checks the published registry, a JSON document.

use std::collections::HashSet;

use serde::Deserialize;

use super::{Activity, Experiment, Registry, same_name};

/// The maximum size of the document, in bytes; the published one has 14 KB.
pub const MAX_DOCUMENT_SIZE: usize = 1 << 20;
/// The maximum length of a name, in bytes.
const MAX_NAME_LENGTH: usize = 256;

/// The error for a document larger than [`MAX_DOCUMENT_SIZE`].
pub const TOO_LARGE: &str = "the registry is larger than 1 MiB";

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
    /// Reads a published registry: experiments with ids from 1 to 511, activities with ids from 1 to 63, no id or
    /// name twice. Other keys are ignored.
    pub fn from_json(document: &[u8]) -> Result<Registry, String> {
        if document.len() > MAX_DOCUMENT_SIZE {
            return Err(TOO_LARGE.to_owned());
        }
        let document: Document =
            serde_json::from_slice(document).map_err(|e| format!("not a valid registry: {e}"))?;
        if document.experiments.is_empty() {
            return Err("the registry has no experiments".to_owned());
        }
        let mut experiments = Vec::with_capacity(document.experiments.len());
        for experiment in document.experiments {
            let (id, name) = (experiment.exp_id, experiment.exp_name);
            check_entry("experiment", &name, id, 511)?;
            let mut activities = Vec::with_capacity(experiment.activities.len());
            for activity in experiment.activities {
                let (id, name) = (activity.activity_id, activity.activity_name);
                check_entry("activity", &name, id, 63)?;
                activities.push(Activity { id, name });
            }
            activities.sort_by_key(|activity| activity.id);
            let kind = format!("experiment \"{}\": activity", name.escape_debug());
            check_distinct(&kind, activities.iter().map(|a| (a.id, a.name.as_str())))?;
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

/// `kind` is experiment or activity, for the error.
fn check_entry(kind: &str, name: &str, id: u16, max_id: u16) -> Result<(), String> {
    let shown = name.escape_debug();
    if name.trim().is_empty() || name.len() > MAX_NAME_LENGTH || name.contains(char::is_control) {
        return Err(format!(
            "{kind} {id}: \"{shown}\" is not a valid name, expected 1 to {MAX_NAME_LENGTH} bytes without control characters"
        ));
    }
    match (1..=max_id).contains(&id) {
        true => Ok(()),
        false => Err(format!(
            "{kind} \"{shown}\": id {id} is out of range, expected 1 to {max_id}"
        )),
    }
}

/// Entries must be ordered by id.
fn check_distinct<'a>(
    kind: &str,
    entries: impl Iterator<Item = (u16, &'a str)>,
) -> Result<(), String> {
    let (mut last, mut names) = (0, HashSet::new());
    for (id, name) in entries {
        if id == std::mem::replace(&mut last, id) {
            return Err(format!("{kind} id {id} occurs twice"));
        }
        let folded: String = name.chars().map(super::fold).collect();
        debug_assert!(same_name(name, &folded));
        if !names.insert(folded) {
            return Err(format!("{kind} \"{}\" occurs twice", name.escape_debug()));
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
    fn a_written_registry_is_read_back() {
        let builtin = Registry::builtin();
        let read = read(&builtin.to_json().to_string()).unwrap();
        assert_eq!(read, builtin);
    }

    #[test]
    fn order_and_unknown_keys_do_not_matter() {
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
    fn each_error_says_what_is_wrong() {
        let experiment = |inner: &str| format!("{{\"experiments\": [{inner}]}}");
        for (text, why) in [
            ("", "not a valid registry: EOF"),
            ("<html>", "not a valid registry: expected value"),
            ("{}", "missing field `experiments`"),
            (&experiment(""), "has no experiments"),
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
                "is not a valid name",
            ),
            (
                &experiment(r#"{"expName": "a\nb", "expId": 1, "activities": []}"#),
                "\"a\\nb\" is not a valid name",
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
                "id 1 occurs twice",
            ),
            (
                &experiment(
                    r#"{"expName": "a b", "expId": 1, "activities": []}, {"expName": "A_B", "expId": 2, "activities": []}"#,
                ),
                "\"A_B\" occurs twice",
            ),
        ] {
            let error = read(text).unwrap_err();
            assert!(error.contains(why), "{text}: {error}");
        }
        let error = read(&" ".repeat(MAX_DOCUMENT_SIZE + 1)).unwrap_err();
        assert_eq!(error, "the registry is larger than 1 MiB");
    }

    proptest! {
        #[test]
        fn no_bytes_cause_a_panic(bytes in proptest::collection::vec(any::<u8>(), 0..300)) {
            let _ = Registry::from_json(&bytes);
        }
    }
}
