"""Servers beside a run's commands, in containers of their own on a network that is the run's alone.

They start with the first command that names them and stay until nobody of the run uses them and it ends or waits.
"""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Collection
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import anyio
import docker
from docker.errors import ImageNotFound, NotFound
from docker.types import LogConfig

from ci_platform.errors import ImageNotFoundError, ServiceNotReadyError, UnavailableError
from ci_platform.named_locks import NamedLocks
from ci_platform.sandboxes import SandboxJob, cgroups
from ci_platform.sandboxes.container.engine import PLATFORM, RUN, SERVICE, Engine, remove
from ci_platform.sandboxes.container.leftovers import remove_left
from ci_platform.sandboxes.container.networks import NOWHERE, make_network, remove_network
from ci_platform.sandboxes.container.readiness import Ended, is_ready
from pipelines.contract import Service

_LOOK_EVERY = 0.1
"""Seconds between two looks at a service that is not ready yet."""

_LAST_LINES = 20
_SHOWN_LINES = 200
"""Of what a service has printed, in the log of each command that uses it."""

_CAPABILITIES = ("CHOWN", "DAC_OVERRIDE", "FOWNER", "KILL", "NET_BIND_SERVICE", "SETGID", "SETUID")
"""What entrypoints of servers need to hand their files to a user of their own, and to become that user."""


@dataclass
class _Running:
    service: Service
    container: str
    last: str = ""
    """When the last line was printed that is in a log, as the engine writes times."""


@dataclass
class _Scope:
    """What runs for one run."""

    network: str
    running: dict[str, _Running] = field(default_factory=dict)
    users: int = 0


