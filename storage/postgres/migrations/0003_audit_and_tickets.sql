-- Who did what, where and when. Rows are added and never changed: the triggers hold for every
-- role, the owner included, and only somebody who may alter the table can get past them.

CREATE TABLE chat_audit (
    id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    at timestamptz NOT NULL DEFAULT clock_timestamp(),
    actor text,                 -- the token's sub; NULL: nobody that we know
    impersonator text,          -- its act.sub
    user_id bigint,
    action text NOT NULL,
    channel_id bigint,          -- no foreign key: the row outlives its channel
    outcome text NOT NULL,
    detail text,
    address inet,
    request_id text NOT NULL
);

CREATE INDEX chat_audit_channel_at ON chat_audit (channel_id, at);
CREATE INDEX chat_audit_actor_at ON chat_audit (actor, at);

CREATE FUNCTION chat_audit_is_append_only() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    RAISE EXCEPTION 'chat_audit is append-only' USING ERRCODE = 'SV002';
END
$$;

CREATE TRIGGER chat_audit_no_change BEFORE UPDATE OR DELETE ON chat_audit
    FOR EACH ROW EXECUTE FUNCTION chat_audit_is_append_only();
CREATE TRIGGER chat_audit_no_truncate BEFORE TRUNCATE ON chat_audit
    FOR EACH STATEMENT EXECUTE FUNCTION chat_audit_is_append_only();

-- One-use tickets for a cross-origin EventSource: the digest only, so that a reader of this
-- table cannot use one.
CREATE TABLE chat_tickets (
    digest bytea PRIMARY KEY,
    subject text NOT NULL,
    session_id text,
    impersonator text,
    session_expires_at timestamptz NOT NULL,
    expires_at timestamptz NOT NULL
);

CREATE INDEX chat_tickets_expires_at ON chat_tickets (expires_at);
