"""The command line as a client of the HTTP API: where the server is, calls, streams."""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Self
from urllib.parse import quote

import httpx

from ci_platform.errors import InvalidInputError, PlatformError, UnauthorizedError, UnavailableError
from ci_platform.service_settings import default_data_folder
from ci_platform.settings import read_secret

ADDRESS_FILE = "server.json"

# An API call is answered from a database on the server; streams have no limit on the time between two events
# but the server's heartbeat, of which two may go missing.
_CALL = httpx.Timeout(30.0, connect=5.0)
_STREAM = httpx.Timeout(40.0, connect=5.0)
# 0.2 s, 0.4 s, …: together a little longer than a server takes to start again.
_MOST_RECONNECTS = 6


class ApiError(PlatformError):
    """The server refused; `code` and `status` are what it said."""

    def __init__(self, message: str, code: str, status: int) -> None:
        super().__init__(message)
        self.code, self.status = code, status  # type: ignore[misc]  # of this one error, not of its class


@dataclass(frozen=True, slots=True)
class Address:
    """Where a server listens, and the file with the local administrator's token."""

    url: str
    token_path: str
    pid: int

    @property
    def alive(self) -> bool:
        """Whether its process exists."""
        try:
            os.kill(self.pid, 0)
        except ProcessLookupError:
            return False
        except PermissionError:
            pass
        return True


@dataclass(frozen=True, slots=True)
class ServerEvent:
    """One server-sent event; `id` is the cursor to go on from."""

    event: str
    data: Any
    id: str | None


def read_address(data: Path) -> Address | None:
    """Return what a server wrote into its data folder, None where there is nothing usable."""
    try:
        return Address(**json.loads((data / ADDRESS_FILE).read_text()))
    except (OSError, ValueError, TypeError):
        return None


def write_address(data: Path, address: Address) -> None:
    """Say where the server is, for command lines on this machine. The file holds no secret."""
    data.mkdir(mode=0o700, parents=True, exist_ok=True)
    temporary = data / f"{ADDRESS_FILE}.{os.getpid()}.tmp"
    fields = {"url": address.url, "token_path": address.token_path, "pid": address.pid}
    temporary.write_text(json.dumps(fields) + "\n")
    temporary.replace(data / ADDRESS_FILE)


def forget_address(data: Path, address: Address) -> None:
    """Remove the address again, unless another server has written its own meanwhile."""
    if read_address(data) == address:
        (data / ADDRESS_FILE).unlink(missing_ok=True)


