"""A process that opens an engine's file and kills itself before a chosen statement of the migration.

Arguments: file, folder of migrations, the version that they lead to, number of the statement (0: never).
The number of the statement that commits it is printed.
"""

from __future__ import annotations

import os
import signal
import sqlite3
import sys
from pathlib import Path
from typing import Any

from dynflow.engines.embedded import database

file, migrations, version, number = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])
connect = sqlite3.connect
statements: list[str] = []


def traced(*args: Any, **options: Any) -> sqlite3.Connection:
    """Connect; count statements from the beginning of the first transaction on."""
    db: sqlite3.Connection = connect(*args, **options)

    def count_and_kill(sql: str) -> None:
        if statements or sql.startswith("BEGIN"):
            statements.append(sql)
            if len(statements) == number:
                os.kill(os.getpid(), signal.SIGKILL)

    db.set_trace_callback(count_and_kill)
    return db


sqlite3.connect = traced  # type: ignore[assignment]
database.SCHEMA_VERSION = version
opened = database.Database(file, "FULL", migrations)
print(statements.index("COMMIT") + 1)  # noqa: T201 - read by the test
opened.close()
