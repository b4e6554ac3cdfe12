//! Hands file descriptors from a part of the daemon to its successor: to the part that replaces it on a reload, or to
//! the same part of the next process, through systemd's file descriptor store (sd_notify(3), FDSTORE).

use std::collections::HashMap;
use std::os::fd::{BorrowedFd, FromRawFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering};

use crossbeam_channel::{Receiver, Sender, unbounded};
use sd_notify::NotifyState;

// Values of `Handover::successor`.
const NONE: u8 = 0;
const IN_THIS_PROCESS: u8 = 1;
const IN_NEXT_PROCESS: u8 = 2;

/// Tells a part of the daemon whether a successor takes over the resources that the part would otherwise remove when it
/// ends.
#[derive(Clone)]
pub struct Handover {
    successor: Arc<AtomicU8>,
    descriptors: (Sender<OwnedFd>, Receiver<OwnedFd>),
}

impl Default for Handover {
    /// Without a successor.
    fn default() -> Handover {
        Handover {
            successor: Arc::default(),
            descriptors: unbounded(),
        }
    }
}

impl Handover {
    /// From now on, resources are kept: another part of this process takes over.
    pub fn begin(&self) {
        self.successor.store(IN_THIS_PROCESS, Ordering::Release);
    }

    /// From now on, resources are kept: the next process takes over.
    pub fn begin_restart(&self) {
        self.successor.store(IN_NEXT_PROCESS, Ordering::Release);
    }

    /// Whether a successor takes over.
    pub fn is_begun(&self) -> bool {
        self.successor.load(Ordering::Acquire) != NONE
    }

    /// Leaves a file descriptor for the successor, if there is one; `name` is the name of the part.
    pub fn leave(&self, name: &str, fd: BorrowedFd<'_>) {
        match self.successor.load(Ordering::Acquire) {
            IN_THIS_PROCESS => {
                if let Ok(fd) = fd.try_clone_to_owned() {
                    let _ = self.descriptors.0.send(fd);
                }
            }
            IN_NEXT_PROCESS => {
                let state = [NotifyState::FdStore, NotifyState::FdName(name)];
                if let Err(error) = sd_notify::notify_with_fds(&state, &[fd]) {
                    log::debug!("{name}: cannot store the file descriptor in systemd: {error}");
                }
            }
            _ => {}
        }
    }

    /// Takes the file descriptor that was left for a successor in this process.
    pub fn take(&self) -> Option<OwnedFd> {
        self.descriptors.1.try_recv().ok()
    }
}

/// Takes the file descriptors that the previous process has left, by the names of its parts, and removes them from
/// systemd's store.
pub fn inherited() -> HashMap<String, OwnedFd> {
    let Ok(descriptors) = sd_notify::listen_fds_with_names() else {
        return HashMap::new();
    };
    let mut inherited = HashMap::new();
    for (fd, name) in descriptors {
        let state = [NotifyState::FdStoreRemove, NotifyState::FdName(&name)];
        if let Err(error) = sd_notify::notify(&state) {
            log::debug!("{name}: cannot remove the file descriptor from systemd: {error}");
        }
        // SAFETY: systemd passed the descriptor to this process, and nothing else in the process uses it.
        inherited.insert(name, unsafe { OwnedFd::from_raw_fd(fd) });
    }
    inherited
}
