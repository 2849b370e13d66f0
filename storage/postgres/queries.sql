-- Every statement that the server sends, by name. Batches come as one JSON parameter: it costs
-- one encode on our side, and PostgreSQL sees the same statement whatever the batch's size.
-- The main application's tables are reached through functions that `sottovoce migrate` makes for
-- the layout it finds (migrations/repeatable). Every column that leaves is cast: the main
-- application may change a type while we run. Times leave as milliseconds since the epoch, whether
-- the column has a time zone or not.

-- name: append
-- In another epoch than the one that is named nothing is stored, and there is no row.
SELECT ord, outcome, seq, id, message_id::text, ts, author_email, author_name, first_name, last_name
FROM chat_append((SELECT %s::json FROM chat_epoch WHERE epoch = %s));

-- name: access
-- Who a Clerk user is, what the channel is to them, and whether they are subscribed. Both the
-- user and the channel may be missing.
SELECT q.ord, p.user_id, p.email, p.first_name, p.last_name, p.is_active, p.subscription_status,
       p.sponsored, p.therapist_ids[1], c.id::bigint, c.last_seq::bigint,
       coalesce(c.therapist_id = ANY (p.therapist_ids), false),
       coalesce(c.prospect_user_id = p.user_id, false), lower(coalesce(c.status::text, 'active'))
FROM json_to_recordset(%s::json) AS q(ord integer, clerk_id text, channel_id bigint)
LEFT JOIN LATERAL chat_people(q.clerk_id, NULL) p ON true
LEFT JOIN chat_channels c ON c.id = q.channel_id;

-- name: pages
-- For each: the messages after a cursor, at most so many; so many of the newest where there is no
-- cursor or it is ahead of the channel.
SELECT q.ord, c.last_seq::bigint, coalesce(q.after > c.last_seq, false),
       m.seq, m.id, m.message_id, m.sender_id, m.client_message_id, m.content,
       m.author_email, m.author_name, m.first_name, m.last_name, m.message_type, m.status, m.ts
FROM json_to_recordset(%s::json)
     AS q(ord integer, channel_id bigint, after bigint, size integer, newest integer)
JOIN chat_channels c ON c.id = q.channel_id
LEFT JOIN LATERAL (
    SELECT * FROM chat_history(q.channel_id) h
    WHERE h.seq > CASE WHEN q.after <= c.last_seq THEN q.after
                       ELSE greatest(c.last_seq - q.newest, 0) END
    ORDER BY h.seq LIMIT q.size
) m ON true
ORDER BY q.ord, m.seq;

-- name: page_before
-- The page that ends just before a message, named by its number; newest first.
SELECT m.seq, m.id, m.message_id, m.sender_id, m.client_message_id, m.content,
       m.author_email, m.author_name, m.first_name, m.last_name, m.message_type, m.status, m.ts
FROM chat_history(%(channel_id)s::bigint) m
WHERE m.seq < %(before)s::bigint
ORDER BY m.seq DESC LIMIT %(size)s;

-- name: seq_of_message
SELECT seq::bigint FROM chat_messages
WHERE channel_id = %(channel_id)s::bigint
  AND (id = %(id)s::bigint OR message_id = %(message_id)s::uuid);

-- name: heads
-- The channels that have messages which this process has not delivered; or have lost some that it
-- has.
SELECT c.id::bigint, c.last_seq::bigint
FROM json_each_text(%s::json) AS q(id, head)
JOIN chat_channels c ON c.id = q.id::bigint
WHERE c.last_seq <> q.head::bigint;

-- name: channels_of
SELECT c.id, c.identifier, c.therapist_id, c.prospect_user_id, c.status, c.last_message_ms,
       c.last_message_preview,
       CASE WHEN t.user_id = %(user_id)s::bigint THEN c.therapist_unread ELSE c.prospect_unread END,
       coalesce(tp.therapist_name, ''), tp.therapist_title,
       coalesce(p.first_name, ''), coalesce(p.last_name, ''), coalesce(p.email, ''), c.channel_name
FROM (
    SELECT own.id FROM chat_people(NULL, %(user_id)s::bigint) me
    CROSS JOIN LATERAL unnest(me.therapist_ids) AS mine(id)
    JOIN chat_channels own ON own.therapist_id = mine.id
    UNION
    SELECT own.id FROM chat_channels own
    WHERE own.prospect_user_id = %(user_id)s::bigint AND %(as_prospect)s
) own
CROSS JOIN LATERAL chat_channel(own.id) c
LEFT JOIN therapists t ON t.id = c.therapist_id
LEFT JOIN LATERAL chat_people(NULL, t.user_id::bigint) tp ON true
LEFT JOIN LATERAL chat_people(NULL, c.prospect_user_id) p ON true
ORDER BY c.last_message_ms DESC NULLS LAST, c.id DESC
LIMIT %(limit)s;

