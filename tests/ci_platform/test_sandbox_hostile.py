"""What a hostile command tries in an isolate sandbox, and that the same try succeeds without one.

Each try is a Python program that exits with 0 if it got what it wanted. SECURITY.md names these tests.
"""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import textwrap
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import anyio
import psutil
import pytest

from ci_platform.sandboxes import SANDBOX_UID, SandboxJob, SandboxOutcome, Tree
from ci_platform.sandboxes.isolate import IsolateSandbox

SECRET = "secret-of-the-host-4711"
NAP = str(200_000 + os.getpid())
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can do it without confinement")
SYSCALL = """
import ctypes, os, sys
libc = ctypes.CDLL(None, use_errno=True)
def call(*arguments):
    result = libc.syscall(*[ctypes.c_long(a) if isinstance(a, int) else a for a in arguments])
    return result if result >= 0 else -ctypes.get_errno()
"""


@pytest.fixture
async def sandbox() -> AsyncIterator[IsolateSandbox]:
    made = IsolateSandbox()
    yield made
    await made.close()


class Confined:
    """Runs programs in the sandbox and beside it."""

    def __init__(self, sandbox: IsolateSandbox, home: Path) -> None:
        self.sandbox, self.home, self.text = sandbox, home, ""
        self.count = 0

    def tree(self) -> Tree:
        self.count += 1
        folders = [self.home / f"{name}{self.count}" for name in ("upper", "work", "lower")]
        for folder in folders:
            folder.mkdir()
            if os.geteuid() == 0:
                os.chown(folder, SANDBOX_UID, SANDBOX_UID)
        return Tree(folders[0], folders[1], (folders[2],))

    async def run(self, program: str, *arguments: str) -> SandboxOutcome:
        pieces: list[bytes] = []
        argv = ("python3", "-c", textwrap.dedent(program), *arguments)
        outcome = await self.sandbox.run(SandboxJob("hostile", argv, self.tree()), pieces.append)
        self.text = b"".join(pieces).decode(errors="replace")
        return outcome

    async def fails(self, program: str, *arguments: str, unconfined: bool = True) -> None:
        """Assert that a try fails inside; and, unless told otherwise, that it succeeds outside."""
        if unconfined:
            assert await run_outside(program, *arguments) == 0, "the try itself does not work"
        outcome = await self.run(program, *arguments)
        assert outcome.exit_code not in {0, 127}, f"it worked: {self.text}"


async def run_outside(program: str, *arguments: str) -> int:
    command = [sys.executable, "-c", textwrap.dedent(program), *arguments]
    done = await anyio.run_process(command, check=False)
    return done.returncode


@pytest.fixture
def confined(sandbox: IsolateSandbox, tmp_path: Path) -> Confined:
    return Confined(sandbox, tmp_path)


# --- files ---


READ = "import sys; print(open(sys.argv[1]).read())"


@needs_root
@pytest.mark.parametrize(
    "path", ["/etc/shadow", "/etc/gshadow", "/root/.bashrc", "/proc/1/environ", "/proc/kcore"]
)
async def test_files_of_the_host_cannot_be_read(confined: Confined, path: str) -> None:
    program = "import sys; open(sys.argv[1], 'rb').read(16)"
    # Some machines keep some of them from root too, or do not have them.
    works_here = await run_outside(program, path) == 0
    assert works_here or path != "/etc/shadow"
    await confined.fails(program, path, unconfined=False)


async def test_the_platforms_data_and_other_workspaces_cannot_be_read(
    confined: Confined, tmp_path: Path
) -> None:
    secret = tmp_path / "secret"
    secret.write_text(SECRET)
    other = confined.tree().upper / "file"
    other.write_text(SECRET)
    for path in (secret, other):
        await confined.fails(READ, str(path))


async def test_only_programs_and_harmless_settings_of_the_host_have_names(confined: Confined) -> None:
    await confined.run("import os; print(*sorted(os.listdir('/'))); print(*sorted(os.listdir('/etc')))")
    root, etc = (line.split() for line in confined.text.splitlines())
    links = {"bin", "lib", "lib32", "lib64", "libx32", "sbin"}
    parents = {Path(sys.base_prefix).parts[1]} - {"usr"}
    expected = {".scratch", "dev", "etc", "home", "proc", "tmp", "usr", "var", "workspace"}
    assert set(root) - links - parents == expected
    assert not {"shadow", "gshadow", "sudoers", "ssh", "machine-id", "resolv.conf"} & set(etc)


