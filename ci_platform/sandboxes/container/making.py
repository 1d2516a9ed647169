"""Making images: from a Dockerfile, and as what a command has left of a container's file system."""

from __future__ import annotations

import secrets
import tempfile
import time
from collections.abc import Iterable, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import anyio
import anyio.from_thread
import anyio.to_thread
import docker
from docker.errors import APIError, ImageNotFound
from docker.utils.build import create_archive, exclude_paths

from ci_platform.errors import FailedError, LimitExceededError, UnavailableError
from ci_platform.sandboxes import MEBIBYTE, MadeImage, Output, SandboxJob, SandboxOutcome, StopReason
from ci_platform.sandboxes.container import walls
from ci_platform.sandboxes.container.engine import JOB, PLATFORM, RUN, Engine, remove
from ci_platform.sandboxes.container.executions import started

_KEEPER = ["sh", "-c", "exec sleep 2147483647"]
_DOCKERFILE = ".dockerfile-of-dynflow"
_MADE = "dynflow-made"
_CONFLICT = 409
_LARGEST_CONTEXT = 2048 * MEBIBYTE
_BLANK = f'LABEL {JOB}="" {RUN}="" {PLATFORM}=""'


async def refuse_triggers(engine: Engine, image: str) -> None:
    """Raise FailedError for an image that would have the engine do things of its own in a build (ONBUILD)."""
    found = await engine.call(lambda client: client.api.inspect_image(image))  # type: ignore[no-untyped-call]
    if found["Config"].get("OnBuild"):
        raise FailedError(f"the image {image!r} has ONBUILD instructions, which builds may not have here")


def private_name(home: str) -> str:
    """Return a name for an image that no other run can guess: whoever names an image of this machine may use it.

    `home` says which platform has made it.
    """
    return f"{_MADE}/{home}-{secrets.token_hex(16)}"


def made(client: docker.DockerClient, home: str) -> list[MadeImage]:
    """Return the images that runs of a platform have made, with the bytes that no other image shares."""
    return [
        MadeImage(
            each["Id"],
            max(0, each["Size"] - max(0, each["SharedSize"])),
            datetime.fromtimestamp(each["Created"], UTC),
        )
        for each in client.df()["Images"] or ()
        if any(tag.startswith(f"{_MADE}/{home}-") for tag in each["RepoTags"] or ())
    ]


def remove_made(client: docker.DockerClient, home: str, exact: str) -> bool:
    """Remove an image that a run has made; False while a container, or another name, holds it."""
    try:
        tags = client.api.inspect_image(exact)["RepoTags"] or ()  # type: ignore[no-untyped-call]
        if not all(tag.startswith(f"{_MADE}/{home}-") for tag in tags):
            return False
        for tag in tags or [exact]:
            client.api.remove_image(tag)
    except ImageNotFound:
        return True
    except APIError as error:
        if error.status_code == _CONFLICT:
            return False
        raise
    return True


async def install(
    engine: Engine, image: str, job: SandboxJob, folder: Path, networks: list[str], output: Output, home: str
) -> tuple[SandboxOutcome, str | None]:
    """Run one command as root of a container of its own, and return its file system as an image if it exits with 0.

    The command comes into the container that keeps still: what is in its environment is not in the image.
    """
    program = {"entrypoint": _KEEPER, "working_dir": walls.WORKSPACE}
    binds = [f"{folder}:{walls.WORKSPACE}:rw"]
    container = await engine.shielded(
        lambda client: walls.create(
            client, image, job, binds=binds, networks=networks, program=program, keepers=1, installs=True
        )
    )
    try:
        await engine.shielded(lambda client: client.api.start(container))
        started = time.monotonic()
        code, reason = await _follow(engine, container, job, output)
        outcome = SandboxOutcome(code, reason, timedelta(seconds=time.monotonic() - started))
        if code or reason != "exited":
            return outcome, None
        return outcome, await engine.shielded(lambda client: _commit(client, container, home))
    finally:
        await engine.shielded(lambda client: remove(client, container))


async def _follow(engine: Engine, container: str, job: SandboxJob, output: Output) -> tuple[int, StopReason]:
    left = job.limits.output

    def take(piece: bytes) -> bool:
        nonlocal left
        output(piece[: max(left, 0)])
        left -= len(piece)
        return left >= 0

    def work(client: docker.DockerClient) -> int | None:
        made = client.api.exec_create(
            container,
            list(job.argv),
            environment=walls.environment(job),
            user="0:0",
            workdir=walls.place(job.cwd),
        )
        with started(client, made["Id"]) as pieces:
            for piece in pieces:
                if not anyio.from_thread.run_sync(take, piece):
                    return None
        return int(client.api.exec_inspect(made["Id"])["ExitCode"] or 0)

    with anyio.move_on_after(job.limits.timeout.total_seconds()):
        code = await engine.call(work, abandon=True)
        return (128 + 9, "output") if code is None else (code, "exited")
    return 128 + 9, "timeout"


