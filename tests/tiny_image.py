"""Images of a few megabytes, made of this machine's own shell: quick to make, to push and to pull."""

from __future__ import annotations

import io
import re
import shutil
import subprocess
import tarfile
from pathlib import Path

PROGRAMS = ("sh", "cat", "sleep", "true", "ls", "id", "hostname")


def make_image(
    tag: str,
    files: dict[str, str] | None = None,
    *,
    programs: tuple[str, ...] = PROGRAMS,
    links: dict[str, str] | None = None,
) -> str:
    """Make an image with `programs`, `files` (path to text) and `links` under `tag`; returns its id, `sha256:…`."""
    done = subprocess.run(
        ["docker", "import", "-", tag],
        input=_root(files or {}, programs, links or {}),
        capture_output=True,
        check=True,
    )
    return done.stdout.decode().strip()


def docker(*arguments: str) -> str:
    """Run a docker command and return what it printed."""
    done = subprocess.run(["docker", *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def forget_image(*names: str) -> None:
    """Remove images where they are there."""
    subprocess.run(["docker", "rmi", "--force", *names], capture_output=True, check=False)


def _root(files: dict[str, str], programs: tuple[str, ...], links: dict[str, str]) -> bytes:
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w") as archive:
        for folder in ("tmp", "var/tmp", "home/ci", "workspace", "proc", "dev", "sys", "etc"):
            if folder.partition("/")[0] not in links:
                _add(archive, folder, None)
        for name, target in links.items():
            item = tarfile.TarInfo(name)
            item.type, item.linkname = tarfile.SYMTYPE, target
            archive.addfile(item)
        paths = {Path("/bin", program): shutil.which(program) for program in programs}
        assert all(paths.values()), paths
        for path, found in paths.items():
            _add(archive, str(path), Path(str(found)).read_bytes())
        for library in sorted({each for found in paths.values() for each in _libraries(str(found))}):
            _add(archive, library, Path(library).read_bytes())
        for name, text in files.items():
            _add(archive, name, text.encode())
    return packed.getvalue()


def _add(archive: tarfile.TarFile, name: str, content: bytes | None) -> None:
    item = tarfile.TarInfo(name.lstrip("/"))
    item.mode = 0o755
    if content is None:
        item.type = tarfile.DIRTYPE
        archive.addfile(item)
        return
    item.size = len(content)
    archive.addfile(item, io.BytesIO(content))


def _libraries(program: str) -> list[str]:
    listed = subprocess.run(["ldd", program], capture_output=True, text=True, check=False).stdout
    return re.findall(r"(/\S+) \(0x", listed)
