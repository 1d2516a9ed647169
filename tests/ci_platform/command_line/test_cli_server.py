"""Commands that ask a server, as a user in another terminal calls them."""

from __future__ import annotations

import json
import tarfile
import time
import uuid
from pathlib import Path

import pytest

from ci_platform.demo import wait_for_run
from ci_platform.repository_push import Destination, push_folder
from tests.ci_platform.api.world import FAILING, GATED, HEAD, QUICK, SLOW
from tests.ci_platform.command_line.conftest import Served


def push(served: Served, folder: Path, pipeline: str) -> str:
    """Push a pipeline into a repository of its own; return the run's id."""
    repo = f"cli/{uuid.uuid4().hex[:12]}"
    served.client.post("/api/v1/repos", {"name": repo})
    (folder / "tree" / ".dynflow").mkdir(parents=True)
    (folder / "tree" / ".dynflow" / "ci.py").write_text(pipeline)
    token = (served.data / "token").read_text().strip()
    sha = push_folder(folder / "tree", Destination(served.client.url, repo, "main", token), "A change")
    return str(wait_for_run(served.client, repo, sha)["id"])


def test_a_run_is_watched_listed_shown_and_its_log_printed(served: Served, tmp_path: Path) -> None:
    run_id = push(served, tmp_path, QUICK)
    watched = served.dynflow("show", run_id, "--watch")
    assert watched.returncode == 0, watched.stderr
    assert "step.completed        greet" in watched.stdout
    shown = served.dynflow("show", "last")
    assert "greet" in shown.stdout
    assert "success" in shown.stdout
    listed = json.loads(served.dynflow("runs", "--json").stdout)
    assert listed["items"][0]["id"] == run_id
    assert run_id[:12] in served.dynflow("runs").stdout
    log = served.dynflow("logs", run_id[:10], "greet").stdout.splitlines()
    assert log[1:3] == ["hello", "world"]
    assert "hello" in served.dynflow("logs", "last").stdout


def test_a_failed_run_has_its_exit_code(served: Served, tmp_path: Path) -> None:
    run_id = push(served, tmp_path, FAILING)
    assert served.dynflow("show", run_id, "--watch").returncode == 1
    run = json.loads(served.dynflow("show", run_id, "--json").stdout)
    assert run["conclusion"] == "failure"


def test_a_gate_is_approved_and_a_second_decision_is_told_so(served: Served, tmp_path: Path) -> None:
    run_id = push(served, tmp_path, GATED)
    while not served.client.get(f"/api/v1/runs/{run_id}")["gates"]:
        pass
    approved = served.dynflow("approve", run_id, "approval", "-m", "fine")
    assert (approved.returncode, approved.stdout) == (0, "gate approval is approved by local-admin\n")
    again = served.dynflow("reject", run_id, "approval")
    assert again.returncode == 2
    assert again.stderr.startswith("dynflow: gate 'approval' was approved by local-admin")
    assert served.dynflow("show", run_id, "-w").returncode == 0
    rerun = served.dynflow("rerun", run_id, "--from-step", "after", "--watch")
    assert rerun.returncode == 0, rerun.stderr
    assert served.dynflow("rerun", run_id, "--from-step", "nothing").returncode == 2


def test_a_log_is_followed_until_the_run_is_cancelled(served: Served, tmp_path: Path) -> None:
    run_id = push(served, tmp_path, SLOW)
    lines = []
    with served.dynflow.start("logs", "-f", run_id) as follower:
        assert follower.stdout is not None
        for line in follower.stdout:
            lines.append(line)
            if line.endswith("│ begun\n"):
                assert served.dynflow("cancel", run_id).returncode == 0
    assert follower.returncode == 0, lines
    assert any(line.startswith("wait │ begun") for line in lines)
    assert served.dynflow("show", run_id, "-w").returncode == 1


