"""A gateway over real sockets: whom it connects to, what it tells, and where it ends."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence

import pytest

from ci_platform.egress import Connection, GatewayLimits
from ci_platform.egress.gateway import Gateway, Resolve, is_this_machine, resolve
from ci_platform.egress.policy import Policy

SOON = 20.0
Answers = Sequence[tuple[int, str]]


class World:
    """A gateway in a thread, with names that the test resolves, and one server that sends back what it gets."""

    def __init__(self) -> None:
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.port = self.listener.getsockname()[1]
        self.server = socket.create_server(("127.0.0.2", 0))
        self.server_port = self.server.getsockname()[1]
        self.ours, self.theirs = socket.socketpair()
        self.file = tempfile.TemporaryFile("a+b", buffering=0)  # noqa: SIM115 - closed by close()
        self.answers: dict[str, list[Answers]] = {}
        self.asked: list[str] = []
        self.thread: threading.Thread | None = None

    def names(self, host: str, port: int) -> Answers:
        self.asked.append(host)
        left = self.answers.get(host)
        if left is None:
            return resolve(host, port)
        return left.pop(0) if len(left) > 1 else left[0]

    def start(
        self,
        hosts: Sequence[str] | None = None,
        *,
        limits: GatewayLimits | None = None,
        policy: Policy | None = None,
        look_up: Resolve | None = None,
    ) -> None:
        inner = [f"127.0.0.2:{self.server_port}", f"inner.test:{self.server_port}"]
        gateway = Gateway(
            self.listener,
            self.theirs,
            self.file.fileno(),
            policy or Policy(hosts, inner),
            limits or GatewayLimits(),
            look_up or self.names,
        )
        self.thread = threading.Thread(target=gateway.serve)
        self.thread.start()

    def ask(self, request: bytes) -> bytes:
        """Send a request and return everything that comes back."""
        with self.client() as client:
            client.sendall(request)
            return read_all(client)

    def client(self) -> socket.socket:
        return socket.create_connection(("127.0.0.1", self.port), SOON)

    def tunnel(self, host: str = "inner.test") -> socket.socket:
        client = self.client()
        client.sendall(f"CONNECT {host}:{self.server_port} HTTP/1.1\r\n\r\n".encode())
        assert client.recv(100).startswith(b"HTTP/1.1 200 ")
        return client

    def accept(self) -> socket.socket:
        self.server.settimeout(SOON)
        return self.server.accept()[0]

    def records(self) -> list[Connection]:
        """End the gateway and return what it has told."""
        self.end()
        self.file.seek(0)
        return [Connection.from_line(line) for line in self.file]

    def end(self) -> None:
        self.ours.close()
        if self.thread is not None:
            self.thread.join(SOON)
            assert not self.thread.is_alive()

    def close(self) -> None:
        self.end()
        for each in (self.listener, self.server, self.theirs, self.file):
            each.close()


@pytest.fixture
def world() -> Iterator[World]:
    made = World()
    made.answers["inner.test"] = [[(socket.AF_INET, "127.0.0.2")]]
    yield made
    made.close()


def read_all(client: socket.socket) -> bytes:
    data = b""
    with contextlib.suppress(ConnectionError):
        while piece := client.recv(65536):
            data += piece
    return data


def test_bytes_go_both_ways_and_are_counted(world: World) -> None:
    world.start()
    with world.tunnel() as client, world.accept() as server:
        client.sendall(b"ping")
        assert server.recv(10) == b"ping"
        server.sendall(b"pong!" * 1000)
        server.shutdown(socket.SHUT_WR)
        assert len(read_all(client)) == 5000
        client.sendall(b"more")  # one side may be done before the other
        client.shutdown(socket.SHUT_WR)
        assert read_all(server) == b"more"
    (record,) = world.records()
    assert (record.host, record.port, record.address) == ("inner.test", world.server_port, "127.0.0.2")
    assert (record.sent, record.received, record.refused, record.cut) == (8, 5000, "", "")
    assert record.seconds > 0


def test_a_plain_request_goes_on_without_what_was_for_the_proxy(world: World) -> None:
    world.start()
    with world.client() as client:
        url = f"http://inner.test:{world.server_port}/path?token=secret"
        client.sendall(
            f"POST {url} HTTP/1.1\r\nProxy-Authorization: Basic c2VjcmV0\r\nContent-Length: 4\r\n\r\nbody".encode()
        )
        with world.accept() as server:
            data = b""
            while not data.endswith(b"body"):
                data += server.recv(65536)
            server.sendall(b"HTTP/1.1 204 No Content\r\n\r\n")
        assert read_all(client).startswith(b"HTTP/1.1 204")
    assert b"POST /path?token=secret HTTP/1.1\r\n" in data
    assert b"roxy" not in data
    (record,) = world.records()
    told = json.dumps(record.as_line().decode()) + str(record)
    assert "secret" not in told
    assert "path" not in told


@pytest.mark.parametrize(
    "host",
    [
        "localhost",
        "127.0.0.1",
        "127.1",
        "2130706433",
        "0x7f000001",
        "0x7f.1",
        "0177.0.0.1",
        "017700000001",
        "0",
    ],
)
def test_no_notation_of_loopback_leads_there(world: World, host: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as service:
        service.settimeout(0)
        port = service.getsockname()[1]
        with contextlib.suppress(OSError), socket.create_connection((host, port), SOON):
            service.accept()[0].close()  # without a gateway it is reached
        world.start()
        answer = world.ask(f"CONNECT {host}:{port} HTTP/1.1\r\n\r\n".encode())
        assert answer.startswith(b"HTTP/1.1 403 ")
        with pytest.raises(BlockingIOError):
            service.accept()
    (record,) = world.records()
    assert "address" in record.refused


@pytest.mark.parametrize(
    "host",
    [
        "[::1]",
        "[::ffff:127.0.0.1]",
        "[::ffff:7f00:1]",
        "[64:ff9b::7f00:1]",
        "[::ffff:169.254.169.254]",
        "[::]",
    ],
)
def test_no_form_of_version_6_leads_to_loopback_or_metadata(world: World, host: str) -> None:
    world.start()
    assert world.ask(f"CONNECT {host}:80 HTTP/1.1\r\n\r\n".encode()).startswith(b"HTTP/1.1 403 ")
    assert world.ask(f"GET http://{host}/ HTTP/1.1\r\n\r\n".encode()).startswith(b"HTTP/1.1 403 ")
    assert all(record.refused for record in world.records())


def test_a_name_that_leads_inside_is_refused_and_said(world: World) -> None:
    world.answers["evil.test"] = [[(socket.AF_INET, "169.254.169.254"), (socket.AF_INET6, "::1")]]
    world.start(["evil.test"])
    answer = world.ask(b"GET http://evil.test/latest/meta-data/ HTTP/1.1\r\n\r\n")
    assert b"403" in answer
    assert b"metadata" in answer or b"loopback" in answer
    (record,) = world.records()
    assert record.refused == "::1 is a loopback address"
    assert record.address == ""


def test_a_name_is_looked_up_once_and_the_judged_address_is_connected_to(world: World) -> None:
    """DNS rebinding: the second answer would lead elsewhere."""
    world.answers["inner.test"] = [[(socket.AF_INET, "127.0.0.2")], [(socket.AF_INET, "127.0.0.1")]]
    with socket.create_server(("127.0.0.1", world.server_port)) as elsewhere:
        elsewhere.settimeout(0)
        world.start()
        with world.tunnel(), world.accept():
            pass
        with pytest.raises(BlockingIOError):
            elsewhere.accept()
    assert world.asked == ["inner.test"]
    assert world.records()[0].address == "127.0.0.2"


def test_a_host_that_is_not_on_the_list_is_not_even_looked_up(world: World) -> None:
    world.start(["inner.test:*"])
    answer = world.ask(b"CONNECT secrets-in-a-name.evil.test:443 HTTP/1.1\r\n\r\n")
    assert b"not on the command's list of hosts" in answer
    with world.tunnel(), world.accept():
        pass
    assert world.asked == ["inner.test"]


class AllPublic(Policy):
    """A world in which every address is public."""

    def why_not_address(self, host: str, port: int, address: str) -> str:
        return ""


def test_addresses_of_this_machine_are_refused_though_they_are_public(world: World) -> None:
    assert is_this_machine(socket.AF_INET, "127.0.0.2")
    assert is_this_machine(socket.AF_INET6, "::1")
    assert not is_this_machine(socket.AF_INET, "192.0.2.1")
    world.answers["own.test"] = [[(socket.AF_INET, "127.0.0.2")]]
    world.start(policy=AllPublic(None))
    assert b"an address of this machine" in world.ask(
        f"CONNECT own.test:{world.server_port} HTTP/1.1\r\n\r\n".encode()
    )


def test_a_server_that_is_not_there_is_told(world: World) -> None:
    world.server.close()
    world.start()
    assert world.ask(f"CONNECT inner.test:{world.server_port} HTTP/1.1\r\n\r\n".encode()).startswith(
        b"HTTP/1.1 502 "
    )
    world.answers["nowhere.test"] = [[]]
    assert b"it has no address" in world.ask(b"CONNECT nowhere.test:443 HTTP/1.1\r\n\r\n")
    assert [bool(record.refused) for record in world.records()] == [True, True]


def test_a_client_that_says_nothing_or_too_much_is_sent_away(world: World) -> None:
    world.start(limits=GatewayLimits(head=0.2))
    assert world.ask(b"CONNECT inner") == b""
    assert world.ask(b"GET http://inner.test/ HTTP/1.1\r\nX: " + b"x" * 70_000) == b""
    assert world.ask(b"nonsense\r\n\r\n").startswith(b"HTTP/1.1 400 ")
    assert [record.host for record in world.records()] == [""]


def test_bytes_of_all_connections_together_have_an_end(world: World) -> None:
    world.start(limits=GatewayLimits(bytes=100_000))
    for _ in range(2):
        with world.tunnel() as client, world.accept() as server:
            with contextlib.suppress(OSError):
                server.sendall(b"x" * 60_000)
                server.shutdown(socket.SHUT_WR)
            client.shutdown(socket.SHUT_WR)
            read_all(client)
    whole, cut = sorted(world.records(), key=lambda record: bool(record.cut))  # which ends first is chance
    assert (whole.received, whole.cut) == (60_000, "")
    assert cut.cut == "the command's limit of bytes is used up"
    assert whole.received + cut.received <= 100_000


def test_the_number_of_connections_has_an_end(world: World) -> None:
    world.start(limits=GatewayLimits(connections=3))
    for _ in range(3):
        assert world.ask(b"CONNECT localhost:1 HTTP/1.1\r\n\r\n").startswith(b"HTTP/1.1 403")
    for _ in range(3):
        with contextlib.suppress(ConnectionError):
            assert world.ask(b"CONNECT localhost:1 HTTP/1.1\r\n\r\n") == b""
    records = world.records()
    assert len(records) == 4
    assert any("3 connections already" in record.refused for record in records)


def test_more_than_may_be_open_at_once_wait(world: World) -> None:
    world.start(limits=GatewayLimits(at_once=1))
    with world.tunnel() as first, world.accept() as served, world.client() as second:
        second.sendall(f"CONNECT inner.test:{world.server_port} HTTP/1.1\r\n\r\n".encode())
        second.settimeout(0.3)
        with pytest.raises(TimeoutError):
            second.recv(1)
        first.close()
        served.close()
        second.settimeout(SOON)
        assert second.recv(100).startswith(b"HTTP/1.1 200 ")


def test_a_connection_without_a_byte_is_cut_off(world: World) -> None:
    world.start(limits=GatewayLimits(idle=0.2))
    with world.tunnel() as client, world.accept():
        assert read_all(client) == b""
    (record,) = world.records()
    assert record.cut == "nothing came for 0.2 s"


def test_a_server_that_takes_nothing_while_it_sends_is_read_all_the_same(world: World) -> None:
    """Both sides send megabytes before they read: with one thread for both directions nothing would move."""
    world.start()
    size = 8_000_000
    with world.tunnel() as client, world.accept() as server:
        sending = [threading.Thread(target=end.sendall, args=(bytes(size),)) for end in (client, server)]
        for thread in sending:
            thread.start()
        reading: Callable[[socket.socket], int] = lambda end: take(end, size)  # noqa: E731 - said once
        # The server reads nothing until all that it sends has been read.
        assert reading(client) == size
        assert reading(server) == size
        for thread in sending:
            thread.join(SOON)


def test_open_connections_end_with_the_command_and_are_told(world: World) -> None:
    world.start()
    with world.tunnel() as client, world.accept() as server:
        client.sendall(b"half")
        assert server.recv(4) == b"half"
        (record,) = world.records()
        assert record.sent == 4
        assert read_all(server) == b""


def test_who_is_looked_up_beyond_the_end_writes_to_no_file_that_is_another_one_by_then(world: World) -> None:
    asked, answered = threading.Event(), threading.Event()

    def look_up(_host: str, _port: int) -> Answers:
        asked.set()
        answered.wait(SOON)
        raise OSError("no such name")

    before = set(threading.enumerate())
    world.start(look_up=look_up)
    with world.client() as client:
        client.sendall(b"CONNECT slow.test:443 HTTP/1.1\r\n\r\n")
        assert asked.wait(SOON)
        assert world.thread is not None
        (looking,) = set(threading.enumerate()) - before - {world.thread}
        world.ours.shutdown(socket.SHUT_RDWR)
        world.thread.join(SOON)
        # What a platform does in whose process it is: the number of the file is free, and soon another one's.
        with tempfile.TemporaryFile() as other:
            os.dup2(other.fileno(), world.file.fileno())
            answered.set()
            looking.join(SOON)
            assert not looking.is_alive()
            assert os.fstat(other.fileno()).st_size == 0


def take(end: socket.socket, size: int) -> int:
    got = 0
    while got < size:
        got += len(end.recv(min(65536, size - got)))
    return got
