//! A small file system, to be filled.

use std::fs;
use std::path::Path;
use std::process::Command;

/// A tmpfs, unmounted on drop.
pub struct Disk<'a>(&'a Path);

impl<'a> Disk<'a> {
    pub fn mount(path: &'a Path, size: &str) -> Disk<'a> {
        fs::create_dir_all(path).unwrap();
        let option = format!("size={size}");
        let mounted = Command::new("mount")
            .args(["-t", "tmpfs", "-o", &option, "tmpfs"])
            .arg(path)
            .status();
        assert!(mounted.unwrap().success());
        Disk(path)
    }
}

impl Drop for Disk<'_> {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg("-l").arg(self.0).status();
    }
}
