-- One unique index serves both ways to find an instance; small params and the retention lie in the instance's
-- row; keys are counted in memory; the fence is in memory too. What a step's row says is not in `history` again.

CREATE TABLE instances_2 (
    key         INTEGER PRIMARY KEY,
    workflow    TEXT NOT NULL,
    id          TEXT NOT NULL,
    tenant      TEXT NOT NULL,
    status      TEXT NOT NULL,
    rank        INTEGER,
    events      INTEGER NOT NULL DEFAULT 0,
    size        INTEGER NOT NULL DEFAULT 0,
    wake_at     INTEGER,
    paused_at   INTEGER,
    created_at  INTEGER NOT NULL,
    started_at  INTEGER,
    ended_at    INTEGER,
    expires_at  INTEGER,
    code        TEXT,
    ending      TEXT,
    params      BLOB,
    retention   BLOB,
    output      BLOB,
    failure     BLOB,
    rollback    BLOB,
    UNIQUE (workflow, id, tenant)
);
INSERT INTO instances_2
    SELECT key, workflow, id, tenant, status, rank, events, size, wake_at, paused_at, created_at, started_at,
        ended_at, expires_at, code, ending,
        CASE WHEN schedule IS NULL AND length(params) <= 512 THEN params END,
        retention, output, failure, rollback
    FROM instances JOIN inputs USING (key);
CREATE TABLE inputs_2 (
    key         INTEGER PRIMARY KEY REFERENCES instances (key) ON DELETE CASCADE,
    params      BLOB NOT NULL,
    schedule    BLOB
);
INSERT INTO inputs_2 SELECT key, params, schedule FROM inputs WHERE schedule IS NOT NULL OR length(params) > 512;
DROP TABLE inputs;
DROP TABLE instances;
ALTER TABLE instances_2 RENAME TO instances;
ALTER TABLE inputs_2 RENAME TO inputs;
CREATE INDEX instances_queue ON instances (workflow, tenant, rank) WHERE status = 'queued';
CREATE INDEX instances_wake ON instances (wake_at) WHERE wake_at IS NOT NULL;
CREATE INDEX instances_live ON instances (status) WHERE status IN ('running', 'waiting_for_pause');
CREATE INDEX instances_expiring ON instances (expires_at) WHERE expires_at IS NOT NULL;
CREATE INDEX instances_code ON instances (code) WHERE code IS NOT NULL;

CREATE TABLE steps_2 (
    step        INTEGER PRIMARY KEY,
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
    started_event INTEGER,
    ended_event INTEGER,
    failure     BLOB,
    output      BLOB
);
INSERT INTO steps_2
    SELECT step, kind, name, count, state, attempt, config, started_at, attempt_at, ended_at, deadline, event_type,
        NULL, NULL, failure, output
    FROM steps;
DROP TABLE steps;
ALTER TABLE steps_2 RENAME TO steps;
CREATE INDEX steps_awaiting ON steps (event_type, step) WHERE state = 'waiting' AND event_type IS NOT NULL;
-- The first event of every instance: it was queued when it was created.
DELETE FROM history WHERE event & 0xFFFFFF = 1;
