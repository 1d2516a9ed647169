"""Whether a service in a container is ready: by its port, over HTTP, or by a command inside."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import docker

from ci_platform.errors import UnavailableError
from pipelines.contract import Service

_ANSWER_WITHIN = 5
"""Seconds for one answer over HTTP."""

_LISTENING = "0A"
_LOOPBACK = ("7F", "00000000000000000000000001000000")
"""How addresses of loopback end (IPv4, in the processor's order) or read (IPv6) in /proc/net/tcp."""

# In the service's network namespace, which a process has to enter: it has no route to the host's.
_ASK = """
import ctypes, encodings.idna, http.client, os, sys  # all of it before the files go out of reach
pid, host, port, path = sys.argv[1:]
libc = ctypes.CDLL(None, use_errno=True)
if libc.setns(os.open(f"/proc/{pid}/ns/net", os.O_RDONLY), 0x40000000):
    sys.exit(os.strerror(ctypes.get_errno()))
os.setgroups([])
os.setgid(65534)
os.setuid(65534)
connection = http.client.HTTPConnection("127.0.0.1", int(port), timeout=5)
try:
    connection.request("GET", path, headers={"Host": host, "Connection": "close"})
    sys.exit(0 if 200 <= connection.getresponse().status < 400 else 3)
except (OSError, http.client.HTTPException, ValueError):
    sys.exit(3)
"""


class Ended(Exception):  # noqa: N818 - it is no error of ours, but what happened to the service
    """The service's container does not run any more."""


def is_ready(client: docker.DockerClient, container: str, service: Service) -> bool:
    """Look once. Blocks for some milliseconds, for what a command inside takes, or for five seconds over HTTP."""
    state: dict[str, Any] = client.api.inspect_container(container)["State"]
    if not state["Running"]:
        raise Ended(f"ended with exit code {state['ExitCode']} before it was ready")
    if service.ready is None:
        return _listens(int(state["Pid"]), service.port)
    if isinstance(service.ready, str):
        return _answers(int(state["Pid"]), service, service.ready)
    made = client.api.exec_create(container, list(service.ready), stdout=False, stderr=False)
    client.api.exec_start(made["Id"])
    return bool(client.api.exec_inspect(made["Id"])["ExitCode"] == 0)


def _listens(pid: int, port: int) -> bool:
    """Whether something listens where others reach it: read off the kernel, so that nobody has to connect."""
    for name in ("tcp", "tcp6"):
        try:
            rows = Path(f"/proc/{pid}/net/{name}").read_text().splitlines()[1:]
        except OSError:
            continue
        for row in rows:
            _, local, _, state, *_ = row.split()
            address, _, number = local.partition(":")
            if state == _LISTENING and int(number, 16) == port and not address.endswith(_LOOPBACK):
                return True
    return False


def _answers(pid: int, service: Service, path: str) -> bool:
    command = [sys.executable, "-I", "-S", "-c", _ASK, str(pid), service.host, str(service.port), path]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, check=False, timeout=_ANSWER_WITHIN + 5, env={}
        )
    except subprocess.TimeoutExpired:
        return False
    if done.returncode not in {0, 3}:
        raise UnavailableError(
            f"service {service.host} cannot be asked over HTTP here: {done.stderr.strip()[-200:]}"
        )
    return done.returncode == 0
