//! Compiles the eBPF programs.

fn main() {
    #[cfg(feature = "bpf")]
    bpf::build();
}

#[cfg(feature = "bpf")]
mod bpf {
    use std::env;
    use std::path::{Path, PathBuf};

    use libbpf_cargo::SkeletonBuilder;

    pub fn build() {
        println!("cargo:rerun-if-changed=bpf");
        let out = PathBuf::from(env::var_os("OUT_DIR").expect("cargo sets OUT_DIR"));
        let mut arguments = vec!["-Wall".to_owned(), "-Werror".to_owned()];
        // On Debian, asm/types.h is in a directory per architecture; on RHEL it is not.
        let arch = env::var("CARGO_CFG_TARGET_ARCH").expect("cargo sets CARGO_CFG_TARGET_ARCH");
        let multiarch = format!("/usr/include/{arch}-linux-gnu");
        if Path::new(&multiarch).is_dir() {
            arguments.push(format!("-I{multiarch}"));
        }
        for name in ["marker", "sockops", "empty"] {
            let built = SkeletonBuilder::new()
                .source(format!("bpf/{name}.bpf.c"))
                .obj(out.join(format!("{name}.bpf.o")))
                .clang_args(&arguments)
                .build();
            if let Err(error) = built {
                eprintln!(
                    "bpf/{name}.bpf.c: {error:#}\ninstall clang, libelf and the kernel's UAPI headers (make deps), or build with --no-default-features"
                );
                std::process::exit(1);
            }
        }
    }
}
