-- Gives a number to a message that comes without one: the main application's own insert, before
-- the take-over, during it, and after a rollback. Our servers' messages bring their number, and
-- the triggers do not fire for them.
--
-- The number is chosen before the row is inserted, and the channel moves on only after it was: an
-- INSERT ... ON CONFLICT DO NOTHING that inserts nothing leaves no hole. The lock on the channel
-- is held until the transaction ends, so numbers become visible in their order.
--
-- SECURITY DEFINER: the main application's role needs no rights on our columns.
CREATE FUNCTION chat_number_message() RETURNS trigger
LANGUAGE plpgsql SECURITY DEFINER SET search_path = @search_path@ AS $$
DECLARE
    channel record;
    latest record;
    author record;
BEGIN
    NEW.is_adopted := true;
    SELECT c.last_seq, c.prospect_user_id,
           (SELECT t.user_id FROM therapists t WHERE t.id = c.therapist_id) AS therapist_user_id
    INTO channel FROM chat_channels c WHERE c.id = NEW.channel_id FOR NO KEY UPDATE OF c;
    IF NOT FOUND THEN
        RETURN NEW;  -- the foreign key refuses it
    END IF;
    NEW.message_id := coalesce(NEW.message_id, @new_message_id@);

    SELECT p.user_id, p.email, concat_ws(' ', nullif(p.first_name, ''), nullif(p.last_name, ''))
           AS name, p.first_name, p.last_name
    INTO author
    FROM unnest(ARRAY[channel.prospect_user_id::bigint, channel.therapist_user_id::bigint]) AS one
    CROSS JOIN LATERAL chat_people(NULL, one) p
    WHERE CASE WHEN NEW.sender_id IS NULL THEN lower(@email_of_p@) = lower(NEW.author_email::text)
               ELSE p.user_id = NEW.sender_id END
    LIMIT 1;
    IF FOUND THEN
        NEW.sender_id := coalesce(NEW.sender_id, author.user_id);
        NEW.author_email := coalesce(NEW.author_email, @their_author_email@);
        IF NEW.author_name IS NULL THEN
            NEW.author_name := @their_author_name@;
            NEW.author_first_name := author.first_name;
            NEW.author_last_name := author.last_name;
        END IF;
    END IF;

    NEW.@sent_at@ := coalesce(NEW.@sent_at@, @now@);
    IF channel.last_seq IS NULL THEN
        RETURN NEW;  -- `sottovoce migrate` has not come to this channel yet, and will number it
    END IF;
    SELECT m.seq, m.@sent_at@ AS sent_at INTO latest FROM chat_messages m
    WHERE m.channel_id = NEW.channel_id AND m.seq IS NOT NULL ORDER BY m.seq DESC LIMIT 1;
    NEW.seq := greatest(channel.last_seq, latest.seq) + 1;
    -- Readers sort by time. A message from further back keeps its time: it was imported.
    IF NEW.@sent_at@ <= latest.sent_at
        AND NEW.@sent_at@ > latest.sent_at - interval '1 minute' THEN
        NEW.@sent_at@ := latest.sent_at + interval '1 millisecond';
    END IF;
    RETURN NEW;
END $$;
