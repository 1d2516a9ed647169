"""GitHub: verifies and reads its deliveries, shows statuses and comments through PyGithub."""

from __future__ import annotations

import hashlib
import hmac
import re
import time
from collections.abc import Callable, Mapping
from datetime import timedelta
from email.utils import parsedate_to_datetime
from typing import Any, TypeVar
from urllib.parse import quote

import anyio.to_thread
from anyio import CapacityLimiter
from github import Auth, Github, GithubException

from ci_platform.errors import FailedError, InvalidInputError, UnauthorizedError, UnavailableError
from ci_platform.forges import Change, Comment, CommitStatus, Delivery, Forge
from ci_platform.forges.payloads import Fields, change_of_pull_request, change_of_push, parse_body

_T = TypeVar("_T")

# GitHub's limits: a status's description, a comment's body.
_MAX_DESCRIPTION = 140
_MAX_COMMENT = 65_536
# Far below GitHub's 100 concurrent requests; reports are small and few.
_CALLS_AT_ONCE = 8
# A 403 for too many requests that names no time: GitHub asks for a minute at least.
_RETRY_WITHOUT_ADVICE = 60.0
# Comments are looked for in this many pages of 100 at most.
_COMMENT_PAGES = 10
_SHA = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}")


class GitHubForge(Forge):
    """GitHub.com or an Enterprise Server, by its base URLs.

    Without a `webhook_secret` no delivery is accepted; without a `token` nothing can be shown there.
    """

    name = "github"

    def __init__(
        self,
        *,
        api_url: str = "https://api.github.com",
        url: str = "https://github.com",
        token: str | None = None,
        webhook_secret: str | None = None,
        timeout: timedelta = timedelta(seconds=15),
    ) -> None:
        self._url, self._token = url.rstrip("/"), token
        self._secret = webhook_secret.encode() if webhook_secret else None
        # No retries and no pauses in there: they would hold a thread. The outbox retries.
        self._github = Github(
            auth=Auth.Token(token) if token else None,
            base_url=api_url,
            timeout=max(1, round(timeout.total_seconds())),
            user_agent="dynflow",
            retry=None,
            seconds_between_requests=None,
            seconds_between_writes=None,
            lazy=True,
        )
        self._limiter: CapacityLimiter | None = None
        self._login: str | None = None
        self._comment_ids: dict[tuple[str, int, str], int] = {}

    # --- in ------------------------------------------------------------------------------------

    def receive(self, headers: Mapping[str, str], body: bytes) -> Delivery:
        """Verify the signature over the raw body, then parse."""
        self._verify(headers.get("x-hub-signature-256", ""), body)
        event, delivery_id = headers.get("x-github-event", ""), headers.get("x-github-delivery", "")
        if not re.fullmatch(r"[a-z_]{1,100}", event):
            raise InvalidInputError("X-GitHub-Event is missing or is no event's name")
        if not re.fullmatch(r"[A-Za-z0-9-]{1,100}", delivery_id):
            raise InvalidInputError("X-GitHub-Delivery is missing or is no delivery's id")
        payload = parse_body(headers.get("content-type", ""), body)
        return _deliver(event, delivery_id, payload)

    def _verify(self, signature: str, body: bytes) -> None:
        if self._secret is None:
            raise UnauthorizedError(
                "no webhook secret is set here (github_webhook_secret): nothing is accepted"
            )
        expected = "sha256=" + hmac.new(self._secret, body, hashlib.sha256).hexdigest()
        # Bytes, because compare_digest refuses text beyond ASCII, which the header may hold.
        if not hmac.compare_digest(expected.encode(), signature.encode("utf-8", "replace")):
            raise UnauthorizedError(
                "X-Hub-Signature-256 is missing or is not this body's: check the webhook secret"
            )

    # --- out -----------------------------------------------------------------------------------

    async def set_status(self, status: CommitStatus) -> None:
        """Show a status on a commit."""
        if not _SHA.fullmatch(status.sha):
            raise FailedError(f"{status.sha[:64]!r} is not a commit's id")
        body = {
            "state": status.state,
            "context": status.context,
            "description": _cut(status.description, _MAX_DESCRIPTION),
            "target_url": status.target_url,
        }
        path = f"/repos/{quote(status.repo)}/statuses/{status.sha}"
        await self._call(lambda: self._request("POST", path, body))

    async def put_comment(self, comment: Comment) -> None:
        """Create the pull request's comment under the marker, or update it."""
        await self._call(lambda: self._put_comment(comment))

    def _put_comment(self, comment: Comment) -> None:
        key = (comment.repo, comment.pr, comment.marker)
        body = {"body": _comment_body(comment)}
        found = self._comment_ids.get(key) or self._find_comment(comment)
        if found is not None:
            self._comment_ids[key] = found
            try:
                self._request("PATCH", f"/repos/{quote(comment.repo)}/issues/comments/{found}", body)
            except GithubException as error:
                if not isinstance(_explain(error), FailedError):
                    raise
                del self._comment_ids[key]  # deleted, or not ours to edit: make a new one
            else:
                return
        made = self._request("POST", f"/repos/{quote(comment.repo)}/issues/{comment.pr}/comments", body)
        if isinstance(made, dict) and isinstance(made.get("id"), int):
            self._comment_ids[key] = made["id"]

    def _find_comment(self, comment: Comment) -> int | None:
        path = f"/repos/{quote(comment.repo)}/issues/{comment.pr}/comments"
        for page in range(1, _COMMENT_PAGES + 1):
            listed = self._request("GET", f"{path}?per_page=100&page={page}")
            comments = listed if isinstance(listed, list) else []
            for one in comments:
                if str(one.get("body") or "").startswith(comment.marker) and self._is_ours(one):
                    return int(one["id"])
            if len(comments) < 100:
                return None
        return None

    def _is_ours(self, comment: dict[str, Any]) -> bool:
        """Whether the token's own account wrote it: anybody can write our marker, and edit it later."""
        author = comment.get("user")
        if author is None:  # GitHub's for an account that is gone: nobody can edit it any more
            return True
        login = self._own_login()
        return bool(author.get("login") == login if login else author.get("type") == "Bot")

    def _own_login(self) -> str:
        if self._login is None:
            try:
                self._login = str(self._request("GET", "/user").get("login") or "")
            except GithubException as error:
                if error.status not in {403, 404}:
                    raise
                self._login = ""  # an app's token has no user; its comments are a bot's
        return self._login

    def _request(self, verb: str, path: str, body: dict[str, Any] | None = None) -> Any:
        _, data = self._github.requester.requestJsonAndCheck(verb, path, input=body)
        return data

    async def _call(self, work: Callable[[], _T]) -> _T:
        if self._limiter is None:
            self._limiter = CapacityLimiter(_CALLS_AT_ONCE)
        try:
            # Not waited for when the platform stops: what was not heard to be done is done again, to one effect.
            return await anyio.to_thread.run_sync(work, abandon_on_cancel=True, limiter=self._limiter)
        except GithubException as error:
            raise _explain(error) from None
        except OSError as error:  # requests' errors are; their text may hold the URL, never the token
            raise UnavailableError(f"GitHub's API does not answer: {type(error).__name__}") from None

    # --- git -----------------------------------------------------------------------------------

    def clone_url(self, repo: str) -> str:
        """Return what git fetches `repo` from, without credentials."""
        return f"{self._url}/{repo}.git"

    def credentials(self, repo: str) -> tuple[str, str] | None:
        """Return GitHub's user name for tokens, and the token."""
        del repo
        return ("x-access-token", self._token) if self._token else None


