"""Program: try in a private mount namespace what workspaces need of overlayfs. Stdlib only; prints why not.

Arguments: a folder on the file system to try, and `privileged` (plain mount, `trusted` xattrs) or
`unprivileged` (in a user namespace, `user` xattrs). Exits 0 where everything worked.
"""

from __future__ import annotations

import ctypes
import os
import stat
import sys
import tempfile
from pathlib import Path

CLONE_NEWNS, CLONE_NEWUSER = 0x20000, 0x10000000
MS_REC, MS_PRIVATE = 0x4000, 0x40000


def main() -> None:
    """Mount, delete a file, replace a directory, look at what the upper layer holds then."""
    folder, kind = sys.argv[1], sys.argv[2]
    libc = ctypes.CDLL(None, use_errno=True)
    uid, gid = os.geteuid(), os.getegid()
    unprivileged = kind == "unprivileged"
    _check(libc.unshare(CLONE_NEWNS | (CLONE_NEWUSER if unprivileged else 0)), "unshare")
    if unprivileged:
        Path("/proc/self/setgroups").write_text("deny", encoding="ascii")
        Path("/proc/self/uid_map").write_text(f"0 {uid} 1", encoding="ascii")
        Path("/proc/self/gid_map").write_text(f"0 {gid} 1", encoding="ascii")
    _check(libc.mount(b"none", b"/", None, MS_REC | MS_PRIVATE, None), "make mounts private")
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        _try(libc, Path(scratch), "userxattr,volatile" if unprivileged else "volatile")


def _try(libc: ctypes.CDLL, scratch: Path, extra: str) -> None:
    lower, upper, work, merged = (scratch / name for name in ("lower", "upper", "work", "merged"))
    for path in (lower, upper, work, merged):
        path.mkdir()
    (lower / "file").write_text("x", encoding="ascii")
    (lower / "folder").mkdir()
    (lower / "folder" / "file").write_text("x", encoding="ascii")
    options = f"lowerdir={lower},upperdir={upper},workdir={work},{extra}".encode()
    _check(libc.mount(b"overlay", bytes(merged), b"overlay", 0, options), "mount overlay")
    try:
        (merged / "file").unlink()
        (merged / "folder" / "file").unlink()
        (merged / "folder").rmdir()
        (merged / "folder").mkdir()
        if list((merged / "folder").iterdir()):
            raise SystemExit("a replaced directory shows its old files")
    finally:
        _check(libc.umount2(bytes(merged), 0), "umount")
    found = (upper / "file").lstat()
    if not stat.S_ISCHR(found.st_mode) or found.st_rdev != 0:
        raise SystemExit("a deletion left no whiteout device")
    os.chmod(work / "work", 0o700)  # noqa: PTH101 - overlayfs leaves it without permissions


def _check(result: int, what: str) -> None:
    if result != 0:
        raise SystemExit(f"{what}: {os.strerror(ctypes.get_errno())}")


if __name__ == "__main__":
    try:
        main()
    except OSError as error:
        raise SystemExit(str(error)) from error
