//! `flowd-rs registry`: the experiments and activities that the program knows.

use std::io::Write;
use std::path::{Path, PathBuf};

use argh::{ArgsInfo, FromArgs};

use crate::config::{Config, DEFAULT_PATH};
use crate::error::{Error, Result};
use crate::registry::{self, Experiment};

/// Print, fetch or search the registry: ids and names of experiments and their activities.
#[derive(ArgsInfo, FromArgs)]
#[argh(subcommand, name = "registry", help_triggers("-h", "--help", "help"))]
pub struct Registry {
    /// configuration file, for its registry.url and workDir (default: /etc/flowd/flowd.cfg)
    #[argh(option, short = 'c')]
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

/// Print all of it, from the cache, or what is built in: what is done without a command, too.
#[derive(ArgsInfo, FromArgs)]
#[argh(subcommand, name = "list", help_triggers("-h", "--help", "help"))]
struct List {}

/// Fetch it from registry.url into the cache in workDir. A running daemon does so every day, and on a reload.
#[derive(ArgsInfo, FromArgs)]
#[argh(subcommand, name = "update", help_triggers("-h", "--help", "help"))]
struct Update {}

/// Print the entries with a name or an id; exit code 1 if there is none.
#[derive(ArgsInfo, FromArgs)]
#[argh(subcommand, name = "lookup", help_triggers("-h", "--help", "help"))]
struct Lookup {
    /// name of an experiment or an activity, or the id of an experiment
    #[argh(positional)]
    what: String,
}

/// The registry that the daemon of a configuration, or of the default one, would begin with.
pub fn known(config: Option<&Path>) -> registry::Registry {
    let config = Config::load(config.unwrap_or(Path::new(DEFAULT_PATH)));
    let settings = config.map_or_else(|_| Config::default_registry(), |config| config.registry);
    registry::known(&settings).0
}

impl Registry {
    pub fn run(self) -> Result<()> {
        let settings = match (&self.config, Path::new(DEFAULT_PATH)) {
            (Some(path), _) => Config::load_registry(path)?,
            (None, default) if default.exists() => Config::load_registry(default)?,
            (None, _) => Config::default_registry(),
        };
        let (registry, source) = registry::known(&settings);
        match self.command {
            None | Some(Command::List(_)) => {
                print(registry.experiments(), |_, _| true);
                Ok(())
            }
            Some(Command::Lookup(lookup)) => {
                let what = lookup.what;
                let wanted = |e: &Experiment, a: &str| {
                    e.id.to_string() == what
                        || registry::same_name(&e.name, &what)
                        || registry::same_name(a, &what)
                };
                match print(registry.experiments(), wanted) {
                    0 => Err(Error::Failed(format!(
                        "no experiment or activity is named \"{}\", and no experiment has such an id, in the registry {source}",
                        what.escape_debug()
                    ))),
                    _ => Ok(()),
                }
            }
            Some(Command::Update(_)) => update(&settings),
        }
    }
}

fn update(settings: &crate::config::Registry) -> Result<()> {
    let url = &settings.url;
    if url.is_empty() {
        return Err(Error::Failed(
            "registry.url is empty: there is nothing to fetch".to_owned(),
        ));
    }
    crate::logging::start(log::LevelFilter::Info, false);
    match registry::fetch(settings) {
        Ok((_, true)) => println!("{url}: as it was"),
        Ok((registry, _)) => println!("{url}: {} experiments", registry.experiments().len()),
        Err(error) => return Err(Error::Failed(format!("{url}: {error}"))),
    }
    Ok(())
}

/// Returns how many lines.
fn print(experiments: &[Experiment], wanted: impl Fn(&Experiment, &str) -> bool) -> usize {
    let mut out = std::io::stdout().lock();
    let mut lines = 0;
    let mut line = |e: &str, en: &str, a: &str, an: &str| {
        writeln!(out, "{e:>10}  {en:<10}  {a:>8}  {an}").is_ok()
    };
    for experiment in experiments {
        for activity in experiment
            .activities
            .iter()
            .filter(|a| wanted(experiment, &a.name))
        {
            // A reader that has seen enough (head, less) closes the pipe.
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
