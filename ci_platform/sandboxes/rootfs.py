"""The root directory of an isolate sandbox: what of the host a command sees. Stdlib only.

Read-only programs of the host, a handful of its settings, and private empty places to write to. Nothing else
of the host has a name in there: no /root, /home, /var, /run, /sys, no sockets, no devices but five.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Sequence
from pathlib import Path

from ci_platform.sandboxes import linux

USER_NAME = "ci"
HOME = "/home/ci"
WORKSPACE = "/workspace"
SCRATCH = "/.scratch"
"""One memory file system for all private places, so that one size limits them together."""

_READ_ONLY = linux.ATTR_RDONLY | linux.ATTR_NOSUID | linux.ATTR_NODEV
_PROGRAMS = ("usr", "bin", "sbin", "lib", "lib32", "lib64", "libx32")
_DEVICES = ("null", "zero", "full", "random", "urandom")
_PRIVATE = {"tmp": "/tmp", "var-tmp": "/var/tmp", "home": HOME, "shm": "/dev/shm"}  # noqa: S108 - the sandbox's own
_SETTINGS = (
    "alternatives",
    "ca-certificates",
    "ca-certificates.conf",
    "crypto-policies",
    "debian_version",
    "fonts",
    "host.conf",
    "inputrc",
    "java-17-openjdk",
    "ld.so.cache",
    "ld.so.conf",
    "ld.so.conf.d",
    "locale.alias",
    "localtime",
    "magic",
    "mime.types",
    "os-release",
    "perl",
    "pki/ca-trust",
    "pki/tls/certs",
    "protocols",
    "python3",
    "python3.11",
    "services",
    "ssl/certs",
    "ssl/openssl.cnf",
    "terminfo",
    "timezone",
)
"""Of /etc, what programs need to start, to speak TLS and to know names, and what never holds a secret."""

_HIDDEN_IN_PROC = (
    "acpi",
    "bus",
    "config.gz",
    "fs",
    "irq",
    "kallsyms",
    "kcore",
    "key-users",
    "keys",
    "kmsg",
    "latency_stats",
    "modules",
    "sched_debug",
    "scsi",
    "slabinfo",
    "sysrq-trigger",
    "timer_list",
    "vmallocinfo",
)


def build(host: str, root: str, toolchains: Sequence[str], uid: int) -> None:
    """Lay out `root` (an empty memory file system) from the host's root directory, seen at `host`."""
    for name in _PROGRAMS:
        _take(f"{host}/{name}", f"{root}/{name}")
    _settings(host, root, uid)
    for path in toolchains:
        if not path.startswith("/usr/"):
            Path(root + path).mkdir(parents=True, exist_ok=True)
            linux.bind(host + path, root + path, _READ_ONLY)
    _devices(host, root)
    _private_places(root, uid)
    for name in ("proc", WORKSPACE[1:]):
        Path(root, name).mkdir()


def path_variable(toolchains: Sequence[str]) -> str:
    """Return PATH for commands: the toolchains first."""
    system = ("/usr/local/sbin", "/usr/local/bin", "/usr/sbin", "/usr/bin", "/sbin", "/bin")
    return ":".join(dict.fromkeys([*(f"{path}/bin" for path in toolchains), *system]))


def mount_proc(root: str) -> None:
    """Mount /proc of the calling process's pid namespace, without the entries that speak of the host."""
    target = f"{root}/proc"
    linux.mount("proc", target, "proc", linux.MS_NOSUID | linux.MS_NODEV | linux.MS_NOEXEC, "hidepid=2")
    linux.bind(f"{target}/sys", f"{target}/sys", linux.ATTR_RDONLY)
    for name in _HIDDEN_IN_PROC:
        entry = Path(target, name)
        if entry.is_dir():
            linux.mount("tmpfs", str(entry), "tmpfs", linux.MS_RDONLY, "size=0,mode=555")
        elif entry.exists():
            linux.bind(f"{root}/dev/null", str(entry), linux.ATTR_RDONLY, recursive=False)


def limit_private_places(root: str, size: int) -> None:
    """Let /tmp, HOME and /dev/shm hold `size` bytes together."""
    flags = linux.MS_REMOUNT | linux.MS_NOSUID | linux.MS_NODEV
    linux.mount("tmpfs", root + SCRATCH, None, flags, f"size={size}")


