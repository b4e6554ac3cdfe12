//! Shared by the benches: table rows, medians, a fast receiver, CPU time and memory of the daemon.
#![allow(dead_code, missing_docs)]

pub mod reader;

use std::fs;
use std::io::IoSliceMut;
use std::net::UdpSocket;
use std::os::fd::AsRawFd;
use std::time::{Duration, Instant};

use nix::sys::socket::{MsgFlags, MultiHeaders, SockaddrIn6, recvmmsg};

use crate::common::daemon::Daemon;

pub fn row(measurement: &str, result: &str, baseline: &str, ratio: &str) {
    println!("| {measurement} | {result} | {baseline} | {ratio} |");
}

pub fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

/// Receives until `count` datagrams have arrived, or none arrives for a second. Returns how many, and when the last one
/// arrived.
pub fn receive(socket: &UdpSocket, count: usize) -> (usize, Instant) {
    const BATCH: usize = 64;
    socket
        .set_read_timeout(Some(Duration::from_secs(1)))
        .unwrap();
    let mut buffers = vec![[0u8; 2048]; BATCH];
    let mut headers = MultiHeaders::<SockaddrIn6>::preallocate(BATCH, None);
    let (mut received, mut last) = (0, Instant::now());
    while received < count {
        let mut slices: Vec<_> = buffers.iter_mut().map(|b| [IoSliceMut::new(b)]).collect();
        match recvmmsg(
            socket.as_raw_fd(),
            &mut headers,
            slices.iter_mut(),
            MsgFlags::MSG_WAITFORONE,
            None,
        ) {
            Ok(messages) => {
                received += messages.count();
                last = Instant::now();
            }
            Err(nix::errno::Errno::EINTR) => {}
            Err(_) => break,
        }
    }
    (received, last)
}

/// User and system time of the process, in seconds.
pub fn cpu(daemon: &Daemon<'_>) -> (f64, f64) {
    cpu_times(daemon.child.id())
}

/// User and system time of a process together, in seconds.
pub fn cpu_of(process: u32) -> f64 {
    let (user, system) = cpu_times(process);
    user + system
}

fn cpu_times(process: u32) -> (f64, f64) {
    let stat = fs::read_to_string(format!("/proc/{process}/stat")).unwrap();
    let fields: Vec<&str> = stat[stat.rfind(')').unwrap()..]
        .split_whitespace()
        .collect();
    let ticks = |n: usize| fields[n].parse::<f64>().unwrap() / 100.0;
    (ticks(12), ticks(13))
}

/// Resident memory in bytes.
pub fn resident(daemon: &Daemon<'_>) -> f64 {
    resident_of(daemon.child.id())
}

/// Resident memory of a process in bytes.
pub fn resident_of(process: u32) -> f64 {
    let status = fs::read_to_string(format!("/proc/{process}/status")).unwrap();
    let line = status.lines().find(|l| l.starts_with("VmRSS:")).unwrap();
    line.split_whitespace()
        .nth(1)
        .unwrap()
        .parse::<f64>()
        .unwrap()
        * 1024.0
}
