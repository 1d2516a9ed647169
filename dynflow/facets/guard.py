"""What SQL of tenants may do: SQLite asks here, while it compiles a statement, about each thing that it would do.

Everything is a list of what is allowed; what a later SQLite brings is refused until it stands here. Stdlib only.
"""

from __future__ import annotations

import sqlite3
import sys


def _names(*lines: str) -> frozenset[str]:
    return frozenset(" ".join(lines).split())


_PLAIN = frozenset(
    {
        sqlite3.SQLITE_ALTER_TABLE,
        sqlite3.SQLITE_CREATE_INDEX,
        sqlite3.SQLITE_CREATE_TABLE,
        sqlite3.SQLITE_CREATE_TRIGGER,
        sqlite3.SQLITE_CREATE_VIEW,
        sqlite3.SQLITE_DELETE,
        sqlite3.SQLITE_DROP_INDEX,
        sqlite3.SQLITE_DROP_TABLE,
        sqlite3.SQLITE_DROP_TRIGGER,
        sqlite3.SQLITE_DROP_VIEW,
        sqlite3.SQLITE_INSERT,
        sqlite3.SQLITE_READ,
        sqlite3.SQLITE_RECURSIVE,
        sqlite3.SQLITE_REINDEX,
        sqlite3.SQLITE_SELECT,
        sqlite3.SQLITE_UPDATE,
    }
)
# `CREATE TABLE temp.t` is no temporary table to SQLite; ALTER TABLE looks at the temporary schema by itself.
_CREATING = frozenset(
    {
        sqlite3.SQLITE_CREATE_INDEX,
        sqlite3.SQLITE_CREATE_TABLE,
        sqlite3.SQLITE_CREATE_TRIGGER,
        sqlite3.SQLITE_CREATE_VIEW,
    }
)
_NAMES = {
    sqlite3.SQLITE_ANALYZE: "ANALYZE",
    sqlite3.SQLITE_ATTACH: "ATTACH",
    sqlite3.SQLITE_CREATE_TEMP_INDEX: "temporary indexes",
    sqlite3.SQLITE_CREATE_TEMP_TABLE: "temporary tables",
    sqlite3.SQLITE_CREATE_TEMP_TRIGGER: "temporary triggers",
    sqlite3.SQLITE_CREATE_TEMP_VIEW: "temporary views",
    sqlite3.SQLITE_CREATE_VTABLE: "virtual tables",
    sqlite3.SQLITE_DETACH: "DETACH",
    sqlite3.SQLITE_DROP_VTABLE: "virtual tables",
    sqlite3.SQLITE_SAVEPOINT: "SAVEPOINT: use batch",
    sqlite3.SQLITE_TRANSACTION: "BEGIN, COMMIT and ROLLBACK: use batch",
}
_PRAGMAS = _names(
    "defer_foreign_keys foreign_key_check foreign_key_list freelist_count index_info index_list index_xinfo",
    "integrity_check page_count quick_check table_info table_list table_xinfo user_version",
)
# Tables that are there without having been made: they show pages and statements as SQLite has them.
_HIDDEN = _names(
    "bytecode completion dbstat fts3tokenize sqlite_dbpage sqlite_memstat sqlite_stmt tables_used"
)
# Functions of expressions, aggregates, windows, dates, JSON and mathematics. Not among them, for example:
# load_extension, fts3_tokenizer (takes pointers), sqlite_offset, sqlite_compileoption_get.
_FUNCTIONS = _names(
    # operators are functions here, too
    "like glob -> ->>",
    "abs changes char coalesce concat concat_ws format hex if ifnull iif instr last_insert_rowid length likely",
    "likelihood lower ltrim max min nullif octet_length printf quote random randomblob replace round rtrim sign",
    "soundex substr substring total_changes trim typeof unhex unicode unlikely upper zeroblob sqlite_version raise",
    "avg count group_concat string_agg sum total",
    "row_number rank dense_rank percent_rank cume_dist ntile lag lead first_value last_value nth_value",
    "current_date current_time current_timestamp date time datetime julianday unixepoch strftime timediff",
    "json json_array json_array_length json_error_position json_extract json_group_array json_group_object",
    "json_insert json_object json_patch json_pretty json_quote json_remove json_replace json_set json_type",
    "json_valid jsonb jsonb_array jsonb_extract jsonb_group_array jsonb_group_object jsonb_insert jsonb_object",
    "jsonb_patch jsonb_remove jsonb_replace jsonb_set",
    "acos acosh asin asinh atan atan2 atanh ceil ceiling cos cosh degrees exp floor ln log log10 log2 mod pi pow",
    "power radians sin sinh sqrt tan tanh trunc",
    # what ALTER TABLE is made of; SQLite answers nobody else
    "sqlite_add_constraint sqlite_drop_column sqlite_drop_constraint sqlite_fail sqlite_find_constraint",
    "sqlite_rename_column sqlite_rename_quotefix sqlite_rename_table sqlite_rename_test",
)

