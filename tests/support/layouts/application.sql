-- The other layout: that of the application's own migrations, as its ORM makes it.
CREATE TYPE user_role AS ENUM ('client', 'therapist', 'admin');
CREATE TYPE chat_channel_status AS ENUM ('active', 'archived', 'blocked');
CREATE TYPE message_status AS ENUM ('sent', 'delivered', 'read', 'failed');

CREATE TABLE employers (
  id serial PRIMARY KEY, name varchar(255), is_active boolean);
CREATE TABLE users (
  id serial PRIMARY KEY, clerk_id varchar(255) UNIQUE NOT NULL, email varchar(255) UNIQUE NOT NULL,
  first_name text, last_name text, role user_role, is_active boolean NOT NULL,
  employer_id integer, subscription_status varchar(50), stripe_subscription_id varchar(255),
  subscription_end_date timestamp, cancel_at_period_end boolean);
CREATE TABLE sponsored_groups (
  id serial PRIMARY KEY, employer_id integer REFERENCES employers(id), name varchar(255),
  is_active boolean NOT NULL DEFAULT true, created_at timestamp NOT NULL DEFAULT now());
CREATE TABLE sponsored_group_members (
  id serial PRIMARY KEY, user_id integer NOT NULL REFERENCES users(id) ON DELETE CASCADE,
  group_id integer NOT NULL REFERENCES sponsored_groups(id) ON DELETE CASCADE,
  is_active boolean NOT NULL DEFAULT true, joined_at timestamp NOT NULL DEFAULT now());
CREATE TABLE therapists (
  id serial PRIMARY KEY,
  user_id integer NOT NULL UNIQUE REFERENCES users(id) ON DELETE CASCADE,
  name varchar(255) NOT NULL, title varchar(255), bio text, license_number varchar(100),
  languages text[] NOT NULL DEFAULT '{}', session_fee integer NOT NULL DEFAULT 0,
  accepts_new_clients boolean NOT NULL DEFAULT true, time_zone varchar(64) NOT NULL DEFAULT 'UTC',
  profile jsonb NOT NULL DEFAULT '{}', created_at timestamp NOT NULL DEFAULT now(),
  updated_at timestamp NOT NULL DEFAULT now(), deleted_at timestamp);

CREATE TABLE chat_channels (
  id serial PRIMARY KEY, chime_channel_arn varchar(500) NOT NULL UNIQUE,
  therapist_id integer NOT NULL REFERENCES therapists(id) ON DELETE CASCADE,
  prospect_user_id integer NOT NULL REFERENCES users(id) ON DELETE CASCADE,
  status chat_channel_status NOT NULL, last_message_at timestamp, last_message_preview text,
  unread_count_therapist integer NOT NULL DEFAULT 0,
  unread_count_prospect integer NOT NULL DEFAULT 0,
  metadata jsonb, created_at timestamp NOT NULL, updated_at timestamp NOT NULL,
  UNIQUE (therapist_id, prospect_user_id));
CREATE TABLE chat_messages (
  id serial PRIMARY KEY,
  channel_id integer NOT NULL REFERENCES chat_channels(id) ON DELETE CASCADE,
  chime_message_id varchar(255) NOT NULL UNIQUE,
  sender_id integer NOT NULL REFERENCES users(id) ON DELETE CASCADE,
  content text, message_type varchar(50) DEFAULT 'STANDARD',
  status message_status DEFAULT 'sent', read_by_therapist_at timestamp,
  read_by_prospect_at timestamp, metadata jsonb, sent_at timestamp NOT NULL,
  created_at timestamp NOT NULL);
CREATE INDEX chat_messages_channel_sent ON chat_messages (channel_id, sent_at);

INSERT INTO employers (id, name, is_active) VALUES (1, 'Acme', true), (2, 'Past', false);
INSERT INTO users (id, clerk_id, email, first_name, last_name, role, is_active, employer_id, subscription_status) VALUES
  (1, 'user_tess', 'tess@example.com', 'Tess', 'Ott', 'therapist', true, NULL, NULL),
  (2, 'user_pia', 'pia@example.com', 'Pia', 'Lund', 'client', true, NULL, 'active'),
  (3, 'user_nona', '', NULL, NULL, NULL, true, NULL, 'active'),
  (4, 'user_gone', 'gone@example.com', 'Gus', 'Orr', 'client', false, NULL, 'active'),
  (5, 'user_lapsed', 'lapsed@example.com', 'Lana', 'Moss', 'client', true, NULL, 'canceled'),
  (6, 'user_sue', 'sue@example.com', 'Sue', 'Acme', 'client', true, 1, NULL),
  (7, 'user_lee', 'lee@example.com', 'Lee', 'Roe', 'therapist', true, NULL, NULL),
  (8, 'user_nele', 'nele@example.com', 'Nele', 'Voss', 'client', true, NULL, 'active'),
  (9, 'user_bo', 'bo@example.com', 'Bo', 'Lock', 'client', true, NULL, 'active'),
  (10, 'user_ari', 'ari@example.com', 'Ari', 'Kive', 'client', true, NULL, 'active');
