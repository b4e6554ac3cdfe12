//! `flowd-rs prepare`: creates what the daemon needs and an ordinary user cannot create.

use std::path::{Path, PathBuf};

use argh::{ArgsInfo, FromArgs};

use crate::config::{self, Config, DEFAULT_PATH};
use crate::error::{Context, Result};
use crate::sys::fifo::{self, group_id};
#[cfg(feature = "bpf")]
use crate::sys::marker;
use crate::sys::ownership::{self, Owner};

/// Create what the daemon needs and only root can create.
#[derive(ArgsInfo, FromArgs)]
#[argh(
    subcommand,
    name = "prepare",
    help_triggers("-h", "--help", "help"),
    note = "Creates the named pipe and the directory of pinned maps. The systemd unit\nruns this as root, before the daemon starts as an ordinary user."
)]
pub struct Prepare {
    /// configuration file (default: /etc/flowd/flowd.cfg)
    #[argh(
        option,
        short = 'c',
        arg_name = "file",
        default = "DEFAULT_PATH.into()"
    )]
    config: PathBuf,

    /// the user that the daemon runs as, by name or id (default: flowd)
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

/// Creates the pipe and sets its owner, group and mode, also of an existing one, since the daemon may not. Does nothing
/// if users other than root can create files on the path, where the daemon creates the pipe itself, or if the path is a
/// symbolic link, which is left to the administrator.
fn prepare_pipe(pipe: &config::NamedPipe, owner: Owner) -> Result<()> {
    let name = || {
        let path = pipe.path.display();
        format!("named pipe {path} (plugins.namedPipe.pipePath)")
    };
    let parent = pipe.path.parent().unwrap_or(Path::new(""));
    let parent = ownership::ensure_root_only_directory(parent).context(name)?;
    let (Some(parent), Some(file_name)) = (parent, pipe.path.file_name()) else {
        return Ok(());
    };
    let path = parent.join(file_name);
    if path.is_symlink() {
        return Ok(());
    }
    let group = pipe.group.as_deref();
    let group =
        group.map(|group| group_id(group).context(|| format!("plugins.namedPipe.group {group}")));
    let group = group.transpose()?;
    if let Some(aside) = fifo::ensure(&path).context(name)?.backup {
        report_moved_aside(&path, &aside);
    }
    let owner = Owner {
        group: group.unwrap_or(owner.group),
        ..owner
    };
    owner.chown_fifo(&path, pipe.mode).context(name)
}

fn report_moved_aside(path: &Path, aside: &Path) {
    eprintln!(
        "flowd-rs: {} was a regular file; renamed it to {} and created the pipe",
        path.display(),
        aside.display()
    );
}
