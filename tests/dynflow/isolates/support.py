"""What the tests of isolates share: the hostile tenant, what it is told of the host, loaders with and without walls."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from dynflow.isolates import IsolateLimits, ProcessLoader, WorkerCode, WorkerStub

HOSTILE = Path(__file__).with_name("hostile_tenant.py.txt").read_text()

# x86_64, aarch64
_NUMBERS = {
    "add_key": (248, 217),
    "bpf": (321, 280),
    "inotify_init1": (294, 26),
    "io_uring_setup": (425, 425),
    "keyctl": (250, 219),
    "perf_event_open": (298, 241),
    "personality": (135, 92),
    "pidfd_open": (434, 434),
    "process_vm_readv": (310, 270),
    "ptrace": (101, 117),
    "setns": (308, 268),
    "shmctl": (31, 195),
    "shmget": (29, 194),
    "unshare": (272, 97),
    "userfaultfd": (323, 282),
}


@contextmanager
def host_to_attack(folder: Path) -> Iterator[dict[str, Any]]:
    """Yield what a tenant could know of a host: files, sockets and a process that really exist."""
    folder.chmod(0o777)
    (folder / "file").write_text("the host's")
    column = {"x86_64": 0, "aarch64": 1}[os.uname().machine]
    with (
        socket.socket() as tcp,
        socket.socket(socket.AF_UNIX) as abstract,
        socket.socket(socket.AF_UNIX) as named,
    ):
        tcp.bind(("127.0.0.1", 0))
        tcp.listen()
        name = f"dynflow-test-{os.getpid()}"
        abstract.bind("\0" + name)
        abstract.listen()
        named.bind(str(folder / "socket"))
        (folder / "socket").chmod(0o666)
        named.listen()
        yield {
            "abstract": name,
            "code": __file__,
            "file": str(folder / "file"),
            "folder": str(folder),
            "nr": {key: numbers[column] for key, numbers in _NUMBERS.items()},
            "packages": str(Path(pytest.__file__).parent.parent),
            "pid": os.getpid(),
            "port": tcp.getsockname()[1],
            "size": 9 * 1024 * 1024,
            "socket": str(folder / "socket"),
        }


def without_walls() -> ProcessLoader:
    """Return a loader whose isolates are plain processes: it shows what the walls are for."""
    return ProcessLoader(walls=(), allow_unconfined=True, ready=0)


def hostile(loader: ProcessLoader, worker_id: str = "hostile", **limits: Any) -> WorkerStub:
    """Return the hostile tenant."""
    modules = {"index.py": HOSTILE}
    stub: WorkerStub = loader.get(
        worker_id, lambda: WorkerCode("index.py", modules, limits=IsolateLimits(**limits))
    )
    return stub
