"""A tenant against its own interpreter: it may win there, and has gained nothing of the host's or another's."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
from collections.abc import AsyncIterator
from datetime import timedelta
from typing import Any

import pytest

from dynflow.errors import DynflowError, IsolateCrashedError, IsolateLimitError
from dynflow.isolates import Caller, Capability, IsolateLimits, ProcessLoader, WorkerCode, current_caller
from dynflow.serialization import MEBIBYTE
from tests.security.support import tenant, until

_ESCAPES = {
    "frames": """
import sys
def fetch(request, env):
    found, frame = [], sys._getframe()
    while frame:
        found += [str(value) for value in frame.f_locals.values()] + list(map(str, frame.f_globals.values()))
        frame = frame.f_back
    return found
""",
    "everything the garbage collector knows": """
import gc
def fetch(request, env):
    gc.unfreeze()
    found = []
    for thing in gc.get_objects():
        if type(thing) is dict:
            found += [value for value in list(thing.values()) if type(value) is str]
    return [text[:300] for text in found if "TOP" in text or "secret" in text.lower()][:200]
""",
    "subclasses of object": """
def fetch(request, env):
    found = []
    for cls in ().__class__.__base__.__subclasses__():
        names = getattr(getattr(cls, "__init__", None), "__globals__", {})
        found += [str(names["environ"])] if "environ" in names else []
    return found
""",
    "the program's whole memory": """
import ctypes
def fetch(request, env):
    found, start = [], id(object()) & ~0xFFFFF
    for page in range(256):  # a mebibyte of the heap
        text = ctypes.string_at(start + page * 4096, 4096)
        if b"TOP-" + b"SECRET" in text:
            found.append(text.decode(errors="replace"))
    return found
""",
    "modules and their source": """
import sys
def fetch(request, env):
    return [str(vars(module).get("environ")) for module in list(sys.modules.values())] + sys.argv + sys.orig_argv
""",
}


@pytest.fixture(scope="module")
async def loader() -> AsyncIterator[ProcessLoader]:
    os.environ["DYNFLOW_PROBE"] = "TOP-SECRET"
    try:
        async with ProcessLoader(ready=0) as made:
            yield made
    finally:
        del os.environ["DYNFLOW_PROBE"]


@pytest.mark.parametrize("escape", _ESCAPES)
async def test_whatever_a_tenant_finds_in_its_interpreter_is_nothing_of_the_hosts(
    loader: ProcessLoader, escape: str
) -> None:
    other = tenant(loader, "kept = 'TOP-SECRET of another tenant'\ndef fetch(request, env): pass")
    await other.call("fetch")
    found = await tenant(loader, _ESCAPES[escape], limits=IsolateLimits(message=64 * MEBIBYTE)).call("fetch")
    assert not [text for text in found if "SECRET" in text]


_PROGRAM = """
import ctypes, sys
def fetch(request, env):
    found, frame = [], sys._getframe()
    argument = ctypes.c_void_p.in_dll(ctypes.CDLL(None), "program_invocation_name").value
    for _ in range(9):  # python -I -S -B -X utf8 -c PROGRAM …
        found.append(ctypes.string_at(argument).decode(errors="replace"))
        argument += len(ctypes.string_at(argument)) + 1
    while frame:
        found.append(repr(dict(frame.f_locals)) + repr(frame.f_globals.get("options")))
        frame = frame.f_back
    return found
