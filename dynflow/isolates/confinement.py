"""Every restriction of an isolate once, each with its reason. Stdlib only; runs inside the zygote.

Walls go up in this order, each covering for a mistake in another (isolates.md, part B, says which attack meets
which wall): namespaces and an empty root around the zygote; around each child a pid and an ipc namespace, a
uid of its own, no capability, limits, Landlock, and last the system-call filter.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import resource
import signal
import sysconfig
from collections.abc import Callable, Iterable, Iterator, Mapping

from dynflow.isolates import guest, seccomp, syscalls

WALLS: Mapping[str, str] = {
    "namespaces": "no other process, no network, no host name, no shared memory is there to be reached",
    "filesystem": "a read-only root with nothing but Python's standard library and time zones",
    "identity": "a uid of its own where the host is root, and no capability",
    "limits": "no file can grow, no core is dumped, few descriptors, memory as the worker's limits say",
    "cgroup": "all isolates of a loader together have an end: memory, tasks, a share of the CPU",
    "landlock": "the kernel itself refuses other files, TCP and signals, should the root ever leak",
    "seccomp": "sixty system calls are answered, none of which starts or reaches anything",
}
ESSENTIAL = frozenset({"namespaces", "filesystem", "identity", "limits", "seccomp"})

# A range of host uids that nobody is given by default: above /etc/subuid's usual ranges, below 2**31.
_HOST_IDS = 1_879_048_192
_ID_COUNT = 65_536
_FIRST_UID, _LAST_UID = 1_000, 60_000
_DESCRIPTORS = 64
_STACK = 8 * 1024 * 1024
# Seconds of CPU in the life of one isolate: the last resort against code that lies to the watchdog.
_CPU = 600


class WallError(Exception):
    """The wall `wall` cannot be put up here; the message says which, why, and what to do."""

    def __init__(self, wall: str, message: str) -> None:
        super().__init__(message)
        self.wall = wall


def join_group(folders: Iterable[str]) -> bool:
    """Move this process into control groups, before it is anything else; return whether it is in all of them."""
    try:
        for folder in folders:
            _write(f"{folder}/cgroup.procs", "0")
    except OSError:
        return False
    return True


def die_with_parent() -> None:
    """Have the kernel kill this process when its parent ends."""
    syscalls.set_parent_death_signal(signal.SIGKILL)


def raise_outer_walls(walls: frozenset[str]) -> bool:
    """Enter new namespaces; the next fork is pid 1. Returns whether many uids are mapped. Raises WallError."""
    if "namespaces" not in walls:
        return False
    flags = syscalls.CLONE_NEWUSER | syscalls.CLONE_NEWNS | syscalls.CLONE_NEWPID | syscalls.CLONE_NEWNET
    flags |= syscalls.CLONE_NEWIPC | syscalls.CLONE_NEWUTS | syscalls.CLONE_NEWCGROUP
    with _wall("namespaces"):
        return enter_namespaces(flags, id_count=_ID_COUNT)


def enter_namespaces(flags: int, *, id_count: int, host_ids: int = _HOST_IDS) -> bool:
    """Leave for new namespaces, a user namespace among them, with ids mapped.

    Root maps `id_count` ids from `host_ids` on (returns True); anybody else maps only their own, to 0.
    """
    uid, gid = os.geteuid(), os.getegid()
    if uid == 0 and _unshare_with_map(flags, f"0 {host_ids} {id_count}"):
        return True
    if uid != 0:
        syscalls.unshare(flags)
    _write("/proc/self/setgroups", "deny")
    _write("/proc/self/uid_map", f"0 {uid} 1")
    _write("/proc/self/gid_map", f"0 {gid} 1")
    return False


def _unshare_with_map(flags: int, ids: str) -> bool:
    # Only a process outside of the new namespace may map more than itself: a helper that stays behind.
    ready_read, ready_write = os.pipe()
    parent = os.getpid()
    helper = os.fork()
    if helper == 0:
        code = 1
        os.close(ready_write)  # so that the read ends where the parent gives up
        with contextlib.suppress(OSError):
            if os.read(ready_read, 1):
                _write(f"/proc/{parent}/uid_map", ids)
                _write(f"/proc/{parent}/gid_map", ids)
                code = 0
        os._exit(code)
    try:
        syscalls.unshare(flags)
        os.write(ready_write, b"1")
    finally:
        os.close(ready_read)
        os.close(ready_write)
        _, status = os.waitpid(helper, 0)
    return status == 0


def raise_inner_walls(walls: frozenset[str], *, own_uids: bool) -> ChildWalls:
    """Give the zygote, pid 1 by now, a root of its own; return the walls for its children. Raises WallError."""
    guest.measure_address_space()
    if "identity" in walls:
        syscalls.drop_bounding_set()  # for the children, who inherit it: forty calls less in each
    if "limits" in walls:
        _set_limits(_LIMITS)  # likewise
    syscalls.set_no_new_privileges()  # likewise
    own_pid_namespace = (
        os.open("/proc/self/ns/pid", os.O_RDONLY | os.O_CLOEXEC) if "namespaces" in walls else None
    )
    if "filesystem" in walls:
        with _wall("filesystem"):
            enter_empty_root(readable_paths())
    with _wall("seccomp"):
        return ChildWalls(walls, own_uids=own_uids, own_pid_namespace=own_pid_namespace)


def readable_paths() -> list[str]:
    """Return the folders that isolates may read: the standard library and the time zones."""
    paths = sysconfig.get_paths()
    found = dict.fromkeys([paths["stdlib"], paths["platstdlib"], "/usr/share/zoneinfo"])
    return [path for path in found if os.path.isdir(path)]  # noqa: PTH112 - no pathlib in this process


def enter_empty_root(readable: list[str]) -> None:
    """Make a root that holds `readable`, read-only and where it was, and nothing else."""
    syscalls.mount("none", "/", None, syscalls.MS_REC | syscalls.MS_PRIVATE)
    # Opened while this process is still the host's root, who alone may look into /root; bound after that.
    sources = [(path, os.open(path, os.O_PATH | os.O_CLOEXEC)) for path in readable]
    become_root_inside()
    new = "/tmp"  # noqa: S108 - only a place to mount over, in a mount namespace of our own
    safe = syscalls.MS_NOSUID | syscalls.MS_NODEV
    syscalls.mount("tmpfs", new, "tmpfs", safe | syscalls.MS_NOEXEC, "mode=755,size=64k,nr_inodes=256")
    for path, fd in sources:
        os.makedirs(new + path, exist_ok=True)  # noqa: PTH103
        bind_read_only(f"/proc/self/fd/{fd}", new + path)
        os.close(fd)
        for hidden in ("site-packages", "dist-packages"):
            if os.path.isdir(f"{new}{path}/{hidden}"):  # noqa: PTH112
                syscalls.mount(
                    "tmpfs", f"{new}{path}/{hidden}", "tmpfs", safe | syscalls.MS_RDONLY, "size=4k"
                )
    syscalls.mount("none", new, None, syscalls.MS_REMOUNT | syscalls.MS_BIND | syscalls.MS_RDONLY | safe)
    syscalls.pivot_root(new)


def bind_read_only(source: str, target: str) -> None:
    """Show `source` at `target`, without writing, set-user-id and devices."""
    syscalls.mount(source, target, None, syscalls.MS_BIND | syscalls.MS_REC)
    # A user namespace may not take away flags that the mount came with.
    inherited = syscalls.MS_NOEXEC if os.statvfs(target).f_flag & os.ST_NOEXEC else 0
    flags = syscalls.MS_RDONLY | syscalls.MS_NOSUID | syscalls.MS_NODEV | inherited
    syscalls.mount("none", target, None, syscalls.MS_REMOUNT | syscalls.MS_BIND | flags)


def become_root_inside() -> None:
    """Take uid and gid 0 of the own user namespace (a nobody outside)."""
    with contextlib.suppress(PermissionError):  # where only one id is mapped, groups cannot be changed
        os.setgroups([])
    os.setresgid(0, 0, 0)
    os.setresuid(0, 0, 0)


class ChildWalls:
    """The walls around each child of a zygote: `prepare` and `restore` around the fork, `confine` in the child."""

    def __init__(self, walls: frozenset[str], *, own_uids: bool, own_pid_namespace: int | None) -> None:
        self._walls, self._own_uids, self._own_pid_namespace = walls, own_uids, own_pid_namespace
        readable = readable_paths() if "filesystem" not in walls else ["/"]
        # Made once, and inherited: that takes a child half of the time of all walls.
        self._ruleset = syscalls.landlock_ruleset(readable) if "landlock" in walls else None
        self._filter = syscalls.SeccompFilter(seccomp.isolate_filter()) if "seccomp" in walls else None
        self._uids = itertools.cycle(range(_FIRST_UID, _LAST_UID))
        self._uid_of: dict[int, int] = {}
        missing = {"cgroup"} if syscalls.landlock_abi() else {"cgroup", "landlock"}
        self.names = sorted(walls - missing)  # that of the host's making, the cgroup, it knows itself

    def prepare(self) -> int:
        """Make the next fork pid 1 of a new namespace; return the uid that it shall have."""
        if "namespaces" in self._walls:
            syscalls.unshare(syscalls.CLONE_NEWPID | syscalls.CLONE_NEWIPC)
        return next(uid for uid in self._uids if uid not in self._uid_of.values())

    def restore(self, pid: int, uid: int) -> None:
        """Make later forks children of the zygote's own namespace again; `uid` is taken while `pid` lives."""
        self._uid_of[pid] = uid
        self.leave_namespace()

    def leave_namespace(self) -> None:
        """Make later forks children of the zygote's own namespace again."""
        if self._own_pid_namespace is not None:
            syscalls.setns(self._own_pid_namespace, syscalls.CLONE_NEWPID)

    def release(self, pid: int) -> None:
        """Say that `pid` has ended."""
        self._uid_of.pop(pid, None)

    def keep_only_descriptors(self, fd: int) -> None:
        """Make `fd` descriptor 3 and close all others but 0 to 2, which are /dev/null, and what `confine` needs."""
        if fd != 3:
            os.dup2(fd, 3, inheritable=False)
        first = 4
        if self._ruleset is not None:
            os.closerange(first, self._ruleset)
            first = self._ruleset + 1
        os.closerange(first, 1 << 20)

    def confine(self, uid: int) -> None:
        """Put the walls around this process. Raises OSError; then it must end."""
        if "identity" in self._walls:
            if self._own_uids:
                os.setresgid(uid, uid, uid)
                os.setresuid(uid, uid, uid)
            syscalls.drop_capabilities()
        if self._walls:
            syscalls.set_undumpable()
        die_with_parent()  # after the change of uid, which takes it back
        if "limits" in self._walls:
            _set_limits(_CHILD_LIMITS)
        if self._ruleset is not None:
            syscalls.landlock_restrict(self._ruleset)
            os.close(self._ruleset)
        if self._filter is not None:
            self._filter.load()


