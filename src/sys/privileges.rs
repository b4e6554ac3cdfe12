//! Drops privileges that are not needed, or no longer needed: capabilities(7), no_new_privs.

use std::collections::HashSet;

use caps::{CapSet, Capability};

/// The capabilities that running threads need to reload and reattach eBPF programs, and to access their maps. Before
/// Linux 5.8, which introduced `CAP_BPF`, this includes `CAP_SYS_ADMIN`. Empty without `uses_bpf`.
pub fn needed(uses_bpf: bool) -> HashSet<Capability> {
    if !uses_bpf {
        return HashSet::new();
    }
    let mut needed: HashSet<Capability> = [
        Capability::CAP_NET_ADMIN,
        Capability::CAP_BPF,
        Capability::CAP_PERFMON,
    ]
    .into();
    if !caps::runtime::thread_all_supported().contains(&Capability::CAP_BPF) {
        needed.insert(Capability::CAP_SYS_ADMIN);
    }
    needed
}

/// The needed capabilities that this thread does not have, or has dropped, sorted by name.
pub fn missing(uses_bpf: bool) -> Vec<String> {
    let permitted = caps::read(None, CapSet::Permitted).unwrap_or_default();
    let missing = needed(uses_bpf)
        .into_iter()
        .filter(|c| !permitted.contains(c));
    let mut names: Vec<String> = missing.map(|capability| capability.to_string()).collect();
    names.sort();
    names
}

/// Sets `no_new_privs`: no program that this process starts gets more privileges than the process has.
pub fn no_new_privileges() {
    if let Err(error) = nix::sys::prctl::set_no_new_privs() {
        let error = std::io::Error::from(error);
        log::warn!("cannot set no_new_privs: {error}");
    }
}

/// Drops all capabilities except those `to_keep` that this thread has, for this thread and for threads that it starts
/// from now on.
pub fn keep_only(to_keep: &HashSet<Capability>) {
    let drop_others = || {
        let permitted = caps::read(None, CapSet::Permitted)?;
        let inheritable = caps::read(None, CapSet::Inheritable)?;
        // The other sets are within these two. Most threads inherit nothing, as the main thread keeps nothing.
        if permitted.is_empty() && inheritable.is_empty() {
            return Ok(());
        }
        let kept: HashSet<Capability> = permitted.intersection(to_keep).copied().collect();
        // Only a thread with CAP_SETPCAP may change the bounding set, and only such a thread needs to.
        if permitted.contains(&Capability::CAP_SETPCAP) {
            for capability in caps::read(None, CapSet::Bounding)?.difference(to_keep) {
                caps::drop(None, CapSet::Bounding, *capability)?;
            }
        }
        if caps::runtime::ambient_set_supported().is_ok() {
            for capability in caps::read(None, CapSet::Ambient)?.difference(to_keep) {
                caps::drop(None, CapSet::Ambient, *capability)?;
            }
        }
        caps::set(None, CapSet::Effective, &kept)?;
        caps::set(None, CapSet::Permitted, &kept)?;
        let inheritable = inheritable.intersection(to_keep).copied().collect();
        caps::set(None, CapSet::Inheritable, &inheritable)
    };
    let result: Result<(), caps::errors::CapsError> = drop_others();
    if let Err(error) = result {
        log::warn!("cannot drop all unneeded capabilities: {error}");
    }
}

/// Drops all capabilities, for threads that need none.
pub fn drop_all() {
    keep_only(&HashSet::new());
}