"""


async def test_a_tenant_finds_nothing_of_what_its_zygote_was_started_with(loader: ProcessLoader) -> None:
    found = await tenant(loader, _PROGRAM).call("fetch")
    assert "zygote.main" in found[7]
    assert len(found) > 15
    assert not [text for text in found if "preload" in text or f"isolates-{os.getpid()}" in text]


class Who(Capability):
    """Says who calls."""

    async def am_i(self) -> str:
        caller: Caller = current_caller.get()
        return f"{caller.worker_id.partition(':')[0]} {caller.metadata} {caller.props}"


_IDENTITY = {
    "another metadata": "vars(env)['WHO']; import dynflow.isolates.guest as g\n"
    "    import gc\n    [setattr(x, '_metadata', 'admin') for x in gc.get_objects() if type(x) is g.Guest]",
    "another caller": "from dynflow.isolates import current_caller, Caller\n"
    "    current_caller.set(Caller('admin', 'admin', 'admin'))",
    "another env": "from dynflow.isolates.proxies import CapabilityProxy\n"
    "    ask = vars(env.WHO)['_ask']\n    ask.keywords['caller'] = 'admin'\n    ask.keywords.clear()",
    "another module of the platform's": "import sys, types\n    fake = types.ModuleType('dynflow.isolates.wire')\n"
    "    sys.modules['dynflow.isolates.wire'] = fake",
    "another kind of peer": "from dynflow.isolates import wire\n"
    "    wire.Peer.caller = 'admin'\n    wire.WireLimits(1 << 40, 1 << 40)",
    "integers that are others": "import ctypes\n    ctypes.memset(id(10**20) + 24, 0xFF, 4)",
}


@pytest.mark.parametrize("trick", _IDENTITY)
async def test_a_tenant_that_rewrites_its_program_is_still_who_it_is(
    loader: ProcessLoader, trick: str
) -> None:
    source = f"async def fetch(request, env):\n    {_IDENTITY[trick]}\n    return await env.WHO.am_i()\n"
    code = WorkerCode("index.py", {"index.py": source}, env={"WHO": Who()}, metadata="tenant")
    told = await loader.load(code).get_entrypoint(props="props").call("fetch")
    assert told == "loaded tenant props"


_RUINS = {
    "without sys.modules": "import sys\n    sys.modules.clear()",
    "without builtins": "import builtins\n    vars(builtins).clear()",
    "with a deaf event loop": "import asyncio\n    asyncio.get_running_loop().stop()",
    "without its socket": "import os\n    os.close(3)",
    "with its socket shut": "import socket\n    socket.socket(fileno=3).shutdown(2)",
    "with an audit hook that refuses": "import sys\n    def hook(*a): raise OSError('no')\n"
    "    sys.addaudithook(hook)",
    "with a profiler that exits": "import sys, os\n    sys.setprofile(lambda *a: os._exit(9))",
    "with a finalizer that spins": "class Spin:\n        def __del__(self):\n            while True: pass\n    Spin()",
    "by jumping to nowhere": "import ctypes\n    ctypes.CFUNCTYPE(None)(1)()",
    "by freeing what is in use": "import ctypes\n    ctypes.pythonapi.Py_DecRef(ctypes.py_object(None))\n"
    "    for _ in range(10**7): ctypes.pythonapi.Py_DecRef(ctypes.py_object(None))",
    "by recursion in C": "import sys\n    sys.setrecursionlimit(2**31 - 1)\n    x = []\n"
    "    for _ in range(10**6): x = [x]\n    repr(x)",
    "by bytecode that is none": "import types\n"
    "    (lambda: 0).__code__.replace(co_code=b'\\x64\\xff' * 9, co_stacksize=0)\n"
    "    types.FunctionType((lambda: 0).__code__.replace(co_code=b'\\x7c\\xff' * 9, co_stacksize=0), {})()",
}


@pytest.mark.parametrize("ruin", _RUINS)
async def test_a_tenant_that_ruins_its_interpreter_ruins_no_other(loader: ProcessLoader, ruin: str) -> None:
    source = f"async def fetch(request, env):\n    {_RUINS[ruin]}\n    return 'went on'\n"
    limits = IsolateLimits(busy=timedelta(seconds=1), cpu_ms=2_000)
    async with asyncio.timeout(15):
        with contextlib.suppress(DynflowError, RuntimeError, SystemError, OSError):
            assert await tenant(loader, source, limits=limits).call("fetch") == "went on"
        assert await tenant(loader, "def fetch(request, env): return 1").call("fetch") == 1


async def test_no_core_is_dumped_and_no_limit_can_be_raised(loader: ProcessLoader) -> None:
    source = """