def mount_point(root: str, place: str, path: str, uid: int) -> str:
    """Return where a job's mount goes, made if it is in the home folder, which is empty. Nothing runs in there yet."""
    if place == "workspace":
        return f"{root}{WORKSPACE}/{path}"
    target = root + HOME
    for name in path.split("/"):
        target += f"/{name}"
        if not Path(target).exists():
            Path(target).mkdir()
            os.chown(target, uid, uid)
    return target


def close(root: str) -> None:
    """Make the root directory itself read-only."""
    fd = os.open(root, os.O_PATH | os.O_CLOEXEC)
    try:
        linux.set_mount_attributes(fd, _READ_ONLY, recursive=False)
    finally:
        os.close(fd)


def _take(source: str, target: str) -> None:
    """Show `source` read-only at `target`: links as links, the rest bound."""
    try:
        mode = os.lstat(source).st_mode
    except OSError:
        return
    if stat.S_ISLNK(mode):
        Path(target).symlink_to(Path(source).readlink())
        return
    _mount_point(target, directory=Path(source).is_dir())
    linux.bind(source, target, _READ_ONLY)


def _mount_point(target: str, *, directory: bool) -> None:
    Path(target).parent.mkdir(parents=True, exist_ok=True)
    if directory:
        Path(target).mkdir(exist_ok=True)
    else:
        Path(target).touch()


def _settings(host: str, root: str, uid: int) -> None:
    etc = Path(root, "etc")
    etc.mkdir()
    for name in _SETTINGS:
        source = _inside(host, f"/etc/{name}")
        if source is not None and os.access(source, os.R_OK):
            _take(source, f"{etc}/{name}")
    texts = {
        "passwd": f"root:x:0:0::/nonexistent:/bin/false\n{USER_NAME}:x:{uid}:{uid}::{HOME}:/bin/sh\n",
        "group": f"root:x:0:\n{USER_NAME}:x:{uid}:\n",
        "hosts": "127.0.0.1 localhost sandbox\n::1 localhost\n",
        "hostname": "sandbox\n",
        "nsswitch.conf": "passwd: files\ngroup: files\nhosts: files dns\n",
    }
    for name, text in texts.items():
        (etc / name).write_text(text)


def _inside(host: str, path: str) -> str | None:
    """Follow links of the host as the host does, although its root is at `host`; None where nothing is."""
    for _ in range(10):
        full = Path(host + path)
        if not full.is_symlink():
            return str(full) if full.exists() else None
        path = os.path.normpath(Path(path).parent / full.readlink())
    return None


def _devices(host: str, root: str) -> None:
    dev = Path(root, "dev")
    dev.mkdir()
    for name in _DEVICES:
        (dev / name).touch()
        linux.bind(
            f"{host}/dev/{name}", f"{dev}/{name}", linux.ATTR_NOSUID | linux.ATTR_NOEXEC, recursive=False
        )
    for name, target in {"fd": "", "stdin": "/0", "stdout": "/1", "stderr": "/2"}.items():
        (dev / name).symlink_to(f"/proc/self/fd{target}")
    (dev / "pts").mkdir()
    try:
        options = "newinstance,ptmxmode=0666,mode=0620"
        linux.mount("devpts", f"{dev}/pts", "devpts", linux.MS_NOSUID | linux.MS_NOEXEC, options)
        (dev / "ptmx").symlink_to("pts/ptmx")
    except OSError:
        # Where a container around us forbids it, commands have no pseudo terminals; all else works.
        pass


def _private_places(root: str, uid: int) -> None:
    scratch = Path(root + SCRATCH)
    scratch.mkdir()
    linux.mount("tmpfs", str(scratch), "tmpfs", linux.MS_NOSUID | linux.MS_NODEV, "mode=0700,size=64m")
    for name, path in _PRIVATE.items():
        (scratch / name).mkdir()
        (scratch / name).chmod(0o1777)
        Path(root + path).mkdir(parents=True, exist_ok=True)
        linux.mount(str(scratch / name), root + path, None, linux.MS_BIND)
    os.chown(root + HOME, uid, uid)
    Path(root + HOME).chmod(0o700)
