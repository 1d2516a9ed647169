"""What a pipeline does most: run commands, and say how it went. Each is one capability call or pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from dynflow.durations import parse_duration
from dynflow.workflow import current_env
from pipelines.contract import CacheSpec, Command, CommandResult, SandboxKind, Service, Workspace, failure_of


async def run_in_sandbox(  # noqa: PLR0913 - one command has this many sides; all but two have a default
    workspace: Workspace,
    argv: Sequence[str],
    *,
    check: bool = True,
    sandbox: SandboxKind = "isolate",
    image: str | None = None,
    env: Mapping[str, str] | None = None,
    cwd: str = ".",
    timeout: Any = None,  # noqa: ASYNC109 - the platform enforces it, where the process is
    network: bool | Sequence[str] = False,
    services: Sequence[Service] = (),
    cache: CacheSpec | Sequence[CacheSpec] = (),
) -> CommandResult:
    """Run `argv` in a sandbox over `workspace` and return how it ended.

    What it changed in the workspace is kept if it exits with 0. Otherwise raises CommandFailedError
    (CommandKilledError, CommandNotStartedError), or returns the result too if `check` is false. Call it inside a step.

    `network`: False for none, True for the internet, or the hosts that the command may reach, such as
    `["pypi.org", "*.pythonhosted.org", "git.example.org:22"]`; a host without a port means 80 and 443.
    `cache`: files that it finds again of earlier runs, and leaves for later ones.
    """
    if isinstance(argv, str) or not all(isinstance(part, str) for part in argv) or not argv:
        raise TypeError(f'argv must be a list of strings, such as ["make", "test"], not {argv!r}')
    if isinstance(network, str):
        raise TypeError(
            f"network must be True, False or a list of hosts, such as [{network!r}], not {network!r}"
        )
    if image is not None and sandbox != "container":
        raise ValueError(f'image={image!r} needs sandbox="container"')
    if services and sandbox != "container":
        raise ValueError('services= needs sandbox="container"')
    command = Command(
        workspace=workspace,
        argv=tuple(argv),
        sandbox=sandbox,
        image=image,
        env=dict(env or {}),
        cwd=cwd,
        timeout=None if timeout is None else parse_duration(timeout),
        network=network if isinstance(network, bool) else tuple(network),
        services=tuple(services),
        cache=tuple(map(_plain, (cache,) if isinstance(cache, CacheSpec) else cache)),
    )
    result: CommandResult = await current_env.get().SANDBOX.run(command)
    if check and not result.ok:
        raise failure_of(result)
    return result


def _plain(cache: CacheSpec) -> CacheSpec:
    """Return the same with tuples. Text is a sequence too, of letters: that is never meant."""
    for name, value in (("paths", cache.paths), ("restore_keys", cache.restore_keys)):
        if isinstance(value, str):
            raise TypeError(f"{name} of a cache must be a list, such as [{value!r}], not {value!r}")
    return CacheSpec(cache.key, tuple(cache.paths), tuple(cache.restore_keys))


def summarise(results: Mapping[str, CommandResult]) -> str:
    """Return a Markdown table of commands: name, outcome, time."""
    rows = [
        f"| {name} | {'passed' if result.ok else f'failed ({result.exit_code})'} "
        f"| {result.duration.total_seconds():.1f} s |"
        for name, result in results.items()
    ]
    return "\n".join(["| Step | Outcome | Time |", "|---|---|---|", *rows])
