"""Patches: what git writes is applied as git applies it; what is hostile or does not fit is refused by name."""

from __future__ import annotations

import os
import random
import subprocess
from pathlib import Path

import pytest

from ci_platform import layers
from ci_platform.errors import PatchError
from ci_platform.layer_copies import Apply
from ci_platform.patches import MOST_BYTES, parse
from ci_platform.patching import plan
from ci_platform.trees import Owner

OWNER = Owner(os.geteuid(), os.getegid())
FIRST = "--- a/x\n+++ b/x\n"


def git(folder: Path, *words: str) -> bytes:
    fixed = ["-c", "user.name=a", "-c", "user.email=a@b", "-c", "core.quotePath=true"]
    return subprocess.run(["git", *fixed, *words], cwd=folder, check=True, capture_output=True).stdout


def contents(folder: Path) -> dict[str, tuple[str, bytes]]:
    """Return what a tree shows: kind and bytes of each path; folders do not count."""
    found = {}
    for entry in layers.walk(folder):
        path = folder / entry.path
        if entry.path.split("/")[0] != ".git" and entry.kind in {"file", "symlink"}:
            link = entry.kind == "symlink"
            script = bool(entry.stat.st_mode & 0o100) and not link
            data = os.fsencode(path.readlink()) if link else path.read_bytes()
            found[entry.path] = ("symlink" if link else "script" if script else "file", data)
    return found


def patched(tmp_path: Path, lower: Path, text: bytes) -> dict[str, tuple[str, bytes]]:
    """Apply a patch as a layer over `lower`; return what the two show together."""
    upper, both = tmp_path / "upper", tmp_path / "both"
    for folder in (upper, both):
        layers.remove_tree(folder)
        folder.mkdir()
    plan(parse(text), [lower]).write(upper, OWNER)
    for layer in (lower, upper):
        Apply()(layer, both)
    return contents(both)


def scramble(chance: random.Random, lines: list[str]) -> list[str]:
    for _ in range(chance.randint(1, 4)):
        at = chance.randrange(len(lines) + 1)
        lines[at : at + chance.randint(0, 3)] = [
            f"new {chance.random()}\n" for _ in range(chance.randint(0, 3))
        ]
    if lines and chance.random() < 0.3:
        lines[-1] = lines[-1].rstrip("\n")
    return lines


@pytest.mark.parametrize("seed", range(6))
def test_what_git_diff_writes_gives_the_tree_that_it_was_made_from(tmp_path: Path, seed: int) -> None:
    chance, work = random.Random(seed), tmp_path / "work"
    (work / "sub" / "deep").mkdir(parents=True)
    names = ["a.txt", "sub/b.txt", 'sub/deep/täb\t"q".txt', "sub/deep/d", "gone", "moves", "mode.sh"]
    for name in names:
        lines = [f"{name} {number % 7}\r\n" if number % 5 else "\n" for number in range(40)]
        (work / name).write_text("".join(lines), newline="")
    (work / "link").symlink_to("a.txt")
    git(work, "init", "-q")
    git(work, "add", "-A")
    git(work, "commit", "-qm", "old")
    for name in names[:4]:
        old = (work / name).read_bytes().decode().splitlines(keepends=True)
        (work / name).write_text("".join(scramble(chance, old)), newline="")
    (work / "gone").unlink()
    (work / "moves").rename(work / "moved")
    (work / "mode.sh").chmod(0o755)
    (work / "link").unlink()
    (work / "link").symlink_to("/etc/passwd")
    (work / "empty").touch()
    (work / "sub/new").mkdir()
    (work / "sub/new/file").write_bytes(b"no end of line")
    git(work, "add", "-A")
    git(work, "commit", "-qm", "new")
    wanted, text = contents(work), git(work, "diff", "-M", f"-U{chance.randint(0, 4)}", "HEAD~", "HEAD")
    git(work, "checkout", "-q", "HEAD~")
    layers.remove_tree(work / ".git")
    assert patched(tmp_path, work, text) == wanted


