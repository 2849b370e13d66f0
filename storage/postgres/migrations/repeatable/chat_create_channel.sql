-- The pair's channel, and whether it was made now. No row: somebody else made it meanwhile, and
-- asking again finds it.
CREATE FUNCTION chat_create_channel(
    of_therapist_id bigint, of_prospect_user_id bigint, of_identifier text, of_name text)
RETURNS TABLE (id bigint, made boolean)
LANGUAGE sql VOLATILE AS $$
    WITH made AS (
        INSERT INTO chat_channels (
            @identifiers@, therapist_id, prospect_user_id, status, channel_name,
            created_at, updated_at)
        VALUES (
            @identifier_values@, of_therapist_id, of_prospect_user_id, @active@, @channel_name@,
            @created_at@, @updated_at@)
        ON CONFLICT (therapist_id, prospect_user_id) DO NOTHING
        RETURNING chat_channels.id
    )
    SELECT made.id::bigint, true FROM made
    UNION ALL
    SELECT c.id::bigint, false FROM chat_channels c
    WHERE c.therapist_id = of_therapist_id AND c.prospect_user_id = of_prospect_user_id
    LIMIT 1
$$;
