"""One JSON shape for every error: `{"error": {"code", "message", "details"}}`. Nothing internal gets out."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from http import HTTPStatus
from typing import Any

from litestar import MediaType, Request, Response
from litestar.exceptions import HTTPException, ValidationException

from ci_platform.errors import PlatformError, UnavailableError
from dynflow.errors import (
    DynflowError,
    IllegalMoveError,
    InstanceExistsError,
    InstanceNotFoundError,
    InvalidArgumentError,
    InvalidInstanceIdError,
)

logger = logging.getLogger(__name__)

_OF_LIBRARY: dict[type[DynflowError], int] = {
    InstanceNotFoundError: 404,
    InvalidInstanceIdError: 404,
    InstanceExistsError: 409,
    IllegalMoveError: 409,
    InvalidArgumentError: 400,
}


@dataclass(frozen=True, slots=True)
class Problem:
    """What went wrong, as it is shown: HTTP status, stable code, sentence, more where there is more."""

    status: int
    code: str
    message: str
    details: dict[str, Any] = field(default_factory=dict)
    headers: dict[str, str] = field(default_factory=dict)

    def body(self) -> dict[str, Any]:
        """Return the JSON body."""
        return {"error": {"code": self.code, "message": self.message, "details": self.details}}


def describe(error: Exception) -> Problem:
    """Return how `error` is shown."""
    if isinstance(error, PlatformError):
        return _of_platform(error)
    if isinstance(error, HTTPException):
        return _of_http(error)
    if isinstance(error, RecursionError) and "deserializing" in str(error):
        return Problem(400, "invalid_input", "the body is nested too deeply")
    for kind, status in _OF_LIBRARY.items():
        if isinstance(error, kind):
            return Problem(status, kind.code, str(error))
    return Problem(500, "internal", "something went wrong on this side; the server's log has the details")


def answer(request: Request[Any, Any, Any], error: Exception) -> Response[Any]:
    """Log what is ours, answer in the one shape."""
    problem = describe(error)
    if problem.status >= 500:
        logger.error("%s %s failed", request.method, request.url.path, exc_info=error)
    return Response(
        problem.body(), status_code=problem.status, headers=problem.headers, media_type=MediaType.JSON
    )


def _of_platform(error: PlatformError) -> Problem:
    if error.status >= 500 and not isinstance(error, UnavailableError):
        return Problem(error.status, error.code, "something went wrong on this side; see the server's log")
    headers = {}
    if error.status == 401:
        headers["WWW-Authenticate"] = 'Bearer realm="dynflow"'
    if isinstance(error, UnavailableError):
        headers["Retry-After"] = "10"
    details = getattr(error, "details", None)
    return Problem(
        error.status, error.code, str(error), dict(details) if isinstance(details, Mapping) else {}, headers
    )


def _of_http(error: HTTPException) -> Problem:
    status = error.status_code
    phrase = HTTPStatus(status).phrase
    code = "invalid_input" if status == 400 else phrase.lower().replace(" ", "_")
    if status == 413:
        code = "too_large"
    details = {}
    if isinstance(error, ValidationException) and error.extra:
        details = {"problems": [_problem(item) for item in error.extra]}
    headers = {key: value for key, value in (error.headers or {}).items() if key.lower() == "allow"}
    if status == 413:
        headers["Connection"] = "close"  # or the rest would still be read, to be thrown away
    message = phrase.capitalize() if status >= 500 else _message(status, error.detail)
    return Problem(status, code, message, details, headers)


def _message(status: int, detail: str) -> str:
    known = {
        404: "there is nothing at this address",
        405: "this address does not answer this method",
        413: "the body is larger than this server takes",
    }
    # A validation message names the handler's parameters, which are the API's own words.
    return known.get(status, detail.partition(" for ")[0] or HTTPStatus(status).phrase)


def _problem(item: Any) -> dict[str, str]:
    if not isinstance(item, Mapping):
        return {"message": str(item)}
    return {key: str(item[key]) for key in ("key", "source", "message") if key in item}
