-- Columns of the main application that must not be empty and have no default, in both tables:
-- refused by name, until they have one.
CREATE TABLE employers (id serial PRIMARY KEY, is_active boolean);
CREATE TABLE users (
  id serial PRIMARY KEY, tenant_id uuid NOT NULL, clerk_id text UNIQUE, email text,
  first_name text, last_name text, is_active boolean, employer_id integer,
  subscription_status text);
CREATE TABLE therapists (
  id serial PRIMARY KEY, tenant_id uuid NOT NULL, user_id integer NOT NULL, name text, title text);
CREATE TABLE chat_channels (
  id serial PRIMARY KEY, region text NOT NULL, channel_identifier text NOT NULL UNIQUE,
  therapist_id integer NOT NULL, prospect_user_id integer NOT NULL,
  status text NOT NULL DEFAULT 'active', created_at timestamptz, updated_at timestamptz,
  last_message_at timestamptz);
CREATE TABLE chat_messages (
  id serial PRIMARY KEY, tenant_id uuid NOT NULL,
  channel_id integer NOT NULL REFERENCES chat_channels ON DELETE CASCADE,
  author_email text, author_name text, content text, created_at timestamptz);

INSERT INTO employers VALUES (1, true);
INSERT INTO users (id, tenant_id, clerk_id, email, first_name, last_name, is_active, employer_id, subscription_status)
  SELECT id, gen_random_uuid(), 'user_' || name, email, first, last, active, employer, status
  FROM (VALUES
    (1, 'tess', 'tess@example.com', 'Tess', 'Ott', true, NULL, NULL),
    (2, 'pia', 'pia@example.com', 'Pia', 'Lund', true, NULL, 'active'),
    (3, 'nona', NULL, NULL, NULL, true, NULL, 'active'),
    (4, 'gone', 'gone@example.com', 'Gus', 'Orr', NULL, NULL, 'active'),
    (5, 'lapsed', 'lapsed@example.com', 'Lana', 'Moss', true, NULL, 'canceled'),
    (6, 'sue', 'sue@example.com', 'Sue', 'Acme', true, 1, NULL),
    (7, 'lee', 'lee@example.com', 'Lee', 'Roe', true, NULL, NULL),
    (8, 'nele', 'nele@example.com', 'Nele', 'Voss', true, NULL, 'active'),
    (9, 'bo', 'bo@example.com', 'Bo', 'Lock', true, NULL, 'active'),
    (10, 'ari', 'ari@example.com', 'Ari', 'Kive', true, NULL, 'active')
  ) AS people (id, name, email, first, last, active, employer, status);
INSERT INTO therapists (id, tenant_id, user_id, name, title) VALUES
  (11, gen_random_uuid(), 1, 'Dr Tess Ott', 'PhD'), (12, gen_random_uuid(), 7, 'Lee Roe', NULL);
INSERT INTO chat_channels (id, region, channel_identifier, therapist_id, prospect_user_id, status) VALUES
  (1, 'eu', 'old-1', 11, 2, 'active'), (2, 'eu', 'old-2', 11, 3, 'active'),
  (3, 'eu', 'old-3', 11, 9, 'blocked'), (4, 'eu', 'old-4', 11, 10, 'archived'),
  (5, 'eu', 'old-5', 11, 4, 'active'), (6, 'eu', 'old-6', 12, 2, 'active'),
  (7, 'eu', 'old-7', 11, 6, 'active'), (8, 'eu', 'old-8', 11, 5, 'active');
INSERT INTO chat_messages (tenant_id, channel_id, author_email, author_name, content, created_at)
  SELECT gen_random_uuid(), channel, email, name, content, at::timestamptz FROM (VALUES
    (1, 'pia@example.com', 'Pia Lund', 'old 1', NULL),
    (1, 'TESS@example.com', 'Tess Ott', 'old 2', '2024-02-03 04:05:06Z'),
    (1, 'pia@example.com', 'Pia Lund', 'old 3', '2024-02-03 04:05:06Z'),
    (1, 'tess@example.com', 'Tess Before', 'old 4', '2024-02-04 00:00:00Z'),
    (2, NULL, NULL, 'old 1', NULL),
    (3, 'bo@example.com', 'Bo Lock', 'old 1', '2024-02-03 04:05:06Z'),
    (4, 'ari@example.com', 'Ari Kive', 'old 1', '2024-02-03 04:05:06Z'),
    (4, 'tess@example.com', 'Tess Ott', 'old 2', '2024-02-03 04:05:07Z'),
    (6, 'lee@example.com', 'Lee Roe', 'old 1', '2024-02-03 04:05:06Z')
  ) AS old (channel, email, name, content, at);
SELECT setval('users_id_seq', 100), setval('therapists_id_seq', 100),
  setval('chat_channels_id_seq', 100);