def _commit(client: docker.DockerClient, container: str, home: str) -> str:
    made = client.api.commit(
        container,
        repository=private_name(home),
        tag="latest",
        changes=[_BLANK, "ENTRYPOINT []", 'CMD ["sh"]'],
    )
    return str(made["Id"])


def read_dockerfile(folder: Path, name: str) -> str:
    """Return the text of a file of a workspace. Raises FailedError where it is none, or is outside."""
    try:
        place = (folder / name).resolve()
        if Path(name).is_absolute() or not place.is_relative_to(folder.resolve()) or not place.is_file():
            raise FailedError(f"there is no Dockerfile {name!r} in the workspace")
        with place.open(encoding="utf-8") as file:
            return file.read(MEBIBYTE)
    except (OSError, ValueError) as error:
        raise FailedError(f"the Dockerfile {name!r} cannot be read: {error}") from None


async def build(
    engine: Engine, folder: Path, dockerfile: str, job: SandboxJob, network: str, output: Output, home: str
) -> str:
    """Build an image from `folder` by the text of a Dockerfile, within the job's limits; returns its id.

    Raises FailedError with what went wrong in the build.
    """
    tag = private_name(home)
    over = False

    def work(client: docker.DockerClient) -> str:
        with _context(folder, dockerfile) as context:
            messages = client.api.build(
                fileobj=context,
                custom_context=True,
                dockerfile=_DOCKERFILE,
                tag=tag,
                rm=True,
                forcerm=True,
                network_mode=network,
                decode=True,
                container_limits={"memory": job.limits.memory, "memswap": job.limits.memory},
            )
            return _read_build(messages, output, lambda: over)

    try:
        with anyio.move_on_after(job.limits.timeout.total_seconds()):
            return await engine.call(work, abandon=True)
    finally:
        over = True
    raise LimitExceededError(f"the build took longer than {job.limits.timeout.total_seconds():g} s")


def _read_build(messages: Iterable[Mapping[str, Any]], output: Output, is_over: Any) -> str:
    image, failed = "", None
    for message in messages:  # to its end in any case: that is what closes the connection
        if is_over():
            raise UnavailableError("the build was stopped")
        failed = message.get("error", failed)
        if message.get("stream"):
            anyio.from_thread.run_sync(output, str(message["stream"]).encode())
        image = (message.get("aux") or {}).get("ID", image)
    if failed is not None:
        raise FailedError(f"the build failed: {str(failed).strip()[:2000]}")
    if not image:
        raise UnavailableError("the engine did not say which image it has built")
    return image


@contextmanager
def _context(folder: Path, dockerfile: str) -> Any:
    """Pack a folder as the docker command does, with the Dockerfile that was checked in place of its own."""
    ignored = folder / ".dockerignore"
    patterns = []
    if ignored.is_file() and not ignored.is_symlink():
        lines = ignored.read_text(errors="replace").splitlines()
        patterns = [line.strip() for line in lines if line.strip() and not line.startswith("#")]
    files = sorted(exclude_paths(str(folder), patterns, dockerfile=_DOCKERFILE))
    size = sum((folder / name).lstat().st_size for name in files if (folder / name).exists())
    if size > _LARGEST_CONTEXT:
        raise LimitExceededError(f"the files of the build are larger than {_LARGEST_CONTEXT // MEBIBYTE} MiB")
    with tempfile.TemporaryFile() as file:
        create_archive(
            root=str(folder),
            files=[name for name in files if name != _DOCKERFILE],
            fileobj=file,
            extra_files=[(_DOCKERFILE, dockerfile)],
        )
        file.seek(0)
        yield file


async def push(engine: Engine, image: str, references: list[str], output: Output) -> list[str]:
    """Push an image under some references; returns each with its digest."""

    def work(client: docker.DockerClient, reference: str) -> str:
        repository, _, tag = reference.rpartition(":")
        client.api.tag(image, repository, tag)
        digest, failed = "", None
        try:
            for message in client.api.push(repository, tag=tag, stream=True, decode=True):
                failed = message.get("error", failed)
                digest = (message.get("aux") or {}).get("Digest", digest)
        except APIError as error:
            raise UnavailableError(f"{reference!r} cannot be pushed: {error.explanation}") from None
        finally:
            client.api.remove_image(reference, noprune=True)
        if failed is not None:
            raise FailedError(f"{reference!r} cannot be pushed: {str(failed)[:500]}")
        anyio.from_thread.run_sync(output, f"pushed {reference}@{digest}\n".encode())
        return f"{reference}@{digest}"

    return [await engine.call(lambda client, it=each: work(client, it)) for each in references]  # type: ignore[misc]
