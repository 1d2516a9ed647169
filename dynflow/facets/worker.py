"""The program that performs SQL of tenants: one request at a time, over the socket that is its standard input.

A process of its own, because SQLite counts memory for a whole process, cannot be interrupted inside of one long
function (`instr` of two megabytes), and is C. So it can be limited, and killed at any moment: what a transaction
left behind is rolled back when the file is opened next. Stdlib only.
"""

from __future__ import annotations

import contextlib
import json
import os
import resource
import signal
import socket
import sqlite3
import struct
import sys
import sysconfig
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

from dynflow.facets.guard import Guard
from dynflow.isolates import syscalls
from dynflow.serialization import MEBIBYTE, decode, encode

# "dynF" as a number: tells our files from other SQLite files.
APPLICATION_ID = 0x64796E46
_MAGIC = b"SQLite format 3\0"
_PAGE = 4_096
# Operations of SQLite's machine between two looks at the clock: a fraction of a millisecond.
_OPERATIONS = 10_000
# Seconds to wait for a lock: nobody but a backup uses the same file at the same time.
_PATIENCE = 2.0
_PATIENCE_WITH_OTHERS = 30.0
# With less room than this on the disk, a full database is the disk's matter and not the limit's.
_DISK_ROOM = 16 * MEBIBYTE

_HEADER = struct.Struct("!I")
_DAMAGED = {sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB}
_OURS = {
    sqlite3.SQLITE_BUSY,
    sqlite3.SQLITE_CANTOPEN,
    sqlite3.SQLITE_IOERR,
    sqlite3.SQLITE_LOCKED,
    sqlite3.SQLITE_PERM,
    sqlite3.SQLITE_PROTOCOL,
    sqlite3.SQLITE_READONLY,
}


class Told(Exception):  # noqa: N818 - an answer, not an error of this program
    """An answer other than a result: `kind` and what belongs to it, see `dynflow.facets`."""

    def __init__(self, kind: str, *details: Any) -> None:
        super().__init__(kind, *details)
        self.kind, self.details = kind, details


def main() -> None:
    """Serve until the host is gone."""
    options = json.loads(sys.argv[1])
    sock = socket.socket(fileno=0)
    walls = confine(Path(options["folder"]), options["limits"], options["writable"])
    worker = Worker(options["folder"], options["limits"])
    _send(sock, encode({"ok": walls}))
    while (request := _receive(sock)) is not None:
        _send(sock, worker.answer(decode(request)))


def confine(folder: Path, limits: dict[str, Any], writable: list[str]) -> list[str]:
    """Take from this process what it does not need; return the names of what stands."""
    with closing(sqlite3.connect(":memory:")) as db:
        db.execute(f"PRAGMA hard_heap_limit = {limits['memory']}")
        db.execute("SELECT randomblob(8)")  # seeded from /dev/urandom, which is out of reach later
    address_space = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    for which, limit in {
        # The heap, and what Python makes of arguments and results.
        resource.RLIMIT_AS: address_space + limits["memory"] + 16 * limits["result"] + 128 * MEBIBYTE,
        resource.RLIMIT_CORE: 0,
        resource.RLIMIT_FSIZE: limits["size"] + _DISK_ROOM,
        resource.RLIMIT_NOFILE: 64,
    }.items():
        hard = resource.getrlimit(which)[1]
        value = limit if hard == resource.RLIM_INFINITY else min(limit, hard)
        resource.setrlimit(which, (value, value))
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the terminal's is for the host, who ends us
    os.umask(0o077)
    syscalls.set_no_new_privileges()
    if folder.stat().st_uid == os.geteuid():
        syscalls.drop_bounding_set()
        syscalls.drop_capabilities()
    syscalls.set_undumpable()
    syscalls.set_parent_death_signal(signal.SIGKILL)
    library = sysconfig.get_paths()
    readable = {library["stdlib"], library["platstdlib"]}
    try:
        abi = syscalls.landlock(sorted(readable), writable=writable)
    except OSError:  # a container may forbid it
        abi = 0
    return ["limits", "landlock"] if abi else ["limits"]


