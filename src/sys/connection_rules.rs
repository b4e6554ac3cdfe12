//! What of a rule for connections depends on this host: users by name, cgroups by id.

use std::collections::HashSet;
use std::fs;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use nix::unistd::User;

use crate::config::ConnectionRule;
use crate::connections::Rule;
use crate::error::{Context, Error, Result};

/// Rules with users and cgroups looked up.
pub fn build(rules: &[ConnectionRule]) -> Result<Vec<Rule>> {
    let build = |rule: &ConnectionRule| {
        Ok(Rule {
            uid: rule.user.as_deref().map(uid).transpose()?,
            cgroups: match &rule.cgroup {
                Some(path) => {
                    let what = || format!("cgroup {} (rules)", path.display());
                    Some(cgroups(path).context(what)?)
                }
                None => None,
            },
            ..rule.rule.clone()
        })
    };
    rules.iter().map(build).collect()
}

/// Looks up the cgroups again: a service that is started again has a new one. One that is gone for now
/// has none.
pub fn refresh(configured: &[ConnectionRule], rules: &mut [Rule]) {
    for (configured, rule) in configured.iter().zip(rules) {
        if let Some(path) = &configured.cgroup {
            rule.cgroups = Some(cgroups(path).unwrap_or_default());
        }
    }
}

fn uid(user: &str) -> Result<u32> {
    if let Ok(uid) = user.parse() {
        return Ok(uid);
    }
    match User::from_name(user) {
        Ok(Some(user)) => Ok(user.uid.as_raw()),
        Ok(None) => Err(Error::Failed(format!(
            "user {user} (rules) is not known on this host"
        ))),
        Err(error) => Err(error).context(|| format!("user {user} (rules)")),
    }
}

/// The ids of a cgroup and of all below it: the numbers of their directories. A path is that of the
/// directory, or one within the hierarchy of cgroup v2.
fn cgroups(path: &Path) -> io::Result<HashSet<u64>> {
    let within = path.strip_prefix("/").unwrap_or(path);
    let places: [PathBuf; 3] = [
        path.to_owned(),
        Path::new("/sys/fs/cgroup/unified").join(within),
        Path::new("/sys/fs/cgroup").join(within),
    ];
    let is_cgroup = |place: &&PathBuf| place.join("cgroup.controllers").exists();
    let Some(place) = places.iter().find(is_cgroup) else {
        return Err(io::Error::new(
            io::ErrorKind::NotFound,
            "not a cgroup of version 2",
        ));
    };
    let mut ids = HashSet::new();
    collect(place, &mut ids)?;
    Ok(ids)
}

fn collect(directory: &Path, ids: &mut HashSet<u64>) -> io::Result<()> {
    ids.insert(fs::metadata(directory)?.ino());
    for entry in fs::read_dir(directory)? {
        let entry = entry?;
        if entry.file_type()?.is_dir() {
            // It may have gone meanwhile.
            let _ = collect(&entry.path(), ids);
        }
    }
    Ok(())
}
