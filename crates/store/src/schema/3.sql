-- What the guard did to a response, as JSON; and end users by their hashes.

ALTER TABLE response ADD COLUMN guard TEXT;

CREATE TABLE abuse_user (
    user TEXT PRIMARY KEY,
    state TEXT NOT NULL CHECK (state IN ('clear', 'throttled', 'review', 'banned')),
    changed_ms BIGINT NOT NULL,
    cleared_ms BIGINT NOT NULL,
    note TEXT,
    appeal TEXT,
    appeal_ms BIGINT
);

CREATE TABLE abuse_event (
    id INTEGER PRIMARY KEY,
    user TEXT NOT NULL REFERENCES abuse_user (user),
    response TEXT NOT NULL,
    at_ms BIGINT NOT NULL,
    policy TEXT NOT NULL,
    kind TEXT NOT NULL,
    weight DOUBLE NOT NULL
);
CREATE INDEX abuse_event_user ON abuse_event (user, at_ms);

CREATE TABLE takedown_shingle (
    doc TEXT NOT NULL,
    hash BIGINT NOT NULL,
    PRIMARY KEY (doc, hash)
) WITHOUT ROWID;
