"""Archives of artifacts: what other programs unpack is what was kept, and the same files are the same bytes."""

from __future__ import annotations

import hashlib
import io
import stat
import subprocess
import tarfile
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path

import pytest

from ci_platform.artifacts.archives import Format, archive, gathered, size_of
from ci_platform.artifacts.contents import Entry, listing
from ci_platform.errors import NotFoundError

CONTENTS = {"a": b"x" * 3_000_000, "deep/ünï ☃": b"", "run": b"#!/bin/sh\n"}
MODES = {"a": 0o644, "deep/ünï ☃": 0o600, "run": 0o755}


def entries() -> list[Entry]:
    found = [
        Entry(path, "file", MODES[path], len(data), hashlib.sha256(data).hexdigest(), zlib.crc32(data))
        for path, data in CONTENTS.items()
    ]
    found += [Entry("empty", "folder", 0o755), Entry("link", "symlink", 0o777, target="deep/ünï ☃")]
    found.append(Entry("long/" * 60 + "name", "file", 0o644))
    return sorted(found, key=lambda entry: entry.path)


def pieces(entry: Entry) -> Iterator[bytes]:
    data = CONTENTS.get(entry.path, b"")
    return (data[at : at + 100_000] for at in range(0, len(data), 100_000))


@pytest.mark.parametrize("form", ["zip", "tar"])
def test_archives_are_the_same_each_time_and_as_long_as_was_said(form: Format) -> None:
    first, second = (b"".join(archive(form, entries(), pieces)) for _ in range(2))
    assert first == second
    assert len(first) == size_of(form, entries())
    parts = list(gathered(archive(form, entries(), pieces)))
    assert b"".join(parts) == first
    assert len(parts) < 20
    assert b"".join(archive(form, [], pieces)) != b""


def test_a_zip_has_files_modes_and_links(tmp_path: Path) -> None:
    path = tmp_path / "x.zip"
    path.write_bytes(b"".join(archive("zip", entries(), pieces)))
    with zipfile.ZipFile(path) as found:
        assert found.testzip() is None
        names = [entry.path + ("/" if entry.kind == "folder" else "") for entry in entries()]
        assert found.namelist() == names
        for name, data in CONTENTS.items():
            assert found.read(name) == data
            assert found.getinfo(name).external_attr >> 16 == stat.S_IFREG | MODES[name]
        assert found.getinfo("link").external_attr >> 16 == stat.S_IFLNK | 0o777
        assert found.read("link").decode() == "deep/ünï ☃"
        assert found.getinfo("empty/").is_dir()


def test_a_tar_has_files_modes_and_links(tmp_path: Path) -> None:
    path = tmp_path / "x.tar"
    path.write_bytes(b"".join(archive("tar", entries(), pieces)))
    subprocess.run(["tar", "-xpf", path, "-C", tmp_path], check=True, capture_output=True)
    for name, data in CONTENTS.items():
        assert (tmp_path / name).read_bytes() == data
        assert stat.S_IMODE((tmp_path / name).stat().st_mode) == MODES[name]
    assert str((tmp_path / "link").readlink()) == "deep/ünï ☃"
    assert (tmp_path / "empty").is_dir()
    with tarfile.open(path) as found:
        assert {member.mtime for member in found} == {315532800}


def test_a_zip_of_files_beyond_four_gigabytes_says_so_in_the_fields_for_that() -> None:
    large = Entry("large", "file", 0o644, 5 << 30, "", 7)
    after = Entry("z", "file", 0o644, 3, "", zlib.crc32(b"end"))
    head, small, *rest = archive("zip", [large, after], lambda entry: [b"end"] if entry is after else [])
    # As if the five gigabytes were there: a file that has them as a hole.
    file = _Gap(head, 5 << 30, small + b"".join(rest))
    assert len(file) == size_of("zip", [large, after])
    with zipfile.ZipFile(file) as found:
        assert [(each.file_size, each.CRC) for each in found.infolist()] == [(5 << 30, 7), (3, after.crc)]
        assert found.read("z") == b"end"


class _Gap(io.RawIOBase):
    """A file with a hole after its beginning."""

    def __init__(self, head: bytes, gap: int, rest: bytes) -> None:
        self._head, self._gap, self._rest, self._at = head, gap, rest, 0

    def __len__(self) -> int:
        return len(self._head) + self._gap + len(self._rest)

    def seekable(self) -> bool:
        return True

    def readable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = 0) -> int:
        self._at = offset + (0, self._at, len(self))[whence]
        return self._at

    def read(self, size: int = -1) -> bytes:
        start = len(self._head) + self._gap
        if self._at < len(self._head):
            found = self._head[self._at :]
        else:
            assert self._at >= start, "nobody reads the hole"
            found = self._rest[self._at - start :]
        found = found if size < 0 else found[:size]
        self._at += len(found)
        return found


def test_folders_of_an_artifact_are_listed() -> None:
    found = entries()
    assert [(each.name, each.kind) for each in listing(found, "")] == [
        ("a", "file"),
        ("deep", "folder"),
        ("empty", "folder"),
        ("link", "symlink"),
        ("long", "folder"),
        ("run", "script"),
    ]
    assert [each.name for each in listing(found, "deep")] == ["ünï ☃"]
    assert listing(found, "empty") == []
    for folder in ("nothing", "a", "dee", "../x"):
        with pytest.raises(NotFoundError):
            listing(found, folder)