class Client:
    """Calls of the HTTP API. Use it in a `with` block. Errors are ApiError and UnavailableError."""

    def __init__(self, url: str, token: str | None) -> None:
        headers = {"Authorization": f"Bearer {token}"} if token else {}
        self.url = url.rstrip("/")
        self._http = httpx.Client(base_url=self.url, headers=headers, timeout=_CALL)
        self._closed = threading.Event()

    @classmethod
    def find(cls, environ: Mapping[str, str] | None = None, data: Path | None = None) -> Client:
        """Return a client of the server that the environment or the data folder names.

        `DYNFLOW_URL` and `DYNFLOW_TOKEN` come first, then the data folder: the one given, `DYNFLOW_DATA`, or the
        default. Raises UnavailableError where no server is running there.
        """
        environ = os.environ if environ is None else environ
        if "DYNFLOW_URL" in environ:
            return cls(environ["DYNFLOW_URL"], environ.get("DYNFLOW_TOKEN"))
        folder = data or Path(environ.get("DYNFLOW_DATA") or default_data_folder()).expanduser()
        address = read_address(folder)
        if address is None or not address.alive:
            raise UnavailableError(
                f"no server is running with the data folder {folder}: start one with `dynflow serve`, "
                "or say where it is with DYNFLOW_URL and DYNFLOW_TOKEN"
            )
        return cls(address.url, environ.get("DYNFLOW_TOKEN") or _local_token(address))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the streams that other threads read, and all connections."""
        self._closed.set()
        self._http.close()

    def get(self, path: str, /, **query: Any) -> Any:
        """Return the JSON of a GET; parameters that are None are left out."""
        return self._call(
            "GET", path, params={key: value for key, value in query.items() if value is not None}
        )

    def text(self, path: str) -> str:
        """Return the text of a GET."""
        with _plainly(self.url):
            response = self._http.get(path)
        _raise_for(response)
        return response.text

    def download(self, path: str, output: IO[bytes], /, **query: Any) -> None:
        """Write the bytes of a GET to a file. UnavailableError where the connection broke in between."""
        with (
            _plainly(self.url),
            self._http.stream("GET", path, params=query, timeout=_STREAM) as response,
        ):
            if response.is_error:
                response.read()
                _raise_for(response)
            for piece in response.iter_bytes():
                output.write(piece)

    def post(self, path: str, body: Any = None, *, seconds: float | None = None) -> Any:
        """Return the JSON of a POST, which may take so long."""
        patience = {} if seconds is None else {"timeout": seconds}
        return self._call("POST", path, json={} if body is None else body, **patience)

    def patch(self, path: str, body: Any) -> Any:
        """Return the JSON of a PATCH."""
        return self._call("PATCH", path, json=body)

    def delete(self, path: str) -> Any:
        """Return the JSON of a DELETE."""
        return self._call("DELETE", path)

    def stream(self, path: str, *, after: str | None = None, **query: Any) -> Iterator[ServerEvent]:
        """Yield server-sent events until an `end` event; connects again where the connection broke."""
        given = {key: value for key, value in query.items() if value is not None}
        failures = 0
        while not self._closed.is_set():
            try:
                for event in self._stream_once(path, given, after):
                    failures = 0
                    after = event.id or after
                    if event.event == "end":
                        return
                    yield event
            except UnavailableError:
                failures += 1
                if failures > _MOST_RECONNECTS:
                    raise
                self._closed.wait(0.1 * 2**failures)

    def _stream_once(self, path: str, query: Mapping[str, Any], after: str | None) -> Iterator[ServerEvent]:
        headers = {"Accept": "text/event-stream", **({"Last-Event-ID": after} if after else {})}
        with (
            _plainly(self.url),
            self._http.stream("GET", path, params=query, headers=headers, timeout=_STREAM) as response,
        ):
            if response.is_error:
                response.read()
                _raise_for(response)
            yield from parse_events(response.iter_lines())

    def _call(self, method: str, path: str, **options: Any) -> Any:
        with _plainly(self.url):
            response = self._http.request(method, path, **options)
        _raise_for(response)
        try:
            return response.json() if response.content else None
        except ValueError:
            raise UnavailableError(f"{self.url} is not a dynflow server: it did not answer in JSON") from None


def parse_events(lines: Iterator[str]) -> Iterator[ServerEvent]:
    """Yield the events of an event stream. Comments are left out."""
    fields: dict[str, str] = {}
    for line in lines:
        name, _, value = line.partition(":")
        value = value.removeprefix(" ")
        if not line:
            if fields.get("data"):
                yield ServerEvent(fields.get("event", "message"), _decode(fields["data"]), fields.get("id"))
            fields = {}
        elif name == "data" and "data" in fields:
            fields["data"] += "\n" + value
        elif name:
            fields[name] = value


def segment(text: str) -> str:
    """Return `text` as one segment of a path."""
    return quote(text, safe="")


def _decode(data: str) -> Any:
    try:
        return json.loads(data)
    except ValueError:
        return data


def _local_token(address: Address) -> str | None:
    try:
        return read_secret(Path(address.token_path))
    except InvalidInputError as error:
        raise UnauthorizedError(
            f"{error}; say which token to use with DYNFLOW_TOKEN, or run this as the server's user"
        ) from None


@contextmanager
def _plainly(url: str) -> Iterator[None]:
    try:
        yield
    except httpx.ConnectError:
        raise UnavailableError(f"nothing answers at {url}") from None
    except httpx.TimeoutException:
        raise UnavailableError(f"{url} does not answer in time") from None
    except (httpx.TransportError, httpx.InvalidURL) as error:
        raise UnavailableError(f"the connection to {url} failed: {error}") from None


def _raise_for(response: httpx.Response) -> None:
    if not response.is_error:
        return
    try:
        error = response.json()["error"]
        code, message = str(error["code"]), str(error["message"])
        problems = [str(item.get("message")) for item in error.get("details", {}).get("problems", ())]
    except (ValueError, KeyError, TypeError, AttributeError):
        raise ApiError(
            f"the server answered {response.status_code}", "unknown", response.status_code
        ) from None
    raise ApiError("; ".join([message, *problems]), code, response.status_code)
