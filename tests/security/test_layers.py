"""One attack, several walls: what each of them answers where the ones before it are taken away."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest

from dynflow.isolates import ProcessLoader
from dynflow.isolates.confinement import WALLS
from dynflow.isolates.syscalls import landlock_abi
from tests.dynflow.isolates.support import host_to_attack
from tests.security.support import PROBER, tenant

_ALL = set(WALLS)
_NO_SUCH_FILE, _REFUSED = "ENOENT", "EPERM"

# What answers: everything; all but the filter; Landlock and nothing before it; nothing at all.
_EXPECTED = {
    "loopback": (_REFUSED, "EACCES", "EACCES", "open"),
    "abstract": (_REFUSED, "ECONNREFUSED", _REFUSED, "open"),
    "named": (_REFUSED, _NO_SUCH_FILE, None, "open"),  # Landlock knows no sockets in files (ABI 7)
    "docker": (_REFUSED, _NO_SUCH_FILE, None, None),
    "metadata": (_REFUSED, "EACCES", "EACCES", None),
    "signal": (_REFUSED, "ESRCH", _REFUSED, "open"),
    "file": (_NO_SUCH_FILE, _NO_SUCH_FILE, "EACCES", "open"),
    "passwd": (_NO_SUCH_FILE, _NO_SUCH_FILE, "EACCES", "open"),
    "write": (_REFUSED, _NO_SUCH_FILE, "EACCES", "open"),
    "processes": (_NO_SUCH_FILE, _NO_SUCH_FILE, "EACCES", "open"),
}
_WALLS = {
    "all walls": _ALL,
    "all but the filter": _ALL - {"seccomp"},
    "Landlock alone": {"landlock", "identity"},
    "no walls": set[str](),
}


@pytest.fixture(scope="module")
def about(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Any]]:
    with host_to_attack(tmp_path_factory.mktemp("host")) as told:
        Path(told["file"]).chmod(0o644)
        yield told


@pytest.fixture(scope="module", params=range(len(_WALLS)), ids=list(_WALLS))
async def column(request: pytest.FixtureRequest, about: dict[str, Any]) -> Any:
    walls = list(_WALLS.values())[request.param]
    if "landlock" in walls and landlock_abi() < 6:
        pytest.skip("Landlock of this kernel knows no scopes")
    async with ProcessLoader(walls=walls, allow_unconfined=True, ready=0) as loader:
        outcomes = await tenant(loader, PROBER).call("try_socket", about)
    Path(about["folder"], "written").unlink(missing_ok=True)  # noqa: ASYNC240 - one file of the test's
    return request.param, outcomes


@pytest.mark.parametrize("attack", _EXPECTED)
async def test_each_wall_that_is_left_refuses_for_its_own_reason(column: Any, attack: str) -> None:
    which, outcomes = column
    expected = _EXPECTED[attack][which]
    if expected is None:
        assert which > 1  # what the host itself says to it
        return
    assert outcomes[attack] == expected


@pytest.fixture(scope="module")
async def confined() -> AsyncIterator[ProcessLoader]:
    async with ProcessLoader(ready=0) as loader:
        yield loader


_LIBRARY = os.path.dirname(os.__file__)  # noqa: PTH120 - as the isolate spells it
_PATHS = [
    "/etc/shadow",
    "/etc/passwd",
    "/etc/hostname",
    "/etc/machine-id",
    "/proc",
    "/proc/self/environ",
    "/proc/self/mem",
    "/proc/self/maps",
    "/proc/self/root/etc/passwd",
    "/proc/self/cwd",
    "/proc/self/ns/user",
    "/proc/1/environ",
    "/proc/1/root",
    "/proc/thread-self/attr/current",
    "/proc/sys/kernel/core_pattern",
    "/proc/sysrq-trigger",
    "/proc/kcore",
    "/proc/kallsyms",
    "/proc/keys",
    "/proc/mounts",
    "/proc/net/tcp",
    "/sys",
    "/sys/fs/cgroup",
    "/sys/fs/cgroup/memory/release_agent",
    "/sys/kernel/debug",
    "/dev",
    "/dev/null",
    "/dev/mem",
    "/dev/kmsg",
    "/dev/kvm",
    "/dev/fuse",
    "/dev/tty",
    "/dev/ptmx",
    "/dev/shm",
    "/dev/fd/3",
    "/run",
    "/run/docker.sock",
    "/var/run/docker.sock",
    "/run/containerd/containerd.sock",
    "/run/dbus/system_bus_socket",
    "/var/lib/docker",
    "/var/run/secrets/kubernetes.io/serviceaccount/token",
    "/root/.bashrc",
    "/root/.ssh/id_rsa",
    "/home/user",
    "/tmp",
    "/usr/bin/python3",
    "/bin/sh",
    "/lib64/ld-linux-x86-64.so.2",
    "/../../../../etc/passwd",
    f"{_LIBRARY}/../../../../../../etc/passwd",
    f"{_LIBRARY}/../../bin/python3",
    f"{_LIBRARY}/sitecustomize.py",
]


@pytest.fixture(scope="module")
async def read(confined: ProcessLoader) -> Any:
    return await tenant(confined, PROBER).call("try_paths", _PATHS, os.O_RDONLY)


@pytest.mark.parametrize("path", _PATHS)
async def test_a_path_of_the_host_is_no_path_in_there(read: Any, path: str) -> None:
    assert read[path] in {_NO_SUCH_FILE, "ENOTDIR"}


async def test_what_is_there_cannot_be_opened_for_writing_by_any_flag(confined: ProcessLoader) -> None:
    stub = tenant(confined, PROBER)
    paths = [f"{_LIBRARY}/os.py", f"{_LIBRARY}/new.py", "/new"]
    for flags in (
        os.O_WRONLY,
        os.O_RDWR,
        os.O_RDONLY | os.O_TRUNC,
        os.O_RDONLY | os.O_CREAT,
        os.O_APPEND | 1,
    ):
        assert set((await stub.call("try_paths", paths, flags)).values()) == {_REFUSED}


async def test_without_the_filter_the_root_is_still_read_only(confined: ProcessLoader) -> None:
    del confined
    async with ProcessLoader(walls=_ALL - {"seccomp", "landlock"}, allow_unconfined=True, ready=0) as loader:
        tried = await tenant(loader, PROBER).call("try_paths", ["/new", f"{_LIBRARY}/new.py"], os.O_CREAT | 1)
    assert set(tried.values()) <= {"EROFS", "EACCES"}