import resource, os, ctypes
def limits():
    return {name: list(resource.getrlimit(getattr(resource, name))) for name in
            ("RLIMIT_CORE", "RLIMIT_FSIZE", "RLIMIT_MEMLOCK", "RLIMIT_NPROC", "RLIMIT_NOFILE", "RLIMIT_MSGQUEUE")}
def raise_(name):
    hard = resource.getrlimit(getattr(resource, name))[1]
    resource.setrlimit(getattr(resource, name), (hard + 1, hard + 1))
def crash(): ctypes.string_at(0)
"""
    stub = tenant(loader, source)
    limits = await stub.call("limits")
    assert limits.pop("RLIMIT_NOFILE") == [64, 64]
    assert set(map(tuple, limits.values())) == {(0, 0)}
    for name in ("RLIMIT_CORE", "RLIMIT_NOFILE", "RLIMIT_NPROC", "RLIMIT_CPU", "RLIMIT_AS"):
        with pytest.raises((PermissionError, ValueError), match=r"not permitted|not allowed"):
            await stub.call("raise_", name)
    with pytest.raises(IsolateCrashedError, match="SIGSEGV"):
        await stub.call("crash")


async def test_descriptors_run_out_within_the_isolate(loader: ProcessLoader) -> None:
    source = """
import os, errno
def fetch(request, env):
    held = []
    try:
        while True:
            held.append(os.open("/", os.O_RDONLY))
    except OSError as error:
        return [len(held), errno.errorcode[error.errno]]
"""
    assert await tenant(loader, source).call("fetch") == [60, "EMFILE"]


async def test_no_process_and_no_thread_can_be_made_by_any_way_of_python(loader: ProcessLoader) -> None:
    source = """
import errno
def outcome(attempt):
    try:
        attempt()
    except OSError as error:
        return errno.errorcode[error.errno]
    except RuntimeError as error:
        return str(error)
    return "open"
def fetch(request, env):
    import os, threading, _posixsubprocess, _thread
    return [outcome(os.fork), outcome(os.forkpty), outcome(lambda: os.posix_spawn("/x", ["x"], {})),
            outcome(lambda: os.execv("/x", ["x"])), outcome(lambda: _thread.start_new_thread(print, ()))]
"""
    fork, forkpty, spawn, execute, thread = await tenant(loader, source).call("fetch")
    assert (fork, spawn, execute) == ("EPERM", "EPERM", "EPERM")
    assert forkpty in {"EPERM", "ENOENT"}  # it wants a terminal first
    assert thread == "can't start new thread"


async def test_memory_ends_with_an_error_of_its_own_and_the_host_says_so(loader: ProcessLoader) -> None:
    for take in (
        "bytearray(1 << 33)",
        "'x' * (1 << 40)",
        "[0] * (1 << 32)",
        "__import__('mmap').mmap(-1, 1 << 33)",
    ):
        source = f"def fetch(request, env): return len({take})"
        with pytest.raises((IsolateLimitError, OSError), match=r"more memory than its limit|Cannot allocate"):
            await tenant(loader, source).call("fetch")


async def test_a_number_that_takes_for_ever_is_stopped_though_no_bytecode_runs(loader: ProcessLoader) -> None:
    source = "def fetch(request, env): return 10 ** 10 ** 8 > 0"
    with pytest.raises(IsolateLimitError, match="without coming back"):
        await tenant(loader, source, limits=IsolateLimits(busy=timedelta(seconds=0.5))).call("fetch")


async def test_signals_that_are_blocked_and_ignored_do_not_keep_it_alive(loader: ProcessLoader) -> None:
    source = """
