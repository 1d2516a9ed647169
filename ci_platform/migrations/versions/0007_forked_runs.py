"""Runs that are forked from others."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0007"
down_revision = "0006"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Go forward."""
    with op.batch_alter_table("run") as table:
        table.add_column(sa.Column("forked_from", sa.String(length=40), nullable=True))
        table.add_column(sa.Column("fork_pending", sa.Boolean(), server_default=sa.false(), nullable=False))
    op.create_index("ix_run_forked_from", "run", ["forked_from"])
    op.create_table(
        "run_fork",
        sa.Column("run_id", sa.String(length=40), nullable=False),
        sa.Column("step", sa.String(length=256), nullable=True),
        sa.Column("count", sa.Integer(), nullable=False),
        sa.Column("ancestors", sa.JSON(), nullable=False),
        sa.Column("kept", sa.JSON(), nullable=False),
        sa.Column("asked_by", sa.String(length=200), nullable=False),
        sa.Column("code", sa.String(length=64), nullable=True),
        sa.Column("inputs", sa.JSON(), nullable=False),
        sa.Column("patch", sa.String(), nullable=True),
        sa.Column("patched", sa.String(length=128), nullable=True),
        sa.Column("patched_files", sa.JSON(), nullable=False),
        sa.Column("unused", sa.JSON(), nullable=True),
        sa.Column("reached", sa.Boolean(), nullable=True),
        sa.ForeignKeyConstraint(["run_id"], ["run.id"], name=op.f("fk_run_fork_run_id_run")),
        sa.PrimaryKeyConstraint("run_id", name=op.f("pk_run_fork")),
    )
