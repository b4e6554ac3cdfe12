//! `flowd-rs prepare`: what the daemon needs and an ordinary user cannot make.

use std::path::{Path, PathBuf};

use argh::{ArgsInfo, FromArgs};

use crate::config::{self, Config, DEFAULT_PATH};
use crate::error::{Context, Result};
use crate::sys::fifo::{self, group_id};
#[cfg(feature = "bpf")]
use crate::sys::marker;
use crate::sys::ownership::Owner;
use crate::sys::state_dir;

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
        if let Some(pipe) = &config.named_pipe {
            prepare_pipe(pipe, owner)?;
        }
        #[cfg(feature = "bpf")]
        if let Some(marker) = &config.marker {
            marker::prepare(&marker.bpf_fs_path, owner)?;
        }
        state_dir::prepare(&config.state_dir, owner)
    }
}

/// Also one that is there gets owner, group and mode: the daemon, once it runs, may not.
fn prepare_pipe(pipe: &config::NamedPipe, owner: Owner) -> Result<()> {
    let what = || {
        format!(
            "named pipe {} (plugins.namedPipe.pipePath)",
            pipe.path.display()
        )
    };
    let group = pipe.group.as_deref().map(group_id).transpose();
    let group = group.context(|| {
        format!(
            "plugins.namedPipe.group {}",
            pipe.group.as_deref().unwrap_or_default()
        )
    })?;
    if let Some(aside) = fifo::ensure(&pipe.path).context(what)?.moved_aside {
        report_moved_aside(&pipe.path, &aside);
    }
    let owner = Owner {
        group: group.unwrap_or(owner.group),
        ..owner
    };
    owner.give(&pipe.path, Some(pipe.mode)).context(what)
}

fn report_moved_aside(path: &Path, aside: &Path) {
    eprintln!(
        "flowd-rs: named pipe {}: a regular file stood in its place, kept as {}",
        path.display(),
        aside.display()
    );
}
