-- Sets the unread count of one of a channel's two people to 0.
CREATE FUNCTION chat_mark_read(of_channel_id bigint, as_therapist boolean)
RETURNS void
LANGUAGE sql VOLATILE AS $$
    UPDATE chat_channels c
    SET @therapist_unread@ = CASE WHEN as_therapist THEN 0 ELSE c.@therapist_unread@ END,
        @prospect_unread@ = CASE WHEN as_therapist THEN c.@prospect_unread@ ELSE 0 END
    WHERE c.id = of_channel_id
      AND CASE WHEN as_therapist THEN c.@therapist_unread@ ELSE c.@prospect_unread@ END > 0
$$;
