//! Notifies systemd on a thread of its own: a service manager that does not read its socket must not block the main thread.

use std::thread;

use crossbeam_channel::{Sender, bounded};
use sd_notify::NotifyState;

use crate::error::{Context, Result};
use crate::sys::privileges;

/// How many notifications may wait. Later ones are dropped.
const QUEUE: usize = 16;

/// Sends notifications to systemd; does nothing if systemd did not start the daemon.
#[derive(Clone)]
pub struct Notifier(Sender<String>);

impl Notifier {
    /// Starts the thread. A stop does not wait for it.
    pub fn start() -> Result<Notifier> {
        let (sender, notifications) = bounded::<String>(QUEUE);
        let send = move || {
            privileges::drop_all();
            for notification in notifications {
                let state = NotifyState::Custom(notification.trim_end());
                if let Err(error) = sd_notify::notify(&[state]) {
                    log::debug!("systemd could not be notified: {error}");
                }
            }
        };
        thread::Builder::new()
            .name("notifier".to_owned())
            .spawn(send)
            .context(|| "thread notifier".to_owned())?;
        Ok(Notifier(sender))
    }

    /// Sends the states in one notification.
    pub fn notify(&self, states: &[NotifyState<'_>]) {
        let lines = states.iter().map(|state| format!("{state}\n"));
        if self.0.try_send(lines.collect()).is_err() {
            log::debug!("systemd does not read its notifications");
        }
    }
}
