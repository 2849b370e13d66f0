-- Stores a batch of messages: number, insert, count, preview, audit; one round trip, one commit.
--
-- Each statement of the function sees what was committed before it began (READ COMMITTED,
-- VOLATILE), so the second one sees every message of the channels that the first has locked.
-- Locks are taken in id order, and only where they can be had at once: a channel that somebody
-- else holds is reported as busy and does not hold up the others.
--
-- outcome: stored, duplicate (the first message with this id), conflict (the id was used for
-- other words), busy (try again), gone (no such channel), blocked or archived (the channel takes
-- no new messages).
-- ts: strictly rising with seq on a channel, so that a reader who sorts by it sees our order;
-- a clock that was far ahead once (over a minute) is not followed.
CREATE FUNCTION chat_append(items json)
RETURNS TABLE (
    ord integer, outcome text, seq bigint, id bigint, message_id uuid, ts bigint,
    author_email text, author_name text, first_name text, last_name text
)
LANGUAGE plpgsql VOLATILE AS $$
#variable_conflict use_column
DECLARE
    locked bigint[];
    closed bigint[];
    clock timestamptz;
BEGIN
    SELECT coalesce(array_agg(held.id), '{}'), array_agg(held.id) FILTER (WHERE held.is_closed)
    INTO locked, closed FROM (
        SELECT c.id::bigint, lower(c.status::text) IN ('blocked', 'archived') AS is_closed
        FROM chat_channels c
        WHERE c.id IN (SELECT (item ->> 'channel_id')::bigint FROM json_array_elements(items) item)
        ORDER BY c.id
        FOR NO KEY UPDATE SKIP LOCKED
    ) held;

    -- Read once, under the locks: a plan may ask within a query for each row anew.
    clock := date_trunc('milliseconds', clock_timestamp());

    RETURN QUERY
    WITH asked AS (
        SELECT i.*, i.channel_id = ANY (locked) AS is_locked,
               coalesce(i.channel_id = ANY (closed), false) AS is_closed,
               first_value(i.ord) OVER same AS first_ord,
               first_value(i.content) OVER same AS first_content
        FROM json_to_recordset(items) AS i(
            ord integer, channel_id bigint, message_id uuid, client_message_id uuid,
            sender_id bigint, by_therapist boolean, author_email text, author_name text,
            first_name text, last_name text, content text, message_type text,
            actor text, impersonator text, address inet, request_id text)
        WINDOW same AS (
            PARTITION BY i.channel_id, i.sender_id, coalesce(i.client_message_id, i.message_id)
            ORDER BY i.ord)
    ),
    known AS (
        SELECT DISTINCT ON (k.ord) k.* FROM (
            SELECT a.ord, m.id::bigint, m.seq, m.message_id, m.@sent_at@ AS sent_at,
                   m.author_email::text, m.author_name::text,
                   m.author_first_name, m.author_last_name,
                   m.content::text, coalesce(upper(m.message_type::text), 'STANDARD') AS message_type
            FROM asked a JOIN chat_messages m
              ON m.channel_id = a.channel_id AND m.sender_id = a.sender_id
             AND m.client_message_id = a.client_message_id
            WHERE a.is_locked
            UNION ALL
            SELECT a.ord, m.id::bigint, m.seq, m.message_id, m.@sent_at@ AS sent_at,
                   m.author_email::text, m.author_name::text,
                   m.author_first_name, m.author_last_name,
                   m.content::text, coalesce(upper(m.message_type::text), 'STANDARD') AS message_type
            FROM asked a JOIN chat_messages m ON m.message_id = a.message_id
            WHERE a.is_locked
        ) k
    ),
    fresh AS (
        SELECT a.*, c.last_seq + row_number() OVER turn AS seq,
               CASE WHEN @last_message_at@ > clock + interval '1 minute' THEN clock
                    ELSE greatest(clock, @last_message_at@ + interval '1 millisecond')
               END + (row_number() OVER turn - 1) * interval '1 millisecond' AS stored_at
        FROM asked a
        JOIN chat_channels c ON c.id = a.channel_id
        WHERE a.is_locked AND a.ord = a.first_ord AND NOT a.is_closed
          AND NOT EXISTS (SELECT FROM known k WHERE k.ord = a.ord)
        WINDOW turn AS (PARTITION BY a.channel_id ORDER BY a.ord)
    ),
    inserted AS (
        INSERT INTO chat_messages (
            channel_id, seq, message_id, client_message_id, sender_id, author_email, author_name,
            author_first_name, author_last_name, content, message_type, status@more_columns@)
        SELECT f.channel_id, f.seq, f.message_id, f.client_message_id, f.sender_id,
               @author_email@, @author_name@, f.first_name, f.last_name, f.content,
               @message_type@, @sent@@more_values@
        FROM fresh f ORDER BY f.channel_id, f.seq
        RETURNING chat_messages.id::bigint, chat_messages.message_id
    ),
    bumped AS (
        UPDATE chat_channels c
        SET last_seq = n.top, last_message_at = @new_last_message_at@,
            updated_at = @new_updated_at@, last_message_preview = n.preview,
            @therapist_unread@ = coalesce(c.@therapist_unread@, 0) + n.for_therapist,
            @prospect_unread@ = coalesce(c.@prospect_unread@, 0) + n.for_prospect
        FROM (
            SELECT f.channel_id, max(f.seq) AS top, max(f.stored_at) AS at,
                   (array_agg(left(f.content, @preview_length@) ORDER BY f.seq DESC))[1] AS preview,
                   count(*) FILTER (WHERE NOT f.by_therapist) AS for_therapist,
                   count(*) FILTER (WHERE f.by_therapist) AS for_prospect
            FROM fresh f GROUP BY f.channel_id
        ) n
        WHERE c.id = n.channel_id
    ),
    audited AS (
        INSERT INTO chat_audit (
            actor, impersonator, user_id, action, channel_id, outcome, address, request_id)
        SELECT a.actor, a.impersonator, a.sender_id, 'message_sent', a.channel_id, 'ok',
               a.address, a.request_id
        FROM fresh a
    )
    SELECT a.ord,
           CASE WHEN NOT a.is_locked THEN
                     CASE WHEN EXISTS (SELECT FROM chat_channels c WHERE c.id = a.channel_id)
                          THEN 'busy' ELSE 'gone' END
                WHEN k.ord IS NOT NULL THEN
                     CASE WHEN k.content = a.content AND k.message_type = a.message_type
                          THEN 'duplicate' ELSE 'conflict' END
                WHEN a.is_closed THEN
                     (SELECT lower(c.status::text) FROM chat_channels c WHERE c.id = a.channel_id)
                WHEN a.ord <> a.first_ord THEN
                     CASE WHEN a.first_content = a.content THEN 'duplicate' ELSE 'conflict' END
                ELSE 'stored' END,
           coalesce(k.seq, f.seq), coalesce(k.id, n.id), coalesce(k.message_id, f.message_id),
           (extract(epoch FROM coalesce(@known_sent_at@, f.stored_at)) * 1000)::bigint,
           -- As chat_history has them.
           CASE WHEN k.ord IS NULL THEN coalesce(@author_email@, '')
                ELSE coalesce(k.author_email, '') END,
           CASE WHEN k.ord IS NULL THEN concat_ws(' ', nullif(f.first_name, ''),
                                                  nullif(f.last_name, ''))
                WHEN k.author_first_name IS NULL THEN coalesce(k.author_name, '')
                ELSE concat_ws(' ', nullif(k.author_first_name, ''),
                               nullif(k.author_last_name, '')) END,
           CASE WHEN k.ord IS NULL THEN f.first_name
                ELSE coalesce(k.author_first_name, split_part(k.author_name, ' ', 1), '') END,
           CASE WHEN k.ord IS NULL THEN f.last_name
                ELSE coalesce(k.author_last_name,
                     substr(k.author_name, nullif(strpos(k.author_name, ' '), 0) + 1), '') END
    FROM asked a
    LEFT JOIN known k ON k.ord = a.ord
    LEFT JOIN fresh f ON f.ord = a.first_ord
    LEFT JOIN inserted n ON n.message_id = f.message_id
    ORDER BY a.ord;
END $$;
