"""What a service may look like: values out of an isolate, so annotations promise nothing."""

from __future__ import annotations

import re
from datetime import timedelta
from typing import Any

from ci_platform.errors import InvalidInputError
from pipelines.contract import Service

_HOST = re.compile(r"[a-z0-9](?:[a-z0-9-]{0,61}[a-z0-9])?")
_MOST = 8
"""Services of one command: each takes what a command may take."""

_LONGEST_WAIT = timedelta(minutes=10)
_LONGEST_TEXT = 100_000


def check_services(services: Any, sandbox: str) -> None:
    """Raise InvalidInputError, naming service and value, unless `services` are services of a container."""
    if not isinstance(services, tuple) or not all(isinstance(each, Service) for each in services):
        raise InvalidInputError(f"services must be a list of Service, not {services!r:.100}")
    if services and sandbox != "container":
        raise InvalidInputError('services are for sandbox="container"')
    if len(services) > _MOST:
        raise InvalidInputError(f"a command may have {_MOST} services, not {len(services)}")
    for service in services:
        _check(service)
    hosts = [service.host for service in services]
    if len(set(hosts)) < len(hosts):
        raise InvalidInputError(f"two services of one command have the same name: {', '.join(hosts)}")


def _check(service: Service) -> None:
    texts: tuple[Any, ...] = (service.image, service.name)
    port: Any = service.port
    timeout: Any = service.timeout
    env: Any = service.env
    if not all(isinstance(text, str) for text in texts):
        raise InvalidInputError(f"image and name of a service are text, not {texts!r:.100}")
    if not _HOST.fullmatch(service.host) or service.host in {"localhost", "sandbox"}:
        raise InvalidInputError(
            f"{service.host!r:.100} cannot be the name of a service: letters a-z, digits and dashes"
        )
    what = f"service {service.host}"
    if isinstance(port, bool) or not isinstance(port, int) or not 0 < port < 65_536:
        raise InvalidInputError(f"{what}: port is 1 to 65535, not {port!r:.100}")
    if not isinstance(timeout, timedelta) or not timedelta() < timeout <= _LONGEST_WAIT:
        raise InvalidInputError(f"{what}: timeout is up to 10 minutes, not {timeout!r:.100}")
    if not isinstance(env, dict) or any(not name or "=" in name for name in map(str, env)):
        raise InvalidInputError(f"{what}: env is a dict of text, its names not empty and without '='")
    _check_texts(what, "env", (*env, *env.values()))
    _check_texts(what, "command", service.command)
    _check_ready(what, service.ready)


def _check_ready(what: str, ready: Any) -> None:
    if isinstance(ready, str):
        if not ready.startswith("/") or not ready.isascii() or not ready.isprintable() or " " in ready:
            raise InvalidInputError(f'{what}: ready is a path such as "/health", not {ready!r:.100}')
    elif ready is not None:
        _check_texts(what, "ready", ready)
        if not ready:
            raise InvalidInputError(f"{what}: ready is an empty command")


def _check_texts(what: str, name: str, texts: Any) -> None:
    if not isinstance(texts, tuple) or not all(isinstance(text, str) and "\0" not in text for text in texts):
        raise InvalidInputError(f"{what}: {name} is text without NUL characters, not {texts!r:.100}")
    if sum(map(len, texts)) > _LONGEST_TEXT:
        raise InvalidInputError(f"{what}: {name} is longer than {_LONGEST_TEXT:,} characters")
