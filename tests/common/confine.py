"""Runs a command as a systemd unit would: confine.py UNIT COMMAND...

Applies the user (as a number), capabilities, no_new_privs, the system call filter, address families, W^X, a read-only
file system with the directories of the unit, and its restrictions of /proc and /sys. Needs root and python3-seccomp.
"""

import ctypes
import os
import stat
import subprocess
import sys

import seccomp

USER = 64123


def settings(unit):
    found = {}
    for line in open(unit):
        key, equals, value = line.strip().partition("=")
        if equals and not key.startswith("#"):
            found.setdefault(key, []).append(value)
    return found


def calls(group):
    """The system calls of one of systemd's groups."""
    out = subprocess.check_output(["systemd-analyze", "syscall-filter", group], text=True)
    names = set()
    for word in (line.strip() for line in out.splitlines()[1:]):
        if word.startswith("@"):
            names |= calls(word)
        elif word and not word.startswith("#"):
            names.add(word)
    return names


def allowed(unit):
    names = set()
    for line in unit["SystemCallFilter"]:
        words = line.lstrip("~").split()
        of = set().union(*(calls(w) if w.startswith("@") else {w} for w in words))
        names = names - of if line.startswith("~") else names | of
    return names


def mount(*arguments):
    subprocess.run(["mount", *arguments], check=True)


def file_system(unit):
    if ctypes.CDLL(None, use_errno=True).unshare(0x00020000) != 0:  # CLONE_NEWNS
        raise OSError(ctypes.get_errno(), "unshare")
    mount("--make-rprivate", "/")
    mount("-t", "tmpfs", "-o", "mode=755", "tmpfs", "/run")
    # systemd mounts it for root only.
    mount("-t", "bpf", "-o", "mode=700", "bpf", "/sys/fs/bpf")
    writable = []
    for key, base in [("StateDirectory", "/var/lib"), ("CacheDirectory", "/var/cache"), ("RuntimeDirectory", "/run")]:
        writable.append(f"{base}/{unit[key][0]}")
    for path in writable:
        os.makedirs(path, exist_ok=True)
        if path.startswith("/var"):
            mount("-t", "tmpfs", "tmpfs", path)
        else:
            mount("--bind", path, path)
        os.chown(path, USER, USER)
        os.chmod(path, stat.S_IRWXU | stat.S_IRGRP | stat.S_IXGRP | stat.S_IROTH | stat.S_IXOTH)
    if "run" in sys.argv:
        prepare(unit)
    for path in (path.lstrip("-") for path in unit["ReadWritePaths"]):
        if os.path.exists(path):
            mount("--bind", path, path)
            writable.append(path)
    mount("-t", "proc", "-o", "subset=pid,hidepid=invisible", "proc", "/proc")
    for line in open("/proc/self/mounts"):
        path = line.split()[1].replace("\\040", " ")
        if path.startswith("/dev") or path == "/proc" or path in writable:
            continue
        # Fails for a mount point hidden below another mount, which cannot be written to either.
        subprocess.run(["mount", "-o", "remount,bind,ro", path], stderr=subprocess.DEVNULL)


def prepare(unit):
    """Runs ExecStartPre=, with full privileges."""
    (line,) = unit["ExecStartPre"]
    assert line.startswith("+-/usr/bin/flowd-rs prepare -c "), line
    program, config = sys.argv[2], sys.argv[sys.argv.index("-c") + 1]
    subprocess.run([program, "prepare", "-c", config, "--user", str(USER)], check=True)


def system_calls(unit):
    filter = seccomp.SyscallFilter(seccomp.ERRNO(1))  # EPERM, SystemCallErrorNumber
    for name in sorted(allowed(unit) - {"socket", "mmap", "mprotect"}):
        try:
            filter.add_rule(seccomp.ALLOW, name)
        except (ValueError, RuntimeError):
            pass  # A call of another architecture, or one newer than libseccomp.
    families = {"AF_UNIX": 1, "AF_INET": 2, "AF_INET6": 10, "AF_NETLINK": 16}
    for family in unit["RestrictAddressFamilies"][0].split():
        filter.add_rule(seccomp.ALLOW, "socket", seccomp.Arg(0, seccomp.EQ, families[family]))
    for protection in (0, 2, 4):  # Neither, PROT_WRITE or PROT_EXEC, not both.
        filter.add_rule(seccomp.ALLOW, "mmap", seccomp.Arg(2, seccomp.MASKED_EQ, 6, protection))
    filter.add_rule(seccomp.ALLOW, "mprotect", seccomp.Arg(2, seccomp.MASKED_EQ, 4, 0))
    filter.load()


def main():
    unit = settings(sys.argv[1])
    if os.getuid() == 0:
        file_system(unit)
        capabilities = ",".join("+" + c[4:].lower() for c in unit["AmbientCapabilities"][0].split())
        bounding = ",".join("+" + c[4:].lower() for c in unit["CapabilityBoundingSet"][0].split())
        os.umask(int(unit["UMask"][0], 8))
        user = ["--reuid", str(USER), "--regid", str(USER), "--clear-groups", "--no-new-privs"]
        bounds = ["--bounding-set", "-all," + bounding]
        held = ["--inh-caps", "-all," + capabilities, "--ambient-caps", "-all," + capabilities]
        os.execvp("setpriv", ["setpriv", *user, *bounds, *held, sys.executable, *sys.argv])
    system_calls(unit)
    os.execvp(sys.argv[2], sys.argv[2:])


main()
