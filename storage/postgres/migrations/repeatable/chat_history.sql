-- The messages of one channel, whatever columns hold them. Inlined by the planner, like
-- chat_people: a caller's condition on seq and its ORDER BY use the index on (channel_id, seq).
--
-- Names are those that the author had when the message was sent. A message that the main
-- application stored has one name, which is divided at its first space.
-- ts: milliseconds since the epoch.
CREATE FUNCTION chat_history(of_channel_id bigint)
RETURNS TABLE (
    seq bigint, id bigint, message_id text, sender_id bigint, client_message_id text, content text,
    author_email text, author_name text, first_name text, last_name text, message_type text,
    status text, ts bigint
)
LANGUAGE sql STABLE AS $$
    SELECT m.seq, m.id::bigint, m.message_id::text, m.sender_id::bigint, m.client_message_id::text,
           coalesce(m.content::text, ''),
           coalesce(m.author_email::text, ''),
           -- The two parts are whole where the column for both was too short.
           CASE WHEN m.author_first_name IS NULL THEN coalesce(m.author_name::text, '')
                ELSE concat_ws(' ', nullif(m.author_first_name, ''), nullif(m.author_last_name, ''))
           END,
           coalesce(m.author_first_name, split_part(m.author_name::text, ' ', 1), ''),
           coalesce(m.author_last_name,
                    substr(m.author_name::text, nullif(strpos(m.author_name::text, ' '), 0) + 1), ''),
           coalesce(upper(m.message_type::text), 'STANDARD'),
           coalesce(upper(m.status::text), 'SENT'),
           (extract(epoch FROM m.@sent_at@) * 1000)::bigint
    FROM chat_messages m
    WHERE m.channel_id = of_channel_id
$$;
