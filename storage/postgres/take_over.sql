-- The statements that number the messages which are there when `sottovoce migrate` comes. `@names@`
-- stand for what differs between layouts, as in migrations/repeatable.

-- name: unnumbered
-- The channels whose messages are not all numbered, and how many messages that are.
SELECT c.id::bigint, count(m.id)
FROM chat_channels c
LEFT JOIN chat_messages m ON m.channel_id = c.id AND m.seq IS NULL
WHERE c.last_seq IS NULL
GROUP BY c.id
ORDER BY c.id;

-- name: lock
-- Channels that nobody else holds. The trigger takes the same lock before it numbers a message.
SELECT id::bigint FROM chat_channels
WHERE id = ANY (%s::bigint[])
ORDER BY id
FOR NO KEY UPDATE SKIP LOCKED;

-- name: number
-- Numbers a channel's messages by time, then by id. Messages without a time come first, and the
-- channel's oldest time keeps them there. The author is who of the channel's two people has the
-- message's sender_id, or the address that was noted.
WITH placed AS (
    SELECT p.*,
           coalesce(latest.seq, 0)
           + row_number() OVER (PARTITION BY p.channel_id ORDER BY p.sent_at NULLS FIRST, p.id)
           AS seq,
           min(p.sent_at) OVER (PARTITION BY p.channel_id) AS oldest
    FROM (
        SELECT m.id, m.channel_id, m.@sent_at@ AS sent_at, m.sender_id, m.author_email
        FROM chat_messages m
        WHERE m.channel_id = ANY (%(channels)s::bigint[]) AND m.seq IS NULL
        ORDER BY m.channel_id, m.@sent_at@ NULLS FIRST, m.id
        LIMIT %(limit)s
    ) p
    LEFT JOIN LATERAL (
        SELECT max(m.seq) AS seq FROM chat_messages m
        WHERE m.channel_id = p.channel_id AND m.seq IS NOT NULL
    ) latest ON true
),
person AS (
    SELECT c.id AS channel_id, p.user_id, p.email, p.first_name, p.last_name,
           concat_ws(' ', nullif(p.first_name, ''), nullif(p.last_name, '')) AS name
    FROM chat_channels c
    LEFT JOIN therapists t ON t.id = c.therapist_id
    CROSS JOIN LATERAL unnest(ARRAY[c.prospect_user_id::bigint, t.user_id::bigint]) AS one
    CROSS JOIN LATERAL chat_people(NULL, one) p
    WHERE c.id = ANY (%(channels)s::bigint[])
),
written AS (
    SELECT DISTINCT ON (placed.id) placed.id AS row_id, person.*
    FROM placed JOIN person ON person.channel_id = placed.channel_id
    WHERE CASE WHEN placed.sender_id IS NULL
               THEN lower(@email_of_person@) = lower(placed.author_email::text)
               ELSE person.user_id = placed.sender_id END
)
UPDATE chat_messages m SET
    seq = placed.seq,
    message_id = coalesce(m.message_id, @old_message_id@),
    @sent_at@ = coalesce(m.@sent_at@, placed.oldest, @channel_created_at@, @now@),
    sender_id = coalesce(m.sender_id, author.user_id),
    author_email = coalesce(m.author_email, @their_author_email@),
    author_name = coalesce(m.author_name, @their_author_name@),
    author_first_name = CASE WHEN m.author_name IS NULL THEN author.first_name END,
    author_last_name = CASE WHEN m.author_name IS NULL THEN author.last_name END
FROM placed
JOIN chat_channels c ON c.id = placed.channel_id
LEFT JOIN written author ON author.row_id = placed.id
WHERE m.id = placed.id;

-- name: finish
-- Gives a channel whose messages are numbered its newest number: from now on the trigger numbers.
UPDATE chat_channels c SET
    last_seq = coalesce(newest.seq, 0),
    last_message_at = coalesce(c.last_message_at, @newest_sent_at@),
    last_message_preview = coalesce(c.last_message_preview, left(newest.content, @preview_length@))
FROM chat_channels same
LEFT JOIN LATERAL (
    SELECT m.seq, m.@sent_at@ AS sent_at, m.content FROM chat_messages m
    WHERE m.channel_id = same.id AND m.seq IS NOT NULL
    ORDER BY m.seq DESC LIMIT 1
) newest ON true
WHERE same.id = c.id AND c.id = ANY (%s::bigint[]);