class Services:
    """The services of all runs, on one engine.

    *Order of calls*: `beside` around each command; `release` when a run ends or waits. *Concurrency*: any.
    *Idempotency*: an equal service of a run is the one that runs. *Cancellation*: what was being started is
    removed. *Errors*: ServiceNotReadyError, ImageNotFoundError, UnavailableError.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._scopes: dict[str, _Scope] = {}
        self._locks = NamedLocks()
        self._inherited: set[str] = set()

    def inherit(self, scope: str) -> None:
        """Take over what an earlier process has started for a run: it is removed with the rest."""
        self._inherited.add(scope)

    @asynccontextmanager
    async def beside(self, job: SandboxJob) -> AsyncIterator[str | None]:
        """Have the job's services ready while the block runs; gives the network to be on, None without services."""
        if not job.services:
            yield None
            return
        async with self._locks(job.scope):
            scope = await self._scope(job.scope)
            scope.users += 1
        try:
            async with self._locks(job.scope):
                for service in job.services:
                    await self._ensure(scope, service, job)
            yield scope.network
        finally:
            scope.users -= 1
            with contextlib.suppress(UnavailableError):
                for service in job.services:
                    await self._report(scope, service, job)

    async def release(self, name: str) -> None:
        """End the services of a run, unless a command of it uses one."""
        async with self._locks(name):
            scope = self._scopes.get(name)
            if name in self._inherited and not (scope and scope.users):
                self._inherited.discard(name)
                await self._engine.shielded(lambda client: remove_left(client, name))
            if scope is None or scope.users:
                return
            del self._scopes[name]
            for running in scope.running.values():
                await self._engine.shielded(lambda client, it=running: remove(client, it.container))  # type: ignore[misc]
            await self._engine.shielded(lambda client: remove_network(client, scope.network))

    async def close(self, *, but: Collection[str] = ()) -> None:
        """End all that nobody uses, `but` what belongs to these runs."""
        for name in set(self._scopes) - set(but):
            await self.release(name)

    async def _scope(self, name: str) -> _Scope:
        scope = self._scopes.get(name)
        if scope is None:
            network = await self._engine.shielded(lambda client: make_network(client, name))
            scope = self._scopes[name] = _Scope(network)
        return scope

    async def _ensure(self, scope: _Scope, service: Service, job: SandboxJob) -> None:
        running = scope.running.get(service.host)
        if running is not None and running.service == service and await self._is_up(running):
            return
        if running is not None:
            job.say(f"service {service.host}: starting anew")
            await self._forget(scope, running)
        running = await self._start(scope, service, job)
        try:
            await self._wait(running, job)
        except BaseException:
            await self._forget(scope, running)
            raise

    async def _start(self, scope: _Scope, service: Service, job: SandboxJob) -> _Running:
        try:
            container = await self._engine.shielded(
                lambda client: _create(client, service, scope.network, job)
            )
        except ImageNotFound:
            raise ImageNotFoundError(
                f"the image {service.image!r} of service {service.host} is gone"
            ) from None
        running = scope.running[service.host] = _Running(service, container)
        await self._engine.shielded(lambda client: client.api.start(container))
        return running

    async def _wait(self, running: _Running, job: SandboxJob) -> None:
        service, began = running.service, anyio.current_time()
        with anyio.move_on_after(service.timeout.total_seconds()):
            try:
                while not await self._engine.call(  # noqa: ASYNC110 - what goes on in a container tells nobody
                    lambda client: is_ready(client, running.container, service), abandon=True
                ):
                    await anyio.sleep(_LOOK_EVERY)
            except Ended as ended:
                raise await self._unready(running, str(ended)) from None
            job.say(f"service {service.host} is ready after {anyio.current_time() - began:.1f} s")
            return
        raise await self._unready(running, f"is not ready after {service.timeout.total_seconds():g} s")

    async def _unready(self, running: _Running, why: str) -> ServiceNotReadyError:
        lines = await self._lines(running)
        last = "\n".join(lines[-_LAST_LINES:]) or "(it printed nothing)"
        return ServiceNotReadyError(f"service {running.service.host} {why}; it printed last:\n{last}")

    async def _is_up(self, running: _Running) -> bool:
        try:
            return bool(
                (await self._engine.call(lambda client: client.api.inspect_container(running.container)))[
                    "State"
                ]["Running"]
            )
        except NotFound:
            return False

    async def _forget(self, scope: _Scope, running: _Running) -> None:
        await self._engine.shielded(lambda client: remove(client, running.container))
        scope.running.pop(running.service.host, None)

    async def _report(self, scope: _Scope, service: Service, job: SandboxJob) -> None:
        """Put what the service has printed since the last time into the job's log."""
        running = scope.running.get(service.host)
        if running is None:
            return
        lines = await self._lines(running)
        if len(lines) > _SHOWN_LINES:
            job.say(f"{service.host} | … {len(lines) - _SHOWN_LINES} lines")
        for line in lines[-_SHOWN_LINES:]:
            job.say(f"{service.host} | {line}")

    async def _lines(self, running: _Running) -> list[str]:
        try:
            text = await self._engine.shielded(
                lambda client: client.api.logs(running.container, timestamps=True)
            )
        except NotFound:
            return []
        pairs = [line.partition(" ") for line in text.decode("utf-8", "replace").splitlines()]
        fresh = [(at, line) for at, _, line in pairs if at > running.last]
        running.last = max([running.last, *(at for at, _ in fresh)])
        return [line for _, line in fresh]


def _create(client: docker.DockerClient, service: Service, network: str, job: SandboxJob) -> str:
    limits = job.limits
    host = client.api.create_host_config(
        cap_drop=["ALL"],
        cap_add=list(_CAPABILITIES),
        dns=[NOWHERE],
        init=True,
        ipc_mode="private",
        # Kept by the engine, to be asked for; a megabyte is what a log of ours would show of it.
        log_config=LogConfig(type=LogConfig.types.JSON, config={"max-size": "1m", "max-file": "1"}),
        mem_limit=limits.memory,
        memswap_limit=limits.memory,
        nano_cpus=None if limits.cpus is None else int(limits.cpus * 1e9),
        network_mode=network,
        pids_limit=limits.processes + 1,
        security_opt=["no-new-privileges"],
    )
    made: dict[str, str] = client.api.create_container(
        service.image,
        command=list(service.command) or None,
        environment=dict(service.env),
        host_config=host,
        hostname=service.host,
        labels={RUN: job.scope, SERVICE: service.host, PLATFORM: cgroups.platform_name()},
        networking_config=client.api.create_networking_config(
            {network: client.api.create_endpoint_config(aliases=[service.host])}  # type: ignore[arg-type]  # by name
        ),
    )
    return made["Id"]
