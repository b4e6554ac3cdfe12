//! `flowd-rs registry`: lists, searches and updates the registry of experiments and activities.

use std::io::Write;
use std::path::{Path, PathBuf};

use argh::{ArgsInfo, FromArgs};

use crate::config::{Config, DEFAULT_PATH};
use crate::error::{Error, Result};
use crate::registry::{self, Experiment};

/// List, search or update the registry of experiments and activities.
#[derive(ArgsInfo, FromArgs)]
#[argh(subcommand, name = "registry", help_triggers("-h", "--help", "help"))]
pub struct Registry {
    /// configuration file with registry.url and workDir (default:
    /// /etc/flowd/flowd.cfg)
    #[argh(option, short = 'c', arg_name = "file")]
    config: Option<PathBuf>,

    #[argh(subcommand)]
    command: Option<Command>,
}

#[derive(ArgsInfo, FromArgs)]
#[argh(subcommand)]
enum Command {
    List(List),
    Update(Update),
    Lookup(Lookup),
}

/// Print all entries, from the cache or else the built-in registry. This is the
/// default.
#[derive(ArgsInfo, FromArgs)]
#[argh(subcommand, name = "list", help_triggers("-h", "--help", "help"))]
struct List {}

/// Fetch the registry from registry.url into the cache in workDir. A running
/// daemon does so once a day and on a reload.
#[derive(ArgsInfo, FromArgs)]
#[argh(subcommand, name = "update", help_triggers("-h", "--help", "help"))]
struct Update {}

/// Print the entries with this name or id; the exit code is 1 if there are none.
#[derive(ArgsInfo, FromArgs)]
#[argh(subcommand, name = "lookup", help_triggers("-h", "--help", "help"))]
struct Lookup {
    /// name of an experiment or an activity, or the id of an experiment
    #[argh(positional)]
    name: String,
}

/// The registry that the daemon would start with, given its configuration file or the default one. If the file is
/// invalid, default settings are used.
pub fn load(config: Option<&Path>) -> registry::Registry {
    let config = Config::load(config.unwrap_or(Path::new(DEFAULT_PATH)));
    let settings = config.map_or_else(|_| Config::default_registry(), |config| config.registry);
    registry::load_cached_or_builtin(&settings).0
}

impl Registry {
    pub fn run(self) -> Result<()> {
        let settings = match (&self.config, Path::new(DEFAULT_PATH)) {
            (Some(path), _) => Config::load_registry_settings(path)?,
            (None, default) if default.exists() => Config::load_registry_settings(default)?,
            (None, _) => Config::default_registry(),
        };
        let (registry, source) = registry::load_cached_or_builtin(&settings);
        match self.command {
            None | Some(Command::List(_)) => {
                print(registry.experiments(), |_, _| true);
                Ok(())
            }
            Some(Command::Lookup(lookup)) => {
                let name = lookup.name;
                let matches = |e: &Experiment, activity: &str| {
                    e.id.to_string() == name
                        || registry::same_name(&e.name, &name)
                        || registry::same_name(activity, &name)
                };
                match print(registry.experiments(), matches) {
                    0 => Err(Error::Failed(format!(
                        "\"{}\" is neither the name of an experiment or activity nor the id of an experiment (registry: {source})",
                        name.escape_debug()
                    ))),
                    _ => Ok(()),
                }
            }
            Some(Command::Update(_)) => update(&settings),
        }
    }
}

fn update(settings: &crate::registry::Settings) -> Result<()> {
    let url = &settings.url;
    if url.is_empty() {
        return Err(Error::Failed(
            "registry.url is empty: no registry to fetch".to_owned(),
        ));
    }
    crate::logging::start(log::LevelFilter::Info, false);
    match registry::fetch(settings) {
        Ok((_, true)) => println!("{url}: not modified"),
        Ok((registry, _)) => {
            let count = registry.experiments().len();
            let plural = if count == 1 { "" } else { "s" };
            println!("{url}: fetched {count} experiment{plural}");
        }
        Err(error) => return Err(Error::Failed(format!("{url}: {error}"))),
    }
    Ok(())
}

/// Prints the activities that match. Returns how many there were, at least 1 if the output was closed meanwhile.
fn print(experiments: &[Experiment], matches: impl Fn(&Experiment, &str) -> bool) -> usize {
    let mut out = std::io::stdout().lock();
    let mut lines = 0;
    let mut line = |e: &str, en: &str, a: &str, an: &str| {
        writeln!(out, "{e:>10}  {en:<10}  {a:>8}  {an}").is_ok()
    };
    for experiment in experiments {
        for activity in experiment
            .activities
            .iter()
            .filter(|a| matches(experiment, &a.name))
        {
            // The reader (head, less) may close the pipe early.
            let (id, activity_id) = (experiment.id.to_string(), activity.id.to_string());
            if lines == 0 && !line("EXPERIMENT", "NAME", "ACTIVITY", "NAME")
                || !line(&id, &experiment.name, &activity_id, &activity.name)
            {
                return lines + 1;
            }
            lines += 1;
        }
    }
    lines
}
