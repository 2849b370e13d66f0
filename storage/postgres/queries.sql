-- Every statement that the server sends, by name. Batches come as one JSON parameter: it costs
-- one encode on our side, and PostgreSQL sees the same statement whatever the batch's size.
-- Times leave as milliseconds since the epoch, whether the column has a time zone or not (the
-- session's is UTC).

-- name: append
-- In another epoch than the one that is named nothing is stored, and there is no row.
SELECT ord, outcome, seq, id, message_id::text, ts, author_email, author_name
FROM chat_append((SELECT %s::json FROM chat_epoch WHERE epoch = %s));

-- name: access
-- Who a Clerk user is, what the channel is to them, and whether they are subscribed. Both the
-- user and the channel may be missing. An employer sponsors chat unless a column
-- `sponsors_chat` of the main application's table says otherwise.
SELECT q.ord, u.id, u.email, coalesce(u.first_name, ''), coalesce(u.last_name, ''),
       coalesce(u.is_active, false), coalesce(u.subscription_status, ''),
       coalesce(e.is_active AND coalesce((to_jsonb(e) ->> 'sponsors_chat')::boolean, true), false),
       (SELECT own.id FROM therapists own WHERE own.user_id = u.id ORDER BY own.id LIMIT 1),
       c.id, c.last_seq, c.therapist_id, t.user_id, c.prospect_user_id
FROM json_to_recordset(%s::json) AS q(ord integer, clerk_id text, channel_id bigint)
LEFT JOIN users u ON u.clerk_id = q.clerk_id
LEFT JOIN employers e ON e.id = u.employer_id
LEFT JOIN chat_channels c ON c.id = q.channel_id
LEFT JOIN therapists t ON t.id = c.therapist_id;

-- name: pages
-- For each: the messages after a cursor, at most so many; so many of the newest where there is no
-- cursor or it is ahead of the channel.
SELECT q.ord, c.last_seq, coalesce(q.after > c.last_seq, false),
       m.seq, m.id, m.message_id::text, m.sender_id, m.client_message_id::text, m.content,
       coalesce(m.author_email, ''), coalesce(m.author_name, ''), m.message_type, m.status, m.ts,
       u.first_name, u.last_name
FROM json_to_recordset(%s::json)
     AS q(ord integer, channel_id bigint, after bigint, size integer, newest integer)
JOIN chat_channels c ON c.id = q.channel_id
LEFT JOIN LATERAL (
    SELECT *, (extract(epoch FROM created_at) * 1000)::bigint AS ts
    FROM chat_messages
    WHERE channel_id = q.channel_id
      AND seq > CASE WHEN q.after <= c.last_seq THEN q.after
                     ELSE greatest(c.last_seq - q.newest, 0) END
    ORDER BY seq LIMIT q.size
) m ON true
LEFT JOIN users u ON u.id = m.sender_id
ORDER BY q.ord, m.seq;

-- name: page_before
-- The page that ends just before a message, named by its id or its UUID; newest first.
SELECT m.seq, m.id, m.message_id::text, m.sender_id, m.client_message_id::text, m.content,
       coalesce(m.author_email, ''), coalesce(m.author_name, ''), m.message_type, m.status,
       (extract(epoch FROM m.created_at) * 1000)::bigint, u.first_name, u.last_name
FROM chat_messages m
LEFT JOIN users u ON u.id = m.sender_id
WHERE m.channel_id = %(channel_id)s AND m.seq < %(before)s
ORDER BY m.seq DESC LIMIT %(size)s;

-- name: seq_of_message
SELECT seq FROM chat_messages
WHERE channel_id = %(channel_id)s
  AND (id = %(id)s::bigint OR message_id = %(message_id)s::uuid);

-- name: heads
-- The channels that have messages which this process has not delivered; or have lost some that it
-- has.
SELECT c.id, c.last_seq
FROM json_each_text(%s::json) AS q(id, head)
JOIN chat_channels c ON c.id = q.id::bigint
WHERE c.last_seq <> q.head::bigint;

-- name: channels_of
SELECT c.id, c.channel_identifier, c.therapist_id, c.prospect_user_id, c.status,
       (extract(epoch FROM c.last_message_at) * 1000)::bigint, c.last_message_preview,
       CASE WHEN t.user_id = %(user_id)s THEN c.therapist_unread ELSE c.prospect_unread END,
       coalesce(t.name, ''), t.title,
       coalesce(p.first_name, ''), coalesce(p.last_name, ''), p.email, c.channel_name
FROM chat_channels c
JOIN therapists t ON t.id = c.therapist_id
JOIN users p ON p.id = c.prospect_user_id
WHERE c.id IN (
    SELECT own.id FROM chat_channels own
    JOIN therapists me ON me.id = own.therapist_id WHERE me.user_id = %(user_id)s
    UNION
    SELECT own.id FROM chat_channels own
    WHERE own.prospect_user_id = %(user_id)s AND %(as_prospect)s)
ORDER BY c.last_message_at DESC NULLS LAST, c.id DESC
LIMIT %(limit)s;

-- name: channel
SELECT c.id, c.channel_identifier, c.therapist_id, c.prospect_user_id, c.status,
       (extract(epoch FROM c.last_message_at) * 1000)::bigint, c.last_message_preview,
       CASE WHEN t.user_id = %(user_id)s THEN c.therapist_unread ELSE c.prospect_unread END,
       coalesce(t.name, ''), t.title,
       coalesce(p.first_name, ''), coalesce(p.last_name, ''), p.email, c.channel_name
FROM chat_channels c
JOIN therapists t ON t.id = c.therapist_id
JOIN users p ON p.id = c.prospect_user_id
WHERE c.id = %(channel_id)s;

-- name: pair
-- The user behind a therapist, and whether the prospect is a user who may have a channel.
SELECT t.user_id, p.id, p.is_active
FROM therapists t CROSS JOIN users p
WHERE t.id = %(therapist_id)s AND p.id = %(prospect_user_id)s;

-- name: create_channel
-- One row: the channel's id, and whether it was made now. Two who ask at once get the same one.
WITH made AS (
    INSERT INTO chat_channels (
        channel_identifier, therapist_id, prospect_user_id, status, channel_name,
        created_at, updated_at)
    VALUES (%(identifier)s, %(therapist_id)s, %(prospect_user_id)s, 'active', %(name)s,
            now(), now())
    ON CONFLICT (therapist_id, prospect_user_id) DO NOTHING
    RETURNING id
)
SELECT id, true FROM made
UNION ALL
SELECT id, false FROM chat_channels
WHERE therapist_id = %(therapist_id)s AND prospect_user_id = %(prospect_user_id)s
LIMIT 1;

-- name: mark_read
UPDATE chat_channels
SET therapist_unread = CASE WHEN %(as_therapist)s THEN 0 ELSE therapist_unread END,
    prospect_unread = CASE WHEN %(as_therapist)s THEN prospect_unread ELSE 0 END
WHERE id = %(channel_id)s
  AND CASE WHEN %(as_therapist)s THEN therapist_unread ELSE prospect_unread END > 0
RETURNING id;

-- name: export_header
SELECT coalesce(t.name, ''), tu.email, coalesce(p.first_name, ''), coalesce(p.last_name, ''),
       p.email, c.last_seq
FROM chat_channels c
JOIN therapists t ON t.id = c.therapist_id
JOIN users tu ON tu.id = t.user_id
JOIN users p ON p.id = c.prospect_user_id
WHERE c.id = %(channel_id)s;

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
DELETE FROM chat_tickets
WHERE digest = %(digest)s
RETURNING subject, session_id, impersonator, extract(epoch FROM session_expires_at)::float8,
          expires_at > now();

-- name: ping
-- Whether PostgreSQL answers, and in which epoch.
SELECT epoch FROM chat_epoch;
