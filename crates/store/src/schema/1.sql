-- Digests are text ("sha256:<hex>"), times are milliseconds since 1970 in UTC.
-- For PostgreSQL read BYTEA for BLOB and DOUBLE PRECISION for DOUBLE.

CREATE TABLE artifact (
    digest TEXT PRIMARY KEY,
    kind TEXT NOT NULL,
    name TEXT NOT NULL,
    form TEXT NOT NULL CHECK (form IN ('file', 'folder')),
    bytes BIGINT NOT NULL,
    created_ms BIGINT NOT NULL
);

CREATE TABLE run (
    id TEXT PRIMARY KEY,
    key TEXT NOT NULL,
    name TEXT NOT NULL,
    settings TEXT NOT NULL,
    code TEXT NOT NULL,
    host TEXT NOT NULL,
    state TEXT NOT NULL CHECK (state IN ('running', 'finished', 'failed', 'interrupted')),
    started_ms BIGINT NOT NULL,
    ended_ms BIGINT,
    seconds DOUBLE,
    summary TEXT,
    error TEXT
);
CREATE INDEX run_key ON run (key, state);

CREATE TABLE run_input (
    run TEXT NOT NULL REFERENCES run (id),
    role TEXT NOT NULL,
    artifact TEXT NOT NULL,
    PRIMARY KEY (run, role, artifact)
);
CREATE INDEX run_input_artifact ON run_input (artifact);

CREATE TABLE run_output (
    run TEXT NOT NULL REFERENCES run (id),
    role TEXT NOT NULL,
    artifact TEXT NOT NULL REFERENCES artifact (digest),
    PRIMARY KEY (run, role)
);
CREATE INDEX run_output_artifact ON run_output (artifact);

CREATE TABLE exposure (
    artifact TEXT NOT NULL,
    doc TEXT NOT NULL,
    run TEXT NOT NULL REFERENCES run (id),
    samples BIGINT NOT NULL,
    PRIMARY KEY (artifact, doc, run)
);
CREATE INDEX exposure_doc ON exposure (doc);
CREATE INDEX exposure_run ON exposure (run);

CREATE TABLE observation (
    doc TEXT NOT NULL,
    source TEXT NOT NULL,
    id TEXT NOT NULL,
    title TEXT NOT NULL,
    licence TEXT,
    consent TEXT NOT NULL,
    lang TEXT,
    seen_ms BIGINT NOT NULL,
    PRIMARY KEY (doc, source, id)
);
CREATE INDEX observation_id ON observation (id);

CREATE TABLE sibling (
    doc TEXT NOT NULL,
    representative TEXT NOT NULL,
    PRIMARY KEY (doc, representative)
);

CREATE TABLE release (
    seq BIGINT PRIMARY KEY,
    id TEXT NOT NULL UNIQUE,
    channel TEXT NOT NULL,
    model TEXT NOT NULL REFERENCES artifact (digest),
    statement TEXT NOT NULL REFERENCES artifact (digest),
    adapter TEXT,
    snapshot TEXT,
    evaluation TEXT,
    created_ms BIGINT NOT NULL
);

CREATE TABLE takedown (
    doc TEXT PRIMARY KEY,
    via TEXT,
    reason TEXT NOT NULL,
    at_ms BIGINT NOT NULL
);

CREATE TABLE response (
    id TEXT PRIMARY KEY,
    session TEXT NOT NULL,
    release TEXT,
    model TEXT NOT NULL,
    backend TEXT NOT NULL,
    endpoint TEXT NOT NULL,
    at_ms BIGINT NOT NULL,
    seed BIGINT,
    stream BOOLEAN NOT NULL,
    settled_ms BIGINT,
    finish TEXT,
    prompt_tokens BIGINT,
    cached_tokens BIGINT,
    completion_tokens BIGINT,
    queue_ms DOUBLE,
    ttft_ms DOUBLE,
    total_ms DOUBLE,
    cost DOUBLE,
    refusal BOOLEAN,
    answer TEXT,
    error TEXT
);
CREATE INDEX response_release ON response (release);
CREATE INDEX response_at ON response (at_ms);
CREATE INDEX response_open ON response (session) WHERE finish IS NULL;

CREATE TABLE log_entry (
    seq BIGINT PRIMARY KEY,
    kind TEXT NOT NULL,
    subject TEXT NOT NULL,
    body BLOB NOT NULL
);
CREATE INDEX log_entry_subject ON log_entry (kind, subject);

CREATE TABLE log_root (
    one BIGINT PRIMARY KEY CHECK (one = 1),
    size BIGINT NOT NULL,
    root TEXT NOT NULL
);
