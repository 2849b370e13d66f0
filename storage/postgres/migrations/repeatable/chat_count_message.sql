-- Moves the channel on behind a message that chat_number_message has numbered. Where the unread
-- counts are the main application's columns, it counts for itself.
CREATE FUNCTION chat_count_message() RETURNS trigger
LANGUAGE plpgsql SECURITY DEFINER SET search_path = @search_path@ AS $$
BEGIN
    UPDATE chat_channels c SET
        last_seq = greatest(c.last_seq, NEW.seq),
        last_message_at = greatest(c.last_message_at, @new_sent_at@),
        last_message_preview = left(NEW.content, @preview_length@)@count_unread@
    WHERE c.id = NEW.channel_id;
    RETURN NULL;
END $$;
