//! Messages for a command line that is wrong: what was wrong, what is close to it, and where to read on. argh parses; its
//! messages are reworded here.

use std::fmt::Write as _;

use argh::{CommandInfoWithArgs, FlagInfo, FlagInfoKind};

use crate::config::nearest::nearest;

/// The message for `arguments`, which argh refused with `error`. `program` describes the whole command line.
pub fn explain(program: CommandInfoWithArgs, arguments: &[&str], error: &str) -> String {
    let error = error.trim();
    let value_of = error.strip_prefix("Error parsing option '");
    let option = value_of.and_then(|rest| rest.split('\'').next());
    let (path, command) = command_of(program, arguments, option);
    if error.starts_with("One of the following subcommands must be present") {
        return missing_command(&path, &command);
    }
    let message = if let Some(argument) = error.strip_prefix("Unrecognized argument: ") {
        unknown_argument(&path, &command, argument)
    } else if let Some(error) = value_of {
        bad_value(arguments, error)
    } else if let Some(option) = error.strip_prefix("No value provided for option '") {
        format!("{} needs a value", option.trim_end_matches(['\'', '.']))
    } else if let Some(names) = error.strip_prefix("Required positional arguments not provided:") {
        let names: Vec<&str> = names.split_whitespace().collect();
        let plural = if names.len() == 1 { "" } else { "s" };
        format!("missing argument{plural}: {}", names.join(", "))
    } else if error.starts_with("Trailing arguments are not allowed after `help`") {
        "no option may follow help".to_owned()
    } else {
        error.to_owned()
    };
    format!("{message}\nSee `{}`.", help_of(&path))
}

/// The message for a command line that ends where a command is needed: the commands, one line each.
pub fn missing_command(path: &str, command: &CommandInfoWithArgs) -> String {
    let mut message = "missing command, expected one of:\n".to_owned();
    for sub in &command.commands {
        // Writing to a String cannot fail.
        let _ = writeln!(message, "  {:<10}{}", sub.name, sub.command.description);
    }
    let separator = if path.is_empty() { "" } else { " " };
    message + &format!("See `flowd-rs help {path}{separator}COMMAND`.")
}

fn help_of(path: &str) -> String {
    format!("flowd-rs help {path}").trim_end().to_owned()
}

/// The command that the arguments name, `config check`, and its description. The search ends at the option
/// `last`, and at the first argument that is neither an option nor a command.
fn command_of(
    program: CommandInfoWithArgs,
    arguments: &[&str],
    last: Option<&str>,
) -> (String, CommandInfoWithArgs) {
    let (mut path, mut command) = (Vec::new(), program);
    let mut words = arguments.iter();
    while let Some(&word) = words.next() {
        if last == Some(word) {
            break;
        }
        if let Some(flag) = command.flags.iter().find(|flag| is_named(flag, word)) {
            if matches!(flag.kind, FlagInfoKind::Option { .. }) {
                words.next();
            }
        } else if let Some(sub) = command.commands.iter().find(|sub| sub.name == word) {
            path.push(sub.name);
            command = sub.command.clone();
        } else if word != "help" {
            break;
        }
    }
    (path.join(" "), command)
}

fn is_named(flag: &FlagInfo<'_>, word: &str) -> bool {
    let is_short = |short: char| word.strip_prefix('-') == Some(short.encode_utf8(&mut [0; 4]));
    flag.long == word || flag.short.is_some_and(is_short)
}

