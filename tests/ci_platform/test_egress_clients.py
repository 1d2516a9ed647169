"""Commands in the isolate sandbox and their way out: real clients, over TLS, to a server of this test; and attacks."""

from __future__ import annotations

import gzip
import hashlib
import http.server
import io
import json
import os
import shutil
import socket
import ssl
import subprocess
import tarfile
import threading
import zipfile
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from pathlib import Path

import anyio
import psutil
import pytest

from ci_platform.egress import Connection
from ci_platform.errors import FailedError
from ci_platform.sandboxes import SANDBOX_UID, SandboxJob, SandboxOutcome, Tree
from ci_platform.sandboxes.isolate import IsolateSandbox

HOST = "127.0.0.2"
"""Of loopback, so that nothing is needed but this machine; not 127.0.0.1, which programs reach without a proxy."""

RUSTUP = sorted(Path.home().glob(".rustup/toolchains/*/bin/cargo"))
NAP = str(300_000 + os.getpid())


class Site:
    """Files served over TLS: a git repository, and one package each for pip, npm and cargo."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.certificate = root.parent / "ca.pem"
        self.port = 0
        self.plain_port = 0

    @property
    def url(self) -> str:
        return f"https://{HOST}:{self.port}"

    @property
    def rules(self) -> tuple[str, ...]:
        return (f"{HOST}:{self.port}", f"{HOST}:{self.plain_port}")

    def write(self, path: str, data: bytes | str) -> None:
        file = self.root / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(data.encode() if isinstance(data, str) else data)


class Handler(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_: object) -> None:
        pass


@contextmanager
def serving(root: Path, context: ssl.SSLContext | None) -> Iterator[int]:
    def handler(*args: object) -> Handler:
        return Handler(*args, directory=str(root))  # type: ignore[arg-type]

    server = http.server.ThreadingHTTPServer((HOST, 0), handler)
    if context is not None:
        server.socket = context.wrap_socket(server.socket, server_side=True, do_handshake_on_connect=False)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield int(server.server_address[1])
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    home = tmp_path_factory.mktemp("site")
    made = Site(home / "files")
    key = home / "key.pem"
    names = [
        "-subj",
        "/CN=test",
        "-addext",
        f"subjectAltName=IP:{HOST}",
        "-addext",
        "basicConstraints=critical,CA:TRUE",
    ]
    options = ["-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-keyout", str(key), *names]
    subprocess.run(["openssl", "req", *options, "-out", made.certificate], check=True, capture_output=True)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(made.certificate, key)
    made.root.mkdir()
    made.write("file.txt", "from outside\n")
    with serving(made.root, context) as made.port, serving(made.root, None) as made.plain_port:
        yield made


class Commands:
    """Runs commands with a network, and keeps what they print and whom they connect to."""

    def __init__(self, home: Path, site: Site) -> None:
        toolchains = [path.parents[1] for path in RUSTUP[:1]]
        self.sandbox = IsolateSandbox(allow_network=True, inner_hosts=site.rules, toolchains=toolchains)
        self.home, self.site, self.text = home, site, ""
        self.connections: list[Connection] = []
        self.count = 0

    def tree(self) -> Tree:
        self.count += 1
        folders = [self.home / f"{name}{self.count}" for name in ("upper", "work", "lower")]
        for folder in folders:
            folder.mkdir()
        shutil.copy(self.site.certificate, folders[2] / "ca.pem")
        for path in (*folders, folders[2] / "ca.pem"):
            if os.geteuid() == 0:
                os.chown(path, SANDBOX_UID, SANDBOX_UID)
        return Tree(folders[0], folders[1], (folders[2],))

    async def run(
        self,
        *argv: str,
        network: bool | tuple[str, ...] = True,
        **env: str,
    ) -> SandboxOutcome:
        pieces: list[bytes] = []
        self.connections = []
        tell = self.connections.append
        job = SandboxJob("out", argv, self.tree(), env, network=network, connected=tell)
        try:
            return await self.sandbox.run(job, pieces.append)
        finally:
            self.text = b"".join(pieces).decode(errors="replace")

    async def succeeds(self, script: str, **env: str) -> None:
        """Run a shell script that must succeed, its connections to the site alone."""
        done = await self.run("sh", "-ec", script, network=self.site.rules, **env)
        assert done.exit_code == 0, self.text
        assert self.connections
        for each in self.connections:
            assert (each.host, each.refused, each.cut) == (HOST, "", "")


@pytest.fixture
async def commands(tmp_path: Path, site: Site) -> AsyncIterator[Commands]:
    made = Commands(tmp_path, site)
    yield made
    await made.sandbox.close()


def needs(program: str) -> pytest.MarkDecorator:
    found = shutil.which(program)
    inside = found is not None and found.startswith(("/usr/", "/bin/"))
    return pytest.mark.skipif(not inside, reason=f"no {program} in /usr on this machine")


# --- clients ---


@needs("curl")
async def test_curl_fetches_over_tls_and_is_on_the_record(commands: Commands, site: Site) -> None:
    await commands.succeeds(f"curl -fsS --cacert ca.pem {site.url}/file.txt?token=secret")
    assert commands.text == "from outside\n"
    (record,) = commands.connections
    assert (record.port, record.address) == (site.port, HOST)
    assert record.received > len("from outside\n")
    assert record.sent > 0
    assert "secret" not in str(record)


@needs("curl")
async def test_curl_fetches_without_tls(commands: Commands, site: Site) -> None:
    await commands.succeeds(f"curl -fsS http://{HOST}:{site.plain_port}/file.txt")
    assert commands.text == "from outside\n"


@needs("wget")
async def test_wget_fetches(commands: Commands, site: Site) -> None:
    await commands.succeeds(f"wget -q -O - --ca-certificate ca.pem {site.url}/file.txt")
    assert commands.text == "from outside\n"


async def test_python_fetches(commands: Commands, site: Site) -> None:
    program = "import ssl, sys, urllib.request as u; c = ssl.create_default_context(cafile='ca.pem');"
    program += "print(u.urlopen(sys.argv[1], context=c).read())"
    await commands.succeeds(f'python3 -c "{program}" {site.url}/file.txt')
    assert "from outside" in commands.text


async def test_pip_installs(commands: Commands, site: Site) -> None:
    wheel = io.BytesIO()
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("demo.py", "print('hello from a wheel')\n")
        archive.writestr("demo-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: demo\nVersion: 1.0\n")
        tag = "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        archive.writestr("demo-1.0.dist-info/WHEEL", tag)
        archive.writestr("demo-1.0.dist-info/RECORD", "demo.py,,\n")
    name = "demo-1.0-py3-none-any.whl"
    site.write(f"simple/demo/{name}", wheel.getvalue())
    site.write("simple/demo/index.html", f'<!DOCTYPE html><a href="{name}">{name}</a>')
    pip = "python3 -m pip install --disable-pip-version-check --target out --cert ca.pem"
    await commands.succeeds(f"{pip} --index-url {site.url}/simple demo; PYTHONPATH=out python3 -m demo")
    assert "hello from a wheel" in commands.text


@needs("git")
async def test_git_clones(commands: Commands, site: Site, tmp_path: Path) -> None:
    work, bare = tmp_path / "work", site.root / "demo.git"
    identity = ["-c", "user.name=t", "-c", "user.email=t@example.org"]
    for arguments in (
        ["init", "-q", str(work)],
        ["-C", str(work), *identity, "commit", "-qm", "One", "--allow-empty"],
    ):
        subprocess.run(["git", *arguments], check=True)  # noqa: ASYNC221 - nothing else goes on
    subprocess.run(["git", "clone", "-q", "--bare", str(work), str(bare)], check=True)  # noqa: ASYNC221
    subprocess.run(["git", "-C", str(bare), "update-server-info"], check=True)  # noqa: ASYNC221
    script = f"git -c http.sslCAInfo=/workspace/ca.pem clone -q {site.url}/demo.git demo; git -C demo log --format=%s"
    await commands.succeeds(script)
    assert commands.text == "One\n"


@needs("npm")
async def test_npm_installs(commands: Commands, site: Site) -> None:
    package = {"name": "demo", "version": "1.0.0"}
    tarball = tar({"package/package.json": json.dumps(package), "package/index.js": "console.log('npm')\n"})
    site.write("npm/demo-1.0.0.tgz", tarball)
    dist = {"tarball": f"{site.url}/npm/demo-1.0.0.tgz", "shasum": hashlib.sha1(tarball).hexdigest()}
    about = {
        "name": "demo",
        "dist-tags": {"latest": "1.0.0"},
        "versions": {"1.0.0": package | {"dist": dist}},
    }
    site.write("npm/demo", json.dumps(about))
    # Not --cafile: where a host is a number, npm compares the certificate with another name.
    install = f"npm install --no-audit --no-fund --strict-ssl=false --registry {site.url}/npm/ demo@1.0.0"
    await commands.succeeds(f"{install}; node -e \"require('demo')\"")
    assert commands.text.endswith("npm\n")


@pytest.mark.skipif(not RUSTUP, reason="no cargo on this machine")
async def test_cargo_fetches(commands: Commands, site: Site) -> None:
    manifest = '[package]\nname = "demo"\nversion = "1.0.0"\nedition = "2021"\n'
    crate = tar({"demo-1.0.0/Cargo.toml": manifest, "demo-1.0.0/src/lib.rs": ""})
    about = {
        "name": "demo",
        "vers": "1.0.0",
        "deps": [],
        "cksum": hashlib.sha256(crate).hexdigest(),
        "features": {},
    }
    site.write("cargo/config.json", json.dumps({"dl": f"{site.url}/crates/{{crate}}-{{version}}.crate"}))
    site.write("cargo/de/mo/demo", json.dumps(about | {"yanked": False}) + "\n")
    site.write("crates/demo-1.0.0.crate", crate)
    script = f"""
        mkdir -p src .cargo; touch src/lib.rs
        printf '[package]\\nname="mine"\\nversion="1.0.0"\\n[dependencies]\\ndemo="1"\\n' >Cargo.toml
        printf '[source.crates-io]\\nreplace-with="site"\\n[source.site]\\nregistry="sparse+{site.url}/cargo/"\\n' \
            >.cargo/config.toml
        cargo fetch --quiet; ls "$HOME"/.cargo/registry/cache/*
    """
    await commands.succeeds(script, CARGO_HTTP_CAINFO="/workspace/ca.pem")
    assert "demo-1.0.0.crate" in commands.text


@pytest.mark.skipif(not Path("/usr/lib/apt/apt-helper").exists(), reason="no apt on this machine")
async def test_apt_downloads(commands: Commands, site: Site) -> None:
    helper = "/usr/lib/apt/apt-helper -o APT::Sandbox::User=''"
    await commands.succeeds(
        f"{helper} download-file http://{HOST}:{site.plain_port}/file.txt got >&2; cat got"
    )
    assert commands.text.endswith("from outside\n")


# --- what is refused ---


def fetch(url: str) -> tuple[str, ...]:
    program = """
import sys, urllib.request
try:
    print(urllib.request.urlopen(sys.argv[1], timeout=20).read())
except OSError as error:
    sys.exit(f"failed: {error}")
"""
    return ("python3", "-c", program, url)


async def test_a_host_that_is_not_listed_is_refused_and_named(commands: Commands, site: Site) -> None:
    done = await commands.run(*fetch(f"http://{HOST}:{site.plain_port}/file.txt"), network=("example.org",))
    assert done.exit_code == 1
    assert "403" in commands.text
    (record,) = commands.connections
    assert record.refused == "it is not on the command's list of hosts"


@pytest.mark.parametrize(
    "host", ["localhost.", "127.0.0.3", "2130706433", "[::ffff:127.0.0.1]", "169.254.169.254"]
)
async def test_an_open_network_leads_neither_to_loopback_nor_to_metadata(
    commands: Commands, host: str
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as service:
        service.settimeout(0)
        port = service.getsockname()[1] if host != "169.254.169.254" else 80
        assert (await commands.run(*fetch(f"http://{host}:{port}/"), no_proxy="", NO_PROXY="")).exit_code == 1
        with pytest.raises(BlockingIOError):
            service.accept()
    assert [bool(record.refused) for record in commands.connections] == [True]


async def test_beside_the_gateway_there_is_no_network(commands: Commands, site: Site) -> None:
    program = f"""
import socket
print(socket.if_nameindex())
for address in [("{HOST}", {site.port}), ("127.0.0.1", {site.port}), ("192.0.2.1", 80), ("1.1.1.1", 53)]:
    for kind in (socket.SOCK_STREAM, socket.SOCK_DGRAM):
        with socket.socket(socket.AF_INET, kind) as s:
            s.settimeout(5)
            try:
                s.connect(address)
                if kind == socket.SOCK_STREAM or not address[0].startswith("127."):
                    print("reached", address, kind)
            except OSError:
                pass
try:
    print("resolved", socket.getaddrinfo("example.org", 80))
except OSError:
    pass
"""
    done = await commands.run("python3", "-c", program)
    assert (done.exit_code, commands.text) == (0, "[(1, 'lo')]\n")
    assert commands.connections == []


async def test_a_command_without_a_network_finds_no_gateway(commands: Commands) -> None:
    program = "import os, socket; print([k for k in os.environ if 'proxy' in k.lower()]);"
    program += "socket.create_connection(('127.0.0.1', 3128), 5)"
    done = await commands.run("python3", "-c", program, network=False)
    assert done.exit_code == 1
    assert "[]\n" in commands.text
    assert "refused" in commands.text


async def test_a_command_may_not_have_what_the_platform_does_not_allow(tmp_path: Path, site: Site) -> None:
    commands = Commands(tmp_path, site)
    await commands.sandbox.close()
    commands.sandbox = IsolateSandbox()
    for network in (True, ("example.org",)):
        with pytest.raises(FailedError, match="network"):
            await commands.run("true", network=network)
    commands.sandbox = IsolateSandbox(allow_network=True)
    with pytest.raises(FailedError, match="top-level"):
        await commands.run("true", network=("*.org",))


async def test_the_gateway_is_nobody_and_ends_with_its_command(commands: Commands, site: Site) -> None:
    """It is killed with everything else, also where the command and a connection of it hang."""
    script = f"curl -sS --limit-rate 1 http://{HOST}:{site.plain_port}/file.txt & echo up; sleep {NAP}"
    with pytest.raises(TimeoutError), anyio.fail_after(3):
        await commands.run("sh", "-c", script)
    assert commands.text.startswith("up")
    with anyio.fail_after(20):
        while gateways():  # noqa: ASYNC110 - what other processes do tells nobody
            await anyio.sleep(0.01)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root sees what hides from its own user")
async def test_the_gateway_has_no_privileges(commands: Commands) -> None:
    seen: list[list[int]] = []

    def status() -> str:
        found = gateways()
        return Path(f"/proc/{found[0]}/status").read_text() if found else ""

    async def look() -> None:
        with anyio.fail_after(20):
            while "Seccomp:\t2" not in (told := status()):  # noqa: ASYNC110 - a process tells nobody
                await anyio.sleep(0.01)
        assert "NoNewPrivs:\t1" in told
        seen.append([int(told.split("Uid:\t")[1].split()[0]), int(told.split("CapEff:\t")[1].split()[0], 16)])

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(look)
        await commands.run("sleep", "2")
    assert seen == [[SANDBOX_UID if os.geteuid() == 0 else os.geteuid(), 0]]


async def test_a_flood_of_connections_is_bounded_and_told(commands: Commands) -> None:
    program = """
import socket
for number in range(300):
    with socket.create_connection(("127.0.0.1", 3128), 20) as s:
        s.sendall(b"CONNECT 10.0.0.1:%d HTTP/1.1\\r\\n\\r\\n" % (number + 1))
        assert b" 403 " in s.recv(100)
"""
    done = await commands.run("python3", "-c", program)
    assert done.exit_code == 0, commands.text
    assert sorted(record.port for record in commands.connections) == list(range(1, 301))
    assert {record.refused for record in commands.connections} >= {"10.0.0.1 is a private address"}


def gateways() -> list[int]:
    """Return the gateways of this process's launchers: leaders of a session that hold no namespace of their own."""
    own = Path("/proc/self/ns/net").readlink()
    found = []
    for process in psutil.Process().children(recursive=True):
        try:
            is_fork = "sandboxes.launcher" in " ".join(process.cmdline())
            if is_fork and os.getsid(process.pid) == process.pid and network_of(process.pid) == own:
                found.append(process.pid)
        except (psutil.Error, OSError):
            continue
    return found


def network_of(pid: int) -> Path:
    return Path(f"/proc/{pid}/ns/net").readlink()


def tar(files: dict[str, str]) -> bytes:
    data = io.BytesIO()
    with tarfile.open(fileobj=data, mode="w") as archive:
        for name, text in files.items():
            info = tarfile.TarInfo(name)
            info.size, info.mode = len(text), 0o644
            archive.addfile(info, io.BytesIO(text.encode()))
    return gzip.compress(data.getvalue())
