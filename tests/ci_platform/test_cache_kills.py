"""kill -9 before each change of a file that saving, carrying on and evicting make: an entry is whole, or not there."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path

import pytest

from ci_platform import layers
from ci_platform.caches.entries import CacheEntry, Entries, entry_id
from ci_platform.caches.opened import OpenCache
from ci_platform.copy_on_write import Method
from ci_platform.sandboxes import SANDBOX_UID
from ci_platform.trees import Owner
from tests.ci_platform.killed_workspaces import apart, die_at

METHOD = Method("overlay" if os.geteuid() == 0 else "user-overlay", {})
OWNER = Owner.of_sandboxes(SANDBOX_UID)
THEN = datetime(2026, 1, 1, tzinfo=UTC)
WHOLE = {"first": {f"f{n}" for n in range(4)}, "second": {f"f{n}" for n in range(1, 4)} | {"new"}}
MOST = 400
# All of them take 20 seconds.
EVERY = 12 if os.environ.get("CI") else 1


def save(entries: Entries, key: str, found: CacheEntry | None = None) -> CacheEntry:
    """Do what `Caches` does for a command that writes the files of `key`."""
    files = None if found is None else entries.folder(found) / "files"
    folder = entries.scratch()
    cache = OpenCache(key, ("deps",), "miss" if found is None else "restored", folder / "0", None, files)
    cache.prepare(METHOD, OWNER)
    (mount,) = cache.mounts()
    if found is None:
        for name in WHOLE[key]:
            (mount.tree.upper / name).write_text(name)
    else:
        (mount.tree.upper / "new").write_text("new")
        with layers.directory(mount.tree.upper) as upper:
            layers.make_whiteout(upper, "f0")
    (cache.folder / "entry").mkdir()
    size, count = cache.collect(cache.folder / "entry", OWNER, durable=True)
    identity = entry_id("tenant", "scope", key, cache.paths)
    entry = CacheEntry(identity, "o/r", "tenant", "scope", key, cache.paths, size, count, THEN, THEN)
    if entries.publish(cache.folder / "entry", entry):
        entries.add(entry)
    layers.remove_tree(folder)
    return entry


def work(root: Path) -> None:
    """Save an entry, carry it on, evict the first one."""
    entries = Entries(root)
    entries.load()
    first = entries.get(entry_id("tenant", "scope", "first", ("deps",))) or save(entries, "first")
    save(entries, "second", first)
    trash = entries.discard(first.id, THEN)
    assert trash is not None
    layers.remove_tree(trash)


def check(root: Path) -> None:
    """Look at what is there after a start, and do it again."""
    entries = Entries(root)
    entries.load()
    for entry in entries.all():
        folder = entries.folder(entry) / "files/0"
        assert {path.name for path in folder.iterdir()} == WHOLE[entry.key]
        assert all(path.read_text() == path.name for path in folder.iterdir())
        assert entry.files == len(WHOLE[entry.key])
    assert {path.name for path in root.glob("*")} <= {".open", ".trash", "tenant"}
    assert [*root.glob(".open/*"), *root.glob(".trash/*")] == []
    work(root)
    assert [entry.key for entry in entries_of(root)] == ["second"]


def entries_of(root: Path) -> list[CacheEntry]:
    """Return what a start finds."""
    entries = Entries(root)
    entries.load()
    return entries.all()


def main(root: Path) -> int:
    """Kill at every change until the work ends by itself; return how many there are."""
    for number in range(1, MOST, EVERY):
        layers.remove_tree(root)

        async def act(number: int = number) -> None:
            die_at(number)
            work(root)

        async def look() -> None:
            check(root)

        ended = apart(act)
        assert ended in {0, -signal.SIGKILL}, ended
        assert apart(look) == 0, f"killed before change {number}"
        if ended == 0:
            return number - 1
    raise AssertionError(f"it goes on after {MOST} changes")


@pytest.mark.slow
async def test_a_kill_before_any_change_leaves_whole_entries_and_nothing_else(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tests.ci_platform.test_cache_kills", str(tmp_path / "caches")]
    done = subprocess.run(  # noqa: ASYNC221 - nothing else runs here
        command, cwd=Path(__file__).parents[2], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert int(done.stdout.split()[-1]) > 30


if __name__ == "__main__":
    sys.stdout.write(f"{main(Path(sys.argv[1]))}\n")
