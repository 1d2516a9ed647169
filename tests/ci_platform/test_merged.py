"""Trees that containers get: nobody else of the host may enter, and the sweep minds only its own."""

from __future__ import annotations

import os
import stat
import subprocess
import tempfile
from pathlib import Path

import pytest

from ci_platform.sandboxes import Tree, merged

DEAD = 4_194_305  # above the largest process id there is


@pytest.fixture
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    (tmp_path / "tmp").mkdir()
    return tmp_path / "tmp"


def a_tree(root: Path) -> Tree:
    for name in ("upper", "work", "lower"):
        (root / name).mkdir(parents=True)
        (root / name).chmod(0o777)
    (root / "lower" / "secret").write_text("theirs")
    return Tree(root / "upper", root / "work", (root / "lower",))


def test_a_tree_lies_where_only_the_platforms_user_may_enter(temporary: Path, tmp_path: Path) -> None:
    with merged.merged(a_tree(tmp_path / "job")) as folder:
        assert (folder / "secret").read_text() == "theirs"
        (place,) = temporary.iterdir()
        assert stat.S_IMODE(place.stat().st_mode) == 0o700
        assert place in folder.parents
        (folder / "new").write_text("x")
    assert (tmp_path / "job" / "upper" / "new").read_text() == "x"
    assert list(temporary.iterdir()) == []


def test_what_a_dead_platform_left_is_swept(temporary: Path) -> None:
    left = temporary / f"dynflow-tree-{DEAD}-x"
    (left / "tree" / "deep").mkdir(parents=True)
    assert merged.sweep() == 1
    assert not left.exists()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can mount and unmount")
def test_a_link_that_somebody_put_there_unmounts_nothing(temporary: Path, tmp_path: Path) -> None:
    mounted = tmp_path / "mounted"
    mounted.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "tmpfs", mounted], check=True)
    try:
        (temporary / f"dynflow-tree-{DEAD}-x").symlink_to(mounted)
        foreign = temporary / f"dynflow-tree-{DEAD}-y"
        foreign.mkdir()
        (foreign / "tree").symlink_to(mounted)
        os.chown(foreign, 12345, 12345)
        assert merged.sweep() == 0
        assert mounted.is_mount()
    finally:
        subprocess.run(["umount", mounted], check=True)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can mount and unmount")
def test_a_tree_that_cannot_be_unmounted_is_not_emptied(
    temporary: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(merged, "unmount", lambda place: False)
    tree = temporary / f"dynflow-tree-{DEAD}-x" / "tree"
    tree.mkdir(parents=True)
    subprocess.run(["mount", "-t", "tmpfs", "tmpfs", tree], check=True)
    try:
        (tree / "work").write_text("a tenant's")
        assert merged.sweep() == 0
        assert (tree / "work").exists()
    finally:
        subprocess.run(["umount", tree], check=True)