def test_a_hunk_is_found_where_the_file_has_moved_on(tmp_path: Path) -> None:
    lower = tmp_path / "lower"
    lower.mkdir()
    (lower / "x").write_text("".join(f"{number}\n" for number in range(100)))
    text = f"some words before\n\n{FIRST}@@ -40,3 +40,3 @@\n 50\n-51\n+fifty-one\n 52\n".encode()
    assert b"\n50\nfifty-one\n52\n" in patched(tmp_path, lower, text)["x"][1]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "this is no patch"),
        ("x" * (MOST_BYTES + 1), "at most"),
        ("@@ -1 +1 @@\n-a\n+b\n", "without a file"),
        (f"{FIRST}@@ nonsense\n", "no hunks"),
        (f"{FIRST}@@ -1,3 +1,3 @@\n a\n", "'x', hunk 1: it is cut off"),
        (f"{FIRST}@@ -1 +1 @@\n-one\n+1\n@@ -3 +3 @@\n-not there\n+b\n", "'x', hunk 2 .*'not there'"),
        (f"{FIRST}@@ -999999999 +1 @@\n-not there\n+b\n", "hunk 1 .*does not apply"),
        ("--- a/no\n+++ b/no\n@@ -1 +1 @@\n-a\n+b\n", "'no': there is no such file"),
        ("--- /dev/null\n+++ b/x\n@@ -0,0 +1 @@\n+b\n", "'x': .*is there already"),
        ("--- /dev/null\n+++ b/folder\n@@ -0,0 +1 @@\n+b\n", "'folder' is a folder"),
        ("--- a/x\n+++ /dev/null\n@@ -1 +0,0 @@\n-one\n", "'x': it would be deleted, but"),
        ("--- /dev/null\n+++ /dev/null\n@@ -0,0 +0,0 @@\n", "names no file"),
        ("diff --git a/x b/x\nGIT binary patch\nliteral 9\n", "binary file"),
        ("diff --git a/x b/x\nBinary files a/x and b/x differ\n", "binary file"),
        ("diff --git a/x b/x\nnew file mode 160000\n", "mode '160000'"),
        ("diff --git a/x b/x\nnew file mode 104755\n", "mode '104755'"),
        ("diff --git a/x b/y\nold mode 100644\nnew mode 100755\n", "does not say which file"),
        ("diff --git a/x b/x\nold mode 100644\nnew mode 120000\n", "a link for a file"),
        (
            "diff --git a/x b/y\nrename from x\nrename to y\ndiff --git a/x b/z\nrename from x\nrename to z\n",
            "has deleted or renamed it",
        ),
    ],
)
def test_what_does_not_fit_is_refused_with_file_and_hunk(tmp_path: Path, text: str, words: str) -> None:
    lower = tmp_path / "lower"
    (lower / "folder").mkdir(parents=True)
    (lower / "x").write_text("one\ntwo\nthree\n")
    with pytest.raises(PatchError, match=words):
        plan(parse(text.encode()), [lower])


@pytest.mark.parametrize(
    "path",
    [
        "../up",
        "/etc/cron.d/x",
        "in/../../up",
        "out/x",
        "to-x/y",
        ".git/config",
        "in/.GIT/hooks/x",
        "a//b",
        "./x",
    ],
)
@pytest.mark.parametrize(
    "shape", ["--- /dev/null\n+++ {}\n", 'diff --git a/x b/x\nrename from x\nrename to "{}"\n']
)
def test_no_patch_leaves_the_workspace(tmp_path: Path, path: str, shape: str) -> None:
    lower = tmp_path / "lower"
    lower.mkdir()
    (lower / "x").write_text("one\n")
    (lower / "out").symlink_to("/etc")
    (lower / "to-x").symlink_to("x")
    text = shape.format(path)
    text += "@@ -0,0 +1 @@\n+bad\n" if "+++" in text else ""
    with pytest.raises(PatchError, match=r"leaves the workspace|\.git|no path|no folder"):
        plan(parse(text.encode()), [lower])


def test_a_link_that_the_patch_makes_is_not_followed_by_it(tmp_path: Path) -> None:
    lower = tmp_path / "lower"
    lower.mkdir()
    link = "diff --git a/l b/l\nnew file mode 120000\n--- /dev/null\n+++ b/l\n@@ -0,0 +1 @@\n+/etc\n"
    text = f"{link}\\ No newline at end of file\n--- /dev/null\n+++ b/l/passwd\n@@ -0,0 +1 @@\n+bad\n"
    with pytest.raises(PatchError, match="'l/passwd' leads through 'l'"):
        plan(parse(text.encode()), [lower])


def test_a_patch_that_would_look_for_ever_is_given_up(tmp_path: Path) -> None:
    lower = tmp_path / "lower"
    lower.mkdir()
    (lower / "x").write_text("a\n" * 200_000)
    hunk = "@@ -1,1001 +1,1001 @@\n" + 1_000 * " a\n" + "-b\n+c\n"
    with pytest.raises(PatchError, match="too long"):
        plan(parse((FIRST + hunk).encode()), [lower])
