"""Images of runs, by digest."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Go forward."""
    op.create_table(
        "run_image",
        sa.Column("run_id", sa.String(length=40), nullable=False),
        sa.Column("asked", sa.String(length=500), nullable=False),
        sa.Column("name", sa.String(length=500), nullable=False),
        sa.Column("exact", sa.String(length=600), nullable=False),
        sa.Column("pinned_at", sa.DateTime(timezone=True), nullable=False),
        sa.ForeignKeyConstraint(["run_id"], ["run.id"], name=op.f("fk_run_image_run_id")),
        sa.PrimaryKeyConstraint("run_id", "asked", name=op.f("pk_run_image")),
    )
