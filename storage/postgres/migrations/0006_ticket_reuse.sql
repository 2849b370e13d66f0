-- A ticket opens streams of one channel: the one that it was used for first. NULL: not used yet.
-- From its first use on, expires_at is the end of its session's lease.

ALTER TABLE chat_tickets ADD COLUMN channel_id bigint;
