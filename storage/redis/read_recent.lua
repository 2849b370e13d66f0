-- The newest messages of channels.
--
-- KEYS: each channel's sorted set.
--
-- Answers with the records of each, in order.
local answers = {}
for i, key in ipairs(KEYS) do
  answers[i] = redis.call('ZRANGE', key, 0, -1)
end
return answers
