"""A hostile pipeline, in its orchestration code and in its commands: every attempt fails, and the platform stays up.

The probes are the same text in three places: in `run`, in a command, and in a plain process of this test, where
they succeed. That is what shows that it is the confinement that stops them.
"""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.scenarios.github_server import serve_github
from tests.scenarios.pipelines import make_repository
from tests.scenarios.server import concluded, running_server
from tests.scenarios.test_main_job import REPO, push_to_main, server_log

# Plain Python without imports of ours: returns {attempt: "done …" or "refused …"}.
PROBES = """\
import os, socket

def attempt(action):
    try:
        return f"done {action()!r:.60}"
    except BaseException as error:
        return f"refused {type(error).__name__}: {error}"

def read(path):
    with open(path, "rb") as file:
        return file.read(20)

def write(path):
    with open(path, "w") as file:
        return file.write("was here")

def environments():
    found = []
    for name in os.listdir("/proc"):
        if name.isdigit():
            try:
                found.append(read_all(f"/proc/{name}/environ"))
            except OSError:
                pass
    if not any(MARKER in text for text in found):
        raise LookupError("the marker is in no environment")
    return True

def read_all(path):
    with open(path, "rb") as file:
        return file.read()

def see_process(pid):
    # Its command line, not just a process of the same number in a namespace of its own.
    if b"ci_platform" not in read_all(f"/proc/{pid}/cmdline") and b"python" not in read_all(f"/proc/{pid}/cmdline"):
        raise LookupError("another process")
    return True

def connect(port):
    with socket.create_connection(("127.0.0.1", port), timeout=2) as connection:
        return connection.getpeername()

def probes(target):
    return {
        "read a file of the host": attempt(lambda: read(target["secret"])),
        "read the platform's database": attempt(lambda: read(target["database"])),
        "list a folder of the host": attempt(lambda: os.listdir(target["folder"])),
        "write outside": attempt(lambda: write(target["folder"] + "/dropped")),
        "read the environment of the platform": attempt(environments),
        "see the platform's process": attempt(lambda: see_process(target["pid"])),
        "signal the platform's process": attempt(lambda: os.kill(target["pid"], 0)),
        "connect to a port of the host": attempt(lambda: connect(target["port"])),
    }
"""

PIPELINE = """\
from dynflow import WorkflowEntrypoint
from pipelines import Workspace, run_in_sandbox
import json

TARGET = {target!r}
MARKER = {marker!r}
{probes}

async def refused(call):
    try:
        return f"done {{await call()!r:.60}}"
    except Exception as error:
        return f"refused {{type(error).__name__}}: {{error}}"

class CIPipeline(WorkflowEntrypoint):
    async def run(self, event, step):
        repo, sha = event.payload["repo"], event.payload["sha"]
        workspace = await step.do("checkout", lambda: self.env.ARTIFACTS.fork(repo, sha=sha))
        found = probes(TARGET)
        foreign = Workspace("0" * 32 + ".checkout-1", repo, sha)
        found["run in another run's workspace"] = await step.do(
            "foreign workspace", lambda: refused(lambda: run_in_sandbox(foreign, ["true"])))
        found["escape by the workspace's id"] = await step.do(
            "strange workspace", lambda: refused(lambda: run_in_sandbox(
                Workspace(workspace.id.partition(".")[0] + "./../..", repo, sha), ["true"])))
        found["fork another repository"] = await step.do(
            "foreign repository", lambda: refused(lambda: self.env.ARTIFACTS.fork("somebody/else", sha=sha)))
        found["comment elsewhere"] = await step.do(
            "foreign comment", lambda: refused(lambda: self.env.GITHUB.comment_on_pr("somebody/else", 1, "hi")))
        found["call a private method"] = await step.do(
            "private", lambda: refused(lambda: self.env.SANDBOX._checked(None, None)))
        await step.do("report", lambda: run_in_sandbox(workspace, ["echo", "orchestration=" + json.dumps(found)]))
        await step.do("commands", lambda: run_in_sandbox(workspace, ["python3", "probe.py"]))
"""