async def test_parents_of_a_toolchain_show_nothing_else(confined: Confined) -> None:
    prefix = Path(sys.base_prefix)
    if prefix.is_relative_to("/usr"):
        pytest.skip("this Python lives in /usr, which is shown as a whole")
    for parent in [*prefix.parents][:-1]:
        await confined.run("import os, sys; print(os.listdir(sys.argv[1]))", str(parent))
        assert len(json.loads(confined.text.replace("'", '"'))) == 1, parent


async def test_nothing_outside_of_private_places_can_be_written(confined: Confined) -> None:
    program = """
        import os
        written = []
        for folder, folders, files in os.walk("/"):
            private = ("/workspace", "/tmp", "/var/tmp", "/home/ci", "/dev/shm", "/.scratch", "/dev/pts")
            if folder.startswith(("/proc", *private)):
                folders.clear()
                continue
            if folder.count("/") > 3:
                folders.clear()
            try:
                open(os.path.join(folder, "x"), "w").close()
                written.append(folder)
            except OSError:
                pass
        print(written)
    """
    assert (await confined.run(program)).exit_code == 0
    assert confined.text == "[]\n"


@needs_root
async def test_devices_of_the_host_cannot_be_opened_or_made(confined: Confined) -> None:
    await confined.run("import os; print(*sorted(os.listdir('/dev')))")
    names = {
        "fd",
        "full",
        "null",
        "ptmx",
        "pts",
        "random",
        "shm",
        "stderr",
        "stdin",
        "stdout",
        "urandom",
        "zero",
    }
    assert set(confined.text.split()) <= names
    make = """
        import os, stat, tempfile
        path = tempfile.mkdtemp() + "/disk"
        os.mknod(path, stat.S_IFBLK | 0o600, os.makedev(254, 0))
    """
    await confined.fails(make)


async def test_the_overlays_own_folders_cannot_be_reached(confined: Confined) -> None:
    await confined.run("print(open('/proc/self/mountinfo').read())")
    assert str(confined.home) not in confined.text


# --- the platform and other processes ---


