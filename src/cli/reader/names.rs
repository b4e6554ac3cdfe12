//! Which science a flow record belongs to: the names of its experiment and activity.

use std::collections::HashMap;

use crate::collector::record::{FlowRecord, Origin};
use crate::flow::Tag;
use crate::registry::Registry;
use crate::scitag;

/// An experiment and an activity with their names.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Science {
    /// `experiment << 6 | activity`.
    pub scitag: u32,
    pub experiment: String,
    pub activity: String,
}

/// Looks names up, each tag once.
pub struct Names {
    registry: Registry,
    known: HashMap<u32, Option<Science>>,
}

impl Names {
    pub fn new(registry: Registry) -> Names {
        Names {
            registry,
            known: HashMap::new(),
        }
    }

    /// The stored attribution of a record, or else the tag of its flow label, if the registry has that tag; and how it is
    /// known.
    pub fn science(&mut self, record: &FlowRecord) -> Option<(&Science, Origin)> {
        let (scitag, origin, must_be_known) = match record.attribution {
            Some(attribution) => (attribution.scitag, attribution.origin, false),
            None => {
                let tag = scitag::from_label(record.flow_label?);
                (scitag::scitag(tag), Origin::Label, true)
            }
        };
        let registry = &self.registry;
        // What is looked up is a flow label of 20 bits or what the collector wrote, so that the map stays small.
        let entry = self.known.entry(scitag << 1 | u32::from(must_be_known));
        let science = entry.or_insert_with(|| find(registry, scitag, must_be_known));
        science.as_ref().map(|science| (science, origin))
    }
}

fn find(registry: &Registry, scitag: u32, must_be_known: bool) -> Option<Science> {
    let tag = Tag {
        experiment: u16::try_from(scitag >> 6).unwrap_or(u16::MAX),
        activity: scitag as u16 & scitag::ACTIVITY_MAX,
    };
    let is_known = || {
        let experiment = registry.experiment(tag.experiment)?;
        experiment.activities.iter().find(|a| a.id == tag.activity)
    };
    if must_be_known && is_known().is_none() {
        return None;
    }
    let (experiment, activity) = registry.names(tag);
    Some(Science {
        scitag,
        experiment,
        activity,
    })
}

/// How a tag is known, in a word.
pub fn word(origin: Origin) -> &'static str {
    match origin {
        Origin::Label => "label",
        Origin::Firefly => "firefly",
        Origin::Site => "site",
    }
}