-- name: channel
SELECT c.id, c.identifier, c.therapist_id, c.prospect_user_id, c.status, c.last_message_ms,
       c.last_message_preview,
       CASE WHEN t.user_id = %(user_id)s::bigint THEN c.therapist_unread ELSE c.prospect_unread END,
       coalesce(tp.therapist_name, ''), tp.therapist_title,
       coalesce(p.first_name, ''), coalesce(p.last_name, ''), coalesce(p.email, ''), c.channel_name
FROM chat_channel(%(channel_id)s::bigint) c
LEFT JOIN therapists t ON t.id = c.therapist_id
LEFT JOIN LATERAL chat_people(NULL, t.user_id::bigint) tp ON true
LEFT JOIN LATERAL chat_people(NULL, c.prospect_user_id) p ON true;

-- name: pair
-- The user behind a therapist, and whether both are people who may have a channel.
SELECT tp.user_id, t.id = ANY (tp.therapist_ids) AND tp.is_active AND p.is_active
FROM therapists t
CROSS JOIN LATERAL chat_people(NULL, t.user_id::bigint) tp
CROSS JOIN LATERAL chat_people(NULL, %(prospect_user_id)s::bigint) p
WHERE t.id = %(therapist_id)s::bigint;

-- name: create_channel
-- One row: the channel's id, and whether it was made now. Two who ask at once get the same one.
SELECT id, made FROM chat_create_channel(
    %(therapist_id)s::bigint, %(prospect_user_id)s::bigint, %(identifier)s::text, %(name)s::text);

-- name: mark_read
SELECT chat_mark_read(%(channel_id)s::bigint, %(as_therapist)s::boolean)::text;

-- name: export_header
SELECT coalesce(tp.therapist_name, ''), coalesce(tp.email, ''),
       coalesce(p.first_name, ''), coalesce(p.last_name, ''), coalesce(p.email, ''),
       c.last_seq::bigint
FROM chat_channels c
LEFT JOIN therapists t ON t.id = c.therapist_id
LEFT JOIN LATERAL chat_people(NULL, t.user_id::bigint) tp ON true
LEFT JOIN LATERAL chat_people(NULL, c.prospect_user_id::bigint) p ON true
WHERE c.id = %(channel_id)s::bigint;

-- name: audit
INSERT INTO chat_audit (
    at, actor, impersonator, user_id, action, channel_id, outcome, detail, address, request_id)
SELECT to_timestamp(q.at / 1000.0), q.actor, q.impersonator, q.user_id, q.action, q.channel_id,
       q.outcome, q.detail, q.address, q.request_id
FROM json_to_recordset(%s::json) AS q(
    at bigint, actor text, impersonator text, user_id bigint, action text, channel_id bigint,
    outcome text, detail text, address inet, request_id text)
RETURNING id;

-- name: issue_ticket
WITH swept AS (DELETE FROM chat_tickets WHERE expires_at < now())
INSERT INTO chat_tickets (
    digest, subject, session_id, impersonator, session_expires_at, expires_at)
VALUES (%(digest)s, %(subject)s, %(session_id)s, %(impersonator)s,
        to_timestamp(%(session_expires_at)s), now() + %(seconds)s * interval '1 second')
RETURNING 1;

-- name: redeem_ticket
-- The first use binds a ticket to a channel. After it the ticket opens that channel alone, until its
-- session's lease ends. Safe to repeat: a lost answer costs nobody their ticket.
UPDATE chat_tickets
SET channel_id = %(channel_id)s,
    expires_at = CASE WHEN channel_id IS NULL
        THEN session_expires_at + %(lease)s * interval '1 second' ELSE expires_at END
WHERE digest = %(digest)s AND expires_at > now()
  AND (channel_id = %(channel_id)s OR (channel_id IS NULL AND session_expires_at > now()))
RETURNING subject, session_id, impersonator, extract(epoch FROM session_expires_at)::float8;

-- name: ping
-- Whether PostgreSQL answers, and in which epoch.
SELECT epoch FROM chat_epoch;

-- name: applied
-- The numbers of the migrations that this database has.
SELECT number::integer FROM chat_migrations;

