"""The Litestar application: which handlers, for whom, with which services, and how errors look."""

from __future__ import annotations

from collections.abc import Callable
from importlib.metadata import version
from typing import Any

from litestar import Litestar, MediaType, Request, Response, Router
from litestar.config.response_cache import ResponseCacheConfig
from litestar.datastructures import MutableScopeHeaders, State
from litestar.di import Provide
from litestar.openapi import OpenAPIConfig
from litestar.openapi.plugins import JsonRenderPlugin, YamlRenderPlugin
from litestar.openapi.spec import Components, SecurityScheme
from litestar.types import Message, Scope

from ci_platform.api.artifacts import delete_artifact, download_artifact, list_artifact_files, list_artifacts
from ci_platform.api.authorization import Authorizer, current_actor
from ci_platform.api.garbage import collect_garbage
from ci_platform.api.gates import decide_gate, list_gates
from ci_platform.api.git import git_router
from ci_platform.api.health import Degraded, Readiness, healthz, readyz
from ci_platform.api.imports import get_import, receive_refresh, refresh_import, start_import
from ci_platform.api.logs import list_connections, read_log
from ci_platform.api.problems import answer
from ci_platform.api.repos import (
    change_repo,
    delete_repo,
    fork_repo,
    get_repo,
    list_repos,
    read_commit,
    read_commits,
    read_tree,
    register_repo,
)
from ci_platform.api.runs import cancel_run, follow_events, fork_run, get_run, list_runs, rerun_run
from ci_platform.api.snapshots import (
    download_snapshot,
    list_snapshot_files,
    list_snapshots,
    read_snapshot_file,
)
from ci_platform.api.streams import Stopping
from ci_platform.api.tokens import create_login_link, create_token, list_tokens, revoke_token
from ci_platform.api.webhooks import receive_webhook
from ci_platform.assembly import Platform
from ci_platform.model import Counter
from ci_platform.sessions import Sessions
from ci_platform.web.pages import page_router
from ci_platform.web.render import Pages, problem_page, wants_page

_API = "/api/v1"
# What the JSON API is sent is a decision, a name, a comment.
_MAX_JSON = 64 * 1024

# Pages bring their own, see web/pages.py.
_HEADERS = {
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
    "referrer-policy": "same-origin",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "content-security-policy": "default-src 'none'; frame-ancestors 'none'",
}


def create_app(platform: Platform) -> Litestar:
    """Return the application over a running platform. `app.state.stopping` ends its streams."""
    settings = platform.settings
    sessions = Sessions(settings.data / "session.key", platform.access, platform.clock)
    stopping = Stopping()
    pages = Pages(base_url=settings.base_url)
    services = {
        "runs": platform.runs,
        "gates": platform.gates,
        "logs": platform.logs,
        "workspaces": platform.workspaces,
        "artifacts": platform.artifacts,
        "deliveries": platform.deliveries,
        "repositories": platform.repositories,
        "git_store": platform.git_store,
        "imports": platform.imports,
        "source": platform.source,
        "access": platform.access,
        "collector": platform.collector,
        "room": platform.room_keeper.room,
        "forges": platform.forges,
        "sessions": sessions,
        "stopping": stopping,
        "pages": pages,
        "readiness": _readiness(platform),
        "degraded": _degraded(platform),
    }
    return Litestar(
        [
            Router(_API, route_handlers=_API_HANDLERS, request_max_body_size=_MAX_JSON),
            Router(
                "/",
                route_handlers=[receive_webhook, receive_refresh],
                request_max_body_size=settings.max_body,
            ),
            healthz,
            readyz,
            git_router(platform),
            page_router(max_body=_MAX_JSON),
        ],
        dependencies={
            **{name: Provide(_always(service), sync_to_thread=False) for name, service in services.items()},
            "actor": Provide(current_actor, sync_to_thread=False),
        },
        guards=[Authorizer(sessions, public_read=settings.public_read)],
        exception_handlers={Exception: _problem_handler(pages)},
        before_send=[_harden],
        openapi_config=_openapi(),
        response_cache_config=ResponseCacheConfig(default_expiration=None),
        state=State({"stopping": stopping, "sessions": sessions, "base_url": settings.base_url}),
        debug=False,
        logging_config=None,
    )


_API_HANDLERS = [
    list_runs,
    get_run,
    follow_events,
    read_log,
    list_connections,
    cancel_run,
    rerun_run,
    fork_run,
    list_snapshots,
    list_snapshot_files,
    read_snapshot_file,
    download_snapshot,
    list_artifacts,
    list_artifact_files,
    download_artifact,
    delete_artifact,
    list_gates,
    decide_gate,
    list_repos,
    register_repo,
    get_repo,
    change_repo,
    delete_repo,
    fork_repo,
    read_commits,
    read_commit,
    read_tree,
    start_import,
    get_import,
    refresh_import,
    list_tokens,
    create_token,
    revoke_token,
    create_login_link,
    collect_garbage,
]


def _openapi() -> OpenAPIConfig:
    return OpenAPIConfig(
        title="dynflow",
        version=version("dynflow"),
        description=(
            "Send a token as `Authorization: Bearer <token>`. Every error is "
            '`{"error": {"code", "message", "details"}}`.'
        ),
        components=Components(
            security_schemes={"token": SecurityScheme(type="http", scheme="bearer", description="A token.")}
        ),
        security=[{"token": []}],
        use_handler_docstrings=True,
        path="/schema",
        # The documents alone: viewers load their scripts from elsewhere, which this server's pages never do.
        render_plugins=[
            JsonRenderPlugin(path=["/", "/openapi.json"], media_type=MediaType.JSON),
            YamlRenderPlugin(path="/openapi.yaml"),
        ],
        openapi_router=Router("/schema", route_handlers=[], opt={"scope": "public"}),
    )


def _always(service: Any) -> Callable[[], Any]:
    return lambda: service


def _readiness(platform: Platform) -> Readiness:
    return {"database": lambda: platform.store.read(lambda tx: tx.first(Counter))}


def _degraded(platform: Platform) -> Degraded:
    return {"disk": lambda: "short of room: new runs wait" if platform.room_keeper.room.shortage() else None}


def _problem_handler(pages: Pages) -> Callable[[Request[Any, Any, Any], Exception], Response[Any]]:
    def handle(request: Request[Any, Any, Any], error: Exception) -> Response[Any]:
        if wants_page(request):
            return problem_page(pages, request, error)
        return answer(request, error)

    return handle


async def _harden(message: Message, scope: Scope) -> None:
    del scope
    if message["type"] == "http.response.start":
        headers = MutableScopeHeaders(message)
        for name, value in _HEADERS.items():
            headers.setdefault(name, value)