# Of the zygote too, so that children inherit them.
_LIMITS = {
    resource.RLIMIT_CORE: 0,
    resource.RLIMIT_FSIZE: 0,
    resource.RLIMIT_MEMLOCK: 0,
    resource.RLIMIT_MSGQUEUE: 0,
    resource.RLIMIT_NOFILE: _DESCRIPTORS,
    resource.RLIMIT_STACK: _STACK,
}
_CHILD_LIMITS = {resource.RLIMIT_CPU: _CPU, resource.RLIMIT_NPROC: 0}


def _set_limits(limits: Mapping[int, int]) -> None:
    for which, limit in limits.items():
        hard = resource.getrlimit(which)[1]
        value = limit if hard == resource.RLIM_INFINITY else min(limit, hard)
        resource.setrlimit(which, (value, value))


def probe() -> dict[str, str]:
    """Put up every wall, in processes of its own; return for each whether it stands and what it lacks."""
    every = frozenset(WALLS) - {"cgroup"}  # which the host makes
    found = _in_a_child(lambda: _probe(every))
    if not found.get("namespaces", "").startswith("up"):
        rest = every - {"namespaces", "filesystem"}
        found |= {"filesystem": "missing: it takes the namespaces", **_in_a_child(lambda: _probe(rest))}
    return {**dict.fromkeys(every, "missing: not tried, because of another"), **found}


