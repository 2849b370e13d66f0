-- A number per channel for every message, 1, 2, 3, …, and what sending and listing need.
-- Old rows are kept. An earlier deployment may have added some of the columns by hand.

-- At once and in full: the ALTERs below need it, and a lock that is raised later can deadlock.
-- No row may slip in without a number.
LOCK TABLE chat_channels, chat_messages IN ACCESS EXCLUSIVE MODE;

-- A foreign key that is checked at commit would forbid ALTER TABLE after UPDATE.
SET CONSTRAINTS ALL IMMEDIATE;

-- The server relies on one channel per pair. Merging two is for people to decide, so look first
-- and change nothing.
DO $$
DECLARE
    pairs bigint;
    channels text;
BEGIN
    SELECT count(*) INTO pairs FROM (
        SELECT FROM chat_channels GROUP BY therapist_id, prospect_user_id HAVING count(*) > 1
    ) AS twins;
    IF pairs > 0 THEN
        SELECT string_agg(id::text, ', ' ORDER BY place) INTO channels FROM (
            SELECT id, row_number() OVER (ORDER BY therapist_id, prospect_user_id, id) AS place
            FROM (
                SELECT id, therapist_id, prospect_user_id,
                    count(*) OVER (PARTITION BY therapist_id, prospect_user_id) AS members
                FROM chat_channels
            ) AS counted
            WHERE members > 1
        ) AS placed
        WHERE place <= 10;
        RAISE EXCEPTION USING ERRCODE = 'SV001', MESSAGE = format(
            'pairs of therapist and prospect with more than one channel: %s (channel ids, at '
            'most ten: %s); merge each pair''s channels into one, then migrate again',
            pairs, channels);
    END IF;
END
$$;

ALTER TABLE chat_channels
    ADD COLUMN IF NOT EXISTS last_seq bigint,
    ADD COLUMN IF NOT EXISTS therapist_unread integer,
    ADD COLUMN IF NOT EXISTS prospect_unread integer,
    ADD COLUMN IF NOT EXISTS last_message_preview text,
    ADD COLUMN IF NOT EXISTS channel_name text;

-- sender_id has no foreign key: users belongs to the main application, its id may be of another
-- integer type, and a message outlives its author's account.
ALTER TABLE chat_messages
    ADD COLUMN IF NOT EXISTS seq bigint,
    ADD COLUMN IF NOT EXISTS message_id uuid,
    ADD COLUMN IF NOT EXISTS sender_id bigint,
    ADD COLUMN IF NOT EXISTS client_message_id uuid,
    ADD COLUMN IF NOT EXISTS message_type text,
    ADD COLUMN IF NOT EXISTS status text;

-- Added by hand, they may be narrower, or UUIDs kept as text. Only where they differ: a change
-- of type writes the whole table.
DO $$
DECLARE
    name text;
    wanted regtype;
BEGIN
    FOR name, wanted IN VALUES
        ('seq', 'bigint'::regtype), ('sender_id', 'bigint'),
        ('message_id', 'uuid'), ('client_message_id', 'uuid')
    LOOP
        IF EXISTS (
            SELECT FROM pg_attribute
            WHERE attrelid = 'chat_messages'::regclass AND attname = name AND atttypid <> wanted
        ) THEN
            EXECUTE format(
                'ALTER TABLE chat_messages ALTER %I DROP DEFAULT, ALTER %I TYPE %s USING %I::%s',
                name, name, wanted, name, wanted);
        END IF;
    END LOOP;
END
$$;

-- Number the channels that are not 1, 2, 3, … already. Negative first: there may be a unique
-- index on (channel_id, seq), which looks at every row as it changes.
UPDATE chat_messages AS message SET seq = -numbered.seq
FROM (
    SELECT id, row_number() OVER (PARTITION BY channel_id ORDER BY created_at NULLS FIRST, id) AS seq
    FROM chat_messages
    WHERE channel_id IN (
        SELECT channel_id FROM chat_messages GROUP BY channel_id
        HAVING min(seq) <> 1 OR max(seq) <> count(*) OR count(DISTINCT seq) <> count(*)
    )
) AS numbered
WHERE message.id = numbered.id;

UPDATE chat_messages SET seq = -seq WHERE seq < 0;

UPDATE chat_messages SET
    message_id = coalesce(message_id, gen_random_uuid()),
    message_type = coalesce(message_type, 'STANDARD'),
    status = coalesce(status, 'SENT')
WHERE message_id IS NULL OR message_type IS NULL OR status IS NULL;

-- An address that two users share tells nothing about who wrote.
UPDATE chat_messages AS message SET sender_id = author.id
FROM (
    SELECT lower(email) AS email, min(id) AS id FROM users
    GROUP BY lower(email) HAVING count(*) = 1
) AS author
WHERE message.sender_id IS NULL AND lower(message.author_email) = author.email;

-- Messages without a time were numbered first: the channel's oldest time keeps them there.
UPDATE chat_messages AS message SET created_at = coalesce(known.oldest, channel.created_at, now())
FROM chat_channels AS channel,
    (SELECT channel_id, min(created_at) AS oldest FROM chat_messages GROUP BY channel_id) AS known
WHERE message.created_at IS NULL
    AND channel.id = message.channel_id AND known.channel_id = message.channel_id;

UPDATE chat_channels SET
    last_seq = 0,
    therapist_unread = coalesce(therapist_unread, 0),
    prospect_unread = coalesce(prospect_unread, 0);

UPDATE chat_channels AS channel SET
    last_seq = newest.seq,
    last_message_at = coalesce(channel.last_message_at, newest.created_at),
    last_message_preview = left(newest.content, 100)
FROM (
    SELECT DISTINCT ON (channel_id) channel_id, seq, created_at, content
    FROM chat_messages ORDER BY channel_id, seq DESC
) AS newest
WHERE channel.id = newest.channel_id;

ALTER TABLE chat_channels
    ALTER last_seq SET DEFAULT 0, ALTER last_seq SET NOT NULL,
    ALTER therapist_unread SET DEFAULT 0, ALTER therapist_unread SET NOT NULL,
    ALTER prospect_unread SET DEFAULT 0, ALTER prospect_unread SET NOT NULL,
    -- The server leaves these out of its INSERT, and the main application may set them itself.
    ALTER created_at SET DEFAULT now(),
    ALTER updated_at SET DEFAULT now(),
    ALTER status SET DEFAULT 'active';

ALTER TABLE chat_messages
    ALTER seq SET NOT NULL,
    ALTER message_id SET NOT NULL,
    ALTER message_type SET DEFAULT 'STANDARD', ALTER message_type SET NOT NULL,
    ALTER status SET DEFAULT 'SENT', ALTER status SET NOT NULL;

CREATE UNIQUE INDEX IF NOT EXISTS chat_messages_channel_seq ON chat_messages (channel_id, seq);
CREATE UNIQUE INDEX IF NOT EXISTS chat_messages_message_id ON chat_messages (message_id);
CREATE UNIQUE INDEX IF NOT EXISTS chat_messages_client_message_id
    ON chat_messages (channel_id, sender_id, client_message_id);
CREATE UNIQUE INDEX IF NOT EXISTS chat_channels_pair
    ON chat_channels (therapist_id, prospect_user_id);
CREATE INDEX IF NOT EXISTS chat_channels_prospect ON chat_channels (prospect_user_id);
