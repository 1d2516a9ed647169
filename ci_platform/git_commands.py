"""The `git` program, in an environment in which no repository and no user's configuration runs anything."""

from __future__ import annotations

import os
import re
import signal
import subprocess
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import IO, Literal
from urllib.parse import urlsplit

import anyio
import anyio.abc

from ci_platform.errors import InvalidInputError, UnavailableError
from ci_platform.sandboxes import cgroups

_PASSED_ON = ("PATH", "SSL_CERT_FILE", "SSL_CERT_DIR", "GIT_SSL_CAINFO", "GIT_EXEC_PATH", "TMPDIR")
_PROXIES = ("http_proxy", "https_proxy", "all_proxy", "no_proxy", "HTTPS_PROXY", "ALL_PROXY", "NO_PROXY")

_OWNER = "DYNFLOW_OWNER"
_OWNED = re.compile(rb"(?:^|\0)" + _OWNER.encode() + rb"=([0-9]+-[0-9]+)@([0-9]+)(?:\0|$)")
_USERINFO = re.compile(r"(?<=://)[^/@\s]+@")
_ERROR_BYTES = 16 * 1024
_OUTPUT_BYTES = 16 * 1024 * 1024

_SETTINGS = {
    # Nothing in a repository may run: no hooks, no monitors, no helpers of ours beyond the one below.
    "core.hooksPath": "/dev/null",
    "core.fsmonitor": "false",
    "credential.helper": "",
    # Repositories may belong to another uid than ours, when the platform once ran as somebody else.
    "safe.directory": "*",
    # Deleting objects while another process reads them is `Source.maintain`'s decision alone.
    "gc.auto": "0",
    "maintenance.auto": "false",
    "receive.autogc": "false",
    # A dead connection ends; a slow one may go on for as long as the caller waits.
    "http.lowSpeedLimit": "1000",
    "http.lowSpeedTime": "60",
    "submodule.recurse": "false",
    "core.fsync": "committed",
}


# Harmless oddities of old repositories, which everybody else's server takes too.
_HARMLESS = ("zeroPaddedFilemode", "badTimezone", "missingSpaceBeforeDate")


def verified(command: Literal["fetch", "receive"]) -> dict[str, str]:
    """Return the settings by which a command takes no object in without looking at it.

    All come as packs, however few: those are checked as a whole, apart from the rest, and can be shared by forks.
    """
    harmless = {f"{command}.fsck.{oddity}": "ignore" for oddity in _HARMLESS}
    return {"transfer.fsckObjects": "true", "transfer.unpackLimit": "1", **harmless}


@dataclass(frozen=True, slots=True)
class Credentials:
    """User and password (or token) for one server."""

    username: str
    password: str = field(repr=False)


class GitError(Exception):
    """`git` exited with `exit_code`; `stderr` is what it said, without credentials."""

    def __init__(self, exit_code: int, stderr: str) -> None:
        super().__init__(exit_code, stderr)
        self.exit_code, self.stderr = exit_code, stderr

    def __str__(self) -> str:
        return self.stderr.strip()[-500:] or f"git exited with {self.exit_code}"


def redact(text: str, *secrets: str) -> str:
    """Take credentials out of what git printed."""
    for secret in filter(None, secrets):
        text = text.replace(secret, "***")
    return _USERINFO.sub("***@", text)


def environment(
    settings: Mapping[str, str] | None = None,
    *,
    protocols: str = "",
    url: str | None = None,
    credentials: Credentials | None = None,
    proxy: str | None = None,
) -> dict[str, str]:
    """Return the whole environment of a git process. It goes through `proxy` alone, where one is named.

    `protocols` names the transports it may use, separated by colons. `credentials` are for the server of
    `url` alone: a redirect to another one gets none. They are in the environment, which only our own uid can
    read, not in argv, a URL or a file.
    """
    configuration = {**_SETTINGS, **(settings or {})}
    result = {name: os.environ[name] for name in (*_PASSED_ON, *_PROXIES) if name in os.environ}
    if proxy is not None:
        result = {name: value for name, value in result.items() if name not in _PROXIES}
        result |= dict.fromkeys(("http_proxy", "https_proxy", "all_proxy"), proxy) | {"no_proxy": ""}
    result |= {
        "HOME": "/nonexistent",
        "LC_ALL": "C",
        "GIT_CONFIG_NOSYSTEM": "1",
        "GIT_CONFIG_GLOBAL": "/dev/null",
        "GIT_ATTR_NOSYSTEM": "1",
        "GIT_TERMINAL_PROMPT": "0",
        "GIT_ASKPASS": "true",
        "GIT_ALLOW_PROTOCOL": protocols,
        "GIT_NO_REPLACE_OBJECTS": "1",
    }
    if credentials is not None and url is not None:
        parts = urlsplit(url)
        helper = '!f() { printf "username=%s\\npassword=%s\\n" "$DYNFLOW_GIT_USER" "$DYNFLOW_GIT_TOKEN"; }; f'
        configuration[f"credential.{parts.scheme}://{parts.netloc}.helper"] = helper
        result |= {"DYNFLOW_GIT_USER": credentials.username, "DYNFLOW_GIT_TOKEN": credentials.password}
    result[_OWNER] = f"{cgroups.platform_name()}@{_pid_namespace()}"
    result["GIT_CONFIG_COUNT"] = str(len(configuration))
    for number, (key, value) in enumerate(configuration.items()):
        result |= {f"GIT_CONFIG_KEY_{number}": key, f"GIT_CONFIG_VALUE_{number}": value}
    return result


