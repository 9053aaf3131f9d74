-- Read by SQLite and by PostgreSQL alike, so only TEXT and BIGINT: flags are 0
-- or 1, times milliseconds since 1970 in UTC, amounts decimal text, `body` JSON.

-- One row. Every change of a team or key takes the next revision.
CREATE TABLE account_revision (one BIGINT PRIMARY KEY CHECK (one = 1), revision BIGINT NOT NULL);
INSERT INTO account_revision VALUES (1, 0);

CREATE TABLE team (
    id TEXT PRIMARY KEY,
    revision BIGINT NOT NULL,
    created_ms BIGINT NOT NULL,
    body TEXT NOT NULL
);
CREATE INDEX team_revision ON team (revision);

CREATE TABLE api_key (
    id TEXT PRIMARY KEY,
    revision BIGINT NOT NULL,
    created_ms BIGINT NOT NULL,
    prefix TEXT NOT NULL,
    hash TEXT NOT NULL UNIQUE,
    -- Set by a rotation: the secret before, good until then.
    old_prefix TEXT,
    old_hash TEXT,
    old_until_ms BIGINT,
    revoked_ms BIGINT,
    body TEXT NOT NULL
);
CREATE INDEX api_key_revision ON api_key (revision);

-- One row: end users are hashed with it.
CREATE TABLE account_salt (one BIGINT PRIMARY KEY CHECK (one = 1), salt TEXT NOT NULL);
