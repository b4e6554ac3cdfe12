//! What touches the kernel. All `unsafe` of the program lives here.

pub mod fifo;
pub mod resolver;
pub mod state_dir;
pub mod stop;
pub mod udp;
