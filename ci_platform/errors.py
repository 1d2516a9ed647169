"""Every error the platform raises on purpose, with what each means to a caller and to a run.

Rejected: the request is at fault (4xx). Failed: the tenant's matter (conclusion `failure`). Unavailable:
ours (conclusion `error`, retried).
"""

from __future__ import annotations

from typing import ClassVar, Literal

Conclusion = Literal["success", "failure", "error", "cancelled", "timed_out"]


class PlatformError(Exception):
    """Base: stable `code`, HTTP `status`, `conclusion` of a run that ends by it, whether to `retry_later`."""

    code: ClassVar[str] = "internal"
    status: ClassVar[int] = 500
    conclusion: ClassVar[Conclusion | None] = "error"
    retry_later: ClassVar[bool] = False


class RejectedError(PlatformError):
    """The request cannot be done as it stands; nothing was changed."""

    code, status, conclusion = "rejected", 400, None


class InvalidInputError(RejectedError):
    """A value is missing, has the wrong type or is out of range; the message names it.

    Asked again, it is again: a step that ends by it is retried only where its config names `retries`.
    """

    code, status = "invalid_input", 400
    retry: ClassVar[str] = "when_configured"


class UnauthorizedError(RejectedError):
    """The signature or the token is missing or wrong."""

    code, status = "unauthorized", 401


class ForbiddenError(RejectedError):
    """Who asks is known and may not do this, however often it is asked for; see InvalidInputError."""

    code, status = "forbidden", 403
    retry: ClassVar[str] = "when_configured"


class NotFoundError(RejectedError):
    """There is nothing under this name."""

    code, status = "not_found", 404


class ConflictError(RejectedError):
    """The state of the thing does not allow it: decided already, finished already, exists already."""

    code, status = "conflict", 409


class TooLargeError(RejectedError):
    """The body is larger than the limit."""

    code, status = "too_large", 413


class PatchError(RejectedError):
    """A patch that cannot be read, may not be applied or does not fit; the message names file and hunk."""

    code, status = "patch_refused", 422


class FailedError(PlatformError):
    """The tenant's pipeline, repository or command is at fault.

    It is most of the time again, so a step that ends by one is retried only where its config names `retries`.
    """

    code, status, conclusion = "failed", 422, "failure"
    retry: ClassVar[str] = "when_configured"


class MissingObjectError(FailedError):
    """A commit that is here names something that is not, or cannot be read."""

    code = "missing_object"


class PipelineInvalidError(FailedError):
    """`.dynflow/ci.py` cannot be loaded; the message has file, line and reason."""

    code = "pipeline_invalid"


class LimitExceededError(FailedError):
    """A command or a run went over a limit; the message names limit and value."""

    code = "limit_exceeded"


class ImageNotFoundError(FailedError):
    """There is no such container image, here or in its registry; the message has the name."""

    code = "image_not_found"


class CacheInvalidError(FailedError):
    """A cache that cannot be: a path outside, a key that is none, files that are not there. The message says which."""

    code = "cache_invalid"


class ServiceNotReadyError(FailedError):
    """A service of a run did not become ready, or ended; the message has its name and its last lines."""

    code = "service_not_ready"


class UnavailableError(PlatformError):
    """Something that we depend on does not answer: git remote, forge, Docker, disk.

    `retry_after` is the seconds to wait before the next try, where the other side said so.
    """

    code, status, retry_later = "unavailable", 503, True

    def __init__(self, message: str = "", retry_after: float | None = None) -> None:
        super().__init__(message)
        self.retry_after = retry_after
