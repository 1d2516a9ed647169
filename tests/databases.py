"""Real databases for tests: SQLite always, Postgres where DYNFLOW_TEST_POSTGRES_URL names a server."""

from __future__ import annotations

import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from sqlalchemy import create_engine, make_url, text

DATABASES = ["sqlite", pytest.param("postgres", marks=pytest.mark.postgres)]


@contextmanager
def database(kind: str, folder: Path) -> Iterator[str]:
    """Yield the URL of an empty database of this kind."""
    if kind == "sqlite":
        yield f"sqlite:///{folder / 'platform.db'}"
        return
    url = os.environ.get("DYNFLOW_TEST_POSTGRES_URL")
    if not url:
        pytest.skip("DYNFLOW_TEST_POSTGRES_URL names no server")
    name = f"dynflow_{uuid.uuid4().hex}"
    server = create_engine(url, isolation_level="AUTOCOMMIT")
    with server.connect() as connection:
        connection.execute(text(f"CREATE DATABASE {name}"))
    try:
        yield make_url(url).set(database=name).render_as_string(hide_password=False)
    finally:
        with server.connect() as connection:
            connection.execute(text(f"DROP DATABASE {name} WITH (FORCE)"))
        server.dispose()
