//! `flowd-rs prepare`: what the daemon needs and an ordinary user cannot make.

use std::path::{Path, PathBuf};

use argh::{ArgsInfo, FromArgs};

use crate::config::{self, Config, DEFAULT_PATH};
use crate::error::{Context, Result};
use crate::sys::fifo::{self, group_id};
#[cfg(feature = "bpf")]
use crate::sys::marker;
use crate::sys::ownership::{self, Owner};

/// Make what a configuration needs and only root can: the named pipe, the directory of pinned maps. For the service,
/// before the daemon starts as an ordinary user.
#[derive(ArgsInfo, FromArgs)]
#[argh(subcommand, name = "prepare", help_triggers("-h", "--help", "help"))]
pub struct Prepare {
    /// configuration file (default: /etc/flowd/flowd.cfg)
    #[argh(option, short = 'c', default = "DEFAULT_PATH.into()")]
    config: PathBuf,

    /// name or id of the user that the daemon runs as (default: flowd)
    #[argh(option, default = "\"flowd\".to_owned()")]
    user: String,
}

impl Prepare {
    pub fn run(self) -> Result<()> {
        let config = Config::load(&self.config)?;
        let owner = Owner::find(&self.user).context(|| format!("--user {}", self.user))?;
        let pipe = config.named_pipe.as_ref();
        let pipe = pipe.map_or(Ok(()), |pipe| prepare_pipe(pipe, owner));
        #[cfg(feature = "bpf")]
        let maps = config.marker.as_ref().map_or(Ok(()), |settings| {
            marker::prepare(&settings.bpf_fs_path, owner)
        });
        #[cfg(not(feature = "bpf"))]
        let maps = Ok(());
        pipe.and(maps)
    }
}

/// Also one that is there gets owner, group and mode: the daemon, once it runs, may not. Where others than root may make
/// files the daemon does it, and links that lead elsewhere are the administrator's.
fn prepare_pipe(pipe: &config::NamedPipe, owner: Owner) -> Result<()> {
    let what = || {
        let path = pipe.path.display();
        format!("named pipe {path} (plugins.namedPipe.pipePath)")
    };
    let parent = pipe.path.parent().unwrap_or(Path::new(""));
    let parent = ownership::roots_alone(parent).context(what)?;
    let (Some(parent), Some(name)) = (parent, pipe.path.file_name()) else {
        return Ok(());
    };
    let path = parent.join(name);
    if path.is_symlink() {
        return Ok(());
    }
    let group = pipe.group.as_deref();
    let group =
        group.map(|group| group_id(group).context(|| format!("plugins.namedPipe.group {group}")));
    let group = group.transpose()?;
    if let Some(aside) = fifo::ensure(&path).context(what)?.moved_aside {
        report_moved_aside(&path, &aside);
    }
    let owner = Owner {
        group: group.unwrap_or(owner.group),
        ..owner
    };
    owner.give_fifo(&path, pipe.mode).context(what)
}

fn report_moved_aside(path: &Path, aside: &Path) {
    eprintln!(
        "flowd-rs: named pipe {}: a regular file stood in its place, kept as {}",
        path.display(),
        aside.display()
    );
}
