"""ProcessLoader: workers by id, each call of one in a confined process of its own."""

from __future__ import annotations

import asyncio
import hashlib
import inspect
import json
import logging
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Self
from uuid import uuid4

from dynflow.errors import InvalidArgumentError, IsolateError, UnserializableError
from dynflow.failure import RemoteError
from dynflow.isolates import (
    Caller,
    CallLimits,
    CodeSource,
    EntrypointStub,
    WorkerCode,
    WorkerLoader,
    WorkerStub,
)
from dynflow.isolates.bindings import HostBinding, Wrap, make_bindings
from dynflow.isolates.cgroup import machine_memory
from dynflow.isolates.confinement import ESSENTIAL, WALLS
from dynflow.isolates.places import Places
from dynflow.isolates.pool import IsolatePool
from dynflow.isolates.process import Isolate, OnOutput
from dynflow.isolates.session import Session, error_of, load_error_of
from dynflow.isolates.tails import Tails, last_words
from dynflow.isolates.warm import IsolateKeeper
from dynflow.isolates.zygotes import IsolateProcess, describe_walls
from dynflow.loop import WorkflowLoop, outside
from dynflow.serialization import pack
from dynflow.workflow import WorkflowStep

_output = logging.getLogger("dynflow.output")
_CLAIM_WITHIN = 5.0


class ProcessLoader(WorkerLoader):
    """Runs every call of a worker in an isolate: a forked, confined process.

    `ready` isolates are kept forked in advance. `workers` are remembered, least recently used ones forgotten. `warm`
    isolates that have finished are kept for the next call of the same code, for a while (see warm.py). `per_tenant`
    calls of one tenant (see `WorkerCode`) have an isolate at the same time, see places.py; runs of workflows are not
    among them, for engines bound those.
    `on_output` gets what tenants print, with who printed it (None: the logger `dynflow.output`). `preload` names
    packages that tenants may import besides the standard library; they are imported before the forks, so they must
    start no thread then, and draw nothing from OpenSSL's generator, which would go on alike in each. `total_memory`
    is what all isolates together may use, in bytes, where the wall `cgroup` stands (None: three quarters of the
    machine's). `walls` are those of `dynflow.isolates.confinement`. Without the essential ones `allow_unconfined` must
    be true; then those that cannot be put up on this machine are left out.
    """

    def __init__(  # noqa: PLR0913 - settings, each with its default
        self,
        *,
        ready: int = 2,
        workers: int = 1_000,
        warm: int = 16,
        per_tenant: int = 64,
        on_output: OnOutput | None = None,
        preload: Collection[str] = ("pipelines",),
        total_memory: int | None = None,
        walls: Collection[str] = tuple(WALLS),
        allow_unconfined: bool = False,
    ) -> None:
        missing = ESSENTIAL - set(walls)
        if missing and not allow_unconfined:
            raise InvalidArgumentError(
                f"isolates need the walls {', '.join(sorted(missing))}: without them tenant code runs with the rights "
                "of this process. For code that you trust use TrustedLoader, or give allow_unconfined=True"
            )
        memory = machine_memory() * 3 // 4 if total_memory is None else total_memory
        self._walls, self._pool_options = tuple(walls), (tuple(preload), ready, memory)
        self._allow_unconfined = allow_unconfined
        self._pool: IsolatePool[Isolate] | None = None
        self._on_output = on_output or _log_output
        self._capacity = workers
        self._workers: OrderedDict[str, _Worker] = OrderedDict()
        self._keeper = IsolateKeeper(warm)
        self.places = Places(per_tenant)
        """Of the tenants' calls."""
        self._wraps: dict[str, Wrap] = {}
        self._holding: set[asyncio.Task[None]] = set()
        self.telling: set[asyncio.Task[None]] = set()
        """Tasks in which tails hear of something."""

    async def __aenter__(self) -> Self:
        try:
            self._pool = await self._start_pool(self._walls)
        except IsolateError:
            if not self._allow_unconfined:
                raise
            found = await asyncio.to_thread(describe_walls)
            self._pool = await self._start_pool(each for each in self._walls if found[each].startswith("up"))
        return self

    async def _start_pool(self, walls: Iterable[str]) -> IsolatePool[Isolate]:
        pool = IsolatePool(tuple(walls), *self._pool_options, self._connect)
        await pool.start()
        return pool

    async def __aexit__(self, *exc_info: object) -> None:
        pool, self._pool = self._pool, None
        for holding in list(self._holding):
            holding.cancel()
        await asyncio.gather(*self._holding, return_exceptions=True)
        self._keeper.close()
        for isolate in list(self._keeper.live):
            await self._discard(isolate)
        if pool is not None:
            await pool.close()
        await last_words(self.telling)

    @property
    def walls(self) -> tuple[str, ...]:
        """The walls that stand around the isolates of this loader."""
        return tuple(self._pool.walls) if self._pool is not None else ()

    @property
    def isolates(self) -> int:
        """How many isolates of tenants there are: at work, and kept for their next call."""
        return len(self._keeper.live)

    async def _connect(self, process: IsolateProcess) -> Isolate:
        return await Isolate.start(process, self._on_output)

    def get(self, worker_id: str, code: CodeSource) -> WorkerStub:
        """Return the worker `worker_id`."""
        worker = self._workers.get(worker_id)
        if worker is None:
            worker = self._workers[worker_id] = _Worker(self, worker_id, code)
            while len(self._workers) > self._capacity:
                self._workers.popitem(last=False)
        self._workers.move_to_end(worker_id)
        return worker

    def load(self, code: WorkerCode) -> WorkerStub:
        """Return a worker of its own for `code`."""
        return _Worker(self, f"loaded:{uuid4().hex}", lambda: code)

    def bind(self, name: str, wrap: Wrap) -> None:
        """Make a workflow binding known."""
        self._wraps[name] = wrap

    # --- for workers ---

    @property
    def wraps(self) -> Mapping[str, Wrap]:
        """What `bind` got."""
        return self._wraps

    async def acquire(self, key: Any, loaded: _Loaded) -> Isolate:
        """Return an isolate that holds `loaded`, for one session: a warm one with the same `key`, or a new one."""
        warm = self._keeper.take(key)
        if warm is not None:
            return warm
        if self._pool is None:
            raise IsolateError("the loader is closed: use it inside `async with loader`")
        isolate = await self._pool.take()
        self._keeper.started(isolate)
        code = loaded.code
        answer = isolate.load(
            code.main_module, loaded.modules, loaded.told, code.metadata, code.limits, loaded.tails
        )
        answer.add_done_callback(_ignore)  # a load error is the answer to every call that follows, too
        return isolate

    def release(self, key: Any, isolate: Isolate) -> None:
        """Keep an isolate that has finished cleanly for a moment."""
        self._keeper.put(key, isolate)

    def hold(self, session: Session, release: Callable[..., Any]) -> None:
        """Keep a session whose call has returned something that lives in its isolate."""

        async def until_let_go() -> None:
            try:
                await session.let_go.wait()
            finally:
                await release(clean=True)

        task = asyncio.get_running_loop().create_task(until_let_go())
        self._holding.add(task)
        task.add_done_callback(self._holding.discard)

    async def discard(self, isolate: Isolate) -> None:
        """Stop an isolate; returns when it is gone, even if cancelled meanwhile."""
        isolate.kill()
        await asyncio.shield(asyncio.ensure_future(self._discard(isolate)))

    async def _discard(self, isolate: Isolate) -> None:
        await isolate.stop()
        self._keeper.gone(isolate)


