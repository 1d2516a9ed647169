"""What a warm container gets of the platform's own: an interpreter, its libraries and the agent, and nothing else.

An image need not have any of that, so it is copied from what the platform itself runs on, and containers have it
read-only. As root only.
"""

from __future__ import annotations

import importlib
import os
import py_compile
import re
import shutil
import subprocess
import sys
import sysconfig
import threading
from pathlib import Path

from ci_platform.errors import UnavailableError
from ci_platform.sandboxes import linux, merged
from ci_platform.sandboxes.container import agent

PLACE = "/.dynflow-agent"
"""Where it is, inside."""

UNSET = ("LD_PRELOAD", "LD_LIBRARY_PATH", "LD_AUDIT", "LD_BIND_NOW", "LD_DEBUG", "GLIBC_TUNABLES", "LOCPATH")
"""What an image may set for programs of its own, and means other libraries than the agent's."""

_ENCODINGS = ("__init__", "aliases", "utf_8")
_SIZE = "128m"
_ANSWERS_WITHIN = 10.0
"""Seconds for one of the programs that are asked here: they take milliseconds."""


class Kit:
    """The folder of one process, made when it is first asked for. Thread-safe; every method may block for 50 ms."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._place: Path | None = None
        self._problem: str | None = None

    def folder(self) -> Path:
        """Return what containers are to have at `PLACE`. Raises UnavailableError, again each time."""
        with self._lock:
            if self._problem is None and self._place is None:
                try:
                    self._place = _make()
                except (
                    OSError,
                    UnavailableError,
                    py_compile.PyCompileError,
                    subprocess.SubprocessError,
                ) as error:
                    self._problem = f"no agent for warm containers: {error}"
            if self._place is None:
                raise UnavailableError(str(self._problem))
            return self._place

    def close(self) -> None:
        """Remove it. Containers that have it keep what their agents have in memory, which is all they need."""
        with self._lock:
            if self._place is not None:
                merged.remove_place(self._place)
            self._place = self._problem = None


def trouble() -> str | None:
    """Return why agents cannot run on this machine, None where they can. Blocks for 50 ms."""
    kit = Kit()
    try:
        kit.folder()
    except UnavailableError as error:
        return str(error)
    finally:
        kit.close()
    return None


def command(*arguments: str, place: str = PLACE) -> list[str]:
    """Return how the agent is started."""
    loader = [f"{place}/loader", "--library-path", f"{place}/lib", f"{place}/python"]
    return [*loader, "-I", "-S", "-X", "utf8", f"{place}/agent.pyc", *arguments]


def _make() -> Path:
    place = merged.make_place()
    try:
        if os.statvfs(place).f_flag & os.ST_NOEXEC:
            linux.mount("dynflow", str(place), "tmpfs", linux.MS_NOSUID | linux.MS_NODEV, f"size={_SIZE}")
        place.chmod(0o755)
        _fill(place)
        _try(place)
    except BaseException:
        merged.remove_place(place)
        raise
    return place


def _fill(place: Path) -> None:
    library, modules = place / "lib", place / f"lib/python{sys.version_info[0]}.{sys.version_info[1]}"
    (modules / "lib-dynload").mkdir(parents=True)
    python = Path(sys.executable).resolve()
    shutil.copyfile(python, place / "python")
    programs = [python]
    for name in ("_socket", "errno"):
        file = getattr(importlib.import_module(name), "__file__", None)
        if file is not None:  # else it is part of the interpreter
            shutil.copyfile(file, modules / "lib-dynload" / Path(file).name)
            programs.append(Path(file))
    loader, libraries = _needed(programs)
    for path in libraries:
        shutil.copyfile(path, library / path.name)
    shutil.copyfile(loader, place / "loader")
    _compile(place, modules)
    for path in (place / "python", place / "agent.pyc", *library.rglob("*")):
        path.chmod(0o755 if path.is_dir() else 0o644)
    # To be run and not to be read: the kernel lets nobody else look into a process that runs such a file.
    (place / "loader").chmod(0o711)


def _compile(place: Path, modules: Path) -> None:
    """Write what the interpreter reads at its start, of the standard library and of ours."""
    standard = Path(sysconfig.get_path("stdlib"))
    (modules / "encodings").mkdir()
    for name in _ENCODINGS:
        source = standard / "encodings" / f"{name}.py"
        _compiled(source, modules / "encodings" / f"{name}.pyc")
    (modules / "os.py").touch()  # by it the interpreter finds the folder; its own is frozen into it
    _compiled(Path(agent.__file__), place / "agent.pyc")


def _compiled(source: Path, target: Path) -> None:
    # Optimised code without docstrings takes less of the containers' memory.
    py_compile.compile(str(source), str(target), dfile=source.name, doraise=True, optimize=2)


def _needed(programs: list[Path]) -> tuple[Path, set[Path]]:
    """Return the loader of a program, the first, and the libraries of all of them."""
    listed = subprocess.run(
        ["ldd", *map(str, programs)],
        env={"LC_ALL": "C", "PATH": os.environ.get("PATH", os.defpath)},
        capture_output=True,
        text=True,
        check=True,
        timeout=_ANSWERS_WITHIN,
    ).stdout
    loader = re.search(r"^\s*(/\S+) \(0x", listed, re.MULTILINE)
    if loader is None:
        raise UnavailableError(f"{programs[0]} is linked in a way of its own")
    found = {Path(path) for path in re.findall(r"=> (/\S+) \(0x", listed)}
    return Path(loader[1]), found


def _try(place: Path) -> None:
    """See that it starts. Raises UnavailableError."""
    done = subprocess.run(
        command(place=str(place)), env={}, cwd="/", capture_output=True, check=False, timeout=_ANSWERS_WITHIN
    )
    if done.returncode or done.stderr:
        raise UnavailableError(f"it does not start: {done.stderr.decode(errors='replace').strip()[-300:]}")
