//! What a part of the daemon leaves to whoever comes after it: in this process on a reload, or in the next
//! one, by way of systemd's file descriptor store (sd_notify(3), FDSTORE).

use std::collections::HashMap;
use std::os::fd::{BorrowedFd, FromRawFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering};

use crossbeam_channel::{Receiver, Sender, unbounded};
use sd_notify::NotifyState;

const NOBODY: u8 = 0;
const WITHIN: u8 = 1;
const NEXT: u8 = 2;

/// Says whether somebody takes over what a part of the daemon would take down when it ends.
#[derive(Clone)]
pub struct Handover {
    to: Arc<AtomicU8>,
    left: (Sender<OwnedFd>, Receiver<OwnedFd>),
}

impl Default for Handover {
    /// Nobody does.
    fn default() -> Handover {
        Handover {
            to: Arc::default(),
            left: unbounded(),
        }
    }
}

impl Handover {
    /// From now on nothing is taken down: another part of this process takes over.
    pub fn begin(&self) {
        self.to.store(WITHIN, Ordering::Release);
    }

    /// The same, but the next process does.
    pub fn begin_restart(&self) {
        self.to.store(NEXT, Ordering::Release);
    }

    /// Whether somebody takes over.
    pub fn is_begun(&self) -> bool {
        self.to.load(Ordering::Acquire) != NOBODY
    }

    /// Leaves a file descriptor to the part of this name that takes over, if one does.
    pub fn leave(&self, name: &str, fd: BorrowedFd<'_>) {
        match self.to.load(Ordering::Acquire) {
            WITHIN => {
                if let Ok(fd) = fd.try_clone_to_owned() {
                    let _ = self.left.0.send(fd);
                }
            }
            NEXT => {
                let state = [NotifyState::FdStore, NotifyState::FdName(name)];
                if let Err(error) = sd_notify::notify_with_fds(&state, &[fd]) {
                    log::debug!("{name}: systemd could not be given the file descriptor: {error}");
                }
            }
            _ => {}
        }
    }

    /// What was left to another part of this process.
    pub fn left(&self) -> Option<OwnedFd> {
        self.left.1.try_recv().ok()
    }
}

/// What the former process has left, by the names of its parts; systemd forgets it.
pub fn inherited() -> HashMap<String, OwnedFd> {
    let Ok(found) = sd_notify::listen_fds_with_names() else {
        return HashMap::new();
    };
    let mut inherited = HashMap::new();
    for (fd, name) in found {
        let state = [NotifyState::FdStoreRemove, NotifyState::FdName(&name)];
        if let Err(error) = sd_notify::notify(&state) {
            log::debug!("{name}: systemd keeps the file descriptor: {error}");
        }
        // SAFETY: systemd hands it over, and nobody else in this process has looked.
        inherited.insert(name, unsafe { OwnedFd::from_raw_fd(fd) });
    }
    inherited
}
