"""The runs that have not ended are found without looking at all others."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0008"
down_revision = "0007"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Go forward."""
    still_open = sa.text("conclusion IS NULL")
    op.create_index("ix_run_open", "run", ["id"], sqlite_where=still_open, postgresql_where=still_open)
