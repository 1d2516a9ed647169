"""The platform: customers upload workflow code over HTTP, call it, and send events to their instances.

Who calls is decided by the API key alone. A customer's code runs in confined processes, reaches its own
instances through `env.WORKFLOWS`, and nothing else.
"""

import hashlib
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

from litestar import Litestar, Request, Response, get, post, put
from litestar.di import Provide
from litestar.exceptions import NotAuthorizedException

from dynflow import (
    DynamicWorkflowBinding,
    DynflowError,
    IllegalMoveError,
    InstanceExistsError,
    InstanceNotFoundError,
    LoadContext,
    create_dynamic_workflow_entrypoint,
    wrap_workflow_binding,
)
from dynflow.engines.embedded import EmbeddedEngine
from dynflow.isolates import IsolateLimits, ProcessLoader, WorkerCode, WorkerStub

LIMITS = IsolateLimits(memory=64 * 1024 * 1024, busy=timedelta(seconds=2))
STATUS_CODES = {InstanceNotFoundError: 404, InstanceExistsError: 409, IllegalMoveError: 409}


class Platform:
    """Code of tenants in files, their instances in one engine."""

    def __init__(self, data: Path) -> None:
        self._code = data / "code"
        self._code.mkdir(parents=True, exist_ok=True)
        self.loader = ProcessLoader()
        self.engine = EmbeddedEngine(data / "instances.db", tenant_concurrency=20)
        entrypoint = create_dynamic_workflow_entrypoint(self._load_runner)
        # `binding`: what tenants reach as env.WORKFLOWS, through the loader in `env`.
        self.engine.register("tenants", entrypoint, env={"LOADER": self.loader}, binding="WORKFLOWS")

    def deploy(self, tenant: str, source: str) -> str:
        """Store a tenant's code for its next calls and new instances; return its version."""
        fresh = self._code / f"{tenant}.new"
        fresh.write_text(source)
        fresh.replace(self._code / f"{tenant}.py")  # the old code or the new, whenever the power fails
        return _version(source)

    def worker(self, tenant: str) -> WorkerStub:
        """Return the tenant's code as it is deployed now."""
        path = self._code / f"{tenant}.py"
        if not path.exists():
            raise InstanceNotFoundError(f"{tenant} has no code yet: PUT /code")
        source = path.read_text()
        code = WorkerCode(
            main_module="index.py",
            modules={"index.py": source},
            env={"WORKFLOWS": wrap_workflow_binding({"tenant_id": tenant}), "TENANT": tenant},
            limits=LIMITS,
        )
        # The version is part of the id, since the loader keeps the code that it has for an id.
        return self.loader.get(f"{tenant}@{_version(source)}", lambda: code)

    def workflows(self, tenant: str) -> DynamicWorkflowBinding:
        """Return the binding that reaches this tenant's instances."""
        return DynamicWorkflowBinding(self.engine.binding("tenants"), {"tenant_id": tenant})

    async def _load_runner(self, context: LoadContext) -> Any:
        return self.worker(context.metadata["tenant_id"]).get_entrypoint("Workflow")


def _version(source: str) -> str:
    return hashlib.sha256(source.encode()).hexdigest()[:12]


@put("/code")
async def deploy(request: Request[Any, Any, Any], tenant: str, platform: Platform) -> dict[str, str]:
    """Take the tenant's module."""
    return {"version": platform.deploy(tenant, (await request.body()).decode())}


@post("/call", status_code=200)
async def call(data: dict[str, Any], tenant: str, platform: Platform) -> Any:
    """Call the `fetch` of the tenant's module."""
    try:
        return await platform.worker(tenant).get_entrypoint().fetch(data)
    except DynflowError:
        raise
    except Exception as error:  # noqa: BLE001 - whatever a tenant's code raises is the tenant's
        return _answer(422, type(error).__name__, str(error))


@get("/instances/{instance_id:str}")
async def show(instance_id: str, tenant: str, platform: Platform) -> dict[str, Any]:
    """Tell how an instance of the tenant is."""
    status = await (await platform.workflows(tenant).get(instance_id)).status()
    error = status.error and f"{status.error.name}: {status.error.message}"
    done = [step.name for step in status.steps if step.status == "complete"]
    return {"status": status.status, "done": done, "output": status.output, "error": error}


@post("/instances/{instance_id:str}/events/{event_type:str}", status_code=202)
async def send(
    instance_id: str, event_type: str, data: dict[str, Any], tenant: str, platform: Platform
) -> None:
    """Send an event to an instance of the tenant; it is durable when this answers."""
    await (await platform.workflows(tenant).get(instance_id)).send_event(type=event_type, payload=data)


def make_app(data: Path, keys: Mapping[str, str]) -> Litestar:
    """Return the application over a folder; `keys` maps API keys to tenants."""
    platform = Platform(data)

    @asynccontextmanager
    async def lifespan(_: Litestar) -> AsyncIterator[None]:
        async with platform.loader, platform.engine:  # goes on with what was running
            yield

    async def tenant(request: Request[Any, Any, Any]) -> str:
        found = keys.get(request.headers.get("authorization", "").removeprefix("Bearer "))
        if found is None:
            raise NotAuthorizedException("give an API key: Authorization: Bearer KEY")
        return found

    return Litestar(
        [deploy, call, show, send],
        lifespan=[lifespan],
        dependencies={
            "tenant": Provide(tenant),
            "platform": Provide(lambda: platform, sync_to_thread=False),
        },
        exception_handlers={DynflowError: _explain},
        request_max_body_size=1_000_000,
        logging_config=None,
        openapi_config=None,
    )


def _explain(_: Request[Any, Any, Any], error: DynflowError) -> Response[Any]:
    codes = [code for cls, code in STATUS_CODES.items() if isinstance(error, cls)]
    return _answer(codes[0] if codes else 422, error.code, str(error))


def _answer(status: int, code: str, message: str) -> Response[Any]:
    return Response({"error": {"code": code, "message": message}}, status_code=status)
