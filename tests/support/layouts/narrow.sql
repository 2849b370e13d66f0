-- Columns that are shorter than what is put into them: a preview of 50 characters, an author's name
-- of 12 and e-mail address of 15, and names for channels of 20.
CREATE TABLE employers (id serial PRIMARY KEY, is_active boolean NOT NULL DEFAULT true);
CREATE TABLE users (
  id serial PRIMARY KEY, clerk_id varchar(64) UNIQUE, email varchar(120), first_name varchar(60),
  last_name varchar(60), is_active boolean NOT NULL DEFAULT true,
  employer_id integer REFERENCES employers, subscription_status varchar(20));
CREATE TABLE therapists (
  id serial PRIMARY KEY, user_id integer NOT NULL REFERENCES users, name varchar(40), title char(5));
CREATE TABLE chat_channels (
  id serial PRIMARY KEY, channel_identifier varchar(32) NOT NULL UNIQUE,
  therapist_id integer NOT NULL REFERENCES therapists,
  prospect_user_id integer NOT NULL REFERENCES users, status varchar(8) NOT NULL DEFAULT 'active',
  channel_name varchar(20), last_message_preview varchar(50),
  created_at timestamp(0) NOT NULL DEFAULT now(), updated_at timestamp(0) NOT NULL DEFAULT now(),
  last_message_at timestamp(3));
CREATE TABLE chat_messages (
  id serial PRIMARY KEY, channel_id integer NOT NULL REFERENCES chat_channels ON DELETE CASCADE,
  author_email varchar(15), author_name varchar(12), content varchar(10000) NOT NULL,
  message_type varchar(8), status char(4), created_at timestamp(3) NOT NULL DEFAULT now());

INSERT INTO employers VALUES (1);
INSERT INTO users (id, clerk_id, email, first_name, last_name, is_active, employer_id, subscription_status) VALUES
  (1, 'user_tess', 'tess@example.com', 'Tess', 'Ott', true, NULL, NULL),
  (2, 'user_pia', 'pia@example.com', 'Pia-Maria Antonia', 'Lund-Osterhausen', true, NULL, 'active'),
  (3, 'user_nona', NULL, NULL, NULL, true, NULL, 'active'),
  (4, 'user_gone', 'gone@example.com', 'Gus', 'Orr', false, NULL, 'active'),
  (5, 'user_lapsed', 'lapsed@example.com', 'Lana', 'Moss', true, NULL, 'canceled'),
  (6, 'user_sue', 'sue@example.com', 'Sue', 'Acme', true, 1, NULL),
  (7, 'user_lee', 'lee@example.com', 'Lee', 'Roe', true, NULL, NULL),
  (8, 'user_nele', 'nele@example.com', 'Nele', 'Voss', true, NULL, 'active'),
  (9, 'user_bo', 'bo@example.com', 'Bo', 'Lock', true, NULL, 'active'),
  (10, 'user_ari', 'ari@example.com', 'Ari', 'Kive', true, NULL, 'active');
INSERT INTO therapists (id, user_id, name, title) VALUES
  (11, 1, 'Dr Tess Ott', 'PhD'), (12, 7, 'Lee Roe', NULL);
INSERT INTO chat_channels (id, channel_identifier, therapist_id, prospect_user_id, status) VALUES
  (1, 'old-1', 11, 2, 'active'), (2, 'old-2', 11, 3, 'active'), (3, 'old-3', 11, 9, 'blocked'),
  (4, 'old-4', 11, 10, 'archived'), (5, 'old-5', 11, 4, 'active'), (6, 'old-6', 12, 2, 'active'),
  (7, 'old-7', 11, 6, 'active'), (8, 'old-8', 11, 5, 'active');
INSERT INTO chat_messages (channel_id, author_email, author_name, content, created_at) VALUES
  (1, 'pia@example.com', 'Pia-Maria An', 'old 1', '2024-02-02 00:00:00'),
  (1, 'TESS@EXAMPLE.CO', 'Tess Ott', 'old 2', '2024-02-03 04:05:06'),
  (1, 'pia@example.com', 'Pia-Maria An', 'old 3', '2024-02-03 04:05:06'),
  (1, 'tess@example.co', 'Tess Before', 'old 4', '2024-02-04 00:00:00'),
  (2, NULL, NULL, 'old 1', '2024-02-03 04:05:06'),
  (3, 'bo@example.com', 'Bo Lock', 'old 1', '2024-02-03 04:05:06'),
  (4, 'ari@example.com', 'Ari Kive', 'old 1', '2024-02-03 04:05:06'),
  (4, 'tess@example.co', 'Tess Ott', 'old 2', '2024-02-03 04:05:07'),
  (6, 'lee@example.com', 'Lee Roe', 'old 1', '2024-02-03 04:05:06');
SELECT setval('users_id_seq', 100), setval('therapists_id_seq', 100),
  setval('chat_channels_id_seq', 100);
