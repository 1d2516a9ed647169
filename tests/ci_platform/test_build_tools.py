"""What build tools leave is there for the next command, and they take it for theirs: nothing is built twice."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from tests.ci_platform.workspace_desk import Desk, opened_desk

RUSTUP = sorted(Path.home().glob(".rustup/toolchains/*/bin/cargo"))
PARTS = ("engine", "mill", "store", "reader")

MAKEFILE = """
app: main.o {objects}
\tcc -o $@ $^
%.o: %.c parts.h
\tcc -c -o $@ $<
""".format(objects=" ".join(f"{part}.o" for part in PARTS))
C_FILES = {
    "Makefile": MAKEFILE.encode(),
    "parts.h": "".join(f"int {part}(void);\n" for part in PARTS).encode(),
    "main.c": b'#include <stdio.h>\n#include "parts.h"\nint main(void) { printf("%d\\n", '
    + " + ".join(f"{part}()" for part in PARTS).encode()
    + b"); return 0; }\n",
    **{f"{part}.c": f'#include "parts.h"\nint {part}(void) {{ return 1; }}\n'.encode() for part in PARTS},
}


@pytest.fixture
async def desk(tmp_path: Path) -> AsyncIterator[Desk]:
    # The tests' own environment has pytest; cargo comes with a toolchain of its user's.
    toolchains = [Path(sys.prefix), *(path.parents[1] for path in RUSTUP[:1])]
    async with opened_desk(tmp_path, toolchains=toolchains) as desk:
        yield desk


def needs(program: str) -> pytest.MarkDecorator:
    return pytest.mark.skipif(not shutil.which(program), reason=f"no {program} on this machine")


@needs("make")
@needs("cc")
async def test_make_compiles_what_has_changed_and_nothing_else(desk: Desk) -> None:
    await desk.fork(desk.remote.commit(C_FILES))
    assert (await desk.run("make && ./app")).splitlines()[-1] == "4"
    assert await desk.run("make") == "make: 'app' is up to date.\n"
    await desk.run("sed -i 's/return 1/return 2/' mill.c")
    assert (await desk.run("make && ./app")).splitlines() == [
        "cc -c -o mill.o mill.c",
        "cc -o app main.o engine.o mill.o store.o reader.o",
        "5",
    ]
    await desk.run("rm store.o; touch parts.h")
    assert (await desk.run("make")).count("cc -c") == 1 + len(PARTS)
    # Fresh forks have none of it, of this commit and of the next: no object is older than its source.
    sha = desk.remote.commit({"mill.c": C_FILES["mill.c"].replace(b"1", b"7")})
    await desk.fork(sha, "run2.build")
    assert (await desk.run("ls; make && ./app", "run2.build")).splitlines()[-1] == "10"


@pytest.mark.skipif(not RUSTUP, reason="no cargo on this machine")
@needs("cc")
async def test_cargo_finds_its_own_fresh(desk: Desk) -> None:
    files = {
        "Cargo.toml": b'[package]\nname = "app"\nversion = "0.1.0"\nedition = "2021"\n',
        "src/main.rs": b'mod part;\nfn main() { println!("{}", part::answer()); }\n',
        "src/part.rs": b"pub fn answer() -> u32 { 42 }\n",
    }
    await desk.fork(desk.remote.commit(files))
    build = "cargo build --offline 2>&1; target/debug/app"
    first = await desk.run(build)
    assert "Compiling app" in first
    assert first.endswith("42\n")
    again = await desk.run(build)
    assert "Compiling" not in again
    assert "Finished" in again
    await desk.run("sed -i s/42/43/ src/part.rs")
    changed = await desk.run(build)
    assert "Compiling app" in changed
    assert changed.endswith("43\n")


BACKEND = """
import zipfile
def build_editable(folder, config_settings=None, metadata_directory=None):
    name, info = "part-1.0-py3-none-any.whl", "part-1.0.dist-info"
    files = {
        "part.pth": "/workspace/src\\n",
        f"{info}/METADATA": "Metadata-Version: 2.1\\nName: part\\nVersion: 1.0\\n",
        f"{info}/WHEEL": "Wheel-Version: 1.0\\nGenerator: test\\nRoot-Is-Purelib: true\\nTag: py3-none-any\\n",
    }
    with zipfile.ZipFile(f"{folder}/{name}", "w") as wheel:
        for path, text in files.items():
            wheel.writestr(path, text)
        wheel.writestr(f"{info}/RECORD", "".join(f"{path},,\\n" for path in [*files, f"{info}/RECORD"]))
    return name
def get_requires_for_build_editable(config_settings=None):
    return []
"""


async def test_what_pip_installs_editable_is_the_workspaces_source(desk: Desk) -> None:
    files = {
        "pyproject.toml": b'[build-system]\nrequires = []\nbuild-backend = "backend"\nbackend-path = ["."]\n',
        "backend.py": BACKEND.encode(),
        "src/part.py": b"ANSWER = 42\n",
    }
    await desk.fork(desk.remote.commit(files))
    await desk.run("python3 -m venv env && env/bin/pip -q install --no-index --no-build-isolation -e .")
    ask = "env/bin/python -c 'import part; print(part.ANSWER)'"
    assert await desk.run(ask) == "42\n"
    await desk.run("echo 'ANSWER = 4_300' > src/part.py")
    assert await desk.run(ask) == "4300\n"
    await desk.run("env/bin/pip -q install --no-index --no-build-isolation -e .")
    assert await desk.run(ask + "; env/bin/pip list --no-index | grep -c ^part") == "4300\n1\n"


async def test_pytest_remembers_what_failed_and_what_it_compiled(desk: Desk) -> None:
    await desk.fork(desk.remote.commit({"test_part.py": b"def test_a(): pass\ndef test_b(): assert 0\n"}))
    pytest_ = "python -m pytest -q -p no:randomly -p no:xdist"
    first = await desk.run(f"{pytest_} || true; stat -c %y __pycache__/*.pyc")
    assert "1 failed, 1 passed" in first
    await desk.run("grep -q test_b .pytest_cache/v/cache/lastfailed")
    again = await desk.run(f"{pytest_} --last-failed || true; stat -c %y __pycache__/*.pyc")
    assert "1 failed in" in again
    assert first.splitlines()[-1] == again.splitlines()[-1], "it was compiled again"


@needs("npm")
async def test_npm_ci_installs_the_same_twice(desk: Desk) -> None:
    package = {"name": "app", "version": "1.0.0", "dependencies": {"part": "file:part"}}
    part = {"name": "part", "version": "1.0.0"}
    lock = {
        "name": "app",
        "version": "1.0.0",
        "lockfileVersion": 3,
        "packages": {
            "": package,
            "part": {"version": "1.0.0"},
            "node_modules/part": {"resolved": "part", "link": True},
        },
    }
    files = {
        "package.json": json.dumps(package).encode(),
        "package-lock.json": json.dumps(lock).encode(),
        "part/package.json": json.dumps(part).encode(),
        "part/index.js": b"module.exports = 42\n",
    }
    await desk.fork(desk.remote.commit(files))
    install = "npm ci --offline --no-audit --no-fund --loglevel=error"
    ask = "node -p 'require(\"part\")'"
    await desk.run(install)
    assert await desk.run(ask) == "42\n"
    await desk.run(install)  # it removes what a command before it has put there
    assert await desk.run(f"{ask}; ls -A node_modules") == "42\n.package-lock.json\npart\n"