def _deliver(event: str, delivery_id: str, payload: Fields) -> Delivery:
    repository = payload.optional("repository")
    repo = repository.text("full_name") if repository else None
    action = payload.text("action", default="")
    summary: dict[str, Any] = {"action": action} if action else {}
    if event == "push":
        change, message = change_of_push(payload)
        return Delivery("github", delivery_id, event, repo, change=change, summary={"message": message})
    if event == "pull_request":
        outcome = change_of_pull_request(payload)
        if isinstance(outcome, Change):
            return Delivery("github", delivery_id, event, repo, change=outcome, summary=summary)
        return Delivery("github", delivery_id, event, repo, ignored=outcome, summary=summary)
    reason = "a ping: the webhook works" if event == "ping" else f"events of kind {event!r} start nothing"
    return Delivery("github", delivery_id, event, repo, ignored=reason, summary=summary)


def _cut(text: str, limit: int) -> str:
    return text if len(text) <= limit else text[: limit - 1] + "…"


def _comment_body(comment: Comment) -> str:
    body = f"{comment.marker}\n{comment.body}"
    if len(body) <= _MAX_COMMENT:
        return body
    note = f"\n\n… cut: GitHub takes {_MAX_COMMENT:,} characters, this comment had {len(body):,}."
    return body[: _MAX_COMMENT - len(note)] + note


def _explain(error: GithubException) -> UnavailableError | FailedError:
    """Tell what may work later from what never will. GitHub's message is quoted, the request is not."""
    said = error.data.get("message") if isinstance(error.data, dict) else None
    message = f"GitHub's API answered {error.status}" + (f": {_cut(str(said), 300)}" if said else "")
    headers = {name.lower(): value for name, value in (error.headers or {}).items()}
    limited = (
        "retry-after" in headers
        or headers.get("x-ratelimit-remaining") == "0"
        or "rate limit" in str(said).lower()
        or "abuse" in str(said).lower()
    )
    if error.status == 429 or (error.status == 403 and limited):
        return UnavailableError(message, retry_after=_advice(headers))
    if error.status == 401:  # the operator can mend it, within the day that reports are tried
        return UnavailableError(f"{message}: check github_token")
    if error.status >= 500 or error.status in {0, 408}:
        return UnavailableError(message, retry_after=_advice(headers, default=None))
    return FailedError(message)


def _advice(headers: Mapping[str, str], default: float | None = _RETRY_WITHOUT_ADVICE) -> float | None:
    """Return the seconds to wait: `retry-after` (seconds or a date), else until `x-ratelimit-reset`."""
    after = headers.get("retry-after", "")
    if after.isdecimal():
        return float(after)
    try:
        if after:
            return max(0.0, parsedate_to_datetime(after).timestamp() - time.time())
    except (ValueError, TypeError):
        pass
    reset = headers.get("x-ratelimit-reset", "")
    if reset.isdecimal() and headers.get("x-ratelimit-remaining", "0") == "0":
        return max(0.0, float(reset) - time.time())
    return default
