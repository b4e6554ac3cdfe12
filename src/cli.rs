//! The command line. One file per command.

mod access;
mod client;
mod collect;
mod config;
mod exporters;
mod filter;
mod flows;
mod listen;
#[cfg(feature = "bpf")]
mod marker;
mod prepare;
mod reader;
mod registry;
mod run;
mod send;
mod status;
mod stun;
mod tag;
mod terminal;
mod usage;

use std::ffi::OsString;
use std::process::ExitCode;

use argh::{ArgsInfo, FromArgs};
use log::LevelFilter;

use crate::error::Result;

/// SciTags network flow and packet marking daemon.
#[derive(ArgsInfo, FromArgs)]
#[argh(help_triggers("-h", "--help", "help"))]
struct Arguments {
    /// error, warn, info, debug or trace; overrides the configuration file
    #[argh(option, arg_name = "level", from_str_fn(log_level))]
    log_level: Option<LevelFilter>,

    /// start each line of the log with the time
    #[argh(switch)]
    log_time: bool,

    /// print the version
    #[argh(switch)]
    version: bool,

    #[argh(subcommand)]
    command: Option<Command>,
}

#[derive(ArgsInfo, FromArgs)]
#[argh(subcommand)]
enum Command {
    Run(run::Run),
    Collect(collect::Collect),
    Config(config::Config),
    Exporters(exporters::Exporters),
    Filter(filter::Filter),
    Flows(flows::Flows),
    Listen(listen::Listen),
    #[cfg(feature = "bpf")]
    Marker(marker::Marker),
    Prepare(prepare::Prepare),
    Reader(reader::Reader),
    Registry(registry::Registry),
    Send(send::Send),
    Status(status::Status),
    Stun(stun::Stun),
    Tag(tag::Tag),
    Version(Version),
}

/// Print the version.
#[derive(ArgsInfo, FromArgs)]
#[argh(subcommand, name = "version", help_triggers("-h", "--help", "help"))]
struct Version {}

/// The options of the log, which may be given before or after the command.
struct Logging {
    level: Option<LevelFilter>,
    time: bool,
}

impl Logging {
    fn start(&self, default: LevelFilter) {
        crate::logging::start(self.level.unwrap_or(default), self.time);
    }
}

/// A command and its options, for the documentation.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CommandLine {
    /// `config check`; empty for the program itself.
    pub command: String,
    /// Long names without the dashes, and short ones.
    pub options: Vec<(String, Option<char>)>,
}

/// Every command with its options; the first is the program itself.
pub fn commands() -> Vec<CommandLine> {
    let mut commands = Vec::new();
    describe("", &Arguments::get_args_info(), &mut commands);
    commands
}

fn describe(path: &str, info: &argh::CommandInfoWithArgs, commands: &mut Vec<CommandLine>) {
    let long = |flag: &argh::FlagInfo| flag.long.trim_start_matches('-').to_owned();
    let options = info.flags.iter().map(|flag| (long(flag), flag.short));
    commands.push(CommandLine {
        command: path.trim_start().to_owned(),
        options: options.collect(),
    });
    for sub in &info.commands {
        describe(&format!("{path} {}", sub.name), &sub.command, commands);
    }
}

fn log_level(word: &str) -> std::result::Result<LevelFilter, String> {
    crate::config::log_level(word)
}

/// Splits an option from a value in the same word: `--log-level=debug`.
fn split_option(word: &str) -> impl Iterator<Item = &str> {
    let (option, value) = match word.split_once('=') {
        Some((option, value)) if option.starts_with("--") => (option, Some(value)),
        _ => (word, None),
    };
    std::iter::once(option).chain(value)
}

/// Runs the command that the arguments of the process name.
pub fn main() -> ExitCode {
    let arguments: std::result::Result<Vec<String>, _> = std::env::args_os()
        .skip(1)
        .map(OsString::into_string)
        .collect();
    let Ok(arguments) = arguments else {
        eprintln!("flowd-rs: an argument is not UTF-8");
        return ExitCode::from(2);
    };
    let arguments: Vec<&str> = arguments
        .iter()
        .flat_map(|word| split_option(word))
        .collect();
    let arguments = reader::arguments::split(&arguments);
    let parsed = match Arguments::from_args(&["flowd-rs"], &arguments) {
        Ok(parsed) => parsed,
        Err(exit) if exit.status.is_ok() => {
            println!("{}", exit.output.trim_end());
            return ExitCode::SUCCESS;
        }
        Err(exit) => {
            let message = usage::explain(Arguments::get_args_info(), &arguments, &exit.output);
            eprintln!("flowd-rs: {message}");
            return ExitCode::from(2);
        }
    };
    match dispatch(parsed) {
        Ok(code) => code,
        Err(error) => {
            eprintln!("flowd-rs: {error}");
            error.exit_code()
        }
    }
}

fn dispatch(arguments: Arguments) -> Result<ExitCode> {
    let logging = Logging {
        level: arguments.log_level,
        time: arguments.log_time,
    };
    match arguments.command {
        _ if arguments.version => version(),
        Some(Command::Version(_)) => version(),
        Some(Command::Run(command)) => return command.run(logging),
        Some(Command::Collect(command)) => return command.run(logging),
        Some(Command::Config(command)) => command.run()?,
        Some(Command::Exporters(command)) => command.run()?,
        Some(Command::Filter(command)) => command.run()?,
        Some(Command::Flows(command)) => command.run()?,
        Some(Command::Send(command)) => command.run()?,
        Some(Command::Status(command)) => command.run()?,
        Some(Command::Stun(command)) => command.run()?,
        Some(Command::Listen(command)) => command.run()?,
        #[cfg(feature = "bpf")]
        Some(Command::Marker(command)) => command.run()?,
        Some(Command::Tag(command)) => return Ok(command.run()),
        Some(Command::Prepare(command)) => command.run()?,
        Some(Command::Reader(command)) => return command.run(),
        Some(Command::Registry(command)) => command.run()?,
        None => {
            let message = usage::missing_command("", &Arguments::get_args_info());
            eprintln!("flowd-rs: {message}");
            return Ok(ExitCode::from(2));
        }
    }
    Ok(ExitCode::SUCCESS)
}

fn version() {
    println!("flowd-rs {}", env!("CARGO_PKG_VERSION"));
}
