-- Enums wherever a word stands, in upper case for the channels and in mixed case for the messages;
-- a domain for e-mail addresses; an employer that sponsors unless it says otherwise.
CREATE TYPE role AS ENUM ('client', 'therapist');
CREATE TYPE subscription AS ENUM ('active', 'trialing', 'past_due', 'canceled');
CREATE TYPE channel_state AS ENUM ('ACTIVE', 'ARCHIVED', 'BLOCKED');
CREATE TYPE message_kind AS ENUM ('Standard', 'System');
CREATE TYPE message_state AS ENUM ('Sent', 'Read');
CREATE DOMAIN address AS varchar(200) CHECK (value LIKE '%@%');

CREATE TABLE employers (id bigint PRIMARY KEY, is_active boolean NOT NULL, sponsors_chat boolean);
CREATE TABLE users (
  id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY, clerk_id text NOT NULL UNIQUE, email address,
  first_name varchar(80), last_name varchar(80), role role NOT NULL, is_active boolean NOT NULL,
  employer_id bigint REFERENCES employers, subscription_status subscription);
CREATE TABLE therapists (
  id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY, user_id bigint NOT NULL REFERENCES users,
  name text, title text);
CREATE TABLE chat_channels (
  id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY, channel_identifier text NOT NULL UNIQUE,
  therapist_id bigint NOT NULL REFERENCES therapists,
  prospect_user_id bigint NOT NULL REFERENCES users,
  status channel_state NOT NULL DEFAULT 'ACTIVE', created_at timestamptz NOT NULL DEFAULT now(),
  updated_at timestamptz NOT NULL DEFAULT now(), last_message_at timestamptz);
CREATE TABLE chat_messages (
  id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
  channel_id bigint NOT NULL REFERENCES chat_channels ON DELETE CASCADE,
  author_email address, author_name text, content text NOT NULL,
  message_type message_kind NOT NULL DEFAULT 'Standard', status message_state NOT NULL DEFAULT 'Sent',
  created_at timestamptz NOT NULL DEFAULT now());

INSERT INTO employers VALUES (1, true, NULL), (2, true, false), (3, false, true);
INSERT INTO users (id, clerk_id, email, first_name, last_name, role, is_active, employer_id, subscription_status)
  OVERRIDING SYSTEM VALUE VALUES
  (1, 'user_tess', 'tess@example.com', 'Tess', 'Ott', 'therapist', true, NULL, NULL),
  (2, 'user_pia', 'pia@example.com', 'Pia', 'Lund', 'client', true, NULL, 'active'),
  (3, 'user_nona', NULL, NULL, NULL, 'client', true, NULL, 'active'),
  (4, 'user_gone', 'gone@example.com', 'Gus', 'Orr', 'client', false, NULL, 'active'),
  (5, 'user_lapsed', 'lapsed@example.com', 'Lana', 'Moss', 'client', true, 2, 'canceled'),
  (6, 'user_sue', 'sue@example.com', 'Sue', 'Acme', 'client', true, 1, NULL),
  (7, 'user_lee', 'lee@example.com', 'Lee', 'Roe', 'therapist', true, NULL, NULL),
  (8, 'user_nele', 'nele@example.com', 'Nele', 'Voss', 'client', true, NULL, 'active'),
  (9, 'user_bo', 'bo@example.com', 'Bo', 'Lock', 'client', true, NULL, 'active'),
  (10, 'user_ari', 'ari@example.com', 'Ari', 'Kive', 'client', true, NULL, 'active');
INSERT INTO therapists (id, user_id, name, title) OVERRIDING SYSTEM VALUE VALUES
  (11, 1, 'Dr Tess Ott', 'PhD'), (12, 7, 'Lee Roe', NULL);
INSERT INTO chat_channels (id, channel_identifier, therapist_id, prospect_user_id, status)
  OVERRIDING SYSTEM VALUE VALUES
  (1, 'old-1', 11, 2, 'ACTIVE'), (2, 'old-2', 11, 3, 'ACTIVE'), (3, 'old-3', 11, 9, 'BLOCKED'),
  (4, 'old-4', 11, 10, 'ARCHIVED'), (5, 'old-5', 11, 4, 'ACTIVE'), (6, 'old-6', 12, 2, 'ACTIVE'),
  (7, 'old-7', 11, 6, 'ACTIVE'), (8, 'old-8', 11, 5, 'ACTIVE');
INSERT INTO chat_messages (channel_id, author_email, author_name, content, created_at) VALUES
  (1, 'pia@example.com', 'Pia Lund', 'old 1', '2024-02-02 00:00:00Z'),
  (1, 'TESS@example.com', 'Tess Ott', 'old 2', '2024-02-03 04:05:06Z'),
  (1, 'pia@example.com', 'Pia Lund', 'old 3', '2024-02-03 04:05:06Z'),
  (1, 'tess@example.com', 'Tess Before', 'old 4', '2024-02-04 00:00:00Z'),
  (2, NULL, NULL, 'old 1', '2024-02-03 04:05:06Z'),
  (3, 'bo@example.com', 'Bo Lock', 'old 1', '2024-02-03 04:05:06Z'),
  (4, 'ari@example.com', 'Ari Kive', 'old 1', '2024-02-03 04:05:06Z'),
  (4, 'tess@example.com', 'Tess Ott', 'old 2', '2024-02-03 04:05:07Z'),
  (6, 'lee@example.com', 'Lee Roe', 'old 1', '2024-02-03 04:05:06Z');
SELECT setval(pg_get_serial_sequence('users', 'id'), 100),
  setval(pg_get_serial_sequence('therapists', 'id'), 100),
  setval(pg_get_serial_sequence('chat_channels', 'id'), 100);
