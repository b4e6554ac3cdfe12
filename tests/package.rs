//! The RPM that `make rpm` has built: its content is complete, and works.
#![allow(missing_docs)]

mod common;

use std::collections::BTreeSet;
use std::fs;
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use common::daemon::Home;
use common::net::{HERE6, Hosts, THERE6};
use common::sink::Sink;

const VERSION: &str = env!("CARGO_PKG_VERSION");

fn built(folder: &str) -> PathBuf {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("target/rpm")
        .join(folder);
    let found =
        fs::read_dir(&folder).unwrap_or_else(|e| panic!("{}: {e}: make rpm", folder.display()));
    let mut packages = found.map(|entry| entry.unwrap().path());
    let prefix = format!("flowd-rs-{VERSION}-");
    packages
        .find(|path| {
            path.file_name()
                .unwrap()
                .to_str()
                .unwrap()
                .starts_with(&prefix)
        })
        .unwrap()
}

fn package() -> PathBuf {
    built(&format!("RPMS/{}", std::env::consts::ARCH))
}

fn text(output: Output) -> String {
    assert!(
        output.status.success(),
        "{}{}",
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr)
    );
    String::from_utf8(output.stdout).unwrap()
}

fn query(arguments: &[&str]) -> String {
    text(
        Command::new("rpm")
            .arg("-qp")
            .args(arguments)
            .arg(package())
            .output()
            .expect("rpm is installed"),
    )
}

#[test]
fn files_modes_owners_and_dependencies_are_as_listed() {
    let format =
        "[%{FILENAMES} %{FILEMODES:perms} %{FILEUSERNAME}:%{FILEGROUPNAME} %{FILEFLAGS:fflags}\n]";
    let files = query(&["--qf", format]);
    let files: BTreeSet<String> = files
        .lines()
        .map(|l| l.trim_end().replace(".gz ", " "))
        .filter(|l| !l.contains(".build-id"))
        .collect();
    let root = |path: &str, mode: &str| format!("{path} {mode} root:root");
    let mut expected: BTreeSet<String> = [
        ("/etc/flowd", "drwxr-xr-x"),
        ("/usr/bin/flowd-rs", "-rwxr-xr-x"),
        ("/usr/lib/systemd/system/flowd-rs.service", "-rw-r--r--"),
        ("/usr/lib/systemd/system/flowd-rs@.service", "-rw-r--r--"),
        (
            "/usr/lib/systemd/system/flowd-collector.service",
            "-rw-r--r--",
        ),
        ("/usr/lib/sysusers.d/flowd-rs.conf", "-rw-r--r--"),
        ("/usr/lib/tmpfiles.d/flowd-rs.conf", "-rw-r--r--"),
        (
            "/usr/share/bash-completion/completions/flowd-rs",
            "-rw-r--r--",
        ),
        ("/usr/share/zsh/site-functions/_flowd-rs", "-rw-r--r--"),
        ("/usr/share/flowd-rs", "drwxr-xr-x"),
        ("/usr/share/flowd-rs/grafana", "drwxr-xr-x"),
        ("/usr/share/flowd-rs/grafana/flowd-rs.json", "-rw-r--r--"),
        ("/usr/share/flowd-rs/prometheus", "drwxr-xr-x"),
        (
            "/usr/share/flowd-rs/prometheus/flowd-rs.rules.yml",
            "-rw-r--r--",
        ),
    ]
    .into_iter()
    .map(|(path, mode)| root(path, mode))
    .collect();
    // Configuration that an upgrade does not replace, documentation, licence.
    for name in ["flowd.cfg", "collector.cfg"] {
        expected.insert(root(&format!("/etc/flowd/{name}"), "-rw-r--r--") + " cn");
    }
    for page in [
        "man5/flowd.cfg.5",
        "man5/flowd-collector.cfg.5",
        "man8/flowd-collector.8",
        "man8/flowd-reader.8",
        "man7/flowd-rs-migration.7",
        "man8/flowd-rs.8",
        "man8/flowd-reader.8",
    ] {
        expected.insert(root(&format!("/usr/share/man/{page}"), "-rw-r--r--") + " d");
    }
    expected.insert(root("/usr/share/man/man8/flowd.8", "lrwxrwxrwx") + " d");
    let doc = format!("/usr/share/doc/flowd-rs-{VERSION}");
    let of_package =
        |line: &String| line.contains("/usr/share/doc/") || line.contains("/usr/share/licenses/");
    let (others, files): (BTreeSet<_>, BTreeSet<_>) = files.into_iter().partition(of_package);
    assert_eq!(files, expected);
    let short: BTreeSet<&str> = others
        .iter()
        .filter_map(|l| l.split(' ').next()?.rsplit('/').next())
        .collect();
    assert!(
        short.is_superset(&BTreeSet::from(["LICENSE", "README.md", "CHANGELOG.md"])),
        "{others:?} {doc}"
    );

    let lines = |what: &str| {
        query(&[what])
            .lines()
            .map(str::to_owned)
            .collect::<Vec<_>>()
    };
    let requires = lines("--requires");
    for needed in [
        "libelf.so.1()(64bit)",
        "libz.so.1()(64bit)",
        "libc.so.6()(64bit)",
        "systemd",
        "shadow-utils",
        "/bin/sh",
    ] {
        assert!(
            requires.iter().any(|r| r == needed),
            "{needed}: {requires:?}"
        );
    }
    // No libraries of a compiler, and none that are linked by accident.
    let libraries = requires
        .iter()
        .filter_map(|r| r.split_once(".so").map(|(name, _)| name));
    let libraries: BTreeSet<&str> = libraries.collect();
    assert!(
        libraries.is_subset(&BTreeSet::from([
            "libc",
            "libelf",
            "libz",
            "libgcc_s",
            "libm",
            "ld-linux-x86-64",
            "ld-linux-aarch64"
        ])),
        "{libraries:?}"
    );
    assert_eq!(lines("--conflicts"), ["python3-scitags"]);
    assert!(
        lines("--provides")
            .iter()
            .any(|p| p.starts_with("scitags-flowd = "))
    );
}

