//! Gives up the privileges that are not needed (any more): capabilities(7), no_new_privs.

use std::collections::HashSet;

use caps::{CapSet, Capability};

use crate::config::Config;

/// What the threads that run may still need, by the configuration: to load and attach programs again, to
/// read and write their maps. Without CAP_BPF, which came with Linux 5.8, it is CAP_SYS_ADMIN.
pub fn kept(config: &Config) -> HashSet<Capability> {
    if config.bpf_users().is_empty() {
        return HashSet::new();
    }
    let mut kept: HashSet<Capability> = [
        Capability::CAP_NET_ADMIN,
        Capability::CAP_BPF,
        Capability::CAP_PERFMON,
    ]
    .into();
    if !caps::runtime::thread_all_supported().contains(&Capability::CAP_BPF) {
        kept.insert(Capability::CAP_SYS_ADMIN);
    }
    kept
}

/// Which of them this thread does not have, or has given up; in the order of their names.
pub fn missing(config: &Config) -> Vec<String> {
    let permitted = caps::read(None, CapSet::Permitted).unwrap_or_default();
    let missing = kept(config).into_iter().filter(|c| !permitted.contains(c));
    let mut names: Vec<String> = missing.map(|capability| capability.to_string()).collect();
    names.sort();
    names
}

/// No program that this process could ever start gets more privileges than it has.
pub fn no_new_privileges() {
    if let Err(error) = nix::sys::prctl::set_no_new_privs() {
        log::warn!("no_new_privs: {error}");
    }
}

/// Keeps these capabilities, as far as they are there, and gives up all others: of this thread, and of
/// those that it starts from now on.
pub fn keep(wanted: &HashSet<Capability>) {
    let keep = || {
        let permitted = caps::read(None, CapSet::Permitted)?;
        let keep = permitted.intersection(wanted).copied().collect();
        // Only who may change the bounding set needs to.
        if permitted.contains(&Capability::CAP_SETPCAP) {
            for capability in caps::read(None, CapSet::Bounding)?.difference(wanted) {
                caps::drop(None, CapSet::Bounding, *capability)?;
            }
        }
        if caps::runtime::ambient_set_supported().is_ok() {
            for capability in caps::read(None, CapSet::Ambient)?.difference(wanted) {
                caps::drop(None, CapSet::Ambient, *capability)?;
            }
        }
        caps::set(None, CapSet::Effective, &keep)?;
        caps::set(None, CapSet::Permitted, &keep)?;
        let inheritable = caps::read(None, CapSet::Inheritable)?;
        let inheritable = inheritable.intersection(wanted).copied().collect();
        caps::set(None, CapSet::Inheritable, &inheritable)
    };
    let result: Result<(), caps::errors::CapsError> = keep();
    if let Err(error) = result {
        log::warn!("capabilities: {error}: not all that could be were given up");
    }
}

/// Gives up all: for threads that need none.
pub fn keep_none() {
    keep(&HashSet::new());
}
