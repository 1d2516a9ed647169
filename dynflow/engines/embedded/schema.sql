-- The embedded engine's schema as it is now. Times are microseconds since the epoch; payloads are encoded values.
-- Rows of one instance lie together: the key of a step or of a history row is the instance's key times 2^24
-- plus its number in the instance, so that one B-tree serves as table and as index.

CREATE TABLE instances (
    key         INTEGER PRIMARY KEY,
    workflow    TEXT NOT NULL,
    id          TEXT NOT NULL,
    tenant      TEXT NOT NULL,
    status      TEXT NOT NULL,
    rank        INTEGER,            -- place in the queue, while queued
    events      INTEGER NOT NULL DEFAULT 0,  -- number of the last history event, as of the last claim while it runs
    size        INTEGER NOT NULL DEFAULT 0,  -- bytes of steps, events and history, roughly: what the state limit counts
    wake_at     INTEGER,            -- earliest deadline, while waiting
    paused_at   INTEGER,
    created_at  INTEGER NOT NULL,
    started_at  INTEGER,            -- first claim since it was created or restarted
    ended_at    INTEGER,
    expires_at  INTEGER,            -- once it has ended: when the sweep deletes it
    code        TEXT,               -- digest of the pinned code
    ending      TEXT,               -- 'terminated' while the rollback of a terminated instance goes on
    params      BLOB,               -- NULL where they are in `inputs`
    retention   BLOB,               -- NULL: the engine's
    output      BLOB,
    failure     BLOB,
    rollback    BLOB,               -- how the rollback ended
    started_event INTEGER,          -- number of the history event that `started_at` was, where the row itself says it
    ended_event INTEGER,            -- the same of `ended_at`
    UNIQUE (workflow, id, tenant)
);
CREATE INDEX instances_queue ON instances (workflow, tenant, rank) WHERE status = 'queued';
CREATE INDEX instances_wake ON instances (wake_at) WHERE wake_at IS NOT NULL;
CREATE INDEX instances_live ON instances (status) WHERE status IN ('running', 'waiting_for_pause');
CREATE INDEX instances_expiring ON instances (expires_at) WHERE expires_at IS NOT NULL;
CREATE INDEX instances_code ON instances (code) WHERE code IS NOT NULL;

-- What is too large to be written anew with each change of the instance's row, or rare.
CREATE TABLE inputs (
    key         INTEGER PRIMARY KEY REFERENCES instances (key) ON DELETE CASCADE,
    params      BLOB NOT NULL,
    schedule    BLOB
);

CREATE TABLE steps (
    step        INTEGER PRIMARY KEY,  -- instance key * 2^24 + order of start
    kind        TEXT NOT NULL,
    name        TEXT NOT NULL,
    count       INTEGER NOT NULL,
    state       TEXT NOT NULL,
    attempt     INTEGER NOT NULL,
    config      BLOB,
    started_at  INTEGER NOT NULL,
    attempt_at  INTEGER NOT NULL,
    ended_at    INTEGER,
    deadline    INTEGER,
    event_type  TEXT,
    started_event INTEGER,  -- number of the history event that its start was, where the row itself says it
    ended_event INTEGER,    -- the same of its end
    failure     BLOB,
    output      BLOB        -- can be large, and is behind what is read without it
);
CREATE INDEX steps_awaiting ON steps (event_type, step) WHERE state = 'waiting' AND event_type IS NOT NULL;

-- Attempts that did not succeed. The last attempt of a step is in its row of `steps`.
CREATE TABLE attempts (
    step        INTEGER NOT NULL,
    number      INTEGER NOT NULL,
    started_at  INTEGER NOT NULL,
    ended_at    INTEGER,
    failure     BLOB,
    retry_at    INTEGER,
    PRIMARY KEY (step, number)
);

CREATE TABLE events (
    event       INTEGER PRIMARY KEY AUTOINCREMENT,
    instance    INTEGER NOT NULL REFERENCES instances (key) ON DELETE CASCADE,
    type        TEXT NOT NULL,
    payload     BLOB NOT NULL,
    sent_at     INTEGER NOT NULL
);
CREATE INDEX events_waiting ON events (instance, type, event);

-- What no other row says: see `history.py`.
CREATE TABLE history (
    event       INTEGER PRIMARY KEY,  -- instance key * 2^24 + number in the instance
    at          INTEGER NOT NULL,
    type        TEXT NOT NULL,
    data        TEXT NOT NULL         -- JSON
);

CREATE TABLE code (
    digest      TEXT PRIMARY KEY,
    modules     BLOB NOT NULL
);
