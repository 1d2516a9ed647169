"""Trees that containers get: nobody else of the host may enter, and the sweep minds only its own."""

from __future__ import annotations

import os
import stat
import subprocess
import tempfile
from pathlib import Path

import pytest

from ci_platform.errors import UnavailableError
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


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can mount and unmount")
@pytest.mark.parametrize("kind", ["overlay", "folder"])
def test_what_is_mounted_in_a_workspace_stays_in_it_whatever_its_names_lead_to(
    tmp_path: Path, kind: str
) -> None:
    """Programs of an image may run in a warm container while the platform mounts there, and change every name."""
    outside, root = tmp_path / "outside", tmp_path / "workspace"
    (outside / "deps").mkdir(parents=True)
    (root / "real" / "deps").mkdir(parents=True)
    (root / "sub").symlink_to(outside)
    tree = a_tree(tmp_path / "job")
    if kind == "folder":
        tree = Tree(tree.upper, tree.work)
        (tree.upper / "secret").write_text("theirs")
    with pytest.raises(UnavailableError, match="'sub/deps' is no folder of the workspace any more"):
        merged.mount_below(tree, root, "sub/deps")
    assert not (outside / "deps").is_mount()
    merged.mount_below(tree, root, "real/deps")
    try:
        assert (root / "real" / "deps" / "secret").read_text() == "theirs"
        subprocess.run(["mount", "-t", "tmpfs", "tmpfs", outside / "deps"], check=True)
        try:
            assert not merged.unmount_below(root, "sub/deps")
            assert (outside / "deps").is_mount(), "it is not the platform's to unmount"
        finally:
            subprocess.run(["umount", outside / "deps"], check=True)
        with (root / "real" / "deps" / "secret").open():
            assert not merged.unmount_below(root, "real/deps"), "somebody has a file of it open"
    finally:
        subprocess.run(["umount", "-l", root / "real" / "deps"], check=False, capture_output=True)
    assert merged.mounts_below(str(root)) == []
    merged.mount_below(a_tree(tmp_path / "later"), root, "real/deps")
    assert merged.unmount_below(root, "real/deps")
    assert list((root / "real" / "deps").iterdir()) == []
