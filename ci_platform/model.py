"""The platform's tables as they are now. `migrations/` is the path here; a test compares the two."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any, ClassVar

from sqlalchemy import JSON, BigInteger, DateTime, Dialect, Index, MetaData, UniqueConstraint, false, text
from sqlalchemy.types import TypeDecorator
from sqlmodel import Field, SQLModel

# Names for every constraint, so that migrations can name them on both databases.
_NAMES = {
    "ix": "ix_%(table_name)s_%(column_0_N_name)s",
    "uq": "uq_%(table_name)s_%(column_0_N_name)s",
    "fk": "fk_%(table_name)s_%(column_0_N_name)s",
    "pk": "pk_%(table_name)s",
}


class UtcDateTime(TypeDecorator[datetime]):
    """An aware UTC datetime on both databases: SQLite keeps no zone, so it is put back on reading."""

    impl = DateTime(timezone=True)
    cache_ok = True

    def process_bind_param(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        """Refuse naive datetimes; store UTC."""
        del dialect
        if value is not None and value.tzinfo is None:
            raise ValueError(f"{value!r} has no time zone")
        return None if value is None else value.astimezone(UTC)

    def process_result_value(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        """Return aware UTC."""
        del dialect
        if value is None:
            return None
        return value.replace(tzinfo=UTC) if value.tzinfo is None else value.astimezone(UTC)


class Row(SQLModel):
    """Base of all tables."""

    metadata: ClassVar[MetaData] = MetaData(naming_convention=_NAMES)


class Repository(Row, table=True):
    """A repository whose changes start runs. `clone_url` overrides what the forge would say.

    `parent` is what it was forked from. Its runs may have the repositories `reads` as submodules. A deleted one keeps
    its row, for the runs that it had.
    """

    __tablename__ = "repository"

    name: str = Field(primary_key=True, max_length=200)
    forge: str = Field(max_length=20)
    clone_url: str | None = None
    default_branch: str = Field(default="main", max_length=255)
    enabled: bool = True
    created_at: datetime = Field(sa_type=UtcDateTime)
    last_number: int = 0  # the newest run's number; taken and raised in one update
    read_only: bool = Field(default=False, sa_column_kwargs={"server_default": false()})
    parent: str | None = Field(default=None, max_length=200)
    reads: list[str] = Field(default_factory=list, sa_type=JSON, sa_column_kwargs={"server_default": "[]"})
    deleted_at: datetime | None = Field(default=None, sa_type=UtcDateTime)


class ImportRow(Row, table=True):
    """A repository of ours that is filled from a URL, and kept like it.

    `sealed_password` and `sealed_hook` (what signs requests to refresh) are encrypted. `depth` is None for all of
    history; without `blobs`, files come when they are read. `due_at` is when to refresh next, `verify` whether to
    look at every object then.
    """

    __tablename__ = "repository_import"

    repo: str = Field(primary_key=True, max_length=200, foreign_key="repository.name")
    url: str
    username: str | None = None
    sealed_password: str | None = None
    sealed_hook: str
    depth: int | None = None
    blobs: bool = True
    state: str = Field(default="waiting", max_length=20)
    due_at: datetime | None = Field(default=None, sa_type=UtcDateTime, index=True)
    verify: bool = False
    refreshed_at: datetime | None = Field(default=None, sa_type=UtcDateTime)
    verified_at: datetime | None = Field(default=None, sa_type=UtcDateTime)
    attempts: int = 0
    last_error: str | None = None


class DeliveryRow(Row, table=True):
    """What a forge told us, once per (forge, delivery id).

    `state`: `received` (to be dispatched), `dispatched` (`run_ids` says to what), `ignored` or `failed`
    (`reason` says why).
    """

    __tablename__ = "delivery"
    __table_args__ = (
        UniqueConstraint("forge", "delivery_id"),
        Index("ix_delivery_state_next_at", "state", "next_at"),
    )

    id: int | None = Field(default=None, primary_key=True)
    forge: str = Field(max_length=20)
    delivery_id: str = Field(max_length=200)
    event: str = Field(max_length=100)
    repo: str | None = Field(default=None, max_length=200, index=True)
    state: str = Field(max_length=20)
    reason: str | None = None
    change: dict[str, Any] | None = Field(default=None, sa_type=JSON)
    summary: dict[str, Any] = Field(default_factory=dict, sa_type=JSON)
    run_ids: list[str] = Field(default_factory=list, sa_type=JSON)
    received_at: datetime = Field(sa_type=UtcDateTime)
    redeliveries: int = 0
    attempts: int = 0
    next_at: datetime = Field(sa_type=UtcDateTime)
    last_error: str | None = None


_OPEN = text("conclusion IS NULL")
"""Of the runs that have not ended: garbage asks for these again and again, and they are few among all."""


class Run(Row, table=True):
    """One run. Alive or not is the engine's to say: `phase` is a projection of it that lists filter by.

    `stop_*` is a decision to end the run early (cancelled, gate rejected, out of time), carried out until
    the engine obeys. `rerun_*` is a rerun that was decided and is not carried out yet, `fork_pending` the same of
    a fork: until then the run that it is forked from (`forked_from`) stays as it is.
    """

    __tablename__ = "run"
    __table_args__ = (
        UniqueConstraint("repo", "number"),
        Index("ix_run_sha", "sha"),
        Index("ix_run_phase", "phase"),
        Index("ix_run_forked_from", "forked_from"),
        Index("ix_run_open", "id", sqlite_where=_OPEN, postgresql_where=_OPEN),
    )

    seq: int | None = Field(default=None, primary_key=True)
    id: str = Field(max_length=40, unique=True)
    repo: str = Field(max_length=200, foreign_key="repository.name")
    number: int
    event: str = Field(max_length=20)
    action: str = Field(max_length=40)
    sha: str = Field(max_length=64)
    ref: str = Field(max_length=1024)
    branch: str = Field(max_length=1024)
    base_branch: str | None = Field(default=None, max_length=1024)
    before: str | None = Field(default=None, max_length=64)
    pr: int | None = None
    actor: str = Field(default="", max_length=200)
    title: str = Field(default="", max_length=500)
    trusted: bool = True
    pipeline_digest: str | None = Field(default=None, max_length=100)
    delivery: int | None = Field(default=None, foreign_key="delivery.id")
    attempt: int = 1
    phase: str = Field(default="queued", max_length=20)
    waiting_for: str | None = Field(default=None, max_length=500)
    created_at: datetime = Field(sa_type=UtcDateTime)
    started_at: datetime | None = Field(default=None, sa_type=UtcDateTime)
    active_since: datetime | None = Field(default=None, sa_type=UtcDateTime)
    ended_at: datetime | None = Field(default=None, sa_type=UtcDateTime)
    conclusion: str | None = Field(default=None, max_length=20)
    conclusion_reason: str | None = None
    stop_conclusion: str | None = Field(default=None, max_length=20)
    stop_reason: str | None = None
    rerun_pending: bool = False
    rerun_from: list[Any] | None = Field(default=None, sa_type=JSON)
    forked_from: str | None = Field(default=None, max_length=40)
    fork_pending: bool = Field(default=False, sa_column_kwargs={"server_default": false()})


class RunFork(Row, table=True):
    """What a run that was forked from another one has of it, and what it has instead.

    `step` None: nothing was kept. `kept` are the steps that were: name, count, and the name of the step that it is
    within or "". `ancestors`: the runs that it comes from, the nearest first. `code` is a commit, `inputs` are parts of
    the event's payload, `patch` is text for the workspace `patched`. `unused` are kept steps that its code did not
    call, `reached` whether it called `step`; both None until it is known.
    """

    __tablename__ = "run_fork"

    run_id: str = Field(primary_key=True, max_length=40, foreign_key="run.id")
    step: str | None = Field(default=None, max_length=256)
    count: int = 1
    ancestors: list[str] = Field(sa_type=JSON)
    kept: list[Any] = Field(sa_type=JSON)
    asked_by: str = Field(max_length=200)
    code: str | None = Field(default=None, max_length=64)
    inputs: dict[str, Any] = Field(sa_type=JSON)
    patch: str | None = None
    patched: str | None = Field(default=None, max_length=128)
    patched_files: list[str] = Field(sa_type=JSON)
    unused: list[Any] | None = Field(default=None, sa_type=JSON)
    reached: bool | None = None


class RunImage(Row, table=True):
    """What the name of an image means in a run: `exact` names it by digest. `asked` is "" for the platform's own."""

    __tablename__ = "run_image"

    run_id: str = Field(primary_key=True, max_length=40, foreign_key="run.id")
    asked: str = Field(primary_key=True, max_length=500)
    name: str = Field(max_length=500)
    exact: str = Field(max_length=600)
    pinned_at: datetime = Field(sa_type=UtcDateTime)


