"""Repositories that a repository's runs may have as submodules."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0005"
down_revision = "0004"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Go forward."""
    op.add_column("repository", sa.Column("reads", sa.JSON(), server_default="[]", nullable=False))