def test_tokens_are_made_listed_and_revoked(served: Served) -> None:
    name = f"robot-{uuid.uuid4().hex[:6]}"
    secret = served.dynflow("token", "create", name, "--scope", "read").stdout.strip()
    url = served.client.url
    assert served.dynflow("runs", DYNFLOW_URL=url, DYNFLOW_TOKEN=secret).returncode == 0
    refused = served.dynflow("cancel", "x" * 32, DYNFLOW_URL=url, DYNFLOW_TOKEN=secret)
    assert refused.returncode == 2
    assert "needs the scope 'write'" in refused.stderr
    tokens = json.loads(served.dynflow("token", "list", "--json").stdout)
    (token_id,) = [token["id"] for token in tokens if token["name"] == name]
    assert secret not in served.dynflow("token", "list").stdout
    assert served.dynflow("token", "revoke", str(token_id)).returncode == 0
    assert served.dynflow("runs", DYNFLOW_URL=url, DYNFLOW_TOKEN=secret).returncode == 2


def test_repositories_are_made_forked_imported_shown_closed_and_deleted(
    served: Served, tmp_path: Path
) -> None:
    name = f"cli/{uuid.uuid4().hex[:12]}"
    made = served.dynflow("repo", "create", name)
    assert (made.returncode, made.stdout) == (0, f"{served.client.url}/git/{name}.git\n")
    (tmp_path / "tree").mkdir()
    (tmp_path / "tree" / "a").write_text("1")
    token = (served.data / "token").read_text().strip()
    sha = push_folder(
        tmp_path / "tree", Destination(served.client.url, name, "main", token), "A \x1b[31mchange"
    )
    assert served.dynflow("repo", "fork", name, f"{name}-fork").returncode == 0
    assert f"fork of {name}" in served.dynflow("repo", "list").stdout
    log = served.dynflow("repo", "log", f"{name}-fork").stdout
    assert log.startswith(sha[:12])
    assert "\x1b" not in log
    url = f"{served.client.url}/git/{name}.git"
    imported = served.dynflow(
        "repo", "import", f"{name}-import", url, "--username", "x", DYNFLOW_IMPORT_PASSWORD=token
    )
    assert imported.returncode == 0, imported.stderr
    assert token not in imported.stdout
    with_deadline = time.monotonic() + 30
    while "state      ready" not in (shown := served.dynflow("repo", "show", f"{name}-import").stdout):
        assert time.monotonic() < with_deadline, shown
    assert "read-only" in shown
    assert served.dynflow("repo", "refresh", f"{name}-import", "--verify").returncode == 0
    assert "starts no runs" in served.dynflow("repo", "set", name, "--no-enabled").stdout
    assert served.dynflow("repo", "delete", name, stdin="n\n").returncode != 0
    assert served.dynflow("repo", "delete", name, "--yes").returncode == 0
    assert "is not registered" in served.dynflow("repo", "show", name).stderr


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (("show", "nothing"), 2, "there is no run 'nothing'"),
        (("show", "f" * 32), 2, "there is no run"),
        (("logs", "f" * 32, "x"), 2, "there is no run"),
        (("approve", "f" * 32, "x"), 2, "there is no run"),
        (("runs", "--status", "great"), 2, "there is no status"),
        (("token", "create", "white space"), 2, "cannot be a token's name"),
        (("token", "create", "a", "--repo", "no/where"), 2, "is not registered here"),
        (("repo", "import", "a/b", "ssh://host/x"), 2, "clone URLs start with"),
        (("repo", "fork", "no/where", "a/b"), 2, "is not registered here"),
        (("repo", "refresh", "no/where"), 2, "is no import"),
        (("repo", "show", "nonsense"), 2, "there is nothing at this address"),
    ],
)
def test_errors_are_one_line_and_an_exit_code(
    served: Served, arguments: tuple[str, ...], code: int, message: str
) -> None:
    done = served.dynflow(*arguments)
    assert done.returncode == code
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert done.stderr.count("\n") == 1


def test_another_server_on_the_same_port_says_what_to_do(served: Served, tmp_path: Path) -> None:
    port = served.client.url.rpartition(":")[2]
    done = served.dynflow("serve", "--data", str(tmp_path / "other"), "--port", port)
    assert done.returncode == 2
    assert "Address already in use" in done.stderr
    assert "--port" in done.stderr


