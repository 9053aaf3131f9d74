-- A process that admits requests. Its reservations are its own until its lease
-- ends; then anyone settles them.
CREATE TABLE replica (
    id TEXT PRIMARY KEY,
    started_ms BIGINT NOT NULL,
    lease_until_ms BIGINT NOT NULL
);

CREATE TABLE reservation (
    id TEXT PRIMARY KEY,
    replica TEXT NOT NULL,
    body TEXT NOT NULL
);
CREATE INDEX reservation_replica ON reservation (replica);

-- What of a limit one replica has spent and what it has claimed: what is spent
-- and what it may admit without asking. The empty replica is all the dead ones.
CREATE TABLE counter (
    limit_id TEXT NOT NULL,
    start_ms BIGINT NOT NULL,
    replica TEXT NOT NULL,
    end_ms BIGINT,
    spent TEXT NOT NULL,
    claimed TEXT NOT NULL,
    PRIMARY KEY (limit_id, start_ms, replica)
);
CREATE INDEX counter_replica ON counter (replica);
CREATE INDEX counter_end ON counter (end_ms);

CREATE TABLE price_list (
    version TEXT PRIMARY KEY,
    body TEXT NOT NULL,
    first_used_ms BIGINT NOT NULL
);

-- One row a settled request, never changed. Costs are picos (10^-12) of the
-- currency; durations microseconds.
CREATE TABLE usage (
    id TEXT PRIMARY KEY,
    attempt_of TEXT,
    api_key TEXT,
    team TEXT,
    end_user TEXT,
    tags TEXT NOT NULL,
    model TEXT NOT NULL,
    adapter TEXT,
    release TEXT,
    backend TEXT NOT NULL,
    endpoint TEXT NOT NULL,
    stream BIGINT NOT NULL,
    at_ms BIGINT NOT NULL,
    settled_ms BIGINT NOT NULL,
    input BIGINT NOT NULL,
    cache_read BIGINT NOT NULL,
    cache_write BIGINT NOT NULL,
    output BIGINT NOT NULL,
    reasoning BIGINT NOT NULL,
    counts TEXT NOT NULL CHECK (counts IN ('measured', 'estimated')),
    machine_us BIGINT NOT NULL,
    cost BIGINT,
    cost_input BIGINT,
    cost_cache_read BIGINT,
    cost_cache_write BIGINT,
    cost_output BIGINT,
    cost_reasoning BIGINT,
    cost_machine BIGINT,
    currency TEXT,
    no_cost_reason TEXT,
    price_version TEXT,
    queue_us BIGINT NOT NULL,
    ttft_us BIGINT,
    total_us BIGINT NOT NULL,
    finish TEXT NOT NULL,
    error TEXT,
    refusal BIGINT NOT NULL,
    guard TEXT
);
CREATE INDEX usage_at ON usage (at_ms, id);
CREATE INDEX usage_key ON usage (api_key, at_ms);
