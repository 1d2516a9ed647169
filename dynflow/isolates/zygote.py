"""The preloaded parent of the isolates: a clean process that forks one confined child per request.

Started by `pool.py` with an empty environment, no site-packages and one file descriptor, the control socket.
What a zygote ever held, each of its children holds: so it never sees a secret, and no tenant's code.

The process that is started puts up the outer walls and waits; its child is the zygote, which is pid 1 of its
own pid namespace: when it ends the kernel ends every isolate. It ends when the host closes the control socket,
which a killed host does too.
"""

from __future__ import annotations

import array
import contextlib
import fcntl
import gc
import importlib
import json
import os
import pkgutil
import random
import select
import signal
import socket
import sys
import traceback
from typing import Any, NoReturn

from dynflow.isolates import confinement, determinism, guest, heap, practice, syscalls, wire
from dynflow.isolates.guest_loop import GuestLoop

# In a fork of a preloaded interpreter these cost nothing; loading C extensions is not possible later, because
# the system-call filter refuses executable mappings.
_PRELOADED = (
    "abc argparse array ast asyncio base64 binascii bisect bz2 calendar cmath codecs collections collections.abc "
    "concurrent.futures configparser contextlib contextvars copy csv ctypes dataclasses datetime decimal difflib "
    "email.message enum fnmatch fractions functools gettext glob graphlib gzip hashlib heapq hmac html "
    "html.parser http importlib.metadata importlib.resources inspect io ipaddress itertools json keyword "
    "linecache locale logging lzma math mimetypes numbers operator pathlib pickle posixpath pprint queue random re "
    "secrets select shlex shutil signal socket statistics string struct tempfile textwrap threading time token "
    "tokenize tomllib traceback types typing unicodedata unittest.mock urllib.parse uuid warnings weakref "
    "xml.etree.ElementTree zipfile zlib zoneinfo "
    "_asyncio _bisect _blake2 _contextvars _csv _datetime _decimal _elementtree _hashlib _heapq _json _lsprof "
    "_md5 _opcode _pickle _posixsubprocess _queue _random _sha1 _sha2 _sha256 _sha3 _sha512 _statistics _struct "
    "_uuid _zoneinfo fcntl grp mmap pyexpat termios"
)

# New containers until a collection: loading a tenant makes some thousand, of which none is garbage.
_COLLECT_AFTER = 10_000
_WIRE = 3  # the descriptor of each child's socket to its host