def test_snapshots_are_listed_looked_into_and_downloaded(served: Served, tmp_path: Path) -> None:
    run_id = push(served, tmp_path, GATED.replace("echo before", "mkdir out; echo built > out/it"))
    while not served.client.get(f"/api/v1/runs/{run_id}")["gates"]:
        pass
    listed = served.dynflow("snapshot", "list", run_id)
    assert [line.split()[:3] for line in listed.stdout.splitlines()] == [
        ["checkout-1@0", "forked"],
        ["checkout-1@1", "committed", "before"],
    ], listed
    (item,) = json.loads(served.dynflow("snapshot", "list", run_id, "--json").stdout)[1:]
    assert (item["paths"], item["size"], item["conflicts"]) == (2, 6, [])
    files = served.dynflow("snapshot", "files", run_id, "checkout-1@1", "out")
    assert files.stdout.split() == ["file", "6", "it"], files.stderr
    assert served.dynflow("snapshot", "cat", run_id, "checkout-1@1", "out/it").stdout == "built\n"
    place = tmp_path / "snapshot.tar"
    done = served.dynflow("snapshot", "download", run_id, "checkout-1@1", "-o", str(place))
    assert done.returncode == 0, done.stderr
    with tarfile.open(place) as archive:
        assert {".dynflow/ci.py", "out/it"} <= set(archive.getnames())
    for wrong, code in (("checkout-1@7", 2), ("nothing@0", 2), ("@", 2)):
        assert served.dynflow("snapshot", "files", run_id, wrong).returncode == code
    served.dynflow("cancel", run_id)


KEEPING = HEAD + (
    "        await sh('make', 'mkdir out; echo one >out/a; echo two >out/b')\n"
    "        keep = self.env.ARTIFACTS.upload\n"
    "        await step.do('keep', lambda: keep('both', workspace, ['out']))\n"
    "        await step.do('one', lambda: keep('only', workspace, ['out/a'], retention='1 day'))\n"
)


def test_artifacts_are_listed_and_downloaded(served: Served, tmp_path: Path) -> None:
    run_id = push(served, tmp_path, KEEPING)
    assert served.dynflow("show", run_id, "--watch").returncode == 0
    listed = served.dynflow("artifact", "list", run_id).stdout.splitlines()
    assert [line.split()[:4] for line in listed] == [["both", "2", "files", "8"], ["only", "1", "file", "4"]]
    files = served.dynflow("artifact", "files", run_id, "both", "out").stdout.splitlines()
    assert [line.split() for line in files] == [["file", "4", "a"], ["file", "4", "b"]]
    assert served.dynflow("artifact", "get", run_id, "both", "out/b", "-o", "-").stdout == "two\n"
    assert served.dynflow("artifact", "get", run_id, "only").returncode == 0
    got = served.dynflow("artifact", "get", run_id, "only")
    assert (got.returncode, "'a' is there already" in got.stderr) == (2, True)
    here = served.dynflow.cwd
    assert (here / "a").read_text() == "one\n"
    assert served.dynflow("artifact", "get", run_id, "both", "--format", "tar", "-o", "x.tar").returncode == 0
    with tarfile.open(here / "x.tar") as archive:
        assert archive.getnames() == ["out/a", "out/b"]
    assert served.dynflow("artifact", "get", run_id, "nothing").returncode == 2
    assert not (here / "nothing.zip").exists()
    assert served.dynflow("artifact", "delete", run_id, "both").returncode == 0
    assert (
        "local-admin deleted it"
        in served.dynflow("artifact", "get", run_id, "both", "--format", "zip").stderr
    )
    assert "local-admin deleted it" in served.dynflow("artifact", "list", run_id).stdout
    before, names = (here / "x.tar").read_bytes(), sorted(here.iterdir())
    assert served.dynflow("artifact", "get", run_id, "both", "-o", "x.tar").returncode == 2
    assert ((here / "x.tar").read_bytes(), sorted(here.iterdir())) == (before, names)