@dataclass(frozen=True, slots=True)
class _Loaded:
    """A worker's code with what goes to the guest and what stays here."""

    code: WorkerCode
    modules: Mapping[str, Any]
    told: dict[str, list[Any]]
    bindings: dict[str, HostBinding]
    digest: str
    tails: Tails
    token: object
    """Of this answer of the code source: isolates with another env are not reused."""


class _Worker(WorkerStub):
    def __init__(self, loader: ProcessLoader, worker_id: str, source: CodeSource) -> None:
        self.loader, self.id = loader, worker_id
        self._source: CodeSource = source
        self._loaded: asyncio.Future[_Loaded] | None = None

    def get_entrypoint(
        self, name: str | None = None, *, props: Any = None, limits: CallLimits | None = None
    ) -> EntrypointStub:
        return _Entrypoint(self, name, props, limits)

    async def loaded(self) -> _Loaded:
        """Return the code, asked for once; after an error it is asked for again."""
        if self._loaded is None:
            self._loaded = asyncio.ensure_future(self._load())
        loading = self._loaded
        try:
            return await asyncio.shield(loading)
        except BaseException:
            if loading.done() and self._loaded is loading:
                self._loaded = None
            raise

    async def _load(self) -> _Loaded:
        made = self._source()
        code = await made if inspect.isawaitable(made) else made
        told, bindings = make_bindings(code.env, self.loader.wraps, code.global_outbound)
        digest = code_digest(code.main_module, code.modules)
        tails = Tails(code.tails, self.loader.telling)
        return _Loaded(code, code.modules, told, bindings, digest, tails, object())