def main(control_fd: int, options: dict[str, Any]) -> None:
    """Run as the process that the host has started."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the terminal's is for the host, who ends us
    control = socket.socket(fileno=fcntl.fcntl(control_fd, fcntl.F_DUPFD_CLOEXEC, _WIRE + 1))
    os.close(control_fd)
    spare = socket.socket(socket.AF_UNIX).detach()
    if spare != _WIRE:  # before anything else takes the number
        os.dup2(spare, _WIRE, inheritable=False)
    own_wire = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM, fileno=_WIRE)
    try:
        _start(control, own_wire, options)
    except confinement.WallError as error:
        _tell(control, {"refused": str(error)})
    except Exception:  # noqa: BLE001 - nobody reads this process's stderr
        _tell(control, {"refused": "the zygote failed: " + traceback.format_exc()[-2000:]})
    os._exit(1)


def _start(control: socket.socket, own_wire: socket.socket, options: dict[str, Any]) -> None:
    os.environ.clear()  # it was started with none, but Python itself sets LC_CTYPE
    sys.argv[:] = sys.orig_argv[:] = [""]
    confinement.die_with_parent()
    grouped = bool(options["groups"]) and confinement.join_group(options["groups"])
    preload(options["preload"])
    determinism.install()
    walls = frozenset(options["walls"])
    options.clear()  # frames of this program are below those of each tenant's code
    own_uids = confinement.raise_outer_walls(walls)
    pid = os.fork()
    if pid:
        control.close()
        os.waitpid(pid, 0)
        os._exit(0)
    proc = os.open("/proc", os.O_RDONLY | os.O_CLOEXEC)
    child_walls = confinement.raise_inner_walls(walls, own_uids=own_uids)
    confinement.die_with_parent()  # after the change of uid, which would take it back
    sys.path[:] = [entry for entry in sys.path if os.path.isdir(entry)]  # noqa: PTH112 - no pathlib here
    practice.warm_up()
    if grouped:
        child_walls.names = sorted([*child_walls.names, "cgroup"])
    Zygote(control, own_wire, child_walls).live(proc)


def preload(extra: Any) -> None:
    """Import what tenants may use."""
    for name in (*_PRELOADED.split(), *extra):
        try:
            module = importlib.import_module(name)
        except ImportError:
            continue  # not in this build of Python
        if name in extra and hasattr(module, "__path__"):
            for found in pkgutil.walk_packages(module.__path__, f"{name}."):
                importlib.import_module(found.name)


class Zygote:
    """Forks a child for every control message, tells its pid and how it ended.

    It does so inside of a guest's event loop, where that would wait for its first message: a child has nothing left
    to set up, and what is not done in it copies none of the memory that it shares.
    """

    def __init__(
        self,
        control: socket.socket,
        own_wire: socket.socket,
        walls: confinement.ChildWalls,
    ) -> None:
        self._control, self._wire, self._walls = control, own_wire, walls
        self._guest = guest.Guest(GuestLoop())
        self._rehearsal: heap.Rehearsal | None = None
        self._pages = heap.Pages([])
        self._is_child = self._rehearses = False
        self._ended = -1

    def live(self, proc: int) -> NoReturn:
        """Serve until the host closes the control socket; in a child until its host closes its own."""
        code = 1
        try:
            guest.serve(lambda: self._connect(proc), self._guest)
            if self._rehearsal is not None:
                self._rehearsal.end()
            code = 0
        except BaseException:  # noqa: BLE001 - nothing may get any further, into code that is not the child's
            text = traceback.format_exc()
            if self._rehearses:  # then children do without what it would have found
                pass
            elif self._is_child:
                os.write(_WIRE, wire.encode_frame(["output", "isolate: " + text]))
            else:
                _tell(self._control, {"refused": "the zygote failed: " + text[-2000:]})
        finally:
            os._exit(code)

    def _connect(self, proc: int) -> socket.socket:
        try:
            return self._rehearse(proc) or self._serve()
        except OSError as error:  # a guest would take that for the end of its host
            raise RuntimeError("it cannot go on") from error

    def _serve(self) -> socket.socket:
        """Fork whenever the host asks for it; return in the children, with the socket to the host."""
        poll = self._listen()
        _tell(self._control, {"ready": True, "walls": self._walls.names})
        while True:
            for fd, _ in poll.poll():
                if fd == self._ended:
                    os.read(fd, 4096)
                    self._reap()
                    continue
                message, fds = _receive(self._control)
                if not message:
                    os._exit(0)
                self._fork(fds[0], is_ahead=message == b"fork ahead")
                if self._is_child:
                    return self._wire

    def _rehearse(self, proc: int) -> socket.socket | None:
        """Have a fork do what all children do, and learn what pages that takes; returns a socket in the fork."""
        gc.set_threshold(_COLLECT_AFTER)
        gc.collect()
        heap.fill_holes()
        gc.freeze()  # collections in the children shall not touch, and so copy, what they share
        gc.disable()
        reading, writing = os.pipe()
        asked = practice.asked(practice.LEAST)
        pid = syscalls.fork()
        if pid == 0:
            self._rehearses = True
            self._rehearsal = heap.Rehearsal(proc, writing)
            self._guest.until_idle = True
            return asked[1]
        os.close(writing)
        os.close(proc)
        with open(reading, "rb") as file:  # noqa: PTH123 - a pipe has no path
            self._pages = heap.Pages.of(file)
        os.waitpid(pid, 0)
        return None

    def _listen(self) -> select.poll:
        self._ended, wake = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        # A handler alone could come just before the poll.
        signal.set_wakeup_fd(wake, warn_on_full_buffer=False)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        poll = select.poll()
        poll.register(self._control, select.POLLIN)
        poll.register(self._ended, select.POLLIN)
        return poll

    def _fork(self, fd: int, *, is_ahead: bool) -> None:
        try:
            uid = self._walls.prepare()
            pid = syscalls.fork()
        except OSError as error:  # no room for another process: that is not the end of the others
            self._walls.leave_namespace()
            os.close(fd)
            _tell(self._control, {"failed": str(error)})
            return
        if pid == 0:
            self._is_child = True
            if is_ahead:
                with contextlib.suppress(OSError):  # then it copies them one by one
                    self._pages.claim()
            self._be_guest(fd, uid)
            return
        self._walls.restore(pid, uid)
        os.close(fd)
        pidfd = os.pidfd_open(pid)
        _tell(self._control, {"forked": pid}, [pidfd])
        os.close(pidfd)

    def _be_guest(self, fd: int, uid: int) -> None:
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        self._walls.keep_only_descriptors(fd)
        self._walls.confine(uid)
        random.seed()
        gc.enable()

    def _reap(self) -> None:
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return
            if not pid:
                return
            self._walls.release(pid)
            _tell(self._control, {"exited": pid, "status": os.waitstatus_to_exitcode(status)})


def _tell(control: socket.socket, message: dict[str, Any], fds: list[int] | None = None) -> None:
    ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
    try:
        control.sendmsg([json.dumps(message).encode()], ancillary)
    except OSError:  # the host is gone
        os._exit(0)


def _receive(control: socket.socket) -> tuple[bytes, list[int]]:
    try:
        message, fds, _, _ = socket.recv_fds(control, 1024, 1)
    except OSError:
        return b"", []
    return message, fds