class RunCache(Row, table=True):
    """What one command of a run found of a cache, and why: `hit`, `restored` by a prefix, `miss`; and what it left."""

    __tablename__ = "run_cache"

    id: int | None = Field(default=None, primary_key=True)
    run_id: str = Field(max_length=40, foreign_key="run.id", index=True)
    step: str = Field(max_length=256)
    count: int
    attempt: int
    key: str = Field(max_length=512)
    outcome: str = Field(max_length=20)
    reason: str
    saved: str | None = None
    opened_at: datetime = Field(sa_type=UtcDateTime)


class ArtifactRow(Row, table=True):
    """Files that a run keeps under a name; its folder on disk is called by `id`, below that of the `tenant`.

    `step`, `count`, `attempt` and `run_attempt` (how often the run was started) say who uploaded it. `outside`: a
    fork's pull request did. `size` in bytes of its files, `taken` on disk; `only` is the path of the one file where
    there is no other. A deleted one says why.
    """

    __tablename__ = "artifact"
    __table_args__ = (Index("ix_artifact_repo_name", "repo", "name"),)

    seq: int | None = Field(default=None, primary_key=True)
    id: str = Field(max_length=32, unique=True)
    run_id: str = Field(max_length=40, foreign_key="run.id", index=True)
    repo: str = Field(max_length=200)
    tenant: str = Field(max_length=32)
    name: str = Field(max_length=128)
    step: str = Field(max_length=256)
    count: int
    attempt: int
    run_attempt: int
    outside: bool
    digest: str = Field(max_length=100)
    files: int
    size: int = Field(sa_type=BigInteger)
    taken: int = Field(sa_type=BigInteger)
    only: str | None = None
    created_at: datetime = Field(sa_type=UtcDateTime)
    expires_at: datetime = Field(sa_type=UtcDateTime)
    deleted_at: datetime | None = Field(default=None, sa_type=UtcDateTime)
    why_deleted: str | None = Field(default=None, max_length=200)


