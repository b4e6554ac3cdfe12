//! `flowd-rs tag`: converts a tag to what a packet carries, and back.

use std::process::ExitCode;

use argh::{ArgsInfo, FromArgs};

use crate::flow;
use crate::registry::Registry;
use crate::scitag;

/// Convert a tag to scitag, flow label and IPv6 option, or back.
#[derive(ArgsInfo, FromArgs)]
#[argh(subcommand, name = "tag", help_triggers("-h", "--help", "help"))]
pub struct Tag {
    #[argh(subcommand)]
    command: Command,
}

#[derive(ArgsInfo, FromArgs)]
#[argh(subcommand)]
enum Command {
    Encode(Encode),
    Decode(Decode),
}

/// Print the scitag, flow label and option of an experiment and activity.
#[derive(ArgsInfo, FromArgs)]
#[argh(subcommand, name = "encode", help_triggers("-h", "--help", "help"))]
struct Encode {
    /// id of 1 to 511, or a name of the registry
    #[argh(positional)]
    experiment: String,

    /// id of 1 to 63, or a name of the registry
    #[argh(positional)]
    activity: String,
}

/// Print the experiment and activity in a flow label.
#[derive(ArgsInfo, FromArgs)]
#[argh(subcommand, name = "decode", help_triggers("-h", "--help", "help"))]
struct Decode {
    /// the value is a scitag, not a flow label
    #[argh(switch)]
    scitag: bool,

    /// decimal, or hexadecimal with the prefix 0x
    #[argh(positional)]
    value: String,
}

impl Tag {
    pub fn run(self) -> ExitCode {
        let registry = super::registry::load(None);
        let result = match self.command {
            Command::Encode(encode) => encode.tag(&registry).map(|tag| (tag, None)),
            Command::Decode(decode) => decode.tag(),
        };
        match result {
            Ok((tag, label)) => {
                show(tag, label, &registry);
                ExitCode::SUCCESS
            }
            Err(message) => {
                eprintln!("flowd-rs: {message}");
                ExitCode::from(2)
            }
        }
    }
}

impl Encode {
    fn tag(&self, registry: &Registry) -> Result<flow::Tag, String> {
        let id = |text: &str, by_name: Option<u16>| text.parse().ok().or(by_name);
        let experiment = id(&self.experiment, registry.experiment_id(&self.experiment));
        let experiment = experiment.filter(|id| (1..=scitag::EXPERIMENT_MAX).contains(id)).ok_or_else(|| {
            format!("experiment \"{}\" is neither an id of 1 to 511 nor a name of the registry (`flowd-rs registry` lists them)", self.experiment.escape_debug())
        })?;
        let activity = id(
            &self.activity,
            registry.activity_id(experiment, &self.activity),
        );
        let activity = activity.filter(|id| (1..=scitag::ACTIVITY_MAX).contains(id)).ok_or_else(|| {
            format!("activity \"{}\" is neither an id of 1 to 63 nor the name of an activity of this experiment (`flowd-rs registry` lists them)", self.activity.escape_debug())
        })?;
        Ok(flow::Tag {
            experiment,
            activity,
        })
    }
}

impl Decode {
    fn tag(&self) -> Result<(flow::Tag, Option<u32>), String> {
        let (max, name) = if self.scitag {
            (65535, "scitag")
        } else {
            (0xfffff, "flow label")
        };
        let value = match self.value.strip_prefix("0x") {
            Some(digits) => u32::from_str_radix(digits, 16),
            None => self.value.parse(),
        };
        match value {
            Ok(value) if value <= max && self.scitag => {
                Ok((scitag::from_scitag(value as u16), None))
            }
            Ok(value) if value <= max => Ok((scitag::from_label(value), Some(value))),
            _ => Err(format!(
                "\"{}\" is not a {name}, expected 0 to {max} ({max:#x})",
                self.value.escape_debug()
            )),
        }
    }
}

fn show(tag: flow::Tag, given: Option<u32>, registry: &Registry) {
    let (experiment, activity) = registry.names(tag);
    println!("experiment  {} {experiment}", tag.experiment);
    println!("activity    {} {activity}", tag.activity);
    if !scitag::fits(tag) {
        println!(
            "not a tag that packets can carry: expected an experiment of 1 to 511 and an activity of 1 to 63"
        );
        return;
    }
    let (label, scitag) = (scitag::label(tag), scitag::scitag(tag));
    println!("scitag      {scitag} {scitag:#x}");
    println!("label       {label} {label:#07x} without entropy");
    match given {
        Some(given) => println!(
            "entropy     {:#07x} of {given:#07x}",
            given & scitag::ENTROPY
        ),
        None => println!(
            "entropy     any of the bits {:#07x} may be set as well",
            scitag::ENTROPY
        ),
    }
    let option: Vec<String> = scitag::options_header(tag, 0)[2..]
        .iter()
        .map(|b| format!("{b:02x}"))
        .collect();
    println!(
        "option      {} (Hop-by-Hop or Destination Options)",
        option.join(" ")
    );
}
