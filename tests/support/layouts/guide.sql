-- The two chat tables of the deployment guide, literally; users, therapists and employers as small
-- as they may be.
CREATE TABLE employers (id SERIAL PRIMARY KEY);
CREATE TABLE users (
  id SERIAL PRIMARY KEY, clerk_id VARCHAR, email VARCHAR, first_name VARCHAR, last_name VARCHAR,
  is_active BOOLEAN, subscription_status VARCHAR);
CREATE TABLE therapists (id SERIAL PRIMARY KEY, user_id INTEGER);

CREATE TABLE chat_channels (
  id SERIAL PRIMARY KEY, channel_identifier VARCHAR UNIQUE NOT NULL,
  therapist_id INTEGER NOT NULL, prospect_user_id INTEGER NOT NULL,
  status VARCHAR DEFAULT 'active', created_at TIMESTAMP DEFAULT NOW(), updated_at TIMESTAMP DEFAULT NOW(),
  last_message_at TIMESTAMP,
  FOREIGN KEY (therapist_id) REFERENCES therapists(id), FOREIGN KEY (prospect_user_id) REFERENCES users(id));
CREATE TABLE chat_messages (
  id SERIAL PRIMARY KEY, channel_id INTEGER NOT NULL, author_email VARCHAR NOT NULL, author_name VARCHAR NOT NULL,
  content TEXT NOT NULL, created_at TIMESTAMP DEFAULT NOW(),
  FOREIGN KEY (channel_id) REFERENCES chat_channels(id) ON DELETE CASCADE);

INSERT INTO users (id, clerk_id, email, first_name, last_name, is_active, subscription_status) VALUES
  (1, 'user_tess', 'tess@example.com', 'Tess', 'Ott', true, NULL),
  (2, 'user_pia', 'pia@example.com', 'Pia', 'Lund', true, 'active'),
  (3, 'user_nona', NULL, NULL, NULL, true, 'active'),
  (4, 'user_gone', 'gone@example.com', 'Gus', 'Orr', false, 'active'),
  (5, 'user_lapsed', 'lapsed@example.com', 'Lana', 'Moss', true, 'canceled'),
  (7, 'user_lee', 'lee@example.com', 'Lee', 'Roe', true, NULL),
  (8, 'user_nele', 'nele@example.com', 'Nele', 'Voss', true, 'active'),
  (9, 'user_bo', 'bo@example.com', 'Bo', 'Lock', true, 'active'),
  (10, 'user_ari', 'ari@example.com', 'Ari', 'Kive', true, 'active');
INSERT INTO therapists (id, user_id) VALUES (11, 1), (12, 7);
INSERT INTO chat_channels (id, channel_identifier, therapist_id, prospect_user_id, status) VALUES
  (1, 'old-1', 11, 2, 'active'), (2, 'old-2', 11, 3, NULL), (3, 'old-3', 11, 9, 'blocked'),
  (4, 'old-4', 11, 10, 'archived'), (5, 'old-5', 11, 4, 'active'), (6, 'old-6', 12, 2, 'active'),
  (8, 'old-8', 11, 5, 'active');
-- Two of one time, and one without any.
INSERT INTO chat_messages (id, channel_id, author_email, author_name, content, created_at) VALUES
  (1, 1, 'TESS@example.com', 'Tess Ott', 'old 2', '2024-02-03 04:05:06'),
  (2, 1, 'pia@example.com', 'Pia Lund', 'old 3', '2024-02-03 04:05:06'),
  (3, 1, 'tess@example.com', 'Tess Before', 'old 4', '2024-02-04 00:00:00'),
  (4, 1, 'pia@example.com', 'Pia Lund', 'old 1', NULL),
  (5, 2, '', '', 'old 1', '2024-02-03 04:05:06'),
  (6, 3, 'bo@example.com', 'Bo Lock', 'old 1', '2024-02-03 04:05:06'),
  (7, 4, 'ari@example.com', 'Ari Kive', 'old 1', '2024-02-03 04:05:06'),
  (8, 4, 'tess@example.com', 'Tess Ott', 'old 2', '2024-02-03 04:05:07'),
  (9, 6, 'lee@example.com', 'Lee Roe', 'old 1', '2024-02-03 04:05:06');
SELECT setval('users_id_seq', 100), setval('therapists_id_seq', 100),
  setval('chat_channels_id_seq', 100), setval('chat_messages_id_seq', 100);