class Worker:
    """Performs requests. `limits` are those of `dynflow.facets.FacetLimits`, `time` in seconds."""

    def __init__(self, folder: str, limits: dict[str, Any]) -> None:
        self._folder, self._limits = folder, limits
        self._actions: dict[str, Callable[[dict[str, Any]], bytes]] = {
            "run": self._run,
            "clone": self._clone,
            "copy": self._copy,
            "delete": self._delete,
            "databases": self._databases,
            "drop": self._drop,
        }

    def answer(self, request: dict[str, Any]) -> bytes:
        """Perform a request; return the answer, encoded."""
        try:
            return self._actions[request["do"]](request)
        except Told as told:
            answer = told
        except sqlite3.Error as error:
            answer = self._judge(error, request)
        except MemoryError:
            answer = Told("limit", "memory", self._limits["memory"])
        except OSError as error:
            answer = Told("unavailable", f"{error.strerror}", f"{error}")
        return encode({"error": [answer.kind, *answer.details]})

    # --- requests ----------------------------------------------------------------------------------

    def _run(self, request: dict[str, Any]) -> bytes:
        path = self._make(request)
        with closing(self._connect(path)) as db:
            guard = Guard(db, self._limits["value"], self._limits["sql"])
            self._set_up(db, path, check=request["check"])
            return self._transaction(db, guard, request["statements"])

    def _clone(self, request: dict[str, Any]) -> bytes:
        source, target = _path(request), _path(request, "target")
        if not source.exists():
            raise Told("invalid", f"there is no database {request['name']!r}")
        if target.exists():
            raise Told("invalid", f"there is a database {request['target']!r} already: delete it first")
        self._make_room(target)
        self._copy_whole(source, target, _PATIENCE)
        return encode({"ok": None})

    def _copy(self, request: dict[str, Any]) -> bytes:
        """Copy a database to another folder, which is a new one; `ok` is False where there is none any more."""
        source, target = Path(request["path"]), Path(request["target"])
        if not source.exists():
            return encode({"ok": False})
        target.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        # Somebody else may use it, whose calls last as long as their limits say.
        self._copy_whole(source, target, _PATIENCE_WITH_OTHERS)
        return encode({"ok": True})

    def _copy_whole(self, source: Path, target: Path, patience: float) -> None:
        partial = target.with_suffix(".partial")
        partial.unlink(missing_ok=True)
        try:
            with closing(self._connect(source, patience)) as db:
                self._set_up(db, source, check=True)
                os.close(os.open(partial, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600))
                with closing(self._connect(partial)) as copy:
                    # The source is locked until this is over: the disk is waited for after that.
                    copy.execute("PRAGMA synchronous = OFF")
                    db.backup(copy)
            _sync(partial)
            partial.rename(target)
            _sync(target.parent)
        finally:
            partial.unlink(missing_ok=True)

    def _delete(self, request: dict[str, Any]) -> bytes:
        path = _path(request)
        existed = path.exists()
        # The journal last: without its database it means nothing, and `_make` takes it away.
        for each in (path, Path(f"{path}-journal")):
            each.unlink(missing_ok=True)
        if existed:
            _sync(path.parent)
        return encode({"ok": existed})

    def _databases(self, request: dict[str, Any]) -> bytes:
        found = sorted(Path(request["folder"]).glob("*.db"))
        return encode({"ok": [{"name": path.stem, "bytes": path.stat().st_size} for path in found]})

    def _drop(self, request: dict[str, Any]) -> bytes:
        folder = Path(request["folder"])
        with contextlib.suppress(FileNotFoundError):
            for path in sorted(folder.iterdir()):  # a database before its journal
                path.unlink()
            folder.rmdir()
        return encode({"ok": None})

    # --- files -------------------------------------------------------------------------------------

    def _make(self, request: dict[str, Any]) -> Path:
        """Return the path of a database, made where it is missing."""
        path = _path(request)
        if not path.exists():
            self._make_room(path)
            Path(f"{path}-journal").unlink(missing_ok=True)  # of one that was deleted
            os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600))
        return path

    def _make_room(self, path: Path) -> None:
        for folder in (path.parent.parent, path.parent):
            if not folder.exists():
                folder.mkdir(mode=0o700)
                _sync(folder.parent)
        if len(list(path.parent.glob("*.db"))) >= self._limits["databases"]:
            raise Told("limit", "databases", self._limits["databases"])

    def _connect(self, path: Path, patience: float = _PATIENCE) -> sqlite3.Connection:
        return sqlite3.connect(
            f"{path.as_uri()}?mode=rw", uri=True, isolation_level=None, timeout=patience, cached_statements=0
        )

    def _set_up(self, db: sqlite3.Connection, path: Path, *, check: bool) -> None:
        """Make a new file ours, or see that it is; set what holds for a connection."""
        size = path.stat().st_size
        if size:
            _check_header(path)
            if check and (found := db.execute("PRAGMA quick_check(1)").fetchone()[0]) != "ok":
                raise Told("damaged", " ".join(str(found).split()))
        # Sorting and the like in memory, which is limited: a file of SQLite's own in /tmp would not be.
        for pragma in (
            "temp_store = MEMORY",
            "cache_size = -2048",
            "mmap_size = 0",
            "synchronous = FULL",
            "cell_size_check = ON",
            "foreign_keys = ON",
            f"max_page_count = {max(self._limits['size'] // _PAGE, 1)}",
        ):
            db.execute(f"PRAGMA {pragma}")
        if not size:
            db.execute(f"PRAGMA page_size = {_PAGE}")
            db.execute("PRAGMA auto_vacuum = FULL")  # what was deleted is given back to the disk
            db.execute(f"PRAGMA application_id = {APPLICATION_ID}")

    # --- SQL ---------------------------------------------------------------------------------------

    def _transaction(self, db: sqlite3.Connection, guard: Guard, statements: list[Any]) -> bytes:
        deadline = time.monotonic() + self._limits["time"]
        db.set_progress_handler(lambda: time.monotonic() > deadline, _OPERATIONS)
        room = Room(self._limits["rows"], self._limits["result"])
        db.execute("BEGIN")
        try:
            results = []
            for number, (sql, params) in enumerate(statements, start=1):
                results.append(self._statement(db, guard, room, sql, params, number))
            answer = self._answer(results)  # before the commit: what cannot be told must not be done
            db.execute("COMMIT")
        except BaseException:
            db.set_progress_handler(None, 0)
            if db.in_transaction:
                db.execute("ROLLBACK")
            raise
        return answer

    def _answer(self, results: list[dict[str, Any]]) -> bytes:
        answer = encode({"ok": results})
        if len(answer) > self._limits["result"]:
            raise Told("limit", "result", self._limits["result"])
        return answer

    def _statement(
        self, db: sqlite3.Connection, guard: Guard, room: Room, sql: str, params: Any, number: int
    ) -> dict[str, Any]:
        guard.trusted, guard.refused = False, None
        try:
            with closing(db.execute(sql, params)) as cursor:
                return _result(cursor, room)
        except (OverflowError, ValueError, sqlite3.Warning, sqlite3.ProgrammingError) as error:
            # Numbers beyond 64 bits, texts that are none, two statements in one, too few parameters.
            raise Told("invalid", f"{error}") from None
        except sqlite3.Error as error:
            if guard.refused is not None:
                raise Told("refused", guard.refused) from None
            told = self._judge(error, {})
            if told.kind == "sql" and number > 1:
                told = Told("sql", f"statement {number}: {told.details[0]}", *told.details[1:])
            raise told from None
        finally:
            guard.trusted = True

    def _judge(self, error: sqlite3.Error, request: dict[str, Any]) -> Told:
        """Return whose matter an error of SQLite is, and what is told of it."""
        code = getattr(error, "sqlite_errorcode", 0) & 0xFF  # the rest says where in SQLite it came up
        name = getattr(error, "sqlite_errorname", "SQLITE_ERROR")
        limited = {
            sqlite3.SQLITE_INTERRUPT: "time",
            sqlite3.SQLITE_NOMEM: "memory",
            sqlite3.SQLITE_TOOBIG: "value",
            sqlite3.SQLITE_FULL: "size",
        }
        if code in _DAMAGED:
            return Told("damaged", str(error))
        if code == sqlite3.SQLITE_FULL and self._disk_is_full():
            return Told("unavailable", "the disk is full", str(error))
        if code in limited:
            return Told("limit", limited[code], self._limits[limited[code]])
        if code in _OURS:
            return Told("unavailable", f"{name}", f"{error} {request.get('name', '')}")
        return Told("sql", str(error), name)

    def _disk_is_full(self) -> bool:
        found = os.statvfs(self._folder)
        return found.f_bavail * found.f_frsize < _DISK_ROOM