-- The membership counts, not the employer's own state: one group is ended, and one member has left.
INSERT INTO sponsored_groups (id, employer_id, name, is_active) VALUES
  (1, 1, 'All', true), (2, 1, 'Ended', false);
INSERT INTO sponsored_group_members (user_id, group_id, is_active) VALUES
  (6, 1, true), (5, 2, true), (5, 1, false);
INSERT INTO therapists (id, user_id, name, title, deleted_at) VALUES
  (11, 1, 'Dr Tess Ott', 'PhD', NULL), (12, 7, 'Lee Roe', NULL, '2024-06-01');
INSERT INTO chat_channels (id, chime_channel_arn, therapist_id, prospect_user_id, status, last_message_at, last_message_preview, unread_count_therapist, unread_count_prospect, created_at, updated_at) VALUES
  (1, 'arn:old-1', 11, 2, 'active', '2024-02-04 00:00:00', 'old 4', 2, 1, '2024-02-01', '2024-02-04'),
  (2, 'arn:old-2', 11, 3, 'active', '2024-02-03 04:05:06', 'old 1', 1, 0, '2024-02-01', '2024-02-03'),
  (3, 'arn:old-3', 11, 9, 'blocked', '2024-02-03 04:05:06', 'old 1', 0, 0, '2024-02-01', '2024-02-03'),
  (4, 'arn:old-4', 11, 10, 'archived', '2024-02-03 04:05:07', 'old 2', 0, 0, '2024-02-01', '2024-02-03'),
  (5, 'arn:old-5', 11, 4, 'active', NULL, NULL, 0, 0, '2024-02-01', '2024-02-01'),
  (6, 'arn:old-6', 12, 2, 'active', '2024-02-03 04:05:06', 'old 1', 0, 0, '2024-02-01', '2024-02-03'),
  (7, 'arn:old-7', 11, 6, 'active', NULL, NULL, 0, 0, '2024-02-01', '2024-02-01'),
  (8, 'arn:old-8', 11, 5, 'active', NULL, NULL, 0, 0, '2024-02-01', '2024-02-01');
-- created_at is when the row was stored, which is not the order in which they were sent.
INSERT INTO chat_messages (id, channel_id, chime_message_id, sender_id, content, status, sent_at, created_at) VALUES
  (1, 1, 'chime-1', 1, 'old 2', 'read', '2024-02-03 04:05:06', '2024-02-03 04:05:09'),
  (2, 1, 'chime-2', 2, 'old 3', 'delivered', '2024-02-03 04:05:06', '2024-02-03 04:05:08'),
  (3, 1, '5f0c0b1e-93d7-4b54-8d3f-1e1b5a9c0001', 1, 'old 4', 'sent', '2024-02-04 00:00:00', '2024-02-04 00:00:00'),
  (4, 1, 'chime-4', 2, 'old 1', NULL, '2024-02-02 00:00:00', '2024-02-05 00:00:00'),
  (5, 2, 'chime-5', 3, 'old 1', 'sent', '2024-02-03 04:05:06', '2024-02-03 04:05:06'),
  (6, 3, 'chime-6', 9, 'old 1', 'failed', '2024-02-03 04:05:06', '2024-02-03 04:05:06'),
  (7, 4, 'chime-7', 10, 'old 1', 'sent', '2024-02-03 04:05:06', '2024-02-03 04:05:06'),
  (8, 4, 'chime-8', 1, 'old 2', 'sent', '2024-02-03 04:05:07', '2024-02-03 04:05:07'),
  (9, 6, 'chime-9', 7, 'old 1', 'sent', '2024-02-03 04:05:06', '2024-02-03 04:05:06');
SELECT setval('users_id_seq', 100), setval('therapists_id_seq', 100),
  setval('chat_channels_id_seq', 100), setval('chat_messages_id_seq', 100);