def _probe(walls: frozenset[str]) -> dict[str, str]:
    try:
        own_uids = raise_outer_walls(walls)
    except WallError as error:
        return {"namespaces": f"missing: {error}"}
    # After that the next fork is the first in its namespace.
    found = _in_a_child(lambda: _probe_inside(walls, own_uids=own_uids))
    return {"namespaces": "up", **found} if "namespaces" in walls else found


def _in_a_child(probing: Callable[[], dict[str, str]]) -> dict[str, str]:
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(read)
        try:
            os.write(write, json.dumps(probing()).encode())
        finally:
            os._exit(0)
    os.close(write)
    with open(read, "rb") as file:  # noqa: PTH123 - a pipe has no path
        told = file.read()
    os.waitpid(pid, 0)
    found: dict[str, str] = json.loads(told or b"{}")
    return found


def _probe_inside(walls: frozenset[str], *, own_uids: bool) -> dict[str, str]:
    missing: dict[str, str] = {}
    try:
        child_walls = raise_inner_walls(walls, own_uids=own_uids)
    except WallError as error:
        missing[error.wall] = f"missing: {error}"
        child_walls = raise_inner_walls(walls - missing.keys(), own_uids=own_uids)
    abi = syscalls.landlock_abi()
    try:
        child_walls.confine(child_walls.prepare())
    except OSError as error:
        missing["seccomp"] = f"missing: {error}"
    found = {
        "filesystem": "up",
        "identity": "up"
        if own_uids
        else "up, but all isolates share this user's uid: only root can give each its own",
        "limits": "up",
        "landlock": _describe_landlock(abi),
        "seccomp": "up",
    }
    return {name: missing.get(name, state) for name, state in found.items() if name in walls}


