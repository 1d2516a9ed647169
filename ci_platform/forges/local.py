"""Our own git server as a forge: pushes are changes, statuses and comments are rows that our pages show."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from ci_platform.errors import UnauthorizedError
from ci_platform.forges import Comment, CommitStatus, Delivery, Forge
from ci_platform.model import ShownComment, ShownStatus
from ci_platform.store import Store, Transaction, col
from dynflow.clock import Clock

_MAX_DESCRIPTION = 140
# As GitHub's, so that a pipeline that works here works there.
_MAX_COMMENT = 65_536


class LocalForge(Forge):
    """The forge without a forge. `mirror_url` tells where git finds a repository: the mirror itself."""

    name = "local"

    def __init__(self, store: Store, clock: Clock, mirror_url: Callable[[str], str]) -> None:
        self._store, self._clock, self._mirror_url = store, clock, mirror_url

    def receive(self, headers: Mapping[str, str], body: bytes) -> Delivery:
        """Refuse: pushes come through our own git server, nothing comes signed."""
        del headers, body
        raise UnauthorizedError("the local forge takes pushes, not webhooks")

    async def set_status(self, status: CommitStatus) -> None:
        """Keep the status for our pages."""
        row = ShownStatus(
            repo=status.repo,
            sha=status.sha,
            context=status.context,
            state=status.state,
            description=status.description[:_MAX_DESCRIPTION],
            target_url=status.target_url,
            updated_at=self._clock.now(),
        )

        def put(tx: Transaction) -> None:
            key = {"repo": row.repo, "sha": row.sha, "context": row.context}
            tx.remove(ShownStatus, *(col(getattr(ShownStatus, name)) == key[name] for name in key))
            tx.add(row)

        await self._store.write(put)

    async def put_comment(self, comment: Comment) -> None:
        """Keep the comment for our pages."""
        row = ShownComment(
            repo=comment.repo,
            pr=comment.pr,
            marker=comment.marker,
            body=comment.body[:_MAX_COMMENT],
            updated_at=self._clock.now(),
        )

        def put(tx: Transaction) -> None:
            tx.remove(
                ShownComment,
                col(ShownComment.repo) == row.repo,
                col(ShownComment.pr) == row.pr,
                col(ShownComment.marker) == row.marker,
            )
            tx.add(row)

        await self._store.write(put)

    def clone_url(self, repo: str) -> str:
        """Return where the mirror is."""
        return self._mirror_url(repo)

    def credentials(self, repo: str) -> tuple[str, str] | None:
        """Return None: the mirror is on this machine."""
        del repo
        return None
