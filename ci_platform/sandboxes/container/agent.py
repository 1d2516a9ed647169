"""The program that keeps a warm container and runs its commands. It is run as a file, with a few modules beside it.

The engine starts it with the container's walls, and all that it forks has them by birth. It takes commands from one
connection, which it makes before anything else runs in the container, and answers each with how it ended. The container
is the tenant's and so is this program, once a command runs: nothing that it says is believed but of that run.
"""

# Not `signal` and `socket`, which bring a megabyte of others with them.
import _signal  # type: ignore[import-not-found]
import _socket
import errno
import os
import sys

NUMBER = 4
"""Bytes of a number: those of a command (its length, its number), those of an answer (number, status, trouble)."""

NOT_FOUND, NOT_EXECUTABLE = 127, 126


class Agent:
    """Runs one command after the other. `folder` has the socket, the pipe for output and the file for ends."""

    def __init__(self, folder: str) -> None:
        self._out = f"{folder}/out"
        # Held open: what a command has printed is not lost when both that and the platform end.
        self._held = os.open(self._out, os.O_RDWR)
        self._ends = os.open(f"{folder}/code", os.O_WRONLY)
        os.chdir("/")
        self._channel = _socket.socket(_socket.AF_UNIX)
        self._channel.connect(f"{folder}/agent")

    def serve(self) -> None:
        """Run commands until nobody gives any, then keep what the last one has printed until the container ends."""
        try:
            while True:
                length, number = (int.from_bytes(self._receive(NUMBER), "little") for _ in range(2))
                status, trouble = self._run(number, self._receive(length))
                answer = b"".join(value.to_bytes(NUMBER, "little") for value in (number, status, trouble))
                self._channel.sendall(answer)
        except (ConnectionError, EOFError):
            self._channel.close()
        while True:
            _signal.pause()

    def _receive(self, size: int) -> bytearray:
        """Return so many bytes. Raises EOFError or ConnectionError where the platform is gone."""
        received = bytearray(size)
        view = memoryview(received)
        while view:
            got = self._channel.recv_into(view)
            if not got:
                raise EOFError
            view = view[got:]
        return received

    def _run(self, number: int, command: bytearray) -> tuple[int, int]:
        """Run one command; returns how it ended, as `waitpid` says it, and the error that kept it from beginning."""
        self._write_down(b"%d\n" % number, anew=True)
        told, tell = os.pipe()
        try:
            child = os.fork()
            if child == 0:
                self._be(command, tell)
        except OSError as error:
            os.close(told)
            os.close(tell)
            return NOT_EXECUTABLE << 8, error.errno or errno.EAGAIN
        finally:
            # Secrets of one command do not wait here for the next.
            command[:] = bytes(len(command))
        os.close(tell)
        trouble = os.read(told, NUMBER)  # the end of it, once the program runs
        os.close(told)
        _, status = os.waitpid(child, 0)
        self._write_down(b"%d %d\n" % (number, _exit_code(status)))
        return status, int.from_bytes(trouble, "little")

    def _write_down(self, text: bytes, *, anew: bool = False) -> None:
        """Write which command runs, and over it how it ended, for a platform that was not there to be told."""
        try:
            if anew:
                os.ftruncate(self._ends, 0)
            os.pwrite(self._ends, text, 0)
        except OSError:
            pass  # a command may fill the folder; then nobody will know

    def _be(self, command: bytearray, tell: int) -> None:
        """Become the command, in a process of its own. Does not return."""
        name, code = b"", NOT_EXECUTABLE
        try:
            cwd, count, *rest = bytes(command).split(b"\0")
            argv, pairs = rest[: int(count)], rest[int(count) :]
            name = argv[0]
            self._take_over(cwd)
            _become(argv, dict(pair.split(b"=", 1) for pair in pairs))
        except OSError as error:
            number = error.errno or errno.EIO
            missing = number in (errno.ENOENT, errno.ENOTDIR)
            code = NOT_FOUND if missing else NOT_EXECUTABLE
            why = "not found" if missing else os.strerror(number)
            os.write(2, name + b": " + why.encode() + b"\n")
            os.write(tell, number.to_bytes(NUMBER, "little"))
        finally:
            os._exit(code)

    def _take_over(self, cwd: bytes) -> None:
        """Read nothing, print into the pipe, be a session of its own, as a command of the engine's is."""
        os.setsid()
        os.dup2(os.open("/dev/null", os.O_RDONLY), 0)
        # For both ways, so that it has a reader though the platform is killed: once it is full, the command waits.
        printed = os.open(self._out, os.O_RDWR)
        os.dup2(printed, 1)
        os.dup2(printed, 2)
        for number in (_signal.SIGPIPE, _signal.SIGXFSZ):
            _signal.signal(number, _signal.SIG_DFL)
        os.chdir(cwd)


def _become(argv: list[bytes], env: dict[bytes, bytes]) -> None:
    """Run a program, which is looked for as a shell does. Raises OSError."""
    name, refused = argv[0], None
    folders = [b""] if b"/" in name else env.get(b"PATH", b"").split(b":")
    for folder in folders:
        path = os.path.join(folder, name)  # noqa: PTH118 - there is no pathlib in here
        try:
            os.execve(path, argv, env)  # noqa: S606 - no shell is the point
        except OSError as error:
            if error.errno == errno.ENOEXEC:  # a script that does not say of what, as shells take it
                os.execve(b"/bin/sh", [b"/bin/sh", path, *argv[1:]], env)  # noqa: S606
            if error.errno not in (errno.ENOENT, errno.ENOTDIR):
                refused = refused or error
    raise refused or FileNotFoundError(errno.ENOENT, "not found")


def _exit_code(status: int) -> int:
    code = os.waitstatus_to_exitcode(status)
    return code if code >= 0 else 128 - code


if __name__ == "__main__":
    if len(sys.argv) == 2:  # without a folder, it only shows that it would start
        Agent(sys.argv[1]).serve()