-- name: catalog
-- What the database says of the tables, columns, indexes, triggers and functions that we use, and
-- what the current role may do with them: one JSON value (storage/postgres/catalog.py).
WITH named AS (
    SELECT name, to_regclass(name) AS oid FROM unnest(ARRAY[
        'users', 'therapists', 'employers', 'sponsored_groups', 'sponsored_group_members',
        'chat_channels', 'chat_messages', 'chat_audit', 'chat_tickets', 'chat_epoch',
        'chat_migrations']) AS name
)
SELECT json_build_object(
    'encoding', (SELECT pg_encoding_to_char(encoding) FROM pg_database
                 WHERE datname = current_database()),
    'version', current_setting('server_version_num')::integer,
    'read_only', current_setting('transaction_read_only') = 'on',
    'schemas', to_json(current_schemas(false)),
    'may_create', coalesce(has_schema_privilege(current_schema(), 'CREATE'), false),
    'tables', (SELECT coalesce(json_object_agg(n.name, json_build_object(
        'owned', pg_has_role(r.relowner, 'USAGE'),
        'may', json_build_object(
            'select', has_table_privilege(n.oid, 'SELECT'),
            'insert', has_table_privilege(n.oid, 'INSERT'),
            'update', has_table_privilege(n.oid, 'UPDATE'),
            'delete', has_table_privilege(n.oid, 'DELETE')),
        'columns', (SELECT json_object_agg(a.attname, json_build_object(
                'type', format_type(CASE WHEN t.typtype = 'd' THEN t.typbasetype ELSE t.oid END,
                                    NULL),
                'length', CASE WHEN t.typname IN ('varchar', 'bpchar') AND a.atttypmod > 4
                               THEN a.atttypmod - 4 END,
                'labels', (SELECT json_agg(e.enumlabel ORDER BY e.enumsortorder)
                           FROM pg_enum e WHERE e.enumtypid = t.oid),
                'not_null', a.attnotnull,
                'filled', a.atthasdef OR a.attidentity <> '' OR a.attgenerated <> '',
                'may_select', has_column_privilege(n.oid, a.attnum, 'SELECT'),
                'may_insert', has_column_privilege(n.oid, a.attnum, 'INSERT'),
                'may_update', has_column_privilege(n.oid, a.attnum, 'UPDATE')))
            FROM pg_attribute a JOIN pg_type t ON t.oid = a.atttypid
            WHERE a.attrelid = n.oid AND a.attnum > 0 AND NOT a.attisdropped),
        'indexes', (SELECT coalesce(json_agg(json_build_object(
                'name', i.indexrelid::regclass::text, 'unique', i.indisunique,
                'valid', i.indisvalid, 'partial', i.indpred IS NOT NULL,
                'columns', (SELECT coalesce(json_agg(a.attname ORDER BY k.place), '[]')
                            FROM unnest(i.indkey[0:i.indnkeyatts - 1])
                                 WITH ORDINALITY AS k(attnum, place)
                            JOIN pg_attribute a
                              ON a.attrelid = i.indrelid AND a.attnum = k.attnum))), '[]')
            FROM pg_index i WHERE i.indrelid = n.oid),
        'triggers', (SELECT coalesce(json_agg(g.tgname), '[]') FROM pg_trigger g
                     WHERE g.tgrelid = n.oid AND NOT g.tgisinternal AND g.tgenabled IN ('O', 'A')))),
        '{}') FROM named n JOIN pg_class r ON r.oid = n.oid),
    'functions', (SELECT coalesce(json_object_agg(f.proname, json_build_object(
        'comment', coalesce(obj_description(f.oid, 'pg_proc'), ''),
        'body', md5(f.prosrc),
        'owned', pg_has_role(f.proowner, 'USAGE'),
        'arguments', pg_get_function_identity_arguments(f.oid),
        'may_execute', has_function_privilege(f.oid, 'EXECUTE'))), '{}')
        FROM pg_proc f WHERE f.pronamespace = ANY (
            SELECT oid FROM pg_namespace WHERE nspname = ANY (current_schemas(false)))
          AND f.proname IN ('chat_people', 'chat_history', 'chat_channel', 'chat_create_channel',
            'chat_mark_read', 'chat_append', 'chat_number_message', 'chat_count_message',
            'chat_audit_is_append_only'))
)::text;

-- name: holders
-- What `sottovoce grants` needs to know besides the catalog: one JSON value
-- (storage/postgres/grants.py).
WITH named AS (
    SELECT name, to_regclass(name) AS oid
    FROM unnest(ARRAY['users', 'therapists', 'chat_channels', 'chat_messages']) AS name
)
SELECT json_build_object(
    'database', current_database(),
    'schema', current_schema(),
    'owners', (SELECT coalesce(json_object_agg(n.name, pg_get_userbyid(r.relowner)), '{}')
               FROM named n JOIN pg_class r ON r.oid = n.oid),
    'superusers', (SELECT json_agg(rolname) FROM pg_roles WHERE rolsuper),
    'roles', (SELECT json_agg(rolname) FROM pg_roles),
    'sequences', (SELECT coalesce(json_agg(DISTINCT s.oid::regclass::text), '[]')
        FROM named n
        JOIN pg_attrdef a ON a.adrelid = n.oid
        JOIN pg_depend d ON d.classid = 'pg_attrdef'::regclass AND d.objid = a.oid
        JOIN pg_class s ON s.oid = d.refobjid AND s.relkind = 'S'
        WHERE n.name IN ('chat_channels', 'chat_messages')),
    'triggers', (SELECT coalesce(json_agg(DISTINCT p.oid::regprocedure::text), '[]')
        FROM named n
        JOIN pg_trigger g ON g.tgrelid = n.oid AND NOT g.tgisinternal AND g.tgenabled IN ('O', 'A')
        JOIN pg_proc p ON p.oid = g.tgfoid AND NOT p.prosecdef
        WHERE n.name IN ('chat_channels', 'chat_messages'))
)::text;
