//! The file of templates and sampling in the state directory: exporters repeat theirs every few minutes only, and what
//! they send meanwhile could not be read after a restart.

use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use jiff::Timestamp;

use crate::collector::exporters::Exporters;
use crate::sys::directory::Directory;
use crate::sys::stop::Stop;
use crate::sys::waiter::Waiter;

/// The name in the state directory.
const NAME: &str = "templates";
/// How long after a change the file is written, at the latest.
const SAVE_INTERVAL: Duration = Duration::from_secs(2);
/// The largest file that is read, in bytes: the limit of all templates, as text.
const MAX_SIZE: u64 = 1 << 30;

/// The file.
#[derive(Clone)]
pub struct TemplatesFile {
    state_dir: PathBuf,
    exporters: Arc<Exporters>,
    /// Counts up with every change.
    changes: Arc<AtomicUsize>,
}

impl TemplatesFile {
    /// Reads the file into `exporters`. What cannot be read is logged, and costs the templates in it only.
    pub fn open(state_dir: &Path, exporters: &Arc<Exporters>, now: Timestamp) -> TemplatesFile {
        let file = TemplatesFile {
            state_dir: state_dir.to_owned(),
            exporters: Arc::clone(exporters),
            changes: Arc::default(),
        };
        let shown = state_dir.join(NAME);
        let shown = shown.display();
        match file.read() {
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => log::warn!("{shown}: {error}; templates of earlier are not known"),
            Ok(bytes) => match exporters.restore(&bytes, now.as_second().max(0) as u64) {
                Ok(restored) => {
                    let entries = restored.entries;
                    log::info!("restored {entries} templates and intervals from {shown}");
                    if restored.damaged > 0 {
                        let damaged = restored.damaged;
                        log::warn!("{shown}: {damaged} damaged lines were skipped");
                    }
                }
                Err(error) => log::warn!("{shown}: {error}"),
            },
        }
        file
    }

    /// Whoever changes a template adds to it.
    pub fn changes(&self) -> Arc<AtomicUsize> {
        Arc::clone(&self.changes)
    }

    fn read(&self) -> io::Result<Vec<u8>> {
        let mut bytes = Vec::new();
        let file = Directory::open(&self.state_dir)?.read(NAME)?;
        file.take(MAX_SIZE).read_to_end(&mut bytes)?;
        Ok(bytes)
    }

    /// Writes the file.
    pub fn save(&self) {
        let write = || {
            let directory = Directory::open(&self.state_dir)?;
            let new = format!("{NAME}.new");
            let _ = directory.remove(&new);
            let mut file = directory.create_new(&new)?;
            file.write_all(&self.exporters.save())?;
            file.sync_data()?;
            directory.rename(&new, NAME)
        };
        if let Err(error) = write() {
            let shown = self.state_dir.join(NAME);
            log::warn!(
                "{}: {error}; templates are not kept over a restart",
                shown.display()
            );
        }
    }

    /// Writes the file soon after each change, until `stop` is set. Also lets old templates expire.
    pub fn keep_saved(&self, stop: &Stop) {
        let Ok(mut waiter) = Waiter::new() else {
            return;
        };
        let _ = waiter.watch(stop);
        let mut saved = self.changes.load(Ordering::Relaxed);
        while !stop.is_set() {
            let _ = waiter.wait(Some(SAVE_INTERVAL));
            self.exporters
                .expire(Timestamp::now().as_second().max(0) as u64);
            let changes = self.changes.load(Ordering::Relaxed);
            if changes != saved {
                saved = changes;
                self.save();
            }
        }
    }
}
