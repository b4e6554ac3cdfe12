//! Access to the kernel and to the system. All `unsafe` code of the program is here.

pub mod clock;
#[cfg(feature = "bpf")]
pub mod clsact;
pub mod directory;
pub mod fifo;
pub mod handover;
pub mod http_client;
pub mod interfaces;
#[cfg(feature = "bpf")]
pub mod mark_maps;
#[cfg(feature = "bpf")]
pub mod marker;
pub mod ownership;
pub mod privileges;
pub mod raw_udp;
pub mod resolver;
pub mod scanner;
pub mod sock_diag;
#[cfg(feature = "bpf")]
pub mod sockops;
pub mod state_dir;
pub mod stop;
pub mod udp;
pub mod udp_receiver;
pub mod waiter;
