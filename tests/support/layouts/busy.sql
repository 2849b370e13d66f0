-- Columns and triggers of the main application's own: updated_at kept by triggers, a counter and a
-- notification behind each message, a generated column, a check, and names that SQL must quote.
CREATE TABLE employers (id serial PRIMARY KEY, is_active boolean NOT NULL DEFAULT true);
CREATE TABLE users (
  id serial PRIMARY KEY, clerk_id text UNIQUE, email text, first_name text, last_name text,
  is_active boolean NOT NULL DEFAULT true, employer_id integer, subscription_status text,
  "fullName" text GENERATED ALWAYS AS (coalesce(first_name, '') || ' ' || coalesce(last_name, ''))
    STORED);
CREATE TABLE therapists (
  id serial PRIMARY KEY, user_id integer NOT NULL REFERENCES users, name text, title text,
  deleted_at timestamptz);
CREATE TABLE chat_channels (
  id serial PRIMARY KEY, channel_identifier text NOT NULL UNIQUE,
  therapist_id integer NOT NULL REFERENCES therapists DEFERRABLE INITIALLY DEFERRED,
  prospect_user_id integer NOT NULL REFERENCES users, status text NOT NULL DEFAULT 'active',
  created_at timestamptz NOT NULL DEFAULT now(), updated_at timestamptz NOT NULL DEFAULT now(),
  last_message_at timestamptz, message_count integer NOT NULL DEFAULT 0, "order" integer,
  labels text[] NOT NULL DEFAULT '{}');
CREATE TABLE chat_messages (
  id serial PRIMARY KEY,
  channel_id integer NOT NULL REFERENCES chat_channels ON DELETE CASCADE
    DEFERRABLE INITIALLY DEFERRED,
  author_email text, author_name text, content text NOT NULL CHECK (content <> ''),
  words tsvector GENERATED ALWAYS AS (to_tsvector('simple', content)) STORED,
  metadata jsonb NOT NULL DEFAULT '{}', created_at timestamptz NOT NULL DEFAULT now(),
  updated_at timestamptz NOT NULL DEFAULT now());
CREATE INDEX ON chat_messages USING gin (words);

CREATE FUNCTION set_updated_at() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
  NEW.updated_at = now();
  RETURN NEW;
END $$;
CREATE FUNCTION count_messages() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
  UPDATE chat_channels SET message_count = message_count + 1 WHERE id = NEW.channel_id;
  PERFORM pg_notify('messages', NEW.id::text);
  RETURN NULL;
END $$;
CREATE FUNCTION trim_content() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
  NEW.metadata = NEW.metadata || jsonb_build_object('length', length(NEW.content));
  RETURN NEW;
END $$;
CREATE TRIGGER set_updated_at BEFORE UPDATE ON chat_channels
  FOR EACH ROW EXECUTE FUNCTION set_updated_at();
CREATE TRIGGER set_updated_at BEFORE UPDATE ON chat_messages
  FOR EACH ROW EXECUTE FUNCTION set_updated_at();
CREATE TRIGGER a_first BEFORE INSERT ON chat_messages
  FOR EACH ROW EXECUTE FUNCTION trim_content();
CREATE TRIGGER count_messages AFTER INSERT ON chat_messages
  FOR EACH ROW EXECUTE FUNCTION count_messages();

INSERT INTO employers VALUES (1);
INSERT INTO users (id, clerk_id, email, first_name, last_name, is_active, employer_id, subscription_status) VALUES
  (1, 'user_tess', 'tess@example.com', 'Tess', 'Ott', true, NULL, NULL),
  (2, 'user_pia', 'pia@example.com', 'Pia', 'Lund', true, NULL, 'active'),
  (3, 'user_nona', NULL, NULL, NULL, true, NULL, 'active'),
  (4, 'user_gone', 'gone@example.com', 'Gus', 'Orr', false, NULL, 'active'),
  (5, 'user_lapsed', 'lapsed@example.com', 'Lana', 'Moss', true, NULL, 'canceled'),
  (6, 'user_sue', 'sue@example.com', 'Sue', 'Acme', true, 1, NULL),
  (7, 'user_lee', 'lee@example.com', 'Lee', 'Roe', true, NULL, NULL),
  (8, 'user_nele', 'nele@example.com', 'Nele', 'Voss', true, NULL, 'active'),
  (9, 'user_bo', 'bo@example.com', 'Bo', 'Lock', true, NULL, 'active'),
  (10, 'user_ari', 'ari@example.com', 'Ari', 'Kive', true, NULL, 'active');
INSERT INTO therapists (id, user_id, name, title, deleted_at) VALUES
  (11, 1, 'Dr Tess Ott', 'PhD', NULL), (12, 7, 'Lee Roe', NULL, '2024-06-01Z');
INSERT INTO chat_channels (id, channel_identifier, therapist_id, prospect_user_id, status) VALUES
  (1, 'old-1', 11, 2, 'active'), (2, 'old-2', 11, 3, 'active'), (3, 'old-3', 11, 9, 'blocked'),
  (4, 'old-4', 11, 10, 'archived'), (5, 'old-5', 11, 4, 'active'), (6, 'old-6', 12, 2, 'active'),
  (7, 'old-7', 11, 6, 'active'), (8, 'old-8', 11, 5, 'active');
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
SELECT setval('users_id_seq', 100), setval('therapists_id_seq', 100),
  setval('chat_channels_id_seq', 100);
