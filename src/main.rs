//! The program: see the manual page, flowd-rs(8).

use std::process::ExitCode;

fn main() -> ExitCode {
    flowd_rs::cli::main()
}
