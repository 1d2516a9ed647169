"""How a supervisor sees its command through: output, limits, the platform's word, and its end. Stdlib only.

A command that may survive the platform has a socket in a folder, at which a later process of the platform finds its
supervisor. It goes on without a platform as with one: all limits are held here. Its output is in a file, which the
platform reads; here it is only told that there is more.
"""

from __future__ import annotations

import contextlib
import errno
import os
import select
import signal
import socket
import struct
import time
from collections.abc import Callable
from typing import Any

from ci_platform.sandboxes import cgroups, gauges, messages

VERSION = 1
"""Of what a supervisor and a later platform say to each other; a platform of another version ends the command."""

_EVERY = 0.2
"""Seconds between two looks at what a command uses."""

_SHORT = 0.05
"""Seconds: what a command of so little time has looked at, the kernel soon lets go of. It takes 2 µs for each file,
which the end of another command is not to wait for."""

_FULL = frozenset({errno.ENOSPC, errno.EDQUOT})

_PIECE = 1024 * 1024
_SPLICE_F_NONBLOCK = 2


class Watch:
    """One command, from its start until somebody has heard how it ended, or nobody will.

    `files` are the file of its output, and where there are any the gateway's lifeline and the socket at which a later
    platform asks. `settle` lets go of everything that the ended command held.
    """

    def __init__(  # noqa: PLR0913 - everything of one sandbox comes together here
        self,
        job: dict[str, Any],
        files: dict[str, int],
        channel: socket.socket,
        *,
        relay: socket.socket,
        init: int,
        told_by_init: int,
        printed: int,
        group: cgroups.Group | None,
        disk: gauges.Disk,
        settle: Callable[[], None],
    ) -> None:
        self._job, self._files, self._init, self._told_by_init = job, files, init, told_by_init
        self._channel: socket.socket | None = channel
        self._relay, self._printed, self._output = relay, printed, files["output"]
        self._group, self._disk, self._settle = group, disk, settle
        self._lifeline = socket.socket(fileno=files["lifeline"]) if "lifeline" in files else None
        self._control = socket.socket(fileno=files["control"]) if "control" in files else None
        self._written, self._left = 0, job["output"]
        self._started = time.monotonic()
        self._verdict: dict[str, Any] = {}
        self._ended = self._heard = self._outlived = False
        self._alone_since = 0.0
        self._status: int | None = None
        self._waits, self._again_at = False, 0.0
        self._poll = select.poll()
        self._handlers: dict[int, Callable[[], None]] = {}

    def run(self) -> None:
        """See it through."""
        pidfd = os.pidfd_open(self._init)
        self._on(pidfd, self._over)
        self._on(self._printed, self._pass_on)
        self._on(self._relay.fileno(), self._hear_the_command)
        if self._channel is not None:
            self._on(self._channel.fileno(), self._hear_the_platform)
        if self._control is not None:
            self._on(self._control.fileno(), self._be_found)
        if self._lifeline is not None:
            self._on(self._lifeline.fileno(), self._hear_the_gateway)
        while not (self._ended and (self._heard or self._is_given_up())):
            for fd, _ in self._poll.poll(self._pause() * 1000):
                if (handler := self._handlers.get(fd)) is not None:
                    handler()
            if not self._ended:
                self._look_after()
        if self._group is not None:
            # Not before the verdict is told: the dead leave their group a moment late, which nobody need wait for.
            self._group.remove()
            if self._outlived:
                self._group.remove_home()

    def _look_after(self) -> None:
        """Do what time brings."""
        if self._waits and time.monotonic() >= self._again_at:
            self._try_again()
        self._hold_limits()
        # What it has printed and found no room for is waited for, too, but not beyond its limits.
        if self._status is not None and not (self._waits and self._goes_well()):
            self._conclude(self._status)

    def kill(self) -> None:
        """End everything at once, where it has not ended."""
        if self._init:
            os.kill(self._init, signal.SIGKILL)
            os.waitpid(self._init, 0)
            self._init = 0

    def _on(self, fd: int, handler: Callable[[], None]) -> None:
        self._handlers[fd] = handler
        self._poll.register(fd, select.POLLIN)

    def _off(self, fd: int) -> None:
        if self._handlers.pop(fd, None) is not None:
            self._poll.unregister(fd)

    def _pause(self) -> float:
        if self._ended:
            return 1.0
        until: float = self._started + self._job["timeout"]
        return max(0.0, min(_EVERY, until - time.monotonic()))

    def _is_given_up(self) -> bool:
        """Whether nobody hears the verdict: no platform is there, and none has come for the time that is given it."""
        if self._channel is not None:
            return False
        return self._control is None or time.monotonic() - self._alone_since > self._job["kept"]

    # --- limits ---

    def _hold_limits(self) -> None:
        job = self._job
        if time.monotonic() - self._started >= job["timeout"]:
            self._stop("timeout")
        elif job["cpu"] is not None and (used := gauges.processor_seconds(self._group)) > job["cpu"]:
            self._stop("cpu", round(used))
        elif self._group is None and (held := gauges.memory_used()) > job["memory"]:
            self._stop("memory", held)
        elif (over := self._disk.over()) is not None:
            self._stop(*over)

    def _goes_well(self) -> bool:
        return "reason" not in self._verdict

    def _stop(self, reason: str, used: int = 0) -> None:
        """Kill the command for a limit."""
        if self._goes_well() and not self._ended:
            self._verdict |= {"reason": reason, "used": used}
            if self._init:
                os.kill(self._init, signal.SIGKILL)

    # --- what happens ---

    def _pass_on(self) -> None:
        """Write what was printed to its file."""
        try:
            if self._left > 0:
                count = min(_PIECE, self._left)
                moved = os.splice(
                    self._printed, self._output, count, offset_dst=self._written, flags=_SPLICE_F_NONBLOCK
                )
            elif moved := len(os.read(self._printed, 1)):
                self._off(self._printed)
                self._stop("output", self._written + moved)
                return
        except BlockingIOError:
            return
        except OSError as error:
            if error.errno not in _FULL:
                raise
            # The disk is full. The command waits where it prints; its time goes on.
            self._off(self._printed)
            self._waits, self._again_at = True, time.monotonic() + _EVERY
            return
        if not moved:
            self._off(self._printed)
            return
        self._written += moved
        self._left -= moved
        self._nudge()

    def _try_again(self) -> None:
        """Go on with what found no room."""
        self._waits = False
        self._on(self._printed, self._pass_on)
        if self._status is not None:
            self._drain()

    def _drain(self) -> None:
        """Write what an ended command has printed last."""
        while self._printed in self._handlers:
            before = self._written
            self._pass_on()
            if self._written == before:
                break

    def _nudge(self) -> None:
        if self._channel is not None:
            messages.nudge(self._channel)

    def _hear_the_command(self) -> None:
        """Take why it could not begin, or hear that it has."""
        self._off(self._relay.fileno())
        if (told := messages.receive(self._relay)) is not None:
            self._verdict |= told[0]

    def _hear_the_gateway(self) -> None:
        """Take that there is another record; it ends only with us, or by an accident."""
        if self._lifeline is not None:
            if not self._lifeline.recv(4096):
                self._off(self._lifeline.fileno())
            self._nudge()

    def _hear_the_platform(self) -> None:
        """Take its word; without it go on alone, or end."""
        if self._channel is None:
            return
        received = messages.receive(self._channel)
        if received is not None and "heard" in received[0]:
            self._heard = True
        elif received is not None:
            self._stop("killed")
        else:
            self._off(self._channel.fileno())
            self._channel.close()
            # Without a control, the platform has only let go of a command that has ended.
            self._channel, self._alone_since = None, time.monotonic()
            self._outlived = self._control is not None
            if self._control is None:
                self._stop("killed")

    def _be_found(self) -> None:
        """Let a later platform in, one at a time: it gets the file of the output, and the verdict when there is one."""
        if self._control is None:
            return
        caller, _ = self._control.accept()
        _, uid, _ = struct.unpack("3i", caller.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
        if self._channel is not None or uid != os.geteuid():
            caller.close()
            return
        self._channel = caller
        self._on(caller.fileno(), self._hear_the_platform)
        files = [self._files[name] for name in ("output", "records") if name in self._files]
        with contextlib.suppress(OSError):
            messages.send(caller, {"hello": VERSION}, files)
            self._tell_the_verdict()

    def _over(self) -> None:
        """Take how init ended, when nothing runs in there any more."""
        for fd in [fd for fd, handler in self._handlers.items() if handler == self._over]:
            self._off(fd)
            os.close(fd)
        _, self._status = os.waitpid(self._init, 0)
        self._init = 0
        self._drain()

    def _conclude(self, status: int) -> None:
        """Say how it ended."""
        if self._relay.fileno() in self._handlers:
            self._hear_the_command()
        self._judge(os.waitstatus_to_exitcode(status))
        if self._lifeline is not None:
            self._off(self._lifeline.fileno())
            _end_gateway(self._lifeline)
        # A server of files ends with its mount, and is asked how it went.
        quick = time.monotonic() - self._started < _SHORT or "lazy" in self._job["files"]
        if quick:
            self._settle()
        else:
            self._verdict["settling"] = True
        self._ended = True
        self._tell_the_verdict()
        if not quick:
            self._settle_at_leisure()

    def _settle_at_leisure(self) -> None:
        """Let go of what the command held when its end is told, and say so: whoever builds on it waits for that."""
        self._settle()
        del self._verdict["settling"]
        if self._channel is not None:
            with contextlib.suppress(OSError):
                messages.send(self._channel, {"settled": True})
        # Who is not to be found again has no more to say.
        self._heard = self._heard or self._control is None

    def _judge(self, code: int) -> None:
        """Say what the end was due to."""
        told = os.read(self._told_by_init, 100) if code >= 0 else b""
        if told.isdigit() and os.WIFSIGNALED(int(told)):
            number = os.WTERMSIG(int(told))
            names = {each.value: each.name for each in signal.Signals}
            self._verdict.setdefault("ended", f"killed by signal {number} ({names.get(number, 'real time')})")
        self._verdict |= {"exited": code if code >= 0 else 128 - code}
        self._verdict["seconds"] = time.monotonic() - self._started
        if self._verdict["exited"] and self._group is not None:
            if self._group.out_of_memory():
                self._verdict.setdefault("reason", "memory")
            elif self._group.out_of_processes():
                self._verdict.setdefault("reason", "processes")
        if "reason" not in self._verdict and (over := self._disk.over_at_the_end()) is not None:
            self._verdict |= {"reason": over[0], "used": over[1]}

    def _tell_the_verdict(self) -> None:
        if self._ended and self._channel is not None:
            with contextlib.suppress(OSError):
                messages.send(self._channel, self._verdict)


_GATEWAY_ENDS_WITHIN = 5.0
"""Seconds that a gateway is waited for when its command is over, so that its last records are there."""


def _end_gateway(lifeline: socket.socket) -> None:
    """Have the command's gateway end, and wait until it has written what it knows."""
    with lifeline:
        lifeline.settimeout(_GATEWAY_ENDS_WITHIN)
        with contextlib.suppress(OSError):
            lifeline.shutdown(socket.SHUT_WR)
            while lifeline.recv(4096):
                pass
