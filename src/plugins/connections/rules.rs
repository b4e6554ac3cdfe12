//! The rules that give connections their tags, with the users and cgroups that they name looked up on this host.

use std::collections::HashSet;
use std::fs;
use std::io;
use std::ops::RangeInclusive;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use ipnet::IpNet;
use nix::unistd::User;

use super::Connection;
use crate::config::ConnectionRule;
use crate::error::{Context, Error, Result};
use crate::flow::Tag;

/// Gives a tag to the connections that match all of its conditions. An empty or absent condition matches all.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Rule {
    /// Networks of the remote address.
    pub remote_networks: Vec<IpNet>,
    /// Ranges of the local port.
    pub local_ports: Vec<RangeInclusive<u16>>,
    /// Ranges of the remote port.
    pub remote_ports: Vec<RangeInclusive<u16>>,
    /// The user who owns the socket.
    pub uid: Option<u32>,
    /// The ids of a cgroup and of the cgroups below it.
    pub cgroups: Option<HashSet<u64>>,
    /// The tag.
    pub tag: Tag,
}

impl Rule {
    /// Whether the connection matches all conditions.
    pub fn matches(&self, connection: &Connection) -> bool {
        let (local, remote) = (connection.flow.source, connection.flow.destination);
        let port_matches = |ranges: &[RangeInclusive<u16>], port| {
            ranges.is_empty() || ranges.iter().any(|range| range.contains(&port))
        };
        let networks = &self.remote_networks;
        (networks.is_empty() || networks.iter().any(|net| net.contains(&remote.address)))
            && port_matches(&self.local_ports, local.port)
            && port_matches(&self.remote_ports, remote.port)
            && self.uid.is_none_or(|uid| connection.uid == Some(uid))
            && self.cgroups.as_ref().is_none_or(|ids| {
                connection
                    .cgroup
                    .is_some_and(|cgroup| ids.contains(&cgroup))
            })
    }
}

/// Builds the rules of a configuration, looking up their users and cgroups.
pub fn build(rules: &[ConnectionRule]) -> Result<Vec<Rule>> {
    let build = |rule: &ConnectionRule| {
        Ok(Rule {
            uid: rule.user.as_deref().map(uid).transpose()?,
            cgroups: match &rule.cgroup {
                Some(path) => {
                    let resource = || format!("cgroup {} (rules)", path.display());
                    Some(cgroup_ids(path).context(resource)?)
                }
                None => None,
            },
            remote_networks: rule.remote_networks.clone(),
            local_ports: rule.local_ports.clone(),
            remote_ports: rule.remote_ports.clone(),
            tag: rule.tag,
        })
    };
    rules.iter().map(build).collect()
}

/// Looks up the cgroups again: a restarted service has a new cgroup. A rule whose cgroup does not exist at the moment
/// matches no connection.
pub fn refresh(configured: &[ConnectionRule], rules: &mut [Rule]) {
    for (configured, rule) in configured.iter().zip(rules) {
        if let Some(path) = &configured.cgroup {
            rule.cgroups = Some(cgroup_ids(path).unwrap_or_default());
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
            "user {user} (rules): no such user on this host"
        ))),
        Err(error) => Err(error).context(|| format!("user {user} (rules)")),
    }
}

/// The ids of a cgroup and of all cgroups below it, which are the inode numbers of their directories. `path` is the
/// directory, or is relative to the root of the cgroup v2 hierarchy.
fn cgroup_ids(path: &Path) -> io::Result<HashSet<u64>> {
    let relative = path.strip_prefix("/").unwrap_or(path);
    let candidates: [PathBuf; 3] = [
        path.to_owned(),
        Path::new("/sys/fs/cgroup/unified").join(relative),
        Path::new("/sys/fs/cgroup").join(relative),
    ];
    let is_cgroup = |path: &&PathBuf| path.join("cgroup.controllers").exists();
    let Some(directory) = candidates.iter().find(is_cgroup) else {
        return Err(io::Error::new(io::ErrorKind::NotFound, "not a cgroup v2"));
    };
    let mut ids = HashSet::new();
    collect_ids(directory, &mut ids)?;
    Ok(ids)
}

fn collect_ids(directory: &Path, ids: &mut HashSet<u64>) -> io::Result<()> {
    ids.insert(fs::metadata(directory)?.ino());
    for entry in fs::read_dir(directory)? {
        let entry = entry?;
        if entry.file_type()?.is_dir() {
            // The cgroup may have been removed meanwhile.
            let _ = collect_ids(&entry.path(), ids);
        }
    }
    Ok(())
}