#[test]
fn scriptlets_are_shell_and_an_upgrade_hands_over() {
    for tag in ["PREIN", "POSTIN", "PREUN", "POSTUN"] {
        let script = query(&["--qf", &format!("%{{{tag}}}")]);
        assert_ne!(script, "(none)", "{tag}");
        let status = Command::new("sh")
            .args(["-n", "-c", &script])
            .status()
            .unwrap();
        assert!(status.success(), "{tag}: {script}");
    }
    for (tag, expected) in [
        ("POSTIN", "preset flowd-rs.service flowd-collector.service "),
        (
            "PREUN",
            "disable --now flowd-rs.service flowd-rs@.service flowd-collector.service ",
        ),
        ("PREUN", "systemctl stop 'flowd-rs@*.service'"),
    ] {
        let script = query(&["--qf", &format!("%{{{tag}}}")]);
        assert!(script.contains(expected), "{tag}: {script}");
    }
    let postun = query(&["--qf", "%{POSTUN}"]);
    assert!(postun.contains("--signal=SIGUSR2"), "{postun}");
    // Run the scriptlet as on an upgrade, with a systemctl that records its arguments.
    let folder = tempfile::tempdir().unwrap();
    let (log, systemctl) = (folder.path().join("log"), folder.path().join("systemctl"));
    fs::write(
        &systemctl,
        format!("#!/bin/sh\necho \"$@\" >> {}\n", log.display()),
    )
    .unwrap();
    fs::set_permissions(&systemctl, fs::Permissions::from_mode(0o755)).unwrap();
    let path = format!(
        "{}:{}",
        folder.path().display(),
        std::env::var("PATH").unwrap()
    );
    let run = |argument: &str| {
        let _ = fs::remove_file(&log);
        let status = Command::new("sh")
            .args(["-c", &postun, "sh", argument])
            .env("PATH", &path)
            .status();
        assert!(status.unwrap().success());
        fs::read_to_string(&log).unwrap_or_default()
    };
    let calls = run("1");
    assert!(
        calls.contains("daemon-reload")
            && calls
                .contains("SIGUSR2 flowd-rs.service flowd-rs@*.service flowd-collector.service"),
        "{calls}"
    );
    assert!(!run("0").contains("SIGUSR2"));
}

#[test]
fn rpmlint_finds_nothing_unexplained() {
    let config = concat!(env!("CARGO_MANIFEST_DIR"), "/rpm/rpmlint.toml");
    let spec = concat!(env!("CARGO_MANIFEST_DIR"), "/rpm/flowd-rs.spec");
    let output = Command::new("rpmlint")
        .args(["--config", config, spec])
        .arg(package())
        .arg(built("SRPMS"))
        .output();
    let output = output.expect("rpmlint is installed");
    let output_text = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(
        output_text.contains(" 0 errors, 0 warnings"),
        "{output_text}"
    );
}

