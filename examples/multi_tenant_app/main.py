"""Run the platform and play its customers: an honest one with orders, and one who attacks the others.

scripts/example multi_tenant_app                       # the play
scripts/example multi_tenant_app --serve 8421          # the platform alone, for your own requests
"""

import argparse
import asyncio
import socket
import tempfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import uvicorn
from app import make_app

TENANTS = Path(__file__).parent / "tenants"
KEYS = {"key-of-acme": "acme", "key-of-mallory": "mallory"}
ATTACKS = (
    "read_a_file",
    "list_the_code_of_others",
    "call_home",
    "run_a_program",
    "take_all_memory",
    "never_come_back",
    "look_at_acmes_order",
    "end_acmes_order",
    "pass_for_acme",
)


def make_server(data: Path, port: int = 0) -> tuple[uvicorn.Server, socket.socket, str]:
    """Return a server of the platform, the socket that it is to serve, and its address."""
    listener = socket.create_server(("127.0.0.1", port))
    config = uvicorn.Config(make_app(data, KEYS), log_level="warning", lifespan="on")
    return uvicorn.Server(config), listener, f"http://127.0.0.1:{listener.getsockname()[1]}"


@asynccontextmanager
async def platform(data: Path) -> AsyncIterator[str]:
    """Serve the platform on a free port; yields its address."""
    server, listener, address = make_server(data)
    serving = asyncio.create_task(server.serve([listener]))  # what comes before it accepts, queues
    try:
        yield address
    finally:
        server.should_exit = True
        await serving


class Customer:
    """Somebody with an API key."""

    def __init__(self, address: str, name: str) -> None:
        headers = {"authorization": f"Bearer key-of-{name}"}
        self._http = httpx.AsyncClient(base_url=address, headers=headers, timeout=30, trust_env=False)

    async def deploy(self, file: str) -> str:
        """Upload a module; return its version."""
        answer = await self._http.put("/code", content=(TENANTS / file).read_bytes())
        return str(answer.raise_for_status().json()["version"])

    async def call(self, **data: Any) -> Any:
        """Call the module's `fetch`."""
        return (await self._http.post("/call", json=data)).json()

    async def pay(self, order: str) -> None:
        """Send the event that an order waits for."""
        (await self._http.post(f"/instances/{order}/events/paid", json={"with": "gold"})).raise_for_status()

    async def order(self, order: str, *statuses: str) -> Any:
        """Return an order once it has one of these statuses."""
        while True:
            found = (await self._http.get(f"/instances/{order}")).raise_for_status().json()
            if found["status"] in statuses:
                return found
            await asyncio.sleep(0.02)


async def first_day(data: Path) -> None:
    """Acme sells; nobody has paid when the platform goes down."""
    async with platform(data) as address:
        acme = Customer(address, "acme")
        say("acme uploads its workflow", await acme.deploy("acme.py"))
        say("acme takes an order", await acme.call(id="order-1", item="anvil"))
        say("order-1", await acme.order("order-1", "waiting"))
    print("\nThe platform is stopped, and started again. order-1 was a few rows meanwhile.\n")


async def second_day(data: Path) -> None:
    """Acme ships by other means; each order ends with the code that it began with."""
    async with platform(data) as address:
        acme = Customer(address, "acme")
        say("acme uploads a second version", await acme.deploy("acme_2.py"))
        say("acme takes another order", await acme.call(id="order-2", item="rocket"))
        for order in ("order-1", "order-2"):
            await acme.pay(order)
            say(f"{order} is paid", (await acme.order(order, "complete", "errored"))["output"])
        await attack(Customer(address, "mallory"))
        say("\nacme's order-1 is still", (await acme.order("order-1", "complete"))["status"])


async def attack(mallory: Customer) -> None:
    """Try what a hostile tenant would."""
    say("\nmallory uploads hostile code", await mallory.deploy("mallory.py"))
    for name in ATTACKS:
        answer = await mallory.call(**{"try": name})
        error = answer.get("error")
        got = f"{error['code']}: {error['message']}" if error else answer["got"]
        say(f"  {name.replace('_', ' ')}", got)


def say(what: str, answer: Any) -> None:
    """Print one line."""
    print(f"{what}: {answer}", flush=True)


async def play(data: Path) -> None:
    """Play both days."""
    await first_day(data)
    await second_day(data)


def main() -> None:
    """Serve, or play."""
    parser = argparse.ArgumentParser(description="A platform whose customers bring workflows.")
    parser.add_argument("--serve", type=int, metavar="PORT", help="serve until stopped (0: any port)")
    parser.add_argument("--data", type=Path, help="where code and instances are kept (default: nowhere)")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        data = given.data or Path(temporary)
        if given.serve is None:
            asyncio.run(play(data))
        else:
            server, listener, address = make_server(data, given.serve)
            print(f"{address}; the API keys are {' and '.join(KEYS)}", flush=True)
            server.run([listener])


if __name__ == "__main__":
    main()