async def test_the_platforms_environment_cannot_be_read(
    confined: Confined, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PLATFORM_SECRET", SECRET)
    program = """
        import glob, os, sys
        found = sys.argv[1] in str(os.environ)
        for path in glob.glob("/proc/[0-9]*/environ"):
            try:
                found = found or sys.argv[1] in open(path).read()
            except OSError:
                pass
        sys.exit(not found)
    """
    await confined.fails(program, SECRET)


async def test_processes_of_the_host_cannot_be_seen(confined: Confined) -> None:
    program = "import os, sys; sys.exit(sum(name.isdecimal() for name in os.listdir('/proc')) < 4)"
    await confined.fails(program)


async def test_init_and_the_launcher_hide_their_memory(confined: Confined) -> None:
    """Pid 1 in there is a fork of the launcher and the same user as the command."""
    look = "import os, sys; p = sys.argv[1]; os.listdir(p) if p[-1] in 'td' else open(p, 'rb').read(1)"
    for path in ("/proc/1/environ", "/proc/1/mem", "/proc/1/maps", "/proc/1/root", "/proc/1/fd"):
        await confined.fails(look, path, unconfined=False)


async def test_a_process_of_the_host_cannot_be_traced_or_signalled(confined: Confined) -> None:
    victim = await asyncio.create_subprocess_exec("sleep", "600")
    trace = SYSCALL + "\npid = int(sys.argv[1])\nsys.exit(-call(101, 16, pid, 0, 0))"
    await confined.fails(trace, str(victim.pid))
    await confined.fails("import os, sys; os.kill(int(sys.argv[1]), 0)", str(victim.pid))
    await confined.run("import os; os.kill(-1, 9)")
    assert victim.returncode is None
    victim.kill()
    await victim.wait()


async def test_shared_memory_of_the_host_cannot_be_reached(confined: Confined) -> None:
    made = SYSCALL + "\nprint(call(29, 4711, 4096, 0o1666))"
    assert await run_outside(made) == 0
    attach = SYSCALL + "\nsys.exit(call(29, 4711, 4096, 0o666) < 0)"
    try:
        await confined.fails(attach)
    finally:
        await run_outside(SYSCALL + "\ncall(31, call(29, 4711, 4096, 0o666), 0, None)")


# --- network ---


CONNECT = """
    import socket, sys
    family = getattr(socket, sys.argv[1])
    address = ("127.0.0.1", int(sys.argv[2])) if sys.argv[1] == "AF_INET" else sys.argv[2].replace("@", chr(0))
    socket.socket(family).connect(address)
"""


async def test_the_hosts_loopback_and_sockets_cannot_be_reached(confined: Confined, tmp_path: Path) -> None:
    path, abstract = str(tmp_path / "socket"), f"@dynflow-test-{os.getpid()}"
    with (
        socket.create_server(("127.0.0.1", 0)) as tcp,
        socket.socket(socket.AF_UNIX) as by_path,
        socket.socket(socket.AF_UNIX) as by_name,
    ):
        for server, address in ((by_path, path), (by_name, abstract.replace("@", "\0"))):
            server.bind(address)
            server.listen()
        os.chmod(path, 0o777)  # noqa: PTH101
        await confined.fails(CONNECT, "AF_INET", str(tcp.getsockname()[1]))
        await confined.fails(CONNECT, "AF_UNIX", path)
        await confined.fails(CONNECT, "AF_UNIX", abstract)


@pytest.mark.parametrize(
    "path", ["/var/run/docker.sock", "/run/docker.sock", "/run/containerd/containerd.sock"]
)
async def test_the_docker_socket_is_not_there(confined: Confined, path: str) -> None:
    await confined.fails(CONNECT, "AF_UNIX", path, unconfined=os.access(path, os.W_OK))


async def test_there_is_no_interface_but_loopback(confined: Confined) -> None:
    await confined.run("import socket; print(socket.if_nameindex())")
    assert confined.text == "[(1, 'lo')]\n"
    await confined.fails("import socket; socket.create_connection(('192.0.2.1', 80), 5)", unconfined=False)


@pytest.mark.parametrize("family", ["AF_VSOCK", "AF_ALG", "AF_PACKET"])
async def test_odd_socket_families_are_refused(confined: Confined, family: str) -> None:
    program = """
        import socket, sys
        family = getattr(socket, sys.argv[1])
        kinds = {socket.AF_ALG: socket.SOCK_SEQPACKET, socket.AF_VSOCK: socket.SOCK_STREAM}
        socket.socket(family, kinds.get(family, socket.SOCK_RAW))
    """
    unconfined = await run_outside(program, family) == 0
    await confined.fails(program, family, unconfined=unconfined)


# --- privileges ---


@needs_root
async def test_a_setuid_program_gives_no_privileges(confined: Confined) -> None:
    """`id` of root with the setuid bit in a lower layer, as a hostile base tree would have it."""
    with tempfile.TemporaryDirectory() as public:
        shutil.copy("/usr/bin/id", public)
        os.chmod(public, 0o755)  # noqa: PTH101
        os.chmod(f"{public}/id", 0o6755)  # noqa: PTH101
        outside = subprocess.run([f"{public}/id", "-u"], user=SANDBOX_UID, capture_output=True, check=True)  # noqa: ASYNC221
        tree, pieces = confined.tree(), list[bytes]()
        hostile = Tree(tree.upper, tree.work, (Path(public),))
        await confined.sandbox.run(SandboxJob("setuid", ("./id", "-u"), hostile), pieces.append)
    assert (outside.stdout, b"".join(pieces)) == (b"0\n", f"{SANDBOX_UID}\n".encode())


@needs_root
@pytest.mark.parametrize("program", [
    "import os; os.setuid(0)",
    "import os; os.chown('/workspace', 0, 0) if os.path.isdir('/workspace') else os.chown('.', 0, 0)",
    "import os; os.chroot('/')",
    "import socket; socket.sethostname(socket.gethostname())",
    "import os; os.nice(-1)",
    "import time; time.clock_settime(time.CLOCK_REALTIME, time.time())",
])  # fmt: skip
async def test_what_only_root_may_do_is_refused(confined: Confined, program: str) -> None:
    await confined.fails(program)


CALLS = {
    "mount": "call(165, b'none', b'/tmp', b'tmpfs', 0, None) == 0 and libc.umount(b'/tmp') == 0",
    "unshare a user namespace": "call(272, 0x10000000) == 0",
    "clone into a user namespace": "call(56, 0x10000000 | 17, 0, 0, 0, 0) >= 0",
    "unshare a mount namespace": "call(272, 0x00020000) == 0",
    "fsopen": "call(430, b'tmpfs', 0) >= 0",
    "open_tree": "call(428, -100, b'/', 1) >= 0",
    "keyctl": "call(250, 0, -3, 1) >= 0",
    "add_key": "call(248, b'user', b'dynflow', b'x', 1, -2) >= 0",
    # An array map of one entry.
    "bpf": "call(321, 0, ctypes.create_string_buffer(bytes([2,0,0,0,4,0,0,0,4,0,0,0,1,0,0,0]+[0]*104)), 120) >= 0",
    "userfaultfd": "call(323, 1) >= 0",
    "io_uring": "call(425, 1, ctypes.create_string_buffer(120)) >= 0",
    "perf_event_open": "call(298, ctypes.create_string_buffer(bytes([1,0,0,0,112]+[0]*107)), 0, -1, -1, 0) >= 0",
    "kernel log": "call(103, 10, None, 0) >= 0",
    "open_by_handle_at": "call(304, -100, ctypes.create_string_buffer(64), 0) != -1",
    "modify_ldt": "call(154, 0, ctypes.create_string_buffer(64), 64) >= 0",
}


@pytest.mark.skipif(os.uname().machine != "x86_64", reason="the numbers are those of x86_64")
@pytest.mark.parametrize("name", CALLS)
async def test_dangerous_system_calls_are_refused(confined: Confined, name: str) -> None:
    program = f"{SYSCALL}\nsys.exit(not ({CALLS[name]}))"
    works_here = await run_outside(program) == 0
    if os.geteuid() == 0:
        # Kernels are built without these three, or switch them off.
        assert works_here or name in {"io_uring", "perf_event_open", "modify_ldt"}, (
            "the try itself does not work"
        )
    await confined.fails(program, unconfined=False)


# --- what the platform's own death leaves ---


PLATFORM = """
import asyncio, json, sys
from pathlib import Path
from ci_platform.sandboxes import SandboxJob, Tree
from ci_platform.sandboxes.isolate import IsolateSandbox

async def main():
    upper, work, lower = map(Path, sys.argv[1:4])
    sandbox = IsolateSandbox()
    argv = ("sh", "-c", f"(setsid sleep {sys.argv[4]} &); echo up; sleep {sys.argv[4]}")
    job = SandboxJob("doomed", argv, Tree(upper, work, (lower,)))
    await sandbox.run(job, lambda piece: print(piece.decode(), end="", flush=True))

asyncio.run(main())
"""


async def test_killing_the_platform_leaves_nothing(confined: Confined) -> None:
    tree = confined.tree()
    folders = [str(path) for path in (tree.upper, tree.work, tree.lowers[0])]
    platform = subprocess.Popen(  # noqa: ASYNC220 - it is killed, not waited for
        [sys.executable, "-c", PLATFORM, *folders, NAP], stdout=subprocess.PIPE, cwd=Path(__file__).parents[2]
    )
    assert platform.stdout is not None
    with platform.stdout:
        assert await anyio.to_thread.run_sync(platform.stdout.readline) == b"up\n"
    family = [platform.pid, *(child.pid for child in psutil.Process(platform.pid).children(recursive=True))]
    await eventually(lambda: len(sleepers()) == 2)
    platform.send_signal(signal.SIGKILL)
    platform.wait()
    await eventually(lambda: not sleepers() and not any(psutil.pid_exists(pid) for pid in family))
    await eventually(lambda: not groups(platform.pid))


async def test_a_launcher_that_was_killed_is_replaced(confined: Confined) -> None:
    assert (await confined.run("print(1)")).exit_code == 0
    launcher = confined.sandbox._launcher
    assert launcher is not None
    ready = psutil.Process(launcher.pid).children(recursive=True)
    launcher.kill()
    launcher.wait()
    await eventually(lambda: not any(process.is_running() for process in ready))
    assert (await confined.run("print(2)")).exit_code == 0
    assert confined.text == "2\n"
    assert (await confined.run("print(3)")).exit_code == 0


def sleepers() -> list[int]:
    return [
        found.pid for found in psutil.process_iter(["cmdline"]) if found.info["cmdline"] == ["sleep", NAP]
    ]


def groups(pid: int) -> list[Path]:
    return list(Path("/sys/fs/cgroup").glob(f"**/dynflow-{pid}-*"))


async def eventually(condition: Callable[[], bool]) -> None:
    with anyio.fail_after(20):
        while not condition():  # noqa: ASYNC110 - what other processes do tells nobody
            await anyio.sleep(0.01)