COMMAND = """
import json
print("command=" + json.dumps(probes(TARGET)))
"""

MARKER = "DYNFLOW_GITHUB_TOKEN=a-token"


@contextmanager
def listening() -> Iterator[int]:
    """Accept connections on loopback; yield the port."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        threading.Thread(target=_accept, args=(server,), daemon=True).start()
        yield server.getsockname()[1]


def _accept(server: socket.socket) -> None:
    while True:
        try:
            server.accept()[0].close()
        except OSError:
            return


def reported(text: str, kind: str) -> dict[str, str]:
    found: dict[str, str] = json.loads(text.rpartition(f"{kind}=")[2].partition("\n")[0])
    return found


def test_nothing_hostile_succeeds_and_all_of_it_does_without_the_confinement(tmp_path: Path) -> None:
    folder = tmp_path / "host"
    folder.mkdir()
    (folder / "secret").write_text("the host's secret")
    with listening() as port, serve_github() as github:
        settings = {"github_api_url": github.url, "allow_file_remotes": "true"}
        with running_server(tmp_path / "data", **settings) as server:
            assert server.process is not None
            target = {
                "secret": str(folder / "secret"),
                "database": str(tmp_path / "data" / "platform.db"),
                "folder": str(folder),
                "pid": server.process.pid,
                "port": port,
            }
            text = PROBES.replace("MARKER in", f"{MARKER.encode()!r} in")
            probe = f"TARGET = {target!r}\n{text}{COMMAND}"
            pipeline = PIPELINE.format(target=target, marker=MARKER, probes=text)
            bare, sha = make_repository(tmp_path / "repo", pipeline, files={"probe.py": probe})
            server.register(REPO, bare)
            server.deliver("push", push_to_main(sha))
            run = server.wait_for_run(concluded, "the run to conclude")
            assert run["conclusion"] == "success", run
            for step, kind in (("report", "orchestration"), ("commands", "command")):
                found = reported(server_log(server, run, step), kind)
                assert found
                assert {name: said for name, said in found.items() if not said.startswith("refused")} == {}, (
                    kind
                )
            assert not (folder / "dropped").exists()

            unconfined = subprocess.run(
                [sys.executable, "-c", probe], capture_output=True, text=True, check=True
            )
            found = reported(unconfined.stdout, "command")
            assert {name: said for name, said in found.items() if not said.startswith("done")} == {}


LIMITS = {
    "computes for ever": ("while True: pass", "2"),
    "prints a gigabyte": ("for _ in range(1024): print('x' * 1024 * 1024)", "printed"),
    "eats memory": ("hoard = [bytearray(64 * 1024 * 1024) for _ in range(1000)]", "emory"),
    "forks": ("import os\nfor _ in range(1000): os.fork()", ""),
    "returns too much": ("return 'x' * 2_000_000", "1,048,576"),
    "waits for nothing": ("import asyncio\nawait asyncio.get_running_loop().create_future()", "never happen"),
}


@pytest.mark.parametrize("name", LIMITS)
def test_a_pipeline_over_its_limits_is_stopped_and_told_so(tmp_path: Path, name: str) -> None:
    body, expected = LIMITS[name]
    lines = "\n".join(f"        {line}" for line in body.splitlines())
    pipeline = (
        "from dynflow import WorkflowEntrypoint\n\nclass CIPipeline(WorkflowEntrypoint):\n"
        f"    async def run(self, event, step):\n{lines}\n"
    )
    bare, sha = make_repository(tmp_path / "repo", pipeline)
    with serve_github() as github:
        settings = {
            "github_api_url": github.url,
            "allow_file_remotes": "true",
            # Of the other limits none is to be met by this one first, however busy the machine is.
            "pipeline_compute": "2 seconds" if name == "computes for ever" else "60 seconds",
        }
        with running_server(tmp_path / "data", **settings) as server:
            server.register(REPO, bare)
            server.deliver("push", push_to_main(sha))
            run = server.wait_for_run(concluded, "the run to conclude")
            assert run["conclusion"] == "failure", run
            assert expected in run["reason"], run["reason"]
            assert server.api("GET", "/repos")