_LIMITS = {
    sqlite3.SQLITE_LIMIT_ATTACHED: 0,
    sqlite3.SQLITE_LIMIT_COLUMN: 500,
    sqlite3.SQLITE_LIMIT_COMPOUND_SELECT: 50,
    sqlite3.SQLITE_LIMIT_EXPR_DEPTH: 100,
    sqlite3.SQLITE_LIMIT_FUNCTION_ARG: 100,
    # LIKE looks at each character for each part of its pattern, in one go that nothing interrupts.
    sqlite3.SQLITE_LIMIT_LIKE_PATTERN_LENGTH: 1_000,
    sqlite3.SQLITE_LIMIT_TRIGGER_DEPTH: 20,
    sqlite3.SQLITE_LIMIT_VARIABLE_NUMBER: 1_000,
    sqlite3.SQLITE_LIMIT_VDBE_OP: 100_000,
    sqlite3.SQLITE_LIMIT_WORKER_THREADS: 0,
}


class Guard:
    """The authorizer of one connection. `refused` says what the last statement wanted that is not allowed.

    While `trusted`, it is the worker's own SQL, and everything is.
    """

    def __init__(self, db: sqlite3.Connection, value: int, sql: int) -> None:
        self.trusted = True
        self.refused: str | None = None
        if sys.version_info >= (3, 12):
            db.setconfig(sqlite3.SQLITE_DBCONFIG_DEFENSIVE, True)  # noqa: FBT003 - takes it by position alone
        limits = {**_LIMITS, sqlite3.SQLITE_LIMIT_LENGTH: value, sqlite3.SQLITE_LIMIT_SQL_LENGTH: sql}
        for which, limit in limits.items():
            db.setlimit(which, limit)
        db.set_authorizer(self._asked)

    def _asked(
        self, action: int, first: str | None, second: str | None, database: str | None, _inner: str | None
    ) -> int:
        if self.trusted:
            return sqlite3.SQLITE_OK
        refused = _refusal(action, (first or "").lower(), (second or "").lower())
        if refused is None and database == "temp" and action in _CREATING:
            refused = "temporary tables"
        if refused is None:
            return sqlite3.SQLITE_OK
        self.refused = self.refused or refused
        return sqlite3.SQLITE_DENY


def _refusal(action: int, first: str, second: str) -> str | None:
    """Return what is refused, None for what is allowed."""
    if action == sqlite3.SQLITE_FUNCTION:
        return None if second in _FUNCTIONS else f"the function {second}()"
    if action == sqlite3.SQLITE_PRAGMA:
        return None if first in _PRAGMAS else f"PRAGMA {first}"
    if action not in _PLAIN:
        return _NAMES.get(action, f"this (action {action})")
    if first.startswith("pragma_") and first.removeprefix("pragma_") not in _PRAGMAS:
        return f"the table {first}"
    if first in _HIDDEN or (first.startswith("sqlite_stat") and action != sqlite3.SQLITE_READ):
        return f"the table {first}"
    return None
