"""Which files of LFS the commits of a repository name: all pointers that any ref leads to. Blocking."""

from __future__ import annotations

import subprocess
import threading
from collections.abc import Collection, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import IO

from ci_platform import git_commands, lfs_pointers
from ci_platform.errors import UnavailableError

_WITHIN = 600.0
"""Seconds to look through a repository; a million commits take two minutes."""


def named(repository: Path, commits: Collection[str] = ()) -> set[str]:
    """Return the ids of the files that a ref leads to, or one of some commits that the repository may have.

    UnavailableError where not all of its objects can be read.
    """
    git = ["git", "--git-dir", str(repository)]
    revisions = ["rev-list", "--objects", "--no-object-names", "--all", "--ignore-missing", "--stdin"]
    small = f"--filter=blob:limit={lfs_pointers.LARGEST + 1}"
    with ExitStack() as stack:
        listing = stack.enter_context(_started([*git, *revisions, small], subprocess.PIPE))
        kinds = [*git, "cat-file", "--buffer", "--batch-check=%(objecttype) %(objectname)"]
        sorting = stack.enter_context(_started(kinds, listing.stdout))
        reading = stack.enter_context(_started([*git, "cat-file", "--buffer", "--batch"], subprocess.PIPE))
        started = [listing, sorting, reading]
        stack.enter_context(_ended_within(started))
        with suppress(BrokenPipeError), _pipe(listing.stdin) as asked:
            asked.write("".join(f"{commit}\n" for commit in commits).encode())
        pipes = (_pipe(sorting.stdout), _pipe(reading.stdin))
        threading.Thread(target=_hand_on, args=pipes, daemon=True).start()
        found = set(_pointers(_pipe(reading.stdout)))
        codes = [each.wait() for each in started]
        said = b"".join(_pipe(each.stderr).read(1000) for each in started)
    if any(codes):
        raise UnavailableError(f"{repository.name}: {said.decode(errors='replace').strip()[-300:]}")
    return found


def _pipe(pipe: IO[bytes] | None) -> IO[bytes]:
    if pipe is None:
        raise AssertionError("a process was started without a pipe")
    return pipe


@contextmanager
def _started(command: Sequence[str], given: int | IO[bytes] | None) -> Iterator[subprocess.Popen[bytes]]:
    environment = git_commands.environment()
    with subprocess.Popen(
        command, stdin=given, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment, cwd="/"
    ) as started:
        if given is not subprocess.PIPE and not isinstance(given, int) and given is not None:
            given.close()  # so that who writes into it learns of the reader's end
        try:
            yield started
        finally:
            started.kill()


@contextmanager
def _ended_within(started: Sequence[subprocess.Popen[bytes]]) -> Iterator[None]:
    def end() -> None:
        for each in started:
            each.kill()

    timer = threading.Timer(_WITHIN, end)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _hand_on(kinds: IO[bytes], blobs: IO[bytes]) -> None:
    with suppress(OSError, ValueError), blobs:
        for line in kinds:
            if line.startswith(b"blob "):
                blobs.write(line[5:])


def _pointers(objects: IO[bytes]) -> Iterator[str]:
    """Yield what the pointers among some objects name, as `git cat-file --batch` prints them."""
    while head := objects.readline():
        what = head.split()[-1]
        if not what.isdigit():
            raise UnavailableError(f"an object is not here: {head.decode(errors='replace')[:100]}")
        size = int(what)
        pointer = lfs_pointers.parse(objects.read(size + 1)[:-1])
        if pointer is not None:
            yield pointer.oid
