//! `flowd-rs registry`: the experiments and activities that the program knows.

use std::io::Write;

use argh::FromArgs;

/// Print the registry: ids and names of experiments and their activities.
#[derive(FromArgs)]
#[argh(subcommand, name = "registry", help_triggers("-h", "--help", "help"))]
pub struct Registry {}

impl Registry {
    pub fn run(self) {
        let registry = crate::registry::Registry::builtin();
        let mut out = std::io::stdout().lock();
        let mut line = |e: &str, en: &str, a: &str, an: &str| {
            writeln!(out, "{e:>10}  {en:<10}  {a:>8}  {an}").is_ok()
        };
        let mut reading = line("EXPERIMENT", "NAME", "ACTIVITY", "NAME");
        for experiment in registry.experiments() {
            for activity in &experiment.activities {
                // A reader that has seen enough (head, less) closes the pipe.
                reading = reading
                    && line(
                        &experiment.id.to_string(),
                        &experiment.name,
                        &activity.id.to_string(),
                        &activity.name,
                    );
            }
        }
    }
}
