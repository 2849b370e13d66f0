-- What a list says of one channel, whatever columns hold it. Inlined by the planner.
-- last_message_ms: milliseconds since the epoch.
CREATE FUNCTION chat_channel(of_channel_id bigint)
RETURNS TABLE (
    id bigint, identifier text, therapist_id bigint, prospect_user_id bigint, status text,
    last_message_ms bigint, last_message_preview text,
    therapist_unread integer, prospect_unread integer, channel_name text
)
LANGUAGE sql STABLE ROWS 1 AS $$
    SELECT c.id::bigint, coalesce(c.@identifier@::text, ''), c.therapist_id::bigint,
           c.prospect_user_id::bigint, lower(coalesce(c.status::text, 'active')),
           (extract(epoch FROM c.last_message_at) * 1000)::bigint, c.last_message_preview::text,
           coalesce(c.@therapist_unread@, 0)::integer, coalesce(c.@prospect_unread@, 0)::integer, c.channel_name::text
    FROM chat_channels c
    WHERE c.id = of_channel_id
$$;