import signal
def fetch(request, env):
    signal.pthread_sigmask(signal.SIG_BLOCK, range(1, 65))
    for number in range(1, 65):
        try:
            signal.signal(number, signal.SIG_IGN)
        except (OSError, ValueError):
            pass
    while True:
        pass
"""
    before = loader.isolates
    with pytest.raises(IsolateLimitError, match="without coming back"):
        await tenant(loader, source, limits=IsolateLimits(busy=timedelta(seconds=0.5))).call("fetch")
    assert loader.isolates <= before
    assert signal.getsignal(signal.SIGTERM) is not signal.SIG_IGN


async def test_a_call_that_times_out_on_purpose_is_not_asked_again(loader: ProcessLoader) -> None:
    source = """
count = 0
async def fetch(request, env):
    global count
    count += 1
    if request.json():
        await __import__("asyncio").sleep(30)
    return count
"""
    worker = loader.load(
        WorkerCode("index.py", {"index.py": source}, limits=IsolateLimits(wall=timedelta(seconds=0.3)))
    )
    stub = worker.get_entrypoint()
    with pytest.raises(IsolateLimitError, match="took more than"):
        await stub.call("fetch", 1)
    assert await stub.call("fetch", 0) == 1  # another process: what misbehaved is not used again


async def test_an_isolate_that_goes_on_after_its_call_is_stopped() -> None:
    source = """
import asyncio
def spin():
    while True:
        pass
async def fetch(request, env):
    asyncio.get_running_loop().call_later(0.01, spin)
    return 1
"""
    async with ProcessLoader(ready=0) as loader:
        assert await tenant(loader, source).call("fetch") == 1
        assert loader.isolates == 1
        # Two looks, a second apart; one that waits is kept for ten.
        await until(lambda: loader.isolates == 0, seconds=6)


async def test_what_a_tenant_pickles_is_bytes_to_the_host(loader: ProcessLoader) -> None:
    source = """
import pickle
class Bomb:
    def __reduce__(self):
        import os
        return os._exit, (77,)
def fetch(request, env):
    return pickle.dumps(Bomb())
"""
    assert type(await tenant(loader, source).call("fetch")) is bytes


@pytest.mark.parametrize(
    "name",
    ["../../x.py", "/etc/x.py", "a/../../../x.py", "sys.py", "os.py", "dynflow/errors.py", "_socket.py"],
)
async def test_names_of_modules_reach_nothing_of_the_hosts(loader: ProcessLoader, name: str) -> None:
    modules = {"index.py": "def fetch(request, env): return 1", name: "raise SystemExit(5)"}
    code = WorkerCode("index.py", modules)
    try:
        assert await loader.load(code).get_entrypoint().call("fetch") == 1
    except DynflowError as error:
        assert "index.py" in str(error) or name in str(error)  # noqa: PT017 - refused is as good


# --- what is said ---


async def test_a_flood_of_tails_and_of_logs_is_bounded(loader: ProcessLoader) -> None:
    heard: list[Any] = []
    source = """
import logging
def fetch(request, env):
    for number in range(100_000):
        logging.getLogger("x" * 10_000).error("y")
"""
    with pytest.raises(IsolateLimitError, match=r"printed more than|names"):
        await tenant(loader, source, limits=IsolateLimits(output=50_000), tails=[heard.append]).call("fetch")
    assert sum(len(event.text) for event in heard) <= 60_000
    assert max(len(event.source) for event in heard) <= 300


async def test_a_tenant_cannot_speak_in_anothers_name_in_the_tails(loader: ProcessLoader) -> None:
    heard: list[Any] = []
    source = """
import os, json
def fetch(request, env):
    body = json.dumps(["output", "forged", 50, "uncaught", "another-worker"]).encode()
    os.write(3, len(body).to_bytes(4, "big") + body)
"""
    with pytest.raises(IsolateCrashedError, match="sent what it never may"):
        await tenant(loader, source, tails=[heard.append]).call("fetch")
    assert not [event for event in heard if event.text == "forged"]