def end_orphans() -> int:
    """Kill the git processes of platforms on this machine that are dead; return how many.

    They are in sessions of their own, and one that waits for a remote does not notice that nobody waits for it:
    it would go on writing into a repository of which we believe that nobody works there.
    """
    ended, here = 0, _pid_namespace()
    for path in Path("/proc").glob("[0-9]*/environ"):
        with suppress(OSError):  # ended meanwhile, or somebody else's
            found = _OWNED.search(path.read_bytes())
            if found is not None and int(found[2]) == here and not cgroups.is_alive(found[1].decode()):
                os.kill(int(path.parent.name), signal.SIGKILL)
                ended += 1
    return ended


def _pid_namespace() -> int:
    """Return in which numbering of processes ours is: a container's processes are seen from outside too."""
    return Path("/proc/self/ns/pid").stat().st_ino


def check_url(url: str, *, allow_file: bool) -> None:
    """Refuse what is not a plain address of a repository. InvalidInputError says why."""
    parts = urlsplit(url)
    allowed = {"https", "http", "file"} if allow_file else {"https", "http"}
    if parts.scheme not in allowed:
        raise InvalidInputError(f"a clone URL starts with one of {sorted(allowed)}, got {redact(url)!r}")
    if parts.username or parts.password:
        raise InvalidInputError(f"a clone URL has no credentials in it: {redact(url)!r}")


@asynccontextmanager
async def process(
    arguments: Sequence[str],
    env: Mapping[str, str],
    *,
    stdin: int | IO[bytes] = subprocess.DEVNULL,
    stderr: int = subprocess.PIPE,
) -> AsyncIterator[anyio.abc.Process]:
    """Run git for the time of the block; however that ends, the process and its children are gone then."""
    try:
        started = await anyio.open_process(
            ["git", *arguments], stdin=stdin, stderr=stderr, env=env, cwd="/", start_new_session=True
        )
    except OSError as error:
        raise UnavailableError(f"git cannot be started: {error}") from error
    try:
        yield started
    finally:
        with suppress(ProcessLookupError):
            os.killpg(started.pid, signal.SIGKILL)
        with anyio.CancelScope(shield=True):
            await started.aclose()


async def run(
    arguments: Sequence[str],
    env: Mapping[str, str],
    *,
    within: timedelta,
    secrets: Sequence[str] = (),
    stdin: bytes = b"",
) -> bytes:
    """Run git to its end and return what it printed.

    Raises GitError where it fails, UnavailableError where it does not end in time. `secrets` are taken out of
    what it says.
    """
    output, errors = bytearray(), bytearray()
    given = subprocess.PIPE if stdin else subprocess.DEVNULL
    try:
        with anyio.fail_after(within.total_seconds()):
            async with process(arguments, env, stdin=given) as git, anyio.create_task_group() as tasks:
                tasks.start_soon(_collect, git.stdout, output, _OUTPUT_BYTES)
                tasks.start_soon(_collect, git.stderr, errors, _ERROR_BYTES)
                await _give(git.stdin, stdin)
                exit_code = await git.wait()
    except TimeoutError:
        raise UnavailableError(f"git {arguments[0]} did not end within {within}") from None
    if exit_code:
        raise GitError(exit_code, redact(errors.decode(errors="replace"), *secrets))
    return bytes(output)


async def _give(stream: anyio.abc.ByteSendStream | None, data: bytes) -> None:
    if stream is not None:
        with suppress(anyio.BrokenResourceError):  # it ended without reading: its exit code says why
            await stream.send(data)
            await stream.aclose()


async def _collect(stream: anyio.abc.ByteReceiveStream | None, into: bytearray, limit: int) -> None:
    if stream is None:
        return
    async for chunk in stream:
        into += chunk
        del into[: max(0, len(into) - limit)]


async def read_configuration(content: bytes) -> list[tuple[str, str]]:
    """Return keys and values of a file in git's format of configuration, which a commit has. Raises GitError.

    Without `--no-includes` git would read whatever file of the host it names.
    """
    command = ["config", "--file", "-", "--no-includes", "--null", "--list"]
    listed = await run(command, environment(), within=timedelta(seconds=30), stdin=content or b"\n")
    lines = [line.partition("\n") for line in listed.decode(errors="replace").split("\0")]
    return [(key, value) for key, _, value in lines if key]
