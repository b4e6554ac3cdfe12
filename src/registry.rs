//! The SciTags registry: names of experiments and activities to ids and back.
//!
//! Names compare without regard to case, and `_` stands for a space, so that a name fits where white
//! space separates fields. The same activity name has different ids in different experiments.

mod builtin;
mod document;
mod update;

pub use update::{Handle, Update, fetch, keep, known};

use serde_json::json;

use crate::flow::Tag;

/// An experiment and its activities.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Experiment {
    /// Id, 1 to 511.
    pub id: u16,
    /// Name as published.
    pub name: String,
    /// Activities in the order of their ids.
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
    /// The registry that is part of the program.
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

    /// All experiments in the order of their ids.
    pub fn experiments(&self) -> &[Experiment] {
        &self.experiments
    }

    /// As the registry is published.
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

    /// The names of experiment and activity of a tag; an id that is not registered is its number.
    pub fn names(&self, tag: Tag) -> (String, String) {
        let experiment = self.experiment(tag.experiment);
        let activity = experiment.and_then(|e| e.activities.iter().find(|a| a.id == tag.activity));
        (
            experiment.map_or_else(|| tag.experiment.to_string(), |e| e.name.clone()),
            activity.map_or_else(|| tag.activity.to_string(), |a| a.name.clone()),
        )
    }
}

fn fold(c: char) -> char {
    if c == '_' {
        ' '
    } else {
        c.to_ascii_lowercase()
    }
}

/// Whether a name is meant: without regard to case, `_` for a space.
pub fn same_name(registered: &str, given: &str) -> bool {
    registered.chars().map(fold).eq(given.chars().map(fold))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_builtin_registry_is_whole_and_every_id_fits_a_label() {
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
    fn names_are_told_apart_by_experiment_and_compare_without_case() {
        let registry = Registry::builtin();
        assert_eq!(registry.experiment_id("CMS"), Some(3));
        assert_eq!(registry.experiment_id("cm"), None);
        assert_eq!(registry.activity_id(2, "data_challenge"), Some(26));
        assert_eq!(registry.activity_id(3, "Data Challenge"), Some(4));
        assert_eq!(registry.activity_id(2, "upload/download_(job)"), Some(22));
        assert_eq!(registry.activity_id(4, "Staging"), None);
    }

    #[test]
    fn an_unregistered_id_is_its_number() {
        let names = Registry::builtin().names(Tag {
            experiment: 3333,
            activity: 7,
        });
        assert_eq!(names, ("3333".to_owned(), "7".to_owned()));
    }
}
