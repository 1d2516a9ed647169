"""The way out of a sandbox: one gateway per command, the only thing that its network leads to. Stdlib only.

`policy` says which hosts and which addresses, `requests` reads what a client asks for, `tunnels` passes bytes on,
`gateway` is the process that does it.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import Any

ADDRESS, PORT = "127.0.0.1", 3128
"""Where a command finds its gateway: on the loopback of its own network namespace. 3128 is what proxies use."""


@dataclass(frozen=True, slots=True)
class Connection:
    """One connection that a command asked for. Nothing of its content: no path, no query, no header.

    `refused` says why there was none, and is empty where there was one; `cut` why it was ended early. `address` is what
    was connected to. `sent` and `received` are bytes, `seconds` how long it took.
    """

    host: str
    port: int
    refused: str = ""
    cut: str = ""
    address: str = ""
    sent: int = 0
    received: int = 0
    seconds: float = 0.0

    def as_line(self) -> bytes:
        """Return it as one line of JSON."""
        return json.dumps(asdict(self)).encode() + b"\n"

    @classmethod
    def from_line(cls, line: bytes) -> Connection:
        """Return what `as_line` wrote. Raises ValueError and TypeError for anything else."""
        found: dict[str, Any] = json.loads(line)
        return cls(**found)

    def __str__(self) -> str:
        what = f"network: {self.host}:{self.port}"
        if self.refused:
            return f"{what} refused: {self.refused}"
        end = f", cut off: {self.cut}" if self.cut else ""
        return f"{what} sent {self.sent:,} bytes, received {self.received:,}, {self.seconds:.3g} s{end}"


@dataclass(frozen=True, slots=True)
class GatewayLimits:
    """What one command may use of the network."""

    at_once: int = 64
    """Connections that are open; more of them wait. Package managers use up to 50."""
    connections: int = 10_000
    bytes: int = 64 * 1024**3
    """In both directions of all connections together."""
    idle: float = 300.0
    """Seconds without a byte in either direction."""
    connect: float = 15.0
    """Seconds for each of the addresses that a name has."""
    head: float = 30.0
    """Seconds for a client to say what it wants."""


def proxy_variables() -> dict[str, str]:
    """Return the environment by which programs find the gateway.

    curl, git, cargo, apt and wget read the small letters, Python, Go and npm either, node's own `fetch` if told to.
    """
    url = f"http://{ADDRESS}:{PORT}"
    names = ("http_proxy", "https_proxy", "all_proxy")
    own = "localhost,127.0.0.1,::1"
    variables = dict.fromkeys((*names, *map(str.upper, names)), url)
    return variables | {"no_proxy": own, "NO_PROXY": own, "NODE_USE_ENV_PROXY": "1"}