fn unknown_argument(path: &str, command: &CommandInfoWithArgs, argument: &str) -> String {
    let shown = argument.escape_debug();
    if argument.starts_with('-') {
        let takes = |flags: &[FlagInfo<'_>]| flags.iter().any(|flag| is_named(flag, argument));
        if let Some(sub) = command.commands.iter().find(|c| takes(c.command.flags)) {
            let place = format!("flowd-rs {path} {}", sub.name).replace("  ", " ");
            return format!("option {shown} must follow its command: `{place} {shown}`");
        }
        // Single letters are all close to one another.
        let long = argument.starts_with("--").then(|| {
            let names: Vec<&str> = command.flags.iter().map(|flag| flag.long).collect();
            nearest(argument, &names)
        });
        return format!("unknown option {shown}{}", suggestion(long.flatten()));
    }
    if command.commands.is_empty() {
        return format!("unexpected argument \"{shown}\"");
    }
    let names: Vec<&str> = command.commands.iter().map(|sub| sub.name).collect();
    let suggestion = suggestion(nearest(argument, &names));
    format!("unknown command \"{shown}\"{suggestion}")
}

fn suggestion(nearest: Option<&str>) -> String {
    nearest.map_or_else(String::new, |name| format!(", did you mean {name}?"))
}

/// `error` is what follows "Error parsing option '": `--port' with value 'x': reason`.
fn bad_value(arguments: &[&str], error: &str) -> String {
    let Some((option, error)) = error.split_once("' with value '") else {
        return error.to_owned();
    };
    // The value may hold any characters, so that it is not clear from the text alone where it ends.
    let mut values = arguments.iter();
    let reason = values.find_map(|value| error.strip_prefix(value)?.strip_prefix("': "));
    match reason {
        Some("duplicate values provided") => format!("{option} is given twice"),
        Some(reason) => format!("{option}: {reason}"),
        None => format!("{option}: {error}"),
    }
}

#[cfg(test)]
mod tests {
    use argh::{ArgsInfo, FromArgs};

    use super::*;
    use crate::cli::Arguments;

    fn explained(line: &str) -> String {
        let arguments: Vec<&str> = line.split(' ').collect();
        let refused = Arguments::from_args(&["flowd-rs"], &arguments).err();
        let output = refused.unwrap_or_else(|| panic!("{line}")).output;
        explain(Arguments::get_args_info(), &arguments, &output)
    }

    #[test]
    fn every_error_names_what_is_wrong_and_where_to_read_on() {
        for (line, message, help) in [
            (
                "statsu",
                "unknown command \"statsu\", did you mean status?",
                "",
            ),
            ("xyzzyx", "unknown command \"xyzzyx\"", ""),
            (
                "--log-level debug config chekc",
                "unknown command \"chekc\", did you mean check?",
                "config",
            ),
            (
                "--log-levle debug run",
                "unknown option --log-levle, did you mean --log-level?",
                "",
            ),
            (
                "run -d --cofnig x",
                "unknown option --cofnig, did you mean --config?",
                "run",
            ),
            ("run -x", "unknown option -x", "run"),
            (
                "-c x run",
                "option -c must follow its command: `flowd-rs run -c`",
                "",
            ),
            (
                "tag --scitag decode 1",
                "option --scitag must follow its command: `flowd-rs tag decode --scitag`",
                "tag",
            ),
            ("status all", "unexpected argument \"all\"", "status"),
            ("flows all", "unknown command \"all\"", "flows"),
            (
                "--log-level loud run",
                "--log-level: \"loud\" is not a valid log level, expected error, warn, info, debug or trace",
                "",
            ),
            (
                "listen --port 70000",
                "--port: \"70000\" is not a port, expected 1 to 65535",
                "listen",
            ),
            (
                "listen --port x': y",
                "--port: \"x\\':\" is not a port, expected 1 to 65535",
                "listen",
            ),
            (
                "listen --address host",
                "--address: \"host\" is not an IPv4 or IPv6 address",
                "listen",
            ),
            (
                "listen --port 1 --port 2",
                "--port is given twice",
                "listen",
            ),
            ("flows --experiment", "--experiment needs a value", "flows"),
            ("tag encode cms", "missing argument: activity", "tag encode"),
            (
                "send start tcp 192.0.2.1 1",
                "missing arguments: destination, destination-port",
                "send",
            ),
            ("run help --debug", "no option may follow help", "run"),
        ] {
            let help = format!("flowd-rs help {help}").trim_end().to_owned();
            let expected = format!("{message}\nSee `{help}`.");
            assert_eq!(explained(line), expected, "{line}");
        }
    }

    #[test]
    fn missing_commands_are_listed_one_per_line() {
        let program = missing_command("", &Arguments::get_args_info());
        assert!(
            program.starts_with("missing command, expected one of:\n  run       Run the daemon ")
        );
        assert!(program.ends_with("\nSee `flowd-rs help COMMAND`."));
        let config = explained("config");
        assert!(config.ends_with("\nSee `flowd-rs help config COMMAND`."));
        for list in [program, config] {
            assert!(list.lines().all(|line| line.len() <= 80), "{list}");
        }
    }
}
