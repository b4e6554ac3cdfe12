//! `BPF_PROG_RUN`: runs the marker program on given frames, without a network.

#![allow(dead_code, missing_docs)]

use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use flowd_rs::scitag::Strategy;
use flowd_rs::sys::marker::{Program, Settings};
use libbpf_rs::{MapCore, MapFlags, MapHandle, ObjectBuilder, libbpf_sys};
use tempfile::TempDir;

/// A bpffs for one test. Dropping it unmounts the file system.
pub struct BpfFs(pub TempDir);

impl BpfFs {
    pub fn new() -> BpfFs {
        BpfFs::mount(tempfile::tempdir().unwrap())
    }

    /// Mounted on a path where only root can create files.
    pub fn of_root() -> BpfFs {
        BpfFs::mount(tempfile::tempdir_in("/run").unwrap())
    }

    fn mount(dir: TempDir) -> BpfFs {
        let mounted = Command::new("mount")
            .args(["-t", "bpf", "bpffs"])
            .arg(dir.path())
            .status();
        assert!(mounted.unwrap().success());
        BpfFs(dir)
    }

    pub fn path(&self) -> &Path {
        self.0.path()
    }
}

impl Drop for BpfFs {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg("-l").arg(self.0.path()).status();
    }
}

/// A tc program that returns at once.
pub fn empty_program() -> OwnedFd {
    let object = include_bytes!(concat!(env!("OUT_DIR"), "/empty.bpf.o"));
    let object = ObjectBuilder::default()
        .open_memory(object)
        .unwrap()
        .load()
        .unwrap();
    let program = object.progs().next().unwrap();
    program.as_fd().try_clone_to_owned().unwrap()
}

/// The pinned array with the program that writes labels in place.
pub fn writer(bpffs: &BpfFs) -> MapHandle {
    MapHandle::from_pinned_path(bpffs.path().join("flowd-rs/v1/writer")).unwrap()
}

/// The id of the program in the array.
pub fn written_by(writer: &MapHandle) -> Option<u32> {
    let id = writer.lookup(&[0; 4], MapFlags::ANY).unwrap()?;
    Some(u32::from_ne_bytes(id.try_into().unwrap()))
}

/// Puts a program in the place of the one that writes labels.
pub fn replace_writer(writer: &MapHandle, program: &OwnedFd) {
    let fd = program.as_raw_fd().to_ne_bytes();
    writer.update(&[0; 4], &fd, MapFlags::ANY).unwrap();
}

pub fn settings(bpffs: &BpfFs, strategy: Strategy) -> Settings {
    Settings {
        program_path: None,
        strategy,
        match_all: false,
        debug: false,
        priority: 10,
        bpf_fs_path: bpffs.path().to_owned(),
    }
}

pub fn load(settings: &Settings) -> Program {
    Program::load(settings, 1000, &[7; 16]).unwrap()
}

pub struct Ran {
    pub frame: Vec<u8>,
    pub verdict: u32,
    /// The average of one run.
    pub duration: Duration,
}

/// Runs a program on a frame `repeat` times, to measure the duration. Returns the frame of the last run.
pub fn run(program: &OwnedFd, frame: &[u8], repeat: i32) -> Ran {
    let mut out = vec![0u8; frame.len() + 256];
    let mut options = libbpf_sys::bpf_test_run_opts {
        sz: size_of::<libbpf_sys::bpf_test_run_opts>() as libbpf_sys::size_t,
        data_in: frame.as_ptr().cast(),
        data_size_in: frame.len() as u32,
        data_out: out.as_mut_ptr().cast(),
        data_size_out: out.len() as u32,
        repeat,
        ..Default::default()
    };
    // SAFETY: input and output have the lengths given, and live until the call returns.
    let result = unsafe { libbpf_sys::bpf_prog_test_run_opts(program.as_raw_fd(), &mut options) };
    assert_eq!(result, 0, "BPF_PROG_RUN");
    out.truncate(options.data_size_out as usize);
    Ran {
        frame: out,
        verdict: options.retval,
        duration: Duration::from_nanos(options.duration.into()),
    }
}