class SnapshotImage(Row, table=True):
    """What an install has left of a container, under a key of its repository: an image of this machine."""

    __tablename__ = "snapshot_image"

    repo: str = Field(primary_key=True, max_length=200)
    key: str = Field(primary_key=True, max_length=200)
    exact: str = Field(max_length=100)
    made_at: datetime = Field(sa_type=UtcDateTime)


class Gate(Row, table=True):
    """One opening of a durable wait for an event. Open while neither `decided_at` nor `closed_at` is set.

    `sent_at`: the engine has the event of an approval. `outcome` says why an undecided gate closed.
    """

    __tablename__ = "gate"
    __table_args__ = (UniqueConstraint("run_id", "name", "count", "opened_at"),)

    id: int | None = Field(default=None, primary_key=True)
    run_id: str = Field(max_length=40, foreign_key="run.id", index=True)
    name: str = Field(max_length=256)
    count: int
    event_type: str = Field(max_length=100)
    opened_at: datetime = Field(sa_type=UtcDateTime)
    deadline: datetime | None = Field(default=None, sa_type=UtcDateTime)
    decision: str | None = Field(default=None, max_length=20)
    decided_by: str | None = Field(default=None, max_length=200)
    comment: str | None = None
    decided_at: datetime | None = Field(default=None, sa_type=UtcDateTime)
    sent_at: datetime | None = Field(default=None, sa_type=UtcDateTime)
    closed_at: datetime | None = Field(default=None, sa_type=UtcDateTime)
    outcome: str | None = Field(default=None, max_length=20)


