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

-- Forget numbers that are not 1, 2, 3, … on their channel, so that it is numbered anew.
ALTER TABLE chat_messages ALTER seq DROP NOT NULL;

UPDATE chat_messages SET seq = NULL
WHERE seq IS NOT NULL AND channel_id IN (
    SELECT channel_id FROM chat_messages GROUP BY channel_id
    HAVING min(seq) <> 1 OR max(seq) <> count(*) OR count(DISTINCT seq) <> count(*)
);

-- Everything in one pass: at a second one PostgreSQL would look up every row's foreign keys.
-- Messages without a time come first, and the channel's oldest time keeps them there. An address
-- that two users share tells nothing about who wrote.
UPDATE chat_messages AS message SET
    seq = coalesce(message.seq, told.place),
    message_id = coalesce(message.message_id, gen_random_uuid()),
    sender_id = coalesce(message.sender_id, told.author_id),
    message_type = coalesce(message.message_type, 'STANDARD'),
    status = coalesce(message.status, 'SENT'),
    created_at = coalesce(message.created_at, told.oldest, now())
FROM (
    SELECT old.id, author.id AS author_id,
        row_number() OVER (PARTITION BY channel_id ORDER BY old.created_at NULLS FIRST, old.id)
            AS place,
        coalesce(min(old.created_at) OVER (PARTITION BY channel_id), channel.created_at) AS oldest
    FROM chat_messages AS old
    JOIN chat_channels AS channel ON channel.id = channel_id
    LEFT JOIN (
        SELECT lower(email) AS email, min(id) AS id FROM users
        GROUP BY lower(email) HAVING count(*) = 1
    ) AS author ON author.email = lower(author_email)
) AS told
WHERE told.id = message.id AND (
    message.seq IS NULL OR message.message_id IS NULL OR message.message_type IS NULL
    OR message.status IS NULL OR message.created_at IS NULL
    OR message.sender_id IS NULL AND told.author_id IS NOT NULL
);

UPDATE chat_channels AS channel SET
    last_seq = coalesce(newest.seq, 0),
    therapist_unread = coalesce(channel.therapist_unread, 0),
    prospect_unread = coalesce(channel.prospect_unread, 0),
    last_message_at = coalesce(channel.last_message_at, newest.created_at),
    last_message_preview = left(newest.content, 100)
FROM chat_channels AS same
LEFT JOIN (
    SELECT DISTINCT ON (channel_id) channel_id, seq, created_at, content
    FROM chat_messages ORDER BY channel_id, seq DESC
) AS newest ON newest.channel_id = same.id
WHERE same.id = channel.id;

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
