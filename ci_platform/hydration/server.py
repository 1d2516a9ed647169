"""The program that mounts one tree out of git and answers what the kernel asks about it. Stdlib only, no secrets.

It mounts in a mount namespace of its own: nobody else sees a path of it, and nothing is left when it is killed. Who
may use the tree gets a mount of it as an open file, over a socket in the program's folder. As long as the platform
holds that socket open the program keeps a mount, too; after that it goes on for commands that still have one, and
the kernel ends it with the last of these. When it dies its mounts refuse everything at once (ENOTCONN).
"""

from __future__ import annotations

import contextlib
import errno
import math
import os
import signal
import socket
import stat
import threading
import time
from pathlib import Path
from typing import Any

from ci_platform.hydration import protocol
from ci_platform.hydration.blobs import Blobs, LostError
from ci_platform.hydration.control import Control
from ci_platform.hydration.table import Node, Table
from ci_platform.sandboxes import linux, messages

_AHEAD, _NEAR = 32, 64
_AHEAD_SIZE, _AHEAD_EACH = 1 << 20, 256 << 10
"""Files fetched ahead once two neighbours were read one after the other, and how large they may be."""

_UNKNOWN = {
    protocol.OPEN,
    protocol.OPENDIR,
}
"""Refused with ENOSYS, after which the kernel opens without asking."""


class Server:
    """Answers requests, one after the other. The kernel gives up on all of them when one takes `timeout` seconds."""

    def __init__(self, table: Table, blobs: Blobs, timeout: int) -> None:
        self._table, self._blobs, self._timeout = table, blobs, timeout
        self._last = 0
        self._ahead: list[tuple[bytes, int]] = []
        self.busy_since: float | None = None
        self.trouble: str | None = None

    def begin(self, device: int) -> None:
        """Come to terms with the kernel; OSError where it is too old."""
        request = os.read(device, protocol.BUFFER)
        _, _, unique, *_ = protocol.IN.unpack_from(request)
        answer = protocol.initialise(request[protocol.IN.size :], self._timeout)
        os.writev(device, protocol.answer(unique, answer))
        # Nearly every command reads these first: the files at the top.
        self._ahead = self._small(self._table.node(0).first, 2 * _AHEAD)

    def serve(self, device: int) -> None:
        """Answer until nothing has the tree mounted any more."""
        while True:
            if self._ahead:
                self.busy_since = time.monotonic()
                ahead, self._ahead = self._ahead, []
                self._blobs.fetch_ahead(ahead)
            self.busy_since = None
            try:
                request = os.read(device, protocol.BUFFER)
            except OSError as error:
                if error.errno in {errno.EINTR, errno.EAGAIN, errno.ENOENT}:
                    continue  # ENOENT: the request was taken back
                return  # ENODEV: unmounted
            self.busy_since = time.monotonic()
            reply = self._reply(request)
            if reply is not None:
                try:
                    os.writev(device, reply)
                except OSError as error:
                    if error.errno == errno.ENODEV:
                        return

    def abort(self) -> None:
        """Make an answer that takes too long end, from another thread: the program is about to."""
        self._blobs.kill()

    def _reply(self, request: bytes) -> list[bytes] | None:
        _, code, unique, number, *_ = protocol.IN.unpack_from(request)
        body = memoryview(request)[protocol.IN.size :]
        if code in {protocol.FORGET, protocol.BATCH_FORGET, protocol.DESTROY}:
            return None
        try:
            return protocol.answer(unique, self._answer(code, number - 1, body))
        except LostError as error:
            self.trouble = str(error)
            return protocol.refusal(unique, errno.EIO)
        except (IndexError, ValueError):
            return protocol.refusal(unique, errno.ESTALE)
        except OSError as error:
            if error.errno not in {errno.ENOSYS, errno.ENOTTY}:
                self.trouble = (
                    error.strerror or "an input/output error"
                )  # a command is told, and no path of ours
            return protocol.refusal(unique, error.errno or errno.EIO)

    def _answer(self, code: int, number: int, body: memoryview) -> bytes:
        if code == protocol.READ:
            return self._read(number, *protocol.READ_IN.unpack_from(body)[1:3])
        if code == protocol.LOOKUP:
            return self._look_up(number, bytes(body[:-1]))
        if code in {protocol.READDIRPLUS, protocol.READDIR}:
            _, offset, size, _ = protocol.READ_IN.unpack_from(body)
            return self._list(number, offset, size, plus=code == protocol.READDIRPLUS)
        if code == protocol.GETATTR:
            return protocol.attributes_out(self._attributes(number, self._table.node(number)))
        if code == protocol.READLINK:
            node = self._table.node(number)
            return self._blobs.read(node.oid, node.size, 0, node.size)[0]
        if code == protocol.STATFS:
            return protocol.statfs(self._table.count)
        raise OSError(errno.ENOTTY if code == protocol.IOCTL else errno.ENOSYS, "not needed")

    def _attributes(self, number: int, node: Node) -> bytes:
        table = self._table
        return protocol.Attributes(
            number + 1, node.mode, node.size, table.modified_at, table.uid, table.gid
        ).packed()

    def _look_up(self, folder: int, name: bytes) -> bytes:
        number = self._table.find(folder, name)
        if number is None:
            return protocol.NOTHING
        return protocol.entry(number + 1, self._attributes(number, self._table.node(number)))

    def _read(self, number: int, offset: int, count: int) -> bytes:
        node = self._table.node(number)
        if offset >= node.size:
            return b""
        content, was_here = self._blobs.read(node.oid, node.size, offset, count)
        if not was_here:
            if 0 < number - self._last < _NEAR:
                self._ahead = self._small(number + 1, _AHEAD)
            self._last = number
        return content

    def _small(self, first: int, count: int) -> list[tuple[bytes, int]]:
        """Return small files among some numbers: children of one folder are neighbours."""
        left, found = _AHEAD_SIZE, []
        for number in range(first, min(first + count, self._table.count)):
            node = self._table.node(number)
            if stat.S_ISREG(node.mode) and node.size <= _AHEAD_EACH:
                left -= node.size
                if left < 0:
                    break
                found.append((node.oid, node.size))
        return found

    def _list(self, folder: int, offset: int, room: int, *, plus: bool) -> bytes:
        found, node = bytearray(), self._table.node(folder)
        for place in range(offset, node.count + 2):
            if place < 2:  # "." and ".."
                name, number, kind = (b".", b"..")[place], folder + 1, stat.S_IFDIR
                about = protocol.NOTHING
            else:
                child = node.first + place - 2
                inner = self._table.node(child)
                name, number, kind = self._table.name(child), child + 1, inner.mode
                about = protocol.entry(number, self._attributes(child, inner)) if plus else b""
            record = protocol.listed(
                name, place + 1, number, stat.S_IFMT(kind) >> 12, about if plus else None
            )
            if len(found) + len(record) > room:
                break
            found += record
        return bytes(found)


