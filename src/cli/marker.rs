//! `flowd-rs marker`: shows packet marking in the kernel, and cleans up after a daemon that was killed.

use std::collections::BTreeMap;
use std::io::Write;
use std::path::{Path, PathBuf};

use argh::{ArgsInfo, FromArgs};

use crate::config::BPF_FS_PATH;
use crate::error::{Context, Error, Result};
use crate::flow::Tag;
use crate::sys::interfaces;
use crate::sys::mark_maps::{Key, Maps, Mark, Total, UNMARKED};
use crate::sys::marker::{lock, our_filters};

/// Show packet marking in the kernel, or clean up after a crash.
#[derive(ArgsInfo, FromArgs)]
#[argh(subcommand, name = "marker", help_triggers("-h", "--help", "help"))]
pub struct Marker {
    /// mount point of the bpffs (default: /sys/fs/bpf)
    #[argh(option, arg_name = "path", default = "BPF_FS_PATH.into()")]
    bpf_fs_path: PathBuf,

    #[argh(subcommand)]
    command: Command,
}

#[derive(ArgsInfo, FromArgs)]
#[argh(subcommand)]
enum Command {
    Show(Show),
    Clean(Clean),
}

/// Print interfaces, strategy, marked flows with their counters, and sums by tag.
#[derive(ArgsInfo, FromArgs)]
#[argh(subcommand, name = "show", help_triggers("-h", "--help", "help"))]
struct Show {}

/// Remove the filters and pinned maps that a killed daemon left.
#[derive(ArgsInfo, FromArgs)]
#[argh(subcommand, name = "clean", help_triggers("-h", "--help", "help"))]
struct Clean {
    /// only the filter on this interface; the pinned maps stay
    #[argh(option, arg_name = "interface")]
    target_interface: Option<String>,

    /// also remove a clsact qdisc that the daemon created, unless another
    /// program uses it
    #[argh(switch)]
    remove_qdisc: bool,
}

impl Marker {
    pub fn run(self) -> Result<()> {
        let maps = Maps::pinned(&self.bpf_fs_path)?;
        match self.command {
            Command::Show(_) => show(&self.bpf_fs_path, maps),
            Command::Clean(clean) => {
                // Refuse to clean up while a daemon is running.
                let _lock = maps.as_ref().map(|_| lock(&self.bpf_fs_path)).transpose()?;
                clean.run(&self.bpf_fs_path, maps)
            }
        }
    }
}

fn show(bpffs: &Path, maps: Option<Maps>) -> Result<()> {
    let (found, _) = interfaces::list().context(|| "interfaces of this host".to_owned())?;
    let registry = super::registry::load(None);
    let mut out = std::io::stdout().lock();
    let mut attached = Vec::new();
    for interface in &found {
        for filter in our_filters(interface.index).context(|| interface.name.clone())? {
            attached.push(format!("{} (priority {})", interface.name, filter.priority));
        }
    }
    // The reader (head, less) may close the pipe early: write errors are ignored.
    let _ = writeln!(
        out,
        "interfaces  {}",
        if attached.is_empty() {
            "none".to_owned()
        } else {
            attached.join(", ")
        }
    );
    let Some(maps) = maps else {
        let _ = writeln!(
            out,
            "no pinned maps below {} (--bpf-fs-path): the marker is not running, or uses another path",
            bpffs.display()
        );
        return Ok(());
    };
    let strategy = maps.strategy().map_or("unknown", |s| s.as_str());
    let mut marks: Vec<(Key, Mark)> = maps.marks().collect();
    marks.sort_by_key(|(_, mark)| std::cmp::Reverse(mark.bytes));
    let _ = writeln!(out, "strategy    {strategy}\nflows       {}", marks.len());
    for (reason, count) in UNMARKED.iter().zip(maps.unmarked()) {
        let plural = if count == 1 { "" } else { "s" };
        let _ = writeln!(out, "unmarked    {count} packet{plural}: {reason}");
    }
    if !marks.is_empty() {
        let _ = writeln!(
            out,
            "\nLABEL    PACKETS       BYTES           EXPERIMENT / ACTIVITY           FLOW"
        );
    }
    let mut totals: BTreeMap<Tag, Total> = maps.totals().into_iter().collect();
    for (key, mark) in &marks {
        let (experiment, activity) = registry.names(mark.tag);
        let flow = key
            .flow()
            .map_or_else(|| "all packets".to_owned(), |flow| flow.to_string());
        let names = format!("{experiment} / {activity}");
        let (label, packets, bytes) = (mark.label, mark.packets, mark.bytes);
        let _ = writeln!(
            out,
            "{label:#07x}  {packets:<12}  {bytes:<14}  {names:<30}  {flow}"
        );
        let total = totals.entry(mark.tag).or_default();
        total.packets += packets;
        total.bytes += bytes;
    }
    if !totals.is_empty() {
        let _ = writeln!(
            out,
            "\nSUM      PACKETS       BYTES           EXPERIMENT / ACTIVITY"
        );
    }
    for (tag, total) in &totals {
        let (experiment, activity) = registry.names(*tag);
        let _ = writeln!(
            out,
            "{:7}  {:<12}  {:<14}  {experiment} / {activity}",
            "", total.packets, total.bytes
        );
    }
    Ok(())
}

impl Clean {
    fn run(self, bpffs: &Path, maps: Option<Maps>) -> Result<()> {
        let (found, _) = interfaces::list().context(|| "interfaces of this host".to_owned())?;
        let chosen = |name: &str| {
            self.target_interface
                .as_deref()
                .is_none_or(|target| target == name)
        };
        if !found.iter().any(|i| chosen(&i.name)) {
            let name = self.target_interface.unwrap_or_default();
            return Err(Error::Failed(format!("there is no interface {name}")));
        }
        for interface in found.iter().filter(|i| chosen(&i.name)) {
            let filters = our_filters(interface.index).context(|| interface.name.clone())?;
            let Some(maps) = &maps else {
                if !filters.is_empty() {
                    let plural = if filters.len() == 1 { "" } else { "s" };
                    println!(
                        "{}: kept {} filter{plural} of a daemon whose pinned maps are not below {} (--bpf-fs-path)",
                        interface.name,
                        filters.len(),
                        bpffs.display()
                    );
                }
                continue;
            };
            maps.detach(interface.index, self.remove_qdisc)
                .context(|| interface.name.clone())?;
            if !filters.is_empty() {
                println!("{}: detached", interface.name);
            }
        }
        if let (Some(maps), None) = (maps, self.target_interface) {
            maps.unpin().context(|| "pinned maps".to_owned())?;
            println!("pinned maps: removed");
        }
        Ok(())
    }
}