class OutboxRow(Row, table=True):
    """Something to show on a forge. Per `key` in the order of `id`; where several wait, the newest alone.

    `state`: `waiting`, `delivered`, `superseded` (a newer one took its place), `dead` (given up),
    `withheld` (of a what-if run: it is never delivered).
    """

    __tablename__ = "outbox"
    __table_args__ = (Index("ix_outbox_state_key", "state", "key"), Index("ix_outbox_key", "key"))

    id: int | None = Field(default=None, primary_key=True)
    run_id: str = Field(max_length=40, foreign_key="run.id", index=True)
    forge: str = Field(max_length=20)
    kind: str = Field(max_length=20)
    key: str = Field(max_length=100)
    payload: dict[str, Any] = Field(sa_type=JSON)
    state: str = Field(default="waiting", max_length=20)
    created_at: datetime = Field(sa_type=UtcDateTime)
    attempts: int = 0
    next_at: datetime = Field(sa_type=UtcDateTime)
    ended_at: datetime | None = Field(default=None, sa_type=UtcDateTime)
    last_error: str | None = None


class Token(Row, table=True):
    """A bearer token: its SHA-256 alone is kept. `repo` limits it to one repository and what is read of it."""

    __tablename__ = "token"

    id: int | None = Field(default=None, primary_key=True)
    name: str = Field(max_length=100)
    digest: str = Field(max_length=64, unique=True)
    scopes: list[str] = Field(sa_type=JSON)
    created_at: datetime = Field(sa_type=UtcDateTime)
    last_used_at: datetime | None = Field(default=None, sa_type=UtcDateTime)
    revoked_at: datetime | None = Field(default=None, sa_type=UtcDateTime)
    repo: str | None = Field(default=None, max_length=200)
    expires_at: datetime | None = Field(default=None, sa_type=UtcDateTime)


class RefState(Row, table=True):
    """What was last heard of a ref of the local forge. `pushes` counts: no push looks like another."""

    __tablename__ = "ref_state"

    repo: str = Field(primary_key=True, max_length=200, foreign_key="repository.name")
    ref: str = Field(primary_key=True, max_length=1024)
    sha: str | None = Field(default=None, max_length=64)
    pushes: int = 0


class ShownStatus(Row, table=True):
    """A commit status of the local forge, as its page shows it."""

    __tablename__ = "shown_status"

    repo: str = Field(primary_key=True, max_length=200, foreign_key="repository.name")
    sha: str = Field(primary_key=True, max_length=64)
    context: str = Field(primary_key=True, max_length=255)
    state: str = Field(max_length=20)
    description: str = Field(max_length=140)
    target_url: str
    updated_at: datetime = Field(sa_type=UtcDateTime)


class ShownComment(Row, table=True):
    """A pull request's comment in the local forge."""

    __tablename__ = "shown_comment"

    repo: str = Field(primary_key=True, max_length=200, foreign_key="repository.name")
    pr: int = Field(primary_key=True, sa_column_kwargs={"autoincrement": False})
    marker: str = Field(primary_key=True, max_length=255)
    body: str
    updated_at: datetime = Field(sa_type=UtcDateTime)


class Counter(Row, table=True):
    """A number that only grows, such as refused signatures."""

    __tablename__ = "counter"

    name: str = Field(primary_key=True, max_length=100)
    value: int = 0