def mount(device: int, target: str) -> None:
    """Mount what is answered at `device`, read-only, for everybody who can see `target`."""
    options = f"fd={device},rootmode=40000,user_id=0,group_id=0,allow_other,default_permissions"
    flags = linux.MS_NOSUID | linux.MS_NODEV | linux.MS_RDONLY
    linux.mount("dynflow", target, "fuse.dynflow", flags, options)


def main(channel_fd: int) -> None:
    """Take the order from the platform, mount, say so, serve to the end."""
    channel = socket.socket(fileno=channel_fd)
    received = messages.receive(channel)
    if received is None:
        return
    order, _ = received
    for number in (signal.SIGINT, signal.SIGHUP, signal.SIGPIPE):
        signal.signal(number, signal.SIG_IGN)
    os.setsid()
    folder = Path(order["folder"])
    try:
        server, device = _open(order, folder)
    except (OSError, ValueError) as error:
        messages.send(channel, {"error": str(error)})
        return
    control = Control(folder, server, channel, order["stuck_after"])
    threading.Thread(target=control.serve, daemon=True).start()
    server.serve(device)
    with contextlib.suppress(OSError):
        control.end()
    os._exit(0)


def _open(order: dict[str, Any], folder: Path) -> tuple[Server, int]:
    linux.unshare(linux.CLONE_NEWNS | linux.CLONE_NEWNET | linux.CLONE_NEWIPC | linux.CLONE_NEWUTS)
    # What the host unmounts goes here, too; what is mounted here the host does not see.
    linux.mount("none", "/", None, linux.MS_REC | linux.MS_SLAVE)
    linux.hide_memory()
    blobs = Blobs(order["repository"], order["env"], folder)
    server = Server(Table(Path(order["table"])), blobs, timeout=2 * math.ceil(order["stuck_after"]))
    (folder / "mount").mkdir(exist_ok=True)
    device = os.open("/dev/fuse", os.O_RDWR | os.O_CLOEXEC)
    mount(device, str(folder / "mount"))
    server.begin(device)
    return server, device
