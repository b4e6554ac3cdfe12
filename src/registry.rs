//! The SciTags registry: maps names of experiments and activities to ids and back.
//!
//! Names are compared without case, and `_` is equal to a space, so that a name can be used where white space
//! separates fields. The same activity name has different ids in different experiments.

mod builtin;
mod document;
mod update;

pub use update::{Settings, SharedRegistry, Update, fetch, keep_updated, load_cached_or_builtin};

use serde_json::json;

use crate::flow::Tag;

/// An experiment and its activities.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Experiment {
    /// Id, 1 to 511.
    pub id: u16,
    /// Name as published.
    pub name: String,
    /// Activities, ordered by id.
    pub activities: Vec<Activity>,
}

/// An activity of an experiment.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Activity {
    /// Id within the experiment, 1 to 63.
    pub id: u16,
    /// Name as published.
    pub name: String,
}

/// All experiments and activities.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Registry {
    experiments: Vec<Experiment>,
}

impl Registry {
    /// The registry that is built into the program.
    pub fn builtin() -> Registry {
        let activity = |&(id, name): &(u16, &str)| Activity {
            id,
            name: name.to_owned(),
        };
        let experiments = builtin::EXPERIMENTS
            .iter()
            .map(|&(id, name, activities)| Experiment {
                id,
                name: name.to_owned(),
                activities: activities.iter().map(activity).collect(),
            })
            .collect();
        Registry { experiments }
    }

    /// All experiments, ordered by id.
    pub fn experiments(&self) -> &[Experiment] {
        &self.experiments
    }

    /// JSON in the format in which the registry is published.
    pub fn to_json(&self) -> serde_json::Value {
        let activity = |a: &Activity| json!({"activityName": a.name, "activityId": a.id});
        let experiment = |e: &Experiment| {
            let activities: Vec<_> = e.activities.iter().map(activity).collect();
            json!({"expName": e.name, "expId": e.id, "activities": activities})
        };
        let experiments: Vec<_> = self.experiments.iter().map(experiment).collect();
        json!({"version": 1, "experiments": experiments})
    }

    /// The experiment with this id.
    pub fn experiment(&self, id: u16) -> Option<&Experiment> {
        self.experiments.iter().find(|e| e.id == id)
    }

    /// The id of the experiment with this name.
    pub fn experiment_id(&self, name: &str) -> Option<u16> {
        self.experiments
            .iter()
            .find(|e| same_name(&e.name, name))
            .map(|e| e.id)
    }

    /// The id of the activity with this name in the experiment with this id.
    pub fn activity_id(&self, experiment: u16, name: &str) -> Option<u16> {
        self.experiment(experiment)?
            .activities
            .iter()
            .find(|a| same_name(&a.name, name))
            .map(|a| a.id)
    }

    /// The names of a tag's experiment and activity; an id that is not registered is shown as a number.
    pub fn names(&self, tag: Tag) -> (String, String) {
        let experiment = self.experiment(tag.experiment);
        let activity = experiment.and_then(|e| e.activities.iter().find(|a| a.id == tag.activity));
        (
            experiment.map_or_else(|| tag.experiment.to_string(), |e| e.name.clone()),
            activity.map_or_else(|| tag.activity.to_string(), |a| a.name.clone()),
        )
    }
}

/// Characters with the same result are equal in names.
fn fold(c: char) -> char {
    if c == '_' {
        ' '
    } else {
        c.to_ascii_lowercase()
    }
}

/// Whether two names are equal: without case, `_` is equal to a space.
pub fn same_name(registered: &str, given: &str) -> bool {
    registered.chars().map(fold).eq(given.chars().map(fold))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_builtin_registry_is_complete_and_every_id_fits_a_label() {
        let registry = Registry::builtin();
        assert_eq!(registry.experiments().len(), 14);
        for (index, experiment) in registry.experiments().iter().enumerate() {
            assert_eq!(usize::from(experiment.id), index + 1);
            assert!(!experiment.activities.is_empty());
            assert!(
                experiment
                    .activities
                    .iter()
                    .all(|a| (1..=63).contains(&a.id))
            );
            for activity in &experiment.activities {
                let tag = Tag {
                    experiment: experiment.id,
                    activity: activity.id,
                };
                let (e, a) = registry.names(tag);
                assert_eq!(registry.experiment_id(&e), Some(tag.experiment));
                assert_eq!(registry.activity_id(tag.experiment, &a), Some(tag.activity));
            }
        }
    }

    #[test]
    fn names_are_compared_without_case_and_activities_per_experiment() {
        let registry = Registry::builtin();
        assert_eq!(registry.experiment_id("CMS"), Some(3));
        assert_eq!(registry.experiment_id("cm"), None);
        assert_eq!(registry.activity_id(2, "data_challenge"), Some(26));
        assert_eq!(registry.activity_id(3, "Data Challenge"), Some(4));
        assert_eq!(registry.activity_id(2, "upload/download_(job)"), Some(22));
        assert_eq!(registry.activity_id(4, "Staging"), None);
    }

    #[test]
    fn an_unregistered_id_is_shown_as_a_number() {
        let names = Registry::builtin().names(Tag {
            experiment: 3333,
            activity: 7,
        });
        assert_eq!(names, ("3333".to_owned(), "7".to_owned()));
    }
}