class _Entrypoint(EntrypointStub):
    def __init__(self, worker: _Worker, name: str | None, props: Any, limits: CallLimits | None) -> None:
        self._worker, self._name, self._props, self._limits = worker, name, props, limits

    async def call(self, method: str, *args: Any, **kwargs: Any) -> Any:
        """Call a public method of the entrypoint."""
        return await outside(self._call(method, args, kwargs))

    async def run(self, event: Any, step: WorkflowStep) -> Any:
        """Run the workflow class; what the tenant's code raises comes as RemoteError."""
        port: Any = step.port
        activity = port.activity()
        held: list[_Held] = []
        try:
            return await outside(self._run(event, port, activity, held), keeps_awake=False)
        finally:
            for each in held:
                each.hold_until_cancelled()
            activity.close()

    async def _call(self, method: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        loaded = await self._worker.loaded()
        caller = Caller(self._worker.id, loaded.code.metadata, self._props)
        give_back = await self._worker.loader.places.take(loaded.code.tenant or self._worker.id)
        try:
            session, put = await self._session(loaded, caller)
        except BaseException:
            give_back()
            raise

        async def release(*, clean: bool) -> None:
            try:
                await put(clean=clean)
            finally:
                give_back()

        try:
            result = await session.call("call", method, [self._name, _plain(self._props), list(args), kwargs])
        except RemoteError as error:
            await release(clean=True)
            raise error_of(error.failure) from error
        except asyncio.CancelledError:
            try:
                await session.cancelled()
            finally:  # it may be cancelled once more
                await release(clean=False)
            raise
        except BaseException:
            await release(clean=False)
            raise
        if session.is_held:
            self._worker.loader.hold(session, release)
        else:
            await release(clean=True)
        return result

    async def _run(self, event: Any, port: Any, activity: Any, held: list[_Held]) -> Any:
        loaded = await self._worker.loaded()
        modules = await port.pin(loaded.digest, loaded.modules)
        if modules != loaded.modules:
            loaded = replace(loaded, modules=modules, digest=code_digest(loaded.code.main_module, modules))
        caller = Caller(
            self._worker.id, loaded.code.metadata, self._props, port.instance_id, port.workflow_name
        )
        session, release = await self._session(loaded, caller, port, activity)
        try:
            result = await session.call("run", "", [self._name, _plain(self._props), event])
        except RemoteError as error:
            if session.has_rollbacks:
                held.append(_Held(release))
            else:
                await release(clean=True)
            raise load_error_of(error.failure) or error from None
        except BaseException:
            await release(clean=False)
            raise
        await release(clean=True)
        return result

    async def _session(
        self, loaded: _Loaded, caller: Caller, port: Any = None, activity: Any = None
    ) -> tuple[Session, Callable[..., Any]]:
        loader, key = self._worker.loader, (loaded.token, loaded.digest)
        isolate = await loader.acquire(key, loaded)
        limits = loaded.code.limits.lowered(self._limits)
        session = Session(isolate, loaded.bindings, caller, limits, port, activity)

        async def release(*, clean: bool) -> None:
            session.close()
            if clean and isolate.is_usable:
                loader.release(key, isolate)
            else:
                await loader.discard(isolate)

        return session, release


class _Held:
    """An isolate that has failed and still holds rollback handlers, which its segment calls next."""

    def __init__(self, release: Callable[..., Any]) -> None:
        self._release = release
        self._host = asyncio.get_running_loop()
        # Where the segment ends before it has even seen the failure, nobody else lets go.
        self._timer = self._host.call_later(_CLAIM_WITHIN, self._let_go)

    def hold_until_cancelled(self) -> None:
        """Hold it as long as the workflow's loop lives; called on that loop."""
        loop = asyncio.get_running_loop()
        if isinstance(loop, WorkflowLoop):
            self._timer.cancel()
            # The loop itself keeps its tasks.
            loop.create_task(loop.outside(self._wait(), keeps_awake=False))  # noqa: RUF006

    async def _wait(self) -> None:
        try:
            await self._host.create_future()
        finally:
            await self._release(clean=False)

    def _let_go(self) -> None:
        asyncio.ensure_future(self._release(clean=False))  # noqa: RUF006 - the loader waits for the isolate


def code_digest(main_module: str, modules: Mapping[str, Any]) -> str:
    """Return `sha256:…` of a worker's code."""
    text = json.dumps([main_module, sorted((file, pack(held)) for file, held in modules.items())])
    return "sha256:" + hashlib.sha256(text.encode()).hexdigest()


def _plain(props: Any) -> Any:
    try:
        pack(props)
    except UnserializableError:
        return None
    return props


def _ignore(answer: asyncio.Future[Any]) -> None:
    if not answer.cancelled():
        answer.exception()


def _log_output(caller: Caller, text: str) -> None:
    for line in text.splitlines():
        # Without control characters: a tenant shall not forge lines of a log, or talk to a terminal.
        _output.info(
            "%s: %s", caller.worker_id, "".join(char if char.isprintable() else "\ufffd" for char in line)
        )
