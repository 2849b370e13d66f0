-- Which past the messages' numbers belong to: 0, and another one after each restore of the
-- database to an earlier point, from which on numbers are given a second time. One row, which
-- `sottovoce restored` changes.

CREATE TABLE chat_epoch (
    -- As many digits as a cursor has room for.
    epoch bigint PRIMARY KEY CHECK (epoch BETWEEN 0 AND 9999999999)
);

CREATE UNIQUE INDEX chat_epoch_one_row ON chat_epoch ((true));

INSERT INTO chat_epoch (epoch) VALUES (0);
