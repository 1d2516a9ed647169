"""The two processes inside of an isolate sandbox: its pid 1, and the one that becomes the command. Stdlib only.

Both are forks of the launcher that have given up what they could. From here on everything is the tenant's.
"""

from __future__ import annotations

import os
import resource
import signal
import socket
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from ci_platform.sandboxes import linux, messages, rootfs, seccomp

HOST, ROOT, LAZY = "/host", "/root", "/lazy"
"""Where the host's tree, the sandbox's root directory and a lazy tree are, while it is laid out."""

_NOT_FOUND, _NOT_EXECUTABLE = 127, 126
_OPEN_FILES = 65_536


def run_to_exit(work: Callable[[], int | None]) -> NoReturn:
    """End this fork with the result of `work`; never return into the code that forked it."""
    code = 70
    try:
        code = work() or 0
    except BaseException as error:  # noqa: BLE001 - a fork has nobody to raise to; the platform sees the channel end
        print(f"sandbox launcher: {error!r}", file=sys.stderr, flush=True)  # noqa: T201 - the platform's own stderr
    finally:
        os._exit(code)


def drop_privileges(uid: int, *, as_root: bool) -> None:
    """Become an ordinary user who can get no privileges again."""
    linux.drop_bounding_capabilities()
    if as_root:
        os.setgroups([])
        os.setresgid(uid, uid, uid)
        os.setresuid(uid, uid, uid)
    linux.drop_capabilities()
    linux.hide_memory()


@dataclass(frozen=True, slots=True)
class Inside:
    """What the processes inside need to know. `relay` brings the job to the one that becomes the command."""

    uid: int
    as_root: bool
    filter: bool
    relay: socket.socket

    def be_init(self, ready: int, finished: int) -> int:
        """Be pid 1: fork the command process, then collect the dead until it ends, and end as it did."""
        linux.die_with_parent()
        if not os.read(ready, 1):
            return 70
        try:
            rootfs.mount_proc(ROOT)
            _stand_apart()
            command = os.fork()
            if command == 0:
                os.close(ready)
                os.close(finished)
                run_to_exit(self._be_command)
            self.relay.close()
            drop_privileges(self.uid, as_root=self.as_root)
            linux.die_with_parent()
        except OSError as error:
            os.write(finished, str(error).encode())
            return 70
        os.write(finished, b"ok")
        os.close(ready)
        while True:
            pid, status = os.wait()
            if pid == command:
                os.write(finished, str(status).encode())
                code = os.waitstatus_to_exitcode(status)
                return code if code >= 0 else 128 - code

    def _be_command(self) -> int:
        """Give up everything, wait for the job, become it."""
        os.setsid()
        drop_privileges(self.uid, as_root=self.as_root)
        if self.filter:
            linux.load_filter(seccomp.program())
        received = messages.receive(self.relay)
        if received is None:
            return 70
        job, (output,) = received
        os.dup2(output, 1)
        os.dup2(output, 2)
        os.close(output)
        try:
            _enter(job["cwd"])
            _set_limits(job)
        except OSError as error:
            messages.send(self.relay, {"refused": str(error)})
            return 70
        return self._become(job["argv"], {os.fsencode(k): os.fsencode(v) for k, v in job["env"].items()})

    def _become(self, argv: list[str], env: dict[bytes, bytes]) -> int:
        for number in (signal.SIGPIPE, signal.SIGINT, signal.SIGXFSZ):
            signal.signal(number, signal.SIG_DFL)
        try:
            os.execvpe(argv[0], argv, env)  # noqa: S606 - no shell is the point
        except FileNotFoundError:
            return self._say_why_not(argv[0], "not found", _NOT_FOUND)
        except OSError as error:
            return self._say_why_not(argv[0], str(error.strerror), _NOT_EXECUTABLE)

    def _say_why_not(self, program: str, why: str, code: int) -> int:
        """Say it to people, as a shell does, and to the platform."""
        os.write(2, f"{program}: {why}\n".encode(errors="replace"))
        messages.send(self.relay, {"ended": why})
        return code


def _stand_apart() -> None:
    """Read nothing, and print nowhere until told where."""
    null = os.open(f"{ROOT}/dev/null", os.O_RDWR)
    for standard in (0, 1, 2):
        os.dup2(null, standard)
    os.close(null)


def _enter(cwd: str) -> None:
    if Path(HOST).exists():
        raise OSError("the host's tree is still there")
    place = os.path.realpath(f"{rootfs.WORKSPACE}/{cwd}")
    if place != rootfs.WORKSPACE and not place.startswith(rootfs.WORKSPACE + "/"):
        raise OSError(f"cwd {cwd!r} leaves the workspace")
    try:
        os.chdir(place)
    except OSError as error:
        raise OSError(f"cwd {cwd!r}: {error.strerror}") from None


def _set_limits(job: dict[str, Any]) -> None:
    for kind, value in job["rlimits"].items():
        number = getattr(resource, kind)
        _, hard = resource.getrlimit(number)
        limit = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(number, (limit, limit))
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(_OPEN_FILES, hard), hard))