#[test]
#[ignore = "needs root: rpm --root, namespaces"]
fn the_installed_package_runs_unchanged() {
    let root = tempfile::tempdir().unwrap();
    let rpm = |arguments: &[&str]| {
        let output = Command::new("rpm")
            .arg("--root")
            .arg(root.path())
            .args(arguments)
            .output();
        text(output.unwrap())
    };
    rpm(&["--initdb"]);
    // That root has no shell to run the scriptlets.
    rpm(&["-i", "--nodeps", "--noscripts", package().to_str().unwrap()]);
    let verified = Command::new("rpm")
        .arg("--root")
        .arg(root.path())
        .args(["-V", "--nodeps", "flowd-rs"])
        .output();
    assert_eq!(text(verified.unwrap()), "");
    let at = |path: &str| root.path().join(path);
    // The user, the pipe and the directories, as systemd creates them from the package's files.
    fs::create_dir_all(at("sys/fs/bpf")).unwrap();
    for (program, arguments) in [
        ("systemd-sysusers", vec![]),
        ("systemd-tmpfiles", vec!["--create"]),
    ] {
        let output = Command::new(program)
            .arg("--root")
            .arg(root.path())
            .args(arguments)
            .output();
        text(output.unwrap());
    }
    let passwd = fs::read_to_string(at("etc/passwd")).unwrap();
    let user = passwd
        .lines()
        .find(|line| line.starts_with("flowd:"))
        .unwrap();
    let uid: u32 = user.split(':').nth(2).unwrap().parse().unwrap();
    for (path, mode) in [
        ("run/flowd", 0o666),
        ("run/flowd-rs", 0o755),
        ("sys/fs/bpf/flowd-rs", 0o700),
    ] {
        let found = fs::metadata(at(path)).unwrap();
        assert_eq!(
            (found.permissions().mode() & 0o777, found.uid()),
            (mode, uid),
            "{path}"
        );
    }
    assert!(fs::metadata(at("run/flowd")).unwrap().file_type().is_fifo());
    let output = Command::new("systemd-analyze")
        .args(["verify", "--man=no", "--root"])
        .arg(root.path())
        .args(["flowd-rs.service", "flowd-collector.service"])
        .output();
    let output_text = String::from_utf8(output.unwrap().stderr).unwrap();
    // Ignore missing files of systemd and util-linux.
    let is_own = |line: &&str| !line.contains("sysinit.target") && !line.contains("/bin/kill");
    let ours = output_text.lines().filter(|line| line.contains("flowd-"));
    let ours: Vec<&str> = ours.filter(is_own).collect();
    assert!(ours.is_empty(), "{output_text}");
    for page in [
        "man8/flowd-rs.8",
        "man8/flowd.8",
        "man8/flowd-reader.8",
        "man5/flowd.cfg.5",
        "man5/flowd-collector.cfg.5",
        "man8/flowd-collector.8",
        "man8/flowd-reader.8",
        "man7/flowd-rs-migration.7",
    ] {
        let page = at("usr/share/man").join(page);
        let there = page.exists()
            || page
                .with_extension(format!(
                    "{}.gz",
                    page.extension().unwrap().to_str().unwrap()
                ))
                .exists();
        assert!(there, "{}", page.display());
    }

    // The daemon with the packaged configuration: the pipe, and fireflies to destinations.
    let hosts = Hosts::new();
    let sink = Sink::bind(&hosts.there, &format!("[{THERE6}]:10514"));
    let home = Home::with("");
    fs::copy(at("etc/flowd/flowd.cfg"), home.path("flowd.cfg")).unwrap();
    let mut command = hosts.here.command("unshare");
    let mounts =
        "for dir in /var/lib /var/cache /run; do mount -t tmpfs none $dir; done; exec \"$@\"";
    command
        .args(["--mount", "sh", "-c", mounts, "sh"])
        .arg(at("usr/bin/flowd-rs"));
    let daemon = home.start_command(command, &[]);
    let pipe = format!("/proc/{}/root/run/flowd", daemon.child.id());
    fs::write(&pipe, format!("start tcp {HERE6} 1 {THERE6} 2 cms Cache\n")).unwrap();
    assert_eq!(sink.firefly().json["context"]["experiment-id"], 3);
    let version = Command::new(at("usr/bin/flowd-rs"))
        .arg("version")
        .output()
        .unwrap();
    assert_eq!(text(version), format!("flowd-rs {VERSION}\n"));
    daemon.stop();
    rpm(&["-e", "--noscripts", "flowd-rs"]);
    assert!(!at("usr/bin/flowd-rs").exists());
}
