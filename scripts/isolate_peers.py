"""What isolates are measured beside: one way each to run a stranger's few lines, from request to first answer.

`DYNFLOW_BENCH_PEERS` names a folder in which `npm install workerd deno` was run; `docker`, `node`, `deno` and `workerd`
are looked for on the path, too. A peer that is not here says so.
"""

from __future__ import annotations

import contextlib
import http.client
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
IMAGE = "dynflow/base:latest"


class AbsentError(Exception):
    """A peer is not here; the message says what is missing."""


class Peer(ABC):
    """One way to run code that is new each time."""

    name: str

    @abstractmethod
    def once(self) -> None:
        """Start it, run the code, get its answer."""


class Command(Peer):
    """A process for each request."""

    def __init__(self, name: str, command: list[str], answer: str) -> None:
        self.name, self._command, self._answer = name, command, answer

    def once(self) -> None:
        """Run the command to its end."""
        done = subprocess.run(self._command, capture_output=True, text=True, check=True)
        if self._answer not in done.stdout:
            raise RuntimeError(f"{self.name}: {done.stdout!r} {done.stderr!r}")


class WorkerLoaderPeer(Peer):
    """A new dynamic worker for each request, through the `workerLoader` binding of a running workerd."""

    def __init__(self, name: str, path: str, port: int) -> None:
        self.name, self._path = name, path
        self._connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)

    def once(self) -> None:
        """Ask it over a connection that is kept."""
        self._connection.request("GET", self._path)
        answer = self._connection.getresponse().read()
        if answer != b"hello":
            raise RuntimeError(f"{self.name}: {answer!r}")


PYTHON = """
import sys
sys.path.append(sys.argv[1])
import asyncio, dataclasses, json, re
from dynflow import WorkflowEntrypoint
from dynflow.isolates.worker import Env, Request, Worker
worker = Worker("index.py", {"index.py": sys.stdin.read()})
class Echo:
    async def back(self, text):
        return text
print(asyncio.run(worker.main.fetch(Request("hello"), Env({"ECHO": Echo()}))))
"""

SCRIPT = "console.log(/[a-z]+/.exec('hello')[0])\n"

WORKER = """
let last = 0;
const TENANT = `export default { async fetch(request, env) {
  return new Response(/[a-z]+/.exec(await request.text())[0]); } }`;
export default { async fetch(request, env) {
  const path = new URL(request.url).pathname;
  if (path === "/nothing") return new Response("hello");
  const modules = { "index.js": TENANT };
  const code = { compatibilityDate: "2026-01-01", mainModule: "index.js", modules, globalOutbound: null };
  const worker = env.LOADER.get(path === "/warm" ? "warm" : "w" + (last++), async () => code);
  return await worker.getEntrypoint().fetch(new Request("http://tenant/", { method: "POST", body: "hello" }));
} }
"""

CONFIG = """
using Workerd = import "/workerd/workerd.capnp";
const config :Workerd.Config = (
  services = [(name = "main", worker = .main)],
  sockets = [(name = "http", address = "127.0.0.1:PORT", http = (), service = "main")]);
const main :Workerd.Worker = (
  modules = [(name = "main.js", esModule = embed "main.js")],
  compatibilityDate = "2026-01-01",
  bindings = [(name = "LOADER", workerLoader = (id = "loader"))]);
"""


def find(program: str) -> str:
    """Return the program's path. Raises AbsentError."""
    folder = Path(os.environ.get("DYNFLOW_BENCH_PEERS", "/nonexistent")) / "node_modules"
    for found in (*folder.glob(f"@*/*/bin/{program}"), *folder.glob(f"@*/*/{program}")):
        if found.is_file():
            return str(found)
    on_path = shutil.which(program)
    if on_path is None:
        raise AbsentError(f"no {program} here")
    return on_path


class TenantOnStdin(Command):
    """`python -I`, which gets the same tenant as isolates do."""

    def __init__(self, tenant: str) -> None:
        super().__init__(
            "`python -I -S`, cold, same imports",
            [sys.executable, "-I", "-S", "-B", "-c", PYTHON, str(ROOT)],
            "",
        )
        self._tenant = tenant

    def once(self) -> None:
        """Run it to its end."""
        done = subprocess.run(self._command, input=self._tenant, capture_output=True, text=True, check=True)
        if done.stdout != "hello\n":
            raise RuntimeError(f"{self.name}: {done.stdout!r} {done.stderr!r}")


@contextlib.contextmanager
def peers(tenant: str) -> Iterator[tuple[list[Peer], list[str]]]:
    """Yield the peers that are here, and what is missing."""
    found: list[Peer] = [TenantOnStdin(tenant)]
    missing: list[str] = []
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        (folder / "tenant.js").write_text(SCRIPT)
        script = str(folder / "tenant.js")
        for program, options in (("deno", ["run", "--quiet"]), ("node", [])):
            try:
                found.append(Command(f"{program}, cold", [find(program), *options, script], "hello"))
            except AbsentError as error:
                missing.append(str(error))
        try:
            port = stack.enter_context(_workerd(folder))
            found.append(WorkerLoaderPeer("workerd: load a new worker, call", "/new", port))
            found.append(WorkerLoaderPeer("workerd: call a warm worker", "/warm", port))
            found.append(WorkerLoaderPeer("workerd: HTTP alone", "/nothing", port))
        except AbsentError as error:
            missing.append(str(error))
        try:
            found.append(_docker())
        except AbsentError as error:
            missing.append(str(error))
        yield found, missing


def _docker() -> Peer:
    docker = find("docker")
    if subprocess.run([docker, "image", "inspect", IMAGE], capture_output=True, check=False).returncode:
        raise AbsentError(
            f"no docker engine with {IMAGE} here (scripts/docker_engine, scripts/build_images base)"
        )
    return Command("docker run", [docker, "run", "--rm", "--network=none", IMAGE, "echo", "hello"], "hello")


@contextlib.contextmanager
def _workerd(folder: Path) -> Iterator[int]:
    program = find("workerd")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port: int = free.getsockname()[1]
    (folder / "main.js").write_text(WORKER)
    (folder / "config.capnp").write_text(CONFIG.replace("PORT", str(port)))
    command = [program, "serve", "--experimental", str(folder / "config.capnp")]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        try:
            for _ in range(100):
                with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
                    break
                time.sleep(0.05)
            yield port
        finally:
            process.kill()