def _describe_landlock(abi: int) -> str:
    if abi == 0:
        return "missing: this kernel has no Landlock, or it is not switched on (lsm=landlock,… at boot)"
    return (
        f"up (ABI {abi})"
        if abi >= 6
        else f"up (ABI {abi}; signals and abstract sockets are scoped from ABI 6 on)"
    )


def _write(path: str, text: str) -> None:
    with open(path, "w") as file:  # noqa: PTH123 - no pathlib in this process
        file.write(text)


@contextlib.contextmanager
def _wall(name: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise WallError(name, f"the wall {name!r} cannot be put up: {error}. {_HINTS[name]}") from error


_HINTS = {
    "namespaces": (
        "Unprivileged user namespaces must be allowed (sysctl user.max_user_namespaces, "
        "kernel.unprivileged_userns_clone, kernel.apparmor_restrict_unprivileged_userns=0); "
        "in a container, its seccomp profile must allow unshare."
    ),
    "filesystem": (
        "Mounting inside a user namespace must be allowed (kernel.apparmor_restrict_unprivileged_userns=0; "
        "in a container, a seccomp profile that allows mount and pivot_root, and an unmasked /proc)."
    ),
    "seccomp": "Isolates run on x86_64 and aarch64 with a kernel built with CONFIG_SECCOMP_FILTER.",
}