class Room:
    """What is left of a call's rows and bytes."""

    def __init__(self, rows: int, size: int) -> None:
        self._rows, self._size = rows, size
        self._rows_left, self._size_left = rows, size

    def take(self, row: tuple[Any, ...]) -> None:
        """Count a row. Raises Told where there is no room for it."""
        self._rows_left -= 1
        self._size_left -= sum(len(value) if isinstance(value, (str, bytes)) else 8 for value in row)
        if self._rows_left < 0:
            raise Told("limit", "rows", self._rows)
        if self._size_left < 0:
            raise Told("limit", "result", self._size)


def _result(cursor: sqlite3.Cursor, room: Room) -> dict[str, Any]:
    columns = [each[0] for each in cursor.description or ()]
    twice = next((name for name in columns if columns.count(name) > 1), None)
    if twice is not None:
        raise Told("invalid", f"two columns are called {twice!r}: give them names with AS")
    rows = []
    for row in cursor:
        room.take(row)
        rows.append(dict(zip(columns, row, strict=True)))
    return {"rows": rows, "changes": max(cursor.rowcount, 0), "last_row_id": cursor.lastrowid or None}


def _check_header(path: Path) -> None:
    with path.open("rb") as file:
        header = file.read(100)
    if not header.startswith(_MAGIC) or len(header) < 100:
        raise Told("damaged", "it is no SQLite database")
    if int.from_bytes(header[68:72], "big") != APPLICATION_ID:
        raise Told("damaged", "it is a SQLite database of another program")


def _path(request: dict[str, Any], key: str = "name") -> Path:
    return Path(request["folder"]) / f"{request[key]}.db"


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _send(sock: socket.socket, data: bytes) -> None:
    sock.sendall(_HEADER.pack(len(data)) + data)


def _receive(sock: socket.socket) -> bytes | None:
    header = _exactly(sock, _HEADER.size)
    return None if header is None else _exactly(sock, _HEADER.unpack(header)[0])


def _exactly(sock: socket.socket, size: int) -> bytes | None:
    received = bytearray()
    while len(received) < size:
        chunk = sock.recv(min(size - len(received), MEBIBYTE))
        if not chunk:
            return None
        received += chunk
    return bytes(received)
